"""The selective scan on the C++ library: channels in vectors, states in registers, states made again backwards."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError, ShapeError
from statescan.ops import _native
from statescan.ops._checks import wants_gradients
from statescan.ops._dispatch import Facts

__all__ = ["refuses", "selective_scan"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


# The fields of ss_scan_args in csrc/selective_scan.h, in order.
_NUMBERS = (
    "dtype softplus b_fixed c_fixed batch length channels states b_groups c_groups sequences chunk threads "
    "u_batch u_step dt_batch dt_step z_batch z_step dy_batch dy_step b_batch b_step b_group c_batch c_step c_group"
)
_POINTERS = (
    "u dt z B C A D dt_bias initial cu_seqlens y final_state checkpoints "
    "dy dfinal du ddt dz dB dC dA dD ddt_bias dinitial"
)


class _Args(ctypes.Structure):
    """Mirrors ss_scan_args in csrc/selective_scan.h."""

    _fields_ = tuple(
        [(name, ctypes.c_int64) for name in _NUMBERS.split()] + [(name, ctypes.c_void_p) for name in _POINTERS.split()]
    )
    __slots__ = ()  # a misspelt field is an error, not a new attribute


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernel does not take this call, with the cure; None if it does."""
    if facts.device == "cpu" and facts.complex_A:
        return "its states are real, A is complex; use backend='torch'"
    return _native.refusal(facts.device, "ss_selective_scan", "ss_selective_scan_backward")


@functools.cache
def _function(name: str) -> Callable[[Any], int]:
    function = getattr(_native.library().lib, name)
    function.argtypes = [ctypes.c_void_p]
    function.restype = ctypes.c_int32
    return function


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is contiguous (any strides before it), else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _chunk(states: int) -> int:
    """Positions between two checkpoints: the states of a chunk of 64 channels should fit the second-level cache."""
    return 32 if states <= 16 else 16


def _slots(batch: int, length: int, states: int, sequences: int | None) -> int:
    """Checkpoints of a call. With packed sequences an upper bound that doesn't look at their lengths."""
    chunk = _chunk(states)
    return batch * -(-length // chunk) if sequences is None else length // chunk + sequences


def _pack(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor | None,
) -> tuple[_Args, list[Tensor]]:
    """The arguments that forward and backward share, and the tensors that must outlive the call."""
    u, dt, B, C, A = _rows(u), _rows(dt), _rows(B), _rows(C), A.contiguous()
    alive = [u, dt, B, C, A]
    args = _Args()
    args.dtype = _DTYPES[u.dtype]
    args.softplus = dt_softplus
    args.batch, args.length, args.channels = u.shape
    args.states = A.shape[1]
    args.chunk = _chunk(A.shape[1])
    args.threads = torch.get_num_threads()
    args.u_batch, args.u_step, _ = u.stride()
    args.dt_batch, args.dt_step, _ = dt.stride()
    args.u, args.dt, args.A = u.data_ptr(), dt.data_ptr(), A.data_ptr()
    args.b_groups = args.c_groups = 1
    if B.dim() == 2:
        args.b_fixed = 1
        B = B.contiguous()
        alive.append(B)
    else:
        args.b_groups = B.shape[2]
        args.b_batch, args.b_step, args.b_group, _ = B.stride()
    if C.dim() == 2:
        args.c_fixed = 1
        C = C.contiguous()
        alive.append(C)
    else:
        args.c_groups = C.shape[2]
        args.c_batch, args.c_step, args.c_group, _ = C.stride()
    args.B, args.C = B.data_ptr(), C.data_ptr()
    if D is not None:
        D = D.contiguous()
        alive.append(D)
        args.D = D.data_ptr()
    if z is not None:
        z = _rows(z)
        alive.append(z)
        args.z = z.data_ptr()
        args.z_batch, args.z_step, _ = z.stride()
    if dt_bias is not None:
        dt_bias = dt_bias.contiguous()
        alive.append(dt_bias)
        args.dt_bias = dt_bias.data_ptr()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        alive.append(cu_seqlens)
        args.cu_seqlens = cu_seqlens.data_ptr()
        args.sequences = cu_seqlens.shape[0] - 1
    else:
        args.sequences = u.shape[0]
    return args, alive


def _run(name: str, args: _Args) -> None:
    code = _function(name)(ctypes.addressof(args))
    if code == -2:
        raise ShapeError(
            f"selective_scan: cu_seqlens must run from 0 to the length, {args.length}, never falling, got others; "
            "pass the cumulated lengths of the packed sequences, beginning with 0"
        )
    if code == -3:
        raise MemoryError("selective_scan: no memory left for the kernel's partial sums; use a smaller batch or length")
    assert code == 0, f"{name} returned {code}"


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_state: bool,
    with_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, final_state, checkpoints = _forward_fake(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, with_state, with_checkpoints
    )
    args, alive = _pack(u, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
        alive.append(initial_state)
        args.initial = initial_state.data_ptr()
    args.y = y.data_ptr()
    if with_state:
        args.final_state = final_state.data_ptr()
    if with_checkpoints:
        args.checkpoints = checkpoints.data_ptr()
    _run("ss_selective_scan", args)
    return y, final_state, checkpoints


def _forward_fake(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_state: bool,
    with_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    states = A.shape[1]
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = _slots(batch, length, states, sequences)
    y = torch.empty((batch, length, channels), dtype=u.dtype, device=u.device)
    final_state = A.new_empty((batch if sequences is None else sequences, channels, states) if with_state else (0,))
    # an empty sequence has a slot that nothing writes
    blank = A.new_empty if sequences is None else A.new_zeros
    checkpoints = blank((slots, states, channels) if with_checkpoints else (0,))
    return y, final_state, checkpoints


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    with_initial: bool,
) -> _Gradients:
    gradients = _backward_fake(
        dy, dfinal, u, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens, checkpoints, with_initial
    )
    du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial = gradients
    args, alive = _pack(u, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens)
    dy, checkpoints = _rows(dy), checkpoints.contiguous()
    alive += (dy, checkpoints)
    args.dy, args.checkpoints = dy.data_ptr(), checkpoints.data_ptr()
    args.dy_batch, args.dy_step, _ = dy.stride()
    if dfinal is not None:
        dfinal = dfinal.contiguous()
        alive.append(dfinal)
        args.dfinal = dfinal.data_ptr()
    args.du, args.ddt, args.dA = du.data_ptr(), ddt.data_ptr(), dA.data_ptr()
    args.dB, args.dC = dB.data_ptr(), dC.data_ptr()
    if D is not None:
        args.dD = dD.data_ptr()
    if z is not None:
        args.dz = dz.data_ptr()
    if dt_bias is not None:
        args.ddt_bias = ddt_bias.data_ptr()
    if with_initial:
        args.dinitial = dinitial.data_ptr()
    _run("ss_selective_scan_backward", args)
    return gradients


def _backward_fake(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    with_initial: bool,
) -> _Gradients:
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        u.new_empty(u.shape),
        u.new_empty(u.shape),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        A.new_empty((0,) if D is None else D.shape),
        u.new_empty((0,) if z is None else u.shape),
        A.new_empty((0,) if dt_bias is None else dt_bias.shape),
        A.new_empty((rows, u.shape[2], A.shape[1]) if with_initial else (0,)),
    )


def _register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    torch.library.define(f"statescan::{name}", schema)
    torch.library.impl(f"statescan::{name}", "CPU", kernel)
    torch.library.register_fake(f"statescan::{name}", fake)


_INPUTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus"
_register(
    "selective_scan_cpu",
    f"({_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens, bool with_state, bool with_checkpoints) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_register(
    "selective_scan_cpu_backward",
    f"(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor? cu_seqlens, Tensor checkpoints, bool with_initial) "
    f"-> ({', '.join(['Tensor'] * 9)})",
    _backward,
    _backward_fake,
)
_forward_op = torch.ops.statescan.selective_scan_cpu.default
_backward_op = torch.ops.statescan.selective_scan_cpu_backward.default


class _Backward(torch.autograd.Function):
    """The backward as a function of its own, so that a second derivative is refused in words instead of being wrong."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return _backward_op(*args)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise BackendUnavailableError(
            "selective_scan: backend 'cpu' has no second derivative, and one was asked for (create_graph=True); "
            "pass backend='torch'"
        )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        with_state: bool,
    ) -> tuple[Tensor, Tensor]:
        y, final_state, checkpoints = _forward_op(
            u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, with_state, True
        )
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, cu_seqlens, checkpoints)
        ctx.dt_softplus, ctx.with_state, ctx.with_initial = dt_softplus, with_state, initial_state is not None
        if not with_state:
            ctx.mark_non_differentiable(final_state)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:  # type: ignore[override]
        u, dt, A, B, C, D, z, dt_bias, cu_seqlens, checkpoints = ctx.saved_tensors
        run = _Backward.apply if torch.is_grad_enabled() else _backward_op
        du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial = run(
            *(dy, dfinal if ctx.with_state else None, u, dt, A, B, C, D, z, dt_bias),
            *(ctx.dt_softplus, cu_seqlens, checkpoints, ctx.with_initial),
        )
        return (
            *(du, ddt, dA, dB, dC),
            None if D is None else dD,
            None if z is None else dz,
            None if dt_bias is None else ddt_bias,
            *(None, dinitial if ctx.with_initial else None, None, None),
        )


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`statescan.ops.selective_scan` on the C++ library, from settled arguments.

    Without a gradient to come nothing is kept; with one, the state before every 32nd position (16th above 16 states).
    """
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    if wants_gradients(*inputs):
        y, final_state = _Scan.apply(
            u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, return_final_state
        )
    else:
        y, final_state, _ = _forward_op(
            u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, return_final_state, False
        )
    return y, final_state if return_final_state else None
