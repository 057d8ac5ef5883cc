"""Text out of tokens, piece by piece: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

__all__ = ["BytesDecoder", "Stop", "StopMatcher", "TextStream"]


_BEFORE = 8
# Tokens after which what is unsettled is shown as it stands.
_UNSETTLED = 24
_REPLACEMENT = "\ufffd".encode()


class BytesDecoder(Protocol):
    """What is asked of a tokenizer here: the bytes that a run of tokens stands for.

    Where it says so by a true attribute `bytes_add_up`, those are the bytes of each token, one after the other.
    """

    def decode_bytes(self, ids: Sequence[int], /) -> bytes: ...


# What single tokens stand for, by tokenizer: text where it is ASCII, whole whatever comes before it, else bytes.
_tables: WeakKeyDictionary[BytesDecoder, dict[int, str | bytes]] = WeakKeyDictionary()


class Stop(NamedTuple):
    """A stop string found: what may still be shown, and which string it was."""

    text: str
    stop: str


class StopMatcher:
    """Finds the first stop string to be completed in a text that comes in pieces.

    What it finds doesn't depend on where the pieces are cut: the string that ends first wins, and of those that end at
    the same character the one that starts first. Text is held back while it may still become a stop string.

    Args:
        stops: strings of at least one character.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str | Stop:
        """Takes the next piece; returns the text that is safe to show, or the `Stop` with the text before it."""
        if not self._stops:
            return piece
        text = self._held + piece
        # (end, start): a stop can't have been complete in the held text alone, so one pass over the new text is enough.
        found = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in self._stops if stop in text]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return Stop(text[:start], stop)
        hold = self._overlap(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """The text held back, at the end: it became no stop string."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class TextStream:
    """Turns tokens into text that can be shown at once: no character is cut, no part of a stop string gets out.

    Bytes that can't be UTF-8 become U+FFFD, as in ``bytes.decode("utf-8", "replace")``. Bytes that begin a character
    are held until it is whole; those still unfinished at the end are left out.

    Args:
        tokenizer: gives the bytes of tokens.
        stops: stop strings.
        before: the tokens before the first one pushed, for tokenizers whose text depends on its neighbours, and for a
            prompt that ends inside a character. Only the last few are looked at.
    """

    def __init__(self, tokenizer: BytesDecoder, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stops)
        self._window = list(before[-_BEFORE:])
        self._known = tokenizer.decode_bytes(self._window) if self._window else b""
        self._utf8.decode(self._known)  # already shown; only an unfinished character stays inside
        self._unfinished = bool(self._utf8.getstate()[0])
        self._table = _tables.setdefault(tokenizer, {}) if getattr(tokenizer, "bytes_add_up", False) else None
        self._stops = bool(stops)

    def push(self, token: int) -> str | Stop:
        """Takes one token; returns the text that is safe to show (it may be empty), or the `Stop` that it completed."""
        if self._table is not None:
            piece = self._table.get(token)
            if piece is None:
                data = self._tokenizer.decode_bytes([token])
                piece = self._table[token] = data.decode("ascii") if data.isascii() else data
            if isinstance(piece, bytes):
                piece = self._text(piece)
            elif self._unfinished:
                piece = self._text(piece.encode())
            return self._matcher.push(piece) if self._stops else piece
        # The bytes of a token are what it adds to the text of the token before it: in vocabularies that mark the
        # beginning of words, a token alone loses its space.
        self._window.append(token)
        data = self._tokenizer.decode_bytes(self._window)
        # Vocabularies that spell a character in several tokens, but decode to text, show U+FFFD until it is whole.
        unsettled = not data.startswith(self._known) or data.endswith(_REPLACEMENT)
        if unsettled and len(self._window) < _UNSETTLED:
            return ""
        new = data[len(self._known) :]
        self._window = [token]
        self._known = self._tokenizer.decode_bytes(self._window)
        return self._matcher.push(self._text(new))

    def _text(self, data: bytes) -> str:
        text = self._utf8.decode(data)
        self._unfinished = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """The rest of the text when the row has ended for another reason than a stop string."""
        return self._matcher.flush()
