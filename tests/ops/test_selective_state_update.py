"""The contract of `selective_state_update`: every backend, every shape and option, forward and every gradient."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.errors import ConfigError, DTypeError, ShapeError, StatescanError
from statescan.ops import selective_scan, selective_state_update
from statescan.ops._dispatch import BACKENDS
from statescan.testing import (
    SCAN_CASES,
    Derivatives,
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

OP = "selective_state_update"
OUTPUTS = ("y", "state")
BACKEND_NAMES = list(BACKENDS[OP])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Many rows: the error budget needs tensors of many numbers, and one step has few.
CASES = {
    name: dataclasses.replace(case, batch=1 if name == "smallest" else 16)
    for name, case in SCAN_CASES.items()
    if case.cu_seqlens is None
}
EVERY_OPTION = CASES["every option"]
DEVICE = os.environ.get("STATESCAN_TEST_DEVICE", "cpu")


def problem_of(
    case: ScanCase, dtype: torch.dtype, seed: int = 0, parameters: torch.dtype | None = None
) -> dict[str, Any]:
    return as_update(scan_problem(case, dtype, seed=seed, device=DEVICE, parameters=parameters))


def running(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return functools.partial(selective_state_update, backend=backend)


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def truth_and_reference(
    case: ScanCase, dtype: torch.dtype, seed: int, parameters: torch.dtype | None = None
) -> tuple[dict[str, Tensor], Derivatives, Derivatives]:
    """(cotangents, float64 truth, the reference in the problem's own precision)."""
    problem = problem_of(case, dtype, seed, parameters)
    reference = derivatives(running("reference"), problem, OUTPUTS)
    cotangents = random_cotangents({name: reference[name] for name in OUTPUTS}, seed)
    reference = derivatives(running("reference"), problem, OUTPUTS, cotangents=cotangents)
    truth = derivatives(oracles.selective_state_update, problem, OUTPUTS, cotangents=cotangents, exact=True)
    return cotangents, truth, reference


def hold_to_budget(
    run: Callable[..., Any], case: ScanCase, dtype: torch.dtype, parameters: torch.dtype | None = None
) -> None:
    results = []
    for seed in range(case.draws(length=1)):
        cotangents, truth, reference = truth_and_reference(case, dtype, seed, parameters)
        actual = derivatives(run, problem_of(case, dtype, seed, parameters), OUTPUTS, cotangents=cotangents)
        aim = truth
        if dtype == torch.float64:  # its rounding errors are judged by the reference's in float32
            _, aim, reference = truth_and_reference(case, torch.float32, seed)
        results.append((actual, truth, reference, aim))
    for name in results[0][1]:
        actual, truth, reference, aim = ([draw[name] for draw in column] for column in zip(*results, strict=True))
        aim = aim if dtype == torch.float64 else None
        assert_within_budget(actual, truth, reference, name, reference_truth=aim)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_truth(name: str) -> None:
    """In float64 the reference and the dense closed form agree to 1e-12, forward and every gradient."""
    for seed in range(CASES[name].draws(length=1)):
        _, truth, reference = truth_and_reference(CASES[name], torch.float64, seed)
        for key, value in truth.items():
            assert (reference[key] - value).norm() <= 1e-12 * value.norm(), key


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "case",
    [
        ScanCase(batch=2, d_inner=4, d_state=2, D=True, z=True, dt_bias=True, initial_state=True, dt_softplus=True),
        ScanCase(batch=2, d_inner=4, d_state=2, B=2, C=4, initial_state=True),
        ScanCase(batch=2, d_inner=4, d_state=2, B="fixed", C="fixed", initial_state=True),
        ScanCase(batch=2, d_inner=4, d_state=2, complex_A=True, complex_BC=True, z=True, initial_state=True),
        ScanCase(batch=2, d_inner=4, d_state=2, complex_A=True, B=2, initial_state=True),
    ],
    ids=["every option", "groups", "fixed", "complex", "complex A"],
)
def test_twice_differentiable(case: ScanCase, backend: str) -> None:
    problem = problem_of(case, torch.float64)
    wanted = {key: value.requires_grad_() for key, value in problem.items() if isinstance(value, Tensor)}

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return running(backend)(**{**problem, **dict(zip(wanted, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(wanted.values()))
    assert torch.autograd.gradgradcheck(function, tuple(wanted.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("name", CASES)
def test_within_budget(name: str, backend: str, dtype: torch.dtype, require_backend: Callable[..., None]) -> None:
    case = CASES[name]
    require_backend(OP, backend, dtype=dtype, complex_A=case.complex_A, d_state=case.d_state)
    hold_to_budget(running(backend), case, dtype)


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float16, torch.float64], ids=names)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_parameters_of_other_dtypes(
    backend: str, parameters: torch.dtype, require_backend: Callable[..., None]
) -> None:
    dtype = torch.float32 if parameters == torch.float64 else parameters
    require_backend(OP, backend, dtype=dtype)
    for name in ("every option", "fixed B and C"):
        hold_to_budget(running(backend), CASES[name], dtype, parameters)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_steps_are_the_scan(
    backend: str, inplace: bool, dtype: torch.dtype, require_backend: Callable[..., None]
) -> None:
    """Step after step gives the scan's outputs and final state, within the budget of the scan's own truth."""
    require_backend(OP, backend, dtype=dtype)
    for name in ("every option", "groups", "fixed C"):
        case = CASES[name]
        whole = scan_problem(case, dtype, device=DEVICE)
        state = whole["initial_state"].clone()
        given, outputs = state, []
        for t in range(case.length):
            step = {**as_update(whole, t), "state": state}
            y, state = selective_state_update(**step, inplace=inplace, backend=backend)
            outputs.append(y)
        assert (state is given) == inplace
        truth = aim = oracles.selective_scan(**whole)
        if dtype == torch.float64:
            whole = scan_problem(case, torch.float32, device=DEVICE)
            aim = oracles.selective_scan(**whole)
        reference = selective_scan(**whole, return_final_state=True, backend="reference")
        got = (torch.stack(outputs, dim=1), state)
        for i, name in enumerate(("y", "final_state")):
            own = reference[i]
            assert own is not None
            own_truth = aim[i] if dtype == torch.float64 else None
            assert_within_budget(got[i], truth[i], own, name, reference_truth=own_truth)


@pytest.mark.parametrize("name", ["every option", "no options", "groups", "different groups", "fixed B and C", "wide"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_inplace_gives_the_same_and_changes_only_the_state(
    backend: str, name: str, require_backend: Callable[..., None]
) -> None:
    require_backend(OP, backend)
    for contiguous in (True, False):
        problem = problem_of(CASES[name], torch.float32)
        if not contiguous:
            problem["state"] = problem["state"].transpose(1, 2).contiguous().transpose(1, 2)
        before = {key: value.clone() for key, value in problem.items() if isinstance(value, Tensor)}
        wanted = selective_state_update(**problem, backend=backend)
        for key, value in before.items():
            assert torch.equal(problem[key], value), key
        got = selective_state_update(**problem, inplace=True, backend=backend)
        assert got.state is problem["state"]
        for key, value in before.items():
            assert torch.equal(problem[key], wanted.state if key == "state" else value), key
        assert torch.equal(got.y, wanted.y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_rows_do_not_depend_on_their_batch(
    backend: str, dtype: torch.dtype, require_backend: Callable[..., None]
) -> None:
    """To the bit; d_inner as in the scan's test of the same name."""
    require_backend(OP, backend, dtype=dtype)
    d_inner = 32 if backend in ("torch", "reference") else 33
    case = ScanCase(batch=5, d_inner=d_inner, d_state=16, D=True, z=True, dt_bias=True, dt_softplus=True,
                    initial_state=True)  # fmt: skip
    problem = problem_of(case, dtype)
    together = running(backend)(**problem)
    for row in range(5):
        rows = ("state", "u", "dt", "B", "C", "z")
        alone = running(backend)(**{k: v[row : row + 1] if k in rows else v for k, v in problem.items()})
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one, all_rows[row : row + 1])


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_runs_are_bit_equal(backend: str, require_backend: Callable[..., None]) -> None:
    require_backend(OP, backend)
    for name in ("every option", "groups", "fixed B and C"):
        problem = problem_of(CASES[name], torch.float32)
        first = derivatives(running(backend), problem, OUTPUTS)
        second = derivatives(running(backend), problem, OUTPUTS)
        with poisoned_memory():
            poisoned = derivatives(running(backend), problem, OUTPUTS)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            other = derivatives(running(backend), problem, OUTPUTS)
        finally:
            torch.set_num_threads(threads)
        for key, value in first.items():
            assert torch.isfinite(value).all(), key
            for again in (second, poisoned, other):
                assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_strided_inputs(backend: str, require_backend: Callable[..., None]) -> None:
    """A position of a longer tensor, and every other feature of a wider one."""
    require_backend(OP, backend)

    def spread(value: Tensor) -> Tensor:
        wide = value.new_full((*value.shape[:-1], 2 * value.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = value
        return wide[..., 1::2]

    for name in ("every option", "groups", "fixed B and C"):

        def run(**problem: Any) -> Any:
            return running(backend)(**{k: spread(v) if isinstance(v, Tensor) else v for k, v in problem.items()})

        hold_to_budget(run, CASES[name], torch.float32)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_autocast_changes_nothing(backend: str, require_backend: Callable[..., None]) -> None:
    require_backend(OP, backend)
    problem = problem_of(CASES["groups"], torch.float32)
    plain = derivatives(running(backend), problem, OUTPUTS)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = derivatives(running(backend), problem, OUTPUTS)
    for key, value in plain.items():
        assert torch.equal(cast[key], value), key


@pytest.mark.parametrize("name", ["every option", "groups", "fixed B and C"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_compiles_as_one_graph(backend: str, name: str, require_backend: Callable[..., None]) -> None:
    require_backend(OP, backend)
    torch.compiler.reset()
    problem = problem_of(CASES[name], torch.float32)
    engine = "inductor" if backend == "cpu" else "aot_eager"
    compiled = torch.compile(running(backend), fullgraph=True, backend=engine)
    eager, traced = (derivatives(run, problem, OUTPUTS) for run in (running(backend), compiled))
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value)

    # in place: the state's own memory changes
    wanted = running(backend)(**problem)
    inplace = torch.compile(
        functools.partial(selective_state_update, inplace=True, backend=backend), fullgraph=True, backend=engine
    )
    y, _ = inplace(**problem)
    torch.testing.assert_close(y, wanted[0])
    torch.testing.assert_close(problem["state"], wanted[1])


class Update(torch.nn.Module):
    """A module around the op, for torch.export."""

    def __init__(self, backend: str, names: tuple[str, ...], dt_softplus: bool) -> None:
        super().__init__()
        self.backend, self.names, self.dt_softplus = backend, names, dt_softplus

    def forward(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = dict(zip(self.names, values, strict=True))
        return selective_state_update(**arguments, dt_softplus=self.dt_softplus, backend=self.backend)


@pytest.mark.parametrize("name", ["every option", "no options"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_exports(backend: str, name: str, require_backend: Callable[..., None]) -> None:
    require_backend(OP, backend)
    problem = problem_of(CASES[name], torch.float32)
    tensors = {key: value for key, value in problem.items() if isinstance(value, Tensor)}
    module = Update(backend, tuple(tensors), problem["dt_softplus"])
    exported = torch.export.export(module, tuple(tensors.values())).module()
    for got, wanted in zip(exported(*tensors.values()), module(*tensors.values()), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("name", ["no options", "every option", "groups", "fixed B and C"])
def test_registration_of_the_kernel(name: str, inplace: bool, require_backend: Callable[..., None]) -> None:
    """opcheck on every operator of this package that the cpu backend calls, forward, backward and in place."""
    require_backend(OP, "cpu")
    problem = problem_of(CASES[name], torch.float32)
    with recorded_calls() as calls:
        if inplace:
            selective_state_update(**problem, inplace=True, backend="cpu")
        else:
            derivatives(running("cpu"), problem, OUTPUTS)
    assert calls
    assert all(str(func).startswith("statescan.selective_") for func, _, _ in calls)
    check_registration(calls)


# ---------------------------------------------------------------------------------------------------------- bad input

SMALL = ScanCase(batch=2, d_inner=4, d_state=3, D=True, z=True, dt_bias=True, initial_state=True, dt_softplus=True)
zeros = torch.zeros
MESSAGES: dict[str, tuple[dict[str, Any], type[StatescanError], str]] = {
    "u of three dimensions": (
        {"u": zeros(2, 1, 4)},
        ShapeError,
        "u must have shape (batch, d_inner), each at least 1, got (2, 1, 4); "
        "pass one position, u[:, t], or call selective_scan for several",
    ),
    "u of integers": (
        {"u": zeros(2, 4, dtype=torch.int32)},
        DTypeError,
        "u must be float32, float64, bfloat16 or float16, got int32; pass u.to(torch.float32)",
    ),
    "dt of another size": (
        {"dt": zeros(2, 5)},
        ShapeError,
        "dt must have shape (batch, d_inner) = (2, 4), got (2, 5); give it u's shape",
    ),
    "z of another dtype": (
        {"z": zeros(2, 4, dtype=torch.float16)},
        DTypeError,
        "z must be float32 (the dtype of u), got float16; pass z.to(torch.float32)",
    ),
    "A transposed": (
        {"A": zeros(3, 4)},
        ShapeError,
        "A must have shape (d_inner, d_state) = (4, d_state >= 1), got (3, 4); pass A.transpose(-1, -2)",
    ),
    "B of another state size": (
        {"B": zeros(2, 5)},
        ShapeError,
        "B must have shape (2, 3), (2, groups, 3) or, the same at every position, (4, 3), got (2, 5); "
        "its last size is the d_state of A",
    ),
    "C with three groups for four channels": (
        {"C": zeros(2, 3, 3)},
        ShapeError,
        "C must have a number of groups that divides d_inner = 4, got 3 groups; "
        "pass (..., groups, d_state) with such a number",
    ),
    "D of another size": (
        {"D": zeros(3)},
        ShapeError,
        "D must have shape (d_inner,) = (4,), got (3,); give it a number for each channel of u",
    ),
    "state transposed": (
        {"state": zeros(2, 3, 4)},
        ShapeError,
        "state must have shape (batch, d_inner, d_state) = (2, 4, 3), got (2, 3, 4); pass state.transpose(-1, -2)",
    ),
    "no state": (
        {"state": None},
        DTypeError,
        "state must be a torch.Tensor, got NoneType; convert it with torch.as_tensor",
    ),
    "state in low precision": (
        {"state": zeros(2, 4, 3, dtype=torch.bfloat16)},
        DTypeError,
        "state must be float32 (the state's dtype for float32 inputs), got bfloat16; pass state.to(torch.float32)",
    ),
    "inplace under autograd": (
        {"inplace": True, "dt_bias": zeros(4, requires_grad=True)},
        ConfigError,
        "inplace=True is not differentiable: wanted no argument that requires a gradient, "
        "got dt_bias with requires_grad; call it under torch.no_grad(), or pass inplace=False",
    ),
    "unknown backend": (
        {"backend": "gpu"},
        ConfigError,
        f"backend must be one of {['auto', *BACKEND_NAMES]}, got 'gpu'",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name: str) -> None:
    change, error, text = MESSAGES[name]
    with pytest.raises(error) as raised:
        selective_state_update(**{**as_update(scan_problem(SMALL, torch.float32)), **change})
    assert str(raised.value) == f"{OP}: {text}"


def test_two_dimensions_are_a_row_each_where_batch_equals_channels() -> None:
    """(batch, d_state) and the fixed (d_inner, d_state) look alike there; the documented reading is by row."""
    case = ScanCase(batch=4, d_inner=4, d_state=3)
    problem = problem_of(case, torch.float64)
    y, _ = selective_state_update(**problem, backend="reference")
    by_row = selective_state_update(**{**problem, "B": problem["B"].unsqueeze(1)}, backend="reference")
    assert torch.equal(y, by_row.y)
    fixed = {**problem, "B": problem["B"].expand(4, 4, 3)}
    assert not torch.equal(y, selective_state_update(**fixed, backend="reference").y)
