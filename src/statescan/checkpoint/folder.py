"""A model's folder: config.json beside its weights, in any of the layouts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.checkpoint.weights import (
    BIN_FILE,
    WEIGHTS_FILE,
    WEIGHTS_FILES,
    TensorSpec,
    open_weights,
    shards_of,
    some,
    write_bin,
    write_safetensors,
)
from statescan.errors import CheckpointError
from statescan.files import atomic_file

__all__ = [
    "CONFIG_FILE",
    "MOST_BYTES_OF_A_SHARD",
    "WEIGHTS_FILE",
    "load_config",
    "load_tensors",
    "read_config",
    "save_folder",
    "tensor_shapes",
]

CONFIG_FILE = "config.json"
MOST_BYTES_OF_A_SHARD = 5 * 10**9


def save_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    binary: bool = False,
    shard_bytes: int = MOST_BYTES_OF_A_SHARD,
) -> Path:
    """Writes config.json and the weights into a folder, each file whole or not at all.

    All are complete on the disk under temporary names before the first takes its place, so a full disk harms nothing.

    Args:
        folder: made where it is missing; other files in it are left alone.
        config: anything that json can write.
        tensors: one entry a parameter, any dtype that safetensors knows; views and shared storage are allowed.
        binary: write pytorch_model.bin instead of safetensors.
        shard_bytes: weights beyond so many bytes are split into several files and an index. Default 5 GB.

    Returns:
        The folder.

    Raises:
        CheckpointError: the system refused to write, or weights of another form lie there, which readers would take.
    """
    folder = Path(folder)
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    groups = [list(specs)] if binary else shards_of(specs, shard_bytes)
    index = None
    if binary:
        files = {BIN_FILE: groups[0]}
    elif len(groups) == 1:
        files = {WEIGHTS_FILE: groups[0]}
    else:
        index = f"{WEIGHTS_FILE}.index.json"
        files = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
    main = index or next(iter(files))
    if others := [name for name in WEIGHTS_FILES if name != main and (folder / name).exists()]:
        raise CheckpointError(
            f"save: {folder} holds {some(others)}, which would be taken for the model's weights beside {main}; save to "
            "another folder"
        )
    with contextlib.ExitStack() as stack:
        # Contexts end in reverse order: what points to the weights takes its place after them.
        config_file = stack.enter_context(atomic_file(folder / CONFIG_FILE))
        config_file.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        if index is not None:
            index_file = stack.enter_context(atomic_file(folder / index))
            total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
            places = {name: file for file, names in files.items() for name in names}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True)
            index_file.write_text(text + "\n", encoding="utf-8")
        for file, names in files.items():
            path = stack.enter_context(atomic_file(folder / file))
            (write_bin if binary else write_safetensors)(path, _Some(tensors, names))
    return folder


class _Some(Mapping[str, Tensor]):
    """Some entries of a mapping, each asked for when it is needed."""

    def __init__(self, tensors: Mapping[str, Tensor], names: list[str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a folder's config.json.

    Raises:
        CheckpointError: the folder or file is missing, or is no JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"load: the model must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, got {folder}, which is "
            f"{'a file' if folder.exists() else 'missing'}; pass the folder that a model was saved to"
        )
    return read_config(folder / CONFIG_FILE)


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config.json, wherever it lies; raises as `load_config` does."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"load: {path.parent} has no {CONFIG_FILE}; pass the folder that a model was saved to"
        ) from None
    except OSError as error:
        raise CheckpointError(f"load: could not read {path}: {error.strerror}; check its permissions") from error
    except ValueError as error:
        raise CheckpointError(
            f"load: {path} is not JSON ({error}); restore the file or save the model again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"load: {path} must hold a JSON object, got {type(config).__name__}; save the model again"
        )
    return config


def tensor_shapes(folder: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder's weights, read from headers alone.

    Raises:
        CheckpointError: the file is missing or cut short.
    """
    return {name: spec.shape for name, spec in open_weights(Path(folder)).specs.items()}


def load_tensors(
    folder: str | os.PathLike[str],
    wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Reads the tensors of a folder's weights after checking every name and shape.

    Args:
        folder: as written by `save_folder`.
        wanted: name -> (shape, dtype that it shall have in memory).
        device: where the tensors shall be. Default: the CPU.

    Returns:
        One tensor a name, in memory of its own (never a view of the file).

    Raises:
        CheckpointError: the file is missing or cut short, lacks a name, has one too many, or a shape differs. All is
            checked before the first tensor is read.
    """
    folder = Path(folder)
    weights = open_weights(folder)
    weights.check({name: shape for name, (shape, _) in wanted.items()}, folder / CONFIG_FILE, floats=False)
    return {
        name: weights[name].to(device=device, dtype=wanted[name][1], copy=True) for name in weights.in_order(wanted)
    }
