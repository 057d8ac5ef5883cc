"""A diagonal-plus-low-rank system of conjugate pairs as a real one: (Re x, Im x) as its states."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.discretization import Discretized, discretize

__all__ = ["discrete_real_form", "kernel_dtype", "real_form", "without_float64"]

# ``A_bar = (I - alpha dt A)^{-1} (I + (1 - alpha) dt A)`` by the name of the rule.
_ALPHA = {"bilinear": 0.5, "backward_euler": 1.0}


def without_float64(facts: Facts) -> str | None:
    """Why plain PyTorch's kernels can't run on this device, with the cure; None where they can: it has float64."""
    return "it needs float64, which this device has not; move the kernel to the CPU" if facts.device == "mps" else None


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


def discrete_real_form(
    Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, discretization: str
) -> tuple[Discretized, Tensor]:
    """``(A_bar, B_bar), C`` of the real system, discretised; B_bar is a vector for each channel.

    The inverse in the bilinear rule and in backward Euler is written down by the Woodbury identity over the reals: with
    ``g = 1 / (1 - a Lambda)``, ``a = alpha dt``,

    ``(I - a A)^{-1} y = g y - g P (I / 2a + Re(P^* g P))^{-1} Re(P^* g y)``

    and nothing has to be factorised: it costs what its 2 states x 2 states entries do, and no library call that waits
    for the device.
    """
    if discretization not in _ALPHA:
        A, B, C = real_form(Lambda, P, B, C)
        found = discretize(A, B.unsqueeze(-1), dt, discretization)
        return Discretized(found.A_bar, found.B_bar.squeeze(-1)), C
    alpha, wide = _ALPHA[discretization], torch.complex128
    Lambda, P, B, C, dt = Lambda.to(wide), P.to(wide), B.to(wide), C.to(wide), dt.double()
    a = (alpha * dt)[:, None]
    g = 1 / (1 - a * Lambda)
    columns, rows = g.unsqueeze(-1) * P, g.unsqueeze(-1) * P.conj()
    left = torch.cat([columns.real, columns.imag], 1)  # (d_model, 2 states, rank)
    right = torch.cat([rows.real, -rows.imag], 1).transpose(1, 2)
    core = (P.conj().transpose(1, 2) @ columns).real
    if P.shape[2] == 1:
        low = left @ (right / (1 / (2 * a.unsqueeze(-1)) + core))
    else:
        one = torch.eye(P.shape[2], dtype=torch.float64, device=P.device)
        low = left @ torch.linalg.solve(one / (2 * a.unsqueeze(-1)) + core, right)
    inverse = (
        torch.cat(
            [
                torch.cat([torch.diag_embed(g.real), torch.diag_embed(-g.imag)], -1),
                torch.cat([torch.diag_embed(g.imag), torch.diag_embed(g.real)], -1),
            ],
            -2,
        )
        - low
    )
    B_bar = inverse @ (dt[:, None] * torch.cat([B.real, B.imag], 1)).unsqueeze(-1)
    if alpha < 1:
        inverse = inverse / alpha - torch.eye(inverse.shape[-1], dtype=torch.float64, device=P.device) * (1 / alpha - 1)
    return Discretized(inverse, B_bar.squeeze(-1)), 2 * torch.cat([C.real, -C.imag], 1)
