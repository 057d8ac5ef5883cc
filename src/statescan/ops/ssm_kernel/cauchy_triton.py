"""S4's kernel as the paper makes it, its Cauchy product in Triton."""

from __future__ import annotations

from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel import products
from statescan.ops.ssm_kernel.generating_function import frequencies_of
from statescan.ops.ssm_kernel.triton_products import make_cauchy_ready, refuses_products

__all__ = ["refuses", "s4_kernel"]

_SUMS = 1 << 25  # of a piece: 256 MB for their real and imaginary parts


def refuses(facts: Facts) -> str | None:
    """Why Triton does not take this call, with the cure; None if it does."""
    return refuses_products(facts)


def s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function; the bilinear rule alone."""
    sums, piece = (1 + P.shape[2]) ** 2, products.frequencies_at_a_time(Lambda, P, _SUMS)
    make_cauchy_ready((Lambda, P, B, C, dt), sums, frequencies_of(length), piece)
    return products.s4_kernel(Lambda, P, B, C, dt, length, "triton", _SUMS)
