"""`batch_invariant`: a row's own results have the same bits alone and among others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.ops import selective_scan
from statescan.testing import ScanCase, scan_problem

OWN = ("u", "dt", "B", "C", "z", "initial_state")


def rows(problem: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    return {k: v[first:last].contiguous() if k in OWN and isinstance(v, Tensor) else v for k, v in problem.items()}


def results(problem: dict[str, Any], cotangent: Tensor, backend: str, **options: Any) -> list[Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in problem.items() if k in OWN}
    y, state = selective_scan(**{**problem, **leaves}, return_final_state=True, backend=backend, **options)
    assert state is not None
    gradients = torch.autograd.grad((y * cotangent).sum() + state.sum(), list(leaves.values()))
    return [y.detach(), state.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_inner", [5, 96])
@pytest.mark.parametrize("backend", ["cpu"])
def test_a_row_alone_and_among_others(backend: str, d_inner: int, dtype: torch.dtype, require_backend: Any) -> None:
    require_backend("selective_scan", backend, dtype=dtype, d_state=16, batch_invariant=True)
    case = ScanCase(
        batch=7, length=40, d_inner=d_inner, d_state=16, D=True, z=True, dt_bias=True, dt_softplus=True,
        initial_state=True,
    )  # fmt: skip
    problem = scan_problem(case, dtype)
    cotangent = torch.randn(problem["u"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = results(problem, cotangent, backend, batch_invariant=True)
    for first, last in ((0, 1), (3, 4), (2, 7)):
        alone = results(rows(problem, first, last), cotangent[first:last], backend, batch_invariant=True)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[first:last], b)
    # here it changes nothing
    for a, b in zip(together, results(problem, cotangent, backend), strict=True):
        assert torch.equal(a, b)
