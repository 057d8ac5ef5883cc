"""The long convolution as an operator for a length that is a symbol."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.ops import _any_length
from statescan.ops.fft_conv import api

__all__: list[str] = []


def _call(u: Tensor, kernel: Tensor, reverse_kernel: Tensor | None, D: Tensor | None, backend: str) -> Tensor:
    return api.fft_conv(u, kernel, reverse_kernel=reverse_kernel, D=D, backend=backend)


def _fake(u: Tensor, kernel: Tensor, reverse_kernel: Tensor | None, D: Tensor | None, backend: str) -> Tensor:
    return torch.empty_like(u).contiguous()


_any_length.define(
    "fft_conv", "(Tensor u, Tensor kernel, Tensor? reverse_kernel, Tensor? D, str backend) -> Tensor", 4, _call, _fake
)
