"""``statescan train``: a language model from texts, resumable, on one device or many."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from statescan.cli.terminal import INTERRUPTED, command, emit_json, note, print_rows

__all__ = ["train"]


@command
def train(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run: model, checkpoints, logs, loss curve.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="File, folder, glob or packaged:moby_dick; may be given several times."),
    ] = None,
    valid: Annotated[
        list[str] | None, typer.Option("--valid", show_default="the last 5 % of the data", help="Held-out text.")
    ] = None,
    preset: Annotated[
        str, typer.Option("--preset", help="Size of the model; `statescan info NAME` shows it.")
    ] = "tiny",
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="'bytes' or a tokenizer JSON.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A run as JSON, e.g. another run's run.json.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="e.g. train.steps=200, model.d_state=32, data.cache=/tmp."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Trains a language model on texts; interrupted, it goes on with --resume to the same bits."""
    from dataclasses import replace

    from statescan.data import load_tokenizer
    from statescan.errors import ConfigError
    from statescan.models import preset as model_preset
    from statescan.train import DataConfig, RunConfig, load_run
    from statescan.train import train as run_training

    if resume:
        run = load_run(out)
    elif config is not None:
        run = RunConfig.from_json(config)
    elif data:
        run = RunConfig(model_preset(preset), DataConfig(tokenizer=tokenizer or "bytes"))
        run = run.fit_vocabulary(load_tokenizer(tokenizer))
    else:
        raise ConfigError(
            "train: wanted a text, got none; name one with --data PATH (--data packaged:moby_dick is here)"
        )
    if data or valid:
        texts = {"paths": tuple(data or run.data.paths), "valid_paths": tuple(valid or run.data.valid_paths)}
        run = replace(run, data=replace(run.data, **texts))
    run = run.apply_overrides(overrides or [])

    result = run_training(run, out, resume=resume)
    if not result.first_process:
        # Of several processes one reports.
        raise typer.Exit(INTERRUPTED if result.interrupted else 0)

    held_out = result.evaluations[-1][1] if result.evaluations else None
    if as_json:
        emit_json(
            {
                "out": result.out,
                "steps": result.steps,
                "train_loss": result.train_loss,
                "bits_per_byte": held_out,
                "evaluations": [{"step": step, "bits_per_byte": bits} for step, bits in result.evaluations],
                "tokens_per_second": result.tokens_per_second,
                "interrupted": result.interrupted,
            }
        )
    else:
        print_rows(
            ("run", str(result.out)),
            ("steps", f"{result.steps:,} of {run.train.steps:,}"),
            ("training loss", f"{result.train_loss:.4f} nats per token"),
            ("held out", "not judged" if held_out is None else f"{held_out:.4f} bits per byte"),
            ("speed", f"{result.tokens_per_second:,.0f} tokens/s"),
        )
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    note(f'next: statescan generate --model {shlex.quote(str(out))} --prompt "Call me" --max-new-tokens 200')
