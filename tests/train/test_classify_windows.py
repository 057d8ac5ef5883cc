"""Classifiers of genome windows: what they are shown, that they learn, and that they go on to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from statescan.data import reverse_complement
from statescan.data.labelled import LabelledOrder
from statescan.data.windows import LabelledWindows, window_rows
from statescan.errors import CheckpointError, DataError
from statescan.models import CausalLM, MambaConfig
from statescan.models.backbone_classifier import BackboneClassifier, BackboneClassifierConfig
from statescan.train.classify import ClassifyConfig, Splits, _ResidentWindows, train_classifier
from statescan.train.logs import read_csv

BACKBONE = MambaConfig(d_model=16, n_layer=1, vocab_size=5)
MODEL = BackboneClassifierConfig(2, BACKBONE, reverse_complement=True, dropout=0.1)
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
    model = replace(MODEL, dropout=0.0, head="likelihood")
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
