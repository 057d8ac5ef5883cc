"""Runs of synthetic tasks: side by side as alone, broken off as in one go, judged in pieces as whole."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from statescan.data import InductionHeads, SelectiveCopying
from statescan.errors import CheckpointError, ConfigError
from statescan.models import CausalLM, MambaConfig
from statescan.recipes.synthetic import (
    Stage,
    SyntheticRun,
    TrainedRun,
    _steps_seen,
    gather_runs,
    judge,
    judge_pieces,
    make_model,
    percent,
    pooled,
    read_scores,
    score_row,
    train_runs,
    wilson,
    write_scores,
)

MODEL = MambaConfig(16, 1, 16, d_state=4)


def _run(seed: int = 0, row: str = "tiny", **fields: object) -> SyntheticRun:
    stages = (Stage(InductionHeads(12), 3, 30), Stage(InductionHeads(20), 2, 50))
    return dataclasses.replace(
        SyntheticRun(row, MODEL, stages, seed, lr=5e-3, warmup=5, decay=0.5, clip=1.0, beta2=0.95),
        **fields,  # type: ignore[arg-type]
    )


def _weights(trained: TrainedRun) -> dict[str, torch.Tensor]:
    return trained.model.state_dict()


def _same(one: TrainedRun, other: TrainedRun) -> bool:
    mine, theirs = _weights(one), _weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _silent(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train_runs([_run()], tmp_path_factory.mktemp("alone"), say=_silent)[0]


def test_side_by_side_is_as_alone(tmp_path: Path, alone: TrainedRun) -> None:
    both = train_runs([_run(), _run(1)], tmp_path, say=_silent)
    assert _same(both[0], alone)
    assert not _same(both[1], alone)
    assert [row[:2] for row in both[0].log] == [row[:2] for row in alone.log]


def test_broken_off_is_as_in_one_go(tmp_path: Path, alone: TrainedRun) -> None:
    calls = 0
    while not (trained := train_runs([_run()], tmp_path, seconds=0, say=_silent)[0]).finished:
        assert trained.steps == 20 * (calls := calls + 1) - 10 * (calls > 1)
        assert (tmp_path / "tiny-seed0" / "checkpoint.pt").exists()
    assert calls >= 3
    assert _same(trained, alone)
    assert [row[:2] for row in trained.log] == [row[:2] for row in alone.log]
    assert not (tmp_path / "tiny-seed0" / "checkpoint.pt").exists()


def test_an_interrupt_keeps_what_was_trained(tmp_path: Path, alone: TrainedRun) -> None:
    def press(_line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_runs([_run(stages=_run().stages)], tmp_path, seconds=0, say=press)
    state = torch.load(tmp_path / "tiny-seed0" / "checkpoint.pt", weights_only=True)
    assert state["steps"] == 20
    assert _same(train_runs([_run()], tmp_path, say=_silent)[0], alone)


def test_what_is_finished_is_read_and_not_trained_again(tmp_path: Path, alone: TrainedRun) -> None:
    train_runs([_run()], tmp_path, say=_silent)
    told: list[str] = []
    again = train_runs([_run()], tmp_path, say=told.append)[0]
    assert told == []
    assert again.finished
    assert _same(again, alone)
    assert again.log[-1][0] == 80
    with pytest.raises(CheckpointError, match="of a run with other settings"):
        train_runs([_run(lr=1e-3)], tmp_path, say=_silent)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    train_runs([_run()], tmp_path, seconds=0, say=_silent)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt' is of a run with other settings"):
        train_runs([_run(beta2=0.9)], tmp_path, say=_silent)


def test_names_are_distinct(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="distinct names"):
        train_runs([_run(), _run(lr=1.0)], tmp_path, say=_silent)


@dataclass(frozen=True)
class _Watched:
    """A task that remembers which examples were asked for."""

    length: int
    seen: list[tuple[int, int]] = field(default_factory=list, compare=False)

    vocab_size = 16
    asked = 1
    chance = 1 / 15
    symbols = InductionHeads().symbols

    @property
    def total_length(self) -> int:
        return self.length

    def batch(self, seed, first, rows, device=None):  # type: ignore[no-untyped-def]
        self.seen.append((int(first), rows))
        return InductionHeads(self.length).batch(seed, first, rows, device)


def test_no_example_comes_twice(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    stages = (Stage(_Watched(8, seen), 3, 50), Stage(_Watched(9, seen), 2, 30))
    for _ in range(6):
        train_runs([_run(stages=stages)], tmp_path, seconds=0, say=_silent)
    numbers = [number for first, rows in seen for number in range(first, first + rows)]
    assert numbers == list(range(50 * 3 + 30 * 2))


def test_the_learning_rate_rises_stays_and_falls() -> None:
    run = _run(lr=1.0, warmup=10, decay=0.25)
    rates = [run.learning_rate(step) for step in range(80)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert set(rates[9:61]) == {1.0}
    assert rates[60:] == pytest.approx([n / 20 for n in range(20, 0, -1)])
    assert {dataclasses.replace(run, warmup=0, decay=0.0).learning_rate(step) for step in range(80)} == {1.0}


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (make_model(MODEL, seed, "cpu").state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["backbone.embedding.weight"], other["backbone.embedding.weight"])


@pytest.mark.parametrize("at_once", [9, 50, 700, 10**6])
def test_judged_in_pieces_as_whole(at_once: int) -> None:
    task = InductionHeads(64)
    torch.manual_seed(1)
    model = CausalLM(MODEL.replace(tie_embeddings=False)).eval()
    batch = task.batch(7, 0, 40)
    with torch.no_grad():
        answers = model(batch.inputs).logits[:, -1].argmax(-1)  # type: ignore[index]
    right = int((answers == batch.answers[:, 0]).sum())
    assert 0 < right < 40
    told: list[tuple[int, int]] = []
    score = judge_pieces(model, task, 40, seed=7, at_once=at_once, progress=lambda *done: told.append(done))
    assert score == (right, 40, 40)
    assert told[-1] == (40 * 64, 40 * 64)
    assert judge(model, task, 40, seed=7, at_once=at_once) == (right, 40, 40)


def test_several_answers_of_an_example_are_judged_each() -> None:
    task = SelectiveCopying(12, 3, 5)
    model = CausalLM(MambaConfig(16, 1, 5, d_state=4)).eval()
    batch = task.batch(2, 0, 50)
    with torch.no_grad():
        right = (model(batch.inputs).logits[:, -3:].argmax(-1) == batch.answers).sum()  # type: ignore[index]
    assert judge(model, task, 50, seed=2, at_once=45) == (int(right), 150, 50)


def test_pieces_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the model sees more tokens at once than asked for, however long the sequence is."""
    model = CausalLM(MODEL).eval()
    sizes: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **given: (sizes.append(ids.numel()), forward(ids, **given))[1])
    judge_pieces(model, InductionHeads(5000), 3, seed=0, at_once=1024)
    assert max(sizes) <= 1024
    assert sum(sizes) == 15000


def test_wilson() -> None:
    # R's prop.test(8, 10, correct = FALSE) and the closed forms at the ends.
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    low, high = wilson(4096, 4096)
    assert high == 1
    assert low == pytest.approx(4096 / (4096 + 1.959964**2))
    assert wilson(0, 50)[0] == 0


@pytest.mark.parametrize(
    ("accuracy", "text"),
    [
        (1.0, "100"),
        (65535 / 65536, "99.9984"),
        (4095 / 4096, "99.975"),
        (0.9989, "99.8"),
        (0.5, "50.0"),
        (0.0671, "6.7"),
    ],
)
def test_only_what_is_perfect_says_100(accuracy: float, text: str) -> None:
    assert percent(accuracy) == text


def test_scores_are_kept_and_pooled(tmp_path: Path) -> None:
    train_runs([_run(), _run(1)], tmp_path, say=_silent)
    assert gather_runs(tmp_path) == []
    for seed, right in ((0, 3), (1, 4)):
        folder = tmp_path / f"tiny-seed{seed}"
        score = judge(CausalLM.from_pretrained(folder).eval(), InductionHeads(12), 4, seed=1)._replace(correct=right)
        write_scores(folder, {12: score_row(score, 0.5)})
    runs = gather_runs(tmp_path)
    assert [(run["row"], run["seed"], run["steps"], run["together"]) for run in runs] == [
        ("tiny", 0, 80, 2),
        ("tiny", 1, 80, 2),
    ]
    assert read_scores(tmp_path / "tiny-seed1")[12]["correct"] == 4
    assert pooled(runs, 12) == (7, 8)
    assert pooled(runs, 13) is None


def test_a_small_run_learns_its_task(tmp_path: Path) -> None:
    task = SelectiveCopying(6, 1, 5)
    stages = (Stage(task, 32, 240),)
    run = SyntheticRun("learns", MambaConfig(16, 1, 5, d_state=4), stages, 0, lr=1e-2, decay=0.5)
    trained = train_runs([run], tmp_path, say=_silent)[0]
    assert judge(trained.model, task, 300, seed=10**6).accuracy > 0.97


def test_quiet_sinks_the_steps_from_its_time_on_and_to_its_floor(tmp_path: Path) -> None:
    """Without: as plain training. With: the steps go down, in a model that trains on, those above the floor alone."""
    plain, never, none, late, quiet = (
        train_runs([_run(row=row, **fields)], tmp_path, say=_silent)[0]
        for row, fields in (
            ("plain", {}),
            ("never", {"quiet": 1.0, "quiet_after": 80}),
            ("none", {"quiet": 1.0, "quiet_floor": 5.0}),
            ("late", {"quiet": 1.0, "quiet_after": 75}),
            ("quiet", {"quiet": 1.0, "quiet_after": 20, "quiet_weights_after": 50}),
        )
    )
    assert _same(plain, never)
    # Nothing lies above this floor.
    assert _same(plain, none)
    batch = InductionHeads(20).batch(9, 0, 16)
    steps = []
    for trained in (plain, late, quiet):
        with _steps_seen(trained.model, weights=True) as seen:
            trained.model(batch.inputs)
        (z,) = seen
        assert z.shape == (16, 20, 32)
        steps.append(z)
    assert steps[1].mean() < steps[0].mean()
    assert steps[2].mean() < steps[1].mean() - 0.1
    # What is looked at is what the layer computes; and nothing of it stays on the model.
    mixer = quiet.model.backbone.layers[0].mixer
    for weights, wanted in ((True, ["dt_proj.weight", "dt_proj.bias"]), (False, ["dt_proj.bias"])):
        with _steps_seen(quiet.model, weights=weights) as seen:
            quiet.model(batch.inputs)
        assert torch.equal(seen[0], steps[2])
        names, parameters = zip(*quiet.model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(seen[0].sum(), parameters, allow_unused=True)
        moved = [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]
        assert moved == [f"backbone.layers.0.mixer.{name}" for name in wanted]
    assert not mixer.dt_proj._forward_hooks  # type: ignore[union-attr]
