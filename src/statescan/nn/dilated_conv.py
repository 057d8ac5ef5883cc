"""A dilated causal convolution with a gate: the baseline that trains in parallel but sees only so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.errors import ConfigError, ShapeError
from statescan.ops._checks import check_cu_seqlens

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
        """Runs a whole sequence.

        Args:
            x: (batch, length, d_model).
            state: what `init_state`, `forward` or `step` gave. Default: zeros, and no state comes out.
            cu_seqlens: (sequences + 1,), bounds of packed sequences; batch 1 then, and a row of the state a sequence.
        """
        if x.ndim != 3 or x.shape[2] != self.d_model or 0 in x.shape:
            raise ShapeError(
                f"DilatedConv: x must be (batch, length >= 1, d_model) with d_model {self.d_model}, "
                f"got {tuple(x.shape)}"
            )
        rows = x.shape[0]
        if cu_seqlens is not None:
            check_cu_seqlens("DilatedConv", cu_seqlens, x.shape[0], x.shape[1], in_graph=True)
            rows = cu_seqlens.shape[0] - 1
        if state is not None:
            self._check_state(state, rows)
        if cu_seqlens is not None:
            return self._packed(x, cu_seqlens, state)
        seen = F.pad(x, (0, 0, self.reach, 0)) if state is None else torch.cat([state.to(x.dtype), x], 1)
        output = self._filtered(seen)
        return DilatedConvOutput(output, None if state is None else seen[:, seen.shape[1] - self.reach :])

    def _check_state(self, state: Tensor, rows: int) -> None:
        if tuple(state.shape) != (rows, self.reach, self.d_model):
            raise ShapeError(
                f"DilatedConv: state must be (batch, reach, d_model) = {(rows, self.reach, self.d_model)}, "
                f"got {tuple(state.shape)}; make it with init_state(batch)"
            )

    def _filtered(self, seen: Tensor) -> Tensor:
        return self._gated(self.conv(seen.transpose(1, 2)).transpose(1, 2))

    def _gated(self, filtered: Tensor) -> Tensor:
        filtered, gate = filtered.chunk(2, -1)
        return self.out_proj(torch.tanh(filtered) * torch.sigmoid(gate))

    def _packed(self, x: Tensor, cu_seqlens: Tensor, state: Tensor | None) -> DilatedConvOutput:
        """One line in which each sequence comes behind the positions that it starts from."""
        sizes = cu_seqlens.diff().tolist()
        before = x.new_zeros(len(sizes), self.reach, self.d_model) if state is None else state.to(x.dtype)
        parts = [part for pair in zip(before, x[0].split(sizes), strict=True) for part in pair]
        line = torch.cat(parts).unsqueeze(0)
        number = torch.repeat_interleave(
            torch.arange(len(sizes), device=x.device), cu_seqlens.diff(), output_size=x.shape[1]
        )
        # The convolution's output t is that of the line's position t + reach.
        output = self._filtered(line).index_select(1, torch.arange(x.shape[1], device=x.device) + number * self.reach)
        if state is None:
            return DilatedConvOutput(output, None)
        ends = (cu_seqlens[1:] + torch.arange(1, len(sizes) + 1, device=x.device) * self.reach).long()
        last = ends[:, None] - self.reach + torch.arange(self.reach, device=x.device)
        return DilatedConvOutput(output, line[0][last])

    def step(self, x: Tensor, state: Tensor) -> DilatedConvOutput:
        """One position: x (batch, d_model). The filters look at `width` inputs; the state, which is left as it is, is
        copied whole."""
        if x.ndim != 2 or x.shape[1] != self.d_model or 0 in x.shape:
            raise ShapeError(
                f"DilatedConv: x must be (batch, d_model) with d_model {self.d_model} in a step, got {tuple(x.shape)}"
            )
        self._check_state(state, x.shape[0])
        seen = torch.cat([state.to(x.dtype), x.unsqueeze(1)], 1)
        taps = seen[:, :: self.dilation].transpose(1, 2).flatten(1)  # (batch, d_model width)
        return DilatedConvOutput(self._gated(F.linear(taps, self.conv.weight.flatten(1), self.conv.bias)), seen[:, 1:])
