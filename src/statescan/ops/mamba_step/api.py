"""The public function mamba_step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from statescan.ops._checks import without_autocast
from statescan.ops._dispatch import Facts, attempt
from statescan.ops.mamba_step.validation import BlockWeights, check_step

__all__ = ["BlockWeights", "MambaStepOutput", "mamba_step"]


class MambaStepOutput(NamedTuple):
    """What `mamba_step` returns: the mixer's output (batch, d_model); the residual stream (batch, d_model)."""

    output: Tensor
    residual: Tensor


def mamba_step(
    x: Tensor,
    residual: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: BlockWeights,
    *,
    backend: str = "auto",
) -> MambaStepOutput:
    """Takes a whole Mamba block one token further, from packed weights; the CPU backend does it in one call.

    For each row of the batch::

        residual = x + residual
        u, z     = in_proj(norm(residual))
        u        = silu(conv(u))                       the convolution's state moves on by u
        dt, B, C = x_proj(u);  dt = softplus(dt_proj(dt) + dt_bias)
        h        = exp(dt A) h + dt B u                in place
        y        = (C . h + D u) * silu(z)
        output   = out_proj(y)

    Args:
        x: output of the block before (or the embedding), (batch, d_model); float32, or float64 off the cpu backend.
        residual: the residual stream before x is added, shape and dtype of x; None for the first block.
        conv_state: the last width-1 inputs of the convolution, oldest first, (batch, width - 1, d_inner), contiguous;
            updated in place.
        ssm_state: h, (batch, d_inner, d_state), contiguous; updated in place.
        weights: `BlockWeights`; its vectors and A in x's dtype.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"torch"`` or ``"reference"``.

    Returns:
        `MambaStepOutput` (output, residual), new tensors. The next block adds the two.

    Raises:
        ShapeError, DTypeError: an argument is not as described.
        ConfigError: a gradient is asked for; this op has none (`statescan.nn.Mamba.step` does).
        BackendUnavailableError: the named backend can't run this call.

    Numerics: everything in float32; the products as `packed_linear` says. On the cpu and cuda backends a row's results
        are the same, bit for bit, whatever other rows come with it (and however many threads run).

    Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, figure 3, algorithm 2.
    """
    check_step(x, residual, conv_state, ssm_state, weights)
    facts = Facts(x.device.type, x.dtype, d_state=weights.d_state, width=weights.width)

    def run(name: str) -> tuple[Tensor, Tensor]:
        if name == "cpu":
            from statescan.ops.mamba_step.cpu import mamba_step as step
        elif name == "cuda":
            from statescan.ops._cuda import make_ready
            from statescan.ops.mamba_step.cuda import mamba_step as step

            # The first kernels move the state on: all have to be there before they run.
            make_ready(step, x, residual, conv_state, ssm_state, weights)
        elif name == "torch":
            from statescan.ops.mamba_step.torch_step import mamba_step as step
        else:
            from statescan.ops.mamba_step.reference import mamba_step as step
        return step(x, residual, conv_state, ssm_state, weights)

    with without_autocast(x.device.type):
        return MambaStepOutput(*attempt("mamba_step", backend, facts, run))
