"""The Vandermonde and the Cauchy product in Triton on the CPU, through its interpreter, and through its compiler.

What only a GPU shows is in tests/gpu/test_ssm_kernel_gpu.py.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_ssm_kernel as kernels
import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError
from statescan.ops import explain, s4_kernel, s4d_kernel
from statescan.ops._dispatch import BACKENDS
from statescan.ops.ssm_kernel import cauchy, products, triton_products, vandermonde
from statescan.ops.ssm_kernel.decay import Decay
from statescan.testing import check_registration, derivatives, poisoned_memory, recorded_calls, refusal

NAMES = {"s4d_kernel": "triton", "s4_kernel": "cauchy_triton"}
pytestmark = pytest.mark.usefixtures("interpreted")


def _both(length: int) -> Iterator[tuple[str, Any, kernels.Case]]:
    yield "s4d_kernel", functools.partial(s4d_kernel, length=length, backend="triton"), kernels._diagonal(3, 9)
    yield "s4_kernel", functools.partial(s4_kernel, length=length, backend="cauchy_triton"), kernels._low_rank(3, 9, 2)


@pytest.mark.parametrize("length", [1, 63, 1000])
@pytest.mark.parametrize("name", kernels.S4D_CASES)
def test_diagonal_kernel(name: str, length: int) -> None:
    run, plain = (functools.partial(s4d_kernel, length=length, backend=b) for b in ("triton", "torch"))
    with poisoned_memory():
        kernels._hold_to_budget(run, plain, plain, kernels.S4D_CASES[name])


@pytest.mark.parametrize("length", [8192, 20000])
@pytest.mark.parametrize("name", ["many pairs", "real", "extremes"])
def test_vandermonde_product_of_several_tiles(name: str, length: int) -> None:
    def plain(log: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        log = log.to(torch.complex128)
        return vandermonde._vandermonde(Decay(log, torch.exp(log), None), weight, length, dtype)

    def make(seed: int) -> kernels.Case:
        case = kernels.S4D_CASES[name](seed)
        return {"log": (case["A"] * case["dt"][:, None]).to(torch.complex128), "weight": case["C"] + 0j}

    run = lambda log, weight: products.vandermonde(log.to(torch.complex128), weight, length, "triton")
    with poisoned_memory():
        kernels._hold_to_budget(run, plain, functools.partial(plain, dtype=torch.float64), make)


def test_vandermonde_product_of_more_states_than_a_block() -> None:
    run, plain = (functools.partial(s4d_kernel, length=300, backend=b) for b in ("triton", "torch"))
    kernels._hold_to_budget(run, plain, plain, lambda seed: kernels._diagonal(2, 70, seed=seed))


@pytest.mark.parametrize("real", [False, True])
def test_a_state_that_forgets_at_once(real: bool) -> None:
    """A dt = -2 under the bilinear rule: A_bar is 0 and has no logarithm."""

    def make(seed: int) -> kernels.Case:
        case = kernels._diagonal(3, 4, real=real, seed=seed)
        return {**case, "A": torch.where(torch.arange(4) == 1, -2 / case["dt"][:, None], case["A"])}

    options = {"length": 70, "discretization": "bilinear"}
    run, plain = (functools.partial(s4d_kernel, backend=b, **options) for b in ("triton", "torch"))
    kernels._hold_to_budget(run, plain, plain, make)


def test_a_million_lags_keep_the_phase() -> None:
    """Up to 3 million turns; the error stays that of a few float32 roundings of each term."""
    length = 1 << 20
    log = torch.tensor([[0.0 + 19.1j, -3e-6 - 3.3j]], dtype=torch.complex128)
    weight = torch.tensor([[1.0 - 0.5j, 0.25 + 2.0j]], dtype=torch.complex128)
    got = products.vandermonde(log, weight, length, "triton").double()
    lags = torch.arange(length, dtype=torch.float64)
    exact = (weight.unsqueeze(-1) * torch.exp(log.unsqueeze(-1) * lags)).real.sum(1)
    assert (got - exact).abs().max() < 6 * torch.finfo(torch.float32).eps * weight.abs().sum()

    g = torch.randn(1, length, generator=torch.Generator().manual_seed(0))
    log, weight = log.requires_grad_(), weight.requires_grad_()
    (products.vandermonde(log, weight, length, "triton") * g).sum().backward()
    got = log.grad, weight.grad
    log.grad = weight.grad = None
    ((weight.unsqueeze(-1) * torch.exp(log.unsqueeze(-1) * lags)).real.sum(1) * g.double()).sum().backward()
    for mine, truth in zip(got, (log.grad, weight.grad), strict=True):
        assert mine is not None
        assert truth is not None
        assert (mine - truth).abs().max() < 1e-6 * truth.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_phase_that_is_no_number_gives_none() -> None:
    log = torch.zeros(2, 3, dtype=torch.complex128)
    log[1, 2] = complex(-0.1, float("nan"))
    K = products.vandermonde(log, torch.ones(2, 3, dtype=torch.complex64), 40, "triton")
    assert torch.equal(K[0], torch.full((40,), 3.0))
    assert K[1].isnan().all()


@pytest.mark.parametrize(
    ("sums", "states", "points"),
    [(1, 1, 1), (3, 5, 2), (4, 32, 17), (5, 3, 70), (9, 7, 300), (4, 33, 150), (17, 34, 9)],
)
def test_cauchy_product(sums: int, states: int, points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_products, "_POINTS", 64)  # several programs for the sums over points
    fixed = kernels._single(kernels._cauchy_problem(sums, states, points))
    y, c = fixed["y"], fixed["c"]

    def exact(Lambda: Tensor, v: Tensor) -> Tensor:
        Lambda = Lambda.unsqueeze(1)
        return sum(  # pyright: ignore[reportReturnType]
            (w.unsqueeze(-1) / (1j * y.double() - c.double() * pole.unsqueeze(-1))).sum(2)
            for w, pole in ((v, Lambda), (v.conj(), Lambda.conj()))
        )

    def make(seed: int) -> kernels.Case:
        problem = kernels._cauchy_problem(sums, states, points, seed)
        return {"Lambda": problem["Lambda"], "v": problem["v"]}

    run = lambda Lambda, v: products.cauchy(Lambda, v, y, c, "triton")
    with poisoned_memory():
        kernels._hold_to_budget(run, lambda Lambda, v: cauchy._sums(Lambda, v, y, c), exact, make)


@pytest.mark.parametrize("rank", [1, 2])
def test_cauchy_kernel(rank: int) -> None:
    def make(seed: int) -> kernels.Case:
        case = kernels._low_rank(3, 7, rank, seed)
        return {**case, "P": case["P"] / 4}  # a larger one makes the Woodbury identity's small system nearly singular

    run, plain = (functools.partial(s4_kernel, length=200, backend=b) for b in ("cauchy_triton", "cauchy"))
    kernels._hold_to_budget(run, plain, functools.partial(s4_kernel, length=200, backend="torch"), make)


def test_the_same_bits_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_products, "_POINTS", 64)
    for op, run, case in _both(500):
        call = functools.partial(derivatives, lambda run=run, **x: (run(**x),), kernels._single(case), ("K",))
        first = call()
        with poisoned_memory():
            again = call()
        for name, value in first.items():
            assert torch.isfinite(torch.view_as_real(value) if value.is_complex() else value).all(), (op, name)
            assert torch.equal(again[name], value), (op, name)


def test_is_registered_and_compiles_as_one_graph() -> None:
    with recorded_calls() as calls:
        for _, run, case in _both(20):
            derivatives(lambda run=run, **x: (run(**x),), kernels._single(case), ("K",))
    assert {str(func) for func, _, _ in calls} == {
        f"statescan.{product}_product_triton{way}.default"
        for product in ("vandermonde", "cauchy")
        for way in ("", "_backward")
    }
    check_registration(calls)
    torch.compiler.reset()
    for op, run, case in _both(40):
        single = kernels._single(case)
        call = lambda *x, run=run, names=tuple(single): run(**dict(zip(names, x, strict=True)))
        traced = torch.compile(call, fullgraph=True, backend="aot_eager")
        eager, compiled = (derivatives(lambda f=f, **x: (f(*x.values()),), single, ("K",)) for f in (call, traced))
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, msg=lambda text, n=(op, name): f"{n}: {text}")


def test_second_derivatives_are_refused() -> None:
    for op, run, case in _both(8):
        leaves = {k: v.requires_grad_() for k, v in kernels._single(case).items()}
        with pytest.raises(BackendUnavailableError, match=f"{op}: backend '{NAMES[op]}' has no second derivatives"):
            torch.autograd.grad(run(**leaves).sum(), leaves["C"], create_graph=True)


@pytest.mark.parametrize("op", NAMES)
def test_refusals_name_the_cure(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = NAMES[op]
    assert refusal(op, name, device="cpu") is None
    assert "use backend='torch'" in str(refusal(op, name, device="cpu", dtype=torch.float64))
    assert "it runs on devices of type cuda or xpu" in str(refusal(op, name, device="mps"))
    assert explain(op, device="cpu").backend != name
    if op == "s4d_kernel":
        order = list(BACKENDS[op])
        assert order.index("triton") == order.index("torch") - 1
        assert "only where it is named" in str(explain(op, device="cpu"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "set TRITON_INTERPRET=1" in str(refusal(op, name, device="cpu"))


@pytest.mark.parametrize(
    "target",
    ["cuda 90 32", *(pytest.param(other, marks=pytest.mark.slow) for other in ("cuda 80 32", "hip gfx942 64"))],
    ids=str,
)
def test_compiles_for_gpus_that_are_not_here(target: str, tmp_path: Path) -> None:
    """All the way to machine code: what the interpreter takes and the compiler does not would show on a GPU alone."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_triton.py")), *target.split()],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {entry["kernel"] for entry in found} == {
        "check_boundaries",
        "vandermonde_states",
        *(f"{product}_{way}" for product in ("vandermonde", "cauchy") for way in ("forward", "backward")),
    }
    for entry in found:
        assert entry["stops"] == (entry["kernel"] == "check_boundaries")
        assert ("cubin" if target.startswith("cuda") else "hsaco") in entry["made"], entry
        assert entry["shared"] <= 64 * 1024, entry
