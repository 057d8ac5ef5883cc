"""Discretisation rules: each against its equation, the exact ones against a solved differential equation."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.ops.discretization import DISCRETIZATIONS, check_stable, discretize, discretize_bilinear, discretize_zoh

EPS = torch.finfo(torch.float64).eps


def _stable(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return matrix - (torch.linalg.eigvals(matrix).real.max() + 0.5) * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("method", DISCRETIZATIONS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_equation(method: str, n: int) -> None:
    A, B, dt = _stable(n), torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 0.3
    one = torch.eye(n, dtype=torch.float64)
    inverse = torch.linalg.inv
    wanted = {
        "zoh": lambda: (e := torch.from_numpy(scipy.linalg.expm(dt * A.numpy())), inverse(A) @ (e - one) @ B),
        "bilinear": lambda: (inverse(one - dt / 2 * A) @ (one + dt / 2 * A), inverse(one - dt / 2 * A) @ (dt * B)),
        "forward_euler": lambda: (one + dt * A, dt * B),
        "backward_euler": lambda: (inverse(one - dt * A), inverse(one - dt * A) @ (dt * B)),
    }[method]()
    for got, truth in zip(discretize(A, B, dt, method), wanted, strict=True):
        assert (got - truth).abs().max() <= 200 * EPS * torch.linalg.cond(A) * truth.abs().max()


@pytest.mark.parametrize("method", DISCRETIZATIONS)
def test_diagonal_is_the_dense_diagonal_matrix(method: str) -> None:
    A = torch.tensor([-1.0 + 3j, -0.5 - 20j, -30.0, -1e-9, 0.0], dtype=torch.complex128)
    B = torch.tensor([1.0, 2.0, -1.0, 3.0, 1.0], dtype=torch.float64)
    dt = torch.tensor([1e-3, 0.1, 1.0], dtype=torch.float64)
    flat = discretize(A, B, dt, method, diagonal=True)
    dense = discretize(torch.diag(A), B.to(A.dtype), dt, method)
    assert flat.A_bar.shape == flat.B_bar.shape == (3, 5)
    assert torch.allclose(torch.diag_embed(flat.A_bar), dense.A_bar, rtol=1e-13, atol=1e-15)
    assert torch.allclose(flat.B_bar, dense.B_bar, rtol=1e-13, atol=1e-15)


def test_zoh_of_half_a_step_twice_is_one_step() -> None:
    A, B = _stable(5), torch.ones(5, dtype=torch.float64)
    half, whole = discretize_zoh(A, B, 0.1), discretize_zoh(A, B, 0.2)
    assert torch.allclose(half.A_bar @ half.A_bar, whole.A_bar, rtol=0, atol=1e-14)
    assert torch.allclose(half.A_bar @ half.B_bar + half.B_bar, whole.B_bar, rtol=0, atol=1e-14)


def test_zoh_takes_a_singular_matrix() -> None:
    """A double integrator has no inverse: B_bar = (dt^2/2, dt)."""
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    got = discretize_zoh(A, torch.tensor([0.0, 1.0], dtype=torch.float64), 0.5)
    assert torch.allclose(got.A_bar, torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64), rtol=2 * EPS, atol=0)
    assert got.B_bar.tolist() == pytest.approx([0.125, 0.5], rel=2 * EPS)


@pytest.mark.parametrize(("method", "order"), [("bilinear", 2), ("forward_euler", 1), ("backward_euler", 1)])
def test_order_of_the_error(method: str, order: int) -> None:
    """One unit of time in k and in 2k steps: the error falls by 2^order."""
    A, B = _stable(4), torch.ones(4, dtype=torch.float64)
    truth = torch.linalg.matrix_exp(A)
    errors = []
    for steps in (256, 512):
        A_bar = discretize(A, B, 1 / steps, method).A_bar
        errors.append((torch.linalg.matrix_power(A_bar, steps) - truth).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


def test_bilinear_keeps_a_stable_system_stable() -> None:
    A = _stable(6, seed=3)
    for dt in (1e-3, 1.0, 1e3):
        radius = torch.linalg.eigvals(discretize_bilinear(A, torch.ones(6, dtype=A.dtype), dt).A_bar).abs().max()
        assert radius < 1


@pytest.mark.parametrize("method", DISCRETIZATIONS)
@pytest.mark.parametrize("diagonal", [False, True])
def test_gradients(method: str, diagonal: bool) -> None:
    if diagonal:
        A = torch.tensor([-1.0 + 2j, -3e-6 + 0j, -0.4 - 1j], dtype=torch.complex128, requires_grad=True)
        B = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    else:
        A = _stable(3).requires_grad_()
        B = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    dt = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: tuple(discretize(*x, method, diagonal=diagonal)), (A, B, dt))


def test_float32_in_float32_out_with_double_inside() -> None:
    A, B = _stable(5).float(), torch.ones(5)
    got = discretize_zoh(A, B, torch.tensor(0.1))
    assert got.A_bar.dtype == got.B_bar.dtype == torch.float32
    truth = discretize_zoh(A.double(), B.double(), torch.tensor(0.1).double())
    assert torch.equal(got.A_bar, truth.A_bar.float())
    assert torch.equal(got.B_bar, truth.B_bar.float())


def test_bad_input() -> None:
    A, B = _stable(3), torch.ones(3, dtype=torch.float64)
    with pytest.raises(ConfigError, match="dt must be positive and finite, got 0"):
        discretize(A, B, 0.0)
    with pytest.raises(ConfigError, match="dt must be positive and finite, got nan"):
        discretize(A, B, float("nan"))
    with pytest.raises(ConfigError, match=r"method must be one of .*got 'euler'"):
        discretize(A, B, 0.1, "euler")
    with pytest.raises(ShapeError, match=r"A must be square .*got \(3, 2\); pass diagonal=True"):
        discretize(A[:, :2], B, 0.1)
    with pytest.raises(ShapeError, match=r"B must have shape .*d_state = 3, got \(2,\)"):
        discretize(A, B[:2], 0.1)
    with pytest.raises(ShapeError, match="B must have d_state = 3 as its last size"):
        discretize(A.diagonal(), B[:2], 0.1, diagonal=True)
    with pytest.raises(DTypeError, match="A must be a floating or complex tensor"):
        discretize(A.long(), B, 0.1)


@pytest.mark.parametrize(("method", "dt"), [("bilinear", 2.0), ("backward_euler", 1.0)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_rule_without_an_inverse_is_refused(method: str, dt: float, diagonal: bool) -> None:
    A = torch.ones(2, dtype=torch.float64) if diagonal else torch.eye(2, dtype=torch.float64)
    B = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ConfigError, match=rf"discretize_{method}: .*got an eigenvalue of A that is {dt:g} / dt"):
        discretize(A, B, dt, method, diagonal=diagonal)
    discretize(A, B, dt / 2, method, diagonal=diagonal)  # a system that grows is a system


@pytest.mark.parametrize("method", DISCRETIZATIONS)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(method: str, diagonal: bool, bad: float, capfd: pytest.CaptureFixture) -> None:
    A = -torch.ones(2, dtype=torch.float64) if diagonal else -torch.eye(2, dtype=torch.float64)
    A[..., 1] = bad
    with pytest.raises(ConfigError, match=r"A must be finite, got . of . numbers that are not"):
        discretize(A, torch.ones(2, dtype=torch.float64), 0.1, method, diagonal=diagonal)
    with pytest.raises(ConfigError, match="op: A must be finite"):
        check_stable("op", A, diagonal=diagonal)
    assert capfd.readouterr().err == ""  # the library below complains on its own where it gets such a matrix


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_step_in_which_the_system_outgrows_its_numbers_is_refused(diagonal: bool) -> None:
    A = torch.full((1,), 800.0, dtype=torch.float64) if diagonal else torch.full((1, 1), 800.0, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"A_bar must be finite, .*pass a smaller dt"):
        discretize_zoh(A, torch.ones(1, dtype=torch.float64), 1.0, diagonal=diagonal)


def test_zoh_near_no_decay_is_exact() -> None:
    """Where (exp(a) - 1) / a is taken by its series, and on the other side."""
    for a in (-9.9e-6, 9.9e-6, -1e-8, -1.1e-5):
        got = discretize_zoh(torch.tensor([a]).double(), torch.ones(1).double(), 1.0, diagonal=True).B_bar.item()
        exact = math.expm1(torch.tensor([a]).double().item()) / torch.tensor([a]).double().item()
        assert got == pytest.approx(exact, rel=4 * EPS, abs=0)


def test_check_stable() -> None:
    for part, stable in ((1e-12, True), (1e-6, False)):  # of rounding's size, and not
        A = torch.tensor([[part, 1.0], [-1.0, part]], dtype=torch.float64)
        for diagonal, given in ((False, A), (True, torch.linalg.eigvals(A))):
            if stable:
                check_stable("op", given, diagonal=diagonal)
            else:
                with pytest.raises(ConfigError, match=r"op: A must be stable .*got one of 1e-06"):
                    check_stable("op", given, diagonal=diagonal)
    with pytest.raises(ShapeError, match=r"op: A must be square .*got \(3, 2\)"):
        check_stable("op", torch.zeros(3, 2))
    check_stable("op", _stable(4))
    check_stable("op", torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))  # a lossless oscillator
    with pytest.raises(ConfigError, match=r"op: A must be stable .*got one of 0.5"):
        check_stable("op", torch.tensor([-1.0, 0.5]), diagonal=True)
    with pytest.raises(ConfigError, match="op: A must be stable"):
        check_stable("op", -_stable(4))
