"""``statescan reproduce builtin-model``: the run that made the packaged model, at a scale of seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from statescan.models import MambaConfig
from statescan.recipes import builtin_model as recipe

Run = Callable[..., Any]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = recipe.LanguageRun("mamba", MambaConfig(8, 1, 256), steps=9, batch_size=2, length=16)
    monkeypatch.setitem(recipe.ROWS, "mamba", run)
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in (*recipe.SHIPPED_TEXTS, "novels_test"):
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


def test_what_is_missing_is_named(run: Run, texts: Path, tmp_path: Path) -> None:
    assert "must be" in run("reproduce", "builtin-model", "--data", texts, "--row", "lstm", "--out", tmp_path / "o").err
    (texts / "sotu.txt").unlink()
    ran = run("reproduce", "builtin-model", "--data", texts, "--out", tmp_path / "out")
    assert ran.code == 1
    assert "wanted 'sotu'" in ran.err
