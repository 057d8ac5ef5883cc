"""Labelled sequences and the order of their batches."""

from __future__ import annotations

import numpy as np
import pytest

from statescan.data.labelled import LabelledOrder, LabelledSequences
from statescan.errors import DataError


def _ragged(count: int = 300, seed: int = 0) -> LabelledSequences:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 40, count).astype(np.int32)
    values = np.where(np.arange(40) < lengths[:, None], draw.integers(1, 9, (count, 40)), 0).astype(np.uint8)
    return LabelledSequences(values, draw.integers(0, 3, count).astype(np.uint8), 3, lengths, vocab_size=9)


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    data = LabelledSequences(np.ones((20, 5), np.uint8), np.zeros(20, np.uint8), 2)
    order = LabelledOrder(data, 4, seed=1)
    assert order.batches == 5
    epochs = [np.concatenate([order[number][0] for number in range(start, start + 5)]) for start in (0, 5, 10)]
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(20))
    assert len({tuple(rows) for rows in epochs}) == 3
    assert all(order[number][1] == 5 for number in range(5))


def test_a_batch_depends_on_its_number_and_the_seed_alone() -> None:
    data = _ragged()
    one, other = LabelledOrder(data, 16, seed=3), LabelledOrder(data, 16, seed=3)
    numbers = list(range(2 * one.batches))
    found = {number: one[number] for number in numbers}
    for number in reversed(numbers):
        rows, length = other[number]
        assert (rows == found[number][0]).all()
        assert length == found[number][1]
    assert any((LabelledOrder(data, 16, seed=4)[n][0] != found[n][0]).any() for n in numbers)


def test_rows_of_about_one_length_come_together() -> None:
    data = _ragged(1000)
    assert data.lengths is not None
    order = LabelledOrder(data, 10, seed=0, multiple=8)
    seen: list[int] = []
    spread = []
    for number in range(order.batches):
        rows, length = order[number]
        assert length >= data.lengths[rows].max()
        assert length % 8 == 0
        assert length - data.lengths[rows].max() < 8
        spread.append(np.ptp(data.lengths[rows]))
        seen += rows.tolist()
    assert sorted(seen) == list(range(1000))
    assert np.mean(spread) < 4  # rows drawn at random are 31 apart


def test_a_row_never_grows_past_the_data() -> None:
    data = _ragged()
    assert {LabelledOrder(data, 300, seed=0, multiple=64)[0][1]} == {40}


def test_take_and_reordered() -> None:
    data = _ragged(10)
    some = data.take(np.array([7, 2]))
    assert (some.values == data.values[[7, 2]]).all()
    assert some.lengths is not None
    assert data.lengths is not None
    assert some.lengths.tolist() == [data.lengths[7], data.lengths[2]]
    pixels = LabelledSequences(np.arange(12, dtype=np.uint8).reshape(2, 6), np.zeros(2, np.uint8), 2, mean=0.5)
    turned = pixels.reordered([5, 4, 3, 2, 1, 0])
    assert turned.values.tolist() == [[5, 4, 3, 2, 1, 0], [11, 10, 9, 8, 7, 6]]
    assert turned.mean == 0.5


def test_bad_input() -> None:
    values, labels = np.ones((4, 3), np.uint8), np.zeros(4, np.uint8)
    with pytest.raises(DataError, match=r"values must be \(count, length\) uint8 and not empty, got \(4, 3\) int64"):
        LabelledSequences(values.astype(np.int64), labels, 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"labels must be \(count,\) = \(4,\), got \(3,\)"):
        LabelledSequences(values, labels[:3], 2)
    with pytest.raises(DataError, match="labels must be below 2, got 5"):
        LabelledSequences(values, labels + np.uint8(5), 2)
    with pytest.raises(DataError, match="vary must have lengths"):
        LabelledSequences(values, labels, 2, vary=lambda rows, lengths: (rows, lengths))
    with pytest.raises(DataError, match="ids must be below vocab_size = 1, got 1"):
        LabelledSequences(values, labels, 2, vocab_size=1)
    with pytest.raises(DataError, match=r"at least train.batch_size = 5 examples, got 4"):
        LabelledOrder(LabelledSequences(values, labels, 2), 5, seed=0)
