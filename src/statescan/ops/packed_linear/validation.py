"""What a packed weight is, and the checks of packed_linear's arguments, shared by every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from statescan.errors import ConfigError, ShapeError
from statescan.ops._checks import ACTIVATION_DTYPES, check_device, check_dtype, check_shape, check_tensor

__all__ = ["PACKED_DTYPES", "PackedDType", "PackedWeight", "check_linear", "check_weight"]

PackedDType = Literal["float32", "bfloat16", "int8"]
PACKED_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class PackedWeight:
    """The weight of a linear map in the form that decoding reads: row-major, one row an output.

    Args:
        data: (rows, columns), contiguous; float32, bfloat16 or int8.
        scale: (rows,) float32 for int8, where weight = data * scale; None otherwise.
    """

    data: Tensor
    scale: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.data.shape[0]

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.data.shape[1]

    @property
    def dtype(self) -> str:
        """``"float32"``, ``"bfloat16"`` or ``"int8"``."""
        return str(self.data.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads: the data and, for int8, the scales."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def unpack(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as a plain (rows, columns) tensor; `rows` (integers of any shape) picks some, as embeddings do."""
        data = self.data if rows is None else self.data[rows]
        if self.scale is None:
            return data.to(dtype)
        scale = self.scale if rows is None else self.scale[rows]
        return data.to(dtype) * scale.unsqueeze(-1).to(dtype)


def check_weight(weight: Tensor, dtype: str) -> None:
    """Raises what pack_weight raises."""
    if dtype not in PACKED_DTYPES:
        raise ConfigError(f"pack_weight: dtype must be one of {list(PACKED_DTYPES)}, got {dtype!r}; pass one of them")
    check_tensor("pack_weight", "weight", weight)
    if weight.dim() != 2:
        raise ShapeError(
            f"pack_weight: weight must have shape (out, in), got {tuple(weight.shape)}; reshape it, as nn.Linear's is"
        )
    check_dtype("pack_weight", "weight", weight, ACTIVATION_DTYPES)


def check_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> None:
    """Raises what packed_linear raises."""
    op = "packed_linear"
    if not isinstance(packed, PackedWeight):
        raise ConfigError(
            f"{op}: packed must be a PackedWeight, got {type(packed).__name__}; make one with pack_weight(weight)"
        )
    check_tensor(op, "x", x)
    check_dtype(op, "x", x, ACTIVATION_DTYPES)
    if x.dim() < 1 or x.shape[-1] != packed.columns:
        raise ShapeError(
            f"{op}: x must have shape (..., {packed.columns}), got {tuple(x.shape)}; features come last, one for "
            "each of the weight's columns"
        )
    check_device(op, "x", x, packed.data, "packed")
    if bias is not None:
        check_tensor(op, "bias", bias)
        check_shape(op, "bias", bias, (packed.rows,), "(out,)")
        check_dtype(op, "bias", bias, ACTIVATION_DTYPES)
        check_device(op, "bias", bias, x, "x")
