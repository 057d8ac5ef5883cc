"""One step of the selective scan on the C++ library: each state is read and written once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statescan.ops import _native
from statescan.ops._checks import wants_gradients
from statescan.ops._dispatch import Facts

__all__ = ["refuses", "selective_state_update"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class _Args(ctypes.Structure):
    """Mirrors ss_update_args in csrc/selective_scan.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("dtype", "softplus", "b_fixed", "c_fixed", "batch", "channels", "states", "b_groups", "c_groups"),
            *("u_batch", "dt_batch", "z_batch", "b_batch", "b_group", "c_batch", "c_group"),
        )
    ) + tuple(
        (name, ctypes.c_void_p) for name in ("u", "dt", "z", "B", "C", "A", "D", "dt_bias", "state", "y", "new_state")
    )


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernel does not take this call, with the cure; None if it does."""
    if facts.device == "cpu" and facts.complex_A:
        return "its states are real, A is complex; use backend='torch'"
    return _native.refusal(facts.device, "ss_selective_state_update")


@functools.cache
def _function() -> Callable[[Any], int]:
    function = _native.library().lib.ss_selective_state_update
    function.argtypes = [ctypes.c_void_p]
    function.restype = ctypes.c_int32
    return function


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is contiguous (any strides before it), else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _run(
    state: Tensor,
    new_state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """Fills new_state (contiguous; may be state itself) and returns y."""
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    u, dt, B, C, A, state = _rows(u), _rows(dt), _rows(B), _rows(C), A.contiguous(), state.contiguous()
    args = _Args()
    args.dtype = _DTYPES[u.dtype]
    args.softplus = dt_softplus
    args.batch, args.channels = u.shape
    args.states = A.shape[1]
    args.u_batch, args.dt_batch = u.stride(0), dt.stride(0)
    args.b_groups = args.c_groups = 1
    if B.dim() == 2:
        args.b_fixed = 1
        B = B.contiguous()
    else:
        args.b_groups = B.shape[1]
        args.b_batch, args.b_group, _ = B.stride()
    if C.dim() == 2:
        args.c_fixed = 1
        C = C.contiguous()
    else:
        args.c_groups = C.shape[1]
        args.c_batch, args.c_group, _ = C.stride()
    args.u, args.dt, args.A, args.B, args.C = u.data_ptr(), dt.data_ptr(), A.data_ptr(), B.data_ptr(), C.data_ptr()
    if D is not None:
        D = D.contiguous()
        args.D = D.data_ptr()
    if dt_bias is not None:
        dt_bias = dt_bias.contiguous()
        args.dt_bias = dt_bias.data_ptr()
    if z is not None:
        z = _rows(z)
        args.z, args.z_batch = z.data_ptr(), z.stride(0)
    args.state, args.new_state, args.y = state.data_ptr(), new_state.data_ptr(), y.data_ptr()
    code = _function()(ctypes.addressof(args))
    assert code == 0, f"ss_selective_state_update returned {code}"
    return y


def _update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    new_state = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    return _run(state, new_state, u, dt, A, B, C, D, z, dt_bias, dt_softplus), new_state


def _update_inplace(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    if state.is_contiguous():
        return _run(state, state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    y, new_state = _update(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    state.copy_(new_state)
    return y


def _update_fake(state: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty(
        state.shape, dtype=state.dtype, device=state.device
    )


def _update_inplace_fake(state: Tensor, u: Tensor, *rest: Any) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


def _register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    torch.library.define(f"statescan::{name}", schema)
    torch.library.impl(f"statescan::{name}", "CPU", kernel)
    torch.library.register_fake(f"statescan::{name}", fake)


_INPUTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus"
_register("selective_state_update_cpu", f"(Tensor state, {_INPUTS}) -> (Tensor, Tensor)", _update, _update_fake)
_register(
    "selective_state_update_cpu_inplace",
    f"(Tensor(a!) state, {_INPUTS}) -> Tensor",
    _update_inplace,
    _update_inplace_fake,
)
_op = torch.ops.statescan.selective_state_update_cpu.default
_inplace_op = torch.ops.statescan.selective_state_update_cpu_inplace.default


def selective_state_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """`statescan.ops.selective_state_update` on the C++ library, from settled arguments.

    Where a gradient is to come it is the scan's, over one position.
    """
    if inplace:
        return _inplace_op(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus), state
    inputs = (state, u, dt, A, B, C, D, z, dt_bias)
    if wants_gradients(*inputs):
        from statescan.ops.selective_scan.cpu import selective_scan

        y, new_state = selective_scan(
            *(u.unsqueeze(1), dt.unsqueeze(1), A),
            *(B if B.dim() == 2 else B.unsqueeze(1), C if C.dim() == 2 else C.unsqueeze(1)),
            *(D, None if z is None else z.unsqueeze(1), dt_bias, dt_softplus, state, None, True),
        )
        assert new_state is not None
        return y.squeeze(1), new_state
    return _op(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)
