"""S4's kernel by squaring: C A_bar^(aT + b) B_bar = (C A_bar^(aT)) (A_bar^b B_bar), powers of a small dense matrix.

With 64 real states log2(L) squarings in float64 cost less than the Cauchy product's L / 2 x 64 complex quotients, no
array of size states x length is held, and no length is built into the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.discretization import discretize
from statescan.ops.ssm_kernel.real_form import kernel_dtype, real_form

__all__ = ["refuses", "s4_kernel"]


def refuses(facts: Facts) -> str | None:
    """Plain PyTorch, on any device that has float64."""
    return "it needs float64, which this device has not; move the kernel to the CPU" if facts.device == "mps" else None


def _orbit(power: Tensor, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``power^k start`` for k < count as columns, count a power of two; and ``power^count``."""
    columns = start.unsqueeze(-1)
    while columns.shape[-1] < count:
        columns = torch.cat([columns, power @ columns], -1)
        power = power @ power
    return columns, power


def s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function."""
    dtype = kernel_dtype(Lambda)
    A, B, C = real_form(Lambda, P, B, C)
    A_bar, B_bar = discretize(A, B.unsqueeze(-1), dt, discretization)
    bits = max(length - 1, 0).bit_length()
    inner, outer = 1 << (bits + 1) // 2, 1 << bits // 2
    columns, jump = _orbit(A_bar, B_bar.squeeze(-1), inner)
    rows, _ = _orbit(jump.transpose(1, 2), C, outer)
    rows = rows[..., : -(-length // inner)]
    return (rows.transpose(1, 2).to(dtype) @ columns.to(dtype)).flatten(1)[:, :length]
