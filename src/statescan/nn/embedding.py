"""An embedding whose gradient is the same to the bit every time, on a GPU too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Embedding"]


class _Lookup(torch.autograd.Function):
    """Rows of a table. The gradient adds up each row's shares in the order of the ids: they are sorted first."""

    @staticmethod
    def forward(ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ids, weight = inputs
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Tensor]:
        (ids,), (gradient,) = ctx.saved_tensors, gradients
        rows = gradient.reshape(-1, gradient.shape[-1])
        return None, gradient.new_zeros(ctx.shape).index_put((ids.reshape(-1).long(),), rows, accumulate=True)


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` with a gradient that is the same to the bit every time.

    Torch adds up an embedding's gradient on a GPU by atomic additions in whatever order they come, which shows where a
    row is used often: a vocabulary of bytes. A resumed run would not be the uninterrupted one.

    Args:
        as `torch.nn.Embedding`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table: (...,) integer ids to (..., embedding_dim)."""
        plain = self.padding_idx is None and self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
        if plain and input.device.type == "cuda" and torch.is_grad_enabled() and self.weight.requires_grad:
            return _Lookup.apply(input, self.weight)  # pyright: ignore[reportReturnType]
        return super().forward(input)
