"""`statescan train` with model.block, model.inner and their like, and the other commands on what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from statescan.models import CausalLM, parameter_count

TEXT = "The whale swam. The men rowed after it, and the sea was cold and wide. " * 60
SMALL = ("model.d_model=16", "model.n_layer=2", "model.d_state=4", "train.steps=2", "train.batch_size=2")
Run = Callable[..., tuple[int, str, str]]
CHOICES = [
    ("model.inner=s4",),
    ("model.inner=s4d-real", "model.block=ungated"),
    ("model.inner=none", "data.packing=true"),
    ("model.inner=s4d", "model.block=h3", "data.packing=true"),
    ("model.block=h3", "model.recompute=cheap"),
    ("model.selective=B,dt",),
    ("model.selective=none", "model.A_init=random"),
    ("model.A_init=s4d-lin", "model.recompute=block"),
    ("model.dt_rank=none",),
]


@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
def test_train_then_the_rest(choice: tuple[str, ...], tmp_path: Path, run: Run) -> None:
    text, out = tmp_path / "whale.txt", tmp_path / "run"
    text.write_text(TEXT)
    settings = [flag for each in (*SMALL, "train.length=32", "train.log_every=1", *choice) for flag in ("--set", each)]
    code, _, err = run("train", "--data", text, "--out", out, *settings)
    assert code == 0, err
    model = CausalLM.from_pretrained(out)
    for each in choice:
        name, _, value = each.partition("=")
        if name.startswith("model."):
            assert str(getattr(model.config, name.removeprefix("model."))) == value

    code, printed, err = run(
        "generate", "--model", out, "--prompt", "Call me", "--max-new-tokens", 5, "--seed", 1, "--json"
    )
    assert code == 0, err
    assert len(json.loads(printed)[0]["tokens"]) == 5
    code, printed, err = run("info", out, "--json")
    assert code == 0, err
    assert json.loads(printed)["parameters"] == parameter_count(model.config)


def test_a_choice_that_makes_no_sense_ends_in_one_line(tmp_path: Path, run: Run) -> None:
    text = tmp_path / "whale.txt"
    text.write_text(TEXT)
    code, out, err = run(
        "train",
        "--data",
        text,
        "--out",
        tmp_path / "run",
        "--set",
        "model.inner=s4",
        "--set",
        "model.selective=B",
    )
    assert code == 1
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "selective must be 'B,C,dt' with inner 's4', got 'B'" in err
