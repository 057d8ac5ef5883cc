"""Runs of synthetic tasks: side by side as alone, broken off as in one go, judged in pieces as whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from statescan.data import InductionHeads, SelectiveCopying
from statescan.errors import CheckpointError, ConfigError
from statescan.models import CausalLM, MambaConfig, config_from_dict
from statescan.recipes import induction_heads, selective_copying, synthetic
from statescan.recipes.synthetic import (
    Pooled,
    Score,
    Stage,
    SyntheticRun,
    TrainedRun,
    _steps_seen,
    gather_runs,
    how_far,
    judge,
    judge_further,
    judge_pieces,
    make_model,
    percent,
    pooled,
    read_scores,
    score_row,
    train_runs,
    unfinished_runs,
    wilson,
    write_scores,
)

MODEL = MambaConfig(16, 1, 16, d_state=4)
RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "reproduce"


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


def test_the_time_is_looked_at_between_the_runs(tmp_path: Path, alone: TrainedRun) -> None:
    """One run makes twenty steps, the one that is furthest behind; nothing is kept of what made none."""
    runs, told = [_run(), _run(1)], []
    train_runs(runs, tmp_path, seconds=0, say=told.append)
    assert [line.split("s  ")[1] for line in told if "loss" not in line] == ["tiny-seed1  step 0 of 80"]
    assert not (tmp_path / "tiny-seed1" / "checkpoint.pt").exists()
    calls = [train_runs(runs, tmp_path, seconds=0, say=_silent)]
    while not all(run.finished for run in calls[-1]):
        calls.append(train_runs(runs, tmp_path, seconds=0, say=_silent))
    assert [[run.steps for run in trained] for trained in calls] == [
        [20, 20], [30, 20], [30, 30], [50, 30], [50, 50], [70, 50], [70, 70], [80, 70], [80, 80],
    ]  # fmt: skip
    assert _same(calls[-1][0], alone)
    assert _same(calls[-1][1], train_runs([_run(1)], tmp_path / "other", say=_silent)[0])


def test_what_is_not_in_the_report_yet_tells_how_far_it_is(tmp_path: Path) -> None:
    train_runs([_run(2)], tmp_path, say=_silent)
    train_runs([_run(3)], tmp_path, say=_silent)
    write_scores(tmp_path / "tiny-seed3", {12: score_row(Score(4, 4, 4), 0.5)})
    train_runs([_run(1)], tmp_path, seconds=0, say=_silent)
    (tmp_path / "tiny-seed0").mkdir()
    found = [(run["row"], run["seed"], how_far(run)) for run in unfinished_runs(tmp_path)]
    assert found == [("tiny", 1, "unfinished (step 20 of 80)"), ("tiny", 2, "trained, not judged")]
    assert [run["seed"] for run in gather_runs(tmp_path)] == [3]
    (tmp_path / "tiny-seed1" / "checkpoint.pt").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt' can't be read .* delete it, and the run begins anew"):
        unfinished_runs(tmp_path)


def test_an_interrupt_keeps_what_was_trained(tmp_path: Path, alone: TrainedRun) -> None:
    def press(_line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_runs([_run(stages=_run().stages)], tmp_path, seconds=0, say=press)
    state = torch.load(tmp_path / "tiny-seed0" / "checkpoint.pt", weights_only=True)
    assert state["steps"] == 20
    assert _same(train_runs([_run()], tmp_path, say=_silent)[0], alone)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(
    tmp_path: Path, alone: TrainedRun, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What is saved is a state that training came through, and the run ends as without the break."""
    calls = 0
    forward = CausalLM.forward

    def counted(self: CausalLM, *args: object, **given: object) -> object:
        nonlocal calls
        # In the ninth step of the second twenty.
        if (calls := calls + 1) == 29:
            os.kill(os.getpid(), number)
        return forward(self, *args, **given)  # type: ignore[arg-type]

    before = signal.getsignal(number)
    monkeypatch.setattr(CausalLM, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        train_runs([_run(), _run(1)], tmp_path, say=_silent)
    monkeypatch.undo()
    assert signal.getsignal(number) is before
    for seed in (0, 1):
        state = torch.load(tmp_path / f"tiny-seed{seed}" / "checkpoint.pt", weights_only=True)
        # The optimiser's own count of steps is that of the checkpoint.
        assert {int(of["step"]) for of in state["optimizer"]["state"].values()} == {state["steps"]}
    assert _same(train_runs([_run(), _run(1)], tmp_path, say=_silent)[0], alone)


def test_a_second_interrupt_leaves_the_checkpoint_before(
    tmp_path: Path, alone: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_runs([_run()], tmp_path, seconds=0, say=_silent)
    path = tmp_path / "tiny-seed0" / "checkpoint.pt"
    before, calls = path.read_bytes(), 0
    forward = CausalLM.forward

    def counted(self: CausalLM, *args: object, **given: object) -> object:
        nonlocal calls
        if (calls := calls + 1) in (5, 6):
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **given)  # type: ignore[arg-type]

    # What a terminal's Ctrl-C does; a shell starts jobs in the background with SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(CausalLM, "forward", counted)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_runs([_run()], tmp_path, say=_silent)
    finally:
        signal.signal(signal.SIGINT, handler)
    monkeypatch.undo()
    assert calls == 6
    assert path.read_bytes() == before
    assert _same(train_runs([_run()], tmp_path, say=_silent)[0], alone)


def test_a_run_that_ends_as_another_is_interrupted_is_not_lost(tmp_path: Path, alone: TrainedRun) -> None:
    """Its last steps are made, and the break comes before it is left in its folder: the next call does that."""

    def press(line: str) -> None:
        if "step 80 of 80" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_runs([_run()], tmp_path, say=press)
    folder = tmp_path / "tiny-seed0"
    assert not (folder / "trained.json").exists()
    told: list[str] = []
    trained = train_runs([_run(), _run(1)], tmp_path, say=told.append)[0]
    assert not any("tiny-seed0" in line for line in told)
    assert _same(trained, alone)
    assert [row[:2] for row in trained.log] == [row[:2] for row in alone.log]
    assert _same(train_runs([_run()], tmp_path, say=_silent)[0], alone)
    held = json.loads((folder / "trained.json").read_text())
    assert (held["steps"], held["together"]) == (80, 1)
    assert not (folder / "checkpoint.pt").exists()


def test_a_signal_in_the_last_steps_leaves_a_finished_run_and_is_told(
    tmp_path: Path, alone: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = 0, CausalLM.forward

    def counted(self: CausalLM, *args: object, **given: object) -> object:
        nonlocal calls
        if (calls := calls + 1) == 78:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(CausalLM, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        train_runs([_run()], tmp_path, say=_silent)
    assert calls == 80
    assert json.loads((tmp_path / "tiny-seed0" / "trained.json").read_text())["steps"] == 80
    assert _same(train_runs([_run()], tmp_path, say=_silent)[0], alone)
    assert calls == 80


def test_a_killed_process_loses_what_came_after_its_last_checkpoint(
    tmp_path: Path, alone: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "_LOOK_EVERY", 0.0)
    monkeypatch.setattr(synthetic, "_SAVE_EVERY", 0.0)

    def copy(line: str) -> None:
        if "step 50 " in line:
            shutil.copytree(tmp_path / "run", tmp_path / "killed")

    train_runs([_run()], tmp_path / "run", say=copy)
    state = torch.load(tmp_path / "killed" / "tiny-seed0" / "checkpoint.pt", weights_only=True)
    assert state["steps"] == 30
    assert _same(train_runs([_run()], tmp_path / "killed", say=_silent)[0], alone)


def test_another_model_does_not_get_the_scores_of_the_one_before(tmp_path: Path) -> None:
    """The cure that the message names: the file that says so is deleted, and the run is trained again."""
    train_runs([_run()], tmp_path, say=_silent)
    folder = tmp_path / "tiny-seed0"
    write_scores(folder, {12: score_row(Score(4, 4, 4), 0.5)})
    assert len(gather_runs(tmp_path)) == 1
    with pytest.raises(CheckpointError, match=r"trained\.json' is of a run with other settings \(lr = "):
        train_runs([_run(lr=1e-3)], tmp_path, say=_silent)
    assert read_scores(folder)[12]["correct"] == 4
    (folder / "trained.json").unlink()
    train_runs([_run(lr=1e-3)], tmp_path, say=_silent)
    assert read_scores(folder) == {}
    assert gather_runs(tmp_path) == []


@pytest.mark.parametrize("name", ["trained.json", "scores.json", "log.csv", "checkpoint.pt"])
@pytest.mark.parametrize("text", ["{", '{"run": 1, "12": {}}\n1'])
def test_a_damaged_file_is_named_with_its_cure(tmp_path: Path, name: str, text: str) -> None:
    train_runs([_run()], tmp_path, say=_silent, seconds=0 if name == "checkpoint.pt" else None)
    folder = tmp_path / "tiny-seed0"
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{name}' (can't be read \(.*; delete it, and|is of a run with other)"):
        read_scores(folder) if name == "scores.json" else train_runs([_run()], tmp_path, say=_silent)


def test_a_damaged_folder_is_named_by_the_report(tmp_path: Path) -> None:
    train_runs([_run()], tmp_path, say=_silent)
    write_scores(tmp_path / "tiny-seed0", {12: score_row(Score(4, 4, 4), 0.5)})
    (tmp_path / "tiny-seed0" / "trained.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"trained\.json' can't be read .* delete it, and the run is trained anew"
    ):
        gather_runs(tmp_path)


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
    assert score == (right, 40, 40, right)
    assert told[-1] == (40 * 64, 40 * 64)
    assert judge(model, task, 40, seed=7, at_once=at_once) == (right, 40, 40, right)


def test_several_answers_of_an_example_are_judged_each() -> None:
    # Of two symbols one is said right by guessing.
    task = SelectiveCopying(12, 3, 4)
    torch.manual_seed(1)
    model = CausalLM(MambaConfig(16, 1, 4, d_state=4, tie_embeddings=False)).eval()
    model.lm_head.weight.data[[0, 3]] = 0
    batch = task.batch(2, 0, 50)
    with torch.no_grad():
        right = (model(batch.inputs).logits[:, -3:].argmax(-1) == batch.answers).sum(1)  # type: ignore[index]
    squares = sum(count * count for count in right.tolist())
    assert int(right.sum()) < squares < 3 * int(right.sum())
    for at_once in (45, 10**6):
        assert judge(model, task, 50, seed=2, at_once=at_once) == (int(right.sum()), 150, 50, squares)


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
        (0.29, "29.0"),
        (0.57, "57.0"),
        (0.0, "0.0"),
        (1e-9, "0.0"),
        (0.999, "99.900"),
    ],
)
def test_only_what_is_perfect_says_100(accuracy: float, text: str) -> None:
    assert percent(accuracy) == text


def test_percents_are_those_of_the_counts() -> None:
    """Rounded down from the ratio itself, not from the float beside it."""
    for asked in (7, 29, 100, 512, 1000):
        for correct in range(asked):
            exact = Fraction(correct, asked)
            if exact < Fraction(999, 1000):
                assert percent(correct / asked) == f"{1000 * correct // asked // 10}.{1000 * correct // asked % 10}"


def _scores(*scores: Score) -> list[dict[str, Any]]:
    return [{"scores": {9: score_row(score, 1.0)}} for score in scores]


def test_without_squares_an_example_is_one_trial() -> None:
    """Sixteen answers a sequence, and three models on the same sequences, are no more trials than there are sequences:
    it is the interval of the worst case, where all answers to a sequence are right or wrong together."""
    both = pooled(_scores(Score(800, 1600, 100), Score(880, 1600, 100)), 9)
    assert both is not None
    assert both.accuracy == pytest.approx(1680 / 3200)
    assert both.trials == pytest.approx((52.5, 100))
    assert wilson(*both.trials) == pytest.approx((0.4280225, 0.6201278), abs=1e-6)
    assert wilson(*Score(1600, 1600, 100).trials)[1] == 1
    # Had each of 64 sequences been judged by both models and 192 more by one of them: 64 of twice the weight.
    uneven = pooled(_scores(Score(512, 1024, 64), Score(2048, 4096, 256)), 9)
    assert uneven is not None
    assert uneven.trials[1] == pytest.approx(320**2 / (64 * 4 + 192))


def test_answers_that_come_apart_count_as_more_trials() -> None:
    """n sequences of m answers: as many trials as p (1 - p) over the variance of the mean, between n and n m."""
    right = torch.tensor([[16] * 700 + [0] * 300, [16] * 500 + [12] * 400 + [0] * 100, [11] * 500 + [12] * 500])
    scores = [Score(int(r.sum()), 16_000, 1000, int(r.square().sum())) for r in right]
    for count, score in zip(right, scores, strict=True):
        share = torch.cat([count / 16, torch.tensor([0.0, 1.0])]).double()
        p = share.mean()
        wanted = min(16_000.0, float(1000 * p * (1 - p) / share.var(correction=0)))
        assert score.trials == pytest.approx((score.accuracy * wanted, wanted), rel=1e-6)
    # Together, as they come, and more evenly than single answers would.
    assert [round(score.trials[1]) for score in scores] == [1000, 1875, 16_000]


@pytest.mark.parametrize(("right", "squares"), [(4096 * 16, 4096 * 256), (0, 0)])
def test_without_an_error_an_example_is_one_trial(right: int, squares: int) -> None:
    """Nothing was seen that tells how errors hang together."""
    score = Score(right, 4096 * 16, 4096, squares)
    assert score.trials[1] == pytest.approx(4096)
    both = pooled(_scores(score, score), 9)
    assert both is not None
    assert wilson(*both.trials) == pytest.approx(wilson(*score._replace(squares=None).trials))


def test_few_errors_tell_little_of_how_they_hang_together() -> None:
    """Each in a sequence of its own: a design effect of 1 to the eye, near 16 after one and near 1 after many."""
    trials = [
        Score(4096 * 16 - wrong, 4096 * 16, 4096, (4096 - wrong) * 256 + wrong * 225).trials[1]
        for wrong in (0, 1, 10, 100, 1000)
    ]
    assert trials == sorted(trials)
    # Errors and one sequence all wrong: (n + 256) squares where single answers would have n + 16.
    for wrong, got in zip((1, 10, 100), trials[1:], strict=False):
        assert got == pytest.approx(4096 * 16 * (wrong + 16) / (wrong + 256), rel=0.01)


def test_models_that_were_judged_on_the_same_examples_are_no_independent_trials() -> None:
    one = Score(900 * 16, 16_000, 1000, 860 * 256 + 80 * 64)
    other = Score(950 * 16, 16_000, 1000, 930 * 256 + 40 * 64)
    same, both = pooled(_scores(one, one), 9), pooled(_scores(one, other), 9)
    assert same is not None
    assert both is not None
    assert same.trials == pytest.approx(one.trials)
    assert both.accuracy == pytest.approx(0.925)

    def error(score: Score | Pooled) -> float:
        return math.sqrt(score.accuracy * (1 - score.accuracy) / score.trials[1])

    # Wholly at the same examples: the mean's error is the mean of the errors.
    assert error(both) == pytest.approx((error(one) + error(other)) / 2, rel=1e-3)
    # One of a file without squares takes the others no further than sequences.
    mixed = pooled(_scores(one, other._replace(squares=None)), 9)
    assert mixed is not None
    assert 1000 <= mixed.trials[1] < both.trials[1]
    # Answers of which there is one an example: as many trials as examples, however different the models are.
    single = pooled(_scores(Score(100, 1000, 1000, 100), Score(999, 1000, 1000, 999)), 9)
    assert single is not None
    assert single.trials[1] == 1000


@pytest.mark.parametrize("wrong_together", [0.0, 0.2, 0.7])
def test_the_interval_holds_the_probability_as_often_as_it_says(wrong_together: float) -> None:
    """Sequences drawn anew 2,000 times: a part of them fails as a whole, the others answer by answer."""
    generator = torch.Generator().manual_seed(1)
    draws, examples, of_each, p_wrong = 2000, 500, 16, 0.06
    alone = (p_wrong - wrong_together * p_wrong) / (1 - wrong_together * p_wrong)
    failed = torch.rand(draws, examples, generator=generator) < wrong_together * p_wrong
    right = (torch.rand(draws, examples, of_each, generator=generator) >= alone).sum(-1).masked_fill(failed, 0)
    held = flat = 0
    for correct, squares in zip(right.sum(1).tolist(), right.square().sum(1).tolist(), strict=True):
        low, high = wilson(*Score(correct, examples * of_each, examples, squares).trials)
        held += low <= 1 - p_wrong <= high
        low, high = wilson(correct, examples * of_each)
        flat += low <= 1 - p_wrong <= high
    assert 0.935 < held / draws < 0.995
    # With single answers as trials it wouldn't.
    assert wrong_together == 0 or flat / draws < 0.8


def test_squares_are_kept_where_all_parts_have_them(tmp_path: Path) -> None:
    whole = score_row(Score(7, 8, 4, 13), 1.0)
    assert whole == {"correct": 7, "asked": 8, "examples": 4, "squares": 13, "seconds": 1.0}
    assert score_row(Score(3, 8, 4, 5), 1.0, whole)["squares"] == 18
    old = score_row(Score(3, 8, 4), 1.0)
    assert "squares" not in old
    assert score_row(Score(7, 8, 4, 13), 0.5, old) == {"correct": 10, "asked": 16, "examples": 8, "seconds": 1.5}
    write_scores(tmp_path, {9: whole, 12: old})
    assert read_scores(tmp_path) == {9: whole, 12: old}


@pytest.mark.parametrize(
    "wrong",
    [
        {"correct": 9},
        {"correct": -1, "squares": 1},
        {"asked": -8, "correct": -8},
        {"examples": 0},
        {"examples": 3},
        {"correct": 7.0},
        {"correct": True, "squares": 1},
        {"examples": "4"},
        {"squares": 0},
        # Seven of eight, two an example: 4 + 4 + 4 + 1 and nothing else.
        {"squares": 12},
        {"squares": 14},
        {"squares": None},
        {"seconds": float("nan")},
        {"seconds": -1},
        {"length": 0},
    ],
    ids=str,
)
def test_impossible_counts_are_a_damaged_file(tmp_path: Path, wrong: dict[str, Any]) -> None:
    whole = score_row(Score(7, 8, 4, 13), 1.0)
    row = {**whole, **wrong}
    text = json.dumps({row.pop("length", 9): row})
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"scores\.json' can't be read .* delete it, and the model is judged anew"
    ):
        read_scores(tmp_path)


def test_all_counts_that_can_be_are_read(tmp_path: Path) -> None:
    """Every way in which three sequences of two answers can be answered."""
    for right in itertools.product(range(3), repeat=3):
        held = {9: score_row(Score(sum(right), 6, 3, sum(count * count for count in right)), 1.0)}
        write_scores(tmp_path, held)
        assert read_scores(tmp_path) == held


def test_parts_are_kept_as_they_are_judged(tmp_path: Path, alone: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_JUDGED_AT_A_TIME", 100)
    asked: list[tuple[int, int]] = []

    def judged(first: int, count: int) -> Score:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append((first, count))
        return Score(count, 2 * count, count)

    with pytest.raises(KeyboardInterrupt):
        judge_further(alone, tmp_path, 30, 8, judged, say=_silent)
    assert asked == [(0, 3), (3, 3)]
    held = read_scores(tmp_path)[30]
    assert (held["correct"], held["asked"], held["examples"]) == (6, 12, 6)
    asked.clear()
    judge_further(alone, tmp_path, 30, 8, judged, say=_silent)
    judge_further(alone, tmp_path, 30, 7, judged, say=_silent)
    assert asked == [(6, 2)]
    assert read_scores(tmp_path)[30]["examples"] == 8


def test_scores_are_kept_and_pooled(tmp_path: Path) -> None:
    train_runs([_run(), _run(1)], tmp_path, say=_silent)
    assert gather_runs(tmp_path) == []
    for seed, right in ((0, 3), (1, 4)):
        folder = tmp_path / f"tiny-seed{seed}"
        score = judge(CausalLM.from_pretrained(folder).eval(), InductionHeads(12), 4, seed=1)._replace(
            correct=right, squares=right
        )
        write_scores(folder, {12: score_row(score, 0.5)})
    runs = gather_runs(tmp_path)
    assert [(run["row"], run["seed"], run["steps"], run["together"]) for run in runs] == [
        ("tiny", 0, 80, 2),
        ("tiny", 1, 80, 2),
    ]
    assert read_scores(tmp_path / "tiny-seed1")[12]["correct"] == 4
    assert pooled(runs, 12) == Pooled((Score(3, 4, 4, 3), Score(4, 4, 4, 4)))
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
        train_runs([_run(row=row, **fields)], tmp_path, say=_silent)[0]  # type: ignore[arg-type]
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


@pytest.mark.parametrize("layers", [1, 2])
def test_the_quiet_term_is_a_mean_over_layers(tmp_path: Path, layers: int) -> None:
    """The loss of the first step, computed from the initial weights."""
    run = _run(model=MODEL.replace(n_layer=layers), stages=(Stage(InductionHeads(12), 3, 20),), quiet=0.5)
    logged = train_runs([run], tmp_path, say=_silent)[0].log[0]
    model = make_model(run.model, 0, "cpu")
    batch = InductionHeads(12).batch(0, 0, 3)
    with _steps_seen(model, weights=True) as seen:
        logits = model(batch.inputs, logits_to_keep=1).logits
    assert logits is not None
    assert len(seen) == layers
    wrong = F.cross_entropy(logits[:, -1], batch.answers[:, 0])
    above = sum(float(F.relu(z + 20).mean().detach()) for z in seen) / layers
    assert above > 1
    assert logged[0] == 1
    assert logged[1] == pytest.approx(float(wrong.detach()) + 0.5 * above, rel=1e-5)


def _recorded(fields: dict[str, Any]) -> SyntheticRun:
    """The run that a file of results tells; a field that it doesn't know has its default."""
    model = {name: value for name, value in fields["model"].items() if name != "kind"}
    stages = []
    for stage in fields["stages"]:
        kind = {"InductionHeads": InductionHeads, "SelectiveCopying": SelectiveCopying}[stage["task"].pop("kind")]
        stages.append(Stage(**{**stage, "task": kind(**stage["task"])}))
    return SyntheticRun(**{**fields, "model": config_from_dict(model), "stages": tuple(stages)})


@pytest.mark.parametrize(
    ("name", "recipe", "rows"),
    [
        ("induction-heads", induction_heads.induction_run, {*induction_heads.ROWS}),
        ("selective-copying", selective_copying.selective_copying_run, {"mamba-s6"}),
        (
            "selective-copying-rows",
            partial(selective_copying.selective_copying_run, share=0.25),
            {*selective_copying.ROWS},
        ),
        (
            "selective-copying-ablation",
            partial(selective_copying.selective_copying_run, share=0.25),
            {"mamba-s6", *selective_copying.ABLATION},
        ),
        (
            "selective-copying-ablation-128",
            partial(selective_copying.selective_copying_run, length=128, share=0.25),
            {"mamba-s6", *(row for row in selective_copying.ABLATION if row.startswith("selective-"))},
        ),
    ],
)
def test_the_recipes_are_those_of_the_runs_on_record(
    name: str, recipe: Callable[[str, int], SyntheticRun], rows: set[str]
) -> None:
    """Every setting of every row of the tables in docs/reproduction.md."""
    runs = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))["runs"]
    assert {run["row"] for run in runs} == rows
    for run in runs:
        wanted = recipe(run["row"], run["seed"])
        assert run["steps"] == wanted.steps
        assert _recorded(run["run"]) == wanted


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"quiet": 1.0, "quiet_weights_after": 40}, {"quiet": 1.0, "quiet_weights_after": 80}),
        ({"bf16": True}, {}),
        ({"clip": 0.0}, {"clip": 0.05}),
        ({"clip": 0.05}, {"clip": 0.5}),
        ({"decay": 0.0}, {}),
        ({"beta2": 0.99}, {}),
    ],
    ids=lambda fields: ",".join(fields),
)
def test_each_setting_counts(tmp_path: Path, one: dict[str, Any], other: dict[str, Any]) -> None:
    trained = [
        train_runs([_run(row=row, **fields)], tmp_path, say=_silent)[0] for row, fields in (("a", one), ("b", other))
    ]
    assert not _same(*trained)
