"""``statescan demo``: from nothing to a trained, judged model and a look inside it, in minutes on a CPU."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from statescan.cli.terminal import INTERRUPTED, command, emit_json, note

__all__ = ["demo"]


@command
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything; an earlier demo's is replaced.")] = Path(
        "demo-out"
    ),
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, show_default="what two minutes on two cores allow", help="Updates.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights, data and samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; the story goes to standard error.")] = False,
) -> None:
    """Trains a small Mamba on Moby-Dick, judges it beside xz and a 5-gram model, and looks inside it."""
    from statescan.recipes.demo import demo as run_demo

    try:
        summary = run_demo(out, steps=steps, seed=seed, say=note if as_json else _say)
    except KeyboardInterrupt:
        note(f"interrupted; what was learnt is kept, go on with: statescan demo --out {shlex.quote(str(out))}")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        emit_json(summary)
        return
    seconds = summary["seconds"]
    print(f"Done in {seconds['all']:.0f} s, {seconds['training']:.0f} s of it training. Written:")
    for name in summary["files"]:
        print(f"  {out / name}")
    model = shlex.quote(str(out / "model"))
    print(
        f"\nOpen {out / 'inspection.html'} in a browser. Next:\n"
        f'  statescan generate --model {model} --prompt "The white whale" --max-new-tokens 300'
    )


def _say(line: str) -> None:
    print(line, flush=True)
