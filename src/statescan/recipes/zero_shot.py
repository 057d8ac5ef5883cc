"""The paper's table 3: zero-shot accuracy of published language models on six tasks.

``statescan reproduce zero-shot --models a,b --data-dir questions`` judges any models and sets them beside it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.evaluate import TASKS, TaskResult, evaluate_tasks, read_questions
from statescan.evaluate.tasks import find_file, named_tasks
from statescan.files import atomic_file, want_folder
from statescan.integrations.language_models import JudgedModel, find_judged

__all__ = ["SIX_TASKS", "TABLE_3", "PaperRow", "average", "beside_paper", "report", "table_rows", "zero_shot"]

SIX_TASKS = ("lambada", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")


class PaperRow(NamedTuple):
    """A row of table 3: accuracies in percent, in the order of `SIX_TASKS`, and perplexity on LAMBADA."""

    model: str
    parameters: float
    lambada_perplexity: float
    accuracies: tuple[float, float, float, float, float, float]


# Gu and Dao (2023), version 2, table 3. Its column of averages is left out: for two models (Mamba-370M and 790M) the
# printed average is not that of the printed accuracies; `average` computes it from them.
TABLE_3 = (
    PaperRow("Hybrid H3-130M", 130e6, 89.48, (25.77, 31.7, 64.2, 44.4, 24.2, 50.6)),
    PaperRow("Pythia-160M", 160e6, 38.10, (33.0, 30.2, 61.4, 43.2, 24.1, 51.9)),
    PaperRow("Mamba-130M", 130e6, 16.07, (44.3, 35.3, 64.5, 48.0, 24.3, 51.9)),
    PaperRow("Hybrid H3-360M", 360e6, 12.58, (48.0, 41.5, 68.1, 51.4, 24.7, 54.1)),
    PaperRow("Pythia-410M", 410e6, 10.84, (51.4, 40.6, 66.9, 52.1, 24.6, 53.8)),
    PaperRow("Mamba-370M", 370e6, 8.14, (55.6, 46.5, 69.5, 55.1, 28.0, 55.3)),
    PaperRow("Pythia-1B", 1.0e9, 7.92, (56.1, 47.2, 70.7, 57.0, 27.1, 53.5)),
    PaperRow("Mamba-790M", 790e6, 6.02, (62.7, 55.1, 72.1, 61.2, 29.5, 56.1)),
    PaperRow("GPT-Neo 1.3B", 1.3e9, 7.50, (57.2, 48.9, 71.1, 56.2, 25.9, 54.9)),
    PaperRow("Hybrid H3-1.3B", 1.3e9, 11.25, (49.6, 52.6, 71.3, 59.2, 28.1, 56.9)),
    PaperRow("OPT-1.3B", 1.3e9, 6.64, (58.0, 53.7, 72.4, 56.7, 29.6, 59.5)),
    PaperRow("Pythia-1.4B", 1.4e9, 6.08, (61.7, 52.1, 71.0, 60.5, 28.5, 57.2)),
    PaperRow("RWKV-1.5B", 1.5e9, 7.04, (56.4, 52.5, 72.4, 60.5, 29.4, 54.6)),
    PaperRow("Mamba-1.4B", 1.4e9, 5.04, (64.9, 59.1, 74.2, 65.5, 32.8, 61.5)),
    PaperRow("GPT-Neo 2.7B", 2.7e9, 5.63, (62.2, 55.8, 72.1, 61.1, 30.2, 57.6)),
    PaperRow("Hybrid H3-2.7B", 2.7e9, 7.92, (55.7, 59.7, 73.3, 65.6, 32.3, 61.4)),
    PaperRow("OPT-2.7B", 2.7e9, 5.12, (63.6, 60.6, 74.8, 60.8, 31.3, 61.0)),
    PaperRow("Pythia-2.8B", 2.8e9, 5.04, (64.7, 59.3, 74.0, 64.1, 32.9, 59.7)),
    PaperRow("RWKV-3B", 3.0e9, 5.24, (63.9, 59.6, 73.7, 67.8, 33.1, 59.6)),
    PaperRow("Mamba-2.8B", 2.8e9, 4.23, (69.2, 66.1, 75.2, 69.7, 36.3, 63.5)),
    PaperRow("GPT-J-6B", 6.0e9, 4.10, (68.3, 66.3, 75.4, 67.0, 36.6, 64.1)),
    PaperRow("OPT-6.7B", 6.7e9, 4.25, (67.7, 67.2, 76.3, 65.6, 34.9, 65.5)),
    PaperRow("Pythia-6.9B", 6.9e9, 4.45, (67.1, 64.0, 75.2, 67.3, 35.5, 61.3)),
    PaperRow("RWKV-7.4B", 7.4e9, 4.38, (67.2, 65.5, 76.1, 67.8, 37.5, 61.0)),
)


def zero_shot(
    models: Sequence[str | os.PathLike[str]],
    data_dir: str | os.PathLike[str],
    *,
    tasks: Sequence[str] = SIX_TASKS,
    limit: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], object] | None = None,
    say: Callable[[str], object] | None = None,
    finished: Callable[[dict[str, Any]], object] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Judges models on the tasks of table 3 and sets them beside it.

    What can be told of all models and files without reading weights is checked before the first is judged. A model
    whose weights turn out to be damaged, or too large for the device, is told at the end: the others are judged.

    Args:
        models: folders or hub ids, of this package, the authors or `transformers`; one at a time lies in memory.
        data_dir: the folder of the tasks' files.
        tasks: of `statescan.evaluate.TASKS`. Default: the table's six.
        limit: judge only the first so many questions of a task. Default: all.
        out: a JSON file for the report with every question's own result, written anew after each model. Default: none.
        progress: called with ("model: task", questions judged, questions).
        say: called with a line before each model. Default: nothing is said.
        finished: called with each model's entry once it is judged (and in `out`), for who may be interrupted. Default:
            none.
        tokenizer: "bytes", or a `tokenizers` JSON file or its folder, for the models that come without one, as the
            authors' do. Default: each must have its own.
        options: of `statescan.integrations.language_models.find_judged`: device, dtype, max_length ...

    Returns:
        {"models": one entry each as `report` gives it, "failed": model -> what was wrong with it, "paper": the rows of
        table 3}.

    Raises:
        ConfigError: no model is named; or as `find_judged` and `evaluate_tasks` raise it.
        DataError, CheckpointError: as those raise, where it is told before the first model is judged, or no model could
            be judged.
    """
    if not models:
        raise ConfigError("zero-shot: at least one model must be named, got none; pass folders or hub ids")
    if out is not None:
        want_folder(out)
    for task in named_tasks(tasks):
        read_questions(find_file(task, data_dir))
    found = [find_judged(source, spare_tokenizer=tokenizer, **options) for source in models]
    paper = [row._asdict() for row in TABLE_3]
    reports: list[dict[str, Any]] = []
    whole: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    first: Exception | None = None
    for number, one in enumerate(found, start=1):
        if say is not None:
            say(f"{one.name} ({number} of {len(found)})")

        def say_task(task: str, done: int, total: int, name: str = one.name) -> None:
            if progress is not None:
                progress(f"{name}: {task}", done, total)

        try:
            judged = one.open()
            results = evaluate_tasks(judged.reader, judged.tokenizer, tasks, data_dir, limit=limit, progress=say_task)
        except (CheckpointError, DataError, torch.OutOfMemoryError) as problem:
            first = first or problem
            failed[one.name] = next(iter(str(problem).splitlines()), type(problem).__name__)
        else:
            reports.append(report(judged, results))
            whole.append(report(judged, results, items=True))
        judged = None
        if out is not None and whole:
            with atomic_file(out) as temporary:
                text = json.dumps({"models": whole, "failed": failed, "paper": paper}, indent=1)
                temporary.write_text(text + "\n", encoding="utf-8")
        if finished is not None and one.name not in failed:
            finished(reports[-1])
    if first is not None and not reports:
        raise first
    return {"models": reports, "failed": failed, "paper": paper}


def report(judged: JudgedModel, results: Iterable[TaskResult], *, items: bool = False) -> dict[str, Any]:
    """What was found out about a model: its name, size and results, as plain values."""
    return {
        "model": judged.name,
        "parameters": judged.parameters,
        "runs_on": judged.runs_on,
        "tasks": {result.task: result.to_dict(items) for result in results},
    }


def average(accuracies: Iterable[float | None]) -> float | None:
    """The mean of the table's six accuracies in percent, None where one is missing."""
    values = list(accuracies)
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def beside_paper(*parameters: int) -> tuple[PaperRow, ...]:
    """The rows of table 3 of about the models' sizes: for each the nearest, and all within a factor of 1.5."""
    kept: set[PaperRow] = set()
    for size in parameters:
        distance = {row: abs(math.log(row.parameters / max(size, 1))) for row in TABLE_3}
        reach = max(min(distance.values()) * 1.01, math.log(1.5))
        kept |= {row for row in TABLE_3 if distance[row] <= reach}
    return tuple(row for row in TABLE_3 if row in kept)


def table_rows(reports: Sequence[Mapping[str, Any]], paper: Sequence[PaperRow]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a table: the judged models, then the paper's.

    Args:
        reports: as `report` gives them.
        paper: rows of `TABLE_3`.

    Returns:
        (titles, rows): a task's paper metric in percent with its standard error; LAMBADA's perplexity; the average of
        the six where all were judged.
    """
    judged = [name for name in TASKS if any(name in one["tasks"] for one in reports)]
    titles = ["model", *(["LAMBADA ppl"] if "lambada" in judged else [])]
    titles += [f"{name} {TASKS[name].metric}" for name in judged]
    six = set(SIX_TASKS) <= set(judged)
    titles += ["average of six"] if six else []
    rows = []
    for one in reports:
        row = [str(one["model"])]
        found = {name: one["tasks"].get(name) for name in judged}
        if "lambada" in judged:
            row.append(_cell(found["lambada"], "perplexity", 1.0))
        row += [_cell(found[name], TASKS[name].metric, 100.0) for name in judged]
        if six:
            mean = average(
                None if found[name] is None else 100 * found[name]["metrics"][TASKS[name].metric]["value"]
                for name in SIX_TASKS
            )
            row.append("" if mean is None else f"{mean:.1f}")
        rows.append(row)
    for published in paper:
        row = [f"{published.model} (paper)"]
        if "lambada" in judged:
            row.append(f"{published.lambada_perplexity:.2f}")
        accuracies = dict(zip(SIX_TASKS, published.accuracies, strict=True))
        row += [f"{accuracies[name]:.1f}" if name in accuracies else "" for name in judged]
        if six:
            row.append(f"{average(published.accuracies):.1f}")
        rows.append(row)
    return titles, rows


def _cell(result: Mapping[str, Any] | None, metric: str, scale: float) -> str:
    if result is None or metric not in result["metrics"]:
        return ""
    figure = result["metrics"][metric]
    if figure["value"] is None:
        return "inf"
    error = "" if figure["standard_error"] is None else f" +- {figure['standard_error'] * scale:.2g}"
    digits = 2 if scale == 1.0 else 1
    return f"{figure['value'] * scale:.{digits}f}{error}"
