"""``statescan train``: a language model from texts, resumable, on one device or many."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from statescan.cli.terminal import INTERRUPTED, command, emit_json, note, print_rows

if TYPE_CHECKING:
    from statescan.train import RunConfig

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
        str | None,
        typer.Option("--preset", show_default="tiny", help="Size of the model; `statescan info NAME` shows it."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", show_default="bytes", help="'bytes' or a tokenizer JSON.")
    ] = None,
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

    if config is not None:
        # Also with --resume, where the line that started a run is given again: train refuses what may not change.
        run, origin = RunConfig.from_json(config), str(config)
    elif resume:
        run, origin = load_run(out), str(out)
    elif data:
        run = RunConfig(model_preset(preset or "tiny"), DataConfig(tokenizer=tokenizer or "bytes"))
        run, origin = run.fit_vocabulary(load_tokenizer(tokenizer)), None
    else:
        raise ConfigError(
            "train: wanted a text, got none; name one with --data PATH (--data packaged:moby_dick is here)"
        )
    if data or valid:
        texts = {"paths": tuple(data or run.data.paths), "valid_paths": tuple(valid or run.data.valid_paths)}
        run = replace(run, data=replace(run.data, **texts))
    run = run.apply_overrides(overrides or [])
    if origin is not None:
        _check_agrees(run, origin, preset, tokenizer, overrides or [])

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


def _check_agrees(run: RunConfig, origin: str, preset: str | None, tokenizer: str | None, overrides: list[str]) -> None:
    """Refuses a --preset or --tokenizer that says otherwise than the run that was read from a file."""
    from dataclasses import fields

    from statescan.data import load_tokenizer
    from statescan.errors import ConfigError
    from statescan.models import preset as model_preset
    from statescan.train import RunConfig

    cure = (
        "leave it out, set single fields with --set model.FIELD=VALUE, or start a new run without --resume or --config"
    )
    if tokenizer is not None and tokenizer != run.data.tokenizer:
        one, other = load_tokenizer(tokenizer), load_tokenizer(run.data.tokenizer)
        if one.fingerprint != other.fingerprint:
            raise ConfigError(
                f"train: wanted --tokenizer {run.data.tokenizer}, which the run in '{origin}' has, got {tokenizer}; "
                "leave it out, or start a new run without --resume or --config"
            )
    if preset is not None:
        # What the same line makes of the preset where it starts a run.
        named = RunConfig(model_preset(preset), run.data).fit_vocabulary(load_tokenizer(run.data.tokenizer))
        named = named.apply_overrides([text for text in overrides if text.strip().startswith("model.")])
        for entry in fields(run.model):
            wanted, got = getattr(run.model, entry.name), getattr(named.model, entry.name)
            if entry.name != "recompute" and wanted != got:
                raise ConfigError(
                    f"train: wanted a --preset with {entry.name} = {wanted}, which the run in '{origin}' has, "
                    f"got '{preset}' with {got}; {cure}"
                )
