"""Induction heads to a million tokens: the paper's table 11, trained at length 256 alone.

``statescan reproduce induction-heads`` trains, judges at every length from 2^6 to 2^20, and leaves a table and a figure
beside the paper's numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statescan.data.synthetic import InductionHeads
from statescan.data.tokenizer import SymbolTokenizer
from statescan.errors import ConfigError, MissingExtraError
from statescan.files import make_folder, write_text
from statescan.models import CausalLM, MambaConfig, TransformerConfig
from statescan.models.baseline_config import RecurrentConfig
from statescan.recipes.synthetic import (
    Pooled,
    Score,
    Stage,
    SyntheticRun,
    figure,
    gather_runs,
    how_far,
    interval,
    judge,
    judge_further,
    judge_pieces,
    machine_facts,
    percent,
    pooled,
    save_figure,
    seed_of_tests,
    train_runs,
    unfinished_runs,
    wilson,
)

__all__ = ["LENGTHS", "PAPER", "ROWS", "evaluate", "induction_heads", "induction_run", "report"]

TRAINED_LENGTH = 256
LENGTHS = tuple(2**k for k in range(6, 21))
EXAMPLES = 4096
# Updates of every row, on batches of 32.
STEPS = 20_000
# Attention costs the square of the length, and the paper's Transformers ended here too, for want of memory.
_LONGEST_ATTENTION, _ATTENTION_EXAMPLES = 2**14, 512

_NO = None
# Accuracy in per cent at 2^6 ... 2^20; None: the paper gives "out of memory". What it marks as perfect is 100 here.
PAPER: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "mamba": ("Mamba", (100,) * 15),
    "h3": ("H3", (100, 100, 100, 80.9, 39.5, 23.8, 14.8, 8.2, 5.9, 6.6, 8.2, 4.7, 8.2, 6.3, 7.4)),
    "hyena": ("Hyena", (97.7, 100, 100, 100, 44.1, 12.5, 6.6, 5.1, 7.0, 5.9, 6.6, 6.6, 5.9, 6.3, 9.8)),
    "attention-xpos": ("MHA, xPos", (100, 100, 100, 99.6, 67.6, 25.4, 7.0, 9.0, 7.8, *(_NO,) * 6)),
    "attention-rotary": ("MHA, rotary", (100, 100, 100, 83.6, 31.3, 18.4, 8.6, 9.0, 5.5, *(_NO,) * 6)),
    "attention-absolute": ("MHA, absolute", (100, 99.6, 100, 58.6, 26.6, 18.8, 9.8, 10.9, 7.8, *(_NO,) * 6)),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: its title, its model, its highest learning rate."""

    title: str
    model: Any
    lr: float


def _attention(positions: str) -> TransformerConfig:
    return TransformerConfig(
        128, 2, 16, n_head=8, positions=positions, d_intermediate=512, mlp="gelu", max_positions=_LONGEST_ATTENTION
    )


ROWS: dict[str, Row] = {
    "mamba": Row("Mamba", MambaConfig(64, 2, 16), 2e-3),
    "h3": Row("H3 block, S4D", MambaConfig(64, 2, 16, d_state=64, block="h3", inner="s4d"), 1e-3),
    "s4": Row("Mamba block, S4", MambaConfig(64, 2, 16, d_state=64, inner="s4"), 1e-3),
    "lstm": Row("LSTM", RecurrentConfig(64, 2, 16, cell="lstm"), 1e-3),
    "attention-xpos": Row("MHA, xPos", _attention("xpos"), 2e-4),
    "attention-rotary": Row("MHA, rotary", _attention("rotary"), 2e-4),
    "attention-absolute": Row("MHA, absolute", _attention("absolute"), 2e-4),
}


def induction_run(row: str = "mamba", seed: int = 0) -> SyntheticRun:
    """How a row of the table is trained.

    Raises:
        ConfigError: there is no such row.
    """
    if row not in ROWS:
        raise ConfigError(f"induction heads: row must be one of {', '.join(ROWS)}, got {row!r}")
    known = ROWS[row]
    stages = (Stage(InductionHeads(TRAINED_LENGTH), 32, STEPS),)
    quiet = 1e-3 if row == "mamba" else 0.0
    return SyntheticRun(
        row, known.model, stages, seed, lr=known.lr, warmup=1000, decay=0.5, clip=1.0, beta2=0.95,
        quiet=quiet, quiet_after=6_000, quiet_weights_after=13_000,
    )  # fmt: skip


def judged_examples(config: Any, length: int, examples: int) -> int:
    """How many of so many examples of a length a model is judged on: all, but of attention, whose cost grows with the
    square of the length, 512 at most, and none that are longer than 2^14 or than its positions reach.

    Args:
        config: the model's.
        length: of an example.
        examples: how many were asked for.
    """
    if not isinstance(config, TransformerConfig):
        return examples
    reach = config.max_positions if config.positions == "absolute" else _LONGEST_ATTENTION
    return min(examples, _ATTENTION_EXAMPLES) if length <= min(reach, _LONGEST_ATTENTION) else 0


def evaluate(
    model: CausalLM,
    *,
    lengths: Sequence[int] = LENGTHS,
    examples: Callable[[int], int] = lambda length: EXAMPLES,
    first: int = 0,
    whole: bool | None = None,
    at_once: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> dict[int, tuple[Score, float]]:
    """Judges a model at several lengths, on fresh examples of each.

    Args:
        model: trained on the task.
        lengths: which.
        examples: how many of a length.
        first: number of the first of them.
        whole: read whole sequences. Default: only where the model's state grows with the length, as attention's does;
            else piece by piece, with memory that doesn't.
        at_once: tokens in memory. Default: 2^19 on a GPU, 2^15 elsewhere.
        progress: called with (length, done, total).

    Returns:
        For each length the score and the seconds that it took.
    """
    device = model.lm_head.weight.device
    at_once = at_once or (1 << 19 if device.type == "cuda" else 1 << 15)
    if whole is None:
        whole = isinstance(model.config, TransformerConfig)
    way = judge if whole else judge_pieces
    scores = {}
    for length in lengths:
        begun = time.perf_counter()
        told = None if progress is None else (lambda done, total, length=length: progress(length, done, total))
        score = way(
            model,
            InductionHeads(length),
            examples(length),
            seed=seed_of_tests(length),
            first=first,
            at_once=at_once,
            progress=told,
        )
        scores[length] = score, time.perf_counter() - begun
    return scores


def induction_heads(
    out: str | os.PathLike[str],
    *,
    rows: Sequence[str] = ("mamba",),
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str = "cpu",
    seconds: float | None = None,
    examples: Callable[[int], int] = lambda length: EXAMPLES,
    longest: int = LENGTHS[-1],
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains and judges rows of the table, and goes on where an earlier call stopped.

    Args:
        out: folder of the runs; `report` is written into it.
        rows: of `ROWS`, all trained side by side.
        seeds: each row is trained with each.
        device: where.
        seconds: leave off training after so many. Default: when it is done.
        examples: how many of each length are judged; those that an earlier call judged count.
        longest: judge no longer ones.
        say: called with lines of progress.

    Returns:
        What results.json holds; see `report`.

    Raises:
        ConfigError: an unknown row.
        CheckpointError: the folder holds a run of the same name with other settings.
    """
    runs = [induction_run(row, seed) for row in rows for seed in seeds]
    out = make_folder(out)
    for trained in train_runs(runs, out, device=device, seconds=seconds, say=say):
        if not trained.finished:
            continue
        folder = out / trained.run.name
        SymbolTokenizer(InductionHeads().symbols).save(folder)
        for length in LENGTHS:
            if length > longest:
                continue

            def judged(first: int, count: int, model: CausalLM = trained.model, length: int = length) -> Score:
                return evaluate(model, lengths=[length], examples=lambda _: count, first=first)[length][0]

            wanted = judged_examples(trained.run.model, length, examples(length))
            judge_further(trained, folder, length, wanted, judged, say=say)
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
        "recipe": "induction-heads",
        "machine": dict(machine or {}),
        "trained_length": TRAINED_LENGTH,
        "paper": {row: dict(zip(map(str, LENGTHS), values, strict=True)) for row, (_, values) in PAPER.items()},
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


def table(runs: Sequence[Mapping[str, Any]], unfinished: Sequence[Mapping[str, Any]] = ()) -> str:
    """The table as Markdown: ours with their 95 % intervals, each seed, and the paper's; how far `unfinished` are."""
    lines = [
        "# Induction heads",
        "",
        f"Accuracy in per cent; trained at length {TRAINED_LENGTH} alone. Ours, rounded down: the answers of all "
        "seeds together, Wilson's 95 % interval in brackets, then each seed. The seeds are judged on the same "
        "sequences: the interval counts a sequence once, and what training's randomness adds to it shows in the seeds' "
        "own numbers. Chance is 6.67.",
        "",
        "| model | parameters | seeds | " + " | ".join(f"2^{n.bit_length() - 1}" for n in LENGTHS) + " |",
        "|---" * (3 + len(LENGTHS)) + "|",
    ]
    for row, known in ROWS.items():
        mine = [run for run in runs if run["row"] == row]
        begun = [run for run in unfinished if run["row"] == row]
        if row in PAPER:
            title, values = PAPER[row]
            cells = ["out of memory" if value is None else f"{value:g}" for value in values]
            lines.append(f"| {title}, paper | | | " + " | ".join(cells) + " |")
        if mine:
            cells = [_cell(pooled(mine, length)) for length in LENGTHS]
            lines.append(f"| **{known.title}** | {mine[0]['parameters']:,} | {len(mine)} | " + " | ".join(cells) + " |")
            for run in mine if len(mine) > 1 else ():
                cells = [
                    "not run" if (score := pooled([run], length)) is None else percent(score.accuracy)
                    for length in LENGTHS
                ]
                lines.append(f"| {known.title}, seed {run['seed']} | | | " + " | ".join(cells) + " |")
        elif not begun:
            lines.append(f"| **{known.title}** | | | " + " | ".join(["not run"] * len(LENGTHS)) + " |")
        for run in begun:
            cells = [how_far(run), *[""] * (len(LENGTHS) - 1)]
            lines.append(f"| {known.title}, seed {run['seed']} | | | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Each run:",
        "",
        "| run | steps | tokens | seconds | device | worst length | its accuracy |",
        "|---" * 7 + "|",
    ]
    for run in runs:
        length = min(run["scores"], key=lambda n: (run["scores"][n]["correct"] / run["scores"][n]["asked"], -n))
        score = run["scores"][length]
        shared = f", {run['together']} runs at once" if run["together"] > 1 else ""
        lines.append(
            f"| {run['row']}, seed {run['seed']} | {run['steps']:,} | {run['tokens'] / 1e6:,.0f} M | "
            f"{run['seconds']:.0f}{shared} | {run['machine']['device']} | {length:,} | "
            f"{percent(score['correct'] / score['asked'])} of {score['asked']:,} |"
        )
    return "\n".join(lines) + "\n"


def _cell(score: Pooled | None) -> str:
    if score is None:
        return "not run"
    return f"{percent(score.accuracy)} [{', '.join(interval(*score.trials))}]"


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over length: ours as lines with their intervals, each seed a dot, the paper's dashed.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    made, axes = figure(9, 4.2)
    colours = dict(
        zip(ROWS, ("#1f5fa8", "#0b8a6f", "#7a4fa3", "#8a8a8a", "#c8553d", "#e0a458", "#b48ead"), strict=True)
    )
    for row, known in ROWS.items():
        colour = colours[row]
        mine = [run for run in runs if run["row"] == row]
        judged = [(length, score) for length in LENGTHS if (score := pooled(mine, length)) is not None]
        if judged:
            lengths = [length for length, _ in judged]
            bands = [wilson(*score.trials) for _, score in judged]
            axes.plot(lengths, [100 * score.accuracy for _, score in judged], "-", color=colour, label=known.title)
            for run in mine:
                each = [(length, score) for length in LENGTHS if (score := pooled([run], length)) is not None]
                axes.plot(
                    [length for length, _ in each], [100 * score.accuracy for _, score in each], "o", color=colour,
                    markersize=4, alpha=0.7,
                )  # fmt: skip
            axes.fill_between(
                lengths, [100 * b[0] for b in bands], [100 * b[1] for b in bands], color=colour, alpha=0.2
            )
        if row in PAPER:
            title, values = PAPER[row]
            points = [(n, v) for n, v in zip(LENGTHS, values, strict=True) if v is not None]
            axes.plot(*zip(*points, strict=True), "--", color=colour, linewidth=1, alpha=0.8, label=f"{title}, paper")
    axes.axvline(TRAINED_LENGTH, color="#1b2230", linewidth=0.8, linestyle=":")
    axes.text(TRAINED_LENGTH * 1.08, 3, "trained here", fontsize=8, color="#5c6675")
    axes.axhline(100 / 15, color="#b0b6bf", linewidth=0.8)
    axes.text(LENGTHS[-1], 100 / 15 + 1.5, "chance", fontsize=8, color="#5c6675", ha="right")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="sequence length", ylabel="accuracy, %", ylim=(0, 103), xticks=LENGTHS[::2])
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(made, path)
