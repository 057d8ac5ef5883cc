"""From a continuous system to a recurrence: the rules that turn (A, B) and a step into (A_bar, B_bar).

The continuous system is ``x'(t) = A x(t) + B u(t)``, the recurrence ``x_k = A_bar x_{k-1} + B_bar u_k``. Every rule is
one function with its equation, computed in float64 (complex128) and differentiable by autograd. All take a dense A, or
with ``diagonal=True`` the diagonal alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.ops._checks import check_tensor, values_readable

__all__ = [
    "DISCRETIZATIONS",
    "Discretized",
    "check_finite",
    "check_forward_euler",
    "check_method",
    "check_stable",
    "discretize",
    "discretize_backward_euler",
    "discretize_bilinear",
    "discretize_forward_euler",
    "discretize_zoh",
]


class Discretized(NamedTuple):
    """``x_k = A_bar x_{k-1} + B_bar u_k``; shapes as A and B, broadcast against dt."""

    A_bar: Tensor
    B_bar: Tensor


def check_finite(op: str, name: str, value: Tensor, cure: str = "") -> None:
    """Raises ConfigError where a number is infinite or NaN; nothing is read while a graph is traced or captured."""
    value = value.detach()
    if not values_readable(value) or bool(torch.isfinite(value).all()):
        return
    bad = int((~torch.isfinite(value)).sum())
    cure = cure or "look where they come from"
    raise ConfigError(f"{op}: {name} must be finite, got {bad} of {value.numel()} numbers that are not; {cure}")


def _wide(op: str, A: Tensor, B: Tensor, dt: Tensor | float, diagonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the arguments; returns A, B and dt in double precision, B with its inputs last, dt ready to multiply A."""
    check_tensor(op, "A", A)
    check_tensor(op, "B", B)
    for name, value in (("A", A), ("B", B)):
        if not (value.is_floating_point() or value.is_complex()):
            raise DTypeError(
                f"{op}: {name} must be a floating or complex tensor, got {value.dtype}; pass {name}.double()"
            )
    dt = torch.as_tensor(dt, dtype=torch.float64, device=A.device)
    if values_readable(dt) and not bool((torch.isfinite(dt) & (dt > 0)).all()):
        raise ConfigError(
            f"{op}: dt must be positive and finite, got {dt.min().item():g} as its smallest; pass a step > 0"
        )
    if diagonal:
        if A.dim() < 1 or B.shape[-1:] != A.shape[-1:]:
            raise ShapeError(
                f"{op}: B must have d_state = {A.shape[-1] if A.dim() else 0} as its last size, as the diagonal A has, "
                f"got {tuple(B.shape)}; pass one input weight for each state"
            )
    else:
        if A.dim() < 2 or A.shape[-1] != A.shape[-2]:
            raise ShapeError(
                f"{op}: A must be square (..., d_state, d_state), got {tuple(A.shape)}; "
                "pass diagonal=True if it is the diagonal alone"
            )
        if B.dim() < 1 or B.shape[0 if B.dim() == 1 else -2] != A.shape[-1]:
            raise ShapeError(
                f"{op}: B must have shape (d_state,) or (..., d_state, inputs) with d_state = {A.shape[-1]}, "
                f"got {tuple(B.shape)}; give it a row for each state of A"
            )
    check_finite(op, "A", A)
    return (
        A.to(torch.complex128 if A.is_complex() else torch.float64),
        B.to(torch.complex128 if B.is_complex() else torch.float64),
        dt[(..., *[None] * (1 if diagonal else 2))],
    )


def _result(op: str, A: Tensor, B: Tensor, A_bar: Tensor, B_bar: Tensor) -> Discretized:
    """Back to the dtypes that came in; B_bar is complex where A is."""
    if A_bar.is_complex() and not B_bar.is_complex():
        B_bar = B_bar.to(A_bar.dtype)
    B_dtype = B.dtype if B.is_complex() == B_bar.is_complex() else A.dtype
    A_bar = A_bar.to(A.dtype)
    check_finite(op, "A_bar", A_bar, "A grows too far in one step: pass a smaller dt")
    return Discretized(A_bar, B_bar.to(B_dtype))


def _dense_input(A: Tensor, B: Tensor) -> tuple[Tensor, bool]:
    """B as a matrix (d_state, inputs) of A's kind, and whether it came as a vector."""
    kind = torch.promote_types(A.dtype, B.dtype)
    return (B.unsqueeze(-1) if B.dim() == 1 else B).to(kind), B.dim() == 1


def discretize_zoh(A: Tensor, B: Tensor, dt: Tensor | float, *, diagonal: bool = False) -> Discretized:
    """Zero-order hold: exact for an input that is constant over each step.

    ``A_bar = exp(dt A)``, ``B_bar = A^{-1} (exp(dt A) - I) B``, taken as an integral: a singular A is no
    exception.

    Args:
        A: ``(d_state, d_state)``, or ``(..., d_state)`` with `diagonal`; real or complex.
        B: ``(d_state,)`` or ``(..., d_state, inputs)``; with `diagonal` any shape that broadcasts against A.
        dt: step, in the unit of time of A; a number, or a tensor that broadcasts against what stands before the states
            in A. Positive.
        diagonal: A is the diagonal of the matrix.

    Returns:
        `Discretized` in the dtypes of A and B (B_bar complex where A is).

    Raises:
        ShapeError: A is not square or B doesn't fit it.
        ConfigError: dt is not positive, A is not finite, or A_bar would not be: A grows too far in one step, or the
            rule's inverse does not exist.

    Numerics: computed in float64; the diagonal's quotient ``(exp(a) - 1) / a`` by expm1, by its series near 0.

    Source: Mamba, arXiv:2312.00752, equation 4; the integral form after Van Loan, 1978.
    """
    wide_A, wide_B, step = _wide("discretize_zoh", A, B, dt, diagonal)
    if diagonal:
        a = step * wide_A
        return _result("discretize_zoh", A, B, torch.exp(a), step * _phi1(a) * wide_B)
    matrix, vector = _dense_input(wide_A, wide_B)
    n, inputs = matrix.shape[-2:]
    # exp([[A, B], [0, 0]] dt) = [[A_bar, B_bar], [0, I]]
    many = torch.broadcast_shapes(wide_A.shape[:-2], matrix.shape[:-2])
    block = wide_A.new_zeros(*many, n + inputs, n + inputs, dtype=matrix.dtype)
    block[..., :n, :n] = wide_A
    block[..., :n, n:] = matrix
    grown = torch.linalg.matrix_exp(step * block)
    B_bar = grown[..., :n, n:]
    return _result("discretize_zoh", A, B, grown[..., :n, :n], B_bar.squeeze(-1) if vector else B_bar)


def _phi1(a: Tensor) -> Tensor:
    """(exp(a) - 1) / a, 1 at 0, with its gradient there."""
    small = a.abs() < 1e-5
    safe = torch.where(small, torch.ones_like(a), a)
    return torch.where(small, 1 + a / 2 + a * a / 6, torch.expm1(safe) / safe)


def discretize_bilinear(A: Tensor, B: Tensor, dt: Tensor | float, *, diagonal: bool = False) -> Discretized:
    """Bilinear rule (Tustin): maps the left half plane onto the unit disc, so a stable system stays stable.

    ``A_bar = (I - dt/2 A)^{-1} (I + dt/2 A)``, ``B_bar = (I - dt/2 A)^{-1} dt B``. Arguments, results and errors as in
    `discretize_zoh`.

    Source: S4, arXiv:2111.00396, equation 3.
    """
    return _generalized("discretize_bilinear", A, B, dt, 0.5, diagonal)


def discretize_forward_euler(A: Tensor, B: Tensor, dt: Tensor | float, *, diagonal: bool = False) -> Discretized:
    """Forward Euler: ``A_bar = I + dt A``, ``B_bar = dt B``; stable only while |1 + dt lambda| <= 1.

    Arguments, results and errors as in `discretize_zoh`.

    Source: HiPPO, arXiv:2008.07669, appendix B.3, with alpha = 0.
    """
    return _generalized("discretize_forward_euler", A, B, dt, 0.0, diagonal)


def discretize_backward_euler(A: Tensor, B: Tensor, dt: Tensor | float, *, diagonal: bool = False) -> Discretized:
    """Backward Euler: ``A_bar = (I - dt A)^{-1}``, ``B_bar = (I - dt A)^{-1} dt B``; damps whatever the step.

    Arguments, results and errors as in `discretize_zoh`.

    Source: HiPPO, arXiv:2008.07669, appendix B.3, with alpha = 1.
    """
    return _generalized("discretize_backward_euler", A, B, dt, 1.0, diagonal)


def _generalized(op: str, A: Tensor, B: Tensor, dt: Tensor | float, alpha: float, diagonal: bool) -> Discretized:
    """``A_bar = (I - alpha dt A)^{-1} (I + (1 - alpha) dt A)``, ``B_bar = (I - alpha dt A)^{-1} dt B``."""
    wide_A, wide_B, step = _wide(op, A, B, dt, diagonal)
    a = step * wide_A
    if diagonal:
        left = 1 - alpha * a
        if values_readable(left) and bool((left == 0).any()):
            raise _no_inverse(op, alpha)
        inverse = 1 / left
        return _result(op, A, B, inverse * (1 + (1 - alpha) * a), inverse * step * wide_B)
    matrix, vector = _dense_input(wide_A, wide_B)
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    left, right = one - alpha * a, one + (1 - alpha) * a
    try:
        A_bar, B_bar = torch.linalg.solve(left, right), torch.linalg.solve(left.to(matrix.dtype), step * matrix)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        raise _no_inverse(op, alpha) from None
    return _result(op, A, B, A_bar, B_bar.squeeze(-1) if vector else B_bar)


def _no_inverse(op: str, alpha: float) -> ConfigError:
    return ConfigError(
        f"{op}: I - {alpha:g} dt A must have an inverse, got an eigenvalue of A that is {1 / alpha:g} / dt; "
        "pass a smaller dt, or a stable A"
    )


DISCRETIZATIONS = {
    "zoh": discretize_zoh,
    "bilinear": discretize_bilinear,
    "forward_euler": discretize_forward_euler,
    "backward_euler": discretize_backward_euler,
}


def discretize(A: Tensor, B: Tensor, dt: Tensor | float, method: str = "zoh", *, diagonal: bool = False) -> Discretized:
    """The rule of that name: ``"zoh"``, ``"bilinear"``, ``"forward_euler"`` or ``"backward_euler"``.

    Raises:
        ConfigError: an unknown method.
    """
    check_method("discretize", "method", method)
    return DISCRETIZATIONS[method](A, B, dt, diagonal=diagonal)


def check_method(op: str, argument: str, method: str) -> None:
    """Raises ConfigError unless `method` names a rule."""
    if not isinstance(method, str) or method not in DISCRETIZATIONS:
        raise ConfigError(f"{op}: {argument} must be one of {sorted(DISCRETIZATIONS)}, got {method!r}; pass its name")


def check_forward_euler(op: str, A: Tensor, dt: Tensor, *, diagonal: bool = False) -> None:
    """Raises ConfigError where forward Euler, alone among the rules, makes a growing recurrence out of a stable system:
    the powers of A_bar would leave their dtype. Nothing is read while a graph is traced or captured.

    Args:
        A: stable; ``(channels, d_state, d_state)``, or with `diagonal` ``(channels, d_state)``.
        dt: ``(channels,)``, step.

    Raises:
        ConfigError: the largest eigenvalue of A_bar is beyond 1 by more than 1e-6, which is left for rounding.
    """
    if not (values_readable(A) and values_readable(dt)):
        return
    A, dt = A.detach(), dt.detach().double()
    step = dt.view(-1, *[1] * (A.dim() - 1)) * A.to(torch.complex128 if A.is_complex() else torch.float64)
    if diagonal:
        size = (1 + step).abs().amax(-1)
    else:
        size = _spectral_radius(torch.eye(A.shape[-1], dtype=step.dtype, device=step.device) + step)
    channel = int(size.argmax())
    worst = size[channel].item()
    if worst > 1 + 1e-6:
        raise ConfigError(
            f"{op}: with discretization 'forward_euler' no eigenvalue of A_bar may be larger than 1, got one of "
            f"{worst:.8g} at dt = {dt[channel].item():.4g}; pass a smaller dt, or 'zoh' or 'bilinear', stable at any dt"
        )


def _spectral_radius(A: Tensor) -> Tensor:
    """``||A^k||^(1/k)`` at k = 2^26, by squaring: too large by the logarithm of the eigenvectors' condition / k."""
    log = torch.zeros(A.shape[:-2], dtype=torch.float64, device=A.device)
    for squarings in range(26):
        size = torch.linalg.matrix_norm(A).clamp(min=torch.finfo(torch.float64).tiny)
        log = log + torch.log(size) / 2**squarings
        A = A / size[..., None, None]
        A = A @ A
    return torch.exp(log)


def check_stable(op: str, A: Tensor, *, diagonal: bool = False) -> None:
    """Raises ConfigError where an eigenvalue of the continuous A has a positive real part: its states would grow.

    Rounding of eigenvalues is allowed for: real parts up to 1e-9 of the largest eigenvalue's size count as zero.

    Raises:
        ShapeError: A is not square. ConfigError: A is not stable, or not finite.
    """
    if not diagonal and (A.dim() < 2 or A.shape[-1] != A.shape[-2]):
        raise ShapeError(
            f"{op}: A must be square (..., d_state, d_state), got {tuple(A.shape)}; "
            "pass diagonal=True if it is the diagonal alone"
        )
    if not values_readable(A):
        return
    A = A.detach()
    if A.device.type == "mps":
        A = A.cpu()  # it has neither double precision nor eigenvalues
    if not diagonal:
        check_finite(op, "A", A)
    wide = (A if diagonal else torch.linalg.eigvals(A)).to(torch.complex128)
    worst, largest = wide.real.max().item(), wide.abs().max().item()
    if not math.isfinite(largest):
        check_finite(op, "A", A)
    if worst > 1e-9 * max(largest, 1.0):
        raise ConfigError(
            f"{op}: A must be stable (no eigenvalue with a positive real part), got one of {worst:.4g}; "
            "change its sign, or shift A by a multiple of the identity"
        )
