"""Small trained models that come with the package, as ``packaged:NAME`` wherever a model is asked for."""

from __future__ import annotations

from pathlib import Path

from statescan.errors import CheckpointError

__all__ = ["PACKAGED", "SHIPPED", "shipped_model"]

PACKAGED = "packaged:"
# Name: how it came to be; docs/reproduction.md says what it can do.
SHIPPED = {
    "induction-heads": "statescan reproduce induction-heads, seed 0",
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
