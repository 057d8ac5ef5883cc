"""S4D's and S4's kernels on the C++ library: the Vandermonde product, and powers of the small matrix by squaring."""

from __future__ import annotations

from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel import products
from statescan.ops.ssm_kernel.cpu_products import refuses_products
from statescan.ops.ssm_kernel.real_form import discrete_real_form

__all__ = ["refuses", "s4_kernel", "s4d_kernel"]


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernels do not take this call, with the cure; None if they do."""
    return refuses_products(facts)


def s4d_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function."""
    return products.s4d_kernel(A, B, C, dt, length, discretization, "cpu")


def s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function."""
    (A_bar, B_bar), rows = discrete_real_form(Lambda, P, B, C, dt, discretization)
    return products.powers(A_bar, B_bar, rows, length, "cpu")
