"""The long convolution as a product of spectra, on any device that torch has a Fourier transform for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._checks import transforms_active
from statescan.ops._dispatch import Facts

__all__ = ["fast_length", "fft_conv", "refuses"]


def refuses(facts: Facts) -> str | None:
    """torch.fft runs on every device this package meets."""
    return None


def fast_length(least: int) -> int:
    """The smallest 2^a 3^b 5^c >= `least`: lengths that Fourier transforms are fast at."""
    best = 1 << max(least - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            length = three << max((least + three - 1) // three - 1, 0).bit_length()
            if least <= length < best:
                best = length
            three *= 3
        five *= 5
    return best


def fft_conv(u: Tensor, kernel: Tensor, reverse_kernel: Tensor | None) -> Tensor:
    """See the public function; u ``(batch, length, d_model)``, kernels ``(d_model, <= length)``, of one float dtype."""
    if reverse_kernel is not None:
        reverse_kernel = reverse_kernel[:, : max(u.shape[1] - 1, 1)]
    function = _Transformed if transforms_active() else _Convolution
    return function.apply(u, kernel, reverse_kernel)  # pyright: ignore[reportReturnType]


def _circle(length: int, kernel: Tensor, reverse_kernel: Tensor | None) -> int:
    """Points of a circle long enough that the end doesn't reach round to the start, nor the start to the end."""
    return fast_length(length + max(kernel.shape[1] - 1, 0 if reverse_kernel is None else reverse_kernel.shape[1]))


def _kernel_spectrum(kernel: Tensor, reverse_kernel: Tensor | None, circle: int) -> Tensor:
    spectrum = torch.fft.rfft(kernel, n=circle)
    if reverse_kernel is None:
        return spectrum
    # weight s of the future sits at lag -1 - s: reversed it ends the circle, which is one rotation of a spectrum
    ahead = torch.fft.rfft(reverse_kernel, n=circle).conj()
    turn = torch.arange(ahead.shape[1], device=kernel.device, dtype=kernel.dtype) * (2 * torch.pi / circle)
    return spectrum + ahead * torch.polar(torch.ones_like(turn), turn)


def _input_spectrum(u: Tensor, circle: int) -> Tensor:
    # Padding, which copies anyway, brings each channel's positions next to each other.
    return torch.fft.rfft(F.pad(u.transpose(1, 2), (0, circle - u.shape[1])))


class _Convolution(torch.autograd.Function):
    """The product of spectra with its gradients, which are products too.

    ``dU = conj(K) dY`` and ``dK = sum over the batch of conj(U) dY``. Autograd's own formula for a real transform goes
    by a complex one of the whole circle, and keeps the spectra; here u is kept and transformed again.
    """

    @staticmethod
    def forward(u: Tensor, kernel: Tensor, reverse_kernel: Tensor | None) -> Tensor:
        circle = _circle(u.shape[1], kernel, reverse_kernel)
        product = _input_spectrum(u, circle) * _kernel_spectrum(kernel, reverse_kernel, circle)
        return torch.fft.irfft(product, n=circle)[..., : u.shape[1]].transpose(1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        u, kernel, reverse_kernel = ctx.saved_tensors
        length, circle = u.shape[1], _circle(u.shape[1], kernel, reverse_kernel)
        dy_spectrum = _input_spectrum(dy, circle)
        du = dkernel = dreverse = None
        if ctx.needs_input_grad[0]:
            product = dy_spectrum * _kernel_spectrum(kernel, reverse_kernel, circle).conj()
            du = torch.fft.irfft(product, n=circle)[..., :length].transpose(1, 2)
        if any(ctx.needs_input_grad[1:]):
            by_lag = torch.fft.irfft((dy_spectrum * _input_spectrum(u, circle).conj()).sum(0), n=circle)
            dkernel = by_lag[:, : kernel.shape[1]]
            if reverse_kernel is not None:
                dreverse = by_lag[:, circle - reverse_kernel.shape[1] :].flip(1)
        return du, dkernel, dreverse


class _Transformed(_Convolution):
    """The same for forward-mode AD and torch.func. torch.compile takes no function that has a `jvp` into a graph."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, du: Tensor, dkernel: Tensor, dreverse: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, kernel, reverse_kernel = ctx.saved_tensors
        circle = _circle(u.shape[1], kernel, reverse_kernel)
        product = _input_spectrum(du, circle) * _kernel_spectrum(kernel, reverse_kernel, circle)
        product = product + _input_spectrum(u, circle) * _kernel_spectrum(dkernel, dreverse, circle)
        return torch.fft.irfft(product, n=circle)[..., : u.shape[1]].transpose(1, 2)  # laid out as the output is
