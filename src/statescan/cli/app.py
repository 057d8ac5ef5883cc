"""The table of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from statescan import __version__
from statescan.cli import terminal
from statescan.cli.audio import spectrogram
from statescan.cli.bench import bench
from statescan.cli.convert import convert
from statescan.cli.demo import demo
from statescan.cli.dna import dna, embed
from statescan.cli.doctor import doctor
from statescan.cli.evaluate import evaluate
from statescan.cli.generate import generate
from statescan.cli.info import info
from statescan.cli.inspect import inspect
from statescan.cli.reproduce import reproduce
from statescan.cli.train import train

__all__ = ["app"]

app = typer.Typer(
    name="statescan",
    help="Selective state space models (Mamba): train, generate, judge and look inside, on any machine.",
    epilog="Example: statescan demo --out demo-out",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"statescan {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    terminal.set_debug(debug)


app.command(epilog="Example: statescan doctor --json")(doctor)
app.command(epilog="Example: statescan train --data packaged:moby_dick --out runs/whale --set train.steps=200")(train)
app.command(epilog='Example: statescan generate --prompt "It was the whale" --max-new-tokens 300 --temperature 0.8')(
    generate
)
app.command(epilog="Example: statescan evaluate --model runs/whale --data packaged:moby_dick --last 0.05")(evaluate)
app.command(epilog='Example: statescan inspect "It was the whale." -o report.html --png')(inspect)
app.command(epilog="Example: statescan bench scan decode --threads 2")(bench)
app.command(epilog="Example: statescan convert runs/whale whale-hf --to transformers")(convert)
app.command(epilog="Example: statescan info 130m --set d_state=32")(info)
app.command(epilog="Example: statescan demo --out demo-out")(demo)
app.command(epilog="Example: statescan spectrogram real.wav out.wav -o pictures.png --columns 2")(spectrogram)
app.command(epilog="Example: statescan embed reads.fa --model runs/genome -o vectors.npy")(embed)
app.add_typer(dna)
app.add_typer(reproduce)
