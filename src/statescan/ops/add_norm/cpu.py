"""The residual addition and RMS norm on the C++ library: one pass over memory each way."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from statescan.ops import _native
from statescan.ops._dispatch import Facts
from statescan.ops.add_norm.autograd import backward_fake, run
from statescan.ops.add_norm.validation import compute_dtype

__all__ = ["add_rms_norm", "refuses"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernel does not take this call, with the cure; None if it does."""
    return _native.refusal(facts.device, "ss_add_rms_norm", "ss_add_rms_norm_backward")


class _Args(ctypes.Structure):
    """Mirrors ss_norm_args in csrc/add_norm.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("wide", "x_dtype", "residual_dtype", "stream_dtype")),
        ("x", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("residual_row", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("rstd", ctypes.c_void_p),
        ("grad_output", ctypes.c_void_p),
        ("grad_output_row", ctypes.c_int64),
        ("grad_stream", ctypes.c_void_p),
        ("grad_stream_row", ctypes.c_int64),
        ("grad_x", ctypes.c_void_p),
        ("grad_residual", ctypes.c_void_p),
        ("grad_weight", ctypes.c_void_p),
    )


def _compute(x_dtype: torch.dtype, stream: torch.dtype) -> torch.dtype:
    return torch.float64 if stream == torch.float64 else compute_dtype(x_dtype)


def _as_rows(tensor: Tensor) -> Tensor:
    """(rows, d) with the last axis contiguous: a view wherever the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _call(function: str, args: _Args) -> None:
    code = getattr(_native.library().lib, function)(ctypes.byref(args))
    if code == -3:
        raise MemoryError("add_rms_norm: no memory left for the kernel's scratch; make the batch or the length smaller")
    assert code == 0, f"{function} returned {code}"


def _forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    output, total, rstd = _forward_fake(x, weight, residual, eps, stream)
    rows, weight = _as_rows(x), weight.to(rstd.dtype).contiguous()
    args = _Args(
        rows=rows.shape[0],
        features=rows.shape[1],
        eps=eps,
        wide=rstd.dtype == torch.float64,
        x_dtype=_DTYPES[x.dtype],
        stream_dtype=_DTYPES[stream],
        x=rows.data_ptr(),
        x_row=rows.stride(0),
        weight=weight.data_ptr(),
        output=output.data_ptr(),
        rstd=rstd.data_ptr(),
    )
    if residual is not None:
        residual = _as_rows(residual)
        args.residual, args.residual_row = residual.data_ptr(), residual.stride(0)
        args.residual_dtype = _DTYPES[residual.dtype]
    if total.numel():
        args.stream = total.data_ptr()
    _call("ss_add_rms_norm", args)
    return output, total, rstd


def _forward_fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    del weight, eps
    same = residual is None and stream == x.dtype  # the sum is x itself: nothing to write
    total = x.new_empty(0 if same else x.shape, dtype=stream)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=_compute(x.dtype, stream))


def _backward(
    grad_output: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_residual, grad_weight = backward_fake(grad_output, grad_total, total, rstd, weight, residual_dtype)
    rows, grads, wide_weight = _as_rows(total), _as_rows(grad_output), weight.to(rstd.dtype).contiguous()
    rstd = rstd.contiguous()
    sums = torch.empty(weight.shape, dtype=rstd.dtype)
    args = _Args(
        rows=rows.shape[0],
        features=rows.shape[1],
        wide=rstd.dtype == torch.float64,
        x_dtype=_DTYPES[grad_output.dtype],
        stream_dtype=_DTYPES[total.dtype],
        x=rows.data_ptr(),
        x_row=rows.stride(0),
        weight=wide_weight.data_ptr(),
        rstd=rstd.data_ptr(),
        grad_output=grads.data_ptr(),
        grad_output_row=grads.stride(0),
        grad_x=grad_x.data_ptr(),
        grad_weight=sums.data_ptr(),
    )
    # A traced graph hands zeros in place of None, also for a sum that was never written.
    if grad_total is not None and grad_total.numel():
        grad_total = _as_rows(grad_total)
        args.grad_stream, args.grad_stream_row = grad_total.data_ptr(), grad_total.stride(0)
    if grad_residual.numel():
        args.grad_residual, args.residual_dtype = grad_residual.data_ptr(), _DTYPES[grad_residual.dtype]
    _call("ss_add_rms_norm_backward", args)
    return grad_x, grad_residual, sums.to(grad_weight.dtype)


torch.library.define(
    "statescan::add_rms_norm_cpu",
    "(Tensor x, Tensor weight, Tensor? residual, float eps, ScalarType stream) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "statescan::add_rms_norm_cpu_backward",
    "(Tensor grad_output, Tensor? grad_total, Tensor total, Tensor rstd, Tensor weight, ScalarType? residual_dtype) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.impl("statescan::add_rms_norm_cpu", "CPU", _forward)
torch.library.impl("statescan::add_rms_norm_cpu_backward", "CPU", _backward)
torch.library.register_fake("statescan::add_rms_norm_cpu", _forward_fake)
torch.library.register_fake("statescan::add_rms_norm_cpu_backward", backward_fake)


def add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.add_rms_norm`; `stream` is the dtype of the residual stream."""
    return run("cpu", x, weight, residual, eps, stream)
