"""Finds and opens the model that a command was given: a model's folder, or a training run's, which is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from statescan.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from statescan.data import ByteTokenizer, JsonTokenizer
    from statescan.models import CausalLM, MambaConfig

__all__ = ["model_folder", "open_model", "read_config"]


def model_folder(path: Path) -> Path:
    """`path`, which holds config.json.

    Raises:
        CheckpointError: it holds none.
    """
    if (path / "config.json").is_file():
        return path
    if not path.exists():
        problem = "which does not exist"
    elif not path.is_dir():
        problem = "which is a file"
    else:
        problem = "which holds no config.json (a run writes its model when it ends)"
    raise CheckpointError(f"model: wanted the folder of a model or of a training run, got '{path}', {problem}")


def read_config(folder: Path) -> MambaConfig:
    """The configuration in a model's folder."""
    from statescan.checkpoint import load_config
    from statescan.models import MambaConfig

    fields = load_config(folder)
    fields.pop("architecture", None)
    return MambaConfig.from_dict(fields)


def open_model(
    path: Path, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[CausalLM, ByteTokenizer | JsonTokenizer]:
    """The model in a folder, ready to be used, and the tokenizer that lies beside it."""
    import torch

    from statescan.data import load_tokenizer
    from statescan.errors import ConfigError
    from statescan.models import CausalLM

    folder = model_folder(path)
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).partition("\n")[0]
        raise ConfigError(f"--device: wanted a device that torch can use here, got '{device}': {reason}") from None
    model = CausalLM.from_pretrained(folder, device=where, dtype=dtype)
    return model.eval(), load_tokenizer(folder)
