"""The induction heads recipe: what it writes comes from its runs, beside the paper's numbers as transcribed."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from statescan.data import InductionHeads, load_tokenizer
from statescan.errors import ConfigError
from statescan.models import CausalLM
from statescan.recipes import induction_heads as recipe
from statescan.recipes import synthetic
from statescan.recipes.synthetic import Stage, SyntheticRun, read_scores, wilson

FACTS = Path(__file__).parents[3] / "shared" / "facts" / "paper.md"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a moment in place of the recipe's own."""

    def run(row: str = "mamba", seed: int = 0) -> SyntheticRun:
        model = recipe.ROWS[row].model.replace(d_model=16)
        return SyntheticRun(row, model, (Stage(InductionHeads(16), 4, 40),), seed)

    monkeypatch.setattr(recipe, "induction_run", run)


def _table(markdown: str) -> dict[str, list[str]]:
    lines = [line.strip().strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    return {cells[0].strip(" *"): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_run_leaves_models_scores_table_and_figure(small: None, tmp_path: Path) -> None:
    told: list[str] = []
    results = recipe.induction_heads(
        tmp_path, rows=["mamba", "attention-rotary"], seeds=(0, 1), examples=lambda length: 4, longest=128,
        say=told.append,
    )  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [(run["row"], run["seed"]) for run in results["runs"]] == [
        ("attention-rotary", 0),
        ("attention-rotary", 1),
        ("mamba", 0),
        ("mamba", 1),
    ]
    for run in results["runs"]:
        assert set(run["scores"]) == {"64", "128"}
        assert run["scores"]["64"]["asked"] == 4
    # The table's numbers are the scores', pooled over seeds.
    rows = _table((tmp_path / "results.md").read_text())
    mine = [run["scores"]["64"]["correct"] for run in results["runs"] if run["row"] == "mamba"]
    # Four sequences, which both seeds were judged on.
    low, high = (100 * end for end in wilson(sum(mine) / 2, 4))
    said = re.fullmatch(r"(\d+\.\d) \[(.+), (.+)\]", rows["Mamba"][2])
    assert said is not None
    assert float(said[1]) == pytest.approx(100 * sum(mine) / 8, abs=0.1)
    assert low - 0.01 <= float(said[2]) <= low < high <= float(said[3]) <= high + 0.01
    assert rows["Mamba"][1] == "2"
    for seed, right in enumerate(mine):
        assert float(rows[f"Mamba, seed {seed}"][2]) == pytest.approx(25 * right, abs=0.1)
    parameters = CausalLM.from_pretrained(tmp_path / "mamba-seed0").parameter_count()
    assert rows["Mamba"][0] == f"{parameters:,}"
    assert rows["mamba, seed 0"][0] == "40"
    assert rows["Mamba"][4] == "not run"
    assert set(rows["LSTM"][2:]) == {"not run"}
    assert rows["MHA, rotary, paper"][2:8] == ["100", "100", "100", "83.6", "31.3", "18.4"]
    assert (tmp_path / "mamba-seed0" / "statescan_tokenizer.json").exists()
    assert load_tokenizer(tmp_path / "mamba-seed0").decode([0, 15]) == "a*"

    # A second call trains and judges nothing again.
    del told[:]
    again = recipe.induction_heads(
        tmp_path, rows=["mamba"], seeds=(0, 1), examples=lambda length: 4, longest=128, say=told.append
    )
    assert told == []
    assert again["runs"] == results["runs"]


def test_an_unfinished_run_is_told_from_one_that_was_not_begun(small: None, tmp_path: Path) -> None:
    given = {"examples": lambda length: 4, "longest": 64, "say": lambda line: None}
    recipe.induction_heads(tmp_path, rows=["mamba"], seeds=(0,), **given)
    recipe.induction_heads(tmp_path, rows=["mamba", "lstm"], seeds=(1,), seconds=0, **given)
    results = recipe.induction_heads(tmp_path, rows=["mamba", "lstm"], seeds=(1,), seconds=0, **given)
    assert [(one["row"], one["seed"], one["steps"], one["of"]) for one in results["unfinished"]] == [
        ("lstm", 1, 20, 40),
        ("mamba", 1, 20, 40),
    ]
    rows = _table((tmp_path / "results.md").read_text())
    assert rows["Mamba"][1] == "1"
    assert rows["Mamba, seed 1"][2] == rows["LSTM, seed 1"][2] == "unfinished (step 20 of 40)"
    assert "LSTM" not in rows
    assert set(rows["MHA, xPos"][2:]) == {"not run"}


def test_the_figure_is_drawn_and_is_the_same_again(small: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recipe.induction_heads(
        tmp_path, rows=["mamba"], seeds=(0,), examples=lambda length: 4, longest=128, say=lambda line: None
    )
    first = (tmp_path / "figure.svg").read_bytes()
    assert b"<svg" in first
    recipe.report(tmp_path)
    assert (tmp_path / "figure.svg").read_bytes() == first


def test_judging_goes_on_where_it_was_broken_off(small: None, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if "length 64" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.induction_heads(tmp_path, seeds=(0,), examples=lambda length: 2, longest=128, say=stop)
    before = read_scores(tmp_path / "mamba-seed0")
    assert set(before) == {64}
    recipe.induction_heads(tmp_path, seeds=(0,), examples=lambda length: 2, longest=128, say=lambda line: None)
    after = read_scores(tmp_path / "mamba-seed0")
    assert set(after) == {64, 128}
    assert after[64] == before[64]


def test_more_examples_are_judged_on_top_of_those_that_were(small: None, tmp_path: Path) -> None:
    """Told in parts or at once, the same examples: the numbers of right answers add up."""
    told: list[str] = []
    for count in (3, 8, 5):
        recipe.induction_heads(
            tmp_path, seeds=(0,), examples=lambda length, count=count: count, longest=64, say=told.append
        )
    parts = read_scores(tmp_path / "mamba-seed0")[64]
    assert (parts["asked"], parts["examples"]) == (8, 8)
    assert sum("length 64" in line for line in told) == 2
    model = CausalLM.from_pretrained(tmp_path / "mamba-seed0").eval()
    whole = recipe.evaluate(model, lengths=[64], examples=lambda length: 8)[64][0]
    assert parts["correct"] == whole.correct
    last = recipe.evaluate(model, lengths=[64], examples=lambda length: 5, first=3)[64][0]
    assert (
        recipe.evaluate(model, lengths=[64], examples=lambda length: 3)[64][0].correct + last.correct == whole.correct
    )


def test_a_long_length_is_kept_in_parts(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_JUDGED_AT_A_TIME", 256)
    told: list[str] = []
    recipe.induction_heads(tmp_path, seeds=(0,), examples=lambda length: 5, longest=128, say=told.append)
    assert sum("length 64" in line for line in told) == 2
    assert sum("length 128" in line for line in told) == 3
    scores = read_scores(tmp_path / "mamba-seed0")
    assert {length: score["examples"] for length, score in scores.items()} == {64: 5, 128: 5}


def test_the_recipe_trains_at_one_length_which_no_test_example_comes_from() -> None:
    for row in recipe.ROWS:
        run = recipe.induction_run(row, 2)
        assert {stage.task for stage in run.stages} == {InductionHeads(256)}
        assert run.seed == 2
        assert run.model == recipe.ROWS[row].model
        assert run.steps == recipe.induction_run().steps
    seeds = {recipe.seed_of_tests(length) for length in recipe.LENGTHS}
    assert len(seeds) == len(recipe.LENGTHS) == 15
    assert min(seeds) > 10**9
    with pytest.raises(ConfigError, match="row must be one of mamba, "):
        recipe.induction_run("mamba2")


def test_evaluate_gives_each_length_its_score() -> None:
    torch.manual_seed(0)
    model = CausalLM(dataclasses.replace(recipe.ROWS["mamba"].model, d_model=16, tie_embeddings=False)).eval()
    told: list[int] = []
    scores = recipe.evaluate(
        model,
        lengths=[8, 300],
        examples=lambda length: 5,
        at_once=256,
        progress=lambda length, done, total: told.append(length),
    )
    assert list(scores) == [8, 300]
    assert set(told) == {8, 300}
    whole = recipe.evaluate(model, lengths=[8, 300], examples=lambda length: 5, whole=True)
    assert [score for score, _ in scores.values()] == [score for score, _ in whole.values()]


def test_the_papers_numbers_are_those_of_its_table() -> None:
    if not FACTS.exists():
        pytest.skip("the facts are not beside this checkout")
    rows = {
        "MHA-Abs": "attention-absolute",
        "MHA-RoPE": "attention-rotary",
        "MHA-xPos": "attention-xpos",
        "H3": "h3",
        "Hyena": "hyena",
        "Mamba": "mamba",
    }
    section = FACTS.read_text().partition("### Induction heads")[2].partition("###")[0]
    found = 0
    for name, row in rows.items():
        cells = re.search(rf"^\| {name} \|(.*)\|$", section, re.MULTILINE)
        assert cells is not None
        values = [cell.strip() for cell in cells[1].split("|")][1:]
        as_ours = ["v" if v == 100 else "x" if v is None else f"{v:.1f}" for v in recipe.PAPER[row][1]]
        assert ["v" if value == "100" else value for value in values] == as_ours
        found += 1
    assert found == len(recipe.PAPER)


def _scored(row: str, seed: int, right: dict[int, int]) -> dict[str, object]:
    scores = {length: {"correct": n, "asked": 8, "examples": 8, "seconds": 1.0} for length, n in right.items()}
    return {
        "row": row, "seed": seed, "parameters": 1, "steps": 2, "tokens": 3, "seconds": 4.0, "together": 1,
        "machine": {"device": "here"}, "scores": scores,
    }  # fmt: skip


def test_each_run_tells_its_worst_length() -> None:
    run = _scored("mamba", 0, {64: 8, 128: 3, 256: 5})
    assert _table(recipe.table([run]))["mamba, seed 0"][-2:] == ["128", "37.5 of 8"]


def test_the_figure_shows_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(recipe, "save_figure", lambda made, path: drawn.append(made))
    recipe.draw([_scored("mamba", seed, {64: right, 128: 8}) for seed, right in enumerate((8, 2, 5))], tmp_path / "x")
    (axes,) = drawn[0].axes
    lines = {(line.get_marker(), *line.get_ydata()) for line in axes.get_lines()}
    assert {("o", 100.0, 100.0), ("o", 25.0, 100.0), ("o", 62.5, 100.0), ("None", 62.5, 100.0)} <= lines


def test_the_term_that_makes_the_steps_sink_is_mambas_alone() -> None:
    quiet = {row: recipe.induction_run(row).quiet for row in recipe.ROWS}
    assert quiet.pop("mamba") == 1e-3
    assert set(quiet.values()) == {0.0}


def test_a_cpu_holds_no_more_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    model = CausalLM(recipe.ROWS["mamba"].model.replace(d_model=8, n_layer=1)).eval()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **given: (sizes.append(ids.numel()), forward(ids, **given))[1])
    recipe.evaluate(model, lengths=[2**17], examples=lambda length: 1)
    assert sum(sizes) == 2**17
    assert max(sizes) == 2**15


def test_attention_is_judged_whole_and_no_further_than_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in ("mamba", "lstm", "h3"):
        assert recipe.judged_examples(recipe.ROWS[row].model, 2**20, 4096) == 4096
    for row in ("attention-rotary", "attention-absolute"):
        config = recipe.ROWS[row].model
        assert [recipe.judged_examples(config, 2**k, 4096) for k in (6, 14, 15)] == [512, 512, 0]
        assert recipe.judged_examples(config, 64, 3) == 3
    short = recipe.ROWS["attention-absolute"].model.replace(d_model=16, max_positions=100)
    assert recipe.judged_examples(short, 128, 4) == 0
    score = recipe.evaluate(CausalLM(short).eval(), lengths=[64], examples=lambda length: 4)[64][0]
    assert score.examples == 4
