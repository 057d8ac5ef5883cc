"""Training of classifiers: it learns, is judged honestly, and goes on to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from statescan.data.labelled import LabelledSequences
from statescan.errors import CheckpointError, ConfigError, DataError, TrainingError
from statescan.models import ClassifierConfig, SequenceClassifier
from statescan.train import latest_checkpoint
from statescan.train.classify import ClassifyConfig, Splits, judge, predictions, train_classifier
from statescan.train.classify import _ClassifierTrainer as Trainer
from statescan.train.logs import read_csv

MODEL = ClassifierConfig(
    classes=3, d_input=1, d_model=16, n_layer=2, d_state=8, mixer="s4d", dropout=0.1, pooling="last"
)
TRAIN = ClassifyConfig(epochs=3, batch_size=16, lr=1e-2, warmup=5, log_every=4, accelerator="cpu", threads=1)


def _pulses(count: int, seed: int) -> LabelledSequences:
    """Which third of the sequence the pulse is in."""
    draw = np.random.default_rng(seed)
    place = draw.integers(0, 18, count)
    values = draw.integers(0, 40, (count, 18)).astype(np.uint8)
    values[np.arange(count), place] = 255
    return LabelledSequences(values, (place // 6).astype(np.uint8), 3, mean=0.12, deviation=0.25)


def _ragged(count: int, seed: int) -> LabelledSequences:
    """Whether the sequence's first token is seen again later; of lengths 3 to 20."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, 21, count).astype(np.int32)
    values = np.where(np.arange(20) < lengths[:, None], draw.integers(1, 9, (count, 20)), 0).astype(np.uint8)
    labels = (values[:, 1:] == values[:, :1]).any(1).astype(np.uint8)
    return LabelledSequences(values, labels, 3, lengths, vocab_size=9)


@pytest.fixture
def data() -> Splits:
    return Splits(_pulses(130, 0), _pulses(40, 1), _pulses(50, 2))


def test_it_learns_and_the_test_is_judged_with_the_last_and_the_best_weights(data: Splits, tmp_path: Path) -> None:
    data = data._replace(train=_pulses(400, 0))
    result = train_classifier(MODEL, replace(TRAIN, epochs=12), data, tmp_path / "run", progress=False)
    assert (result.steps, result.epochs, result.interrupted) == (300, 12, False)
    assert result.final is not None
    assert result.best is not None
    assert result.final.accuracy > 0.8  # chance is a third
    last = SequenceClassifier.from_pretrained(tmp_path / "run")
    best = SequenceClassifier.from_pretrained(tmp_path / "run" / "best")
    assert judge(last, data.test) == result.final
    assert judge(best, data.test, batch_size=7) == pytest.approx(result.best)
    # The best epoch is the first with the highest validation accuracy, whatever the test says.
    accuracies = dict(result.evaluations)
    assert list(accuracies) == list(range(1, 13))
    assert result.best_epoch == max(accuracies, key=lambda epoch: accuracies[epoch])
    assert judge(best, data.valid).accuracy == accuracies[result.best_epoch]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["test"]["final"]["accuracy"] == result.final.accuracy
    assert run["test"]["best"] == {
        "epoch": result.best_epoch,
        "valid": accuracies[result.best_epoch],
        **result.best._asdict(),
    }
    rows = read_csv(tmp_path / "run" / "evaluations.csv")
    assert [float(row["accuracy"]) for row in rows] == list(accuracies.values())


def test_validation_chooses_the_epoch_whatever_the_test_says(data: Splits, tmp_path: Path) -> None:
    # Of the validation every label is another one: the better the model gets, the fewer are right.
    valid = replace(data.valid, labels=((data.valid.labels + 1) % 3).astype(np.uint8))
    data = data._replace(train=_pulses(400, 0), valid=valid)
    result = train_classifier(MODEL, replace(TRAIN, epochs=8), data, tmp_path / "run", progress=False)
    assert result.final is not None
    assert result.best is not None
    accuracies = dict(result.evaluations)
    best = SequenceClassifier.from_pretrained(tmp_path / "run" / "best")
    assert judge(best, valid).accuracy == accuracies[result.best_epoch] == max(accuracies.values())
    assert accuracies[8] < 0.2 < 0.7 < result.final.accuracy
    assert result.best.accuracy < result.final.accuracy
    assert (predictions(best, data.test) == data.test.labels).mean() == result.best.accuracy


def test_a_signal_with_the_last_update_leaves_a_finished_run_and_is_told(
    data: Splits, stop_after: Any, tmp_path: Path
) -> None:
    train = replace(TRAIN, epochs=1)
    steps = train_classifier(MODEL, train, data, tmp_path / "whole", progress=False).steps
    stop_after(steps)
    result = train_classifier(MODEL, train, data, tmp_path / "run", progress=False)
    assert (result.steps, result.interrupted, result.signalled) == (steps, False, True)
    assert result.final is not None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    # Time that is up is no signal.
    stop_after(None)
    late = train_classifier(MODEL, train, data, tmp_path / "late", progress=False, seconds=0)
    assert (late.interrupted, late.signalled) == (True, False)


def test_judging_counts_every_row_once_by_a_loop_of_its_own(data: Splits) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(replace(MODEL, dropout=0.5))
    right, loss = 0, 0.0
    model.eval()
    for row, label in zip(data.test.values, data.test.labels, strict=True):
        x = (torch.from_numpy(row.astype(np.float32)) / 255 - 0.12) / 0.25
        logits = model(x.reshape(1, -1, 1)).logits[0]
        right += int(logits.argmax()) == label
        loss -= float(torch.log_softmax(logits.detach(), -1)[label])
    model.train()
    found = judge(model, data.test, batch_size=8)
    assert model.training
    assert found.accuracy == right / 50
    assert found.loss == pytest.approx(loss / 50, rel=1e-5)


@pytest.mark.parametrize("kind", ["pulses", "ragged", "views"])
@pytest.mark.parametrize("step", [1, 8, 13])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(
    data: Splits, stop_after: Any, tmp_path: Path, kind: str, step: int
) -> None:
    model = MODEL
    if kind == "ragged":
        data = Splits(_ragged(130, 0), _ragged(40, 1), _ragged(50, 2))
        model = replace(MODEL, d_input=0, vocab_size=9, bidirectional=True)
    elif kind == "views":
        backwards = np.stack([np.arange(18), np.arange(17, -1, -1)]).astype(np.int32)
        data = data._replace(train=replace(data.train, views=backwards))
    whole = train_classifier(model, TRAIN, data, tmp_path / "whole", progress=False)
    stop_after(step)
    first = train_classifier(model, TRAIN, data, tmp_path / "parts", progress=False)
    assert first.interrupted
    assert first.final is None
    assert first.steps == step
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "interrupted"
    stop_after(None)
    # What the process draws meanwhile is no part of it.
    torch.randn(5)
    second = train_classifier(model, TRAIN, data, tmp_path / "parts", resume=True, progress=False)
    assert (second.final, second.best, second.evaluations) == (whole.final, whole.best, whole.evaluations)
    for name in ("log.csv", "evaluations.csv", "model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


def test_a_run_that_was_killed_starts_over_or_from_its_checkpoint(data: Splits, tmp_path: Path) -> None:
    train_classifier(MODEL, TRAIN, data, tmp_path / "whole", progress=False)

    class Killed(BaseException):
        pass

    def die(self: Trainer) -> None:
        if self.done == 12:
            raise Killed
        original(self)

    original = Trainer._update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", die)
        with pytest.raises(Killed):
            train_classifier(MODEL, TRAIN, data, tmp_path / "parts", progress=False)
    checkpoint = latest_checkpoint(tmp_path / "parts")
    assert checkpoint is not None
    assert checkpoint.step == 8
    assert len(read_csv(tmp_path / "parts" / "log.csv")) == 3  # step 12 came after the checkpoint
    train_classifier(MODEL, TRAIN, data, tmp_path / "parts", resume=True, progress=False)
    for name in ("log.csv", "evaluations.csv", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


def test_rows_are_read_through_their_views_in_training_alone(data: Splits) -> None:
    from statescan.train.classify import _Resident

    views = np.stack([np.arange(18), np.full(18, 18)]).astype(np.int32)  # as it is, or nothing but zeros
    resident = _Resident(replace(data.train, views=views, mean=0.0, deviation=1.0), torch.device("cpu"))
    rows = torch.arange(100)
    plain, labels, _ = resident.batch(rows, 18)
    torch.manual_seed(0)
    seen, same, _ = resident.batch(rows, 18, vary=True)
    gone = (seen == 0).all(1).squeeze(-1)
    assert 25 < int(gone.sum()) < 75
    assert torch.equal(seen[~gone], plain[~gone])
    assert torch.equal(labels, same)


def test_a_changed_run_says_since_when(data: Splits, tmp_path: Path) -> None:
    train_classifier(MODEL, replace(TRAIN, epochs=1), data, tmp_path / "run", progress=False, facts={"shift": 0})
    for epochs, shift in ((2, 0), (2, 0), (3, 1)):
        config = replace(TRAIN, epochs=epochs)
        train_classifier(MODEL, config, data, tmp_path / "run", resume=True, progress=False, facts={"shift": shift})
    history = json.loads((tmp_path / "run" / "run.json").read_text())["history"]
    assert history == [
        {"after_step": 8, "changed": {"epochs": [1, 2]}},
        {"after_step": 16, "changed": {"epochs": [2, 3], "shift": [0, 1]}},
    ]


def test_the_systems_of_s4_learn_at_their_own_rate(data: Splits, tmp_path: Path) -> None:
    """One update of Adam moves a weight by about its learning rate."""
    config = replace(TRAIN, epochs=1, batch_size=130, warmup=1, weight_decay=0.0)
    torch.manual_seed(config.seed)
    before = SequenceClassifier(MODEL).state_dict()
    train_classifier(MODEL, config, data, tmp_path / "run", progress=False)
    after = SequenceClassifier.from_pretrained(tmp_path / "run").state_dict()
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    for name, by in moved.items():
        system = name.rpartition(".")[2] in ("log_dt", "log_A_real", "A_imag", "B")
        assert by == pytest.approx(1e-3 if system else 1e-2, rel=0.02), name


def test_bad_settings(data: Splits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs: wanted >= 1, got 0"):
        ClassifyConfig(epochs=0)
    with pytest.raises(ConfigError, match=r"train\.lr: wanted > 0"):
        ClassifyConfig(lr=0)
    with pytest.raises(ConfigError, match=r"wanted a model with classes, vocab_size and d_input = \(3, 0, 1\)"):
        train_classifier(replace(MODEL, classes=4), TRAIN, data, tmp_path / "run")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"wanted train\.accelerator=cuda, which this machine has not"):
            train_classifier(MODEL, replace(TRAIN, accelerator="cuda"), data, tmp_path / "run")
    with pytest.raises(DataError, match=r"at least train\.batch_size = 500 examples, got 130"):
        train_classifier(MODEL, replace(TRAIN, batch_size=500), data, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"resume: wanted a run in"):
        train_classifier(MODEL, TRAIN, data, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_what_a_resumed_run_must_share(data: Splits, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_classifier(MODEL, replace(TRAIN, epochs=1), data, out, progress=False)
    with pytest.raises(ConfigError, match="wanted a folder without a run"):
        train_classifier(MODEL, TRAIN, data, out)
    for change in (
        {"model": replace(MODEL, d_state=16)},
        {"train": replace(TRAIN, seed=1)},
        {"train": replace(TRAIN, batch_size=8)},
        {"data": data._replace(train=_pulses(130, 5))},
        {"data": data._replace(test=_pulses(50, 5))},
    ):
        given = {"model": MODEL, "train": TRAIN, "data": data, **change}
        with pytest.raises(CheckpointError, match="with which the run began"):
            train_classifier(given["model"], given["train"], given["data"], out, resume=True)
    more = train_classifier(MODEL, replace(TRAIN, epochs=2), data, out, resume=True, progress=False)
    assert (more.steps, [epoch for epoch, _ in more.evaluations]) == (16, [1, 2])
    with pytest.raises(ConfigError, match=r"wanted train\.epochs of at least 2, which are done"):
        train_classifier(MODEL, replace(TRAIN, epochs=1), data, out, resume=True)


def test_gradients_that_are_no_numbers_end_the_run(data: Splits, tmp_path: Path) -> None:
    broken = data._replace(train=replace(data.train, deviation=0.0))
    config = replace(TRAIN, log_every=1, max_nonfinite=3)
    with pytest.raises(TrainingError, match="the last 3 gradients up to step 3 were infinite or no numbers"):
        train_classifier(MODEL, config, broken, tmp_path / "run", progress=False)
    assert [row["skipped"] for row in read_csv(tmp_path / "run" / "log.csv")] == ["1", "2", "3"]


def test_values_side_by_side_make_one_position():
    from statescan.train.classify import _Resident

    values = np.arange(24, dtype=np.uint8).reshape(2, 12)
    lengths = np.array([12, 5], np.int32)
    data = LabelledSequences(values, np.zeros(2, np.uint8), 2, lengths=lengths, frame=4)
    inputs, _, mask = _Resident(data, torch.device("cpu")).batch(torch.arange(2), 6)
    assert inputs.shape == (2, 2, 4)
    torch.testing.assert_close(255 * inputs[1, 1], torch.tensor([16.0, 17, 18, 19]))
    assert mask is not None
    # A position is real where any of its values is.
    assert mask.tolist() == [[True, True], [True, True]]
    _, _, mask = _Resident(data, torch.device("cpu")).batch(torch.arange(2), 12)
    assert mask is not None
    assert mask.tolist() == [[True, True, True], [True, True, False]]
