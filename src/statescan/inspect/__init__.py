"""Looking inside: what a model's layers write into their states, what they let pass, and how long it stays."""

from __future__ import annotations

from statescan.inspect.selection import (
    ChannelMap,
    InspectReport,
    LayerSelection,
    inspect_text,
    layer_selection,
    token_contributions,
)

__all__ = [
    "ChannelMap",
    "InspectReport",
    "LayerSelection",
    "inspect_text",
    "layer_selection",
    "token_contributions",
]
