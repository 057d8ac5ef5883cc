"""Training on windows of several lengths: an update has one of them and as many ids as any; runs resume to the bit."""

from __future__ import annotations

import pytest
import torch
from test_loop import InterruptAt

from statescan.data import MixedLengthSampler, build_token_file
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.models import CausalLM
from statescan.train import CapturedStep, loop, train
from statescan.train.logs import read_csv


@pytest.mark.parametrize("captured", [False, True])
def test_a_run_of_mixed_lengths_resumes_to_the_same_bits(make_run, tmp_path, assert_same_run, monkeypatch, captured):
    if captured:  # as on a GPU; a graph's parts run here one after the other
        monkeypatch.setattr(loop._Trainer, "_capture_lacks", lambda self: None)
    run = make_run(shortest_length=8, accumulate=2)
    train(run, tmp_path / "whole", progress=False)
    assert train(run, tmp_path / "parts", progress=False, callbacks=[InterruptAt(6)]).interrupted
    train(run, tmp_path / "parts", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", run)
    with pytest.raises(CheckpointError, match=r"wanted train\.shortest_length = 8, with which the run began, got 0"):
        train(make_run(accumulate=2), tmp_path / "parts", resume=True, progress=False)


def test_an_update_is_the_gradient_of_its_windows(make_run, tmp_path, corpus, saved_tensors):
    run = make_run(steps=1, shortest_length=4, accumulate=2, evaluate_every=0, clip=0, seed=5)
    result = train(run, tmp_path / "run", progress=False)
    ids, _ = build_token_file(corpus, cache=run.data.cache).split(0.1)
    windows = torch.from_numpy(MixedLengthSampler(ids, 32, 4, 4, 5).next_batch(4))
    assert windows.shape == (4 * 4, 8 + 1), "a seed whose first update has shorter windows"
    torch.manual_seed(5)
    model = CausalLM(run.model).double()
    loss = model(windows[:, :-1], labels=windows).loss
    loss.backward()
    assert result.train_loss == pytest.approx(loss.item(), rel=1e-6)
    _, tensors = saved_tensors(tmp_path / "run", run)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        moment = tensors[f"optimizer.exp_avg.{name}"].double() / (1 - run.train.betas[0])
        torch.testing.assert_close(moment, parameter.grad, rtol=1e-3, atol=float(parameter.grad.abs().max()) * 1e-4)


def test_a_graph_for_each_length(make_run, tmp_path, monkeypatch):
    run = make_run(shortest_length=8)
    plain = train(run, tmp_path / "plain", progress=False)
    monkeypatch.setattr(loop._Trainer, "_capture_lacks", lambda self: None)
    seen: dict[int, set[tuple[int, ...]]] = {}
    real = CapturedStep.step

    def step(self, windows):
        seen.setdefault(id(self), set()).add(tuple(windows.shape))
        return real(self, windows)

    monkeypatch.setattr(CapturedStep, "step", step)
    captured = train(run, tmp_path / "captured", progress=False)
    assert captured.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
    assert sorted(shape for shapes in seen.values() for shape in shapes) == [(4, 33), (8, 17), (16, 9)]
    assert all(len(shapes) == 1 for shapes in seen.values())
    rows = (tmp_path / "captured" / "log.csv").read_text().splitlines()
    assert rows[-1].split(",")[2] == str(12 * 4 * 32), "as many ids in every update"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"shortest_length": 12}, ConfigError, r"shortest_length: wanted train\.length = 32 divided by a power of two"),
        ({"shortest_length": 64}, ConfigError, r"divided by a power of two, got 64"),
        ({"shortest_length": 8, "initial_state": "carry"}, ConfigError, r"wanted 0 with train\.initial_state=carry"),
        ({"shortest_length": 8, "data__packing": "true"}, ConfigError, r"packing=false with train\.shortest_length"),
        ({"shortest_length": 8, "batch_size": 40}, DataError, r"for each of the lengths \[8, 16, 32\]"),
    ],
)
def test_what_does_not_go_together_is_named(make_run, tmp_path, fields, error, message):
    with pytest.raises(error, match=message):
        train(make_run(**fields), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs gloo")
def test_two_processes_take_the_course_of_one(make_run, run_child, tmp_path):
    fields = {"shortest_length": 8, "log_every": 1, "evaluate_every": 0, "checkpoint_every": 0, "steps": 5}
    torch.set_default_dtype(torch.float64)
    try:
        train(make_run(**fields), tmp_path / "one", progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    child = run_child(tmp_path / "two", make_run(devices=2, strategy="ddp", **fields), "--double")
    assert child.returncode == 0, child.stderr[-3000:]
    one, two = ([float(row["loss"]) for row in read_csv(tmp_path / name / "log.csv")] for name in ("one", "two"))
    assert len(one) == 5
    # In float64; logged from float32, rounded in each process and in their sum.
    assert two == pytest.approx(one, rel=4 * 2**-24)
