"""``statescan bench``: our ops and model beside the peers that are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from statescan.cli.terminal import command, emit_json, progress_console, result_console

__all__ = ["bench"]


@command
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="scan, conv, norm, prefill, decode, train, or all.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="For all alike [default: torch's].")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: shows that it runs, not how fast.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Measure the installed peers too.")] = True,
    only: Annotated[str | None, typer.Option("--only", help="Only implementations whose name contains this.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write everything to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measures ops and model beside the peers, each in its own process, after checking it against ours."""
    from statescan.bench import run

    console = progress_console()
    report = run(
        names or ["all"],
        threads=threads,
        quick=quick,
        peers=peers,
        only=only,
        out=out,
        progress=lambda line: console.print(line, style="dim"),
    )
    if as_json:
        emit_json(report)
    else:
        result_console().print(_table(report))


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    machine = report["machine"]
    title = ", ".join(f"{name} {machine[name]}" for name in ("cpu", "threads", "torch") if name in machine)
    table = Table(box=None, padding=(0, 2), title=title, title_justify="left", header_style="bold")
    for heading in ("benchmark", "case", "implementation", "dtype"):
        table.add_column(heading)
    for heading in ("ms, median", "best", "tokens/s", "x floor", "error"):
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        cells = [row["bench"], row["case"], row["implementation"], row["dtype"]]
        if row["failure"]:
            table.add_row(*cells, "", "", "", "", row["failure"])
            continue
        table.add_row(
            *cells,
            *(
                "" if row[key] is None else form.format(row[key])
                for key, form in (
                    ("milliseconds", "{:,.2f}"),
                    ("best", "{:,.2f}"),
                    ("tokens_per_second", "{:,.1f}"),
                    ("ratio", "{:.2f}"),
                    ("relative_error", "{:.1e}"),
                )
            ),
        )
    return table
