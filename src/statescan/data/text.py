"""Texts from files, folders, globs and archives, read as bytes in pieces of bounded size.

Bytes are what a file holds, and a byte-level model takes any of them, so nothing is decoded here except JSON lines.
`Chunk.text` decodes for the tokenizers that need characters.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import importlib.resources
import io
import json
import logging
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from statescan.errors import DataError, MissingExtraError

__all__ = ["Chunk", "Document", "Source", "find_sources", "packaged_corpus", "read_chunks", "read_texts"]

logger = logging.getLogger("statescan.data")

PACKAGED_PREFIX = "packaged:"
_PACKAGED_FILES = {"moby_dick": "moby_dick.txt.xz"}
_COMPRESSED = {".gz", ".tgz", ".xz", ".txz", ".zst", ".tzst"}
_TAR_SHORT = {".tgz", ".txz", ".tzst"}
# What the decompressors and tarfile raise for a file that is cut short or damaged.
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, tarfile.TarError)
_CHUNK_BYTES = 8 << 20
_SNIFF_BYTES = 8192

InvalidUtf8 = Literal["error", "replace"]


@dataclass(frozen=True)
class Source:
    """One file to read.

    Args:
        path: the file.
        named: True where the user named this very file; False where a folder or a glob brought it in. Files that were
            not named are left out when they look binary.
        name: how messages call it; the path where empty.
    """

    path: Path
    named: bool = True
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or str(self.path)


@dataclass(frozen=True)
class Chunk:
    """A piece of a document: at most about 8 MiB, cut after a line end where there is one.

    Args:
        source: the file's path, with the line's number in JSON lines and the member's name in a tar.
        content: the bytes, never empty except for a document that is empty.
        starts_document: False where this goes on with the document of the chunk before.
        offset: position of `content` in its document, in bytes.
    """

    source: str
    content: bytes
    starts_document: bool
    offset: int = 0

    def text(self, invalid_utf8: InvalidUtf8 = "error") -> str:
        """The content as characters; invalid UTF-8 is an error, or U+FFFD where `invalid_utf8` is "replace"."""
        try:
            return self.content.decode("utf-8", errors="strict" if invalid_utf8 == "error" else "replace")
        except UnicodeDecodeError as problem:
            raise DataError(
                f"data: {self.source}: wanted UTF-8, got the byte 0x{self.content[problem.start]:02x} at offset "
                f"{self.offset + problem.start}; convert it, set data.invalid_utf8=replace, or use the byte tokenizer"
            ) from None


@dataclass(frozen=True)
class Document:
    """One text, whole: `source` says where it came from, `content` holds its bytes as they stood in the file."""

    source: str
    content: bytes

    def text(self, invalid_utf8: InvalidUtf8 = "error") -> str:
        """The content as characters; see `Chunk.text`."""
        return Chunk(self.source, self.content, True).text(invalid_utf8)


def packaged_corpus(name: str = "moby_dick") -> str:
    """The text that comes with the package: Moby-Dick, 1.2 MB, public domain (corpus/NOTICE names its source).

    Args:
        name: which of the packaged texts; "moby_dick" is the only one.

    Returns:
        The text. ``packaged_corpus().encode()`` gives the very bytes of the file. As a source for training or
        evaluation the same text is called ``packaged:moby_dick``.

    Raises:
        DataError: no such text.
    """
    with _open_packaged(name) as stream:
        return lzma.decompress(stream.read()).decode("utf-8")


def _packaged_entry(name: str) -> Any:
    if name not in _PACKAGED_FILES:
        raise DataError(
            f"data: wanted one of the packaged texts ({', '.join(sorted(_PACKAGED_FILES))}), got '{name}'; "
            f"use {PACKAGED_PREFIX}moby_dick"
        )
    return importlib.resources.files("statescan.data") / "corpus" / _PACKAGED_FILES[name]


def _open_packaged(name: str) -> IO[bytes]:
    return _packaged_entry(name).open("rb")


def find_sources(paths: str | Path | Sequence[str | Path]) -> list[Source]:
    """The files behind paths, folders (recursive), globs and packaged names, in an order that depends on names alone.

    Args:
        paths: one or several of: a file; a folder, whose files are taken in sorted order at any depth, without those
            whose name or folder begins with a dot; a glob (``**`` crosses folders); ``packaged:moby_dick``.

    Returns:
        Each file once, in the order of `paths`, and sorted by path within a folder or glob.

    Raises:
        DataError: a path does not exist, a glob or folder holds no file, or no path was given.
    """
    entries = [paths] if isinstance(paths, str | Path) else list(paths)
    if not entries:
        raise DataError("data: wanted at least one file, folder or glob, got none; name a text with --data PATH")
    found: dict[str, Source] = {}
    for entry in entries:
        for source in _expand(str(entry)):
            key = source.name or os.path.realpath(source.path)
            if key not in found or (source.named and not found[key].named):
                found[key] = source
    return list(found.values())


def _expand(entry: str) -> list[Source]:
    if entry.startswith(PACKAGED_PREFIX):
        name = entry.removeprefix(PACKAGED_PREFIX)
        packaged = _packaged_entry(name)
        return [Source(Path(str(packaged)), True, entry)]
    path = Path(entry).expanduser()
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise DataError(
                f"data: wanted a folder with text files, got '{entry}', which holds none; name another path"
            )
        return [Source(file, False) for file in files]
    if path.exists():
        return [Source(path)]
    if glob.has_magic(entry):
        matches: list[Path] = []
        for match in sorted(glob.glob(str(path), recursive=True)):
            matches.extend(_files_below(Path(match)) if Path(match).is_dir() else [Path(match)])
        if matches:
            return [Source(file, False) for file in matches]
        raise DataError(f"data: wanted files matching '{entry}', got none; check the pattern (quote it in the shell)")
    raise DataError(f"data: wanted an existing file, folder or glob, got '{entry}', which does not exist")


def _files_below(folder: Path) -> list[Path]:
    def refuse(problem: OSError) -> None:
        raise DataError(f"data: the folder '{problem.filename}' can't be read ({problem.strerror})") from problem

    files = []
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files.extend(Path(here) / name for name in names if not name.startswith("."))
    return sorted(file for file in files if file.is_file())


def read_texts(
    paths: str | Path | Sequence[str | Path], *, field: str = "text", skipped: list[str] | None = None
) -> Iterator[Document]:
    """Every document behind `paths`, whole, one at a time.

    Args:
        paths: files, folders, globs or packaged names, as `find_sources` takes them.
        field: the field of each JSON line that holds the text.
        skipped: a list that receives the files left out because they look binary.

    Yields:
        Documents: one per text file, one per JSON line, one per text file inside a tar.

    Raises:
        DataError: a file is missing, unreadable, cut short or damaged; a line is no JSON or lacks `field`.
    """
    source, parts = "", None
    for chunk in read_chunks(find_sources(paths), field=field, skipped=skipped):
        if chunk.starts_document:
            if parts is not None:
                yield Document(source, b"".join(parts))
            source, parts = chunk.source, []
        assert parts is not None, "the first chunk starts a document"
        parts.append(chunk.content)
    if parts is not None:
        yield Document(source, b"".join(parts))


def read_chunks(
    sources: Iterable[Source], *, field: str = "text", chunk_bytes: int = _CHUNK_BYTES, skipped: list[str] | None = None
) -> Iterator[Chunk]:
    """The documents of `sources` in pieces of at most about `chunk_bytes`, so that memory stays bounded.

    Args:
        sources: what `find_sources` returned.
        field: the field of each JSON line that holds the text.
        chunk_bytes: size of a piece; a piece ends after a line end, or else between two UTF-8 characters.
        skipped: a list that receives the files left out because they look binary.

    Yields:
        Chunks, in order.

    Raises:
        DataError: as for `read_texts`.
    """
    for source in sources:
        if source.path.is_dir():
            raise DataError(f"data: wanted a file, got the folder '{source.label}'")
        try:
            with contextlib.ExitStack() as stack:
                stream, name = _open(source.path, stack)
                yield from _read_stream(stream, name, source.label, source.named, field, chunk_bytes, skipped)
        except _DAMAGE as problem:
            raise DataError(
                f"data: {source.label}: wanted a whole file, got one that is cut short or damaged "
                f"({str(problem) or type(problem).__name__}); copy or download it again"
            ) from problem
        except OSError as problem:
            raise DataError(
                f"data: {source.label} can't be read ({problem.strerror or problem}); check path and permissions"
            ) from problem


def _open(path: Path, stack: contextlib.ExitStack) -> tuple[Any, str]:
    """The decompressed stream of a file, and its name without the compression's ending (.tgz counts as .tar)."""
    suffix = path.suffix.lower()
    if suffix not in _COMPRESSED:
        return stack.enter_context(open(path, "rb")), path.name
    name = path.stem + (".tar" if suffix in _TAR_SHORT else "")
    if suffix in {".gz", ".tgz"}:
        return stack.enter_context(gzip.open(path, "rb")), name
    if suffix in {".xz", ".txz"}:
        return stack.enter_context(lzma.open(path, "rb")), name
    raw = stack.enter_context(path.open("rb"))
    return stack.enter_context(io.BufferedReader(_ZstdStream(raw), 1 << 20)), name


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or several zstd frames; raises EOFError where the last one is cut short.

    zstandard's own stream reader ends silently there, and a silent end would train on half a corpus.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise MissingExtraError("reading .zst files", "zstandard", "zstd") from None
        self._raw = raw
        self._zstandard = zstandard
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._raw.read(1 << 17)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame ends early")
                return 0
            self._ready = self._decompress(compressed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, compressed: bytes) -> bytes:
        parts = []
        while compressed:
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                parts.append(self._frame.decompress(compressed))
            except self._zstandard.ZstdError as problem:
                raise EOFError(str(problem)) from problem
            compressed = b""
            if self._frame.eof:
                compressed = self._frame.unused_data
                self._frame = None
        return b"".join(parts)


def _read_stream(
    stream: IO[bytes], name: str, label: str, named: bool, field: str, chunk_bytes: int, skipped: list[str] | None
) -> Iterator[Chunk]:
    suffix = Path(name).suffix.lower()
    if suffix == ".tar":
        # "r|": read in one pass, so that a compressed stream is never rewound.
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                hidden = any(part.startswith(".") for part in Path(member.name).parts if part != ".")
                if not member.isfile() or hidden:
                    continue
                inner = archive.extractfile(member)
                assert inner is not None, "isfile() members have content"
                yield from _read_stream(
                    inner, member.name, f"{label}:{member.name}", False, field, chunk_bytes, skipped
                )
        # A tar ends before its compressed stream does, whose checksum comes last.
        while stream.read(_CHUNK_BYTES):
            pass
    elif suffix in {".jsonl", ".ndjson"}:
        yield from _read_json_lines(stream, label, field)
    else:
        yield from _read_plain(stream, label, named, chunk_bytes, skipped)


def _read_plain(
    stream: IO[bytes], label: str, named: bool, chunk_bytes: int, skipped: list[str] | None
) -> Iterator[Chunk]:
    pending = stream.read(chunk_bytes)
    if not named and b"\0" in pending[:_SNIFF_BYTES]:
        logger.warning("data: %s looks binary (it holds NUL bytes) and is left out; name it alone to read it", label)
        if skipped is not None:
            skipped.append(label)
        return
    offset, first = 0, True
    while True:
        more = stream.read(chunk_bytes) if pending else b""
        if not more:
            if pending or first:
                yield Chunk(label, pending, first, offset)
            return
        cut = _cut(pending)
        yield Chunk(label, pending[:cut], first, offset)
        offset, first = offset + cut, False
        pending = pending[cut:] + more


def _cut(content: bytes) -> int:
    """Where to end a piece: after its last line end, else before its last character, which may be incomplete."""
    line_end = content.rfind(b"\n") + 1
    if line_end:
        return line_end
    cut = len(content) - 1
    while cut > 1 and len(content) - cut < 4 and 0x80 <= content[cut] < 0xC0:
        cut -= 1
    return max(cut, 1)


def _read_json_lines(stream: IO[bytes], label: str, field: str) -> Iterator[Chunk]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{label}:{number}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as problem:
            raise DataError(
                f"data: {where}: wanted one JSON object a line, got a line that is none ({problem})"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"data: {where}: wanted a JSON object, got {type(record).__name__}")
        if field not in record:
            raise DataError(
                f"data: {where}: wanted the field '{field}', got {', '.join(map(repr, list(record)[:8])) or 'none'}; "
                f"name the field that holds the text with data.field=NAME"
            )
        text = record[field]
        if not isinstance(text, str):
            raise DataError(f"data: {where}: wanted a string in the field '{field}', got {type(text).__name__}")
        # JSON may hold halves of a surrogate pair, which no UTF-8 can: they become U+FFFD.
        yield Chunk(where, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(), True)
