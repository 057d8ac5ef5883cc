"""The residual addition and RMS norm in Triton: one pass over memory each way for rows of usual width."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops import _triton
from statescan.ops._checks import wants_gradients
from statescan.ops._dispatch import Facts
from statescan.ops.add_norm.autograd import backward_fake, backward_in_two, run

__all__ = ["add_rms_norm", "refuses"]

_FEATURES = 8192  # of a piece of a row
_ROWS = 16  # whose shares of the weight's gradient are added up by one program


def refuses(facts: Facts) -> str | None:
    """Why Triton does not take this call, with the cure; None if it does."""
    return _triton.refusal(facts)


def _as_rows(tensor: Tensor) -> Tensor:
    """(rows, d): a view wherever the strides allow one."""
    return tensor.reshape(-1, tensor.shape[-1])


def _pieces(features: int) -> dict[str, int]:
    piece = min(_FEATURES, _triton.power_of_2(features))
    return {"BF": piece, "PIECES": -(-features // piece), "num_warps": max(1, min(16, piece // 256))}


def _forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    output, total, rstd = _forward_fake(x, weight, residual, eps, stream)
    rows, other = _as_rows(x), None if residual is None else _as_rows(residual)
    with _triton.on_device_of(x):
        if rows.shape[0]:
            _triton.kernels("add_norm").norm_forward[(rows.shape[0],)](
                *(rows, other, weight.float().contiguous(), total if total.numel() else None, output, rstd),
                *(*rows.stride(), *((0, 0) if other is None else other.stride()), rows.shape[1], eps),
                **_pieces(rows.shape[1]),
            )
    return output, total, rstd


def _forward_fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    del weight, eps
    same = residual is None and stream == x.dtype  # the sum is x itself: nothing to write
    total = x.new_empty((0,) if same else x.shape, dtype=stream)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward(
    grad_output: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_residual, grad_weight = backward_fake(grad_output, grad_total, total, rstd, weight, residual_dtype)
    sums, grads = _as_rows(total), _as_rows(grad_output)
    # A traced graph hands zeros in place of None, also for a sum that was never written.
    onward = None if grad_total is None or not grad_total.numel() else _as_rows(grad_total)
    rows, features = sums.shape
    programs = -(-rows // _ROWS)
    shares = torch.empty(programs, features, dtype=torch.float32, device=total.device)
    with _triton.on_device_of(total):
        if rows:
            _triton.kernels("add_norm").norm_backward[(programs,)](
                *(grads, onward, sums, rstd.contiguous(), weight.float().contiguous()),
                *(grad_x, grad_residual if grad_residual.numel() else None, shares),
                *(*grads.stride(), *((0, 0) if onward is None else onward.stride()), *sums.stride(), rows, features),
                **_pieces(features),
                ROWS=_ROWS,
            )
    if _triton.rehearsing():
        return grad_x, grad_residual, grad_weight
    return grad_x, grad_residual, shares.sum(0).to(grad_weight.dtype)


_backward_op, _rehearse_backward = backward_in_two(_backward, _forward_fake)

_triton.register(
    "add_rms_norm_triton",
    "(Tensor x, Tensor weight, Tensor? residual, float eps, ScalarType stream) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_triton.register(
    "add_rms_norm_triton_backward",
    "(Tensor grad_output, Tensor? grad_total, Tensor total, Tensor rstd, Tensor weight, ScalarType? residual_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_op,
    backward_fake,
)


def add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.add_rms_norm`; `stream` is the dtype of the residual stream."""
    if wants_gradients(x, weight, residual):
        _triton.make_ready(_rehearse_backward, x, weight, residual, stream)
    return run("triton", x, weight, residual, eps, stream)
