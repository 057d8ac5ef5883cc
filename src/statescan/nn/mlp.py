"""The Transformers' second half of a block: a position by itself, through a wider layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.errors import ConfigError

__all__ = ["MLP", "GatedMLP"]


class MLP(nn.Module):
    """``y = W_2 gelu(W_1 x + b_1) + b_2``, as in Pythia (GPT-NeoX).

    Args:
        d_model: width of input and output.
        d_inner: width between. Default: 4 d_model.
        bias: default True.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner = 4 * d_model if d_inner is None else d_inner
        _want("MLP", d_model, d_inner)
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, d_inner, **factory)
        self.out_proj = nn.Linear(d_inner, d_model, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) to the same."""
        return self.out_proj(F.gelu(self.in_proj(x)))


class GatedMLP(nn.Module):
    """SwiGLU: ``y = W_2 (silu(W_g x) * (W_1 x))``, as in Transformer++ (LLaMA).

    Args:
        d_model: width of input and output.
        d_inner: width between. Default: 8/3 d_model, rounded up to a multiple of 64: as many weights as `MLP` has.
        bias: default False.
        device, dtype: of the parameters.

    Source: Shazeer (2020), arXiv:2002.05202.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int | None = None,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner = -(-8 * d_model // (3 * 64)) * 64 if d_inner is None else d_inner
        _want("GatedMLP", d_model, d_inner)
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * d_inner, **factory)
        self.out_proj = nn.Linear(d_inner, d_model, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) to the same."""
        gate, value = self.in_proj(x).chunk(2, -1)
        return self.out_proj(F.silu(gate) * value)


def _want(name: str, d_model: int, d_inner: int) -> None:
    if min(d_model, d_inner) < 1:
        raise ConfigError(f"{name}: d_model and d_inner must be >= 1, got {d_model} and {d_inner}")
