"""What a text costs without a neural network: a general compressor and a model of byte n-grams."""

from __future__ import annotations

import lzma
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from statescan.errors import ConfigError, DataError

__all__ = ["NGramModel", "ngram_bits_per_byte", "xz_bits_per_byte"]

_XZ_PRESET = 9 | lzma.PRESET_EXTREME


def xz_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Bits that xz needs for a byte of `held_out` when it has `train` to refer to.

    ``8 (size(xz(train + held_out)) - size(xz(train))) / len(held_out)``, at preset 9 extreme, whose dictionary of 64
    MiB sees the whole of a text up to that length.

    Args:
        train: what the other models were trained on; may be empty.
        held_out: at least one byte.

    Raises:
        DataError: `held_out` is empty.
    """
    if not held_out:
        raise DataError("xz_bits_per_byte: held_out must hold at least one byte, got none")
    both, alone = (len(lzma.compress(data, preset=_XZ_PRESET)) for data in (train + held_out, train))
    return 8 * (both - alone) / len(held_out)


def ngram_bits_per_byte(train: bytes, held_out: bytes, order: int = 5) -> float:
    """Bits that an `NGramModel` of `train` needs for a byte of `held_out`, taken to follow it.

    Args:
        train: at least `order` bytes.
        held_out: at least one byte.
        order: 1 to 7. Default 5.

    Raises:
        ConfigError, DataError: as `NGramModel` does.
    """
    return NGramModel(order).fit(train).bits_per_byte(held_out, context=train)


class _Level(NamedTuple):
    """Counts of the n-grams of one length: sorted keys, and what their contexts sum up to."""

    keys: NDArray[np.uint64]  # context and symbol, most recent byte lowest
    discounted: NDArray[np.float64]  # (count - discount) / count of the context, per key
    contexts: NDArray[np.uint64]
    backoff: NDArray[np.float64]  # weight of the shorter context, per context


class NGramModel:
    """Predicts bytes from the bytes before: modified Kneser-Ney smoothing, interpolated down to the uniform.

    ``p_k(w | c) = (N(c w) - D(N(c w))) / N(c) + backoff(c) p_{k-1}(w | c without its first byte)``; an unseen context
    hands over to the shorter one whole. The longest order counts occurrences, the shorter ones the different bytes seen
    before. Everything is arrays: keys are sorted and looked up by bisection, 1 MB takes a fraction of a second.

    Args:
        order: longest n-gram, 1 to 7 (a context of order - 1 bytes). Default 5.

    Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (1998), section 3;
        discounts from its equation 17, here kept within (0, count).
    """

    def __init__(self, order: int = 5) -> None:
        if not 1 <= order <= 7:
            raise ConfigError(f"NGramModel: order must be from 1 to 7, got {order}")
        self.order = order
        self._levels: list[_Level] = []

    def fit(self, text: bytes) -> NGramModel:
        """Counts a text; what was counted before is forgotten.

        Raises:
            DataError: the text is shorter than the order.
        """
        if len(text) < self.order:
            raise DataError(f"NGramModel: text must hold at least {self.order} bytes, got {len(text)}")
        grams = _grams(np.frombuffer(text, dtype=np.uint8), self.order)
        keys, counts = np.unique(grams, return_counts=True)
        levels = [_level(keys, counts)]
        for length in range(self.order - 1, 0, -1):
            # Each different (length + 1)-gram counts once for the n-gram that is left when its first byte goes.
            keys, counts = np.unique(keys & np.uint64((1 << 8 * length) - 1), return_counts=True)
            levels.append(_level(keys, counts))
        self._levels = levels[::-1]
        return self

    def bits(self, text: bytes, context: bytes = b"") -> NDArray[np.float64]:
        """Bits spent on each byte of a text.

        Args:
            text: the bytes to judge.
            context: what stands before it, e.g. the end of the training text.

        Returns:
            (len(text),) float64.
        """
        self._fitted()
        before = context[-(self.order - 1) :] if self.order > 1 else b""
        data = np.frombuffer(before + text, dtype=np.uint8)
        p = np.full(len(data), 1 / 256)
        for length, level in enumerate(self._levels, start=1):
            if len(data) < length:
                break
            # The first bytes of all have no context of this length: they keep the shorter one's probability.
            p[length - 1 :] = _interpolate(level, _grams(data, length), p[length - 1 :])
        return -np.log2(p[len(before) :])

    def bits_per_byte(self, text: bytes, context: bytes = b"") -> float:
        """Mean of `bits`.

        Raises:
            DataError: the text is empty.
        """
        if not text:
            raise DataError("NGramModel: text must hold at least one byte, got none")
        return float(self.bits(text, context).mean())

    def probabilities(self, context: bytes) -> NDArray[np.float64]:
        """Distribution of the next byte, (256,) float64; it sums to 1."""
        self._fitted()
        p = np.full(256, 1 / 256)
        for length, level in enumerate(self._levels, start=1):
            if len(context) < length - 1:
                break
            past = int.from_bytes(context[len(context) - length + 1 :], "big")
            p = _interpolate(level, np.uint64(past << 8) | np.arange(256, dtype=np.uint64), p)
        return p

    def _fitted(self) -> None:
        if not self._levels:
            raise ConfigError("NGramModel: fit(text) must come first")


def _grams(data: NDArray[np.uint8], length: int) -> NDArray[np.uint64]:
    """Every run of `length` bytes as one number, the last byte lowest."""
    count = len(data) - length + 1
    keys = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        keys = (keys << np.uint64(8)) | data[offset : offset + count]
    return keys


def _level(keys: NDArray[np.uint64], counts: NDArray[np.int64]) -> _Level:
    discount = _discounts(counts)[np.minimum(counts, 3)]
    contexts, first = np.unique(keys >> np.uint64(8), return_index=True)
    total = np.add.reduceat(counts, first)
    owner = np.repeat(np.arange(len(contexts)), np.diff(np.append(first, len(keys))))
    return _Level(
        keys,
        (counts - discount) / total[owner],
        contexts,
        np.add.reduceat(discount, first) / total,
    )


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """D(0..3): what is taken off a count of 1, 2, and 3 or more."""
    n = [int((counts == c).sum()) for c in range(5)]
    y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
    out = np.zeros(4)
    for c in (1, 2, 3):
        # Small or odd texts leave an estimate outside (0, c): absolute discounting by y, within the same bounds,
        # instead.
        estimate = c - (c + 1) * y * n[c + 1] / n[c] if n[c] else y
        out[c] = estimate if 0 < estimate < c else min(y, 0.5)
    return out


def _interpolate(level: _Level, keys: NDArray[np.uint64], shorter: NDArray[np.float64]) -> NDArray[np.float64]:
    def look_up(table: NDArray[np.uint64], values: NDArray[np.float64], wanted: NDArray[np.uint64], missing: float):
        at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
        return np.where(table[at] == wanted, values[at], missing)

    direct = look_up(level.keys, level.discounted, keys, 0.0)
    weight = look_up(level.contexts, level.backoff, keys >> np.uint64(8), 1.0)
    return direct + weight * shorter
