"""CUDA kernels compiled at first use by NVRTC, through NVIDIA's cuda-core: no toolkit and no compiler on the machine.

A kernel's cubin is kept on disk under a name made from its source, its options, the architecture and the versions of
compiler and package, so that a machine compiles it once; the file appears whole or not at all, so that processes that
start together don't harm each other, and ends with its checksum, so that a damaged one is compiled anew.

`make_ready` compiles what a call will launch later, while another backend can still take the call; Triton's backends
(`statescan.ops._triton`) use it, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import os
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import statescan
from statescan.errors import BackendUnavailableError, CheckpointError, ConfigError
from statescan.files import atomic_file, default_cache_folder
from statescan.ops._checks import no_device

__all__ = [
    "MOST_BLOCKS",
    "Kernel",
    "cache_folder",
    "elsewhere",
    "i32",
    "kernel",
    "launch_ready",
    "make_ready",
    "pieces",
    "rehearsal",
    "rehearsing",
    "unavailable_reason",
]

_Result = TypeVar("_Result")

_COMMON = Path(__file__).with_name("_cuda_common.cuh")
i32 = ctypes.c_int32
MOST_BLOCKS = 65535  # of a launch on its second and on its third axis


def _core() -> Any:
    try:
        import cuda.core as core  # pyright: ignore[reportMissingImports]

        if hasattr(core, "Program"):
            return core
    except ImportError:
        pass
    import cuda.core.experimental as core  # where cuda-core is older than 0.5  # pyright: ignore[reportMissingImports]

    return core


def _nvrtc_version() -> tuple[int, int]:
    """Of the compiler that cuda-core calls."""
    from cuda.bindings import nvrtc  # pyright: ignore[reportMissingImports]

    code, major, minor = nvrtc.nvrtcVersion()
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion: {code.name}")
    return int(major), int(minor)


_PROBE = 'extern "C" __global__ void probe() {}'


def _probe() -> str | None:
    """Compiles and loads an empty kernel: finds a missing compiler or too old a driver before a real call does."""
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        return f"its kernels need compute capability 8.0, {name} has {major}.{minor}; use backend='torch'"
    wanted = torch.version.cuda or "13"
    install = f"pip install 'cuda-core[cu{wanted.split('.')[0]}]'"
    try:
        core, compiler = _core(), _nvrtc_version()
        if compiler[0] != int(wanted.split(".")[0]):
            return (
                f"its compiler, NVRTC, is of CUDA {compiler[0]}.{compiler[1]} and torch of CUDA {wanted}, whose first "
                f"numbers must be one; {install}"
            )
        core.Device(torch.cuda.current_device()).set_current()
        core.ObjectCode.from_cubin(_cached(_PROBE, (), f"sm_{major}{minor}")).get_kernel("probe")
    except Exception as problem:
        return (
            f"an empty kernel could not be compiled and loaded ({type(problem).__name__}: {_in_a_line(problem)}); it "
            f"takes a driver for CUDA {wanted} and {install}"
        )
    return None


def elsewhere(device: str) -> str:
    """Why a CUDA backend takes no tensors on another kind of device, with the cure."""
    return f"it runs on CUDA devices, the inputs are on '{device}'; move them with .to('cuda'), or use backend='torch'"


@functools.cache
def unavailable_reason() -> str | None:
    """Why CUDA kernels can't be compiled here, with the cure; None where they can. Where there is a GPU that goes
    unused for it, it also warns, once a process."""
    if not torch.cuda.is_available():
        return f"{no_device('cuda')}, or use backend='torch'"
    if torch.version.hip:
        return "this torch is built for ROCm; CUDA kernels run on NVIDIA GPUs"
    try:
        _core()
    except ImportError as problem:
        major = (torch.version.cuda or "13").split(".")[0]
        reason = f"cuda-core does not import ({problem}); install it: pip install 'cuda-core[cu{major}]'"
    else:
        reason = _probe()
    if reason is not None:
        warnings.warn(f"statescan's CUDA kernels are not used: {reason}", stacklevel=2)
    return reason


def pieces(rows: int) -> list[slice]:
    """The rows of a batch, as many at once as a launch takes where each has blocks of its own on such an axis."""
    return [slice(first, first + MOST_BLOCKS) for first in range(0, rows, MOST_BLOCKS)]


def _in_a_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())


def cache_folder() -> Path:
    """Where compiled kernels are kept.

    Raises:
        ConfigError: see `statescan.files.default_cache_folder`.
    """
    return default_cache_folder() / "kernels"


def _compile(source: str, options: tuple[str, ...], arch: str) -> bytes:
    core = _core()
    defines = [tuple(o.split("=", 1)) for o in options] or None  # it takes no empty list
    # A generic lambda can't be marked as the device's own: without this NVRTC takes it for the host's and refuses it.
    settings = core.ProgramOptions(arch=arch, std="c++17", define_macro=defines, device_as_default_execution_space=True)
    try:
        code = core.Program(source, "c++", settings).compile("cubin").code
    except Exception as problem:
        raise BackendUnavailableError(
            f"a CUDA kernel did not compile for {arch} with {' '.join(options) or 'no options'}: "
            f"{_in_a_line(problem)}; use backend='torch' and report this"
        ) from problem
    return bytes(code)


# Folders of which it was said that they can't be written; None: there is no folder.
_not_kept: set[Path | None] = set()


def _say_not_kept(folder: Path | None, problem: BaseException) -> None:
    if folder not in _not_kept:
        _not_kept.add(folder)
        place = "" if folder is None else f" in {folder}"
        warnings.warn(
            f"compiled CUDA kernels can't be kept{place} ({_in_a_line(problem)}); every process compiles them anew: "
            "set STATESCAN_CACHE to a folder that can be written",
            stacklevel=4,
        )


def _checksum(code: bytes) -> bytes:
    return hashlib.sha256(code).digest()


def _cached(source: str, options: tuple[str, ...], arch: str) -> bytes:
    versions = (torch.version.cuda or "", *map(str, _nvrtc_version()), getattr(_core(), "__version__", ""))
    facts = "\0".join([source, *options, arch, *versions, statescan.__version__])
    try:
        file = cache_folder() / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.cubin"
    except ConfigError as problem:
        _say_not_kept(None, problem)
        return _compile(source, options, arch)
    try:
        held = file.read_bytes()
    except OSError:
        held = b""
    # The driver is told no length: what a full disk or a crash left of a file would send it past the end.
    size = len(_checksum(b""))
    if len(held) > size and _checksum(held[:-size]) == held[-size:]:
        return held[:-size]
    code = _compile(source, options, arch)
    try:
        with atomic_file(file) as part:
            part.write_bytes(code + _checksum(code))
    except CheckpointError as problem:
        _say_not_kept(file.parent, problem.__cause__ or problem)
    return code


def _allow_shared(function: Any, shared: int) -> None:
    """Lets a kernel use more than 48 KiB of shared memory a block (cuda-core reads the attribute, it can't set it)."""
    from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

    kind = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (code,) = driver.cuKernelSetAttribute(kind, shared, int(function.handle), torch.cuda.current_device())
    if code != driver.CUresult.CUDA_SUCCESS:
        raise BackendUnavailableError(f"this GPU does not give a block {shared} bytes of shared memory ({code.name})")


# `has_context`: the driver needs a context in every thread that launches. autograd's own thread has none until torch
# first asks something of the driver there, and memory from torch's cache asks nothing.
# `rehearses`: see `make_ready`.
_thread = threading.local()


class _AttributeValue(ctypes.Union):
    """CUlaunchAttributeValue: 64 bytes."""

    _fields_ = (("numbers", ctypes.c_uint * 16),)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("kind", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", _AttributeValue))


class _Configuration(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_COOPERATIVE, _CLUSTER, _PROGRAMMATIC = 2, 4, 6  # CUlaunchAttributeID


@functools.cache
def _launcher() -> Any:
    """The driver's cuLaunchKernelEx. cuda-core's launch is the same call behind a configuration, a stream and argument
    holders made anew each time, which cost the host more than the driver does."""
    library = ctypes.WinDLL("nvcuda.dll") if os.name == "nt" else ctypes.CDLL("libcuda.so.1")
    launch = library.cuLaunchKernelEx
    launch.argtypes = (ctypes.c_void_p,) * 4
    launch.restype = ctypes.c_int
    return launch


def _error_name(code: int) -> str:
    from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

    return driver.CUresult(code).name


def _stream_handle() -> int:
    return torch.cuda.current_stream().cuda_stream


if hasattr(torch._C, "_cuda_getCurrentRawStream"):
    # What torch's own compiled code asks: it makes no object.
    def _stream_handle() -> int:
        return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


# What a kernel's parameter is, by what is handed over: 8 bytes each, of which the kernel reads as many as it declares;
# bytes are a structure of their own size.
_FORMATS = {int: "q", float: "d", ctypes.c_double: "d", ctypes.c_int32: "i4x", ctypes.c_float: "f4x"}


class _Prepared:
    """A launch's structures, filled anew for each: configuration, arguments, and the pointers to them."""

    def __init__(self, kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        kinds = (int if a is None or isinstance(a, torch.Tensor) else type(a) for a in arguments)
        formats = [f"{len(a)}s" if kind is bytes else _FORMATS[kind] for a, kind in zip(arguments, kinds, strict=True)]
        layout = struct.Struct("=" + "".join(formats))
        self._values = ctypes.create_string_buffer(max(layout.size, 1))
        self.fill = functools.partial(layout.pack_into, self._values, 0)
        sizes = [struct.calcsize(f"={one}") for one in formats]
        places = itertools.accumulate(sizes[:-1], initial=ctypes.addressof(self._values))
        self._pointers = (ctypes.c_void_p * max(len(arguments), 1))(*(places if arguments else ()))
        self.pointers = ctypes.addressof(self._pointers)
        attributes = kernel.attributes
        self.configuration = _Configuration(
            1, 1, 1, kernel.threads, 1, 1, kernel.shared, None, attributes, len(attributes)
        )
        self.address = ctypes.addressof(self.configuration)


class Kernel:
    """One compiled function; call it with a grid and its arguments (tensors, None, ints as `i32` or plain 64-bit,
    floats as ``ctypes.c_float`` or plain 64-bit, and structures as bytes, of one size in all calls)."""

    def __init__(
        self,
        function: Any,
        threads: int,
        shared: int,
        cooperative: bool = False,
        cluster: int = 1,
        early: bool = False,
    ) -> None:
        self._function = function  # keeps its module loaded
        self._handle = int(function.handle)
        self.threads, self.shared, self._cluster = threads, shared, cluster
        wanted: list[tuple[int, tuple[int, ...]]] = [(_COOPERATIVE, (1,))] if cooperative else []
        if cluster > 1:
            wanted.append((_CLUSTER, (cluster, 1, 1)))
        if early:
            wanted.append((_PROGRAMMATIC, (1,)))
        self.attributes = (_Attribute * len(wanted))()
        for attribute, (kind, numbers) in zip(self.attributes, wanted, strict=True):
            attribute.kind = kind
            attribute.value.numbers[: len(numbers)] = numbers
        self._core = _core()
        self._launch = _launcher()
        # Those that no thread is filling: to take one out and to put it back are single steps of the interpreter.
        self._free: list[_Prepared] = []
        if shared > 48 * 1024:
            _allow_shared(function, shared)

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launches on torch's current stream. Tensors are passed by address, None as a null pointer.

        Raises:
            RuntimeError: the driver refuses; an error of an earlier kernel may show here.
        """
        if rehearsing():
            return
        if not getattr(_thread, "has_context", False):
            self._core.Device(torch.cuda.current_device()).set_current()
            _thread.has_context = True
        try:
            ready = self._free.pop()
        except IndexError:
            ready = _Prepared(self, arguments)
        ready.fill(
            *[
                a
                if (kind := type(a)) is int or kind is float or kind is bytes
                else a.value
                if kind is i32 or kind is ctypes.c_float
                else 0
                if a is None
                else a.data_ptr()
                for a in arguments
            ]
        )
        configuration = ready.configuration
        configuration.grid_x, configuration.grid_y, configuration.grid_z = grid[0] * self._cluster, grid[1], grid[2]
        configuration.stream = _stream_handle()
        code = self._launch(ready.address, self._handle, ready.pointers, None)
        self._free.append(ready)
        if code:
            raise RuntimeError(
                f"a CUDA kernel could not be launched ({_error_name(code)}; grid {grid}, {self.threads} threads and "
                f"{self.shared} bytes of shared memory a block); an earlier kernel's error may show here: run with "
                "CUDA_LAUNCH_BLOCKING=1"
            )


@functools.cache
def _module(file: str, options: tuple[str, ...], device: int, specific: bool) -> Any:
    core = _core()
    core.Device(device).set_current()
    major, minor = torch.cuda.get_device_capability(device)
    source = _COMMON.read_text() + Path(file).read_text()
    return core.ObjectCode.from_cubin(_cached(source, options, f"sm_{major}{minor}{'a' * specific}"))


def _loaded(module: Any, name: str, again: bool = True) -> Any:
    """A kernel of a module, which the driver loads with the first; `again`: once more where it found no memory."""
    try:
        return module.get_kernel(name)
    except Exception as problem:
        if "OUT_OF_MEMORY" not in str(problem).upper():
            raise BackendUnavailableError(
                f"a compiled CUDA kernel could not be loaded ({type(problem).__name__}: {_in_a_line(problem)}); use "
                "backend='torch' and report this; an earlier kernel's error may show here: run with "
                "CUDA_LAUNCH_BLOCKING=1"
            ) from problem
        if not again:
            raise torch.OutOfMemoryError(f"no memory is left on the GPU to load '{name}': {problem}") from problem
    torch.cuda.empty_cache()  # the driver loads code beside what torch keeps
    return _loaded(module, name, again=False)


@functools.cache
def _function(
    file: str,
    name: str,
    options: tuple[str, ...],
    threads: int,
    device: int,
    shared: int,
    cooperative: bool,
    cluster: int,
    early: bool,
    specific: bool,
) -> Kernel:
    function = _loaded(_module(file, options, device, specific), name)
    return Kernel(function, threads, shared, cooperative, cluster, early)


_kernels: dict[tuple[Any, ...], Kernel] = {}


def kernel(
    file: Path,
    name: str,
    options: Mapping[str, int],
    threads: int,
    device: int,
    shared: int = 0,
    cooperative: bool = False,
    cluster: int = 1,
    early: bool = False,
    specific: bool = False,
) -> Kernel:
    """The function `name` of `file`, compiled with the macros `options` for this device; made once a process.
    `shared`: bytes of dynamic shared memory a block. `cooperative`: all blocks of a launch run at once, or it fails.
    `cluster`: blocks of a cluster; the grid then counts clusters. `early`: it may begin before the launch in front has
    ended, for which it waits itself (``griddepcontrol.wait``) before it touches memory; compute capability 9.0.
    `specific`: it uses instructions of this architecture alone (``sm_90a``).

    Raises:
        BackendUnavailableError: the compiler or the driver refuses it.
    """
    # To put the macros into words takes longer than the launch.
    key = (file, name, threads, device, shared, cooperative, cluster, early, specific, *options.items())
    found = _kernels.get(key)
    if found is None:
        settings = tuple(f"{k}={v}" for k, v in sorted(options.items()))
        found = _function(str(file), name, settings, threads, device, shared, cooperative, cluster, early, specific)
        _kernels[key] = found
    return found


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Kernels called in this context and thread are compiled and not launched; all else runs."""
    before = rehearsing()
    _thread.rehearses = True
    try:
        yield
    finally:
        _thread.rehearses = before


def rehearsing() -> bool:
    """Whether this thread is in a `rehearsal`."""
    return getattr(_thread, "rehearses", False)


# Calls that were made ready.
_ready: set[tuple[Any, ...]] = set()
_MOST_READY = 4096  # where every batch has a length of its own


def _layout(x: Any) -> Any:
    """All of an argument that a choice of kernels may depend on."""
    if isinstance(x, Tensor):
        return x.dtype, x.get_device(), x.shape, x.stride(), x.data_ptr() % 16
    if hasattr(x, "__dataclass_fields__"):
        return type(x), *(_layout(getattr(x, field.name)) for field in dataclasses.fields(x))
    return x


_PLAIN: Any = Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]  # no operators of its own


def _has_memory(x: Any) -> bool:
    """Whether an argument is no tensor, or one that kernels can read. Fake and functional tensors have no memory, and
    what else brings operators of its own has it somewhere else; a Parameter and any plain subclass have it."""
    kind: Any = type(x)
    return not isinstance(x, Tensor) or kind.__torch_dispatch__ is _PLAIN


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """A context whose operators no dispatch mode sees: a tracer would record them, and a selective checkpoint would
    miss them when it runs the call again, which is ready then."""
    if not torch._C._len_torch_dispatch_stack() and not torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return contextlib.nullcontext()  # what follows imports much
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def make_ready(launch: Callable[..., object], *given: Any) -> None:
    """Compiles beforehand, once for calls of one layout, the kernels that ``launch(*given)`` launches: where that fails
    another backend can still take the call, which it no longer could when states were moved on, or in the middle of a
    backward pass.

    Args:
        launch: a function of a module, called with kernels compiled and not launched; what else it does has to be
            harmless, and its results are thrown away. Tensors come to it as other objects over the same memory, so that
            what is noted on one is noted on none of the caller's.
        given: tensors, dataclasses of them, and values by which kernels are chosen.

    Raises:
        BackendUnavailableError: the compiler or the driver refuses one.
    """
    if torch.compiler.is_compiling() or not all(map(_has_memory, given)):
        return
    key = (launch, *map(_layout, given))
    if key in _ready:
        return
    try:
        with rehearsal(), _unseen():
            launch(*(x.detach() if isinstance(x, Tensor) else x for x in given))
    except torch.OutOfMemoryError:  # the call itself may yet have room
        return
    if len(_ready) >= _MOST_READY:
        _ready.clear()
    _ready.add(key)


def launch_ready(launch: Callable[..., _Result], *gradients: Tensor | None) -> _Result:
    """``launch(*gradients)`` of a backward pass that was made ready with fresh tensors. Gradients may come in any other
    layout; where no kernel can be made for that, they are copied first.

    Raises:
        BackendUnavailableError: `launch` wasn't made ready.
    """
    try:
        return launch(*gradients)
    except BackendUnavailableError:
        return launch(
            *(None if g is None else torch.empty(g.shape, dtype=g.dtype, device=g.device).copy_(g) for g in gradients)
        )
