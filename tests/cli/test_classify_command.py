"""``statescan train --task``: from a line to a judged classifier, and on from where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Run = Callable[..., tuple[int, str, str]]
SMALL = [
    f"--set={text}"
    for text in (
        "model.d_model=8",
        "model.n_layer=1",
        "model.classes=6",
        "train.epochs=2",
        "train.batch_size=8",
        "train.accelerator=cpu",
        "train.threads=1",
    )
]


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 60, (80, 6, 6)).astype(np.uint8)
    y = draw.integers(0, 6, 80).astype(np.uint8)
    path = tmp_path / "small.npz"
    np.savez(path, x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    return path


def test_trains_tells_and_goes_on(run: Run, mnist: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = ("train", "--task", "smnist", "--mixer", "s4d", "--data", mnist, "--out", out)
    code, shown, err = run(*line, *SMALL)
    assert (code, err) == (0, "")
    for text in ("steps             10, 2 of 2 epochs", "validation", "test, last epoch", "chosen by validation)"):
        assert text in shown
    code, shown, err = run("train", "--resume", "--out", out, "--set", "train.epochs=3", "--json")
    assert code == 0
    told = json.loads(shown)
    assert (told["task"], told["mixer"], told["steps"], told["epochs"]) == ("smnist", "s4d", 15, 3)
    assert [entry["epoch"] for entry in told["validation"]] == [1, 2, 3]
    assert 0 <= told["test_final"]["accuracy"] <= 1
    assert told["test_best"]["epoch"] in (1, 2, 3)
    assert "resuming" in err


def test_s4_is_the_mixer_where_none_is_named(run: Run, mnist: Path, tmp_path: Path) -> None:
    code, shown, _ = run("train", "--task", "psmnist", "--data", mnist, "--out", tmp_path / "run", "--json", *SMALL)
    assert (code, json.loads(shown)["mixer"]) == (0, "s4")


def test_wrong_lines_say_what_is_wrong_and_touch_nothing(run: Run, mnist: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    task = ("train", "--out", out, "--task", "smnist", "--data", mnist)
    for line, wanted in (
        ((*task[:3], "--mixer", "s4"), "--mixer wanted a --task, got none"),
        ((*task[:3], "--task", "cifar"), "--task must be one of"),
        ((*task, "--mixer", "elman"), "--mixer must be one of"),
        ((*task, "--preset", "tiny"), "--preset is for texts, wanted none with --task"),
        ((*task, "--valid", "x"), "--valid is for texts"),
        ((*task, "--data", mnist), "--task takes one --data, got 2"),
        ((*task[:5], "--data", tmp_path / "none.npz"), "which does not exist"),
        ((*task, "--resume"), "wanted a run of --task in"),
        ((*task, "--set", "model.width=3"), "wanted a known field, got 'model.width'"),
    ):
        code, shown, err = run(*line)
        assert (code, shown, len(err.strip().splitlines())) == (1, "", 1), line
        assert wanted in err
        assert not out.exists()


def test_a_resumed_run_keeps_its_task_and_mixer(run: Run, mnist: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run("train", "--task", "smnist", "--mixer", "s4d", "--data", mnist, "--out", out, *SMALL)[0] == 0
    for option, value, has in (("--task", "psmnist", "smnist"), ("--mixer", "s4", "s4d")):
        code, _, err = run("train", "--resume", "--out", out, option, value)
        assert code == 1
        assert f"wanted {option} {has}, which the run in" in err
