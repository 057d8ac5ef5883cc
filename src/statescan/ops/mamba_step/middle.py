"""Convolution, x_proj, dt_proj, state and gate of a decoding step of several rows in one launch: see middle.cu."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from statescan.ops import _cuda
from statescan.ops._cuda import i32
from statescan.ops.mamba_step.validation import BlockWeights

__all__ = ["Middle", "MiddleTiles", "refuses_middle", "refuses_tiles"]

_SOURCE = Path(__file__).with_name("middle.cu")
_TILES_SOURCE = Path(__file__).with_name("middle_tiles.cu")
_WARPS = 16
_THREADS = 32 * (_WARPS + 1)
_SHARED_LIMIT = 227 * 1024  # bytes of shared memory a block can have on compute capability 9.0
_TYPES = {torch.bfloat16: 1, torch.float16: 2}
_MOST_ROWS = 128
_TILE_ROWS, _TILE_CHANNELS, _TILES_THREADS = 16, 256, 512  # of a block of middle_tiles.cu
_TILES_EACH = False  # EACH of middle_tiles.cu, for tests/gpu/sanitize.py
_TILE_RANK = 192  # largest dt_rank there: x_proj's weights of the block fit its ring
_MOST_STATES = 64 * 4096  # channels of all rows up to which it was faster than the pieces where measured


def _channels(d_inner: int, device: torch.device) -> int | None:
    """Channels of a block: the fewest, in eights, with which all blocks run at once; None where that can't be."""
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    for channels in (8, 16, 24, 32, 40, 48, 64):
        if d_inner % channels == 0 and d_inner // channels <= blocks:
            return channels
    return None


def refuses_middle(block: BlockWeights, device: torch.device) -> str | None:
    """Why the one-launch middle does not take blocks of this kind on this device; None if it does."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, the weights are on '{device.type}'"
    reason = _cuda.unavailable_reason()
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(device)[0] < 9:
        return "its states stream by bulk copies, which need compute capability 9.0"
    if block.x_proj.data.dtype not in _TYPES:
        return f"its products take bfloat16 or float16, the weights are {block.x_proj.dtype}"
    if block.d_state != 16:
        return f"it holds 16 states a channel, d_state is {block.d_state}"
    if block.d_inner % 512 or block.dt_rank % 16 or block.dt_rank > 256:
        return (
            "d_inner must be a multiple of 512 and dt_rank one of 16 up to 256, they are "
            f"{block.d_inner} and {block.dt_rank}"
        )
    if _channels(block.d_inner, device) is None:
        return f"d_inner {block.d_inner} does not divide among the multiprocessors"
    vectors = [block.conv_weight, block.conv_bias, block.dt_bias]
    tensors = [block.x_proj.data, block.dt_proj.data, block.A, *(x for x in vectors if x is not None)]
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return "its loads begin at multiples of 16 bytes, and one of the weights does not; pass clones of them"
    return None


class Middle:
    """What lies between in_proj and out_proj for up to 128 rows, one launch a block of the model.

    Launches of one object must follow each other on one stream: they share their buffers.

    Args:
        block: any block of the model; all have its sizes.
        device: a CUDA device.
    """

    most_rows = _MOST_ROWS

    def __init__(self, block: BlockWeights, device: torch.device) -> None:
        channels = _channels(block.d_inner, device)
        assert channels is not None
        self._channels, self._rank, self._inner, self._width = channels, block.dt_rank, block.d_inner, block.width
        self._dtype = block.x_proj.data.dtype
        self._device = device.index or 0
        rows = self.most_rows
        self._u = torch.empty(rows, block.d_inner, dtype=self._dtype, device=device)
        self._low = torch.empty(rows, block.dt_rank, dtype=self._dtype, device=device)
        self._bc = torch.empty(rows, 2 * block.d_state, device=device)
        self._counters = torch.zeros(3 * 32, dtype=torch.int32, device=device)

    def pays(self, rows: int) -> bool:
        """Whether so many rows are best taken by it."""
        return rows <= self.most_rows and rows * self._inner <= _MOST_STATES

    def _kernel(self, rows: int, conv: torch.dtype) -> _cuda.Kernel:
        most = min(max(16, 1 << math.ceil(math.log2(rows))), self.most_rows)
        tiles = 1 if most <= 64 else 2  # of eight outputs: as many blocks as there are take part
        together = _WARPS // (self._channels // 8)
        slot = together * self._channels * 64
        numbers = most * self._channels
        rest = 4 * (numbers + max(numbers, _WARPS * 128 * tiles) + most * 32) + self._channels * (self._rank + 8) * 2
        slots = min((_SHARED_LIMIT - rest - 128) // (slot + 16), math.ceil(most / together))
        options = {
            "IN": _TYPES[self._dtype],
            "E": self._inner,
            "R": self._rank,
            "W": self._width,
            "CE": self._channels,
            "ROWS": most,
            "NX": tiles,
            "SLOTS": slots,
            "FLIGHT": 6,
            "CONV": int(conv != torch.float32),
        }
        shared = slots * (slot + 16) + rest + 128
        return _cuda.kernel(_SOURCE, "middle_step", options, _THREADS, self._device, shared=shared, cooperative=True)

    def __call__(
        self,
        uz: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        weights: BlockWeights,
        y: Tensor,
    ) -> None:
        """y = what out_proj takes; both states are moved on in place.

        Args:
            uz: (rows, 2 d_inner), what in_proj gave.
            conv_state: (rows, width - 1, d_inner), float32 or uz's dtype.
            ssm_state: (rows, d_inner, d_state) float32.
            weights: of the block.
            y: (rows, d_inner).
        """
        w, rows = weights, uz.shape[0]
        self._kernel(rows, conv_state.dtype)(
            (self._inner // self._channels, 1, 1),
            uz,
            conv_state,
            ssm_state,
            w.conv_weight,
            w.conv_bias,
            w.x_proj.data,
            w.x_bias,
            w.dt_proj.data,
            w.dt_bias,
            w.A,
            w.D,
            self._u,
            self._low,
            self._bc,
            y,
            self._counters,
            i32(rows),
        )


def refuses_tiles(block: BlockWeights, device: torch.device) -> str | None:
    """Why the one-launch middle of many rows does not take blocks of this kind on this device; None if it does."""
    reason = refuses_middle(block, device)
    if reason is not None:
        return reason
    if block.dt_rank % 32 or block.dt_rank > _TILE_RANK:
        return f"dt_rank must be a multiple of 32 up to {_TILE_RANK}, it is {block.dt_rank}"
    if block.width < 2:
        return f"the convolution must have 2 taps or more, it has {block.width}"
    return None


def _tiles_memory(rank: int) -> tuple[int, int]:
    """Slots of the ring of a block of middle_tiles.cu, and all its shared memory in bytes."""
    slot = _TILE_CHANNELS * 64
    rest = _TILE_ROWS * (2 * (_TILE_CHANNELS + 32) + 2 * _TILE_CHANNELS + 16 * (rank + 40) + 128)
    rest += _TILE_ROWS * 2 * (rank + (0 if rank % 64 else 32)) + 264
    slots = min((_SHARED_LIMIT - rest) // (slot + 16), _TILE_ROWS)
    return slots, slots * (slot + 16) + rest


class MiddleTiles:
    """What lies between in_proj and out_proj for many rows, one launch a block of the model: see middle_tiles.cu.

    Launches of one object must follow each other on one stream: they share their buffers. A launch begins while the one
    in front of it may still run, and reads weights and states before that has ended: it may make uz, and no more.

    Args:
        block: any block of the model; all have its sizes.
        device: a CUDA device.
    """

    def __init__(self, block: BlockWeights, device: torch.device) -> None:
        self._rank, self._inner, self._width = block.dt_rank, block.d_inner, block.width
        self._dtype = block.x_proj.data.dtype
        self._device = device.index or 0
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self._sharing = block.d_inner // _TILE_CHANNELS  # blocks of the same rows
        tiles = blocks // self._sharing
        self.most_rows = tiles * _TILE_ROWS
        part = _TILE_ROWS * (2 * block.dt_rank + 4 * 2 * block.d_state)  # bytes that a block gives the others
        self._parts = torch.empty(tiles * self._sharing * part, dtype=torch.uint8, device=device)
        self._counters = torch.zeros(tiles * 64, dtype=torch.int32, device=device)

    def pays(self, rows: int) -> bool:
        """Whether so many rows are best taken by it: they fill most multiprocessors, and no more."""
        tiles = math.ceil(rows / _TILE_ROWS)
        return rows <= self.most_rows and rows * self._inner > _MOST_STATES and tiles * 4 >= self.most_rows // 16 * 3

    def _kernel(self, conv: torch.dtype) -> _cuda.Kernel:
        slots, shared = _tiles_memory(self._rank)
        options = {
            "IN": _TYPES[self._dtype],
            "E": self._inner,
            "R": self._rank,
            "W": self._width,
            "CE": _TILE_CHANNELS,
            "SLOTS": slots,
            "CONV": int(conv != torch.float32),
            "EACH": int(_TILES_EACH),
        }
        return _cuda.kernel(
            _TILES_SOURCE,
            "middle_tiles",
            options,
            _TILES_THREADS,
            self._device,
            shared=shared,
            cooperative=True,
            early=True,
        )

    def __call__(
        self,
        uz: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        weights: BlockWeights,
        y: Tensor,
    ) -> None:
        """y = what out_proj takes; both states are moved on in place. Arguments as in `Middle`."""
        w, rows = weights, uz.shape[0]
        self._kernel(conv_state.dtype)(
            (self._sharing, math.ceil(rows / _TILE_ROWS), 1),
            uz,
            conv_state,
            ssm_state,
            w.conv_weight,
            w.conv_bias,
            w.x_proj.data,
            w.x_bias,
            w.dt_proj.data,
            w.dt_bias,
            w.A,
            w.D,
            self._parts,
            y,
            self._counters,
            i32(rows),
        )
