"""Which windows of a corpus each step reads: shuffled without a stored order, so that one number is the whole state."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from statescan.errors import ConfigError, DataError

__all__ = ["WindowSampler", "permute"]

_ROUNDS = 6


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): each input bit moves about half of the output's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
                permute(np.array([0]), max(1, min(self._slack, self.length)), self.seed ^ 0x5EED, int(epoch))[0]
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
        mine = self.state_dict()
        for name in ("length", "seed", "tokens"):
            if state[name] != mine[name]:
                raise DataError(
                    f"sampler: wanted a position saved with {name} = {mine[name]}, got {state[name]}; "
                    "resume with the same data, train.length and train.seed"
                )
        self.position = state["position"]
