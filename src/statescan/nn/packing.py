"""Padded batches as packed sequences: the real tokens one after the other, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statescan.errors import DTypeError, ShapeError

__all__ = ["Packing", "pack"]


class Packing(NamedTuple):
    """Where the real tokens of a padded batch lie.

    places: (tokens,) int64, the positions of real tokens in the flattened (batch * length) grid, row after row.
    cu_seqlens: (batch + 1,) int32, where each row's tokens start in the packed line.
    grid: (batch, length) of the padded batch.
    """

    places: Tensor
    cu_seqlens: Tensor
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        """How many tokens are real."""
        return self.places.shape[0]

    def pack(self, x: Tensor) -> Tensor:
        """(batch, length, ...) -> (1, tokens, ...), the real tokens alone, in order."""
        return x.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """(1, tokens, ...) -> (batch, length, ...), zeros where there is padding."""
        batch, length = self.grid
        flat = x.new_zeros(batch * length, *x.shape[2:]).index_copy(0, self.places, x[0])
        return flat.unflatten(0, (batch, length))


def pack(caller: str, mask: Tensor, batch: int, length: int, device: torch.device) -> Packing | None:
    """Reads a padding mask; gives None where every token is real, so that nothing needs packing.

    Args:
        caller: named in errors.
        mask: (batch, length), bool or integer, true (1) at real tokens, false (0) at padding, anywhere in the row.
        batch: rows that the mask has to have.
        length: columns that the mask has to have.
        device: where the tokens are.

    Raises:
        ShapeError: the mask has another shape or device.
        DTypeError: the mask is neither bool nor integer.
    """
    if mask.shape != (batch, length):
        raise ShapeError(
            f"{caller}: mask must be (batch, length) = ({batch}, {length}), got {tuple(mask.shape)}; "
            "give one entry a token, 1 at real tokens and 0 at padding"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise DTypeError(f"{caller}: mask must be bool or integer, got {mask.dtype}; pass mask.bool()")
    if mask.device != device:
        raise ShapeError(f"{caller}: mask must be on {device}, where the tokens are, got {mask.device}; move it there")
    real = mask != 0
    index = real.flatten().nonzero().flatten()
    if index.shape[0] == batch * length:
        return None
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    cu_seqlens[1:] = real.sum(1).cumsum(0)
    return Packing(index, cu_seqlens, (batch, length))
