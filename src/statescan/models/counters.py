"""What a model costs, from its configuration alone: parameters, operations per token, bytes of state."""

from __future__ import annotations

from typing import NamedTuple

import torch

from statescan.models.baseline_config import BaselineConfig, ModelConfig
from statescan.models.baseline_counters import baseline_forward_flops, baseline_parameters, baseline_state_bytes
from statescan.models.config import MambaConfig
from statescan.nn.inner_maps import BLOCKS

__all__ = ["Flops", "flops_per_token", "parameter_count", "state_bytes"]


class Flops(NamedTuple):
    """Floating-point operations per token: of a forward pass, and of a training step (forward and backward)."""

    forward: int
    training: int


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, a tied embedding counted once.

    A layer of Mamba has, with d = d_model, i = d_inner, n = d_state, r = dt_rank (0 where the step is fixed),
    w = d_conv, and s streams (2; of block "h3" 3, "ungated" 1)::

        in_proj sdi, conv1d iw (+ i), the inner map, out_proj id, norm d

    (+ si + d with bias), and its inner map::

        s6                 x_proj i(r + 2n), dt_proj ri + i, A_log in, D i
        s4                 A, P, B and C in each, the step i, D i
        s4d, s4d-real      A, B and C in each, the step i, D i

    In S6 a B or C that is fixed has as many as its part of x_proj, and a complex A as many as a real one. Around the
    layers stand the embedding, padded_vocab_size * d, norm_f, d, an untied lm_head.
    """
    if isinstance(config, BaselineConfig):
        return baseline_parameters(config)
    d, i, streams = config.d_model, config.d_inner, BLOCKS[config.block]
    layer = streams * d * i + i * config.d_conv + i * _inner_parameters(config) + i * d + d
    layer += i if config.conv_bias else 0
    layer += streams * i + d if config.bias else 0
    embedding = config.padded_vocab_size * d
    return config.n_layer * layer + d + embedding * (1 if config.tie_embeddings else 2)


def _inner_parameters(config: MambaConfig) -> int:
    """Of the inner map, for each of its channels."""
    n, r = config.d_state, config.dt_rank_size
    return {"s6": 2 * r + 3 * n + 2, "s4": 4 * n + 2, "s4d": 3 * n + 2, "s4d-real": 3 * n + 2, "none": 0}[config.inner]


def flops_per_token(config: ModelConfig, context: int = 0) -> Flops:
    """Floating-point operations a token. Of attention's alone a part grows with the context.

    A multiply-add counts two, an exponential one. Forward, a layer of Mamba, names as in `parameter_count`::

        2 (sdi + i(r + 2n) + ri + id)    the projections; of B and C those that depend on the input
        2iw                              the convolution
        7in                              the scan: dt A, its exponential, times h, (dt u) B, their sum, C h and its sum
        4i                               dt u, softplus, + D u (2)
        2i                               silu(z) and its product, or H3's two products
        4d                               norm and residual

    and 2 padded_vocab_size d for lm_head. Where A is complex the scan takes 21 for each of n / 2 states. A map that
    doesn't select counts as its recurrence, with + D u: 5in real, 14 for each of n / 2 complex states, i(2n^2 + 4n) for
    S4's matrix. In training it is a convolution, whose Fourier transforms take about log2(length) times more than that
    of S4D. The backward pass counts twice the forward pass, so training three times it; what `recompute` runs again is
    not counted, since it is not useful work.

    Of a baseline: two for each number of its matrices, and a few for norms, gates and states, S4 as its recurrence; of
    attention also context (4 d_model + 5 heads), the scores, their softmax and the values.

    Args:
        config: of the model.
        context: positions that a token looks at, itself among them; on average half of the length. Default 0: without
            attention's own products.
    """
    if isinstance(config, BaselineConfig):
        forward = baseline_forward_flops(config, context)
        return Flops(forward, 3 * forward)
    d, i, r, streams = config.d_model, config.d_inner, config.dt_rank_size, BLOCKS[config.block]
    n = config.d_state
    selective = i * (r + n * len(config.selected & {"B", "C"})) + r * i
    layer = 2 * (streams * d * i + selective + i * d) + 2 * i * config.d_conv + 4 * d
    layer += 0 if config.block == "ungated" else 2 * i
    if config.inner == "s6":
        layer += i * (21 * n // 2 if config.state_size[1] else 7 * n) + 4 * i
    elif config.inner != "none":
        layer += i * {"s4": 2 * n * n + 4 * n, "s4d": 7 * n, "s4d-real": 5 * n}[config.inner] + 2 * i
    forward = config.n_layer * layer + 4 * d + 2 * config.padded_vocab_size * d
    return Flops(forward, 3 * forward)


def state_bytes(
    config: ModelConfig, batch: int = 1, dtype: torch.dtype = torch.float32, *, context: int | None = None
) -> int:
    """Bytes of the state of `batch` sequences; whatever their length, but for attention's.

    A layer of Mamba keeps d_conv - 1 inputs of d_inner channels in the activations' dtype, and d_inner * d_state
    numbers in float32 (float64 beside float64 activations), as many where d_state / 2 of them are complex, none without
    an inner map. LSTM, GRU and convolutions keep activations, S4 d_state numbers a channel in float32, attention a key
    and a value for each position.

    Args:
        config: of the model.
        batch: number of sequences.
        dtype: of the activations.
        context: tokens that each has seen; a Transformer's must be given.

    Raises:
        ConfigError: a Transformer's without a context.
    """
    if isinstance(config, BaselineConfig):
        return baseline_state_bytes(config, batch, dtype, context)
    states, is_complex = config.state_size
    exact = torch.promote_types(dtype, torch.complex64 if is_complex else torch.float32)
    conv = (config.d_conv - 1) * config.d_inner * dtype.itemsize
    ssm = config.d_inner * states * exact.itemsize
    return batch * config.n_layer * (conv + ssm)
