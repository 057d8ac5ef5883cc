"""The demo leaves what it names, goes on where it was interrupted, and harms nothing that isn't its own."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from statescan.data import ByteTokenizer
from statescan.errors import ConfigError, DataError
from statescan.evaluate import ngram_bits_per_byte
from statescan.models import CausalLM, MambaConfig
from statescan.recipes import demo as recipe
from statescan.recipes import shipped
from statescan.recipes.demo import demo, demo_run
from statescan.train import train

pytest.importorskip("lightning_fabric")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model in the place of the packaged one."""
    torch.manual_seed(0)
    folder = tmp_path / "shipped" / "builtin"
    CausalLM(MambaConfig(16, 1, 256, initializer_range=0.08), dtype=torch.bfloat16).save_pretrained(folder)
    ByteTokenizer().save(folder)
    monkeypatch.setattr(shipped, "_FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(recipe, "_JUDGED", 2000)


def test_a_demo_leaves_what_it_names_and_is_replaced_by_the_next(tmp_path: Path) -> None:
    out, lines = tmp_path / "demo", []
    summary = demo(out, steps=3, say=lines.append, progress=False)
    assert [name for name in summary["files"] if not (out / name).exists()] == []
    assert json.loads((out / "summary.json").read_text())["bits_per_byte"] == summary["bits_per_byte"]
    assert [entry["step"] for entry in summary["evaluations"]] == [0, 1, 2, 3]
    assert summary["evaluations"][-1]["bits_per_byte"] < summary["evaluations"][0]["bits_per_byte"]
    assert summary["bits_per_byte"] < summary["bits_per_byte_before"]
    # It writes before it learns, and what it wrote stands beside what it writes then.
    assert "writes on from" in lines[0]
    assert "before" in lines[-1].splitlines()[1]
    assert "after" in lines[-1].splitlines()[1]
    assert all(sample["before"] != sample["after"] for sample in summary["samples"])
    assert any("5-gram" in line for line in lines)
    assert any("worse than 5-gram" in line for line in lines)  # three updates don't beat it, and it says so
    assert f"{summary['bits_per_byte']:.4f}" in (out / "summary.md").read_text()

    from statescan.data import build_token_file

    learnt, held_out = build_token_file(recipe.CORPUS).split(0.05)
    held_out = held_out[:2001]
    assert summary["yardsticks"]["5-gram"] == pytest.approx(ngram_bits_per_byte(learnt.tobytes(), held_out.tobytes()))
    assert summary["held_out_bytes"] == len(held_out)

    (out / "notes.txt").write_text("precious")
    with pytest.raises(ConfigError, match="an earlier demo's folder"):
        demo(out, steps=3, say=lines.append, progress=False)
    assert (out / "notes.txt").read_text() == "precious"
    (out / "notes.txt").unlink()
    (out / "samples.txt").write_text("stale")
    again = demo(out, steps=3, say=lines.append, progress=False)
    assert (out / "samples.txt").read_text() != "stale"
    # The same machine, the same figures (another precision may have been the faster one in the probe).
    if again["run"] == summary["run"]:
        assert again["bits_per_byte"] == summary["bits_per_byte"]


def test_an_interrupted_demo_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = demo_run(steps=4, seed=1)
    monkeypatch.setattr(recipe, "_probe", lambda: {"float32": 0.1, "bf16": 0.2})
    tmp_path = tmp_path / "demo"

    def stop(self: recipe.Callback, step: int, path: Path) -> None:
        if step == 2:
            raise KeyboardInterrupt

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(recipe._Watch, "on_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path, steps=4, seed=1, say=lines.append, progress=False)
    assert not any("going on" in line for line in lines)
    # Killed while it wrote a file, it would have left this.
    (tmp_path / ".samples.txt.12.0a1b2c3d.tmp").write_text("")
    summary = demo(tmp_path, steps=4, seed=1, say=lines.append, progress=False)
    assert any("going on where it was interrupted" in line for line in lines)
    assert summary["steps"] == 4
    train(run, tmp_path / "whole", progress=False)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


def test_a_signal_with_the_last_update_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_probe", lambda: {"float32": 0.1, "bf16": 0.2})

    def stop(self: recipe.Callback, row: dict[str, float]) -> None:
        if row["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(recipe._Watch, "on_log", stop)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path / "demo", steps=3, say=lines.append, progress=False)
    assert not (tmp_path / "demo" / "samples.txt").exists()
    summary = demo(tmp_path / "demo", steps=3, say=lines.append, progress=False)
    assert any("going on where it was interrupted" in line for line in lines)
    assert summary["steps"] == 3


def test_a_slow_machine_trains_fewer_steps_and_its_time_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "_probe", lambda: {"float32": 0.5, "bf16": 2.0})
    resumed, run, _ = recipe._plan(tmp_path / "slow", [recipe.CORPUS], None, 0, 10**6)
    assert not resumed
    assert (run.train.steps, run.train.precision) == (150, "float32")
    # A short text is not learnt by heart.
    assert recipe._plan(tmp_path / "short", [recipe.CORPUS], None, 0, 20_480)[1].train.steps == 60
    monkeypatch.setattr(recipe, "_LIMIT", 0.0)
    summary = demo(tmp_path / "ended", steps=30, say=lambda line: None, progress=False)
    assert summary["stopped_by_time"]
    assert summary["steps"] < 30
    assert "stopped by its time limit" in (tmp_path / "ended" / "summary.md").read_text()


def test_a_text_of_ones_own_is_learnt(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(f"The rose {i} is a rose and will be a rose for ever." for i in range(300)))
    lines: list[str] = []
    summary = demo(tmp_path / "demo", data=[str(text)], steps=2, say=lines.append, progress=False)
    assert summary["text"] == str(text)
    assert all(sample["prompt"].startswith("The rose ") for sample in summary["samples"])
    text.write_text("x")
    with pytest.raises(DataError, match="wanted a text of some thousand bytes"):
        demo(tmp_path / "none", data=[str(text)], say=lines.append, progress=False)


def test_columns_hold_both_texts() -> None:
    lines = recipe._side_by_side("before", "aa bb cc", "after", "dd", width=5).splitlines()
    assert [line.split("  |  ") for line in lines] == [
        ["before", "after"], ["-----", "-----"], ["aa bb", "dd"], ["cc     |"],
    ]  # fmt: skip


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    tmp_path = tmp_path / "other"
    tmp_path.mkdir()
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="--out must be new, empty or an earlier demo's folder"):
        demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    with pytest.raises(ConfigError, match="got the file"):
        demo(tmp_path / "thesis.txt")


def test_a_stranger_in_a_demos_folder_is_left_alone(tmp_path: Path) -> None:
    tmp_path = tmp_path / "demo"
    tmp_path.mkdir()
    (tmp_path / recipe._MARK).write_text("")
    (tmp_path / "summary.md").write_text("a demo's")
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="--out must be new, empty or an earlier demo's folder"):
        demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_model_that_train_made_is_no_demo(tmp_path: Path) -> None:
    tmp_path = tmp_path / "run"
    train(demo_run(steps=1), tmp_path / "model", progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="--out must be new, empty or an earlier demo's folder"):
        demo(tmp_path, steps=1, say=lambda line: None, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_demo_that_makes_it_worse_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def harmful(*given: Any, **named: Any) -> Any:
        run = demo_run(*given, **named)
        return dataclasses.replace(run, train=dataclasses.replace(run.train, lr=5.0, warmup=0))

    lines: list[str] = []
    monkeypatch.setattr(recipe, "demo_run", harmful)
    summary = demo(tmp_path / "demo", steps=2, say=lines.append, progress=False)
    assert summary["bits_per_byte"] > summary["bits_per_byte_before"]
    assert any("So the model is the better as it came" in line for line in lines)
