"""The Vandermonde product as a matrix product: A_bar^(aT + b) = A_bar^(aT) A_bar^b, two short tables for all powers.

For length L the tables have about 2 sqrt(L) powers of each state in place of L; what is left is one real matrix product
of inner size 2 states for each channel, whose output is the kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel.decay import Decay, diagonal_system
from statescan.ops.ssm_kernel.real_form import kernel_dtype, without_float64

__all__ = ["refuses", "s4d_kernel", "s4d_response"]


def refuses(facts: Facts) -> str | None:
    """Plain PyTorch, on any device that has float64."""
    return without_float64(facts)


def _powers(decay: Decay, exponents: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of A_bar^k: ``(d_model, states, exponents)``."""
    k = exponents.double()
    size = torch.exp((decay.log.real.unsqueeze(-1) * k).to(dtype))
    phase = torch.remainder(decay.log.imag.unsqueeze(-1) * k, 2 * torch.pi).to(dtype)
    real, imag = size * torch.cos(phase), size * torch.sin(phase)
    if decay.tiny is None:
        return real, imag
    # 1, A_bar, 0, 0, ...: the gradient's first two terms too, which are all it has at 0.
    first, tiny = (exponents == 1) * decay.A_bar.unsqueeze(-1), decay.tiny.unsqueeze(-1)
    real = torch.where(tiny, first.real.to(dtype) + (exponents == 0).to(dtype), real)
    return real, torch.where(tiny, first.imag.to(dtype), imag)


def _tables(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Exponents b < T and aT whose sums are all of 0 .. length - 1."""
    inner = 1 << (max(length - 1, 0).bit_length() + 1) // 2
    outer = -(-length // inner)
    return torch.arange(inner, device=device), torch.arange(outer, device=device) * inner


def _vandermonde(decay: Decay, weight: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """``Re(sum_n weight_n A_bar_n^l)`` for l < length; weight ``(..., d_model, states)``, complex128."""
    inner, outer = _tables(length, weight.device)
    low_real, low_imag = _powers(decay, inner, dtype)
    high_real, high_imag = _powers(decay, outer, dtype)
    weight_real, weight_imag = weight.real.to(dtype).unsqueeze(-1), weight.imag.to(dtype).unsqueeze(-1)
    real = weight_real * high_real - weight_imag * high_imag
    imag = weight_real * high_imag + weight_imag * high_real
    # Re((real + i imag)(low_real + i low_imag))
    K = torch.cat([real, -imag], -2).transpose(-1, -2) @ torch.cat([low_real, low_imag], -2)
    return K.flatten(-2)[..., :length]


def s4d_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function."""
    decay, B_bar = diagonal_system(A, B, dt, discretization)
    return _vandermonde(decay, B_bar * C * (2 if A.is_complex() else 1), length, kernel_dtype(A))


def s4d_response(
    A: Tensor, B: Tensor, C: Tensor, dt: Tensor, u: Tensor, state: Tensor, discretization: str
) -> tuple[Tensor, Tensor]:
    """See the public function."""
    dtype, length = kernel_dtype(A), u.shape[1]
    decay, B_bar = diagonal_system(A, B, dt, discretization)
    pairs = 2 if A.is_complex() else 1
    y = _vandermonde(decay, decay.A_bar * C * state * pairs, length, dtype).transpose(1, 2)

    # sum_l A_bar^(L-1-l) u_l: within each stretch of T positions a matrix product, then the stretches' own powers
    inner, outer = _tables(length, u.device)
    low = torch.cat(_powers(decay, inner, dtype), 1)  # (d_model, 2 states, T)
    backwards = u.to(dtype).flip(1).permute(2, 0, 1)
    backwards = F.pad(backwards, (0, len(inner) * len(outer) - length)).unflatten(-1, (len(outer), len(inner)))
    real, imag = (backwards.flatten(1, 2) @ low.transpose(1, 2)).unflatten(1, backwards.shape[1:3]).chunk(2, -1)
    high_real, high_imag = (part.transpose(1, 2).unsqueeze(1) for part in _powers(decay, outer, dtype))
    taken_in = torch.complex(
        (real * high_real - imag * high_imag).sum(2), (real * high_imag + imag * high_real).sum(2)
    ).transpose(0, 1)
    whole = torch.complex(*_powers(decay, torch.full((1,), length, device=u.device), torch.float64)).squeeze(-1)
    final = whole * state + B_bar * taken_in
    return y, final if A.is_complex() else final.real
