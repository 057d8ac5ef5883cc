"""Zero-shot tasks on the command line: ``statescan evaluate --tasks`` and ``statescan reproduce zero-shot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statescan.cli.terminal import command, emit_json, fail, note, progress, result_console

if TYPE_CHECKING:
    from statescan.recipes.zero_shot import PaperRow

__all__ = ["print_table", "split_names", "zero_shot"]


@command
def zero_shot(
    models: Annotated[
        str, typer.Option("--models", help="Folders or owner/name on the hub, with commas between: any causal models.")
    ],
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Folder of the tasks' files: NAME.jsonl or .jsonl.xz.")],
    tasks: Annotated[
        str | None, typer.Option("--tasks", show_default="the table's six", help="Tasks with commas between.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, show_default="all", help="Judge the first N questions of a task.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", show_default="none", help="'bytes' or a tokenizer JSON, for models that come without one."
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option("--context", min=1, help="Tokens of an input that are read, its last; at most the model's own."),
    ] = 2048,
    runs_on: Annotated[
        str, typer.Option("--runs-on", help="statescan, transformers, or auto: statescan for the models that it has.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option("--device", show_default="cuda where there is one", help="cpu, cuda, cuda:1, ...")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the report, with every question's, here.")
    ] = None,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Show all of table 3, not the rows of about the models' sizes alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to standard error.")] = False,
) -> None:
    """Table 3: zero-shot accuracy on six tasks, of any models, beside the paper's."""
    import torch

    from statescan.recipes import zero_shot as recipe

    def show(reports: Sequence[Mapping[str, Any]]) -> None:
        paper = recipe.TABLE_3 if all_rows else recipe.beside_paper(*(one["parameters"] for one in reports))
        print_table(reports, paper)
        if out is not None:
            print(f"\nwrote {out}")

    finished: list[Mapping[str, Any]] = []
    try:
        with progress("judging", unit="questions") as bar:
            found = recipe.zero_shot(
                split_names(models),
                data_dir,
                tasks=recipe.SIX_TASKS if tasks is None else split_names(tasks),
                limit=limit,
                out=out,
                progress=lambda _, done, total: bar(done, total),
                say=note,
                finished=finished.append,
                device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
                dtype=dtype,
                tokenizer=tokenizer,
                runs_on=runs_on,
                max_length=context,
            )
    except KeyboardInterrupt:
        # Half of what was asked for is no JSON of it; the report holds the finished ones.
        if finished and not as_json:
            show(finished)
        raise
    if as_json:
        emit_json(found)
    else:
        show(found["models"])
    _tell_failed(found["failed"])


def _tell_failed(failed: Mapping[str, str]) -> None:
    if failed:
        fail("; ".join(f"{name} was not judged: {problem}" for name, problem in failed.items()))


def split_names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def print_table(reports: Sequence[Mapping[str, Any]], paper: Sequence[PaperRow]) -> None:
    """Prints the judged models and rows of the paper's table 3."""
    from rich.table import Table

    from statescan.recipes.zero_shot import table_rows

    titles, rows = table_rows(reports, paper)
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for title in titles:
        table.add_column(title, justify="left" if title == "model" else "right")
    for row in rows:
        table.add_row(*row)
    result_console().print(table)
    print("\naccuracies in percent +- the standard error over questions")
