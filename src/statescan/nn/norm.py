"""Root-mean-square norm that takes the residual addition in with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from statescan.ops import AddNormOutput, add_rms_norm

__all__ = ["RMSNorm"]


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
