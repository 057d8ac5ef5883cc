"""packed_linear on the C++ library."""

from __future__ import annotations

from statescan.ops import _native
from statescan.ops._dispatch import Facts

__all__ = ["refuses"]


def refuses(facts: Facts) -> str | None:
    """Why the C++ kernel does not take this call."""
    if facts.device != "cpu":
        return f"it runs on the CPU, the inputs are on {facts.device}"
    return _native.unavailable_reason() or "the installed C++ library has no such kernel; reinstall statescan"
