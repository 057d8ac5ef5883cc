"""Model folders: config.json and model.safetensors, written whole or not at all; this room knows no model class."""

from statescan.checkpoint.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_config,
    load_tensors,
    save_folder,
    tensor_shapes,
)
from statescan.files import atomic_file

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "atomic_file",
    "load_config",
    "load_tensors",
    "save_folder",
    "tensor_shapes",
]
