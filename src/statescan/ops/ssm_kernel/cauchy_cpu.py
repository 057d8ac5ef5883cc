"""S4's kernel as the paper makes it, its Cauchy product on the C++ library."""

from __future__ import annotations

from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel import products
from statescan.ops.ssm_kernel.cpu_products import refuses_product

__all__ = ["refuses", "s4_kernel"]

_SUMS = 1 << 20  # of a piece: its arrays fit the cache, and the heap, whose pages stay


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernels do not take this call, with the cure; None if they do."""
    return refuses_product("cauchy", facts)


def s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """See the public function; the bilinear rule alone."""
    return products.s4_kernel(Lambda, P, B, C, dt, length, "cpu", _SUMS)
