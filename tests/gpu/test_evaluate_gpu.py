"""Likelihoods on a GPU: shared beginnings, many batches in flight, against float64 on the host."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from statescan.errors import ShapeError
from statescan.evaluate import Request, StateReader
from statescan.models import CausalLM, MambaConfig
from statescan.ops import _cuda, causal_conv1d
from statescan.testing import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    reason = _cuda.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("share", [True, False])
def test_as_on_the_host(share: bool) -> None:
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    model = CausalLM(MambaConfig(d_model=64, n_layer=3, vocab_size=500)).eval()
    contexts = [draw.integers(0, 500, draw.integers(1, 60)) for _ in range(60)]
    ask = [Request(context, draw.integers(0, 500, draw.integers(1, 30))) for context in contexts for _ in range(4)]
    truth = StateReader(copy.deepcopy(model).double()).score(ask)
    # What float32 on the host makes of it is the budget of float32 on the GPU.
    host = StateReader(model, share=share).score(ask)
    reader = StateReader(copy.deepcopy(model).cuda(), share=share, batch_tokens=700)
    for _ in range(2):
        got = reader.score(ask)
        values, wide, narrow = (
            torch.tensor([answer.logprob for answer in answers], dtype=torch.float64) for answers in (got, truth, host)
        )
        assert_within_budget(values.float(), wide, narrow.float())
        assert sum(a.greedy != b.greedy for a, b in zip(got, truth, strict=True)) == 0


def test_boundaries_are_read_once_and_again_when_they_change() -> None:
    x, weight = torch.randn(1, 9, 8, device="cuda"), torch.randn(8, 4, device="cuda")
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32, device="cuda")
    first = causal_conv1d(x, weight, cu_seqlens=offsets).y
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # where the host would wait for the device
    try:
        again = causal_conv1d(x, weight, cu_seqlens=offsets).y
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, first)
    offsets[1] = 10
    with pytest.raises(ShapeError, match="must never fall, got 10 followed by 9"):
        causal_conv1d(x, weight, cu_seqlens=offsets)
