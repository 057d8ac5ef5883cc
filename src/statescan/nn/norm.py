"""Norms that take the residual addition in with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.ops import AddNormOutput, add_rms_norm

__all__ = ["LayerNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """Adds a layer's output to the residual stream and normalises the sum by its root mean square.

    Equations, over the last axis::

        sum    = x + residual
        output = sum / sqrt(mean(sum^2) + eps) * weight

    Args:
        d_model: size of the last axis.
        eps: added to the mean square. Default 1e-5.
        backend: as in `statescan.ops.add_rms_norm`. Default "auto".
        device: where the weight is made. Default: torch's.
        dtype: of the weight. Default: torch's.
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_dtype: torch.dtype | None = None
    ) -> AddNormOutput:
        """The normalised sum, in the dtype of x, and the sum itself; see `statescan.ops.add_rms_norm`.

        Args:
            x: (..., d_model).
            residual: shape of x. Default: none, the sum is x.
            residual_dtype: dtype of the sum that is returned. Default: of residual, else of x.
        """
        return add_rms_norm(
            x, self.weight, residual=residual, eps=self.eps, residual_dtype=residual_dtype, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """Adds a layer's output to the residual stream and normalises the sum by its mean and variance.

    Equations, over the last axis::

        sum    = x + residual
        output = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias

    Args:
        d_model: size of the last axis.
        eps: added to the variance. Default 1e-5.
        device: where the weights are made. Default: torch's.
        dtype: of the weights. Default: torch's.

    Source: Ba, Kiros and Hinton (2016), arXiv:1607.06450.
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ones and the bias to zeros."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_dtype: torch.dtype | None = None
    ) -> AddNormOutput:
        """The normalised sum, in the dtype of x, and the sum itself; arguments as in `RMSNorm.forward`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
        output = F.layer_norm(total, self.weight.shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        kept = residual_dtype or (x if residual is None else residual).dtype
        return AddNormOutput(output.to(x.dtype), total.to(kept))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
