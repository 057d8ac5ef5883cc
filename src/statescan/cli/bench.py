"""``statescan bench``: our ops and models beside the peers that are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from statescan.cli.terminal import command, emit_json, progress_console, result_console

__all__ = ["bench"]


@command
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            show_default="all",
            help="scan, conv, norm, attention, block, train, generate, prefill, decode (CPU), or all. "
            "Or one of these alone: figures FILE..., which draws the files' figures into the folder --out; properties, "
            "time and memory of each kind of layer over length; s4-kernels, S4's kernel beside plain PyTorch.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", show_default="the GPU where there is one", help="cuda or cpu.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, show_default="torch's", help="For all alike.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: shows that it runs, not how fast.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Measure the installed peers too.")] = True,
    only: Annotated[str | None, typer.Option("--only", help="Only implementations, or layers, with this name.")] = None,
    case: Annotated[str | None, typer.Option("--case", help="Only cases, as the table names them, with this.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="generate: this preset in place of the usual ones, e.g. pythia-1.4b.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write everything to this JSON file; figures: the folder.")
    ] = None,
    peer: Annotated[
        Path | None,
        typer.Option("--peer", help="s4-kernels: the file models/s4/s4.py of state-spaces/s4, measured too."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measures ops and models beside the peers, after checking every result against float64."""
    if names and names[0] == "figures":
        _figures(names[1:], out, as_json)
        return
    console = progress_console()
    if names == ["properties"]:
        from statescan.bench.properties import run_properties

        report = run_properties(
            device=device,
            threads=threads,
            quick=quick,
            only=only,
            out=out,
            progress=lambda line: console.print(line, style="dim"),
        )
        emit_json(report) if as_json else result_console().print(_properties_table(report))
        return
    if names == ["s4-kernels"]:
        from statescan.bench.s4_kernels import run_s4_kernels

        report = run_s4_kernels(
            device=device,
            threads=threads,
            quick=quick,
            peers=peers,
            peer=peer,
            only=only,
            out=out,
            progress=lambda line: console.print(line, style="dim"),
        )
        emit_json(report) if as_json else result_console().print(_s4_table(report))
        return
    from statescan.bench import run

    report = run(
        names or ["all"],
        device=device,
        threads=threads,
        quick=quick,
        peers=peers,
        only=only,
        case=case,
        model=model,
        out=out,
        progress=lambda line: console.print(line, style="dim"),
    )
    if as_json:
        emit_json(report)
    else:
        result_console().print(_table(report))


def _figures(files: list[str], out: Path | None, as_json: bool) -> None:
    from statescan.bench.figures import draw
    from statescan.bench.properties import draw_properties, read_properties

    folder, drawn, others = out or Path("figures"), [], []
    for file in map(Path, files):
        report = read_properties(file)
        if report is None:
            others.append(file)
        else:
            drawn.append(draw_properties(report, folder / file.with_suffix(".svg").name))
    if others or not files:
        drawn += draw(others, folder)
    if as_json:
        emit_json({"figures": drawn})
    else:
        for path in drawn:
            print(path)


def _properties_table(report: dict[str, Any]) -> Any:
    table = _titled(report["machine"])
    table.add_column("layer")
    for heading in ("length", "training us a token", "training KiB a token", "inference ms a step", "state MiB"):
        table.add_column(heading, justify="right")
    rows = {(row["kind"], row["use"], row["length"]): row for row in report["rows"]}
    for kind, length in dict.fromkeys((row["kind"], row["length"]) for row in report["rows"]):
        train, infer = (rows[kind, use, length] for use in ("training", "inference"))
        table.add_row(
            kind,
            f"{length:,}",
            *(("-", "-") if train["failure"] else (f"{1e6 * train['seconds_per_token']:.3f}", _kib(train["bytes"]))),
            *(("-", "-") if infer["failure"] else (_milliseconds(1e3 * infer["seconds"]), _mib(infer["bytes"]))),
        )
    return table


def _kib(size: float) -> str:
    return f"{size / 2**10:,.1f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.3f}"


def _s4_table(report: dict[str, Any]) -> Any:
    table = _titled(report["machine"])
    for heading in ("implementation", "mode"):
        table.add_column(heading)
    for heading in (
        "d_model",
        "ms, median",
        "floor ms",
        "x floor",
        "memory MiB",
        "error",
        "ours is faster",
        "of memory",
    ):
        table.add_column(heading, justify="right")
    bars = {(bar["beside"], bar["mode"]): bar for bar in report["bars"]}
    for row in report["rows"]:
        cells = [row["implementation"], row["mode"], str(row["d_model"])]
        if row["failure"]:
            table.add_row(*cells, "", "", "", "", row["failure"])
            continue
        bar = bars.get((row["implementation"], row["mode"]))
        table.add_row(
            *cells,
            _milliseconds(row["milliseconds"]),
            *((_milliseconds(row["floors"]["bytes"]), f"{row['ratio']:,.1f}") if "ratio" in row else ("", "")),
            f"{row['peak_memory_bytes'] / 2**20:,.0f}",
            f"{row['relative_error']:.1e}",
            *([f"{bar['times_faster']:.1f} x", f"1 / {1 / max(bar['part_of_memory'], 1e-9):.1f}"] if bar else []),
        )
    return table


def _titled(machine: dict[str, Any]) -> Any:
    from rich.table import Table

    titles = ("gpu", "driver", "cuda") if machine.get("device") == "cuda" else ("cpu", "threads")
    facts = [f"{name} {machine[name]}" for name in titles if name in machine]
    facts += [f"torch {machine['versions']['torch']}"] if "versions" in machine else []
    return Table(box=None, padding=(0, 2), title=", ".join(facts), title_justify="left", header_style="bold")


def _table(report: dict[str, Any]) -> Any:
    table = _titled(report["machine"])
    for heading in ("benchmark", "case", "implementation", "dtype"):
        table.add_column(heading)
    for heading in ("ms, median", "spread", "tokens/s", "peak GiB", "floor ms", "x floor", "error"):
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        cells = [row["bench"], row["case"], row["implementation"], row["dtype"]]
        if row["failure"]:
            table.add_row(*cells, "", "", "", "", "", "", row["failure"])
            continue
        # On a CPU every measurement has its process's peak; of an op's it says nothing.
        hidden = {"peak_memory_bytes"} if row["bench"] in ("scan", "conv", "norm") else set()
        table.add_row(
            *cells,
            *(
                "" if row.get(key) is None or key in hidden else form(row[key])
                for key, form in (
                    ("milliseconds", _milliseconds),
                    ("spread", _milliseconds),
                    ("tokens_per_second", lambda v: f"{v:,.1f}" if v < 1000 else f"{v:,.0f}"),
                    ("peak_memory_bytes", lambda v: f"{v / 2**30:,.2f}"),
                    ("floor_ms", _milliseconds),
                    ("ratio", lambda v: f"{v:.2f}"),
                    ("relative_error", lambda v: f"{v:.1e}"),
                )
            ),
        )
    return table


def _milliseconds(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.4f}"
