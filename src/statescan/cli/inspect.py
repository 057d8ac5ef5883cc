"""``statescan inspect``: what a model writes down of a text and what it lets pass, as a page and a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from statescan.cli.models import BUILTIN_MODEL, MODEL_HELP
from statescan.cli.terminal import command, emit_json, note, result_console

__all__ = ["inspect"]


@command
def inspect(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text to look at; '-' reads standard input.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page, one HTML file.")] = Path("report.html"),
    png: Annotated[bool, typer.Option("--png", help="Also draw a PNG beside the page.")] = False,
    model: Annotated[Path, typer.Option("--model", help=MODEL_HELP)] = BUILTIN_MODEL,
    layer: Annotated[
        int | None,
        typer.Option("--layer", show_default="the middle one", help="Shown channel by channel; -1: the last."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Look at the first so many tokens.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Shows which characters of a text a model writes into its state, and which it lets pass."""
    from statescan.cli.models import open_model
    from statescan.files import want_folder
    from statescan.inspect import inspect_text

    want_folder(out)
    language_model, tokenizer = open_model(model)
    report = inspect_text(
        language_model, tokenizer, sys.stdin.read() if text == "-" else text, layer=layer, max_tokens=max_tokens
    )
    report.save_html(out)
    files = [out]
    if png:
        files.append(out.with_suffix(".png"))
        report.save_png(files[-1])

    if as_json:
        emit_json(
            {
                "files": files,
                "pieces": report.pieces,
                "bits": report.bits.tolist(),
                "notes": report.notes,
                "layers": [
                    {
                        "layer": one.layer,
                        "delta": one.delta.tolist(),
                        "written": one.written.tolist(),
                        "half_life": one.half_life.tolist(),
                        "influence": one.share.tolist(),
                    }
                    for one in report.layers
                ],
            }
        )
        return
    import numpy as np
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("layer", justify="right")
    table.add_column("mean step", justify="right")
    table.add_column("half-life, tokens", justify="right")
    table.add_column("written most strongly")
    for one in report.layers:
        strongest = np.argsort(-one.written[1:], kind="stable")[:8] + 1
        pieces = " ".join(repr(report.pieces[token]) for token in strongest)
        table.add_row(str(one.layer), f"{one.delta.mean():.3g}", f"{np.median(one.half_life):.3g}", pieces)
    result_console().print(table)
    for remark in report.notes:
        note(remark)
    for path in files:
        print(f"wrote {path}")
