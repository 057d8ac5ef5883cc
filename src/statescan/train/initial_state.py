"""States that windows start from in training: carried along a text, or drawn like those that texts leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statescan.errors import CheckpointError, ConfigError
from statescan.models import CausalLM

__all__ = ["InitialState"]


class InitialState:
    """What a model's windows start from, batch after batch; all of it stays on the device.

    Args:
        model: one whose state has a fixed size.
        rows: windows of a batch.
        kind: "carry", the state after the same row's last window; "noise", independent normal numbers, each layer's,
            channel's and state's with the root mean square over the rows of the last batch's final states.
        from_zero: share of rows that start from zeros all the same.

    Raises:
        ConfigError: an unknown kind; the model's state grows (attention), so that carrying it is something else.

    Source: state passing and noise as in Buitrago Ruiz and Gu (2025), arXiv:2507.02782, where the state is another
    text's unless the text goes on; truncated backpropagation through time: Williams and Peng (1990).
    """

    def __init__(self, model: CausalLM, rows: int, kind: str, from_zero: float) -> None:
        if kind not in ("carry", "noise"):
            raise ConfigError(f"train: initial_state must be 'carry' or 'noise' here, got {kind!r}")
        if getattr(model.config, "family", None) == "transformer":
            raise ConfigError(
                f"train: train.initial_state={kind} wants a model whose state has a fixed size, got a Transformer; "
                "set train.initial_state=zero"
            )
        self.kind, self.from_zero = kind, from_zero
        # As noise it is the mean square of the final states, (1, ...), and before the first batch of none.
        self._held = model.init_state(rows if kind == "carry" else 1)
        self._rows = rows
        self._flat: list[Tensor] = []
        _map(self._flat.append, self._held)

    def before(self) -> Any:
        """The state for the next batch, which no later batch changes."""
        keep = torch.rand(self._rows, device=self._flat[0].device) >= self.from_zero

        def start(held: Tensor) -> Tensor:
            if self.kind == "noise":
                shape = (self._rows, *held.shape[1:])
                held = torch.randn(shape, device=held.device, dtype=held.dtype) * held.abs().sqrt()
            mask = keep.view(-1, *(1,) * (held.ndim - 1))
            return torch.where(mask, held, torch.zeros((), device=held.device, dtype=held.dtype))

        return _map(start, self._held)

    @torch.no_grad()
    def after(self, state: Any) -> None:
        """Takes the state that the batch ended with."""
        final: list[Tensor] = []
        _map(final.append, state)
        for held, value in zip(self._flat, final, strict=True):
            value = value.detach()
            held.copy_(value if self.kind == "carry" else value.abs().square().mean(0, keepdim=True))

    def state_dict(self) -> list[Tensor]:
        """The tensors that going on needs."""
        return [held.detach().cpu().clone() for held in self._flat]

    def load_state_dict(self, tensors: list[Tensor]) -> None:
        """Takes what `state_dict` gave.

        Raises:
            CheckpointError: they are of another model, or of another number of rows.
        """
        shapes = [[tuple(t.shape) for t in some] for some in (self._flat, tensors)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"resume: wanted carried states of shapes {shapes[0][:2]} ..., got {shapes[1][:2]} ...; start a new run"
            )
        for held, tensor in zip(self._flat, tensors, strict=True):
            held.copy_(tensor)


def _map(function: Callable[[Tensor], Any], state: Any) -> Any:
    """A state with every tensor put through a function: tuples and named tuples, of tensors and None."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else function(state)
    parts = [_map(function, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
