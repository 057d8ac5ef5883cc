"""Runs in processes of their own that are stopped by signals, the one that can't be caught among them."""

import json
import signal

import pytest

from statescan.models import CausalLM
from statescan.train import latest_checkpoint, train


@pytest.mark.parametrize("where", ["write", "commit"])
def test_sigkill_while_a_checkpoint_is_written_loses_what_came_since_the_last(
    make_run, run_child, tmp_path, assert_same_run, where
):
    run = make_run(threads=1)
    child = run_child(tmp_path / "parts", run, "--hang", where, 8, wait=False)
    line = child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    _, errors = child.communicate()
    assert line == f"hanging in {where}\n", errors
    assert child.returncode == -signal.SIGKILL
    assert latest_checkpoint(tmp_path / "parts").step == 4
    # The child had one thread; so must the run that it is held against.
    train(run, tmp_path / "whole", progress=False)
    train(run, tmp_path / "parts", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", run)
    assert not list((tmp_path / "parts" / "checkpoints").glob(".*"))


def test_sigterm_ends_with_a_checkpoint_a_model_and_one_clear_line(make_run, run_child, tmp_path):
    child = run_child(tmp_path / "run", make_run(), "--signal", int(signal.SIGTERM), 6)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == {"steps": 6, "interrupted": True, "loss": pytest.approx(5, abs=1)}
    (line,) = [line for line in child.stderr.splitlines() if line.startswith("interrupted")]
    assert line.startswith("interrupted after step 6, which is saved; go on with: statescan.train.train(run, ")
    assert latest_checkpoint(tmp_path / "run").step == 6
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert CausalLM.from_pretrained(tmp_path / "run")
