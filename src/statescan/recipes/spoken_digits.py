"""Spoken digits told apart from raw samples: the Free Spoken Digit Dataset, S4 and Mamba beside a CNN and an LSTM."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from statescan.data.audio import LEVELS
from statescan.data.augment import VaryWaveforms
from statescan.data.recordings import SILENCE, Recordings, labelled_recordings, read_recordings, refuse_repeats
from statescan.errors import ConfigError, DataError, MissingExtraError
from statescan.files import make_folder, write_text
from statescan.models import ClassifierConfig
from statescan.recipes.synthetic import figure, interval, percent, save_figure
from statescan.train.classify import ClassifyConfig, Splits, train_classifier
from statescan.train.config import apply_overrides
from statescan.train.finished import run_status
from statescan.train.loop import RUN_FILE

__all__ = [
    "LONGEST",
    "ROWS",
    "SPEAKERS",
    "DigitRun",
    "digit_parts",
    "digit_run",
    "digit_splits",
    "read_digits",
    "report",
    "speaker_and_take",
    "spoken_digits",
]

# Samples of a recording that a classifier reads: all of it in 97.6 % of them.
LONGEST = 6144
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
# The official test are the recordings with numbers below 5; these are held out of the rest for the curves.
_TEST, _VALID = range(5), range(5, 7)
_RATE = 8000


@dataclass(frozen=True)
class DigitRun:
    """A classifier and its schedule."""

    model: ClassifierConfig
    train: ClassifyConfig


ROWS: dict[str, str] = {
    "s4": "S4",
    "s4d": "S4D",
    "mamba": "Mamba",
    "conv": "dilated CNN",
    "lstm": "LSTM",
}
# A dilated CNN of ten layers of width 3 sees 2,047 samples, a quarter of a second.
_MODEL: dict[str, dict[str, Any]] = {
    "s4": {"d_state": 64},
    "s4d": {"d_state": 64},
    "mamba": {"d_state": 16},
    "conv": {"n_layer": 10, "d_model": 96},
    "lstm": {"n_layer": 2, "d_model": 192},
}
_TRAIN: dict[str, dict[str, Any]] = {
    "s4": {"lr": 4e-3},
    "s4d": {"lr": 4e-3},
    # Serial: few long steps, and cuDNN's own loops in place of one graph.
    "lstm": {"batch_size": 256, "precision": "float32", "capture": False, "epochs": 30, "warmup": 30},
}


def digit_run(row: str, overrides: Sequence[str] = (), *, frame: int = 1) -> DigitRun:
    """The model and schedule of a row of the table.

    Args:
        row: one of `ROWS`.
        overrides: "model.d_model=64", "train.epochs=5", ...
        frame: raw samples that are read at each position.

    Raises:
        ConfigError: an unknown row or field, or a frame that is none.
    """
    if row not in ROWS:
        raise ConfigError(f"spoken digits: the row must be one of {', '.join(ROWS)}, got {row!r}")
    if frame < 1 or LONGEST % frame:
        raise ConfigError(f"spoken digits: the frame must divide {LONGEST} samples, got {frame}; 16 is 2 ms")
    model = {"classes": 10, "d_input": frame, "mixer": row, "d_model": 128, "n_layer": 4, "dropout": 0.1, **_MODEL[row]}
    train = {"epochs": 40, "batch_size": 64, "lr": 2e-3, "warmup": 100, "precision": "bf16", "multiple": 2048}
    train |= _TRAIN.get(row, {})

    return apply_overrides(DigitRun(ClassifierConfig(**model), ClassifyConfig(**train)), overrides)


def read_digits(data: str | os.PathLike[str], *, progress: Callable[[int, int], object] | None = None) -> Recordings:
    """The recordings, at 8 kHz, each scaled to a loudest sample of 1, in 256 mu-law levels; labels 0 to 9.

    Args:
        data: the folder of wav files named ``digit_speaker_take.wav``; or the .npz file that `Recordings.save` wrote.
        progress: called with (files done, files).

    Raises:
        DataError: the folder can't be read, a name is not of that form, a name or a recording comes twice, or a file
            holds other recordings than such: of another rate, quantisation or scale, with labels that are not those of
            their names.
    """
    recordings = read_recordings([data], sample_rate=_RATE, labels="name", normalize=True, progress=progress)
    if recordings.classes != tuple("0123456789"):
        raise DataError(
            f"spoken digits: '{data}' must hold recordings of 0 to 9 named digit_speaker_take.wav, got labels "
            f"{', '.join(recordings.classes[:12]) or 'none'}"
        )
    for name in recordings.names:
        speaker_and_take(name)
    if len(set(recordings.names)) < len(recordings):
        raise DataError(f"spoken digits: '{data}' must hold each recording once, got a name twice; leave copies out")
    refuse_repeats((recordings,))
    # What a folder gives of itself, a file might not hold.
    lack, labels = "", recordings.labels
    low, high = (part.reduceat(recordings.codes, recordings.offsets[:-1]) for part in (np.minimum, np.maximum))
    if labels is None or [str(label) for label in labels] != [name[:1] for name in recordings.names]:
        lack = "the labels that its names tell"
    elif recordings.quantization != "mu-law":
        lack = "mu-law's levels"
    elif ((low > 0) & (high < LEVELS - 1) & ((low < SILENCE) | (high > SILENCE))).any():
        lack = "recordings scaled to a loudest sample of 1"
    if lack:
        raise DataError(
            f"spoken digits: '{data}' must hold {lack}, got others; write it anew with --keep of statescan reproduce "
            "spoken-digits"
        )
    return recordings


def speaker_and_take(name: str) -> tuple[str, int]:
    """What ``7_jackson_32.wav`` says: the speaker, and the number of the recording."""
    parts = name.rsplit(".", 1)[0].split("_")
    if len(parts) != 3 or not parts[2].isdecimal():
        raise DataError(f"spoken digits: names must be digit_speaker_take.wav, got '{name}'")
    return parts[1], int(parts[2])


def digit_parts(recordings: Recordings, split: str) -> tuple[Recordings, Recordings, Recordings]:
    """Recordings to learn from, to watch the learning by, and to judge.

    Args:
        recordings: from `read_digits`.
        split: "official", test are the recordings with numbers below 5; or a speaker's name, test are all of that
            speaker's. Of the others numbers 5 and 6 (0 and 1 with a speaker) are held out for validation.

    Raises:
        ConfigError: no such split.
    """
    known = [speaker_and_take(name) for name in recordings.names]
    speakers = {speaker for speaker, _ in known}
    if split == "official":
        test = np.array([take in _TEST for _, take in known])
        valid = np.array([take in _VALID for _, take in known])
    elif split in speakers:
        test = np.array([speaker == split for speaker, _ in known])
        valid = np.array([take < len(_VALID) for _, take in known]) & ~test
    else:
        raise ConfigError(f"spoken digits: the split must be official or one of {sorted(speakers)}, got {split!r}")
    return tuple(  # pyright: ignore[reportReturnType]
        recordings.take(np.flatnonzero(rows)) for rows in (~test & ~valid, valid, test)
    )


def digit_splits(recordings: Recordings, split: str, vary: VaryWaveforms | None, frame: int = 1) -> Splits:
    """The parts of `digit_parts` as a classifier takes them; `vary` is for those that it learns from."""
    train, valid, test = (labelled_recordings(part, LONGEST, frame) for part in digit_parts(recordings, split))
    # All are read on the scale of those that are learnt from.
    scale = {"mean": train.mean, "deviation": train.deviation}
    return Splits(replace(train, vary=vary), replace(valid, **scale), replace(test, **scale))


def spoken_digits(
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    rows: Sequence[str] = ("s4",),
    splits: Sequence[str] = ("official",),
    vary: VaryWaveforms | None = None,
    frame: int = 1,
    overrides: Sequence[str] = (),
    seconds: float | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains and judges each row on each split; goes on with what an earlier call left unfinished.

    Args:
        out: folder of the runs, ``row-split`` (with ``-frame16`` and the like), and of results.json, results.md and,
            where matplotlib is installed, figure.svg.
        data: see `read_digits`.
        rows: of `ROWS`.
        splits: see `digit_parts`; "speakers" for all six, one after the other held out.
        vary: how recordings are varied in training. Default: `VaryWaveforms()`.
        frame: raw samples that are read at each position; 16 makes sequences of some 220 positions, for a CPU.
        overrides: of the models and schedules, see `digit_run`.
        seconds: leave off training after so many.
        say: called with lines of progress.

    Returns:
        What results.json holds.

    Raises:
        ConfigError, DataError: an unknown row or split, data that can't be read.
        CheckpointError: a folder holds a run with other settings, or of other recordings.
        KeyboardInterrupt: interrupted; what was trained is kept.
    """
    out, begun = make_folder(out), time.perf_counter()
    recordings = read_digits(data)
    vary = VaryWaveforms() if vary is None else vary
    asked = [one for split in splits for one in (SPEAKERS if split == "speakers" else (split,))]
    for split in asked:
        parts = digit_splits(recordings, split, vary, frame)
        for row in rows:
            run = digit_run(row, overrides, frame=frame)
            folder = out / (f"{row}-{split}" if frame == 1 else f"{row}-{split}-frame{frame}")
            facts = {"task": "spoken-digits", "row": row, "split": split, "frame": frame, "vary": asdict(vary)}
            digests = {name: {"digest": part.digest} for name, part in zip(Splits._fields, parts, strict=True)}
            status = run_status(folder, {"model": run.model, "train": run.train}, facts | digests)
            if status == "finished":
                continue
            left = None if seconds is None else seconds - (time.perf_counter() - begun)
            if left is not None and left <= 0:
                say(f"{folder.name}: no time left, not begun")
                continue
            result = train_classifier(
                run.model,
                run.train,
                parts,
                folder,
                resume=status is not None,
                seconds=left,
                facts=facts,
            )
            judged = "interrupted" if result.final is None else f"{percent(result.final.accuracy)} % of the test right"
            say(f"{folder.name}: {result.epochs} epochs, {result.seconds:.0f} s, {judged}")
            report(out)
            if result.signalled:
                raise KeyboardInterrupt
    return report(out)


def report(out: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes results.json, results.md and figure.svg from the runs in a folder, and gives what results.json holds."""
    out = Path(out)
    runs = []
    for path in sorted(out.glob(f"*/{RUN_FILE}")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.get("data", {}).get("task") != "spoken-digits":
            continue
        runs.append(
            {
                "row": facts["data"]["row"],
                "split": facts["data"]["split"],
                "frame": facts["config"]["model"]["d_input"],
                "status": facts["status"],
                "parameters": facts["parameters"],
                "epochs": len(facts["evaluations"]),
                "steps": facts["steps"],
                "seconds": facts["seconds"],
                "device": facts["device"],
                "examples": {name: facts["data"][name]["examples"] for name in Splits._fields},
                "validation": [accuracy for _, accuracy in facts["evaluations"]],
                "test": facts.get("test"),
                "config": facts["config"],
                "vary": facts["data"]["vary"],
            }
        )
    order = list(ROWS)
    runs.sort(key=lambda run: (run["frame"], run["split"] != "official", order.index(run["row"]), run["split"]))
    results = {"recipe": "spoken-digits", "runs": runs}
    for name, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("results.md", table(runs))):
        write_text(out / name, text)
    with contextlib.suppress(MissingExtraError):
        draw(runs, out / "figure.svg")
    return results


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs as Markdown."""
    lines = [
        "# Spoken digits from raw samples",
        "",
        "Accuracy on the test in per cent, with the weights of the last epoch, and with those that the validation "
        "split chose; the interval is Wilson's, 95 %, over the test's recordings. Chance is 10. The rows differ in "
        "size, and in how many updates of how many recordings each is trained for: the LSTM has the fewest.",
        "",
        "| model | samples a position | test | last epoch | interval | chosen epoch | parameters | epochs | updates | "
        "minutes | device |",
        "|---" * 11 + "|",
    ]
    for run in runs:
        what = "official" if run["split"] == "official" else f"speaker {run['split']}"
        begin, test = f"| {ROWS[run['row']]} | {run['frame']} | {what} |", run["test"]
        updates = f"{run['steps']:,} of {run['config']['train']['batch_size']}"
        end = f"{run['parameters']:,} | {run['epochs']} | {updates} | {run['seconds'] / 60:.1f} | {run['device']} |"
        if test is None:
            lines.append(f"{begin} {run['status']} | | | {end}")
            continue
        count = run["examples"]["test"]
        right = round(test["final"]["accuracy"] * count)
        lines.append(
            f"{begin} **{percent(test['final']['accuracy'])}** | {' to '.join(interval(right, count))} | "
            f"{percent(test['best']['accuracy'])} | {end}"
        )
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The validation accuracy over the epochs of each row on the official split.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    made, axes = figure(7.0, 4.0)
    for run in runs:
        if run["split"] == "official" and run["validation"]:
            curve = [100 * (1 - accuracy) for accuracy in run["validation"]]
            title = ROWS[run["row"]] + ("" if run["frame"] == 1 else f", {run['frame']} samples a position")
            axes.plot(range(1, len(curve) + 1), curve, label=title, linewidth=1.4)
    axes.set(xlabel="epoch", ylabel="wrong of the validation recordings, %", yscale="symlog", ylim=(0, 100))
    if axes.lines:
        axes.legend(fontsize=8, frameon=False)
    save_figure(made, path)
