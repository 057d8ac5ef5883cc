"""The synthetic tasks: every example is what its docstring says, by a generator in plain Python written apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from statescan.data import AssociativeRecall, InductionHeads, SelectiveCopying
from statescan.errors import ConfigError

MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _words(seed: int, example: int) -> Iterator[int]:
    """SplitMix64 as published: the state goes up by G, the output is the mixed state."""
    gamma = 0x9E3779B97F4A7C15
    state = _mix((_mix(seed & MASK) + (example + 1) * gamma) & MASK)
    while True:
        state = (state + gamma) & MASK
        yield _mix(state)


def _below(word: int, n: int) -> int:
    return (word >> 32) * n >> 32


def _copying(task: SelectiveCopying, seed: int, example: int) -> tuple[list[int], list[int]]:
    words = _words(seed, example)
    data = [1 + _below(next(words), task.vocab_size - 2) for _ in range(task.tokens)]
    if task.spread:
        order = sorted((next(words) >> 32, place) for place in range(task.length))
        places = sorted(place for _, place in order[: task.tokens])
    else:
        places = list(range(task.tokens))
    inputs = [0] * task.length
    for place, token in zip(places, data, strict=True):
        inputs[place] = token
    return inputs + [task.vocab_size - 1] * task.tokens, data


def _induction(task: InductionHeads, seed: int, example: int) -> tuple[list[int], list[int]]:
    words = _words(seed, example)
    place = _below(next(words), task.length - 2)
    inputs = [_below(next(words), task.vocab_size - 1) for _ in range(task.length)]
    inputs[place] = inputs[-1] = task.vocab_size - 1
    return inputs, [inputs[place + 1]]


def _recall(task: AssociativeRecall, seed: int, example: int) -> tuple[list[int], list[int]]:
    words = _words(seed, example)
    half = task.vocab_size // 2
    keys = [key for _, key in sorted((next(words) >> 32, key) for key in range(half))][: task.pairs]
    values = [half + _below(next(words), task.vocab_size - half) for _ in range(task.pairs)]
    asked = [pair for _, pair in sorted((next(words) >> 32, pair) for pair in range(task.pairs))][: task.queries]
    pairs = list(itertools.chain.from_iterable(zip(keys, values, strict=True)))
    return pairs + [keys[pair] for pair in asked], [values[pair] for pair in asked]


CASES = [
    (SelectiveCopying(40, 5, 7), _copying),
    (SelectiveCopying(5, 5, 7), _copying),
    (SelectiveCopying(300), _copying),
    (SelectiveCopying(20, 4, spread=False), _copying),
    (InductionHeads(3), _induction),
    (InductionHeads(61, 9), _induction),
    (InductionHeads(256), _induction),
    (AssociativeRecall(4, 3, 9), _recall),
    (AssociativeRecall(16, 16, 32), _recall),
]


@pytest.mark.parametrize(("task", "made"), CASES, ids=lambda x: repr(x) if hasattr(x, "batch") else "")
@pytest.mark.parametrize(("seed", "first"), [(0, 0), (7, 1_000_000_007), (-3, 5)])
def test_examples_are_those_of_the_docstring(task, made, seed: int, first: int) -> None:
    batch = task.batch(seed, first, 4)
    wanted = [made(task, seed, first + row) for row in range(4)]
    assert batch.inputs.tolist() == [inputs for inputs, _ in wanted]
    assert batch.answers.tolist() == [answers for _, answers in wanted]
    assert batch.inputs.shape == (4, task.total_length)
    assert batch.answers.shape == (4, task.asked)
    assert len(set(task.symbols)) == task.vocab_size


@pytest.mark.parametrize("task", [case[0] for case in CASES], ids=repr)
def test_the_first_example_may_be_a_number_on_the_device(task) -> None:
    whole = task.batch(3, 10, 6)
    tensor = task.batch(3, torch.tensor(12), 3)
    assert torch.equal(whole.inputs[2:5], tensor.inputs)
    assert torch.equal(whole.answers[2:5], tensor.answers)


def test_seeds_and_examples_differ() -> None:
    task = SelectiveCopying(64)
    rows = torch.cat([task.batch(seed, 0, 200).inputs for seed in range(5)])
    assert len({tuple(row) for row in rows.tolist()}) == 1000


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_pieces_are_the_whole(piece: int) -> None:
    task = InductionHeads(200)
    batch = task.batch(1, 40, 5)
    pieces, answers = task.pieces(1, 40, 5, piece)
    parts = list(pieces)
    assert all(part.shape[1] <= piece for part in parts)
    assert torch.equal(torch.cat(parts, 1), batch.inputs)
    assert torch.equal(answers, batch.answers)


def test_the_draws_are_even() -> None:
    """Chi-squared of places, tokens and answers, each below the 1e-6 quantile."""
    scipy_stats = pytest.importorskip("scipy.stats")

    def even(values: torch.Tensor, n: int) -> None:
        counts = torch.bincount(values.flatten(), minlength=n).double()
        assert len(counts) == n
        expected = counts.sum() / n
        assert ((counts - expected) ** 2 / expected).sum() < scipy_stats.chi2.ppf(1 - 1e-6, n - 1)

    heads = InductionHeads(40).batch(0, 0, 20_000)
    trigger = heads.inputs == 15
    assert (trigger.sum(1) == 2).all()
    even(trigger[:, :-1].int().argmax(1), 38)
    even(heads.inputs[~trigger], 15)
    even(heads.answers, 15)
    copying = SelectiveCopying(40, 4).batch(0, 0, 20_000)
    is_data = (copying.inputs[:, :40] > 0).nonzero()
    even(is_data[:, 1], 40)
    even(copying.answers - 1, 14)
    recall = AssociativeRecall(4, 2, 16).batch(0, 0, 20_000)
    even(recall.inputs[:, 0], 8)
    even(recall.answers - 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectiveCopying(3, 4), "SelectiveCopying: length must be from tokens = 4"),
        (lambda: SelectiveCopying(vocab_size=2), "vocab_size must be at least 3"),
        (lambda: SelectiveCopying(tokens=0), "tokens must be at least 1, got 0"),
        (lambda: InductionHeads(2), "InductionHeads: length must be from 3"),
        (lambda: AssociativeRecall(17), "pairs must be from 1 to the number of keys, vocab_size // 2 = 16"),
        (lambda: AssociativeRecall(3, 4), "queries must be from 1 to pairs = 3"),
        (lambda: InductionHeads().pieces(0, 0, 1, 0), "piece must be at least 1"),
    ],
)
def test_what_is_out_of_range_is_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
