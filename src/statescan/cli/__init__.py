"""The command line: ``statescan doctor | train | generate | evaluate | inspect | bench | info | demo``.

Thin: a command parses, builds a config, calls one function of a lower room and prints. Results go to standard output,
progress and errors to standard error. Everything heavy is imported inside the commands, so that help is immediate.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 a `StatescanError`, 2 a usage error, 130 interrupted.

    Args:
        arguments: what follows ``statescan`` (default: the process's own arguments).
    """
    from statescan.cli.app import app

    app(args=None if arguments is None else list(arguments), prog_name="statescan")
