"""The readable truth of the kernels: one power of A_bar after the other, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.discretization import discretize
from statescan.ops.ssm_kernel.real_form import kernel_dtype, real_form, without_float64

__all__ = ["refuses", "s4_kernel", "s4d_kernel"]


def refuses(facts: Facts) -> str | None:
    """The reference runs everything, on any device that has float64."""
    return without_float64(facts)


def s4d_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """``K_l = sum_n C_n B_bar_n A_bar_n^l``, twice the real part of it for complex A."""
    dtype, pairs = kernel_dtype(A), A.is_complex()
    A, B, C = (m.to(torch.complex128) for m in (A, B, C))
    A_bar, x = discretize(A, B, dt, discretization, diagonal=True)
    lags = []
    for _ in range(length):
        lags.append((C * x).sum(-1).real)
        x = A_bar * x
    K = torch.stack(lags, -1)
    return (2 * K if pairs else K).to(dtype)


def s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """``K_l = C A_bar^l B_bar`` with the dense real matrix."""
    A, B, C = real_form(Lambda, P, B, C)
    kernels = []
    for d in range(A.shape[0]):
        A_bar, x = discretize(A[d], B[d], dt[d], discretization)
        lags = []
        for _ in range(length):
            lags.append(C[d] @ x)
            x = A_bar @ x
        kernels.append(torch.stack(lags))
    return torch.stack(kernels).to(kernel_dtype(Lambda))
