"""The cross-entropy of a linear layer's outputs, a chunk of tokens at a time.

With a reduction the gradients are taken in the forward pass, while a chunk's logits exist, so that nothing of the
vocabulary's size but the weight's own gradient outlives a chunk. Without one the backward pass makes each chunk's
logits again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statescan.ops._checks import without_autocast
from statescan.ops._dispatch import Facts
from statescan.ops.cross_entropy.validation import accumulate_dtype

__all__ = ["linear_cross_entropy", "refuses"]

# Logits that exist at once, counted in numbers: 64 MB in float32, and enough rows to keep a matrix product busy.
_LOGITS_AT_ONCE = 2**24
_ROWS_AT_LEAST = 256


def refuses(facts: Facts) -> str | None:
    """None: plain PyTorch runs everything."""
    del facts
    return None


def _rows_of_a_chunk(rows: int, vocabulary: int, chunk_size: int | None) -> int:
    if chunk_size is None:
        chunk_size = max(_LOGITS_AT_ONCE // vocabulary, _ROWS_AT_LEAST)
    return max(min(chunk_size, rows), 1)


def _log_probabilities(h: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """(rows, vocabulary) log-softmax of a chunk, in `wide`; h and weight are in the dtype of the product."""
    logits = (h @ weight.T).to(wide)
    if bias is not None:
        logits += bias
    return torch.log_softmax(logits, -1)


def _losses(log_p: Tensor, aim: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, -log_p.gather(-1, aim[:, None])[:, 0], 0)


class _Gradients:
    """Sums of the gradients over chunks, each made only where it is wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool], wide: Any):
        self.weight = weight
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.of_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
        self.of_bias = None if bias is None or not wanted[2] else torch.zeros_like(bias)

    def add(self, start: int, h: Tensor, log_p: Tensor, aim: Tensor, scale: Tensor, late: Tensor | None) -> None:
        """Takes in a chunk: d loss / d logits = (softmax - onehot) * scale, made in place of log_p.

        `late` multiplies the products instead of the factors where the product's dtype has too small a range.
        """
        g = log_p.exp_()
        g.scatter_add_(-1, aim[:, None], g.new_full((aim.shape[0], 1), -1.0))
        g *= scale[:, None]
        if self.of_bias is not None:
            self.of_bias += g.sum(0) if late is None else g.sum(0) * late
        g = g.to(h.dtype)
        if self.hidden is not None:
            part = g @ self.weight
            self.hidden[start : start + h.shape[0]] = part if late is None else part * late
        if self.of_weight is not None:
            if self.of_weight.dtype == h.dtype:
                self.of_weight.addmm_(g.T, h)
            else:
                self.of_weight += g.T @ h


class _Reduced(torch.autograd.Function):
    """Sum or mean of the losses; the gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
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
        wide = accumulate_dtype(compute)
        # needs_input_grad tells of the inputs alone: under no_grad it is true for every parameter.
        wanted = ctx.needs_input_grad[:3] if grad_mode else (False, False, False)
        counted = targets != ignore_index
        aim = torch.where(counted, targets, 0).long()
        scale = counted.to(wide)
        # float16 can't hold a probability over the number of tokens: there the mean is taken after the products.
        late = None
        count = scale.sum().clamp(min=1)
        if mean:
            if compute == torch.float16:
                late = 1 / count
            else:
                scale = scale / count
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with without_autocast(hidden.device.type):
            w = weight.to(compute)
            b = None if bias is None else bias.to(wide)
            gradients = _Gradients(hidden, w, b, wanted, wide)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                h = hidden[rows].to(compute)
                log_p = _log_probabilities(h, w, b, wide)
                total += _losses(log_p, aim[rows], counted[rows]).sum()
                if any(wanted):
                    gradients.add(start, h, log_p, aim[rows], scale[rows], late)
            if mean:
                total = total / count
            if late is not None and gradients.of_weight is not None:
                gradients.of_weight *= late
        ctx.save_for_backward(
            gradients.hidden,
            None if gradients.of_weight is None else gradients.of_weight.to(weight.dtype),
            None if gradients.of_bias is None or bias is None else gradients.of_bias.to(bias.dtype),
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
    def forward(
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
        return _per_token(hidden, weight, bias, targets, ignore_index, chunk, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets = ctx.saved_tensors
        wide = accumulate_dtype(ctx.compute)
        counted = targets != ctx.ignore_index
        aim = torch.where(counted, targets, 0).long()
        scale = torch.where(counted, grads[0], 0).to(wide)
        with without_autocast(hidden.device.type):
            w = weight.to(ctx.compute)
            b = None if bias is None else bias.to(wide)
            gradients = _Gradients(hidden, w, b, ctx.needs_input_grad[:3], wide)
            for start in range(0, hidden.shape[0], ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                h = hidden[rows].to(ctx.compute)
                log_p = _log_probabilities(h, w, b, wide)
                gradients.add(start, h, log_p, aim[rows], scale[rows], None)
        return (
            gradients.hidden,
            None if gradients.of_weight is None else gradients.of_weight.to(weight.dtype),
            None if gradients.of_bias is None or bias is None else gradients.of_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _per_token(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    chunk: int,
    compute: torch.dtype,
) -> Tensor:
    wide = accumulate_dtype(compute)
    counted = targets != ignore_index
    aim = torch.where(counted, targets, 0).long()
    losses = torch.empty(targets.shape, dtype=wide, device=hidden.device)
    with without_autocast(hidden.device.type):
        w = weight.to(compute)
        b = None if bias is None else bias.to(wide)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            log_p = _log_probabilities(hidden[rows].to(compute), w, b, wide)
            losses[rows] = _losses(log_p, aim[rows], counted[rows])
    return losses


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
    chunk = _rows_of_a_chunk(hidden.shape[0], weight.shape[0], chunk_size)
    if reduction == "none":
        return _PerToken.apply(hidden, weight, bias, targets, ignore_index, chunk, compute)  # type: ignore[return-value]
    # Asked for here, since inside of a Function's forward the grad mode is always off.
    grad_mode = torch.is_grad_enabled()
    return _Reduced.apply(  # type: ignore[return-value]
        hidden, weight, bias, targets, ignore_index, reduction == "mean", chunk, compute, grad_mode
    )
