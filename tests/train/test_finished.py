"""Whether a finished run is the one that is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from statescan.errors import CheckpointError
from statescan.models import ClassifierConfig, MambaConfig
from statescan.models.backbone_classifier import BackboneClassifierConfig
from statescan.models.baseline_config import ConvConfig
from statescan.train.classify import ClassifyConfig
from statescan.train.finished import check_same, run_status, weights_digest

MODEL, TRAIN = ClassifierConfig(classes=3, d_input=1), ClassifyConfig(epochs=2)


def write(folder: Path, **changes: object) -> None:
    facts = {
        "status": "finished",
        "config": json.loads(json.dumps({"model": MODEL.to_dict(), "train": TRAIN.__dict__})),
        "data": {"task": "x", "train": {"digest": 5, "examples": 3}},
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(facts))


def test_status_and_what_differs(tmp_path: Path) -> None:
    config = {"model": MODEL, "train": TRAIN}
    assert run_status(tmp_path, config) is None
    write(tmp_path)
    data = {"task": "x", "train": {"digest": 5}}
    assert run_status(tmp_path) == run_status(str(tmp_path), config, data) == "finished"
    for other, named, words in (
        ({**config, "model": replace(MODEL, d_model=8)}, data, r"other settings \(model.d_model = 128, wanted 8\)"),
        ({**config, "train": replace(TRAIN, betas=(0.5, 0.6))}, data, r"other settings \(train.betas = "),
        (config, {"train": {"digest": 6}}, r"other data \(train.digest = 5, wanted 6\)"),
        (config, {"vary": 1}, r"other data \(vary = nothing, wanted 1\)"),
        ({"model": MambaConfig(d_model=8, n_layer=1, vocab_size=5)}, {}, "other settings"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            run_status(tmp_path, other, named)
        assert str(tmp_path / "run.json") in str(caught.value)
    # One that goes on is asked by the training itself.
    write(tmp_path, status="interrupted")
    assert run_status(tmp_path, {"model": replace(MODEL, d_model=8)}, {"vary": 1}) == "interrupted"
    for text in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match="can't be read as a run's facts"):
            run_status(tmp_path)


def test_a_field_that_came_later_counts_as_its_default(tmp_path: Path) -> None:
    held = json.loads(json.dumps({"model": MODEL.to_dict(), "train": TRAIN.__dict__}))
    del held["model"]["dropout"], held["train"]["clip"]
    write(tmp_path, config=held)
    assert run_status(tmp_path, {"model": MODEL, "train": TRAIN}) == "finished"
    with pytest.raises(CheckpointError, match=r"model.dropout = 0.0, wanted 0.3"):
        run_status(tmp_path, {"model": replace(MODEL, dropout=0.3), "train": TRAIN})


def test_models_in_models(tmp_path: Path) -> None:
    one = BackboneClassifierConfig(3, MambaConfig(d_model=8, n_layer=1, vocab_size=5))
    write(tmp_path, config={"model": one.to_dict()})
    assert run_status(tmp_path, {"model": one}) == "finished"
    with pytest.raises(CheckpointError, match=r"model.backbone.n_layer = 1, wanted 2"):
        run_status(tmp_path, {"model": replace(one, backbone=replace(one.backbone, n_layer=2))})
    with pytest.raises(CheckpointError, match="other settings"):
        run_status(tmp_path, {"model": replace(one, backbone=ConvConfig(d_model=8, n_layer=1, vocab_size=5))})


def test_plain_values() -> None:
    held = {"steps": 3, "model": {"stages": ["s4", "mamba"]}}
    check_same("trained.json", held, {"model": {"stages": ("s4", "mamba")}})
    with pytest.raises(
        CheckpointError, match=r"'trained.json' is of a run with other settings \(steps = 3, wanted 4\)"
    ):
        check_same("trained.json", held, {"steps": 4})


def test_weights_are_known_again(tmp_path: Path) -> None:
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "run.json").write_text(name)
    one, same, other = (weights_digest(tmp_path / name) for name in "abc")
    assert one == same != other
