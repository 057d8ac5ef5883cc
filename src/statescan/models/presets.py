"""Configurations by name: small ones for bytes on a laptop, and the published sizes."""

from __future__ import annotations

import difflib
from typing import Any

from statescan.errors import ConfigError
from statescan.models.baseline_config import (
    ConvConfig,
    ModelConfig,
    RecurrentConfig,
    S4Config,
    TransformerConfig,
)
from statescan.models.config import MambaConfig

__all__ = ["PRESETS", "preset"]

# The small ones read bytes (a vocabulary of 256); the published ones the tokens of GPT-NeoX.
_BYTES = 256
_NEOX = 50277


def _pythia(d_model: int, n_layer: int, n_head: int, vocab_size: int = _NEOX) -> TransformerConfig:
    """GPT-NeoX's architecture: LayerNorm, GELU, biases, attention beside the MLP, a quarter of each head turned."""
    return TransformerConfig(
        d_model,
        n_layer,
        vocab_size,
        n_head=n_head,
        mlp="gelu",
        norm="layer",
        bias=True,
        parallel=True,
        rotary_fraction=0.25,
        tie_embeddings=False,
        init="neox",
        pad_vocab_size_multiple=128 if vocab_size == _NEOX else 8,
    )


_MAMBA: dict[str, ModelConfig] = {
    "tiny": MambaConfig(d_model=128, n_layer=4, vocab_size=_BYTES),
    "mini": MambaConfig(d_model=256, n_layer=6, vocab_size=_BYTES),
    "small": MambaConfig(d_model=512, n_layer=12, vocab_size=_BYTES),
    "130m": MambaConfig(d_model=768, n_layer=24, vocab_size=_NEOX),
    "370m": MambaConfig(d_model=1024, n_layer=48, vocab_size=_NEOX),
    "790m": MambaConfig(d_model=1536, n_layer=48, vocab_size=_NEOX),
    "1.4b": MambaConfig(d_model=2048, n_layer=48, vocab_size=_NEOX),
    "2.8b": MambaConfig(d_model=2560, n_layer=64, vocab_size=_NEOX),
}
# Layers, width and heads as in Gu and Dao (2023), table 12 (GPT-3's), beside the Mamba of about as many parameters.
_TRANSFORMER: dict[str, ModelConfig] = {
    "transformer++-tiny": TransformerConfig(128, 2, _BYTES, n_head=2),
    "transformer++-mini": TransformerConfig(256, 3, _BYTES, n_head=4),
    "transformer++-small": TransformerConfig(512, 6, _BYTES, n_head=8),
    "transformer++-130m": TransformerConfig(768, 12, _NEOX, n_head=12),
    "transformer++-370m": TransformerConfig(1024, 24, _NEOX, n_head=16),
    "transformer++-790m": TransformerConfig(1536, 24, _NEOX, n_head=16),
    "transformer++-1.4b": TransformerConfig(2048, 24, _NEOX, n_head=32),
    "pythia-tiny": _pythia(128, 2, 2, _BYTES),
    "pythia-mini": _pythia(256, 3, 4, _BYTES),
    "pythia-small": _pythia(512, 6, 8, _BYTES),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
}
# Layers of the others: as many as give about the parameters of the Mamba of that name.
_OTHERS: dict[str, ModelConfig] = {
    **{
        f"{cell}-{size}": RecurrentConfig(d, n, _BYTES, cell=cell)
        for cell, depths in (("lstm", (3, 4, 8)), ("gru", (3, 5, 10)))
        for size, d, n in zip(("tiny", "mini", "small"), (128, 256, 512), depths, strict=True)
    },
    **{
        f"conv-{size}": ConvConfig(d, n, _BYTES)
        for size, d, n in (("tiny", 128, 6), ("mini", 256, 8), ("small", 512, 15))
    },
    **{
        f"{mixer}-{size}": S4Config(d, n, _BYTES, mixer=mixer)
        for mixer in ("s4", "s4d")
        for size, d, n in (("tiny", 128, 3), ("mini", 256, 4), ("small", 512, 7))
    },
}
PRESETS: dict[str, ModelConfig] = {**_MAMBA, **_TRANSFORMER, **_OTHERS}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """A preset by name, with some fields changed.

    Args:
        name: one of `PRESETS`.
        overrides: fields of the preset's own class, `MambaConfig` for one without a family in its name.

    Raises:
        ConfigError: the preset or a field is unknown, or a value is out of range.

    Example:
        >>> preset("tiny", n_layer=2).n_layer
        2
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, 1)
        cure = f"did you mean '{near[0]}'?" if near else "or make a configuration yourself"
        raise ConfigError(f"preset: the name must be one of {', '.join(PRESETS)}, got {name!r}; {cure}")
    return PRESETS[name].replace(**overrides)
