"""The residual addition and RMS norm as their equations read."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.add_norm.validation import compute_dtype

__all__ = ["add_rms_norm", "refuses"]


def refuses(facts: Facts) -> str | None:
    """None: the reference runs everything."""
    del facts
    return None


def add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.add_rms_norm`; `stream` is the dtype of the residual stream."""
    compute = torch.float64 if torch.float64 in (x.dtype, stream) else compute_dtype(x.dtype)
    total = x
    if residual is not None:
        total = x.to(compute) + residual.to(compute)
    total = total.to(stream)
    wide = total.to(compute)
    mean_square = (wide * wide).mean(-1, keepdim=True)
    output = wide / torch.sqrt(mean_square + eps) * weight.to(compute)
    return output.to(x.dtype), total
