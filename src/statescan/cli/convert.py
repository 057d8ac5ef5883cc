"""``statescan convert``: a checkpoint in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statescan.cli.terminal import command, emit_json, print_rows

__all__ = ["convert"]


@command
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A model's folder, a file of weights, or owner/name on the hub.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The new folder.")],
    to: Annotated[str, typer.Option("--to", help="state-spaces, transformers or statescan.")],
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.", show_default="main")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Look into the hub's cache alone.")] = False,
    shard_megabytes: Annotated[
        int, typer.Option("--shard-megabytes", min=1, help="Split weights beyond so many megabytes.")
    ] = 5000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Writes a checkpoint in another layout, every number to the bit; the folder appears when it is whole."""
    from statescan import models

    folder = models.convert(
        source, destination, to, revision=revision, offline=offline, shard_bytes=shard_megabytes * 10**6
    )
    names = sorted(path.name for path in folder.iterdir())
    size = sum(path.stat().st_size for path in folder.iterdir())
    if as_json:
        emit_json({"folder": str(folder), "layout": to, "files": names, "bytes": size})
        return
    print_rows(("folder", str(folder)), ("layout", to), ("files", ", ".join(names)), ("size", f"{size / 1e6:,.1f} MB"))
