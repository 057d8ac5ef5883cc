"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from statescan.errors import CheckpointError

__all__ = ["atomic_file", "flush_to_disk"]

_CURES = {
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


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to, and puts the file in place when the block ends well.

    The new file is on the disk before it takes the name, so a crash at any moment leaves either the old file or the new
    one. When the block raises, the temporary file is removed and whatever stood at `path` is unharmed.

    Args:
        path: where the file shall be; its folder is made where it is missing.

    Raises:
        CheckpointError: the system refused to write; the text names the file, the reason and a cure.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
        stood = "; the file that stood there is unharmed" if path.exists() else ""
        raise CheckpointError(f"save: could not write {path}: {_reason(error)}{stood}; {_cure(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
