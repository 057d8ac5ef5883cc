"""Token files: a corpus turned into ids once, then memory-mapped by every run and process that reads it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from statescan.data.dna import read_records
from statescan.data.text import Chunk, InvalidUtf8, Source, find_sources, read_chunks
from statescan.data.tokenizer import ByteTokenizer, DnaTokenizer, Tokenizer, token_dtype
from statescan.errors import DataError
from statescan.files import default_cache_folder

__all__ = ["TokenFile", "build_token_file"]

_MAGIC = b"SSTOKENS"
_VERSION = 1
# magic, version, bytes per id, ids, documents, position of the offsets, position and length of the JSON: 64 bytes.
_HEADER = struct.Struct("<8sIIQQQQQ8x")
_BATCH_BYTES = 1 << 20


class TokenFile:
    """The ids of a corpus, memory-mapped, with the offsets of its documents.

    Layout: a header of 64 bytes, the ids (uint8, uint16 or uint32, little-endian), the offsets (int64), a JSON with the
    facts. A file is whole or it is refused: the header gives every position, and the length must agree.

    Args:
        path: a file that `build_token_file` wrote.

    Attributes:
        tokens: all ids, (ids,) uint8 | uint16 | uint32, read-only and memory-mapped. Two documents are parted by the
            tokenizer's `end_of_text`, which belongs to the first of them.
        document_offsets: (documents + 1,) int64: where each document starts, and the number of ids at the end.
        facts: tokenizer (name), fingerprint, vocab_size, bytes (of the texts), digest, key, sources, skipped; of bases
            also documents, the names of the records.

    Raises:
        DataError: no such file, not a token file, or cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as stream:
                header = stream.read(_HEADER.size)
                if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                    raise DataError(f"token file: wanted a file made by statescan, got '{self.path}', which is none")
                _, version, width, count, documents, offsets_at, facts_at, facts_length = _HEADER.unpack(header)
                if version != _VERSION:
                    raise DataError(
                        f"token file '{self.path}': wanted format {_VERSION}, got {version}; delete it to build it anew"
                    )
                if size != facts_at + facts_length:
                    raise DataError(
                        f"token file '{self.path}': wanted {facts_at + facts_length} bytes, got {size}: cut short; "
                        "delete it to build it anew"
                    )
                stream.seek(facts_at)
                self.facts: dict[str, Any] = json.loads(stream.read(facts_length))
        except OSError as problem:
            raise DataError(f"token file '{self.path}' can't be read ({problem.strerror})") from problem
        dtype = np.dtype({1: "<u1", 2: "<u2", 4: "<u4"}[width])
        self.tokens: NDArray[Any] = np.memmap(self.path, dtype, mode="r", offset=_HEADER.size, shape=(count,))
        self.document_offsets: NDArray[np.int64] = np.memmap(
            self.path, np.dtype("<i8"), mode="r", offset=offsets_at, shape=(documents + 1,)
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return (
            f"TokenFile({str(self.path)!r}, {len(self)} ids of '{self.facts['tokenizer']}', "
            f"{len(self.document_offsets) - 1} documents)"
        )

    @property
    def key(self) -> str:
        """Equal for two files exactly when the same sources went through the same tokenizer in the same way."""
        return self.facts["key"]

    @property
    def digest(self) -> str:
        """Equal for two files exactly when their ids are the same, wherever the sources lay."""
        return self.facts["digest"]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each id, over the whole file (the marks between documents count as ids)."""
        return self.facts["bytes"] / len(self)

    def split(self, valid_fraction: float) -> tuple[NDArray[Any], NDArray[Any]]:
        """The ids for training and those held out: the last `valid_fraction`, so that no training text follows them.

        The cut falls on the start of a document where one lies within half of the fraction, else between two ids. It
        depends on the file and the fraction alone.

        Args:
            valid_fraction: in [0, 1); 0 holds nothing out.

        Returns:
            (train, valid): two views of `tokens`.

        Raises:
            DataError: the fraction is out of range.
        """
        if not 0.0 <= valid_fraction < 1.0:
            raise DataError(f"token file: wanted valid_fraction in [0, 1), got {valid_fraction}")
        held_out = round(len(self) * valid_fraction)
        cut = len(self) - held_out
        offsets = self.document_offsets
        place = int(np.searchsorted(offsets, cut))
        near = [int(offsets[i]) for i in (place - 1, place) if 0 < i < len(offsets) - 1]
        near = [offset for offset in near if 2 * abs(offset - cut) <= held_out]
        if near:
            cut = min(near, key=lambda offset: abs(offset - cut))
        return self.tokens[:cut], self.tokens[cut:]


def build_token_file(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer | None = None,
    *,
    field: str = "text",
    invalid_utf8: InvalidUtf8 = "error",
    cache: str | os.PathLike[str] | None = None,
) -> TokenFile:
    """The token file of a corpus: the one in the cache if the sources have not changed, else a new one.

    The cache's key holds the sources' paths, sizes and times of change, the tokenizer's fingerprint, `field` and
    `invalid_utf8`. A file is written under another name and renamed when whole: a crash leaves nothing behind that a
    later run would take, and of two processes that build at once the last one's equal file stays.

    Args:
        paths: files, folders, globs or packaged names, as `find_sources` takes them.
        tokenizer: what turns text into ids; None for bytes.
        field: the field of each JSON line that holds the text.
        invalid_utf8: what a tokenizer of characters does with bytes that are no UTF-8: "error", or "replace" them by
            U+FFFD. Bytes stay as they are with the byte tokenizer.
        cache: folder of the token files; None for `default_cache_folder`.

    Returns:
        The file, open.

    Raises:
        DataError: a source can't be read, the corpus is empty, or the cache can't be written.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    sources = find_sources(paths)
    folder = default_cache_folder() / "tokens" if cache is None else Path(cache)
    key = _key(sources, tokenizer, field, invalid_utf8)
    path = folder / f"{key[:32]}.tokens"
    if path.exists():
        # A damaged file is built anew; a good one is never touched again.
        with contextlib.suppress(DataError):
            return TokenFile(path)
    temporary = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".building-")
        with os.fdopen(handle, "wb") as stream:
            _write(stream, sources, tokenizer, field, invalid_utf8, key)
        try:
            os.replace(temporary, path)
        except PermissionError:
            # Windows does not replace a file that another process has mapped: that one is the same file, built first.
            if not path.exists():
                raise
            Path(temporary).unlink()
    except BaseException as problem:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise DataError(
                f"token file: '{folder}' can't be written ({problem.strerror}); make room, or name another folder with "
                "data.cache=FOLDER or STATESCAN_CACHE"
            ) from problem
        raise
    return TokenFile(path)


def _key(sources: Sequence[Source], tokenizer: Tokenizer, field: str, invalid_utf8: str) -> str:
    facts = []
    for source in sources:
        try:
            status = source.path.stat()
        except OSError as problem:
            raise DataError(f"data: {source.label} can't be read ({problem.strerror})") from problem
        facts.append([os.path.abspath(source.path), status.st_size, status.st_mtime_ns, source.named])
    whole = [_VERSION, facts, tokenizer.fingerprint, tokenizer.end_of_text, field, invalid_utf8]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def _write(
    stream: BinaryIO, sources: Sequence[Source], tokenizer: Tokenizer, field: str, invalid_utf8: InvalidUtf8, key: str
) -> None:
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")
    separator = None if tokenizer.end_of_text is None else np.array([tokenizer.end_of_text], dtype).tobytes()
    stream.write(b"\0" * _HEADER.size)
    count, text_bytes = 0, 0
    digest = hashlib.sha256(dtype.str.encode())
    offsets: list[int] = []
    skipped: list[str] = []
    # The mark goes between two documents, so it is written when the next one turns out to have something in it.
    fresh = True
    of_bases = isinstance(tokenizer, DnaTokenizer)
    chunks = read_records(sources) if of_bases else read_chunks(sources, field=field, skipped=skipped)
    documents: list[str] = []
    for chunk, ids in _encoded(chunks, tokenizer, invalid_utf8):
        fresh = fresh or chunk.starts_document
        if not len(ids):
            continue
        if fresh:
            if offsets and separator is not None:
                stream.write(separator)
                digest.update(separator)
                count += 1
            offsets.append(count)
            documents.append(chunk.source)
            fresh = False
        content = np.ascontiguousarray(ids, dtype).tobytes()
        stream.write(content)
        digest.update(content)
        count += len(ids)
        text_bytes += len(chunk.content)
    if not count:
        names = ", ".join(source.label for source in sources[:3]) + (" ..." if len(sources) > 3 else "")
        cause = f" ({len(skipped)} binary files were left out)" if skipped else ""
        raise DataError(
            f"data: wanted {'bases' if of_bases else 'text'}, got none in {names}{cause}; name files that hold some"
        )
    offsets.append(count)
    position = _HEADER.size + count * dtype.itemsize
    offsets_at = -(-position // 64) * 64
    stream.write(b"\0" * (offsets_at - position) + np.array(offsets, "<i8").tobytes())
    facts = json.dumps(
        {
            "tokenizer": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bytes": text_bytes,
            "digest": digest.hexdigest(),
            "key": key,
            "sources": [source.label for source in sources],
            "skipped": skipped,
            **({"documents": documents} if of_bases else {}),
        }
    ).encode()
    facts_at = offsets_at + 8 * len(offsets)
    stream.write(facts)
    stream.seek(0)
    stream.write(
        _HEADER.pack(_MAGIC, _VERSION, dtype.itemsize, count, len(offsets) - 1, offsets_at, facts_at, len(facts))
    )
    stream.flush()
    os.fsync(stream.fileno())


def _encoded(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, invalid_utf8: InvalidUtf8
) -> Iterator[tuple[Chunk, NDArray[Any]]]:
    """Each chunk with its ids. Short chunks go through the tokenizer together, which then works in parallel."""
    if isinstance(tokenizer, ByteTokenizer):
        for chunk in chunks:
            yield chunk, tokenizer.encode(chunk.content)
        return
    if isinstance(tokenizer, DnaTokenizer):
        for chunk in chunks:
            yield chunk, tokenizer.encode(chunk.content, record=chunk.source)
        return
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk.content)
        if size >= _BATCH_BYTES:
            yield from zip(batch, tokenizer.encode_batch([c.text(invalid_utf8) for c in batch]), strict=True)
            batch, size = [], 0
    if batch:
        yield from zip(batch, tokenizer.encode_batch([c.text(invalid_utf8) for c in batch]), strict=True)
