"""Sizes beyond what one launch takes, and what the scan's kernels leave out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from statescan.errors import BackendUnavailableError, ShapeError
from statescan.ops import causal_conv1d, decode_attention, selective_scan, selective_state_update
from statescan.testing import ScanCase, as_update, derivatives, random_cotangents, scan_problem
from statescan.testing.conv import ConvCase, conv_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

ROWS = 65_540  # more than a grid's second and third axes have
EVERY = {"D": True, "z": True, "dt_bias": True, "initial_state": True, "dt_softplus": True}


def hold(op: Any, backend: str, problem: dict[str, Any], **options: Any) -> None:
    """The results and gradients of plain PyTorch."""
    plain = functools.partial(op, return_final_state=True, backend="torch")
    outputs = derivatives(plain, problem)
    cotangents = random_cotangents({name: outputs[name] for name in ("y", "final_state")})
    wanted = derivatives(plain, problem, cotangents=cotangents)
    own = functools.partial(op, return_final_state=True, backend=backend, **options)
    for name, value in derivatives(own, problem, cotangents=cotangents).items():
        by_row = value.shape[:1] == (ROWS,)  # the others are sums over the batch, which end in other bits
        close = {"rtol": 1e-4, "atol": 1e-5} if by_row else {"rtol": 1e-3, "atol": 1e-3 * float(value.abs().max())}
        torch.testing.assert_close(value, wanted[name], **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("backend", "invariant"), [("cuda", False), ("cuda", True), ("triton", False)], ids=["cuda", "invariant", "triton"]
)
def test_the_scan_of_many_rows(backend: str, invariant: bool, require_backend: Any) -> None:
    require_backend("selective_scan", backend, device="cuda", d_state=4)
    case = ScanCase(batch=ROWS, length=3, d_inner=8, d_state=4, **EVERY)
    hold(selective_scan, backend, scan_problem(case, torch.float32, device="cuda"), batch_invariant=invariant)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_other_ops_of_many_rows(backend: str, require_backend: Any) -> None:
    require_backend("causal_conv1d", backend, device="cuda")
    hold(causal_conv1d, backend, conv_problem(ConvCase(batch=ROWS, length=3), torch.float32, device="cuda"))
    step = as_update(scan_problem(ScanCase(batch=ROWS, length=1, d_inner=8, d_state=4), torch.float32, device="cuda"))
    found, wanted = (selective_state_update(**step, backend=name) for name in (backend, "torch"))
    torch.testing.assert_close(tuple(found), tuple(wanted), rtol=1e-5, atol=1e-5)


def test_attention_of_many_rows() -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    given = [torch.randn(ROWS, 1, 64, generator=draw, device="cuda") for _ in range(3)]
    caches = [torch.randn(ROWS, 1, 4, 64, generator=draw, device="cuda") for _ in range(2)]
    lengths = torch.arange(ROWS, device="cuda", dtype=torch.int32) % 4
    found, wanted = (
        decode_attention(*given, *(cache.clone() for cache in caches), lengths, backend=name)
        for name in ("cuda", "torch")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_length_that_positions_cannot_count_is_refused() -> None:
    u = torch.zeros(1, device="cuda", dtype=torch.bfloat16).expand(1, 2**31, 1)
    with pytest.raises(ShapeError, match=r"must have a length of at most .* hand the final_state on as initial_state"):
        selective_scan(u, u, -torch.ones(1, 1, device="cuda"), u, u, backend="cuda")


def test_second_derivatives_of_the_scan_are_refused_not_wrong() -> None:
    problem = scan_problem(ScanCase(batch=2, length=40, d_inner=32, **EVERY), torch.float32, device="cuda")
    y = selective_scan(**{**problem, "u": problem["u"].requires_grad_()}, backend="cuda").y
    torch.autograd.grad(y.sum(), problem["u"], retain_graph=True)
    with pytest.raises(BackendUnavailableError, match="no second derivatives; use backend='torch'"):
        torch.autograd.grad(y.sum(), problem["u"], create_graph=True)
