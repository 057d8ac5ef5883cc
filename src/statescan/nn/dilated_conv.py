"""A dilated causal convolution with a gate: the baseline that trains in parallel but sees only so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.errors import ConfigError, ShapeError
from statescan.nn.sequences import by_sequence

__all__ = ["DilatedConv", "DilatedConvOutput"]


class DilatedConvOutput(NamedTuple):
    """output: shaped as the input; state: the last inputs (batch, (width - 1) dilation, d_model), or None."""

    output: Tensor
    state: Tensor | None


class DilatedConv(nn.Module):
    """WaveNet's unit: ``y_t = W_o (tanh(sum_k F_k x_{t - k r}) * sigmoid(sum_k G_k x_{t - k r}))``.

    Args:
        d_model: width of input and output.
        width: number of taps, >= 1. Default 2.
        dilation: distance between taps, r. Default 1. Layers of 1, 2, 4, ... see 2^layers positions.
        bias: the filters have biases. Default True.
        device, dtype: of the parameters.

    Source: van den Oord et al. (2016), arXiv:1609.03499, equation 2.
    """

    def __init__(
        self,
        d_model: int,
        *,
        width: int = 2,
        dilation: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(d_model, width, dilation) < 1:
            raise ConfigError(
                f"DilatedConv: d_model, width and dilation must be >= 1, got {d_model}, {width} and {dilation}"
            )
        self.d_model, self.width, self.dilation = d_model, width, dilation
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv1d(d_model, 2 * d_model, width, dilation=dilation, bias=bias, **factory)
        self.out_proj = nn.Linear(d_model, d_model, bias=False, **factory)

    @property
    def reach(self) -> int:
        """How many positions back the layer sees: (width - 1) dilation."""
        return (self.width - 1) * self.dilation

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Zeros before the first position, (batch, reach, d_model)."""
        like = self.out_proj.weight
        return torch.zeros(batch, self.reach, self.d_model, device=device or like.device, dtype=dtype or like.dtype)

    def forward(self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> DilatedConvOutput:
        """Runs a whole sequence; arguments as in the other layers, x (batch, length, d_model)."""
        if x.ndim != 3 or x.shape[2] != self.d_model or 0 in x.shape:
            raise ShapeError(
                f"DilatedConv: x must be (batch, length >= 1, d_model) with d_model {self.d_model}, "
                f"got {tuple(x.shape)}"
            )
        if cu_seqlens is not None:
            packed = by_sequence("DilatedConv", lambda one: self.forward(one).output, x, cu_seqlens, state)
            return DilatedConvOutput(packed, None)
        if state is not None and tuple(state.shape) != (x.shape[0], self.reach, self.d_model):
            raise ShapeError(
                f"DilatedConv: state must be (batch, reach, d_model) = {(x.shape[0], self.reach, self.d_model)}, "
                f"got {tuple(state.shape)}; make it with init_state(batch)"
            )
        seen = F.pad(x, (0, 0, self.reach, 0)) if state is None else torch.cat([state.to(x.dtype), x], 1)
        filtered, gate = self.conv(seen.transpose(1, 2)).transpose(1, 2).chunk(2, -1)
        output = self.out_proj(torch.tanh(filtered) * torch.sigmoid(gate))
        return DilatedConvOutput(output, None if state is None else seen[:, seen.shape[1] - self.reach :])

    def step(self, x: Tensor, state: Tensor) -> DilatedConvOutput:
        """One position: x (batch, d_model)."""
        output = self.forward(x.unsqueeze(1), state)
        return DilatedConvOutput(output.output.squeeze(1), output.state)
