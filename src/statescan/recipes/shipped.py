"""Trained models that come with the package, as ``packaged:NAME`` wherever a model is asked for.

The one called ``builtin``, a byte-level language model, is what commands take where no model is named.
"""

from __future__ import annotations

from pathlib import Path

from statescan.errors import CheckpointError

__all__ = ["BUILTIN", "PACKAGED", "SHIPPED", "shipped_model"]

PACKAGED = "packaged:"
BUILTIN = "builtin"
# Name: how it came to be; docs/reproduction.md says what it can do.
SHIPPED = {
    BUILTIN: "statescan reproduce builtin-model",
    "induction-heads": "statescan reproduce induction-heads, seed 2",
    "selective-copying": "statescan reproduce selective-copying, seed 0",
}
_FOLDER = Path(__file__).with_name("models")


def shipped_model(name: str) -> Path:
    """The folder of a model that comes with the package.

    Args:
        name: one of `SHIPPED`, with ``packaged:`` before it or without.

    Raises:
        CheckpointError: there is none of that name.
    """
    name = name.removeprefix(PACKAGED)
    if name not in SHIPPED:
        raise CheckpointError(f"model: wanted one of the packaged models ({', '.join(SHIPPED)}), got '{name}'")
    return _FOLDER / name
