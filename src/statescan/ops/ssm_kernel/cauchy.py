"""S4's kernel as the paper makes it, the Cauchy product in plain PyTorch, in pieces of bounded memory.

``v / (iy - c Lambda)`` and its conjugate pair's have the denominators ``p + i (y -+ c Im(Lambda))`` with
``p = -c Re(Lambda)``: two quotients for each state and frequency, the same for all sums, which are one matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel import generating_function
from statescan.ops.ssm_kernel.real_form import without_float64

__all__ = ["refuses", "s4_kernel"]

_CHUNK_ELEMENTS = 1 << 22  # d_model x states x frequencies of one piece: 16 MB an array in float32


def refuses(facts: Facts) -> str | None:
    """Plain PyTorch, on any device that has float64."""
    return without_float64(facts)


def _sums(Lambda: Tensor, v: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """``sum_n v_n / (iy - c Lambda_n)`` over the pairs; v ``(d_model, sums, states)``, y and c ``(k,)``."""
    p, turn = -c * Lambda.real.unsqueeze(-1), c * Lambda.imag.unsqueeze(-1)
    low, high = y - turn, y + turn
    r_low, r_high = 1 / (p * p + low * low), 1 / (p * p + high * high)
    low, high = low * r_low, high * r_high
    of_real = torch.cat(
        [p * (r_low + r_high), -(low + high)], -1
    )  # (d_model, states, 2 k): real parts, imaginary parts
    of_imag = torch.cat([low - high, p * (r_low - r_high)], -1)
    sums = torch.cat([v.real, v.imag], -1) @ torch.cat([of_real, of_imag], 1)
    return torch.complex(*sums.chunk(2, -1))


def s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function; the bilinear rule alone."""
    piece = max(1, _CHUNK_ELEMENTS // Lambda.numel())
    return generating_function.s4_kernel(_sums, Lambda, P, B, C, dt, length, piece)
