"""What every command shares: how it reports results, progress and errors, and with which exit code it ends."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from statescan.errors import StatescanError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "INTERRUPTED",
    "command",
    "emit_json",
    "fail",
    "note",
    "print_rows",
    "progress",
    "progress_console",
    "result_console",
    "set_debug",
    "was_given",
]

Function = TypeVar("Function", bound=Callable[..., Any])

INTERRUPTED = 130  # 128 + SIGINT, what shells report

_debug = bool(os.environ.get("STATESCAN_DEBUG"))


def set_debug(on: bool) -> None:
    """Lets exceptions pass through with their traceback (``statescan --debug``, or STATESCAN_DEBUG=1)."""
    global _debug
    _debug = _debug or on


def command(function: Function) -> Function:
    """Decorates a command: known errors end it with one clear line and exit code 1, Ctrl-C with 130."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            print("statescan: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output went away (`statescan ... | head`): no message, and none at shutdown either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except StatescanError as error:
            if _debug:
                raise
            fail(str(error))
        except OSError as error:
            if _debug:
                raise
            where = f" '{error.filename}'" if error.filename else ""
            fail(f"the system refused{where}: {error.strerror or error}")
        except Exception as error:
            # typer's own exceptions (usage errors, Exit) are for typer.
            if _debug or type(error).__module__.partition(".")[0] in {"typer", "click"}:
                raise
            fail(
                f"unexpected {type(error).__name__}: {error} (this is a defect: "
                "`statescan --debug ...` shows the traceback to report)"
            )

    return guarded  # pyright: ignore[reportReturnType]


def fail(message: str) -> NoReturn:
    """Prints one line on standard error and ends the command with exit code 1."""
    print("statescan: " + " ".join(message.split()), file=sys.stderr)
    raise typer.Exit(1)


def emit_json(value: Any) -> None:
    """Writes `value` to standard output as JSON (non-finite numbers as null, paths and other objects as text)."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def print_rows(*rows: tuple[str, str]) -> None:
    """Prints names and values in two columns on standard output."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def result_console() -> Console:
    """Rich console on standard output; a pipe gets wide plain lines, so that no figure is cut.

    Text is printed as it is: square brackets are no markup (``pip install 'statescan[train]'``).
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    return console


def was_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter of the command comes from the user, and not from its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def note(text: str) -> None:
    """A remark on standard error: nothing a program would read."""
    print(text, file=sys.stderr, flush=True)


def progress_console() -> Console:
    """Rich console on standard error, where progress goes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def progress(what: str, *, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error (nothing where that is no terminal); yields a function of (done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = progress_console()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
