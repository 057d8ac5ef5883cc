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
from statescan.recipes import induction_heads, selective_copying, synthetic
from statescan.recipes.synthetic import Stage, SyntheticRun, judge, seed_of_tests

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

    def copying(row: str = "mamba-s6", seed: int = 0, length: int = 4096, share: float = 1.0) -> SyntheticRun:
        model = selective_copying.ROWS[row].model.replace(d_model=16)
        return SyntheticRun(row, model, (Stage(SelectiveCopying(length), 1, round(4 * share)),), seed)

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


def test_small_steps_and_long_half_lives_are_told_in_three_digits(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = run("inspect", "hdck*kabcf*", "--model", "packaged:induction-heads", "-o", page, "--json")
    assert code == 0, err
    layers = json.loads(out)["layers"]
    _, out, _ = run("inspect", "hdck*kabcf*", "--model", "packaged:induction-heads", "-o", page)
    rows = [line.split() for line in out.splitlines() if re.match(r" *\d+ ", line)]
    for row, layer in zip(rows, layers, strict=True):
        mean = sum(layer["delta"]) / len(layer["delta"])
        middle = sorted(layer["half_life"])[len(layer["half_life"]) // 2]
        assert float(row[1]) == pytest.approx(mean, rel=0.006)
        assert float(row[2]) == pytest.approx(middle, rel=0.006)
        assert max(map(len, row[1:3])) <= len("1.23e-05")


def test_a_budget_of_tokens_takes_fewer_of_the_long_sequences() -> None:
    count = _judged(4096, 2**20)
    assert [count(2**k) for k in (6, 8, 10, 19, 20, 21)] == [4096, 4096, 1024, 2, 2, 2]
    assert {_judged(7, None)(2**k) for k in (6, 20)} == {7}


def test_training_judges_no_more_tokens_than_asked_for(run: Run, short: None, tmp_path: Path) -> None:
    code, out, _ = run(
        "reproduce", "induction-heads", "--out", tmp_path / "heads", "--seeds", 1, "--tokens", 40, "--device", "cpu",
        "--json",
    )  # fmt: skip
    assert code == 0
    scores = json.loads(out)["runs"][0]["scores"]
    assert {length: score["asked"] for length, score in scores.items()} == {"8": 5, "16": 2}


def test_seconds_leave_a_run_unfinished(run: Run, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def longer(row: str = "mamba", seed: int = 0) -> SyntheticRun:
        model = induction_heads.ROWS[row].model.replace(d_model=16)
        return SyntheticRun(row, model, (Stage(InductionHeads(8), 2, 60),), seed)

    monkeypatch.setattr(induction_heads, "induction_run", longer)
    arguments = ("--out", tmp_path / "heads", "--seeds", 1, "--examples", 1, "--device", "cpu", "--json")
    code, out, err = run("reproduce", "induction-heads", *arguments, "--seconds", 0)
    assert code == 0
    told = json.loads(out)
    assert told["runs"] == []
    assert told["unfinished"] == [{"row": "mamba", "seed": 0, "steps": 20, "of": 60}]
    assert "step 20 of 60" in err
    assert (tmp_path / "heads" / "mamba-seed0" / "checkpoint.pt").exists()


def test_the_time_reaches_copying_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(selective_copying, "selective_copying", lambda out, **options: given.update(options) or {})
    code, _, _ = run("reproduce", "selective-copying", "--out", tmp_path / "x", "--seconds", 7, "--seeds", 2, "--json")
    assert code == 0
    assert (given["seconds"], given["seeds"], given["examples"]) == (7, range(2), 4096)


def test_a_share_and_a_length_reach_the_recipe(run: Run, short: None, tmp_path: Path) -> None:
    code, out, _ = run(
        "reproduce", "selective-copying", "--out", tmp_path / "copying", "--seeds", 1, "--examples", 1, "--length", 128,
        "--share", 0.5, "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0
    (one,) = json.loads(out)["runs"]
    assert one["steps"] == 2
    assert set(one["scores"]) == {"128"}


def test_full_goes_on_to_all_lengths(run: Run, untrained: Path, monkeypatch: pytest.MonkeyPatch, short: None) -> None:
    monkeypatch.setattr("statescan.cli.reproduce._SHORT", 8)
    arguments = ("reproduce", "induction-heads", "--evaluate-only", "--model", untrained, "--examples", 1, "--json")
    assert set(json.loads(run(*arguments)[1])["lengths"]) == {"8"}
    assert set(json.loads(run(*arguments, "--full")[1])["lengths"]) == {"8", "16"}


@pytest.mark.parametrize("length", [None, 64])
def test_copying_is_judged_on_sequences_that_no_run_was_trained_on(
    run: Run, tmp_path: Path, length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def watched(*args: object, **given: int) -> object:
        seeds.append(given["seed"])
        return judge(*args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic, "judge", watched)
    torch.manual_seed(0)
    task = SelectiveCopying(length or 4096)
    model = CausalLM(selective_copying.ROWS["mamba-s6"].model.replace(d_model=16, tie_embeddings=False)).eval()
    folder = model.save_pretrained(tmp_path / "model")
    given = () if length is None else ("--length", length)
    code, out, _ = run(
        "reproduce", "selective-copying", "--evaluate-only", "--model", folder, "--examples", 12, "--device", "cpu",
        "--json", *given,
    )  # fmt: skip
    assert code == 0
    told = json.loads(out)["lengths"][str(task.length)]
    assert seeds == [seed_of_tests(task.length)]
    assert min(seeds) > 10**9
    tests = judge(model, task, 12, seed=seeds[0])
    assert (told["correct"], told["asked"]) == (tests.correct, 192)
    assert told["paper"] == (0.998 if length is None else None)
    # Twelve trials, not 192.
    assert told["interval"][1] - told["interval"][0] > 0.2


def test_attention_is_judged_too_and_not_too_far(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    monkeypatch.setattr(induction_heads, "_LONGEST_ATTENTION", 8)
    model = CausalLM(induction_heads.ROWS["attention-absolute"].model.replace(d_model=16, max_positions=32))
    arguments = ("--evaluate-only", "--model", model.save_pretrained(tmp_path / "model"), "--examples", 2, "--json")
    code, out, err = run("reproduce", "induction-heads", *arguments, "--device", "cpu")
    assert code == 0, err
    assert set(json.loads(out)["lengths"]) == {"8"}
    assert "attention is judged up to length 8: " in err


@pytest.mark.parametrize("recipe", ["induction-heads", "selective-copying"])
@pytest.mark.parametrize("more", [("--evaluate-only",), ("--seeds", 1)])
def test_a_device_that_is_not_there_is_named(run: Run, tmp_path: Path, recipe: str, more: tuple[object, ...]) -> None:
    out = () if "--evaluate-only" in more else ("--out", tmp_path / "out")
    code, _, err = run("reproduce", recipe, *more, *out, "--device", "foo")
    assert code == 1
    assert "--device must be a device that torch can use here, got 'foo'" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("induction-heads", ("--model", "m"), "--model is for --evaluate-only; leave it out, or give both"),
        ("induction-heads", ("--full",), "--full is for --evaluate-only"),
        ("selective-copying", ("--model", "m"), "--model is for --evaluate-only"),
        ("induction-heads", ("--evaluate-only", "--row", "lstm"), "--row is of training, and --evaluate-only trains"),
        ("induction-heads", ("--evaluate-only", "--seeds", "3"), "--seeds is of training"),
        ("induction-heads", ("--evaluate-only", "--seconds", "3"), "--seconds is of training"),
        ("selective-copying", ("--evaluate-only", "--share", "1"), "--share is of training"),
        ("selective-copying", ("--evaluate-only", "--row", "lstm"), "--row is of training"),
        (
            "induction-heads",
            ("--row", "all", "--row", "mamba"),
            "must be 'all' alone, or names of rows, got 'all' beside 'm",
        ),
        ("selective-copying", ("--evaluate-only", "--length", "0"), "length must be from tokens = 16"),
        ("selective-copying", ("--length", "0"), "length must be one of 128, "),
        ("selective-copying", ("--share", "0"), "share of updates must be in (0, 1], got 0"),
    ],
)
def test_an_option_is_not_passed_over(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("reproduce", name, *arguments)
    assert code == 1
    assert said in err
    assert (out, list(tmp_path.iterdir())) == ("", [])


def test_a_model_of_another_task_is_refused(run: Run, untrained: Path, tmp_path: Path) -> None:
    code, _, err = run("reproduce", "selective-copying", "--evaluate-only", "--model", untrained, "--length", 32)
    assert code == 1
    assert "--model must have the task's vocabulary, 16 ids (.ABCDEFGHIJKLMN?), got" in err
    assert "(abcdefghijklmno*); name a model that learnt this task" in err
    bytewise = CausalLM(induction_heads.ROWS["mamba"].model.replace(d_model=8, vocab_size=256))
    folder = bytewise.save_pretrained(tmp_path / "bytes")
    code, _, err = run("reproduce", "induction-heads", "--evaluate-only", "--model", folder)
    assert code == 1
    assert f"got '{folder}' with 256 " in err
