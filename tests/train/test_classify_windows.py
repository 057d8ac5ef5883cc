"""Classifiers of genome windows: what they are shown, that they learn, and that they go on to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from statescan.data import reverse_complement
from statescan.data.labelled import LabelledOrder, LabelledSequences
from statescan.data.windows import LabelledWindows, window_rows
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.models import CausalLM, MambaConfig
from statescan.models.backbone_classifier import BackboneClassifier, BackboneClassifierConfig
from statescan.train.classify import (
    ClassifyConfig,
    Splits,
    _ClassifierTrainer,
    _label_passes,
    _ResidentWindows,
    judge,
    train_classifier,
)
from statescan.train.logs import read_csv

BACKBONE = MambaConfig(d_model=16, n_layer=1, vocab_size=5)
MODEL = BackboneClassifierConfig(2, BACKBONE, reverse_complement=True, dropout=0.1)
LIKELIHOOD = replace(MODEL, dropout=0.0, head="likelihood")
TRAIN = ClassifyConfig(epochs=2, batch_size=8, lr=1e-2, warmup=5, log_every=4, accelerator="cpu", threads=1)


@pytest.fixture
def data() -> Splits:
    """Two genomes, of which one has twice as many G and C."""
    draw = np.random.default_rng(0)
    genomes = [draw.choice(4, 6000, p=p) for p in ([0.3, 0.2, 0.2, 0.3], [0.15, 0.35, 0.35, 0.15])]
    tokens = np.concatenate(genomes).astype(np.uint8)
    parts = []
    for low, high in ((0, 4000), (4000, 5000), (5000, 6000)):
        rows = [window_rows(np.array([[low, high]]) + 6000 * label, 64) for label in (0, 1)]
        first, room = (np.concatenate(some) for some in zip(*rows, strict=True))
        labels = np.repeat(np.arange(2, dtype=np.uint8), len(first) // 2)
        parts.append(LabelledWindows(tokens, first, room, labels, 2, 64))
    return Splits(*parts)


def test_rows_begin_in_their_room_on_either_strand(data: Splits) -> None:
    windows = data.train
    assert isinstance(windows, LabelledWindows)
    resident = _ResidentWindows(windows, torch.device("cpu"))
    rows = torch.arange(len(windows))
    fixed, labels, mask = resident.batch(rows, 64)
    assert (fixed.numpy() == windows.values).all()
    assert (labels.numpy() == windows.labels).all()
    assert mask is None
    starts, strands = set(), [0, 0]
    for _ in range(8):
        shown = resident.batch(rows, 64, vary=True)[0].numpy().astype(np.uint8)
        for row in range(len(windows)):
            low, high = windows.first[row], windows.first[row] + windows.room[row]
            found = [
                (strand, start - low)
                for start in range(low, high)
                for strand, turned in enumerate((shown[row], reverse_complement(shown[row])))
                if (windows.tokens[start : start + 64] == turned).all()
            ]
            assert found, "a row shows a window of its own room"
            strands[found[0][0]] += 1
            starts.add(int(found[0][1]))
    assert min(strands) > 0.4 * sum(strands)
    assert min(starts) < 3
    assert max(starts) > 60


def test_homologues_come_together_from_one_place_and_strand(data: Splits) -> None:
    genome = np.random.default_rng(1).integers(0, 4, 2000).astype(np.uint8)
    first = np.stack([np.arange(0, 900, 50), np.arange(1000, 1900, 50)], 1).ravel()
    windows = LabelledWindows(
        np.concatenate([genome[:1000], genome[:1000]]),
        first,
        np.full(len(first), 40),
        np.tile(np.arange(2, dtype=np.uint8), len(first) // 2),
        2,
        50,
        together=2,
    )
    order = LabelledOrder(windows, 6, seed=0)
    resident = _ResidentWindows(windows, torch.device("cpu"))
    seen = []
    for number in range(order.batches):
        rows, _ = order[number]
        pairs = rows.reshape(-1, 2)
        assert (pairs[:, 0] % 2 == 0).all()
        assert (pairs[:, 1] == pairs[:, 0] + 1).all()
        seen += rows.tolist()
        shown = resident.batch(torch.from_numpy(rows), 50, vary=True)[0].view(-1, 2, 50)
        assert torch.equal(shown[:, 0], shown[:, 1])
    assert len(set(seen)) == len(seen) == 36
    assert order[0][0].tolist() != order[order.batches][0].tolist()
    with pytest.raises(DataError, match="multiple of 2, so many rows go together, got 5"):
        LabelledOrder(windows, 5, seed=0)


def test_learns_and_goes_on_to_the_same_bits(data: Splits, tmp_path: Path) -> None:
    whole = train_classifier(MODEL, TRAIN, data, tmp_path / "whole", progress=False)
    assert whole.best is not None
    assert whole.best.accuracy > 0.85
    part = tmp_path / "part"
    stopped = train_classifier(MODEL, TRAIN, data, part, progress=False, seconds=0)
    assert stopped.interrupted
    assert 0 < stopped.steps < whole.steps
    again = train_classifier(MODEL, TRAIN, data, part, progress=False, resume=True)
    assert again.final == whole.final
    for name in ("model.safetensors", "log.csv", "evaluations.csv"):
        assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = replace(data.train, tokens=data.train.tokens[::-1].copy())  # type: ignore[union-attr, type-var]
    with pytest.raises(CheckpointError, match="the train split"):
        train_classifier(MODEL, TRAIN, data._replace(train=other), part, progress=False, resume=True)


def test_tells_labels_apart_by_their_likelihoods(data: Splits, tmp_path: Path) -> None:
    """It learns without a loss of the labels, and goes on to the same bits; what is logged is nats a base."""
    model = LIKELIHOOD
    config = replace(TRAIN, epochs=3, log_every=1)
    whole = train_classifier(model, config, data, tmp_path / "whole", progress=False)
    assert whole.best is not None
    assert whole.best.accuracy > 0.9
    losses = [float(row["loss"]) for row in read_csv(tmp_path / "whole" / "log.csv")]
    assert 1.0 < losses[-1] < losses[0] < 2.5
    part = tmp_path / "part"
    assert train_classifier(model, config, data, part, progress=False, seconds=0).interrupted
    train_classifier(model, config, data, part, progress=False, resume=True)
    for name in ("model.safetensors", "log.csv", "evaluations.csv"):
        assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_labels_are_learnt_from_a_part_of_the_updates_on(
    data: Splits, stop_after: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Up to it the run is one without; then the loss is the labels' cross entropy, in passes of as many readings."""
    config = replace(TRAIN, log_every=1)
    train_classifier(LIKELIHOOD, config, data, tmp_path / "without", progress=False)
    read, original = [], BackboneClassifier._read

    def count(self: BackboneClassifier, inputs: torch.Tensor, *rest: Any) -> Any:
        read.append(len(inputs))
        return original(self, inputs, *rest)

    monkeypatch.setattr(BackboneClassifier, "_read", count)
    judge(BackboneClassifier(LIKELIHOOD), data.valid, batch_size=9)
    assert read == [8] * 7 + [4]  # of thirty windows four at once, for two labels
    read.clear()
    config = replace(config, labels_from=0.4)
    result = train_classifier(LIKELIHOOD, config, data, tmp_path / "run", progress=False)
    without, rows = (read_csv(tmp_path / name / "log.csv") for name in ("without", "run"))
    assert result.steps == 30
    assert rows[:12] == without[:12]
    assert read[:16] == [8] * 16  # twelve updates, and two of two passes for two labels

    stop_after(12)
    train_classifier(LIKELIHOOD, config, data, tmp_path / "part", progress=False)
    model = BackboneClassifier.from_pretrained(tmp_path / "part")
    assert isinstance(data.train, LabelledWindows)
    resident = _ResidentWindows(data.train, torch.device("cpu"))
    torch.manual_seed(config.seed + (12 << 20))
    losses = []
    for part in torch.from_numpy(LabelledOrder(data.train, 8, config.seed)[12][0]).chunk(2):
        inputs, labels, _ = resident.batch(part, 64, vary=True)
        losses.append(F.cross_entropy(model(inputs).logits, labels).item())
    assert float(rows[12]["loss"]) == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert float(rows[12]["loss"]) != pytest.approx(float(without[12]["loss"]), rel=0.1)


@pytest.mark.parametrize("kind", ["float32", "bf16", "ragged"])
def test_stopped_where_labels_begin_to_be_learnt_it_goes_on_to_the_same_bits(
    data: Splits, stop_after: Any, tmp_path: Path, kind: str
) -> None:
    model, config = LIKELIHOOD, replace(TRAIN, log_every=5, labels_from=0.4)
    if kind == "bf16":
        config = replace(config, precision="bf16")
    elif kind == "ragged":
        draw = np.random.default_rng(0)
        lengths = draw.integers(3, 21, 125).astype(np.int32)
        labels = (np.arange(125) % 2).astype(np.uint8)
        values = draw.integers(1, 5, (125, 20)) + 4 * labels[:, None]
        values = np.where(np.arange(20) < lengths[:, None], values, 0).astype(np.uint8)
        rows = LabelledSequences(values, labels, 2, lengths, vocab_size=9)
        data = Splits(rows, rows.take(slice(0, 30)), rows.take(slice(30, 60)))
        model = replace(LIKELIHOOD, backbone=BACKBONE.replace(vocab_size=9), reverse_complement=False)
        config = replace(config, multiple=8)
    whole = train_classifier(model, config, data, tmp_path / "whole", progress=False)
    assert whole.best is not None
    assert whole.best.accuracy > 0.9
    # No row is of both losses.
    steps = [int(row["step"]) for row in read_csv(tmp_path / "whole" / "log.csv")]
    assert steps == [5, 10, 12, 15, 20, 25, 30]
    for stop in (11, 12, 13):
        part = tmp_path / str(stop)
        stop_after(stop)
        assert train_classifier(model, config, data, part, progress=False).steps == stop
        stop_after(None)
        assert [int(row["step"]) for row in read_csv(part / "log.csv")] == [5, 10, 12][: 2 + (stop >= 12)]
        train_classifier(model, config, data, part, progress=False, resume=True)
        for name in ("model.safetensors", "log.csv", "evaluations.csv"):
            assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (stop, name)


def test_a_run_goes_on_to_learn_labels(data: Splits, stop_after: Any, tmp_path: Path) -> None:
    """Its tokens learnt, with another schedule, which is told; no row of log.csv is of both losses."""
    whole, late = tmp_path / "whole", tmp_path / "late"
    stop_after(15)
    train_classifier(LIKELIHOOD, TRAIN, data, late, progress=False)
    stop_after(None)
    config = replace(TRAIN, labels_from=0.5)
    train_classifier(LIKELIHOOD, config, data, late, progress=False, resume=True)
    assert json.loads((late / "run.json").read_text())["history"] == [
        {"after_step": 15, "changed": {"labels_from": [1.0, 0.5]}}
    ]
    rows = read_csv(late / "log.csv")
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 15, 16, 20, 24, 28, 30]
    assert float(rows[4]["loss"]) < 0.7 < 1.2 < float(rows[3]["loss"]), "a base costs more than one of two labels"
    # From the first update on.
    best = train_classifier(LIKELIHOOD, replace(config, labels_from=0.0), data, whole, progress=False).best
    assert best is not None
    assert best.accuracy > 0.85
    assert float(read_csv(whole / "log.csv")[0]["loss"]) < 1.0


def test_a_row_ends_where_a_resume_begins_to_learn_labels(data: Splits, stop_after: Any, tmp_path: Path) -> None:
    """Even where the run was stopped behind the update from which labels are learnt then, and killed once more."""
    config = replace(TRAIN, log_every=10)
    part = tmp_path / "part"
    stop_after(16)
    train_classifier(LIKELIHOOD, replace(config, log_every=16), data, tmp_path / "rows", progress=False)
    train_classifier(LIKELIHOOD, config, data, part, progress=False)
    config = replace(config, labels_from=0.4)
    for late in (True, False):  # killed, and not
        with pytest.MonkeyPatch.context() as patch:
            if late:
                patch.setattr(_ClassifierTrainer, "_save", lambda trainer: None)
            stop_after(19 if late else None)
            train_classifier(LIKELIHOOD, config, data, part, progress=False, resume=True)
        rows = read_csv(part / "log.csv")
        assert [int(row["step"]) for row in rows] == ([10, 16] if late else [10, 16, 20, 30])
    first, second = float(rows[0]["loss"]), float(rows[1]["loss"])
    assert (10 * first + 6 * second) / 16 == pytest.approx(float(read_csv(tmp_path / "rows" / "log.csv")[0]["loss"]))
    assert float(rows[2]["loss"]) < 0.7, "of labels alone"


def test_killed_behind_a_checkpoint_where_labels_begin(data: Splits, tmp_path: Path) -> None:
    """The row of the last tokens is written before the checkpoint, and stands once."""
    config = replace(TRAIN, labels_from=0.5)
    train_classifier(LIKELIHOOD, config, data, tmp_path / "whole", progress=False)
    update = _ClassifierTrainer._update

    def killed(trainer: _ClassifierTrainer) -> None:
        if trainer.done == 18:
            raise RuntimeError("killed")
        update(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ClassifierTrainer, "_update", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_classifier(LIKELIHOOD, config, data, tmp_path / "part", progress=False)
    steps = [int(row["step"]) for row in read_csv(tmp_path / "part" / "log.csv")]
    assert steps == [4, 8, 12, 15, 16], "an epoch has 15 updates"
    train_classifier(LIKELIHOOD, config, data, tmp_path / "part", progress=False, resume=True)
    for name in ("model.safetensors", "log.csv", "evaluations.csv"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_that_learnt_labels_does_not_go_back(data: Splits, stop_after: Any, tmp_path: Path) -> None:
    out, config = tmp_path / "run", replace(TRAIN, labels_from=0.5)
    stop_after(19)
    train_classifier(LIKELIHOOD, config, data, out, progress=False)
    stop_after(None)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for wrong, most, until in (
        ({"epochs": 4}, 0.3166, 30),
        ({"labels_from": 0.7}, 0.6333, 21),
        ({"labels_from": 1.0}, 0.6333, 30),
    ):
        other = replace(config, **wrong)  # type: ignore[arg-type]
        message = (
            rf"train\.labels_from of at most {most} with train\.epochs={other.epochs}.* learns labels by step 19, got "
            rf"{other.labels_from}, with which it would go back to tokens until step {until}; "
            rf"set train\.labels_from={most} to go on"
        )
        with pytest.raises(ConfigError, match=message):
            train_classifier(LIKELIHOOD, other, data, out, progress=False, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    # What the message says goes on, and so does a later beginning that lies behind.
    stop_after(20)
    config = replace(config, epochs=4, labels_from=0.3166)
    assert train_classifier(LIKELIHOOD, config, data, out, progress=False, resume=True).steps == 20
    assert all(float(row["loss"]) < 0.7 for row in read_csv(out / "log.csv") if int(row["step"]) > 15)


def test_when_labels_can_be_learnt(data: Splits, tmp_path: Path) -> None:
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=rf"train\.labels_from: wanted in \[0, 1\], got {wrong}"):
            replace(TRAIN, labels_from=wrong)
    with pytest.raises(ConfigError, match=r"wanted train\.labels_from=1 for a model that learns labels throughout"):
        train_classifier(MODEL, replace(TRAIN, labels_from=0.5), data, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    # Below 1 the last update learns them at least: a row ends before it.
    assert isinstance(data.train, LabelledWindows)
    almost = float(np.nextafter(1, 0))
    for part, updates, ends in ((0.75, 2, [1, 2]), (0.9, 4, [3, 4]), (almost, 3, [2, 3]), (0.5, 1, [1]), (1.0, 2, [2])):
        few = data._replace(train=data.train.take(slice(0, 8 * updates)))
        config, out = replace(TRAIN, epochs=1, labels_from=part, log_every=50), tmp_path / f"{updates} from {part}"
        train_classifier(LIKELIHOOD, config, few, out, progress=False)
        assert [int(row["step"]) for row in read_csv(out / "log.csv")] == ends


def test_passes_of_an_update_that_learns_labels() -> None:
    """Each reads no more sequences than the batch has, where it can be cut so."""
    for classes, parts, passes in ((8, 256, 8), (3, 256, 4), (8, 20, 10), (8, 13, 13), (4, 2, 2), (2, 1, 1)):
        assert _label_passes(replace(LIKELIHOOD, classes=classes), parts) == passes
    assert _label_passes(MODEL, 256) == 1


def test_rows_that_go_together_stay_in_one_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Six rows, two by two homologues, of two labels: three passes of two, where rows alone would make two of three."""
    bases = np.random.default_rng(0).integers(0, 4, 3000).astype(np.uint8)
    first = np.stack([np.arange(0, 2900, 64), np.arange(3000, 5900, 64)], 1).ravel()
    labels = np.tile(np.arange(2, dtype=np.uint8), len(first) // 2)
    rows = LabelledWindows(np.concatenate([bases, bases]), first, np.full(len(first), 20), labels, 2, 64, together=2)
    data = Splits(rows.take(slice(0, 60)), rows.take(slice(60, 76)), rows.take(slice(76, 92)))
    read, original = [], BackboneClassifier._read

    def record(self: BackboneClassifier, inputs: torch.Tensor, *rest: Any) -> Any:
        if self.training:
            read.append(inputs)
        return original(self, inputs, *rest)

    monkeypatch.setattr(BackboneClassifier, "_read", record)
    config = replace(TRAIN, epochs=1, batch_size=6, labels_from=0.5)
    assert train_classifier(LIKELIHOOD, config, data, tmp_path / "run", progress=False).steps == 10
    assert [len(inputs) for inputs in read] == [6] * 5 + [2 * 2] * 15  # a pass reads two rows under two labels
    for inputs in read[5:]:
        assert torch.equal(inputs[0], inputs[1]), "homologues, from one place and strand"


def test_a_run_from_before_a_field_was_there(data: Splits, tmp_path: Path) -> None:
    """It goes on with the field's default, to the same bits, and tells of no change."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    train_classifier(MODEL, TRAIN, data, whole, progress=False)
    train_classifier(MODEL, TRAIN, data, part, progress=False, seconds=0)
    facts = json.loads((part / "run.json").read_text())
    assert "head" not in facts["config"]["model"], "the linear head is told by saying nothing, as before there were two"
    del facts["config"]["train"]["multiple"]
    (part / "run.json").write_text(json.dumps(facts))
    train_classifier(MODEL, TRAIN, data, part, progress=False, resume=True)
    for name in ("model.safetensors", "log.csv", "evaluations.csv"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((part / "run.json").read_text())["history"] == []


def test_starts_from_pretrained_weights(data: Splits, tmp_path: Path) -> None:
    torch.manual_seed(3)
    CausalLM(BACKBONE).save_pretrained(tmp_path / "lm")
    slow = replace(TRAIN, epochs=1, lr=1e-12, min_lr=0.0)
    train_classifier(MODEL, slow, data, tmp_path / "run", progress=False, pretrained=tmp_path / "lm")
    tuned = BackboneClassifier.from_pretrained(tmp_path / "run").backbone.layers[0].mixer.in_proj.weight  # type: ignore[union-attr]
    start = CausalLM.from_pretrained(tmp_path / "lm").backbone.layers[0].mixer.in_proj.weight  # type: ignore[union-attr]
    assert torch.allclose(tuned, start, atol=1e-6)  # type: ignore[arg-type]
