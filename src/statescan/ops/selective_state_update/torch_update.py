"""One step in plain PyTorch with few passes over the state; on any device, twice differentiable unless in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._dispatch import Facts

__all__ = ["refuses", "selective_state_update"]


def refuses(facts: Facts) -> str | None:
    """Plain PyTorch runs everything."""
    return None


def _channels(matrix: Tensor, groups: int, real: torch.dtype) -> Tensor:
    """B or C as (batch or 1, groups, d_inner / groups or 1, d_state)."""
    if not matrix.is_complex():
        matrix = matrix.to(real)
    if matrix.dim() == 2:
        return matrix.view(1, groups, -1, matrix.shape[1])
    if matrix.shape[1] == groups:
        return matrix.unsqueeze(2)
    return matrix.repeat_interleave(groups // matrix.shape[1], dim=1).unsqueeze(2)


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
    """One step; arguments as `settle` leaves them, meaning as in the public function.

    h' = exp(dt A) h + dt B u;  y = (C . h' + D u) * silu(z).
    """
    dtype = u.dtype
    batch, d_inner = u.shape
    real = torch.float64 if dtype == torch.float64 else torch.float32
    # One view serves both: channels as (groups, channels of a group), so that B and C broadcast and are never copied.
    groups_B, groups_C = (1 if m.dim() == 2 else m.shape[1] for m in (B, C))
    groups = groups_B if groups_B % groups_C == 0 else groups_C if groups_C % groups_B == 0 else d_inner
    B, C = _channels(B, groups, real), _channels(C, groups, real)

    x, dt = u.to(real), dt.to(real)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    grouped = (batch, groups, d_inner // groups, A.shape[1])
    decay = torch.exp(dt.unsqueeze(-1) * A).view(grouped)
    drive = (dt * x).view(*grouped[:3], 1) * B
    if inplace:
        new = state.contiguous().view(grouped).mul_(decay).add_(drive)
        new_state = state if state.is_contiguous() else state.copy_(new.view(state.shape))
    else:
        new = decay * state.contiguous().view(grouped) + drive
        new_state = new.view(state.shape)
    y = (new * C).sum(-1).view(batch, d_inner)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(dtype), new_state
