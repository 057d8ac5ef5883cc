"""Tasks by name: their data, their configurations, and a run that is found again in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from statescan.data import LISTOPS_VOCABULARY, solve_listops
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.models import SequenceClassifier
from statescan.models.classifier import MIXERS
from statescan.recipes import sequence_classification
from statescan.recipes.sequence_classification import (
    TASKS,
    classification,
    classification_results,
    load_classification,
    run_classification,
    task_data,
)

SMALL = ("model.d_model=8", "model.n_layer=1", "train.epochs=1", "train.batch_size=8", "train.accelerator=cpu")


@pytest.fixture
def mnist(tmp_path: Path) -> str:
    """Pictures of 6 x 6 whose label is the row that is white."""
    draw = np.random.default_rng(0)
    x = draw.integers(0, 60, (80, 6, 6)).astype(np.uint8)
    y = draw.integers(0, 6, 80).astype(np.uint8)
    x[np.arange(80), y] = 255
    path = tmp_path / "small.npz"
    np.savez(path, x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    return str(path)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_task_has_a_model_of_every_mixer_that_takes_its_data(task: str, mixer: str) -> None:
    run = classification(task, mixer, overrides=["model.d_model=16", "model.n_layer=1", "model.d_mlp=0"])
    assert (run.model.mixer, run.task) == (mixer, task)
    model = SequenceClassifier(run.model)
    given = torch.randint(1, 16, (2, 9)) if task == "listops" else torch.randn(2, 9, 1)
    assert model(given).logits.shape == (2, 10)


def test_overrides_reach_every_part_and_a_wrong_one_is_named() -> None:
    run = classification("listops", "s4d", overrides=["train.lr=0.5", "model.d_state=4", "examples=5,6,7"])
    assert (run.train.lr, run.model.d_state, run.examples) == (0.5, 4, (5, 6, 7))
    assert run.model.bidirectional
    with pytest.raises(ConfigError, match=r"got 'train\.rate'"):
        classification("smnist", "s4", overrides=["train.rate=1"])
    with pytest.raises(ConfigError, match=r"--task must be one of \['smnist', 'psmnist', 'listops'\], got 'cifar'"):
        classification("cifar", "s4")
    with pytest.raises(ConfigError, match=r"--mixer must be one of .*'s4d'.*, got 'S4'"):
        classification("smnist", "S4")


@pytest.mark.parametrize(
    ("task", "setting"), [("smnist", "lengths=10,100"), ("psmnist", "examples=6,2,2"), ("listops", "shift=1")]
)
def test_a_setting_of_another_task_is_not_passed_over(task: str, setting: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"train: {setting.split('=')[0]} is for \w+ alone, got .* with --task {task}"
    ):
        classification(task, "s4", overrides=[setting])


def test_the_permuted_task_is_the_plain_one_with_its_pixels_moved(mnist: str) -> None:
    plain, permuted = (task_data(classification(task, "s4", data=mnist)) for task in ("smnist", "psmnist"))
    assert [len(part) for part in plain] == [45, 15, 20]
    for one, other in zip(plain, permuted, strict=True):
        assert (one.labels == other.labels).all()
        assert (np.sort(one.values) == np.sort(other.values)).all()
        assert (one.values != other.values).any()
    again = task_data(classification("psmnist", "lstm", data=mnist))
    assert (again.train.values == permuted.train.values).all()


def test_listops_is_made_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))
    data = task_data(classification("listops", "s4", overrides=["examples=6,2,2", "data_seed=3"]))
    assert [len(part) for part in data] == [6, 2, 2]
    assert data.train.lengths is not None
    for row, length, label in zip(data.train.values, data.train.lengths, data.train.labels, strict=True):
        assert 500 < length < 2000
        assert solve_listops([LISTOPS_VOCABULARY[i] for i in row[:length]]) == label
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_curriculum_goes_from_short_expressions_to_longer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))
    common = [*SMALL, "examples=16,2,2"]
    short = classification("listops", "s4d", overrides=[*common, "lengths=5,20"])
    data = task_data(short)
    assert data.train.lengths is not None
    assert data.train.lengths.min() > 5
    assert data.train.lengths.max() < 20
    run_classification(short, tmp_path / "short", progress=False)
    # With a learning rate of next to nothing what the next run starts from is what it ends with.
    still = ["train.lr=1e-30", "train.min_lr=0", f"start={tmp_path / 'short'}"]
    longer = classification("listops", "s4d", overrides=[*common, "lengths=20,40", *still])
    run_classification(longer, tmp_path / "longer", progress=False)
    one, other = (SequenceClassifier.from_pretrained(tmp_path / name).state_dict() for name in ("short", "longer"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_classification(tmp_path / "longer") == longer
    (row,) = classification_results([tmp_path / "longer"])
    assert row["config"]["lengths"] == (20, 40)
    wider = classification("listops", "s4d", overrides=[*common, "model.d_model=16", f"start={tmp_path / 'short'}"])
    with pytest.raises(ConfigError, match="wanted a classifier with d_model = 16 to start from, got 8"):
        run_classification(wider, tmp_path / "wider", progress=False)


def test_pictures_must_be_named_where_none_are_installed(monkeypatch: pytest.MonkeyPatch, mnist: str) -> None:
    monkeypatch.setattr(sequence_classification, "find_images", lambda: None)
    with pytest.raises(DataError, match=r"--task smnist wanted pictures, got none; name MNIST's \.npz file"):
        task_data(classification("smnist", "s4"))
    monkeypatch.setattr(sequence_classification, "find_images", lambda: Path(mnist))
    assert len(task_data(classification("smnist", "s4")).test) == 20


def test_a_run_is_found_again_in_its_folder(mnist: str, tmp_path: Path) -> None:
    overrides = [*SMALL, "data_seed=2", "model.classes=6"]
    run = classification("psmnist", "s4d", data=mnist, overrides=overrides)
    result = run_classification(run, tmp_path / "run", progress=False)
    assert result.final is not None
    assert load_classification(tmp_path / "run") == run
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (facts["task"], facts["path"], facts["train"]["examples"]) == ("psmnist", mnist, 45)
    (row,) = classification_results([tmp_path / "run"])
    assert (row["task"], row["mixer"], row["status"], row["epochs"], row["steps"]) == (
        "psmnist",
        "s4d",
        "finished",
        1,
        5,
    )
    assert row["test_final"]["accuracy"] == result.final.accuracy
    assert row["validation"] == [accuracy for _, accuracy in result.evaluations]
    assert row["parameters"] == sum(p.numel() for p in SequenceClassifier(run.model).parameters())
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="wanted a run of --task"):
            load_classification(wrong)
    (tmp_path / "run" / "run.json").write_text('{"config": {"model": {}}, "data": {"digest": 3}, "status": "x"}')
    with pytest.raises(CheckpointError, match="wanted a run of --task"):
        load_classification(tmp_path / "run")
