"""The yardsticks against their definitions, computed with dictionaries and loops."""

from __future__ import annotations

import lzma
from collections import Counter, defaultdict

import numpy as np
import pytest

from statescan.errors import ConfigError, DataError
from statescan.evaluate import NGramModel, ngram_bits_per_byte, xz_bits_per_byte

TEXT = (b"the cat sat on the mat and the rat ate the hat; then that cat chased the fat rat. " * 3) + bytes(
    range(97, 123)
) * 2


class NaiveKneserNey:
    """The same model from the book: dictionaries, one probability at a time."""

    def __init__(self, text: bytes, order: int) -> None:
        grams = Counter(text[i : i + order] for i in range(len(text) - order + 1))
        self.counts = {order: grams}
        for length in range(order - 1, 0, -1):
            self.counts[length] = Counter(gram[1:] for gram in self.counts[length + 1])
        self.discount = {}
        self.followers = {}
        for length, counts in self.counts.items():
            n = Counter(counts.values())
            y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
            d = [0.0]
            for c in (1, 2, 3):
                estimate = c - (c + 1) * y * n[c + 1] / n[c] if n[c] else y
                d.append(estimate if 0 < estimate < c else min(y, 0.5))
            self.discount[length] = d
            followers = defaultdict(dict)
            for gram, count in counts.items():
                followers[gram[:-1]][gram[-1]] = count
            self.followers[length] = followers

    def p(self, symbol: int, context: bytes, length: int) -> float:
        if length == 0:
            return 1 / 256
        shorter = self.p(symbol, context[1:], length - 1)
        seen = self.followers[length].get(context)
        if seen is None:
            return shorter
        total = sum(seen.values())
        d = [self.discount[length][min(c, 3)] for c in seen.values()]
        count = seen.get(symbol, 0)
        return max(count - self.discount[length][min(count, 3)], 0) / total + sum(d) / total * shorter


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7])
def test_matches_the_definition(order):
    model, naive = NGramModel(order).fit(TEXT), NaiveKneserNey(TEXT, order)
    held = b"the bat and the cat \xff\x00 zz"
    for i in range(len(held)):
        length = min(i + 1, order)
        context = held[i - length + 1 : i]
        np.testing.assert_allclose(model.bits(held)[i], -np.log2(naive.p(held[i], context, length)), rtol=1e-12)


@pytest.mark.parametrize("context", [b"", b"t", b"the ", b"cat chased", b"\xff\xff\xff\xff", b"\x00the"])
@pytest.mark.parametrize("order", [1, 3, 5, 7])
def test_probabilities_sum_to_one_and_are_positive(order, context):
    p = NGramModel(order).fit(TEXT).probabilities(context)
    assert p.shape == (256,)
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-13)


@pytest.mark.parametrize("text", [b"aaaaaaaaaa", b"abcdefgh", b"ab", bytes(range(256)) * 4])
def test_odd_texts_still_give_distributions(text):
    model = NGramModel(2).fit(text)
    for context in (b"a", b"z"):
        p = model.probabilities(context)
        assert (p > 0).all()
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-13)


def test_bits_are_those_of_the_probabilities_and_context_counts():
    model = NGramModel(4).fit(TEXT)
    bits = model.bits(b"rat", context=b"the fat ")
    wanted = [-np.log2(model.probabilities(b"the fat " + b"rat"[:i])["rat"[i].encode()[0]]) for i in range(3)]
    np.testing.assert_allclose(bits, wanted, rtol=1e-12)
    np.testing.assert_allclose(model.bits_per_byte(b"rat", context=b"the fat "), np.mean(wanted), rtol=1e-12)
    assert model.bits(b"rat")[0] != bits[0]


def test_longer_contexts_help_on_text_and_cost_nothing_on_noise():
    rng = np.random.default_rng(0)
    noise, more = rng.bytes(20000), rng.bytes(2000)
    assert 7.95 < NGramModel(5).fit(noise).bits_per_byte(more) < 8.2
    held = b"the rat sat on the cat and the hat"
    assert NGramModel(5).fit(TEXT).bits_per_byte(held) < NGramModel(1).fit(TEXT).bits_per_byte(held)


def test_a_chain_of_known_entropy_is_learnt_to_its_entropy():
    """A first-order chain over four letters that goes on to the next one with probability 0.9."""

    def chain(length, seed):
        rng = np.random.default_rng(seed)
        steps = np.where(rng.random(length) < 0.9, 1, 1 + rng.integers(1, 4, length))
        return (97 + np.cumsum(steps) % 4).astype(np.uint8).tobytes()

    entropy = -(0.9 * np.log2(0.9) + 3 * (0.1 / 3) * np.log2(0.1 / 3))
    train, held = chain(200_000, 1), chain(50_000, 2)
    assert entropy * 0.97 < ngram_bits_per_byte(train, held, order=3) < entropy * 1.03
    assert 1.95 < ngram_bits_per_byte(train, held, order=1) < 2.05


def test_ngram_errors():
    with pytest.raises(ConfigError, match="from 1 to 7, got 8"):
        NGramModel(8)
    with pytest.raises(ConfigError, match="fit"):
        NGramModel().bits(b"abc")
    with pytest.raises(DataError, match="at least 5 bytes, got 3"):
        NGramModel().fit(b"abc")
    with pytest.raises(DataError, match="at least one byte"):
        NGramModel(2).fit(b"abc").bits_per_byte(b"")


def test_xz_refers_to_the_training_text():
    rng = np.random.default_rng(0)
    noise = rng.bytes(20000)
    assert xz_bits_per_byte(noise, noise) < 0.5
    assert 7.9 < xz_bits_per_byte(noise, rng.bytes(20000)) < 8.2
    preset = 9 | lzma.PRESET_EXTREME
    wanted = 8 * (len(lzma.compress(TEXT + b"hello", preset=preset)) - len(lzma.compress(TEXT, preset=preset))) / 5
    assert xz_bits_per_byte(TEXT, b"hello") == wanted
    with pytest.raises(DataError, match="at least one byte"):
        xz_bits_per_byte(TEXT, b"")
