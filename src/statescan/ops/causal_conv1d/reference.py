"""The causal convolution as its definition reads: one position after the other, on any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops._checks import assert_cu_seqlens
from statescan.ops._dispatch import Facts
from statescan.ops.causal_conv1d.validation import compute_dtype

__all__ = ["causal_conv1d", "causal_conv1d_update", "refuses"]


def refuses(facts: Facts) -> str | None:
    """None: the reference runs everything."""
    del facts
    return None


def _one_output(window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """act(bias + sum_k weight[:, k] * window[:, k]) for a window (batch, width, d)."""
    compute = compute_dtype(window.dtype)
    y = (window.to(compute) * weight.to(compute).t()).sum(1)
    if bias is not None:
        y = y + bias.to(compute)
    if silu:
        y = y * torch.sigmoid(y)
    return y.to(window.dtype)


def _one_batch(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    length, width = x.shape[1], weight.shape[1]
    history = torch.cat([initial_state, x], 1)
    outputs = [_one_output(history[:, t : t + width], weight, bias, silu) for t in range(length)]
    y = torch.stack(outputs, 1) if outputs else x
    return y, history[:, length:].clone()


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.causal_conv1d`; gives (y, final_state)."""
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = x.new_zeros(rows, weight.shape[1] - 1, x.shape[2])
    if cu_seqlens is None:
        return _one_batch(x, weight, bias, silu, initial_state)
    assert_cu_seqlens("causal_conv1d", cu_seqlens, x.shape[1])
    offsets = cu_seqlens.tolist()
    parts = [
        _one_batch(x[:, offsets[i] : offsets[i + 1]], weight, bias, silu, initial_state[i : i + 1]) for i in range(rows)
    ]
    return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts], 0)


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.causal_conv1d_update`."""
    window = torch.cat([state, x[:, None]], 1)
    y = _one_output(window, weight, bias, silu)
    if inplace:
        return y, state.copy_(window[:, 1:])
    return y, window[:, 1:].clone()
