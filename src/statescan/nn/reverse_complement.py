"""A block of DNA models that treats both strands alike, whatever module is inside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from statescan.errors import ShapeError

__all__ = ["ReverseComplement", "complement_ids", "strand_pair"]


def complement_ids(ids: Tensor) -> Tensor:
    """The other strand of ids in A C G T N, (..., length), read from its own start."""
    ids = ids.flip(-1)
    # Without a table, which a CUDA graph could not copy to the device.
    return torch.where(ids < 4, 3 - ids, ids)


def strand_pair(embed: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Embeddings of both strands side by side, what `ReverseComplement` takes.

    ``[E(ids), flip(E(complement_ids(ids)))]``, the flip over length and channels, so that the pair of the other strand
    is the flip of the pair of this one.

    Args:
        embed: from ids (batch, length) to (batch, length, d).
        ids: (batch, length) int64, A C G T N as 0 to 4.

    Returns:
        (batch, length, 2 d).
    """
    return torch.cat([embed(ids), embed(complement_ids(ids)).flip(1, 2)], -1)


class ReverseComplement(nn.Module):
    """A module made reverse-complement equivariant by parameter sharing.

    With x = [a, b], halves of the channels, and flip over length and channels::

        y = [f(a), flip(f(flip(b)))]        so that        y(flip(x)) = flip(y(x))

    Both halves go through `inner` as one batch.

    Args:
        inner: from (batch, length, d) to the same shape.

    Source: Schiff et al. (2024), "Caduceus", arXiv:2403.03234, section 3.2.
    """

    def __init__(self, inner: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, 2 d) to the same shape."""
        if x.ndim != 3 or x.shape[-1] % 2:
            raise ShapeError(f"ReverseComplement: x must be (batch, length, 2 d), got {tuple(x.shape)}")
        this, other = x.chunk(2, -1)
        y = self.inner(torch.cat([this, other.flip(1, 2)]))
        this, other = y.chunk(2)
        return torch.cat([this, other.flip(1, 2)], -1)
