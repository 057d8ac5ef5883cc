"""The selective copying recipe: its tables come from its runs, beside the paper's numbers as transcribed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from statescan.data import SelectiveCopying, load_tokenizer
from statescan.errors import ConfigError
from statescan.models import CausalLM
from statescan.recipes import selective_copying as recipe
from statescan.recipes.synthetic import Pooled, Score, Stage, SyntheticRun, interval, judge, read_scores, seed_of_tests

FACTS = Path(__file__).parents[3] / "shared" / "facts" / "paper.md"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a moment in place of the recipe's own."""

    def run(row: str = "mamba-s6", seed: int = 0, *, length: int = 4096, share: float = 1.0) -> SyntheticRun:
        known = {**recipe.ROWS, **recipe.ABLATION}[row]
        stages = (Stage(SelectiveCopying(32), 4, 20), Stage(SelectiveCopying(min(known.length, length)), 1, 2))
        return SyntheticRun(row, known.model.replace(d_model=16), stages, seed)

    monkeypatch.setattr(recipe, "selective_copying_run", run)


def test_a_run_leaves_models_scores_tables_and_figure(small: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = ["mamba-s6", "lstm", "selective-B"]
    results = recipe.selective_copying(tmp_path, rows=rows, seeds=(0, 1), examples=3, say=lambda line: None)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    runs = {(run["row"], run["seed"]): run for run in results["runs"]}
    assert set(runs) == {(row, seed) for row in rows for seed in (0, 1)}
    # Each is judged at the length of its row, on examples of its own seed, all answers of an example.
    assert {(row, *run["scores"]) for (row, _), run in runs.items()} == {
        ("mamba-s6", "4096"),
        ("lstm", "256"),
        ("selective-B", "4096"),
    }
    again = judge(
        CausalLM.from_pretrained(tmp_path / "lstm-seed1").eval(), SelectiveCopying(256), 3, seed=seed_of_tests(256)
    )
    score = runs["lstm", 1]["scores"]["256"]
    assert (score["correct"], score["asked"], score["examples"], score["squares"]) == again
    assert score["asked"] == 48
    markdown = (tmp_path / "results.md").read_text()
    mine = [runs["mamba-s6", seed]["scores"]["4096"] for seed in (0, 1)]
    both = Pooled(tuple(Score(*(one[name] for name in Score._fields)) for one in mine))
    # Three sequences, which both seeds were judged on.
    assert 3 <= both.trials[1] <= 48
    assert f"| {' to '.join(interval(*both.trials))} |" in markdown
    assert "| Mamba, S6 | 99.8 | **" in markdown
    assert "| no gate, S6 | 97 | not run |" in markdown
    assert "| LSTM (at length 256) |" in markdown
    assert b"<svg" in (tmp_path / "figure.svg").read_bytes()
    assert load_tokenizer(tmp_path / "mamba-s6-seed0").decode([0, 1, 15]) == ".A?"


def test_every_row_is_trained_as_long_as_the_headline() -> None:
    headline = recipe.selective_copying_run()
    for row, known in {**recipe.ROWS, **recipe.ABLATION}.items():
        run = recipe.selective_copying_run(row, 3)
        assert run.steps == headline.steps == 35_000
        assert run.stages[-1].task == SelectiveCopying(known.length)
        lengths = [stage.task.total_length for stage in run.stages]
        assert lengths == sorted(lengths)
        assert (run.lr, run.beta2, run.decay) == (headline.lr, headline.beta2, headline.decay)
        assert {stage.batch_size for stage in run.stages} == {64}
    with pytest.raises(ConfigError, match="row must be one of mamba-s6, "):
        recipe.selective_copying_run("mamba")


def test_a_shorter_and_quicker_table() -> None:
    """All rows end at the length, the LSTM no later than at its own, with the same updates; the order stays."""
    for row in ("mamba-s6", "lstm", "selective-none"):
        run = recipe.selective_copying_run(row, length=512, share=0.5)
        assert run.steps == (12_000 + 3_000 + 3_000 + 8_000) // 2
        assert run.stages[0] == Stage(SelectiveCopying(64), 64, 6_000)
        assert run.stages[-1].task == SelectiveCopying(256 if row == "lstm" else 512)
    assert recipe.selective_copying_run("lstm", length=128).stages[-1].task == SelectiveCopying(128)
    with pytest.raises(ConfigError, match=r"length must be one of 128, 256, .*4096, got 100"):
        recipe.selective_copying_run(length=100)
    with pytest.raises(ConfigError, match=r"share of updates must be in \(0, 1\], got 0"):
        recipe.selective_copying_run(share=0)


def test_the_table_says_at_which_length(small: None, tmp_path: Path) -> None:
    results = recipe.selective_copying(
        tmp_path, rows=["mamba-s6", "lstm"], seeds=(0,), examples=2, length=512, say=lambda line: None
    )
    assert results["length"] == 512
    assert [set(run["scores"]) for run in results["runs"]] == [{"256"}, {"512"}]
    markdown = (tmp_path / "results.md").read_text()
    assert "16 tokens among 512;" in markdown
    assert "| LSTM (at length 256) |  | **" in markdown
    assert "| Mamba, S6 | 99.8 | **" in markdown


def test_the_rows_are_the_papers() -> None:
    """Three inner maps in three blocks; what is selective in all combinations, of which 'all' is the headline."""
    assert {f"{block}-{inner}" for block in ("mamba", "h3", "ungated") for inner in ("s6", "s4", "s4d")} <= set(
        recipe.ROWS
    )
    for row, known in recipe.ROWS.items():
        if row not in ("lstm", "attention"):
            assert (known.model.block, known.model.inner) == tuple(row.split("-"))
            block = {"mamba": "Mamba", "h3": "H3", "ungated": "no gate"}[known.model.block]
            assert known.title == f"{block}, {known.model.inner.upper()}"
    chosen = {
        frozenset(known.model.selective.split(",")) - {"none"} for known in recipe.ABLATION.values()
    }  # the sizes of the state select by all
    assert len(chosen) == 8
    sizes = [known.model.d_state for row, known in recipe.ABLATION.items() if row.startswith("state-")]
    assert sorted([*sizes, recipe.ROWS["mamba-s6"].model.d_state]) == [1, 2, 4, 8, 16, 32, 64]


def test_the_papers_numbers_are_those_of_its_table() -> None:
    if not FACTS.exists():
        pytest.skip("the facts are not beside this checkout")
    section = FACTS.read_text().partition("### Selective copying")[2].partition("###")[0]
    said = dict(part.strip().rsplit(" ", 1) for part in section.partition("\n")[2].strip().rstrip(".").split(";"))
    names = {
        "S4/none": "ungated-s4",
        "S6/none": "ungated-s6",
        "H3+S4": "h3-s4",
        "H3+S6": "h3-s6",
        "Mamba+S4": "mamba-s4",
        "Mamba+S6": "mamba-s6",
    }
    assert {names[name]: float(said[name]) for name in names} == recipe.PAPER


def test_more_examples_are_judged_on_top_of_those_that_were(small: None, tmp_path: Path) -> None:
    told: list[str] = []
    for count in (3, 8, 5):
        recipe.selective_copying(tmp_path, rows=["lstm"], seeds=(0,), examples=count, say=told.append)
    parts = read_scores(tmp_path / "lstm-seed0")[256]
    assert (parts["asked"], parts["examples"]) == (128, 8)
    assert sum("length 256" in line for line in told) == 2
    model = CausalLM.from_pretrained(tmp_path / "lstm-seed0").eval()
    whole = judge(model, SelectiveCopying(256), 8, seed=seed_of_tests(256))
    assert (parts["correct"], parts["squares"]) == (whole.correct, whole.squares)


def _scored(row: str, seed: int, right: int) -> dict[str, object]:
    score = {"correct": right, "asked": 160, "examples": 10, "seconds": 1.0}
    return {
        "row": row, "seed": seed, "parameters": 1, "steps": 2, "tokens": 3, "seconds": 4.0, "together": 1,
        "machine": {"device": "here"}, "scores": {4096: score},
    }  # fmt: skip


def test_each_seed_is_told_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    runs = [_scored("mamba-s6", seed, right) for seed, right in enumerate((160, 40, 100))]
    assert "| Mamba, S6 | 99.8 | **62.5** | 33.29 to 84.77 | 100, 25.0, 62.5 | 1 | 2 |" in recipe.table(runs)
    begun = [{"row": "mamba-s6", "seed": 3, "steps": 20, "of": 40}, {"row": "h3-s6", "seed": 0, "steps": 40, "of": 40}]
    told = recipe.table(runs, begun)
    assert " | 100, 25.0, 62.5, seed 3: unfinished (step 20 of 40) | 1 | 2 |" in told
    assert "| H3, S6 | 99.7 | seed 0: trained, not judged | | | | |" in told
    assert "| no gate, S6 | 97 | not run | | | | |" in told
    drawn = []
    monkeypatch.setattr(recipe, "save_figure", lambda made, path: drawn.append(made))
    recipe.draw(runs, tmp_path / "x")
    (axes,) = drawn[0].axes
    dots = [float(x) for line in axes.get_lines() if line.get_marker() == "o" for x in line.get_xdata()]
    assert dots == [100.0, 25.0, 62.5]


@pytest.mark.parametrize("wrong", [{"length": 100}, {"share": 0.0}, {"rows": ["none"]}])
def test_what_is_refused_leaves_no_folder(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        recipe.selective_copying(tmp_path / "out", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
