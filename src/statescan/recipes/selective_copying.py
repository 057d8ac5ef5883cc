"""Selective copying, the paper's table 1, and what of S6 must depend on the input for it.

``statescan reproduce selective-copying`` trains with a curriculum over length, judges at length 4,096 with 16 tokens to
remember, and leaves a table and a figure beside the paper's numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statescan.data.synthetic import SelectiveCopying
from statescan.data.tokenizer import SymbolTokenizer
from statescan.errors import ConfigError, MissingExtraError
from statescan.files import make_folder, write_text
from statescan.models import MambaConfig, TransformerConfig
from statescan.models.baseline_config import RecurrentConfig
from statescan.recipes.synthetic import (
    Score,
    Stage,
    SyntheticRun,
    figure,
    gather_runs,
    how_far,
    interval,
    judge,
    judge_further,
    machine_facts,
    percent,
    pooled,
    save_figure,
    seed_of_tests,
    train_runs,
    unfinished_runs,
)

__all__ = ["ABLATION", "PAPER", "ROWS", "report", "selective_copying", "selective_copying_run"]

LENGTH = 4096
EXAMPLES = 4096
# (length, updates) of the curriculum, and the updates at the length that it leads to.
_CURRICULUM = ((64, 12_000), (128, 3_000), (256, 3_000), (512, 3_000), (1024, 3_000), (2048, 3_000))
_LAST_UPDATES = 8_000
# Token accuracy in per cent; table 1's rows that have one here.
PAPER: dict[str, float] = {
    "ungated-s4": 18.3,
    "ungated-s6": 97.0,
    "h3-s4": 57.0,
    "h3-s6": 99.7,
    "mamba-s4": 56.4,
    "mamba-s6": 99.8,
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its title, its model, and the length that it is trained and judged at in place of 4,096."""

    title: str
    model: Any
    length: int = LENGTH


def _mamba(**fields: Any) -> MambaConfig:
    return MambaConfig(64, 2, 16, **fields)


_BLOCKS = {"mamba": "Mamba", "h3": "H3", "ungated": "no gate"}
# S4 and S4D at the state size that they were published with.
_INNER = {"s4": ("S4", {"d_state": 64}), "s4d": ("S4D", {"d_state": 64}), "s6": ("S6", {})}

ROWS: dict[str, Row] = {
    **{
        f"{block}-{inner}": Row(f"{_BLOCKS[block]}, {title}", _mamba(block=block, inner=inner, **fields))
        for block in ("mamba", "h3", "ungated")
        for inner, (title, fields) in reversed(_INNER.items())
    },
    # One position after the other: at 4,096 its steps would take longer than all other rows together.
    "lstm": Row("LSTM", RecurrentConfig(64, 2, 16, cell="lstm"), length=256),
    "attention": Row("Transformer, rotary", TransformerConfig(64, 2, 16, n_head=8, positions="rotary")),
}

# What of S6 depends on the input, and how large its state is.
ABLATION: dict[str, Row] = {
    **{
        f"selective-{parts.replace(',', '-')}": Row(
            f"selective: {parts.replace(',', ', ').replace('dt', 'Δ')}", _mamba(selective=parts)
        )
        for parts in ("none", "B", "C", "dt", "B,C", "B,dt", "C,dt")
    },
    **{f"state-{size}": Row(f"d_state {size}", _mamba(d_state=size)) for size in (1, 2, 4, 8, 32, 64)},
}


def selective_copying_run(
    row: str = "mamba-s6", seed: int = 0, *, length: int = LENGTH, share: float = 1.0
) -> SyntheticRun:
    """How a row of the tables is trained: short sequences first, since most of what is to be learnt is in them.

    Args:
        row: of `ROWS` or `ABLATION`.
        seed: of weights and examples.
        length: where the curriculum ends, and what is judged: a power of 2 from 128. All rows have the updates that it
            takes to come there, those that end earlier too.
        share: of these updates, in (0, 1].

    Raises:
        ConfigError: there is no such row; a length or share out of range.
    """
    known = {**ROWS, **ABLATION}
    if row not in known:
        raise ConfigError(f"selective copying: row must be one of {', '.join(known)}, got {row!r}")
    lengths = [at for at, _ in _CURRICULUM[1:]] + [LENGTH]
    if length not in lengths:
        raise ConfigError(f"selective copying: length must be one of {', '.join(map(str, lengths))}, got {length}")
    if not 0 < share <= 1:
        raise ConfigError(f"selective copying: the share of updates must be in (0, 1], got {share}")
    longest = min(known[row].length, length)
    plan = [(at, max(1, round(share * updates))) for at, updates in (*_CURRICULUM, (LENGTH, _LAST_UPDATES))]
    left = sum(updates for at, updates in plan[:-1] if at < length) + plan[-1][1]
    stages = []
    for at, updates in plan:
        if at < longest:
            stages.append(Stage(SelectiveCopying(at), 64, updates))
            left -= updates
    stages.append(Stage(SelectiveCopying(longest), 64, left))
    return SyntheticRun(
        row, known[row].model, tuple(stages), seed, lr=2e-3, warmup=500, decay=0.25, clip=1.0, beta2=0.95, bf16=True
    )


def selective_copying(
    out: str | os.PathLike[str],
    *,
    rows: Sequence[str] = ("mamba-s6",),
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str = "cpu",
    seconds: float | None = None,
    examples: int = EXAMPLES,
    length: int = LENGTH,
    share: float = 1.0,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains and judges rows of the tables, and goes on where an earlier call stopped.

    Args:
        out: folder of the runs; `report` is written into it.
        rows: of `ROWS` and `ABLATION`, all trained side by side.
        seeds: each row is trained with each.
        device: where.
        seconds: leave off training after so many. Default: when it is done.
        examples: how many are judged; those that an earlier call judged count.
        length, share: as in `selective_copying_run`.
        say: called with lines of progress.

    Returns:
        What results.json holds; see `report`.

    Raises:
        ConfigError: an unknown row; a length or share out of range.
        CheckpointError: the folder holds a run of the same name with other settings.
    """
    runs = [selective_copying_run(row, seed, length=length, share=share) for row in rows for seed in seeds]
    out = make_folder(out)
    for trained in train_runs(runs, out, device=device, seconds=seconds, say=say):
        if not trained.finished:
            continue
        folder, task = out / trained.run.name, trained.run.stages[-1].task
        SymbolTokenizer(task.symbols).save(folder)
        at = task.total_length - task.asked

        def judged(first: int, count: int, model: Any = trained.model, task: Any = task, at: int = at) -> Score:
            return judge(model, task, count, seed=seed_of_tests(at), first=first)

        judge_further(trained, folder, at, examples, judged, say=say)
    return report(out, machine=machine_facts(device))


def report(out: str | os.PathLike[str], *, machine: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes results.json, results.md and, where matplotlib is installed, figure.svg from the runs in a folder.

    Args:
        out: folder of finished and judged runs.
        machine: where this was called.

    Returns:
        What results.json holds: the runs with their scores, how far the unfinished ones are, and the paper's numbers.
    """
    out = Path(out)
    runs, unfinished = gather_runs(out), unfinished_runs(out)
    results = {
        "recipe": "selective-copying",
        "machine": dict(machine or {}),
        "length": _longest(runs),
        "paper": PAPER,
        "runs": [{**run, "scores": {str(k): v for k, v in run["scores"].items()}} for run in runs],
        "unfinished": unfinished,
    }
    for name, text in (
        ("results.json", json.dumps(results, indent=1) + "\n"),
        ("results.md", table(runs, unfinished)),
    ):
        write_text(out / name, text)
    with contextlib.suppress(MissingExtraError):
        draw(runs, out / "figure.svg")
    return results


def _longest(runs: Sequence[Mapping[str, Any]]) -> int:
    """The length that the rows were trained for, but for those that are run at a shorter one."""
    return max((length for run in runs for length in run["scores"]), default=LENGTH)


def _accuracies(runs: Sequence[Mapping[str, Any]], row: str, length: int) -> list[float]:
    scores = [run["scores"][length] for run in runs if run["row"] == row and length in run["scores"]]
    return [score["correct"] / score["asked"] for score in scores]


def table(runs: Sequence[Mapping[str, Any]], unfinished: Sequence[Mapping[str, Any]] = ()) -> str:
    """The tables as Markdown, each row beside the paper's; of `unfinished` how far they are."""
    longest = _longest(runs)
    lines = [
        "# Selective copying",
        "",
        f"Token accuracy in per cent, rounded down, 16 tokens among {longest:,}; chance is 7.14. The paper's are at "
        f"{LENGTH:,}. The interval is Wilson's, 95 %. The 16 answers to a sequence hang together, and the seeds are "
        "judged on the same sequences: the interval is that of as many independent trials as tell as much (the "
        "sequences themselves where the file of scores doesn't say how far answers hang together). What training's "
        "randomness adds to it shows in the seeds' own numbers.",
        "",
    ]
    for rows, heading in ((ROWS, "model"), (ABLATION, "Mamba, S6")):
        lines += [f"| {heading} | paper | here | interval | each seed | parameters | steps |", "|---" * 7 + "|"]
        for row, known in rows.items():
            mine = [run for run in runs if run["row"] == row]
            paper = f"{PAPER[row]:g}" if row in PAPER else ""
            length = min(known.length, longest)
            title = known.title if length == longest else f"{known.title} (at length {length:,})"
            score = pooled(mine, length)
            begun = [f"seed {run['seed']}: {how_far(run)}" for run in unfinished if run["row"] == row]
            if score is None:
                lines.append(f"| {title} | {paper} | {', '.join(begun) or 'not run'} | | | | |")
                continue
            each = ", ".join([*(percent(one) for one in _accuracies(runs, row, length)), *begun])
            between = " to ".join(interval(*score.trials))
            lines.append(
                f"| {title} | {paper} | **{percent(score.accuracy)}** | {between} | {each} | "
                f"{mine[0]['parameters']:,} | {mine[0]['steps']:,} |"
            )
        lines.append("")
    lines += ["| run | tokens | seconds | device |", "|---" * 4 + "|"]
    for run in runs:
        shared = f", {run['together']} runs at once" if run["together"] > 1 else ""
        lines.append(
            f"| {run['row']}, seed {run['seed']} | {run['tokens'] / 1e6:,.0f} M | {run['seconds']:.0f}{shared} | "
            f"{run['machine']['device']} |"
        )
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Each row's seeds as dots beside the paper's number.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    longest = _longest(runs)
    rows = [(row, known.title, min(known.length, longest)) for row, known in {**ROWS, **ABLATION}.items()]
    rows = [row for row in rows if _accuracies(runs, row[0], row[2])]
    made, axes = figure(7.5, 0.8 + 0.3 * len(rows))
    for place, (row, _, length) in enumerate(rows):
        for accuracy in _accuracies(runs, row, length):
            axes.plot(100 * accuracy, place, "o", color="#1f5fa8", markersize=6, alpha=0.7)
        if row in PAPER:
            axes.plot(PAPER[row], place, "d", color="#c8553d", markersize=8, markerfacecolor="none")
    axes.plot([], [], "o", color="#1f5fa8", alpha=0.7, label=f"here, at {longest:,}, one a seed")
    axes.plot([], [], "d", color="#c8553d", markerfacecolor="none", label=f"paper, at {LENGTH:,}")
    axes.axvline(100 / 14, color="#b0b6bf", linewidth=0.8)
    titles = [f"{title} (at {length:,})" if length != longest else title for _, title, length in rows]
    axes.set_yticks(range(len(rows)), titles)
    axes.invert_yaxis()
    axes.set(xlabel="token accuracy, %; the line is chance", xlim=(0, 102))
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    save_figure(made, path)
