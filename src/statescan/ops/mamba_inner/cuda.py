"""The layer on NVIDIA GPUs: the launchers of the convolution's and the scan's kernels, behind two torch.library ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statescan.ops import _cuda
from statescan.ops._checks import without_autocast
from statescan.ops.add_norm import cuda as add_norm
from statescan.ops.causal_conv1d import cuda as conv
from statescan.ops.mamba_inner.layer import (
    POLICIES,
    Kept,
    LayerGradients,
    LayerWeights,
    Normed,
    backward,
    forward,
    rehearse,
)
from statescan.ops.selective_scan import cuda as scan

__all__ = ["CudaKernels", "make_ready", "run_backward", "run_forward"]


class CudaKernels:
    """`statescan.ops.mamba_inner.layer.Kernels` by the cuda backends of the ops."""

    def norm_again(self, source: Normed, dtype: torch.dtype) -> Tensor:
        return add_norm.launch_again(source.stream, source.weight, source.eps, dtype)

    def conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        return conv.launch_forward(x, weight, bias, True, None, cu_seqlens)

    def conv_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, dx: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return conv.launch_backward(dy, None, x, weight, bias, True, None, cu_seqlens, dx)[1:3]

    def scan_forward(
        self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, w: LayerWeights, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, _, checkpoints = scan.launch_forward(u, dt, w.A, B, C, w.D, z, w.dt_bias, True, None, cu_seqlens)
        return y, checkpoints

    def scan_backward(
        self,
        dy: Tensor,
        checkpoints: Tensor,
        u: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor,
        w: LayerWeights,
        cu_seqlens: Tensor | None,
        dz: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        y = torch.empty_like(u)
        inputs = (u, dt, w.A, B, C, w.D, z, w.dt_bias, True, None, cu_seqlens)
        du, ddt, dA, dB, dC, dD, _, d_bias, _ = scan.launch_backward(
            *inputs, dy=dy, checkpoints=checkpoints, dz=dz, y=y
        )
        return y, du, ddt, dB, dC, dA, dD, d_bias


_POLICIES = tuple(POLICIES)
_WEIGHTS = (
    "Tensor in_proj, Tensor? in_bias, Tensor conv, Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, Tensor dt_bias, "
    "Tensor A, Tensor D, Tensor out_proj, Tensor? out_bias"
)
_LIBRARY = torch.library.Library("statescan", "FRAGMENT")
_LIBRARY.define(
    f"mamba_inner_cuda(Tensor x, {_WEIGHTS}, Tensor? cu_seqlens, int policy) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"mamba_inner_cuda_backward(Tensor dout, Tensor? x, Tensor? stream, Tensor? norm, float eps, {_WEIGHTS}, "
    "Tensor? cu_seqlens, Tensor xz, Tensor u, Tensor x_dbl, Tensor checkpoints, int policy, bool[] wanted) "
    f"-> ({', '.join(['Tensor'] * len(LayerGradients._fields))})"
)


def run_forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The op's implementation: the output, and what is kept (else empty tensors) in the order of `Kept`."""
    *weights, cu_seqlens, policy = rest
    with torch.cuda.device(x.device), without_autocast(x.device.type):
        out, kept = forward(CudaKernels(), x, LayerWeights(*weights), cu_seqlens, POLICIES[_POLICIES[policy]])
    return (out, *(x.new_empty(0) if t is None else t for t in kept))


def run_backward(
    dout: Tensor, x: Tensor | None, stream: Tensor | None, norm: Tensor | None, eps: float, *rest: Any
) -> tuple[Tensor, ...]:
    """The op's implementation: the gradients in the order of `LayerGradients`, empty where not wanted."""
    count = len(LayerWeights._fields)
    weights, cu_seqlens, saved, policy, wanted = rest[:count], rest[count], rest[count + 1 : -2], rest[-2], rest[-1]
    keep = POLICIES[_POLICIES[policy]]
    kept = Kept(*(t if name in keep else None for name, t in zip(Kept._fields, saved, strict=True)))
    source: Any = x if stream is None or norm is None else Normed(stream, norm, eps)
    with torch.cuda.device(dout.device), without_autocast(dout.device.type):
        gradients = backward(
            CudaKernels(), dout.contiguous(), source, LayerWeights(*weights), cu_seqlens, kept, tuple(wanted)
        )
    return tuple(dout.new_empty(0) if g is None else g for g in gradients)


def _rehearse(x: Tensor, stream: Tensor | None, norm: Tensor | None, eps: float, *rest: Any) -> None:
    *weights, cu_seqlens = rest
    normed = None if stream is None or norm is None else Normed(stream, norm, eps)
    with torch.cuda.device(x.device), without_autocast(x.device.type):
        rehearse(CudaKernels(), x, LayerWeights(*weights), cu_seqlens, normed)


def make_ready(x: Tensor, stream: Tensor | None, norm: Tensor | None, eps: float, *rest: Any) -> None:
    """Compiles the kernels of both passes beforehand, see `statescan.ops._cuda.make_ready`; `rest`: the weights and
    cu_seqlens.

    Raises:
        BackendUnavailableError: one can't be made.
    """
    _cuda.make_ready(_rehearse, x, stream, norm, eps, *rest)


_LIBRARY.impl("mamba_inner_cuda", run_forward, "CUDA")
_LIBRARY.impl("mamba_inner_cuda_backward", run_backward, "CUDA")


@torch.library.register_fake("statescan::mamba_inner_cuda", lib=_LIBRARY)
def _(x, *rest):  # type: ignore[no-untyped-def]
    w, cu_seqlens, policy = LayerWeights(*rest[:-2]), rest[-2], rest[-1]
    batch, length, _ = x.shape
    inner, state = w.A.shape
    shapes = {
        "xz": (batch, length, 2 * inner),
        "u": (batch, length, inner),
        "x_dbl": (batch, length, w.x_proj.shape[0]),
    }
    keep = POLICIES[_POLICIES[policy]]
    kept = [x.new_empty(shapes[name] if name in keep else 0) for name in Kept._fields[:-1]]
    # sizes may be symbols
    tile = scan.plan.__wrapped__(1, 1, 8, state, 1, 1, x.dtype == torch.float64, cu_seqlens is not None).tile
    shape = (batch, (length + tile - 1) // tile, inner, state)
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    checkpoints = x.new_empty(shape, dtype=real) if "checkpoints" in keep else x.new_empty(0)
    return (torch.empty_like(x), *kept, checkpoints)


@torch.library.register_fake("statescan::mamba_inner_cuda_backward", lib=_LIBRARY)
def _(dout, x, stream, norm, eps, *rest):  # type: ignore[no-untyped-def]
    like = (dout, *rest[: len(LayerWeights._fields)])
    return tuple(
        dout.new_empty(0) if g is None or not w else torch.empty_like(g, memory_format=torch.contiguous_format)
        for g, w in zip(like, rest[-1], strict=True)
    )
