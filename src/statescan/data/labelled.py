"""Sequences with one label each, in memory as small integers: what a classifier learns from and is judged on."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from statescan.data.windows import LabelledWindows
from statescan.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LabelledOrder", "LabelledSequences"]

# Batches of sequences of unequal length are cut from pools of so many batches, sorted by length inside.
_POOL = 32


@dataclass(frozen=True)
class LabelledSequences:
    """Equally long rows of bytes with their labels.

    Args:
        values: (count, length) uint8: pixels, or token ids with 0 behind the end of a shorter sequence.
        labels: (count,) uint8.
        classes: number of labels.
        lengths: (count,) int32, how much of each row is real; None where all of it is.
        vocab_size: number of token ids; 0 where the values are real numbers.
        mean, deviation: of the values over 255, where they are real: a model reads
            ``(value / 255 - mean) / deviation``.
        views: (views, length) int32, orders in which a row may be read in training, one at random each time; where it
            says `length` there stands a 0. None: rows are read as they are.
        frame: values that make one position of real numbers: a model reads (batch, length / frame, frame).
        vary: from (rows (batch, length) uint8, lengths (batch,)) to such that a model shall see in training, floats on
            the scale of the values; it draws anew each time. None: rows are read as they are.

    Raises:
        DataError: shapes that don't go together, a label or an id out of range.
    """

    values: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    classes: int
    lengths: NDArray[np.int32] | None = None
    vocab_size: int = 0
    mean: float = 0.0
    deviation: float = 1.0
    views: NDArray[np.int32] | None = None
    vary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    frame: int = 1

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype != np.uint8 or self.values.size == 0:
            raise DataError(
                f"labelled sequences: values must be (count, length) uint8 and not empty, got {self.values.shape} "
                f"{self.values.dtype}"
            )
        if self.frame < 1 or self.values.shape[1] % self.frame or (self.vocab_size and self.frame > 1):
            raise DataError(
                f"labelled sequences: frame must divide the length {self.values.shape[1]}, and be 1 for tokens, got "
                f"{self.frame}"
            )
        for name, array in (("labels", self.labels), ("lengths", self.lengths)):
            if array is not None and array.shape != (len(self.values),):
                raise DataError(
                    f"labelled sequences: {name} must be (count,) = ({len(self.values)},), got {array.shape}"
                )
        if self.vary is not None and self.lengths is None:
            raise DataError("labelled sequences: vary must have lengths to change, got none; pass how much is real")
        if int(self.labels.max()) >= self.classes:
            raise DataError(
                f"labelled sequences: labels must be below {self.classes}, got {int(self.labels.max())}; "
                "is it the file of labels that belongs to these values?"
            )
        if self.vocab_size and int(self.values.max()) >= self.vocab_size:
            raise DataError(
                f"labelled sequences: ids must be below vocab_size = {self.vocab_size}, got {int(self.values.max())}"
            )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.values.shape[1]

    @property
    def digest(self) -> int:
        """Differs where the rows or their labels do."""
        return zlib.crc32(self.labels.tobytes(), zlib.crc32(self.values.tobytes()))

    def take(self, rows: Any) -> LabelledSequences:
        """Some rows, by a slice or an array of indices."""
        lengths = None if self.lengths is None else self.lengths[rows]
        return replace(self, values=self.values[rows], labels=self.labels[rows], lengths=lengths)

    def reordered(self, order: Sequence[int] | NDArray[Any]) -> LabelledSequences:
        """The positions of every row in another order: pixels by a fixed permutation."""
        order = np.asarray(order)
        values, views = np.ascontiguousarray(self.values[:, order]), self.views
        if views is not None:
            # Where each position has gone; the 0 past the end stays there.
            place = np.append(np.argsort(order), self.length).astype(np.int32)
            views = place[views[:, order]]
        return replace(self, values=values, views=views)


class LabelledOrder:
    """Which rows make which batch: a new random order each epoch, given by the seed and the number of the batch alone.

    Sequences of unequal length are put together with such of about their own; a batch is as long as its longest row,
    rounded up to `multiple`, so that only a few shapes occur. The rows that fill no whole batch are left out of that
    epoch.

    Args:
        data: the rows.
        batch_size: rows of a batch.
        seed: of the order.
        multiple: to which lengths are rounded up.

    Raises:
        DataError: fewer rows than a batch has.
    """

    def __init__(
        self, data: LabelledSequences | LabelledWindows, batch_size: int, seed: int, *, multiple: int = 512
    ) -> None:
        if len(data) < batch_size:
            raise DataError(
                f"train: wanted at least train.batch_size = {batch_size} examples, got {len(data)}; "
                "take more data or a smaller train.batch_size"
            )
        self._data, self._batch_size, self._seed, self._multiple = data, batch_size, seed, multiple
        self.batches = len(data) // batch_size
        self._together = getattr(data, "together", 1)
        if batch_size % self._together:
            raise DataError(
                f"train: wanted train.batch_size to be a multiple of {self._together}, so many rows go together, got "
                f"{batch_size}"
            )
        self._epoch = -1
        self._rows = np.empty((0, 0), np.int64)

    def __getitem__(self, number: int) -> tuple[NDArray[np.int64], int]:
        """Batch `number`, counted from the start of the run: its rows' indices (batch_size,), and its length."""
        epoch, place = divmod(number, self.batches)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._shuffled(epoch)
        rows = self._rows[place]
        return rows, self._padded(rows)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        draw = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        if self._together > 1:
            group = draw.permutation(len(self._data) // self._together)[:, None] * self._together
            order = (group + np.arange(self._together)).ravel()[: self.batches * self._batch_size]
        else:
            order = draw.permutation(len(self._data))[: self.batches * self._batch_size]
        if self._data.lengths is None:
            return order.reshape(self.batches, self._batch_size)
        pool = _POOL * self._batch_size
        parts = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = np.concatenate([part[np.argsort(self._data.lengths[part], kind="stable")] for part in parts])
        return order.reshape(self.batches, self._batch_size)[draw.permutation(self.batches)]

    def _padded(self, rows: NDArray[np.int64]) -> int:
        if self._data.lengths is None:
            return self._data.length
        longest = int(self._data.lengths[rows].max())
        return min(-(-longest // self._multiple) * self._multiple, self._data.length)
