"""Windows of genomes with one label each, cut when they are read: what a classifier of DNA learns from."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statescan.data.tokenizer import DNA_LETTERS
from statescan.errors import ConfigError, DataError

__all__ = ["LabelledWindows", "window_rows"]


@dataclass(frozen=True)
class LabelledWindows:
    """Windows of one length in arrays of bases, which many of them share.

    A row may begin at any of `room` bases from `first` on: at one at random each time in training, at `first` when it
    is judged.

    Args:
        tokens: (bases,) uint8 ids, A C G T N as 0 to 4.
        first: (count,) int64.
        room: (count,) int64, at least 1.
        labels: (count,) uint8.
        classes: number of labels.
        length: bases of a window.
        both_strands: in training a row is read from the other strand half of the time. Default True.
        together: so many neighbouring rows are always in one batch, begin at the same place of their room and are read
            from the same strand: the homologous windows of several species, of which only what differs tells them
            apart. Default 1.

    Raises:
        DataError: arrays that don't go together.
    """

    tokens: NDArray[np.uint8]
    first: NDArray[np.int64]
    room: NDArray[np.int64]
    labels: NDArray[np.uint8]
    classes: int
    length: int
    both_strands: bool = True
    together: int = 1

    # What `LabelledSequences` has besides.
    lengths = None
    vocab_size = len(DNA_LETTERS)

    def __post_init__(self) -> None:
        shape = (len(self.first),)
        if not shape[0] or self.room.shape != shape or self.labels.shape != shape:
            raise DataError(
                f"labelled windows: first, room and labels must be (count,) with count >= 1, got {self.first.shape}, "
                f"{self.room.shape} and {self.labels.shape}"
            )
        last = int((self.first + self.room).max()) - 1 + self.length
        if int(self.first.min()) < 0 or int(self.room.min()) < 1 or last > len(self.tokens):
            raise DataError(f"labelled windows: rows must lie within the {len(self.tokens)} bases, got up to {last}")
        if int(self.labels.max()) >= self.classes:
            raise DataError(f"labelled windows: labels must be below {self.classes}, got {int(self.labels.max())}")
        if self.together < 1 or shape[0] % self.together:
            raise DataError(f"labelled windows: together must divide the {shape[0]} rows, got {self.together}")

    def __len__(self) -> int:
        return len(self.first)

    @property
    def digest(self) -> int:
        """Differs where the windows, their bases or their labels do."""
        parts = (self.tokens, self.first, self.room, self.labels)
        value = self.length
        for part in parts:
            value = zlib.crc32(part.tobytes(), value)
        return value

    @property
    def values(self) -> NDArray[np.uint8]:
        """(count, length): every row at its first place."""
        return np.stack([self.tokens[start : start + self.length] for start in self.first.tolist()])

    def take(self, rows: Any) -> LabelledWindows:
        """Some rows, by a slice or an array of indices."""
        return replace(self, first=self.first[rows], room=self.room[rows], labels=self.labels[rows])


def window_rows(
    spans: NDArray[np.int64], length: int, count: int | None = None, *, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows for the windows of a length that fit into spans, one after the other without overlap.

    Args:
        spans: (spans, 2) starts and ends.
        length: bases of a window.
        count: as many rows, drawn at random; where the windows are fewer they come several times. Default: each window
            once, in order.
        seed: of the choice.

    Returns:
        (first, room), int64: a row's room reaches to the start of the next window, or as far as the span lets it.

    Raises:
        ConfigError: length < 1.
        DataError: no span is as long as a window.
    """
    if length < 1:
        raise ConfigError(f"windows: wanted length >= 1, got {length}")
    firsts, rooms = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start, end in spans.tolist():
        first = np.arange(start, end - length + 1, length)
        firsts.append(first)
        rooms.append(np.minimum(length, end - length - first + 1))
    first, room = np.concatenate(firsts), np.concatenate(rooms)
    if not len(first):
        longest = int((spans[:, 1] - spans[:, 0]).max()) if len(spans) else 0
        raise DataError(
            f"dna: wanted a stretch of at least {length} bases, got {longest} at most: the window is longer than every "
            "record or block; take a shorter window"
        )
    if count is None:
        return first, room
    draw = np.random.Generator(np.random.PCG64(seed))
    rows = np.concatenate([draw.permutation(len(first)) for _ in range(-(-count // len(first)))])[:count]
    return first[rows], room[rows]
