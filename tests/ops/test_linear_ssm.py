"""One linear system from three sides, and against scipy's simulation of the continuous one."""

from __future__ import annotations

import pytest
import scipy.signal
import torch

from statescan.errors import ConfigError, ShapeError
from statescan.ops.discretization import DISCRETIZATIONS, discretize
from statescan.ops.hippo import hippo_legs
from statescan.ops.linear_ssm import ssm_convolution, ssm_kernel, ssm_recurrence, ssm_simulate


def _system(n: int = 6, inputs: int = 2, outputs: int = 3) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    A = hippo_legs(n).A
    B, C, D = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((n, inputs), (outputs, n), (outputs, inputs))
    )
    return A, B, C, D


def _input(length: int, inputs: int = 2) -> torch.Tensor:
    return torch.randn(3, length, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("method", DISCRETIZATIONS)
@pytest.mark.parametrize("length", [1, 2, 31, 257])
def test_convolution_is_recurrence(method: str, length: int) -> None:
    A, B, C, D = _system()
    A_bar, B_bar = discretize(A, B, 0.05, method)
    u = _input(length)
    recurrent = ssm_recurrence(A_bar, B_bar, C, u, D=D).y
    convolved = ssm_convolution(ssm_kernel(A_bar, B_bar, C, length), u, D=D)
    assert (recurrent - convolved).abs().max() <= 1e-12 * recurrent.abs().max()


def test_cut_anywhere_is_whole() -> None:
    A, B, C, D = _system()
    A_bar, B_bar = discretize(A, B, 0.05)
    u = _input(20)
    whole = ssm_recurrence(A_bar, B_bar, C, u, D=D)
    first = ssm_recurrence(A_bar, B_bar, C, u[:, :7], D=D)
    second = ssm_recurrence(A_bar, B_bar, C, u[:, 7:], D=D, initial_state=first.final_state)
    assert torch.equal(torch.cat([first.y, second.y], 1), whole.y)
    assert torch.equal(second.final_state, whole.final_state)


@pytest.mark.parametrize("hold", ["linear", "zero"])
def test_simulation_is_scipys(hold: str) -> None:
    A, B, C, D = _system()
    u, dt = _input(100), 0.03
    got = ssm_simulate(A, B, C, u, dt, D=D, hold=hold)
    for row in range(u.shape[0]):
        time = torch.arange(100, dtype=torch.float64) * dt
        system = (A.numpy(), B.numpy(), C.numpy(), D.numpy())
        _, y, _ = scipy.signal.lsim(system, u[row].numpy(), time.numpy(), interp=hold == "linear")
        assert (got[row] - torch.from_numpy(y)).abs().max() < 1e-10 * got.abs().max()


def test_zero_order_hold_is_the_simulation_of_a_held_input() -> None:
    """The recurrence's x_k has taken in u_k for a whole step, the simulation's y at that time hasn't yet."""
    A, B, C, _ = _system()
    u = _input(50)
    held = ssm_simulate(A, B, C, torch.cat([u, u[:, -1:]], 1), 0.03, hold="zero")
    recurrent = ssm_recurrence(*discretize(A, B, 0.03), C, u).y
    assert (held[:, 1:] - recurrent).abs().max() < 1e-12 * recurrent.abs().max()


def test_complex_diagonal_system() -> None:
    A = torch.diag(torch.tensor([-0.5 + 3j, -0.5 - 3j], dtype=torch.complex128))
    B = torch.ones(2, dtype=torch.complex128)
    C = torch.tensor([1 - 1j, 1 + 1j], dtype=torch.complex128)
    A_bar, B_bar = discretize(A, B, 0.1)
    u = _input(40, 1)
    kernel = ssm_kernel(A_bar, B_bar, C, 40)
    assert kernel.imag.abs().max() < 1e-14  # conjugate pairs make a real system
    recurrent = ssm_recurrence(A_bar, B_bar, C, u).y
    assert not recurrent.is_complex()
    assert (recurrent - ssm_convolution(kernel.real, u)).abs().max() < 1e-12


def test_a_complex_system_that_is_not_in_pairs_is_simulated_as_a_whole() -> None:
    """No conjugate cancels the imaginary parts, so none may be dropped on the way; a real C beside it, too."""
    A = torch.diag(torch.tensor([-0.5 + 3j, -0.2 - 1j], dtype=torch.complex128))
    u = _input(60, 1)
    for B, C in (([1.0, 2j], [1 - 1j, 0.5j]), ([1.0, 2.0], [1.0, -1.0])):
        B, C = torch.tensor(B, dtype=torch.complex128), torch.tensor(C, dtype=torch.complex128)
        D = torch.tensor([[0.3]], dtype=torch.float64)
        recurrent = ssm_recurrence(*discretize(A, B, 0.1), C, u, D=D).y - u * D
        held = ssm_simulate(A, B, C, torch.cat([u, u[:, -1:]], 1), 0.1, D=D, hold="zero")
        assert not held.is_complex()
        held = held[:, 1:] - torch.cat([u, u[:, -1:]], 1)[:, 1:] * D
        assert (held - recurrent).abs().max() < 1e-12 * recurrent.abs().max()
        if not C.imag.any():
            assert torch.equal(ssm_simulate(A, B.real, C.real, u, 0.1), ssm_simulate(A, B, C, u, 0.1))


def test_a_system_that_grows_may_run_until_it_leaves_the_numbers() -> None:
    A, b, dt = 2 * torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), 0.1
    assert ssm_kernel(A, b, b, 100)[-1].item() == 2 * 2.0**99
    u = torch.ones(1, 6000, 1, dtype=torch.float64)
    assert ssm_recurrence(A, b, b, u[:, :100]).y[0, -1].item() == 2 * (2.0**100 - 1)
    assert ssm_simulate(A, b, b, u[:, :11], dt)[0, -1].item() == pytest.approx(torch.e**2 - 1, rel=1e-12)
    for run in (
        lambda: ssm_kernel(A, b, b, 5000),
        lambda: ssm_recurrence(A, b, b, u),
        lambda: ssm_simulate(A, b, b, u, dt),
    ):
        with pytest.raises(ConfigError, match=r"must be finite, got .* shorten the sequence or pass a stable A"):
            run()
    A[0, 1] = float("nan")
    with pytest.raises(ConfigError, match="ssm_kernel: A must be finite, got 1 of 4 numbers that are not"):
        ssm_kernel(A, b, b, 4)


def test_gradients() -> None:
    A, B, C, D = (m.requires_grad_() for m in _system(3, 1, 1))
    u = _input(5, 1).requires_grad_()

    def run(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        A_bar, B_bar = discretize(A, B, 0.1)
        return ssm_convolution(ssm_kernel(A_bar, B_bar, C, 5), u, D=D) + ssm_recurrence(A_bar, B_bar, C, u, D=D).y

    assert torch.autograd.gradcheck(run, (A, B, C, D, u))
    assert torch.autograd.gradcheck(lambda *x: ssm_simulate(*x[:3], x[3], 0.1), (A, B, C, u))


def test_bad_input() -> None:
    A, B, C, D = _system()
    u = _input(4)
    with pytest.raises(ShapeError, match=r"A must be square \(d_state, d_state\), got \(6, 5\)"):
        ssm_recurrence(A[:, :5], B, C, u)
    with pytest.raises(ShapeError, match="C must have shape"):
        ssm_kernel(A, B, C[:, :5], 4)
    with pytest.raises(ConfigError, match="length must be an integer >= 1, got 0"):
        ssm_kernel(A, B, C, 0)
    with pytest.raises(ConfigError, match=r"length must be an integer >= 1, got 2\.5"):
        ssm_kernel(A, B, C, 2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ShapeError, match="u must have shape"):
        ssm_recurrence(A, B, C, u[..., :1])
    with pytest.raises(ShapeError, match="D must have shape"):
        ssm_recurrence(A, B, C, u, D=D[:2])
    with pytest.raises(ShapeError, match="initial_state must have shape"):
        ssm_recurrence(A, B, C, u, initial_state=torch.zeros(3, 5))
    with pytest.raises(ConfigError, match="hold must be 'linear' or 'zero', got 'cubic'"):
        ssm_simulate(A, B, C, u, 0.1, hold="cubic")
    with pytest.raises(ConfigError, match="dt must be a positive time, got 0"):
        ssm_simulate(A, B, C, u, 0.0)
