"""Checks on backends and on what they register with torch.library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from statescan.ops._dispatch import explain

__all__ = ["RecordedCall", "check_registration", "poisoned_memory", "recorded_calls", "refusal"]

# its one attribute is put there by a property of the module's class, which type checkers don't see
_fill: Any = torch.utils.deterministic

RecordedCall = tuple[Any, tuple[Any, ...], dict[str, Any]]


def refusal(op: str, backend: str, **facts: Any) -> str | None:
    """Why a backend can't run a call, or None; `facts` are the fields of `statescan.ops.Facts`."""
    return explain(op, **facts).refusals[backend]


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[RecordedCall]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "statescan":
            kept = tree_map_only(torch.Tensor, lambda value: value.detach().clone(), (args, kwargs))
            self.calls.append((func, *kept))
        return func(*args, **kwargs)


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[RecordedCall]]:
    """Collects every call of an operator in the `statescan` namespace, with copies of its arguments."""
    calls: list[RecordedCall] = []
    with _Recorder(calls):
        yield calls


def check_registration(calls: list[RecordedCall]) -> None:
    """Runs `torch.library.opcheck` on recorded calls: schema, fake kernel, tracing with static and dynamic shapes."""
    for func, args, kwargs in calls:
        torch.library.opcheck(func, args, kwargs)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory that torch.empty hands out is full of NaN, so that an output nobody wrote shows."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    fill = _fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    _fill.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _fill.fill_uninitialized_memory = fill
