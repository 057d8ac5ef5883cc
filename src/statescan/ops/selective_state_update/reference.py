"""The readable truth of one step. float64 in, float64 out; autograd differentiates it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._dispatch import Facts

__all__ = ["refuses", "selective_state_update"]


def refuses(facts: Facts) -> str | None:
    """The reference runs everything."""
    return None


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
    dtype, d_inner = u.dtype, u.shape[1]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    u, dt = u.to(real), dt.to(real)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    B, C = (m if m.is_complex() else m.to(real) for m in (B, C))
    # (batch, groups, d_state) -> (batch, d_inner, d_state); a fixed B is (d_inner, d_state) already
    B, C = (m if m.dim() == 2 else m.repeat_interleave(d_inner // m.shape[1], dim=1) for m in (B, C))

    new_state = torch.exp(dt.unsqueeze(-1) * A) * state + (dt * u).unsqueeze(-1) * B
    y = (C * new_state).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z.to(real))
    if inplace:
        new_state = state.copy_(new_state)
    return y.to(dtype), new_state
