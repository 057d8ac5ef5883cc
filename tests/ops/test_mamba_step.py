"""The contract of `mamba_step`: every backend against a float64 step written apart, states, bits, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan import errors
from statescan.ops import mamba_step, pack_weight
from statescan.ops._dispatch import BACKENDS
from statescan.ops.mamba_step import BlockWeights
from statescan.ops.mamba_step import cuda as cuda_step
from statescan.testing import assert_within_budget, check_registration, poisoned_memory, recorded_calls

TEST_DEVICE = os.environ.get("STATESCAN_TEST_DEVICE", "cpu")
BACKEND_NAMES = list(BACKENDS["mamba_step"])
PACKED = ["float32", "bfloat16", "int8"]
# (d_model, d_inner, d_state, dt_rank, width): published proportions; primes everywhere; the smallest of everything.
SHAPES = [(32, 64, 16, 2, 4), (37, 41, 5, 3, 3), (5, 67, 19, 7, 2), (1, 1, 1, 1, 1)]
Problem = tuple[Tensor, Tensor | None, Tensor, Tensor, BlockWeights]


def problem(shape: tuple[int, ...], batch: int, packed: Any, full: bool = True, seed: int = 0) -> Problem:
    d_model, d_inner, d_state, rank, width = shape
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(TEST_DEVICE)

    def weight(out: int, columns: int) -> Any:
        return pack_weight(draw(out, columns) / columns**0.5, packed)

    weights = BlockWeights(
        norm=1 + 0.1 * draw(d_model),
        in_proj=weight(2 * d_inner, d_model),
        conv_weight=draw(d_inner, width),
        x_proj=weight(rank + 2 * d_state, d_inner),
        dt_proj=weight(d_inner, rank),
        A=-torch.exp(draw(d_inner, d_state)),
        out_proj=weight(d_model, d_inner),
        conv_bias=draw(d_inner) if full else None,
        dt_bias=draw(d_inner) if full else None,
        D=draw(d_inner) if full else None,
        in_bias=draw(2 * d_inner) if full else None,
        x_bias=draw(rank + 2 * d_state) if full else None,
        out_bias=draw(d_model) if full else None,
    )
    residual = draw(batch, d_model) if full else None
    return draw(batch, d_model), residual, draw(batch, width - 1, d_inner), draw(batch, d_inner, d_state), weights


def truth(x: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor, w: BlockWeights) -> list[Tensor]:
    """(output, residual, conv_state, ssm_state) in float64, one channel and one state number at a time."""

    def dense(packed: Any) -> Tensor:
        data = packed.data.double()
        return data if packed.scale is None else data * packed.scale.double()[:, None]

    def added(value: Tensor, bias: Tensor | None) -> Tensor:
        return value if bias is None else value + bias.double()

    stream = x.double() if residual is None else x.double() + residual.double()
    normed = stream / (stream.pow(2).mean(1, keepdim=True) + w.epsilon).sqrt() * w.norm.double()
    uz = added(normed @ dense(w.in_proj).T, w.in_bias)
    u, z = uz[:, : w.d_inner], uz[:, w.d_inner :]
    past = [conv_state[:, k].double() for k in range(w.width - 1)] + [u]
    u = added(sum(tap * w.conv_weight[:, k].double() for k, tap in enumerate(past)), w.conv_bias)  # type: ignore
    u = u / (1 + torch.exp(-u))
    selected = added(u @ dense(w.x_proj).T, w.x_bias)
    dt = added(selected[:, : w.dt_rank] @ dense(w.dt_proj).T, w.dt_bias)
    dt = torch.log1p(torch.exp(dt))
    B, C = selected[:, w.dt_rank : w.dt_rank + w.d_state], selected[:, w.dt_rank + w.d_state :]
    h = ssm_state.double().clone()
    y = torch.zeros_like(u) if w.D is None else w.D.double() * u
    for n in range(w.d_state):
        h[:, :, n] = torch.exp(dt * w.A[:, n].double()) * h[:, :, n] + dt * u * B[:, n : n + 1]
        y = y + h[:, :, n] * C[:, n : n + 1]
    y = y * z / (1 + torch.exp(-z))
    after = torch.stack(past[1:], 1) if w.width > 1 else conv_state.double()
    return [added(y @ dense(w.out_proj).T, w.out_bias), stream, after, h]


def run(given: Problem, backend: str) -> list[Tensor]:
    x, residual, conv_state, ssm_state, weights = given
    conv_state, ssm_state = conv_state.clone(), ssm_state.clone()
    output = mamba_step(x, residual, conv_state, ssm_state, weights, backend=backend)
    return [*output, conv_state, ssm_state]


@pytest.mark.parametrize("full", [True, False], ids=["every option", "no option"])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_within_budget(backend: str, packed: str, full: bool, require_backend: Any) -> None:
    require_backend("mamba_step", backend)
    for shape in SHAPES:
        for batch in (1, 2, 5):
            draws = [problem(shape, batch, packed, full, seed) for seed in range(4 if min(shape) > 1 else 32)]
            before = [draw[0].clone() for draw in draws]
            with poisoned_memory():
                actual = [run(draw, backend) for draw in draws]
            exact, own = [truth(*draw) for draw in draws], [run(draw, "reference") for draw in draws]
            for i, name in enumerate(("output", "residual", "conv_state", "ssm_state")):
                assert_within_budget(
                    [a[i] for a in actual], [t[i] for t in exact], [r[i] for r in own], f"{shape} {batch}: {name}"
                )
            for draw, x in zip(draws, before, strict=True):
                assert torch.equal(draw[0], x), "x was written to"


@pytest.mark.parametrize("backend", ["cuda", "torch", "reference"])
def test_float64(backend: str, require_backend: Any) -> None:
    require_backend("mamba_step", backend, dtype=torch.float64)
    given = problem(SHAPES[1], 3, "float32")
    wide = {k: v.double() for k, v in vars(given[4]).items() if isinstance(v, Tensor)}
    weights = replace(given[4], **wide)
    assert given[1] is not None
    x, residual, conv, ssm = (t.double() for t in given[:4] if t is not None)
    actual, exact = run((x, residual, conv, ssm, weights), backend), truth(*given)
    low, low_exact = run(given, "reference"), truth(*given)
    for a, t, r, rt in zip(actual, exact, low, low_exact, strict=True):
        assert_within_budget(a, t, r, reference_truth=rt)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_row_does_not_depend_on_its_company_or_the_threads(backend: str, packed: str, require_backend: Any) -> None:
    require_backend("mamba_step", backend)
    before = torch.get_num_threads()
    try:
        x, residual, conv, ssm, weights = problem((96, 192, 16, 6, 4), 9, packed)
        assert residual is not None
        rows = [(x[r : r + 1], residual[r : r + 1], conv[r : r + 1], ssm[r : r + 1], weights) for r in range(9)]
        alone = [torch.cat(parts) for parts in zip(*(run(row, backend) for row in rows), strict=True)]
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for n in range(1, 10):
                some = run((x[:n], residual[:n], conv[:n].clone(), ssm[:n].clone(), weights), backend)
                for a, b in zip(some, alone, strict=True):
                    assert torch.equal(a, b[:n]), (threads, n)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_strided_inputs_and_no_aliasing(backend: str, require_backend: Any) -> None:
    require_backend("mamba_step", backend)
    x, residual, conv, ssm, weights = problem(SHAPES[0], 3, "float32")
    if backend in ("cpu", "cuda"):
        wanted = run((x, residual, conv, ssm, weights), backend)
        got = run((x.t().contiguous().t(), residual, conv, ssm, weights), backend)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    output = mamba_step(x, None, conv.clone(), ssm.clone(), weights, backend=backend)
    assert torch.equal(output.residual, x)
    assert output.residual.data_ptr() != x.data_ptr()


def test_registration_and_compilation(require_backend: Any) -> None:
    require_backend("mamba_step", "cpu")
    given = problem(SHAPES[1], 2, "int8")
    with recorded_calls() as calls:
        wanted = run(given, "cpu")
        run(problem(SHAPES[0], 1, "float32", full=False), "cpu")
    check_registration([call for call in calls if "mamba_step" in str(call[0])])
    assert any("mamba_step" in str(call[0]) for call in calls)
    x, residual, conv, ssm, weights = given
    conv, ssm = conv.clone(), ssm.clone()
    compiled = torch.compile(lambda *t: mamba_step(*t, weights, backend="cpu"), fullgraph=True, backend="aot_eager")
    got = [*compiled(x, residual, conv, ssm), conv, ssm]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_lower_instruction_sets(isa: str, require_backend: Any) -> None:
    require_backend("mamba_step", "cpu")
    if os.environ.get("STATESCAN_CPU_ISA") == isa:
        pytest.skip("this is the run that the test starts")
    chosen = "test_within_budget and cpu or company"
    started = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__, "-k", chosen],
        env={**os.environ, "STATESCAN_CPU_ISA": isa, "STATESCAN_TEST_REQUIRE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert started.returncode == 0, started.stdout[-3000:]


GOOD = dict(zip(("x", "residual", "conv_state", "ssm_state", "weights"), problem(SHAPES[0], 2, "float32"), strict=True))
WRONG = [
    ({"x": torch.ones(2, 31)}, errors.ShapeError, r"x must have shape \(batch, 32\), got \(2, 31\)"),
    ({"x": torch.ones(2, 32).bfloat16()}, errors.DTypeError, "x must be float32 or float64, got bfloat16"),
    ({"residual": torch.ones(3, 32)}, errors.ShapeError, r"residual must have shape \(batch, d_model\) = \(2, 32\)"),
    ({"conv_state": torch.ones(2, 4, 64)}, errors.ShapeError, r"conv_state must have shape .* = \(2, 3, 64\)"),
    ({"ssm_state": torch.ones(2, 16, 64).transpose(1, 2)}, errors.ShapeError, "ssm_state must be contiguous"),
    ({"ssm_state": torch.ones(2, 64, 16).double()}, errors.DTypeError, "ssm_state must be float32"),
    ({"weights": {}}, errors.ConfigError, "weights must be a BlockWeights, got dict"),
    ({"weights": replace(GOOD["weights"], D=torch.ones(3))}, errors.ShapeError, r"weights.D must have shape"),  # type: ignore
    ({"x": torch.ones(2, 32, requires_grad=True)}, errors.ConfigError, "not differentiable.*got x with requires_grad"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG)
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    moved = {k: v.to(TEST_DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=text) as caught:
        mamba_step(**{**GOOD, **moved})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_forward_mode_is_refused() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return mamba_step(**{**GOOD, "x": x}).output  # type: ignore[arg-type]

    with pytest.raises(errors.ConfigError, match=r"no forward-mode AD and no .* torch\.func.*nn\.Mamba"):
        torch.func.jvp(step, (GOOD["x"],), (GOOD["x"],))


def test_many_rows_on_cuda_go_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch has at most 65,535 rows on its second axis: each gets its own, and none twice."""
    seen: list[tuple[str, int, Tensor]] = []

    def kernel(self: object, name: str, early: bool = False, **options: int) -> Any:
        def run(grid: tuple[int, int, int], *arguments: Any) -> None:
            y = [x for x in arguments if isinstance(x, Tensor)][-1]
            seen.append((name, grid[1], y))
            y += 1

        return run

    pieces = object.__new__(cuda_step.Pieces)
    monkeypatch.setattr(cuda_step.Pieces, "_kernel", kernel)
    rows, d_inner = 2 * 65535 + 3, 1
    u, z, dt, y = (torch.zeros(rows, d_inner) for _ in range(4))
    state, B, C = (torch.zeros(rows, *shape) for shape in ((d_inner, 4), (4,), (4,)))
    pieces.state_step(state, u, z, dt, torch.zeros(d_inner, 4), B, C, None, None, y)
    pieces.conv_step(u, torch.zeros(rows, 3, d_inner), torch.zeros(d_inner, 4), None, y)
    for name in ("state_step", "conv_step"):
        assert [count for one, count, _ in seen if one == name] == [65535, 65535, 3]
    assert (y == 2).all()
