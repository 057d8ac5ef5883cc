"""Low-rank adapters on a model that is trained on: PEFT's, around every matrix of its layers."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from torch import Tensor, nn

from statescan.errors import ConfigError, MissingExtraError
from statescan.files import atomic_file, make_folder, write_text
from statescan.models import CausalLM

__all__ = ["add_adapters", "merged_weights", "save_adapters"]

_NAME = "default"


def add_adapters(model: CausalLM, rank: int) -> None:
    """Freezes a model and puts an adapter around every linear map of its layers: ``W x`` becomes ``W x + 2 B A x``.

    A is (rank, inputs), drawn; B is (outputs, rank), zeros: so the model computes what it did before. The head, the
    embedding, norms, convolutions, A_log, D and the map to the step sizes stay as they are.

    Args:
        model: changed in place; only its adapters are trained from here on.
        rank: of each adapter, >= 1.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigError: the rank is below 1, or above that of every matrix: an adapter of a lower one learns as much.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), arXiv:2106.09685.
    """
    if rank < 1:
        raise ConfigError(f"train: train.lora must be a rank >= 1 here, got {rank}; 0 trains all weights")
    peft = _peft()
    maps = {
        f"backbone.layers.{name}": module
        for name, module in model.backbone.layers.named_modules()
        if type(module) is nn.Linear
    }
    highest = max((min(module.weight.shape) for module in maps.values()), default=0)
    if rank > highest:
        raise ConfigError(
            f"train: train.lora must be a rank of at most {highest}, the highest that a matrix of this model's layers "
            f"has, got {rank}; take a lower one, or 0 to train all weights"
        )
    with warnings.catch_warnings():
        # It warns of tied weights, of which no adapter is one.
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(maps)), model, adapter_name=_NAME
        )


def merged_weights(model: CausalLM) -> dict[str, Tensor]:
    """The weights of the plain model that computes what an adapted one does, by the plain model's names."""
    weights = {
        name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if "lora_" not in name
    }
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight(_NAME)  # type: ignore[operator, union-attr]
    return weights


def save_adapters(model: CausalLM, folder: str | os.PathLike[str]) -> Path:
    """Writes the adapters alone, as ``peft.PeftModel.from_pretrained(model, folder)`` reads them.

    Args:
        model: after `add_adapters`.
        folder: made where it is missing.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    folder, peft = make_folder(folder), _peft()
    tensors = peft.get_peft_model_state_dict(model, adapter_name=_NAME)
    # As they are called where PEFT wraps the model.
    named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(folder / "adapter_model.safetensors") as temporary:
        save_file(named, temporary, metadata={"format": "pt"})
    fields = model.peft_config[_NAME].to_dict()  # type: ignore[union-attr, index]
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    write_text(folder / "adapter_config.json", json.dumps(fields, indent=2, default=str) + "\n")
    return folder


def _peft():  # type: ignore[no-untyped-def]
    try:
        import peft
    except ImportError:
        raise MissingExtraError("train.lora", "peft", "lora") from None
    return peft
