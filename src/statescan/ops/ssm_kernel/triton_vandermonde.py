"""S4D's kernel in Triton: the Vandermonde product in one pass, forward and backward."""

from __future__ import annotations

from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel import products
from statescan.ops.ssm_kernel.triton_products import make_vandermonde_ready, refuses_products

__all__ = ["refuses", "s4d_kernel"]


def refuses(facts: Facts) -> str | None:
    """Why Triton does not take this call, with the cure; None if it does."""
    return refuses_products(facts)


def s4d_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function."""
    make_vandermonde_ready((A, B, C, dt), length)
    return products.s4d_kernel(A, B, C, dt, length, discretization, "triton")
