"""Tasks that test what a model can hold on to: copying, selective copying, induction heads, associative recall.

A batch is a function of (seed, number of the first example) alone, in integers: every device makes the same tokens, a
step counter that lives on the device is enough to make the next batch inside a CUDA graph, and one number resumes a
run. Example e of seed s draws words from SplitMix64 (Steele, Lea and Flood 2014), whose k-th output is
``mix(key + (k + 1) G)`` with ``G = 0x9E3779B97F4A7C15``, from the key ``mix(mix(s) + (e + 1) G)``, all modulo 2^64. A
word becomes a number below n as ``(upper 32 bits * n) >> 32``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from statescan.errors import ConfigError

__all__ = [
    "AssociativeRecall",
    "InductionHeads",
    "SelectiveCopying",
    "SyntheticBatch",
    "SyntheticTask",
    "example_keys",
    "random_words",
    "words_below",
]


class SyntheticBatch(NamedTuple):
    """inputs: (batch, length) int64; answers: (batch, asked) int64, what the last `asked` positions must predict."""

    inputs: Tensor
    answers: Tensor


class SyntheticTask(Protocol):
    """What the recipes ask of a task."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def total_length(self) -> int:
        """Tokens of an example."""
        ...

    @property
    def asked(self) -> int:
        """How many of the last positions are judged."""
        ...

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the tokens that can be an answer."""
        ...

    @property
    def symbols(self) -> str:
        """A character for each token id, for pictures."""
        ...

    def batch(
        self, seed: int, first: int | Tensor, rows: int, device: torch.device | str | None = None
    ) -> SyntheticBatch:
        """Examples first to first + rows - 1; `first` may be a 0-d int64 tensor on the device."""
        ...


def _signed(word: int) -> int:
    """The int64 that has the bits of a 64-bit word."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def example_keys(seed: int, first: int | Tensor, rows: int, device: torch.device | str | None = None) -> Tensor:
    """The keys of examples first to first + rows - 1: (rows,) int64, bits of a 64-bit word.

    Args:
        seed: any integer; its lowest 64 bits count.
        first: number of the first example, or a 0-d int64 tensor of it.
        rows: how many.
        device: where they are made.
    """
    base = _mix(torch.full((), _signed(seed), dtype=torch.int64, device=device))
    return _mix(base + (torch.arange(1, rows + 1, device=device) + first) * _GAMMA)


def random_words(keys: Tensor, start: int, stop: int) -> Tensor:
    """Words start to stop - 1 of each example: (rows, stop - start) int64, bits of a 64-bit word."""
    steps = torch.arange(start + 1, stop + 1, device=keys.device) * _GAMMA
    return _mix(keys.unsqueeze(-1) + steps)


def words_below(words: Tensor, n: int) -> Tensor:
    """Each word as a number in [0, n), n <= 2^31; every one has probability 1/n up to 2^-32."""
    return (_shift(words, 32) * n) >> 32


def _smallest(words: Tensor, count: int) -> Tensor:
    """Which `count` of each row's words are smallest in their upper 32 bits (of equals the first): (rows, count)."""
    places = torch.arange(words.shape[1], device=words.device)
    keys = ((_shift(words, 32)) << 31) | places
    return keys.topk(count, dim=1, largest=False, sorted=True).values & ((1 << 31) - 1)


def _want(task: object, name: str, fits: bool, wanted: str) -> None:
    if not fits:
        raise ConfigError(f"{type(task).__name__}: {name} must be {wanted}, got {getattr(task, name)!r}")


@dataclass(frozen=True, slots=True)
class SelectiveCopying:
    """Sixteen tokens lie at random places of a long noise; say them in order when asked.

    An example is `length` tokens, of which `tokens` are data and the others noise, and then `tokens` markers. At the
    i-th marker the i-th data token is to be predicted. Ids: 0 is noise, ``vocab_size - 1`` the marker, the others are
    data.

    Words of an example: 0 to tokens - 1 are the data, each ``1 + (word below vocab_size - 2)``. Words tokens + t, with
    t in [0, length), decide the places: the data lie, in order of place, where the upper 32 bits of the word are
    smallest, of equals at the first place.

    Args:
        length: data and noise together. Default 4096.
        tokens: how many to remember, at most `length`. Default 16.
        vocab_size: noise and marker included. Default 16.
        spread: at random places. False puts the data at the front, which is the copying task that this one generalises
            (a fixed delay, which a linear time-invariant model can learn). Default True.

    Raises:
        ConfigError: a field is out of range.

    Source: Gu and Dao (2023), section 4.1.1 and appendix E.1, which give length 4096, 16 tokens and vocabulary 16.
    They leave open how the answer is asked for and whether 4096 counts it. As in the S4 authors' `torch_copying_data`
    (variable=True), from which the encoding here is, the markers follow the sequence; that one has `tokens` more of
    noise and data than its length says. Copying: Arjovsky et al. (2016), arXiv:1511.06464; selective copying: Jing et
    al. (2019), arXiv:1706.02761.
    """

    length: int = 4096
    tokens: int = 16
    vocab_size: int = 16
    spread: bool = True

    def __post_init__(self) -> None:
        _want(self, "vocab_size", self.vocab_size >= 3, "at least 3: noise, marker and a data token")
        _want(self, "tokens", self.tokens >= 1, "at least 1")
        _want(self, "length", self.tokens <= self.length < 1 << 31, f"from tokens = {self.tokens} to 2^31 - 1")

    @property
    def total_length(self) -> int:
        """Tokens of an example, the markers included."""
        return self.length + self.tokens

    @property
    def asked(self) -> int:
        """One answer a data token."""
        return self.tokens

    @property
    def chance(self) -> float:
        """One in as many as there are data tokens."""
        return 1 / (self.vocab_size - 2)

    @property
    def symbols(self) -> str:
        """A dot for noise, capital letters for data, a question mark for the marker."""
        return "." + _letters(self.vocab_size - 2, "A") + "?"

    def batch(
        self, seed: int, first: int | Tensor, rows: int, device: torch.device | str | None = None
    ) -> SyntheticBatch:
        """Examples first to first + rows - 1 of a seed.

        Args:
            seed: of all examples.
            first: number of the first one, or a 0-d int64 tensor of it on the device.
            rows: how many.
            device: where they are made. Default: torch's.

        Returns:
            SyntheticBatch: inputs (rows, length + tokens), answers (rows, tokens).
        """
        keys = example_keys(seed, first, rows, device)
        words = random_words(keys, 0, self.tokens + (self.length if self.spread else 0))
        data = 1 + words_below(words[:, : self.tokens], self.vocab_size - 2)
        if self.spread:
            places = _smallest(words[:, self.tokens :], self.tokens).sort(1).values
        else:
            places = torch.arange(self.tokens, device=keys.device).expand(rows, -1)
        inputs = torch.zeros(rows, self.total_length, dtype=torch.int64, device=keys.device)
        inputs[:, self.length :] = self.vocab_size - 1
        return SyntheticBatch(inputs.scatter(1, places, data), data)


@dataclass(frozen=True, slots=True)
class InductionHeads:
    """A trigger stands somewhere in random tokens; when it comes again, say what followed it.

    An example is `length` tokens. The last one is the trigger, and so is the one at a place drawn from
    [0, length - 2); all others are ordinary. At the last position the token after the first trigger is to be predicted.
    Ids: ``vocab_size - 1`` is the trigger, the others are ordinary.

    Words of an example: 0 is the place, ``word below length - 2``; word 1 + t is the token at t,
    ``word below vocab_size - 1``, where no trigger stands.

    Args:
        length: all tokens, at least 3. Default 256.
        vocab_size: the trigger included. Default 16.

    Raises:
        ConfigError: a field is out of range.

    Source: Gu and Dao (2023), section 4.1.2 and appendix E.1; the task is that of H3, arXiv:2212.14052, in whose code
    the trigger is likewise one of the vocabulary and stands at a place drawn uniformly.
    """

    length: int = 256
    vocab_size: int = 16

    def __post_init__(self) -> None:
        _want(self, "vocab_size", self.vocab_size >= 3, "at least 3: the trigger and two others")
        _want(self, "length", 3 <= self.length < 1 << 31, "from 3 to 2^31 - 1")

    @property
    def total_length(self) -> int:
        """Tokens of an example."""
        return self.length

    @property
    def asked(self) -> int:
        """One answer."""
        return 1

    @property
    def chance(self) -> float:
        """One in as many as there are ordinary tokens."""
        return 1 / (self.vocab_size - 1)

    @property
    def symbols(self) -> str:
        """Small letters for ordinary tokens, a star for the trigger."""
        return _letters(self.vocab_size - 1, "a") + "*"

    def batch(
        self, seed: int, first: int | Tensor, rows: int, device: torch.device | str | None = None
    ) -> SyntheticBatch:
        """Examples first to first + rows - 1 of a seed: inputs (rows, length), answers (rows, 1); see `pieces`."""
        keys = example_keys(seed, first, rows, device)
        return SyntheticBatch(self.piece(keys, 0, self.length), self.answers(keys))

    def pieces(
        self, seed: int, first: int, rows: int, piece: int, device: torch.device | str | None = None
    ) -> tuple[Iterator[Tensor], Tensor]:
        """The same examples piece by piece, so that a million tokens a row need never be in memory together.

        Args:
            seed, first, rows, device: as in `SelectiveCopying.batch`.
            piece: tokens of a piece; the last one may be shorter.

        Returns:
            An iterator over (rows, piece) int64 inputs, and the answers (rows, 1).
        """
        if piece < 1:
            raise ConfigError(f"InductionHeads.pieces: piece must be at least 1, got {piece}")
        keys = example_keys(seed, first, rows, device)
        starts = range(0, self.length, piece)
        return (self.piece(keys, start, min(piece, self.length - start)) for start in starts), self.answers(keys)

    def piece(self, keys: Tensor, start: int | Tensor, count: int) -> Tensor:
        """Tokens start to start + count - 1 of the examples that have these keys: (rows, count) int64.

        Args:
            keys: (rows,), from `example_keys`.
            start: place of the first token, or a 0-d int64 tensor of it on the device.
            count: how many; the example's end is not passed.
        """
        at = torch.arange(count, device=keys.device) + start
        # Word 1 + t is the token at t.
        tokens = words_below(_mix(keys.unsqueeze(-1) + (at + 2) * _GAMMA), self.vocab_size - 1)
        trigger = (at == self._place(keys)) | (at == self.length - 1)
        return tokens.masked_fill(trigger, self.vocab_size - 1)

    def answers(self, keys: Tensor) -> Tensor:
        """What must be predicted at the last position of the examples that have these keys: (rows, 1) int64."""
        # The answer stands one after the trigger.
        return words_below(_mix(keys.unsqueeze(-1) + (self._place(keys) + 3) * _GAMMA), self.vocab_size - 1)

    def _place(self, keys: Tensor) -> Tensor:
        return words_below(random_words(keys, 0, 1), self.length - 2)


@dataclass(frozen=True, slots=True)
class AssociativeRecall:
    """Pairs of a key and a value, then keys: say the value of each.

    An example is ``key value key value ... query query ...``: `pairs` pairs with distinct keys, then `queries` distinct
    ones of these keys. At each query its value is to be predicted. Ids: the lower half of the vocabulary are keys, the
    upper half values.

    With K = vocab_size // 2, words of an example: 0 to K - 1 order the keys, the pairs' keys are the ids of the `pairs`
    smallest (upper 32 bits; of equals the lower id), smallest first; K to K + pairs - 1 are the values,
    ``K + (word below vocab_size - K)``; the next `pairs` words order the pairs in the same way, the first `queries` of
    which are asked for.

    Args:
        pairs: how many, at most as many as there are keys. Default 8.
        queries: how many keys are asked for, at most `pairs`. Default 1.
        vocab_size: keys and values. Default 32.

    Raises:
        ConfigError: a field is out of range.

    Source: Ba et al. (2016), arXiv:1610.06258; the form with a key and its value next to each other as in H3,
    arXiv:2212.14052; several queries as in Arora et al. (2023), arXiv:2312.04927.
    """

    pairs: int = 8
    queries: int = 1
    vocab_size: int = 32

    def __post_init__(self) -> None:
        _want(self, "vocab_size", self.vocab_size >= 4, "at least 4: two keys and two values")
        keys = self.vocab_size // 2
        _want(self, "pairs", 1 <= self.pairs <= keys, f"from 1 to the number of keys, vocab_size // 2 = {keys}")
        _want(self, "queries", 1 <= self.queries <= self.pairs, f"from 1 to pairs = {self.pairs}")

    @property
    def total_length(self) -> int:
        """Tokens of an example."""
        return 2 * self.pairs + self.queries

    @property
    def asked(self) -> int:
        """One answer a query."""
        return self.queries

    @property
    def chance(self) -> float:
        """One in as many as there are values."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    @property
    def symbols(self) -> str:
        """Small letters for keys, capital ones for values."""
        keys = self.vocab_size // 2
        return _letters(keys, "a") + _letters(self.vocab_size - keys, "A")

    def batch(
        self, seed: int, first: int | Tensor, rows: int, device: torch.device | str | None = None
    ) -> SyntheticBatch:
        """Examples first to first + rows - 1 of a seed: inputs (rows, 2 pairs + queries), answers (rows, queries)."""
        half = self.vocab_size // 2
        words = random_words(example_keys(seed, first, rows, device), 0, half + 2 * self.pairs)
        keys = _smallest(words[:, :half], self.pairs)
        values = half + words_below(words[:, half : half + self.pairs], self.vocab_size - half)
        asked = _smallest(words[:, half + self.pairs :], self.queries)
        pairs = torch.stack([keys, values], dim=-1).flatten(1)
        return SyntheticBatch(torch.cat([pairs, keys.gather(1, asked)], 1), values.gather(1, asked))


def _letters(count: int, first: str) -> str:
    """Distinct characters: the alphabet from `first`, and beyond it Braille signs, which every monospaced font has."""
    alphabet = [chr(ord(first) + i) for i in range(min(count, 26))]
    beyond = 0x2801 if first == "a" else 0x2881
    return "".join(alphabet + [chr(beyond + i) for i in range(count - len(alphabet))])
