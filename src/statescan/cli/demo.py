"""``statescan demo``: the packaged model writes, learns a text, and writes again, in minutes on a CPU."""

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
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", show_default="packaged:moby_dick", help="Text to learn: file, folder or glob; several times."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, show_default="what 75 seconds here allow", help="Updates.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of data and samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; the story goes to standard error.")] = False,
) -> None:
    """The packaged model writes, learns your text or Moby-Dick, writes again; judged beside xz and a 5-gram model."""
    from statescan.recipes.demo import CORPUS
    from statescan.recipes.demo import demo as run_demo

    try:
        summary = run_demo(out, data=data or [CORPUS], steps=steps, seed=seed, say=note if as_json else _say)
    except KeyboardInterrupt:
        note("interrupted; what was learnt is kept, go on with the same command")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        emit_json(summary)
        return
    seconds = summary["seconds"]
    print(f"Done in {seconds['all']:.0f} s, {seconds['training']:.0f} s of it training. Written:")
    for name in summary["files"]:
        print(f"  {out / name}")
    model, prompt = shlex.quote(str(out / "model")), shlex.quote(summary["samples"][0]["prompt"])
    print(
        f"\nOpen {out / 'inspection.html'} in a browser. Next:\n"
        f"  statescan generate --model {model} --prompt {prompt} --max-new-tokens 300"
    )


def _say(line: str) -> None:
    print(line, flush=True)
