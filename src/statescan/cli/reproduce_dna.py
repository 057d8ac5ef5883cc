"""``statescan reproduce dna-pretraining``, ``microbes`` and ``great-apes``: genomes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statescan.cli.dna import Gaps
from statescan.cli.reproducing import Device, Json, chosen_rows, default_device, going_on, print_results
from statescan.cli.terminal import command, note

__all__ = ["dna_pretraining", "great_apes", "microbes"]

Lengths = Annotated[
    list[int] | None, typer.Option("--length", help="Bases of a window; several times for several lengths.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of weights and order.")]
Seconds = Annotated[
    float | None,
    typer.Option(
        "--seconds", min=0, show_default="no end", help="Leave off a run's training after so many; call again."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of every run, e.g. train.epochs=2."),
]


@command
def dna_pretraining(
    data: Annotated[list[str], typer.Option("--data", help="FASTA, FASTQ or .npz; several times for several.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of runs, table and figure; resumable.")] = Path(
        "reproduce/dna-pretraining"
    ),
    row: Annotated[
        list[str] | None, typer.Option("--row", show_default="all", help="mamba, s4, conv or transformer.")
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Bases of a window in the end, a power of two.")] = 1 << 15,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates, of 131,072 bases each.")] = 1000,
    context: Annotated[int, typer.Option("--context", min=2, help="Bases of the longest window judged.")] = 1 << 17,
    carried: Annotated[
        int | None,
        typer.Option(
            "--carried",
            show_default="as far as a region held out reaches, up to 2^20",
            help="Bases over which a state is carried.",
        ),
    ] = None,
    valid_regions: Annotated[
        Path | None,
        typer.Option("--valid-regions", show_default="a twentieth of all", help="BED file of what is held out."),
    ] = None,
    device: Device = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Figure 5: next-base prediction with length warm-up, and the loss as a function of the context."""
    from statescan.recipes import dna_pretraining as recipe

    rows = chosen_rows(row, recipe.ROWS)
    regions = "" if valid_regions is None else str(valid_regions)
    on = [f"train.accelerator={default_device(device).partition(':')[0]}"]
    runs = {
        name: recipe.pretraining_run(
            name,
            data,
            length=length,
            valid_regions=regions,
            steps=steps,
            judged=max(context, carried or 0),
            overrides=[*on, *(overrides or [])],
        )
        for name in rows
    }
    with going_on():
        results = recipe.dna_pretraining(runs, out, context=context, carried=carried, say=note)
    print_results(out, results, as_json)


@command
def microbes(
    data: Annotated[list[str], typer.Option("--data", help="Folder or files, one a species: FASTA, FASTQ or .npz.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of runs and table; resumable.")] = Path(
        "reproduce/microbes"
    ),
    length: Lengths = None,
    seed: Seed = 0,
    seconds: Seconds = None,
    gaps: Gaps = None,
    device: Device = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Which microbe a window of 256 or 1,024 bases is from, beside a logistic regression on 4-mers."""
    from statescan.data import DnaTokenizer, find_sources
    from statescan.recipes import dna_species as recipe

    tokenizer = DnaTokenizer(gaps=gaps or "error")
    on = [f"train.accelerator={default_device(device).partition(':')[0]}"]
    with going_on():
        for bases in length or (256, 1024):
            run = recipe.microbe_run(
                bases, max(2, len(find_sources(data))), seed=seed, overrides=[*on, *(overrides or [])]
            )
            splits, names = recipe.microbe_splits(data, bases, run.rows, seed=run.data_seed, tokenizer=tokenizer)
            recipe.dna_species(run, splits, out, species=names, seconds=seconds, say=note)
    print_results(out, recipe.report(out), as_json)


@command
def great_apes(
    data: Annotated[
        Path,
        typer.Option("--data", help=".npz of aligned blocks, or a folder of FASTA whose i-th records are orthologous."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of runs, table and figure; resumable.")] = Path(
        "reproduce/great-apes"
    ),
    length: Lengths = None,
    pretrained: Annotated[
        Path | None,
        typer.Option("--pretrained", show_default="from scratch", help="Model of bases to start from, fine-tuned."),
    ] = None,
    seed: Seed = 0,
    seconds: Seconds = None,
    gaps: Gaps = None,
    device: Device = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Appendix E.3: which great ape a window of up to 2^17 bases is from, unknown bases masked alike in all."""
    from statescan.cli.models import model_folder, read_config
    from statescan.data import DnaTokenizer
    from statescan.data.aligned import mask_alike, read_blocks
    from statescan.models import MambaConfig
    from statescan.recipes import dna_species as recipe

    start = None if pretrained is None else model_folder(pretrained)
    backbone = MambaConfig(d_model=128, n_layer=12, vocab_size=5) if start is None else read_config(start)
    on = [f"train.accelerator={default_device(device).partition(':')[0]}"]
    blocks = read_blocks(data, DnaTokenizer(gaps=gaps or "error"))
    apart = start is not None and recipe.kept_apart(start, blocks)
    if start is not None and not apart:
        note(f"no record says that '{start}' has read nothing of the test, nor of its homologues: the table marks it")
    aligned = mask_alike(blocks)
    with going_on():
        for bases in length or [1 << 13, 1 << 15]:
            run = recipe.ape_run(
                bases,
                backbone,
                classes=len(aligned.names),
                pretrained=start is not None,
                seed=seed,
                overrides=[*on, *(overrides or [])],
            )
            splits = recipe.ape_splits(aligned, bases, run.rows, seed=run.data_seed, mask=False)
            recipe.dna_species(
                run,
                splits,
                out,
                species=aligned.names,
                pretrained=start,
                apart=apart,
                kmers=5,
                seconds=seconds,
                say=note,
            )
    print_results(out, recipe.report(out), as_json)
