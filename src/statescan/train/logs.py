"""What a run tells: CSV files, TensorBoard events, a loss curve, and a line of progress."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from pathlib import Path
from typing import Any

from statescan.checkpoint import atomic_file
from statescan.errors import CheckpointError
from statescan.files import write_text

__all__ = ["CsvLog", "Progress", "TensorBoardLog", "draw_curve", "read_csv"]


class CsvLog:
    """Rows of numbers, appended one by one; numbers are written so that reading gives the same ones back.

    Args:
        path: the file.
        columns: their names; the first is "step".
        keep_until: rows of later steps are taken out first (those that came after the checkpoint a run resumes from);
            None starts the file anew.

    Raises:
        CheckpointError: the system refused to write.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], keep_until: int | None = None) -> None:
        self.path = path
        self.columns = columns
        rows = []
        if keep_until is not None and path.exists():
            rows = [row for row in read_csv(path) if len(row) == len(columns) and int(row["step"]) <= keep_until]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())

    def append(self, **values: Any) -> None:
        """Add one row, in one write."""
        assert tuple(values) == self.columns, (tuple(values), self.columns)
        try:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(",".join(str(value) for value in values.values()) + "\n")
        except OSError as problem:
            raise CheckpointError(
                f"train: could not write {self.path}: {problem.strerror}; make room, then go on with resume"
            ) from problem


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a log; a last line that was cut short by a crash is left out."""
    text = Path(path).read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row and None not in row.values()]


class TensorBoardLog:
    """Scalars for TensorBoard, where it is installed.

    Args:
        folder: of the event files.
        step: events after this step, left by a run that is resumed, are hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    @property
    def available(self) -> bool:
        """Whether events are written."""
        return self._writer is not None

    def add(self, step: int, **scalars: float) -> None:
        """Add values at a step; a double underscore in a name makes a group."""
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name.replace("__", "/"), value, step)

    def close(self) -> None:
        """Write what is still held back."""
        if self._writer is not None:
            self._writer.close()


def draw_curve(
    path: Path, rows: list[dict[str, str]], evaluations: list[tuple[int, float]], bytes_per_token: float
) -> bool:
    """Draw the training loss and the held-out text's, in bits per byte, over the steps, as PNG.

    Args:
        path: the PNG; written whole or not at all.
        rows: of log.csv.
        evaluations: (step, bits per byte).
        bytes_per_token: of the training text, which turns the loss into bits per byte.

    Returns:
        False where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if rows:
        steps = [int(row["step"]) for row in rows]
        bits = [float(row["loss"]) / math.log(2) / bytes_per_token for row in rows]
        axes.plot(steps, bits, color="#56B4E9", linewidth=1.2, label="training text")
    if evaluations:
        label = f"held-out text (last: {evaluations[-1][1]:.3f})"
        axes.plot(*zip(*evaluations, strict=True), "o-", color="#D55E00", markersize=4, linewidth=1.8, label=label)
    axes.set_xlabel("update")
    axes.set_ylabel("bits per byte")
    axes.set_title("Loss", loc="left", fontsize=12, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    if rows or evaluations:
        axes.legend(frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return True


class Progress:
    """One line on standard error with steps, loss, how the held-out part is judged, the speed and the time left.

    Args:
        steps: of the whole run.
        done: steps done before.
        shown: False, or a standard error that is no terminal, shows nothing.
        judged: unit of `held_out`.
        each: what the speed counts.
    """

    def __init__(self, steps: int, done: int, shown: bool, *, judged: str = "bits/byte", each: str = "tokens") -> None:
        self._bar: Any = None
        if not (shown and sys.stderr.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                f"loss {{task.fields[loss]}}  held out {{task.fields[held_out]}} {judged}  "
                f"{{task.fields[speed]}} {each}/s"
            ),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("training", total=steps, completed=done, loss="-", held_out="-", speed="-")
        self._bar.start()

    def step(self, done: int) -> None:
        """A step is over."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def show(self, **fields: str) -> None:
        """New values of loss, held_out or speed."""
        if self._bar is not None:
            self._bar.update(self._task, **fields)

    def note(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line as it stands."""
        if self._bar is not None:
            self._bar.stop()
