"""The products of S4D's and S4's kernels on the C++ library: a channel at a time, tables of powers in the cache."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from statescan.ops import _native
from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel import products

__all__ = [
    "cauchy_backward",
    "cauchy_forward",
    "powers_backward",
    "powers_forward",
    "refuses_product",
    "vandermonde_backward",
    "vandermonde_forward",
]


def refuses_product(product: str, facts: Facts) -> str | None:
    """Why the C++ kernels do not take this call of a product, with the cure; None if they do."""
    if facts.device == "cpu" and facts.dtype == torch.float64:
        return "its products are taken in float32, A is in double precision; use backend='torch'"
    return _native.refusal(facts.device, f"ss_{product}", f"ss_{product}_backward")


def _struct(name: str, numbers: str, pointers: str) -> type[ctypes.Structure]:
    fields = [(field, ctypes.c_int64) for field in numbers.split()]
    fields += [(field, ctypes.c_void_p) for field in pointers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})


# As in csrc/ssm_kernel.h.
_VandermondeArgs = _struct(
    "_VandermondeArgs", "channels states length", "log_re log_im w_re w_im kernel grad s0_re s0_im s1_re s1_im"
)
_CauchyArgs = _struct(
    "_CauchyArgs",
    "channels sums states points",
    "lam_re lam_im v_re v_im y c out_re out_im grad_re grad_im dlam_re dlam_im dv_re dv_im",
)
_PowersArgs = _struct("_PowersArgs", "channels states length bits", "A B C kernel grad dA dB dC")


def _call(function: str, args: ctypes.Structure, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        setattr(args, name, tensor.data_ptr())
    code = getattr(_native.library().lib, function)(ctypes.byref(args))
    if code == -3:
        raise MemoryError("s4_kernel, s4d_kernel: no memory left for the kernel's scratch; take fewer states")
    assert code == 0, f"{function} returned {code}"


def vandermonde_forward(log_re: Tensor, log_im: Tensor, w_re: Tensor, w_im: Tensor, length: int) -> Tensor:
    """See `products`."""
    channels, states = log_re.shape
    kernel = w_re.new_empty(channels, length)
    args = _VandermondeArgs(channels, states, length)
    inputs = {"log_re": log_re, "log_im": log_im, "w_re": w_re, "w_im": w_im}
    _call("ss_vandermonde", args, {**inputs, "kernel": kernel})
    return kernel


def vandermonde_backward(log_re: Tensor, log_im: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `products`."""
    (channels, states), length = log_re.shape, g.shape[1]
    s0_re, s0_im, s1_re, s1_im = sums = tuple(g.new_empty(channels, states) for _ in range(4))
    args = _VandermondeArgs(channels, states, length)
    inputs = {"log_re": log_re, "log_im": log_im, "grad": g}
    _call("ss_vandermonde_backward", args, inputs | {"s0_re": s0_re, "s0_im": s0_im, "s1_re": s1_re, "s1_im": s1_im})
    return sums  # pyright: ignore[reportReturnType]


def cauchy_forward(
    lam_re: Tensor, lam_im: Tensor, v_re: Tensor, v_im: Tensor, y: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """See `products`."""
    (channels, sums, states), points = v_re.shape, y.shape[0]
    out_re, out_im = (v_re.new_empty(channels, sums, points) for _ in range(2))
    inputs = {"lam_re": lam_re, "lam_im": lam_im, "v_re": v_re, "v_im": v_im, "y": y, "c": c}
    args = _CauchyArgs(channels, sums, states, points)
    _call("ss_cauchy", args, inputs | {"out_re": out_re, "out_im": out_im})
    return out_re, out_im


def cauchy_backward(
    lam_re: Tensor, lam_im: Tensor, v_re: Tensor, v_im: Tensor, y: Tensor, c: Tensor, g_re: Tensor, g_im: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `products`."""
    (channels, sums, states), points = v_re.shape, y.shape[0]
    dlam_re, dlam_im, dv_re, dv_im = found = tuple(torch.empty_like(x) for x in (lam_re, lam_im, v_re, v_im))
    inputs = {"lam_re": lam_re, "lam_im": lam_im, "v_re": v_re, "v_im": v_im, "y": y, "c": c}
    gradients = {"dlam_re": dlam_re, "dlam_im": dlam_im, "dv_re": dv_re, "dv_im": dv_im}
    args = _CauchyArgs(channels, sums, states, points)
    _call("ss_cauchy_backward", args, inputs | {"grad_re": g_re, "grad_im": g_im} | gradients)
    return found  # pyright: ignore[reportReturnType]


def powers_forward(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """See `products`."""
    channels, states = B.shape
    kernel = B.new_empty(channels, length, dtype=torch.float32)
    args = _PowersArgs(channels, states, length, _inner_bits(length))
    _call("ss_powers", args, {"A": A, "B": B, "C": C, "kernel": kernel})
    return kernel


def powers_backward(A: Tensor, B: Tensor, C: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `products`."""
    (channels, states), length = B.shape, g.shape[1]
    dA, dB, dC = (torch.empty_like(x) for x in (A, B, C))
    args = _PowersArgs(channels, states, length, _inner_bits(length))
    _call("ss_powers_backward", args, {"A": A, "B": B, "C": C, "grad": g, "dA": dA, "dB": dB, "dC": dC})
    return dA, dB, dC


def _inner_bits(length: int) -> int:
    """Of T in l = a T + b: as many a as b, or half as many."""
    return (max(length - 1, 0).bit_length() + 1) // 2


products.register("cpu", ("CPU",), sys.modules[__name__])
