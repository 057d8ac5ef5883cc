"""The contract of `causal_conv1d` and `causal_conv1d_update` on the `cuda` backend, plus what only its kernels show:
whole and cut vectors, runs and blocks, buffers with a stride, offsets above 2^31.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError
from statescan.ops import causal_conv1d, causal_conv1d_update, explain
from statescan.ops.causal_conv1d import cuda as backend
from statescan.testing import (
    assert_within_budget,
    check_registration,
    derivatives,
    poisoned_memory,
    random_cotangents,
    recorded_calls,
)
from statescan.testing.conv import CONV_CASES, ConvCase, causal_conv1d_oracle
from statescan.testing.conv import conv_problem as problem_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

conv_problem = functools.partial(problem_on, device="cuda")
OUTPUTS = ("y", "final_state")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Every count of channels a thread, whole and cut; runs that start, cross and end in each other; many taps.
KERNEL_CASES = {
    "whole blocks": ConvCase(batch=2, length=64, features=256),
    "cut block": ConvCase(batch=1, length=33, features=264),
    "two channels a thread": ConvCase(batch=1, length=37, features=130),
    "four channels a thread": ConvCase(batch=1, length=37, features=132),
    "blocks of time": ConvCase(batch=1, length=1030, features=8),
    "blocks of time, packed": ConvCase(
        batch=1, length=1030, features=8, offsets=(0, 1, 1, 3, 64, 65, 500, 1000, 1028, 1030)
    ),
    "packed on ends of runs": ConvCase(batch=1, length=64, features=64, offsets=(0, 8, 16, 32, 48, 64)),
    "packed, one by one": ConvCase(batch=1, length=9, features=64, offsets=tuple(range(10))),
    "packed, one by one, no state": ConvCase(
        batch=1, length=9, features=64, offsets=tuple(range(10)), initial_state=False
    ),
    **{f"width {width}, vectors": ConvCase(width=width, length=45, features=64) for width in (1, 2, 3, 5, 8, 12, 16)},
    "width 17": ConvCase(width=17, length=40, features=24),
    "width 40": ConvCase(width=40, length=30, features=5, bias=False),
    "width 17, packed": ConvCase(batch=1, width=17, length=60, features=8, offsets=(0, 0, 3, 40, 60)),
    "width 16, packed": ConvCase(batch=1, width=16, length=200, features=48, offsets=(0, 0, 3, 40, 60, 200)),
    "one run with tiles inside": ConvCase(batch=1, length=700, features=512),
    "tiles inside, packed": ConvCase(batch=1, length=700, features=512, offsets=(0, 4, 70, 71, 300, 500, 699, 700)),
    "width 17, long": ConvCase(batch=1, width=17, length=600, features=8, silu=False, initial_state=False),
}
CASES = {**CONV_CASES, **KERNEL_CASES}


def running(name: str = "cuda") -> Callable[..., tuple[Tensor, Tensor | None]]:
    return functools.partial(causal_conv1d, return_final_state=True, backend=name)


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hold_to_budget(
    run: Callable[..., Any], case: ConvCase, dtype: torch.dtype, parameters: torch.dtype | None = None
) -> None:
    """Every result against the float64 truth, judged beside the reference in the problem's precision."""
    same = running("reference" if case.length <= 300 else "torch")
    draws = []
    for seed in range(4 if case.features * case.length < 1000 else 1):
        problem = conv_problem(case, dtype, parameters=parameters, seed=seed)
        own = problem if dtype != torch.float64 else conv_problem(case, torch.float32, seed=seed)
        reference = derivatives(same, own, seed=seed)
        cotangents = random_cotangents({name: reference[name] for name in OUTPUTS}, seed)
        truth, own_truth = (
            derivatives(causal_conv1d_oracle, given, cotangents=cotangents, exact=True) for given in (problem, own)
        )
        draws.append((derivatives(run, problem, cotangents=cotangents), truth, reference, own_truth))
    for name in draws[0][1]:
        actual, truth, reference, own_truth = ([draw[name] for draw in column] for column in zip(*draws, strict=True))
        aim = own_truth if dtype == torch.float64 else None
        assert_within_budget(actual, truth, reference, name, reference_truth=aim)


def test_auto_takes_it() -> None:
    for op in ("causal_conv1d", "causal_conv1d_update"):
        assert explain(op, device="cuda").backend == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("name", CASES)
def test_within_budget(name: str, dtype: torch.dtype) -> None:
    with poisoned_memory():
        hold_to_budget(running(), CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("name", ["every option", "packed", "whole blocks", "width 17"])
def test_float32_parameters(name: str, dtype: torch.dtype) -> None:
    hold_to_budget(running(), CASES[name], dtype, torch.float32)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 63, 64, 65, 255, 256, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_lengths_around_runs(length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_to_budget(running(), ConvCase(batch=1, length=length, features=64), dtype)
    monkeypatch.setattr(backend, "_FORWARD_16_BITS", (*backend._FORWARD_16_BITS[:5], 0))  # as where the chip is full
    if dtype == torch.bfloat16:
        hold_to_budget(running(), ConvCase(batch=1, length=length, features=64), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize(
    "name",
    ["every option", "packed", "packed, no initial state", "one run with tiles inside", "tiles inside, packed",
     "width 3, vectors", "width 5, vectors", "blocks of time, packed", "plain", "cut block"],
)  # fmt: skip
def test_long_runs(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs that calls take which fill the chip, here given to small ones."""
    for settings in ("_FORWARD", "_FORWARD_16_BITS", "_BACKWARD"):
        monkeypatch.setattr(backend, settings, (*getattr(backend, settings)[:5], 0))
    hold_to_budget(running(), CASES[name], dtype)


def test_sums_over_many_positions_stay_within_budget() -> None:
    hold_to_budget(running(), ConvCase(batch=2, length=6000, features=64, initial_state=False), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("name", ["every option", "blocks of time", "blocks of time, packed", "width 17, long"])
def test_runs_are_bit_equal(name: str, dtype: torch.dtype) -> None:
    problem = conv_problem(CASES[name], dtype)
    first = derivatives(running(), problem)
    for _ in range(5):
        again = derivatives(running(), problem)
        for key, value in first.items():
            assert torch.isfinite(value).all(), key
            assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("width", [1, 4, 9, 17])
def test_cut_anywhere_is_whole_is_step_by_step(width: int, dtype: torch.dtype) -> None:
    problem = conv_problem(ConvCase(length=21, features=64, width=width), dtype)
    x, state = problem.pop("x"), problem.pop("initial_state")
    whole = running()(x, initial_state=state, **problem)
    for cut in range(1, 21):
        head = running()(x[:, :cut], initial_state=state, **problem)
        tail = running()(x[:, cut:], initial_state=head[1], **problem)
        assert torch.equal(torch.cat([head[0], tail[0]], 1), whole[0])
        assert torch.equal(tail[1], whole[1])
    for inplace in (False, True):
        stepped, outputs = state.clone(), []
        for t in range(21):
            before = stepped
            y, stepped = causal_conv1d_update(x[:, t], stepped, inplace=inplace, backend="cuda", **problem)
            assert (stepped is before) == inplace
            outputs.append(y)
        assert torch.equal(torch.stack(outputs, 1), whole[0])
        assert torch.equal(stepped, whole[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("width", [2, 4, 17])
def test_packed_is_separate_beside_poisoned_neighbours(width: int, poison: float) -> None:
    offsets = (0, 5, 5, 6, 200, 203)
    case = ConvCase(batch=1, length=203, features=64, width=width, offsets=offsets)
    for own in range(len(offsets) - 1):
        problem = conv_problem(case, torch.float32)
        begin, end = offsets[own], offsets[own + 1]
        problem["initial_state"][:own] = problem["initial_state"][own + 1 :] = poison
        problem["x"][:, :begin] = problem["x"][:, end:] = poison
        if begin == end:
            state = running()(**problem)[1]
            assert state is not None
            assert torch.equal(state[own], problem["initial_state"][own])
            continue
        alone = {**problem, "x": problem["x"][:, begin:end], "cu_seqlens": None}
        alone["initial_state"] = problem["initial_state"][own : own + 1]
        one = derivatives(running(), alone, seed=3)
        cotangents = random_cotangents({name: one[name] for name in OUTPUTS}, 3)
        wide = {
            "y": torch.full_like(problem["x"], poison),
            "final_state": torch.full_like(problem["initial_state"], poison),
        }
        wide["y"][:, begin:end], wide["final_state"][own] = cotangents["y"], cotangents["final_state"][0]
        packed = derivatives(running(), problem, cotangents=wide)
        for name in ("y", "d x"):
            assert torch.equal(packed[name][:, begin:end], one[name]), name
        for name in ("final_state", "d initial_state"):
            assert torch.equal(packed[name][own], one[name][0]), name


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("case", ["every option", "packed", "width 17, packed"])
def test_gradient_out_of_one_result_alone(case: str, name: str) -> None:
    problem = conv_problem(CASES[case], torch.float64)
    cotangent = random_cotangents({name: dict(zip(OUTPUTS, causal_conv1d_oracle(**problem), strict=True))[name]})
    actual = derivatives(running(), problem, cotangents=cotangent)
    truth = derivatives(causal_conv1d_oracle, problem, cotangents=cotangent)
    for key in truth:
        torch.testing.assert_close(actual[key], truth[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("how", ["half", "channels first", "unaligned", "expanded gradient"])
def test_strided_inputs(how: str, dtype: torch.dtype) -> None:
    problem = conv_problem(ConvCase(batch=2, length=19, features=64), dtype)
    if how == "expanded gradient":
        leaves = {name: problem[name].requires_grad_() for name in ("x", "weight")}
        y = running()(**problem)[0]
        ones = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), retain_graph=True)
        for a, b in zip(ones, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
            assert torch.equal(a, b)
        return
    plain = derivatives(running(), problem)
    x = problem["x"]
    if how == "half":
        strided = torch.cat([torch.full_like(x, float("nan")), x], -1)[..., 64:]
    elif how == "channels first":
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        strided = torch.cat([x[..., :1], x], -1)[..., 1:]
    wide = torch.randn(2, 5, 64, device="cuda").to(dtype)
    wide[:, 1:4] = problem["initial_state"]
    given = {**problem, "x": strided, "weight": problem["weight"].t().contiguous().t(), "initial_state": wide[:, 1:4]}
    result = derivatives(running(), given)
    for name in plain:
        if name in ("d weight", "d bias") and how == "unaligned":  # other blocks, another order of summation
            torch.testing.assert_close(result[name], plain[name])
        else:
            assert torch.equal(result[name], plain[name]), name


@pytest.mark.parametrize("width", [4, 17])
def test_results_in_buffers_with_a_stride(width: int) -> None:
    """Both halves of a projection: x is read where it lies, y and the gradient of x are written into halves."""
    problem = conv_problem(ConvCase(batch=2, length=70, features=64, width=width, initial_state=False), torch.bfloat16)
    x, weight, bias = (problem[name] for name in ("x", "weight", "bias"))
    both = torch.cat([x, torch.randn_like(x)], -1)
    y = backend.launch_forward(x, weight, bias, True)
    dy = torch.randn_like(x)
    want = backend.launch_backward(dy, None, x, weight, bias, True)
    out, gradient = torch.full_like(both, 7.0), torch.full_like(both, 7.0)
    assert (
        backend.launch_forward(both[..., :64], weight, bias, True, out=out[..., 64:]).data_ptr()
        == out[..., 64:].data_ptr()
    )
    assert torch.equal(out[..., 64:], y)
    assert (out[..., :64] == 7).all()
    got = backend.launch_backward(dy, None, both[..., :64], weight, bias, True, dx=gradient[..., :64])
    assert (gradient[..., 64:] == 7).all()
    assert torch.equal(gradient[..., :64], want[0])
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [1, 4, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_update_has_gradients(width: int, dtype: torch.dtype) -> None:
    problem = conv_problem(ConvCase(length=1, width=width), dtype)
    problem["x"], problem["state"] = problem["x"][:, 0], problem.pop("initial_state")
    step = derivatives(functools.partial(causal_conv1d_update, backend="cuda"), problem, OUTPUTS)
    with torch.no_grad():
        y, state = causal_conv1d_update(**problem, backend="cuda")
    assert torch.equal(step["y"], y)
    assert torch.equal(step["final_state"], state)
    if dtype not in (torch.float64, torch.float32):  # the convolution's gradients, held to their budget above
        return
    truth = derivatives(functools.partial(causal_conv1d_update, backend="torch"), problem, OUTPUTS)
    for name, value in truth.items():
        torch.testing.assert_close(step[name], value)


@pytest.mark.parametrize("inplace", [False, True])
def test_update_of_a_strided_state(inplace: bool) -> None:
    problem = conv_problem(ConvCase(length=1, features=64), torch.bfloat16)
    problem["x"], state = problem["x"][:, 0], problem.pop("initial_state")
    want = causal_conv1d_update(state=state, **problem, backend="cuda")
    for strided in (torch.cat([state, state], -1)[..., :64], state.transpose(1, 2).contiguous().transpose(1, 2)):
        got = causal_conv1d_update(state=strided, **problem, inplace=inplace, backend="cuda")
        assert torch.equal(got.y, want.y)
        assert torch.equal(got.state, want.state)
        assert not inplace or got.state is strided


def test_extreme_inputs_keep_silu_finite() -> None:
    x = torch.tensor([-3e38, -1e4, -88.0, -87.0, 0.0, 87.0, 1e4, 3e38], device="cuda").reshape(1, 8, 1).requires_grad_()
    y = causal_conv1d(x, torch.ones(1, 1, device="cuda"), activation="silu", backend="cuda").y
    truth = torch.nn.functional.silu(x.detach().double())
    torch.testing.assert_close(y.detach().double(), truth, rtol=1e-6, atol=1e-30)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(gradient).all()
    missing = torch.full((1, 3, 2), float("nan"), device="cuda")
    assert causal_conv1d(missing, torch.ones(2, 4, device="cuda"), activation="silu", backend="cuda").y.isnan().all()


def test_an_empty_batch() -> None:
    problem = conv_problem(ConvCase(batch=2, features=8), torch.float32)
    problem["x"], problem["initial_state"] = problem["x"][:0], problem["initial_state"][:0]
    result = derivatives(running(), problem)
    assert result["y"].shape == (0, 11, 8)
    assert not result["d weight"].any()


@pytest.mark.parametrize("name", ["every option", "plain", "packed", "width 17, packed", "width 1"])
@pytest.mark.parametrize("final", [True, False])
def test_registration(name: str, final: bool) -> None:
    problem = conv_problem(CASES[name], torch.float32)
    with recorded_calls() as calls:
        derivatives(functools.partial(causal_conv1d, return_final_state=final, backend="cuda"), problem)
    want = ["statescan::causal_conv1d_cuda", "statescan::causal_conv1d_cuda_backward"]
    assert [call[0]._schema.name for call in calls] == want
    check_registration(calls)


@pytest.mark.parametrize("inplace", [False, True])
def test_registration_of_the_update(inplace: bool) -> None:
    problem = conv_problem(ConvCase(length=1), torch.float32)
    problem["x"], problem["state"] = problem["x"][:, 0], problem.pop("initial_state")
    with recorded_calls() as calls:
        causal_conv1d_update(**problem, inplace=inplace, backend="cuda")
    assert len(calls) == 1
    check_registration(calls)


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("name", ["every option", "packed", "plain"])
def test_compiles_as_one_graph(name: str, final: bool) -> None:
    torch.compiler.reset()
    run = functools.partial(causal_conv1d, return_final_state=final, backend="cuda")
    problem = conv_problem(CASES[name], torch.float32)
    eager = derivatives(run, problem)
    traced = derivatives(torch.compile(run, fullgraph=True), problem)
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["whole blocks", "packed on ends of runs", "width 17, packed"])
def test_graph_capture(name: str) -> None:
    """Forward and backward replay from a CUDA graph with the same bits, and so does the step in place."""
    problem = conv_problem(CASES[name], torch.bfloat16)
    offsets = problem.pop("cu_seqlens", None)
    inputs = [problem[key].requires_grad_() for key in ("x", "weight", "bias", "initial_state")]

    def step() -> list[Tensor]:
        y = backend.launch_forward(*inputs[:3], True, inputs[3], offsets)
        gradients = backend.launch_backward(y, None, *inputs[:3], True, inputs[3], offsets)
        return [y, *(g for g in gradients if g is not None)]

    with torch.no_grad():
        eager = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    graph.replay()
    for a, b in zip(eager, captured, strict=True):
        assert torch.equal(a, b)


def test_graph_capture_of_the_update() -> None:
    problem = conv_problem(ConvCase(length=1, features=64), torch.bfloat16)
    problem["x"], state = problem["x"][:, 0], problem.pop("initial_state")
    want = causal_conv1d_update(state=state.clone(), **problem, inplace=True, backend="cuda")
    live = state.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = causal_conv1d_update(state=live, **problem, inplace=True, backend="cuda")
    live.copy_(state)
    graph.replay()
    assert torch.equal(y, want.y)
    assert torch.equal(live, want.state)


def test_wrong_offsets_stop_the_kernel() -> None:
    """The host checks what it can see; in a graph the kernel itself refuses, with a message."""
    program = (
        "import torch; from statescan.ops.causal_conv1d import cuda\n"
        "x = torch.randn(1, 9, 8, device='cuda'); w = torch.randn(8, 4, device='cuda')\n"
        "cu = torch.tensor({offsets}, dtype=torch.int32, device='cuda')\n"
        "cuda.launch_forward(x, w, None, True, None, cu); torch.cuda.synchronize(); print('went on')\n"
    )
    for offsets, good in (([0, 5, 9], True), ([0, 12], False), ([1, 9], False), ([0, 7, 3, 9], False)):
        run = subprocess.run(
            [sys.executable, "-c", program.format(offsets=offsets)], capture_output=True, text=True, timeout=120
        )
        assert (run.returncode == 0) == good, run.stderr
        assert good == ("went on" in run.stdout)
        assert good or "cu_seqlens must go from 0 to the length of x, 9" in run.stdout + run.stderr


def test_second_derivatives_are_refused_not_wrong() -> None:
    x = torch.randn(1, 4, 3, device="cuda", requires_grad=True)
    y = causal_conv1d(x, torch.ones(3, 2, device="cuda"), backend="cuda").y
    with pytest.raises(BackendUnavailableError, match="no second derivatives; use backend='torch'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_the_cpu_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="runs on CUDA devices, the inputs are on 'cpu'"):
        causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 2), backend="cuda")


@pytest.mark.large
def test_offsets_above_2_31() -> None:
    """The last positions of a row of 2.2 billion numbers are those of the same positions run alone."""
    features, tail = 2048, 200
    length = 2**31 // features + 3 * tail
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("takes 20 GB of device memory")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1, length, features, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(features, 4, generator=generator, device="cuda")
    y = backend.launch_forward(x, weight, None, True)
    state = x[:, -tail - 3 : -tail].clone()
    alone = x[:, -tail:].clone()
    assert torch.equal(y[:, -tail:], backend.launch_forward(alone, weight, None, True, state))
    assert torch.equal(backend.final_state(x, 4, None, None), x[:, -3:])
    # y stands in for its own gradient, zero but for the last positions
    y[:, :-tail] = 0
    dx, dweight, _, _ = backend.launch_backward(y, None, x, weight, None, True)
    want = backend.launch_backward(y[:, -tail:].clone(), None, alone, weight, None, True, state)
    assert torch.equal(dx[:, -tail:], want[0])
    torch.testing.assert_close(dweight, want[1], rtol=1e-4, atol=1e-4)
