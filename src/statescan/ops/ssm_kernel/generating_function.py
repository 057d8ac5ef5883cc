"""S4's kernel as the paper makes it: its generating function at the roots of unity, and an inverse Fourier transform.

With ``w = exp(-2 pi i k / L)`` and ``theta = pi k / L``, ``sum_l K_l w^l`` is

``exp(i theta) [ C' r B - c C' r P (I + c P^* r P)^{-1} P^* r B ]``, ``r = dt / (i y - c dt Lambda)``,
``y = 2 sin(theta)``, ``c = cos(theta)``, ``C' = C (I - A_bar^L)``

by the Woodbury identity. (The paper's ``2 / (1 + w)`` is spread into r, so that nothing is infinite at w = -1.) What is
left are (1 + rank)^2 Cauchy products ``sum_n v_n / (iy - c Lambda_n)``, each with its conjugate pair's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from statescan.ops._checks import transforms_active
from statescan.ops.ssm_kernel.real_form import discrete_real_form, kernel_dtype

__all__ = ["CauchyProduct", "frequencies_of", "s4_kernel"]

# (Lambda, v, y, c) -> sums: complex (d_model, states), complex (d_model, sums, states), real (k,), real (k,)
# -> complex (d_model, sums, k)
CauchyProduct = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _ending(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """``C (I - A_bar^L)`` of the pairs, complex128."""
    (A_bar, _), rows = discrete_real_form(Lambda, P, B, C, dt, "bilinear")
    last, power, left = rows.unsqueeze(1), A_bar, length
    while left >= 16:  # a square costs as much as some ten products with a row
        if left % 2:
            last = last @ power
        power, left = power @ power, left // 2
    for _ in range(left):
        last = last @ power
    real, imag = (rows - last.squeeze(1)).chunk(2, 1)
    return torch.complex(real, -imag) / 2


def _piece(
    product: CauchyProduct, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, theta: Tensor
) -> Tensor:
    """The generating function at some frequencies: ``(d_model, k)``, complex; theta in float64."""
    rank = P.shape[2]
    y, c = (2 * torch.sin(theta)).to(dt.dtype), torch.cos(theta).to(dt.dtype)
    columns = torch.cat([B.unsqueeze(1), P.transpose(1, 2)], 1)  # what stands right of r
    rows = torch.cat([C.unsqueeze(1), P.transpose(1, 2).conj()], 1)  # and left of it
    v = (rows.unsqueeze(2) * (dt[:, None, None] * columns).unsqueeze(1)).flatten(1, 2)
    s = product(dt.unsqueeze(-1) * Lambda, v, y, c).unflatten(1, (1 + rank, 1 + rank))  # (d_model, row, column, k)
    if rank == 1:
        low = s[:, 0, 1] * s[:, 1, 0] / (1 + c * s[:, 1, 1])
    else:
        s = s.movedim(-1, 1)
        one = torch.eye(rank, dtype=s.dtype, device=s.device)
        low = torch.linalg.solve(one + c[:, None, None] * s[..., 1:, 1:], s[..., 1:, 0])
        low = (s[..., 0, 1:] * low).sum(-1)
        s = s.movedim(1, -1)
    turn = torch.polar(torch.ones_like(theta), theta).to(s.dtype)
    return turn * (s[:, 0, 0] - c * low)


def frequencies_of(length: int) -> int:
    """How many a real kernel of so many lags has."""
    return length // 2 + 1


def s4_kernel(
    product: CauchyProduct, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, piece: int
) -> Tensor:
    """See the public function; the bilinear rule alone.

    Args:
        product: the Cauchy product that makes the sums.
        Lambda, P, B, C, dt, length: as there, P ``(d_model, states, rank)``.
        piece: frequencies at a time. Where there are more, a backward pass makes each piece again.
    """
    dtype = kernel_dtype(Lambda)
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    last = _ending(Lambda, P, B, C, dt, length).to(complex_dtype)
    Lambda, P, B, dt = Lambda.to(complex_dtype), P.to(complex_dtype), B.to(complex_dtype), dt.to(dtype)
    frequencies = frequencies_of(length)
    theta = torch.arange(frequencies, dtype=torch.float64, device=Lambda.device) * (math.pi / length)
    parts = [
        checkpoint(_piece, product, Lambda, P, B, last, dt, part, use_reentrant=False)
        if torch.is_grad_enabled() and frequencies > piece and not transforms_active()
        else _piece(product, Lambda, P, B, last, dt, part)
        for part in theta.split(piece)
    ]
    return torch.fft.irfft(parts[0] if len(parts) == 1 else torch.cat(parts, 1), n=length)
