"""A whole stack of blocks and its head, one token further for one row, in one launch: see decode.cu."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from statescan.ops import _cuda
from statescan.ops._cuda import i32
from statescan.ops.mamba_step.validation import BlockWeights
from statescan.ops.packed_linear.validation import PackedWeight

__all__ = ["Stack", "refuses_stack"]

_SOURCE = Path(__file__).with_name("decode.cu")
_THREADS = 512 + 64
_FIELDS = 13  # pointers of `struct Layer`
_SHARED_LIMIT = 227 * 1024  # bytes of shared memory a block can have on compute capability 9.0
_WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _up(value: int, unit: int) -> int:
    return math.ceil(value / unit) * unit


def _layout(
    d_model: int, d_inner: int, rank: int, d_state: int, vocabulary: int, layers: int, blocks: int, size: int
) -> tuple[int, int]:
    """(bytes of a slot of the ring, bytes of `struct Shared` without its barriers), as decode.cu has them."""
    outputs = rank + 2 * d_state
    channels, rows, words = (math.ceil(total / blocks) for total in (d_inner, d_model, vocabulary))
    slot = _up(max(4 * d_model, 2 * d_inner, channels * outputs) * size, 128)
    parts = 4 * (2 * _up(channels, 4) + _up(rows, 4) + _up(words, 4))
    return slot, 8 * _FIELDS * layers + 4 * (d_inner + parts + _up(channels, 4) + outputs + 1024 + 16) + 64


def refuses_stack(blocks: Sequence[BlockWeights], head: PackedWeight, device: torch.device) -> str | None:
    """Why the one-launch step does not take this model on this device; None if it does."""
    first = blocks[0]
    if device.type != "cuda":
        return f"it runs on CUDA devices, the weights are on '{device.type}'"
    reason = _cuda.unavailable_reason()
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(device)[0] < 9:
        return "its weights stream by bulk copies, which need compute capability 9.0"
    if head.data.dtype not in _WEIGHTS:
        return f"its weights are float32, bfloat16 or float16, they are {head.dtype}"
    if first.d_state != 16:
        return f"it holds 16 states a channel, d_state is {first.d_state}"
    if first.d_model % 32 or first.d_inner % 32 or (first.dt_rank + 32) % 8 or first.dt_rank > 480:
        return (
            "d_model and d_inner must be multiples of 32 and dt_rank one of 8 up to 480, they are "
            f"{first.d_model}, {first.d_inner}, {first.dt_rank}"
        )
    if any(tensor.data_ptr() % 16 for tensor in _tensors(blocks, head)):
        return "its copies begin at multiples of 16 bytes, and one of the weights does not; pass clones of them"
    if _slots(first, len(blocks), head, device) < 4:
        return "a few rows of its weights don't fit a block's shared memory"
    return None


def _tensors(blocks: Sequence[BlockWeights], head: PackedWeight) -> list[Tensor]:
    values = [value for block in blocks for value in vars(block).values()] + [head]
    return [x.data if isinstance(x, PackedWeight) else x for x in values if isinstance(x, (Tensor, PackedWeight))]


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(first: BlockWeights, device: torch.device) -> int:
    return min(_multiprocessors(device), first.d_inner)


def _slots(first: BlockWeights, layers: int, head: PackedWeight, device: torch.device) -> int:
    slot, rest = _layout(
        first.d_model,
        first.d_inner,
        first.dt_rank,
        first.d_state,
        head.rows,
        layers,
        _blocks(first, device),
        head.data.element_size(),
    )
    return min((_SHARED_LIMIT - rest) // (slot + 16), 64) // 4 * 4


class Stack:
    """Blocks of one shape with embedding and head, whose step for one row is a single launch.

    Args:
        blocks: float32 vectors and weights of one dtype on one CUDA device; kept alive here.
        embedding: packed (vocabulary, d_model).
        norm: (d_model,) weight of the norm before the head.
        epsilon: of that norm.
        head: packed (vocabulary, d_model).
        head_bias: (vocabulary,) or None.
    """

    def __init__(
        self,
        blocks: Sequence[BlockWeights],
        embedding: PackedWeight,
        norm: Tensor,
        epsilon: float,
        head: PackedWeight,
        head_bias: Tensor | None,
        **options: int,
    ) -> None:
        first, device = blocks[0], norm.device
        transposed = [w.x_proj.data.t().contiguous() for w in blocks]
        self._keep = (list(blocks), transposed, embedding, norm, head, head_bias)
        self._layers = torch.tensor(
            [
                [
                    0 if tensor is None else tensor.data_ptr()
                    for tensor in (
                        w.in_proj.data,
                        x_proj,
                        w.dt_proj.data,
                        w.out_proj.data,
                        w.norm,
                        w.conv_weight,
                        w.conv_bias,
                        w.A,
                        w.D,
                        w.dt_bias,
                        w.in_bias,
                        w.x_bias,
                        w.out_bias,
                    )
                ]
                for w, x_proj in zip(blocks, transposed, strict=True)
            ],
            dtype=torch.int64,
        ).to(device)
        self.nbytes = sum(x.nbytes for x in transposed)  # of weights that nobody else holds
        self._grid = (_blocks(first, device), 1, 1)
        size = head.data.element_size()
        slot, rest = _layout(
            first.d_model,
            first.d_inner,
            first.dt_rank,
            first.d_state,
            head.rows,
            len(blocks),
            self._grid[0],
            size,
        )
        slots = options.pop("SLOTS", 0) or _slots(first, len(blocks), head, device)
        macros = {
            "IN": 0,
            "D": first.d_model,
            "E": first.d_inner,
            "N": first.d_state,
            "R": first.dt_rank,
            "W": first.width,
            "V": head.rows,
            "NB": self._grid[0],
            "WT": _WEIGHTS[head.data.dtype],
            "SLOTS": slots,
            "LAYERS": len(blocks),
            **options,
        }
        shared = slots * (slot + 16) + rest
        self._run = _cuda.kernel(
            _SOURCE, "decode_step", macros, _THREADS, device.index or 0, shared=shared, cooperative=True
        )
        outputs = first.dt_rank + 2 * first.d_state
        words = first.d_model + first.d_inner + outputs * (1 + self._grid[0])
        words += 10 * len(blocks) * self._grid[0] * ("PROFILE" in options)
        self._words = torch.zeros(words, dtype=torch.int64, device=device)
        self._epoch = torch.zeros(1, dtype=torch.int32, device=device)
        self._epsilons = (ctypes.c_float(first.epsilon), ctypes.c_float(epsilon))

    def step(self, token: Tensor, conv_state: Tensor, ssm_state: Tensor, logits: Tensor) -> None:
        """Writes the logits (vocabulary,) after one more token; states (layers, batch, ...) of row 0 move in place.

        Everything is read and written by address, so the launch can be captured in a graph.

        Args:
            token: (1,) int32.
            conv_state: (layers, >= 1, width - 1, d_inner) float32.
            ssm_state: (layers, >= 1, d_inner, d_state) float32.
            logits: (vocabulary,) float32.
        """
        blocks, _, embedding, norm, head, head_bias = self._keep
        self._run(
            self._grid,
            self._layers,
            i32(len(blocks)),
            embedding.data,
            head.data,
            norm,
            head_bias,
            *self._epsilons,
            token,
            conv_state,
            conv_state.stride(0),
            ssm_state,
            ssm_state.stride(0),
            logits,
            self._words,
            self._epoch,
        )
