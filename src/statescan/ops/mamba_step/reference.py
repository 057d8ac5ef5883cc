"""The readable truth of a block's decoding step, one line an equation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.mamba_step.validation import BlockWeights

__all__ = ["mamba_step", "refuses"]


def refuses(facts: Facts) -> str | None:
    """Runs everywhere."""
    return None


def mamba_step(
    x: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights
) -> tuple[Tensor, Tensor]:
    """(output, residual) of the block; both states are moved on in place."""
    w, dtype = weights, x.dtype

    residual = x.clone() if residual is None else x + residual
    normed = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + w.epsilon) * w.norm

    u, z = F.linear(normed, w.in_proj.unpack(dtype=dtype), w.in_bias).chunk(2, dim=-1)

    window = torch.cat([conv_state, u.unsqueeze(1)], dim=1)  # the last width inputs, oldest first
    conv_state.copy_(window[:, 1:])
    u = torch.einsum("bwd,dw->bd", window, w.conv_weight)
    u = F.silu(u if w.conv_bias is None else u + w.conv_bias)

    sizes = [w.dt_rank, w.d_state, w.d_state]
    dt, B, C = F.linear(u, w.x_proj.unpack(dtype=dtype), w.x_bias).split(sizes, dim=-1)
    dt = F.softplus(F.linear(dt, w.dt_proj.unpack(dtype=dtype), w.dt_bias))

    decay = torch.exp(dt.unsqueeze(-1) * w.A)
    ssm_state.copy_(decay * ssm_state + (dt * u).unsqueeze(-1) * B.unsqueeze(1))
    y = torch.einsum("bdn,bn->bd", ssm_state, C)
    if w.D is not None:
        y = y + w.D * u
    return F.linear(y * F.silu(z), w.out_proj.unpack(dtype=dtype), w.out_bias), residual
