"""A model that is there already, trained on with a text of one's own: what `statescan train --from` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from statescan.checkpoint import open_source
from statescan.data import build_token_file, load_tokenizer
from statescan.generate.packed import multiplies_bfloat16
from statescan.models.causal_lm import config_of
from statescan.train import DataConfig, RunConfig, TrainConfig

__all__ = ["PASSES", "STEPS", "finetuning_run", "within_passes"]

# A short text is gone through so often at most: more would learn it by heart, and unlearn what was there before.
PASSES = 3
STEPS = 300


def finetuning_run(
    model: str | os.PathLike[str],
    data: Sequence[str],
    *,
    lora: int = 0,
    tokenizer: str | None = None,
    steps: int | None = None,
) -> RunConfig:
    """A run that goes on from a model's weights on another text, in minutes on a laptop for a model of ten million.

    The learning rate is a tenth of what a model of that size is trained with from nothing (with adapters, which start
    from zero, the whole of it), and there is no weight decay: what was learnt before is to stay.

    Args:
        model: a model's folder.
        data: files, folders, globs or packaged names.
        lora: rank of low-rank adapters; 0 trains all weights. Default 0.
        tokenizer: "bytes" or a tokenizer's JSON. Default: the model's own.
        steps: updates. Default: 300, but three passes through the training part at most.

    Returns:
        The run, for `statescan.train.train`.

    Raises:
        CheckpointError: there is no model.
        DataError: without `steps`, the text can't be read.
    """
    if steps is None:
        return within_passes(finetuning_run(model, data, lora=lora, tokenizer=tokenizer, steps=STEPS))
    # Absolute: a run goes on from anywhere.
    model = os.path.abspath(model)
    tokenizer = model if tokenizer is None else tokenizer
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
            weights=model,
            lora=lora,
        ),
    )


def within_passes(run: RunConfig, passes: float = PASSES) -> RunConfig:
    """A run that goes so often through the part of its text that it learns from, at most; one update at least.

    Warm-up and the distance between two judgements and two checkpoints shrink with the updates.

    Args:
        run: of texts.
        passes: through the training part.

    Raises:
        DataError: the text can't be read.
    """
    data, config = run.data, run.train
    tokenizer = load_tokenizer(data.tokenizer)
    file = build_token_file(data.paths, tokenizer, field=data.field, invalid_utf8=data.invalid_utf8, cache=data.cache)
    tokens = file.tokens if data.valid_paths else file.split(data.valid_fraction)[0]
    steps = max(1, int(passes * len(tokens) / (config.batch_size * config.length)))
    if steps >= config.steps:
        return run
    return replace(
        run,
        train=replace(
            config,
            steps=steps,
            warmup=min(config.warmup, max(1, steps // 10)),
            evaluate_every=min(config.evaluate_every, max(1, steps // 4)),
            checkpoint_every=min(config.checkpoint_every, max(1, steps // 2)),
        ),
    )
