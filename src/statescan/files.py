"""Files that are written whole or not at all: the one writer of every room that leaves something behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from statescan.errors import CheckpointError, ConfigError

__all__ = [
    "atomic_file",
    "default_cache_folder",
    "flush_to_disk",
    "is_leftover",
    "make_folder",
    "want_folder",
    "write_json",
    "write_text",
]

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")

_CURES = {
    errno.ENOENT: "make its folder first or name another",
    errno.ENOTDIR: "a part of the path is a file: name another folder",
    errno.EEXIST: "a part of the path is a file: name another folder",
    errno.EISDIR: "a folder stands there: name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free some space or save to another disk",
    errno.EDQUOT: "free some of your quota or save to another disk",
    errno.EFBIG: "raise the file size limit (ulimit -f) or save to another disk",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
}


def flush_to_disk(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Windows opens no folders; there a rename is as durable as the file system makes it.
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """The system's own words, also from libraries that wrap an OSError in an exception of theirs."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _cure(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return _CURES.get(error.errno, "check the path and the disk")
    return next(
        (cure for code, cure in _CURES.items() if f"os error {code})" in str(error)), "check the path and the disk"
    )


def default_cache_folder() -> Path:
    """Where what can be made again is kept, token files and compiled kernels: $STATESCAN_CACHE, else the user's cache
    folder of this system.

    Raises:
        ConfigError: the environment names no folder, and the user has no home.
    """
    named = os.environ.get("STATESCAN_CACHE")
    system = platform.system()
    try:
        if named:
            return Path(named).expanduser()
        if system == "Windows":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif system == "Darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise ConfigError(
            f"cache: wanted the user's cache folder, got no home folder to find it in ({error}); set STATESCAN_CACHE "
            "to a folder that can be written"
        ) from error
    return base / "statescan"


def is_leftover(name: str) -> bool:
    """Whether a file of this name is what a process that was killed while writing left behind."""
    return _TEMPORARY.fullmatch(name) is not None


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Makes a folder and those above it, where they are missing.

    Raises:
        CheckpointError: the system refused; the text names the folder, the reason and a cure.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # /proc and its like say "no such file" to whoever makes one.
        cure = "choose a folder that you may write to" if error.errno == errno.ENOENT else _cure(error)
        raise CheckpointError(f"save: could not make the folder {path}: {_reason(error)}; {cure}") from error
    return path


def want_folder(path: str | os.PathLike[str]) -> None:
    """Refuses a path whose folder does not exist, or that is a folder itself, before the work whose result shall go
    there is begun.

    Raises:
        CheckpointError: there is no such folder, or a folder stands at the file's place.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise CheckpointError(f"save: could not write {path}: {os.strerror(errno.EISDIR)}; {_CURES[errno.EISDIR]}")
    if not os.path.isdir(path.parent):
        raise CheckpointError(
            f"save: could not write {path}: there is no folder {path.parent}; make it first or name another"
        )


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, make_parents: bool = True) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to, and puts the file in place when the block ends well.

    The new file is on the disk before it takes the name, so a crash at any moment leaves either the old file or the new
    one. When the block raises, the temporary file is removed and whatever stood at `path` is unharmed.

    Args:
        path: where the file shall be.
        make_parents: its folder is made where it is missing; else that is an error, for a path that someone typed.

    Raises:
        CheckpointError: the system refused to write; the text names the file, the reason and a cure.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if make_parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            want_folder(path)
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except CheckpointError:
        raise
    except Exception as error:
        # safetensors raises an exception of its own for a failed write; anything else is the caller's mistake, not the
        # disk's, and goes up as it is.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        stood = "; the file that stood there is unharmed" if os.path.isfile(path) else ""
        raise CheckpointError(f"save: could not write {path}: {_reason(error)}{stood}; {_cure(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text in UTF-8, as `atomic_file` writes.

    Raises:
        CheckpointError: the system refused.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 1) -> None:
    """Writes a value as JSON with a line's end behind it, as `atomic_file` writes.

    Args:
        path: where the file shall be.
        value: of what JSON knows.
        indent: spaces a level, None for one line. Default 1.

    Raises:
        CheckpointError: the system refused.
    """
    write_text(path, json.dumps(value, indent=indent) + "\n")
