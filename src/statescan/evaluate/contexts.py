"""What more context is worth: the same tokens, read with less and with more of it before them.

The mean over a position in a window says little of it where some parts of a text are harder than others by more than
context is worth: each position's mean is of other tokens. Here the same tokens are judged in windows of several
lengths, and what is told is the mean of the differences, token by token, with its standard error over places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from statescan.errors import ConfigError, DataError
from statescan.evaluate.likelihood import row_bits, window_bits
from statescan.evaluate.ratios import ratio_of_sums

__all__ = ["ByContext", "CarriedOctave", "ContextPoint", "Region", "read_by_context"]

# Windows: as long as the longest, half as long, ...
_LENGTHS = 8
# Tokens of a locus at least, and of a stretch that is read at once.
_LOCUS = 1 << 14
# Tokens and stretches judged at most; each token is read twice for each length.
_TOKENS, _STRETCHES = 1 << 22, 1 << 10
# Tokens of a forward pass, where a window isn't longer.
_AT_ONCE = 1 << 17


class Region(NamedTuple):
    """What no context reaches into from outside.

    start, end: where it lies in the ids; group: regions of one group are homologues of each other, so that what lies at
    the same place of them is of one locus; place: of its first token in the group.
    """

    start: int
    end: int
    group: int
    place: int = 0


class CarriedOctave(NamedTuple):
    """Tokens after `first` to `last` others, the state carried: (loci,) how many, and the sum over each locus of the
    bits that they cost less those that they cost in the longest window."""

    first: int
    last: int
    tokens: NDArray[np.int64]
    more: NDArray[np.float64]


class ContextPoint(NamedTuple):
    """The mean over tokens that have `first` to `last` others before them.

    bits_per_token: of all tokens judged; with a state carried further, where not all have as many, the mean in the
    longest windows plus `change`; change: the mean difference from the same tokens in windows half as long, of a state
    carried from the longest windows; None for the shortest; standard_error: of `change` over loci, None of a single
    one; carried: whether the state was.
    """

    first: int
    last: int
    bits_per_token: float
    change: float | None
    standard_error: float | None
    carried: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ByContext:
    """Bits of the same tokens in windows of several lengths.

    Args:
        digest: of the tokens judged, what stands before them, and their loci: two with the same digest can be paired.
        lengths: of the windows, rising.
        tokens: (loci,) judged of each locus.
        bits: (lengths, loci) that they cost in all.
        carried: octaves beyond the longest window.
    """

    digest: str
    lengths: tuple[int, ...]
    tokens: NDArray[np.int64]
    bits: NDArray[np.float64]
    carried: tuple[CarriedOctave, ...] = ()

    def curve(self) -> list[ContextPoint]:
        """The loss over the context, and what each doubling brings."""
        points = []
        means = (self.bits.sum(1) / self.tokens.sum()).tolist()
        for number, (length, mean) in enumerate(zip(self.lengths, means, strict=True)):
            change: tuple[float | None, float | None] = (None, None)
            if number:
                change = _difference(self.bits[number] - self.bits[number - 1], self.tokens)
            points.append(ContextPoint(length - length // 2 + 1, length, mean, *change))
        for octave in self.carried:
            more, error = _difference(octave.more, octave.tokens)
            points.append(ContextPoint(octave.first, octave.last, means[-1] + more, more, error, carried=True))
        return points

    def whole(self) -> tuple[float, float | None]:
        """(bits per token that the longest windows cost more than the shortest, standard error over loci)."""
        return _difference(self.bits[-1] - self.bits[0], self.tokens)

    def paired(self, other: ByContext) -> bool:
        """Whether the same tokens were judged in the same windows."""
        return (self.digest, self.lengths) == (other.digest, other.lengths)

    def less(self, other: ByContext) -> list[tuple[float, float | None]]:
        """(bits per token that it needs more than another on the same tokens, standard error over loci) by length.

        Raises:
            ConfigError: the other was judged on other tokens, or in other windows.
        """
        if not self.paired(other):
            raise ConfigError(
                "contexts: wanted two models judged on the same tokens in the same windows, got others; judge both "
                "anew, on the same data"
            )
        return [_difference(here - there, self.tokens) for here, there in zip(self.bits, other.bits, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, as JSON takes them."""
        carried = [
            {"first": one.first, "last": one.last, "tokens": one.tokens.tolist(), "more": one.more.tolist()}
            for one in self.carried
        ]
        return {
            "digest": self.digest,
            "lengths": list(self.lengths),
            "tokens": self.tokens.tolist(),
            "bits": self.bits.tolist(),
            "carried": carried,
        }

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> ByContext:
        """What `to_dict` gave."""
        carried = tuple(
            CarriedOctave(one["first"], one["last"], np.array(one["tokens"]), np.array(one["more"]))
            for one in held["carried"]
        )
        bits = np.array(held["bits"], np.float64)
        return cls(held["digest"], tuple(held["lengths"]), np.array(held["tokens"]), bits, carried)


def _difference(sums: NDArray[np.float64], tokens: NDArray[np.int64]) -> tuple[float, float | None]:
    there = tokens > 0
    mean, error = ratio_of_sums(sums[there], tokens[there])
    return mean, None if np.isnan(error) else error


def read_by_context(
    model: nn.Module,
    tokens: NDArray[Any],
    regions: Sequence[Region],
    *,
    context: int,
    carried: int | None = None,
    unjudged: int | None = None,
    locus: int = _LOCUS,
) -> ByContext:
    """Judges the same tokens in windows of `context`, of half of it, and so on, eight lengths in all.

    A token is judged in the second half of a window: in one of W, W / 2 + 1 to W tokens stand before it. So all that
    have half of `context` and more before them in their region can be judged at every length, each in one window; of
    a stretch at a region's end as many as half of `context` at least. Where they are more than 2^22 it is stretches
    spread evenly over all of them, the same in homologues.

    Args:
        model: as in `evaluate_tokens`, in evaluation mode; with `carried` one of a state of fixed size.
        tokens: (tokens,) ids.
        regions: of them.
        context: tokens of the longest window, at least 2.
        carried: tokens over which the state is carried, beside; the octaves beyond `context` are set beside the
            longest windows. Default: none.
        unjudged: an id that is read and not judged.
        locus: tokens that count as drawn together, with their homologues; half of `context` where that is more.

    Returns:
        The bits by length and locus.

    Raises:
        ConfigError: `context` is out of range.
        DataError: no region is longer than `context`, all is unknown, or an id is outside the model's vocabulary.
    """
    if context < 2:
        raise ConfigError(f"contexts: context must be at least 2, got {context}")
    stretches = _stretches(regions, context, max(locus, context // 2))
    _, loci = np.unique(np.concatenate([one.loci() for one in stretches]), return_inverse=True)
    count = int(loci.max()) + 1
    aims = np.concatenate([np.asarray(tokens[one.start : one.end]) for one in stretches])
    known = np.ones(len(aims), bool) if unjudged is None else aims != unjudged
    if not known.any():
        raise DataError("contexts: wanted tokens to judge, got unknown ones alone")

    lengths = tuple(sorted({max(2, context >> power) for power in range(_LENGTHS)}))
    sums, bits = [], np.empty(0)
    for length in lengths:
        stride = length // 2
        before, at_once = length - stride, max(1, _AT_ONCE // length)
        read = [tokens[one.start - 1 - before : one.end] for one in stretches]
        bits = np.concatenate([window_bits(model, some, length, stride, batch_size=at_once)[before:] for some in read])
        sums.append(np.bincount(loci, np.where(known, bits, 0.0), count))

    digest = hashlib.sha256(repr((lengths, [one.end - one.start for one in stretches])).encode())
    digest.update(loci.astype("<i8").tobytes())
    for one in stretches:
        digest.update(np.asarray(tokens[one.start - 1 - context + context // 2 : one.end]).astype("<i8").tobytes())
    octaves = []
    if carried is not None:
        octave, more = _carried(model, tokens, stretches, bits, context, carried)
        for number in np.unique(octave[(octave >= 0) & known]).tolist():
            here = known & (octave == number)
            first, last = (context << number) + 1, min(context << (number + 1), carried)
            there = np.bincount(loci, here, count).astype(np.int64)
            cost = np.bincount(loci, np.where(here, more, 0.0), count).astype(np.float64)
            octaves.append(CarriedOctave(first, last, there, cost))
    judged = np.bincount(loci, known, count).astype(np.int64)
    return ByContext(digest.hexdigest(), lengths, judged, np.stack(sums), tuple(octaves))


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Tokens that are judged, [start, end); `first` is where the first such of the region lies, `size` a locus's."""

    region: Region
    start: int
    end: int
    first: int
    size: int

    def loci(self) -> NDArray[np.int64]:
        """(tokens,): equal where the locus is."""
        places = np.arange(self.start, self.end) - self.first + self.region.place
        # No locus has as high a number.
        return (self.region.group << 40) + places // self.size


def _stretches(regions: Sequence[Region], context: int, size: int) -> list[_Stretch]:
    """What is judged, `size` tokens or fewer at a time."""
    half = context // 2
    found = []
    for region in regions:
        first = region.start + context - half + 1
        for start in range(first, region.end - half + 1, size):
            found.append(_Stretch(region, start, min(start + size, region.end), first, size))
    if not found:
        longest = max((region.end - region.start for region in regions), default=0)
        raise DataError(
            f"contexts: wanted a region of more than {context} tokens, got {longest} at most; lower the context"
        )
    share = min(1.0, _TOKENS / sum(one.end - one.start for one in found), _STRETCHES / len(found))
    loci = [int(one.loci()[0]) for one in found]
    distinct = sorted(set(loci))
    chosen = np.linspace(0, len(distinct) - 1, max(1, int(share * len(distinct)))).round()
    kept = {distinct[int(number)] for number in chosen}
    return [one for one, number in zip(found, loci, strict=True) if number in kept]


def _carried(
    model: nn.Module,
    tokens: NDArray[Any],
    stretches: Sequence[_Stretch],
    bits: NDArray[np.float64],
    context: int,
    carried: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(octave beyond `context`, -1 where it isn't beyond; bits more than `bits`) of each token of the stretches, the
    state carried over `carried` tokens from a region's start on, and again from there."""
    octave, more = np.full(len(bits), -1), np.zeros(len(bits))
    offsets = np.cumsum([0, *(one.end - one.start for one in stretches)])
    starts = [
        first
        for region in dict.fromkeys(one.region for one in stretches)
        for first in range(region.start, region.end - carried, carried)
    ]
    chunk = min(context, _AT_ONCE)
    rows, where = max(1, _AT_ONCE // chunk), next(model.parameters()).device
    for batch in (starts[number : number + rows] for number in range(0, len(starts), rows)):
        pieces = [piece for _, piece in row_bits(model, tokens, batch, carried, chunk, where)]
        for first, row in zip(batch, np.concatenate(pieces, axis=1), strict=True):
            for one, offset in zip(stretches, offsets, strict=False):
                low, high = max(one.start, first + context + 1), min(one.end, first + carried + 1)
                if low < high:
                    here = slice(offset + low - one.start, offset + high - one.start)
                    before = np.arange(low, high) - first
                    octave[here] = np.frexp((before - 1) // context)[1] - 1
                    more[here] = row[low - first - 1 : high - first - 1] - bits[here]
    return octave, more
