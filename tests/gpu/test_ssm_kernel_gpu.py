"""S4D's kernel in Triton and S4's Cauchy product on a GPU: result and gradients against float64 within the budget of
plain PyTorch, the same bits always, graphs, memory.

tests/ops/test_triton_ssm_kernel.py holds the same kernels to the same budget through Triton's interpreter, at sizes
that it can run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.ops import explain, s4_kernel, s4d_kernel
from statescan.ops.ssm_kernel import cauchy, products, vandermonde
from statescan.ops.ssm_kernel.decay import Decay
from statescan.testing import (
    assert_within_budget,
    check_registration,
    derivatives,
    poisoned_memory,
    recorded_calls,
    refusal,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

Case = dict[str, Tensor]
FULL = (512, 32, 16_384)  # channels, pairs of states, lags


@pytest.fixture(scope="module", autouse=True)
def _is_there() -> None:
    reason = refusal("s4d_kernel", "triton", device="cuda", complex_A=True)
    if reason is not None:
        pytest.skip(reason)


def _diagonal(channels: int, states: int, *, real: bool = False, seed: int = 0) -> Case:
    """S4D-Lin's A and steps over two decades, moved a little at random."""
    draw = torch.Generator().manual_seed(seed)
    fade = -0.5 - torch.rand(channels, states, generator=draw)
    turn = math.pi * (torch.arange(states) + torch.rand(channels, states, generator=draw))
    kind = torch.float32 if real else torch.complex64
    B, C = (torch.randn(channels, states, generator=draw, dtype=kind) for _ in range(2))
    dt = 0.001 * 100 ** torch.rand(channels, generator=draw)
    A = fade * (1 + torch.arange(states)) if real else torch.complex(fade, turn)
    return {name: value.cuda() for name, value in (("A", A), ("B", B), ("C", C), ("dt", dt))}


def _low_rank(channels: int, states: int, rank: int, seed: int = 0) -> Case:
    case = _diagonal(channels, states, seed=seed)
    draw = torch.Generator().manual_seed(1 + seed)
    P = torch.randn(channels, states, rank, generator=draw, dtype=torch.complex64).cuda() / 4
    return {"Lambda": case["A"], "P": P, "B": case["B"], "C": case["C"], "dt": case["dt"]}


def _hold(run: Any, plain: Any, exact: Any, make: Callable[[int], Case], draws: int = 8) -> None:
    """Result and every gradient: at most twice the error of plain PyTorch in float32, and one rounding."""
    found = [
        [
            derivatives(lambda f=function, **x: (f(**x),), make(seed), ("K",), exact=last, seed=seed)
            for function, last in ((run, False), (exact, True), (plain, False))
        ]
        for seed in range(1, 1 + draws)
    ]
    for name in found[0][0]:
        assert_within_budget(*([draw[i][name] for draw in found] for i in range(3)), name)  # pyright: ignore[reportArgumentType]


def _s4d(length: int) -> tuple[Any, Any]:
    run, plain = (functools.partial(s4d_kernel, length=length, backend=name) for name in ("triton", "torch"))
    return run, plain


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(
    ("channels", "states", "length"),
    [(3, 7, 1), (3, 33, 2), (5, 64, 63), (3, 70, 1000), (3, 4, 20_001), (5, 9, 8192), (4, 16, 70_001), (2, 300, 999)],
)
def test_vandermonde_product(channels: int, states: int, length: int, real: bool) -> None:
    def plain(log: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        log = log.to(torch.complex128)
        return vandermonde._vandermonde(Decay(log, torch.exp(log), None), weight, length, dtype)

    def make(seed: int) -> Case:
        case = _diagonal(channels, states, real=real, seed=seed)
        return {"log": case["A"] * case["dt"][:, None] + 0j, "weight": case["C"] + 0j}

    run = lambda log, weight: products.vandermonde(log.to(torch.complex128), weight, length, "triton")
    _hold(run, plain, functools.partial(plain, dtype=torch.float64), make)


def test_vandermonde_product_at_full_size() -> None:
    channels, states, length = FULL
    run, plain = _s4d(length)
    _hold(run, plain, plain, lambda seed: _diagonal(channels, states, seed=seed), draws=1)


def test_a_million_lags_keep_the_phase() -> None:
    """Up to 3 million turns, hardly fading."""

    def make(seed: int) -> Case:
        case = _diagonal(3, 32, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        fade = -(10 ** -(5 + 3 * torch.rand(3, 32, generator=draw)))
        turn = 20 * (torch.rand(3, 32, generator=draw) - 0.5)
        return {**case, "A": torch.complex(fade, turn).cuda(), "dt": torch.ones(3).cuda()}

    run, plain = _s4d(1 << 20)
    _hold(run, plain, plain, make, draws=2)


@pytest.mark.parametrize(
    ("channels", "sums", "states", "points"),
    [(3, 1, 1, 1), (3, 3, 5, 2), (5, 4, 32, 1025), (3, 9, 33, 3000), (2, 17, 70, 300), (64, 4, 32, 8193)],
)
def test_cauchy_product(channels: int, sums: int, states: int, points: int) -> None:
    theta = torch.linspace(0, math.pi / 2, points, dtype=torch.float64).cuda()
    y, c = (2 * theta.sin()).float(), theta.cos().float()

    def exact(Lambda: Tensor, v: Tensor) -> Tensor:
        return cauchy._sums(Lambda, v, y.double(), c.double())

    def make(seed: int) -> Case:
        case = _diagonal(channels, states, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        v = torch.randn(channels, sums, states, generator=draw, dtype=torch.complex64).cuda()
        return {"Lambda": case["A"] * case["dt"][:, None], "v": v}

    run, plain = lambda Lambda, v: products.cauchy(Lambda, v, y, c, "triton"), lambda **x: cauchy._sums(**x, y=y, c=c)
    _hold(run, plain, exact, make, draws=4 if channels < 64 else 1)


@pytest.mark.parametrize(
    ("channels", "states", "rank", "length"), [(3, 7, 2, 63), (3, 32, 1, 1000), (64, 32, 1, 16_384)]
)
def test_cauchy_kernel(channels: int, states: int, rank: int, length: int) -> None:
    run, plain, exact = (
        functools.partial(s4_kernel, length=length, backend=name) for name in ("cauchy_triton", "cauchy", "torch")
    )
    _hold(run, plain, exact, lambda seed: _low_rank(channels, states, rank, seed), draws=8 if channels < 64 else 1)


def _both(channels: int, states: int, length: int) -> list[tuple[Any, Case]]:
    return [
        (functools.partial(s4d_kernel, length=length, backend="triton"), _diagonal(channels, states)),
        (functools.partial(s4_kernel, length=length, backend="cauchy_triton"), _low_rank(channels, states, 1)),
    ]


@pytest.mark.parametrize("size", [(5, 33, 9001), (256, 32, 16_384)], ids=str)
def test_the_same_bits_always(size: tuple[int, int, int]) -> None:
    """Whatever stood in the memory that outputs and shares were given."""
    run, case = _both(*size)[0]
    call = functools.partial(derivatives, lambda **x: (run(**x),), case, ("K",))
    first = call()
    with poisoned_memory():
        poisoned = call()
    for name, value in first.items():
        assert torch.isfinite(torch.view_as_real(value) if value.is_complex() else value).all(), name
        assert torch.equal(value, poisoned[name]), name
    for _ in range(3):
        again = call()
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("sums", [1, 4, 9])
def test_the_cauchy_product_has_the_same_bits_always(sums: int) -> None:
    """Alone: S4's kernel has transforms and solvers around it, which are not ours."""
    theta = torch.linspace(0, math.pi / 2, 8193, dtype=torch.float64).cuda()
    y, c = (2 * theta.sin()).float(), theta.cos().float()
    draw = torch.Generator().manual_seed(0)
    case = {
        "Lambda": _diagonal(16, 40)["A"],
        "v": torch.randn(16, sums, 40, generator=draw, dtype=torch.complex64).cuda(),
    }
    call = functools.partial(derivatives, lambda **x: (products.cauchy(**x, y=y, c=c, backend="triton"),), case, ("S",))
    first = call()
    with poisoned_memory():
        poisoned = call()
    again = call()
    for name, value in first.items():
        assert torch.isfinite(torch.view_as_real(value)).all(), name
        assert torch.equal(value, poisoned[name]), name
        assert torch.equal(value, again[name]), name


def test_registration() -> None:
    with recorded_calls() as calls:
        for run, case in _both(3, 9, 300):
            derivatives(lambda run=run, **x: (run(**x),), case, ("K",))
    assert {str(func) for func, _, _ in calls} == {
        f"statescan.{product}_product_triton{way}.default"
        for product in ("vandermonde", "cauchy")
        for way in ("", "_backward")
    }
    check_registration(calls)


@pytest.mark.parametrize("which", [0, 1], ids=["s4d", "s4"])
def test_compiles_as_one_graph(which: int) -> None:
    torch.compiler.reset()
    run, case = _both(5, 32, 1000)[which]
    call = lambda *x: run(**dict(zip(case, x, strict=True)))  # "Lambda", made lower case by the tracer, is a keyword
    traced = torch.compile(call, fullgraph=True)
    eager, compiled = (derivatives(lambda f=f, **x: (f(*x.values()),), case, ("K",)) for f in (call, traced))
    for name, value in eager.items():
        error = float((compiled[name] - value).norm())
        assert error <= 1e-5 * float(value.norm()), name


@pytest.mark.parametrize("which", [0, 1], ids=["s4d", "s4"])
def test_graph_capture(which: int) -> None:
    run, case = _both(64, 32, 4096)[which]
    leaves = {name: value.requires_grad_() for name, value in case.items()}

    def step() -> list[Tensor]:
        K = run(**leaves)
        return [K.detach(), *torch.autograd.grad(K.square().sum(), list(leaves.values()))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in captured:
        value.zero_()
    graph.replay()
    for name, a, b in zip(("K", *case), eager, captured, strict=True):
        if which == 0:
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
            )


def test_memory() -> None:
    """Forward: the kernel and what is as small as the states. With the backward: the gradient that flows in, too."""
    channels, states, length = FULL
    run, case = _both(channels, states, length)[0]
    of_kernel, of_states = channels * length * 4, channels * states * 16

    def peak(call: Callable[[], Any]) -> int:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    with torch.no_grad():
        assert peak(lambda: run(**case)) < of_kernel + 30 * of_states
    leaves = {name: value.requires_grad_() for name, value in case.items()}
    g = torch.ones(channels, length, device="cuda")
    assert peak(lambda: torch.autograd.grad(run(**leaves), list(leaves.values()), g)) < of_kernel + 60 * of_states


def test_a_phase_that_is_no_number_gives_none() -> None:
    log = torch.zeros(2, 3, dtype=torch.complex128, device="cuda")
    log[1, 2] = complex(-0.1, float("nan"))
    K = products.vandermonde(log, torch.ones(2, 3, dtype=torch.complex64, device="cuda"), 40_000, "triton")
    assert torch.equal(K[0], torch.full((40_000,), 3.0, device="cuda"))
    assert K[1].isnan().all()


def test_auto_takes_it() -> None:
    assert explain("s4d_kernel", device="cuda", complex_A=True).backend == "triton"
    assert explain("s4d_kernel", device="cuda", complex_A=True, dtype=torch.float64).backend == "torch"
    assert explain("s4_kernel", device="cuda", complex_A=True).backend == "torch"


@pytest.mark.large
def test_offsets_above_2_31() -> None:
    """A kernel of 2.2 billion numbers: its last channels are those of a call with these channels alone."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("takes 30 GB of device memory")
    length, tail = 1 << 20, 3
    channels = 2**31 // length + 64
    log = torch.complex(-torch.rand(channels, 2).double() * 1e-5, torch.randn(channels, 2).double()).cuda()
    w = torch.randn(channels, 2, dtype=torch.complex64).cuda()
    with torch.no_grad():
        K = products.vandermonde(log, w, length, "triton")
        assert torch.equal(K[-tail:], products.vandermonde(log[-tail:], w[-tail:], length, "triton"))
        whole = torch.ops.statescan.vandermonde_product_triton_backward(log.real, log.imag, K)
        part = torch.ops.statescan.vandermonde_product_triton_backward(log.real[-tail:], log.imag[-tail:], K[-tail:])
    for a, b in zip(whole, part, strict=True):  # parts of the length are added up in an order that goes by the channels
        torch.testing.assert_close(a[-tail:], b, rtol=0, atol=1e-4 * float(b.abs().max()))
