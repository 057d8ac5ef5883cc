"""The model that comes with the package is what commands take where none is named, and what training goes on from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from statescan.cli.models import stored_dtype
from statescan.data import ByteTokenizer
from statescan.models import CausalLM, MambaConfig
from statescan.recipes import shipped

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in the place of the packaged one."""
    torch.manual_seed(0)
    folder = tmp_path / "shipped" / "builtin"
    CausalLM(MambaConfig(16, 2, 256), dtype=torch.bfloat16).save_pretrained(folder)
    ByteTokenizer().save(folder)
    monkeypatch.setattr(shipped, "_FOLDER", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    return folder


def test_commands_take_it_where_no_model_is_named(run: Run, builtin: Path, tmp_path: Path) -> None:
    options = ("--prompt", "Call me", "--seed", 3, "--max-new-tokens", 8, "--json")
    written = run("generate", *options)
    assert written.code == 0, written.err
    for name in ("builtin", "packaged:builtin", builtin):
        assert json.loads(run("generate", *options, "--model", name).out) == json.loads(written.out)
    (tmp_path / "text.txt").write_text("It was the best of times. " * 10)
    judged = json.loads(run("evaluate", "--data", "text.txt", "--json").out)
    assert judged["model"] == "builtin"
    assert judged["bits_per_byte"] > 0
    assert run("inspect", "It was the whale.", "-o", tmp_path / "page.html").code == 0


def test_a_folder_of_that_name_comes_first(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(1)
    ByteTokenizer().save(CausalLM(MambaConfig(8, 1, 256)).save_pretrained(tmp_path / "builtin"))
    assert "float32" in run("generate", "--model", "builtin", "--prompt", "x", "--max-new-tokens", 1).err


def test_weights_are_packed_as_they_are_stored(run: Run, builtin: Path, tmp_path: Path) -> None:
    assert stored_dtype(builtin) == "bfloat16"
    CausalLM(MambaConfig(8, 1, 256)).save_pretrained(tmp_path / "wide")
    assert stored_dtype(tmp_path / "wide") == "float32"
    assert "bfloat16" in run("generate", "--prompt", "x", "--max-new-tokens", 1).err
    assert "int8" in run("generate", "--prompt", "x", "--max-new-tokens", 1, "--dtype", "int8").err


@pytest.mark.parametrize("lora", [0, 2])
def test_training_goes_on_from_it_and_commands_open_the_result(
    run: Run, builtin: Path, tmp_path: Path, lora: int
) -> None:
    pytest.importorskip("lightning_fabric")
    if lora:
        pytest.importorskip("peft")
    (tmp_path / "mine.txt").write_text("A rose is a rose is a rose. " * 200)
    small = ("train.steps=12", "train.length=32", "train.accelerator=cpu", f"data.cache={tmp_path}", "train.lr=0.03")
    options = [part for override in small for part in ("--set", override)]
    ran = run("train", "--from", "builtin", "--lora", lora, "--data", "mine.txt", "--out", "tuned", *options, "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    first, last = facts["evaluations"][0], facts["evaluations"][-1]
    assert last["bits_per_byte"] < first["bits_per_byte"]
    # What it began with is the packaged model.
    before = json.loads(run("evaluate", "--data", "mine.txt", "--last", 0.05, "--context", 32, "--json").out)
    assert first["bits_per_byte"] == pytest.approx(before["bits_per_byte"], abs=0.02)
    after = json.loads(
        run("evaluate", "--model", "tuned", "--data", "mine.txt", "--last", 0.05, "--context", 32, "--json").out
    )
    assert after["bits_per_byte"] == pytest.approx(last["bits_per_byte"], abs=0.02)
    assert (tmp_path / "tuned" / "adapter" / "adapter_config.json").exists() == bool(lora)
    assert run("generate", "--model", "tuned", "--prompt", "A", "--max-new-tokens", 3).code == 0
    other = run("train", "--resume", "--lora", 5, "--out", "tuned")
    assert other.code == 1
    assert f"wanted --lora {lora}, which the run has, got 5" in other.err


def test_a_text_that_makes_the_model_worse_is_told_and_the_best_is_named(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    (tmp_path / "mine.txt").write_text("A rose is a rose is a rose. " * 20)
    (tmp_path / "other.txt").write_bytes(bytes(range(256)) * 4)
    common = ("train", "--from", "builtin", "--data", "mine.txt", "--valid", "other.txt", "--set", "train.length=16")
    common = (*common, "--set", "train.accelerator=cpu", "--set", f"data.cache={tmp_path}", "--set", "train.lr=0.1")
    ran = run(*common, "--out", "short")
    assert ran.code == 0, ran.err
    # 560 bytes three times, in updates of 8 x 16.
    assert "13 updates; 3 passes at most" in ran.err
    assert "is better on the held-out text" in ran.err
    assert "--model short/best --prompt" in ran.err
    facts = json.loads(run(*common, "--out", "long", "--set", "train.steps=15", "--json").out)
    assert facts["steps"] == 15


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--lora", 2, "--data", "x"), "--lora 2 wants --from MODEL"),
        (("--from", "builtin"), "wanted a text"),
        (("--from", "nowhere", "--data", "x"), "'nowhere', which does not exist"),
        (("--from", "builtin", "--task", "smnist"), "--from is for texts"),
        (("--from", "builtin", "--data", "x", "--preset", "mini"), "wanted a --preset with d_model = 16"),
    ],
)
def test_what_does_not_go_together_is_named(run: Run, tmp_path: Path, arguments: tuple[Any, ...], told: str) -> None:
    (tmp_path / "x").write_text("x" * 5000)
    ran = run("train", *arguments, "--out", tmp_path / "out")
    assert ran.code == 1
    assert told in ran.err
    assert not (tmp_path / "out").exists()


def test_the_demo_s_next_line_goes_on_with_the_text_that_was_learnt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = {"seconds": {"all": 2.0, "training": 1.0}, "files": ["model"], "samples": [{"prompt": "A rose's "}]}
    monkeypatch.setattr("statescan.recipes.demo.demo", lambda out, **settings: summary)
    line = run("demo", "--out", "shown").out.splitlines()[-1]
    assert shlex.split(line)[:6] == ["statescan", "generate", "--model", "shown/model", "--prompt", "A rose's "]
