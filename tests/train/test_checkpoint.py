import json
import os

import pytest
import torch
from torch import nn

from statescan.errors import CheckpointError
from statescan.train import GuardedAdamW, TrainConfig, latest_checkpoint, list_checkpoints
from statescan.train.checkpoint import load_checkpoint, random_states, save_checkpoint, set_random_states


def trained(width=3, seed=0, updates=2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
    guarded = GuardedAdamW(model, TrainConfig())
    for _ in range(updates):
        model(torch.randn(5, 4)).square().sum().backward()
        guarded.step(1e-2)
    return model, guarded.optimizer


def save(folder, step, model, optimizer, keep=3):
    return save_checkpoint(folder, step, model, optimizer, trainer={"step": step}, rank_state={"mine": step}, keep=keep)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_and_back(tmp_path):
    model, optimizer = trained()
    path = save(tmp_path, 7, model, optimizer)
    assert path.name == "step-00000007"
    other, other_optimizer = trained(seed=1, updates=0)
    found = latest_checkpoint(tmp_path)
    assert found.trainer_state() == {"step": 7}
    assert load_checkpoint(found, other, other_optimizer) == {"mine": 7}
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert optimizer.state[one].keys() == other_optimizer.state[two].keys()
        for name, tensor in optimizer.state[one].items():
            assert torch.equal(tensor, other_optimizer.state[two][name]), name
    # And the next update is the same too (what the guard left in the first optimiser is of the update before).
    torch.manual_seed(3)
    x = torch.randn(5, 4)
    optimizer.grad_scale = optimizer.found_inf = None
    for one, its in ((model, optimizer), (other, other_optimizer)):
        one.zero_grad()
        for group in its.param_groups:
            group["lr"] = 1e-2  # the schedule sets it before each update; no checkpoint holds it
        one(x).square().sum().backward()
        its.step()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_the_newest_stay(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 30, 100_000_000):
        save(tmp_path, step, model, optimizer, keep=2)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [30, 100_000_000]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, *trained())
    model, optimizer = trained(seed=5)
    save(tmp_path, 1, model, optimizer)
    other, other_optimizer = trained(seed=1)
    load_checkpoint(latest_checkpoint(tmp_path), other, other_optimizer)
    assert torch.equal(model[0].weight, other[0].weight)


def test_what_is_not_whole_is_no_checkpoint(tmp_path):
    save(tmp_path, 1, *trained())
    whole = save(tmp_path, 2, *trained())
    for name in [path.name for path in whole.iterdir()]:
        content = (whole / name).read_bytes()
        for broken in (None, content[:-1], b""):
            if broken is None:
                (whole / name).unlink()
            else:
                (whole / name).write_bytes(broken)
            assert latest_checkpoint(tmp_path).step == 1, (name, broken)
        (whole / name).write_bytes(content)
        assert latest_checkpoint(tmp_path).step == 2
    (whole / "manifest.json").write_text(json.dumps({"format": 99, "files": {}}))
    assert latest_checkpoint(tmp_path).step == 1
    (tmp_path / "checkpoints" / ".writing-step-00000009").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("")
    assert latest_checkpoint(tmp_path).step == 1
    assert latest_checkpoint(tmp_path / "elsewhere") is None


def test_what_a_crash_left_is_cleared_by_the_next_save(tmp_path):
    (tmp_path / "checkpoints" / ".writing-step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".writing-step-00000001" / "x").write_text("")
    (tmp_path / "checkpoints" / ".removing-step-00000000").mkdir()
    save(tmp_path, 1, *trained())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("limit", [0, 300, 3000])
def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path, limit):
    resource = pytest.importorskip("resource")
    model, optimizer = trained(width=200)
    save(tmp_path, 1, model, optimizer)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(CheckpointError, match=r"could not write .*step-00000002: File too large; older") as raised:
            save(tmp_path, 2, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before
    assert latest_checkpoint(tmp_path).step == 1
    save(tmp_path, 2, model, optimizer)
    assert latest_checkpoint(tmp_path).step == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(tmp_path, 1, *trained())


def test_another_model_is_named(tmp_path):
    save(tmp_path, 1, *trained())
    found = latest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"wanted '.*0.weight' of shape \(5, 4\), got \(3, 4\)"):
        load_checkpoint(found, *trained(width=5))
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    with pytest.raises(
        CheckpointError, match=r"is of another model: '.*0.bias': the checkpoint has it, this run does not"
    ):
        load_checkpoint(found, model, GuardedAdamW(model, TrainConfig()).optimizer)


def test_damaged_tensors_of_the_right_size_are_named(tmp_path):
    path = save(tmp_path, 1, *trained())
    content = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(b"x" * len(content))
    with pytest.raises(CheckpointError, match="can't be read") as raised:
        load_checkpoint(latest_checkpoint(tmp_path), *trained())
    assert "\n" not in str(raised.value)


def test_random_states_go_on():
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random_states()
    drawn = [draw() for _ in range(3)]
    set_random_states(states)
    assert [draw() for _ in range(3)] == drawn
