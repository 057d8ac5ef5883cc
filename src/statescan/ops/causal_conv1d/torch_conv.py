"""The causal convolution in plain PyTorch: one shifted multiply-add a tap, on any device, differentiable twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._checks import assert_cu_seqlens, sequence_of
from statescan.ops._dispatch import Facts
from statescan.ops.causal_conv1d.validation import compute_dtype

__all__ = ["causal_conv1d", "causal_conv1d_update", "refuses"]


def refuses(facts: Facts) -> str | None:
    """None: plain PyTorch runs everything."""
    del facts
    return None


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.causal_conv1d`; gives (y, final_state)."""
    compute = compute_dtype(x.dtype)
    length, features, width = x.shape[1], x.shape[2], weight.shape[1]
    past = width - 1
    if cu_seqlens is None:
        state = x.new_zeros(x.shape[0], past, features) if initial_state is None else initial_state
        # A state that was given is part of the graph also where it is empty (width 1): its gradient is an empty tensor.
        history = x if past == 0 and initial_state is None else torch.cat([state, x], 1)
        taps = [history[:, k : k + length] for k in range(width)]
        final_state = history[:, length:].clone()
    else:
        # Rows of `history`: the packed inputs, then every sequence's state. Where tap k of position t falls before its
        # sequence's start it reads that sequence's state, so nothing is ever multiplied by a neighbour's input.
        assert_cu_seqlens("causal_conv1d", cu_seqlens, length)
        sequences = cu_seqlens.shape[0] - 1
        state = x.new_zeros(sequences, past, features) if initial_state is None else initial_state
        history = torch.cat([x[0], state.reshape(sequences * past, features)], 0)
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        positions = torch.arange(length, device=x.device)
        sequence = sequence_of(cu_seqlens, length)

        def rows(position: Tensor, of: Tensor) -> Tensor:
            ahead = position - starts[of]
            return torch.where(ahead >= 0, position, length + of * past + past + ahead)

        taps = [history[rows(positions - past + k, sequence)][None] for k in range(width)]
        all_sequences = torch.arange(sequences, device=x.device)[:, None].expand(sequences, past)
        slots = ends[:, None] - past + torch.arange(past, device=x.device)
        final_state = history[rows(slots, all_sequences)]
    w = weight.to(compute)
    y = taps[0].to(compute) * w[:, 0]
    for k in range(1, width):
        y = torch.addcmul(y, taps[k].to(compute), w[:, k])
    if bias is not None:
        y = y + bias.to(compute)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype), final_state


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.causal_conv1d_update`."""
    y, new_state = causal_conv1d(x[:, None], weight, bias, silu, state, None)
    return y[:, 0], state.copy_(new_state) if inplace else new_state
