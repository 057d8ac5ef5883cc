"""The run of the model in the box, in seconds: it ends in time and decayed, carries states, judges fairly."""

from __future__ import annotations

import csv
import itertools
import json
import lzma
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from statescan.errors import CheckpointError, ConfigError
from statescan.evaluate import evaluate_tokens
from statescan.models import CausalLM, MambaConfig, TransformerConfig
from statescan.recipes import builtin_model as recipe
from statescan.recipes.builtin_model import ROWS, LanguageRun, builtin_model, overlapping_bits, train_language_model

SMALL = LanguageRun(
    "mamba", MambaConfig(16, 1, 256), seconds=0.0, steps=12, batch_size=2, length=16, warmup=3, lr=1e-2, carried=0.5
)
TWIN = replace(
    SMALL, row="transformer++", model=TransformerConfig(16, 1, 256, n_head=2), steps=0, seconds=60.0, carried=0
)


@pytest.fixture
def text() -> np.ndarray:
    return np.frombuffer(b"A rose is a rose is a rose. " * 200, np.uint8)


def test_the_models_are_of_one_size_and_fit_the_box() -> None:
    counts = {name: CausalLM(run.model, device="meta").parameter_count() for name, run in ROWS.items()}
    assert counts["transformer++"] == pytest.approx(counts["mamba"], rel=0.005)
    mamba = CausalLM(ROWS["mamba"].model, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in mamba.parameters()) < 16e6


def test_the_rate_rises_and_ends_at_zero_by_updates_or_by_time() -> None:
    run = replace(SMALL, steps=100, seconds=10.0, warmup=10, lr=1.0)
    assert run.learning_rate(0, 0.0) == pytest.approx(0.1)
    assert run.learning_rate(50, run.progress(50, 0.0)) == pytest.approx(0.5)
    assert run.learning_rate(50, run.progress(50, 7.5)) == pytest.approx(0.25)
    assert run.learning_rate(50, run.progress(50, 10.0)) == 0.0
    assert replace(run, steps=0).progress(10**6, 5.0) == 0.5


def test_a_run_by_time_ends_with_it(tmp_path: Path, text: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count()
    # A clock that is read twice an update, and so gives each a twentieth of the run.
    monkeypatch.setattr(recipe, "time", SimpleNamespace(perf_counter=lambda: 0.5 * next(readings)))
    trained = train_language_model(replace(SMALL, steps=0, seconds=20.0), text, tmp_path, say=lambda line: None)
    assert 8 + 14 <= trained["steps"] <= 8 + 20
    assert 20.0 <= trained["seconds"] < 22.0
    with open(tmp_path / "log.csv", newline="", encoding="utf-8") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates[-1] <= 0.1 * max(rates)
    assert 0 < trained["carried_from_step"] < trained["steps"]


def test_a_run_learns_and_is_rounded_as_it_is_shipped(tmp_path: Path, text: np.ndarray) -> None:
    trained = train_language_model(replace(SMALL, steps=60), text, tmp_path, say=lambda line: None)
    assert trained["final_loss"] < 5.0 < np.log(256)
    stored = CausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = CausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a.float(), b) for a, b in zip(stored.parameters(), wide.parameters(), strict=True))
    assert trained["file_bytes"] < 3 * trained["parameters"]


def test_rows_go_on_where_they_ended() -> None:
    windows = recipe._Windows(replace(SMALL, batch_size=4), 1000)
    first, second = windows.onwards(), windows.onwards()
    inside = first + SMALL.length <= 1000 - SMALL.length - 1
    assert inside.any()
    assert (second[inside] == first[inside] + SMALL.length).all()
    assert ((second >= 0) & (second < 1000 - SMALL.length)).all()


def test_carried_states_reach_the_next_window(text: np.ndarray) -> None:
    run = replace(SMALL, fresh=0.0)
    course = recipe._Course(run, text, torch.device("cpu"), False)
    start = course.windows.onwards().copy()
    course.windows._lanes = start.copy() - run.length
    course.update(0.0, True)
    course.update(0.0, True)
    ids = torch.from_numpy(np.stack([text[s : s + 2 * run.length] for s in start]).astype(np.int64))
    with torch.no_grad():
        whole = course.model(ids, state=course.model.init_state(run.batch_size)).state
    assert course._initial is not None
    for held, wanted in zip(course._initial._held, whole, strict=True):
        torch.testing.assert_close(held.ssm, wanted.ssm, rtol=1e-4, atol=1e-5)


def test_overlapping_windows_judge_every_byte_once(text: np.ndarray) -> None:
    torch.manual_seed(0)
    model, some = CausalLM(MambaConfig(16, 1, 256)).eval(), text[: 1 + 16 * 5]
    whole = evaluate_tokens(model, some, total_bytes=len(some), context=16)
    assert overlapping_bits(model, some, 16, 16) == pytest.approx(whole.bits_per_token, rel=1e-6)
    # By hand: the first window whole, then the last eight of each.
    bits = []
    for start in range(0, len(some) - 16, 8):
        ids = torch.from_numpy(some[start : start + 17].astype(np.int64))
        losses = torch.nn.functional.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
        bits += (losses if start == 0 else losses[-8:]).tolist()
    assert overlapping_bits(model, some, 16, 8, batch_size=3) == pytest.approx(np.mean(bits) / np.log(2), rel=1e-6)
    with pytest.raises(ConfigError, match="stride must be in"):
        overlapping_bits(model, some, 16, 17)


def test_rows_of_a_folder_are_trained_once_and_the_twin_as_long_as_mamba(tmp_path: Path, text: np.ndarray) -> None:
    data = tmp_path / "texts"
    data.mkdir()
    for name in (*recipe.SHIPPED_TEXTS, "novels_test"):
        (data / f"{name}.txt.xz").write_bytes(lzma.compress(text.tobytes()[:600]))
    out, lines = tmp_path / "out", []
    call = {"cache": tmp_path / "cache", "say": lines.append}
    results = builtin_model(data, out, runs=[SMALL, TWIN], **call)
    assert results["transformer++"]["steps"] == results["mamba"]["steps"] == 12
    scores = results["mamba"]["scores"]["novels_test"]
    assert scores["carried"] is not None
    assert results["transformer++"]["scores"]["novels_test"]["carried"] is None
    assert f"{scores['carried']:.4f}" in (out / "results.md").read_text(encoding="utf-8")

    before = (out / "mamba" / "model.safetensors").stat().st_mtime_ns
    assert builtin_model(data, out, runs=[SMALL], **call) == json.loads((out / "results.json").read_text())
    assert (out / "mamba" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="other settings"):
        builtin_model(data, out, runs=[replace(SMALL, lr=1.0)], **call)
    (data / f"{recipe.SHIPPED_TEXTS[0]}.txt.xz").write_bytes(lzma.compress(text.tobytes()[:700]))
    with pytest.raises(CheckpointError, match="other texts"):
        builtin_model(data, out, runs=[SMALL], **call)


def test_runs_that_cannot_be_are_refused(text: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="a run must end"):
        replace(SMALL, steps=0, seconds=0.0)
    with pytest.raises(ConfigError, match="carried by Mamba alone"):
        replace(TWIN, carried=0.5)
    with pytest.raises(ConfigError, match="at least length"):
        recipe._Windows(SMALL, 10)
