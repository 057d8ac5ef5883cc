"""The residual addition and RMS norm on NVIDIA GPUs: kernels in norm.cu, one pass over memory each way.

A row stays in the registers of a group of threads. The weight's gradient is summed by blocks that walk rows at a fixed
distance, one row of partial sums a block, and added by a second kernel in an order that shape and chip fix.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from statescan.ops import _cuda
from statescan.ops._checks import wants_gradients
from statescan.ops._cuda import i32
from statescan.ops._dispatch import Facts
from statescan.ops.add_norm.autograd import backward_fake, backward_in_two, run
from statescan.ops.add_norm.validation import compute_dtype

__all__ = ["add_rms_norm", "launch_again", "refuses"]

_SOURCE = Path(__file__).with_name("norm.cu")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Measured on an H100 (docs/performance.md): threads a block, packets of eight numbers that a thread holds at most.
_FORWARD = (128, 1)
_BACKWARD = (256, 1)
_THREADS_A_PROCESSOR = 512  # of the backward, whose blocks walk over the rows


def refuses(facts: Facts) -> str | None:
    """CUDA devices."""
    if facts.device != "cuda":
        return _cuda.elsewhere(facts.device)
    return _cuda.unavailable_reason()


def _compute(x_dtype: torch.dtype, stream: torch.dtype) -> torch.dtype:
    return torch.float64 if stream == torch.float64 else compute_dtype(x_dtype)


def _as_rows(tensor: Tensor) -> Tensor:
    """(rows, d) with the last axis contiguous: a view wherever the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _macros(settings: tuple[int, int], features: int, real: torch.dtype, *tensors: Tensor | None) -> dict[str, int]:
    """Threads a row and what each holds; 16-byte accesses where all tensors allow them."""
    threads, most = settings
    lanes = 32
    while lanes < 1024 and math.ceil(features / (8 * lanes)) > most:
        lanes *= 2
    whole = features % 8 == 0
    for tensor in tensors:
        if tensor is not None:
            whole = whole and tensor.data_ptr() % 16 == 0
            whole = whole and all(stride % 8 == 0 for stride in tensor.stride()[:-1])
    return {
        "IN": 3 if real == torch.float64 else 0,
        "NT": max(threads, lanes),
        "LANES": lanes,
        "EACH": math.ceil(features / (8 * lanes)),
        "VEC": int(whole),
    }


def _forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    output, total, rstd = _forward_fake(x, weight, residual, eps, stream)
    if x.numel() == 0:
        return output, total, rstd
    rows, weight = _as_rows(x), weight.contiguous()
    old = None if residual is None else _as_rows(residual)
    keep = total.numel() > 0
    macros = _macros(_FORWARD, rows.shape[1], rstd.dtype, rows, old, weight)
    macros |= {"XT": _TYPES[x.dtype], "RT": -1 if old is None else _TYPES[old.dtype], "ST": _TYPES[stream]}
    macros |= {"WT": _TYPES[weight.dtype], "KEEP": int(keep), "APART": 0}
    with torch.cuda.device(x.device):
        run = _cuda.kernel(_SOURCE, "norm_forward", macros, macros["NT"], x.device.index or 0)
        run(
            (math.ceil(rows.shape[0] / (macros["NT"] // macros["LANES"])), 1, 1),
            *(rows, rows.stride(0), old, 0 if old is None else old.stride(0), weight),
            *(total if keep else None, output, rstd, rows.shape[0], i32(rows.shape[1]), eps),
        )
    return output, total, rstd


def launch_again(total: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The norm's output in `dtype`, again from the sum (..., d) that it gave: the same bits, outside of autograd."""
    output = torch.empty(total.shape, dtype=dtype, device=total.device)
    if total.numel() == 0:
        return output
    rows, weight = _as_rows(total), weight.contiguous()
    zero = torch.zeros(rows.shape[1], dtype=dtype, device=total.device)  # one row that all rows add
    rstd = torch.empty(rows.shape[0], dtype=_compute(dtype, total.dtype), device=total.device)
    macros = _macros(_FORWARD, rows.shape[1], rstd.dtype, rows, zero, weight, output)
    kind = _TYPES[total.dtype]
    macros |= {"XT": _TYPES[dtype], "RT": kind, "ST": kind, "WT": _TYPES[weight.dtype], "KEEP": 0, "APART": 0}
    with torch.cuda.device(total.device):
        run = _cuda.kernel(_SOURCE, "norm_forward", macros, macros["NT"], total.device.index or 0)
        run(
            (math.ceil(rows.shape[0] / (macros["NT"] // macros["LANES"])), 1, 1),
            *(zero, 0, rows, rows.stride(0), weight, None, output, rstd, rows.shape[0], i32(rows.shape[1]), eps),
        )
    return output


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
    fake = backward_fake(grad_output, grad_total, total, rstd, weight, residual_dtype)
    grad_x, grad_residual, grad_weight = fake
    if total.numel() == 0:
        return grad_x, grad_residual, grad_weight.zero_()
    rows, grads, weight, rstd = _as_rows(total), _as_rows(grad_output), weight.contiguous(), rstd.contiguous()
    # A traced graph hands zeros in place of None, also for a sum that was never written.
    more = None if grad_total is None or grad_total.numel() == 0 else _as_rows(grad_total)
    apart = grad_residual.numel() > 0
    macros = _macros(_BACKWARD, rows.shape[1], rstd.dtype, rows, grads, more, weight)
    macros |= {"XT": _TYPES[grad_output.dtype], "RT": _TYPES[grad_residual.dtype] if apart else -1}
    macros |= {"ST": _TYPES[total.dtype], "WT": _TYPES[weight.dtype], "GT": int(more is not None), "APART": int(apart)}
    threads = macros["NT"]
    processors = torch.cuda.get_device_properties(total.device).multi_processor_count
    resident = processors * max(_THREADS_A_PROCESSOR // threads, 1)
    blocks = min(math.ceil(rows.shape[0] / (threads // macros["LANES"])), resident)
    partial = torch.empty(blocks, rows.shape[1], dtype=rstd.dtype, device=total.device)
    with torch.cuda.device(total.device):
        index = total.device.index or 0
        _cuda.kernel(_SOURCE, "norm_backward", macros, threads, index)(
            (blocks, 1, 1),
            *(rows, rows.stride(0), weight, rstd, grads, grads.stride(0), more, 0 if more is None else more.stride(0)),
            *(grad_x, grad_residual if apart else None, partial, rows.shape[0], i32(rows.shape[1])),
        )
        _cuda.kernel(_SOURCE, "norm_sums", macros, 1024, index)(
            (math.ceil(rows.shape[1] / 32), 1, 1), partial, i32(blocks), i32(rows.shape[1]), grad_weight
        )
    return grad_x, grad_residual, grad_weight


_backward_op, _rehearse_backward = backward_in_two(_backward, _forward_fake)
_LIBRARY = torch.library.Library("statescan", "FRAGMENT")
_LIBRARY.define(
    "add_rms_norm_cuda(Tensor x, Tensor weight, Tensor? residual, float eps, ScalarType stream) -> "
    "(Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "add_rms_norm_cuda_backward(Tensor grad_output, Tensor? grad_total, Tensor total, Tensor rstd, Tensor weight, "
    "ScalarType? residual_dtype) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("add_rms_norm_cuda", _forward, "CUDA")
_LIBRARY.impl("add_rms_norm_cuda_backward", _backward_op, "CUDA")
torch.library.register_fake("statescan::add_rms_norm_cuda", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("statescan::add_rms_norm_cuda_backward", backward_fake, lib=_LIBRARY)


def add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, stream: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.add_rms_norm`; `stream` is the dtype of the residual stream."""
    if wants_gradients(x, weight, residual):
        _cuda.make_ready(_rehearse_backward, x, weight, residual, stream)
    return run("cuda", x, weight, residual, eps, stream)
