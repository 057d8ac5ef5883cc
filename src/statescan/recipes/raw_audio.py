"""Raw sound foretold sample by sample: which stages of the SaShiMi backbone want a fixed A, and which want selection.

And spoken digits made by label, judged by the classifier of `statescan.recipes.spoken_digits`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from statescan.data.audio import quantize, write_audio
from statescan.data.recordings import Recordings, labelled_recordings, load_recordings, read_recordings, trim_silence
from statescan.errors import CheckpointError, ConfigError, MissingExtraError
from statescan.evaluate.waveforms import bits_per_sample, paired_difference, sound_scores
from statescan.files import make_folder, write_json, write_text
from statescan.generate.waveform import generate_waveforms
from statescan.inspect.spectrogram import draw_spectrograms
from statescan.models import SequenceClassifier
from statescan.models.waveform import WaveformConfig, WaveformModel
from statescan.recipes import spoken_digits
from statescan.recipes.spoken_digits import SPEAKERS, digit_parts, digit_splits, read_digits
from statescan.recipes.synthetic import figure, save_figure
from statescan.train.classify import Splits
from statescan.train.config import apply_overrides
from statescan.train.finished import check_same, run_status, weights_digest
from statescan.train.loop import RUN_FILE
from statescan.train.waveform import BEST, WaveformTraining, train_waveform

__all__ = [
    "CONTEXTS",
    "MUSIC_CONTEXTS",
    "ROWS",
    "TASKS",
    "Row",
    "WaveformRun",
    "judge_digits",
    "judge_sounds",
    "make_digits",
    "music_parts",
    "raw_audio",
    "report",
    "waveform_run",
    "write_sounds",
]

# Samples of a made digit; 97.6 % of the recordings are no longer.
LONGEST = 6144
# Where the ranges of context begin by which the held-out recordings are judged: samples before the judged one.
# Of the digits' official test 75 of the 300 recordings reach 4,096, and two 8,192, which tell nothing.
CONTEXTS = (16, 64, 256, 1024, 4096)
MUSIC_CONTEXTS = (64, 1024, 4096, 16_384, 65_536)
TASKS = ("digits", "music")
_SCORES = "scores.json"
# Recordings that were learnt from, or pieces of them, that are judged beside the test.
_LEARNT = 300
# The row from which the table tells the others' differences.
_REFERENCE = "s4-s4"
# Of each track of music, as shares of it: where what is held out to watch begins, where the test does, and where that
# ends. The middle, since tracks fade at their ends. Runs are marked with it; those judged at the ends, as in an earlier
# version, have no mark.
_MIDDLE = (0.45, 0.5, 0.55)
# A tenth of a second of digital silence ends a sound.
_REST = 800


@dataclass(frozen=True)
class Row:
    """A row of the table: its title, what differs in the model, and in the training."""

    title: str
    model: Mapping[str, Any]
    train: Mapping[str, Any]
    paper: str = ""


# The paper's table 5 has the outer stages before the centre; the rows here have 1.84 to 2.11 million parameters.
ROWS: dict[str, Row] = {
    "s4-mamba": Row("S4 outside, Mamba in the centre", {"stages": ("s4", "s4", "mamba")}, {}, "1.859"),
    "s4-s4": Row("S4 everywhere (SaShiMi)", {"stages": ("s4", "s4", "s4")}, {}, "1.867"),
    "mamba-mamba": Row("Mamba everywhere", {"stages": ("mamba", "mamba", "mamba")}, {}, "1.852"),
    "mamba-s4": Row("Mamba outside, S4 in the centre", {"stages": ("mamba", "mamba", "s4")}, {}, "1.853"),
    "s4-complex": Row("S4 outside, Mamba with complex A in the centre", {"stages": ("s4", "s4", "mamba-complex")}, {}),
    "s4d-mamba": Row("S4D outside, Mamba in the centre", {"stages": ("s4d", "s4d", "mamba")}, {}),
    "s4-attention": Row("S4 outside, attention in the centre", {"stages": ("s4", "s4", "attention")}, {}, "1.859"),
    "conv": Row("dilated CNN (WaveNet's units)", {"stages": ("conv",), "d_model": 136, "n_layer": 20}, {}),
    # Serial, so on shorter windows, with as many samples an update, by cuDNN's own loops in place of one graph. It
    # learns no context beyond them: the table says so.
    "lstm": Row(
        "LSTM",
        {"stages": ("lstm",), "d_model": 312, "n_layer": 2},
        {"window": 1024, "batch_size": 64, "capture": False},
    ),
}
CONDITIONAL = "conditional"


@dataclass(frozen=True)
class WaveformRun:
    """A model of sound and its schedule."""

    model: WaveformConfig
    train: WaveformTraining


def waveform_run(row: str, overrides: Sequence[str] = (), *, task: str = "digits") -> WaveformRun:
    """The model and schedule of a row of the table, or of "conditional", the model that says digits by their label.

    Args:
        row: one of `ROWS`, or "conditional".
        overrides: "model.d_model=32", "train.steps=500", ...
        task: "digits", or "music": windows eight times as long, with as many samples an update.

    Raises:
        ConfigError: an unknown row, task or field.
    """
    if task not in TASKS or (task == "music" and row == CONDITIONAL):
        known = " or ".join(TASKS) if task not in TASKS else f"digits with the row {CONDITIONAL}"
        raise ConfigError(f"raw audio: the task must be {known}, got {task!r}")
    model: dict[str, Any] = {"n_layer": 2, "d_model": 64}
    train: dict[str, Any] = {"steps": 2000, "batch_size": 16, "window": 4096, "precision": "bf16", "lr": 2e-3}
    train |= {"evaluate_every": 0, "checkpoint_every": 500, "log_every": 20}
    if row == CONDITIONAL:
        model |= {"n_layer": 4, "classes": 10, "dropout": 0.1, "stages": ("mamba", "mamba", "mamba")}
        # Validation chooses the weights: how long the few recordings are worth hearing is not known beforehand. Played
        # as they are, they were learnt by heart after 6,500 updates.
        train |= {
            "steps": 12_000,
            "stretch": 0.125,
            "evaluate_every": 1000,
            "evaluate_windows": 0,
            "keep_best": True,
            "window": 5120,
        }
    elif row in ROWS:
        model |= ROWS[row].model
        train |= ROWS[row].train
    else:
        raise ConfigError(f"raw audio: the row must be one of {', '.join(ROWS)} or {CONDITIONAL}, got {row!r}")
    if task == "music":
        train |= {"window": 8 * train["window"], "batch_size": max(1, train["batch_size"] // 8)}
    return apply_overrides(WaveformRun(WaveformConfig(**model), WaveformTraining(**train)), overrides)


def music_parts(data: str | os.PathLike[str]) -> tuple[Recordings, Recordings, Recordings]:
    """Long recordings by time: of the middle of each one twentieth, before it, to watch, and one, behind it, to judge.

    What is on either side of the two is learnt from, each side a recording of its own, so that no window reaches into
    what is held out, nor over it.

    Args:
        data: a file or folder of sound files, which are brought to the first one's rate; or an .npz of `Recordings`.
    """
    recordings = dataclasses.replace(read_recordings([data]), labels=None, classes=())
    begin, middle, end = _MIDDLE
    return recordings.outside(begin, end), recordings.between(begin, middle), recordings.between(middle, end)


def raw_audio(
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    rows: Sequence[str] = ("s4-mamba", "s4-s4"),
    task: str = "digits",
    overrides: Sequence[str] = (),
    contexts: Sequence[int] | None = None,
    seconds: float | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains each row on spoken digits or music and judges it on what it has not heard, by the context it is given.

    Args:
        out: folder of the runs, of the names of the rows, and of results.json, results.md and figure.svg.
        data: see `statescan.recipes.spoken_digits.read_digits` (judged on the official test) and `music_parts`.
        rows: of `ROWS`, or "conditional" (digits alone).
        task: "digits" or "music".
        overrides: of the models and schedules, see `waveform_run`.
        contexts: the test is judged by the number of samples before the judged one; where the ranges of it begin.
            Recordings of digits are heard whole, those of music in pieces of twice the last context. Default:
            `CONTEXTS` or `MUSIC_CONTEXTS`.
        seconds: leave off training after so many; the same call goes on.
        say: called with lines of progress.

    Returns:
        What results.json holds.

    Raises:
        ConfigError, DataError: an unknown row, data that can't be read.
        CheckpointError: a folder holds a run with other settings, or of other recordings.
        KeyboardInterrupt: interrupted; what was trained is kept.
    """
    out, begun = make_folder(out), time.perf_counter()
    runs = {row: waveform_run(row, overrides, task=task) for row in rows}
    music = task == "music"
    contexts = tuple(sorted(set(contexts or (MUSIC_CONTEXTS if music else CONTEXTS))))
    learnt, valid, test = music_parts(data) if music else digit_parts(read_digits(data), "official")
    told: dict[str, Any] = {"task": task} | ({"middle": list(_MIDDLE)} if music else {})
    for row, run in runs.items():
        folder = out / row
        model = dataclasses.replace(run.model, sample_rate=learnt.sample_rate)
        parts = (learnt, valid)
        if row == CONDITIONAL:
            # The few that are longer end where a window does: a made digit starts where a recording does.
            parts = (learnt.cut(run.train.window), valid.cut(run.train.window))
        digests = {name: {"digest": part.digest} for name, part in zip(("train", "valid"), parts, strict=True)}
        status = run_status(folder, {"model": model, "train": run.train}, {**told, **digests})
        if status != "finished":
            left = None if seconds is None else seconds - (time.perf_counter() - begun)
            if left is not None and left <= 0:
                say(f"{row}: no time left, not begun")
                continue
            result = train_waveform(
                model,
                run.train,
                parts,
                folder,
                resume=status is not None,
                seconds=left,
                facts={"recipe": "raw-audio", "row": row, **told},
            )
            say(
                f"{row}: {result.steps:,} of {run.train.steps:,} steps, {result.train_bits:.3f} bits in training, "
                f"{result.samples_per_second:,.0f} samples/s, {result.peak_bytes / 2**30:.2f} GiB"
            )
            if result.signalled:
                raise KeyboardInterrupt
            if result.interrupted:
                continue
        _judge(row, run, folder, (learnt, test), contexts, music, say)
        report(out)
    return report(out)


def _judge(
    row: str,
    run: WaveformRun,
    folder: Path,
    parts: tuple[Recordings, Recordings],
    contexts: tuple[int, ...],
    music: bool,
    say: Callable[[str], object],
) -> None:
    """Leaves scores.json in a finished run's folder, where it does not hold those that are asked for."""
    learnt, test = (part.cut(run.train.window) for part in parts) if row == CONDITIONAL else parts
    path, weights = folder / _SCORES, _chosen(folder)
    asked = {
        "test": test.digest,
        "learnt": learnt.digest,
        "contexts": list(contexts),
        "weights": BEST if weights != folder else "last",
    }
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        if {name: held.get(name) for name in asked} == asked:
            return
    model = WaveformModel.from_pretrained(weights, device=_device())
    autocast = torch.bfloat16 if run.train.precision == "bf16" and _device() == "cuda" else None
    longest = 2 * contexts[-1] if music else None
    judged = bits_per_sample(model, test, longest=longest, contexts=contexts, autocast=autocast)
    known = bits_per_sample(model, learnt, longest=longest, limit=_LEARNT, autocast=autocast)
    say(f"{row}: {judged.bits:.4f} bits per sample of the test, {known.bits:.4f} of recordings that it learnt from")
    scores = {"all": {"bits": judged.bits, "samples": judged.samples}}
    scores |= {
        str(low): {"bits": bits, "samples": count, "recordings": pieces}
        for low, (bits, count, pieces) in judged.by_context.items()
    }
    held = {
        **asked,
        "scores": scores,
        "learnt_from": {"bits": known.bits, "samples": known.samples},
        # Of each recording of the test, in its order: what paired differences need.
        "each": [[round(bits, 3), int(count)] for bits, count in judged.each],
    }
    write_json(path, held, indent=None)


def _chosen(folder: Path) -> Path:
    """Where the weights are that count: those that validation chose, in a run that kept them, else the last."""
    return folder / BEST if (folder / BEST / "config.json").exists() else folder


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_digits(
    out: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    each: int = 50,
    temperature: float = 1.0,
    seed: int = 0,
    at_once: int = 500,
    say: Callable[[str], object] = print,
) -> Recordings:
    """Sounds that a conditioned model makes, `each` for each label, and keeps in a file; made once, and anew where the
    model, `each`, the temperature or the seed is another than that of the file (beside it, as .json).

    Args:
        out: the .npz file.
        model: folder of the model.
        each: sounds of each label.
        temperature, seed: as in `generate_waveforms`.
        at_once: rows that are drawn side by side.
        say: called with a line on the speed.

    Returns:
        The sounds, each as long as it lasts, scaled as the recordings are.

    Raises:
        CheckpointError: the folder is no model's.
        ConfigError: the model is not conditioned.
    """
    made = WaveformModel.from_pretrained(model, device=_device())
    of = {"model": weights_digest(model), "each": each, "temperature": temperature, "seed": seed, "samples": LONGEST}
    told = Path(out).with_suffix(".json")
    if Path(out).exists() and told.exists() and json.loads(told.read_text()) == of:
        return load_recordings(out)
    classes = made.config.classes
    if not classes:
        raise ConfigError(f"make digits: the model in '{model}' must be conditioned by labels, got one that is not")
    labels = np.repeat(np.arange(classes), each)
    begun = time.perf_counter()
    rows = [
        generate_waveforms(made, LONGEST, rows=len(part), labels=part, temperature=temperature, seed=seed + start)
        for start, part in ((start, labels[start : start + at_once]) for start in range(0, len(labels), at_once))
    ]
    seconds = time.perf_counter() - begun
    say(
        f"{len(labels)} sounds of {LONGEST:,} samples in {seconds:.1f} s, "
        f"{len(labels) * LONGEST / seconds:,.0f} samples a second"
    )
    sounds = Recordings(
        np.concatenate([row for part in rows for row in part]),
        np.arange(len(labels) + 1, dtype=np.int64) * LONGEST,
        tuple(f"{label}_made_{number % each}.wav" for number, label in enumerate(labels)),
        made.config.sample_rate,
        made.config.quantization,
        labels.astype(np.uint8),
        tuple(map(str, range(classes))),
    )
    sounds = _as_recorded(sounds)
    told.unlink(missing_ok=True)  # of no sounds, should this be broken off in between
    sounds.save(out)
    write_json(told, of)
    return sounds


def _as_recorded(sounds: Recordings) -> Recordings:
    """Each up to where it falls silent, and scaled to a loudest sample of 1, as the recordings are."""
    parts = []
    for number in range(len(sounds)):
        wave = sounds.waveform(number)[: trim_silence(sounds[number], _REST)]
        parts.append(quantize(wave / (np.abs(wave).max() or 1), sounds.quantization))
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return Recordings(
        np.concatenate(parts),
        offsets,
        sounds.names,
        sounds.sample_rate,
        sounds.quantization,
        sounds.labels,
        sounds.classes,
    )


@torch.no_grad()
def judge_sounds(sounds: Recordings, classifier: str | os.PathLike[str], recordings: Recordings) -> dict[str, Any]:
    """What the digit classifier says of made sounds, and of real ones beside them.

    Args:
        sounds: from `make_digits`.
        classifier: folder of a run of `spoken_digits` on the official split.
        recordings: from `read_digits`; those that the classifier was trained and judged on.

    Returns:
        "made", "test", "train": `SoundScores` each as a dictionary, the Fréchet distance to the training recordings;
        "each": the part recognised of each label; "confused": (labels, labels) counts, asked for by heard; "early":
        made sounds that are shorter than every recording that was learnt from, and how many of them are recognised;
        "endless": the same of those that did not fall silent.

    Raises:
        CheckpointError: no classifier of spoken digits, one of another split, or one that learnt from other recordings.
    """
    _check_classifier(classifier, recordings)
    model = SequenceClassifier.from_pretrained(classifier).to(_device()).eval()
    learnt, _, test = digit_parts(recordings, "official")
    scale = labelled_recordings(learnt, spoken_digits.LONGEST)
    read = {name: _read(model, part, scale.mean, scale.deviation) for name, part in
            (("train", learnt), ("test", test), ("made", sounds))}  # fmt: skip
    real, labels = read["train"][1], scale.labels
    parts = {"train": learnt, "test": test, "made": sounds}
    result: dict[str, Any] = {
        name: sound_scores(*read[name], real, labels, part.labels)._asdict() for name, part in parts.items()
    }
    assert sounds.labels is not None
    confused, heard = np.zeros((len(sounds.classes), model.config.classes), int), read["made"][0].argmax(1)
    np.add.at(confused, (sounds.labels, heard), 1)
    for name, those in (("early", sounds.lengths < learnt.lengths.min()), ("endless", sounds.lengths >= LONGEST)):
        result[name] = {"sounds": int(those.sum()), "recognised": int((heard == sounds.labels)[those].sum())}
    result["each"] = [float(row[label] / max(1, row.sum())) for label, row in enumerate(confused)]
    result["confused"] = confused.tolist()
    result["seconds"] = {name: float(part.lengths.mean() / part.sample_rate) for name, part in parts.items()}
    return result


def _check_classifier(folder: str | os.PathLike[str], recordings: Recordings) -> None:
    """Refuses a classifier that may have learnt from the test."""
    run_status(folder)
    path = Path(folder) / RUN_FILE
    facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"data": {}}
    if facts["data"].get("task") != "spoken-digits":
        raise CheckpointError(
            f"judge sounds: '{folder}' must hold a run of reproduce spoken-digits; train one with --split official"
        )
    parts = digit_splits(recordings, "official", None, facts["data"]["frame"])
    digests = {name: {"digest": part.digest} for name, part in zip(Splits._fields, parts, strict=True)}
    check_same(path, facts["data"], {"split": "official", **digests}, "data")


def _read(
    model: SequenceClassifier, part: Recordings, mean: float, deviation: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(logits, features) of each recording, as the classifier reads it."""
    frame = model.config.d_input
    rows, device = labelled_recordings(part, spoken_digits.LONGEST, frame), model.head.weight.device
    assert rows.lengths is not None
    order = np.argsort(rows.lengths, kind="stable")
    logits = np.empty((len(rows), model.config.classes), np.float32)
    features = np.empty((len(rows), model.config.d_model), np.float32)
    for start in range(0, len(order), 250):
        chosen = order[start : start + 250]
        length = -(-int(rows.lengths[chosen].max()) // frame) * frame
        inputs = torch.from_numpy(rows.values[chosen, :length]).to(device)
        mask = torch.arange(0, length, frame, device=device) < torch.from_numpy(rows.lengths[chosen]).to(
            device
        ).unsqueeze(1)
        known = model.features(((inputs.float() / 255 - mean) / deviation).unflatten(1, (-1, frame)), mask=mask)
        features[chosen] = known.float().cpu().numpy()
        logits[chosen] = model.head(known).float().cpu().numpy()
    return logits, features


def report(out: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes results.json, results.md and figure.svg from the runs in a folder, and gives what results.json holds.

    Runs on music that an earlier version judged at the tracks' ends are named there, and left out.
    """
    out, runs, at_ends = Path(out), [], []
    for path in sorted(out.glob(f"*/{RUN_FILE}")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.get("data", {}).get("recipe") != "raw-audio":
            continue
        if facts["data"].get("task") == "music" and facts["data"].get("middle") != list(_MIDDLE):
            at_ends.append(facts["data"]["row"])
            continue
        kept = path.parent / _SCORES
        held = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        # A file of an older form holds none of these.
        held = {name: held.get(name) for name in ("test", "weights", "scores", "learnt_from", "each")}
        runs.append(
            {
                "row": facts["data"]["row"],
                "task": facts["data"].get("task", "digits"),
                **{
                    name: facts.get(name)
                    for name in ("status", "parameters", "steps", "seconds", "device", "train_bits")
                },
                **{name: facts.get(name) for name in ("samples_per_second", "peak_bytes")},
                "valid": facts["evaluations"],
                **held,
                "scores": held["scores"] or {},
                "config": facts["config"],
            }
        )
    order = [*ROWS, CONDITIONAL]
    runs.sort(key=lambda run: order.index(run["row"]))
    _add_differences(runs)
    results: dict[str, Any] = {"recipe": "raw-audio", "runs": runs, "judged_at_ends": at_ends}
    judged = out / "judged.json"
    if judged.exists():
        results["judged"] = json.loads(judged.read_text(encoding="utf-8"))
    for name, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("results.md", table(results))):
        write_text(out / name, text)
    with contextlib.suppress(MissingExtraError):
        draw(runs, out / "figure.svg")
    return results


def _add_differences(runs: Sequence[dict[str, Any]]) -> None:
    """To each run that was judged on the same recordings as the reference: how far it is from it, and the error."""
    against = next((run for run in runs if run["row"] == _REFERENCE and run["each"]), None)
    for run in runs:
        run["difference"] = None
        if against and run is not against and run["each"] and run["test"] == against["test"] and len(run["each"]) > 1:
            bits, error = paired_difference(np.array(run["each"]), np.array(against["each"]))
            run["difference"] = {"from": _REFERENCE, "bits": bits, "standard_error": error}


def _title(row: str) -> str:
    return "conditioned by the digit, Mamba everywhere" if row == CONDITIONAL else ROWS[row].title


_DIGITS = (
    "Bits per sample of the spoken digits' official test (8 kHz, 256 mu-law levels, each recording scaled to a loudest "
    "sample of 1), each recording heard from its beginning on; silence behind it is not judged. By columns: of the "
    "samples with so many before them, up to the next column's number. What is said there differs too (a word's onset "
    "comes early), so compare rows within a column. The paper's numbers are nats per sample on SC09 (16 kHz, other "
    "data): for the order, not for the size."
)
_HEAD = (
    "One seed a row. The difference from S4 everywhere is paired by the test's recordings, with 1.96 standard errors "
    "over them: what another seed would give is not in it. `learnt` is the same measure on recordings that were learnt "
    "from{learnt}. Where validation chose the weights, the update stands behind the number of updates. The LSTM learns "
    "from shorter windows than the others, more of them an update: see the column."
)
_MUSIC = (
    "Bits per sample of the twentieth of each track behind its middle (256 mu-law levels), heard in pieces of at most "
    "twice the largest context asked for. The twentieth before the middle is held out as well, what is on either side "
    "of the two learnt from. By columns: of the samples with so many before them, up to the next column's number."
)
# What that tells.
_LEARNT_DIGITS = ": what is lower there was learnt by heart"
_LEARNT_MUSIC = (
    "; the tracks' beginnings and ends are in it, which fade and cost little, so what is lower there was not all "
    "learnt by heart"
)


def table(results: Mapping[str, Any]) -> str:
    """The runs as Markdown: bits per sample of the test over the context; and the judgement of made digits."""
    contexts = _contexts(results["runs"])
    music = any(run["task"] == "music" for run in results["runs"])
    lines = [
        "# Raw audio",
        "",
        _MUSIC if music else _DIGITS,
        "",
        _HEAD.format(learnt=_LEARNT_MUSIC if music else _LEARNT_DIGITS),
        "",
        f"| model | paper | all | from S4 | learnt | {' | '.join(f'{context:,}' for context in contexts)} "
        "| parameters | window | updates | samples/s | GiB |",
        "|---" * (10 + len(contexts)) + "|",
    ]
    lines += _counts(results["runs"], contexts)
    for run in results["runs"]:
        paper = ROWS[run["row"]].paper if run["row"] in ROWS and run["task"] == "digits" else ""
        scores = run["scores"]
        first, *cells = [f"{scores[str(c)]['bits']:.3f}" if str(c) in scores else "" for c in ("all", *contexts)]
        speed, peak = run["samples_per_second"] or 0, (run["peak_bytes"] or 0) / 2**30
        away = run["difference"]
        away = "" if away is None else f"{away['bits']:+.3f} ± {1.96 * away['standard_error']:.3f}"
        known = "" if run["learnt_from"] is None else f"{run['learnt_from']['bits']:.3f}"
        updates = f"{run['steps']:,}"
        if run["weights"] == BEST:
            updates += f" ({min(run['valid'], key=lambda entry: entry['bits'])['step']:,})"
        lines.append(
            f"| {_title(run['row'])} | {paper} | {first} | {away} | {known} | {' | '.join(cells)} | "
            f"{run['parameters']:,} | {run['config']['train']['window']:,} | {updates} | {speed:,.0f} | {peak:.2f} |"
        )
    if at_ends := results.get("judged_at_ends"):
        lines += ["", f"Not in the table, as an earlier version judged them at the tracks' ends: {', '.join(at_ends)}."]
    if "judged" in results:
        lines += ["", "Digits made by label, judged by the classifier trained here on the official split:", ""]
        lines += ["| | recognised, % | IS | mIS | AM | Fréchet | mean seconds |", "|---" * 7 + "|"]
        judged = results["judged"]
        for name in ("made", "test", "train"):
            one = judged[name]
            lines.append(
                f"| {name} ({one['sounds']}) | {100 * one['accuracy']:.1f} | {one['inception']:.2f} | "
                f"{one['modified_inception']:.1f} | {one['activation_maximization']:.2f} | {one['frechet']:.2f} | "
                f"{judged['seconds'][name]:.2f} |"
            )
        each = ", ".join(f"{digit}: {100 * part:.0f}" for digit, part in enumerate(judged["each"]))
        lines += ["", f"Recognised of each digit, per cent: {each}."]
        for name, what in (
            ("early", "ended before the shortest recording that was learnt from"),
            ("endless", f"did not end within {LONGEST:,} samples"),
        ):
            if name in judged:
                lines.append(f"{judged[name]['sounds']} {what}; {judged[name]['recognised']} of them were recognised.")
    return "\n".join(lines) + "\n"


def _counts(runs: Sequence[Mapping[str, Any]], contexts: Sequence[int]) -> list[str]:
    """For each test that rows were judged on, a line that says how many samples and recordings its columns have."""
    lines: dict[Any, str] = {}
    for run in runs:
        scores = run["scores"]
        if not run["each"] or run["test"] in lines:
            continue
        cells = [
            f"{scores[str(c)]['samples']:,} of {scores[str(c)]['recordings']}" if str(c) in scores else ""
            for c in contexts
        ]
        whole = f"{scores['all']['samples']:,} of {len(run['each'])}"
        lines[run["test"]] = f"| *samples of recordings* | | {whole} | | | {' | '.join(cells)} | | | | | |"
    return list(lines.values())


def _contexts(runs: Sequence[Mapping[str, Any]]) -> list[int]:
    """All columns of some runs' scores but that of all samples."""
    return sorted({int(context) for run in runs for context in run["scores"] if context != "all"})


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bits per sample over the number of samples before.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    made, axes = figure(7.0, 4.2)
    for run in runs:
        if run["scores"] and run["row"] in ROWS:
            contexts = _contexts([run])
            bits = [run["scores"][str(context)]["bits"] for context in contexts]
            axes.plot(contexts, bits, "o-", label=_title(run["row"]), linewidth=1.4, markersize=3.5)
    axes.set(xlabel="samples before, at least", ylabel="bits per sample of the test", xscale="log")
    axes.set_xscale("log", base=2)
    if axes.lines:
        axes.legend(fontsize=8, frameon=False)
    save_figure(made, path)


def judge_digits(
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    classifier: str | os.PathLike[str],
    *,
    each: int = 50,
    temperature: float = 1.0,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Digits made by the conditioned model in `out`, judged; leaves made.npz and judged.json there.

    Raises:
        CheckpointError: no conditioned model, or no classifier as `judge_sounds` wants it.
    """
    out = Path(out)
    if run_status(out / CONDITIONAL) is None:
        raise CheckpointError(f"judge digits: '{out}' must hold a run of the row {CONDITIONAL}; train it first")
    recordings = read_digits(data)
    _check_classifier(classifier, recordings)  # before the minutes that making them may take
    chosen = _chosen(out / CONDITIONAL)
    sounds = make_digits(out / "made.npz", chosen, each=each, temperature=temperature, seed=seed, say=say)
    judged = judge_sounds(sounds, classifier, recordings)
    write_json(out / "judged.json", judged)
    say(f"{100 * judged['made']['accuracy']:.1f} % of {len(sounds)} made digits recognised")
    report(out)
    return judged


def write_sounds(
    out: str | os.PathLike[str], data: str | os.PathLike[str], folder: str | os.PathLike[str], *, each: int = 1
) -> list[Path]:
    """Some of the made digits as wav files, and their spectrograms above those of recordings of the same digits.

    Args:
        out: folder in which `judge_digits` left made.npz.
        data: see `statescan.recipes.spoken_digits.read_digits`.
        folder: of the wav files and of spectrograms.png.
        each: sounds of each digit, the first ones: nobody chose.

    Returns:
        The wav files.

    Raises:
        DataError: no digits were made.
        MissingExtraError: soundfile or matplotlib is not installed.
    """
    made, folder = load_recordings(Path(out) / "made.npz"), make_folder(folder)
    assert made.labels is not None
    _, _, test = digit_parts(read_digits(data), "official")
    assert test.labels is not None
    written, rows = [], []
    for digit, name in enumerate(made.classes):
        for number, row in enumerate(np.flatnonzero(made.labels == digit)[:each]):
            path = folder / f"{name}-{number}.wav"
            write_audio(path, made.waveform(int(row)), made.sample_rate)
            written.append(path)
        first = int(np.flatnonzero(made.labels == digit)[0])
        spoken = np.flatnonzero(test.labels == digit)
        # Another speaker's with each digit.
        real = int(spoken[digit * len(spoken) // len(SPEAKERS) % len(spoken)])
        rows.append(
            (
                (f"made: {name}", made.waveform(first), made.sample_rate),
                (f"recorded: {name}", test.waveform(real), test.sample_rate),
            )
        )
    # Five digits side by side, made above recorded, and the next five below.
    shown = [pair[which] for at in range(0, len(rows), 5) for which in (0, 1) for pair in rows[at : at + 5]]
    draw_spectrograms(folder / "spectrograms.png", shown, columns=5)
    return written
