"""Texts in which names are given to others, so that a name is foretold from what was read of it and not by heart.

A small model that reads the same novels many times learns their names by heart, and with that loses the reason to look
back for them. In a copy of the text whose people and places are called otherwise in every stretch, only looking back
helps. What counts as a name is how it is written, so titles, peoples, months and God are among them: of English novels,
speeches and Wikipedia's introductions "Mrs", "Miss", "States" and "American" are of the most frequent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from statescan.errors import DataError

__all__ = ["SEGMENT", "VERSION", "find_names", "swap_books", "swap_names", "swapped_copies"]

# Bytes in which a name stays the same.
SEGMENT = 1 << 15
# Changes whenever the same text and seed give other names.
VERSION = 2
# A capitalised word: three ASCII letters at least, no letter beside them, of other alphabets with two bytes each either
# (a quotation mark or a dash has three).
_BEFORE, _AFTER = rb"(?<![A-Za-z])(?<![\xc3-\xdf][\x80-\xbf])", rb"(?![A-Za-z\xc3-\xdf])"
_CAPITALISED = re.compile(_BEFORE + rb"[A-Z][a-z]{2,}" + _AFTER)
_WITHIN = re.compile(rb"(?<=[a-z,;] )[A-Z][a-z]{2,}" + _AFTER)
_LOWER = re.compile(_BEFORE + rb"[a-z]{3,}" + _AFTER)
# How often a name stands inside a sentence at least, and how many times as often as the same word without its capital.
_LEAST, _RATHER = 2, 5


def find_names(text: bytes) -> list[bytes]:
    """The words that a text writes with a capital inside of sentences, and hardly ever without.

    Args:
        text: UTF-8 text in a language that capitalises names, English say.

    Returns:
        Each once, in order.
    """
    within, lower = Counter(_WITHIN.findall(text)), Counter(_LOWER.findall(text))
    return sorted(name for name, count in within.items() if count >= _LEAST and count > _RATHER * lower[name.lower()])


def swap_names(text: bytes, names: Sequence[bytes], seed: int | Sequence[int], *, segment: int = SEGMENT) -> bytes:
    """The text with other names: in every segment each name is another one's, or one made of two, wherever it stands.

    Args:
        text: UTF-8 text.
        names: what to swap, as `find_names` gives it.
        seed: of the draws.
        segment: bytes at most, up to a line's end, or a space where there is none, in which a name stays the same.

    Returns:
        The new text, of another length.

    Raises:
        DataError: a segment of no bytes.
    """
    if segment < 1:
        raise DataError(f"swap_names: segment must be at least 1 byte, got {segment}")
    known, random, parts, start = set(names), np.random.default_rng(seed), [], 0

    def another() -> bytes:
        one, two = (names[i] for i in random.integers(len(names), size=2))
        if random.random() < 0.5:
            return one
        return one[: (len(one) + 1) // 2] + two[len(two) // 2 :].lower()

    while start < len(text):
        end = start + segment
        if end < len(text):
            end = text.rfind(b"\n", start, end) + 1 or text.rfind(b" ", start, end) + 1 or end
        called: dict[bytes, bytes] = {}

        def renamed(found: re.Match[bytes], called: dict[bytes, bytes] = called) -> bytes:
            name = found.group()
            if name not in known:
                return name
            if name not in called:
                called[name] = another()
            return called[name]

        parts.append(_CAPITALISED.sub(renamed, text[start:end]))
        start = end
    return b"".join(parts)


def swapped_copies(tokens: NDArray[np.uint8], copies: int, seed: int = 0) -> NDArray[np.uint8]:
    """Copies of a text of bytes, one after the other, each with names of its own.

    Args:
        tokens: (bytes,) uint8.
        copies: how many.
        seed: of the draws; copy k is the same however many there are.

    Returns:
        (about copies * bytes,) uint8.

    Raises:
        DataError: the text has no two names to give to each other.
    """
    text = tokens.tobytes()
    names = _names(text)
    return np.frombuffer(b"".join(swap_names(text, names, (seed, copy)) for copy in range(copies)), np.uint8)


def swap_books(books: Sequence[bytes], copies: int, seed: int = 0) -> Iterator[list[bytes]]:
    """Copies of books in which each has other names, which it keeps from its first page to its last.

    Args:
        books: UTF-8 texts; a name of one is a name in all.
        copies: how many.
        seed: of the draws; copy k is the same however many there are.

    Raises:
        DataError: they have no two names to give to each other.
    """
    names = _names(b"\n".join(books))
    for copy in range(copies):
        yield [
            swap_names(book, names, (seed, copy, number), segment=max(1, len(book)))
            for number, book in enumerate(books)
        ]


def _names(text: bytes) -> list[bytes]:
    names = find_names(text)
    if len(names) < 2:
        raise DataError(
            "names: wanted a text with two names at least, words that it writes with a capital within sentences and "
            f"hardly ever without; got {len(names)}; train without copies"
        )
    return names
