"""The contract of `selective_scan`: every backend, every shape and option, forward and every gradient."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from statescan.ops import selective_scan
from statescan.ops._dispatch import BACKENDS
from statescan.ops.selective_scan import torch_scan
from statescan.testing import (
    COMPLEX_CASES,
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

# The whole suite runs on another device with STATESCAN_TEST_DEVICE=cuda.
DEVICE = os.environ.get("STATESCAN_TEST_DEVICE", "cpu")
scan_problem = functools.partial(problem_on, device=DEVICE)

OUTPUTS = ("y", "final_state")
BACKEND_NAMES = list(BACKENDS["selective_scan"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EVERY_OPTION = SCAN_CASES["every option"]
PACKED = SCAN_CASES["packed, empty ones"]


def running(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return functools.partial(selective_scan, return_final_state=True, backend=backend)


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def truth_and_reference(
    case: ScanCase, dtype: torch.dtype, seed: int, parameters: torch.dtype | None = None
) -> tuple[dict[str, Tensor], Derivatives, Derivatives]:
    """(cotangents, float64 truth, the reference in the problem's own precision)."""
    problem = scan_problem(case, dtype, seed=seed, parameters=parameters)
    reference = derivatives(running("reference"), problem, seed=seed)
    cotangents = random_cotangents({name: reference[name] for name in OUTPUTS}, seed)
    truth = derivatives(oracles.selective_scan, problem, cotangents=cotangents, exact=True)
    return cotangents, truth, reference


def hold_to_budget(
    run: Callable[..., Any], case: ScanCase, dtype: torch.dtype, parameters: torch.dtype | None = None
) -> None:
    """Forward and every gradient of `run` on a case, against the truth, over as many draws as the case asks for."""
    results = []
    for seed in range(case.draws()):
        cotangents, truth, reference = truth_and_reference(case, dtype, seed, parameters)
        problem = scan_problem(case, dtype, seed=seed, parameters=parameters)
        actual = derivatives(run, problem, cotangents=cotangents)
        aim = truth
        if dtype == torch.float64:  # its rounding errors are judged by the reference's in float32
            _, aim, reference = truth_and_reference(case, torch.float32, seed)
        results.append((actual, truth, reference, aim))
    for name in results[0][1]:
        actual, truth, reference, aim = ([draw[name] for draw in column] for column in zip(*results, strict=True))
        aim = aim if dtype == torch.float64 else None
        assert_within_budget(actual, truth, reference, name, reference_truth=aim)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Lets short problems cross the torch backend's chunk boundaries."""
    monkeypatch.setattr(torch_scan, "CHUNK", 8)
    return 8


# ------------------------------------------------------------------------------------------------------------ the truth


@pytest.mark.parametrize("name", SCAN_CASES)
def test_reference_is_the_truth(name: str) -> None:
    """In float64 the sequential loop and the dense closed form agree to 1e-12, forward and every gradient."""
    for seed in range(SCAN_CASES[name].draws()):
        _, truth, reference = truth_and_reference(SCAN_CASES[name], torch.float64, seed)
        for key, value in truth.items():
            assert reference[key].dtype in (torch.float64, torch.complex128)
            assert (reference[key] - value).norm() <= 1e-12 * value.norm(), key


GRADCHECK_CASES = {
    "every option": ScanCase(batch=2, length=5, d_inner=2, d_state=2, D=True, z=True, dt_bias=True,
                             initial_state=True, dt_softplus=True),
    "groups": ScanCase(batch=1, length=4, d_inner=4, d_state=2, B=2, C=4, initial_state=True),
    "fixed": ScanCase(batch=1, length=4, d_inner=2, d_state=2, B="fixed", C="fixed", initial_state=True),
    "packed": ScanCase(batch=1, length=7, d_inner=2, d_state=2, initial_state=True, cu_seqlens=(0, 0, 3, 7, 7)),
    "complex": ScanCase(batch=1, length=5, d_inner=2, d_state=2, complex_A=True, complex_BC=True, initial_state=True),
    "complex A, real B": ScanCase(batch=1, length=4, d_inner=2, d_state=1, complex_A=True, D=True, z=True),
    "complex, packed": ScanCase(batch=1, length=6, d_inner=2, d_state=1, complex_A=True, complex_BC=True,
                                initial_state=True, cu_seqlens=(0, 2, 6)),
}  # fmt: skip


def gradcheck_arguments(name: str, backend: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    problem = scan_problem(GRADCHECK_CASES[name], torch.float64)
    wanted = {
        key: value.requires_grad_()
        for key, value in problem.items()
        if isinstance(value, Tensor) and key != "cu_seqlens"
    }

    def function(*values: Tensor) -> tuple[Tensor, Tensor | None]:
        return running(backend)(**{**problem, **dict(zip(wanted, values, strict=True))})

    return function, tuple(wanted.values())


@pytest.mark.parametrize("name", GRADCHECK_CASES)
def test_gradcheck_of_the_reference(name: str) -> None:
    function, values = gradcheck_arguments(name, "reference")
    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("name", GRADCHECK_CASES)
def test_torch_is_twice_differentiable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_scan, "CHUNK", 3)  # so that chunks are run again in both backward passes
    function, values = gradcheck_arguments(name, "torch")
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_scan_is_a_convolution(backend: str, require_backend: Callable[..., None]) -> None:
    """With A, B, C and dt fixed the system is time-invariant: y = K * u with K_j = C exp(j dt A) dt B."""
    require_backend("selective_scan", backend, dtype=torch.float64)
    length, d_inner, d_state, step = 120, 5, 4, 0.05
    rng = np.random.default_rng(0)
    A, B, C = -rng.random((d_inner, d_state)), *rng.standard_normal((2, d_inner, d_state))
    u = rng.standard_normal((length, d_inner))
    kernel = np.einsum("dn,ldn,dn->ld", C, np.exp(step * np.arange(length)[:, None, None] * A), step * B)
    spectrum = np.fft.rfft(kernel, 2 * length, axis=0) * np.fft.rfft(u, 2 * length, axis=0)
    wanted = np.fft.irfft(spectrum, axis=0)[:length]
    A, B, C, u = (torch.from_numpy(value).to(DEVICE) for value in (A, B, C, u))
    got = selective_scan(u[None], torch.full_like(u[None], step), A, B, C, backend=backend).y[0].cpu().numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- the error budget


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("name", SCAN_CASES)
def test_within_budget(name: str, backend: str, dtype: torch.dtype, require_backend: Callable[..., None]) -> None:
    case = SCAN_CASES[name]
    require_backend("selective_scan", backend, dtype=dtype, complex_A=case.complex_A, d_state=case.d_state)
    hold_to_budget(running(backend), case, dtype)


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float16, torch.float64], ids=names)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_parameters_of_other_dtypes(
    backend: str, parameters: torch.dtype, require_backend: Callable[..., None]
) -> None:
    """A, D, dt_bias and fixed B, C come in any float dtype; their gradients come back in it."""
    dtype = torch.float32 if parameters == torch.float64 else parameters
    require_backend("selective_scan", backend, dtype=dtype)
    for name in ("every option", "fixed B and C"):
        hold_to_budget(running(backend), SCAN_CASES[name], dtype, parameters)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_lengths_around_chunks(
    backend: str, length: int, short_chunks: int, require_backend: Callable[..., None]
) -> None:
    require_backend("selective_scan", backend)
    case = ScanCase(batch=1, length=length, d_inner=17, d_state=2, D=True, z=True, dt_bias=True, dt_softplus=True,
                    initial_state=True)  # fmt: skip
    hold_to_budget(running(backend), case, torch.float32)


@pytest.mark.parametrize(
    "length", [torch_scan.CHUNK - 1, torch_scan.CHUNK, torch_scan.CHUNK + 1, 2 * torch_scan.CHUNK + 3]
)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_lengths_around_the_real_chunk(backend: str, length: int, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend)
    case = ScanCase(batch=1, length=length, d_inner=4, d_state=1, dt_bias=True, dt_softplus=True, initial_state=True)
    hold_to_budget(running(backend), case, torch.float32)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_long_sums_stay_within_budget(backend: str, require_backend: Callable[..., None]) -> None:
    """Gradients that sum over all positions: one running float32 sum would lose more than the budget."""
    require_backend("selective_scan", backend)
    case = ScanCase(batch=2, length=700, d_inner=32, d_state=1, D=True, z=True, dt_bias=True, dt_softplus=True)
    hold_to_budget(running(backend), case, torch.float32)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_packed_across_chunks(backend: str, short_chunks: int, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend)
    for bounds in ((0, 8, 16, 24), (0, 7, 8, 9, 24), (0, 24), (0, 0, 1, 23, 24, 24), (0, 12, 12, 20, 24)):
        case = ScanCase(batch=1, length=24, cu_seqlens=bounds, initial_state=True, z=True)
        hold_to_budget(running(backend), case, torch.float32)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_softplus_over_its_whole_range(backend: str, require_backend: Callable[..., None]) -> None:
    """dt before the softplus from -80 to 90, with its threshold at 20: values and gradients, in float32."""
    require_backend("selective_scan", backend)
    raw = torch.cat([torch.linspace(-80, 90, 61), torch.linspace(19.9, 20.1, 21), torch.tensor([20.0, 0.0, -1e-3])])
    problem = scan_problem(ScanCase(batch=1, length=1, d_inner=raw.numel(), d_state=2, rate=1e-2), torch.float32)
    problem.update(dt=raw.view(1, 1, -1).to(DEVICE), dt_softplus=True)
    got = derivatives(running(backend), problem)
    cotangents = random_cotangents({name: got[name] for name in OUTPUTS})
    truth = derivatives(oracles.selective_scan, problem, cotangents=cotangents, exact=True)
    reference = derivatives(running("reference"), problem, cotangents=cotangents)
    for name in truth:
        assert_within_budget(got[name], truth[name], reference[name], name)
    # Small values don't count in a norm: here each entry is held to a few roundings of its own size.
    own = (reference["d dt"].double() - truth["d dt"]).abs() / truth["d dt"].abs()
    error = (got["d dt"].double() - truth["d dt"]).abs() / truth["d dt"].abs()
    assert (error <= 2 * (own.max() + torch.finfo(torch.float32).eps / 2)).all()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_step_of_zero_changes_nothing(backend: str, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend)
    problem = scan_problem(ScanCase(initial_state=True), torch.float32)
    problem["dt"] = torch.zeros_like(problem["dt"])
    assert torch.equal(running(backend)(**problem)[1], problem["initial_state"])


# ----------------------------------------------------------------------------------------------- cuts, packing, batches


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_cut_anywhere_is_whole_is_step_by_step(
    backend: str, dtype: torch.dtype, short_chunks: int, require_backend: Callable[..., None]
) -> None:
    require_backend("selective_scan", backend, dtype=dtype)
    length = EVERY_OPTION.length
    cuts = [(0, at, length) for at in (1, 7, 8, 9, 16, length - 1)] + [(0, 3, 4, 20, length), tuple(range(length + 1))]
    for bounds in cuts:

        def in_parts(
            *, initial_state: Tensor, bounds: tuple[int, ...] = bounds, **problem: Any
        ) -> tuple[Tensor, Tensor]:
            parts, state = [], initial_state
            for start, stop in itertools.pairwise(bounds):
                part = {
                    key: value[:, start:stop] if key in ("u", "dt", "B", "C", "z") else value
                    for key, value in problem.items()
                }
                y, state = running(backend)(**part, initial_state=state)
                assert state is not None
                parts.append(y)
            return torch.cat(parts, dim=1), state

        hold_to_budget(in_parts, EVERY_OPTION, dtype)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_packed_is_separate(backend: str, short_chunks: int, require_backend: Callable[..., None]) -> None:
    """Each sequence of a packed row within the budget of that sequence alone; cu_seqlens may be int64."""
    require_backend("selective_scan", backend)
    problem = scan_problem(PACKED, torch.float32)
    problem["cu_seqlens"] = problem["cu_seqlens"].long()
    y, final_state = running(backend)(**problem)
    assert PACKED.cu_seqlens is not None
    for i, (start, stop) in enumerate(itertools.pairwise(PACKED.cu_seqlens)):
        alone = {k: v[:, start:stop] if k in ("u", "dt", "B", "C", "z") else v for k, v in problem.items()}
        alone.update(initial_state=problem["initial_state"][i : i + 1], cu_seqlens=None)
        if start == stop:
            assert torch.equal(final_state[i], alone["initial_state"][0])
            continue
        truth = oracles.selective_scan(**alone)
        reference = running("reference")(**alone)
        assert_within_budget(y[:, start:stop], truth[0], reference[0], f"y of sequence {i}")
        assert_within_budget(final_state[i : i + 1], truth[1], reference[1], f"final_state of sequence {i}")


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_packed_never_leaks(
    backend: str, poison: float, short_chunks: int, require_backend: Callable[..., None]
) -> None:
    """Whatever stands in the neighbours, a sequence's outputs and gradients stay the same to the bit."""
    require_backend("selective_scan", backend)
    clean = scan_problem(PACKED, torch.float32)
    assert PACKED.cu_seqlens is not None
    sequence = PACKED.cu_seqlens.index(6)
    start, stop = 6, 23
    poisoned = {key: value.clone() if isinstance(value, Tensor) else value for key, value in clean.items()}
    for key in ("u", "dt", "B", "C", "z"):
        poisoned[key][:, :start] = poison
    others = [i for i in range(len(PACKED.cu_seqlens) - 1) if i != sequence]
    poisoned["initial_state"][others] = poison
    for first, last in ((start, stop), (0, 5)):  # the poison before the good sequence, then after it
        mirrored = [clean, poisoned]
        i = sequence
        if first == 0:
            mirrored = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in clean.items()} for _ in range(2)]
            for key in ("u", "dt", "B", "C", "z"):
                mirrored[1][key][:, last:] = poison
            i = PACKED.cu_seqlens.index(5) - 1
            mirrored[1]["initial_state"][[k for k in range(len(PACKED.cu_seqlens) - 1) if k != i]] = poison

        def alone(first: int = first, last: int = last, i: int = i, **problem: Any) -> tuple[Tensor, Tensor]:
            y, final_state = running(backend)(**problem)
            assert final_state is not None
            return y[:, first:last], final_state[i]

        results = [derivatives(alone, problem) for problem in mirrored]
        for key in OUTPUTS:
            assert torch.isfinite(results[0][key]).all()
            assert torch.equal(results[0][key], results[1][key]), key
        for key in ("d u", "d dt", "d B", "d C", "d z"):
            assert torch.equal(results[0][key][:, first:last], results[1][key][:, first:last]), key
        assert torch.equal(results[0]["d initial_state"][i], results[1]["d initial_state"][i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_rows_do_not_depend_on_their_batch(
    backend: str, dtype: torch.dtype, short_chunks: int, require_backend: Callable[..., None]
) -> None:
    """To the bit. PyTorch's own elementwise CPU kernels round the last numel % 32 elements of a tensor with another
    exponential than the rest, so the backends made of them can hold this only where no such rest exists.
    """
    require_backend("selective_scan", backend, dtype=dtype)
    d_inner = 32 if backend in ("torch", "reference") else 33
    case = ScanCase(batch=5, length=29, d_inner=d_inner, d_state=16, D=True, z=True, dt_bias=True, dt_softplus=True,
                    initial_state=True)  # fmt: skip
    problem = scan_problem(case, dtype)
    together = derivatives(running(backend), problem)
    cotangents = random_cotangents({name: together[name] for name in OUTPUTS})
    for row in range(5):
        rows = ("u", "dt", "B", "C", "z", "initial_state")
        alone = derivatives(
            running(backend),
            {key: value[row : row + 1] if key in rows else value for key, value in problem.items()},
            cotangents={key: value[row : row + 1] for key, value in cotangents.items()},
        )
        for key in (*OUTPUTS, *(f"d {name}" for name in rows)):
            assert torch.equal(alone[key], together[key][row : row + 1]), key


@pytest.mark.parametrize("name", ["every option", "packed, empty ones", "groups", "fixed B and C"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_runs_are_bit_equal(backend: str, name: str, require_backend: Callable[..., None]) -> None:
    """Twice the same, on one thread as on two, and whatever stood in the memory that the outputs were given."""
    require_backend("selective_scan", backend)
    problem = scan_problem(SCAN_CASES[name], torch.float32)
    first = derivatives(running(backend), problem)
    second = derivatives(running(backend), problem)
    with poisoned_memory():
        poisoned = derivatives(running(backend), problem)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        other = derivatives(running(backend), problem)
    finally:
        torch.set_num_threads(threads)
    for key, value in first.items():
        assert torch.isfinite(value).all(), key
        for again in (second, poisoned, other):
            assert torch.equal(value, again[key]), key


# ------------------------------------------------------------------------------------------------- how it can be called


def strided(value: Tensor, how: str) -> Tensor:
    """The same values in another layout."""
    if how == "every other":
        wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])
        wide[..., ::2] = value
        return wide[..., ::2]
    if how == "time first":
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "features first":
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    # a slice of one wide projection, as x_proj's output is cut
    wide = torch.cat([value.new_full((*value.shape[:-1], 3), float("nan")), value, value], dim=-1)
    return wide[..., 3 : 3 + value.shape[-1]]


@pytest.mark.parametrize("how", ["every other", "time first", "features first", "cut from a wider one"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_strided_inputs(backend: str, how: str, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend)
    for name in ("every option", "groups", "fixed B and C"):
        case = SCAN_CASES[name]

        def run(**problem: Any) -> Any:
            views = {k: strided(v, how) if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in problem.items()}
            assert not views["u"].is_contiguous()
            return running(backend)(**views)

        hold_to_budget(run, case, torch.float32)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_expanded_inputs_and_expanded_gradients(backend: str, require_backend: Callable[..., None]) -> None:
    """Strides of 0: one dt for all channels, and the gradient that a sum sends back."""
    require_backend("selective_scan", backend)
    problem = scan_problem(ScanCase(), torch.float32)
    step = problem["dt"][:, :, :1].clone().requires_grad_()
    problem["dt"] = step.expand_as(problem["u"])
    selective_scan(**problem, backend=backend).y.sum().backward()
    dense = step.detach().requires_grad_()
    problem["dt"] = dense.repeat(1, 1, problem["u"].shape[2])
    y = selective_scan(**problem, backend="reference").y
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(step.grad, dense.grad)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_only_some_inputs_need_gradients(backend: str, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend)
    problem = scan_problem(EVERY_OPTION, torch.float32)
    whole = derivatives(running(backend), problem)
    cotangents = random_cotangents({name: whole[name] for name in OUTPUTS})
    for name in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"):
        one = {key: value.detach() if isinstance(value, Tensor) else value for key, value in problem.items()}
        one[name].requires_grad_()
        outputs = zip(OUTPUTS, running(backend)(**one), strict=True)
        heads = {key: value for key, value in outputs if value.requires_grad}  # the final state knows no C, D, z
        (gradient,) = torch.autograd.grad(tuple(heads.values()), one[name], [cotangents[key] for key in heads])
        # a sum may be taken in another order where less is asked for, so not to the bit
        torch.testing.assert_close(gradient, whole[f"d {name}"])


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_gradient_into_one_output_alone(backend: str, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend, dtype=torch.float64)
    problem = scan_problem(EVERY_OPTION, torch.float64)
    for name in OUTPUTS:
        cotangents = {name: truth_and_reference(EVERY_OPTION, torch.float64, 0)[0][name]}
        got = derivatives(running(backend), problem, cotangents=cotangents)
        truth = derivatives(oracles.selective_scan, problem, cotangents=cotangents)
        for key, value in truth.items():
            assert (got[key] - value).norm() <= 1e-12 * value.norm(), key


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_final_state_comes_only_when_asked_for(backend: str, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend)
    for case in (EVERY_OPTION, PACKED):
        problem = scan_problem(case, torch.bfloat16)
        asked = selective_scan(**problem, return_final_state=True, backend=backend)
        assert asked.final_state is not None
        assert asked.final_state.dtype == torch.float32
        assert asked.y.dtype == torch.bfloat16
        left = selective_scan(**problem, backend=backend)
        assert left.final_state is None
        assert torch.equal(left.y, asked.y)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_inputs_are_left_as_they_were(backend: str, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend)
    problem = scan_problem(EVERY_OPTION, torch.float32)
    before = {key: value.clone() for key, value in problem.items() if isinstance(value, Tensor)}
    derivatives(running(backend), problem)
    for key, value in before.items():
        assert torch.equal(problem[key], value), key


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_autocast_changes_nothing(backend: str, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend)
    for dtype in (torch.float32, torch.bfloat16):
        problem = scan_problem(SCAN_CASES["groups"], dtype)
        plain = derivatives(running(backend), problem)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            cast = derivatives(running(backend), problem)
        for key, value in plain.items():
            assert cast[key].dtype == value.dtype
            assert torch.equal(cast[key], value), key


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_under_no_grad_and_inference_mode(backend: str, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend)
    problem = {
        k: v.requires_grad_() if isinstance(v, Tensor) else v
        for k, v in scan_problem(EVERY_OPTION, torch.float32).items()
    }
    wanted = running(backend)(**problem)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = running(backend)(**problem)
        assert not got[0].requires_grad
        assert torch.equal(got[0], wanted[0])


def test_memory_stays_bounded_under_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the torch backend keeps for the backward pass: a state a chunk beside its inputs, no state a position."""
    monkeypatch.setattr(torch_scan, "CHUNK", 16)
    length, d_inner, d_state = 512, 8, 32
    case = ScanCase(batch=1, length=length, d_inner=d_inner, d_state=d_state, dt_softplus=True)
    problem = {
        k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in scan_problem(case, torch.float32).items()
    }
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        selective_scan(**problem, backend="torch")
    states = 4 * length * d_inner * d_state
    inputs = sum(v.untyped_storage().nbytes() for v in problem.values() if isinstance(v, Tensor))
    assert sum(kept.values()) <= 2 * (inputs + states / 16)
    assert sum(kept.values()) < states / 2


# ------------------------------------------------------------------------------------------- compilers and registration


class Scan(torch.nn.Module):
    """A module around the op, for torch.export."""

    def __init__(self, backend: str, names: tuple[str, ...], **options: Any) -> None:
        super().__init__()
        self.backend, self.names, self.options = backend, names, options

    def forward(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        y, state = selective_scan(
            **dict(zip(self.names, values, strict=True)), **self.options, return_final_state=True, backend=self.backend
        )
        assert state is not None
        return y, state


def tensors_and_options(case: ScanCase, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    problem = scan_problem(case, dtype)
    tensors = {key: value for key, value in problem.items() if isinstance(value, Tensor)}
    return tensors, {"dt_softplus": case.dt_softplus}


COMPILED_CASES = {
    "no options": ScanCase(length=5),
    "every option": ScanCase(length=11, D=True, z=True, dt_bias=True, dt_softplus=True, initial_state=True),
    "packed": ScanCase(batch=1, length=11, cu_seqlens=(0, 0, 4, 11), initial_state=True),
    "packed, no state": ScanCase(batch=1, length=11, cu_seqlens=(0, 5, 11)),
}


@pytest.mark.parametrize("name", COMPILED_CASES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_compiles_as_one_graph(
    backend: str, name: str, short_chunks: int, require_backend: Callable[..., None]
) -> None:
    """torch.compile(fullgraph=True), forward and backward, gives what eager gives.

    The kernel goes through inductor; the PyTorch backends are traced and differentiated without its code generation,
    which takes long and is not this package's to test.
    """
    require_backend("selective_scan", backend)
    torch.compiler.reset()
    problem = scan_problem(COMPILED_CASES[name], torch.float32)
    compiled = torch.compile(running(backend), fullgraph=True, backend="inductor" if backend == "cpu" else "aot_eager")
    eager = derivatives(running(backend), problem)
    traced = derivatives(compiled, problem)
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_inductor_compiles_the_torch_backend() -> None:
    torch.compiler.reset()
    problem = scan_problem(COMPILED_CASES["no options"], torch.float32)
    eager = derivatives(running("torch"), problem)
    traced = derivatives(torch.compile(running("torch"), fullgraph=True), problem)
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", COMPILED_CASES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_exports(backend: str, name: str, short_chunks: int, require_backend: Callable[..., None]) -> None:
    require_backend("selective_scan", backend)
    tensors, options = tensors_and_options(COMPILED_CASES[name])
    module = Scan(backend, tuple(tensors), **options)
    exported = torch.export.export(module, tuple(tensors.values())).module()
    for got, wanted in zip(exported(*tensors.values()), module(*tensors.values()), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["no options", "every option", "groups", "fixed B and C", "packed, empty ones"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_registration_of_the_kernel(name: str, dtype: torch.dtype, require_backend: Callable[..., None]) -> None:
    """opcheck on every operator of this package that the cpu backend calls, forward and backward."""
    require_backend("selective_scan", "cpu", dtype=dtype)
    problem = scan_problem(SCAN_CASES[name], dtype)
    with recorded_calls() as calls:
        derivatives(running("cpu"), problem)
    assert {str(func).split(".")[1] for func, _, _ in calls} >= {"selective_scan_cpu", "selective_scan_cpu_backward"}
    check_registration(calls)


def test_reference_and_torch_take_complex_and_auto_finds_them() -> None:
    case = COMPLEX_CASES["complex A, B, C"]
    problem = scan_problem(case, torch.float32)
    assert torch.equal(running("auto")(**problem)[0], running("torch")(**problem)[0])
