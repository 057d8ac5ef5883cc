"""statescan: selective state space models, S4 to S6 (Mamba), from one op to a trained, evaluated model.

Importing this package needs torch alone and takes in no GPU library; rooms are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from statescan import errors, models, nn, ops
    from statescan.models import CausalLM, MambaConfig
    from statescan.ops import explain

__all__ = ["CausalLM", "MambaConfig", "__version__", "errors", "explain", "models", "nn", "ops"]

_HOME = {
    "CausalLM": "statescan.models",
    "MambaConfig": "statescan.models",
    "explain": "statescan.ops",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in {"errors", "models", "nn", "ops"}:
        return importlib.import_module(f"statescan.{name}")
    raise AttributeError(f"module 'statescan' has no attribute '{name}'")
