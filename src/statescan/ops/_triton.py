"""What the Triton backends share: whether Triton can run here, and how their kernels are launched.

Nothing here imports triton before a call needs it. Kernels are in modules of their own (``triton_kernels.py`` beside
each backend), imported at the first launch. On the CPU they run only through Triton's interpreter, for tests: slowly.

Triton compiles a kernel where it is first launched. Those of a backward pass are compiled in the forward call, by
`make_ready` with a function that goes through the backward pass: there another backend can still take the call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError
from statescan.ops import _cuda
from statescan.ops._checks import check_cu_seqlens, in_capture, no_device, seen_and_right
from statescan.ops._cuda import launch_ready, rehearsing
from statescan.ops._dispatch import Facts

__all__ = [
    "check_boundaries",
    "hardware",
    "kernels",
    "launch_ready",
    "make_ready",
    "multiprocessors",
    "on_device_of",
    "power_of_2",
    "refusal",
    "register",
    "rehearsing",
]

_DEVICES = ("cuda", "xpu")  # AMD GPUs are 'cuda' to torch
_INSTALL = "install it: pip install triton (Linux; torch's own CUDA and ROCm wheels bring it)"


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _probe(device: str) -> str | None:
    """Why kernels can't be compiled and run on this kind of device; None where an empty one ran."""
    if device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (7, 0):
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return f"Triton needs compute capability 7.0, {name} has {major}.{minor}; use backend='torch'"
    try:
        functions = importlib.import_module("statescan.ops._triton_functions")
        functions.probe[(1,)](torch.zeros(1, device=device))
    except Exception as problem:
        text = " ".join(str(problem).split())
        return (
            f"an empty kernel could not be compiled and run ({type(problem).__name__}: {text[:300]}); Triton takes a C "
            "compiler (gcc or clang) on the machine and a driver as new as torch's; use backend='torch' without them"
        )
    return None


@functools.cache
def _unavailable(device: str) -> str | None:
    if not getattr(torch, device).is_available():
        return f"{no_device(device)}, or use backend='torch'"
    if importlib.util.find_spec("triton") is None:
        return f"triton does not import; {_INSTALL}"
    reason = _probe(device)
    if reason is not None:
        warnings.warn(f"statescan's Triton kernels are not used: {reason}", stacklevel=2)
    return reason


def refusal(facts: Facts) -> str | None:
    """Why Triton kernels can't take a call on this device in this dtype, with the cure; None where they can."""
    if facts.dtype == torch.float64:
        return "its kernels compute in float32, the inputs are float64; use backend='torch'"
    if facts.device == "cpu":
        if not interpreting():
            return (
                "it runs on GPUs, the inputs are on 'cpu'; use backend='cpu', or set TRITON_INTERPRET=1 before Python "
                "starts to interpret its kernels (slow, for tests)"
            )
        return None if importlib.util.find_spec("triton") is not None else f"triton does not import; {_INSTALL}"
    if facts.device not in _DEVICES:
        kinds = " or ".join(_DEVICES)
        return f"it runs on devices of type {kinds}, the inputs are on '{facts.device}'; use backend='torch'"
    if interpreting():
        return "TRITON_INTERPRET is set, which interprets kernels on the CPU; unset it to run on the GPU"
    return _unavailable(facts.device)


class _Made:
    """A kernel that is compiled and loaded where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def make(*arguments: Any, **named: Any) -> None:
            made = self._kernel.warmup(*arguments, grid=grid, **named)
            # Too much shared memory shows where it is loaded. The interpreter makes nothing.
            load = getattr(made, "_init_handles", None)
            if load is not None:
                _load(load)

        return make


def _load(load: Callable[[], None], again: bool = True) -> None:
    """Loads a kernel; `again`: once more where the driver found no memory."""
    try:
        return load()
    except RuntimeError as problem:
        if "out of memory" not in str(problem).lower():
            raise
        if not again:
            raise torch.OutOfMemoryError(
                f"no memory is left on the GPU to load a Triton kernel: {problem}"
            ) from problem
    for device in _DEVICES:
        getattr(torch, device).empty_cache()  # the driver loads code beside what torch keeps
    return _load(load, again=False)


class _Rehearsed:
    """A module of kernels in a rehearsal."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> _Made:
        return _Made(getattr(self._module, name))


def _kernels_of(module: str) -> Any:
    found = importlib.import_module(module)
    return _Rehearsed(found) if rehearsing() else found


def kernels(op: str) -> Any:
    """The module of an op's kernels; imports triton. In a rehearsal (`make_ready`) they are made and not launched."""
    return _kernels_of(f"statescan.ops.{op}.triton_kernels")


def make_ready(launch: Callable[..., object], *given: Any) -> None:
    """`statescan.ops._cuda.make_ready`, but not while a CUDA graph is captured: what a rehearsal does besides kernels,
    such as casts, would be recorded. A call that was captured without a warm-up makes its kernels as they are launched.

    Raises:
        BackendUnavailableError: a kernel could not be made.
    """
    tensors = (x for x in given if isinstance(x, Tensor))
    if not torch.compiler.is_compiling() and any(in_capture(x) for x in tensors):
        return
    _cuda.make_ready(launch, *given)


def hardware(tensor: Tensor) -> int:
    """What `_triton_functions` tunes exponentials for: 0 interpreter (exact), 1 NVIDIA, 2 others."""
    if tensor.device.type == "cpu":
        return 0
    return 1 if tensor.device.type == "cuda" and torch.version.hip is None else 2


def multiprocessors(tensor: Tensor) -> int:
    """How many independent processors the tensor's GPU has; 1 for the interpreter."""
    if tensor.device.type == "cuda":
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    if tensor.device.type == "xpu":
        return torch.xpu.get_device_properties(tensor.device).max_compute_units
    return 1


def _was_not_made(problem: BaseException | None) -> bool:
    """Whether an exception says that Triton could not make a kernel (and not that one failed as it ran)."""
    if type(problem).__name__ == "InterpreterError":
        return False
    of_triton = type(problem).__module__.partition(".")[0] == "triton"
    return of_triton or (isinstance(problem, RuntimeError) and "PassManager::run failed" in str(problem))


class on_device_of:  # noqa: N801  # stands in a with statement, as a function would
    """A context in which Triton launches on the tensor's own GPU.

    Raises:
        BackendUnavailableError: a kernel could not be made.
    """

    def __init__(self, tensor: Tensor) -> None:
        kind = tensor.device.type
        self._device: Any = contextlib.nullcontext() if kind == "cpu" else getattr(torch, kind).device(tensor.device)

    def __enter__(self) -> None:
        self._device.__enter__()

    def __exit__(self, kind: Any, problem: BaseException | None, trace: Any) -> None:
        self._device.__exit__(kind, problem, trace)
        if _was_not_made(problem):
            text = " ".join(str(problem).split())
            raise BackendUnavailableError(
                f"a Triton kernel did not compile ({type(problem).__name__}: {text[:300]}); use backend='torch' and "
                "report this"
            ) from problem


# Devices that have the kernel below: the first call brings it, a capture could not.
_checking: set[torch.device] = set()


def check_boundaries(op: str, cu_seqlens: Tensor, length: int) -> None:
    """Stops the program where boundaries of packed sequences are wrong that the host has never seen (in a compiled or
    captured graph): one small launch in front of kernels that trust them.

    Raises:
        ShapeError: they are wrong, and on the CPU.
    """
    if cu_seqlens.device.type == "cpu":  # Triton's interpreter leaves assertions out
        check_cu_seqlens(op, cu_seqlens, 1, length)
        return
    if cu_seqlens.device in _checking and seen_and_right(cu_seqlens, length):
        return
    _checking.add(cu_seqlens.device)
    sequences, block = cu_seqlens.shape[0] - 1, 1024
    functions = _kernels_of("statescan.ops._triton_functions")
    functions.check_boundaries[(-(-sequences // block),)](cu_seqlens, sequences, length, BLOCK=block)


def power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an operator of the ``statescan`` namespace that runs Triton kernels, with its fake kernel."""
    torch.library.define(f"statescan::{name}", schema)
    for device in ("CPU", "CUDA", "XPU"):
        torch.library.impl(f"statescan::{name}", device, kernel)
    torch.library.register_fake(f"statescan::{name}", fake)
