"""The C++ CPU library: one binary per platform behind a plain C ABI, loaded by ctypes, on torch's own thread pool."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path

import torch

__all__ = ["ABI_VERSION", "NativeLibrary", "library", "refusal", "unavailable_reason"]

ABI_VERSION = 1
_CURE = (
    "install a C++17 compiler (Linux: g++ or clang; macOS: xcode-select --install; Windows: Visual Studio Build Tools) "
    "and reinstall: pip install --force-reinstall --no-deps --no-cache-dir statescan"
)


def _file_name() -> str:
    return {"Windows": "statescan_cpu.dll", "Darwin": "libstatescan_cpu.dylib"}.get(
        platform.system(), "libstatescan_cpu.so"
    )


def _find() -> Path | None:
    """STATESCAN_CPU_LIBRARY if set, else the newest of the package's _lib folders.

    An editable install has up to two: one beside the sources (``make lib``) and one that pip built into site-packages.
    """
    named = os.environ.get("STATESCAN_CPU_LIBRARY")
    if named:
        return Path(named)
    import statescan

    found = [path for folder in statescan.__path__ if (path := Path(folder) / "_lib" / _file_name()).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


class NativeLibrary:
    """The loaded library. ``lib`` is the ctypes handle; every call releases the GIL and returns 0 or an error code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lib = ctypes.CDLL(str(path))
        self.lib.ss_abi_version.restype = ctypes.c_int
        if self.lib.ss_abi_version() != ABI_VERSION:
            found = self.lib.ss_abi_version()
            raise OSError(f"{path} has ABI version {found}, this package needs {ABI_VERSION}: reinstall statescan")
        self.lib.ss_isa.restype = ctypes.c_char_p
        # torch's own parallel_for: one thread pool in the process, and torch.set_num_threads is obeyed.
        parallel_for = ctypes.CDLL(_torch_library()).torch_parallel_for
        self.lib.ss_set_parallel_for.argtypes = [ctypes.c_void_p]
        self.lib.ss_set_parallel_for(ctypes.cast(parallel_for, ctypes.c_void_p))

    @property
    def isa(self) -> str:
        """Instruction set the kernels run with: avx512, avx2, neon or generic (STATESCAN_CPU_ISA lowers it)."""
        return self.lib.ss_isa().decode()


def _torch_library() -> str:
    name = {"Windows": "torch_cpu.dll", "Darwin": "libtorch_cpu.dylib"}.get(platform.system(), "libtorch_cpu.so")
    return str(Path(torch.__file__).parent / "lib" / name)


@functools.cache
def _load() -> NativeLibrary | str:
    path = _find()
    if path is None:
        return f"the C++ CPU kernels were not built at installation; {_CURE}"
    try:
        return NativeLibrary(path)
    except (OSError, AttributeError) as problem:
        return f"the C++ CPU library does not load ({problem}); {_CURE}"


def unavailable_reason() -> str | None:
    """Why the CPU kernels can't be used, with the cure; None where they can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def refusal(device: str, *symbols: str) -> str | None:
    """Why the kernels `symbols` can't run on tensors of this device type, with the cure; None where all can."""
    if device != "cpu":
        return f"it runs on the CPU, the inputs are on {device}; use backend='torch'"
    reason = unavailable_reason()
    if reason is None and not all(hasattr(library().lib, symbol) for symbol in symbols):
        reason = f"the C++ library {library().path} is older than this package; reinstall statescan"
    return reason


def library() -> NativeLibrary:
    """The loaded library; call only where `unavailable_reason` is None."""
    loaded = _load()
    assert isinstance(loaded, NativeLibrary), loaded
    return loaded
