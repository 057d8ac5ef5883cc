"""Which models' packed updates may become one CUDA graph: those that never look at where the documents start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from statescan.data import PackedSampler, WindowSampler
from statescan.models import MambaConfig, S4Config
from statescan.train import loop


def lacks(config: Any, sampler: type) -> str | None:
    trainer: Any = SimpleNamespace(
        device=torch.device("cuda"),
        fabric=SimpleNamespace(world_size=1),
        config=SimpleNamespace(compile=False, accumulate=1),
        sampler=object.__new__(sampler),
        model_config=config,
    )
    return loop._Trainer._capture_lacks(trainer)


@pytest.mark.parametrize("fields", [{}, {"block": "h3"}, {"A_init": "s4d-lin"}, {"inner": "none"}], ids=str)
def test_a_scan_takes_packed_documents_in_a_graph(fields: dict[str, Any]) -> None:
    config = MambaConfig(d_model=8, n_layer=1, vocab_size=11, **fields)
    assert lacks(config, PackedSampler) is None


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(d_model=8, n_layer=1, vocab_size=11, inner="s4"),
        MambaConfig(d_model=8, n_layer=1, vocab_size=11, inner="s4d", block="h3"),
        S4Config(d_model=8, n_layer=1, vocab_size=11),
    ],
    ids=str,
)
def test_a_convolution_over_whole_documents_does_not(config: Any) -> None:
    said = lacks(config, PackedSampler)
    assert said is not None
    assert said.startswith("data.packing=false, or layers that take packed documents")
    assert lacks(config, WindowSampler) is None
