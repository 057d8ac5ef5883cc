"""The cross-entropy of a linear layer's outputs on NVIDIA GPUs, a chunk of tokens at a time.

Each chunk is three matrix products and one pass of softmax_gradient.cu over its logits, which turns them into their
gradient where they lie. With a reduction all of it happens in the forward pass; without one the backward pass makes
each chunk's logits again.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statescan.ops import _cuda
from statescan.ops._checks import without_autocast
from statescan.ops._cuda import i32
from statescan.ops._dispatch import Facts
from statescan.ops.cross_entropy.validation import accumulate_dtype

__all__ = ["linear_cross_entropy", "refuses"]

_SOURCE = Path(__file__).with_name("softmax_gradient.cu")
_IN = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Logits that exist at once, in bytes, whatever the vocabulary: products of fewer rows are slower, and each chunk reads
# and writes the weight's gradient once.
_LOGITS_AT_ONCE = 2**29
_ROWS_AT_LEAST = 256
_THREADS = 1024
_NOT_COUNTED = -(2**62)  # as in softmax_gradient.cu; other targets outside of the vocabulary make NaN


def refuses(facts: Facts) -> str | None:
    """CUDA devices, every dtype."""
    if facts.device != "cuda":
        return _cuda.elsewhere(facts.device)
    return _cuda.unavailable_reason()


def _rows_of_a_chunk(rows: int, vocabulary: int, chunk_size: int | None, item: int) -> int:
    if chunk_size is None:
        chunk_size = max(_LOGITS_AT_ONCE // (vocabulary * item) // _ROWS_AT_LEAST, 1) * _ROWS_AT_LEAST
    return max(min(chunk_size, rows), 1)


@functools.cache
def _most_held(device: int) -> int:
    """Bytes of a row that a block may hold so that two blocks fit a multiprocessor of this device."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_multiprocessor", 0) // 2 - 2048  # not there in older torch


def _softmax_gradient(logits: Tensor, targets: Tensor, bias: Tensor | None, scale: Tensor, wanted: bool) -> Tensor:
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=accumulate_dtype(logits.dtype), device=logits.device)
    if rows == 0:
        return losses
    pieces = (vocabulary + 7) // 8
    threads = min(max(32, 1 << (pieces - 1).bit_length()), _THREADS)
    whole = vocabulary % 8 == 0 and logits.stride(0) % 8 == 0 and logits.data_ptr() % 16 == 0
    held = vocabulary * logits.element_size()
    hold = whole and 8 * threads < vocabulary and held <= _most_held(logits.device.index or 0)
    options = {
        "IN": _IN[logits.dtype],
        "NT": threads,
        "HOLD": int(hold),
        "MINB": 2 if hold else 1,
        "VEC": int(whole),
        "BIAS": int(bias is not None),
    }
    with torch.cuda.device(logits.device):
        shared = held if hold else 0
        run = _cuda.kernel(_SOURCE, "softmax_gradient", options, threads, logits.device.index or 0, shared)
        run((rows, 1, 1), logits, logits.stride(0), targets, bias, scale, losses, vocabulary, i32(int(wanted)))
    return losses


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:  # 16-bit factors, a float32 sum: the product is not rounded before it is added
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # type: ignore[call-overload]


_LIBRARY = torch.library.Library("statescan", "FRAGMENT")
_LIBRARY.define(
    "softmax_gradient_(Tensor(a!) logits, Tensor targets, Tensor? bias, Tensor scale, bool wanted) -> Tensor"
)
_LIBRARY.impl("softmax_gradient_", _softmax_gradient, "CUDA")
_LIBRARY.define("add_product_(Tensor(a!) total, Tensor a, Tensor b) -> ()")
_LIBRARY.impl("add_product_", _add_product, "CUDA")


@torch.library.register_fake("statescan::softmax_gradient_", lib=_LIBRARY)
def _(logits, targets, bias, scale, wanted):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[0], dtype=accumulate_dtype(logits.dtype))


@torch.library.register_fake("statescan::add_product_", lib=_LIBRARY)
def _(total, a, b):  # type: ignore[no-untyped-def]
    return None


class _Call:
    """A call's tensors in the dtypes that the products and sums take."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignored: int, of: Any):
        self.compute, self.wide = of, accumulate_dtype(of)
        self.hidden = hidden
        self.weight = weight.to(of)
        self.bias = None if bias is None else bias.to(self.wide)
        self.counted = targets != ignored
        self.aim = torch.where(self.counted, targets.long(), _NOT_COUNTED)

    def chunks(self, scale: Tensor, wanted: tuple[bool, ...], chunk: int, late: Tensor | None) -> tuple[Any, ...]:
        """Losses (rows,) and the wanted gradients of hidden, weight and bias, for a gradient `scale` (rows,) of each
        loss. `late` multiplies products instead, where their dtype has too small a range."""
        rows = self.hidden.shape[0]
        losses, of_hidden = [], []
        of_weight = torch.zeros(self.weight.shape, dtype=self.wide, device=scale.device) if wanted[1] else None
        of_bias = torch.zeros_like(self.bias) if self.bias is not None and wanted[2] else None
        for start in range(0, rows, chunk):
            here = slice(start, start + chunk)
            h = self.hidden[here].to(self.compute)
            g = h @ self.weight.T
            losses.append(torch.ops.statescan.softmax_gradient_(g, self.aim[here], self.bias, scale[here], any(wanted)))
            if wanted[0]:
                part = g @ self.weight
                of_hidden.append((part if late is None else part * late).to(self.hidden.dtype))
            if of_weight is not None:
                torch.ops.statescan.add_product_(of_weight, g.T, h)
            if of_bias is not None:
                of_bias += g.sum(0, dtype=self.wide)
            del g  # or two chunks exist while the next one is made
        if late is not None:
            of_weight = None if of_weight is None else of_weight * late
            of_bias = None if of_bias is None else of_bias * late
        return (
            torch.cat(losses) if losses else scale,
            (torch.cat(of_hidden) if of_hidden else torch.zeros_like(self.hidden)) if wanted[0] else None,
            of_weight,
            of_bias,
        )


class _Reduced(torch.autograd.Function):
    """Sum or mean of the losses; the gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        mean: bool,
        chunk: int,
        compute: torch.dtype,
        grad_mode: bool,
    ) -> Tensor:
        # needs_input_grad tells of the inputs alone: under no_grad it is true for every parameter.
        wanted = tuple(ctx.needs_input_grad[:3]) if grad_mode else (False, False, False)
        with without_autocast(hidden.device.type):
            call = _Call(hidden, weight, bias, targets, ignore_index, compute)
            scale = call.counted.to(call.wide)
            count = scale.sum().clamp(min=1)
            # float16 can't hold a probability over the number of tokens: there the mean is taken after the products.
            late = 1 / count if mean and compute == torch.float16 else None
            losses, *gradients = call.chunks(scale / count if mean and late is None else scale, wanted, chunk, late)
            total = losses.sum()
            if mean:
                total = total / count
        given = (hidden, weight, bias)
        ctx.save_for_backward(
            *(None if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, given, strict=True))
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = [None if part is None else part * grads[0].to(part.dtype) for part in ctx.saved_tensors]
        return (*parts, None, None, None, None, None, None)


class _PerToken(torch.autograd.Function):
    """One loss a token; the backward pass makes each chunk's logits again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        chunk: int,
        compute: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.ignore_index, ctx.chunk, ctx.compute = ignore_index, chunk, compute
        with without_autocast(hidden.device.type):
            call = _Call(hidden, weight, bias, targets, ignore_index, compute)
            return call.chunks(call.counted.to(call.wide), (False, False, False), chunk, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets = ctx.saved_tensors
        with without_autocast(hidden.device.type):
            call = _Call(hidden, weight, bias, targets, ctx.ignore_index, ctx.compute)
            scale = torch.where(call.counted, grads[0], 0).to(call.wide)
            _, *gradients = call.chunks(scale, tuple(ctx.needs_input_grad[:3]), ctx.chunk, None)
        given = (hidden, weight, bias)
        parts = [None if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, given, strict=True)]
        return (*parts, None, None, None, None)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    chunk_size: int | None,
    compute: torch.dtype,
) -> Tensor:
    """See `statescan.ops.linear_cross_entropy`; hidden (rows, d), targets (rows,)."""
    chunk = _rows_of_a_chunk(hidden.shape[0], weight.shape[0], chunk_size, compute.itemsize)
    if reduction == "none":
        return _PerToken.apply(hidden, weight, bias, targets, ignore_index, chunk, compute)  # type: ignore[return-value]
    # Asked for here, since inside of a Function's forward the grad mode is always off.
    grad_mode = torch.is_grad_enabled()
    return _Reduced.apply(  # type: ignore[return-value]
        hidden, weight, bias, targets, ignore_index, reduction == "mean", chunk, compute, grad_mode
    )
