"""Questions from files, their metrics by hand, and the command beside the paper's table."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path

import pytest
import torch

from statescan.cli import main
from statescan.data import ByteTokenizer
from statescan.errors import ConfigError, DataError
from statescan.evaluate import Likelihood, StateReader, evaluate_tasks, read_questions
from statescan.evaluate.tasks import TASKS, Question, evaluate_task
from statescan.models import CausalLM, MambaConfig
from statescan.recipes.zero_shot import TABLE_3, average, beside_paper

LINES = {
    "hellaswag": [
        {"context": "one", "choices": [" a", " bb bb"], "gold": 1},
        {"context": "two", "choices": [" aaaa", " b"], "gold": 0},
    ],
    "lambada_test": [{"context": "one", "target": " x"}, {"context": "two", "target": " y"}],
    "winogrande": [{"contexts": ["he", "she"], "continuation": " ran.", "gold": 1}],
    "blimp": [{"task": "p", "good": "ab", "bad": "ba"}, {"task": "q", "good": "ab", "bad": "ba"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in LINES.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name == "hellaswag":
            (tmp_path / f"{name}.jsonl.xz").write_bytes(lzma.compress(text.encode()))
        else:
            (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


class Told:
    """Answers with what it was told, in turn."""

    def __init__(self, *answers: tuple[float, bool]) -> None:
        self.answers = list(answers)

    def score(self, requests, progress=None) -> list[Likelihood]:
        return [Likelihood(*self.answers.pop(0)) for _ in requests]


def test_metrics_by_hand(folder: Path) -> None:
    reader = Told(
        (-2.0, False), (-5.0, False), (-5.0, False), (-2.0, False),  # hellaswag
        (-1.0, True), (-3.0, False),  # lambada
        (-4.0, False), (-3.0, False),  # winogrande
        (-1.0, False), (-2.0, False), (-2.0, False), (-1.0, False),  # blimp
    )  # fmt: skip
    hellaswag, lambada, winogrande, blimp = evaluate_tasks(
        reader, ByteTokenizer(), ["hellaswag", "lambada", "winogrande", "blimp"], folder
    )
    # The likeliest: 0 and 1, both wrong. By character: -2/1 against -5/5, and -5/4 against -2/1, both right.
    assert hellaswag.metrics == {"acc": (0.0, 0.0), "acc_norm": (1.0, 0.0)}
    assert hellaswag.headline == hellaswag.metrics["acc_norm"]
    # Of two numbers 0 and 1 the standard deviation is sqrt(1/2), and the error that over sqrt(2).
    assert lambada.metrics["acc"] == pytest.approx((0.5, 0.5))
    assert lambada.metrics["perplexity"] == pytest.approx((math.exp(2), math.exp(2)))
    assert winogrande.metrics == {"acc": (1.0, None)}
    assert blimp.metrics["acc"] == pytest.approx((0.5, 0.5))
    assert {name: part.value for name, part in blimp.parts.items()} == {"p": 1.0, "q": 0.0}


def test_a_sentence_of_blimp_is_asked_with_a_space_in_front(folder: Path) -> None:
    assert read_questions(folder / "blimp.jsonl")[0].pairs == (("", " ab"), ("", " ba"))


def test_metrics_of_the_paper() -> None:
    assert {name for name, task in TASKS.items() if task.metric == "acc_norm"} == {"hellaswag", "arc_challenge"}
    assert {task.metric for task in TASKS.values()} == {"acc", "acc_norm"}


def test_pieces_of_many_questions_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    reader = StateReader(CausalLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256, d_state=4)).double())
    questions = [
        Question(tuple((f"question {i}", f" {c}{i * j}") for j, c in enumerate("abcd"[: 1 + i % 4])), 0, "")
        for i in range(23)
    ]
    said: list[tuple[int, int]] = []
    whole = evaluate_task(reader, ByteTokenizer(), TASKS["piqa"], questions)
    monkeypatch.setattr("statescan.evaluate.tasks._FIRST_TEXTS", 3)
    monkeypatch.setattr("statescan.evaluate.tasks._MOST_TEXTS", 7)
    pieces = evaluate_task(
        reader, ByteTokenizer(), TASKS["piqa"], questions, progress=lambda *done: said.append((done[0], done[1]))
    )
    assert len({done for done, _ in said}) > 5
    assert said == sorted(said)
    assert said[-1] == (23, 23)
    for one, other in zip(whole.items, pieces.items, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-12)
    with pytest.raises(DataError, match="piqa must have at least one question, got none"):
        evaluate_task(reader, ByteTokenizer(), TASKS["piqa"], [])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: "),
        ("[1]", "line 1: wanted an object, got list"),
        ('{"context": "a"}', "wanted context and choices, .*got context"),
        ('{"context": 1, "target": "b"}', "context must be text, got 1"),
        ('{"context": "a", "choices": ["b"], "gold": 0}', "choices must be a list of at least two texts"),
        ('{"context": "a", "choices": ["b", "c"], "gold": 2}', "gold must be a number from 0 to 1, got 2"),
        ("", "must hold at least one question"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "piqa.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_questions(tmp_path / "piqa.jsonl")


def test_files_that_are_missing_or_damaged(folder: Path) -> None:
    whole = (folder / "hellaswag.jsonl.xz").read_bytes()
    (folder / "hellaswag.jsonl.xz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"could not read .*hellaswag.jsonl.xz .*copy it again"):
        read_questions(folder / "hellaswag.jsonl.xz")
    with pytest.raises(DataError, match="there is no file"):
        read_questions(folder / "nowhere.jsonl")
    with pytest.raises(DataError, match="the task piqa needs its file"):
        evaluate_tasks(Told(), ByteTokenizer(), ["piqa"], folder)
    with pytest.raises(ConfigError, match=r"a task must be one of lambada, .*got 'mmlu'"):
        evaluate_tasks(Told(), ByteTokenizer(), ["mmlu"], folder)


def test_the_table_of_the_paper() -> None:
    rows = {row.model: row for row in TABLE_3}
    assert average(rows["Mamba-130M"].accuracies) == pytest.approx(44.7, abs=0.05)
    assert average(rows["Mamba-2.8B"].accuracies) == pytest.approx(63.3, abs=0.05)
    assert average([1.0, None]) is None
    assert "Mamba-130M" in {row.model for row in beside_paper(129_135_360)}
    assert "Mamba-2.8B" not in {row.model for row in beside_paper(129_135_360)}


def test_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = tmp_path / "model"
    CausalLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256, d_state=4)).save_pretrained(model)
    ByteTokenizer().save(model)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    code, out, err = run("evaluate", "--model", model, "--tasks", "hellaswag,blimp", "--data-dir", folder)
    assert code == 0, err
    assert "Mamba-130M (paper)" in out
    assert "hellaswag acc_norm" in out
    report = tmp_path / "report.json"
    code, out, err = run(
        "reproduce", "zero-shot", "--models", f"{model},{model}", "--data-dir", folder, "--tasks", "lambada",
        "--out", report, "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    assert len(told["models"]) == 2
    assert told["models"][0]["tasks"] == told["models"][1]["tasks"]
    assert len(json.loads(report.read_text())["models"][0]["tasks"]["lambada"]["items"]) == 2
    for arguments, words in (
        (("--tasks", "lambada", "--data", "x"), "exactly one of --data and --tasks"),
        (("--tasks", "lambada", "--data-dir", folder, "--last", "0.5"), "--last is for --data"),
        (("--tasks", "mmlu", "--data-dir", folder), "a task must be one of"),
        (("--tasks", "lambada", "--data-dir", folder, "--runs-on", "jax"), "runs_on must be"),
        (("--data", "x", "--limit", "3"), "--limit is for --tasks"),
    ):
        code, out, err = run("evaluate", "--model", model, *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert words in err
