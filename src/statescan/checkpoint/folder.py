"""A model's folder: config.json beside model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.errors import CheckpointError
from statescan.files import atomic_file

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "load_config", "load_tensors", "save_folder", "tensor_shapes"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_LISTED = 3


def save_folder(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes config.json and model.safetensors into a folder, each whole or not at all.

    Both are complete on the disk under temporary names before the first takes its place, so a full disk harms nothing.

    Args:
        folder: made where it is missing; other files in it are left alone.
        config: anything that json can write.
        tensors: one entry a parameter, any dtype that safetensors knows; views and shared storage are allowed.

    Returns:
        The folder.

    Raises:
        CheckpointError: the system refused to write.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic_file(folder / CONFIG_FILE) as config_file, atomic_file(folder / WEIGHTS_FILE) as weights_file:
        config_file.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        save_file(_unshared(plain), weights_file, metadata={"format": "pt"})
    return folder


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none of which shares memory with another or is part of a larger one."""
    seen: set[int] = set()
    alone = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if tensor.numel() and (
            storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size()
        ):
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        alone[name] = tensor
    return alone


def load_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a folder's config.json.

    Raises:
        CheckpointError: the folder or file is missing, or is no JSON object.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise CheckpointError(
            f"load: the model must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, got {folder}, which is "
            f"{'a file' if folder.exists() else 'missing'}; pass the folder that a model was saved to"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"load: {folder} has no {CONFIG_FILE}; pass the folder that a model was saved to"
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


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(
            f"load: {path.parent} has no {path.name}; pass the folder that a model was saved to"
        ) from None
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"load: {path} is cut short or no safetensors file ({size} bytes: {error}); copy it again or save the "
            "model again"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"load: could not read {path}: {error.strerror or error}; check its permissions"
        ) from error


def tensor_shapes(folder: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder's model.safetensors, read from its header alone.

    Raises:
        CheckpointError: the file is missing or cut short.
    """
    with _open(Path(folder) / WEIGHTS_FILE) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def load_tensors(
    folder: str | os.PathLike[str],
    wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Reads the tensors of a folder's model.safetensors after checking every name and shape.

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
    path = folder / WEIGHTS_FILE
    with _open(path) as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
        missing = sorted(set(wanted) - set(there))
        if missing:
            raise CheckpointError(
                f"load: {path} lacks {_some(missing)}; it belongs to another configuration than {folder / CONFIG_FILE}"
            )
        extra = sorted(set(there) - set(wanted))
        if extra:
            raise CheckpointError(
                f"load: {path} holds {_some(extra)}, which the model does not have; it belongs to another "
                f"configuration than {folder / CONFIG_FILE}"
            )
        for name, (shape, _) in wanted.items():
            if there[name] != tuple(shape):
                raise CheckpointError(
                    f"load: {path}: {name} must have shape {tuple(shape)}, got {there[name]}; it belongs to another "
                    f"configuration than {folder / CONFIG_FILE}"
                )
        tensors = {}
        for name, (_, dtype) in wanted.items():
            tensor = file.get_tensor(name)
            tensors[name] = tensor.to(device=device, dtype=dtype, copy=True)
        return tensors
