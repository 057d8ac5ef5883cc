"""Folders of models that no published layout has: config.json with the architecture's name, the weights as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from statescan import checkpoint as files
from statescan.errors import CheckpointError

__all__ = ["load_own_weights", "own_config", "save_own"]


def save_own(folder: str | os.PathLike[str], architecture: str, config: Mapping[str, Any], model: nn.Module) -> Path:
    """Writes config.json and a model's weights into a folder, whole or not at all."""
    return files.save_folder(folder, {"architecture": architecture, **config}, model.state_dict())


def own_config(folder: str | os.PathLike[str], architecture: str) -> dict[str, Any]:
    """What `save_own` wrote of a model's configuration.

    Raises:
        CheckpointError: there is no such file, or it is another architecture's.
    """
    fields = files.load_config(folder)
    if fields.pop("architecture", None) != architecture:
        raise CheckpointError(f"{folder}: config.json is not a {architecture}'s; open it with its own class")
    return fields


def load_own_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Puts the weights that `save_own` wrote into a model of that configuration.

    Raises:
        CheckpointError: a file is missing, cut short or of another shape.
    """
    wanted = {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    model.load_state_dict(files.load_tensors(folder, wanted))
