"""The contract of `add_rms_norm` on the `cuda` backend, plus what only its kernels show: every count of threads a row,
whole and cut packets, partial sums of many blocks, offsets above 2^31.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError
from statescan.ops import add_rms_norm, explain
from statescan.testing import (
    assert_within_budget,
    check_registration,
    derivatives,
    poisoned_memory,
    random_cotangents,
    recorded_calls,
)
from statescan.testing.conv import add_rms_norm_oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

OUTPUTS = ("output", "residual")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 3),
    (5,),
    (2, 3, 37),
    (4, 64),
    (2, 65, 96),
    (131, 16),
    (3, 1, 257),
    (5, 768),
    (3, 1024),
    (3, 1030),
    (2, 4096),
]


def names(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def running(name: str = "cuda", **fixed: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    return functools.partial(add_rms_norm, backend=name, **fixed)


def norm_problem(
    shape: tuple[int, ...],
    x: torch.dtype,
    residual: torch.dtype | None = torch.float32,
    weight: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device="cuda", dtype=dtype)

    problem = {"x": draw(shape, x), "weight": draw(shape[-1:], weight)}
    if residual is not None:
        problem["residual"] = draw(shape, residual)
    return problem


def hold_to_budget(make: Callable[..., dict[str, Tensor]], **fixed: Any) -> None:
    """Every result against the float64 truth, judged beside the reference in the problem's precision."""
    draws, exact = [], False
    for seed in range(4):
        problem = make(seed=seed)
        exact = problem["x"].dtype == torch.float64
        own = {name: value.float() for name, value in problem.items()} if exact else problem
        reference = derivatives(running("reference", **fixed), own, OUTPUTS, seed=seed)
        cotangents = random_cotangents({name: reference[name] for name in OUTPUTS}, seed)
        actual = derivatives(running(**fixed), problem, OUTPUTS, cotangents=cotangents)
        truth, own_truth = (
            derivatives(add_rms_norm_oracle, given, OUTPUTS, cotangents=cotangents, exact=True)
            for given in (problem, own)
        )
        draws.append((actual, truth, reference, own_truth))
    for name in draws[0][0]:
        actual, truth, reference, own_truth = ([draw[i][name] for draw in draws] for i in range(4))
        assert_within_budget(actual, truth, reference, name, reference_truth=own_truth if exact else None)


def test_auto_takes_it() -> None:
    assert explain("add_rms_norm", device="cuda").backend == "cuda"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_forward_and_every_gradient(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    with poisoned_memory():
        for residual in (None, dtype):
            hold_to_budget(functools.partial(norm_problem, shape, dtype, residual, dtype))


@pytest.mark.parametrize("features", [41, 64, 768, 1024])
def test_mixed_precision(features: int) -> None:
    low = [torch.float32, torch.bfloat16, torch.float16]
    for x, residual, stream in itertools.product(low, [None, *low], [None, *low]):
        if features != 41 and (x, residual, stream) not in [
            (torch.bfloat16, torch.float32, None),
            (torch.bfloat16, torch.bfloat16, torch.float32),
            (torch.bfloat16, None, torch.float32),
        ]:
            continue
        hold_to_budget(functools.partial(norm_problem, (3, features), x, residual), residual_dtype=stream)


def test_long_rows() -> None:
    for features in (8192, 20000, 66000):
        hold_to_budget(functools.partial(norm_problem, (1, features), torch.float32))


def test_dtypes_of_the_results() -> None:
    for x, residual, stream in itertools.product(DTYPES, [None, *DTYPES], [None, *DTYPES]):
        result = add_rms_norm(**norm_problem((2, 9), x, residual), residual_dtype=stream, backend="cuda")
        assert result.output.dtype == x
        assert result.residual.dtype == (stream or residual or x)
    alone = norm_problem((2, 9), torch.float32, None)
    assert add_rms_norm(**alone, backend="cuda").residual is alone["x"]


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("residual", [None, torch.float32, torch.float64], ids=names)
def test_gradient_out_of_one_result_alone(residual: torch.dtype | None, name: str) -> None:
    problem = norm_problem((3, 21), torch.float64, residual, torch.float64)
    cotangents = {name: torch.randn(3, 21, dtype=torch.float64, device="cuda")}
    actual = derivatives(running(residual_dtype=torch.float64), problem, OUTPUTS, cotangents=cotangents)
    truth = derivatives(add_rms_norm_oracle, problem, OUTPUTS, cotangents=cotangents, exact=True)
    for key in truth:
        tight = {"rtol": 1e-12, "atol": 1e-12} if actual[key].dtype == torch.float64 else {}
        torch.testing.assert_close(actual[key].double(), truth[key], **tight)


@pytest.mark.parametrize("features", [53, 256, 768, 1024, 3000])
def test_runs_are_bit_equal_and_rows_alone(features: int) -> None:
    """More rows than blocks, so that a block walks; a row's own results don't depend on the others."""
    problem = norm_problem((5000, features), torch.bfloat16)
    first = derivatives(running(), problem, OUTPUTS)
    cotangents = random_cotangents({name: first[name] for name in OUTPUTS})
    for _ in range(3):
        again = derivatives(running(), problem, OUTPUTS, cotangents=cotangents)
        for name, value in first.items():
            assert torch.isfinite(value).all(), name
            assert torch.equal(value, again[name]), name
    truth = derivatives(add_rms_norm_oracle, problem, OUTPUTS, cotangents=cotangents, exact=True)
    reference = derivatives(running("reference"), problem, OUTPUTS, cotangents=cotangents)
    assert_within_budget(first["d weight"], truth["d weight"], reference["d weight"], "d weight")
    for row in (0, 1, 4097, 4999):
        own = {name: value[row] for name, value in cotangents.items()}
        alone = {**problem, **{name: problem[name][row] for name in ("x", "residual")}}
        result = derivatives(running(), alone, OUTPUTS, cotangents=own)
        for name in (*OUTPUTS, "d x", "d residual"):
            assert torch.equal(result[name], first[name][row]), name


def test_strided_inputs() -> None:
    for features, dtype in itertools.product((21, 64), (torch.float32, torch.bfloat16)):
        problem = norm_problem((4, 6, features), dtype)
        plain = derivatives(running(), problem, OUTPUTS)
        x = problem["x"]
        for strided in (torch.cat([x, x], -1)[..., features:], torch.cat([x[..., :1], x], -1)[..., 1:]):
            given = {
                "x": strided,
                "weight": torch.stack([problem["weight"]] * 2, 1)[:, 0],
                "residual": problem["residual"].transpose(0, 2).contiguous().transpose(0, 2),
            }
            result = derivatives(running(), given, OUTPUTS)
            for name in plain:
                torch.testing.assert_close(result[name], plain[name])


def test_no_rows() -> None:
    problem = {
        name: value[:0] if name != "weight" else value for name, value in norm_problem((2, 8), torch.float32).items()
    }
    result = derivatives(running(), problem, OUTPUTS)
    assert result["output"].shape == (0, 8)
    assert not result["d weight"].any()


@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16], ids=names)
def test_registration(residual: torch.dtype | None) -> None:
    with recorded_calls() as calls:
        derivatives(running(), norm_problem((3, 24), torch.bfloat16, residual), OUTPUTS)
    want = ["statescan::add_rms_norm_cuda", "statescan::add_rms_norm_cuda_backward"]
    assert [call[0]._schema.name for call in calls] == want
    check_registration(calls)


@pytest.mark.parametrize("residual", [None, torch.float32], ids=names)
def test_compiles_as_one_graph(residual: torch.dtype | None) -> None:
    problem = norm_problem((3, 24), torch.bfloat16, residual)
    torch.compiler.reset()
    eager = derivatives(running(), problem, OUTPUTS)
    traced = derivatives(torch.compile(running(), fullgraph=True), problem, OUTPUTS)
    for name, value in eager.items():
        torch.testing.assert_close(traced[name], value)


def test_graph_capture() -> None:
    problem = norm_problem((64, 1024), torch.bfloat16)

    def step() -> list[Tensor]:
        leaves = {k: v.detach().requires_grad_() for k, v in problem.items()}
        output, total = add_rms_norm(**leaves, backend="cuda")
        return [output, total, *torch.autograd.grad(output.float().sum() + total.sum(), list(leaves.values()))]

    eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(eager, captured, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_refused_not_wrong() -> None:
    x = torch.randn(2, 3, device="cuda", requires_grad=True)
    output = add_rms_norm(x, torch.ones(3, device="cuda"), backend="cuda").output
    with pytest.raises(BackendUnavailableError, match="no second derivatives; use backend='torch'"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


@pytest.mark.large
def test_offsets_above_2_31() -> None:
    features = 1024
    rows = 2**31 // features + 100
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("takes 35 GB of device memory")
    x = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(features, device="cuda")
    x.requires_grad_()
    output = add_rms_norm(x, weight, backend="cuda").output
    (gradient,) = torch.autograd.grad(output, x, x.detach())
    tail = x[-100:].detach().clone().requires_grad_()
    alone = add_rms_norm(tail, weight, backend="cuda").output
    assert torch.equal(output[-100:], alone)
    assert torch.equal(gradient[-100:], torch.autograd.grad(alone, tail, tail.detach())[0])
