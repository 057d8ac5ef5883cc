"""HiPPO: the matrices against the integrals they stand for, the low-rank form against the dense matrix."""

from __future__ import annotations

import math

import pytest
import torch

from statescan.errors import ConfigError, ShapeError
from statescan.ops.hippo import (
    HIPPO_MEASURES,
    hippo,
    hippo_basis,
    hippo_fourier,
    hippo_legs,
    hippo_legt,
    hippo_nplr,
    hippo_project,
    hippo_reconstruct,
    hippo_weight,
)

SPAN = {"legs": 1.0, "legt": 0.5, "lagt": 1.0, "fourier": 0.5}


def _quadrature(low: float, high: float, points: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Legendre nodes and weights on [low, high]."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(points)
    half = (high - low) / 2
    return torch.from_numpy(nodes * half + (low + high) / 2), torch.from_numpy(weights * half)


def _signal(time: torch.Tensor) -> torch.Tensor:
    """Smooth, 0 before time 0 to third order, and of one period 0.5 from time 0.5 on (for the Fourier window)."""
    return torch.sin(4 * math.pi * time) ** 3 * (time > 0)


def test_published_entries() -> None:
    """Entries written out by hand from the papers' formulas."""
    A, B = hippo_legs(3)
    assert torch.allclose(
        A, -torch.tensor([[1, 0, 0], [3**0.5, 2, 0], [5**0.5, 15**0.5, 3]], dtype=torch.float64), atol=1e-15, rtol=0
    )
    assert torch.allclose(B, torch.tensor([1, 3**0.5, 5**0.5], dtype=torch.float64), atol=1e-15, rtol=0)
    A, B = hippo_legt(2, window=2.0)
    assert torch.allclose(A, torch.tensor([[-0.5, 3**0.5 / 2], [-(3**0.5) / 2, -1.5]], dtype=torch.float64))
    assert torch.allclose(B, torch.tensor([0.5, 3**0.5 / 2], dtype=torch.float64))


@pytest.mark.parametrize("measure", HIPPO_MEASURES)
def test_functions_are_orthonormal_under_their_measure(measure: str) -> None:
    span = SPAN[measure]
    age, weight = _quadrature(0, 120.0 if measure == "lagt" else span)
    basis = hippo_basis(measure, 9, age, span=span)
    gram = basis.T @ (basis * (weight * hippo_weight(measure, age, span=span)).unsqueeze(-1))
    assert (gram - torch.eye(9, dtype=torch.float64)).abs().max() < 1e-10


@pytest.mark.parametrize("measure", HIPPO_MEASURES)
def test_coefficients_are_the_integrals(measure: str) -> None:
    """x_n(t) = integral of u(t - s) p_n(s) w(s) ds by quadrature; the online states close in on it as dt falls."""
    span, end, order = SPAN[measure], 1.0, 6
    age, weight = _quadrature(0, span if measure in ("legt", "fourier") else end)
    density = hippo_weight(measure, age, span=span)
    basis = hippo_basis(measure, order, age, span=span)
    truth = (_signal(end - age) * weight * density) @ basis
    errors = []
    for steps in (2000, 4000):
        time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        # legt forgets what left its window through its own approximation: give it functions enough to see the signal
        size = 40 if measure in ("legt", "fourier") else order
        x = hippo_project(_signal(time), size, measure, dt=end / steps, window=span)[-1]
        errors.append((x[:order] - truth).abs().max().item())
    assert errors[1] < 2e-3
    assert errors[1] < 0.62 * errors[0]  # first order in the sampling at least


@pytest.mark.parametrize("measure", HIPPO_MEASURES)
def test_reconstruction(measure: str) -> None:
    """The past comes back from the state: better with more coefficients."""
    span, steps = SPAN[measure], 4000
    unit = 20.0 if measure == "lagt" else 1.0  # the fading measure looks back a few units of its own time
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    age = torch.linspace(0.05 * span, 0.9 * span, 200, dtype=torch.float64)
    errors = []
    for size in (5, 61):
        x = hippo_project(_signal(time), size, measure, dt=unit / steps, window=span)[-1]
        back = hippo_reconstruct(x, age * unit, measure, span=span)
        assert back.shape == (200,)
        errors.append((back - _signal(1 - age)).abs().mean().item())
    assert errors[1] < 0.05
    assert errors[1] < 0.15 * errors[0]


def test_legs_does_not_depend_on_the_rate() -> None:
    """The scaled measure has no time of its own: a signal drawn out to twice the length leaves the same state."""
    time = torch.arange(1, 3001, dtype=torch.float64) / 3000
    slow = torch.arange(1, 6001, dtype=torch.float64) / 6000
    x, y = hippo_project(_signal(time), 8)[-1], hippo_project(_signal(slow), 8)[-1]
    assert (x - y).abs().max() < 2e-3 < x.abs().max() / 10


@pytest.mark.parametrize("method", ["bilinear", "zoh", "forward_euler"])
def test_the_first_steps_of_legs(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample k, counted from 1, is taken in with a step of 1/k: equation 3, written out, over a bound of pieces too."""
    monkeypatch.setattr("statescan.ops.hippo._STEPS", 2)
    A, B = hippo_legs(4)
    one, inverse, u = torch.eye(4, dtype=torch.float64), torch.linalg.inv, (0.7, -1.1, 0.4, 2.0, -0.3)
    got, x = hippo_project(torch.tensor(u), 4, method=method), torch.zeros(4, dtype=torch.float64)
    for k, u_k in enumerate(u, 1):
        A_bar, B_bar = {
            "bilinear": lambda h: (inverse(one - h / 2 * A) @ (one + h / 2 * A), inverse(one - h / 2 * A) @ (h * B)),
            "zoh": lambda h: (e := torch.linalg.matrix_exp(h * A), inverse(A) @ (e - one) @ B),
            "forward_euler": lambda h: (one + h * A, h * B),
        }[method](1 / k)
        x = A_bar @ x + B_bar * torch.tensor(u_k).double()
        assert (got[k - 1] - x).abs().max() < 1e-13 * x.abs().max()


@pytest.mark.parametrize("measure", HIPPO_MEASURES)
def test_a_complex_signal_is_its_two_parts(measure: str) -> None:
    signal = torch.randn(2, 9, dtype=torch.complex128, generator=torch.Generator().manual_seed(2))
    real, imag = (hippo_project(part, 5, measure, dt=0.1) for part in (signal.real, signal.imag))
    got = hippo_project(signal, 5, measure, dt=0.1)
    assert (got - torch.complex(real, imag)).abs().max() < 1e-12 * got.abs().max()
    age = torch.tensor([0.1, 0.6])
    back = hippo_reconstruct(got[0, -1], age, measure)
    parts = (hippo_reconstruct(part[0, -1], age, measure) for part in (real, imag))
    assert (back - torch.complex(*parts)).abs().max() < 1e-12 * back.abs().max()


def test_a_weight_ends_where_its_window_does() -> None:
    age = torch.tensor([-0.01, 0.0, 0.49, 0.51], dtype=torch.float64)
    for measure in ("legs", "legt", "fourier"):
        assert hippo_weight(measure, age, span=0.5).tolist() == [0, 2, 2, 0]
    assert hippo_weight("lagt", age).tolist() == pytest.approx([0, 1, math.exp(-0.49), math.exp(-0.51)])


@pytest.mark.parametrize("measure", HIPPO_MEASURES)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
def test_normal_plus_low_rank_is_the_dense_matrix(measure: str, n: int) -> None:
    A, B = hippo(measure, n)
    Lambda, P, B_eigen, V = hippo_nplr(measure, n)
    back = V @ (torch.diag(Lambda) - P @ P.mH) @ V.mH
    scale = max(A.abs().max().item(), 1.0)
    assert (back - A).abs().max() < 1e-13 * scale
    assert (V @ B_eigen - B).abs().max() < 1e-12
    assert (V @ V.mH - torch.eye(n, dtype=V.dtype)).abs().max() < 1e-13
    assert P.shape == (n, 2 if measure == "legt" else 1)
    assert (Lambda.real <= 0).all()
    assert torch.allclose(Lambda.imag, -Lambda.imag.flip(0), atol=1e-10 * scale)  # conjugate pairs


@pytest.mark.parametrize("measure", HIPPO_MEASURES)
def test_the_systems_are_stable(measure: str) -> None:
    assert torch.linalg.eigvals(hippo(measure, 24).A).real.max() < 1e-9


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"hippo: measure must be one of .*got 'legq'"):
        hippo("legq", 4)
    with pytest.raises(ConfigError, match="hippo_legs: d_state must be an integer >= 1, got 0"):
        hippo_legs(0)
    with pytest.raises(ConfigError, match="hippo_fourier: window must be a positive time, got -1"):
        hippo_fourier(4, window=-1.0)
    with pytest.raises(ShapeError, match="signal must have shape"):
        hippo_project(torch.zeros(3, 0), 4)
    with pytest.raises(ConfigError, match="method must be one of"):
        hippo_project(torch.zeros(3), 4, method="magic")
    age = torch.tensor([0.1, 0.6])
    for measure in ("legs", "legt", "fourier"):
        for call in (hippo_weight, lambda m, a, span: hippo_basis(m, 4, a, span=span)):
            with pytest.raises(ConfigError, match="span must be a positive time, got 0"):
                call(measure, age, span=0)
        with pytest.raises(ConfigError, match=rf"age must be within 0 .. 0.5, what {measure} sees, got 0.1 .. 0.6"):
            hippo_reconstruct(torch.zeros(4), age, measure, span=0.5)
    with pytest.raises(ConfigError, match=r"age must be within 0 .. inf, what lagt sees, got -0.1 .. 0.6"):
        hippo_reconstruct(torch.zeros(4), torch.tensor([-0.1, 0.6]), "lagt")
    assert hippo_reconstruct(torch.ones(4), torch.tensor([1e-12, 0.5 + 1e-12]), "legt", span=0.5).isfinite().all()
