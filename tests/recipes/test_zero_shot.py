"""Several models judged one after the other: nothing that is finished is lost, and what can be told is told first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from statescan.cli import main
from statescan.data import ByteTokenizer
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.models import CausalLM, MambaConfig
from statescan.recipes import zero_shot as recipe
from statescan.recipes.zero_shot import zero_shot

QUESTIONS = [
    {"context": "one", "choices": [" a", " bb bb"], "gold": 1},
    {"context": "a", "choices": ["b", "c"], "gold": 0},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in QUESTIONS)
    for name in ("piqa", "arc_easy"):
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def model(folder: Path, seed: int, tokenizer: bool = True) -> Path:
    torch.manual_seed(seed)
    CausalLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256, d_state=4)).save_pretrained(folder)
    if tokenizer:
        ByteTokenizer().save(folder)
    return folder


def damage(folder: Path) -> Path:
    """Weights that are cut, which only reading them tells."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    return folder


def test_a_model_that_fails_does_not_take_the_others_along(questions: Path, tmp_path: Path) -> None:
    models = [model(tmp_path / name, seed) for seed, name in enumerate("abcd")]
    damage(models[1]), damage(models[3])
    out = tmp_path / "report.json"
    seen: list[list[str]] = []

    def say(line: str) -> None:
        seen.append([one["model"] for one in json.loads(out.read_text())["models"]] if out.exists() else [])

    found = zero_shot(models, questions, tasks=["piqa"], out=out, say=say)
    assert [one["model"] for one in found["models"]] == [str(models[0]), str(models[2])]
    assert list(found["failed"]) == [str(models[1]), str(models[3])]
    assert "cut short" in found["failed"][str(models[1])]
    # The report is there after each model, before the next one.
    assert seen == [[], [str(models[0])], [str(models[0])], [str(models[0]), str(models[2])]]
    written = json.loads(out.read_text())
    assert written["failed"] == found["failed"]
    assert [len(one["tasks"]["piqa"]["items"]) for one in written["models"]] == [2, 2]
    with pytest.raises(CheckpointError, match="cut short"):
        zero_shot([models[1], models[3]], questions, tasks=["piqa"])


def test_what_can_be_told_is_told_before_the_first_is_judged(questions: Path, tmp_path: Path) -> None:
    good, bare = model(tmp_path / "a", 0), model(tmp_path / "b", 1, tokenizer=False)

    def refused(error: type[Exception], words: str, models: list[Path], **options) -> None:
        def say(line: str) -> None:
            raise AssertionError("a model was opened")

        with pytest.raises(error, match=words):
            zero_shot(models, questions, **{"tasks": ["piqa"], "say": say, **options})

    refused(CheckpointError, "nowhere", [good, tmp_path / "nowhere"])
    refused(DataError, "name a tokenizer with --tokenizer", [good, bare])
    refused(DataError, "the task winogrande needs its file", [good], tasks=["piqa", "winogrande"])
    (questions / "arc_easy.jsonl").write_text("{", encoding="utf-8")
    refused(DataError, "arc_easy.jsonl, line 1", [good], tasks=["piqa", "arc_easy"])
    refused(ConfigError, "at least one model must be named", [])
    (bare / "config.json").write_text('{"model_type": "mamba", "hidden_act": "relu", "num_hidden_layers": 1}')
    refused(ConfigError, "hidden_act", [good, bare], runs_on="statescan", tokenizer="bytes")


def test_the_named_tokenizer_is_for_the_models_without_one(questions: Path, tmp_path: Path) -> None:
    bare, own = model(tmp_path / "a", 0, tokenizer=False), model(tmp_path / "b", 0)
    (dna := tmp_path / "dna").mkdir()
    (dna / "statescan_tokenizer.json").write_text('{"kind": "dna", "soft_masked": "base", "gaps": "error"}')
    first, second = zero_shot([bare, own], questions, tasks=["piqa"], tokenizer="bytes")["models"]
    assert first["tasks"] == second["tasks"]
    # With another for those that have none, the one that has its own is judged as before.
    (alone,) = zero_shot([own], questions, tasks=["piqa"], tokenizer=dna)["models"]
    assert alone["tasks"] == second["tasks"]


def test_the_command_tells_what_failed(questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = model(tmp_path / "a", 0), damage(model(tmp_path / "b", 1))
    arguments = ["reproduce", "zero-shot", "--models", f"{good},{bad}", "--data-dir", str(questions), "--tasks", "piqa"]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--device", "cpu", "--context", "64", *more])
        out, err = capsys.readouterr()
        assert end.value.code == 1
        assert str(good) in out
        assert f"{bad} was not judged: load: " in err.splitlines()[-1]
    with pytest.raises(SystemExit):
        main([*arguments, "--device", "cpu", "--context", "3"])
    # Of choices of five and six tokens only three can't be read.
    assert re.search(r"no longer than max_length = 3 tokens.*raise max_length \(--context\)", capsys.readouterr().err)
    # A folder where the report shall go is told before the judging.
    with pytest.raises(SystemExit):
        main([*arguments, "--device", "cpu", "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert "a folder stands there: name a file" in err
    assert "of 2)" not in err


def test_an_interrupted_command_shows_the_models_that_are_finished(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    judge, judged = recipe.evaluate_tasks, []

    def interrupted(*arguments, **options):
        judged.append(arguments)
        if len(judged) == 2:
            raise KeyboardInterrupt
        return judge(*arguments, **options)

    monkeypatch.setattr(recipe, "evaluate_tasks", interrupted)
    arguments = ["reproduce", "zero-shot", "--models", ",".join(map(str, models)), "--data-dir", str(questions)]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--tasks", "piqa", "--device", "cpu", "--out", str(tmp_path / "report.json")])
    out, _ = capsys.readouterr()
    assert end.value.code == 130
    assert str(models[0]) in out
    assert str(models[1]) not in out
    assert f"wrote {tmp_path / 'report.json'}" in out


def test_the_tasks_of_the_scaling_table_on_record_are_the_documents() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "reproduction.md").read_text(encoding="utf-8").replace("**", "")
    lines, words = text.splitlines(), " ".join(text.split())
    held = json.loads((root / "benchmarks" / "results" / "reproduce" / "language-scaling-tasks.json").read_text())
    models, kinds = held["models"], {}
    for family, name in (("mamba", "Mamba"), ("transformer++", "Transformer++"), ("pythia", "Transformer (Pythia)")):
        one = models[f"{family}-16m"]
        blimp, lambada = one["tasks"]["blimp"], one["tasks"]["lambada"]
        assert (blimp["questions"], len(blimp["parts"]), lambada["questions"]) == (67000, 67, 5153)
        kinds[family] = [part["value"] for _, part in sorted(blimp["parts"].items())]
        right, error = (lambada["metrics"]["acc"][key] for key in ("value", "standard_error"))
        # None right: the upper end of Wilson's interval.
        most = 100 * 1.96**2 / (lambada["questions"] + 1.96**2)
        share = f"{100 * right:.2f} ± {100 * error:.2f} %" if right else f"95 %: below {most:.2f} %"
        acc, perplexity, bits = blimp["metrics"]["acc"], lambada["metrics"]["perplexity"], one["wikitext2_test"]
        cells = [
            f"{100 * acc['value']:.2f} ± {100 * acc['standard_error']:.2f}",
            f"{right * lambada['questions']:.0f} ({share})",
            f"{round(perplexity['value'], -2):,.0f} ± {round(perplexity['standard_error'], -2):,.0f}",
            f"{bits['bits_per_byte']:.3f} ± {bits['standard_error']:.3f}",
        ]
        assert f"| {name} | {' | '.join(cells)} |" in lines
    told = []
    for family in ("transformer++", "pythia"):
        ahead = 100 * (torch.tensor(kinds["mamba"]) - torch.tensor(kinds[family])).double()
        told.append(f"{ahead.mean():.1f} ± {ahead.std() / len(ahead) ** 0.5:.1f}")
    assert f"Mamba is {told[0]} points ahead of Transformer++ and {told[1]} ahead of Pythia's type" in words


def test_the_tasks_of_the_packaged_model_on_record_are_the_documents() -> None:
    root = Path(__file__).parents[2]
    lines = (root / "docs" / "reproduction.md").read_text(encoding="utf-8").replace("**", "").splitlines()
    held = json.loads((root / "benchmarks" / "results" / "reproduce" / "builtin-model.json").read_text())
    # In the table's order: packaged, before, twin, twin without copies.
    runs = [held["runs"][number] for number in (0, 4, 1, 7)]
    blimp, right = ([run[task]["metrics"]["acc"] for run in runs] for task in ("blimp", "lambada"))
    words = [run["lambada"]["metrics"]["perplexity"] for run in runs]
    carried = [run["wikitext2"] for run in runs[:2]]
    windows = [runs[0]["wikitext2"]["windows"], runs[2]["wikitext2"]["windows"], runs[3]["wikitext2"]]
    told = {
        "BLiMP, all 67,000 pairs": [f"{100 * one['value']:.2f} ± {100 * one['standard_error']:.2f}" for one in blimp],
        "LAMBADA, 5,153 passages": [f"{100 * one['value']:.2f} ± {100 * one['standard_error']:.2f}" for one in right],
        "LAMBADA, perplexity of the last word": [
            f"{one['value']:,.0f} ± {one['standard_error']:,.0f}" for one in words
        ],
        "WikiText-2's test set, bits per byte: the state carried": [
            *(f"{one['bits_per_byte']:.3f} ± {one['standard_error']:.3f}" for one in carried),
            "-",
            "-",
        ],
        "the same in windows of 2,048": [
            f"{one['bits_per_byte']:.3f} ± {one['standard_error']:.3f}" for one in windows
        ],
    }
    told["the same in windows of 2,048"].insert(1, "")
    before, without = (held[f"beside_the_{one}"]["wikitext2_test"]["all"] for one in ("one_before", "twin"))
    every = [f"{bits:.3f}" for bits in (before["one"], before["other"], without["other"])]
    told["the same, every sixth window of 2,048"] = [*every[:2], "", every[2]]
    for start, cells in told.items():
        (line,) = [line for line in lines if line.startswith(f"| {start}") and line.count("|") == 6]
        assert line.endswith(f" | {' | '.join(cells)} |".replace("|  |", "| |"))
