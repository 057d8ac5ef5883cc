"""S4D's kernel on the C++ library: the Vandermonde product."""

from __future__ import annotations

from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel import products
from statescan.ops.ssm_kernel.cpu_products import refuses_product

__all__ = ["refuses", "s4d_kernel"]


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernels do not take this call, with the cure; None if they do."""
    return refuses_product("vandermonde", facts)


def s4d_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function."""
    return products.s4d_kernel(A, B, C, dt, length, discretization, "cpu")
