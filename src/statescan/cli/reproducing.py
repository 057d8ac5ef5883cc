"""What the commands of ``statescan reproduce`` share: options, rows, the device, interruption, the printed table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from statescan.cli.terminal import INTERRUPTED, emit_json, note

__all__ = [
    "Device",
    "Json",
    "Overrides",
    "ReportOnly",
    "Seconds",
    "chosen_rows",
    "default_device",
    "going_on",
    "print_results",
]

Device = Annotated[str | None, typer.Option("--device", show_default="cuda where there is one", help="cpu or cuda.")]
Seconds = Annotated[
    float | None,
    typer.Option("--seconds", min=0, show_default="no end", help="Leave off training after so many; call again."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of every run, e.g. train.steps=20."),
]
ReportOnly = Annotated[bool, typer.Option("--report", help="Train nothing: write table and figure of what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to standard error.")]


@contextlib.contextmanager
def going_on(kept: str = "what was trained is kept, and the same command goes on from there") -> Iterator[None]:
    """Says, where the user interrupts, what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"interrupted; {kept}")
        raise typer.Exit(INTERRUPTED) from None


def default_device(name: str | None) -> str:
    """The device that was named, or a GPU where there is one.

    Raises:
        ConfigError: torch can't use it here.
    """
    import torch

    from statescan.cli.models import usable_device

    return str(usable_device(name or ("cuda" if torch.cuda.is_available() else "cpu")))


def chosen_rows(asked: Sequence[str] | None, known: Mapping[str, Any], headline: str | None = None) -> list[str]:
    """The rows that were asked for, each once: all for "all"; where none was, the headline, or all without one.

    Raises:
        ConfigError: there is no such row, or "all" stands beside others.
    """
    from statescan.errors import ConfigError

    if not asked and headline is not None:
        return [headline]
    if not asked or set(asked) == {"all"}:
        return list(known)
    if "all" in asked:
        others = ", ".join(f"'{name}'" for name in dict.fromkeys(asked) if name != "all")
        raise ConfigError(f"reproduce: --row must be 'all' alone, or names of rows, got 'all' beside {others}")
    for name in asked:
        if name not in known:
            raise ConfigError(f"reproduce: --row must be one of {', '.join(known)}, or 'all', got '{name}'")
    return list(dict.fromkeys(asked))


def print_results(out: Path, results: Mapping[str, Any], as_json: bool) -> None:
    """The table of a folder and which files it holds, or all of it as JSON."""
    if as_json:
        emit_json(results)
        return
    print((out / "results.md").read_text(encoding="utf-8"))
    for path in sorted(out.glob("*.*")):
        if path.is_file():
            print(f"wrote {path}")
