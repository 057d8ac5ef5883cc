"""The plain form of packed_linear, the truth the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.packed_linear.validation import PackedWeight

__all__ = ["packed_linear", "refuses"]


def refuses(facts: Facts) -> str | None:
    """Runs everywhere."""
    return None


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """y_o = sum_k x_k W_ok + bias_o in float32 (float64 for float64), rounded once to x's dtype."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.einsum("...k,ok->...o", x.to(compute), packed.unpack(dtype=compute))
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype)
