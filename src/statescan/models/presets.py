"""Configurations by name: small ones for bytes on a laptop, and the published sizes."""

from __future__ import annotations

import difflib
from typing import Any

from statescan.errors import ConfigError
from statescan.models.config import MambaConfig

__all__ = ["PRESETS", "preset"]

# The small ones read bytes (a vocabulary of 256); the published ones the tokens of GPT-NeoX.
_BYTES = 256
_NEOX = 50277

PRESETS: dict[str, MambaConfig] = {
    "tiny": MambaConfig(d_model=128, n_layer=4, vocab_size=_BYTES),
    "mini": MambaConfig(d_model=256, n_layer=6, vocab_size=_BYTES),
    "small": MambaConfig(d_model=512, n_layer=12, vocab_size=_BYTES),
    "130m": MambaConfig(d_model=768, n_layer=24, vocab_size=_NEOX),
    "370m": MambaConfig(d_model=1024, n_layer=48, vocab_size=_NEOX),
    "790m": MambaConfig(d_model=1536, n_layer=48, vocab_size=_NEOX),
    "1.4b": MambaConfig(d_model=2048, n_layer=48, vocab_size=_NEOX),
    "2.8b": MambaConfig(d_model=2560, n_layer=64, vocab_size=_NEOX),
}


def preset(name: str, **overrides: Any) -> MambaConfig:
    """A preset by name, with some fields changed.

    Args:
        name: one of `PRESETS`.
        overrides: fields of `MambaConfig`.

    Raises:
        ConfigError: the preset or a field is unknown, or a value is out of range.

    Example:
        >>> preset("tiny", n_layer=2).n_layer
        2
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, 1)
        cure = f"did you mean '{near[0]}'?" if near else "or make a MambaConfig yourself"
        raise ConfigError(f"preset: the name must be one of {', '.join(PRESETS)}, got {name!r}; {cure}")
    return PRESETS[name].replace(**overrides)
