"""The long convolution as a product of spectra, on any device that torch has a Fourier transform for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    length = u.shape[1]
    ahead_lags = 0 if reverse_kernel is None else min(reverse_kernel.shape[1], max(length - 1, 1))
    # A circle long enough that the end doesn't reach round to the start, nor the start to the end.
    circle = fast_length(length + max(kernel.shape[1] - 1, ahead_lags))
    spectrum = torch.fft.rfft(kernel, n=circle)
    if reverse_kernel is not None:
        # weight s of the future sits at lag -1 - s: reversed it ends the circle, which is one rotation of a spectrum
        ahead = torch.fft.rfft(reverse_kernel[:, :ahead_lags], n=circle).conj()
        turn = torch.arange(ahead.shape[1], device=u.device, dtype=u.dtype) * (2 * torch.pi / circle)
        spectrum = spectrum + ahead * torch.polar(torch.ones_like(turn), turn)
    # Padding, which copies anyway, brings each channel's positions next to each other.
    product = torch.fft.rfft(F.pad(u.transpose(1, 2), (0, circle - length))) * spectrum
    return torch.fft.irfft(product, n=circle)[..., :length].transpose(1, 2)
