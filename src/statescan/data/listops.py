"""ListOps: nested operations on digits, made by the rules of the Long Range Arena."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from statescan.errors import ConfigError

__all__ = ["LISTOPS_VOCABULARY", "ListOpsExample", "listops", "solve_listops"]

_OPERATIONS = ("[MIN", "[MAX", "[MED", "[SM")
LISTOPS_VOCABULARY: tuple[str, ...] = ("<pad>", *(str(digit) for digit in range(10)), *_OPERATIONS, "]")
_ID = {token: index for index, token in enumerate(LISTOPS_VOCABULARY)}


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
    greatest depth, and an operation else. Kept where ``min_length < length < max_length`` tokens, brackets included.

    Args:
        seed: of the examples; the same seed gives the same ones in the same order.
        min_length, max_length: bounds, neither is reached.
        max_depth: levels of operations.
        max_arguments: most arguments of an operation.
        leaf_probability: that an argument is a digit.

    Yields:
        `ListOpsExample`.

    Raises:
        ConfigError: a bound is out of range.

    Source: Tay et al. (2020), arXiv:2011.04006, appendix; Nangia and Bowman (2018), arXiv:1804.06028. Splits of 96,000,
    2,000 and 2,000 are taken from the front.
    """
    if not (0 <= min_length < max_length - 1 and max_depth >= 1 and max_arguments >= 2 and 0 < leaf_probability < 1):
        raise ConfigError(
            "listops: wanted 0 <= min_length < max_length - 1, max_depth >= 1, max_arguments >= 2 and a probability "
            f"within (0, 1), got {min_length}, {max_length}, {max_depth}, {max_arguments} and {leaf_probability}"
        )
    draw = np.random.Generator(np.random.PCG64(seed))
    seen: set[bytes] = set()

    def grow(depth: int, ids: list[int]) -> int | None:
        """Appends a tree and gives its value; None where it has grown too long to be kept."""
        if depth > 1 and (depth > max_depth or draw.random() < leaf_probability):
            digit = int(draw.integers(10))
            ids.append(_ID[str(digit)])
            return digit
        operation = _OPERATIONS[int(draw.integers(len(_OPERATIONS)))]
        ids.append(_ID[operation])
        values = []
        for _ in range(int(draw.integers(2, max_arguments + 1))):
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
