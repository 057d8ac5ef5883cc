"""The public long convolution: checks, picks a backend, calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.errors import ShapeError
from statescan.ops._any_length import is_symbol
from statescan.ops._checks import (
    ACTIVATION_DTYPES,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
    without_autocast,
)
from statescan.ops._dispatch import choose

__all__ = ["fft_conv"]


def fft_conv(
    u: Tensor, kernel: Tensor, *, reverse_kernel: Tensor | None = None, D: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Convolves every channel with a kernel as long as the sequence, by the fast Fourier transform.

    ``y_t = sum_{s >= 0} kernel_s u_{t-s} + sum_{s >= 0} reverse_kernel_s u_{t+1+s} + D u_t``;
    outside the sequence u is 0.

    Args:
        u: ``(batch, length, d_model)``, float32, float64, bfloat16 or float16.
        kernel: ``(d_model, kernel_length)``, real; what lies past the length has no effect.
        reverse_kernel: ``(d_model, kernel_length)``, weights of the future: makes the convolution bidirectional.
            Default None: causal.
        D: ``(d_model,)``, the skip connection. Default None.
        backend: ``"auto"``, ``"torch"`` or ``"reference"``.

    Returns:
        y, shape and dtype of u. Differentiable in every tensor.

    Raises:
        ShapeError, DTypeError: an argument doesn't fit.
        BackendUnavailableError: the named backend can't run the call.

    Numerics: the spectra are complex64, complex128 for float64 inputs; kernel and D are taken to float32 (float64).

    Source: S4, arXiv:2111.00396, equation 4 and section 2.4.
    """
    op = "fft_conv"
    check_tensor(op, "u", u)
    check_dtype(op, "u", u, ACTIVATION_DTYPES)
    if u.dim() != 3 or u.shape[1] == 0:
        raise ShapeError(f"{op}: u must have shape (batch, length >= 1, d_model), got {tuple(u.shape)}")
    d_model = u.shape[2]
    for name, value in (("kernel", kernel), ("reverse_kernel", reverse_kernel)):
        if value is None:
            continue
        check_tensor(op, name, value)
        check_dtype(op, name, value, ACTIVATION_DTYPES, "the real kernel")
        check_device(op, name, value, u, "u")
        if value.dim() != 2 or value.shape[0] != d_model or value.shape[1] == 0:
            raise ShapeError(
                f"{op}: {name} must have shape (d_model, kernel_length) = ({d_model}, >= 1), got {tuple(value.shape)}; "
                "give each channel of u one row"
            )
    if D is not None:
        check_tensor(op, "D", D)
        check_dtype(op, "D", D, ACTIVATION_DTYPES)
        check_device(op, "D", D, u, "u")
        check_shape(op, "D", D, (d_model,), "(d_model,)")
    name = choose(op, backend, u.device.type, u.dtype)
    if is_symbol(u.shape[1]):
        from statescan.ops.fft_conv import any_length  # noqa: F401, registers the operator

        return torch.ops.statescan.fft_conv(u, kernel, reverse_kernel, D, name)
    if name == "torch":
        from statescan.ops.fft_conv import torch_fft as module
    else:
        from statescan.ops.fft_conv import reference as module
    with without_autocast(u.device.type):
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        kernel = kernel[:, : u.shape[1]].to(wide)
        if reverse_kernel is not None:
            reverse_kernel = reverse_kernel[:, : u.shape[1]].to(wide)
        if D is not None:
            # The skip is a weight of lag 0 like any other: no pass of its own over u and y.
            kernel = torch.cat([kernel[:, :1] + D.to(wide).unsqueeze(-1), kernel[:, 1:]], 1)
        return module.fft_conv(u.to(wide), kernel, reverse_kernel).to(u.dtype)
