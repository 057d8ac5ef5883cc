"""mamba_step on the C++ library: a block, or a whole stack of blocks with its head, in one call and one region."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from statescan.ops import _native
from statescan.ops._dispatch import Facts
from statescan.ops.mamba_step.validation import BlockWeights
from statescan.ops.packed_linear.cpu import Matrix, matrix
from statescan.ops.packed_linear.validation import PackedWeight

__all__ = ["Stack", "mamba_step", "refuses"]


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernel does not take this call, with the cure; None if it does."""
    if facts.device == "cpu" and facts.dtype != torch.float32:
        return f"it computes in float32, the input is {str(facts.dtype).removeprefix('torch.')}; use backend='torch'"
    return _native.refusal(facts.device, "ss_mamba_step")


class _Block(ctypes.Structure):
    """Mirrors ss_block in csrc/mamba_step.h."""

    _fields_ = (
        *((name, Matrix) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        *((name, ctypes.c_void_p) for name in ("norm", "conv_weight", "conv_bias", "A", "D")),
        ("epsilon", ctypes.c_double),
    )


class _Args(ctypes.Structure):
    """Mirrors ss_step_args in csrc/mamba_step.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "layers", "threads", "d_model", "d_inner", "d_state", "dt_rank", "width")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("blocks", "x", "residual", "conv_state", "ssm_state", "output", "residual_out")
        ),
        ("head", Matrix),
        ("head_norm", ctypes.c_void_p),
        ("head_epsilon", ctypes.c_double),
        ("logits", ctypes.c_void_p),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _call(args: _Args) -> None:
    code = _native.library().lib.ss_mamba_step(ctypes.byref(args))
    if code == -3:
        raise MemoryError("mamba_step: no memory left for the kernel's scratch; make the batch smaller")
    assert code == 0, f"ss_mamba_step returned {code}"


def _forward(
    x: Tensor,
    residual: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    norm: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    projections: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    output, stream = torch.empty_like(x), torch.empty_like(x)
    if x.shape[0] == 0:
        return output, stream
    block = _Block(
        *(matrix(*three) for three in zip(projections, scales, biases, strict=True)),
        _pointer(norm),
        _pointer(conv_weight),
        _pointer(conv_bias),
        _pointer(A),
        _pointer(D),
        epsilon,
    )
    args = _Args(
        batch=x.shape[0],
        layers=1,
        threads=torch.get_num_threads(),
        d_model=x.shape[1],
        d_inner=A.shape[0],
        d_state=A.shape[1],
        dt_rank=projections[2].shape[1],
        width=conv_weight.shape[1],
        blocks=ctypes.addressof(block),
        x=x.data_ptr(),
        residual=_pointer(residual),
        conv_state=_pointer(conv_state),
        ssm_state=_pointer(ssm_state),
        output=output.data_ptr(),
        residual_out=stream.data_ptr(),
    )
    _call(args)
    return output, stream


def _forward_fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    del rest
    return torch.empty_like(x), torch.empty_like(x)


torch.library.define(
    "statescan::mamba_step_cpu",
    "(Tensor x, Tensor? residual, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor norm, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor A, Tensor? D, Tensor[] projections, Tensor?[] scales, Tensor?[] biases, float epsilon) "
    "-> (Tensor, Tensor)",
)
torch.library.impl("statescan::mamba_step_cpu", "CPU", _forward)
torch.library.register_fake("statescan::mamba_step_cpu", _forward_fake)


def _contiguous(weights: BlockWeights) -> tuple[list[PackedWeight], list[Tensor | None]]:
    projections = [weights.in_proj, weights.x_proj, weights.dt_proj, weights.out_proj]
    biases = [weights.in_bias, weights.x_bias, weights.dt_bias, weights.out_bias]
    return projections, [None if bias is None else bias.contiguous() for bias in biases]


@torch.no_grad()
def mamba_step(
    x: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.mamba_step`."""
    w = weights
    projections, biases = _contiguous(w)
    return torch.ops.statescan.mamba_step_cpu(
        x,
        residual,
        conv_state,
        ssm_state,
        w.norm.contiguous(),
        w.conv_weight.contiguous(),
        None if w.conv_bias is None else w.conv_bias.contiguous(),
        w.A.contiguous(),
        None if w.D is None else w.D.contiguous(),
        [packed.data for packed in projections],
        [packed.scale for packed in projections],
        biases,
        w.epsilon,
    )


class Stack:
    """Blocks of one shape, and a head after them, whose step is a single call of the C++ library.

    Args:
        blocks: float32 vectors, contiguous tensors on the CPU; kept alive here.
        norm: (d_model,) weight of the norm before the head.
        epsilon: of that norm.
        head: packed (vocabulary, d_model).
        head_bias: (vocabulary,) or None.
    """

    def __init__(
        self, blocks: Sequence[BlockWeights], norm: Tensor, epsilon: float, head: PackedWeight, head_bias: Tensor | None
    ) -> None:
        self._keep = (list(blocks), norm, head, head_bias)
        self._blocks = (_Block * len(blocks))()
        for i, w in enumerate(blocks):
            projections, biases = _contiguous(w)
            self._blocks[i] = _Block(
                *(matrix(p.data, p.scale, bias) for p, bias in zip(projections, biases, strict=True)),
                *(_pointer(tensor) for tensor in (w.norm, w.conv_weight, w.conv_bias, w.A, w.D)),
                w.epsilon,
            )
        first = blocks[0]
        self._vocabulary = head.rows
        self._args = {
            "layers": len(blocks),
            "d_model": first.d_model,
            "d_inner": first.d_inner,
            "d_state": first.d_state,
            "dt_rank": first.dt_rank,
            "width": first.width,
            "blocks": ctypes.addressof(self._blocks),
            "head": matrix(head.data, head.scale, head_bias),
            "head_norm": _pointer(norm),
            "head_epsilon": epsilon,
        }

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Logits (batch, vocabulary) for embeddings x (batch, d_model); states (layers, batch, ...) move in place."""
        logits = torch.empty(x.shape[0], self._vocabulary, dtype=torch.float32)
        x = x.contiguous()
        _call(
            _Args(
                **self._args,
                batch=x.shape[0],
                threads=torch.get_num_threads(),
                x=x.data_ptr(),
                conv_state=_pointer(conv_state),
                ssm_state=_pointer(ssm_state),
                logits=logits.data_ptr(),
            )
        )
        return logits
