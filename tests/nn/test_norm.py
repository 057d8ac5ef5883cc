"""The norm module: what it adds to the op is the weight, its initial value and the residual's dtype."""

from __future__ import annotations

import pytest
import torch

from statescan.errors import ShapeError
from statescan.nn import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_adds_then_normalises(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x, residual = (
        torch.randn(2, 3, 16).to(dtype),
        torch.randn(2, 3, 16, dtype=torch.promote_types(dtype, torch.float32)),
    )
    output, total = norm(x, residual)
    exact = x.double() + residual.double()
    wanted = exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    assert (output.dtype, total.dtype) == (dtype, residual.dtype)
    # one rounding of the output, and a few of the arithmetic that is float32 (or float64) at least
    slack = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(residual.dtype if dtype != torch.float64 else dtype).eps
    assert ((output.double() - wanted).abs() <= slack * wanted.abs().max()).all()
    assert ((total.double() - exact).abs() <= torch.finfo(residual.dtype).eps * exact.abs().max()).all()


def test_residual_dtype() -> None:
    norm = RMSNorm(8)
    x = torch.randn(1, 2, 8, dtype=torch.bfloat16)
    output, total = norm(x, None, torch.float32)
    assert (output.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(norm.weight, torch.ones(8))
    assert "8, eps=1e-05" in repr(norm)


def test_wrong_width() -> None:
    with pytest.raises(ShapeError, match="weight"):
        RMSNorm(8)(torch.randn(1, 7))
