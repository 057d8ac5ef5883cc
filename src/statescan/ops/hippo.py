"""HiPPO: state matrices that remember. Each measure weighs the past; its states are the past's coefficients.

For a measure ``w`` on the age ``s`` of an input and polynomials (or waves) ``p_n`` orthonormal under it, the state is
``x_n(t) = integral of u(t - s) p_n(s) w(s) ds``. Differentiated, that is a linear system ``x' = A x + B u``, and
``u(t - s) ~ sum_n x_n(t) p_n(s)`` gives the signal back.

| measure | age | w | p_n |
|---|---|---|---|
| legs | all of [0, t], stretched | 1/t | sqrt(2n+1) P_n(1 - 2 s/t) |
| legt | a window [0, T] | 1/T | sqrt(2n+1) P_n(1 - 2 s/T) |
| lagt | all, fading | exp(-s) | L_n(s) |
| fourier | a window [0, T] | 1/T | 1, sqrt 2 cos(2 pi k s/T), sqrt 2 sin(2 pi k s/T), ... |

`legs` is the one whose system depends on the time: ``x' = (A x + B u) / t``; as a constant system (as S4 uses it) it
weighs the age by ``exp(-s)`` and its functions are ``sqrt(2n+1) P_n(2 exp(-s) - 1)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from statescan.errors import ConfigError, ShapeError
from statescan.ops._checks import check_tensor, values_readable
from statescan.ops.discretization import discretize

__all__ = [
    "HIPPO_MEASURES",
    "HippoMatrices",
    "NormalPlusLowRank",
    "hippo",
    "hippo_basis",
    "hippo_fourier",
    "hippo_lagt",
    "hippo_legs",
    "hippo_legt",
    "hippo_nplr",
    "hippo_project",
    "hippo_reconstruct",
    "hippo_weight",
]


_STEPS = 1024  # of legs, whose system is another at every sample: matrices that are held at once


class HippoMatrices(NamedTuple):
    """``x' = A x + B u``: A ``(d_state, d_state)``, B ``(d_state,)``, float64."""

    A: Tensor
    B: Tensor


def _check_size(op: str, d_state: int, window: float = 1.0) -> None:
    if not isinstance(d_state, int) or isinstance(d_state, bool) or d_state < 1:
        raise ConfigError(f"{op}: d_state must be an integer >= 1, got {d_state!r}; pass the number of coefficients")
    if not (math.isfinite(window) and window > 0):
        raise ConfigError(f"{op}: window must be a positive time, got {window!r}; pass the length of the window")


def _roots(d_state: int) -> Tensor:
    """sqrt(2n + 1), the norms of the Legendre polynomials."""
    return torch.sqrt(2 * torch.arange(d_state, dtype=torch.float64) + 1)


def hippo_legs(d_state: int) -> HippoMatrices:
    """Scaled Legendre: the whole past, every part of it alike.

    ``A[n, k] = -sqrt((2n+1)(2k+1))`` below the diagonal, ``-(n+1)`` on it, 0 above; ``B[n] = sqrt(2n+1)``.

    Args:
        d_state: number of coefficients, >= 1.

    Returns:
        `HippoMatrices`, float64.

    Raises:
        ConfigError: d_state < 1.

    Source: HiPPO, arXiv:2008.07669, equation 3 (theorem 2); S4, arXiv:2111.00396, equation 2.
    """
    _check_size("hippo_legs", d_state)
    root = _roots(d_state)
    A = -torch.tril(torch.outer(root, root), -1) - torch.diag(torch.arange(1, d_state + 1, dtype=torch.float64))
    return HippoMatrices(A, root)


def hippo_legt(d_state: int, window: float = 1.0) -> HippoMatrices:
    """Translated Legendre: a sliding window, every part of it alike.

    With ``M = sqrt((2n+1)(2k+1)) / window``: ``A[n, k] = -M`` for k <= n, ``-(-1)^(n-k) M`` for k > n;
    ``B[n] = sqrt(2n+1) / window``.

    Args:
        d_state: number of coefficients, >= 1.
        window: length T of the window, in the unit of time of the system.

    Source: HiPPO, arXiv:2008.07669, theorem 1, in orthonormal coordinates.
    """
    _check_size("hippo_legt", d_state, window)
    root, order = _roots(d_state), torch.arange(d_state)
    gap = order[:, None] - order[None, :]
    sign = torch.where(gap >= 0, 1.0, 1.0 - 2.0 * (gap % 2).double())
    return HippoMatrices(-torch.outer(root, root) * sign / window, root / window)


def hippo_lagt(d_state: int) -> HippoMatrices:
    """Translated Laguerre: the whole past, fading as exp(-age).

    ``A[n, k] = -1`` for k <= n, 0 above; ``B[n] = 1``.

    Source: HiPPO, arXiv:2008.07669, theorem 1, with alpha = 0, beta = 1.
    """
    _check_size("hippo_lagt", d_state)
    ones = torch.ones(d_state, d_state, dtype=torch.float64)
    return HippoMatrices(-torch.tril(ones), ones[0])


def hippo_fourier(d_state: int, window: float = 1.0) -> HippoMatrices:
    """A sliding window in waves: constant, cosine and sine of 1, 2, ... periods.

    With ``p`` the functions at age 0 (1, sqrt 2, 0, sqrt 2, 0, ...) and F the waves' rotations of ``2 pi k``:
    ``A = (F - 2 p p^T) / window``, ``B = 2 p / window``. The factor 2: at the window's ends a Fourier series gives the
    mean of the two, ``(u(t) + u(t - window)) / 2``.

    Args:
        d_state: number of coefficients, >= 1; an even one leaves its last state at 0 (a wave needs two).
        window: length T of the window, in the unit of time of the system.

    Source: How to Train Your HiPPO, arXiv:2206.12037, theorem 6 (FouT).
    """
    _check_size("hippo_fourier", d_state, window)
    p = _fourier_start(d_state)
    return HippoMatrices((_fourier_turn(d_state) - 2 * torch.outer(p, p)) / window, 2 * p / window)


def _fourier_start(d_state: int) -> Tensor:
    """The waves at age 0."""
    p = torch.zeros(d_state, dtype=torch.float64)
    p[0] = 1
    p[1 : d_state - 1 : 2] = math.sqrt(2)
    return p


def _fourier_turn(d_state: int) -> Tensor:
    """The waves' derivative by age: cos' = -w sin, sin' = w cos."""
    turn = torch.zeros(d_state, d_state, dtype=torch.float64)
    for cosine in range(1, d_state - 1, 2):
        frequency = math.pi * (cosine + 1)
        turn[cosine, cosine + 1], turn[cosine + 1, cosine] = -frequency, frequency
    return turn


HIPPO_MEASURES: dict[str, Callable[[int], HippoMatrices]] = {
    "legs": hippo_legs,
    "legt": hippo_legt,
    "lagt": hippo_lagt,
    "fourier": hippo_fourier,
}


def _check_measure(op: str, measure: str) -> None:
    if measure not in HIPPO_MEASURES:
        raise ConfigError(f"{op}: measure must be one of {sorted(HIPPO_MEASURES)}, got {measure!r}")


def hippo(measure: str, d_state: int) -> HippoMatrices:
    """The matrices of the measure ``"legs"``, ``"legt"``, ``"lagt"`` or ``"fourier"`` (windows of length 1)."""
    _check_measure("hippo", measure)
    return HIPPO_MEASURES[measure](d_state)


def _legendre(d_state: int, x: Tensor) -> Tensor:
    """sqrt(2n+1) P_n(x) for n < d_state, in a new last dimension, by Bonnet's recurrence."""
    rows = [torch.ones_like(x), x]
    for n in range(1, d_state - 1):
        rows.append(((2 * n + 1) * x * rows[n] - n * rows[n - 1]) / (n + 1))
    return torch.stack(rows[:d_state], -1) * _roots(d_state).to(x.device)


def _check_span(op: str, measure: str, span: Tensor | float) -> None:
    """What a measure is stretched over, where it is stretched."""
    wide = torch.as_tensor(span).double()
    if measure != "lagt" and values_readable(wide) and not bool((torch.isfinite(wide) & (wide > 0)).all()):
        raise ConfigError(
            f"{op}: span must be a positive time, got {wide.min().item():g}; "
            "pass the window, or for legs the time since the start"
        )


def hippo_basis(measure: str, d_state: int, age: Tensor, *, span: Tensor | float = 1.0) -> Tensor:
    """The functions p_n at an age, so that ``u(t - age) ~ (hippo_basis(...) * x(t)).sum(-1)``.

    Args:
        measure: name of a measure, see the module's table.
        d_state: number of functions.
        age: any shape; how long ago, 0 = now.
        span: what the functions are stretched over: the window T of `legt` and `fourier`, the time t since the start
            for `legs`; broadcasts against `age`. No meaning for `lagt`.

    Returns:
        ``(*age.shape, d_state)``, float64.

    Raises:
        ConfigError: an unknown measure, d_state < 1, a span <= 0.
    """
    _check_measure("hippo_basis", measure)
    _check_size("hippo_basis", d_state)
    _check_span("hippo_basis", measure, span)
    age = torch.as_tensor(age).double()
    part = age / span
    if measure in ("legs", "legt"):
        return _legendre(d_state, 1 - 2 * part)
    if measure == "lagt":
        rows = [torch.ones_like(age), 1 - age]
        for n in range(1, d_state - 1):
            rows.append(((2 * n + 1 - age) * rows[n] - n * rows[n - 1]) / (n + 1))
        return torch.stack(rows[:d_state], -1)
    waves = [torch.ones_like(part)]
    for n in range(1, d_state):
        turn = 2 * math.pi * ((n + 1) // 2) * part
        wave = torch.cos(turn) if n % 2 else torch.sin(turn)
        waves.append(math.sqrt(2) * wave if n % 2 == 0 or n + 1 < d_state else torch.zeros_like(part))
    return torch.stack(waves, -1)


def hippo_weight(measure: str, age: Tensor, *, span: Tensor | float = 1.0) -> Tensor:
    """The measure's density at an age; `span` as in `hippo_basis`. Its integral over the age is 1."""
    _check_measure("hippo_weight", measure)
    _check_span("hippo_weight", measure, span)
    age = torch.as_tensor(age).double()
    if measure == "lagt":
        return torch.where(age >= 0, torch.exp(-age), torch.zeros_like(age))
    inside = (age >= 0) & (age <= span)
    return torch.where(inside, torch.ones_like(age) / span, torch.zeros_like(age))


def hippo_project(
    signal: Tensor,
    d_state: int,
    measure: str = "legs",
    *,
    dt: float = 1.0,
    window: float = 1.0,
    method: str = "bilinear",
) -> Tensor:
    """The coefficients of a signal's past at every time, made online: one small product for each sample.

    Args:
        signal: ``(..., length)``, samples ``u(dt), u(2 dt), ...``.
        d_state: number of coefficients.
        measure: name of a measure.
        dt: time between samples. `legs` doesn't depend on it.
        window: the window T of `legt` and `fourier`.
        method: discretisation, see `statescan.ops.discretization.discretize`.

    Returns:
        ``(..., length, d_state)``, float64, complex128 of a complex signal: the state after each sample.

    Raises:
        ShapeError: an empty signal. ConfigError: an unknown measure or method, a size or step out of range.

    Source: HiPPO, arXiv:2008.07669, algorithm of section 2.3; `legs` by its equation 3, with step 1/k at sample k.
    """
    check_tensor("hippo_project", "signal", signal)
    if signal.dim() < 1 or signal.shape[-1] == 0:
        raise ShapeError(f"hippo_project: signal must have shape (..., length >= 1), got {tuple(signal.shape)}")
    _check_measure("hippo_project", measure)
    windowed = {"legt": hippo_legt, "fourier": hippo_fourier}
    A, B = windowed[measure](d_state, window) if measure in windowed else hippo(measure, d_state)
    fixed = None if measure == "legs" else discretize(A, B, dt, method)
    u = _wide(signal)
    x = u.new_zeros(*u.shape[:-1], d_state)
    states = []
    for start in range(0, u.shape[-1], _STEPS):
        piece = u[..., start : start + _STEPS].unbind(-1)
        if fixed is None:
            steps = 1 / torch.arange(start + 1, start + len(piece) + 1, dtype=torch.float64)
            A_bar, B_bar = (m.to(u) for m in discretize(A, B, steps, method))
        else:
            A_bar, B_bar = (m.to(u).expand(len(piece), *m.shape) for m in fixed)
        for u_k, A_k, B_k in zip(piece, A_bar, B_bar, strict=True):
            x = x @ A_k.T + u_k.unsqueeze(-1) * B_k
            states.append(x)
    return torch.stack(states, -2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def hippo_reconstruct(
    coefficients: Tensor, age: Tensor, measure: str = "legs", *, span: Tensor | float = 1.0
) -> Tensor:
    """The signal as the coefficients remember it, at the given ages.

    Args:
        coefficients: ``(..., d_state)``, the state at one time.
        age: ``(points,)``, how long ago.
        measure: name of the measure the coefficients were made with.
        span: see `hippo_basis`; for `legs` the time since the start.

    Returns:
        ``(..., points)``, float64; complex128 of complex coefficients.

    Raises:
        ConfigError: an unknown measure, a span <= 0, an age outside of what the measure sees: [0, span], of `lagt` all
            from 0 on.
    """
    op = "hippo_reconstruct"
    check_tensor(op, "coefficients", coefficients)
    _check_measure(op, measure)
    _check_span(op, measure, span)
    age = torch.as_tensor(age).double()
    oldest = torch.as_tensor(math.inf if measure == "lagt" else span).double()
    slack = 1e-6 * torch.as_tensor(span).double()  # of times in float32
    if values_readable(age) and not bool(((age >= -slack) & (age <= oldest + slack)).all()):
        raise ConfigError(
            f"{op}: age must be within 0 .. {oldest.max().item():g}, what {measure} sees, got {age.min().item():g} .. "
            f"{age.max().item():g}; pass the times that it was made of, or the right span"
        )
    wide = _wide(coefficients)
    return wide @ hippo_basis(measure, wide.shape[-1], age, span=span).to(wide).transpose(-1, -2)


class NormalPlusLowRank(NamedTuple):
    """``A = V (diag(Lambda) - P P^*) V^*`` and ``B = V B_eigen``, with V unitary.

    Lambda ``(d_state,)``, P ``(d_state, rank)``, B ``(d_state,)`` in the eigenbasis (diagonal plus low rank) and V
    ``(d_state, d_state)``; complex128. The eigenvalues come in conjugate pairs, sorted by imaginary part.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def hippo_nplr(measure: str, d_state: int) -> NormalPlusLowRank:
    """A HiPPO matrix as a normal matrix plus a low-rank one, and so in its eigenbasis diagonal plus low rank.

    ``A + P P^T`` is a multiple of the identity plus a skew-symmetric matrix, whose eigenvectors are unitary: Hermitian
    eigenproblem, no ill-conditioned diagonalisation. Rank 1 for `legs`, `lagt` and `fourier`, 2 for `legt`.

    Args:
        measure: name of a measure (windows of length 1).
        d_state: number of states.

    Returns:
        `NormalPlusLowRank`, complex128.

    Raises:
        ConfigError: an unknown measure, d_state < 1.

    Source: S4, arXiv:2111.00396, theorem 1 and appendix C.1.
    """
    A, B = hippo(measure, d_state)
    if measure == "legs":
        P = torch.sqrt(torch.arange(d_state, dtype=torch.float64) + 0.5).unsqueeze(-1)
    elif measure == "legt":
        P = torch.zeros(d_state, 2, dtype=torch.float64)
        P[0::2, 0], P[1::2, 1] = _roots(d_state)[0::2], _roots(d_state)[1::2]
    elif measure == "lagt":
        P = torch.full((d_state, 1), math.sqrt(0.5), dtype=torch.float64)
    else:
        P = math.sqrt(2) * _fourier_start(d_state).unsqueeze(-1)
    normal = A + P @ P.T
    damping = -0.5 if measure in ("legs", "lagt") else 0.0  # the diagonal of what is left
    skew = (normal - normal.T) / 2
    frequency, V = torch.linalg.eigh(-1j * skew)  # skew = V (i frequency) V^*
    if measure == "fourier" and d_state % 2 == 0:  # the constant and the idle state, both without a frequency: a pair
        V[:, [d_state // 2 - 1, d_state // 2]] = 0
        V[0, [d_state // 2 - 1, d_state // 2]] = math.sqrt(0.5)
        V[-1, d_state // 2 - 1], V[-1, d_state // 2] = -1j * math.sqrt(0.5), 1j * math.sqrt(0.5)
    return NormalPlusLowRank(damping + 1j * frequency, V.mH @ P.to(V.dtype), V.mH @ B.to(V.dtype), V)
