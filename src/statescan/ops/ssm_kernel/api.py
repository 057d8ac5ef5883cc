"""The public kernels of S4D and S4: checks, picks a backend, calls it."""

from __future__ import annotations

import cmath
from typing import NamedTuple

import torch
from torch import Tensor

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.ops._any_length import is_symbol
from statescan.ops._checks import (
    check_device,
    check_shape,
    check_tensor,
    transformed,
    values_readable,
    without_autocast,
)
from statescan.ops._dispatch import Facts, attempt, choose
from statescan.ops.discretization import check_finite, check_forward_euler, check_method, check_stable
from statescan.ops.ssm_kernel.real_form import kernel_dtype, real_form

__all__ = ["StateResponse", "s4_kernel", "s4_response", "s4d_kernel", "s4d_response"]

_REAL = (torch.float32, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)


class StateResponse(NamedTuple):
    """What a state before the first position adds: y ``(batch, length, d_model)``, and the state after the last."""

    y: Tensor
    final_state: Tensor


def _check(op: str, A_name: str, A: Tensor, others: dict[str, Tensor], dt: Tensor, length: int, method: str) -> None:
    check_tensor(op, A_name, A)
    if A.dim() != 2 or A.numel() == 0:
        raise ShapeError(
            f"{op}: {A_name} must have shape (d_model, states), got {tuple(A.shape)}; one row for each channel"
        )
    if A.dtype not in (*_REAL, *_COMPLEX):
        raise DTypeError(
            f"{op}: {A_name} must be float32, float64 or complex, got {A.dtype}; pass {A_name}.to(torch.complex64)"
        )
    for name, value in others.items():
        check_tensor(op, name, value)
        check_device(op, name, value, A, A_name)
        check_shape(op, name, value, tuple(A.shape), f"(d_model, states) as {A_name}")
    check_tensor(op, "dt", dt)
    check_device(op, "dt", dt, A, A_name)
    check_shape(op, "dt", dt, (A.shape[0],), "(d_model,)")
    if dt.is_complex() or not dt.is_floating_point():
        raise DTypeError(f"{op}: dt must be real, got {dt.dtype}; pass exp(log_dt) in float32")
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)) or length < 1:
        raise ConfigError(f"{op}: length must be an integer >= 1, got {length!r}; pass the length of the sequence")
    if values_readable(dt) and not bool((torch.isfinite(dt) & (dt > 0)).all()):
        raise ConfigError(
            f"{op}: dt must be positive and finite, got {dt.min().item():g} as its smallest; pass exp(log_dt)"
        )
    check_stable(op, A, diagonal=True)
    check_method(op, "discretization", method)
    # One look at all, since each makes the host wait for a GPU; a sum is not finite where one of its numbers is not.
    given = [value.detach() for value in others.values()]
    if all(map(values_readable, given)) and not cmath.isfinite(sum(x.sum() for x in given)):
        for name, value in others.items():
            check_finite(op, name, value)


def _columns(op: str, P: Tensor) -> Tensor:
    """P as ``(d_model, states, rank)``."""
    check_tensor(op, "P", P)
    columns = P.unsqueeze(-1) if P.dim() == 2 else P
    if columns.dim() != 3 or columns.shape[2] == 0:
        raise ShapeError(
            f"{op}: P must have shape (d_model, states) or (d_model, states, rank >= 1), got {tuple(P.shape)}; "
            "without a low rank it is s4d_kernel"
        )
    check_finite(op, "P", P)
    return columns


def _check_steps(op: str, A: Tensor, dt: Tensor, method: str, P: Tensor | None = None) -> None:
    """After the choice of a backend: a device without float64 has been refused by then."""
    if method != "forward_euler":
        return
    if P is None:
        check_forward_euler(op, A, dt, diagonal=True)
    elif values_readable(A) and values_readable(P):
        check_forward_euler(op, real_form(A.detach(), P.detach(), A, A)[0], dt)


def s4d_kernel(
    A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, discretization: str = "zoh", backend: str = "auto"
) -> Tensor:
    """Kernel of a diagonal state space model: a product with a Vandermonde matrix.

    ``K_l = sum_n C_n B_bar_n A_bar_n^l``; for complex A each state stands for itself and its conjugate:
    ``K_l = 2 Re(...)``.

    Args:
        A: ``(d_model, states)``, the diagonal of the continuous system; complex (one of each conjugate pair) or real.
            Negative real parts.
        B: ``(d_model, states)``, real or complex.
        C: ``(d_model, states)``, real or complex.
        dt: ``(d_model,)``, step, positive.
        length: number of lags.
        discretization: ``"zoh"``, ``"bilinear"``, ``"forward_euler"`` or ``"backward_euler"``.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"torch"`` or ``"reference"``; see `statescan.explain`.

    Returns:
        ``(d_model, length)``, float32; float64 for A in double precision.

    Raises:
        ShapeError, DTypeError, ConfigError: an argument doesn't fit.
        BackendUnavailableError: the named backend can't run this call.

    Numerics: size and phase of A_bar's powers are carried in float64 over the whole length and rounded to float32 at
    the start of every stretch of lags, so long kernels don't lose the phase; sums over the states are taken in float32.

    Source: S4D, arXiv:2206.11893, equations 4 to 6.
    """
    op = "s4d_kernel"
    _check(op, "A", A, {"B": B, "C": C}, dt, length, discretization)
    by_transform = transformed(A, B, C, dt)
    facts = Facts(A.device.type, kernel_dtype(A), A.is_complex(), A.shape[1], transformed=by_transform)

    def run(name: str) -> Tensor:
        _check_steps(op, A, dt, discretization)  # computes, which a refusal stands before
        if is_symbol(length):
            from statescan.ops.ssm_kernel import any_length  # noqa: F401, registers the operator

            return torch.ops.statescan.s4d_kernel(A, B, C, dt, length, discretization, name)
        if name == "cpu":
            from statescan.ops.ssm_kernel import cpu as module
        elif name == "triton":
            from statescan.ops.ssm_kernel import triton_vandermonde as module
        elif name == "torch":
            from statescan.ops.ssm_kernel import vandermonde as module
        else:
            from statescan.ops.ssm_kernel import reference as module
        with without_autocast(A.device.type):
            return module.s4d_kernel(A, B, C, dt, length, discretization)

    return attempt(op, backend, facts, run)


def s4_kernel(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
    *,
    discretization: str = "bilinear",
    backend: str = "auto",
) -> Tensor:
    """Kernel of a state space model whose A is diagonal plus low rank: ``A = diag(Lambda) - P P^*``.

    ``K_l = 2 Re(C A_bar^l B_bar)``, where each state stands for itself and its conjugate.

    Args:
        Lambda: ``(d_model, states)``, complex, one of each conjugate pair; negative real parts.
        P: ``(d_model, states)`` complex, rank 1, or ``(d_model, states, rank)``.
        B: ``(d_model, states)``, complex.
        C: ``(d_model, states)``, complex.
        dt: ``(d_model,)``, step, positive.
        length: number of lags.
        discretization: as for `s4d_kernel`; the backends named cauchy have the bilinear rule alone.
        backend: ``"auto"``; ``"cpu"`` in C++ and ``"torch"``: powers of the small dense matrix by squaring, in float64,
            and a product; ``"cauchy"``: the paper's way, its generating function at the roots of unity by the Woodbury
            identity and a Cauchy product, in pieces of bounded memory, ``"cauchy_cpu"`` and ``"cauchy_triton"`` with
            that product in one pass; ``"reference"``: one power after the other.

    Returns:
        ``(d_model, length)``, float32; float64 for Lambda in double precision.

    Raises:
        ShapeError, DTypeError, ConfigError: an argument doesn't fit.
        BackendUnavailableError: the named backend can't run this call.

    Numerics: by squaring within 2e-7 of float64 in the 2-norm over 16,384 lags, by a Cauchy product in float32 2e-6 and
    the gradient for dt up to 1e-4: near a frequency of A the quotient loses what float32 has lost of both. "auto" takes
    the former.

    Source: S4, arXiv:2111.00396, section 3 and appendix C.3; here C itself is the parameter, not ``C (I - A_bar^L)``:
    the same parameters serve every length and, by dt, every sampling rate.
    """
    op = "s4_kernel"
    columns = _columns(op, P)
    _check(op, "Lambda", Lambda, {"P": columns[..., 0], "B": B, "C": C}, dt, length, discretization)
    if not Lambda.is_complex():
        raise DTypeError(
            f"{op}: Lambda must be complex, got {Lambda.dtype}; pass one eigenvalue of each conjugate pair"
        )
    by_transform = transformed(Lambda, P, B, C, dt)
    facts = Facts(Lambda.device.type, kernel_dtype(Lambda), True, Lambda.shape[1], transformed=by_transform)

    def run(name: str) -> Tensor:
        _check_steps(op, Lambda, dt, discretization, columns)
        if name == "cpu":
            from statescan.ops.ssm_kernel import cpu_powers as module
        elif name == "torch":
            from statescan.ops.ssm_kernel import doubling as module
        elif name == "reference":
            from statescan.ops.ssm_kernel import reference as module
        else:
            if discretization != "bilinear":
                raise ConfigError(
                    f"{op}: discretization must be 'bilinear' with backend '{name}', got {discretization!r}; "
                    "its formula holds for that rule alone: use backend='torch'"
                )
            if name == "cauchy_cpu":
                from statescan.ops.ssm_kernel import cauchy_cpu as module
            elif name == "cauchy_triton":
                from statescan.ops.ssm_kernel import cauchy_triton as module
            else:
                from statescan.ops.ssm_kernel import cauchy as module
        if is_symbol(length):
            from statescan.ops.ssm_kernel import any_length  # noqa: F401, registers the operator

            return torch.ops.statescan.s4_kernel(Lambda, columns, B, C, dt, length, discretization, name)
        with without_autocast(Lambda.device.type):
            return module.s4_kernel(Lambda, columns, B, C, dt, length, discretization)

    return attempt(op, backend, facts, run)


def _check_run(op: str, u: Tensor, state: Tensor, like: Tensor, name: str) -> None:
    check_tensor(op, "u", u)
    check_tensor(op, "state", state)
    check_device(op, "u", u, like, name)
    check_device(op, "state", state, like, name)
    if u.dim() != 3 or u.shape[1] == 0 or u.shape[2] != like.shape[0]:
        raise ShapeError(
            f"{op}: u must have shape (batch, length >= 1, d_model) with d_model = {like.shape[0]}, "
            f"got {tuple(u.shape)}"
        )
    check_shape(op, "state", state, (u.shape[0], *like.shape), "(batch, d_model, states)")
    if state.is_complex() != like.is_complex():
        wanted = "complex" if like.is_complex() else "real"
        raise DTypeError(
            f"{op}: state must be {wanted} as {name} is, got {state.dtype}; take it from init_state or a call"
        )


def s4d_response(
    A: Tensor, B: Tensor, C: Tensor, dt: Tensor, u: Tensor, state: Tensor, *, discretization: str = "zoh"
) -> StateResponse:
    """What a state adds to the output of a diagonal system, and the state after the input: the kernel's other half.

    ``y_l = C A_bar^(l+1) x`` (twice the real part for pairs) and ``x' = A_bar^L x + sum_l A_bar^(L-1-l) B_bar u_l``.
    With the convolution of `s4d_kernel` added, this is the recurrence from that state.

    Args:
        A, B, C, dt, discretization: as in `s4d_kernel`.
        u: ``(batch, length, d_model)``, the input.
        state: ``(batch, d_model, states)``, before the first position; complex where A is.

    Returns:
        `StateResponse`: y in float32 (float64), the final state in double precision.

    Raises:
        ShapeError, DTypeError, ConfigError: an argument doesn't fit.
    """
    _check("s4d_response", "A", A, {"B": B, "C": C}, dt, 1, discretization)
    _check_run("s4d_response", u, state, A, "A")
    choose("s4d_kernel", "torch", A.device.type, kernel_dtype(A))  # refuses where it would, in words
    _check_steps("s4d_response", A, dt, discretization)
    if is_symbol(u.shape[1]):
        from statescan.ops.ssm_kernel import any_length  # noqa: F401, registers the operator

        return StateResponse(*torch.ops.statescan.s4d_response(A, B, C, dt, u, state, discretization))
    from statescan.ops.ssm_kernel import vandermonde

    with without_autocast(A.device.type):
        return StateResponse(*vandermonde.s4d_response(A, B, C, dt, u, state, discretization))


def s4_response(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    u: Tensor,
    state: Tensor,
    *,
    discretization: str = "bilinear",
) -> StateResponse:
    """The same for a system that is diagonal plus low rank, see `s4_kernel` and `s4d_response`.

    Args:
        Lambda, P, B, C, dt, discretization: as in `s4_kernel`.
        u: ``(batch, length, d_model)``, the input.
        state: ``(batch, d_model, states)``, complex, before the first position.

    Returns:
        `StateResponse`: y in float32 (float64), the final state in complex128.

    Raises:
        ShapeError, DTypeError, ConfigError: an argument doesn't fit.
    """
    columns = _columns("s4_response", P)
    _check("s4_response", "Lambda", Lambda, {"P": columns[..., 0], "B": B, "C": C}, dt, 1, discretization)
    _check_run("s4_response", u, state, Lambda, "Lambda")
    choose("s4_kernel", "torch", Lambda.device.type, kernel_dtype(Lambda))  # refuses where it would, in words
    _check_steps("s4_response", Lambda, dt, discretization, columns)
    if is_symbol(u.shape[1]):
        from statescan.ops.ssm_kernel import any_length  # noqa: F401, registers the operator

        return StateResponse(*torch.ops.statescan.s4_response(Lambda, columns, B, C, dt, u, state, discretization))
    from statescan.ops.ssm_kernel import doubling

    with without_autocast(Lambda.device.type):
        return StateResponse(*doubling.s4_response(Lambda, columns, B, C, dt, u, state, discretization))
