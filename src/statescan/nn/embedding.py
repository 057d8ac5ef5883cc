"""An embedding whose gradient is the same to the bit every time, on a GPU too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.ops._checks import transforms_active, without_autocast

__all__ = ["Embedding"]

# A table of few rows (bytes, nucleotides) gets its gradient as a product with ones and zeros: a row is there used by
# thousands of tokens, which a sum by sorted ids takes one after the other. Then, how many ones and zeros at once.
_FEW_ROWS = 1024
_AT_ONCE = 1 << 25


def _row_sums(ids: Tensor, rows: Tensor, table: torch.Size) -> Tensor:
    """The sum of the rows of each id, in a fixed order: ids (tokens,), rows (tokens, width), to the table's shape."""
    if table[0] > _FEW_ROWS:
        # added up one after the other, in the dtype of the sums: a half's would be lost where a row is used often
        wide = torch.promote_types(rows.dtype, torch.float32)
        return rows.new_zeros(table, dtype=wide).index_put((ids.long(),), rows.to(wide), accumulate=True).to(rows.dtype)
    sums = rows.new_zeros(table)
    every = torch.arange(table[0], device=ids.device, dtype=ids.dtype)[:, None]
    tokens = max(1, _AT_ONCE // table[0])
    for some_ids, some_rows in zip(ids.split(tokens), rows.split(tokens), strict=True):
        sums = torch.addmm(sums, (some_ids == every).to(rows.dtype), some_rows)
    return sums


class _Lookup(torch.autograd.Function):
    """Rows of a table, and a gradient that adds up each row's shares in a fixed order."""

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
        with without_autocast(rows.device.type):  # which would round the sums
            return None, _row_sums(ids.reshape(-1), rows, ctx.shape)


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
        trained = torch.is_grad_enabled() and self.weight.requires_grad and not transforms_active()
        if plain and input.device.type == "cuda" and trained:
            return _Lookup.apply(input, self.weight)  # pyright: ignore[reportReturnType]
        return super().forward(input)
