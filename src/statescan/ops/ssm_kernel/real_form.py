"""A diagonal-plus-low-rank system of conjugate pairs as a real one: (Re x, Im x) as its states."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kernel_dtype", "real_form"]


def kernel_dtype(A: Tensor) -> torch.dtype:
    """float32, or float64 where A is in double precision."""
    return torch.float64 if A.dtype in (torch.float64, torch.complex128) else torch.float32


def real_form(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A ``(d_model, 2 states, 2 states)``, B and C ``(d_model, 2 states)``, real float64: the same input-output map.

    With the conjugates along, ``x' = Lambda x - P (P^* x + conj(P^* x)) + B u = Lambda x - 2 P Re(P^* x) + B u`` and
    ``y = 2 Re(C x)``: linear in (Re x, Im x) over the reals.
    """
    wide = torch.complex128
    Lambda, P, B, C = Lambda.to(wide), P.to(wide), B.to(wide), C.to(wide)
    turn = torch.cat(
        [
            torch.cat([torch.diag_embed(Lambda.real), torch.diag_embed(-Lambda.imag)], -1),
            torch.cat([torch.diag_embed(Lambda.imag), torch.diag_embed(Lambda.real)], -1),
        ],
        -2,
    )
    rows = torch.cat([P.real, P.imag], 1)  # (d_model, 2 states, rank)
    A = turn - 2 * rows @ rows.transpose(1, 2)
    return A, torch.cat([B.real, B.imag], 1), 2 * torch.cat([C.real, -C.imag], 1)
