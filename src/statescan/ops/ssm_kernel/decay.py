"""A discretised diagonal system by the logarithms of its A_bar, which its powers are made from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statescan.ops.discretization import discretize

__all__ = ["Decay", "diagonal_system"]

# An A_bar smaller than this has no logarithm of use; its square is nothing in any dtype.
_TINY = 1e-30


class Decay(NamedTuple):
    """A_bar by its logarithm, and itself where it is next to 0: complex128 ``(d_model, states)``."""

    log: Tensor
    A_bar: Tensor
    tiny: Tensor | None


def diagonal_system(A: Tensor, B: Tensor, dt: Tensor, discretization: str) -> tuple[Decay, Tensor]:
    """A_bar and B_bar, complex128."""
    wide = torch.complex128
    A_bar, B_bar = discretize(A.to(wide), B.to(wide), dt, discretization, diagonal=True)
    if discretization == "zoh":
        return Decay(dt.double().unsqueeze(-1) * A.to(wide), A_bar, None), B_bar
    tiny = A_bar.abs() < _TINY
    return Decay(torch.log(torch.where(tiny, torch.ones_like(A_bar), A_bar)), A_bar, tiny), B_bar
