"""What the kernels' backends share: an autograd function over two ops, and what their backward passes have alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statescan.ops._checks import refuse_second_derivative, wants_gradients
from statescan.ops._cuda import launch_ready

__all__ = ["backward_fake", "backward_in_two", "run"]

_Three = tuple[Tensor, Tensor, Tensor]


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


def backward_fake(
    grad_output: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual_dtype: torch.dtype | None,
) -> _Three:
    """Room for what a backward op gives: the gradients of x, of the residual and of the weight."""
    del grad_total, rstd
    # Where both have one dtype x and the residual have one gradient; it is written once.
    apart = residual_dtype is not None and residual_dtype != grad_output.dtype
    grad_residual = total.new_empty(total.shape if apart else (0,), dtype=residual_dtype or total.dtype)
    return grad_output.new_empty(total.shape), grad_residual, weight.new_empty(weight.shape)


def backward_in_two(
    backward: Callable[..., _Three], forward_fake: Callable[..., _Three]
) -> tuple[Callable[..., _Three], Callable[..., None]]:
    """A backward that compiles its kernels as two functions: the op, which launches what the forward call had compiled,
    and what that call hands to `make_ready`."""

    def op(grad_output: Tensor, grad_total: Tensor | None, *saved: Any) -> _Three:
        def launch(grad_output: Tensor, grad_total: Tensor | None) -> _Three:
            return backward(grad_output, grad_total, *saved)

        return launch_ready(launch, grad_output, grad_total)

    def rehearse(x: Tensor, weight: Tensor, residual: Tensor | None, stream: torch.dtype) -> None:
        """The backward passes that may follow such a call: the sum's gradient may come or not."""
        output, total, rstd = forward_fake(x, weight, residual, 0.0, stream)
        written = total.numel() > 0
        total = total if written else x
        for grad_total in (None, torch.empty_like(total)) if written else (None,):
            backward(output, grad_total, total, rstd, weight, None if residual is None else residual.dtype)

    return op, rehearse
