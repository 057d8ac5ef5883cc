"""The Vandermonde product as a matrix product: A_bar^(aT + b) = A_bar^(aT) A_bar^b, two short tables for all powers.

For length L the tables have about 2 sqrt(L) powers of each state in place of L; what is left is one real matrix product
of inner size 2 states for each channel, whose output is the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.discretization import discretize
from statescan.ops.ssm_kernel.real_form import kernel_dtype

__all__ = ["refuses", "s4d_kernel"]


def refuses(facts: Facts) -> str | None:
    """Plain PyTorch, on any device that has float64."""
    return "it needs float64, which this device has not; move the kernel to the CPU" if facts.device == "mps" else None


def _powers(log_A: Tensor, exponents: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(log_A k): ``(d_model, states, exponents)``; log_A is complex128."""
    exponents = exponents.double()
    size = torch.exp((log_A.real.unsqueeze(-1) * exponents).to(dtype))
    phase = torch.remainder(log_A.imag.unsqueeze(-1) * exponents, 2 * torch.pi).to(dtype)
    return size * torch.cos(phase), size * torch.sin(phase)


def s4d_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function."""
    dtype, pairs = kernel_dtype(A), A.is_complex()
    wide = torch.complex128
    A_bar, B_bar = discretize(A.to(wide), B.to(wide), dt, discretization, diagonal=True)
    log_A = dt.double().unsqueeze(-1) * A.to(wide) if discretization == "zoh" else torch.log(A_bar)
    weight = B_bar * C.to(wide) * (2 if pairs else 1)

    inner = 1 << (max(length - 1, 0).bit_length() + 1) // 2
    outer = -(-length // inner)
    steps = torch.arange(max(inner, outer), device=A.device)
    low_real, low_imag = _powers(log_A, steps[:inner], dtype)
    high_real, high_imag = _powers(log_A, steps[:outer] * inner, dtype)
    weight_real, weight_imag = weight.real.to(dtype).unsqueeze(-1), weight.imag.to(dtype).unsqueeze(-1)
    real = weight_real * high_real - weight_imag * high_imag
    imag = weight_real * high_imag + weight_imag * high_real
    # Re((real + i imag)(low_real + i low_imag))
    K = torch.cat([real, -imag], 1).transpose(1, 2) @ torch.cat([low_real, low_imag], 1)
    return K.flatten(1)[:, :length]
