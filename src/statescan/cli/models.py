"""Finds and opens the model that a command was given.

A folder (a training run's is one), owner/name on the hub, or packaged:NAME, which comes with the package; "builtin" is
the language model among those, and what a command takes where none is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from statescan.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from statescan.data import Tokenizer
    from statescan.models import CausalLM, ModelConfig

__all__ = [
    "BUILTIN_MODEL",
    "MODEL_HELP",
    "model_folder",
    "open_model",
    "or_packaged",
    "read_config",
    "stored_dtype",
    "usable_device",
]

# What a command takes where no model is named.
BUILTIN_MODEL = Path("builtin")
MODEL_HELP = "Folder of a model or of a training run, owner/name on the hub, or packaged:NAME."


def or_packaged(path: Path) -> Path:
    """`path`, or the folder of the packaged model that it names: by packaged:NAME, or as "builtin" where no folder is
    called so.

    Raises:
        CheckpointError: no packaged model has that name.
    """
    from statescan.recipes.shipped import PACKAGED, shipped_model

    if path.as_posix().startswith(PACKAGED) or (path == BUILTIN_MODEL and not path.exists()):
        return shipped_model(path.as_posix())
    return path


def model_folder(path: Path) -> Path:
    """`path`, which holds config.json, or the hub's cache of what `path` names there, or a packaged model's folder.

    Raises:
        CheckpointError: it holds none, or the hub has no such thing.
    """
    from statescan.checkpoint import is_hub_id, locate

    path = or_packaged(path)
    if is_hub_id(path.as_posix()):
        path = locate(path.as_posix())
    if (path / "config.json").is_file():
        return path
    if not path.exists():
        problem = "which does not exist"
    elif not path.is_dir():
        problem = "which is a file"
    else:
        problem = "which holds no config.json (a run writes its model when it ends)"
    raise CheckpointError(f"model: wanted the folder of a model or of a training run, got '{path}', {problem}")


def read_config(folder: Path) -> ModelConfig:
    """The configuration in a model's folder, of any layout."""
    from statescan.checkpoint import open_source
    from statescan.models.causal_lm import config_of

    return config_of(open_source(folder))


def stored_dtype(folder: Path) -> str:
    """What a model's weights lose nothing by when they are packed for decoding: "bfloat16" where the matrices are
    stored so, else "float32"."""
    import torch

    from statescan.checkpoint import open_source
    from statescan.checkpoint.weights import open_weights

    specs = open_weights(open_source(folder).weights_path).specs
    matrices = {spec.dtype for name, spec in specs.items() if name.endswith("_proj.weight")}
    return "bfloat16" if matrices == {torch.bfloat16} else "float32"


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: torch can't use it here.
    """
    from statescan.ops import _checks

    return _checks.usable_device("--device", name)


def open_model(
    path: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, tokenizer: str | None = None
) -> tuple[CausalLM, Tokenizer]:
    """The model in a folder, ready to be used, and the tokenizer that is named or lies beside it."""
    from statescan.data import load_tokenizer
    from statescan.models import CausalLM

    folder = model_folder(path)
    model = CausalLM.from_pretrained(folder, device=usable_device(device), dtype=dtype)
    return model.eval(), load_tokenizer(tokenizer or folder)
