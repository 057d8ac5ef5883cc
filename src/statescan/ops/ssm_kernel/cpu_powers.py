"""S4's kernel on the C++ library: powers of the small dense matrix by squaring."""

from __future__ import annotations

from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel import products
from statescan.ops.ssm_kernel.cpu_products import refuses_product
from statescan.ops.ssm_kernel.real_form import discrete_real_form

__all__ = ["refuses", "s4_kernel"]


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernels do not take this call, with the cure; None if they do."""
    return refuses_product("powers", facts)


def s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function."""
    (A_bar, B_bar), rows = discrete_real_form(Lambda, P, B, C, dt, discretization)
    return products.powers(A_bar, B_bar, rows, length, "cpu")
