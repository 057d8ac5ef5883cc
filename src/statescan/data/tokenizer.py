"""Tokenizers: bytes by default, any `tokenizers` JSON by path, bases, a character for each id of a small vocabulary."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from statescan.errors import ConfigError, DataError, MissingExtraError
from statescan.files import atomic_file, write_json

__all__ = [
    "DNA_LETTERS",
    "ByteTokenizer",
    "DnaTokenizer",
    "JsonTokenizer",
    "SymbolTokenizer",
    "Tokenizer",
    "encode_texts",
    "load_tokenizer",
    "prefix_token",
    "token_dtype",
]

_OWN_FILE = "statescan_tokenizer.json"
_JSON_FILE = "tokenizer.json"
# Beside tokenizer.json: which of its tokens begins a text, and which ends it.
_NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
DNA_LETTERS = "ACGTN"
# What stands for several bases, N among them.
_IUPAC = "RYSWKMBDHVN"
_NO_BASE = 255
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


@runtime_checkable
class Tokenizer(Protocol):
    """What the package asks of a tokenizer."""

    @property
    def name(self) -> str:
        """A short name for people: "bytes", or the file's."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly when they turn every text into the same ids."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """The id put between two documents, None where there is none."""
        ...

    def encode(self, text: str | bytes) -> NDArray[Any]:
        """The ids of a text, in the narrowest of uint8, uint16, uint32 that holds the vocabulary."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of several texts, each as `encode` gives them."""
        ...

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        ...

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """The bytes of ids: pieces of a character too, so a stream can be put together without loss."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer into a model's folder, from which `load_tokenizer` reads it."""
        ...


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned integer that holds ids below `vocab_size`."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if vocab_size <= np.iinfo(dtype).max + 1:
            return np.dtype(dtype)
    raise DataError(f"tokenizer: wanted at most 2**32 ids, got {vocab_size}")


class ByteTokenizer:
    """One id per byte: 256 of them, no file, nothing unknown. The NUL byte stands between documents."""

    name = "bytes"
    fingerprint = "bytes"
    vocab_size = 256
    end_of_text: int | None = 0
    bytes_add_up = True

    def encode(self, text: str | bytes) -> NDArray[np.uint8]:
        """The bytes of a text: those of its UTF-8 form for a string, the very bytes for bytes (valid UTF-8 or not)."""
        data = text.encode("utf-8", "replace") if isinstance(text, str) else bytes(text)
        return np.frombuffer(data, dtype=np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint8]]:
        """The bytes of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of bytes; what is no UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """The bytes themselves."""
        array = np.asarray(ids)
        if array.size and (array.min() < 0 or array.max() > 255):
            raise DataError(f"byte tokenizer: wanted ids in [0, 256), got {int(array.min())} to {int(array.max())}")
        return array.astype(np.uint8).tobytes()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the few bytes that say "bytes" into a model's folder."""
        write_json(Path(folder) / _OWN_FILE, {"kind": "bytes", "vocab_size": 256}, indent=None)

    def __repr__(self) -> str:
        return "ByteTokenizer()"


class SymbolTokenizer:
    """One character an id, for vocabularies that were never text: the synthetic tasks, or bases of a genome.

    Args:
        symbols: distinct characters; the i-th stands for id i.

    Raises:
        DataError: a character comes twice, or there is none.
    """

    name = "symbols"
    bytes_add_up = True
    end_of_text: int | None = None

    def __init__(self, symbols: str) -> None:
        if not symbols or len(set(symbols)) != len(symbols):
            raise DataError(f"symbol tokenizer: wanted distinct characters, got {symbols!r}")
        self.symbols = symbols
        self.vocab_size = len(symbols)
        self.fingerprint = f"symbols {symbols}"
        self._id_of = {symbol: number for number, symbol in enumerate(symbols)}
        self._dtype = token_dtype(self.vocab_size)

    def encode(self, text: str | bytes) -> NDArray[Any]:
        """The id of each character.

        Raises:
            DataError: a character that stands for none.
        """
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        try:
            return np.array([self._id_of[symbol] for symbol in text], dtype=self._dtype)
        except KeyError as unknown:
            raise DataError(f"symbol tokenizer: wanted characters of {self.symbols!r}, got {unknown}") from None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The characters of ids."""
        array = np.asarray(ids)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise DataError(
                f"symbol tokenizer: wanted ids in [0, {self.vocab_size}), got {int(array.min())} to {int(array.max())}"
            )
        return "".join(self.symbols[int(number)] for number in array)

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """The UTF-8 of the characters of ids."""
        return self.decode(ids).encode()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the characters into a model's folder."""
        with atomic_file(Path(folder) / _OWN_FILE) as temporary:
            text = json.dumps({"kind": "symbols", "symbols": self.symbols}, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        return f"SymbolTokenizer({self.symbols!r})"


class DnaTokenizer:
    """A C G T N as ids 0 to 4, upper or lower case; U is T, and every other letter of IUPAC's code is N.

    Args:
        soft_masked: what lower-case bases, those that a repeat masker marked, are: "base", as any other, or "n",
            unknown. Default "base".
        gaps: what ``-`` and ``.`` of aligned sequences are: "error", "n" (unknown), or "drop" (not there; positions
            then count bases alone). Default "error".

    Raises:
        ConfigError: another word.

    Source: Cornish-Bowden (1985), "Nomenclature for incompletely specified bases in nucleic acid sequences".
    """

    name = "dna"
    symbols = DNA_LETTERS
    vocab_size = len(DNA_LETTERS)
    bytes_add_up = True
    end_of_text: int | None = None
    # No prediction is judged on an unknown base.
    unjudged = DNA_LETTERS.index("N")

    def __init__(self, soft_masked: str = "base", gaps: str = "error") -> None:
        for name, value, known in (
            ("soft_masked", soft_masked, ("base", "n")),
            ("gaps", gaps, ("error", "n", "drop")),
        ):
            if value not in known:
                raise ConfigError(f"dna tokenizer: {name} must be one of {', '.join(known)}, got {value!r}")
        self.soft_masked, self.gaps = soft_masked, gaps
        self.fingerprint = f"dna {soft_masked} {gaps}"
        table = np.full(256, _NO_BASE, np.uint8)
        for letters, number in (*zip(("A", "C", "G", "TU"), range(4), strict=True), (_IUPAC, self.unjudged)):
            table[np.frombuffer(letters.encode(), np.uint8)] = number
            lower = self.unjudged if soft_masked == "n" else number
            table[np.frombuffer(letters.lower().encode(), np.uint8)] = lower
        if gaps == "n":
            table[np.frombuffer(b"-.", np.uint8)] = self.unjudged
        self._table = table

    def encode(self, text: str | bytes, *, record: str = "") -> NDArray[np.uint8]:
        """The ids of bases.

        Args:
            text: the bases.
            record: how messages call where they are from.

        Raises:
            DataError: a letter that stands for no base.
        """
        letters = np.frombuffer(text.encode("latin-1", "replace") if isinstance(text, str) else text, np.uint8)
        if self.gaps == "drop":
            letters = letters[(letters != ord("-")) & (letters != ord("."))]
        ids = self._table[letters]
        if (ids == _NO_BASE).any():
            self._refuse(letters, ids, record)
        return ids

    def _refuse(self, letters: NDArray[np.uint8], ids: NDArray[np.uint8], record: str) -> None:
        wrong = letters[ids == _NO_BASE]
        where = f" in the record '{record}'" if record else ""
        letter, place = chr(wrong[0]), int(np.argmax(ids == _NO_BASE)) + 1
        if np.isin(wrong, np.frombuffer(b"EFILPQZXJO*efilpqzxjo", np.uint8)).any():
            cure = "that looks like protein, and this reads DNA alone"
        elif letter in "-.":
            cure = (
                "gaps of an alignment are read as unknown with --gaps n, left out with --gaps drop; in training "
                "with --set data.gaps=n or data.gaps=drop"
            )
        else:
            cure = "take it out of the file"
        raise DataError(
            f"dna: wanted letters of the nucleotide code (ACGTUN, RYSWKMBDHV, of either case){where}, got "
            f"{letter!r} at place {place:,}; {cure}"
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint8]]:
        """The ids of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The letters of ids."""
        return self.decode_bytes(ids).decode()

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """The letters of ids as bytes."""
        array = np.asarray(ids)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise DataError(
                f"dna tokenizer: wanted ids in [0, {self.vocab_size}), got {int(array.min())} to {int(array.max())}"
            )
        return np.frombuffer(self.symbols.encode(), np.uint8)[array.astype(np.int64)].tobytes()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what it is made of into a model's folder."""
        fields = {"kind": "dna", "soft_masked": self.soft_masked, "gaps": self.gaps}
        write_json(Path(folder) / _OWN_FILE, fields, indent=None)

    def __repr__(self) -> str:
        return f"DnaTokenizer(soft_masked={self.soft_masked!r}, gaps={self.gaps!r})"


class JsonTokenizer:
    """A tokenizer of the `tokenizers` package, read from its JSON file.

    Args:
        path: the JSON file.

    Raises:
        MissingExtraError: `tokenizers` is not installed.
        DataError: the file is missing or is no tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            import tokenizers
        except ImportError:
            raise MissingExtraError("a tokenizer from a JSON file", "tokenizers", "hub") from None
        try:
            self._json = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise DataError(f"tokenizer: '{self.path}' can't be read ({problem})") from None
        beside = [self.path.parent / name for name in _NAMING_FILES] if self.path.name == _JSON_FILE else []
        self._beside = {path: path.read_bytes() for path in beside if path.is_file()}
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(self._json)
        except Exception as problem:  # the package raises bare Exception for any malformed file
            raise DataError(
                f"tokenizer: wanted a `tokenizers` JSON file, got '{self.path}', which is none ({problem})"
            ) from None
        # A text is encoded whole and alone, whatever batches the file was last saved for.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = self.path.parent.name if self.path.name == _JSON_FILE else self.path.stem
        self.fingerprint = hashlib.sha256(self._json.encode()).hexdigest()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self._dtype = token_dtype(self.vocab_size)

    def encode(self, text: str | bytes) -> NDArray[Any]:
        """The ids of a text, without special tokens added around it; bytes are decoded as UTF-8 first."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=self._dtype)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[NDArray[Any]]:
        """The ids of several texts, encoded in parallel; with the tokens that the file says to add around a text where
        asked for."""
        batch = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in batch]

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the file says to add tokens around a text (a Llama's ``<s>``)."""
        return self._tokenizer.num_special_tokens_to_add(is_pair=False) > 0

    @functools.cached_property
    def begin_of_text(self) -> int | None:
        """The id that a text without context is judged after, as transformers would say it: the token that a file
        beside tokenizer.json names as the one that begins a text, else the one that ends it, else the first that the
        file adds to a text; None where nothing is told.

        Raises:
            DataError: the file beside it is no JSON object.
        """
        for kind in ("bos_token", "eos_token"):
            if (id := self._named(kind)) is not None:
                return id
        sample = self._tokenizer.encode("a")
        return sample.ids[0] if sample.ids and sample.special_tokens_mask[0] else None

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a text and stands between two: of the token that a file beside tokenizer.json names so, else
        of the first in the vocabulary that is called as such a token often is; None where there is neither.

        Raises:
            DataError: the file beside it is no JSON object.
        """
        return self._end_of_text

    @functools.cached_property
    def _end_of_text(self) -> int | None:
        named = self._named("eos_token")
        known = (id for id in map(self._tokenizer.token_to_id, _END_OF_TEXT) if id is not None)
        return next(known, None) if named is None else named

    def _named(self, kind: str) -> int | None:
        """The id of the token that a file beside tokenizer.json calls "bos_token" or "eos_token"."""
        for path, text in self._beside.items():
            token = _read_object(path, text).get(kind)
            token = token.get("content") if isinstance(token, dict) else token
            id = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
            if id is not None:
                return id
        return None

    @functools.cached_property
    def splits_at_spaces(self) -> bool:
        """Whether a text's ids are those of the part before a space and those of the part that begins with it, wherever
        no other whitespace is next to that space.

        True of byte-level BPE over GPT-2's pattern (GPT-2, GPT-NeoX, Pythia): a word takes a space before it along and
        none after it, and neither a merge nor an added token reaches over that place. Told from the file; False where
        it does not follow from what stands there.
        """
        told = json.loads(self._json)
        before, normalizer, model = (told.get(name) or {} for name in ("pre_tokenizer", "normalizer", "model"))
        return (
            before.get("type") == "ByteLevel"
            and before.get("use_regex", True) is True
            and before.get("add_prefix_space") is False
            and normalizer.get("type") in (None, "NFC")
            and model.get("type") == "BPE"
            and not model.get("dropout")
            and not any(
                token.get("lstrip")
                or token.get("rstrip")
                or token.get("single_word")
                or len({letter.isspace() for letter in token["content"]}) > 1
                for token in told.get("added_tokens") or ()
            )
        )

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of ids, special tokens included."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """The bytes of ids: exact for byte-level vocabularies; else the UTF-8 of the decoded text."""
        if self._bytes_of_id is None:
            return self.decode(ids).encode()
        try:
            return b"".join(self._bytes_of_id[int(id)] for id in ids)
        except KeyError as problem:
            raise DataError(f"tokenizer {self.name}: wanted ids in its vocabulary, got {problem}") from None

    @property
    def bytes_add_up(self) -> bool:
        """Whether the bytes of ids are those of each id, one after the other."""
        return self._bytes_of_id is not None

    @functools.cached_property
    def _bytes_of_id(self) -> dict[int, bytes] | None:
        """The bytes of each id of a byte-level vocabulary; None for other kinds."""
        if '"ByteLevel"' not in json.dumps(json.loads(self._json).get("decoder")):
            return None
        byte_of = _byte_level_alphabet()
        added = {id: token.content for id, token in self._tokenizer.get_added_tokens_decoder().items()}
        table = {}
        for token, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if id in added:
                table[id] = added[id].encode()
            elif all(character in byte_of for character in token):
                table[id] = bytes(byte_of[character] for character in token)
            else:
                return None
        return table

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json into a model's folder, and what stood beside it to name its tokens."""
        for path, text in self._beside.items():
            with atomic_file(Path(folder) / path.name) as temporary:
                temporary.write_bytes(text)
        with atomic_file(Path(folder) / _JSON_FILE) as temporary:
            temporary.write_text(self._json, encoding="utf-8", newline="")

    def __repr__(self) -> str:
        return f"JsonTokenizer({str(self.path)!r}, vocab_size={self.vocab_size})"


def _read_object(path: Path, text: bytes) -> dict[str, Any]:
    """What a JSON file of this text holds."""
    try:
        fields = json.loads(text)
    except ValueError as problem:
        raise DataError(f"tokenizer: '{path}' can't be read as JSON ({problem}); copy it again") from None
    if not isinstance(fields, dict):
        raise DataError(f"tokenizer: wanted a JSON object in '{path}', got {type(fields).__name__}; copy it again")
    return fields


def prefix_token(tokenizer: Any) -> int | None:
    """The id that stands before a text without context: the tokenizer's `begin_of_text`, else its `end_of_text`."""
    begin = getattr(tokenizer, "begin_of_text", None)
    return getattr(tokenizer, "end_of_text", None) if begin is None else begin


def encode_texts(tokenizer: Any, texts: Sequence[str], prefix: int | None) -> list[NDArray[Any]]:
    """The ids of whole texts with the tokens that a tokenizer adds by itself (a Llama's ``<s>``), as lm-eval has them.

    Args:
        tokenizer: with ``encode_batch``; where its ``adds_special_tokens`` is true, that takes ``add_special_tokens``.
        texts: may be empty.
        prefix: the token that begins a text; nothing is added to one that begins with that token's own letters.
    """
    if not getattr(tokenizer, "adds_special_tokens", False):
        return tokenizer.encode_batch(texts)
    begin = "" if prefix is None else tokenizer.decode([prefix])
    begun = [bool(begin) and text.startswith(begin) for text in texts]
    ids = {}
    for bare in (False, True):
        some = [text for text, has in zip(texts, begun, strict=True) if has == bare]
        ids |= dict(zip(some, tokenizer.encode_batch(some, add_special_tokens=not bare), strict=True))
    return [ids[text] for text in texts]


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one character: itself where printable, else 256 + a running number."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return alphabet


def _read_own(path: Path) -> ByteTokenizer | SymbolTokenizer | DnaTokenizer:
    """What the `save` of one of ours wrote."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["kind"] == "symbols":
            return SymbolTokenizer(str(fields["symbols"]))
        if fields["kind"] == "bytes":
            return ByteTokenizer()
        if fields["kind"] == "dna":
            return DnaTokenizer(str(fields["soft_masked"]), str(fields["gaps"]))
        problem = f"its kind is {fields['kind']!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise DataError(f"tokenizer: wanted what save wrote, got '{path}', which can't be read so ({problem})")


def load_tokenizer(
    source: str | os.PathLike[str] | None = None,
) -> ByteTokenizer | SymbolTokenizer | DnaTokenizer | JsonTokenizer:
    """A tokenizer by name or path.

    Args:
        source: None or "bytes" for the byte tokenizer; "dna" for A C G T N; else a `tokenizers` JSON file, or a folder
            that holds tokenizer.json or what the `save` of one of ours wrote (a model's folder).

    Returns:
        The tokenizer.

    Raises:
        DataError: the path does not exist, or holds no tokenizer.
        MissingExtraError: a JSON file was named and `tokenizers` is not installed.
    """
    if source is None or str(source) == "bytes":
        return ByteTokenizer()
    if str(source) == "dna":
        return DnaTokenizer()
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / _JSON_FILE).is_file():
            return JsonTokenizer(path / _JSON_FILE)
        if (path / _OWN_FILE).is_file():
            return _read_own(path / _OWN_FILE)
        raise DataError(
            f"tokenizer: wanted {_JSON_FILE} or {_OWN_FILE} in the folder '{path}', got neither; "
            "name a tokenizer with --tokenizer PATH or --tokenizer bytes"
        )
    if not path.exists():
        raise DataError(
            f"tokenizer: wanted 'bytes', 'dna' or an existing file or folder, got '{source}', which does not exist"
        )
    return _read_own(path) if path.name == _OWN_FILE else JsonTokenizer(path)
