"""The contract of `selective_state_update` on the `cuda` backend, plus what only its kernel shows: all counts of lanes,
cut fours, strided and very large states.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError
from statescan.ops import explain, selective_scan, selective_state_update
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
    scan_problem,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

OUTPUTS = ("y", "state")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EVERY = {"D": True, "z": True, "dt_bias": True, "initial_state": True, "dt_softplus": True}
CASES = {
    **{
        name: dataclasses.replace(case, batch=1 if name == "smallest" else 16)
        for name, case in REAL_CASES.items()
        if case.cu_seqlens is None
    },
    **{
        f"d_state {n}": ScanCase(batch=4, d_inner=48, d_state=n, **EVERY)
        for n in (1, 2, 3, 4, 7, 12, 16, 17, 33, 64, 100, 128)
    },
    "groups in fours": ScanCase(batch=4, d_inner=64, d_state=16, B=2, C=4, **EVERY),
    "fixed in fours": ScanCase(batch=4, d_inner=64, d_state=16, B="fixed", C="fixed", **EVERY),
    "cut block": ScanCase(batch=3, d_inner=67, d_state=16, **EVERY),
}


def running(name: str = "cuda") -> Callable[..., tuple[Tensor, Tensor]]:
    return functools.partial(selective_state_update, backend=name)


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem_of(case: ScanCase, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    return as_update(scan_problem(case, dtype, seed=seed, device="cuda"))


def hold_to_budget(run: Callable[..., Any], case: ScanCase, dtype: torch.dtype) -> None:
    draws = []
    for seed in range(case.draws(length=1)):
        problem = problem_of(case, dtype, seed)
        own = problem if dtype != torch.float64 else problem_of(case, torch.float32, seed)
        reference = derivatives(running("reference"), own, OUTPUTS, seed=seed)
        cotangents = random_cotangents({name: reference[name] for name in OUTPUTS}, seed)
        truth, aim = (
            derivatives(oracles.selective_state_update, given, OUTPUTS, cotangents=cotangents, exact=True)
            for given in (problem, own)
        )
        actual = derivatives(run, problem, OUTPUTS, cotangents=cotangents)
        with torch.no_grad():  # the kernel itself; gradients are the scan's
            y, state = run(**problem)
        draws.append(({**actual, "y of the step": y, "state of the step": state}, truth, reference, aim))
    for name in draws[0][0]:
        key = name.removesuffix(" of the step")
        actual = [draw[0][name] for draw in draws]
        truth, reference, aim = ([draw[i][key] for draw in draws] for i in (1, 2, 3))
        assert_within_budget(actual, truth, reference, name, reference_truth=aim if dtype == torch.float64 else None)


def test_auto_takes_it() -> None:
    assert explain("selective_state_update", device="cuda").backend == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("name", CASES)
def test_within_budget(name: str, dtype: torch.dtype) -> None:
    with poisoned_memory():
        hold_to_budget(running(), CASES[name], dtype)


def test_256_states() -> None:
    hold_to_budget(running(), ScanCase(batch=2, d_inner=33, d_state=256, **EVERY), torch.float32)
    with pytest.raises(BackendUnavailableError, match="d_state is 257; use backend='torch'"):
        running()(**problem_of(ScanCase(batch=1, d_state=257), torch.float32))
    with pytest.raises(BackendUnavailableError, match="up to 128 states"):
        running()(**problem_of(ScanCase(batch=1, d_state=129), torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_steps_are_the_scan(inplace: bool, dtype: torch.dtype) -> None:
    """Step after step gives the scan's outputs and final state, within the budget of the scan's own truth."""
    for name in ("every option", "groups", "fixed C"):
        whole = scan_problem(REAL_CASES[name], dtype, device="cuda")
        state = whole["initial_state"].clone()
        given, outputs = state, []
        for t in range(REAL_CASES[name].length):
            step = {**as_update(whole, t), "state": state}
            y, state = selective_state_update(**step, inplace=inplace, backend="cuda")
            outputs.append(y)
        assert (state is given) == inplace
        truth = aim = oracles.selective_scan(**whole)
        if dtype == torch.float64:
            whole = scan_problem(REAL_CASES[name], torch.float32, device="cuda")
            aim = oracles.selective_scan(**whole)
        reference = selective_scan(**whole, return_final_state=True, backend="reference")
        for i, (key, got) in enumerate((("y", torch.stack(outputs, dim=1)), ("final_state", state))):
            own = reference[i]
            assert own is not None
            assert_within_budget(got, truth[i], own, key, reference_truth=aim[i] if dtype == torch.float64 else None)


@pytest.mark.parametrize(
    "name", ["every option", "no options", "groups", "different groups", "fixed B and C", "cut block"]
)
def test_inplace_gives_the_same_and_changes_only_the_state(name: str) -> None:
    for turned in (False, True):
        problem = problem_of(CASES[name], torch.float32)
        if turned:
            problem["state"] = problem["state"].transpose(1, 2).contiguous().transpose(1, 2)
        before = {key: value.clone() for key, value in problem.items() if isinstance(value, Tensor)}
        wanted = running()(**problem)
        for key, value in before.items():
            assert torch.equal(problem[key], value), key
        got = selective_state_update(**problem, inplace=True, backend="cuda")
        assert got.state is problem["state"]
        for key, value in before.items():
            assert torch.equal(problem[key], wanted[1] if key == "state" else value), key
        assert torch.equal(got.y, wanted[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_rows_do_not_depend_on_their_batch_and_runs_are_bit_equal(dtype: torch.dtype) -> None:
    problem = problem_of(CASES["cut block"], dtype)
    together, again = running()(**problem), running()(**problem)
    for one, two in zip(together, again, strict=True):
        assert torch.equal(one, two)
    for row in range(3):
        rows = ("state", "u", "dt", "B", "C", "z")
        alone = running()(**{k: v[row : row + 1] if k in rows else v for k, v in problem.items()})
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one, all_rows[row : row + 1])


def test_strided_inputs() -> None:
    def spread(value: Tensor) -> Tensor:
        wide = value.new_full((*value.shape[:-1], 2 * value.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = value
        return wide[..., 1::2]

    def shifted(value: Tensor) -> Tensor:
        return torch.cat([value[..., :1], value, value[..., :2]], dim=-1)[..., 1:-2]

    for change in (spread, shifted):

        def run(change: Any = change, **problem: Any) -> Any:
            return running()(**{k: change(v) if isinstance(v, Tensor) else v for k, v in problem.items()})

        for name in ("every option", "groups in fours", "fixed in fours"):
            hold_to_budget(run, CASES[name], torch.float32)
            hold_to_budget(run, CASES[name], torch.bfloat16)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("name", ["no options", "every option", "groups", "fixed B and C"])
def test_registration(name: str, inplace: bool) -> None:
    problem = problem_of(CASES[name], torch.float32)
    with recorded_calls() as calls:
        selective_state_update(**problem, inplace=inplace, backend="cuda")
    assert [str(call[0]).split(".")[1].removesuffix("_inplace") for call in calls] == ["selective_state_update_cuda"]
    check_registration(calls)


@pytest.mark.parametrize("name", ["every option", "groups", "fixed B and C"])
def test_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    problem = problem_of(CASES[name], torch.float32)
    eager = derivatives(running(), problem, OUTPUTS)
    traced = derivatives(torch.compile(running(), fullgraph=True), problem, OUTPUTS)
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value)
    wanted = running()(**problem)
    inplace = functools.partial(selective_state_update, inplace=True, backend="cuda")
    y, _ = torch.compile(inplace, fullgraph=True)(**problem)
    torch.testing.assert_close(y, wanted[0])
    torch.testing.assert_close(problem["state"], wanted[1])


def test_graph_capture() -> None:
    problem = problem_of(CASES["groups in fours"], torch.bfloat16)
    start = problem["state"].clone()
    wanted = running()(**problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = selective_state_update(**problem, inplace=True, backend="cuda")
    problem["state"].copy_(start)
    graph.replay()
    torch.testing.assert_close(y, wanted[0], rtol=0, atol=0)
    assert torch.equal(problem["state"], wanted[1])


@pytest.mark.large
def test_offsets_above_2_31() -> None:
    batch, d_inner, d_state = 2100, 4096, 256
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("takes 10 GB of device memory")
    state = torch.randn(batch, d_inner, d_state, device="cuda")
    u, dt = (torch.randn(batch, d_inner, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    B, C = (torch.randn(batch, d_state, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    A = -torch.rand(d_inner, d_state, device="cuda")
    alone = running()(state[-3:].clone(), u[-3:], dt[-3:], A, B[-3:], C[-3:], dt_softplus=True)
    y, state = selective_state_update(state, u, dt, A, B, C, dt_softplus=True, inplace=True, backend="cuda")
    assert torch.equal(y[-3:], alone[0])
    assert torch.equal(state[-3:], alone[1])
