"""Sound on the command line: ``train --modality audio``, ``generate --seconds``, ``spectrogram``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statescan.cli.models import BUILTIN_MODEL
from statescan.cli.terminal import INTERRUPTED, command, emit_json, note, print_rows, progress

if TYPE_CHECKING:
    from statescan.train.waveform import AudioRun

__all__ = ["generate_audio", "spectrogram", "train_audio"]

# A model that learns something in minutes on two cores.
_SMALL: dict[str, Any] = {"stages": ("s4", "s4", "mamba"), "d_model": 32, "n_layer": 2}


def train_audio(
    out: Path,
    *,
    data: list[str],
    valid: list[str],
    overrides: list[str],
    resume: bool,
    as_json: bool,
    **strange: Any,
) -> None:
    """Trains a waveform model on sound files; the options are those of ``statescan train``."""
    from dataclasses import replace

    from statescan.errors import ConfigError
    from statescan.models.waveform import WaveformConfig
    from statescan.train.config import apply_overrides
    from statescan.train.waveform import AudioData, AudioRun, WaveformTraining, load_audio_run, run_audio

    given = [f"--{name}" for name, value in strange.items() if value is not None]
    if given:
        raise ConfigError(f"train: {given[0]} has no use with --modality audio; leave it out")
    run: AudioRun
    if resume:
        run = load_audio_run(out)
    else:
        run = AudioRun(WaveformConfig(**_SMALL), AudioData(), WaveformTraining(steps=1000, batch_size=8))
    if data or valid:
        paths = {"paths": tuple(data or run.data.paths), "valid_paths": tuple(valid or run.data.valid_paths)}
        run = replace(run, data=replace(run.data, **paths))
    run = apply_overrides(run, overrides)
    result = run_audio(run, out, resume=resume, say=note)

    held_out = result.evaluations[-1].bits if result.evaluations else None
    if as_json:
        emit_json(
            {
                "out": result.out,
                "steps": result.steps,
                "train_bits_per_sample": result.train_bits,
                "bits_per_sample": held_out,
                "evaluations": [entry._asdict() for entry in result.evaluations],
                "samples_per_second": result.samples_per_second,
                "peak_bytes": result.peak_bytes,
                "seconds": result.seconds,
                "interrupted": result.interrupted,
            }
        )
    else:
        print_rows(
            ("run", str(result.out)),
            ("steps", f"{result.steps:,} of {run.train.steps:,}"),
            ("training", f"{result.train_bits:.3f} bits per sample"),
            ("held out", "not judged" if held_out is None else f"{held_out:.3f} bits per sample"),
            ("speed", f"{result.samples_per_second:,.0f} samples/s"),
            ("time", f"{result.seconds:,.0f} s"),
        )
    if result.signalled:
        raise typer.Exit(INTERRUPTED)
    note(f"next: statescan generate --model {shlex.quote(str(out))} --seconds 2 -o out.wav")


def generate_audio(
    model: Path,
    out: Path | None,
    *,
    seconds: float | None,
    label: str | None,
    temperature: float,
    seed: int | None,
    device: str,
    picture: Path | None,
    as_json: bool,
    prompt: list[str] | None,
) -> None:
    """Makes sound with a waveform model; the options are those of ``statescan generate``."""
    import secrets
    import time

    from statescan.data.audio import dequantize, write_audio
    from statescan.errors import ConfigError
    from statescan.files import want_folder
    from statescan.generate.waveform import generate_waveforms
    from statescan.inspect.spectrogram import draw_spectrograms, want_png
    from statescan.models.waveform import WaveformModel

    if model == BUILTIN_MODEL and not model.exists():
        raise ConfigError(
            "generate: sound wanted a model of it, named with --model, got none (the packaged one writes text); train "
            "one with statescan train --modality audio --data FOLDER --out RUN"
        )
    if prompt:
        raise ConfigError("generate: --prompt is for texts, wanted none with --seconds or -o; leave it out")
    if out is None or seconds is None:
        lack = "-o FILE.wav" if out is None else "--seconds"
        raise ConfigError(f"generate: sound wanted --seconds and -o FILE.wav, got no {lack}; name both")
    for path in (out, picture):
        if path is not None:
            want_folder(path)
    if out.suffix.lower() not in (".wav", ".flac"):
        raise ConfigError(f"generate: -o must end in .wav or .flac for sound, got '{out}'")
    if picture is not None:
        want_png(picture)
    waveform = WaveformModel.from_pretrained(model, device=device).eval()
    config = waveform.config
    samples = round(seconds * config.sample_rate)
    if samples < 1:
        raise ConfigError(f"generate: --seconds must be a sample at least, at {config.sample_rate} Hz, got {seconds}")
    names = _class_names(model, config.classes)
    if (label is None) != (not names):
        wanted = f"one of {', '.join(names)}, as the model was trained" if names else "none: the model has no labels"
        raise ConfigError(f"generate: --label must be {wanted}, got {label}")
    if label is not None and label not in names:
        raise ConfigError(f"generate: --label must be one of {', '.join(names)}, got '{label}'")
    seed = secrets.randbelow(2**31) if seed is None else seed
    begun = time.perf_counter()
    with progress("generating", unit="samples") as bar:
        codes = generate_waveforms(
            waveform,
            samples,
            labels=None if label is None else [names.index(label)],
            temperature=temperature,
            seed=seed,
            progress=bar,
        )
    taken = time.perf_counter() - begun
    sound = dequantize(codes[0], config.quantization)
    write_audio(out, sound, config.sample_rate)
    if picture is not None:
        draw_spectrograms(picture, [(f"{out.name}, seed {seed}", sound, config.sample_rate)])
    if as_json:
        emit_json(
            {
                "out": out,
                "samples": samples,
                "sample_rate": config.sample_rate,
                "label": label,
                "seed": seed,
                "seconds": taken,
                "spectrogram": picture,
            }
        )
    else:
        print(f"wrote {out}" + ("" if picture is None else f"\nwrote {picture}"))
    note(f"{samples:,} samples in {taken:.1f} s, {samples / taken:,.0f} samples/s, seed {seed}")


def _class_names(model: Path, classes: int) -> list[str]:
    """The labels' names, from the run that trained the model; numbers where it tells none."""
    from statescan.train.waveform import BEST

    run = model.parent if model.name == BEST else model
    try:
        names = json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    return names if len(names) == classes else list(map(str, range(classes)))


@command
def spectrogram(
    sounds: Annotated[list[Path], typer.Argument(help="Sound files, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG.")],
    columns: Annotated[int, typer.Option("--columns", min=1, help="Pictures in a row.")] = 1,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="Of each sound, at most: what comes after is not drawn.")
    ] = 10.0,
    window: Annotated[int, typer.Option("--window", min=2, help="Samples of a window.")] = 256,
) -> None:
    """Draws sounds as spectrograms on one scale: real and generated side by side."""
    from statescan.data.audio import audio_facts, find_audio, read_audio
    from statescan.files import want_folder
    from statescan.inspect.spectrogram import draw_spectrograms, want_png

    want_folder(out)
    want_png(out)
    found = []
    for path in find_audio(sounds):
        facts = audio_facts(path)
        frames = max(1, min(facts.frames, round(seconds * facts.sample_rate)))
        found.append((path.name, read_audio(path, frames=frames).samples, facts.sample_rate))
    draw_spectrograms(out, found, columns=columns, window=window, hop=max(1, window // 4))
    print(f"wrote {out}")
