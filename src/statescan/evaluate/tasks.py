"""Zero-shot tasks: questions as JSON lines, what a model makes of them, the metric of the paper with its error.

Each line of a file is one question; four forms are known, told apart by their fields::

    {"context": ..., "choices": [...], "gold": 2}                  multiple choice
    {"contexts": [...], "continuation": ..., "gold": 1}            one ending after several beginnings (WinoGrande)
    {"context": ..., "target": ...}                                the word that must come next (LAMBADA)
    {"task": ..., "good": ..., "bad": ...}                         two sentences (BLiMP)

What is judged stands in a choice, space in front included (a sentence of BLiMP gets one, as in lm-eval's template);
"gold" counts from 0.
"""

from __future__ import annotations

import json
import lzma
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statescan.data.tokenizer import prefix_token
from statescan.errors import ConfigError, DataError
from statescan.evaluate.continuations import Likelihood, Reader, Request, encode_pairs

__all__ = ["TASKS", "Metric", "Question", "Task", "TaskResult", "evaluate_task", "evaluate_tasks", "read_questions"]

Progress = Callable[[str, int, int], object]

# Texts of the first reading, which begins when they are encoded, and of the largest: many batches of a GPU.
_FIRST_TEXTS, _MOST_TEXTS = 2048, 16384


@dataclass(frozen=True, slots=True)
class Task:
    """A task by name.

    Args:
        name: e.g. "hellaswag".
        metric: the one that the paper gives: "acc", the likeliest choice; "acc_norm", the likeliest per character.
        file: its file's name without ``.jsonl``.
        lm_eval: what lm-eval calls it.
    """

    name: str
    metric: str
    file: str
    lm_eval: str


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("lambada", "acc", "lambada_test", "lambada_openai"),
        Task("hellaswag", "acc_norm", "hellaswag", "hellaswag"),
        Task("piqa", "acc", "piqa", "piqa"),
        Task("arc_easy", "acc", "arc_easy", "arc_easy"),
        Task("arc_challenge", "acc_norm", "arc_challenge", "arc_challenge"),
        Task("winogrande", "acc", "winogrande", "winogrande"),
        Task("blimp", "acc", "blimp", "blimp"),
    )
}


class Metric(NamedTuple):
    """A figure and its standard error (None for a single question)."""

    value: float
    standard_error: float | None


class Question(NamedTuple):
    """A question: texts as (context, continuation), the right one's number, and what it belongs to (or "").

    A question with a single text asks whether its continuation is the likeliest, token by token.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int
    part: str


@dataclass(frozen=True, slots=True)
class TaskResult:
    """How well a model does at a task.

    Args:
        task: its name.
        metric: the name of the paper's metric, a key of `metrics`.
        questions: how many were judged.
        metrics: "acc"; "acc_norm" for multiple choice; "perplexity" of the asked-for words where there is no choice.
        parts: accuracy of each part of a task that has parts (BLiMP's 67 phenomena).
        items: for each question: the log-likelihood of each choice, and whether each metric's answer is right.
    """

    task: str
    metric: str
    questions: int
    metrics: dict[str, Metric]
    parts: dict[str, Metric]
    items: tuple[dict[str, Any], ...]

    @property
    def headline(self) -> Metric:
        """The paper's metric."""
        return self.metrics[self.metric]

    def to_dict(self, items: bool = False) -> dict[str, Any]:
        """Plain numbers, lists and dicts, as JSON takes them; with each question's own result where asked for."""
        fields: dict[str, Any] = {
            "task": self.task,
            "metric": self.metric,
            "questions": self.questions,
            "metrics": {name: _plain(metric) for name, metric in self.metrics.items()},
        }
        if self.parts:
            fields["parts"] = {name: _plain(metric) for name, metric in self.parts.items()}
        if items:
            fields["items"] = list(self.items)
        return fields


def _plain(metric: Metric) -> dict[str, float | None]:
    """As JSON takes it: what is infinite is None."""
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in metric._asdict().items()
    }


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Reads a file of questions, JSON lines, plain or ending in ``.xz``.

    Raises:
        DataError: the file is missing, damaged or empty, or a line is no question; the text names the line.
    """
    path = Path(path)
    questions = []
    number = 0
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    questions.append(_question(json.loads(line)))
    except FileNotFoundError:
        raise DataError(f"evaluate: there is no file {path}; check the path") from None
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        raise DataError(f"evaluate: could not read {path} after line {number} ({reason}); copy it again") from problem
    except ValueError as problem:
        raise DataError(f"evaluate: {path}, line {number}: {problem}") from problem
    if not questions:
        raise DataError(f"evaluate: {path} must hold at least one question, got none; copy it again")
    return questions


_FORMS = "wanted context and choices, contexts and continuation, context and target, or good and bad"


def _question(fields: Any) -> Question:
    if not isinstance(fields, dict):
        raise ValueError(f"wanted an object, got {type(fields).__name__}")

    def text(name: str) -> str:
        if not isinstance(fields[name], str):
            raise ValueError(f"{name} must be text, got {fields[name]!r}")
        return fields[name]

    def texts(name: str) -> list[str]:
        value = fields[name]
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{name} must be a list of at least two texts, got {value!r}")
        return value

    part = text("task") if "task" in fields else ""
    if {"context", "choices"} <= set(fields):
        pairs = tuple((text("context"), choice) for choice in texts("choices"))
    elif {"contexts", "continuation"} <= set(fields):
        pairs = tuple((context, text("continuation")) for context in texts("contexts"))
    elif {"context", "target"} <= set(fields):
        return Question(((text("context"), text("target")),), 0, part)
    elif {"good", "bad"} <= set(fields):
        # As lm-eval asks it: no context, and its template's space in front of the sentence all the same.
        return Question((("", f" {text('good')}"), ("", f" {text('bad')}")), 0, part)
    else:
        raise ValueError(f"{_FORMS}, got {', '.join(sorted(map(str, fields))) or 'no field'}")
    gold = fields.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(pairs):
        raise ValueError(f"gold must be a number from 0 to {len(pairs) - 1}, got {gold!r}")
    return Question(pairs, gold, part)


def find_file(task: Task, folder: str | os.PathLike[str]) -> Path:
    """A task's file in a folder, plain or compressed.

    Raises:
        DataError: there is none.
    """
    folder = Path(folder)
    for ending in (".jsonl", ".jsonl.xz"):
        for name in dict.fromkeys((task.file, task.name)):
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    there = (
        f"{folder} holds no {task.file}.jsonl nor {task.file}.jsonl.xz" if folder.is_dir() else f"no folder {folder}"
    )
    raise DataError(
        f"evaluate: the task {task.name} needs its file, but there is {there}; name its folder by data_dir (--data-dir)"
    )


def named_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name, each once.

    Raises:
        ConfigError: an unknown name, or none.
    """
    if not names:
        raise ConfigError(f"evaluate: at least one task must be named, got none; there are {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"evaluate: a task must be one of {', '.join(TASKS)}, got {name!r}; check the name")
    return [TASKS[name] for name in dict.fromkeys(names)]


def evaluate_tasks(
    reader: Reader,
    tokenizer: Any,
    names: Sequence[str],
    data_dir: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Judges a model on tasks whose questions lie in a folder.

    Args:
        reader: the model; see `statescan.evaluate.StateReader` and `LogitsReader`.
        tokenizer: with ``encode_batch`` and ``end_of_text``; see `encode_pairs` and
            `statescan.data.tokenizer.prefix_token`.
        names: of `TASKS`.
        data_dir: the folder of their files.
        limit: judge only the first so many questions of a task (of each of its parts). Default: all.
        progress: called with (task, questions judged, questions).

    Returns:
        One result a task, in the order of names.

    Raises:
        ConfigError: an unknown name or a limit below 1.
        DataError: a file is missing or holds no questions; all are looked for before the first is judged.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"evaluate: limit must be at least 1, got {limit}; leave it out to judge all questions")
    tasks = named_tasks(names)
    files = [find_file(task, data_dir) for task in tasks]
    results = []
    for task, file in zip(tasks, files, strict=True):
        questions = read_questions(file)
        if limit is not None:
            questions = _first(questions, limit)
        report = None if progress is None else (lambda done, total, name=task.name: progress(name, done, total))
        results.append(evaluate_task(reader, tokenizer, task, questions, progress=report))
    return results


def _first(questions: Sequence[Question], limit: int) -> list[Question]:
    counts: dict[str, int] = {}
    kept = []
    for question in questions:
        counts[question.part] = counts.get(question.part, 0) + 1
        if counts[question.part] <= limit:
            kept.append(question)
    return kept


def evaluate_task(
    reader: Reader,
    tokenizer: Any,
    task: Task,
    questions: Sequence[Question],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> TaskResult:
    """Judges a model on questions, at least one; arguments as in `evaluate_tasks`, progress without the task's name.

    Raises:
        DataError: there is no question, or a text has no token.
    """
    if not questions:
        raise DataError(f"evaluate: {task.name} must have at least one question, got none; pass those of a file")
    items = []
    # Texts become tokens beside the reading of those before, which leaves the host little to do where a GPU reads.
    with ThreadPoolExecutor(1) as worker:
        pieces = _pieces(questions)
        encoded = worker.submit(_encode, tokenizer, pieces[0])
        read = 0
        for number, piece in enumerate(pieces):
            requests = encoded.result()
            if number + 1 < len(pieces):
                encoded = worker.submit(_encode, tokenizer, pieces[number + 1])
            report = None if progress is None else _of_all(progress, read, len(piece), len(questions))
            scores = iter(reader.score(requests, progress=report))
            items += [_item(question, [next(scores) for _ in question.pairs]) for question in piece]
            read += len(piece)
    names = [name for name in ("acc", "acc_norm") if all(name in item for item in items)]
    metrics = {name: _mean(np.array([item[name] for item in items], dtype=np.float64)) for name in names}
    if all(len(question.pairs) == 1 for question in questions):
        nats = _mean(np.array([-item["logprobs"][0] for item in items]))
        # A small error e of the mean changes exp(mean) by exp(mean) * e. A hopeless model may pass the largest number.
        value = math.exp(nats.value) if nats.value < 700 else math.inf
        metrics["perplexity"] = Metric(value, None if nats.standard_error is None else value * nats.standard_error)
    parts = {}
    for part in dict.fromkeys(question.part for question in questions):
        if part:
            right = [item["acc"] for item, question in zip(items, questions, strict=True) if question.part == part]
            parts[part] = _mean(np.array(right, dtype=np.float64))
    metric = task.metric if task.metric in metrics else "acc"
    return TaskResult(task.name, metric, len(questions), metrics, parts, tuple(items))


def _encode(tokenizer: Any, questions: Sequence[Question]) -> list[Request]:
    pairs = [pair for question in questions for pair in question.pairs]
    return encode_pairs(tokenizer, pairs, prefix_token(tokenizer))


def _pieces(questions: Sequence[Question]) -> list[Sequence[Question]]:
    """Questions in pieces of some thousand texts, each up to twice as large as the one before."""
    pieces: list[Sequence[Question]] = []
    begin = texts = 0
    most = _FIRST_TEXTS
    for end, question in enumerate(questions, start=1):
        texts += len(question.pairs)
        if texts >= most or end == len(questions):
            pieces.append(questions[begin:end])
            begin, texts, most = end, 0, min(2 * most, _MOST_TEXTS)
    return pieces


def _of_all(progress: Callable[[int, int], object], before: int, here: int, total: int) -> Callable[[int, int], object]:
    """A piece's progress in tokens as that of all questions."""
    return lambda done, tokens: progress(before + here * done // max(tokens, 1), total)


def _item(question: Question, scores: Sequence[Likelihood]) -> dict[str, Any]:
    logprobs = [score.logprob for score in scores]
    if len(scores) == 1:
        return {"logprobs": logprobs, "acc": scores[0].greedy}
    item: dict[str, Any] = {"logprobs": logprobs, "acc": int(np.argmax(logprobs)) == question.gold}
    if len({context for context, _ in question.pairs}) == 1 and question.pairs[0][0]:
        # Characters of the choice as it was written, before a space was put in front.
        lengths = [len(choice.removeprefix(" ")) for _, choice in question.pairs]
        item["acc_norm"] = int(np.argmax(np.array(logprobs) / np.maximum(lengths, 1))) == question.gold
    return item


def _mean(values: NDArray[np.float64]) -> Metric:
    """The mean of independent questions; its error is their standard deviation (n - 1) over sqrt(n)."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Metric(float(values.mean()), error)
