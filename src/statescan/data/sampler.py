"""Which windows of a corpus each step reads: shuffled without a saved order, so that one number is the whole state."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statescan.errors import ConfigError, DataError

__all__ = ["LaneSampler", "MixedLengthSampler", "PackedSampler", "PackedWindows", "WindowSampler", "permute"]

_ROUNDS = 6
_PHASE_SEED = 0x5EED
_DEAL_SEED = _PHASE_SEED << 16


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): each input bit moves about half of the output's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(seed: int, index: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each index and seed, as good as drawn at random."""
    key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
    return (_mix(index.astype(np.uint64) ^ key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: NDArray[Any], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where a shuffle of [0, size) takes each index, computed from the index alone.

    A balanced Feistel network over the next even number of bits, walked until it lands inside [0, size): a bijection
    for any round function, with no table of the order to store, to broadcast or to save.

    Args:
        index: any integers in [0, size).
        size: how many there are, >= 1.
        seed: picks the shuffle.
        epoch: picks it too; every pair (seed, epoch) gives its own.

    Returns:
        Integers in [0, size), of the same shape; distinct for distinct indices.

    Source: M. Luby and C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988;
    J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", 2002 (the walk).
    """
    index = np.asarray(index)
    half = max(1, -(-(size - 1).bit_length() // 2))
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) + np.uint64(epoch)
    keys = _mix(key + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    result = index.astype(np.uint64).ravel()
    outside = np.arange(result.size)
    while outside.size:
        value = result[outside]
        left, right = value >> shift, value & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        value = (left << shift) | right
        result[outside] = value
        outside = outside[value >= size]
    return result.astype(np.int64).reshape(index.shape)


class WindowSampler:
    """Batches of windows of ``length + 1`` ids: ``length`` inputs and, one further, their targets.

    Window i of an epoch is ``tokens[phase + i * length :][: length + 1]``: neighbours share one id, so that no position
    is a target twice. Each epoch visits every window once, in its own order and with its own phase (so that the windows
    themselves differ between epochs). Epochs run on into each other: a batch may hold the end of one and the start
    of the next.

    The state is one number, how many windows were drawn by all ranks together, so that a run may go on with another
    number of ranks.

    Args:
        tokens: (ids,) unsigned integers, memory-mapped or not.
        length: inputs per window.
        seed: picks the order and the phases.
        rank: this process, in [0, world).
        world: how many processes draw from the same order; each takes an equal, disjoint part of every batch.

    Raises:
        DataError: there are fewer than ``length + 1`` ids.
    """

    def __init__(self, tokens: NDArray[Any], length: int, seed: int, *, rank: int = 0, world: int = 1) -> None:
        if length < 1:
            raise ConfigError(f"sampler: wanted length >= 1, got {length}")
        if len(tokens) < length + 1:
            raise DataError(
                f"sampler: wanted at least length + 1 = {length + 1} ids, got {len(tokens)}; "
                "take a longer text or a smaller train.length"
            )
        self.tokens = tokens
        self.length = length
        self.seed = seed
        self.rank = rank
        self.world = world
        self.position = 0
        whole = (len(tokens) - 1) // length
        # One window less leaves room for a phase of up to `length`, which is worth more than the tail it costs.
        self.windows_per_epoch = whole - 1 if whole > 1 else whole
        self._slack = len(tokens) - 1 - self.windows_per_epoch * length

    @property
    def epoch(self) -> float:
        """How many times the corpus has been gone through."""
        return self.position / self.windows_per_epoch

    def starts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first id of the windows at these places of the endless order."""
        epochs = positions // self.windows_per_epoch
        places = positions % self.windows_per_epoch
        starts = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            phase = int(
                permute(np.array([0]), max(1, min(self._slack, self.length)), self.seed ^ _PHASE_SEED, int(epoch))[0]
            )
            window = permute(places[here], self.windows_per_epoch, self.seed, int(epoch))
            starts[here] = phase + window * self.length
        return starts

    def next_batch(self, batch_size: int) -> NDArray[np.int64]:
        """The next windows of this rank; all ranks must ask for as many, and together they get `world` times that.

        Args:
            batch_size: windows for this rank.

        Returns:
            (batch_size, length + 1) int64.
        """
        first = self.position + self.rank * batch_size
        starts = self.starts(np.arange(first, first + batch_size, dtype=np.int64))
        self.position += batch_size * self.world
        return np.stack([self.tokens[start : start + self.length + 1] for start in starts]).astype(np.int64)

    def state_dict(self) -> dict[str, int]:
        """The position, and what it counts in."""
        return {"position": self.position, "length": self.length, "seed": self.seed, "tokens": len(self.tokens)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position.

        Raises:
            DataError: the state counts windows of another length, seed or corpus.
        """
        check_state(self.state_dict(), state)
        self.position = state["position"]


class MixedLengthSampler:
    """Batches of windows of several lengths: each batch of one of them, all batches of as many ids.

    The lengths are `length` and its halves down to `shortest`. The text is cut into the windows of `length` that
    `WindowSampler` has; every epoch deals them out to its batches, and the batches to the lengths in equal shares and
    an order of their own. What belongs to a length is cut into windows of it, which come shuffled. So an epoch predicts
    an id once, whatever window it lies in (but for what doesn't fill a batch), every length gets as many of them, and a
    batch of short windows is drawn from as much text as its length has.

    The state is one number, how many windows of `length` all ranks together have drawn the ids of.

    Args:
        tokens: (ids,) unsigned integers, memory-mapped or not.
        length: inputs of the longest windows.
        shortest: inputs of the shortest, `length` divided by a power of two.
        rows: windows of `length` that hold as many ids as a batch, of all ranks together.
        seed: picks the orders and the phases.
        rank: this process, in [0, world).
        world: how many processes draw from the same order; each takes an equal, disjoint part of every batch.

    Raises:
        ConfigError: lengths that don't double into each other, or rows below 1.
        DataError: an epoch has fewer batches than there are lengths.

    Source: a length for each update, with as many tokens, as in Pouransari et al. (2024), arXiv:2405.13226, whose
    windows of a length are whole documents' parts.
    """

    def __init__(
        self, tokens: NDArray[Any], length: int, shortest: int, rows: int, seed: int, *, rank: int = 0, world: int = 1
    ) -> None:
        doublings = max(0, (length // max(1, shortest)).bit_length() - 1)
        if shortest < 1 or shortest << doublings != length or rows < 1:
            raise ConfigError(
                f"sampler: wanted rows >= 1 and a shortest length that doubles up to length = {length}, got {rows} and "
                f"{shortest}; e.g. {max(1, length // 4)}"
            )
        self._windows = WindowSampler(tokens, length, seed)
        self.lengths = [shortest << number for number in range(doublings + 1)]
        self._batches = self._windows.windows_per_epoch // rows
        if self._batches < len(self.lengths):
            raise DataError(
                f"sampler: wanted a batch of {rows} x {length} ids for each of the lengths {self.lengths}, got "
                f"{len(tokens)} ids; take a longer text or a smaller train.length"
            )
        self.rows, self.seed, self.rank, self.world, self.position = rows, seed, rank, world, 0
        self.windows_per_epoch = self._batches * rows

    @property
    def epoch(self) -> float:
        """How many times the corpus has been gone through."""
        return self.position / self.windows_per_epoch

    def next_batch(self, batch_size: int) -> NDArray[np.int64]:
        """The next windows of this rank.

        Args:
            batch_size: windows of `length` that hold as many ids; times `world` it must be `rows`.

        Returns:
            (batch_size k, length / k + 1) int64, with k a power of two.

        Raises:
            ConfigError: another number of rows.
        """
        if batch_size * self.world != self.rows:
            raise ConfigError(f"sampler: wanted batches of {self.rows} / {self.world} windows, got {batch_size}")
        epoch, number = divmod(self.position // self.rows, self._batches)
        dealt = int(permute(np.array([number]), self._batches, self.seed ^ _DEAL_SEED, epoch)[0])
        which = dealt * len(self.lengths) // self._batches
        # The batches of a length lie side by side among those that are dealt.
        first, last = (-(-one * self._batches // len(self.lengths)) for one in (which, which + 1))
        window = self.lengths[which]
        parts = self._windows.length // window
        each = batch_size * parts
        place = ((dealt - first) * self.world + self.rank) * each + np.arange(each, dtype=np.int64)
        place = permute(place, (last - first) * self.rows * parts, self.seed ^ window, epoch)
        whole = epoch * self._windows.windows_per_epoch + first * self.rows + place // parts
        starts = self._windows.starts(whole) + place % parts * window
        self.position += self.rows
        return np.stack([self._windows.tokens[start : start + window + 1] for start in starts]).astype(np.int64)

    def state_dict(self) -> dict[str, int]:
        """The position, and what it counts in."""
        return self._windows.state_dict() | {
            "position": self.position,
            "shortest_length": self.lengths[0],
            "rows": self.rows,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position.

        Raises:
            DataError: the state counts windows of other lengths, seed or corpus, or other batches.
        """
        check_state(self.state_dict(), state)
        self.position = state["position"]


class LaneSampler:
    """Batches whose rows each go on where the same row of the batch before ended: for a state that is carried along.

    The text is cut into as many lanes as a batch has rows, over all ranks; a row reads its lane window by window, and
    then goes on into the next one's. So a row's text is without a break but for one in every pass through the whole,
    and an epoch visits every window once. The seed picks where the first lane starts, within the ids that are left
    over.

    The state is one number, how many windows were drawn by all ranks together.

    Args:
        tokens: (ids,) unsigned integers, memory-mapped or not.
        length: inputs per window.
        rows: of a batch, of all ranks together.
        seed: picks the phase.
        rank: this process, in [0, world).
        world: how many processes draw from the same lanes; each takes an equal, disjoint part of every batch.

    Raises:
        ConfigError: length or rows below 1.
        DataError: there are fewer than ``rows * length + 1`` ids.
    """

    def __init__(
        self, tokens: NDArray[Any], length: int, rows: int, seed: int, *, rank: int = 0, world: int = 1
    ) -> None:
        if length < 1 or rows < 1:
            raise ConfigError(f"sampler: wanted length and rows >= 1, got {length} and {rows}")
        if len(tokens) < rows * length + 1:
            raise DataError(
                f"sampler: wanted at least {rows} rows x length {length} + 1 = {rows * length + 1} ids, got "
                f"{len(tokens)}; take a longer text, a smaller train.length or a smaller train.batch_size"
            )
        self.tokens = tokens
        self.length = length
        self.rows = rows
        self.seed = seed
        self.rank = rank
        self.world = world
        self.position = 0
        self._windows_of_lane = (len(tokens) - 1) // (length * rows)
        self.windows_per_epoch = self._windows_of_lane * rows
        slack = len(tokens) - 1 - self.windows_per_epoch * length
        self._phase = int(permute(np.array([0]), slack + 1, seed ^ _PHASE_SEED, 0)[0])

    @property
    def epoch(self) -> float:
        """How many times the corpus has been gone through."""
        return self.position / self.windows_per_epoch

    def next_batch(self, batch_size: int) -> NDArray[np.int64]:
        """The next windows of this rank's rows.

        Args:
            batch_size: rows of this rank; times `world` it must be `rows`.

        Returns:
            (batch_size, length + 1) int64.

        Raises:
            ConfigError: another number of rows.
        """
        if batch_size * self.world != self.rows:
            raise ConfigError(
                f"sampler: wanted batches of {self.rows} / {self.world} rows, got {batch_size}; a lane belongs to a row"
            )
        row = self.rank * batch_size + np.arange(batch_size, dtype=np.int64)
        window = (row * self._windows_of_lane + self.position // self.rows) % self.windows_per_epoch
        starts = self._phase + window * self.length
        self.position += self.rows
        return np.stack([self.tokens[start : start + self.length + 1] for start in starts]).astype(np.int64)

    def state_dict(self) -> dict[str, int]:
        """The position, and what it counts in."""
        return {
            "position": self.position,
            "length": self.length,
            "rows": self.rows,
            "seed": self.seed,
            "tokens": len(self.tokens),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position.

        Raises:
            DataError: the state counts windows of another length, seed or corpus, or in other lanes.
        """
        check_state(self.state_dict(), state)
        self.position = state["position"]


class PackedWindows(NamedTuple):
    """Windows of documents, laid end to end as one packed sequence.

    Args:
        inputs: (1, windows * length) int64, the ids.
        targets: (1, windows * length) int64, the id that follows each in its document.
        cu_seqlens: (pieces + 1,) int32, from 0 to windows * length: where each piece of a document starts. A window's
            start is one of them.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]


class PackedSampler:
    """Batches of windows of `length` predictions that are packed with documents, none of which sees another.

    A document of n ids holds n - 1 predictions: each id but the last, and the one after it. An epoch lays the documents
    end to end in an order of its own, leaves out a phase of its own at the start, cuts the rest into windows and visits
    each once, in an order of its own. A document longer than what is left of a window goes on in the next one, with an
    empty state; no prediction is made twice, and none from one document to the next. Every window holds exactly
    `length` predictions, so nothing is padded and every batch weighs the same.

    The state is one number, how many windows were drawn by all ranks together, as with `WindowSampler`.

    Args:
        tokens: (ids,) unsigned integers, memory-mapped or not.
        offsets: (documents + 1,) where each document starts, rising from 0 to the number of ids.
        length: predictions per window.
        seed: picks the orders and the phases.
        rank: this process, in [0, world).
        world: how many processes draw from the same order; each takes an equal, disjoint part of every batch.

    Raises:
        ConfigError: length < 1.
        DataError: the documents hold fewer than `length` predictions, or the offsets don't fit the ids.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        offsets: NDArray[Any],
        length: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if length < 1:
            raise ConfigError(f"sampler: wanted length >= 1, got {length}")
        offsets = np.asarray(offsets, np.int64)
        sizes = np.diff(offsets)
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(tokens) or sizes.min() < 0:
            raise DataError(f"sampler: wanted offsets that rise from 0 to the number of ids, {len(tokens)}")
        whole = sizes > 1
        self.tokens = tokens
        self.length = length
        self.seed = seed
        self.rank = rank
        self.world = world
        self.position = 0
        self._starts = offsets[:-1][whole]
        self._predictions = sizes[whole] - 1
        self.predictions = int(self._predictions.sum())
        if self.predictions < length:
            raise DataError(
                f"sampler: wanted documents with at least length = {length} predictions, got {self.predictions} in "
                f"{len(sizes)} of them; take a longer text or a smaller train.length"
            )
        self.windows_per_epoch = self.predictions // length
        self._slack = self.predictions - self.windows_per_epoch * length
        self._layouts: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @property
    def epoch(self) -> float:
        """How many times the corpus has been gone through."""
        return self.position / self.windows_per_epoch

    def _layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """An epoch's documents in order, and the place of each one's first prediction in the row of all of them."""
        if epoch not in self._layouts:
            # A batch may hold the end of an epoch and the start of the next, no more.
            self._layouts = {known: layout for known, layout in self._layouts.items() if known == epoch - 1}
            # Another key than that of the windows, which would else come in the order of the documents.
            count = len(self._starts)
            order = permute(np.arange(count), count, self.seed ^ (_PHASE_SEED << 32), epoch)
            sizes = self._predictions[order]
            self._layouts[epoch] = order, np.cumsum(sizes) - sizes
        return self._layouts[epoch]

    def pieces(self, position: int) -> list[tuple[int, int]]:
        """What the window at a place of the endless order holds.

        Args:
            position: counts windows from 0.

        Returns:
            (first id, predictions) of each piece, in order; the predictions sum to `length`.
        """
        return self._pieces_of(np.array([position]))[0]

    def _pieces_of(self, positions: NDArray[np.int64]) -> list[list[tuple[int, int]]]:
        """`pieces` of several windows: a shuffle costs as much for one number as for a batch of them."""
        epochs, places = np.divmod(positions, self.windows_per_epoch)
        found: list[list[tuple[int, int]]] = [[] for _ in positions]
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            order, firsts = self._layout(epoch)
            phase = int(permute(np.array([0]), self._slack + 1, self.seed ^ _PHASE_SEED, epoch)[0])
            starts = phase + self.length * permute(places[here], self.windows_per_epoch, self.seed, epoch)
            numbers = np.searchsorted(firsts, starts, side="right") - 1
            for row, start, number in zip(here.tolist(), starts.tolist(), numbers.tolist(), strict=True):
                end = start + self.length
                while start < end:
                    document = int(order[number])
                    inside = start - int(firsts[number])
                    count = min(end - start, int(self._predictions[document]) - inside)
                    found[row].append((int(self._starts[document]) + inside, count))
                    start += count
                    number += 1
        return found

    def next_batch(self, batch_size: int, parts: int = 1) -> list[PackedWindows]:
        """The next windows of this rank; all ranks must ask for as many, and together they get `world` times that.

        Args:
            batch_size: windows for this rank.
            parts: how many packed sequences to make of them; divides batch_size. Default 1.

        Returns:
            `parts` packed sequences of batch_size / parts windows each.
        """
        first = self.position + self.rank * batch_size
        each = batch_size // parts
        windows = self._pieces_of(np.arange(first, first + batch_size, dtype=np.int64))
        batch = [
            self._pack([piece for window in windows[start : start + each] for piece in window])
            for start in range(0, batch_size, each)
        ]
        self.position += batch_size * self.world
        return batch

    def _pack(self, pieces: list[tuple[int, int]]) -> PackedWindows:
        inputs = np.concatenate([self.tokens[start : start + count] for start, count in pieces])
        targets = np.concatenate([self.tokens[start + 1 : start + count + 1] for start, count in pieces])
        cu_seqlens = np.cumsum([0, *(count for _, count in pieces)]).astype(np.int32)
        return PackedWindows(inputs.astype(np.int64)[None], targets.astype(np.int64)[None], cu_seqlens)

    def state_dict(self) -> dict[str, int]:
        """The position, and what it counts in."""
        return {
            "position": self.position,
            "length": self.length,
            "seed": self.seed,
            "tokens": len(self.tokens),
            "predictions": self.predictions,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position.

        Raises:
            DataError: the state counts windows of another length, seed or corpus, or of no packed one.
        """
        check_state(self.state_dict(), state)
        self.position = state["position"]


def check_state(mine: dict[str, int], state: dict[str, int]) -> None:
    for name in {**mine, **state}:
        if name != "position" and state.get(name) != mine.get(name):
            raise DataError(
                f"sampler: wanted a position saved with {name} = {mine.get(name)}, got {state.get(name)}; "
                "resume with the same data, data.packing, train.length and train.seed"
            )
