"""The contract of `causal_conv1d` and `causal_conv1d_update`: every backend, forward and every gradient."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan import errors
from statescan.ops import causal_conv1d, causal_conv1d_update
from statescan.ops._dispatch import BACKENDS
from statescan.testing import (
    Derivatives,
    assert_within_budget,
    check_registration,
    derivatives,
    poisoned_memory,
    random_cotangents,
    recorded_calls,
)
from statescan.testing.conv import CONV_CASES, ConvCase, causal_conv1d_oracle
from statescan.testing.conv import conv_problem as problem_on

DEVICE = os.environ.get("STATESCAN_TEST_DEVICE", "cpu")
conv_problem = functools.partial(problem_on, device=DEVICE)
BACKEND_NAMES = list(BACKENDS["causal_conv1d"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OUTPUTS = ("y", "final_state")
EVERY_OPTION = CONV_CASES["every option"]
PACKED = CONV_CASES["packed"]


def running(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return functools.partial(causal_conv1d, return_final_state=True, backend=backend)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def truth_and_reference(
    case: ConvCase, dtype: torch.dtype, parameters: torch.dtype | None, seed: int
) -> tuple[dict[str, Tensor], Derivatives, Derivatives, Derivatives]:
    """(cotangents, float64 truth, reference, truth of the reference's problem); beside float64 it runs in float32."""
    lower = torch.float32 if dtype == torch.float64 else dtype
    own = conv_problem(case, lower, parameters=parameters, seed=seed)
    reference = derivatives(running("reference"), own, seed=seed)
    cotangents = random_cotangents({name: reference[name] for name in OUTPUTS}, seed)
    problem = conv_problem(case, dtype, parameters=parameters, seed=seed)
    truth, own_truth = (
        derivatives(causal_conv1d_oracle, given, cotangents=cotangents, exact=True) for given in (problem, own)
    )
    return cotangents, truth, reference, own_truth


def hold_to_budget(
    run: Callable[..., Any], case: ConvCase, dtype: torch.dtype, parameters: torch.dtype | None = None
) -> None:
    """Every result of `run` against the float64 truth, judged beside the reference in the problem's precision."""
    draws = []
    # The reference's error on a few numbers is a matter of luck: small problems are judged over several draws.
    for seed in range(4 if case.features * case.length < 1000 else 1):
        cotangents, truth, reference, own_truth = truth_and_reference(case, dtype, parameters, seed)
        problem = conv_problem(case, dtype, parameters=parameters, seed=seed)
        draws.append((derivatives(run, problem, cotangents=cotangents), truth, reference, own_truth))
    for name in draws[0][1]:
        actual, truth, reference, own_truth = ([draw[name] for draw in column] for column in zip(*draws, strict=True))
        if dtype == torch.float64:
            assert_within_budget(actual, truth, reference, name, reference_truth=own_truth)
        else:
            assert_within_budget(actual, truth, reference, name)


@pytest.mark.parametrize("case", CONV_CASES.values(), ids=CONV_CASES.keys())
def test_reference_agrees_with_an_oracle_written_apart(case: ConvCase) -> None:
    problem = conv_problem(case, torch.float64)
    actual, truth = (derivatives(run, problem) for run in (running("reference"), causal_conv1d_oracle))
    for name in truth:
        torch.testing.assert_close(actual[name], truth[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [EVERY_OPTION, PACKED, ConvCase(length=2, width=6)], ids=["batch", "packed", "short"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str, case: ConvCase) -> None:
    problem = conv_problem(ConvCase(**{**vars_of(case), "features": 2}), torch.float64)
    leaves = {name: value.requires_grad_() for name, value in problem.items() if is_float(value)}
    fixed = {name: value for name, value in problem.items() if name not in leaves}

    def run(*values: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(running(backend)(**dict(zip(leaves, values, strict=True)), **fixed))

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))
    if backend == "torch":
        assert torch.autograd.gradgradcheck(run, tuple(leaves.values()))


def vars_of(case: ConvCase) -> dict[str, Any]:
    return {name: getattr(case, name) for name in case.__dataclass_fields__}


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CONV_CASES.values(), ids=CONV_CASES.keys())
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_forward_and_every_gradient(require_backend: Any, backend: str, case: ConvCase, dtype: torch.dtype) -> None:
    require_backend("causal_conv1d", backend, dtype=dtype, width=case.width)
    with poisoned_memory():
        hold_to_budget(running(backend), case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_float32_parameters_with_low_precision_inputs(require_backend: Any, backend: str, dtype: torch.dtype) -> None:
    require_backend("causal_conv1d", backend, dtype=dtype)
    for case in (EVERY_OPTION, PACKED):
        hold_to_budget(running(backend), case, dtype, torch.float32)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_gradient_out_of_one_result_alone(require_backend: Any, backend: str, name: str) -> None:
    require_backend("causal_conv1d", backend, dtype=torch.float64)
    problem = conv_problem(ConvCase(length=2), torch.float64)
    cotangent = random_cotangents({name: dict(zip(OUTPUTS, causal_conv1d_oracle(**problem), strict=True))[name]})
    actual = derivatives(running(backend), problem, cotangents=cotangent)
    truth = derivatives(causal_conv1d_oracle, problem, cotangents=cotangent)
    for key in truth:
        torch.testing.assert_close(actual[key], truth[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_state_has_an_empty_gradient(require_backend: Any, backend: str, packed: bool) -> None:
    require_backend("causal_conv1d", backend)
    x = torch.randn(1, 6, 3, device=DEVICE, requires_grad=True)
    weight = torch.randn(3, 1, device=DEVICE, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32, device=DEVICE) if packed else None
    state = torch.zeros(2 if packed else 1, 0, 3, device=DEVICE, requires_grad=True)
    y = causal_conv1d(x, weight, initial_state=state, cu_seqlens=cu_seqlens, backend=backend).y
    y.square().sum().backward()
    assert state.grad is not None
    assert state.grad.shape == state.shape


def assert_same(backend: str, actual: Tensor, whole: Tensor, truth: Tensor) -> None:
    """Bit-equal from the C++ kernel, whose lanes all compute alike. torch takes the last few elements of a tensor by
    another exponential than the rest, so there the one result has to be as near to the truth as the other."""
    if backend == "cpu":
        assert torch.equal(actual, whole)
    else:
        assert_within_budget(actual, truth, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("width", [1, 4, 9])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_cut_anywhere_is_whole_is_step_by_step(
    require_backend: Any, backend: str, width: int, dtype: torch.dtype
) -> None:
    require_backend("causal_conv1d", backend, dtype=dtype, width=width)
    problem = conv_problem(ConvCase(length=13, width=width), dtype)
    truth = derivatives(causal_conv1d_oracle, problem, exact=True)
    x, state = problem.pop("x"), problem.pop("initial_state")
    whole = running(backend)(x, initial_state=state, **problem)
    for cut in range(1, 13):
        head = running(backend)(x[:, :cut], initial_state=state, **problem)
        tail = running(backend)(x[:, cut:], initial_state=head[1], **problem)
        assert_same(backend, torch.cat([head[0], tail[0]], 1), whole[0], truth["y"])
        assert torch.equal(tail[1], whole[1])
    for inplace in (False, True):
        stepped, outputs = state.clone(), []
        for t in range(13):
            before = stepped
            y, stepped = causal_conv1d_update(x[:, t], stepped, inplace=inplace, backend=backend, **problem)
            assert (stepped is before) == inplace
            outputs.append(y)
        assert_same(backend, torch.stack(outputs, 1), whole[0], truth["y"])
        assert torch.equal(stepped, whole[1])


@pytest.mark.parametrize("initial_state", [True, False])
@pytest.mark.parametrize("width", [1, 4, 9])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_packed_is_separate_beside_poisoned_neighbours(
    require_backend: Any, backend: str, width: int, initial_state: bool
) -> None:
    require_backend("causal_conv1d", backend, width=width)
    offsets = (0, 5, 5, 6, 20, 23)
    case = ConvCase(batch=1, length=23, width=width, offsets=offsets, initial_state=initial_state)
    for own in range(len(offsets) - 1):
        problem = conv_problem(case, torch.float32)
        begin, end = offsets[own], offsets[own + 1]
        alone = {**problem, "x": problem["x"][:, begin:end].clone(), "cu_seqlens": None}
        if initial_state:
            alone["initial_state"] = problem["initial_state"][own : own + 1].clone()
            problem["initial_state"][:own] = problem["initial_state"][own + 1 :] = float("nan")
        problem["x"][:, :begin] = problem["x"][:, end:] = float("nan")
        leaf = problem["x"].requires_grad_()
        y, final_state = running(backend)(**problem)
        if begin == end:
            wanted = problem["initial_state"][own] if initial_state else torch.zeros_like(final_state[own])
            assert torch.equal(final_state[own], wanted)
            continue
        leaf_alone = alone["x"].requires_grad_()
        y_alone, final_alone = running(backend)(**alone)
        truth_leaf = alone["x"].detach().double().requires_grad_()
        exact = {name: value.double() if is_float(value) else value for name, value in alone.items()}
        y_truth, final_truth = causal_conv1d_oracle(**{**exact, "x": truth_leaf})
        (gradient_truth,) = torch.autograd.grad(y_truth.sum() + final_truth.sum(), truth_leaf)
        assert_same(backend, y[:, begin:end].detach(), y_alone.detach(), y_truth)
        assert torch.equal(final_state[own], final_alone[0])
        (gradient,) = torch.autograd.grad(y[:, begin:end].sum() + final_state[own].sum(), leaf)
        (gradient_alone,) = torch.autograd.grad(y_alone.sum() + final_alone.sum(), leaf_alone)
        assert_same(backend, gradient[:, begin:end], gradient_alone, gradient_truth)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_two_runs_and_any_number_of_threads_are_bit_equal(require_backend: Any, backend: str) -> None:
    require_backend("causal_conv1d", backend)
    length = 37 if backend == "reference" else 600
    problem = conv_problem(ConvCase(batch=3, length=length, features=300), torch.float32)
    first = derivatives(running(backend), problem)
    threads = torch.get_num_threads()
    try:
        for number in (threads, 1, 2, 5) if backend == "cpu" else (threads,):
            torch.set_num_threads(number)
            again = derivatives(running(backend), problem)
            for name in first:
                assert torch.equal(first[name], again[name]), (name, number)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_row_does_not_depend_on_the_batch(require_backend: Any, backend: str) -> None:
    require_backend("causal_conv1d", backend)
    problem = conv_problem(ConvCase(batch=5, length=33, features=40), torch.float32)
    together = derivatives(running(backend), problem)
    cotangents = random_cotangents({name: together[name] for name in OUTPUTS})
    truth = derivatives(causal_conv1d_oracle, problem, cotangents=cotangents, exact=True)
    for row in range(5):
        alone = {**problem, **{name: problem[name][row : row + 1] for name in ("x", "initial_state")}}
        own = {name: value[row : row + 1] for name, value in cotangents.items()}
        result = derivatives(running(backend), alone, cotangents=own)
        for name in (*OUTPUTS, "d x", "d initial_state"):
            assert_same(backend, result[name][0], together[name][row], truth[name][row])


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_strided_inputs(require_backend: Any, backend: str) -> None:
    require_backend("causal_conv1d", backend)
    problem = conv_problem(ConvCase(batch=2, length=9, features=21), torch.float32)
    plain = derivatives(running(backend), problem)
    half = torch.randn(2, 9, 42, device=DEVICE)
    half[..., 21:] = problem["x"]
    turned = problem["x"].transpose(1, 2).contiguous().transpose(1, 2)
    wide_state = torch.randn(2, 5, 21, device=DEVICE)
    wide_state[:, 1:4] = problem["initial_state"]
    for x in (half[..., 21:], turned):
        strided = {
            **problem,
            "x": x,
            "weight": problem["weight"].t().contiguous().t(),
            "bias": torch.stack([problem["bias"]] * 2, 1)[:, 0],
            "initial_state": wide_state[:, 1:4],
        }
        result = derivatives(running(backend), strided)
        for name in plain:
            assert torch.equal(result[name], plain[name]), name
    # a gradient that comes in with a stride of 0, as from a sum
    leaves = {name: problem[name].detach().requires_grad_() for name in ("x", "weight")}
    y = running(backend)(**{**problem, **leaves})[0]
    ones = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), retain_graph=True)
    expanded = torch.autograd.grad(y.sum(), list(leaves.values()))
    for a, b in zip(ones, expanded, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE != "cpu", reason="copies are counted on the CPU")
def test_half_of_a_projection_is_read_in_place(require_backend: Any) -> None:
    require_backend("causal_conv1d", "cpu")
    projected = torch.randn(1, 8, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        causal_conv1d(projected[..., 32:], torch.randn(32, 4), backend="cpu")
    assert not [event.name for event in profile.events() if event.name in ("aten::copy_", "aten::clone")]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_update_has_gradients(require_backend: Any, backend: str) -> None:
    require_backend("causal_conv1d_update", backend, dtype=torch.float64)
    problem = conv_problem(ConvCase(length=1), torch.float64)
    whole = derivatives(causal_conv1d_oracle, problem)
    cotangents = {
        name: value[:, 0] if name == "y" else value
        for name, value in random_cotangents({name: whole[name] for name in OUTPUTS}).items()
    }
    problem["x"], problem["state"] = problem["x"][:, 0], problem.pop("initial_state")
    run = functools.partial(causal_conv1d_update, backend=backend)
    step = derivatives(run, problem, OUTPUTS, cotangents=cotangents)
    whole["y"], whole["d x"], whole["d state"] = whole["y"][:, 0], whole["d x"][:, 0], whole.pop("d initial_state")
    assert step.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(step[name], whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_extreme_inputs_keep_silu_finite(require_backend: Any, backend: str) -> None:
    require_backend("causal_conv1d", backend)
    numbers = torch.tensor([-3e38, -1e4, -88.0, -87.0, 0.0, 87.0, 1e4, 3e38], device=DEVICE)
    x = numbers.reshape(1, 8, 1).requires_grad_()
    y = causal_conv1d(x, torch.ones(1, 1, device=DEVICE), activation="silu", backend=backend).y
    truth = torch.nn.functional.silu(x.detach().double())
    torch.testing.assert_close(y.detach().double(), truth, rtol=1e-6, atol=1e-30)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(gradient).all()
    missing = torch.full((1, 3, 2), float("nan"), device=DEVICE)
    y = causal_conv1d(missing, torch.ones(2, 4, device=DEVICE), activation="silu", backend=backend).y
    assert torch.isnan(y).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernel of the CPU")
@pytest.mark.parametrize("case", [EVERY_OPTION, CONV_CASES["plain"], PACKED], ids=["every", "plain", "packed"])
def test_registration(require_backend: Any, case: ConvCase) -> None:
    require_backend("causal_conv1d", "cpu")
    with recorded_calls() as calls:
        derivatives(running("cpu"), conv_problem(case, torch.float32))
    assert [call[0]._schema.name for call in calls] == [
        "statescan::causal_conv1d_cpu",
        "statescan::causal_conv1d_cpu_backward",
    ]
    check_registration(calls)


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled for the CPU")
@pytest.mark.parametrize("case", [EVERY_OPTION, PACKED], ids=["batch", "packed"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compiles_into_one_graph(require_backend: Any, backend: str, case: ConvCase) -> None:
    require_backend("causal_conv1d", backend)
    problem = conv_problem(case, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(running(backend), fullgraph=True, backend="aot_eager")
    eager, graph = derivatives(running(backend), problem), derivatives(compiled, problem)
    for name in eager:
        torch.testing.assert_close(graph[name], eager[name])


@pytest.mark.skipif(DEVICE != "cpu", reason="exported on the CPU")
def test_exports(require_backend: Any) -> None:
    require_backend("causal_conv1d", "cpu")
    problem = conv_problem(EVERY_OPTION, torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
            return tuple(running("cpu")(x, weight, bias, activation="silu", initial_state=state))

    inputs = (problem["x"], problem["weight"], problem["bias"], problem["initial_state"])
    exported = torch.export.export(Layer(), inputs).module()
    for a, b in zip(exported(*inputs), Layer()(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernel of the CPU")
def test_wrong_offsets_in_a_compiled_graph_are_caught_by_the_kernel(require_backend: Any) -> None:
    require_backend("causal_conv1d", "cpu")
    x, weight = torch.randn(1, 9, 5), torch.randn(5, 4)
    for offsets in ([0, 12], [1, 9], [0, 7, 3, 9]):
        with pytest.raises(errors.ShapeError, match="cu_seqlens must go from 0 to the length of x, 9"):
            torch.ops.statescan.causal_conv1d_cpu(x, weight, None, None, torch.tensor(offsets), True)


@pytest.mark.skipif(DEVICE != "cpu", reason="instruction sets of the CPU")
@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_lower_instruction_sets(require_backend: Any, isa: str) -> None:
    require_backend("causal_conv1d", "cpu")
    chosen = (
        "test_forward_and_every_gradient and cpu and float32 or test_forward_and_every_gradient and cpu and bfloat16"
        " or test_extreme or (cut_anywhere and cpu and float16)"
    )
    if os.environ.get("STATESCAN_CPU_ISA") == isa:
        pytest.skip("this is the run that the test starts")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__, "-k", chosen],
        env={**os.environ, "STATESCAN_CPU_ISA": isa, "STATESCAN_TEST_REQUIRE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def good() -> dict[str, Any]:
    return conv_problem(ConvCase(batch=2, length=5, features=3), torch.float32)


WRONG = [
    ({"x": torch.randn(5, 3)}, errors.ShapeError, r"x must be \(batch, length >= 1, d >= 1\), got \(5, 3\); channels"),
    ({"x": torch.randn(2, 0, 3)}, errors.ShapeError, r"x must be .*got \(2, 0, 3\)"),
    (
        {"x": torch.ones(2, 5, 3, dtype=torch.int64)},
        errors.DTypeError,
        r"x must be float64, .* got torch.int64; convert",
    ),
    ({"weight": torch.randn(4, 4)}, errors.ShapeError, r"weight must be \(d, width\) = \(3, width >= 1\).*\(4, 4\)"),
    ({"weight": torch.randn(3, 1, 4)}, errors.ShapeError, r"weight must be .* needs .squeeze\(1\)"),
    ({"weight": torch.randn(3, 0)}, errors.ShapeError, r"weight must be \(d, width\)"),
    ({"weight": torch.ones(3, 4, dtype=torch.int32)}, errors.DTypeError, "weight must be float64"),
    (
        {"weight": torch.randn(3, 4, device="meta")},
        errors.ShapeError,
        "weight must be on the device of x, .*, got meta",
    ),
    ({"bias": torch.randn(4)}, errors.ShapeError, r"bias must be \(d,\) = \(3,\), got \(4,\); give"),
    ({"bias": torch.ones(3, dtype=torch.bool)}, errors.DTypeError, "bias must be float64"),
    ({"bias": torch.randn(3, device="meta")}, errors.ShapeError, "bias must be on the device of x"),
    ({"activation": "gelu"}, errors.ConfigError, "activation must be None or 'silu', got 'gelu'; apply"),
    ({"backend": "cudnn"}, errors.ConfigError, r"backend must be one of \['auto'.*got 'cudnn'"),
    (
        {"initial_state": torch.randn(2, 4, 3)},
        errors.ShapeError,
        r"initial_state must be \(batch, width-1, d\) = \(2, 3, 3\), got \(2, 4, 3\); it holds",
    ),
    (
        {"initial_state": torch.randn(2, 3, 3).double()},
        errors.DTypeError,
        "initial_state must have the dtype of x, torch.float32, got torch.float64; convert",
    ),
    ({"initial_state": torch.randn(2, 3, 3, device="meta")}, errors.ShapeError, "initial_state must be on the device"),
    ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, errors.ShapeError, "the batch must be 1, got 2"),
    (
        {"x": torch.randn(1, 5, 3), "cu_seqlens": torch.tensor([0, 4])},
        errors.ShapeError,
        "must end at the length 5, got 4",
    ),
    ({"x": torch.randn(1, 5, 3), "cu_seqlens": torch.tensor([1, 5])}, errors.ShapeError, "must start at 0, got 1"),
    ({"x": torch.randn(1, 5, 3), "cu_seqlens": torch.tensor([0, 4, 3, 5])}, errors.ShapeError, "must never fall"),
    (
        {"x": torch.randn(1, 5, 3), "cu_seqlens": torch.tensor([0.0, 5.0])},
        errors.DTypeError,
        "cu_seqlens must be int32",
    ),
    (
        {"x": torch.randn(1, 5, 3), "cu_seqlens": torch.tensor([[0, 5]])},
        errors.ShapeError,
        "cu_seqlens must have shape",
    ),
    (
        {"x": torch.randn(1, 5, 3), "cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": torch.randn(1, 3, 3)},
        errors.ShapeError,
        r"initial_state must be \(sequences, width-1, d\) = \(2, 3, 3\), got \(1, 3, 3\)",
    ),
]


def placed(change: dict[str, Any]) -> dict[str, Any]:
    """The tensors where the tests run, but for those that are on the wrong device on purpose."""
    return {k: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type == "cpu" else v for k, v in change.items()}


@pytest.mark.parametrize(("change", "error", "text"), WRONG, ids=[text[:40] for _, _, text in WRONG])
def test_bad_input(change: dict[str, Any], error: type[Exception], text: str) -> None:
    problem = good()
    if "x" in change and "initial_state" not in change:
        del problem["initial_state"]
    with pytest.raises(error, match=f"causal_conv1d: .*{text}") as caught:
        causal_conv1d(**{**problem, **placed(change)})
    assert "\n" not in str(caught.value)


WRONG_UPDATES = [
    ({"x": torch.randn(2, 1, 3)}, errors.ShapeError, r"x must be \(batch, d >= 1\), got \(2, 1, 3\); one token"),
    ({"state": torch.randn(2, 4, 3)}, errors.ShapeError, r"state must be \(batch, width-1, d\) = \(2, 3, 3\)"),
    ({"state": torch.randn(2, 3, 3).half()}, errors.DTypeError, "state must have the dtype of x"),
    ({"weight": torch.randn(2, 4)}, errors.ShapeError, "weight must be"),
    ({"activation": "relu"}, errors.ConfigError, "activation must be None or 'silu'"),
    ({"backend": "none"}, errors.ConfigError, "backend must be one of"),
    (
        {"weight": torch.randn(3, 4, requires_grad=True), "inplace": True},
        errors.ConfigError,
        "inplace=True gives no gradients, but weight requires one; use inplace=False",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG_UPDATES, ids=[text[:40] for _, _, text in WRONG_UPDATES])
def test_bad_update(change: dict[str, Any], error: type[Exception], text: str) -> None:
    problem = {
        "x": torch.randn(2, 3),
        "state": torch.randn(2, 3, 3),
        "weight": torch.randn(3, 4),
        "bias": torch.randn(3),
    }
    with pytest.raises(error, match=f"causal_conv1d_update: .*{text}"):
        causal_conv1d_update(**{**problem, **change})


def test_cpu_backend_refuses_other_devices_and_second_derivatives(require_backend: Any) -> None:
    with pytest.raises(errors.BackendUnavailableError, match="it runs on the CPU, the inputs are on meta; use"):
        causal_conv1d(torch.randn(1, 2, 3, device="meta"), torch.randn(3, 4, device="meta"), backend="cpu")
    require_backend("causal_conv1d", "cpu")
    x = torch.randn(1, 4, 3, requires_grad=True)
    y = causal_conv1d(x, torch.randn(3, 4), activation="silu", backend="cpu").y
    with pytest.raises(errors.BackendUnavailableError, match="no second derivatives; use backend='torch'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_no_final_state_unless_asked_for() -> None:
    assert causal_conv1d(**good()).final_state is None
    assert causal_conv1d(**good(), return_final_state=True).final_state is not None
