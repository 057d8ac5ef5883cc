"""What a baseline costs, from its configuration alone; `statescan.models.counters` says what each number means."""

from __future__ import annotations

import torch

from statescan.errors import ConfigError
from statescan.models.baseline_config import (
    BaselineConfig,
    ConvConfig,
    RecurrentConfig,
    S4Config,
    TransformerConfig,
)

__all__ = ["baseline_forward_flops", "baseline_parameters", "baseline_state_bytes"]


def _norm(config: BaselineConfig) -> int:
    return config.d_model * (2 if config.norm == "layer" else 1)


def _matrices(config: BaselineConfig) -> int:
    """Numbers of a layer's weights that each multiply every token: those of its products."""
    d, m = config.d_model, config.mlp_width
    mlp = m * d * (3 if config.mlp == "gated" else 2)
    if isinstance(config, TransformerConfig):
        return mlp + 2 * d * d + 2 * d * (d // config.heads) * config.kv_heads
    if isinstance(config, RecurrentConfig):
        h, gates = config.hidden, 4 if config.cell == "lstm" else 3
        return mlp + gates * h * (d + h) + h * d
    if isinstance(config, ConvConfig):
        return mlp + 2 * d * d * config.width + d * d
    return mlp + 2 * d * d


def _vectors(config: BaselineConfig) -> int:
    """The rest of a layer: biases, norms, and S4's system."""
    d, m = config.d_model, config.mlp_width
    rest = _norm(config) * (2 if m else 1)
    if isinstance(config, TransformerConfig):
        inner = m * (2 if config.mlp == "gated" else 1)
        return rest + (2 * d + 2 * (d // config.heads) * config.kv_heads + inner + d if config.bias else 0)
    if isinstance(config, RecurrentConfig):
        gates = 4 if config.cell == "lstm" else 3
        return rest + (2 * gates * config.hidden if config.bias else 0)
    if isinstance(config, ConvConfig):
        return rest + (2 * d if config.bias else 0)
    assert isinstance(config, S4Config)
    # The step and D; A, B and C in conjugate pairs of which one is kept, S4 with P beside them; output_linear's bias.
    numbers = {"s4d": 3, "s4": 4}[config.mixer] * config.d_state + 2
    return rest + d * numbers + 2 * d


def baseline_parameters(config: BaselineConfig) -> int:
    """Number of parameters, a tied embedding counted once."""
    embedding = config.padded_vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    if isinstance(config, TransformerConfig) and config.positions == "absolute":
        embedding += config.max_positions * config.d_model
    return config.n_layer * (_matrices(config) + _vectors(config)) + _norm(config) + embedding


def baseline_forward_flops(config: BaselineConfig, context: int) -> int:
    """Operations of a forward pass a token that looks at `context` positions."""
    d, m = config.d_model, config.mlp_width
    layer = 2 * _matrices(config) + 4 * d * (2 if m else 1) + (3 if config.mlp == "gated" else 1) * m
    if isinstance(config, TransformerConfig):
        layer += context * (4 * d + 5 * config.heads)
        turned = 0 if config.positions in ("absolute", "none") else config.rotary_fraction
        layer += int(3 * turned * (d + config.kv_heads * (d // config.heads)))
    elif isinstance(config, RecurrentConfig):
        layer += config.hidden * (9 if config.cell == "lstm" else 10)
    elif isinstance(config, ConvConfig):
        layer += 3 * d
    elif isinstance(config, S4Config):
        n = config.d_state
        layer += d * ({"s4": 2 * n * n + 4 * n, "s4d": 7 * n}[config.mixer] + 2 + 4)
    return config.n_layer * layer + 4 * d + 2 * config.padded_vocab_size * d


def baseline_state_bytes(config: BaselineConfig, batch: int, dtype: torch.dtype, context: int | None) -> int:
    """Bytes of the state of `batch` sequences; attention's, after `context` tokens each.

    Raises:
        ConfigError: a Transformer's without a context.
    """
    exact = torch.promote_types(dtype, torch.float32)
    if isinstance(config, TransformerConfig):
        if context is None:
            raise ConfigError(
                "state_bytes: context must be given for a Transformer, whose state grows with every token, got none; "
                "e.g. context=2048"
            )
        layer = 2 * context * config.kv_heads * (config.d_model // config.heads) * dtype.itemsize
        return batch * config.n_layer * layer
    if isinstance(config, RecurrentConfig):
        return batch * config.n_layer * config.hidden * (2 if config.cell == "lstm" else 1) * dtype.itemsize
    if isinstance(config, ConvConfig):
        return batch * config.reach * config.d_model * dtype.itemsize
    assert isinstance(config, S4Config)
    return batch * config.n_layer * config.d_model * config.d_state * exact.itemsize
