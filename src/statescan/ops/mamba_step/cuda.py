"""mamba_step on NVIDIA GPUs: the pieces of step.cu around matrix products, for any shape, batch and packing.

`Pieces` launches them one by one, for this op and for the decoder of `statescan.generate`, which puts cuBLAS's products
between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from statescan.ops import _cuda
from statescan.ops._cuda import i32
from statescan.ops._dispatch import Facts
from statescan.ops.mamba_step.validation import BlockWeights
from statescan.ops.packed_linear.validation import PackedWeight

__all__ = ["Pieces", "mamba_step", "refuses"]

_SOURCE = Path(__file__).with_name("step.cu")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int8: 4}
_THREADS = 256
_ROWS = 8  # that `linear` takes at a time


def refuses(facts: Facts) -> str | None:
    """CUDA devices, d_state up to 256."""
    if facts.device != "cuda":
        return _cuda.elsewhere(facts.device)
    if facts.d_state > 256:
        return f"its kernels hold up to 256 states a channel, d_state is {facts.d_state}; use backend='torch'"
    return _cuda.unavailable_reason()


def _lanes(d_state: int) -> tuple[int, int]:
    """(threads of a channel, states of each): four states each where that comes out even."""
    lanes = d_state // 4
    if d_state % 4 == 0 and lanes in (1, 2, 4, 8, 16, 32):
        return lanes, 4
    lanes = max(1, min(32, 1 << math.ceil(math.log2(math.ceil(d_state / 32)))))
    return lanes, math.ceil(d_state / lanes)


class Pieces:
    """Launches of step.cu for activations of one dtype; sums and states are float32 (float64 for float64).

    Args:
        dtype: of activations.
        device: a CUDA device.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._options = {"IN": _TYPES[dtype]}
        self._device = device.index if device.index is not None else torch.cuda.current_device()

        self._early = torch.cuda.get_device_capability(self._device)[0] >= 9

    def _kernel(self, name: str, early: bool = False, **options: int) -> _cuda.Kernel:
        return _cuda.kernel(_SOURCE, name, {**self._options, **options}, _THREADS, self._device, early=early)

    def add_norm(
        self,
        x: Tensor,
        before: Tensor | None,
        stream: Tensor,
        weight: Tensor,
        epsilon: float,
        normed: Tensor,
    ) -> None:
        """stream = x + before; normed = stream / rms(stream) * weight; (rows, d_model), `before` may be `stream`.

        x may come as contiguous parts to be added up, (parts, rows, d_model).
        """
        rows, d_model = stream.shape
        chunks = math.ceil(d_model / (8 * _THREADS)) if d_model % 8 == 0 else 0
        tensors = [t for t in (x, before, stream, weight, normed) if t is not None]
        whole = 0 < chunks <= 2 and all(t.data_ptr() % 16 == 0 for t in tensors)
        parts = x.shape[0] if x.dim() == 3 else 1
        # It begins while the product in front ends; in a step of a hundred launches that counts.
        run = self._kernel("add_norm", self._early, CHUNKS=chunks if whole else 0, PARTS=parts, EARLY=int(self._early))
        run((rows, 1, 1), x, before, stream, weight, normed, i32(d_model), float(epsilon))

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """x W^T + bias with sums in the state's precision; x (rows, in) with contiguous rows."""
        rows, outputs, columns = x.shape[0], packed.rows, packed.columns
        y = x.new_empty(rows, outputs)
        run = self._kernel("linear", WT=_TYPES[packed.data.dtype])
        grid = (math.ceil(outputs / 8), math.ceil(rows / _ROWS), 1)
        scale = packed.scale if packed.scale is None or x.dtype != torch.float64 else packed.scale.double()
        if grid[1] > _cuda.MOST_BLOCKS:
            return torch.cat([self.linear(part, packed, bias) for part in x.split(_cuda.MOST_BLOCKS)])
        sizes = (i32(rows), i32(outputs), i32(columns))
        run(grid, x, x.stride(0), packed.data, scale, bias, y, *sizes)
        return y

    def conv_step(self, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """y = silu(conv(x)), the state (rows, width - 1, d_inner) moved on; x (rows, d_inner) may be a part of rows.

        The state is float32 (float64 for float64) or has x's dtype.
        """
        rows, d_inner = x.shape
        if rows > _cuda.MOST_BLOCKS:
            for r in _cuda.pieces(rows):
                self.conv_step(x[r], state[r], weight, bias, y[r])
            return
        run = self._kernel("conv_step", W=weight.shape[1], CONV=int(state.dtype != weight.dtype))
        run((math.ceil(d_inner / _THREADS), rows, 1), x, x.stride(0), state, weight, bias, y, i32(d_inner))

    def state_step(
        self,
        state: Tensor,
        u: Tensor,
        z: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
    ) -> None:
        """y = (C . h + D u) silu(z) for h, (rows, d_inner, d_state), moved on in place; dt before bias and softplus."""
        rows, d_inner = u.shape
        if rows > _cuda.MOST_BLOCKS:
            for r in _cuda.pieces(rows):
                self.state_step(state[r], u[r], z[r], dt[r], A, B[r], C[r], D, bias, y[r])
            return
        lanes, states = _lanes(A.shape[1])
        marks = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in (state, A, B, C))
        run = self._kernel("state_step", N=A.shape[1], G=lanes, NS=states, VBC=int(marks))
        grid = (math.ceil(d_inner / (_THREADS // lanes)), rows, 1)
        run(grid, state, u, z, z.stride(0), dt, B, C, B.stride(0), A, D, bias, y, i32(d_inner))


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
    stream = torch.empty_like(x)
    if x.shape[0] == 0:
        return torch.empty_like(x), stream
    pieces = Pieces(x.dtype, x.device)
    weights = [PackedWeight(data, scale) for data, scale in zip(projections, scales, strict=True)]
    (in_proj, x_proj, dt_proj, out_proj), (in_bias, x_bias, dt_bias, out_bias) = weights, biases
    d_inner, d_state = A.shape
    normed, u, y = torch.empty_like(x), x.new_empty(x.shape[0], d_inner), x.new_empty(x.shape[0], d_inner)
    pieces.add_norm(x, residual, stream, norm, epsilon, normed)
    uz = pieces.linear(normed, in_proj, in_bias)
    pieces.conv_step(uz[:, :d_inner], conv_state, conv_weight, conv_bias, u)
    selected = pieces.linear(u, x_proj, x_bias)
    dt, B, C = selected.split([dt_proj.columns, d_state, d_state], dim=1)
    pieces.state_step(ssm_state, u, uz[:, d_inner:], pieces.linear(dt, dt_proj, None), A, B, C, D, dt_bias, y)
    return pieces.linear(y, out_proj, out_bias), stream


def _forward_fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    del rest
    return torch.empty_like(x), torch.empty_like(x)


torch.library.define(
    "statescan::mamba_step_cuda",
    "(Tensor x, Tensor? residual, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor norm, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor A, Tensor? D, Tensor[] projections, Tensor?[] scales, Tensor?[] biases, float epsilon) "
    "-> (Tensor, Tensor)",
)
torch.library.impl("statescan::mamba_step_cuda", "CUDA", _forward)
torch.library.register_fake("statescan::mamba_step_cuda", _forward_fake)


@torch.no_grad()
def mamba_step(
    x: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.mamba_step`."""
    w = weights
    projections = [w.in_proj, w.x_proj, w.dt_proj, w.out_proj]
    biases = [w.in_bias, w.x_bias, w.dt_bias, w.out_bias]

    def whole(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    return torch.ops.statescan.mamba_step_cuda(
        x,
        residual,
        conv_state,
        ssm_state,
        w.norm.contiguous(),
        w.conv_weight.contiguous(),
        whole(w.conv_bias),
        w.A.contiguous(),
        whole(w.D),
        [packed.data for packed in projections],
        [packed.scale for packed in projections],
        [whole(bias) for bias in biases],
        w.epsilon,
    )
