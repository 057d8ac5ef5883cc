"""S4's kernel by squaring: C A_bar^(aT + b) B_bar = (C A_bar^(aT)) (A_bar^b B_bar), powers of a small dense matrix.

With 64 real states log2(L) squarings in float64 cost less than the Cauchy product's L / 2 x 64 complex quotients, no
array of size states x length is held, and no length is built into the parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel.real_form import discrete_real_form, kernel_dtype, without_float64

__all__ = ["refuses", "s4_kernel", "s4_response"]


def refuses(facts: Facts) -> str | None:
    """Plain PyTorch, on any device that has float64."""
    return without_float64(facts)


def _orbit(power: Tensor, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``power^k start`` for k < count as columns, count a power of two; and ``power^count``."""
    # Columns and power stand side by side, so that one product doubles the first and squares the second.
    held, columns = torch.cat([start.unsqueeze(-1), power], -1), 1
    while columns < count:
        known, power = held.split([columns, power.shape[-1]], -1)
        held = torch.cat([known, power @ held], -1)
        columns *= 2
    known, power = held.split([columns, power.shape[-1]], -1)
    return known, power


def s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function."""
    dtype = kernel_dtype(Lambda)
    (A_bar, B_bar), C = discrete_real_form(Lambda, P, B, C, dt, discretization)
    bits = max(length - 1, 0).bit_length()
    inner, outer = 1 << (bits + 1) // 2, 1 << bits // 2
    columns, jump = _orbit(A_bar, B_bar, inner)
    rows, _ = _orbit(jump.transpose(1, 2), C, outer)
    rows = rows[..., : -(-length // inner)]
    return (rows.transpose(1, 2).to(dtype) @ columns.to(dtype)).flatten(1)[:, :length]


def s4_response(
    Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, u: Tensor, state: Tensor, discretization: str
) -> tuple[Tensor, Tensor]:
    """See the public function."""
    dtype, length = kernel_dtype(Lambda), u.shape[1]
    (A_bar, B_bar), C = discrete_real_form(Lambda, P, B, C, dt, discretization)
    bits = max(length - 1, 0).bit_length()
    inner, outer = 1 << (bits + 1) // 2, -(-length // (1 << (bits + 1) // 2))
    columns, jump = _orbit(A_bar, B_bar, inner)
    rows, _ = _orbit(A_bar.transpose(1, 2), (C.unsqueeze(1) @ A_bar).squeeze(1), inner)

    x = torch.cat([state.real, state.imag], -1).double().permute(1, 2, 0)  # (d_model, 2 states, batch)
    # Forwards over stretches of T positions, the last one shorter: y of each from the state before the first of all.
    y, held = [], x
    for _ in range(outer):
        y.append(rows.transpose(1, 2).to(dtype) @ held.to(dtype))
        held = jump @ held
    y = torch.cat(y, 1)[:, :length].permute(2, 1, 0)

    # The inputs' own part of the last state: stretches counted from the end, the first one padded in front.
    stretches = F.pad(u.to(dtype).permute(2, 0, 1), (inner * outer - length, 0)).unflatten(-1, (outer, inner))
    taken_in = stretches.flip(-1).flatten(1, 2) @ columns.to(dtype).transpose(1, 2)  # (d_model, batch outer, 2 states)
    taken_in = taken_in.unflatten(1, stretches.shape[1:3]).permute(2, 0, 3, 1).double()
    total = torch.zeros_like(x)
    for part in taken_in:
        total = jump @ total + part
    total = total + torch.linalg.matrix_power(A_bar, length) @ x
    real, imag = total.permute(2, 0, 1).chunk(2, -1)
    return y, torch.complex(real, imag)
