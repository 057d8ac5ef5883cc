"""``statescan reproduce spoken-digits`` and ``raw-audio``: sound told apart, and sound made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statescan.cli.reproducing import Json, Overrides, ReportOnly, Seconds, chosen_rows, going_on, print_results
from statescan.cli.terminal import command, note

__all__ = ["raw_audio", "spoken_digits"]

Data = Annotated[
    Path,
    typer.Option("--data", help="The Free Spoken Digit Dataset's folder of wav files, or the .npz that --keep wrote."),
]


@command
def spoken_digits(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Folder of runs, table and figure; resumable.")] = Path(
        "reproduce/spoken-digits"
    ),
    row: Annotated[
        list[str] | None,
        typer.Option("--row", show_default="s4", help="Row of the table: s4, s4d, mamba, conv, lstm; or 'all'."),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            "--split", show_default="official", help="official, a speaker's name, or 'speakers', each held out in turn."
        ),
    ] = None,
    frame: Annotated[
        int, typer.Option("--frame", min=1, help="Raw samples read at each position; 16 suits a CPU.")
    ] = 1,
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Write the recordings as read into this .npz, for a later --data.")
    ] = None,
    seconds: Seconds = None,
    overrides: Overrides = None,
    only_report: ReportOnly = False,
    as_json: Json = False,
) -> None:
    """Digits from raw samples: S4 and Mamba beside a CNN and an LSTM, on the official split or a new speaker."""
    from statescan.recipes import spoken_digits as recipe

    rows = chosen_rows(row, recipe.ROWS, "s4")
    with going_on():
        if only_report:
            results = recipe.report(out)
        else:
            if keep is not None:
                recipe.read_digits(data).save(keep)
            results = recipe.spoken_digits(
                out,
                data,
                rows=rows,
                splits=split or ["official"],
                frame=frame,
                overrides=overrides or [],
                seconds=seconds,
                say=note,
            )
    print_results(out, results, as_json)


@command
def raw_audio(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Folder of runs, table and figure; resumable.")] = Path(
        "reproduce/raw-audio"
    ),
    row: Annotated[
        list[str] | None,
        typer.Option("--row", show_default="s4-mamba", help="Row of the table, 'all', or 'conditional'."),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            "--task", help="What --data holds: digits, or music (any long recordings, judged in the middle of each)."
        ),
    ] = "digits",
    classifier: Annotated[
        Path | None,
        typer.Option(
            "--classifier",
            help="Folder of a run of spoken-digits on the official split: make digits with 'conditional', judge them.",
        ),
    ] = None,
    each: Annotated[int, typer.Option("--each", min=1, help="Digits made of each kind.")] = 50,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="Of the made digits.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the made digits.")] = 0,
    wav: Annotated[
        Path | None, typer.Option("--wav", help="Write some of the made digits into this folder, and a picture.")
    ] = None,
    seconds: Seconds = None,
    overrides: Overrides = None,
    only_report: ReportOnly = False,
    as_json: Json = False,
) -> None:
    """Bits per sample of raw sound by what stands in each stage; digits made by label, and judged."""
    from statescan.recipes import raw_audio as recipe

    rows = ["conditional"] if row == ["conditional"] else chosen_rows(row, recipe.ROWS, "s4-mamba")
    with going_on():
        results = recipe.report(out)
        if not only_report:
            results = recipe.raw_audio(
                out, data, rows=rows, task=task, overrides=overrides or [], seconds=seconds, say=note
            )
        if classifier is not None:
            recipe.judge_digits(out, data, classifier, each=each, temperature=temperature, seed=seed, say=note)
            results = recipe.report(out)
        if wav is not None:
            recipe.write_sounds(out, data, wav)
    print_results(out, results, as_json)
