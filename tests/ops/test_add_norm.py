"""The contract of `add_rms_norm`: every backend, forward and every gradient."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan import errors
from statescan.ops import add_rms_norm
from statescan.ops._dispatch import BACKENDS
from statescan.testing import (
    assert_within_budget,
    check_registration,
    derivatives,
    poisoned_memory,
    random_cotangents,
    recorded_calls,
    refusal,
)
from statescan.testing.conv import add_rms_norm_oracle

DEVICE = os.environ.get("STATESCAN_TEST_DEVICE", "cpu")
BACKEND_NAMES = list(BACKENDS["add_rms_norm"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OUTPUTS = ("output", "residual")
# one number, less than a vector, whole vectors, a rest, more rows than one partial sum of the weight's gradient holds
# One feature alone is left out: there output is the sign of the sum and its gradient is made of eps and cancellation.
SHAPES = [(1, 3), (5,), (2, 3, 37), (4, 64), (2, 65, 96), (131, 16), (3, 1, 257)]


def dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def running(backend: str, **fixed: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    return functools.partial(add_rms_norm, backend=backend, **fixed)


def norm_problem(
    shape: tuple[int, ...],
    x: torch.dtype,
    residual: torch.dtype | None = torch.float32,
    weight: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=DEVICE, dtype=dtype)

    problem = {"x": draw(shape, x), "weight": draw(shape[-1:], weight)}
    if residual is not None:
        problem["residual"] = draw(shape, residual)
    return problem


def hold_to_budget(backend: str, make: Callable[..., dict[str, Tensor]], **fixed: Any) -> None:
    """Every result against the float64 truth, judged beside the reference in the same precision.

    Beside float64, where truth and reference share their roundings, the reference runs in float32.
    """
    draws = []
    for seed in range(4):
        problem = make(seed=seed)
        exact = problem["x"].dtype == torch.float64
        own = {name: value.float() for name, value in problem.items()} if exact else problem
        reference = derivatives(running("reference", **fixed), own, OUTPUTS, seed=seed)
        cotangents = random_cotangents({name: reference[name] for name in OUTPUTS}, seed)
        actual = derivatives(running(backend, **fixed), problem, OUTPUTS, cotangents=cotangents)
        truth, own_truth = (
            derivatives(add_rms_norm_oracle, given, OUTPUTS, cotangents=cotangents, exact=True)
            for given in (problem, own)
        )
        draws.append((actual, truth, reference, own_truth, exact))
    for name in draws[0][0]:
        actual, truth, reference, own_truth = ([draw[i][name] for draw in draws] for i in range(4))
        if draws[0][4]:
            assert_within_budget(actual, truth, reference, name, reference_truth=own_truth)
        else:
            assert_within_budget(actual, truth, reference, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", [None, torch.float64], ids=dtype_name)
def test_reference_agrees_with_an_oracle_written_apart(shape: tuple[int, ...], residual: torch.dtype | None) -> None:
    problem = norm_problem(shape, torch.float64, residual, torch.float64)
    actual, truth = (derivatives(run, problem, OUTPUTS) for run in (running("reference"), add_rms_norm_oracle))
    for name in truth:
        torch.testing.assert_close(actual[name], truth[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str) -> None:
    problem = norm_problem((2, 3, 5), torch.float64, torch.float64, torch.float64)
    leaves = [problem[name].requires_grad_() for name in ("x", "weight", "residual")]

    def run(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(running(backend)(x, weight, residual=residual))  # pyright: ignore[reportReturnType]

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_forward_and_every_gradient(
    require_backend: Any, backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    require_backend("add_rms_norm", backend, dtype=dtype)
    with poisoned_memory():
        for residual in (None, dtype):
            hold_to_budget(backend, functools.partial(norm_problem, shape, dtype, residual, dtype))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_mixed_precision(require_backend: Any, backend: str) -> None:
    low = [torch.float32, torch.bfloat16, torch.float16]
    for x, residual, stream in itertools.product(low, [None, *low], [None, *low]):
        require_backend("add_rms_norm", backend, dtype=x)
        hold_to_budget(backend, functools.partial(norm_problem, (3, 41), x, residual), residual_dtype=stream)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_dtypes_of_the_results(require_backend: Any, backend: str) -> None:
    require_backend("add_rms_norm", backend)
    dtypes = [d for d in DTYPES if refusal("add_rms_norm", backend, device=DEVICE, dtype=d) is None]
    for x, residual, stream in itertools.product(dtypes, [None, *dtypes], [None, *dtypes]):
        problem = norm_problem((2, 9), x, residual)
        result = add_rms_norm(**problem, residual_dtype=stream, backend=backend)
        assert result.output.dtype == x
        assert result.residual.dtype == (stream or residual or x)
    alone = norm_problem((2, 9), torch.float32, None)
    assert add_rms_norm(**alone, backend=backend).residual is alone["x"]


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("residual", [None, torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_gradient_out_of_one_result_alone(
    require_backend: Any, backend: str, residual: torch.dtype | None, name: str
) -> None:
    require_backend("add_rms_norm", backend, dtype=torch.float64)
    problem = norm_problem((3, 21), torch.float64, residual, torch.float64)
    cotangents = {name: torch.randn(3, 21, dtype=torch.float64, device=DEVICE)}
    fixed = {"residual_dtype": torch.float64}
    actual = derivatives(running(backend, **fixed), problem, OUTPUTS, cotangents=cotangents)
    truth = derivatives(add_rms_norm_oracle, problem, OUTPUTS, cotangents=cotangents, exact=True)
    for key in truth:
        tight = actual[key].dtype == torch.float64
        torch.testing.assert_close(
            actual[key].double(), truth[key], **({"rtol": 1e-12, "atol": 1e-12} if tight else {})
        )


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_two_runs_and_any_number_of_threads_are_bit_equal(require_backend: Any, backend: str) -> None:
    require_backend("add_rms_norm", backend)
    problem = norm_problem((300, 200), torch.float32)
    first = derivatives(running(backend), problem, OUTPUTS)
    threads = torch.get_num_threads()
    try:
        for number in (threads, 1, 2, 5) if backend == "cpu" else (threads,):
            torch.set_num_threads(number)
            again = derivatives(running(backend), problem, OUTPUTS)
            for name in first:
                assert torch.equal(first[name], again[name]), (name, number)
    finally:
        torch.set_num_threads(threads)


def test_a_row_does_not_depend_on_the_others(require_backend: Any) -> None:
    require_backend("add_rms_norm", "cpu")
    problem = norm_problem((70, 53), torch.float32)
    together = derivatives(running("cpu"), problem, OUTPUTS)
    cotangents = random_cotangents({name: together[name] for name in OUTPUTS})
    for row in (0, 1, 63, 64, 69):
        own = {name: value[row] for name, value in cotangents.items()}
        alone = {**problem, **{name: problem[name][row] for name in ("x", "residual")}}
        result = derivatives(running("cpu"), alone, OUTPUTS, cotangents=own)
        for name in (*OUTPUTS, "d x", "d residual"):
            assert torch.equal(result[name], together[name][row]), name


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_strided_inputs(require_backend: Any, backend: str) -> None:
    require_backend("add_rms_norm", backend)
    problem = norm_problem((4, 6, 21), torch.float32)
    plain = derivatives(running(backend), problem, OUTPUTS)
    wide = torch.randn(4, 6, 42, device=DEVICE)
    wide[..., 21:] = problem["x"]
    strided = {
        "x": wide[..., 21:],
        "weight": torch.stack([problem["weight"]] * 2, 1)[:, 0],
        "residual": problem["residual"].transpose(0, 2).contiguous().transpose(0, 2),
    }
    result = derivatives(running(backend), strided, OUTPUTS)
    for name in plain:
        if backend == "cpu":
            assert torch.equal(result[name], plain[name]), name
        else:
            torch.testing.assert_close(result[name], plain[name])


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernel of the CPU")
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16], ids=dtype_name)
def test_registration(require_backend: Any, residual: torch.dtype | None) -> None:
    require_backend("add_rms_norm", "cpu")
    problem = norm_problem((3, 19), torch.bfloat16, residual)
    with recorded_calls() as calls:
        derivatives(running("cpu"), problem, OUTPUTS)
    assert [call[0]._schema.name for call in calls] == [
        "statescan::add_rms_norm_cpu",
        "statescan::add_rms_norm_cpu_backward",
    ]
    check_registration(calls)


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled for the CPU")
@pytest.mark.parametrize("residual", [None, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compiles_into_one_graph(require_backend: Any, backend: str, residual: torch.dtype | None) -> None:
    require_backend("add_rms_norm", backend)
    problem = norm_problem((3, 19), torch.float32, residual)
    torch.compiler.reset()
    compiled = torch.compile(running(backend), fullgraph=True, backend="aot_eager")
    eager, graph = (derivatives(run, problem, OUTPUTS) for run in (running(backend), compiled))
    for name in eager:
        torch.testing.assert_close(graph[name], eager[name])


@pytest.mark.skipif(DEVICE != "cpu", reason="exported on the CPU")
def test_exports(require_backend: Any) -> None:
    require_backend("add_rms_norm", "cpu")
    problem = norm_problem((3, 19), torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(running("cpu")(x, weight, residual=residual))  # pyright: ignore[reportReturnType]

    inputs = tuple(problem[name] for name in ("x", "weight", "residual"))
    exported = torch.export.export(Layer(), inputs).module()
    for a, b in zip(exported(*inputs), Layer()(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE != "cpu", reason="instruction sets of the CPU")
@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_lower_instruction_sets(require_backend: Any, isa: str) -> None:
    require_backend("add_rms_norm", "cpu")
    if os.environ.get("STATESCAN_CPU_ISA") == isa:
        pytest.skip("this is the run that the test starts")
    chosen = "cpu and (test_forward_and_every_gradient or mixed_precision or one_result_alone)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__, "-k", chosen],
        env={**os.environ, "STATESCAN_CPU_ISA": isa, "STATESCAN_TEST_REQUIRE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


WRONG = [
    ({"x": torch.tensor(1.0)}, errors.ShapeError, r"x must be \(..., d >= 1\), got \(\); the norm"),
    ({"x": torch.ones(2, 3, dtype=torch.int64)}, errors.DTypeError, "x must be float64, .* got torch.int64; convert"),
    ({"weight": torch.randn(4)}, errors.ShapeError, r"weight must be \(d,\) = \(3,\), got \(4,\); give"),
    ({"weight": torch.ones(3, dtype=torch.int8)}, errors.DTypeError, "weight must be float64"),
    ({"weight": torch.randn(3, device="meta")}, errors.ShapeError, "weight must be on the device of x, cpu, got meta"),
    ({"residual": torch.randn(3)}, errors.ShapeError, r"residual must have the shape of x, \(2, 3\), got \(3,\)"),
    ({"residual": torch.ones(2, 3).bool()}, errors.DTypeError, "residual must be float64"),
    ({"residual": torch.randn(2, 3, device="meta")}, errors.ShapeError, "residual must be on the device of x"),
    ({"eps": -1e-5}, errors.ConfigError, "eps must be a finite number >= 0, got -1e-05"),
    ({"eps": float("nan")}, errors.ConfigError, "eps must be a finite number >= 0, got nan"),
    ({"residual_dtype": torch.int32}, errors.DTypeError, "residual_dtype must be float64, .* got torch.int32"),
    ({"backend": "apex"}, errors.ConfigError, r"backend must be one of \['auto'.*got 'apex'"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG, ids=[text[:40] for _, _, text in WRONG])
def test_bad_input(change: dict[str, Any], error: type[Exception], text: str) -> None:
    problem = {"x": torch.randn(2, 3), "weight": torch.randn(3), "residual": torch.randn(2, 3)}
    if "x" in change:
        del problem["residual"]
    with pytest.raises(error, match=f"add_rms_norm: .*{text}") as caught:
        add_rms_norm(**{**problem, **change})
    assert "\n" not in str(caught.value)


def test_second_derivatives_are_refused_not_wrong(require_backend: Any) -> None:
    require_backend("add_rms_norm", "cpu")
    x = torch.randn(2, 3, requires_grad=True)
    output = add_rms_norm(x, torch.ones(3), backend="cpu").output
    with pytest.raises(errors.BackendUnavailableError, match="no second derivatives; use backend='torch'"):
        torch.autograd.grad(output.sum(), x, create_graph=True)
