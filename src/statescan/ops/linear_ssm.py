"""The linear state space model from its three sides: a differential equation, a recurrence, a convolution.

``x'(t) = A x(t) + B u(t), y(t) = C x(t) + D u(t)`` becomes with a step (`statescan.ops.discretization`)
``x_k = A_bar x_{k-1} + B_bar u_k, y_k = C x_k + D u_k``, and unrolled ``y = K * u + D u`` with
``K_k = C A_bar^k B_bar``.
All functions are plain PyTorch: any device, differentiable, in the dtype of their inputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from statescan.errors import ConfigError, ShapeError
from statescan.ops._checks import check_tensor
from statescan.ops.discretization import check_finite
from statescan.ops.fft_conv.api import fft_conv

__all__ = ["LinearOutput", "ssm_convolution", "ssm_kernel", "ssm_recurrence", "ssm_simulate"]


class LinearOutput(NamedTuple):
    """y ``(batch, length, outputs)`` and the state after the last position ``(batch, d_state)``."""

    y: Tensor
    final_state: Tensor


def _system(op: str, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Checks a system; B as (d_state, inputs), C as (outputs, d_state), D as (outputs, inputs)."""
    for name, value in (("A", A), ("B", B), ("C", C)):
        check_tensor(op, name, value)
    if A.dim() != 2 or A.shape[0] != A.shape[1]:
        raise ShapeError(f"{op}: A must be square (d_state, d_state), got {tuple(A.shape)}; pass one system's matrix")
    check_finite(op, "A", A)
    n = A.shape[0]
    B = B.unsqueeze(-1) if B.dim() == 1 else B
    C = C.unsqueeze(0) if C.dim() == 1 else C
    if B.dim() != 2 or B.shape[0] != n:
        raise ShapeError(f"{op}: B must have shape (d_state, inputs) = ({n}, ...), got {tuple(B.shape)}")
    if C.dim() != 2 or C.shape[1] != n:
        raise ShapeError(f"{op}: C must have shape (outputs, d_state) = (..., {n}), got {tuple(C.shape)}")
    if D is not None:
        check_tensor(op, "D", D)
        D = D.reshape(1, 1) if D.numel() == 1 else D
        if tuple(D.shape) != (C.shape[0], B.shape[1]):
            raise ShapeError(
                f"{op}: D must have shape (outputs, inputs) = ({C.shape[0]}, {B.shape[1]}), got {tuple(D.shape)}"
            )
    return A, B, C, D


def _finite(op: str, name: str, value: Tensor) -> None:
    check_finite(op, name, value, "the system grows too far for its dtype: shorten the sequence or pass a stable A")


def _inputs(op: str, u: Tensor, inputs: int) -> None:
    check_tensor(op, "u", u)
    if u.dim() != 3 or u.shape[2] != inputs or u.shape[1] == 0:
        raise ShapeError(
            f"{op}: u must have shape (batch, length >= 1, inputs) = (..., ..., {inputs}), got {tuple(u.shape)}"
        )


def ssm_kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, length: int) -> Tensor:
    """The convolution kernel ``K_k = C A_bar^k B_bar`` for k < length, by squaring: log2(length) products of matrices.

    Args:
        A_bar: ``(d_state, d_state)``, a discrete system.
        B_bar: ``(d_state,)`` or ``(d_state, inputs)``.
        C: ``(d_state,)`` or ``(outputs, d_state)``.
        length: number of lags, >= 1.

    Returns:
        ``(length, outputs, inputs)``; complex where the system is.

    Raises:
        ShapeError: matrices that don't fit. ConfigError: length < 1, or a kernel that is not finite, since the system
            grows too far.

    Source: S4, arXiv:2111.00396, equation 5.
    """
    A, B, C, _ = _system("ssm_kernel", A_bar, B_bar, C, None)
    if not isinstance(length, int) or length < 1:
        raise ConfigError(f"ssm_kernel: length must be an integer >= 1, got {length!r}; pass the number of lags")
    kind = torch.promote_types(torch.promote_types(A.dtype, B.dtype), C.dtype)
    A, power = A.to(kind), A.to(kind)
    columns = B.to(kind).unsqueeze(0)  # A^k B for k < len(columns)
    while columns.shape[0] < length:
        columns = torch.cat([columns, power @ columns])
        power = power @ power
    kernel = C.to(kind) @ columns[:length]
    _finite("ssm_kernel", "the kernel", kernel)
    return kernel


def ssm_recurrence(
    A_bar: Tensor, B_bar: Tensor, C: Tensor, u: Tensor, *, D: Tensor | None = None, initial_state: Tensor | None = None
) -> LinearOutput:
    """Runs ``x_k = A_bar x_{k-1} + B_bar u_k, y_k = C x_k + D u_k``, one position after the other.

    Args:
        A_bar: ``(d_state, d_state)``; B_bar ``(d_state[, inputs])``; C ``([outputs, ]d_state)``.
        u: ``(batch, length, inputs)``.
        D: ``(outputs, inputs)``. Default None: no skip.
        initial_state: ``(batch, d_state)``. Default None: zeros.

    Returns:
        `LinearOutput`; y is real where u is (the real part of a complex system's output).

    Raises:
        ShapeError: matrices, u or a state that don't fit. ConfigError: an output that is not finite, since the system
            grows too far.
    """
    A, B, C, D = _system("ssm_recurrence", A_bar, B_bar, C, D)
    _inputs("ssm_recurrence", u, B.shape[1])
    kind = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.promote_types(C.dtype, u.dtype))
    A, B, C, wide = A.to(kind), B.to(kind), C.to(kind), u.to(kind)
    x = wide.new_zeros(u.shape[0], A.shape[0]) if initial_state is None else initial_state.to(kind)
    if tuple(x.shape) != (u.shape[0], A.shape[0]):
        raise ShapeError(
            f"ssm_recurrence: initial_state must have shape (batch, d_state) = {(u.shape[0], A.shape[0])}, "
            f"got {tuple(x.shape)}"
        )
    outputs = []
    for u_k in wide.unbind(1):
        x = x @ A.T + u_k @ B.T
        outputs.append(x @ C.T)
    y = _output(torch.stack(outputs, 1), u, D)
    _finite("ssm_recurrence", "the output", y)
    return LinearOutput(y, x)


def _output(y: Tensor, u: Tensor, D: Tensor | None) -> Tensor:
    """Real where the input is, with the skip."""
    if y.is_complex() and not u.is_complex():
        y = y.real
    return y if D is None else y + u @ D.T


def ssm_convolution(kernel: Tensor, u: Tensor, *, D: Tensor | None = None) -> Tensor:
    """Runs the same system as a convolution: ``y = K * u + D u``, by the fast Fourier transform.

    Args:
        kernel: ``(kernel_length, outputs, inputs)``, real, from `ssm_kernel`.
        u: ``(batch, length, inputs)``.
        D: ``(outputs, inputs)``. Default None.

    Returns:
        ``(batch, length, outputs)``; the state before the first position is 0.
    """
    check_tensor("ssm_convolution", "kernel", kernel)
    if kernel.dim() != 3:
        raise ShapeError(
            f"ssm_convolution: kernel must have shape (kernel_length, outputs, inputs), got {tuple(kernel.shape)}; "
            "make it with ssm_kernel"
        )
    _, outputs, inputs = kernel.shape
    _inputs("ssm_convolution", u, inputs)
    pairs = u.unsqueeze(2).expand(-1, -1, outputs, -1).flatten(2)  # one channel for each (output, input)
    y = fft_conv(pairs, kernel.flatten(1).T).unflatten(2, (outputs, inputs)).sum(-1)
    return y if D is None else y + u @ D.reshape(outputs, inputs).T


def ssm_simulate(
    A: Tensor, B: Tensor, C: Tensor, u: Tensor, dt: float, *, D: Tensor | None = None, hold: str = "linear"
) -> Tensor:
    """Solves ``x' = A x + B u, y = C x + D u`` from x = 0 at the times 0, dt, 2 dt, ... of the samples.

    Exact for an input that is linear between its samples (``hold="linear"``) or constant from each sample to the next
    (``hold="zero"``): a matrix exponential, no numerical integration.

    Args:
        A: ``(d_state, d_state)``; B ``(d_state[, inputs])``; C ``([outputs, ]d_state)``; continuous.
        u: ``(batch, length, inputs)``, the input at each time.
        dt: time between samples, > 0.
        D: ``(outputs, inputs)``. Default None.
        hold: ``"linear"`` or ``"zero"``.

    Returns:
        ``(batch, length, outputs)``: y at the samples' times, as `scipy.signal.lsim` gives it; real where u is (the
        real part of a complex system's output).

    Raises:
        ConfigError: an unknown hold, dt <= 0, an output that is not finite, since the system grows too far.
        ShapeError: matrices that don't fit.
    """
    op = "ssm_simulate"
    A, B, C, D = _system(op, A, B, C, D)
    _inputs(op, u, B.shape[1])
    if hold not in ("linear", "zero"):
        raise ConfigError(f"{op}: hold must be 'linear' or 'zero', got {hold!r}")
    n, inputs = B.shape
    if not (math.isfinite(dt) and dt > 0):
        raise ConfigError(f"{op}: dt must be a positive time, got {dt!r}; pass the time between two samples")
    # The input's value and its slope are states of their own: w' = slope, slope' = 0, over one step of length 1.
    kind = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.promote_types(C.dtype, u.dtype))
    A, B, C, wide = A.to(kind), B.to(kind), C.to(kind), u.to(kind)
    grown = A.new_zeros(n + 2 * inputs, n + 2 * inputs)
    grown[:n, :n], grown[:n, n : n + inputs] = A * dt, B * dt
    grown[n : n + inputs, n + inputs :] = torch.eye(inputs, dtype=kind, device=A.device)
    step = torch.linalg.matrix_exp(grown)[:n]
    A_bar, constant, slope = step.split([n, inputs, inputs], 1)
    now, following = (constant - slope, slope) if hold == "linear" else (constant, torch.zeros_like(slope))
    x = wide.new_zeros(u.shape[0], n)
    states = [x]
    for k in range(u.shape[1] - 1):
        x = x @ A_bar.T + wide[:, k] @ now.T + wide[:, k + 1] @ following.T
        states.append(x)
    y = _output(torch.stack(states, 1) @ C.T, u, D)
    _finite(op, "the output", y)
    return y
