"""One step of the selective scan in Triton: each state is read and written once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from statescan.ops import _triton
from statescan.ops._checks import wants_gradients
from statescan.ops._dispatch import Facts

__all__ = ["refuses", "selective_state_update"]

_NUMBERS = 1024  # states of a program of four warps


def refuses(facts: Facts) -> str | None:
    """Why Triton does not take this call, with the cure; None if it does."""
    if facts.complex_A:
        return "its kernels take real A only; complex A runs on backend='torch'"
    if facts.d_state > 256:
        return f"its kernels hold up to 256 states a channel, d_state is {facts.d_state}; use backend='torch'"
    return _triton.refusal(facts)


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
    """Fills new_state (may be state itself) and returns y."""
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    batch, d_inner = u.shape
    fixed_B, fixed_C = B.dim() == 2, C.dim() == 2
    groups_B, groups_C = (1 if fixed else x.shape[1] for x, fixed in ((B, fixed_B), (C, fixed_C)))
    groups = math.lcm(groups_B, groups_C)
    A = A.float().contiguous()
    D, dt_bias = (None if x is None else x.float().contiguous() for x in (D, dt_bias))
    B, C = (x.float().contiguous() if fixed else x for x, fixed in ((B, fixed_B), (C, fixed_C)))
    states, per_group = _triton.power_of_2(A.shape[1]), d_inner // groups
    channels = min(_NUMBERS // states, _triton.power_of_2(per_group))
    each = -(-per_group // channels)
    blocks = each * groups
    with _triton.on_device_of(u):
        _triton.kernels("selective_state_update").state_update[(blocks * batch,)](
            *(state, u, dt, z, B, C, A, D, dt_bias, y, new_state),
            *(*state.stride(), *new_state.stride(), *u.stride(), *dt.stride(), *((0, 0) if z is None else z.stride())),
            *((0, 0, 0) if fixed_B else B.stride()),
            *((0, 0, 0) if fixed_C else C.stride()),
            *(d_inner, per_group, each, blocks, d_inner // groups_B, d_inner // groups_C),
            N=A.shape[1],
            NP=states,
            BD=channels,
            SOFTPLUS=dt_softplus,
            FIXED_B=fixed_B,
            FIXED_C=fixed_C,
            GPU=_triton.hardware(u),
        )
    return y


def _update(state: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    new_state = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    return _run(state, new_state, *arguments), new_state


def _update_inplace(state: Tensor, *arguments: Any) -> Tensor:
    return _run(state, state, *arguments)


def _update_fake(state: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty(
        state.shape, dtype=state.dtype, device=state.device
    )


def _update_inplace_fake(state: Tensor, u: Tensor, *rest: Any) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


_INPUTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus"
_triton.register(
    "selective_state_update_triton", f"(Tensor state, {_INPUTS}) -> (Tensor, Tensor)", _update, _update_fake
)
_triton.register(
    "selective_state_update_triton_inplace",
    f"(Tensor(a!) state, {_INPUTS}) -> Tensor",
    _update_inplace,
    _update_inplace_fake,
)
_op = torch.ops.statescan.selective_state_update_triton.default
_inplace_op = torch.ops.statescan.selective_state_update_triton_inplace.default


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
    """`statescan.ops.selective_state_update` in Triton, from settled arguments.

    Where a gradient is to come it is the scan's, over one position.
    """
    if inplace:
        return _inplace_op(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus), state
    inputs = (state, u, dt, A, B, C, D, z, dt_bias)
    if wants_gradients(*inputs):
        from statescan.ops.selective_scan.triton_scan import selective_scan

        y, new_state = selective_scan(
            *(u.unsqueeze(1), dt.unsqueeze(1), A),
            *(B if B.dim() == 2 else B.unsqueeze(1), C if C.dim() == 2 else C.unsqueeze(1)),
            *(D, None if z is None else z.unsqueeze(1), dt_bias, dt_softplus, state, None, True),
        )
        assert new_state is not None
        return y.squeeze(1), new_state
    return _op(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)
