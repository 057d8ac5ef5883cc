"""packed_linear on the C++ library: each weight is read once for up to four rows, at the memory's speed."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statescan.ops import _native
from statescan.ops._dispatch import Facts
from statescan.ops.packed_linear.validation import PackedWeight

__all__ = ["Matrix", "matrix", "packed_linear", "refuses"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 4}


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernel does not take this call, with the cure; None if it does."""
    if facts.device == "cpu" and facts.dtype == torch.float64:
        return "it sums in float32, the input is float64; use backend='torch'"
    return _native.refusal(facts.device, "ss_packed_linear")


class Matrix(ctypes.Structure):
    """Mirrors ss_packed_matrix in csrc/packed_linear.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
    )


class _Args(ctypes.Structure):
    """Mirrors ss_linear_args in csrc/packed_linear.h."""

    _fields_ = (
        ("matrix", Matrix),
        ("batch", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        ("y", ctypes.c_void_p),
    )


def matrix(data: Tensor, scale: Tensor | None, bias: Tensor | None) -> Matrix:
    """The C struct of contiguous tensors that the caller keeps alive; scale and bias are float32."""
    assert data.is_contiguous()
    return Matrix(
        data.shape[0],
        data.shape[1],
        data.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        _DTYPES[data.dtype],
    )


def _forward(x: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    data = data.contiguous()
    scale = None if scale is None else scale.contiguous()
    y = torch.empty(rows.shape[0], data.shape[0], dtype=torch.float32)
    if y.numel():
        args = _Args(
            matrix(data, scale, bias),
            rows.shape[0],
            torch.get_num_threads(),
            rows.data_ptr(),
            rows.stride(0),
            y.data_ptr(),
        )
        code = _native.library().lib.ss_packed_linear(ctypes.byref(args))
        assert code == 0, f"ss_packed_linear returned {code}"
    return y.to(x.dtype).view(*x.shape[:-1], data.shape[0])


def _forward_fake(x: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    del scale, bias
    return x.new_empty(*x.shape[:-1], data.shape[0])


torch.library.define("statescan::packed_linear_cpu", "(Tensor x, Tensor data, Tensor? scale, Tensor? bias) -> Tensor")
torch.library.impl("statescan::packed_linear_cpu", "CPU", _forward)
torch.library.register_fake("statescan::packed_linear_cpu", _forward_fake)


class _PackedLinear(torch.autograd.Function):
    """The weight is a constant; the gradient of x is a product with it, unpacked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(data, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return torch.ops.statescan.packed_linear_cpu(x, data, scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        data, scale = ctx.saved_tensors
        wide = grad.float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ((wide if scale is None else wide * scale) @ data.float()).to(grad.dtype)
        grad_bias = wide.flatten(0, -2).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """See `statescan.ops.packed_linear`."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _PackedLinear.apply(x, packed.data, packed.scale, bias)  # pyright: ignore[reportReturnType]
    return torch.ops.statescan.packed_linear_cpu(x, packed.data, packed.scale, bias)
