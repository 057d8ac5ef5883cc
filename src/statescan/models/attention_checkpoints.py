"""Baselines in the published layouts: what transformers' GPT-NeoX and Llama files hold, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from statescan import checkpoint as files
from statescan.checkpoint.attention_layouts import (
    attention_fields_to,
    tensors_from,
    tensors_to,
)
from statescan.errors import CheckpointError, ConfigError
from statescan.models.baseline_config import BaselineConfig, TransformerConfig

__all__ = ["published_tensors", "to_published"]


def _fields(config: TransformerConfig) -> dict[str, Any]:
    """All fields, defaults that follow from others written out."""
    n_kv_head = None if config.kv_heads == config.heads else config.kv_heads
    return config.to_dict() | {
        "n_head": config.heads,
        "n_kv_head": n_kv_head,
        "d_intermediate": config.mlp_width,
    }


def to_published(
    config: BaselineConfig, tensors: Mapping[str, Tensor], layout: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors) of a baseline in a published layout.

    Raises:
        CheckpointError: the layout has no word for what the model is.
        ConfigError: an unknown layout.
    """
    if layout not in files.LAYOUTS:
        raise ConfigError(f"save: the layout must be one of {', '.join(map(repr, files.LAYOUTS))}, got {layout!r}")
    if layout != "transformers" or not isinstance(config, TransformerConfig):
        raise CheckpointError(
            f"save: the {layout} layout has no word for a model of {type(config).__name__}; save as 'statescan'"
        )
    dtype = str(tensors["backbone.embedding.weight"].dtype).removeprefix("torch.")
    fields = _fields(config)
    return attention_fields_to(fields, dtype), tensors_to(fields, tensors)


def published_tensors(
    opened: files.Source, config: TransformerConfig, wanted: Mapping[str, tuple[int, ...]]
) -> Mapping[str, Tensor]:
    """The tensors of a GPT-NeoX's or Llama's files under our names, each put together when it is asked for.

    Raises:
        CheckpointError: a file is cut short, a name is missing or surplus, a shape is wrong.
    """
    weights, fields = files.open_weights(opened.weights_path), _fields(config)
    shapes = tensors_from(fields, weights.specs, lambda name: torch.empty(weights.specs[name].shape, device="meta"))
    for name, shape in wanted.items():
        try:
            got: Any = tuple(shapes[name]().shape)
        except RuntimeError as problem:
            got = f"another ({problem})"
        if got != shape:
            raise CheckpointError(
                f"load: {name} must have the shape {shape}, as {files.CONFIG_FILE} says, got {got}; copy both files "
                "again"
            )
    return _Made(tensors_from(fields, weights.specs, weights.__getitem__))


class _Made(Mapping[str, Tensor]):
    def __init__(self, made: Mapping[str, Callable[[], Tensor]]) -> None:
        self._made = made

    def __getitem__(self, name: str) -> Tensor:
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)
