"""The scaling table: sizes are matched, rows resume, windows are judged one by one, the report says what is there."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from statescan.data import ByteTokenizer, load_tokenizer
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.evaluate import evaluate_tokens
from statescan.models import CausalLM, MambaConfig, TransformerConfig
from statescan.models.baseline_config import RecurrentConfig
from statescan.recipes import language_scaling as recipe
from statescan.recipes.novels import read_corpus
from statescan.train import RunConfig

REAL_ROWS = recipe.ROWS
SMALL = {
    "mamba-0.3m": MambaConfig(8, 1, 256, d_state=2),
    "mamba-1m": MambaConfig(16, 1, 256, d_state=2),
    "mamba-4m": MambaConfig(24, 1, 256, d_state=2),
    "transformer++-0.3m": TransformerConfig(8, 1, 256, n_head=1, d_intermediate=16),
    "lstm-1m": RecurrentConfig(8, 1, 256),
}


@pytest.fixture(scope="module")
def novels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small parts of several books each."""
    folder = tmp_path_factory.mktemp("novels")
    for part, sizes in (("train", (900, 700)), ("valid", (150,)), ("test", (333, 170))):
        (folder / f"novels_{part}").mkdir()
        for number, size in enumerate(sizes):
            text = " ".join(f"{part} {number} said the {i * i % 97}th of them;" for i in range(size))[:size]
            (folder / f"novels_{part}" / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path_factory.getbasetemp() / "token-cache"))
    monkeypatch.setattr(recipe, "ROWS", SMALL)
    monkeypatch.setattr(recipe, "_LENGTH", 32)
    monkeypatch.setattr(recipe, "_WINDOWS", 4)
    monkeypatch.setattr(recipe, "_LSTM", recipe._LSTM | {"batch_size": 8, "length": 16})


def _silent(_line: str) -> None:
    pass


def test_sizes_are_matched_and_the_counts_are_the_models_own() -> None:
    rows = REAL_ROWS
    for size, about in (("0.3m", 0.3e6), ("1m", 1e6), ("4m", 4e6), ("16m", 16e6)):
        counts = {
            row: recipe.parameters_outside(CausalLM(config, device="meta"))
            for row, config in rows.items()
            if row.endswith(f"-{size}") and not row.startswith(("lstm", "s4"))
        }
        assert len(counts) == 3
        assert max(counts.values()) / min(counts.values()) < 1.005, counts
        assert abs(counts[f"mamba-{size}"] / about - 1) < 0.1
    for row in ("lstm-1m", "s4-1m"):
        assert abs(recipe.parameters_outside(CausalLM(rows[row], device="meta")) / 1.067e6 - 1) < 0.1


def test_a_row_says_all_and_follows_the_rule(novels: Path) -> None:
    run = recipe.scaling_run("mamba-1m", novels, passes=3.0)
    ids = len(read_corpus(novels, "novels_train"))
    assert 1600 <= ids <= 1602
    assert run.train.steps == round(3.0 * ids / (4 * 32))
    assert run.train.warmup == round(0.1 * run.train.steps)
    # Killed without a word it loses an eighth of its updates at most.
    assert run.train.checkpoint_every == run.train.steps // 8 > 0
    assert run.train.lr == pytest.approx(recipe.RATES["mamba"] * 96 / 16)
    assert (run.train.precision, run.train.accelerator) == ("float32", "cpu")
    assert recipe.scaling_run("mamba-1m", novels, device="cuda").train.precision == "bf16"
    assert RunConfig.from_dict(run.to_dict()) == run
    lstm = recipe.scaling_run("lstm-1m", novels)
    assert (lstm.train.initial_state, lstm.train.batch_size) == ("carry", 8)
    assert lstm.train.lr == recipe.RATES["lstm"]
    assert recipe.scaling_run("mamba-1m", novels, lr=0.5, dropout=0.25).model.dropout == 0.25
    with pytest.raises(ConfigError, match=r"the row must be one of mamba-0\.3m, .* got 'mamba-2m'"):
        recipe.scaling_run("mamba-2m", novels)
    with pytest.raises(ConfigError, match=r"at least one update of 160\d ids"):
        recipe.scaling_run("mamba-1m", novels, passes=0.01)
    with pytest.raises(DataError, match="wanted 'novels_train'"):
        recipe.scaling_run("mamba-1m", novels / "novels_train")


def test_rows_are_trained_judged_and_tabled_once(novels: Path, tmp_path: Path) -> None:
    said: list[str] = []
    rows = ["mamba-0.3m", "transformer++-0.3m", "mamba-1m"]
    results = recipe.language_scaling(rows, novels, tmp_path, passes=2.0, say=said.append)
    assert list(results["rows"]) == ["mamba-0.3m", "mamba-1m", "transformer++-0.3m"]
    assert (results["not_tuned"], results["not_run"]) == (list(results["rows"]), ["mamba-4m", "lstm-1m"])
    assert results["power_laws"] == {}, "rows that no tuning told their rate measure the care that they had"
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    table = (tmp_path / "results.md").read_text()
    for words in (
        "3,200 bytes read in training, judged in windows of 32.",
        "| Mamba 0.3M |",
        "through in this folder, in no power law: mamba-0.3m, mamba-1m, transformer++-0.3m.",
        "Not run: mamba-4m, lstm-1m.",
        "not measured",
    ):
        assert words in table
    assert (tmp_path / "figure.svg").exists()
    assert not (tmp_path / "mamba-0.3m" / "checkpoints").exists()
    # what a row came to is what the trained model gives on the unseen books, window by window
    row, file = results["rows"]["mamba-0.3m"], read_corpus(novels, "novels_test")
    model = CausalLM.from_pretrained(tmp_path / "mamba-0.3m").eval()
    books = recipe.books_of(file, ByteTokenizer())
    assert [len(book) for book in books] == [333, 170]
    told = [evaluate_tokens(model, book, bytes_per_token=1.0, context=32) for book in books]
    assert row["bits_per_byte"] == pytest.approx(
        sum(one.bits_per_byte * one.bytes for one in told) / sum(one.bytes for one in told), rel=1e-6
    )
    for mine, theirs in zip(row["books"], told, strict=True):
        assert mine["bytes"] == theirs.bytes
        assert mine["bits_per_byte"] == pytest.approx(theirs.bits_per_byte, rel=1e-6)
        assert mine["standard_error"] == pytest.approx(theirs.standard_error, rel=1e-3)
    beside = row["beside_transformer++"]
    twin = results["rows"]["transformer++-0.3m"]
    assert beside[0] == pytest.approx(row["bits_per_byte"] - twin["bits_per_byte"], abs=1e-6)
    assert 0 < beside[1] < row["standard_error"] + twin["standard_error"]
    # the same command does nothing again; other settings are refused
    said.clear()
    before = (tmp_path / "mamba-1m" / "model.safetensors").stat().st_mtime_ns
    assert recipe.language_scaling(rows, novels, tmp_path, passes=2.0, say=said.append) == results
    assert said == []
    assert (tmp_path / "mamba-1m" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match=r"mamba-1m/run.json' .* other settings \(train.steps = 25, wanted 13\)"):
        recipe.language_scaling(["mamba-1m"], novels, tmp_path, passes=1.0, say=_silent)
    # nor does it where the texts were moved; other texts in their place are refused
    moved = shutil.copytree(novels, tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert recipe.language_scaling(rows, moved, tmp_path, passes=2.0, say=said.append) == results
    assert said == []
    (moved / "novels_train" / "0.txt").write_text("Another book. " * 60)
    with pytest.raises(CheckpointError, match=r"run.json' is of a run with other data \(digest"):
        recipe.language_scaling(rows, moved, tmp_path, passes=2.0, say=_silent)


def test_a_row_that_was_broken_off_goes_on(novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe.scaling_run("mamba-0.3m", novels, passes=1.0)
    whole = recipe.train_row(run, tmp_path / "whole", say=_silent)
    real, stops = recipe.train, [True]

    def broken(run: RunConfig, folder: Path, **rest: object):  # type: ignore[no-untyped-def]
        rest["callbacks"] = [*rest["callbacks"], *([_Stop(5)] if stops else [])]  # type: ignore[misc]
        return real(run, folder, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(recipe, "train", broken)
    with pytest.raises(KeyboardInterrupt):
        recipe.train_row(run, tmp_path / "parts", say=_silent)
    stops.clear()
    parts = recipe.train_row(run, tmp_path / "parts", say=_silent)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name])


def test_a_signal_with_the_last_update_is_told_and_the_row_is_done(
    novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe.scaling_run("mamba-0.3m", novels, passes=1.0)
    real = recipe.train

    def broken(run: RunConfig, folder: Path, **rest: object):  # type: ignore[no-untyped-def]
        rest["callbacks"] = [*rest["callbacks"], _Stop(run.train.steps)]  # type: ignore[misc]
        return real(run, folder, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(recipe, "train", broken)
    with pytest.raises(KeyboardInterrupt):
        recipe.train_row(run, tmp_path, say=_silent)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"
    # Nobody measures it later.
    assert json.loads((tmp_path / "speed.json").read_text())["seconds"] > 0
    told: list[str] = []
    recipe.train_row(run, tmp_path, say=told.append)
    assert told == []


class _Stop(recipe.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, row: dict[str, float]) -> None:
        if row["step"] == self.step:
            signal.raise_signal(signal.SIGINT)


def test_every_rate_is_tried_and_the_best_one_with_dropout(
    novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "GRID", (1e-4, 3e-2))
    said: list[str] = []
    found = recipe.tune(["mamba-1m", "mamba-0.3m"], novels, tmp_path, passes=1.0, say=said.append)
    assert [(one["row"], one["lr"], one["dropout"]) for one in found] == [
        ("mamba-0.3m", 1e-4, 0.0),
        ("mamba-0.3m", 3e-2, 0.0),
        ("mamba-0.3m", 3e-2, 0.1),
    ]
    by_rate = [one["bits_per_byte"] for one in found]
    assert by_rate[1] < by_rate[0], "three hundred times the rate learns more in a dozen updates"
    assert json.loads((tmp_path / "tuning.json").read_text()) == found
    assert any(line.startswith("mamba-0.3m: 0.03 is the best of the grid and at its end") for line in said)
    best = min(found, key=lambda one: one["bits_per_byte"])
    told = recipe.tuned("mamba-1m", tmp_path)
    assert told == {"lr": pytest.approx(best["lr"] * 96 / 16), "dropout": best["dropout"]}
    assert recipe.tuned("lstm-1m", tmp_path) == {}
    results = recipe.language_scaling(["mamba-1m"], novels, tmp_path, say=_silent)
    config = results["rows"]["mamba-1m"]["config"]
    assert {"lr": config["train"]["lr"], "dropout": config["model"]["dropout"]} == told
    assert results["not_tuned"] == []
    # Nobody tried the rule where it is known to need it.
    assert recipe.tuned("mamba-4m", tmp_path) == {}


def test_the_rule_is_tried_at_a_larger_size_and_what_it_found_holds_there(
    novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "GRID", (1e-5, 1e-3))
    monkeypatch.setattr(recipe, "DROPOUTS", (0.0,))
    said: list[str] = []
    found = recipe.tune(["mamba-4m"], novels, tmp_path, passes=1.0, say=said.append)
    rates = {one["lr"]: one["bits_per_byte"] for one in found if one["row"] == "mamba-4m"}
    assert sorted(rates) == pytest.approx([1e-3 * 96 / 24 * factor for factor in (0.5, 1.0, 2.0)])
    assert min(rates, key=lambda rate: rates[rate]) == max(rates), "of a dozen updates the highest of these learns most"
    assert "mamba-4m: 2 times the rule is the best of what was tried and at its end" in said
    assert recipe.tuned("mamba-4m", tmp_path) == {"lr": max(rates), "dropout": 0.0}
    # Smaller ones take the rule as it is.
    assert recipe.tuned("mamba-1m", tmp_path) == {"lr": pytest.approx(1e-3 * 96 / 16), "dropout": 0.0}
    rows = ["mamba-0.3m", "mamba-1m", "mamba-4m"]
    results = recipe.language_scaling(rows, novels, tmp_path, say=_silent)
    assert results["not_tuned"] == []
    law = results["power_laws"]["mamba"]
    one, other = (
        recipe.fit_power_law(
            [results["rows"][row]["parameters_outside_embedding"] for row in rows],
            [results["rows"][row]["bits_per_byte"] for row in rows],
        ),
        recipe.PowerLaw(law["scale"], law["exponent"], law["standard_error"]),
    )
    assert one == pytest.approx(other, rel=1e-9)
    table = (tmp_path / "results.md").read_text()
    wanted = f"{law['scale']:.3f} x parameters ^ {-law['exponent']:.4f}, the exponent ± {law['standard_error']:.4f} by"
    assert wanted in table
    # Some of it is no tuning.
    held = json.loads((tmp_path / "tuning.json").read_text())
    for left in range(len(held)):
        (tmp_path / "tuning.json").write_text(json.dumps(held[:left] + held[left + 1 :]))
        assert recipe.tuned("mamba-4m", tmp_path) == {}
    assert recipe.report(tmp_path)["power_laws"] == {}


def test_rows_of_other_lengths_are_told_apart(novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "tuned", lambda row, out: {"lr": 1e-3, "dropout": 0.0})
    small, twin, larger, largest = rows = ["mamba-0.3m", "transformer++-0.3m", "mamba-1m", "mamba-4m"]
    results = recipe.language_scaling(rows, novels, tmp_path, say=_silent)
    assert list(results["power_laws"]) == ["mamba"]
    assert results["power_laws"]["mamba"]["rows"] == [small, larger, largest]
    assert "beside_transformer++" in results["rows"][small]
    assert results["apart"] == []
    # The largest reads twice as much, the twin learns from and is judged in windows half as long.
    shutil.rmtree(tmp_path / largest)
    recipe.language_scaling([largest], novels, tmp_path, passes=2.0, say=_silent)
    shutil.rmtree(tmp_path / twin)

    def halved(run: RunConfig) -> RunConfig:
        return run.apply_overrides(["train.length=16", "train.batch_size=8"])

    results = recipe.language_scaling([twin], novels, tmp_path, change=halved, say=_silent)
    assert results["apart"] == [largest, twin]
    assert results["power_laws"] == {}, "two rows are no law"
    assert "beside_transformer++" not in results["rows"][small]
    table = (tmp_path / "results.md").read_text()
    assert (
        f"{largest} (3,200 bytes read in training, judged in windows of 32), "
        f"{twin} (1,664 bytes read in training, judged in windows of 16)."
    ) in table
    # A seed that read more is no spread of this row's.
    results = recipe.language_scaling([small], novels, tmp_path, seed=1, say=_silent)
    assert list(results["rows"][small]["other_seeds"]) == ["1"]
    recipe.language_scaling([small], novels, tmp_path, seed=2, passes=2.0, say=_silent)
    assert list(recipe.report(tmp_path)["rows"][small]["other_seeds"]) == ["1"]


def test_a_loss_that_blew_up_is_told_and_in_no_law(
    novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["mamba-0.3m", "mamba-1m", "mamba-4m"]
    monkeypatch.setattr(recipe, "tuned", lambda row, out: {"lr": 1e-3, "dropout": 0.0})
    results = recipe.language_scaling(rows, novels, tmp_path, say=_silent)
    assert (results["blown_up"], list(results["power_laws"])) == ([], ["mamba"])
    rise = results["rows"]["mamba-4m"]["loss_rise"]
    assert rise["times"] < 1.2
    log = tmp_path / "mamba-4m" / "log.csv"
    head, *lines = log.read_text().splitlines()
    cells = lines[7].split(",")
    least = min(float(line.split(",")[3]) for line in lines[:7])
    lines[7] = ",".join([*cells[:3], str(2.5 * least), *cells[4:]])
    log.write_text("\n".join([head, *lines]) + "\n")
    results = recipe.report(tmp_path)
    assert results["rows"]["mamba-4m"]["loss_rise"] == {"times": pytest.approx(2.5), "update": int(cells[0])}
    assert (results["blown_up"], results["power_laws"]) == (["mamba-4m"], {})
    assert f"in no power law: mamba-4m (2.50 times, by update {cells[0]})." in (tmp_path / "results.md").read_text()


def test_a_row_whose_loss_blew_up_is_trained_anew_at_half_the_rate(
    novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, rate, said = "mamba-1m", recipe.learning_rate_of("mamba-1m"), []
    blows_up_above = 0.6 * rate

    def rise(log: Path) -> tuple[float, int]:
        run = json.loads((Path(log).parent / "run.json").read_text())
        return (2.0 if run["config"]["train"]["lr"] > blows_up_above else 1.1), 7

    monkeypatch.setattr(recipe, "loss_rise", rise)
    results = recipe.language_scaling([row], novels, tmp_path, say=said.append)
    assert results["rows"][row]["config"]["train"]["lr"] == rate / 2
    assert results["blown_up"] == []
    aside = tmp_path / "blown-up" / f"{row}-lr{rate:g}"
    assert json.loads((aside / "run.json").read_text())["config"]["train"]["lr"] == rate
    assert [text for text in said if "trained anew at half the rate" in text]
    assert recipe.own_settings(row, tmp_path) == {"lr": rate / 2}
    assert recipe.own_settings("mamba-4m", tmp_path) == {}
    # The same command takes what is done; another seed takes the rate that came out.
    said.clear()
    assert recipe.language_scaling([row], novels, tmp_path, say=said.append)["rows"][row]["config"]["train"]["lr"] == (
        rate / 2
    )
    assert not said
    recipe.language_scaling([row], novels, tmp_path, seed=1, say=_silent)
    assert json.loads((tmp_path / f"{row}-seed1" / "run.json").read_text())["config"]["train"]["lr"] == rate / 2
    # Two halvings at most, and none of a rate that was asked for.
    blows_up_above = 0.0
    recipe.language_scaling([row], novels, tmp_path, say=_silent)
    results = recipe.language_scaling([row], novels, tmp_path, say=_silent)
    assert (recipe.halvings(row, tmp_path), results["blown_up"]) == (recipe.HALVINGS, [row])
    other = tmp_path / "asked"
    results = recipe.language_scaling(
        [row], novels, other, change=lambda run: run.apply_overrides(["train.lr=0.5"]), say=_silent
    )
    assert (results["blown_up"], recipe.halvings(row, other)) == ([row], 0)


def test_how_far_a_loss_rose(tmp_path: Path) -> None:
    def told(*losses: object) -> tuple[float, int] | None:
        rows = [f"{10 * number},{loss}\n" for number, loss in enumerate(losses, 1)]
        (tmp_path / "log.csv").write_text("step,loss\n" + "".join(rows))
        return recipe.loss_rise(tmp_path / "log.csv")

    assert told(5.0, 2.0, 1.6, 2.4, 4.0, 3.0, 1.0, 1.5) == (2.5, 50)
    assert told(5.0, 4.0, 3.0) == (0.8, 20), "one that only falls stays below 1"
    assert told(4.0, float("nan"), 2.0, 3.0) == (1.5, 40)
    assert told(4.0) is None


def test_no_row_is_trained_where_another_cannot_be(novels: Path, tmp_path: Path) -> None:
    def wrong(run: RunConfig) -> RunConfig:
        return run.apply_overrides(["train.length=-1"] if run.model.d_model == 16 else [])

    with pytest.raises(ConfigError, match="length"):
        recipe.language_scaling(["mamba-0.3m", "mamba-1m"], novels, tmp_path, change=wrong, say=_silent)
    assert not list(tmp_path.glob("*/run.json"))
    # The second row's folder holds another run.
    recipe.language_scaling(["mamba-1m"], novels, tmp_path, passes=0.5, say=_silent)
    with pytest.raises(CheckpointError, match="train"):
        recipe.language_scaling(["mamba-0.3m", "mamba-1m"], novels, tmp_path, passes=1.0, say=_silent)
    assert [path.parent.name for path in tmp_path.glob("*/run.json")] == ["mamba-1m"]


def test_the_best_of_what_was_tried() -> None:
    bits = {"a": 2.0, "b": 1.5, "c": None}
    assert recipe.best_tried(bits, ["a", "b", "c"]) == "b"
    assert recipe.best_tried(bits, ["a", "c"]) == "a"
    assert recipe.best_tried(bits, ["c"]) is None
    assert recipe.best_tried(bits, ["a", "d"]) is None


@pytest.mark.parametrize("field", ["train.lr=0.5", "model.dropout=0.3"])
def test_what_is_tried_is_not_set(novels: Path, tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=r"leave train\.lr and model\.dropout alone"):
        recipe.tune(["mamba-0.3m"], novels, tmp_path, change=lambda run: run.apply_overrides([field]), say=_silent)
    assert not list(tmp_path.glob("tuning/*/run.json"))


def test_a_report_is_of_a_folder_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"wanted a folder of rows to report on, got '.*typo'"):
        recipe.report(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_a_rate_that_diverges_is_the_worst_and_is_not_tried_again(
    novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "GRID", (1e30, 1e-3))
    monkeypatch.setattr(recipe, "DROPOUTS", (0.0,))
    said: list[str] = []
    found = recipe.tune(["mamba-0.3m"], novels, tmp_path, passes=2.0, say=said.append)
    assert "mamba-0.3m-lr1e+30-dropout0: diverged" in said
    bits = {one["lr"]: one["bits_per_byte"] for one in found}
    assert bits[1e30] is None
    assert 0 < bits[1e-3] < 8
    assert json.loads((tmp_path / "tuning.json").read_text(), parse_constant=pytest.fail) == found
    assert recipe.tuned("mamba-0.3m", tmp_path)["lr"] == recipe.learning_rate_of("mamba-0.3m", 1e-3)
    # Some of the grid is no tuning.
    (tmp_path / "part").mkdir()
    for part in (found[:1], found[1:]):
        (tmp_path / "part" / "tuning.json").write_text(json.dumps(part))
        assert recipe.tuned("mamba-0.3m", tmp_path / "part") == {}
    said.clear()
    for weights in tmp_path.glob("tuning/*/model.safetensors"):  # nobody needs them any more
        weights.unlink()
    assert recipe.tune(["mamba-0.3m"], novels, tmp_path, passes=2.0, say=said.append) == found
    assert not [line for line in said if line.startswith("training")]
    with pytest.raises(CheckpointError, match=r"other settings \(train.steps = 25, wanted 38\)"):
        recipe.tune(["mamba-0.3m"], novels, tmp_path, passes=3.0, say=_silent)


def test_an_lstm_is_judged_as_all_are_and_other_seeds_are_told(novels: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    shutil.copytree(novels, texts)
    for seed in (0, 1):
        results = recipe.language_scaling(["lstm-1m"], texts, tmp_path / "out", seed=seed, say=_silent)
    row, other = results["rows"]["lstm-1m"], json.loads((tmp_path / "out" / "lstm-1m-seed1" / "score.json").read_text())
    assert row["config"]["train"]["length"] == 16
    judged = recipe.read_judged(tmp_path / "out" / "lstm-1m")
    assert judged.bytes.tolist() == [32] * 10 + [12] + [32] * 5 + [9], "windows of 32, as the other rows have them"
    assert row["other_seeds"] == {"1": other["bits_per_byte"]}
    assert other["bits_per_byte"] != row["bits_per_byte"]
    assert f" | {other['bits_per_byte']:.4f} | " in (tmp_path / "out" / "results.md").read_text()
    # Books of the same names, but others: neither what was learnt nor what was judged is taken for theirs.
    for part, told in (("test", r"score.json' .* books \(digest"), ("train", r"run.json' .* data \(digest")):
        (texts / f"novels_{part}" / "0.txt").write_text("Another book. " * 64)
        with pytest.raises(CheckpointError, match=told):
            recipe.language_scaling(["lstm-1m"], texts, tmp_path / "out", say=_silent)


def test_speed_is_measured_in_a_moment_of_training(
    novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = recipe.measure_speed("mamba-0.3m", novels, tmp_path, updates=50, say=_silent)
    assert told["tokens_per_second"] > 0
    assert told["bytes_per_second"] == pytest.approx(told["tokens_per_second"], rel=0.01)
    assert json.loads((tmp_path / "speed" / "mamba-0.3m.json").read_text()) == told
    assert [path.name for path in (tmp_path / "speed").iterdir()] == ["mamba-0.3m.json"]
    assert told["model_flop_utilization"] is None, "nobody knows this device's peak"
    # Where it is known, line and table say which part of it the model's operations took.
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(recipe, "utilization", lambda *fields: asked.append(fields) or 0.123)
    said: list[str] = []
    told = recipe.measure_speed("mamba-0.3m", novels, tmp_path, updates=50, say=said.append)
    assert told["model_flop_utilization"] == 0.123
    assert asked == [(SMALL["mamba-0.3m"], 32, told["tokens_per_second"], torch.device("cpu"), "float32")]
    assert said[-1].endswith("tokens/s, 12.3 % of the peak in model operations")
    recipe.language_scaling(["mamba-0.3m"], novels, tmp_path, passes=1.0, say=_silent)
    assert f"| {told['bytes_per_second']:,.0f} (12.3 %) |" in (tmp_path / "results.md").read_text()


def test_ids_of_pairs_are_judged_by_their_bytes(novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(recipe, "_BPE_LENGTH", 16)
    path = recipe.bpe_tokenizer(novels, tmp_path, vocab_size=300)
    assert recipe.bpe_tokenizer(novels, tmp_path, vocab_size=400) == path, "it is read where it stands"
    ids = load_tokenizer(path)
    assert ids.vocab_size == 300
    file = read_corpus(novels, "novels_test", tokenizer=ids)
    run = recipe.scaling_run("mamba-0.3m", novels, tokenizer=str(path), passes=4.0)
    assert (run.model.vocab_size, run.train.length) == (300, 16)
    judged = recipe.judge(CausalLM(run.model).eval(), file, ids, 16)
    books = recipe.books_of(file, ids)
    whole = [ids.decode_bytes(book) for book in books]
    assert list(map(len, whole)) == [333, 170]
    firsts = sum(len(ids.decode_bytes(book[:1])) for book in books)
    assert judged.bytes.sum() == 333 + 170 - firsts
    assert judged.book.tolist() == [n for n, book in enumerate(books) for _ in range(math.ceil((len(book) - 1) / 16))]


def test_errors_of_ratios_and_pairs() -> None:
    generator = np.random.default_rng(0)
    sizes = np.full(400, 8)
    hard = generator.normal(16, 4, 400)
    one = recipe.Judged(hard + generator.normal(0, 0.1, 400), sizes, np.zeros(400, int))
    other = recipe.Judged(hard, sizes, np.zeros(400, int))
    mean, error = one.mean()
    assert mean == pytest.approx(one.bits.sum() / 3200)
    assert error == pytest.approx(one.bits.std(ddof=1) / 8 / 20, rel=1e-9)
    difference, paired = recipe.paired_difference(one, other)
    assert difference == pytest.approx((one.bits - other.bits).sum() / 3200)
    assert paired < error / 20, "what both find hard is in neither's favour"
    with pytest.raises(ConfigError, match="on the same windows"):
        recipe.paired_difference(one, other._replace(bytes=sizes + 1))


def test_a_power_law_is_found_again() -> None:
    sizes = [2.7e5, 1.1e6, 4.4e6]
    law = recipe.fit_power_law(sizes, [3.5 * size**-0.06 for size in sizes])
    assert law == pytest.approx((3.5, 0.06, 0.0))
    assert law.at(1e6) == pytest.approx(3.5 * 1e6**-0.06)
    assert recipe.fit_power_law(sizes[:2], [1.8, 1.7]).standard_error is None
    # Its error is that of how its exponents scatter where the points do.
    generator, sizes = np.random.default_rng(0), [2.7e5, 1.1e6, 4.4e6, 1.6e7]
    laws = [
        recipe.fit_power_law(sizes, [3.5 * size**-0.06 * math.exp(generator.normal(0, 0.01)) for size in sizes])
        for _ in range(2000)
    ]
    spread = float(np.std([law.exponent for law in laws]))
    assert math.sqrt(float(np.mean([(law.standard_error or 0.0) ** 2 for law in laws]))) == pytest.approx(
        spread, rel=0.05
    )
    with pytest.raises(ConfigError, match="at least two points, got 1 and 1"):
        recipe.fit_power_law([1.0], [2.0])


def test_the_report_needs_no_training(novels: Path, tmp_path: Path) -> None:
    results = recipe.report(recipe.make_folder(tmp_path))
    assert (results["rows"], results["not_run"]) == ({}, list(SMALL))
    assert "Not run: mamba-0.3m" in (tmp_path / "results.md").read_text()
    assert not (tmp_path / "figure.svg").exists()


def test_the_table_on_record_is_the_documents() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "reproduction.md").read_text(encoding="utf-8")
    held = json.loads((root / "benchmarks" / "results" / "reproduce" / "language-scaling.json").read_text())
    rows, sizes = held["rows"], ("0.3m", "1m", "4m", "16m")
    assert not held["blown_up"]
    assert not held["not_tuned"]
    for family in ("mamba", "transformer++", "pythia"):
        of_family = [rows[f"{family}-{size}"] for size in sizes]
        cells = [f"{row['bits_per_byte']:.4f} ± {row['standard_error']:.4f}" for row in of_family]
        assert f"| {' | '.join(cells)} |" in text.replace("**", "")
        law = held["power_laws"][family]
        assert f"-{law['exponent']:.4f} ± {law['standard_error']:.4f}" in text
    ahead = [rows[f"mamba-{size}"]["beside_transformer++"] for size in sizes]
    assert all(difference + 2 * error < 0 for difference, error in ahead)
    cells = [f"{difference:+.4f} ± {error:.4f}" for difference, error in ahead]
    assert f"| {' | '.join(cells)} |" in text
    for size in sizes:
        mamba, other = (rows[f"{family}-{size}"]["books"] for family in ("mamba", "transformer++"))
        assert all(one["bits_per_byte"] < two["bits_per_byte"] for one, two in zip(mamba, other, strict=True))
    assert not held["not_run"]
    assert list(rows) == list(REAL_ROWS)
    # Of one kind, but for the pairs of another seed, which only Mamba's rows have.
    seeds = "other_seeds_beside_transformer++"
    assert {frozenset(row) - {seeds, "beside_transformer++"} for row in rows.values()} == {
        frozenset(rows["transformer++-1m"])
    }
    for family, name in (("mamba", "Mamba"), ("transformer++", "Transformer++")):
        cells = [f"{rows[f'{family}-{size}']['other_seeds']['1']:.4f}" for size in sizes]
        assert f"| {name}, seed 1 | {' | '.join(cells)} |" in text
    second = [rows[f"mamba-{size}"][seeds]["1"] for size in sizes]
    assert all(difference + 2 * error < 0 for difference, error in second)
    cells = [f"{difference:+.4f} ± {error:.4f}" for difference, error in second]
    assert f"| Mamba minus Transformer++, seed 1 | {' | '.join(cells)} |" in text
    for size, (first, _), (other, _) in zip(sizes, ahead, second, strict=True):
        mamba, twin = rows[f"mamba-{size}"], rows[f"transformer++-{size}"]
        assert first == pytest.approx(mamba["bits_per_byte"] - twin["bits_per_byte"])
        assert other == pytest.approx(mamba["other_seeds"]["1"] - twin["other_seeds"]["1"])
    words, moved = " ".join(text.split()), {}
    for family in ("mamba", "transformer++"):
        of_family = [rows[f"{family}-{size}"] for size in sizes]
        moved[family] = [row["other_seeds"]["1"] - row["bits_per_byte"] for row in of_family]
    both = [abs(one[0] - two[0]) for one, two in zip(ahead, second, strict=True)]
    assert f"by {min(moved['mamba']):.4f} to {max(moved['mamba']):.4f} (Mamba) and" in words
    assert f"and {min(moved['transformer++']):.4f} to {max(moved['transformer++']):.4f} (Transformer++," in words
    assert f"with the seed by {min(both):.4f} to {max(both):.4f}, where" in words
    told = [f"{min(some):.3f} to {max(some):.3f}" for some in ([-one for one, _ in pairs] for pairs in (ahead, second))]
    assert f"by {told[0]} bits per byte with seed 0 and {told[1]} with seed 1," in words
    s4, mamba = rows["s4-1m"], rows["mamba-1m"]["bits_per_byte"]
    difference, error = s4["beside_transformer++"]
    assert (
        f"has {s4['bits_per_byte']:.4f} ± {s4['standard_error']:.4f}, {-difference:.4f} ± {error:.4f} below "
        f"Transformer++ and {s4['bits_per_byte'] - mamba:.3f} above Mamba"
    ) in words
    # The LSTM's pair is with a run made again.
    lstm, again = rows["lstm-1m"], held["run_again"]["transformer++-1m"]
    recorded = rows["transformer++-1m"]["bits_per_byte"]
    assert lstm["beside_transformer++"][0] == pytest.approx(lstm["bits_per_byte"] - again["bits_per_byte"])
    assert f"The LSTM, at 3.2e-2, has {lstm['bits_per_byte']:.4f} ± {lstm['standard_error']:.4f}, " in words
    assert f"came to {again['bits_per_byte']:.4f} where the table has {recorded:.4f}" in words
    difference, error = lstm["beside_transformer++"]
    assert f"The LSTM is {-difference:.4f} ± {error:.4f} below that run, window by window," in words
    assert f"and {recorded - lstm['bits_per_byte']:.4f} below the table's" in words
    below, above = s4["bits_per_byte"] - lstm["bits_per_byte"], lstm["bits_per_byte"] - mamba
    assert min(below, above) > 0
    assert f", {below:.3f} below S4 and {above:.3f} above Mamba" in words
    bits = {(one["lr"], one["dropout"]): one["bits_per_byte"] for one in held["tuning"] if one["row"] == "lstm-1m"}
    assert recipe.best_tried(bits, [*((lr, 0.0) for lr in recipe.GRID), (3.2e-2, 0.1)]) == (
        lstm["config"]["train"]["lr"],
        lstm["config"]["model"]["dropout"],
    )
    assert f"came to {bits[3.2e-2, 0.0]:.4f} of the held-out books at 3.2e-2, with dropout of 0.1 to" in words
    assert f"with dropout of 0.1 to {bits[3.2e-2, 0.1]:.4f} (" in words


def test_the_table_by_bpe_on_record_is_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "ROWS", REAL_ROWS)
    root = Path(__file__).parents[2]
    text = (root / "docs" / "reproduction.md").read_text(encoding="utf-8")
    bare, words = text.replace("**", ""), " ".join(text.replace("**", "").split())
    results = root / "benchmarks" / "results" / "reproduce"
    held = json.loads((results / "language-scaling-bpe.json").read_text())
    by_bytes = json.loads((results / "language-scaling.json").read_text())["rows"]
    rows, sizes = held["rows"], ("0.3m", "1m", "4m", "16m")
    assert not held["blown_up"] + held["not_tuned"] + held["apart"]
    assert [*rows, *held["not_run"]] == list(REAL_ROWS)
    # Rates and dropouts are what the recipe says of the grid on record.
    (tmp_path / "tuning.json").write_text(json.dumps(held["tuning"]))
    for family, name in (("mamba", "Mamba"), ("transformer++", "Transformer++"), ("pythia", "Transformer (Pythia)")):
        of_family = [rows[f"{family}-{size}"] for size in sizes]
        twins = [by_bytes[f"{family}-{size}"] for size in sizes]
        cells = [f"{row['bits_per_byte']:.4f} ± {row['standard_error']:.4f}" for row in of_family]
        assert f"| {name}, BPE | {' | '.join(cells)} |" in bare
        cells = [f"{row['bits_per_byte']:.4f}" for row in twins]
        assert f"| {name}, bytes | {' | '.join(cells)} |" in bare
        gained = [twin["bits_per_byte"] - row["bits_per_byte"] for row, twin in zip(of_family, twins, strict=True)]
        assert min(gained) > 0
        assert f"by {gained[0]:.3f} to {gained[-1]:.3f}" in words
        law = held["power_laws"][family]
        assert f"^ -{law['exponent']:.4f} ± {law['standard_error']:.4f}" in words
        for row, twin in zip(of_family, twins, strict=True):
            assert row["parameters_outside_embedding"] == twin["parameters_outside_embedding"]
            found = {"lr": row["config"]["train"]["lr"], "dropout": row["config"]["model"]["dropout"]}
            assert recipe.tuned(row["row"], tmp_path) == found
            embedding = 8192 * REAL_ROWS[row["row"]].d_model * (2 if family == "pythia" else 1)
            assert row["parameters"] - row["parameters_outside_embedding"] == embedding
    cells = [f"{8192 * recipe.SIZES[size]:,}" for size in sizes]
    assert f"| embedding of 8,192 ids, parameters (Pythia's twice) | {' | '.join(cells)} |" in text
    for family, name in (("mamba", "Mamba"), ("pythia", "Pythia")):
        pairs = [rows[f"{family}-{size}"]["beside_transformer++"] for size in sizes]
        cells = [f"{difference:+.4f} ± {error:.4f}" for difference, error in pairs]
        (line,) = [line for line in text.splitlines() if line.startswith(f"| BPE: {name} minus Transformer++")]
        assert line.endswith(f" | {' | '.join(cells)} |")
        if family == "mamba":
            assert all(difference + 2 * error < 0 for difference, error in pairs)
            gaps = [-difference for difference, _ in pairs]
            assert f"at every size there, too, by {min(gaps):.3f} to {max(gaps):.3f}," in words
        else:
            assert f"below Transformer++ at 0.3M by {-pairs[0][0]:.3f}." in words
            assert f"at 16M it is {pairs[-1][0]:.3f} above" in words
    found = [
        min(one["bits_per_byte"] for one in held["tuning"] if one["row"] == f"{family}-0.3m")
        for family in ("mamba", "transformer++", "pythia")
    ]
    assert "the best of the grid are {:.4f}, {:.4f} and {:.4f} of the held-out books".format(*found) in words
    for size in sizes:
        mamba, other = (rows[f"{family}-{size}"]["books"] for family in ("mamba", "transformer++"))
        assert all(one["bits_per_byte"] < two["bits_per_byte"] for one, two in zip(mamba, other, strict=True))
    # With all parameters counted.
    for small, large in (("0.3m", "1m"), ("1m", "4m"), ("4m", "16m")):
        one, two = rows[f"mamba-{small}"], by_bytes[f"mamba-{large}"]
        assert one["parameters"] < two["parameters"]
        assert one["bits_per_byte"] < two["bits_per_byte"]
        few, many = (f"{row['parameters'] / 1e6:.2f}" for row in (one, two))
        low, high = (f"{row['bits_per_byte']:.4f}" for row in (one, two))
        assert re.search(f"{few} (million )?have {low} where {many} (by bytes )?have {high}", words)


def _rate(lr: float) -> str:
    """As the documents write it, two digits: 3.2e-2, 6e-3."""
    digits, power = f"{lr:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def test_paces_rates_and_grids_on_record_are_the_documents() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "reproduction.md").read_text(encoding="utf-8").replace("**", "")
    lines, words = text.splitlines(), " ".join(text.split())
    results = root / "benchmarks" / "results" / "reproduce"
    held = json.loads((results / "language-scaling.json").read_text())
    rows, sizes = held["rows"], ("0.3m", "1m", "4m", "16m")
    families = {"mamba": "Mamba", "transformer++": "Transformer++", "pythia": "Transformer (Pythia)"}

    def cells(told: Callable[[dict[str, Any]], str], held: dict[str, Any]) -> str:
        return " | ".join(", ".join(told(held[f"{family}-{size}"]) for family in families) for size in sizes)

    def pace(row: dict[str, Any]) -> str:
        return f"{row['alone']['bytes_per_second'] / 1e6:.{2 if row['row'].endswith('-16m') else 1}f}"

    def memory(row: dict[str, Any]) -> str:
        return f"{row['alone']['peak_bytes'] / 2**20:,.0f}"

    def rate(row: dict[str, Any]) -> str:
        return _rate(row["config"]["train"]["lr"])

    by_bpe = json.loads((results / "language-scaling-bpe.json").read_text())
    used = cells(lambda row: f"{100 * row['alone']['model_flop_utilization']:.1f}", rows)
    assert f"| MB/s of training, alone: the three | {cells(pace, rows)} |" in lines
    assert f"| of the GPU's peak, % | {used} |" in lines
    assert f"| memory of the training, MiB | {cells(memory, rows)} |" in lines
    assert f"| rate of Mamba, Transformer++, Pythia | {cells(rate, rows)} |" in lines
    assert f"| BPE: rate of Mamba, Transformer++, Pythia | {cells(rate, by_bpe['rows'])} |" in lines
    lstm, s4 = rows["lstm-1m"], rows["s4-1m"]
    slow = f"{lstm['alone']['bytes_per_second'] / 1e6:.2f}"
    assert f"The LSTM makes {slow} MB/s in {memory(lstm)} MiB, S4 {pace(s4)} in {memory(s4)}." in words
    assert (
        f"training took {lstm['training']['seconds']:.0f} s, beside two runs and more, "
        f"where Mamba 1M took {rows['mamba-1m']['training']['seconds']:.0f}:"
    ) in words
    # Of seed 1 the file has neither books nor losses.
    assert "and with seed 0 in each of the four books;" in words
    assert "No row's loss of seed 0 blew up." in words
    assert all(row["loss_rise"]["times"] < 1.5 for row in rows.values())
    larger = rows["transformer++-4m"]["bits_per_byte"] - rows["transformer++-16m"]["bits_per_byte"]
    assert f"bring Transformer++ {larger:.3f} from 4M to 16M" in words
    heading = " | ".join(size.upper() for size in sizes)
    assert text.count(f"| bits per byte, four unseen books | {heading} |") == 2
    assert f"| at 0.3M | {' | '.join(map(_rate, recipe.GRID))} | best rate, dropout 0.1 |" in lines
    assert "| at 4M, times the rule | rule | 1/2 | 1 | 2 |" in lines

    # The grid at 0.3M, dropout at its best rate, then the factors on the rule at 4M.
    def grid(held: dict[str, Any], family: str, size: str) -> dict[tuple[float, float], float]:
        of_row = [one for one in held["tuning"] if one["row"] == f"{family}-{size}"]
        return {(one["lr"], one["dropout"]): one["bits_per_byte"] for one in of_row}

    def care(held: dict[str, Any], family: str) -> tuple[float, float, float, list[float]]:
        small, large = grid(held, family, "0.3m"), grid(held, family, "4m")
        best = min(recipe.GRID, key=lambda lr: small[lr, 0.0])
        dropout = min(recipe.DROPOUTS, key=lambda dropout: small[best, dropout])
        rule = best * 96 / 256
        found = [next(bits for (lr, _), bits in large.items() if lr == pytest.approx(rule * f)) for f in recipe.FACTORS]
        assert {tried for _, tried in large} == {dropout}
        return best, dropout, rule, found

    for family, name in families.items():
        small, (best, dropout, rule, found) = grid(held, family, "0.3m"), care(held, family)
        assert best not in (recipe.GRID[0], recipe.GRID[-1])
        told = [f"{small[lr, 0.0]:.4f}" for lr in recipe.GRID] + [f"{small[best, 0.1]:.4f}"]
        assert f"| {name} | {' | '.join(told)} |" in lines
        told = [_rate(rule)] + [f"{bits:.4f}" for bits in found]
        assert f"| {name}{', dropout 0.1' if dropout else ''} | {' | '.join(told)} |" in lines
    s4_grid = grid(held, "s4", "1m")
    best = min(recipe.GRID, key=lambda lr: s4_grid[lr, 0.0])
    assert f"(S4's to {s4_grid[best, 0.0]:.4f} at {_rate(best)})" in words
    assert rate(s4) == _rate(best)
    assert f"S4 of a million parameters, at {rate(s4)}, has" in words
    pythia = grid(held, "pythia", "0.3m")
    assert f"dropout was chosen by {pythia[1.6e-2, 0.0] - pythia[1.6e-2, 0.1]:.4f}," in words
    whole = json.loads((results / "language-scaling-width.json").read_text())["rows"]["mamba-4m"]["bits_per_byte"]
    below = rows["mamba-4m"]["bits_per_byte"] - whole
    assert f"pass at the rule itself, {whole:.4f} at 4M (`language-scaling-width.json`), is {below:.3f} below" in words
    between = [abs(by_bpe["rows"][f"pythia-{size}"]["beside_transformer++"][0]) for size in ("1m", "4m")]
    assert "At 1M and 4M the {:.3f} and {:.3f} between them".format(*between) in words
    by_family = [care(by_bpe, family) for family in families]
    rates = [_rate(best) for best, *_ in by_family]
    ends = (recipe.GRID[0], recipe.GRID[-1])
    assert not [best for best, dropout, *_ in by_family if best in ends or dropout]
    factors = [recipe.FACTORS[found.index(min(found))] for *_, found in by_family]
    assert factors == [1, 1, 0.5]
    assert (
        f"of the held-out books at {rates[0]}, {rates[1]} and {rates[2]}, none at its end, all without dropout; "
        "the factor is 1, 1 and, at the end of what was tried, 1/2."
    ) in words
