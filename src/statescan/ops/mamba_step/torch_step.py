"""mamba_step composed of this package's smaller ops on their torch backends, for every device."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.add_norm.api import add_rms_norm
from statescan.ops.causal_conv1d.api import causal_conv1d_update
from statescan.ops.mamba_step.validation import BlockWeights
from statescan.ops.packed_linear.api import packed_linear
from statescan.ops.selective_state_update.api import selective_state_update

__all__ = ["mamba_step", "refuses"]


def refuses(facts: Facts) -> str | None:
    """Runs everywhere."""
    return None


@torch.no_grad()
def mamba_step(
    x: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights
) -> tuple[Tensor, Tensor]:
    """(output, residual) of the block; both states are moved on in place."""
    w = weights
    normed, residual = add_rms_norm(x, w.norm, residual=residual, eps=w.epsilon, backend="torch")
    if residual is x:
        residual = x.clone()
    u, z = packed_linear(normed, w.in_proj, w.in_bias, backend="torch").chunk(2, dim=-1)
    u, _ = causal_conv1d_update(
        u, conv_state, w.conv_weight, w.conv_bias, activation="silu", inplace=True, backend="torch"
    )
    dt, B, C = packed_linear(u, w.x_proj, w.x_bias, backend="torch").split([w.dt_rank, w.d_state, w.d_state], dim=-1)
    dt = packed_linear(dt, w.dt_proj, backend="torch")
    # B and C with a group dimension: (batch, d_state) would be ambiguous where the batch equals d_inner.
    y, _ = selective_state_update(
        ssm_state,
        u,
        dt,
        w.A,
        B.unsqueeze(1),
        C.unsqueeze(1),
        D=w.D,
        z=z,
        dt_bias=w.dt_bias,
        dt_softplus=True,
        inplace=True,
        backend="torch",
    )
    return packed_linear(y, w.out_proj, w.out_bias, backend="torch"), residual
