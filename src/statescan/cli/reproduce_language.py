"""``statescan reproduce language-scaling`` and ``context-growth``: language models on whole novels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statescan.cli.reproducing import (
    Device,
    Json,
    Overrides,
    ReportOnly,
    chosen_rows,
    default_device,
    going_on,
    print_results,
)
from statescan.cli.terminal import command, emit_json, note

if TYPE_CHECKING:
    from statescan.train import RunConfig

__all__ = ["context_growth", "language_scaling", "print_tuning"]

Data = Annotated[
    Path, typer.Option("--data", help="Folder of novels_train, novels_valid and novels_test (.tar.xz, .txt, ...).")
]
Rows = Annotated[
    list[str] | None,
    typer.Option("--row", show_default="all", help="Row of the table; several times for several, or 'all'."),
]


@command
def language_scaling(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Folder of runs, table and figure; resumable.")] = Path(
        "reproduce/language-scaling"
    ),
    row: Rows = None,
    passes: Annotated[
        float | None,
        typer.Option("--passes", min=0, max=4, show_default="1; 0.25 with --tune", help="Through the training books."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights and order.")] = 0,
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", help="'bytes', or 'bpe': 8,192 ids, trained on the training books; in OUT/bpe."),
    ] = "bytes",
    device: Device = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Train over the grid of learning rates and dropouts that each row's come from."),
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time each row's training for a moment instead, alone on the device.")
    ] = False,
    only_report: ReportOnly = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Figure 4, on novels: Mamba, Transformers, an LSTM and S4, in bits per byte of unseen books over their size."""
    from statescan.errors import ConfigError
    from statescan.recipes import language_scaling as recipe

    if sum((tune, speed, only_report)) > 1:
        raise ConfigError("reproduce: --tune, --speed and --report exclude each other, got several; name one")
    if tokenizer not in ("bytes", "bpe"):
        raise ConfigError(f"reproduce: --tokenizer must be 'bytes' or 'bpe', got '{tokenizer}'")
    rows = chosen_rows(row, recipe.ROWS)
    where = device_kind(device)
    # Bits of other ids are another table.
    out = out if tokenizer == "bytes" else out / tokenizer
    ids = tokenizer if tokenizer == "bytes" or only_report else str(recipe.bpe_tokenizer(data, out))
    shared: dict[str, Any] = {"tokenizer": ids, "device": where, "change": changed_by(overrides), "say": note}
    with going_on():
        if tune:
            found = recipe.tune(rows, data, out, passes=recipe.TUNING_PASSES if passes is None else passes, **shared)
            print_tuning(found, as_json)
            return
        if speed:
            for name in rows:
                recipe.measure_speed(name, data, out, **shared)
        if speed or only_report:
            results = recipe.report(out)
        else:
            passes = recipe.PASSES if passes is None else passes
            results = recipe.language_scaling(rows, data, out, passes=passes, seed=seed, **shared)
    print_results(out, results, as_json)


@command
def context_growth(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Folder of runs, table and figure; resumable.")] = Path(
        "reproduce/context-growth"
    ),
    scaling: Annotated[
        Path, typer.Option("--scaling", help="Folder of language-scaling, whose rows some of these are.")
    ] = Path("reproduce/language-scaling"),
    row: Rows = None,
    size: Annotated[str, typer.Option("--size", help="Of the scaling table's sizes.")] = "1m",
    passes: Annotated[float, typer.Option("--passes", min=0, max=4, help="Through the training books.")] = 1.0,
    longest: Annotated[
        int | None,
        typer.Option(
            "--longest",
            min=2048,
            show_default="1048576; with --report the farthest there",
            help="Positions judged, a power of two.",
        ),
    ] = None,
    device: Device = None,
    only_report: ReportOnly = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Bits per byte over a position up to a million: Mamba of three lengths, five remedies, beside Transformers."""
    from statescan.recipes import context_growth as recipe

    rows = chosen_rows(row, recipe.ROWS)
    with going_on():
        if only_report:
            results = recipe.report(out, longest)
        else:
            results = recipe.context_growth(
                rows, data, out, scaling=scaling, size=size, passes=passes, longest=longest or recipe.LONGEST,
                device=device_kind(device), change=changed_by(overrides), say=note,
            )  # fmt: skip
    print_results(out, results, as_json)


def device_kind(name: str | None) -> str:
    """The device that was named or is there, as training takes it."""
    from statescan.errors import ConfigError

    if name not in (None, "cpu", "cuda"):
        raise ConfigError(f"reproduce: --device must be cpu or cuda, got '{name}'; CUDA_VISIBLE_DEVICES picks one")
    return default_device(name)


def changed_by(overrides: Sequence[str] | None) -> Callable[[RunConfig], RunConfig]:
    """What --set makes of a run."""
    return lambda run: run.apply_overrides(overrides or [])


def print_tuning(found: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """What a grid came to, as a table or as JSON."""
    if as_json:
        emit_json(found)
        return
    print("| row | learning rate | dropout | updates | bits per byte, held-out books |\n|---|---:|---:|---:|---:|")
    for one in sorted(found, key=lambda one: (one["row"], one["dropout"], one["lr"])):
        bits = "diverged" if one["bits_per_byte"] is None else f"{one['bits_per_byte']:.4f}"
        print(f"| {one['row']} | {one['lr']:g} | {one['dropout']:g} | {one['updates']:,} | {bits} |")
