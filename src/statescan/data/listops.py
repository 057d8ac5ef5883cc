"""ListOps: nested operations on digits, made by the rules of the Long Range Arena."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from statescan.data.labelled import LabelledSequences
from statescan.errors import ConfigError, DataError
from statescan.files import atomic_file

__all__ = ["LISTOPS_VOCABULARY", "ListOpsExample", "listops", "listops_splits", "read_listops", "solve_listops"]

_OPERATIONS = ("[MIN", "[MAX", "[MED", "[SM")
LISTOPS_VOCABULARY: tuple[str, ...] = ("<pad>", *(str(digit) for digit in range(10)), *_OPERATIONS, "]")
_ID = {token: index for index, token in enumerate(LISTOPS_VOCABULARY)}
# Examples that one stream of random numbers gives in `listops_splits`: whoever makes them, they are the same.
_SHARD = 1000
# Part of a kept file's name, raised when the rules are changed, so that no examples of older ones are taken for these.
_RULES = "v2"


class ListOpsExample(NamedTuple):
    """ids: (length,) uint8 into `LISTOPS_VOCABULARY`, 0 is padding; answer: the value, 0 to 9."""

    ids: np.ndarray
    answer: int


def _apply(operation: str, values: list[int]) -> int:
    if operation == "[MIN":
        return min(values)
    if operation == "[MAX":
        return max(values)
    if operation == "[SM":
        return sum(values) % 10
    ordered, half = sorted(values), len(values) // 2
    # the integer part of the median
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


def solve_listops(tokens: list[str]) -> int:
    """The value of an expression, read by a stack; apart from the generator, so that it can check it.

    Raises:
        ConfigError: the tokens are no complete expression.
    """
    stack: list[list] = [[]]
    for token in tokens:
        if token in _OPERATIONS:
            stack.append([token])
        elif token == "]" and len(stack) > 1 and len(stack[-1]) > 1:
            operation, *values = stack.pop()
            stack[-1].append(_apply(operation, values))
        elif token.isdigit():
            stack[-1].append(int(token))
        else:
            raise ConfigError(f"solve_listops: {token!r} does not fit where it stands; close only what was opened")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ConfigError("solve_listops: the tokens are no single complete expression; every [ needs its ]")
    return stack[0][0]


def listops(
    seed: int,
    *,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_arguments: int = 10,
    leaf_probability: float = 0.75,
) -> Iterator[ListOpsExample]:
    """Endless distinct examples: trees whose nodes are leaves with a probability, kept by their length.

    A tree's root is an operation of 2 to `max_arguments` arguments; each is a digit with `leaf_probability` or at the
    greatest depth, and an operation else: so operations nest ``max_depth - 1`` deep, nine in the Arena's data. Kept
    where ``min_length < length < max_length`` tokens, brackets included.

    Args:
        seed: of the examples; the same seed gives the same ones in the same order.
        min_length, max_length: bounds, neither is reached.
        max_depth: levels of a tree, the last of which has digits alone: at least 2.
        max_arguments: most arguments of an operation.
        leaf_probability: that an argument is a digit.

    Yields:
        `ListOpsExample`.

    Raises:
        ConfigError: a bound is out of range.

    Source: Tay et al. (2020), arXiv:2011.04006, appendix; Nangia and Bowman (2018), arXiv:1804.06028. Splits of 96,000,
    2,000 and 2,000 are taken from the front.
    """
    if not (0 <= min_length < max_length - 1 and max_depth >= 2 and max_arguments >= 2 and 0 < leaf_probability < 1):
        raise ConfigError(
            "listops: wanted 0 <= min_length < max_length - 1, max_depth >= 2, max_arguments >= 2 and a probability "
            f"within (0, 1), got {min_length}, {max_length}, {max_depth}, {max_arguments} and {leaf_probability}"
        )
    draw = random.Random(seed).random
    seen: set[bytes] = set()
    first_digit = _ID["0"]

    def grow(depth: int, ids: list[int]) -> int | None:
        """Appends a tree and gives its value; None where it has grown too long to be kept."""
        if depth > 1 and (depth >= max_depth or draw() < leaf_probability):
            digit = int(10 * draw())
            ids.append(first_digit + digit)
            return digit
        operation = _OPERATIONS[int(len(_OPERATIONS) * draw())]
        ids.append(_ID[operation])
        values = []
        for _ in range(2 + int((max_arguments - 1) * draw())):
            value = grow(depth + 1, ids)
            if value is None or len(ids) >= max_length:
                return None
            values.append(value)
        ids.append(_ID["]"])
        return _apply(operation, values)

    while True:
        ids: list[int] = []
        answer = grow(1, ids)
        if answer is None or not min_length < len(ids) < max_length:
            continue
        packed = np.asarray(ids, dtype=np.uint8)
        key = packed.tobytes()
        if key not in seen:
            seen.add(key)
            yield ListOpsExample(packed, answer)


def listops_splits(
    seed: int = 0,
    counts: tuple[int, int, int] = (96_000, 2_000, 2_000),
    *,
    workers: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    **rules: int | float,
) -> tuple[LabelledSequences, LabelledSequences, LabelledSequences]:
    """The Long Range Arena's task: examples for training, validation and test, all distinct.

    Args:
        seed: of the examples; what comes out depends on nothing else but the counts and the rules.
        counts: examples of each split.
        workers: processes that make them. Default: one for each core, where there is work for them.
        cache: a folder that keeps what was made. Default: none.
        rules: those of `listops`, where they shall be others.

    Raises:
        ConfigError: a count below 1, or a rule out of range.
    """
    if min(counts) < 1:
        raise ConfigError(f"listops: every count must be at least 1, got {counts}")
    total = sum(counts)
    kept = None
    if cache is not None:
        named = "".join(f"-{name}-{value}" for name, value in sorted(rules.items()))
        kept = Path(cache) / f"listops-{_RULES}-{seed}-{total}{named}.npz"
    if kept is not None and kept.exists():
        with np.load(kept, allow_pickle=False) as held:
            ids, lengths, answers = held["ids"], held["lengths"], held["answers"]
    else:
        ids, lengths, answers = _make(seed, total, workers, rules)
        if kept is not None:
            with atomic_file(kept) as temporary, open(temporary, "wb") as stream:
                np.savez(stream, ids=ids, lengths=lengths, answers=answers)
    return _cut(ids, lengths, answers, counts)


def _make(
    seed: int, total: int, workers: int | None, rules: dict[str, int | float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of all examples in one line, their lengths and answers."""
    # A few more than wanted, since two shards may have made the same one.
    shards = -(-(total + total // 100 + 1) // _SHARD)
    workers = min(workers or os.cpu_count() or 1, shards // 4)
    jobs = [(seed, shard, min(_SHARD, total + 100), rules) for shard in range(shards)]
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            made = list(pool.map(_shard, jobs))
    else:
        made = map(_shard, jobs)
    distinct = {example.ids.tobytes(): example for example in itertools.chain.from_iterable(made)}
    examples = list(itertools.islice(distinct.values(), total))
    if len(examples) < total:
        raise ConfigError(f"listops: the rules allow {len(examples)} distinct examples or few more, wanted {total}")
    lengths = np.array([len(example.ids) for example in examples], np.int32)
    answers = np.array([example.answer for example in examples], np.uint8)
    return np.concatenate([example.ids for example in examples]), lengths, answers


def _shard(job: tuple[int, int, int, dict[str, int | float]]) -> list[ListOpsExample]:
    seed, shard, count, rules = job
    return list(itertools.islice(listops((seed << 32) + shard, **rules), count))  # pyright: ignore[reportArgumentType]


def _cut(
    ids: np.ndarray, lengths: np.ndarray, answers: np.ndarray, counts: tuple[int, ...]
) -> tuple[LabelledSequences, LabelledSequences, LabelledSequences]:
    """The splits, one after the other, as rows of one length."""
    width = int(lengths.max())
    values = np.zeros((len(lengths), width), np.uint8)
    values[np.arange(width) < lengths[:, None]] = ids
    ends = np.cumsum(counts)
    parts = (slice(end - count, end) for count, end in zip(counts, ends, strict=True))
    vocabulary = len(LISTOPS_VOCABULARY)
    return tuple(  # pyright: ignore[reportReturnType]
        LabelledSequences(values[part], answers[part], 10, lengths[part], vocabulary) for part in parts
    )


def read_listops(
    folder: str | os.PathLike[str],
) -> tuple[LabelledSequences, LabelledSequences, LabelledSequences]:
    """The three splits from the files of the Long Range Arena's own release: basic_train.tsv, _val and _test.

    Args:
        folder: that holds them. Each line has an expression, a tab and its value, after a line of headings; round
            brackets, which only group, are left out, as the Arena does.

    Raises:
        DataError: a file is missing, or a line is no expression with a value.
    """
    found = []
    for split in ("train", "val", "test"):
        path = Path(folder) / f"basic_{split}.tsv"
        if not path.is_file():
            raise DataError(f"listops: wanted basic_train.tsv, basic_val.tsv and basic_test.tsv, got no '{path}'")
        rows: list[tuple[np.ndarray, int]] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], 2):
            source, _, target = line.partition("\t")
            try:
                ids = [_ID[token] for token in source.split() if token not in "()"]
                rows.append((np.asarray(ids, np.uint8), int(target)))
            except (KeyError, ValueError) as problem:
                raise DataError(
                    f"listops: line {number} of '{path}' must be an expression, a tab and its value, got {problem}"
                ) from None
        found.append(rows)
    every = [row for rows in found for row in rows]
    if not all(found):
        raise DataError(f"listops: wanted examples in each of the three files, got an empty one in '{folder}'")
    lengths = np.array([len(ids) for ids, _ in every], np.int32)
    answers = np.array([answer for _, answer in every], np.uint8)
    return _cut(np.concatenate([ids for ids, _ in every]), lengths, answers, tuple(len(rows) for rows in found))
