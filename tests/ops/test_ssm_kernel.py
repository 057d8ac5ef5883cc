"""Kernels of S4 and S4D against powers of a dense matrix, written apart, in float64."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from statescan.errors import BackendUnavailableError, ConfigError, DTypeError, ShapeError
from statescan.ops import _native, explain, fft_conv, s4_kernel, s4_response, s4d_kernel, s4d_response
from statescan.ops._dispatch import BACKENDS
from statescan.ops.discretization import DISCRETIZATIONS, discretize
from statescan.ops.hippo import hippo_legs, hippo_nplr
from statescan.ops.ssm_kernel import cauchy, products
from statescan.ops.ssm_kernel.real_form import real_form
from statescan.testing import (
    assert_within_budget,
    check_registration,
    derivatives,
    poisoned_memory,
    recorded_calls,
    refusal,
)

Case = dict[str, torch.Tensor]


def _diagonal(channels: int = 3, states: int = 4, *, real: bool = False, seed: int = 0) -> Case:
    draw = torch.Generator().manual_seed(seed)
    kind = torch.float64 if real else torch.complex128
    A = -torch.rand(channels, states, generator=draw, dtype=torch.float64) - 0.1
    if not real:
        A = torch.complex(A, 8 * torch.randn(channels, states, generator=draw, dtype=torch.float64))
    B, C = (torch.randn(channels, states, generator=draw, dtype=kind) for _ in range(2))
    return {"A": A, "B": B, "C": C, "dt": torch.tensor([0.3, 0.02, 0.001][:channels], dtype=torch.float64)}


def _low_rank(channels: int = 3, states: int = 4, rank: int = 1, seed: int = 0) -> Case:
    draw = torch.Generator().manual_seed(1 + seed)
    case = _diagonal(channels, states, seed=seed)
    P = torch.randn(channels, states, rank, generator=draw, dtype=torch.complex128)
    return {"Lambda": case["A"], "P": P if rank > 1 else P[..., 0], "B": case["B"], "C": case["C"], "dt": case["dt"]}


def _dense(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, dt: float, length: int, method: str) -> torch.Tensor:
    """C A_bar^l B_bar with explicit inverses and matrix_power."""
    n = A.shape[0]
    one = torch.eye(n, dtype=A.dtype)
    inverse = torch.linalg.inv
    A_bar, B_bar = {
        "zoh": lambda: (e := torch.linalg.matrix_exp(dt * A), inverse(A) @ (e - one) @ B),
        "bilinear": lambda: (inverse(one - dt / 2 * A) @ (one + dt / 2 * A), inverse(one - dt / 2 * A) @ (dt * B)),
        "forward_euler": lambda: (one + dt * A, dt * B),
        "backward_euler": lambda: (inverse(one - dt * A), inverse(one - dt * A) @ (dt * B)),
    }[method]()
    return torch.stack([C @ torch.linalg.matrix_power(A_bar, k) @ B_bar for k in range(length)])


def _s4d_truth(case: Case, length: int, method: str) -> torch.Tensor:
    A, B, C = (case[k].to(torch.complex128) for k in "ABC")
    rows = [_dense(torch.diag(A[d]), B[d], C[d], case["dt"][d].item(), length, method) for d in range(A.shape[0])]
    K = torch.stack(rows).real
    return 2 * K if case["A"].is_complex() else K


def _s4_truth(case: Case, length: int, method: str) -> torch.Tensor:
    """The whole conjugate system, 2 states wide, nothing made real."""
    rows = []
    for d in range(case["Lambda"].shape[0]):
        Lambda, P, B, C = (torch.cat([case[k][d], case[k][d].conj()]) for k in ("Lambda", "P", "B", "C"))
        P = P.reshape(len(Lambda), -1)
        rows.append(_dense(torch.diag(Lambda) - P @ P.mH, B, C, case["dt"][d].item(), length, method))
    K = torch.stack(rows)
    assert K.imag.abs().max() < 1e-9 * K.abs().max()
    return K.real


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("method", DISCRETIZATIONS)
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("length", [1, 2, 13, 64, 65])
def test_s4d_is_the_dense_system(backend: str, method: str, real: bool, length: int) -> None:
    case = _diagonal(real=real)
    if method == "forward_euler":
        case["dt"] = case["dt"] / 20  # inside its region of stability
    got = s4d_kernel(**case, length=length, discretization=method, backend=backend)
    truth = _s4d_truth(case, length, method)
    assert got.dtype == torch.float64
    assert got.shape == (3, length)
    assert (got - truth).abs().max() < 1e-12 * truth.abs().max()


@pytest.mark.parametrize("backend", ["torch", "cauchy", "reference"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 13, 64, 65])
def test_s4_is_the_dense_system(backend: str, rank: int, length: int) -> None:
    case = _low_rank(rank=rank)
    got = s4_kernel(**case, length=length, backend=backend)
    truth = _s4_truth(case, length, "bilinear")
    assert got.shape == (3, length)
    assert (got - truth).abs().max() < 1e-10 * truth.abs().max()


@pytest.mark.parametrize("method", ["zoh", "backward_euler"])
def test_s4_with_other_rules(method: str) -> None:
    case = _low_rank()
    truth = _s4_truth(case, 30, method)
    for backend in ("torch", "reference"):
        got = s4_kernel(**case, length=30, discretization=method, backend=backend)
        assert (got - truth).abs().max() < 1e-10 * truth.abs().max()


@pytest.mark.parametrize("backend", ["torch", "cauchy"])
def test_hippo_kernel(backend: str) -> None:
    """The half of HiPPO's eigenvalues in S4's hands gives the kernel of the dense HiPPO matrix."""
    n, length, dt = 32, 200, 0.01
    A, B = hippo_legs(n)
    Lambda, P, B_eigen, V = hippo_nplr("legs", n)
    C = torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    half = Lambda.imag > 0
    assert int(half.sum()) == n // 2
    C_eigen = C.to(V.dtype) @ V
    case = {"Lambda": Lambda, "P": P[:, 0], "B": B_eigen, "C": C_eigen}
    case = {k: v[half].unsqueeze(0) for k, v in case.items()}
    got = s4_kernel(**case, dt=torch.tensor([dt], dtype=torch.float64), length=length, backend=backend)
    truth = _dense(A, B, C, dt, length, "bilinear")
    assert (got[0] - truth).abs().max() < 1e-9 * truth.abs().max()


@pytest.mark.parametrize("backend", ["torch", "cauchy"])
def test_s4_gradients(backend: str) -> None:
    case = {k: v.requires_grad_() for k, v in _low_rank(2, 2).items()}
    names = list(case)
    assert torch.autograd.gradcheck(
        lambda *x: s4_kernel(**dict(zip(names, x, strict=True)), length=9, backend=backend), tuple(case.values())
    )


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_s4d_gradients(real: bool, method: str) -> None:
    case = {k: v.requires_grad_() for k, v in _diagonal(2, 2, real=real).items()}
    names = list(case)
    assert torch.autograd.gradcheck(
        lambda *x: s4d_kernel(**dict(zip(names, x, strict=True)), length=9, discretization=method), tuple(case.values())
    )


def test_pieces_of_the_cauchy_product_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for elements in (cauchy._CHUNK_ELEMENTS, 3 * 4 * 5):
        monkeypatch.setattr(cauchy, "_CHUNK_ELEMENTS", elements)
        case = {k: v.requires_grad_() for k, v in _low_rank().items()}
        K = s4_kernel(**case, length=37, backend="cauchy")
        K.square().sum().backward()
        results.append([K.detach(), *(v.grad for v in case.values())])
    for whole, cut in zip(*results, strict=True):
        assert torch.allclose(whole, cut, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["s4d", "s4d, fast and hardly fading", "s4"])
def test_float32_over_a_long_kernel_keeps_the_phase(kernel: str) -> None:
    """float32 parameters, a kernel of 4,096 lags: the error stays that of float32 sums."""
    length = 4096
    case = _diagonal() if kernel.startswith("s4d") else _low_rank()
    if "fast" in kernel:  # 5,200 turns, at whose end a twentieth is left: a phase not reduced in time loses 2e-3 of one
        case["A"] = torch.complex(torch.full((3, 4), -0.01), torch.tensor([80.0, 77.0, 83.0, 79.0]).expand(3, 4))
        case["dt"] = torch.tensor([0.1, 0.05, 0.02])
    single = {k: v.to(torch.complex64 if v.is_complex() else torch.float32) for k, v in case.items()}
    double = {k: v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in single.items()}
    op = s4d_kernel if kernel.startswith("s4d") else s4_kernel
    got, truth = op(**single, length=length), op(**double, length=length, backend="reference")
    assert got.dtype == torch.float32
    # one rounding for each of the 16 terms of a sum, of the size of its terms
    size = 2 * (double["B"].abs() * double["C"].abs() * double["dt"][:, None]).sum(-1, keepdim=True)
    assert ((got.double() - truth).abs() <= 16 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("backend", ["torch", "cauchy"])
def test_rate_change(backend: str) -> None:
    """Twice the step is half the sampling rate, as a system of that step has it, and no parameter changes."""
    case = _low_rank()
    slow = {**case, "dt": case["dt"] * 2}
    truth = _s4_truth(slow, 40, "bilinear")
    got = s4_kernel(**{**case, "dt": case["dt"] * 2}, length=40, backend=backend)
    assert (got - truth).abs().max() < 1e-10 * truth.abs().max()
    if backend == "torch":  # with the exact rule every second lag is the same, but for the input's longer hold
        fast = s4d_kernel(**_diagonal(), length=80)
        diagonal = _diagonal()
        twice = s4d_kernel(**{**diagonal, "dt": diagonal["dt"] * 2}, length=40)
        held = fast[:, 0::2] + fast[:, 1::2]
        assert (twice - held).abs().max() < 1e-12 * held.abs().max()


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_a_state_that_forgets_at_once(real: bool, length: int) -> None:
    """A dt = -2 under the bilinear rule: A_bar is exactly 0, which has no logarithm, and the 0th power is 1."""
    draw = torch.Generator().manual_seed(4)
    kind = torch.float64 if real else torch.complex128
    A = torch.tensor([[-1.0, -2.0], [-2.0, -4.0]], dtype=kind)
    B, C = (torch.randn(2, 2, generator=draw, dtype=kind) for _ in range(2))
    case = {"A": A, "B": B, "C": C, "dt": torch.tensor([1.0, 0.5], dtype=torch.float64)}
    u, state = torch.randn(3, length, 2, generator=draw, dtype=torch.float64), torch.randn(3, 2, 2, dtype=kind)
    results = []
    for backend in ("torch", "reference"):
        leaves = {k: v.clone().requires_grad_() for k, v in case.items()}
        K = s4d_kernel(**leaves, length=length, discretization="bilinear", backend=backend)
        weight = torch.arange(1.0, length + 1, dtype=torch.float64)
        (K * weight).sum().backward()
        results.append([K.detach(), *(v.grad for v in leaves.values())])
    for got, truth in zip(*results, strict=True):
        assert (got - truth).abs().max() < 1e-13 * truth.abs().max()

    response = s4d_response(**case, u=u, state=state, discretization="bilinear")
    y = fft_conv(u, K.detach()) + response.y
    A_bar, B_bar = discretize(A, B, case["dt"], "bilinear", diagonal=True)
    x = state
    for t in range(length):
        x = A_bar * x + B_bar * u[:, t].unsqueeze(-1)
        assert (y[:, t] - (1 if real else 2) * (C * x).sum(-1).real).abs().max() < 1e-12
    assert (response.final_state - x).abs().max() < 1e-12


def _by_steps(A_bar: torch.Tensor, B_bar: torch.Tensor, C: torch.Tensor, u: torch.Tensor, x: torch.Tensor) -> tuple:
    """The dense recurrence of one channel: u ``(batch, length)``, x ``(batch, n)``."""
    y = []
    for k in range(u.shape[1]):
        x = x @ A_bar.T + u[:, k, None] * B_bar
        y.append(x @ C)
    return torch.stack(y, 1), x


@pytest.mark.parametrize("kernel", ["s4d", "s4d real", "s4", "s4 rank 2"])
@pytest.mark.parametrize("length", [1, 2, 13, 40])
def test_response_and_convolution_are_the_recurrence(kernel: str, length: int) -> None:
    """From a state: convolution + response = steps of the dense conjugate system, and the last state is its state."""
    s4, real = kernel.startswith("s4 ") or kernel == "s4", kernel.endswith("real")
    case = _low_rank(rank=2 if kernel.endswith("2") else 1) if s4 else _diagonal(real=real)
    draw = torch.Generator().manual_seed(5)
    u = torch.randn(2, length, 3, generator=draw, dtype=torch.float64)
    state = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64 if real else torch.complex128)
    K = s4_kernel(**case, length=length) if s4 else s4d_kernel(**case, length=length)
    response = s4_response(**case, u=u, state=state) if s4 else s4d_response(**case, u=u, state=state)
    y = fft_conv(u, K) + response.y
    for d in range(3):
        parts = [v[d] if v.dim() > 1 else v for k, v in case.items() if k != "dt"]
        if not real:
            parts = [torch.cat([p, p.conj()]) for p in parts]
        A = torch.diag(parts[0])
        if s4:
            P = parts.pop(1).reshape(A.shape[0], -1)
            A = A - P @ P.mH
        A_bar, B_bar = discretize(A, parts[1], case["dt"][d], "bilinear" if s4 else "zoh")
        start = state[:, d] if real else torch.cat([state[:, d], state[:, d].conj()], -1)
        truth, last = _by_steps(A_bar, B_bar, parts[2], u[:, :, d].to(A.dtype), start)
        scale = truth.abs().max()
        assert (y[:, :, d] - truth.real).abs().max() < 1e-10 * scale
        assert (response.final_state[:, d] - last[:, :4]).abs().max() < 1e-10 * last.abs().max()


@pytest.mark.parametrize("s4", [False, True])
def test_response_gradients(s4: bool) -> None:
    case = _low_rank(2, 2) if s4 else _diagonal(2, 2)
    inputs = {
        **case,
        "u": torch.randn(1, 5, 2, dtype=torch.float64),
        "state": torch.randn(1, 2, 2, dtype=torch.complex128),
    }
    names, op = list(inputs), s4_response if s4 else s4d_response
    assert torch.autograd.gradcheck(
        lambda *x: tuple(op(**dict(zip(names, x, strict=True)))), [v.requires_grad_() for v in inputs.values()]
    )


def test_bad_input_and_explain() -> None:
    case = _low_rank()
    with pytest.raises(ShapeError, match=r"s4_kernel: B must have shape .*got \(3, 3\)"):
        s4_kernel(**{**case, "B": case["B"][:, :3]}, length=4)
    with pytest.raises(DTypeError, match="Lambda must be complex"):
        s4_kernel(**{k: v.real if v.is_complex() else v for k, v in case.items()}, length=4)
    with pytest.raises(ConfigError, match="length must be an integer >= 1, got 0"):
        s4_kernel(**case, length=0)
    with pytest.raises(ConfigError, match="discretization must be 'bilinear' with backend 'cauchy'"):
        s4_kernel(**case, length=4, discretization="zoh", backend="cauchy")
    with pytest.raises(ConfigError, match="dt must be positive"):
        s4d_kernel(**{**_diagonal(), "dt": torch.tensor([0.1, -0.1, 0.1])}, length=4, backend="reference")
    with pytest.raises(ConfigError, match="dt must be positive"):
        s4d_kernel(**{**_diagonal(), "dt": torch.tensor([0.1, -0.1, 0.1])}, length=4)
    with pytest.raises(ConfigError, match="s4_kernel: A must be stable"):
        s4_kernel(**{**case, "Lambda": -case["Lambda"]}, length=4)
    for name, bad in (("Lambda", float("nan")), ("P", float("inf"))):
        broken = {**case, name: torch.where(torch.arange(4) == 1, bad, case[name])}
        for backend in ("torch", "cauchy", "reference"):
            with pytest.raises(ConfigError, match=r"s4_kernel: .* must be finite, got 3 of 12 numbers"):
                s4_kernel(**broken, length=4, backend=backend)
    with pytest.raises(ConfigError, match="s4d_kernel: A must be finite"):
        s4d_kernel(**{**_diagonal(), "A": torch.full((3, 4), -float("inf"))}, length=4)
    for name in ("B", "C"):
        for given, kernel, response in ((case, s4_kernel, s4_response), (_diagonal(), s4d_kernel, s4d_response)):
            broken = {**given, name: torch.where(torch.arange(4) == 1, float("nan"), given[name])}
            with pytest.raises(ConfigError, match=rf"s4d?_kernel: {name} must be finite, got 3 of 12 numbers"):
                kernel(**broken, length=4)
            with pytest.raises(ConfigError, match=rf"s4d?_response: {name} must be finite, got 3 of 12 numbers"):
                response(**broken, u=torch.zeros(1, 2, 3), state=torch.zeros(1, 3, 4, dtype=torch.complex128))
    with pytest.raises(ShapeError, match=r"s4_kernel: P must have shape .*rank >= 1\), got \(3, 4, 0\); .*s4d_kernel"):
        s4_kernel(**{**case, "P": torch.zeros(3, 4, 0, dtype=torch.complex128)}, length=4)
    for wrong in (["zoh"], None, "euler"):
        with pytest.raises(ConfigError, match=r"s4_kernel: discretization must be one of \['backward_euler'.*got "):
            s4_kernel(**case, length=4, discretization=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="s4_kernel: length must be an integer >= 1, got True"):
        s4_kernel(**case, length=True)
    with pytest.raises(DTypeError, match=r"s4_response: P must be a torch.Tensor, got str"):
        s4_response(**{**case, "P": "x"}, u=torch.zeros(1, 2, 3), state=torch.zeros(1, 3, 4, dtype=torch.complex128))


@pytest.mark.parametrize("kernel", ["s4d", "s4d real", "s4", "s4 rank 2"])
def test_forward_euler_is_refused_where_its_steps_grow(kernel: str) -> None:
    """|A_bar| against the eigenvalues of a dense matrix; on both sides of the largest stable step."""
    if kernel.startswith("s4d"):
        case = _diagonal(real="real" in kernel)
        dense = [torch.diag(row) for row in case["A"]]
        op, respond = s4d_kernel, s4d_response
    else:
        case = _low_rank(rank=2 if "rank" in kernel else 1)
        dense = list(real_form(case["Lambda"], case["P"].reshape(3, 4, -1), case["B"], case["C"])[0])
        op, respond = s4_kernel, s4_response
    poles = torch.stack([torch.linalg.eigvals(A) for A in dense])
    largest = (-2 * poles.real / poles.abs() ** 2).amin(-1)  # |1 + dt pole| = 1
    run = {"u": torch.zeros(1, 2, 3), "state": torch.zeros_like(case["B"]).unsqueeze(0)}
    inside = op(**{**case, "dt": 0.999 * largest}, length=20000, discretization="forward_euler", backend="torch")
    assert inside.abs().amax() < 1e3 * inside[:, :100].abs().amax()
    assert inside[:, -100:].isfinite().all()
    respond(**{**case, "dt": 0.999 * largest}, **run, discretization="forward_euler")
    steps = torch.where(torch.arange(3) == 1, 1.001, 0.999) * largest
    refused = (
        rf"with discretization 'forward_euler' no eigenvalue of A_bar .* got one of 1\.\d+ at dt = {steps[1]:.4g}; "
        "pass a smaller dt, or 'zoh' or 'bilinear'"
    )
    for backend in ("auto", "torch", "reference"):
        with pytest.raises(ConfigError, match=refused):
            op(**{**case, "dt": steps}, length=3, discretization="forward_euler", backend=backend)
    with pytest.raises(ConfigError, match=refused):
        respond(**{**case, "dt": steps}, **run, discretization="forward_euler")
    for method in ("zoh", "bilinear", "backward_euler"):
        assert op(**{**case, "dt": 1000 * largest}, length=300, discretization=method).isfinite().all()


class _OnMPS(torch.Tensor):
    """What a check sees of a tensor on Apple's GPU: no double precision."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return torch.device("mps")
        if func is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        if func in (torch.Tensor.to, torch.Tensor.double):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_on_mps_the_refusal_is_in_words() -> None:
    run = {"u": torch.zeros(1, 2, 3), "state": torch.zeros(1, 3, 4, dtype=torch.complex64)}
    run = {k: v.as_subclass(_OnMPS) for k, v in run.items()}
    for kernel, respond, case in (
        (s4d_kernel, s4d_response, _diagonal()),
        (s4_kernel, s4_response, _low_rank()),
    ):
        case = {k: v.as_subclass(_OnMPS) for k, v in _single(case).items()}
        for method in ("zoh", "forward_euler"):
            with pytest.raises(BackendUnavailableError, match="reference: it needs float64, which this device has not"):
                kernel(**case, length=4, discretization=method)
            with pytest.raises(BackendUnavailableError, match="it needs float64, which this device has not"):
                respond(**case, **run, discretization=method)


def test_a_partly_old_library_is_refused(monkeypatch: pytest.MonkeyPatch, require_backend: Any) -> None:
    """Each product asks for its own functions: with one missing, the other backends still run."""
    require_backend("s4d_kernel", "cpu")
    whole = _native.library()

    class Old:
        def __init__(self, missing: str) -> None:
            self.missing = missing

        def __getattr__(self, name: str) -> Any:
            if name == self.missing:
                raise AttributeError(name)
            return getattr(whole.lib, name)

    backends = {
        "vandermonde": ("s4d_kernel", "cpu"),
        "powers": ("s4_kernel", "cpu"),
        "cauchy": ("s4_kernel", "cauchy_cpu"),
    }
    for missing, (op, backend) in backends.items():
        for symbol in (f"ss_{missing}", f"ss_{missing}_backward"):
            library = SimpleNamespace(path=whole.path, lib=Old(symbol))
            monkeypatch.setattr(_native, "library", lambda library=library: library)
            assert "is older than this package; reinstall statescan" in str(refusal(op, backend))
            for other in backends.values():
                assert other == (op, backend) or refusal(*other) is None
    library = SimpleNamespace(path=whole.path, lib=Old("ss_powers"))
    monkeypatch.setattr(_native, "library", lambda: library)
    case = _single(_low_rank())
    assert torch.equal(s4_kernel(**case, length=9), s4_kernel(**case, length=9, backend="torch"))


# ------------------------------------------------------------------------------- the products' kernels, in float32


def _single(case: Case) -> Case:
    return {k: v.to(torch.complex64 if v.is_complex() else torch.float32) for k, v in case.items()}


def _extremes(channels: int = 3, states: int = 9, seed: int = 0) -> Case:
    """dt Re(A) from -1e-8 to -50, whole circles of phase."""
    draw = torch.Generator().manual_seed(3 + seed)
    case = _diagonal(channels, states, seed=seed)
    fade = -torch.logspace(-8, 1.69897, states, dtype=torch.float64).expand(channels, states)
    phase = 6 * torch.rand(channels, states, generator=draw, dtype=torch.float64) - 3
    return {**case, "A": torch.complex(fade, phase) / case["dt"][:, None]}


S4D_CASES: dict[str, Callable[[int], Case]] = {
    "pairs": lambda seed: _diagonal(3, 7, seed=seed),
    "many pairs": lambda seed: _diagonal(3, 33, seed=seed),
    "real": lambda seed: _diagonal(3, 5, real=True, seed=seed),
    "one real state": lambda seed: _diagonal(3, 1, real=True, seed=seed),
    "extremes": lambda seed: _extremes(seed=seed),
    "real extremes": lambda seed: {**_diagonal(3, 9, real=True, seed=seed), "A": _extremes(seed=seed)["A"].real},
}


def _hold_to_budget(
    run: Callable[..., Any], reference: Callable[..., Any], exact: Callable[..., Any], make: Callable[[int], Case]
) -> None:
    """Result and every gradient in float32, with a budget of twice the error that plain PyTorch makes; eight draws."""
    draws = [
        [
            derivatives(lambda f=function, **x: (f(**x),), _single(make(seed)), ("K",), exact=last, seed=seed)
            for function, last in ((run, False), (exact, True), (reference, False))
        ]
        for seed in range(1, 9)
    ]
    for name in draws[0][0]:
        assert_within_budget(*([draw[i][name] for draw in draws] for i in range(3)), name)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", S4D_CASES)
@pytest.mark.parametrize("length", [1, 2, 63, 1000, 16384])
def test_vandermonde_product_in_cpp(require_backend: Any, name: str, length: int) -> None:
    require_backend("s4d_kernel", "cpu")
    run, plain = (functools.partial(s4d_kernel, length=length, backend=b) for b in ("cpu", "torch"))
    _hold_to_budget(run, plain, functools.partial(s4d_kernel, length=length, backend="torch"), S4D_CASES[name])


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("method", ["bilinear", "forward_euler", "backward_euler"])
@pytest.mark.parametrize("length", [1, 2, 70])
def test_vandermonde_product_in_cpp_with_other_rules(
    require_backend: Any, real: bool, method: str, length: int
) -> None:
    """One state of each channel has A dt = -2, which the bilinear rule makes 0: it has no logarithm."""
    require_backend("s4d_kernel", "cpu")

    def make(seed: int) -> Case:
        case = _diagonal(3, 4, real=real, seed=seed)
        dt = torch.tensor([0.25, 0.03125, 0.0078125], dtype=torch.float64)
        A = torch.where(torch.arange(4) == 1, -2 / dt[:, None], case["A"] / 32)
        return {**case, "dt": dt, "A": A / 4 if method == "forward_euler" else A}

    run, plain = (
        functools.partial(s4d_kernel, length=length, discretization=method, backend=b) for b in ("cpu", "torch")
    )
    exact = functools.partial(s4d_kernel, length=length, discretization=method, backend="torch")
    _hold_to_budget(run, plain, exact, make)


@pytest.mark.parametrize(("states", "rank"), [(7, 1), (7, 2), (1, 1), (33, 1)])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 9, 63, 1000, 16384])
def test_powers_in_cpp(require_backend: Any, states: int, rank: int, length: int) -> None:
    """Lengths around each number of powers that an orbit takes."""
    require_backend("s4_kernel", "cpu")
    run, plain = (functools.partial(s4_kernel, length=length, backend=b) for b in ("cpu", "torch"))
    exact = functools.partial(s4_kernel, length=length, backend="torch")
    _hold_to_budget(run, plain, exact, lambda seed: _low_rank(3, states, rank, seed))


@pytest.mark.parametrize("method", ["zoh", "backward_euler"])
def test_powers_in_cpp_with_other_rules(require_backend: Any, method: str) -> None:
    require_backend("s4_kernel", "cpu")
    run, plain = (functools.partial(s4_kernel, length=100, discretization=method, backend=b) for b in ("cpu", "torch"))
    exact = functools.partial(s4_kernel, length=100, discretization=method, backend="torch")
    _hold_to_budget(run, plain, exact, lambda seed: _low_rank(3, 4, 1, seed))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 63, 1000, 16384])
def test_cauchy_kernel_in_cpp(require_backend: Any, rank: int, length: int) -> None:
    require_backend("s4_kernel", "cauchy_cpu")

    def make(seed: int) -> Case:
        case = _low_rank(3, 7, rank, seed)
        return {**case, "P": case["P"] / 4}  # a larger one makes the Woodbury identity's small system nearly singular

    run, plain = (functools.partial(s4_kernel, length=length, backend=b) for b in ("cauchy_cpu", "cauchy"))
    _hold_to_budget(run, plain, functools.partial(s4_kernel, length=length, backend="torch"), make)


def _cauchy_problem(sums: int, states: int, points: int, seed: int = 0) -> Case:
    draw = torch.Generator().manual_seed(6 + seed)
    complex_ = functools.partial(torch.randn, generator=draw, dtype=torch.complex128)
    theta = torch.linspace(0, torch.pi / 2, points, dtype=torch.float64)
    Lambda = complex_(2, states)
    Lambda = torch.complex(-Lambda.real.abs() - 1e-3, Lambda.imag)
    return {"Lambda": Lambda, "v": complex_(2, sums, states), "y": 2 * theta.sin(), "c": theta.cos()}


@pytest.mark.parametrize(("sums", "states", "points"), [(1, 1, 1), (3, 5, 2), (4, 32, 17), (5, 3, 70), (9, 7, 1500)])
def test_cauchy_product_in_cpp(require_backend: Any, sums: int, states: int, points: int) -> None:
    require_backend("s4_kernel", "cauchy_cpu")
    problem = _single(_cauchy_problem(sums, states, points))
    y, c = problem["y"], problem["c"]

    def exact(Lambda: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        Lambda = Lambda.unsqueeze(1)
        return sum(  # pyright: ignore[reportReturnType]
            (w.unsqueeze(-1) / (1j * y.double() - c.double() * pole.unsqueeze(-1))).sum(2)
            for w, pole in ((v, Lambda), (v.conj(), Lambda.conj()))
        )

    def make(seed: int) -> Case:
        problem = _cauchy_problem(sums, states, points, seed)
        return {"Lambda": problem["Lambda"], "v": problem["v"]}

    run = lambda Lambda, v: products.cauchy(Lambda, v, y, c, "cpu")
    _hold_to_budget(run, lambda Lambda, v: cauchy._sums(Lambda, v, y, c), exact, make)


def _in_cpp(length: int) -> Iterator[tuple[str, Callable[..., Any], Case]]:
    yield "vandermonde", functools.partial(s4d_kernel, length=length, backend="cpu"), _diagonal(3, 9)
    yield "powers", functools.partial(s4_kernel, length=length, backend="cpu"), _low_rank(3, 9, 2)
    yield "cauchy", functools.partial(s4_kernel, length=length, backend="cauchy_cpu"), _low_rank(3, 9, 2)


@pytest.mark.parametrize("length", [37, 3000])
def test_kernels_in_cpp_give_the_same_bits_always(require_backend: Any, length: int) -> None:
    """Two runs, memory full of NaN, and another number of threads."""
    require_backend("s4d_kernel", "cpu")
    threads = torch.get_num_threads()
    for product, run, case in _in_cpp(length):
        wide = {k: v.repeat(8, *[1] * (v.dim() - 1)) for k, v in _single(case).items()}
        call = functools.partial(derivatives, lambda run=run, **x: (run(**x),), wide, ("K",))
        try:
            torch.set_num_threads(1)
            first = call()
            with poisoned_memory():
                again = call()
            torch.set_num_threads(3)
            others = call()
        finally:
            torch.set_num_threads(threads)
        for name, value in first.items():
            assert torch.isfinite(torch.view_as_real(value) if value.is_complex() else value).all(), (product, name)
            assert torch.equal(again[name], value), (product, name)
            if product == "vandermonde":  # the others have torch's own products around them, see the next test
                assert torch.equal(others[name], value), (product, name)


@pytest.mark.parametrize("product", ["powers", "cauchy"])
def test_products_in_cpp_are_the_same_whatever_the_threads(require_backend: Any, product: str) -> None:
    require_backend("s4_kernel", "cpu")
    draw = torch.Generator().manual_seed(7)
    if product == "cauchy":
        problem = _single(_cauchy_problem(4, 9, 3000))
        y, c = problem.pop("y"), problem.pop("c")
        problem = {k: v.repeat(12, *[1] * (v.dim() - 1)) for k, v in problem.items()}
        run = functools.partial(products.cauchy, y=y, c=c, backend="cpu")
    else:
        noise = functools.partial(torch.randn, generator=draw, dtype=torch.float64)
        problem = {"A": noise(24, 18, 18) / 18, "B": noise(24, 18), "C": noise(24, 18)}
        run = functools.partial(products.powers, length=3000, backend="cpu")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(derivatives(lambda **x: (run(**x),), problem, ("result",)))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


def test_what_is_registered(require_backend: Any) -> None:
    require_backend("s4d_kernel", "cpu")
    with recorded_calls() as calls:
        for _, run, case in _in_cpp(20):
            derivatives(lambda run=run, **x: (run(**x),), _single(case), ("K",))
    assert {str(func) for func, _, _ in calls} == {
        f"statescan.{product}_product_cpu{way}.default"
        for product in ("vandermonde", "cauchy", "powers")
        for way in ("", "_backward")
    }
    check_registration(calls)


@pytest.mark.parametrize("product", ["vandermonde", "powers", "cauchy"])
def test_compiles_and_exports(require_backend: Any, product: str) -> None:
    require_backend("s4d_kernel", "cpu")
    _, run, case = next(x for x in _in_cpp(40) if x[0] == product)
    single = _single(case)
    torch.compiler.reset()
    call = lambda *x: run(**dict(zip(single, x, strict=True)))  # "Lambda", made lower case by the tracer, is a keyword
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, traced = (derivatives(lambda f=f, **x: (f(*x.values()),), single, ("K",)) for f in (call, compiled))
    for name, value in eager.items():
        assert torch.allclose(traced[name], value, rtol=1e-6, atol=1e-6), name

    class Kernel(torch.nn.Module):
        def forward(self, *x: torch.Tensor) -> torch.Tensor:
            return call(*x)

    exported = torch.export.export(Kernel(), tuple(single.values())).module()
    assert torch.equal(exported(*single.values()), run(**single))


@pytest.mark.parametrize("product", ["vandermonde", "powers", "cauchy"])
def test_second_derivatives_are_refused_not_wrong(require_backend: Any, product: str) -> None:
    require_backend("s4d_kernel", "cpu")
    _, run, case = next(x for x in _in_cpp(8) if x[0] == product)
    leaves = {k: v.requires_grad_() for k, v in _single(case).items()}
    name = {"vandermonde": "s4d_kernel: backend 'cpu'", "powers": "s4_kernel: backend 'cpu'"}.get(product)
    refused = f"^{name or 's4_kernel: backend .cauchy_cpu.'} has no second derivatives; use backend='torch'"
    with pytest.raises(BackendUnavailableError, match=refused):
        torch.autograd.grad(run(**leaves).sum(), leaves["C"], create_graph=True)


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_lower_instruction_sets(require_backend: Any, isa: str) -> None:
    require_backend("s4d_kernel", "cpu")
    if os.environ.get("STATESCAN_CPU_ISA") == isa:
        pytest.skip("this is the run that the test starts")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__, "-k", "in_cpp and not 16384"],
        env={**os.environ, "STATESCAN_CPU_ISA": isa, "STATESCAN_TEST_REQUIRE": "cpu,cauchy_cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_which_backend_runs(require_backend: Any) -> None:
    for op, named in (("s4d_kernel", "cpu"), ("s4_kernel", "cpu"), ("s4_kernel", "cauchy_cpu")):
        assert "backend='torch'" in str(refusal(op, named, device="cpu", dtype=torch.float64))
        assert "it runs on the CPU, the inputs are on cuda" in str(refusal(op, named, device="cuda"))
        assert explain(op, dtype=torch.float64).backend == "torch"
        for backend in BACKENDS[op]:  # complex128 is in every way of making a kernel
            assert re.search("it needs float64|it runs on", str(refusal(op, backend, device="mps"))), backend
        assert explain(op, device="mps").backend == "none"
    with pytest.raises(BackendUnavailableError, match="A is in double precision; use backend='torch'"):
        s4d_kernel(**_diagonal(), length=4, backend="cpu")
    require_backend("s4d_kernel", "cpu")
    with pytest.raises(ConfigError, match="discretization must be 'bilinear' with backend 'cauchy_cpu', got 'zoh'"):
        s4_kernel(**_single(_low_rank()), length=4, discretization="zoh", backend="cauchy_cpu")
    assert explain("s4d_kernel", complex_A=True).backend == "cpu"
    assert explain("s4_kernel").backend == "cpu"
