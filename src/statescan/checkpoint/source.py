"""A published checkpoint, opened: our fields, and our tensors under our names, whatever its layout."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.checkpoint.folder import CONFIG_FILE, read_config
from statescan.checkpoint.hub import locate
from statescan.checkpoint.layouts import detect_layout, fields_from, their_name
from statescan.checkpoint.weights import Weights, open_weights, same_bits
from statescan.errors import CheckpointError, ConfigError, StatescanError

__all__ = ["Source", "SourceTensors", "open_source"]

_HEAD, _EMBEDDING = "lm_head.weight", "backbone.embedding.weight"


@dataclass(frozen=True)
class Source:
    """A checkpoint of any layout.

    Args:
        folder: where config.json lies.
        layout: one of `LAYOUTS`.
        fields: of `MambaConfig`.
        weights_path: a file of weights, an index, or the folder.
    """

    folder: Path
    layout: str
    fields: dict[str, Any]
    weights_path: Path

    @functools.cached_property
    def _weights(self) -> Weights:
        return open_weights(self.weights_path)

    def check_layers(self, layers: int) -> None:
        """Refuses more layers than there are tensors, before a model of so many is made.

        Raises:
            CheckpointError: the weights hold fewer tensors, or they can't be opened.
        """
        if layers > len(self._weights.specs):
            raise CheckpointError(
                f"load: {self._weights.path} holds {len(self._weights.specs)} tensors, fewer than the {layers} layers "
                f"that {self.folder / CONFIG_FILE} says; it belongs to another configuration"
            )

    @contextlib.contextmanager
    def making_shapes(self) -> Iterator[None]:
        """Around the making of a model that has shapes alone (torch's meta device).

        Raises:
            CheckpointError: config.json says sizes that no tensor can have.
        """
        try:
            yield
        except StatescanError:
            raise
        except (RuntimeError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"load: {self.folder / CONFIG_FILE} says sizes that no tensor can have "
                f"({(str(error) or type(error).__name__).splitlines()[0]}); copy it again"
            ) from error

    def tensors(self, wanted: Mapping[str, tuple[int, ...]], tied: bool) -> SourceTensors:
        """Opens the weights and checks every name and shape.

        Args:
            wanted: our name -> shape, with lm_head.weight unless it is tied.
            tied: a head that is written all the same must be the embedding to the bit.

        Raises:
            CheckpointError: a file is cut short or no such file, a name is missing or surplus, a shape is wrong.
        """
        weights = self._weights
        names = {name: their_name(self.layout, name) for name in wanted}
        if names[_EMBEDDING] not in weights.specs and _EMBEDDING in weights.specs:
            names[_EMBEDDING] = _EMBEDDING  # transformers reads the other layout's name too
        weights.check(
            {names[name]: shape for name, shape in wanted.items()},
            self.folder / CONFIG_FILE,
            spare=(_HEAD,) if tied else (),
        )
        if tied and _HEAD in weights.specs and not same_bits(weights[_HEAD], weights[names[_EMBEDDING]]):
            raise CheckpointError(
                f"load: {weights.path}: {_HEAD} differs from {names[_EMBEDDING]}, but {self.folder / CONFIG_FILE} says "
                "that they are tied; set tie_embeddings (transformers: tie_word_embeddings) to false to keep both"
            )
        return SourceTensors(weights, names)


class SourceTensors(Mapping[str, Tensor]):
    """Tensors under our names, mapped from the files: copy them before the files may change."""

    def __init__(self, weights: Weights, names: dict[str, str]) -> None:
        self._weights, self._names = weights, names
        ours = {theirs: name for name, theirs in names.items()}
        self._order = [ours[name] for name in weights.in_order(names.values())]

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored embedding."""
        return self._weights.specs[self._names[_EMBEDDING]].dtype


def open_source(source: str | os.PathLike[str], *, revision: str | None = None, offline: bool = False) -> Source:
    """Finds a checkpoint and reads its config.json; see `locate` for what a source may be.

    Raises:
        CheckpointError: nothing is there, or config.json is missing or no JSON object.
        ConfigError: an architecture or a field that is not known here.
    """
    path = locate(source, revision, offline)
    folder = path if path.is_dir() else path.parent
    if path.name == CONFIG_FILE and not path.is_dir():
        path = folder
    config_file = folder / CONFIG_FILE
    if not path.is_dir() and not config_file.exists():
        raise CheckpointError(
            f"load: {path} has no {CONFIG_FILE} beside it, which says what model it is; copy that too"
        )
    config = read_config(config_file)
    layout = detect_layout(config, config_file)
    try:
        return Source(folder, layout, fields_from(layout, config, config_file), path)
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"{config_file}: a field has a value of the wrong kind ({error}); copy the file again"
        ) from error
