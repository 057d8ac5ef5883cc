"""Pixel-by-pixel MNIST, its permuted form, and ListOps: the tasks on which sequence layers are compared, by name.

``python -m statescan.recipes.sequence_classification RUN... --out FILE`` puts the results of finished and unfinished
runs into one file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statescan.data import default_cache_folder
from statescan.data.images import find_images, pixel_sequences, read_images
from statescan.data.listops import LISTOPS_VOCABULARY, listops_splits, read_listops
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.files import atomic_file
from statescan.models import ClassifierConfig
from statescan.models.classifier import MIXERS
from statescan.train.classify import ClassifyConfig, ClassifyResult, Splits, train_classifier
from statescan.train.config import apply_overrides, build_config
from statescan.train.loop import RUN_FILE

__all__ = [
    "TASKS",
    "Classification",
    "classification",
    "classification_results",
    "load_classification",
    "run_classification",
    "task_data",
]

TASKS = ("smnist", "psmnist", "listops")
# The permutation of psMNIST's pixels, the same for every model.
_PERMUTATION_SEED = 0
# The Long Range Arena's bounds of a ListOps expression.
_ARENA = (500, 2000)
_EXAMPLES = (96_000, 2_000, 2_000)


@dataclasses.dataclass(frozen=True)
class Classification:
    """A run: which task, which data, which model, how it is trained.

    Args:
        task: one of `TASKS`.
        data: file or folder of the data; "" for what is found or made.
        examples: of ListOps, for training, validation and test, where they are made.
        data_seed: of ListOps's examples, and of the pictures held out for validation.
        shift: pixels by which a picture is moved at random in training.
        lengths: of ListOps, where they are made: more tokens than the first, fewer than the second. Others than the
            Arena's make a first step of a curriculum, whose model the next run starts from.
        start: folder of a classifier whose weights it starts from; "" for none.
        model: the classifier.
        train: the schedule.

    Raises:
        ConfigError: a setting of another task's data.
    """

    task: str
    data: str
    model: ClassifierConfig
    train: ClassifyConfig
    examples: tuple[int, int, int] = _EXAMPLES
    data_seed: int = 0
    shift: int = 0
    lengths: tuple[int, int] = _ARENA
    start: str = ""

    def __post_init__(self) -> None:
        others = {"shift": 0} if self.task == "listops" else {"examples": _EXAMPLES, "lengths": _ARENA}
        for name, default in others.items():
            value = getattr(self, name)
            if (tuple(value) if isinstance(default, tuple) else value) != default:
                of = "pictures" if name == "shift" else "ListOps"
                raise ConfigError(f"train: {name} is for {of} alone, got {value} with --task {self.task}; leave it out")


# What each mixer has in place of the defaults: four blocks of width 128, of which an LSTM's and a GRU's, that run one
# position after the other, are two.
_MODEL: dict[str, dict[str, Any]] = {
    "s4": {"d_state": 64},
    "s4d": {"d_state": 64},
    "mamba": {"d_state": 16},
    "lstm": {"n_layer": 2},
    "gru": {"n_layer": 2},
    "attention": {"d_mlp": 512},
}
_TASK: dict[str, dict[str, Any]] = {
    "smnist": {"classes": 10, "d_input": 1, "dropout": 0.1},
    "psmnist": {"classes": 10, "d_input": 1, "dropout": 0.2},
    "listops": {"classes": 10, "vocab_size": len(LISTOPS_VOCABULARY), "n_layer": 6},
}
# S4 and S4D see both ways where order means nothing (permuted pixels) and, as published, in ListOps; every other mixer
# is causal everywhere.
_BOTH_WAYS = ("psmnist", "listops")
_TRAIN: dict[str, dict[str, Any]] = {
    "smnist": {"epochs": 25},
    "psmnist": {"epochs": 30},
    "listops": {"epochs": 25, "warmup": 1000},
}
_RATE = {"s4": 4e-3, "s4d": 4e-3, "attention": 1e-3}
# A recurrence over hundreds of positions: float32, and cuDNN's own loops in place of one graph.
_RECURRENT = {"batch_size": 256, "precision": "float32", "capture": False}


def classification(task: str, mixer: str, *, data: str = "", overrides: Sequence[str] = ()) -> Classification:
    """The configuration that this package trains a mixer with on a task.

    Args:
        task: one of `TASKS`.
        mixer: one of `statescan.models.classifier.MIXERS`.
        data: file or folder of the data; "" for what is found or made.
        overrides: "model.d_model=256", "train.epochs=10", ...; see `statescan.train.apply_overrides`.

    Raises:
        ConfigError: an unknown task, mixer or field.
    """
    if task not in TASKS:
        raise ConfigError(f"train: --task must be one of {list(TASKS)}, got {task!r}")
    if mixer not in MIXERS:
        raise ConfigError(f"train: --mixer must be one of {sorted(MIXERS)}, got {mixer!r}")
    model: dict[str, Any] = {"mixer": mixer, **_TASK[task], **_MODEL.get(mixer, {})}
    train: dict[str, Any] = {"precision": "bf16", "batch_size": 64, "lr": _RATE.get(mixer, 2e-3), **_TRAIN[task]}
    if mixer in ("s4", "s4d"):
        model["bidirectional"] = task in _BOTH_WAYS
        if task == "listops":
            model["d_state"] = 16
    if mixer in ("lstm", "gru"):
        train |= _RECURRENT
    run = Classification(task, data, ClassifierConfig(**model), ClassifyConfig(**train))
    return apply_overrides(run, overrides)


def task_data(run: Classification) -> Splits:
    """Reads or makes the three splits of a run.

    Raises:
        DataError: the data can't be found or read.
    """
    if run.task == "listops":
        if run.data:
            return Splits(*read_listops(run.data))
        rules = (
            {} if tuple(run.lengths) == _ARENA else dict(zip(("min_length", "max_length"), run.lengths, strict=True))
        )
        return Splits(*listops_splits(run.data_seed, run.examples, cache=default_cache_folder(), **rules))
    place = Path(run.data) if run.data else find_images()
    if place is None:
        raise DataError(
            f"train: --task {run.task} wanted pictures, got none; name MNIST's .npz file or the folder of its four idx "
            "files with --data PATH (Debian's package dataset-fashion-mnist is found without)"
        )
    permutation = _PERMUTATION_SEED if run.task == "psmnist" else None
    images = read_images(place)
    held_out = min(5000, len(images.x_train) // 4)
    parts = pixel_sequences(
        images, held_out=held_out, permutation_seed=permutation, shift=run.shift, seed=run.data_seed
    )
    return Splits(*parts)


def run_classification(
    run: Classification, out: str | os.PathLike[str], *, resume: bool = False, progress: bool = True
) -> ClassifyResult:
    """Trains and judges; see `statescan.train.train_classifier` for what is left in `out`, and for the errors."""
    facts = {"task": run.task, "path": run.data, "examples": list(run.examples), "data_seed": run.data_seed}
    facts |= {"shift": run.shift, "lengths": list(run.lengths), "start": run.start}
    return train_classifier(
        run.model, run.train, task_data(run), out,
        resume=resume, progress=progress, facts=facts, pretrained=run.start or None,
    )  # fmt: skip


def load_classification(out: str | os.PathLike[str]) -> Classification:
    """The run in a folder, from its run.json.

    Raises:
        CheckpointError: no classifier's run stands there.
    """
    path = Path(out) / RUN_FILE
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        facts, config = held["data"], held["config"]
        values = {
            "task": facts["task"],
            "data": facts["path"],
            "examples": facts["examples"],
            "data_seed": facts["data_seed"],
            "shift": facts.get("shift", 0),
            "lengths": facts.get("lengths", _ARENA),
            "start": facts.get("start", ""),
            "model": config["model"],
            "train": config["train"],
        }
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"train: wanted a run of --task in '{out}', got none there; name a folder that such a run wrote"
        ) from None
    return build_config(Classification, values)


def classification_results(folders: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """A row for each run, out of its own run.json.

    Args:
        folders: of runs, finished or not.

    Returns:
        For each: task, mixer, parameters, seed, epochs and steps done, minutes, device, the validation accuracy of each
        epoch, the accuracies on the test ("final", and "best" with the epoch that validation chose; None where the run
        has not come to its end), what was changed on the way, and the configuration.

    Raises:
        CheckpointError: a folder holds no such run.
    """
    rows = []
    for folder in folders:
        run = load_classification(folder)
        facts = json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))
        rows.append(
            {
                "task": run.task,
                "mixer": run.model.mixer,
                "status": facts["status"],
                "parameters": facts["parameters"],
                "seed": run.train.seed,
                "epochs": len(facts["evaluations"]),
                "steps": facts["steps"],
                "minutes": facts["seconds"] / 60,
                "device": facts["device"],
                "validation": [accuracy for _, accuracy in facts["evaluations"]],
                "test_final": facts.get("test", {}).get("final"),
                "test_best": facts.get("test", {}).get("best"),
                "history": facts.get("history", []),
                "config": {
                    **facts["config"],
                    **{name: getattr(run, name) for name in ("shift", "data_seed", "lengths", "start")},
                },
                "versions": facts["versions"],
            }
        )
    return rows


def main() -> None:
    """``python -m statescan.recipes.sequence_classification RUN... --out FILE``."""
    parser = argparse.ArgumentParser(description="Puts the results of runs of --task into one JSON file.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that statescan train --task wrote")
    parser.add_argument("--out", required=True, type=Path, help="the file")
    given = parser.parse_args()
    with atomic_file(given.out) as temporary:
        text = json.dumps({"benchmark": "classification", "rows": classification_results(given.runs)}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
