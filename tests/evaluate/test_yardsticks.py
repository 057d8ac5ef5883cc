"""The yardsticks are honest: the n-gram's probabilities sum to one, it beats what it should, and it doesn't cheat."""

from __future__ import annotations

import lzma

import numpy as np
import pytest

from statescan.errors import ConfigError, DataError
from statescan.evaluate.yardsticks import NgramModel, ngram_bits_per_byte, xz_bits_per_byte

TEXT = ("the whale swam in the cold sea, and the man saw the whale in the sea. " * 40).encode()


def _markov(length: int, seed: int) -> bytes:
    """A first-order chain over four letters with a known entropy rate of log2(4) - 0.9 log2(0.9 * 4) - ..."""
    random = np.random.default_rng(seed)
    letters, jumps, others = [0], random.random(length), random.integers(1, 4, length)
    for jump, other in zip(jumps, others, strict=True):
        letters.append((letters[-1] + (1 if jump < 0.9 else 1 + int(other))) % 4)
    return bytes(97 + letter for letter in letters)


@pytest.mark.parametrize("order", [1, 2, 5, 7])
def test_probabilities_sum_to_one_in_seen_and_unseen_contexts(order: int) -> None:
    model = NgramModel(TEXT, order)
    for context in (b"the wh", b"zzzzzz", b"\x00\x00\x00the"[-6:]):
        number = int.from_bytes(context[len(context) - (order - 1) :], "big") << 8
        assert model.probabilities(number + np.arange(256)).sum() == pytest.approx(1.0, abs=1e-12)


def test_a_chain_of_known_entropy_is_learnt_to_its_entropy() -> None:
    train, held_out = _markov(200_000, 1), _markov(50_000, 2)
    entropy = -(0.9 * np.log2(0.9) + 3 * (0.1 / 3) * np.log2(0.1 / 3))
    bits = ngram_bits_per_byte(train, held_out, order=3)
    assert entropy * 0.97 < bits < entropy * 1.03
    assert ngram_bits_per_byte(train, held_out, order=1) > 1.9  # without a context four equal letters cost two bits


def test_the_unigram_is_close_to_the_entropy_of_the_counts() -> None:
    counts = np.bincount(np.frombuffer(TEXT, np.uint8))
    share = counts[counts > 0] / counts.sum()
    # Kneser-Ney's order 1 is interpolated with 1/256, so it is never below the counts' entropy.
    assert 0 <= NgramModel(TEXT, 1).bits_per_byte(TEXT) + (share * np.log2(share)).sum() < 0.05


def test_the_first_byte_is_judged_in_the_context_of_the_text_before() -> None:
    model = NgramModel(TEXT, 5)
    whole = model.probabilities(np.array([int.from_bytes(b"whale"[-5:], "big")]))[0]
    assert model.bits_per_byte(b"e", before=b"the whal") == pytest.approx(-np.log2(whole))


def test_xz_after_the_training_text() -> None:
    fresh = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)
    assert xz_bits_per_byte(TEXT, TEXT) < 0.5
    assert xz_bits_per_byte(TEXT, fresh) == pytest.approx(8, abs=0.3)
    both = len(lzma.compress(TEXT + TEXT[:999], preset=9 | lzma.PRESET_EXTREME))
    alone = len(lzma.compress(TEXT, preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_byte(TEXT, TEXT[:999]) == 8 * (both - alone) / 999


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="order must be from 1 to 7, got 9"):
        NgramModel(TEXT, 9)
    with pytest.raises(DataError, match="at least 5 bytes, got 3"):
        NgramModel(b"abc")
    with pytest.raises(DataError, match="is empty"):
        NgramModel(TEXT).bits_per_byte(b"")
    with pytest.raises(DataError, match="flat sequence of bytes"):
        NgramModel(np.array([1, 2, 300]))
    with pytest.raises(DataError, match="is empty"):
        xz_bits_per_byte(TEXT, b"")
