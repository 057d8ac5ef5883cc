"""S4's kernel as the paper makes it: its generating function at the roots of unity, and an inverse Fourier transform.

With ``w = exp(-2 pi i k / L)`` and ``theta = pi k / L``, ``sum_l K_l w^l`` is

``exp(i theta) [ C' r B - c C' r P (I + c P^* r P)^{-1} P^* r B ]``, ``r = 1 / (i y - c Lambda)``,
``y = 2 sin(theta) / dt``, ``c = cos(theta)``, ``C' = C (I - A_bar^L)``

by the Woodbury identity. (The paper's ``2 / (1 + w)`` is spread into r, so that nothing is infinite at w = -1.) A state
and its conjugate together give ``v / (iy - c Lambda) + conj = (2 Re(v) iy - 2 c Re(v conj(Lambda))) / q`` with one
complex ``q = c^2 |Lambda|^2 - y^2 - 2 i y c Re(Lambda)`` for all the sums: each is a real matrix product with 1 / q.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from statescan.ops._dispatch import Facts
from statescan.ops.discretization import discretize
from statescan.ops.ssm_kernel.real_form import kernel_dtype, real_form

__all__ = ["refuses", "s4_kernel"]

_CHUNK_ELEMENTS = 1 << 22  # d_model x states x frequencies of one piece: 16 MB an array in float32


def refuses(facts: Facts) -> str | None:
    """Plain PyTorch, on any device that has float64."""
    return "it needs float64, which this device has not; move the kernel to the CPU" if facts.device == "mps" else None


def _end(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """``C (I - A_bar^L)`` of the pairs, complex128."""
    A, B, rows = real_form(Lambda, P, B, C)
    A_bar = discretize(A, B.unsqueeze(-1), dt, "bilinear").A_bar
    rows = rows - (rows.unsqueeze(1) @ torch.linalg.matrix_power(A_bar, length)).squeeze(1)
    real, imag = rows.chunk(2, 1)
    return torch.complex(real, -imag) / 2


def _sums(Lambda: Tensor, v: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """``sum_n v_n / (iy - c Lambda_n)`` over the pairs; v ``(d_model, sums, states)``, y ``(d_model, k)``."""
    y2, yc = y.unsqueeze(1), (y * c).unsqueeze(1)
    q_real = (c * c) * (Lambda.abs() ** 2).unsqueeze(-1) - y2 * y2
    q_imag = -2 * yc * Lambda.real.unsqueeze(-1)
    size = q_real * q_real + q_imag * q_imag
    inverse = torch.cat([q_real / size, -q_imag / size], -1)  # (d_model, states, 2 k): real parts, imaginary parts
    slope, level = 2 * v.real, -2 * (v * Lambda.conj().unsqueeze(1)).real
    moved, still = (torch.cat([slope, level], 1) @ inverse).chunk(2, 1)
    moved = torch.complex(*moved.chunk(2, -1))
    still = torch.complex(*still.chunk(2, -1))
    return 1j * y.unsqueeze(1) * moved + c * still


def _piece(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, theta: Tensor) -> Tensor:
    """The generating function at some frequencies: ``(d_model, k)``, complex."""
    rank = P.shape[2]
    c = torch.cos(theta)
    y = 2 * torch.sin(theta) / dt.unsqueeze(-1)
    columns = torch.cat([B.unsqueeze(1), P.transpose(1, 2)], 1)  # what stands right of r
    rows = torch.cat([C.unsqueeze(1), P.transpose(1, 2).conj()], 1)  # and left of it
    v = (rows.unsqueeze(2) * columns.unsqueeze(1)).flatten(1, 2)
    s = _sums(Lambda, v, y, c).unflatten(1, (1 + rank, 1 + rank)).movedim(-1, 1)  # (d_model, k, row, column)
    plain, right, left, core = s[..., 0, 0], s[..., 0, 1:], s[..., 1:, 0], s[..., 1:, 1:]
    if rank == 1:
        low = right[..., 0] * left[..., 0] / (1 + c * core[..., 0, 0])
    else:
        one = torch.eye(rank, dtype=core.dtype, device=core.device)
        low = (right * torch.linalg.solve(one + c[:, None, None] * core, left)).sum(-1)
    return torch.polar(torch.ones_like(theta), theta) * (plain - c * low)


def s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function; the bilinear rule alone."""
    dtype = kernel_dtype(Lambda)
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    last = _end(Lambda, P, B, C, dt, length).to(complex_dtype)
    Lambda, P, B, dt = Lambda.to(complex_dtype), P.to(complex_dtype), B.to(complex_dtype), dt.to(dtype)
    frequencies = length // 2 + 1
    theta = (torch.arange(frequencies, dtype=torch.float64, device=Lambda.device) * (math.pi / length)).to(dtype)
    piece = max(1, _CHUNK_ELEMENTS // Lambda.numel())
    parts = [
        checkpoint(_piece, Lambda, P, B, last, dt, part, use_reentrant=False)
        if torch.is_grad_enabled() and frequencies > piece
        else _piece(Lambda, P, B, last, dt, part)
        for part in theta.split(piece)
    ]
    return torch.fft.irfft(torch.cat(parts, 1), n=length)
