import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from statescan.models import CausalLM, MambaConfig
from statescan.train import DataConfig, GuardedAdamW, RunConfig, TrainConfig, latest_checkpoint
from statescan.train.checkpoint import _tensors, load_checkpoint
from statescan.train.classify import _ClassifierTrainer

CHILD = Path(__file__).with_name("child.py")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text of a few thousand bytes, so that a short run goes through it more than once."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"{number} green bottles, standing on the wall.\n" for number in range(60)))
    return path


@pytest.fixture
def make_run(corpus, tmp_path_factory):
    """A small run, with fields set by keyword: train's by their name, others with their part."""
    cache = tmp_path_factory.getbasetemp() / "token-cache"

    def make(**fields):
        model = MambaConfig(d_model=16, n_layer=2, vocab_size=256, d_state=4)
        data = DataConfig(paths=(str(corpus),), valid_fraction=0.1, cache=str(cache))
        train = TrainConfig(
            steps=12, batch_size=4, length=32, lr=1e-2, warmup=3, evaluate_every=5, evaluate_tokens=200,
            checkpoint_every=4, keep_checkpoints=2, log_every=3, accelerator="cpu",
        )  # fmt: skip
        overrides = [
            f"{name.replace('__', '.') if '__' in name else 'train.' + name}={v}" for name, v in fields.items()
        ]
        return RunConfig(model, data, train).apply_overrides(overrides)

    return make


@pytest.fixture
def run_child(tmp_path):
    """Start child.py; gives the finished process, or the running one with wait=False."""

    def start(out, run, *options, wait=True):
        config = tmp_path / f"{Path(out).name}.json"
        config.write_text(run.to_json())
        command = [sys.executable, str(CHILD), str(out), str(config), *map(str, options)]
        environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
        environment["OMP_NUM_THREADS"] = "1"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
        if not wait:
            return subprocess.Popen(command, **pipes)
        return subprocess.run(command, **pipes, timeout=240, check=False)

    return start


@pytest.fixture
def stop_after(monkeypatch):
    """A function that makes the training of a classifier get a SIGINT after an update."""

    def arrange(step: int | None) -> None:
        def update(self: _ClassifierTrainer) -> None:
            original(self)
            if self.done == step:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(_ClassifierTrainer, "_update", update)

    original = _ClassifierTrainer._update
    return arrange


@pytest.fixture
def saved_tensors():
    return _saved_tensors


def _saved_tensors(out, run):
    """Every tensor of a run's newest checkpoint, and the step: weights and moments, whole."""
    checkpoint = latest_checkpoint(out)
    model = CausalLM(run.model)
    optimizer = GuardedAdamW(model, run.train).optimizer
    load_checkpoint(checkpoint, model, optimizer)
    return checkpoint.step, {name: tensor.clone() for name, tensor in _tensors(model, optimizer).items()}


@pytest.fixture
def assert_same_run():
    return _assert_same_run


def _assert_same_run(one, other, run):
    """Two runs are equal to the bit: weights, moments, counters, random states, logs, and the model that came out."""
    step, tensors = _saved_tensors(one, run)
    other_step, other_tensors = _saved_tensors(other, run)
    assert step == other_step
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
    assert latest_checkpoint(one).trainer_state() == latest_checkpoint(other).trainer_state()
    states = [torch.load(latest_checkpoint(out).path / "rank-00000.pt", weights_only=True) for out in (one, other)]
    assert torch.equal(states[0]["random"]["torch"], states[1]["random"]["torch"])
    assert states[0]["random"]["python"] == states[1]["random"]["python"]
    (_, keys, *rest), (_, other_keys, *other_rest) = (state["random"]["numpy"] for state in states)
    assert torch.equal(keys, other_keys)
    assert rest == other_rest
    for name in ("log.csv", "evaluations.csv", "model.safetensors", "config.json", "best/model.safetensors"):
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes(), name
    results = [json.loads((Path(out) / "run.json").read_text()) for out in (one, other)]
    assert results[0]["evaluations"] == results[1]["evaluations"]
    assert results[0]["best"] == results[1]["best"]
