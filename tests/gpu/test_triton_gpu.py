"""The contract of the `triton` backends compiled for a GPU, plus what only a GPU shows: segments of time, whole and cut
blocks of channels, graphs.

tests/ops/test_triton.py holds the same kernels to the contract on the CPU, through Triton's interpreter; the suites of
the single ops run here, too, with STATESCAN_TEST_DEVICE=cuda in the environment.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from test_selective_scan_cuda import EVERY, KERNEL_CASES, hold_to_budget, names
from torch import Tensor

from statescan.ops import add_rms_norm, causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from statescan.ops.selective_scan import triton_scan
from statescan.testing import (
    REAL_CASES,
    ScanCase,
    as_update,
    assert_within_budget,
    check_registration,
    derivatives,
    oracles,
    poisoned_memory,
    random_cotangents,
    recorded_calls,
    refusal,
)
from statescan.testing import scan_problem as problem_on
from statescan.testing.conv import CONV_CASES, ConvCase, add_rms_norm_oracle, causal_conv1d_oracle
from statescan.testing.conv import conv_problem as conv_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

scan_problem = functools.partial(problem_on, device="cuda")
conv_problem = functools.partial(conv_on, device="cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Many rows or sequences of one channel block would take the sequential reference long and show nothing new here.
CASES = {name: case for name, case in REAL_CASES.items() if name not in ("smallest", "two steps")} | KERNEL_CASES
SEGMENTED = {
    "segments": ScanCase(batch=1, length=1500, d_inner=64, d_state=16, **EVERY),
    "segments, fixed": ScanCase(batch=2, length=700, d_inner=24, d_state=5, B="fixed", C="fixed", **EVERY),
    "segments, groups": ScanCase(batch=2, length=520, d_inner=48, d_state=8, B=2, C=3, **EVERY),
    "segments, packed": ScanCase(
        batch=1, length=1500, d_inner=64, d_state=16, cu_seqlens=(0, 5, 5, 700, 701, 1024, 1500), **EVERY
    ),
    "segments, packed on their ends": ScanCase(
        batch=1, length=1024, d_inner=32, d_state=4, cu_seqlens=(0, 0, 64, 128, 512, 1024, 1024), **EVERY
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _is_there() -> None:
    reason = refusal("selective_scan", "triton", device="cuda")
    if reason is not None:
        pytest.skip(reason)


def scan(**problem: Any) -> tuple[Tensor, Tensor | None]:
    return selective_scan(**problem, return_final_state=True, backend="triton")


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts time into segments of two spans of checkpoints wherever a sequence is longer than that."""
    monkeypatch.setattr(triton_scan, "_segment", lambda programs, wanted, length: 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("name", CASES)
def test_scan_within_budget(name: str, dtype: torch.dtype) -> None:
    hold_to_budget(scan, CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("name", SEGMENTED)
def test_scan_in_segments(name: str, dtype: torch.dtype, short_segments: None) -> None:
    hold_to_budget(scan, SEGMENTED[name], dtype)


@pytest.mark.parametrize("name", ["every option", "packed, empty ones", "fixed B and C", "groups"])
def test_segments_longer_than_the_sequences(name: str, short_segments: None) -> None:
    hold_to_budget(scan, CASES[name], torch.float32)


def test_256_states() -> None:
    hold_to_budget(scan, ScanCase(batch=1, length=37, d_inner=33, d_state=256, **EVERY), torch.float32)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 63, 64, 65])
def test_lengths_around_tiles(length: int) -> None:
    hold_to_budget(scan, ScanCase(batch=1, length=length, d_inner=64, d_state=16, **EVERY), torch.float32)


def test_long_sums_stay_within_budget() -> None:
    case = ScanCase(batch=2, length=4000, d_inner=64, d_state=16, D=True, z=True, dt_bias=True, dt_softplus=True)
    hold_to_budget(scan, case, torch.float32)


def test_a_step_of_zero_changes_nothing() -> None:
    problem = scan_problem(ScanCase(d_inner=64, d_state=16, length=40, initial_state=True), torch.float32)
    problem["dt"] = torch.zeros_like(problem["dt"])
    assert torch.equal(scan(**problem)[1], problem["initial_state"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("name", ["whole blocks, cut tile", "cut block", "segments", "segments, packed", "groups"])
def test_scan_gives_the_same_bits_always(name: str, dtype: torch.dtype) -> None:
    """Whatever stood in the memory that outputs and workspaces were given."""
    problem = scan_problem({**CASES, **SEGMENTED}[name], dtype)
    first = derivatives(scan, problem)
    with poisoned_memory():
        poisoned = derivatives(scan, problem)
    for key, value in first.items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(value, poisoned[key]), key
    for _ in range(5):
        again = derivatives(scan, problem)
        for key, value in first.items():
            assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "segments"])
def test_packed_never_leaks(poison: float, cut: bool, request: pytest.FixtureRequest) -> None:
    if cut:
        request.getfixturevalue("short_segments")
    case = ScanCase(batch=1, length=1500, d_inner=64, d_state=16, cu_seqlens=(0, 300, 1100, 1500), **EVERY)
    clean = scan_problem(case, torch.float32)
    dirty = {key: value.clone() if isinstance(value, Tensor) else value for key, value in clean.items()}
    for key in ("u", "dt", "B", "C", "z"):
        dirty[key][:, :300] = poison
        dirty[key][:, 1100:] = poison
    dirty["initial_state"][[0, 2]] = poison

    def middle(**problem: Any) -> tuple[Tensor, Tensor]:
        y, final_state = scan(**problem)
        assert final_state is not None
        return y[:, 300:1100], final_state[1]

    results = [derivatives(middle, problem) for problem in (clean, dirty)]
    for key in ("y", "final_state"):
        assert torch.equal(results[0][key], results[1][key]), key
    for key in ("d u", "d dt", "d B", "d C", "d z"):
        assert torch.equal(results[0][key][:, 300:1100], results[1][key][:, 300:1100]), key


@pytest.mark.parametrize("how", ["every other", "time first", "features first"])
def test_strided_inputs(how: str) -> None:
    def strided(value: Tensor) -> Tensor:
        if how == "every other":
            return torch.repeat_interleave(value, 2, dim=-1)[..., ::2]
        if how == "time first":
            return value.transpose(0, 1).contiguous().transpose(0, 1)
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)

    def run(**problem: Any) -> Any:
        return scan(**{k: strided(v) if k in ("u", "dt", "z", "B", "C") else v for k, v in problem.items()})

    hold_to_budget(run, CASES["whole blocks, cut tile"], torch.float32)


@pytest.mark.parametrize("name", ["every option", "whole blocks", "packed, empty ones"])
def test_registration(name: str) -> None:
    problem = scan_problem(CASES[name], torch.bfloat16)
    with recorded_calls() as calls:
        derivatives(scan, problem)
    assert {str(func).split(".")[1] for func, _, _ in calls} >= {"selective_scan_triton"}
    check_registration(calls)


@pytest.mark.parametrize("name", ["whole blocks", "packed, no state"])
def test_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    problem = scan_problem(CASES[name], torch.float32)
    eager = derivatives(scan, problem)
    traced = derivatives(torch.compile(scan, fullgraph=True), problem)
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_graph_capture() -> None:
    problem = scan_problem(CASES["whole blocks"], torch.bfloat16)

    def step() -> list[Tensor]:
        leaves = {k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in problem.items()}
        y = selective_scan(**leaves, backend="triton").y
        return [y, *torch.autograd.grad(y.float().sum(), [v for v in leaves.values() if isinstance(v, Tensor)])]

    eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(eager, captured, strict=True):
        assert torch.equal(a, b)


@pytest.mark.large
def test_offsets_above_2_31() -> None:
    """A row of 2.2 billion numbers: its last steps are those of the same steps run alone from the state before them."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9 or torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("takes 25 GB of device memory")
    d_inner, d_state, tail = 2048, 16, 512
    length = 2**31 // d_inner + 3 * tail
    generator = torch.Generator("cuda").manual_seed(0)
    big = functools.partial(torch.randn, generator=generator, device="cuda", dtype=torch.bfloat16)
    u = big(1, length, d_inner)
    dt = big(1, length, d_inner).sub_(3)
    B, C = big(1, length, d_state), big(1, length, d_state)
    A = -torch.rand(d_inner, d_state, generator=generator, device="cuda") - 0.1
    cut = length - tail
    with torch.no_grad():
        run = functools.partial(selective_scan, A=A, dt_softplus=True, return_final_state=True)
        before = run(u=u[:, :cut], dt=dt[:, :cut], B=B[:, :cut], C=C[:, :cut], backend="triton").final_state
        y, state = run(u=u, dt=dt, B=B, C=C, backend="triton")
        rest = {name: x[:, cut:].clone() for name, x in (("u", u), ("dt", dt), ("B", B), ("C", C))}
        rest["initial_state"] = before
        wanted = run(**rest, backend="torch")
        exact = run(**{k: v.double() for k, v in rest.items()} | {"A": A.double()}, backend="torch")
    assert_within_budget(y[:, cut:], exact.y, wanted.y, "y")
    assert state is not None
    assert wanted.final_state is not None
    assert_within_budget(state, exact.final_state, wanted.final_state, "final_state")


# ------------------------------------------------------------------------------------------------------- the other ops


def hold(
    run: Any, truth: Any, reference: Any, problem: dict[str, Any], outputs: tuple[str, ...] = ("y", "final_state")
) -> None:
    own = derivatives(reference, problem, outputs)
    cotangents = random_cotangents({name: own[name] for name in outputs if name in own})
    own, actual = (derivatives(f, problem, outputs, cotangents=cotangents) for f in (reference, run))
    exact = derivatives(truth, problem, outputs, cotangents=cotangents, exact=True)
    for name, value in exact.items():
        assert_within_budget(actual[name], value, own[name], name)
    with poisoned_memory():
        again = derivatives(run, problem, outputs, cotangents=cotangents)
    for name, value in actual.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("name", ["every option", "groups", "fixed B and C", "d_state 64", "d_state 5", "wide"])
def test_single_step(name: str, dtype: torch.dtype) -> None:
    problem = as_update(scan_problem(dataclasses.replace(CASES[name], batch=32), dtype))
    run = functools.partial(selective_state_update, backend="triton")
    reference = functools.partial(selective_state_update, backend="reference")
    hold(run, oracles.selective_state_update, reference, problem, ("y", "state"))
    with torch.no_grad():
        y, state = run(**problem)
        given = {**problem, "state": problem["state"].clone()}
        inplace = run(**given, inplace=True)
    assert inplace.state is given["state"]
    assert torch.equal(inplace.state, state)
    assert torch.equal(inplace.y, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(
    "case",
    [
        *(CONV_CASES[name] for name in ("every option", "plain", "packed", "packed, wide filter", "width 1")),
        ConvCase(batch=3, length=100, features=300),
    ],
    ids=["every option", "plain", "packed", "packed, wide filter", "width 1", "many tiles"],
)
def test_convolution(case: ConvCase, dtype: torch.dtype) -> None:
    run = functools.partial(causal_conv1d, return_final_state=True, backend="triton")
    reference = functools.partial(causal_conv1d, return_final_state=True, backend="reference")
    hold(run, causal_conv1d_oracle, reference, conv_problem(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_step_by_step(width: int, dtype: torch.dtype) -> None:
    problem = conv_problem(ConvCase(length=9, features=150, width=width), dtype)
    whole = causal_conv1d(**problem, return_final_state=True, backend="triton")
    x, state = problem.pop("x"), problem.pop("initial_state")
    for inplace in (False, True):
        now = state.clone()
        for t in range(9):
            y, now = causal_conv1d_update(x[:, t], now, inplace=inplace, backend="triton", **problem)
            torch.testing.assert_close(y, whole.y[:, t])
        assert torch.equal(now, whole.final_state)


@pytest.mark.parametrize("x", DTYPES, ids=names)
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 37), (2, 65, 96), (5, 9000)], ids=str)
def test_norm(shape: tuple[int, ...], residual: torch.dtype | None, x: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    problem = {"x": torch.randn(shape, generator=generator).to("cuda", x), "weight": torch.rand(shape[-1:]).cuda()}
    if residual is not None:
        problem["residual"] = torch.randn(shape, generator=generator).to("cuda", residual)
    run = functools.partial(add_rms_norm, backend="triton")
    reference = functools.partial(add_rms_norm, backend="reference")
    hold(run, add_rms_norm_oracle, reference, problem, ("output", "residual"))


def test_ops_compile_as_one_graph() -> None:
    torch.compiler.reset()
    conv = conv_problem(CONV_CASES["every option"], torch.float32)
    run = functools.partial(causal_conv1d, return_final_state=True, backend="triton")
    eager, traced = derivatives(run, conv), derivatives(torch.compile(run, fullgraph=True), conv)
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value)
    step = as_update(scan_problem(CASES["every option"], torch.float32))
    update = functools.partial(selective_state_update, backend="triton", inplace=True)
    with torch.no_grad():
        given = [{**step, "state": step["state"].clone()} for _ in range(2)]
        plain = update(**given[0])
        compiled = torch.compile(update, fullgraph=True)(**given[1])
    torch.testing.assert_close(compiled.y, plain.y)
    torch.testing.assert_close(given[1]["state"], given[0]["state"])
