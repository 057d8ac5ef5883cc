"""The long convolution against numpy's direct sums and its own reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from statescan.errors import BackendUnavailableError, ConfigError, DTypeError, ShapeError
from statescan.ops import explain, fft_conv
from statescan.ops.fft_conv.torch_fft import fast_length

BACKENDS = ["torch", "reference"]


def _case(
    length: int, kernel_length: int, dtype: torch.dtype = torch.float64, reverse: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    draw = torch.Generator().manual_seed(length * 1000 + kernel_length)
    rows = [
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((2, length, 3), *[(3, kernel_length)] * 2, (3,))
    ]
    u, kernel, ahead, D = rows
    return u.to(dtype), kernel.to(dtype), ahead.to(dtype) if reverse else None, D.to(dtype)


def _truth(u: torch.Tensor, kernel: torch.Tensor, ahead: torch.Tensor | None, D: torch.Tensor | None) -> torch.Tensor:
    """numpy.convolve, channel by channel, in float64."""
    u, kernel = u.double(), kernel.double()
    length = u.shape[1]
    y = torch.zeros_like(u)
    for b in range(u.shape[0]):
        for d in range(u.shape[2]):
            y[b, :, d] += torch.from_numpy(np.convolve(u[b, :, d], kernel[d])[:length])
            if ahead is not None:
                shifted = np.convolve(u[b, :, d].flip(0), ahead[d].double())[:length][::-1]
                y[b, :-1, d] += torch.from_numpy(shifted[1:].copy())
    return y if D is None else y + u * D.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("length", "kernel_length"), [(1, 1), (1, 4), (2, 1), (7, 7), (13, 5), (13, 40), (64, 64)])
@pytest.mark.parametrize("reverse", [False, True])
def test_sums(backend: str, length: int, kernel_length: int, reverse: bool) -> None:
    u, kernel, ahead, D = _case(length, kernel_length, reverse=reverse)
    got = fft_conv(u, kernel, reverse_kernel=ahead, D=D, backend=backend)
    assert got.dtype == u.dtype
    assert (got - _truth(u, kernel, ahead, D)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str) -> None:
    inputs = [x.requires_grad_() for x in _case(6, 9) if x is not None]
    run = lambda u, k, r, D: fft_conv(u, k, reverse_kernel=r, D=D, backend=backend)
    assert torch.autograd.gradcheck(run, tuple(inputs))
    assert torch.autograd.gradgradcheck(run, tuple(inputs))


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3,), (1, 2, 3)])
def test_gradients_of_some_are_those_of_all(frozen: tuple[int, ...]) -> None:
    inputs = [x.requires_grad_() for x in _case(6, 9) if x is not None]
    run = lambda u, k, r, D: fft_conv(u, k, reverse_kernel=r, D=D).sin().sum()
    every = torch.autograd.grad(run(*inputs), inputs)
    some = [x.detach() if i in frozen else x for i, x in enumerate(inputs)]
    asked = [i for i in range(4) if i not in frozen]
    found = torch.autograd.grad(run(*some), [some[i] for i in asked])
    assert all(torch.equal(a, every[i]) for a, i in zip(found, asked, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_have_a_float32_spectrum(dtype: torch.dtype) -> None:
    u, kernel, _, D = _case(2000, 2000, dtype)
    kernel = kernel / 45  # keeps the sums near 1
    got = fft_conv(u, kernel, D=D)
    truth = _truth(u, kernel, None, D)
    assert got.dtype == dtype
    # the output's rounding, and twice what a float32 transform of this length leaves
    rounding = torch.finfo(dtype).eps / 2 * truth.abs()
    spectral = 2 * torch.finfo(torch.float32).eps * np.log2(4096) * truth.pow(2).mean().sqrt() * 4
    assert ((got.double() - truth).abs() <= rounding + spectral).all()


def test_strided_input_and_autocast() -> None:
    u, kernel, _, D = _case(30, 30, torch.float32)
    wide = torch.cat([u, u], -1)[..., 1:4]
    assert torch.equal(fft_conv(wide, kernel, D=D), fft_conv(wide.contiguous(), kernel, D=D))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fft_conv(u, kernel, D=D), fft_conv(u, kernel, D=D))
        inside = fft_conv(u, kernel, D=D)
    assert torch.equal(inside, fft_conv(u, kernel, D=D))


def test_fast_length() -> None:
    for least in [1, 2, 3, 7, 11, 97, 1000, 4097, 65537]:
        length = fast_length(least)
        assert least <= length <= max(1.07 * least, least + 1)
        for prime in (2, 3, 5):
            while length % prime == 0:
                length //= prime
        assert length == 1


def test_bad_input_and_explain() -> None:
    u, kernel, _, D = _case(5, 5)
    with pytest.raises(ShapeError, match=r"u must have shape \(batch, length >= 1, d_model\), got \(2, 0, 3\)"):
        fft_conv(u[:, :0], kernel)
    with pytest.raises(
        ShapeError, match=r"kernel must have shape \(d_model, kernel_length\) = \(3, >= 1\), got \(2, 5\)"
    ):
        fft_conv(u, kernel[:2])
    with pytest.raises(ShapeError, match="D must have shape"):
        fft_conv(u, kernel, D=D[:2])
    with pytest.raises(DTypeError, match="kernel must be"):
        fft_conv(u, kernel.to(torch.complex128))
    with pytest.raises(ConfigError, match="backend must be one of"):
        fft_conv(u, kernel, backend="cufft")
    assert explain("fft_conv").backend == "torch"
    assert not issubclass(BackendUnavailableError, ConfigError)
