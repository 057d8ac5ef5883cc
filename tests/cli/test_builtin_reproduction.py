"""``statescan reproduce builtin-model``: the run that made the packaged model, at a scale of seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from statescan.models import MambaConfig, TransformerConfig
from statescan.recipes import builtin_model as recipe

Run = Callable[..., Any]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = recipe.LanguageRun("mamba", MambaConfig(8, 1, 256), steps=9, batch_size=2, length=16)
    twin = replace(run, row="transformer++", model=TransformerConfig(8, 1, 256, n_head=2), seconds=0.0)
    monkeypatch.setitem(recipe.ROWS, "mamba", run)
    monkeypatch.setitem(recipe.ROWS, "transformer++", twin)
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in (*recipe.SHIPPED_TEXTS, "novels_valid", "novels_test"):
        (folder / f"{name}.txt").write_text("A rose is a rose is a rose. " * 20)
    return folder


def test_a_row_is_trained_judged_and_kept(run: Run, texts: Path, tmp_path: Path) -> None:
    ran = run("reproduce", "builtin-model", "--data", texts, "--out", tmp_path / "out", "--lr", 0.01, "--json")
    assert ran.code == 0, ran.err
    row = json.loads(ran.out)["mamba"]
    assert row["steps"] == 9
    assert row["run"] == replace(recipe.ROWS["mamba"], lr=0.01).to_dict()
    assert row["scores"]["novels_test"]["carried"] > 0
    told = run("reproduce", "builtin-model", "--data", texts, "--out", tmp_path / "out", "--lr", 0.01)
    assert f"{row['scores']['novels_test']['carried']:.4f}" in told.out
    assert run("evaluate", "--model", tmp_path / "out" / "mamba", "--data", texts / "sotu.txt").code == 0


def test_a_row_is_tried_with_fewer_updates_and_other_fields(run: Run, texts: Path, tmp_path: Path) -> None:
    line = ("reproduce", "builtin-model", "--data", texts, "--out", tmp_path / "out", "--json")
    ran = run(*line, "--row", "transformer++", "--steps", 2, "--set", "batch_size=1", "--set", "model.dropout=0.5")
    assert ran.code == 0, ran.err
    row = json.loads(ran.out)["transformer++"]
    assert (row["steps"], row["run"]["batch_size"], row["run"]["model"]["dropout"]) == (2, 1, 0.5)
    assert "first updates" in ran.err
    assert "seconds" in run(*line, "--row", "transformer++", "--seconds", 5).err
    assert "batch_size" in run(*line, "--set", "batch_sizes=1").err


def test_the_grid_is_gone_through_and_told(
    run: Run, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "UPDATES", 8)
    line = ("reproduce", "builtin-model", "--data", texts, "--out", tmp_path / "out", "--tune")
    ran = run(*line, "--share", 0.25)
    assert ran.code == 0, ran.err
    assert (
        ran.out.count("| transformer++ |") == ran.out.count("| mamba |") == len(recipe.GRID) + len(recipe.DROPOUTS) - 1
    )
    row = json.loads(run(*line[:-1], "--json").out)["mamba"]
    assert row["run"]["lr"] == recipe.tuned("mamba", tmp_path / "out")["lr"]
    assert "--steps is for a call without --tune" in run(*line, "--steps", 3).err
    assert "tuning sets lr itself" in run(*line, "--set", "lr=0.001").err
    assert "--share is for a call with --tune" in run(*line[:-1], "--share", 0.5).err


def test_an_interruption_says_what_is_kept(
    run: Run, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe._Course, "update", interrupted)
    ran = run("reproduce", "builtin-model", "--data", texts, "--out", tmp_path / "out")
    assert ran.code == 130
    assert "the one that was being trained begins anew" in ran.err


def test_what_is_missing_is_named(run: Run, texts: Path, tmp_path: Path) -> None:
    assert "must be" in run("reproduce", "builtin-model", "--data", texts, "--row", "lstm", "--out", tmp_path / "o").err
    (texts / "sotu.txt").unlink()
    ran = run("reproduce", "builtin-model", "--data", texts, "--out", tmp_path / "out")
    assert ran.code == 1
    assert "wanted 'sotu'" in ran.err
