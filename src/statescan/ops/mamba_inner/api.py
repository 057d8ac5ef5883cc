"""`mamba_inner`: a whole layer as one differentiable function."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statescan.errors import BackendUnavailableError
from statescan.ops._checks import check_cu_seqlens
from statescan.ops._dispatch import choose
from statescan.ops.mamba_inner.layer import POLICIES, Kept, LayerGradients, LayerWeights, Normed

__all__ = ["LayerWeights", "Normed", "mamba_inner", "mamba_inner_or_none", "unavailable_reason"]


# Why a layer of such facts, which should have run as one function, did not: it runs op by op from then on.
_broken: dict[tuple[torch.dtype, int, int], str] = {}


def unavailable_reason(device: str, dtype: torch.dtype, d_state: int, d_conv: int) -> str | None:
    """Why a layer can't run as one function and takes its ops one after the other; None where it can.

    Args:
        device: device type of the activations.
        dtype: of the activations.
        d_state: state size.
        d_conv: width of the convolution.
    """
    for op, taken in (
        ("causal_conv1d", choose("causal_conv1d", "auto", device, dtype, width=d_conv)),
        ("selective_scan", choose("selective_scan", "auto", device, dtype, d_state=d_state)),
    ):
        if taken != "cuda":
            return f"{op} runs on '{taken}'"
    return _broken.get((dtype, d_state, d_conv))


unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `_dispatch.choose`


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, compute, cu_seqlens, policy, stream, norm, eps, *weights):  # type: ignore[no-untyped-def, override]
        cast = x.to(compute)
        number = tuple(POLICIES).index(policy)
        source = None if stream is not None and policy != "none" else cast
        if source is not None:
            stream = norm = None
        if not torch.compiler.is_compiling():
            from statescan.ops.mamba_inner.cuda import make_ready

            make_ready(cast, stream, norm, eps, *weights, cu_seqlens)
        out, *kept = torch.ops.statescan.mamba_inner_cuda(cast, *weights, cu_seqlens, number)
        ctx.save_for_backward(source, stream, norm, cu_seqlens, *kept, *weights)
        ctx.eps, ctx.policy, ctx.dtype = eps, number, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, stream, norm, cu_seqlens, *rest = ctx.saved_tensors
        kept, weights = rest[: len(Kept._fields)], rest[len(Kept._fields) :]
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[7:]]
        gradients = torch.ops.statescan.mamba_inner_cuda_backward(
            grads[0], source, stream, norm, ctx.eps, *weights, cu_seqlens, *kept, ctx.policy, wanted
        )
        dx, *of_weights = (g if want else None for g, want in zip(gradients, wanted, strict=True))
        return (None if dx is None else dx.to(ctx.dtype), *(None,) * 6, *of_weights)


def mamba_inner(
    x: Tensor,
    weights: LayerWeights,
    *,
    cu_seqlens: Tensor | None = None,
    recompute: str = "none",
    normed: Normed | None = None,
) -> Tensor:
    """A Mamba layer from zero states, differentiable in x and every weight, with no copy that its equations don't need.

    The equations are those of `statescan.nn.Mamba`. Against the layer's ops one after the other: the halves of
    in_proj's output are read where they lie, and their gradients are written into one tensor; the scan's output is made
    again by the scan's backward pass, which has it anyway, and is never kept; weight gradients are summed in float32
    where the weights are.

    Args:
        x: (batch, length, d_model); under autocast any float dtype.
        weights: the layer's, in any float dtype.
        cu_seqlens: (sequences + 1,) int32, where packed sequences start; batch is 1. Default: none.
        recompute: ``"none"`` keeps what the backward pass needs but for dt_proj's output; ``"cheap"`` in_proj's and
            x_proj's outputs and the scan's checkpoints; ``"block"`` nothing. What isn't kept is made again, with the
            same gradients to the bit.
        normed: what x is made again from, where it isn't kept (with "cheap" and "block"). Default: x is kept.

    Returns:
        (batch, length, d_model) in autocast's dtype, else x's.

    Raises:
        ShapeError: cu_seqlens do not go from 0 to the length without falling.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), algorithm 2, figure 3
    and section 3.3.2 (recomputation).
    """
    import statescan.ops.mamba_inner.cuda  # noqa: F401  # registers the two ops

    if cu_seqlens is not None:
        check_cu_seqlens("Mamba.forward", cu_seqlens, x.shape[0], x.shape[1])
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    source = (None, None, 0.0) if normed is None else (normed.stream.detach(), normed.weight.detach(), normed.eps)
    return _Inner.apply(x, compute, cu_seqlens, recompute, *source, *weights)  # type: ignore[return-value]


def mamba_inner_or_none(x: Tensor, weights: LayerWeights, **arguments: Any) -> Tensor | None:
    """`mamba_inner`, or None where a kernel of its passes can't be made here: warned of once, with the cause."""
    try:
        return mamba_inner(x, weights, **arguments)
    except BackendUnavailableError as problem:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        _broken[dtype, weights.A.shape[1], weights.conv.shape[1]] = str(problem)
        warnings.warn(f"Mamba: a layer runs op by op instead of as one function: {problem}", stacklevel=2)
        return None


assert LayerGradients._fields[1:] == LayerWeights._fields
