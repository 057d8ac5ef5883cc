"""The readable truth of the long convolution: its sum, lag by lag."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from statescan.ops._dispatch import Facts

__all__ = ["fft_conv", "refuses"]


def refuses(facts: Facts) -> str | None:
    """The reference runs everything."""
    return None


def fft_conv(u: Tensor, kernel: Tensor, reverse_kernel: Tensor | None) -> Tensor:
    """``y_t = sum_s kernel_s u_{t-s} + sum_s reverse_kernel_s u_{t+1+s}``, one lag after the other."""
    length = u.shape[1]
    y = u * kernel[:, 0]
    for lag in range(1, kernel.shape[1]):
        y = y + F.pad(u[:, : length - lag], (0, 0, lag, 0)) * kernel[:, lag]
    if reverse_kernel is not None:
        for lag in range(min(reverse_kernel.shape[1], length - 1)):
            y = y + F.pad(u[:, lag + 1 :], (0, 0, 0, lag + 1)) * reverse_kernel[:, lag]
    return y
