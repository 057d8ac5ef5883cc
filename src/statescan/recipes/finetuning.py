"""A model that is there already, trained on with a text of one's own: what `statescan train --from` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from statescan.checkpoint import open_source
from statescan.data import load_tokenizer
from statescan.generate.packed import multiplies_bfloat16
from statescan.models.causal_lm import config_of
from statescan.train import DataConfig, RunConfig, TrainConfig

__all__ = ["finetuning_run"]


def finetuning_run(
    model: str | os.PathLike[str],
    data: Sequence[str],
    *,
    lora: int = 0,
    tokenizer: str | None = None,
    steps: int = 300,
) -> RunConfig:
    """A run that goes on from a model's weights on another text, in minutes on a laptop for a model of ten million.

    The learning rate is a tenth of what a model of that size is trained with from nothing (with adapters, which start
    from zero, the whole of it), and there is no weight decay: what was learnt before is to stay.

    Args:
        model: a model's folder.
        data: files, folders, globs or packaged names.
        lora: rank of low-rank adapters; 0 trains all weights. Default 0.
        tokenizer: "bytes" or a tokenizer's JSON. Default: the model's own.
        steps: updates. Default 300.

    Returns:
        The run, for `statescan.train.train`.

    Raises:
        CheckpointError: there is no model.
    """
    tokenizer = os.fspath(model) if tokenizer is None else tokenizer
    config = config_of(open_source(model))
    named = load_tokenizer(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return RunConfig(
        config,
        DataConfig(paths=tuple(data), tokenizer="bytes" if named.name == "bytes" else tokenizer),
        TrainConfig(
            steps=steps,
            batch_size=8,
            length=256,
            lr=3e-3 if lora else 4e-4,
            warmup=min(20, max(1, steps // 10)),
            weight_decay=0.0,
            precision="bf16" if multiplies_bfloat16(device) else "float32",
            evaluate_every=max(1, steps // 4),
            evaluate_tokens=8192,
            checkpoint_every=max(1, steps // 2),
            keep_checkpoints=1,
            weights=os.fspath(model),
            lora=lora,
        ),
    )
