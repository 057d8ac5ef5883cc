"""The weights of a block as mamba_step takes them, and the checks of its arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from statescan.errors import ConfigError, ShapeError
from statescan.ops._checks import check_device, check_dtype, check_shape, check_tensor, transformed
from statescan.ops.packed_linear.validation import PackedWeight

__all__ = ["BlockWeights", "check_step"]


@dataclass(frozen=True)
class BlockWeights:
    """What one block (norm and mixer) reads for a decoding step; vectors and A are float32 and contiguous.

    Args:
        norm: (d_model,) weight of the RMS norm.
        in_proj: packed (2 d_inner, d_model): the rows of x, then those of z.
        conv_weight: (d_inner, width); the last tap multiplies the present input.
        x_proj: packed (dt_rank + 2 d_state, d_inner): the rows of dt, B, C.
        dt_proj: packed (d_inner, dt_rank).
        A: (d_inner, d_state), real, as it enters exp(dt A): -exp(A_log).
        out_proj: packed (d_model, d_inner).
        conv_bias, dt_bias, D: (d_inner,) or None.
        in_bias, x_bias, out_bias: biases of the projections, or None.
        epsilon: added to the mean square in the norm.
    """

    norm: Tensor
    in_proj: PackedWeight
    conv_weight: Tensor
    x_proj: PackedWeight
    dt_proj: PackedWeight
    A: Tensor
    out_proj: PackedWeight
    conv_bias: Tensor | None = None
    dt_bias: Tensor | None = None
    D: Tensor | None = None
    in_bias: Tensor | None = None
    x_bias: Tensor | None = None
    out_bias: Tensor | None = None
    epsilon: float = 1e-5

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.in_proj.columns

    @property
    def d_inner(self) -> int:
        """Number of channels."""
        return self.A.shape[0]

    @property
    def d_state(self) -> int:
        """Size of a channel's state."""
        return self.A.shape[1]

    @property
    def dt_rank(self) -> int:
        """Rank of the step sizes' projection."""
        return self.dt_proj.columns

    @property
    def width(self) -> int:
        """Taps of the convolution."""
        return self.conv_weight.shape[1]


def _check_weights(weights: BlockWeights, dtype: torch.dtype) -> None:
    op = "mamba_step"
    if not isinstance(weights, BlockWeights):
        raise ConfigError(f"{op}: weights must be a BlockWeights, got {type(weights).__name__}")
    d_model, d_inner, d_state, rank = weights.d_model, weights.d_inner, weights.d_state, weights.dt_rank
    for name, packed, wanted in (
        ("in_proj", weights.in_proj, (2 * d_inner, d_model)),
        ("x_proj", weights.x_proj, (rank + 2 * d_state, d_inner)),
        ("dt_proj", weights.dt_proj, (d_inner, rank)),
        ("out_proj", weights.out_proj, (d_model, d_inner)),
    ):
        check_shape(op, f"weights.{name}", packed.data, wanted, "(out, in)")
    for name, value, wanted in (
        ("norm", weights.norm, (d_model,)),
        ("conv_weight", weights.conv_weight, (d_inner, weights.width)),
        ("conv_bias", weights.conv_bias, (d_inner,)),
        ("dt_bias", weights.dt_bias, (d_inner,)),
        ("D", weights.D, (d_inner,)),
        ("in_bias", weights.in_bias, (2 * d_inner,)),
        ("x_bias", weights.x_bias, (rank + 2 * d_state,)),
        ("out_bias", weights.out_bias, (d_model,)),
        ("A", weights.A, (d_inner, d_state)),
    ):
        if value is not None:
            check_shape(op, f"weights.{name}", value, wanted, "of the block's sizes")
            check_dtype(op, f"weights.{name}", value, (dtype,), "the dtype of x")


def check_step(
    x: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights
) -> None:
    """Raises what mamba_step raises."""
    op = "mamba_step"
    check_tensor(op, "x", x)
    check_dtype(op, "x", x, (torch.float32, torch.float64))
    _check_weights(weights, x.dtype)
    if x.dim() != 2 or x.shape[1] != weights.d_model:
        raise ShapeError(f"{op}: x must have shape (batch, {weights.d_model}), got {tuple(x.shape)}")
    batch = x.shape[0]
    check_device(op, "weights", weights.A, x, "x")
    for name, value, wanted, meaning in (
        ("residual", residual, (batch, weights.d_model), "(batch, d_model)"),
        ("conv_state", conv_state, (batch, weights.width - 1, weights.d_inner), "(batch, width - 1, d_inner)"),
        ("ssm_state", ssm_state, (batch, weights.d_inner, weights.d_state), "(batch, d_inner, d_state)"),
    ):
        if value is None:
            continue
        check_tensor(op, name, value)
        check_shape(op, name, value, wanted, meaning)
        check_dtype(op, name, value, (x.dtype,), "the dtype of x")
        check_device(op, name, value, x, "x")
        if name != "residual" and not value.is_contiguous():
            raise ShapeError(
                f"{op}: {name} must be contiguous, because it is updated in place, got strides {value.stride()}; "
                f"pass {name}.contiguous() and keep it"
            )
    if torch.is_grad_enabled():
        for name, value in (("x", x), ("residual", residual), ("conv_state", conv_state), ("ssm_state", ssm_state)):
            if value is not None and value.requires_grad:
                raise ConfigError(
                    f"{op}: updates its states in place and is not differentiable: wanted no argument that requires a "
                    f"gradient, got {name} with requires_grad; call it under torch.no_grad(), or use nn.Mamba.step"
                )
    if transformed(x, residual, conv_state, ssm_state):
        raise ConfigError(
            f"{op}: updates its states in place and is not differentiable: wanted no forward-mode AD and no "
            "transform of torch.func, got an argument that takes part in one; use nn.Mamba.step"
        )
