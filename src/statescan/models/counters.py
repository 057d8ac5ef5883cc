"""What a model costs, from its configuration alone: parameters, operations per token, bytes of state."""

from __future__ import annotations

from typing import NamedTuple

import torch

from statescan.models.config import MambaConfig

__all__ = ["Flops", "flops_per_token", "parameter_count", "state_bytes"]


class Flops(NamedTuple):
    """Floating-point operations per token: of a forward pass, and of a training step (forward and backward)."""

    forward: int
    training: int


def parameter_count(config: MambaConfig) -> int:
    """Number of parameters, a tied embedding counted once.

    A layer has, with d = d_model, i = d_inner, n = d_state, r = dt_rank, w = d_conv::

        in_proj 2di, conv1d iw (+ i), x_proj i(r + 2n), dt_proj ri + i, A_log in, D i, out_proj id, norm d

    (+ 2i + d with bias); around the layers stand the embedding, padded_vocab_size * d, norm_f, d, an untied lm_head.
    """
    d, i, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank_size
    layer = 2 * d * i + i * config.d_conv + i * (r + 2 * n) + r * i + i + i * n + i + i * d + d
    layer += i if config.conv_bias else 0
    layer += 2 * i + d if config.bias else 0
    embedding = config.padded_vocab_size * d
    return config.n_layer * layer + d + embedding * (1 if config.tie_embeddings else 2)


def flops_per_token(config: MambaConfig) -> Flops:
    """Floating-point operations a token; no term grows with the context's length.

    A multiply-add counts two, an exponential one. Forward, a layer::

        2 (2di + i(r + 2n) + ri + id)    the four projections
        2iw                              the convolution
        7in                              the scan: dt A, its exponential, times h, (dt u) B, their sum, C h and its sum
        6i                               dt u, softplus, + D u (2), silu(z) and its product
        4d                               norm and residual

    and 2 padded_vocab_size d for lm_head. The backward pass counts twice the forward pass, so training three times it;
    what `recompute` runs again is not counted, since it is not useful work.
    """
    d, i, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank_size
    projections = 2 * (2 * d * i + i * (r + 2 * n) + r * i + i * d)
    layer = projections + 2 * i * config.d_conv + 7 * i * n + 6 * i + 4 * d
    forward = config.n_layer * layer + 4 * d + 2 * config.padded_vocab_size * d
    return Flops(forward, 3 * forward)


def state_bytes(config: MambaConfig, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the state of `batch` sequences, whatever their length.

    A layer keeps d_conv - 1 inputs of d_inner channels in the activations' dtype, and d_inner * d_state numbers in
    float32 (float64 beside float64 activations).
    """
    exact = torch.promote_types(dtype, torch.float32)
    conv = (config.d_conv - 1) * config.d_inner * dtype.itemsize
    ssm = config.d_inner * config.d_state * exact.itemsize
    return batch * config.n_layer * (conv + ssm)
