"""Runs of synthetic tasks on a GPU, a stream and a CUDA graph each: side by side as alone, broken off as in one go."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from statescan.data import InductionHeads, SelectiveCopying
from statescan.models import MambaConfig
from statescan.recipes.synthetic import Stage, SyntheticRun, TrainedRun, judge, train_runs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Two stages whose updates are no multiples of a graph's, and the quiet term from the middle of the second on.
STAGES = (Stage(InductionHeads(12), 4, 50), Stage(InductionHeads(20), 3, 70))
RUN = SyntheticRun(
    "tiny", MambaConfig(16, 2, 16, d_state=4), STAGES, 0, lr=1e-3, warmup=5, decay=0.5, clip=1.0, quiet=1e-3,
    quiet_after=70, quiet_weights_after=90,
)  # fmt: skip


def _same_but_for_rounding(one: TrainedRun, other: TrainedRun) -> None:
    """Initial weights that differ by 1e-5 of themselves move no loss of these by more than 1e-5; another seed, 0.2."""
    assert [row[0] for row in one.log] == [row[0] for row in other.log] == list(range(1, 121))
    losses = (torch.tensor([row[1] for row in trained.log]) for trained in (one, other))
    torch.testing.assert_close(*losses, rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train_runs([RUN], tmp_path_factory.mktemp("alone"), device="cuda", say=lambda line: None)[0]


def test_as_on_a_cpu(tmp_path: Path, alone: TrainedRun) -> None:
    _same_but_for_rounding(train_runs([RUN], tmp_path, say=lambda line: None)[0], alone)


def test_side_by_side_is_as_alone(tmp_path: Path, alone: TrainedRun) -> None:
    runs = [dataclasses.replace(RUN, seed=seed) for seed in (0, 1, 2)]
    trained = train_runs(runs, tmp_path, device="cuda", say=lambda line: None)
    _same_but_for_rounding(trained[0], alone)
    for other in trained[1:]:
        apart = torch.tensor([row[1] - at[1] for row, at in zip(other.log, alone.log, strict=True)]).abs().max()
        assert apart > 0.02


def test_broken_off_is_as_in_one_go(tmp_path: Path, alone: TrainedRun) -> None:
    calls = 0
    while not (trained := train_runs([RUN], tmp_path, device="cuda", seconds=0, say=lambda line: None)[0]).finished:
        state = torch.load(tmp_path / "tiny-seed0" / "checkpoint.pt", weights_only=True, map_location="cpu")
        assert {int(of["step"]) for of in state["optimizer"]["state"].values()} == {trained.steps}
        calls += 1
    assert calls >= 6
    _same_but_for_rounding(trained, alone)


def test_several_runs_learn_their_task(tmp_path: Path) -> None:
    task = SelectiveCopying(6, 1, 5)
    config = MambaConfig(16, 1, 5, d_state=4)
    runs = [
        SyntheticRun("learns", config, (Stage(task, 32, 300),), seed, lr=1e-2, decay=0.5, bf16=seed == 1)
        for seed in (0, 1)
    ]
    for trained in train_runs(runs, tmp_path, device="cuda", say=lambda line: None):
        assert trained.finished
        assert trained.log[-1][0] == 300
        assert judge(trained.model, task, 300, seed=10**6).accuracy > 0.97
