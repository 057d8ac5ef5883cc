"""Public function of the fused residual addition and RMS norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statescan.ops._checks import transformed
from statescan.ops._dispatch import Facts, attempt
from statescan.ops.add_norm.validation import check_add_rms_norm

__all__ = ["AddNormOutput", "add_rms_norm"]


class AddNormOutput(NamedTuple):
    """Result of `add_rms_norm`: the normalised sum, and the sum itself, which goes on along the residual stream."""

    output: Tensor
    residual: Tensor


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> AddNormOutput:
    """Adds a layer's output to the residual stream and normalises the sum by its root mean square.

    Equations, over the last axis::

        sum    = x + residual
        output = sum / sqrt(mean(sum^2) + eps) * weight

    Args:
        x: (..., d); float64, float32, bfloat16 or float16.
        weight: (d,), any float dtype.
        residual: shape of x, any float dtype. Default: none, the sum is x.
        eps: added to the mean square, >= 0. Default 1e-5.
        residual_dtype: dtype of the sum that is returned. Default: the dtype of residual, else of x.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"reference"``; see
            `statescan.explain`.

    Returns:
        AddNormOutput(output, residual): output (..., d) in the dtype of x, whatever the residual's and the weight's
        are, so that a bfloat16 layer goes on in bfloat16 beside a float32 stream; residual is the sum in
        `residual_dtype`. Without `residual` and without a cast the sum is x itself, not a copy. Gradients flow into x,
        weight and residual, out of both results.

    Raises:
        ShapeError: a shape or device does not fit.
        DTypeError: a dtype is not taken.
        ConfigError: eps is negative or not finite, or an unknown backend.
        BackendUnavailableError: the named backend can't run this call.

    Numerics: the sum is rounded once to `residual_dtype`, and that rounded sum is normalised; the norm is taken in
    float32 (float64 where x or the residual stream is float64) and rounded once to the dtype of x.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4; the placement before each
    Mamba block as in Gu and Dao (2023). eps stands inside the root, as there.
    """
    stream = check_add_rms_norm(x, weight, residual, eps, residual_dtype)
    widest = torch.float64 if torch.float64 in (x.dtype, stream) else x.dtype
    facts = Facts(x.device.type, widest, transformed=transformed(x, weight, residual))

    def run(name: str) -> tuple[Tensor, Tensor]:
        if name == "cpu":
            from statescan.ops.add_norm.cpu import add_rms_norm as norm
        elif name == "triton":
            from statescan.ops.add_norm.triton_norm import add_rms_norm as norm
        elif name == "cuda":
            from statescan.ops.add_norm.cuda import add_rms_norm as norm
        elif name == "torch":
            from statescan.ops.add_norm.torch_norm import add_rms_norm as norm
        else:
            from statescan.ops.add_norm.reference import add_rms_norm as norm
        return norm(x, weight, residual, float(eps), stream)

    return AddNormOutput(*attempt("add_rms_norm", backend, facts, run))
