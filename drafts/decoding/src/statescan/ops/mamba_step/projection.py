"""The large products of a decoding step of up to 128 rows, at the pace at which their weights can be read: see
projection.cu."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.ops import _cuda
from statescan.ops._cuda import i32

__all__ = ["Projection", "refuses_projection"]

_SOURCE = Path(__file__).with_name("projection.cu")
_TYPES = {torch.bfloat16: 1, torch.float16: 2}
_MAP_TYPES = {torch.bfloat16: 9, torch.float16: 6}  # CUtensorMapDataType
_SWIZZLE_128B, _PROMOTION_256B = 3, 3  # CUtensorMapSwizzle, CUtensorMapL2promotion
_TILE = 64  # outputs of a block, and columns fetched at a time
_MOST_ROWS = 128
_STAGES = 8
_CLUSTER = 2
_THREADS = 160


@functools.cache
def _encoder() -> Any:
    library = ctypes.WinDLL("nvcuda.dll") if os.name == "nt" else ctypes.CDLL("libcuda.so.1")
    encode = library.cuTensorMapEncodeTiled
    encode.restype = ctypes.c_int
    return encode


def _tensor_map(tensor: Tensor, box_rows: int, promotion: int = _PROMOTION_256B) -> bytes:
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
        ctypes.c_int(promotion),
        ctypes.c_int(0),
    )
    if code:
        raise RuntimeError(f"projection: the driver refuses a tensor map of {tuple(tensor.shape)} (CUDA error {code})")
    return buffer.raw[start : start + 128]


def refuses_projection(weight: Tensor, parts: int) -> str | None:
    """Why a product with this weight (outputs, columns), cut into so many parts of the columns, can't run here; None if
    it can."""
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
    if outputs % (_TILE * _CLUSTER) or columns % (_TILE * parts):
        unit = f"{_TILE * _CLUSTER} outputs and {_TILE * parts} columns"
        return f"it takes {unit} at a time, they are {outputs} and {columns}"
    blocks = outputs // _TILE * parts
    there = torch.cuda.get_device_properties(weight.device).multi_processor_count
    if blocks > there:
        return f"its {blocks} blocks would take turns on {there} multiprocessors"
    if weight.data_ptr() % 16 or not weight.is_contiguous():
        return "its copies begin at multiples of 16 bytes, the weight's rows do not; pass a clone"
    return None


class Projection:
    """Products x W^T with weights of one shape, for up to 128 rows.

    Args:
        weights: (outputs, columns) each, one dtype and device; kept alive here.
        parts: of the columns; each has a result of its own, and their sum is the product.
        options: macros of projection.cu.
    """

    most_rows = _MOST_ROWS

    def __init__(self, weights: list[Tensor], parts: int = 1, **options: int) -> None:
        first = weights[0]
        self.outputs, self.columns = first.shape
        self.parts = parts
        self._weights = weights
        self._promotion = options.pop("PROMOTION", _PROMOTION_256B)
        self._maps = [_tensor_map(weight, _TILE, self._promotion) for weight in weights]
        self._device = first.device.index or 0
        self._dtype = first.dtype
        self._options = options

    def __call__(self, index: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, (rows, outputs), or with several parts what adds up to it, (parts, rows, outputs).

        Args:
            index: of the weight.
            x: (rows, columns), contiguous.
            bias: (outputs,) float32 or None.
        """
        rows = x.shape[0]
        most = 64 if rows <= 64 else 128
        cluster = self._options.get("CL", _CLUSTER)
        options = {
            "IN": _TYPES[self._dtype],
            "NR": most,
            "KP": self.columns // self.parts,
            "STAGES": _STAGES,
            "CL": cluster,
            "GROUP": 2,
            "HINT": 0,
            "STAGGER": 0,
            "EARLY": 1,
            **self._options,
        }
        shared = options["STAGES"] * ((_TILE + most) * 128 + 16)
        run = _cuda.kernel(
            _SOURCE,
            "project",
            options,
            _THREADS,
            self._device,
            shared=shared,
            cluster=cluster,
            early=bool(options["EARLY"]),
            specific=True,
        )
        shape = (rows, self.outputs) if self.parts == 1 else (self.parts, rows, self.outputs)
        y = x.new_empty(shape)
        grid = (self.outputs // _TILE // cluster, self.parts, 1)
        run(grid, self._maps[index], _tensor_map(x, most // cluster), bias, y, i32(rows), i32(self.outputs))
        return y
