"""The residual addition and RMS norm through torch's own `rms_norm`, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.add_norm.validation import compute_dtype

__all__ = ["add_rms_norm", "refuses"]


def refuses(facts: Facts) -> str | None:
    """None: plain PyTorch runs everything."""
    del facts
    return None


def add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.add_rms_norm`; `stream` is the dtype of the residual stream."""
    compute = torch.float64 if torch.float64 in (x.dtype, stream) else compute_dtype(x.dtype)
    total = x if residual is None else x.to(compute) + residual.to(compute)
    total = total.to(stream)
    output = F.rms_norm(total.to(compute), (x.shape[-1],), weight.to(compute), eps)
    return output.to(x.dtype), total
