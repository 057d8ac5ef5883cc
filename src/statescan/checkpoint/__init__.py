"""File formats and layouts of checkpoints, written whole or not at all; this room knows no model class."""

from statescan.checkpoint.folder import (
    CONFIG_FILE,
    MOST_BYTES_OF_A_SHARD,
    WEIGHTS_FILE,
    load_config,
    load_tensors,
    save_folder,
    tensor_shapes,
)
from statescan.checkpoint.hub import TOKENIZER_FILES, is_hub_id, locate
from statescan.checkpoint.layouts import LAYOUTS, fields_to, head_is_written, their_name
from statescan.checkpoint.source import Source, SourceTensors, open_source
from statescan.checkpoint.weights import open_weights
from statescan.files import atomic_file

__all__ = [
    "CONFIG_FILE",
    "LAYOUTS",
    "MOST_BYTES_OF_A_SHARD",
    "TOKENIZER_FILES",
    "WEIGHTS_FILE",
    "Source",
    "SourceTensors",
    "atomic_file",
    "fields_to",
    "head_is_written",
    "is_hub_id",
    "load_config",
    "load_tensors",
    "locate",
    "open_source",
    "open_weights",
    "save_folder",
    "tensor_shapes",
    "their_name",
]
