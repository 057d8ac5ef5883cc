"""The products that kernels are made of, on the fast backends: fused kernels behind one autograd function each.

A backend is a pair of functions for each product it has, of contiguous real tensors (complex ones come as their parts):

``vandermonde_forward(log_re, log_im, w_re, w_im, length) -> K`` and
``vandermonde_backward(log_re, log_im, g) -> (s0_re, s0_im, s1_re, s1_im)``:
``K[d, l] = Re(sum_n w[d, n] z^l)`` with ``z = exp(log[d, n])``, and ``s0 = sum_l g[d, l] z^l``,
``s1 = sum_l l g[d, l] z^l``; log in float64, all else in float32; states ``(d_model, states)``, K and g
``(d_model, length)``.

``cauchy_forward(lam_re, lam_im, v_re, v_im, y, c) -> (out_re, out_im)`` and
``cauchy_backward(lam_re, lam_im, v_re, v_im, y, c, g_re, g_im) -> (dlam_re, dlam_im, dv_re, dv_im)``:
``out[d, s, k] = sum_n v / (i y - c lam) + conj(v) / (i y - c conj(lam))`` with ``v[d, s, n]``, ``lam[d, n]``, ``y[k]``,
``c[k]``, and the derivatives of ``sum(g_re out_re + g_im out_im)``; all in float32, any number of sums s.

``powers_forward(A, B, C, length) -> K`` and ``powers_backward(A, B, C, g) -> (dA, dB, dC)``: ``K[d, l] = C A^l B`` of
real matrices ``(d_model, n, n)`` and vectors ``(d_model, n)`` in float64, and the derivatives of ``sum(g K)``; K and g
in float32.

None of them holds an array of states x length; each sums in an order that the shapes alone fix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from statescan.ops._checks import refuse_second_derivative, wants_gradients
from statescan.ops.ssm_kernel import generating_function
from statescan.ops.ssm_kernel.decay import diagonal_system

__all__ = ["cauchy", "frequencies_at_a_time", "powers", "register", "s4_kernel", "s4d_kernel", "vandermonde"]


def _vandermonde_fake(log_re: Tensor, log_im: Tensor, w_re: Tensor, w_im: Tensor, length: int) -> Tensor:
    return w_re.new_empty(w_re.shape[0], length)


def _vandermonde_backward_fake(log_re: Tensor, log_im: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s0_re, s0_im, s1_re, s1_im = (g.new_empty(log_re.shape) for _ in range(4))
    return s0_re, s0_im, s1_re, s1_im


def _cauchy_fake(lam_re: Tensor, lam_im: Tensor, v_re: Tensor, v_im: Tensor, y: Tensor, c: Tensor) -> tuple:
    shape = (*v_re.shape[:2], y.shape[0])
    return v_re.new_empty(shape), v_re.new_empty(shape)


def _cauchy_backward_fake(
    lam_re: Tensor, lam_im: Tensor, v_re: Tensor, v_im: Tensor, y: Tensor, c: Tensor, g_re: Tensor, g_im: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(part) for part in (lam_re, lam_im, v_re, v_im))  # pyright: ignore[reportReturnType]


def _powers_fake(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    return A.new_empty(A.shape[0], length, dtype=torch.float32)


def _powers_backward_fake(A: Tensor, B: Tensor, C: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(A), torch.empty_like(B), torch.empty_like(C)


_STATES, _POINTS = "Tensor lam_re, Tensor lam_im, Tensor v_re, Tensor v_im", "Tensor y, Tensor c"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
_SCHEMAS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "vandermonde": (
        "vandermonde_forward",
        "(Tensor log_re, Tensor log_im, Tensor w_re, Tensor w_im, SymInt length) -> Tensor",
        _vandermonde_fake,
    ),
    "vandermonde_backward": (
        "vandermonde_backward",
        f"(Tensor log_re, Tensor log_im, Tensor g) -> {_FOUR}",
        _vandermonde_backward_fake,
    ),
    "cauchy": ("cauchy_forward", f"({_STATES}, {_POINTS}) -> (Tensor, Tensor)", _cauchy_fake),
    "cauchy_backward": (
        "cauchy_backward",
        f"({_STATES}, {_POINTS}, Tensor g_re, Tensor g_im) -> {_FOUR}",
        _cauchy_backward_fake,
    ),
    "powers": ("powers_forward", "(Tensor A, Tensor B, Tensor C, SymInt length) -> Tensor", _powers_fake),
    "powers_backward": (
        "powers_backward",
        "(Tensor A, Tensor B, Tensor C, Tensor g) -> (Tensor, Tensor, Tensor)",
        _powers_backward_fake,
    ),
}


def register(backend: str, devices: Sequence[str], implementation: Any) -> None:
    """Makes a backend's functions the operators ``statescan::<product>_product_<backend>`` and ``..._backward``.

    Args:
        backend: its name.
        devices: torch's dispatch keys, ``"CPU"``, ``"CUDA"``, ``"XPU"``.
        implementation: a module with the functions, which get contiguous tensors.
    """
    for product, (function, schema, fake) in _SCHEMAS.items():
        if not hasattr(implementation, function):
            continue
        name = f"statescan::{_name(product, backend)}"
        torch.library.define(name, schema)
        for device in devices:
            torch.library.impl(name, device, _on_contiguous(getattr(implementation, function)))
        torch.library.register_fake(name, fake)


def _name(product: str, backend: str) -> str:
    kind, _, backward = product.partition("_")
    return f"{kind}_product_{backend}" + ("_backward" if backward else "")


def _on_contiguous(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        return function(*(x.contiguous() if isinstance(x, Tensor) else x for x in inputs))

    return call


def _run(product: str, backend: str, *inputs: Any) -> Any:
    return getattr(torch.ops.statescan, _name(product, backend))(*inputs)


class _Vandermonde(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_re: Tensor, log_im: Tensor, w_re: Tensor, w_im: Tensor, length: int, backend: str
    ) -> Tensor:
        ctx.save_for_backward(log_re, log_im, w_re, w_im)
        ctx.backend = backend
        return _run("vandermonde", backend, log_re, log_im, w_re, w_im, length)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("s4d_kernel", ctx.backend)
        log_re, log_im, w_re, w_im = ctx.saved_tensors
        s0_re, s0_im, s1_re, s1_im = _run("vandermonde_backward", ctx.backend, log_re, log_im, g)
        # K = Re(w z^l): by w conj(s0), by log conj(w s1)
        by_log_re, by_log_im = w_re * s1_re - w_im * s1_im, -(w_re * s1_im + w_im * s1_re)
        return by_log_re.double(), by_log_im.double(), s0_re, -s0_im, None, None


class _Cauchy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, lam_re: Tensor, lam_im: Tensor, v_re: Tensor, v_im: Tensor, y: Tensor, c: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(lam_re, lam_im, v_re, v_im, y, c)
        ctx.backend = backend
        return _run("cauchy", backend, lam_re, lam_im, v_re, v_im, y, c)

    @staticmethod
    def backward(ctx: Any, g_re: Tensor, g_im: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("s4_kernel", f"cauchy_{ctx.backend}")
        return (*_run("cauchy_backward", ctx.backend, *ctx.saved_tensors, g_re, g_im), None, None, None)


class _Powers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, C: Tensor, length: int, backend: str) -> Tensor:
        ctx.save_for_backward(A, B, C)
        ctx.backend = backend
        return _run("powers", backend, A, B, C, length)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("s4_kernel", ctx.backend)
        return (*_run("powers_backward", ctx.backend, *ctx.saved_tensors, g), None, None)


def vandermonde(log: Tensor, weight: Tensor, length: int, backend: str) -> Tensor:
    """``K[d, l] = Re(sum_n weight[d, n] exp(l log[d, n]))``, float32 ``(d_model, length)``.

    Args:
        log: ``(d_model, states)``, complex128; its real parts at most 0 but for rounding.
        weight: ``(d_model, states)``, complex; taken in float32.
        length: number of lags.
        backend: one that has registered its products.
    """
    inputs = (log.real.contiguous(), log.imag.contiguous(), weight.real.float(), weight.imag.float(), length)
    if wants_gradients(log, weight):
        return _Vandermonde.apply(*inputs, backend)  # pyright: ignore[reportReturnType]
    return _run("vandermonde", backend, *inputs)


def cauchy(Lambda: Tensor, v: Tensor, y: Tensor, c: Tensor, backend: str) -> Tensor:
    """``sum_n v_n / (iy - c Lambda_n)`` and its conjugate pair's, complex64 ``(d_model, sums, k)``.

    Args:
        Lambda: ``(d_model, states)``, complex64, negative real parts.
        v: ``(d_model, sums, states)``, complex64.
        y, c: ``(k,)``, float32; no gradient flows into them.
        backend: one that has registered its products.
    """
    inputs = (Lambda.real, Lambda.imag, v.real, v.imag, y, c)
    inputs = tuple(part.contiguous() for part in inputs)
    if wants_gradients(Lambda, v):
        return torch.complex(*_Cauchy.apply(*inputs, backend))  # pyright: ignore[reportGeneralTypeIssues]
    return torch.complex(*_run("cauchy", backend, *inputs))


def powers(A: Tensor, B: Tensor, C: Tensor, length: int, backend: str) -> Tensor:
    """``K[d, l] = C[d] A[d]^l B[d]``, float32 ``(d_model, length)``.

    Args:
        A: ``(d_model, n, n)``, float64.
        B, C: ``(d_model, n)``, float64.
        length: number of lags.
        backend: one that has registered the product.
    """
    if wants_gradients(A, B, C):
        return _Powers.apply(A, B, C, length, backend)  # pyright: ignore[reportReturnType]
    return _run("powers", backend, A, B, C, length)


def s4d_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str, backend: str) -> Tensor:
    """See the public function."""
    decay, B_bar = diagonal_system(A, B, dt, discretization)
    weight = B_bar * C * (2 if A.is_complex() else 1)
    if decay.tiny is None:
        return vandermonde(decay.log, weight, length, backend)
    # An A_bar next to 0 has the powers 1, A_bar, 0, 0, ... and the gradient of these.
    K = vandermonde(decay.log, torch.where(decay.tiny, 0, weight), length, backend)
    weight = torch.where(decay.tiny, weight, 0)
    first = torch.stack([weight.sum(-1).real, (weight * decay.A_bar).sum(-1).real], -1)[:, :length]
    return torch.cat([K[:, :2] + first.to(K.dtype), K[:, 2:]], 1)


def frequencies_at_a_time(Lambda: Tensor, P: Tensor, sums: int) -> int:
    """How many `s4_kernel` takes where it makes about so many sums; arguments as there."""
    return max(1, sums // (Lambda.shape[0] * (1 + P.shape[2]) ** 2))


def s4_kernel(
    Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, backend: str, sums: int
) -> Tensor:
    """See the public function; the bilinear rule alone, in pieces of about so many sums."""
    product = lambda Lambda, v, y, c: cauchy(Lambda, v, y, c, backend)
    return generating_function.s4_kernel(product, Lambda, P, B, C, dt, length, frequencies_at_a_time(Lambda, P, sums))
