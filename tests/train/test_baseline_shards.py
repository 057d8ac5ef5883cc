"""Sharded over two processes (gloo) the baselines train as on one: weights that a module holds twice, S4's marks."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from statescan.models import RecurrentConfig, S4Config, TransformerConfig

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)

SMALL: dict[str, Any] = {"d_model": 16, "n_layer": 2, "vocab_size": 256}
CONFIGS = {
    "pythia": TransformerConfig(
        **SMALL, n_head=2, mlp="gelu", norm="layer", bias=True, parallel=True, tie_embeddings=False
    ),
    "lstm": RecurrentConfig(**SMALL),  # torch's module keeps its weights in a list beside its parameters
    "s4": S4Config(**SMALL, mixer="s4", d_state=4),  # whose system learns no faster than 0.001
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_is_whole(make_run, run_child, tmp_path, name: str) -> None:
    losses = []
    for devices, strategy in ((1, "auto"), (2, "fsdp")):
        run = make_run(steps=3, warmup=1, evaluate_every=0, log_every=1, devices=devices, strategy=strategy)
        done = run_child(tmp_path / strategy, dataclasses.replace(run, model=CONFIGS[name]), "--double")
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(json.loads(done.stdout.strip().splitlines()[-1])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
