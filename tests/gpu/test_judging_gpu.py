"""Judging in pieces on a GPU, where a piece is one CUDA graph: the logits are those of whole sequences."""

from __future__ import annotations

import pytest
import torch

from statescan.data import InductionHeads
from statescan.data.synthetic import example_keys
from statescan.models import MambaConfig
from statescan.recipes.synthetic import _Reader, judge, judge_pieces, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("inner", ["s6", "s4"])
def test_graphs_of_pieces_read_as_whole_sequences(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MambaConfig(32, 2, 16, d_state=8, inner=inner, tie_embeddings=False)
    model = make_model(config, 0, "cuda").eval()
    task = InductionHeads(16_384 + 100)
    replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal replays
        replays += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    read = 0

    def told(tokens: int) -> None:
        nonlocal read
        read += tokens

    with torch.no_grad():
        # 32 pieces and a short one; then the same graph for other rows.
        reader = _Reader(model, task, 6, 512)
        for first in (0, 6):
            keys = example_keys(3, first, 6, "cuda")
            logits = reader.read(keys, told)
            batch = task.batch(3, first, 6, "cuda")
            whole = model(batch.inputs, logits_to_keep=1).logits
            assert whole is not None
            torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)
            assert torch.equal(task.answers(keys), batch.answers)
    assert read == 12 * task.length
    if inner == "s6":
        assert replays == (32 - 1) + 32


def test_blocks_of_rows_are_judged_as_whole_sequences() -> None:
    model = make_model(MambaConfig(32, 1, 16, d_state=8, tie_embeddings=False), 0, "cuda").eval()
    task = InductionHeads(8192)
    score = judge_pieces(model, task, 640, seed=3, first=5, at_once=256 * 512)
    whole = judge(model, task, 640, seed=3, first=5)
    assert score.examples == whole.examples == 640
    # Two answers of a random model may be equally likely but for rounding.
    assert abs(score.correct - whole.correct) <= 2
