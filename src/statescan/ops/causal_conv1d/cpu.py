"""The causal convolution on the C++ library: vectorised over channels, in parallel over time and channels."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from statescan.errors import ShapeError
from statescan.ops import _native
from statescan.ops._checks import refuse_second_derivative, wants_gradients
from statescan.ops._dispatch import Facts
from statescan.ops.causal_conv1d.validation import compute_dtype

__all__ = ["causal_conv1d", "causal_conv1d_update", "refuses"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernel does not take this call, with the cure; None if it does."""
    return _native.refusal(facts.device, "ss_causal_conv1d", "ss_causal_conv1d_backward")


class _Args(ctypes.Structure):
    """Mirrors ss_conv_args in csrc/causal_conv1d.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "features", "width", "sequences")),
        ("dtype", ctypes.c_int32),
        ("silu", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("x_batch", ctypes.c_int64),
        ("x_row", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_channel", ctypes.c_int64),
        ("weight_tap", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("initial_state", ctypes.c_void_p),
        ("initial_batch", ctypes.c_int64),
        ("initial_row", ctypes.c_int64),
        ("cu_seqlens", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("final_state", ctypes.c_void_p),
        ("grad_y", ctypes.c_void_p),
        ("grad_y_batch", ctypes.c_int64),
        ("grad_y_row", ctypes.c_int64),
        ("grad_final_state", ctypes.c_void_p),
        ("grad_x", ctypes.c_void_p),
        ("grad_weight", ctypes.c_void_p),
        ("grad_bias", ctypes.c_void_p),
        ("grad_initial_state", ctypes.c_void_p),
    )


def _dense_channels(tensor: Tensor) -> Tensor:
    """The tensor itself where its channels lie side by side (any strides before them), else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[_Args, list[Tensor]]:
    """The arguments that forward and backward share, and the tensors that must outlive the call."""
    compute = compute_dtype(x.dtype)
    x, weight = _dense_channels(x), weight.to(compute)
    alive = [x, weight]
    args = _Args(
        batch=x.shape[0],
        length=x.shape[1],
        features=x.shape[2],
        width=weight.shape[1],
        sequences=x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        dtype=_DTYPES[x.dtype],
        silu=silu,
        x=x.data_ptr(),
        x_batch=x.stride(0),
        x_row=x.stride(1),
        weight=weight.data_ptr(),
        weight_channel=weight.stride(0),
        weight_tap=weight.stride(1),
    )
    if bias is not None:
        bias = bias.to(compute).contiguous()
        args.bias = bias.data_ptr()
        alive.append(bias)
    if initial_state is not None and weight.shape[1] > 1:
        initial_state = _dense_channels(initial_state)
        args.initial_state = initial_state.data_ptr()
        args.initial_batch, args.initial_row = initial_state.stride(0), initial_state.stride(1)
        alive.append(initial_state)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
        args.cu_seqlens = cu_seqlens.data_ptr()
        alive.append(cu_seqlens)
    return args, alive


def _call(function: str, args: _Args) -> None:
    code = getattr(_native.library().lib, function)(ctypes.byref(args))
    if code == -2:
        raise ShapeError(
            f"causal_conv1d: cu_seqlens must go from 0 to the length of x, {args.length}, and never fall, "
            "got other offsets; pass the running sum of the sequences' lengths, with 0 in front"
        )
    if code == -3:
        raise MemoryError(
            "causal_conv1d: no memory left for the kernel's scratch; make the batch or the length smaller"
        )
    assert code == 0, f"{function} returned {code}"


def _state_shape(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    return (x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, weight.shape[1] - 1, x.shape[2])


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    args, alive = _inputs(x, weight, bias, initial_state, cu_seqlens, silu)
    y, final_state = _forward_fake(x, weight, bias, initial_state, cu_seqlens, silu)
    args.y, args.final_state = y.data_ptr(), final_state.data_ptr()
    _call("ss_causal_conv1d", args)
    del alive
    return y, final_state


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    del bias, initial_state, silu
    return x.new_empty(x.shape), x.new_empty(_state_shape(x, weight, cu_seqlens))


def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args, alive = _inputs(x, weight, bias, initial_state, cu_seqlens, silu)
    compute = compute_dtype(x.dtype)
    grad_y, grad_final_state = _dense_channels(grad_y), grad_final_state.contiguous()
    grad_x, _, _, grad_initial = _backward_fake(
        grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, silu
    )
    grad_weight = weight.new_empty(weight.shape, dtype=compute)
    grad_bias = weight.new_empty(x.shape[2] if bias is not None else 0, dtype=compute)
    args.grad_y, args.grad_y_batch, args.grad_y_row = grad_y.data_ptr(), grad_y.stride(0), grad_y.stride(1)
    if grad_final_state.numel():
        args.grad_final_state = grad_final_state.data_ptr()
    args.grad_x, args.grad_weight = grad_x.data_ptr(), grad_weight.data_ptr()
    if bias is not None:
        args.grad_bias = grad_bias.data_ptr()
    if grad_initial.numel():
        args.grad_initial_state = grad_initial.data_ptr()
    _call("ss_causal_conv1d_backward", args)
    del alive
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to((weight if bias is None else bias).dtype), grad_initial


def _backward_fake(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del grad_y, grad_final_state, silu
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    grad_initial = x.new_empty(0 if initial_state is None else _state_shape(x, weight, cu_seqlens))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_bias, grad_initial


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu"
torch.library.define("statescan::causal_conv1d_cpu", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "statescan::causal_conv1d_cpu_backward",
    f"(Tensor grad_y, Tensor grad_final_state, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("statescan::causal_conv1d_cpu", "CPU", _forward)
torch.library.impl("statescan::causal_conv1d_cpu_backward", "CPU", _backward)
torch.library.register_fake("statescan::causal_conv1d_cpu", _forward_fake)
torch.library.register_fake("statescan::causal_conv1d_cpu_backward", _backward_fake)


class _CausalConv1d(torch.autograd.Function):
    """Saves the inputs alone: the backward makes the pre-activation again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
        ctx.silu = silu
        return torch.ops.statescan.causal_conv1d_cpu(x, weight, bias, initial_state, cu_seqlens, silu)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_final_state: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("causal_conv1d", "cpu")
        _, _, bias, initial_state, _ = saved = ctx.saved_tensors
        grad_x, grad_weight, grad_bias, grad_initial = torch.ops.statescan.causal_conv1d_cpu_backward(
            grad_y, grad_final_state, *saved, ctx.silu
        )
        return (
            grad_x,
            grad_weight,
            grad_bias if bias is not None else None,
            grad_initial if initial_state is not None else None,
            None,
            None,
        )


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.causal_conv1d`; gives (y, final_state)."""
    if wants_gradients(x, weight, bias, initial_state):
        return _CausalConv1d.apply(x, weight, bias, initial_state, cu_seqlens, silu)  # pyright: ignore[reportReturnType]
    return torch.ops.statescan.causal_conv1d_cpu(x, weight, bias, initial_state, cu_seqlens, silu)


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.causal_conv1d_update`: a convolution of length 1 from a state."""
    y, new_state = causal_conv1d(x[:, None], weight, bias, silu, state, None)
    return y[:, 0], state.copy_(new_state) if inplace else new_state
