"""Windows of several lengths on a GPU: a graph for each, in turns, gives the bits of what runs kernel by kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from statescan.models import MambaConfig
from statescan.train import DataConfig, RunConfig, TrainConfig, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_mixed_lengths_have_a_graph_a_length(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"{number * number % 97} of them;" for number in range(20_000)))
    config = TrainConfig(
        steps=30, batch_size=2, length=1024, shortest_length=256, log_every=1, evaluate_every=0, checkpoint_every=0,
        precision="bf16", accelerator="cuda", lr=1e-2, warmup=2,
    )  # fmt: skip
    data = DataConfig(paths=(str(tmp_path / "text.txt"),), cache=str(tmp_path))
    run = RunConfig(MambaConfig(d_model=32, n_layer=2, vocab_size=256, dropout=0.1), data, config)
    train(run, tmp_path / "captured", progress=False)
    train(replace(run, train=replace(config, capture=False)), tmp_path / "plain", progress=False)
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("captured", "plain")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 31
