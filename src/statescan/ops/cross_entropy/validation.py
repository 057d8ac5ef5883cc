"""What `linear_cross_entropy` accepts, checked before any backend sees the call."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.ops._checks import ACTIVATION_DTYPES, check_device, check_dtype, check_shape, check_tensor

__all__ = ["accumulate_dtype", "check_linear_cross_entropy", "compute_dtype"]

_OP = "linear_cross_entropy"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the softmax, the losses and the gradients' sums: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on (it leaves float64 alone), else the one dtype that came."""
    device = hidden.device.type
    wide = torch.float64 in (hidden.dtype, weight.dtype)
    if not wide and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def check_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    chunk_size: int | None,
) -> None:
    """Raises the first thing wrong with a call; reads the targets' values only where that costs no device transfer."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_tensor(_OP, name, tensor)
            check_dtype(_OP, name, tensor, ACTIVATION_DTYPES)
            check_device(_OP, name, tensor, hidden, "hidden")
    check_tensor(_OP, "targets", targets)
    check_device(_OP, "targets", targets, hidden, "hidden")
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[0] < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"{_OP}: hidden must be (..., d) and weight (vocabulary >= 1, d), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}; weight is laid out as nn.Linear's"
        )
    check_shape(_OP, "targets", targets, tuple(hidden.shape[:-1]), "hidden.shape[:-1]", "give one target a token")
    if bias is not None:
        check_shape(_OP, "bias", bias, (weight.shape[0],), "(vocabulary,)", "give one number a row of weight")
    if targets.dtype not in (torch.int64, torch.int32):
        raise DTypeError(f"{_OP}: targets must be int64 or int32, got {targets.dtype}; pass targets.long()")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise DTypeError(
            f"{_OP}: hidden and weight must share one dtype outside of autocast, got {hidden.dtype} and "
            f"{weight.dtype}; convert one of them"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"{_OP}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}; use 'mean'")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ConfigError(
            f"{_OP}: chunk_size must be an integer >= 1, got {chunk_size!r}; leave it out for the default"
        )
    if (
        targets.device.type == "cpu"
        and type(targets) is Tensor
        and targets.numel()
        and not torch.compiler.is_compiling()
    ):
        counted = targets[targets != ignore_index]
        if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= weight.shape[0]):
            raise ShapeError(
                f"{_OP}: targets must be {ignore_index} (ignored) or in [0, {weight.shape[0]}), got "
                f"{int(counted.min())} to {int(counted.max())}; the vocabulary has {weight.shape[0]} rows"
            )
