"""The contract of the `triton` backends on the CPU, through Triton's interpreter: small problems, every option.

The suites of the single ops skip them there, because an interpreted kernel takes milliseconds a position. What only a
GPU shows is in tests/gpu/test_triton.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import test_add_norm as norms
import test_causal_conv1d as convolutions
import test_selective_scan as scans
import test_selective_state_update as updates
import torch
from test_checks import WRONG, packed_op
from torch import Tensor

from statescan.errors import BackendUnavailableError, ShapeError
from statescan.ops import (
    _triton,
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_state_update,
)
from statescan.ops._dispatch import BACKENDS, explain
from statescan.ops.selective_scan import triton_scan
from statescan.testing import (
    REAL_CASES,
    ScanCase,
    as_update,
    check_registration,
    derivatives,
    poisoned_memory,
    recorded_calls,
    refusal,
    scan_problem,
)
from statescan.testing.conv import CONV_CASES, ConvCase, conv_problem

EVERY = {"D": True, "z": True, "dt_bias": True, "initial_state": True, "dt_softplus": True}
OPS = ["selective_scan", "selective_state_update", "causal_conv1d", "causal_conv1d_update", "add_rms_norm"]
names = scans.names
pytestmark = pytest.mark.usefixtures("interpreted")


scan = scans.running("triton")


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> int:
    """Lets short problems be cut into segments of time, as long ones are where channels don't fill a GPU."""
    monkeypatch.setattr(triton_scan, "_segment", lambda programs, wanted, length: triton_scan._EVERY)
    return triton_scan._EVERY


SMALL_CASES = {
    **{
        name: REAL_CASES[name]
        for name in (
            *("no options", "D alone", "z alone", "dt_softplus alone", "fixed B", "fixed C", "fixed B and C", "wide"),
            *("packed, empty ones", "packed, no state", "packed, groups", "large steps", "huge steps, underflow"),
        )
    },
    "every option": ScanCase(batch=1, d_inner=33, d_state=16, length=18, **EVERY),
    "groups": ScanCase(batch=1, length=6, d_inner=36, B=3, C=2, **EVERY),
    "d_state 1": ScanCase(batch=2, length=17, d_inner=33, d_state=1, **EVERY),
    "d_state 20": ScanCase(batch=1, length=6, d_inner=32, d_state=20, **EVERY),
    "one step": ScanCase(length=1, d_inner=32, d_state=16, **EVERY),
}
SEGMENTED_CASES = {
    "whole row": ScanCase(batch=2, length=37, d_inner=32, **EVERY),
    "no options": ScanCase(batch=1, length=40, d_inner=32),
    "fixed": ScanCase(batch=1, length=33, d_inner=32, B="fixed", C="fixed", **EVERY),
    "packed": ScanCase(batch=1, length=60, d_inner=32, cu_seqlens=(0, 0, 5, 37, 53, 60, 60), **EVERY),
    "packed on their ends": ScanCase(batch=1, length=48, d_inner=32, cu_seqlens=(0, 16, 48), z=True),
}


@pytest.mark.parametrize("name", SMALL_CASES)
def test_scan_within_budget(name: str) -> None:
    scans.hold_to_budget(scan, SMALL_CASES[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("name", ["every option", "packed, groups", "fixed B"])
def test_scan_in_low_precision(name: str, dtype: torch.dtype) -> None:
    scans.hold_to_budget(scan, SMALL_CASES[name], dtype)


@pytest.mark.parametrize("name", SEGMENTED_CASES)
def test_scan_in_segments(name: str, short_segments: int) -> None:
    case = SEGMENTED_CASES[name]
    assert triton_scan.plan(1, case.length, case.d_inner, case.d_state, 1, 1).segment_forward == short_segments
    scans.hold_to_budget(scan, case, torch.float32)


@pytest.mark.parametrize("length", [3, 4, 5, 15, 16, 17])
def test_lengths_around_runs_and_checkpoints(length: int) -> None:
    scans.hold_to_budget(scan, ScanCase(batch=1, length=length, d_inner=32, d_state=2, **EVERY), torch.float32)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "segments"])
def test_scan_is_the_same_bits_always_and_never_leaks(cut: bool, request: pytest.FixtureRequest) -> None:
    """Two runs, poisoned memory, and NaN in the neighbours of a packed sequence."""
    if cut:
        request.getfixturevalue("short_segments")
    case = ScanCase(batch=1, length=40, d_inner=32, cu_seqlens=(0, 5, 35, 40), **EVERY)
    clean = scan_problem(case, torch.float32)
    dirty = {key: value.clone() if isinstance(value, Tensor) else value for key, value in clean.items()}
    for key in ("u", "dt", "B", "C", "z"):
        dirty[key][:, :5] = dirty[key][:, 35:] = float("nan")
    dirty["initial_state"][[0, 2]] = float("nan")

    def middle(**problem: Any) -> tuple[Tensor, Tensor]:
        y, state = scan(**problem)
        assert state is not None
        return y[:, 5:35], state[1]

    first, poisoned = derivatives(middle, clean), derivatives(middle, dirty)
    with poisoned_memory():
        again = derivatives(middle, clean)
    for key, value in first.items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(again[key], value), key
    for key in ("y", "final_state"):
        assert torch.equal(poisoned[key], first[key]), key
    for key in ("d u", "d dt", "d B", "d C", "d z"):
        assert torch.equal(poisoned[key][:, 5:35], first[key][:, 5:35]), key
    assert torch.equal(poisoned["d initial_state"][1], first["d initial_state"][1])


@pytest.mark.parametrize("how", ["every other", "time first", "features first"])
def test_strided_inputs(how: str) -> None:
    def run(**problem: Any) -> Any:
        views = {k: scans.strided(v, how) if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in problem.items()}
        assert not views["u"].is_contiguous()
        return scan(**views)

    scans.hold_to_budget(run, ScanCase(batch=2, length=5, d_inner=32, B=2, **EVERY), torch.float32)


def test_gradient_into_one_output_alone() -> None:
    problem = scan_problem(ScanCase(batch=1, length=5, d_inner=8, **EVERY), torch.float32)
    whole = derivatives(scan, problem)
    parts = [derivatives(scan, problem, cotangents={name: torch.ones_like(whole[name])}) for name in scans.OUTPUTS]
    both = derivatives(scan, problem, cotangents={name: torch.ones_like(whole[name]) for name in scans.OUTPUTS})
    for key, value in both.items():
        if key.startswith("d "):
            torch.testing.assert_close(parts[0][key] + parts[1][key], value)


def test_softplus_over_its_whole_range(require_backend: Callable[..., None]) -> None:
    scans.test_softplus_over_its_whole_range("triton", require_backend)


COMPILED_CASES = {
    "every option": ScanCase(batch=1, length=5, d_inner=8, **EVERY),
    "packed, no state": ScanCase(batch=1, length=5, d_inner=8, cu_seqlens=(0, 0, 2, 5)),
}


@pytest.mark.parametrize("name", COMPILED_CASES)
def test_compiles_as_one_graph_and_is_registered(name: str) -> None:
    torch.compiler.reset()
    problem = scan_problem(COMPILED_CASES[name], torch.float32)
    with recorded_calls() as calls:
        eager = derivatives(scan, problem)
    assert {str(func).split(".")[1] for func, _, _ in calls} == {
        "selective_scan_triton",
        "selective_scan_triton_backward",
    }
    check_registration(calls)
    traced = derivatives(torch.compile(scan, fullgraph=True, backend="aot_eager"), problem)
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_wrong_boundaries_stop_a_graph(op: str) -> None:
    """Forward and backward, each by itself: a captured backward pass may be replayed with others."""
    torch.compiler.reset()
    run = packed_op(op, "triton")
    graph = torch.compile(run, fullgraph=True, backend="aot_eager")
    right = torch.tensor([0, 0, 4, 10], dtype=torch.int32)
    torch.testing.assert_close(graph(right), run(right))
    with recorded_calls() as calls:
        if op == "selective_scan":
            derivatives(scan, scan_problem(COMPILED_CASES["packed, no state"], torch.float32))
        else:
            derivatives(convolutions.running("triton"), conv_problem(CONV_CASES["packed"], torch.float32))
    backward, given, named = next(call for call in calls if "backward" in str(call[0]))
    arguments = [argument.name for argument in backward._schema.arguments]
    for wrong in WRONG:
        with pytest.raises(ShapeError, match=f"{op}: cu_seqlens must"):
            graph(torch.tensor(wrong, dtype=torch.int32))
        own = list(given)
        own[arguments.index("cu_seqlens")] = torch.tensor(wrong, dtype=torch.int32)
        with pytest.raises(ShapeError, match=f"{op}: cu_seqlens must"):
            backward(*own, **named)


def test_the_kernel_that_checks_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs in place of the look at values on the CPU; the interpreter has to be told to keep assertions."""
    from triton.runtime.interpreter import interpreter_builder

    from statescan.ops import _triton_functions

    monkeypatch.setattr(interpreter_builder, "options", dataclasses.replace(interpreter_builder.options, debug=True))

    def check(bounds: list[int], length: int) -> None:
        sequences, block = len(bounds) - 1, 4
        grid = (-(-sequences // block),)
        cu = torch.tensor([*bounds, 77], dtype=torch.int32)  # what follows belongs to somebody else
        _triton_functions.check_boundaries[grid](cu, sequences, length, BLOCK=block)

    for right in ([0, 10], [0, 0, 4, 10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 0, 0, 10, 10, 10]):
        check(right, 10)
    for wrong in (*WRONG, [0, 1, 2, 3, 4, 6, 5, 7, 8, 10], [1, 10], [0, 11], [0, 2, 3, 4, 5, 9]):
        with pytest.raises(Exception, match="cu_seqlens must go from 0 to the length and never fall"):
            check(wrong, 10)


# ------------------------------------------------------------------------------------------------------- the other ops


@pytest.mark.parametrize("name", ["fixed B and C", "no options"])
def test_single_step(name: str) -> None:
    updates.hold_to_budget(updates.running("triton"), updates.CASES[name], torch.float32)


def test_single_step_writes_and_in_place() -> None:
    for case, dtype in itertools.product(("every option", "different groups"), (torch.float32, torch.bfloat16)):
        problem = as_update(scan_problem(REAL_CASES[case], dtype))
        wanted = selective_state_update(**problem, backend="reference")
        got = selective_state_update(**problem, backend="triton")
        torch.testing.assert_close(got, wanted)
        problem["state"] = problem["state"].transpose(1, 2).contiguous().transpose(1, 2)
        inplace = selective_state_update(**problem, inplace=True, backend="triton")
        assert inplace.state is problem["state"]
        assert torch.equal(inplace.state, got.state)
        assert torch.equal(inplace.y, got.y)


CONVOLUTIONS = {
    **{name: CONV_CASES[name] for name in ("plain", "shorter than the filter", "packed", "width 1")},
    "over tiles": ConvCase(batch=1, length=35, features=3),
    "blocks of channels": ConvCase(batch=1, length=3, features=131),
    "packed, wide filter": ConvCase(batch=1, length=23, features=7, width=9, offsets=(0, 0, 2, 7, 7, 20, 23, 23)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    with poisoned_memory():
        convolutions.hold_to_budget(convolutions.running("triton"), CONVOLUTIONS[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=names)
def test_convolution_in_low_precision(dtype: torch.dtype) -> None:
    convolutions.hold_to_budget(convolutions.running("triton"), ConvCase(batch=1, length=9), dtype, torch.float32)


def test_convolution_is_packed_and_strided_and_step_by_step(require_backend: Callable[..., None]) -> None:
    convolutions.test_packed_is_separate_beside_poisoned_neighbours(require_backend, "triton", 4, True)
    convolutions.test_strided_inputs(require_backend, "triton")
    convolutions.test_extreme_inputs_keep_silu_finite(require_backend, "triton")
    problem = conv_problem(ConvCase(length=5), torch.float32)
    whole = causal_conv1d(**problem, return_final_state=True, backend="triton")
    x, state = problem.pop("x"), problem.pop("initial_state")
    for inplace in (False, True):
        now = state.clone()
        for t in range(5):
            before = now
            y, now = causal_conv1d_update(x[:, t], now, inplace=inplace, backend="triton", **problem)
            assert (now is before) == inplace
            torch.testing.assert_close(y, whole.y[:, t])
        assert torch.equal(now, whole.final_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("shape", [(1, 3), (2, 3, 37), (18, 16)], ids=str)
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with poisoned_memory():
        for residual in (None, dtype):
            norms.hold_to_budget("triton", functools.partial(norms.norm_problem, shape, dtype, residual, dtype))


def test_norm_of_long_rows_and_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from statescan.ops.add_norm import triton_norm

    monkeypatch.setattr(triton_norm, "_FEATURES", 16)
    low = [torch.float32, torch.bfloat16]
    for x, residual, stream in itertools.product(low, [None, torch.bfloat16], [None, torch.float32]):
        make = functools.partial(norms.norm_problem, (3, 41), x, residual)
        norms.hold_to_budget("triton", make, residual_dtype=stream)


def test_the_other_ops_are_registered() -> None:
    with recorded_calls() as calls:
        for name in ("every option", "packed"):
            derivatives(convolutions.running("triton"), conv_problem(CONV_CASES[name], torch.float32))
        step = as_update(scan_problem(SMALL_CASES["one step"], torch.float32))
        selective_state_update(**step, backend="triton")
        selective_state_update(**step, inplace=True, backend="triton")
        x, state = torch.randn(2, 5), torch.randn(2, 3, 5)
        for inplace in (False, True):
            causal_conv1d_update(x, state, torch.randn(5, 4), inplace=inplace, backend="triton")
        for residual in (None, torch.bfloat16):
            derivatives(functools.partial(add_rms_norm, backend="triton"),
                        norms.norm_problem((3, 19), torch.float32, residual), norms.OUTPUTS)  # fmt: skip
    assert len({str(func) for func, _, _ in calls}) == 8
    check_registration(calls)


# -------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("op", OPS)
def test_refusals_name_the_cure(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(op, "triton", device="cpu") is None
    assert "use backend='torch'" in str(refusal(op, "triton", device="cpu", dtype=torch.float64))
    assert "it runs on devices of type cuda or xpu" in str(refusal(op, "triton", device="mps"))
    assert "unset it to run on the GPU" in str(refusal(op, "triton", device="cuda"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "set TRITON_INTERPRET=1" in str(refusal(op, "triton", device="cpu"))
    if not torch.cuda.is_available():
        assert str(refusal(op, "triton", device="cuda")).startswith("torch sees no CUDA device")
    # the order that "auto" reads: after what is made for one kind of device, before PyTorch
    order = list(BACKENDS[op])
    assert order.index("triton") == order.index("torch") - 1
    if "cuda" in order:
        assert order.index("cuda") < order.index("triton")


def test_auto_never_interprets() -> None:
    for op in OPS:
        assert explain(op, device="cpu").backend != "triton"
    assert "only where it is named" in str(explain("selective_scan", device="cpu"))


def test_what_the_scan_leaves_out() -> None:
    assert "backend='torch'" in str(refusal("selective_scan", "triton", complex_A=True))
    assert "d_state is 257" in str(refusal("selective_scan", "triton", d_state=257))
    with pytest.raises(BackendUnavailableError, match="the inputs are float64"):
        selective_scan(**scan_problem(ScanCase(), torch.float64), backend="triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from statescan.ops import _triton

    monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(refusal("selective_scan", "triton", device="cpu"))


@pytest.mark.parametrize("op", ["scan", "convolution", "norm"])
def test_second_derivatives_are_refused(op: str) -> None:
    x = torch.randn(1, 2, 4, requires_grad=True)
    if op == "scan":
        b = torch.randn(1, 2, 2)
        y = selective_scan(x, x, -torch.ones(4, 2), b, b, backend="triton").y
    elif op == "convolution":
        y = causal_conv1d(x, torch.randn(4, 4), activation="silu", backend="triton").y
    else:
        y = add_rms_norm(x, torch.ones(4), backend="triton").output
    with pytest.raises(BackendUnavailableError, match="backend 'triton' has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_kernel_that_does_not_compile() -> None:
    """Told as such, so that another backend takes the call; what fails as a kernel runs stays what it is."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import InterpreterError, OutOfResources

    tensor = torch.zeros(1)
    for problem in (
        CompilationError(None, None, "no such thing"),  # type: ignore[arg-type]
        OutOfResources(300, 200, "shared memory"),
        RuntimeError("PassManager::run failed"),
    ):
        words = rf"a Triton kernel did not compile \({type(problem).__name__}: .*\); use backend='torch'"
        with pytest.raises(BackendUnavailableError, match=words) as caught, _triton.on_device_of(tensor):
            raise problem
        assert caught.value.__cause__ is problem
    for problem in (InterpreterError("an assertion"), RuntimeError("CUDA error"), ValueError("a size")):
        with pytest.raises(type(problem), match=str(problem)), _triton.on_device_of(tensor):
            raise problem
