"""The large products of a decoding step of 64 to 128 rows, at the pace at which their weights can be read: see
projection.cu."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError
from statescan.ops import _cuda
from statescan.ops._cuda import i32

__all__ = ["Projection", "pays", "refuses_projection"]

_SOURCE = Path(__file__).with_name("projection.cu")
_TYPES = {torch.bfloat16: 1, torch.float16: 2}
_MAP_TYPES = {torch.bfloat16: 9, torch.float16: 6}  # CUtensorMapDataType
_SWIZZLE_128B, _PROMOTION_256B = 3, 3  # CUtensorMapSwizzle, CUtensorMapL2promotion
_TILE = 64  # outputs of a block, and columns fetched at a time
_FEWEST_ROWS, _MOST_ROWS = 64, 128
_STAGES = 8
_THREADS = 160


@functools.cache
def _encoder() -> Any:
    library = ctypes.WinDLL("nvcuda.dll") if os.name == "nt" else ctypes.CDLL("libcuda.so.1")
    encode = library.cuTensorMapEncodeTiled
    encode.restype = ctypes.c_int
    return encode


def _tensor_map(tensor: Tensor, box_rows: int) -> bytes:
    """CUtensorMap of a contiguous matrix for boxes of 64 columns, swizzled over 128 bytes; rows past the end are 0."""
    rows, columns = tensor.shape
    buffer = ctypes.create_string_buffer(128 + 64)
    start = -ctypes.addressof(buffer) % 64
    code = _encoder()(
        ctypes.c_void_p(ctypes.addressof(buffer) + start),
        ctypes.c_int(_MAP_TYPES[tensor.dtype]),
        ctypes.c_uint32(2),
        ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(columns * tensor.element_size()),
        (ctypes.c_uint32 * 2)(_TILE, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_PROMOTION_256B),
        ctypes.c_int(0),
    )
    if code:
        raise BackendUnavailableError(
            f"projection: the driver refuses a tensor map of {tuple(tensor.shape)} (CUDA error {code}); "
            "report this with the GPU's name"
        )
    return buffer.raw[start : start + 128]


def _blocks(outputs: int, parts: int) -> int:
    return outputs // _TILE * parts


def pays(rows: int, outputs: int, parts: int, multiprocessors: int) -> bool:
    """Whether so many rows are best taken by it, not by cuBLAS: where it was faster when measured, which is at 64 rows
    and more (at 16 it was slower) with blocks for most multiprocessors."""
    return _FEWEST_ROWS <= rows <= _MOST_ROWS and 3 * multiprocessors <= 4 * _blocks(outputs, parts)


def refuses_projection(weights: Sequence[Tensor], parts: int) -> str | None:
    """Why products with these weights, (outputs, columns) each and of one dtype, cut into so many parts of the columns,
    can't run here; None if they can."""
    weight = weights[0]
    if weight.device.type != "cuda":
        return f"it runs on CUDA devices, the weights are on '{weight.device.type}'"
    reason = _cuda.unavailable_reason()
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(weight.device)[0] != 9:
        return "its products are instructions of compute capability 9.0 alone"
    if weight.dtype not in _TYPES:
        return f"it takes bfloat16 or float16, the weights are {str(weight.dtype).removeprefix('torch.')}"
    outputs, columns = weight.shape
    if outputs % _TILE or columns % (_TILE * parts):
        return f"it takes {_TILE} outputs and {_TILE * parts} columns at a time, they are {outputs} and {columns}"
    blocks = _blocks(outputs, parts)
    there = torch.cuda.get_device_properties(weight.device).multi_processor_count
    if blocks > there:
        return f"its {blocks} blocks would take turns on {there} multiprocessors"
    if any(one.data_ptr() % 16 or not one.is_contiguous() for one in weights):
        return "its copies begin at multiples of 16 bytes, and the rows of one weight do not; pass clones of them"
    return None


class Projection:
    """Products x W^T with weights of one shape, for up to 128 rows.

    A launch begins while the one in front of it may still run, and reads the weight before that has ended.

    Args:
        weights: (outputs, columns) each, contiguous, one dtype and device; kept alive here.
        parts: of the columns; each has a result of its own, and their sum is the product.
    """

    def __init__(self, weights: Sequence[Tensor], parts: int = 1) -> None:
        first = weights[0]
        self._outputs, self._columns = first.shape
        self._parts = parts
        self._weights = list(weights)
        self._maps = [_tensor_map(weight, _TILE) for weight in weights]
        self._device = first.device.index or 0
        self._dtype = first.dtype
        self._multiprocessors = torch.cuda.get_device_properties(first.device).multi_processor_count

    def pays(self, rows: int) -> bool:
        """Whether so many rows are best taken by it."""
        return pays(rows, self._outputs, self._parts, self._multiprocessors)

    def __call__(self, index: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, (rows, outputs), or with several parts what adds up to it, (parts, rows, outputs).

        Args:
            index: of the weight.
            x: (rows, columns), contiguous.
            bias: (outputs,) float32 or None.
        """
        rows = x.shape[0]
        most = 64 if rows <= 64 else _MOST_ROWS
        options = {
            "IN": _TYPES[self._dtype],
            "NR": most,
            "KP": self._columns // self._parts,
            "STAGES": _STAGES,
        }
        shared = _STAGES * ((_TILE + most) * _TILE * x.element_size() + 16)
        run = _cuda.kernel(
            _SOURCE, "project", options, _THREADS, self._device, shared=shared, early=True, specific=True
        )
        y = x.new_empty((rows, self._outputs) if self._parts == 1 else (self._parts, rows, self._outputs))
        grid = (self._outputs // _TILE, self._parts, 1)
        run(grid, self._maps[index], _tensor_map(x, most), bias, y, i32(rows), i32(self._outputs))
        return y
