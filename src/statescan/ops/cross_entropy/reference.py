"""The cross-entropy of a linear layer's outputs as its equations read, all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.cross_entropy.validation import accumulate_dtype

__all__ = ["linear_cross_entropy", "refuses"]


def refuses(facts: Facts) -> str | None:
    """None: the reference runs everything."""
    del facts
    return None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    chunk_size: int | None,
    compute: torch.dtype,
) -> Tensor:
    """See `statescan.ops.linear_cross_entropy`; hidden (rows, d), targets (rows,); chunk_size is not looked at."""
    del chunk_size
    logits = hidden.to(compute) @ weight.to(compute).T
    logits = logits.to(accumulate_dtype(compute))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    counted = targets != ignore_index
    aim = torch.where(counted, targets, 0).long()
    losses = torch.logsumexp(logits, -1) - logits.gather(-1, aim[:, None])[:, 0]
    losses = torch.where(counted, losses, 0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / counted.sum().clamp(min=1) if reduction == "mean" else total
