"""A language model as the engine's decoder by its own forward and step: for those that have no packed form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from statescan.errors import ConfigError
from statescan.models import CausalLM
from statescan.nn.attention import AttentionState

__all__ = ["ModelDecoder", "RowStates"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RowStates:
    """A model's state with one row a sequence: every tensor in it has the rows along its first dimension.

    Rows of attention's cache may have seen different numbers of tokens.

    Args:
        layers: what `CausalLM.init_state` gives.
    """

    def __init__(self, layers: Any) -> None:
        self.layers = layers

    def select(self, rows: Tensor | Sequence[int]) -> RowStates:
        """A new state of the given rows, in that order; a row may come more than once."""
        index = torch.as_tensor(rows, dtype=torch.int64)

        def pick(part: Any) -> Any:
            if isinstance(part, AttentionState):
                return part.select(index.tolist())
            return part.index_select(0, index.to(part.device))

        return RowStates(_map(pick, self.layers))

    def assign(self, row: int, other: RowStates, other_row: int = 0) -> None:
        """Overwrites one row by a row of another state of the same model."""

        def write(part: Any, source: Any) -> Any:
            if isinstance(part, AttentionState):
                return part.overwrite(row, source, other_row)
            part[row] = source[other_row]
            return part

        self.layers = _map(write, self.layers, other.layers)


def _map(change: Any, value: Any, *others: Any) -> Any:
    if isinstance(value, (Tensor, AttentionState)):
        return change(value, *others)
    if value is None:
        return None
    parts = [_map(change, *each) for each in zip(value, *others, strict=True)]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


class ModelDecoder:
    """Decodes with `CausalLM.forward` and `CausalLM.step` themselves, in evaluation mode.

    `PackedModel` is several times faster for the models that it takes; this one takes every model.

    Args:
        model: the language model; left unchanged. Where it has the wanted dtype and device already its parameters are
            shared, else copied.
        dtype: of the weights, "float32", "bfloat16" or "float16"; what a model of this dtype keeps in float32 stays so.
        device: where to run. Default: where the model is.

    Raises:
        ConfigError: a dtype that only packed weights have, or a model with adapters that would have to be copied into
            another dtype.
    """

    def __init__(self, model: CausalLM, dtype: str = "float32", *, device: torch.device | str | None = None) -> None:
        if dtype not in _DTYPES:
            raise ConfigError(
                f"Engine: dtype must be one of {', '.join(_DTYPES)} for a model that has no packed form, got {dtype!r}"
            )
        self.config, self.dtype = model.config, dtype
        where = model.backbone.embedding.weight.device if device is None else torch.device(device)
        self._model = _ready(model, _DTYPES[dtype], where)

    @property
    def model(self) -> CausalLM:
        """What runs: in evaluation mode, with parameters of the wanted dtype."""
        return self._model

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, a tied table counted once."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._model.backbone.embedding.weight.device

    def init_state(self, batch: int = 1) -> RowStates:
        """The state before the first token, for `batch` rows."""
        return RowStates(self._model.init_state(batch))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, state: RowStates, logits: Literal["last", "all"] = "last") -> Tensor:
        """Takes many tokens a row, (batch, length); gives float32 logits of the last position, or of all."""
        output = self._model(input_ids, state=state.layers, logits_to_keep=1 if logits == "last" else 0)
        state.layers = output.state
        assert output.logits is not None
        return (output.logits[:, -1] if logits == "last" else output.logits).float()

    @torch.no_grad()
    def step(self, input_ids: Tensor, state: RowStates) -> Tensor:
        """Takes one more token a row, (batch,); gives float32 logits (batch, vocabulary)."""
        output = self._model.step(input_ids, state.layers)
        state.layers = output.state
        assert output.logits is not None
        return output.logits.float()


def _ready(model: CausalLM, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """A model in evaluation mode with parameters of the wanted dtype, the model's own where they have it."""
    template = type(model)(model.config, device="meta", dtype=dtype)
    wanted = {name: part.dtype for name, part in template.state_dict().items()}
    have = model.state_dict()
    if all(part.device == device and part.dtype == wanted.get(name, part.dtype) for name, part in have.items()):
        # Another module around the same tensors, so that the caller's keeps its mode.
        shared = {id(part): part for part in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, shared).eval()
    if have.keys() != wanted.keys():
        strange = sorted(have.keys() ^ wanted.keys())[0]
        raise ConfigError(
            f"Engine: a model with other parameters than its configuration's, {strange}, must have the wanted dtype "
            f"and device already, {dtype} and {device}; merge its adapters, or move it"
        )
    copied = {name: part.detach().to(device, wanted[name]) for name, part in have.items()}
    template.load_state_dict(copied, assign=True)
    template.tie_weights()
    return template.eval()
