"""What `causal_conv1d` and `causal_conv1d_update` accept, checked before any backend sees the call."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.ops._checks import ACTIVATION_DTYPES, check_cu_seqlens, check_device

__all__ = ["check_conv", "check_update", "compute_dtype"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in ACTIVATION_DTYPES:
        raise DTypeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}; "
            f"convert it with {name}.float()"
        )


def _check_weights(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    features = x.shape[-1]
    _check_float(op, "x", x)
    _check_float(op, "weight", weight)
    if weight.ndim != 2 or weight.shape[0] != features or weight.shape[1] < 1:
        raise ShapeError(
            f"{op}: weight must be (d, width) = ({features}, width >= 1) for x of shape {_shape(x)}, "
            f"got {_shape(weight)}; a torch Conv1d weight (d, 1, width) needs .squeeze(1)"
        )
    if bias is not None:
        _check_float(op, "bias", bias)
        if bias.ndim != 1 or bias.shape[0] != features:
            raise ShapeError(f"{op}: bias must be (d,) = ({features},), got {_shape(bias)}; give one number a channel")
    if activation not in (None, "silu"):
        raise ConfigError(f"{op}: activation must be None or 'silu', got {activation!r}; apply others to y yourself")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ShapeError(
                f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move it with .to(x.device)"
            )


def _check_state(op: str, name: str, state: Tensor, x: Tensor, wanted: tuple[int, int, int], what: str) -> None:
    if _shape(state) != wanted:
        raise ShapeError(
            f"{op}: {name} must be ({what}, width-1, d) = {wanted}, got {_shape(state)}; "
            "it holds the last width-1 inputs, oldest first"
        )
    if state.dtype != x.dtype:
        raise DTypeError(
            f"{op}: {name} must have the dtype of x, {x.dtype}, got {state.dtype}; convert it with .to(x.dtype)"
        )
    if state.device != x.device:
        raise ShapeError(
            f"{op}: {name} must be on the device of x, {x.device}, got {state.device}; move it with .to(x.device)"
        )


def check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises the first thing wrong with a call of `causal_conv1d`."""
    op = "causal_conv1d"
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] < 1:
        raise ShapeError(f"{op}: x must be (batch, length >= 1, d >= 1), got {_shape(x)}; channels come last")
    _check_weights(op, x, weight, bias, activation)
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, x.shape[0], x.shape[1])
        check_device(op, "cu_seqlens", cu_seqlens, x, "x")
    if initial_state is not None:
        rows, what = (x.shape[0], "batch") if cu_seqlens is None else (cu_seqlens.shape[0] - 1, "sequences")
        wanted = (rows, weight.shape[1] - 1, x.shape[2])
        _check_state(op, "initial_state", initial_state, x, wanted, what)


def check_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, inplace: bool
) -> None:
    """Raises the first thing wrong with a call of `causal_conv1d_update`."""
    op = "causal_conv1d_update"
    if x.ndim != 2 or x.shape[1] < 1:
        raise ShapeError(f"{op}: x must be (batch, d >= 1), got {_shape(x)}; one token for each row of the batch")
    _check_weights(op, x, weight, bias, activation)
    _check_state(op, "state", state, x, (x.shape[0], weight.shape[1] - 1, x.shape[1]), "batch")
    if inplace and torch.is_grad_enabled():
        for name, tensor in (("x", x), ("state", state), ("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise ConfigError(
                    f"{op}: inplace=True gives no gradients, but {name} requires one; "
                    "use inplace=False, or call it under torch.no_grad()"
                )
