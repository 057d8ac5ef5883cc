"""What `add_rms_norm` accepts, checked before any backend sees the call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.ops._checks import ACTIVATION_DTYPES

__all__ = ["check_add_rms_norm", "compute_dtype"]

_OP = "add_rms_norm"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the norm is taken: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, residual_dtype: torch.dtype | None
) -> torch.dtype:
    """Raises the first thing wrong with a call; gives the dtype of the residual stream."""
    for name, tensor in (("x", x), ("weight", weight), ("residual", residual)):
        if tensor is not None and tensor.dtype not in ACTIVATION_DTYPES:
            raise DTypeError(
                f"{_OP}: {name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}; "
                f"convert it with {name}.float()"
            )
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ShapeError(f"{_OP}: x must be (..., d >= 1), got {tuple(x.shape)}; the norm runs over the last axis")
    if weight.ndim != 1 or weight.shape[0] != x.shape[-1]:
        raise ShapeError(
            f"{_OP}: weight must be (d,) = ({x.shape[-1]},), got {tuple(weight.shape)}; give one number a feature"
        )
    if residual is not None and residual.shape != x.shape:
        raise ShapeError(
            f"{_OP}: residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "expand it first, nothing is broadcast"
        )
    for name, tensor in (("weight", weight), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ShapeError(
                f"{_OP}: {name} must be on the device of x, {x.device}, got {tensor.device}; move it with .to(x.device)"
            )
    if not (math.isfinite(eps) and eps >= 0):
        raise ConfigError(f"{_OP}: eps must be a finite number >= 0, got {eps!r}; the published value is 1e-5")
    if residual_dtype is None:
        return x.dtype if residual is None else residual.dtype
    if residual_dtype not in ACTIVATION_DTYPES:
        raise DTypeError(
            f"{_OP}: residual_dtype must be float64, float32, bfloat16 or float16, got {residual_dtype}; "
            "leave it out to keep the residual's own"
        )
    return residual_dtype
