"""``statescan train``: a language model from texts, or a classifier of sequences on a task of name; resumable."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from statescan.cli.audio import train_audio
from statescan.cli.dna import train_dna
from statescan.cli.terminal import INTERRUPTED, command, emit_json, note, print_rows

if TYPE_CHECKING:
    from statescan.train import RunConfig
    from statescan.train.classify import Judgement

__all__ = ["train"]


@command
def train(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run: model, checkpoints, logs, loss curve.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="File, folder, glob or packaged:moby_dick; may be given several times. With --task: MNIST's .npz file "
            "or folder of idx files; the Long Range Arena's folder of ListOps.",
        ),
    ] = None,
    modality: Annotated[
        str, typer.Option("--modality", help="What --data holds: text, dna (FASTA, FASTQ) or audio (WAV, FLAC).")
    ] = "text",
    task: Annotated[
        str | None,
        typer.Option("--task", help="Classify sequences: smnist, psmnist (permuted) or listops (made, unless --data)."),
    ] = None,
    mixer: Annotated[
        str | None,
        typer.Option("--mixer", show_default="s4", help="Of --task: s4, s4d, mamba, lstm, gru, conv, attention."),
    ] = None,
    valid: Annotated[
        list[str] | None, typer.Option("--valid", show_default="the last 5 % of the data", help="Held-out text.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", show_default="tiny", help="Size of the model; `statescan info NAME` shows it."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Go on from this model's weights: 'builtin', which comes along, or as --model elsewhere."
        ),
    ] = None,
    lora: Annotated[
        int, typer.Option("--lora", min=0, help="With --from: train adapters of this rank; 0: all weights.")
    ] = 0,
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
    """Trains a language model on texts, from nothing or --from a model, or a classifier with --task; resumable."""
    if modality != "text":
        kind = _of_modality(modality)
        if start is not None or lora:
            from statescan.errors import ConfigError

            given = "--from" if start is not None else "--lora"
            raise ConfigError(f"train: {given} has no use with --modality {modality}; leave it out")
        kind(
            out,
            data=data or [],
            valid=valid or [],
            overrides=overrides or [],
            resume=resume,
            as_json=as_json,
            task=task,
            mixer=mixer,
            preset=preset,
            tokenizer=tokenizer,
            config=config,
        )
        return
    if task is not None or mixer is not None or (resume and _is_classifier(out)):
        strange = {"--valid": valid, "--preset": preset, "--tokenizer": tokenizer, "--config": config}
        strange |= {"--from": start, "--lora": lora}
        _classify(out, data or [], task, mixer, overrides or [], resume, as_json, [n for n in strange if strange[n]])
        return

    from dataclasses import replace

    from statescan.cli.models import model_folder
    from statescan.data import load_tokenizer
    from statescan.errors import ConfigError
    from statescan.models import preset as model_preset
    from statescan.recipes.finetuning import PASSES, STEPS, finetuning_run, within_passes
    from statescan.train import DataConfig, RunConfig, load_run
    from statescan.train import train as run_training

    if lora and start is None and not resume:
        raise ConfigError(f"train: --lora {lora} wants --from MODEL, got none; name the model to go on from")
    if start is not None and config is not None:
        raise ConfigError("train: --from and --config exclude each other, got both; set train.weights in the config")
    if config is not None:
        # Also with --resume, where the line that started a run is given again: train refuses what may not change.
        run, origin = RunConfig.from_json(config), str(config)
    elif resume:
        run, origin = load_run(out), str(out)
    elif start is not None and data:
        folder = model_folder(start)
        run, origin = finetuning_run(folder, data, lora=lora, tokenizer=tokenizer, steps=STEPS), str(start)
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
    if start is not None and not resume and not any(one.strip().startswith("train.steps") for one in overrides or []):
        # By the size of an update that was asked for.
        run = within_passes(run)
        note(f"{run.train.steps:,} updates; {PASSES} passes at most, --set train.steps=N for more")
    if lora and lora != run.train.lora:
        raise ConfigError(
            f"train: wanted --lora {run.train.lora}, which the run has, got {lora}; leave it out, or start a new run"
        )
    if origin is not None:
        _check_agrees(run, origin, preset, tokenizer, overrides or [])

    result = run_training(run, out, resume=resume)
    if not result.first_process:
        # Of several processes one reports.
        raise typer.Exit(INTERRUPTED if result.signalled else 0)

    held_out = result.evaluations[-1][1] if result.evaluations else None
    after = [(step, bits) for step, bits in result.evaluations if step]
    best = min(after, key=lambda one: one[1], default=None)
    if as_json:
        emit_json(
            {
                "out": result.out,
                "steps": result.steps,
                "train_loss": result.train_loss,
                "bits_per_byte": held_out,
                "evaluations": [{"step": step, "bits_per_byte": bits} for step, bits in result.evaluations],
                "tokens_per_second": result.tokens_per_second,
                "model_flop_utilization": result.utilization,
                "interrupted": result.interrupted,
            }
        )
    else:
        used = "" if result.utilization is None else f", {100 * result.utilization:.1f} % of the peak"
        print_rows(
            ("run", str(result.out)),
            ("steps", f"{result.steps:,} of {run.train.steps:,}"),
            ("training loss", f"{result.train_loss:.4f} nats per token"),
            ("held out", "not judged" if held_out is None else f"{held_out:.4f} bits per byte"),
            ("speed", f"{result.tokens_per_second:,.0f} tokens/s{used}"),
        )
    if result.signalled:
        raise typer.Exit(INTERRUPTED)
    model = out
    if best is not None and best[1] < after[-1][1] and (out / "best" / "config.json").exists():
        model = out / "best"
        note(f"held out it was best at step {best[0]:,}, {best[1]:.4f} bits per byte: '{model}' holds that model")
    if best is not None and run.train.weights and len(after) < len(result.evaluations):
        began = result.evaluations[0][1]
        if best[1] >= began:
            note(
                f"warning: '{run.train.weights}', where it began, is better on the held-out text: {began:.4f} bits per "
                f"byte; this text is too short or too plain for so many updates: take more text, fewer updates (--set "
                "train.steps) or a lower rate (--set train.lr)"
            )
    note(f'next: statescan generate --model {shlex.quote(str(model))} --prompt "Call me" --max-new-tokens 200')


def _of_modality(modality: str) -> Callable[..., None]:
    from statescan.errors import ConfigError

    if modality not in _MODALITIES:
        known = ", ".join(["text", *_MODALITIES])
        raise ConfigError(f"train: --modality must be one of {known}, got '{modality}'")
    return _MODALITIES[modality]


# What is no text is trained in a module of its own (cli/dna.py, cli/audio.py), which gets every option of the line.
_MODALITIES: dict[str, Callable[..., None]] = {"dna": train_dna, "audio": train_audio}


def _is_classifier(out: Path) -> bool:
    from statescan.errors import CheckpointError
    from statescan.recipes.sequence_classification import load_classification

    try:
        load_classification(out)
    except CheckpointError:
        return False
    return True


def _classify(
    out: Path,
    data: list[str],
    task: str | None,
    mixer: str | None,
    overrides: list[str],
    resume: bool,
    as_json: bool,
    strange: list[str],
) -> None:
    from dataclasses import replace

    from statescan.errors import ConfigError
    from statescan.recipes.sequence_classification import classification, load_classification, run_classification
    from statescan.train.config import apply_overrides

    if strange:
        raise ConfigError(f"train: {strange[0]} is for texts, wanted none with --task; leave it out")
    if len(data) > 1:
        raise ConfigError(f"train: --task takes one --data, got {len(data)}; name the file or folder of its data")
    if resume:
        run = load_classification(out)
        for name, wanted, got in (("--task", run.task, task), ("--mixer", run.model.mixer, mixer)):
            if got is not None and got != wanted:
                raise ConfigError(
                    f"train: wanted {name} {wanted}, which the run in '{out}' has, got {got}; leave it out, or start a "
                    "new run without --resume"
                )
        run = apply_overrides(replace(run, data=data[0]) if data else run, overrides)
    elif task is None:
        raise ConfigError("train: --mixer wanted a --task, got none; name one: smnist, psmnist or listops")
    else:
        run = classification(task, mixer or "s4", data=data[0] if data else "", overrides=overrides)
    result = run_classification(run, out, resume=resume)

    if as_json:
        emit_json(
            {
                "out": result.out,
                "task": run.task,
                "mixer": run.model.mixer,
                "steps": result.steps,
                "epochs": result.epochs,
                "validation": [{"epoch": epoch, "accuracy": accuracy} for epoch, accuracy in result.evaluations],
                "test_final": result.final and result.final._asdict(),
                "test_best": result.best and {"epoch": result.best_epoch, **result.best._asdict()},
                "seconds": result.seconds,
                "interrupted": result.interrupted,
            }
        )
    else:
        valid = f"{100 * result.evaluations[-1][1]:.2f} % right" if result.evaluations else "not judged"
        print_rows(
            ("run", str(result.out)),
            ("steps", f"{result.steps:,}, {result.epochs} of {run.train.epochs} epochs"),
            ("validation", valid),
            ("test, last epoch", _percent(result.final)),
            ("test, best epoch", f"{_percent(result.best)} (epoch {result.best_epoch}, chosen by validation)"),
            ("time", f"{result.seconds:,.0f} s"),
        )
    if result.signalled:
        raise typer.Exit(INTERRUPTED)


def _percent(judged: Judgement | None) -> str:
    return "not judged" if judged is None else f"{100 * judged.accuracy:.2f} % right"


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
            wanted, got = getattr(run.model, entry.name), getattr(named.model, entry.name, "none such")
            if entry.name != "recompute" and wanted != got:
                raise ConfigError(
                    f"train: wanted a --preset with {entry.name} = {wanted}, which the run in '{origin}' has, "
                    f"got '{preset}' with {got}; {cure}"
                )
