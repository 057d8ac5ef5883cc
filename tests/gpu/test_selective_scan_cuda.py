"""The contract of `selective_scan` on the `cuda` backend, plus what only a GPU shows: tiles and chunks of its kernels,
offsets above 2^31, compilation at first use.

tests/ops/test_selective_scan.py runs there too, with STATESCAN_TEST_DEVICE=cuda in the environment.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError, ShapeError
from statescan.ops import _cuda, selective_scan
from statescan.ops.selective_scan import cuda as backend
from statescan.testing import (
    REAL_CASES,
    SCAN_CASES,
    Derivatives,
    ScanCase,
    assert_within_budget,
    check_registration,
    derivatives,
    oracles,
    poisoned_memory,
    random_cotangents,
    recorded_calls,
)
from statescan.testing import scan_problem as problem_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

scan_problem = functools.partial(problem_on, device="cuda")
OUTPUTS = ("y", "final_state")
EVERY = {"D": True, "z": True, "dt_bias": True, "initial_state": True, "dt_softplus": True}

# Shapes that reach every path of the kernels: 16-byte and single accesses, whole and cut tiles and blocks of channels,
# every count of lanes a channel, one pass and chunks of time.
KERNEL_CASES = {
    "whole blocks": ScanCase(batch=2, length=64, d_inner=64, d_state=16, **EVERY),
    "whole blocks, cut tile": ScanCase(batch=2, length=77, d_inner=128, d_state=16, **EVERY),
    "cut block": ScanCase(batch=2, length=40, d_inner=72, d_state=16, **EVERY),
    "no gate, no softplus": ScanCase(batch=2, length=70, d_inner=64, d_state=16),
    "groups of whole blocks": ScanCase(batch=1, length=70, d_inner=128, d_state=16, B=2, C=2, **EVERY),
    "fixed B": ScanCase(batch=2, length=70, d_inner=64, d_state=16, B="fixed", **EVERY),
    "fixed C": ScanCase(batch=2, length=70, d_inner=64, d_state=16, C="fixed", **EVERY),
    "d_state 8": ScanCase(batch=2, length=45, d_inner=64, d_state=8, **EVERY),
    "d_state 17": ScanCase(batch=2, length=45, d_inner=40, d_state=17, **EVERY),
    "d_state 32": ScanCase(batch=2, length=45, d_inner=64, d_state=32, **EVERY),
    "d_state 64": ScanCase(batch=2, length=45, d_inner=32, d_state=64, **EVERY),
    "d_state 100": ScanCase(batch=1, length=37, d_inner=33, d_state=100, **EVERY),
    "d_state 128": ScanCase(batch=1, length=37, d_inner=33, d_state=128, **EVERY),
    "chunks": ScanCase(batch=1, length=1500, d_inner=64, d_state=16, **EVERY),
    "chunks, packed": ScanCase(
        batch=1, length=1500, d_inner=64, d_state=16, cu_seqlens=(0, 5, 5, 700, 701, 1024, 1500), **EVERY
    ),
    "packed on tile ends": ScanCase(
        batch=1, length=128, d_inner=64, d_state=16, cu_seqlens=(0, 32, 64, 96, 128), **EVERY
    ),
}
CASES = {**REAL_CASES, **KERNEL_CASES}


def running(name: str = "cuda") -> Callable[..., tuple[Tensor, Tensor | None]]:
    return functools.partial(selective_scan, return_final_state=True, backend=name)


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The sequential reference is slow; where it would take thousands of steps the parallel PyTorch scan stands in.
def same_precision(case: ScanCase) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return running("reference" if case.length <= 256 else "torch")


def truth_of(problem: dict[str, Any], case: ScanCase, cotangents: dict[str, Tensor]) -> Derivatives:
    oracle = oracles.selective_scan if case.length <= 256 else running("torch")
    return derivatives(oracle, problem, cotangents=cotangents, exact=True)


def hold_to_budget(run: Callable[..., Any], case: ScanCase, dtype: torch.dtype) -> None:
    columns: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
    for seed in range(case.draws()):
        problem = scan_problem(case, dtype, seed=seed)
        reference = derivatives(same_precision(case), problem, seed=seed)
        cotangents = random_cotangents({name: reference[name] for name in OUTPUTS}, seed)
        truth = truth_of(problem, case, cotangents)
        reference = derivatives(same_precision(case), problem, cotangents=cotangents)
        aim = truth
        if dtype == torch.float64:  # its rounding errors are judged by the reference's in float32
            single = scan_problem(case, torch.float32, seed=seed)
            reference = derivatives(same_precision(case), single, seed=seed)
            short = random_cotangents({name: reference[name] for name in OUTPUTS}, seed)
            aim = truth_of(single, case, short)
            reference = derivatives(same_precision(case), single, cotangents=short)
        actual = derivatives(run, problem, cotangents=cotangents)
        for name in truth:
            columns.setdefault(name, []).append((actual[name], truth[name], reference[name], aim[name]))
    for name, rows in columns.items():
        actual, truth, reference, aim = ([row[i] for row in rows] for i in range(4))
        assert_within_budget(actual, truth, reference, name, reference_truth=aim if dtype == torch.float64 else None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("name", CASES)
def test_within_budget(name: str, dtype: torch.dtype) -> None:
    hold_to_budget(running(), CASES[name], dtype)


@pytest.fixture
def plans_anew() -> Iterator[None]:
    """Plans are kept by shape: none from before the test's own thresholds, and none of its own afterwards."""
    backend.plan.cache_clear()
    yield
    backend.plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize(
    "name",
    ["smallest", "every option", "d_state 5", "d_state 8", "fixed B and C", "packed, empty ones", "large steps",
     "whole blocks, cut tile", "cut block", "groups of whole blocks", "chunks", "chunks, packed"],
)  # fmt: skip
@pytest.mark.usefixtures("plans_anew")
def test_two_lanes_a_channel(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward's form for calls that fill the chip twice over, here made to run small ones."""
    monkeypatch.setattr(backend, "_BLOCKS_FOR_TWO_LANES", 0)
    assert backend.plan(1, 1, 8, 16, 1, 132, False, False).lanes_forward == 2
    hold_to_budget(running(), CASES[name], dtype)


# Shapes whose blocks of the backward come in twos, in the form that models use.
HALVES_CASES = {
    "one tile": ScanCase(batch=2, length=20, d_inner=128, d_state=16, **EVERY),
    "whole tiles": ScanCase(batch=2, length=64, d_inner=256, d_state=16, **EVERY),
    "cut tile": ScanCase(batch=2, length=77, d_inner=128, d_state=16, **EVERY),
    "six tiles": ScanCase(batch=3, length=161, d_inner=384, d_state=16, z=True),
    "groups": ScanCase(batch=2, length=70, d_inner=512, d_state=16, B=2, C=1, **EVERY),
    "d_state 8": ScanCase(batch=2, length=97, d_inner=128, d_state=8, **EVERY),
    "chunks": ScanCase(batch=1, length=1500, d_inner=128, d_state=16, **EVERY),
}


@pytest.fixture
def launched_halves(plans_anew: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In how many halves the blocks of each backward were."""
    launched: list[int] = []
    kernel = _cuda.kernel

    def noted(file: Path, name: str, options: dict[str, int], threads: int, *rest: Any) -> _cuda.Kernel:
        if name == "scan_backward" and not options["PASS"]:
            launched.append(options["HALVES"])
            assert threads == options["HALVES"] * options["NT"]
        return kernel(file, name, options, threads, *rest)

    monkeypatch.setattr(_cuda, "kernel", noted)
    return launched


@pytest.fixture
def blocks_in_twos(launched_halves: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two blocks of the backward are one wherever that is possible, not only where they fill the chip."""
    monkeypatch.setattr(backend, "_in_twos", lambda blocks, multiprocessors: True)
    return launched_halves


def room_for_halves() -> bool:
    chip = torch.cuda.get_device_properties(0)
    return backend.plan(1, 64, 128, 16, 1, 1, False, False, False, *backend._room(chip)).halves


@pytest.mark.parametrize("name", HALVES_CASES)
def test_two_blocks_as_halves_of_one(name: str, blocks_in_twos: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the budget, the same bits every time, and but for the order in which dB and dC are added up, those of
    blocks by themselves."""
    if not room_for_halves():
        pytest.skip("a multiprocessor has no room for two blocks of this form")
    hold_to_budget(running(), HALVES_CASES[name], torch.bfloat16)
    problem = scan_problem(HALVES_CASES[name], torch.bfloat16)
    with poisoned_memory():
        first = derivatives(running(), problem)
    for _ in range(5):
        again = derivatives(running(), problem)
        for key, value in first.items():
            assert torch.equal(value, again[key]), key
    assert set(blocks_in_twos) == {2}
    monkeypatch.setattr(backend, "_in_twos", lambda blocks, multiprocessors: False)
    backend.plan.cache_clear()
    apart = derivatives(running(), problem)
    assert blocks_in_twos[-1] == 1
    for key, value in first.items():
        if key not in ("d B", "d C"):
            assert torch.equal(value, apart[key]), key


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("blocks_in_twos")
def test_other_forms_where_blocks_may_be_halves(name: str) -> None:
    hold_to_budget(running(), CASES[name], torch.bfloat16)


def test_halves_write_the_output_again(blocks_in_twos: list[int]) -> None:
    if not room_for_halves():
        pytest.skip("a multiprocessor has no room for two blocks of this form")
    problem = scan_problem(HALVES_CASES["cut tile"], torch.bfloat16)
    out, _, checkpoints = backend.launch_forward(**problem)
    y, dy = torch.full_like(out, float("nan")), torch.randn_like(out)
    with_y = backend.launch_backward(**problem, dy=dy, checkpoints=checkpoints, y=y)
    without = backend.launch_backward(**problem, dy=dy, checkpoints=checkpoints)
    assert blocks_in_twos == [2, 2]
    torch.testing.assert_close(y, out, rtol=2**-7, atol=2**-7)
    for a, b in zip(with_y, without, strict=True):
        assert torch.equal(a, b)


def test_halves_where_the_chip_is_full(launched_halves: list[int]) -> None:
    """Many blocks at once, as models have them, and nothing forced."""
    if not room_for_halves():
        pytest.skip("a multiprocessor has no room for two blocks of this form")
    chip = torch.cuda.get_device_properties(0)
    count = chip.multi_processor_count
    case = ScanCase(batch=count, length=100, d_inner=128, d_state=16, **EVERY)
    sizes = (case.batch, case.length, case.d_inner, case.d_state, 1, count, False, False, False)
    assert backend.plan(*sizes, *backend._room(chip)).halves
    problem = scan_problem(case, torch.bfloat16)
    reference = derivatives(running("torch"), problem)
    cotangents = random_cotangents({name: reference[name] for name in OUTPUTS}, 1)
    truth = derivatives(running("torch"), problem, cotangents=cotangents, exact=True)
    reference = derivatives(running("torch"), problem, cotangents=cotangents)
    first = derivatives(running(), problem, cotangents=cotangents)
    assert set(launched_halves) == {2}
    for name in truth:
        assert_within_budget(first[name], truth[name], reference[name], name)
    for _ in range(3):
        again = derivatives(running(), problem, cotangents=cotangents)
        for key, value in first.items():
            assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.usefixtures("plans_anew")
def test_chunks_in_pieces(lanes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward's first pass with every chunk but the last in pieces, as long rows have it, here of a short one."""
    monkeypatch.setattr(backend, "_LONG_FORWARD", 64)
    monkeypatch.setattr(backend, "_BLOCKS_FOR_TWO_LANES", 0 if lanes == 2 else 10**6)
    chip = torch.cuda.get_device_properties(0).multi_processor_count
    cut = backend.plan(2, 1500, 64, 16, 1, chip, False, False)
    assert (cut.lanes_forward, cut.pieces_forward) == (lanes, 3)
    assert cut.chunks_forward > 2
    hold_to_budget(running(), ScanCase(batch=2, length=1500, d_inner=64, d_state=16, **EVERY), dtype)


def test_256_states() -> None:
    hold_to_budget(running(), ScanCase(batch=1, length=37, d_inner=33, d_state=256, **EVERY), torch.float32)
    with pytest.raises(BackendUnavailableError, match="d_state is 257; use backend='torch'"):
        running()(**scan_problem(ScanCase(d_state=257), torch.float32))
    with pytest.raises(BackendUnavailableError, match="up to 128 states"):
        running()(**scan_problem(ScanCase(d_state=129), torch.float64))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257])
def test_lengths_around_tiles(length: int) -> None:
    hold_to_budget(running(), ScanCase(batch=1, length=length, d_inner=64, d_state=16, **EVERY), torch.float32)


def test_long_sums_stay_within_budget() -> None:
    case = ScanCase(batch=2, length=4000, d_inner=64, d_state=16, D=True, z=True, dt_bias=True, dt_softplus=True)
    hold_to_budget(running(), case, torch.float32)


def test_a_step_of_zero_changes_nothing() -> None:
    problem = scan_problem(ScanCase(d_inner=64, d_state=16, length=40, initial_state=True), torch.float32)
    problem["dt"] = torch.zeros_like(problem["dt"])
    assert torch.equal(running()(**problem)[1], problem["initial_state"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize(
    "name", ["whole blocks, cut tile", "cut block", "chunks", "chunks, packed", "groups", "fixed B and C"]
)
def test_runs_are_bit_equal(name: str, dtype: torch.dtype) -> None:
    """Always the same bits, whatever stood in the memory that outputs and workspaces were given."""
    problem = scan_problem(CASES[name], dtype)
    first = derivatives(running(), problem)
    with poisoned_memory():
        poisoned = derivatives(running(), problem)
    for key, value in first.items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(value, poisoned[key]), key
    for _ in range(5):
        again = derivatives(running(), problem)
        for key, value in first.items():
            assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize(("length", "d_inner"), [(70, 64), (1500, 72), (2048, 64)])
def test_batch_invariant(length: int, d_inner: int, dtype: torch.dtype) -> None:
    """A row's own results have the same bits alone and among others."""
    own = ("u", "dt", "B", "C", "z", "initial_state")
    problem = scan_problem(ScanCase(batch=5, length=length, d_inner=d_inner, d_state=16, **EVERY), dtype)
    cotangent = torch.randn(problem["u"].shape, device="cuda").to(dtype)

    def results(first: int, last: int) -> list[Tensor]:
        leaves = {k: problem[k][first:last].detach().clone().requires_grad_() for k in own}
        y, state = running()(**{**problem, **leaves}, batch_invariant=True)
        assert state is not None
        loss = (y * cotangent[first:last]).float().sum() + state.sum()
        return [y.detach(), state.detach(), *torch.autograd.grad(loss, list(leaves.values()))]

    together = results(0, 5)
    for first, last in ((0, 1), (3, 4), (1, 5)):
        for a, b in zip(together, results(first, last), strict=True):
            assert torch.equal(a[first:last], b)


def test_batch_invariant_where_the_plan_would_differ() -> None:
    """Among 400 rows the plan takes two lanes a channel and one pass, for a row alone chunks: but not when asked."""
    wide = (16, 1, 132, False, False)
    assert backend.plan(1, 2048, 64, *wide) != backend.plan(400, 2048, 64, *wide)
    assert backend.plan(1, 2048, 64, *wide, True) == backend.plan(400, 2048, 64, *wide, True)
    problem = scan_problem(ScanCase(batch=400, length=1100, d_inner=64, d_state=16, dt_softplus=True), torch.bfloat16)
    alone = {k: v[7:8].contiguous() if k in ("u", "dt", "B", "C") else v for k, v in problem.items()}
    with torch.no_grad():
        assert torch.equal(
            running()(**problem, batch_invariant=True)[0][7:8], running()(**alone, batch_invariant=True)[0]
        )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30], ids=str)
def test_packed_never_leaks(poison: float) -> None:
    """Whatever stands in a neighbour of the row, across tiles and chunks, a sequence's results keep their bits."""
    case = ScanCase(batch=1, length=1500, d_inner=64, d_state=16, cu_seqlens=(0, 300, 1100, 1500), **EVERY)
    clean = scan_problem(case, torch.float32)
    dirty = {key: value.clone() if isinstance(value, Tensor) else value for key, value in clean.items()}
    for key in ("u", "dt", "B", "C", "z"):
        dirty[key][:, :300] = poison
        dirty[key][:, 1100:] = poison
    dirty["initial_state"][[0, 2]] = poison

    def middle(**problem: Any) -> tuple[Tensor, Tensor]:
        y, final_state = running()(**problem)
        assert final_state is not None
        return y[:, 300:1100], final_state[1]

    results = [derivatives(middle, problem) for problem in (clean, dirty)]
    for key in OUTPUTS:
        assert torch.equal(results[0][key], results[1][key]), key
    for key in ("d u", "d dt", "d B", "d C", "d z"):
        assert torch.equal(results[0][key][:, 300:1100], results[1][key][:, 300:1100]), key
    assert torch.equal(results[0]["d initial_state"][1], results[1]["d initial_state"][1])


def test_infinite_and_missing_steps() -> None:
    """softplus at both ends: -inf is no step at all, NaN stays NaN in its own channel."""
    problem = scan_problem(ScanCase(batch=1, length=8, d_inner=64, d_state=16, dt_softplus=True, initial_state=True),
                           torch.float32)  # fmt: skip
    problem["dt"][..., 0] = float("-inf")
    problem["dt"][:, 3, 1] = float("nan")
    y, state = running()(**problem)
    assert state is not None
    assert torch.equal(state[:, 0], problem["initial_state"][:, 0])
    assert y[:, 3:, 1].isnan().all()
    assert y[:, :3].isfinite().all()
    assert y[:, :, 2:].isfinite().all()


@pytest.mark.parametrize("how", ["every other", "time first", "unaligned"])
def test_strided_inputs(how: str) -> None:
    def strided(value: Tensor) -> Tensor:
        if how == "every other":
            return torch.repeat_interleave(value, 2, dim=-1)[..., ::2]
        if how == "time first":
            return value.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.cat([value[..., :1], value, value[..., :2]], dim=-1)[..., 1:-2]

    def run(**problem: Any) -> Any:
        return running()(**{k: strided(v) if k in ("u", "dt", "z", "B", "C") else v for k, v in problem.items()})

    hold_to_budget(run, CASES["whole blocks, cut tile"], torch.float32)
    hold_to_budget(run, CASES["whole blocks, cut tile"], torch.bfloat16)


@pytest.mark.parametrize("name", ["whole blocks, cut tile", "cut block", "chunks"])
def test_launches_write_into_slices(name: str) -> None:
    """u and z from two halves, output and gradients written into slices: the same bits, nothing beside."""
    problem = scan_problem(CASES[name], torch.bfloat16)
    wide = torch.cat([problem.pop("u"), problem.pop("z")], dim=-1)
    u, z = wide.chunk(2, dim=-1)
    d_inner = u.shape[-1]
    y, _, checkpoints = backend.launch_forward(u.contiguous(), z=z.contiguous(), **problem)
    dy = torch.randn(y.shape, device="cuda").to(y.dtype)
    plain = backend.launch_backward(u.contiguous(), z=z.contiguous(), **problem, dy=dy, checkpoints=checkpoints)
    for pad in (0, 8, 3):
        room = torch.full((*y.shape[:2], 4 * d_inner + pad), 7.0, device="cuda", dtype=y.dtype)
        parts = [room[..., pad + i * d_inner : pad + (i + 1) * d_inner] for i in range(4)]
        got, _, kept = backend.launch_forward(u, z=z, **problem, y=parts[3])
        assert got.data_ptr() == parts[3].data_ptr()
        assert torch.equal(parts[3], y)
        into = dict(zip(("du", "dz", "ddt"), parts, strict=False))
        sliced = backend.launch_backward(u, z=z, **problem, dy=dy, checkpoints=kept, **into)
        for a, b in zip(plain, sliced, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(parts[1], plain[6])
        assert (room[..., :pad] == 7).all()
    with pytest.raises(ShapeError, match="selective_scan: du must be"):
        backend.launch_backward(u, z=z, **problem, dy=dy, checkpoints=kept, du=parts[0][:, :-1])


@pytest.mark.parametrize(
    "name", ["no options", "every option", "whole blocks", "groups", "fixed B and C", "packed, empty ones"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_registration(name: str, dtype: torch.dtype) -> None:
    problem = scan_problem(CASES[name], dtype)
    with recorded_calls() as calls:
        derivatives(running(), problem)
    assert {str(func).split(".")[1] for func, _, _ in calls} >= {"selective_scan_cuda", "selective_scan_cuda_backward"}
    check_registration(calls)


@pytest.mark.parametrize("name", ["every option", "whole blocks", "packed, no state"])
def test_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    problem = scan_problem(CASES[name], torch.float32)
    eager = derivatives(running(), problem)
    traced = derivatives(torch.compile(running(), fullgraph=True), problem)
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_graph_capture() -> None:
    """Forward and backward replay from a CUDA graph with the same bits."""
    problem = scan_problem(CASES["whole blocks"], torch.bfloat16)

    def step() -> list[Tensor]:
        leaves = {k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in problem.items()}
        y = selective_scan(**leaves, backend="cuda").y
        return [y, *torch.autograd.grad(y.float().sum(), [v for v in leaves.values() if isinstance(v, Tensor)])]

    eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(eager, captured, strict=True):
        assert torch.equal(a, b)


@pytest.mark.large
@pytest.mark.parametrize(("batch", "gated", "memory"), [(1, False, 60e9), (1, True, 75e9), (3, True, 120e9)])
def test_offsets_above_2_31(batch: int, gated: bool, memory: float) -> None:
    """A row of 2.2 billion numbers, or one that begins behind 2.1 billion: its last steps are those of the same steps
    run alone from the state before them, with a gate and a gradient into the final state, too."""
    d_inner, d_state, tail = 2048, 16, 512
    length = 2**31 // (d_inner * max(batch - 1, 1)) + 3 * tail
    if torch.cuda.get_device_properties(0).total_memory < memory:
        pytest.skip(f"wants {memory / 1e9:.0f} GB of device memory")
    generator = torch.Generator("cuda").manual_seed(0)
    big = functools.partial(torch.randn, generator=generator, device="cuda", dtype=torch.bfloat16)
    u = big(batch, length, d_inner)
    dt = big(batch, length, d_inner).sub_(3)
    z = big(batch, length, d_inner) if gated else None
    B, C = big(batch, length, d_state), big(batch, length, d_state)
    A = -torch.rand(d_inner, d_state, generator=generator, device="cuda") - 0.1
    D, bias = (torch.randn(d_inner, generator=generator, device="cuda") for _ in range(2))
    cut = length - tail
    with torch.no_grad():
        before = selective_scan(u[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], dt_bias=bias, dt_softplus=True,
                                return_final_state=True, backend="cuda").final_state  # fmt: skip
    whole = {"u": u, "dt": dt, "B": B, "C": C} | ({} if z is None else {"z": z})
    leaves = {name: value.requires_grad_() for name, value in whole.items()}
    y, final_state = running()(**whole, A=A, D=D, dt_bias=bias, dt_softplus=True)
    assert final_state is not None
    # only the last row's last steps are asked about, so only they send a gradient
    dy, dfinal = torch.zeros_like(y), torch.zeros_like(final_state)
    dy[-1:, cut:] = big(1, tail, d_inner)
    if gated:
        dfinal[-1:] = torch.randn(1, d_inner, d_state, generator=generator, device="cuda")
    gradients = torch.autograd.grad([y, final_state], list(leaves.values()), [dy, dfinal])
    got = {"y": y[-1:, cut:].detach(), "final_state": final_state[-1:].detach()}
    got |= {f"d {name}": value[-1:, cut:] for name, value in zip(leaves, gradients, strict=True)}
    got = {name: value.clone() for name, value in got.items()}
    alone = {name: value[-1:, cut:].detach().clone() for name, value in leaves.items()}
    alone |= {"A": A, "D": D, "dt_bias": bias, "initial_state": before[-1:], "dt_softplus": True}
    cotangents = {"y": dy[-1:, cut:].clone(), "final_state": dfinal[-1:].clone()}
    del y, dy, final_state, dfinal, gradients, whole, leaves, u, dt, z, B, C
    torch.cuda.empty_cache()
    truth = derivatives(running("torch"), alone, cotangents=cotangents, exact=True)
    reference = derivatives(running("torch"), alone, cotangents=cotangents)
    for name, value in got.items():
        assert_within_budget(value, truth[name], reference[name], name)


# ------------------------------------------------------------------------------------------------ compiled at first use


def test_plan_is_the_same_for_checkpoints() -> None:
    """The spacing of checkpoints, which the fake kernel tells the compiler, depends on no size but d_state."""
    for n in range(1, 257):
        for wide in (False, True):
            if wide and n > 128:
                continue
            for packed in (False, True):
                shapes = ((1, 1, 8, 1, 1), (8, 2048, 2048, 1, 132), (1, 65536, 1536, 3, 80))
                tiles = {backend.plan(b, l, d, n, g, m, wide, packed).tile for b, l, d, g, m in shapes}
                assert len(tiles) == 1


def test_processes_that_start_together(tmp_path: Path) -> None:
    """Three processes compile into one empty cache; a fourth finds whole files and compiles nothing."""
    program = (
        "import torch; from statescan.ops import selective_scan, _cuda\n"
        "x = torch.ones(1, 9, 64, device='cuda', dtype=torch.bfloat16); b = x[..., :16].clone()\n"
        "y = selective_scan(x, x, -torch.ones(64, 16, device='cuda'), b, b, backend='cuda').y\n"
        "print(float(y.float().sum()), len(list(_cuda.cache_folder().iterdir())))\n"
    )
    environment = {**os.environ, "STATESCAN_CACHE": str(tmp_path)}
    start = functools.partial(subprocess.Popen, [sys.executable, "-c", program], env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    together = [start() for _ in range(3)]
    lines = [process.communicate(timeout=300) for process in together]
    assert all(process.returncode == 0 for process in together), lines
    fourth = start()
    out, _ = fourth.communicate(timeout=300)
    files = sorted((tmp_path / "kernels").iterdir())
    assert all(file.suffix == ".cubin" for file in files)
    assert int(out.split()[1]) == len(files)
    assert len({line.split()[0] for line, _ in lines} | {out.split()[0]}) == 1


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("STATESCAN_CACHE", str(blocked))
    major, minor = torch.cuda.get_device_capability()
    with pytest.warns(UserWarning, match="set STATESCAN_CACHE to a folder that can be written"):
        assert _cuda._cached('extern "C" __global__ void f() {}', (), f"sm_{major}{minor}")


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path))
    with pytest.raises(BackendUnavailableError, match=r"did not compile for sm_.* with IN=1: .*use backend='torch'"):
        _cuda._cached("no such code", ("IN=1",), "sm_80")
    assert not list(tmp_path.rglob("*.cubin"))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler: `auto` goes on with one warning that names cause and cure, a named backend raises."""
    x = torch.ones(1, 4, 8, device="cuda")
    b = torch.ones(1, 4, 2, device="cuda")
    arguments = (x, x, -torch.ones(8, 2, device="cuda"), b, b)

    def missing() -> Any:
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(_cuda, "_core", missing)
    _cuda.unavailable_reason.cache_clear()
    try:
        with pytest.warns(UserWarning, match="not used: cuda-core does not import .*pip install 'cuda-core") as caught:
            selective_scan(*arguments)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            selective_scan(*arguments)
        with pytest.raises(BackendUnavailableError, match="pip install 'cuda-core"):
            selective_scan(*arguments, backend="cuda")
    finally:
        _cuda.unavailable_reason.cache_clear()


def test_an_old_architecture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "compute capability 8.0" in str(_cuda._probe())


def test_cases_are_held_elsewhere_too() -> None:
    """Nothing of the shared contract is left out here but complex A, which the backend refuses."""
    assert set(SCAN_CASES) - set(CASES) == {name for name, case in SCAN_CASES.items() if case.complex_A}
