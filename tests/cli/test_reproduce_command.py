"""``statescan reproduce``: the packaged models are judged, rows are trained, results are printed and kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from statescan.cli.reproduce import _judged
from statescan.data import InductionHeads, SelectiveCopying
from statescan.models import CausalLM
from statescan.recipes import induction_heads, selective_copying
from statescan.recipes.synthetic import Stage, SyntheticRun

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = CausalLM(induction_heads.ROWS["mamba"].model.replace(d_model=16, tie_embeddings=False))
    induction_heads.SymbolTokenizer(InductionHeads().symbols).save(model.save_pretrained(tmp_path / "model"))
    return tmp_path / "model"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a moment, at lengths of a moment, in place of the recipes' own."""

    def heads(row: str = "mamba", seed: int = 0) -> SyntheticRun:
        model = induction_heads.ROWS[row].model.replace(d_model=16)
        return SyntheticRun(row, model, (Stage(InductionHeads(8), 2, 20),), seed)

    def copying(row: str = "mamba-s6", seed: int = 0, **_: object) -> SyntheticRun:
        model = selective_copying.ROWS[row].model.replace(d_model=16)
        return SyntheticRun(row, model, (Stage(SelectiveCopying(4096), 1, 1),), seed)

    monkeypatch.setattr(induction_heads, "induction_run", heads)
    monkeypatch.setattr(induction_heads, "LENGTHS", (8, 16))
    paper = {row: (title, values[:2]) for row, (title, values) in induction_heads.PAPER.items()}
    monkeypatch.setattr(induction_heads, "PAPER", paper)
    monkeypatch.setattr(selective_copying, "selective_copying_run", copying)


@pytest.mark.parametrize("name", ["induction-heads", "selective-copying"])
def test_help_shows_an_example(run: Run, name: str) -> None:
    code, out, _ = run("reproduce", name, "--help")
    assert code == 0
    assert f"Example: statescan reproduce {name}" in out


def test_a_named_model_is_judged_by_number(run: Run, untrained: Path) -> None:
    code, out, _ = run(
        "reproduce", "induction-heads", "--evaluate-only", "--model", untrained, "--examples", 3, "--device", "cpu",
        "--json",
    )  # fmt: skip
    assert code == 0
    told = json.loads(out)
    assert told["model"] == str(untrained)
    assert [int(length) for length in told["lengths"]] == [2**k for k in range(6, 17)]
    wanted = induction_heads.evaluate(
        CausalLM.from_pretrained(untrained).eval(), lengths=[64, 128], examples=lambda length: 3
    )
    for length, (score, _) in wanted.items():
        row = told["lengths"][str(length)]
        assert (row["correct"], row["asked"], row["paper"]) == (score.correct, 3, 1.0)
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]


def test_runs_are_trained_judged_and_kept(run: Run, short: None, tmp_path: Path) -> None:
    out_folder = tmp_path / "heads"
    code, out, err = run(
        "reproduce", "induction-heads", "--out", out_folder, "--seeds", 2, "--row", "mamba", "--row", "lstm",
        "--examples", 2, "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    assert "| **LSTM** |" in out
    assert f"wrote {out_folder / 'results.json'}" in out
    assert "lstm-seed1  step 20 of 20" in err
    runs = json.loads((out_folder / "results.json").read_text())["runs"]
    assert [(one["row"], one["seed"]) for one in runs] == [("lstm", 0), ("lstm", 1), ("mamba", 0), ("mamba", 1)]


def test_selective_copying_prints_json_alone(run: Run, short: None, tmp_path: Path) -> None:
    code, out, _ = run(
        "reproduce", "selective-copying", "--out", tmp_path / "copying", "--seeds", 1, "--examples", 2, "--device",
        "cpu", "--json",
    )  # fmt: skip
    assert code == 0
    told = json.loads(out)
    assert told["recipe"] == "selective-copying"
    assert told["runs"][0]["scores"]["4096"]["asked"] == 32


def test_an_unknown_row_is_named(run: Run, tmp_path: Path) -> None:
    code, out, err = run("reproduce", "induction-heads", "--row", "mamba3", "--out", tmp_path / "x")
    assert code == 1
    assert out == ""
    assert "--row must be one of mamba, h3, " in err
    assert not (tmp_path / "x").exists()


def test_an_unknown_packaged_model_is_named(run: Run) -> None:
    code, _, err = run("inspect", "ab", "--model", "packaged:heads")
    assert code == 1
    assert re.search(r"wanted one of the packaged models \(.*induction-heads, selective-copying\), got 'heads'", err)


def test_a_budget_of_tokens_takes_fewer_of_the_long_sequences() -> None:
    count = _judged(4096, 2**20)
    assert [count(2**k) for k in (6, 8, 10, 19, 20, 21)] == [4096, 4096, 1024, 2, 2, 2]
    assert {_judged(7, None)(2**k) for k in (6, 20)} == {7}
