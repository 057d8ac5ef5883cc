"""What the kernels' backends share: one autograd function over a forward and a backward op, and when it is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statescan.ops._checks import refuse_second_derivative, wants_gradients

__all__ = ["run", "wants_gradients"]


class _AddRMSNorm(torch.autograd.Function):
    """Saves the sum, which goes on anyway, and one number a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype, backend: str
    ) -> tuple[Tensor, Tensor]:
        output, total, rstd = getattr(torch.ops.statescan, f"add_rms_norm_{backend}")(x, weight, residual, eps, stream)
        same = residual is None and stream == x.dtype
        ctx.save_for_backward(x if same else total, rstd, weight)
        ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("add_rms_norm", ctx.backend)
        total, rstd, weight = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(total, dtype=ctx.x_dtype)
        grad_x, grad_residual, grad_weight = getattr(torch.ops.statescan, f"add_rms_norm_{ctx.backend}_backward")(
            grad_output, grad_total, total, rstd, weight, ctx.residual_dtype
        )
        if ctx.residual_dtype is None:
            return grad_x, grad_weight, None, None, None, None
        return grad_x, grad_weight, grad_residual if grad_residual.numel() else grad_x, None, None, None


def run(
    backend: str, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`statescan.ops.add_rms_norm` by the ops ``add_rms_norm_<backend>`` and ``add_rms_norm_<backend>_backward``.

    Args:
        backend: ``"cpu"``, ``"cuda"`` or ``"triton"``, whose module has registered its two ops.
        x, weight, residual, eps: as in the public function.
        stream: dtype of the residual stream.
    """
    if wants_gradients(x, weight, residual):
        output, total = _AddRMSNorm.apply(x, weight, residual, eps, stream, backend)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        forward = getattr(torch.ops.statescan, f"add_rms_norm_{backend}")
        output, total, _ = forward(x, weight, residual, eps, stream)
    return output, x if residual is None and stream == x.dtype else total
