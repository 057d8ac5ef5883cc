"""DNA on a GPU: what is captured in a graph gives the bits of what runs kernel by kernel, at every length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from statescan.bench.long_window import long_window
from statescan.data.windows import LabelledWindows, window_rows
from statescan.models import BackboneClassifierConfig, MambaConfig
from statescan.train import DataConfig, RunConfig, TrainConfig, train
from statescan.train.classify import ClassifyConfig, Splits, train_classifier

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BACKBONE = MambaConfig(d_model=32, n_layer=2, vocab_size=5)


@pytest.mark.parametrize(
    ("together", "head", "labels_from"),
    [(1, "linear", 1.0), (2, "linear", 1.0), (1, "likelihood", 1.0), (1, "likelihood", 0.5), (2, "likelihood", 0.5)],
)
def test_windows_are_cut_in_the_graph_as_outside(together: int, head: str, labels_from: float, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 20_000).astype(np.uint8)
    first, room = window_rows(np.array([[0, 20_000]]), 100)
    labels = (np.arange(len(first)) % 2).astype(np.uint8)
    rows = LabelledWindows(tokens, first, room, labels, 2, 100, together=together)
    data = Splits(rows.take(slice(0, 120)), rows.take(slice(120, 160)), rows.take(slice(160, 200)))
    dropout = 0.1 if head == "linear" else 0.0
    model = BackboneClassifierConfig(2, BACKBONE, reverse_complement=True, dropout=dropout, head=head)
    config = ClassifyConfig(
        epochs=2, batch_size=8, warmup=2, log_every=5, accelerator="cuda", precision="bf16", labels_from=labels_from
    )
    captured = train_classifier(model, config, data, tmp_path / "captured", progress=False)
    plain = train_classifier(model, replace(config, capture=False), data, tmp_path / "plain", progress=False)
    assert (captured.final, captured.evaluations) == (plain.final, plain.evaluations)
    for name in ("log.csv", "model.safetensors"):
        assert (tmp_path / "captured" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name


def test_a_length_warm_up_has_a_graph_a_length(tmp_path: Path) -> None:
    bases = np.random.default_rng(0).integers(0, 4, 60_000).astype(np.uint8)
    np.savez(tmp_path / "g.npz", seq=bases, reclen=np.array([60_000]), names=np.array(["a"]))
    config = TrainConfig(
        steps=12, batch_size=2, length=1024, first_length=256, stage_steps=4, log_every=1, evaluate_every=0,
        checkpoint_every=0, precision="bf16", accelerator="cuda", lr=1e-2, warmup=2,
    )  # fmt: skip
    paths = (str(tmp_path / "g.npz"),)
    run = RunConfig(BACKBONE, DataConfig(paths=paths, modality="dna", tokenizer="dna", cache=str(tmp_path)), config)
    train(run, tmp_path / "captured", progress=False)
    train(replace(run, train=replace(config, capture=False)), tmp_path / "plain", progress=False)
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("captured", "plain")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 13


def test_memory_of_a_long_window_is_counted() -> None:
    kept, made_again = (long_window(replace(BACKBONE, recompute=name), 1 << 16) for name in ("none", "block"))
    assert kept.peak_bytes is not None
    assert made_again.peak_bytes is not None
    assert made_again.peak_bytes < kept.peak_bytes < 8 << 30
    assert kept.loss == pytest.approx(made_again.loss, rel=1e-5)
