"""What a graph of a model's step refuses before it captures anything; the graphs themselves run in tests/gpu."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from statescan.errors import ConfigError
from statescan.generate.graphs import StepGraph
from statescan.models import CausalLM, preset


class Cache(NamedTuple):
    keys: Tensor
    length: int


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (
            Cache(torch.zeros(2, 4), 0),
            Cache(torch.zeros(2, 4), 1),
            "must lie in tensors on the device, a step made 1 of 0",
        ),
        (Cache(torch.zeros(2, 4), 0), Cache(torch.zeros(2, 5), 0), "(2, 4) torch.float32 became (2, 5) torch.float32"),
        (Cache(torch.zeros(2), 0), Cache(torch.zeros(2).half(), 0), "must keep shape and dtype"),
        ([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)], "must leave the state's structure as it is"),
    ],
)
def test_a_state_that_changes_otherwise_than_in_its_tensors(before: Any, after: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        StepGraph._refuse_change(before, after)
    StepGraph._refuse_change(before, before)


def test_it_runs_on_cuda_devices() -> None:
    with pytest.raises(ConfigError, match="must be on a CUDA device, its state is on 'cpu'"):
        StepGraph(CausalLM(preset("tiny")).eval(), 2)
