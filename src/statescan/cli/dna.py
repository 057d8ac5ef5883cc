"""What the command line does with DNA: ``train --modality dna``, ``embed``, and the group ``dna``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statescan.cli.terminal import INTERRUPTED, command, emit_json, note, print_rows, progress

if TYPE_CHECKING:
    from statescan.data import Genome
    from statescan.models import CausalLM

__all__ = ["dna", "embed", "train_dna"]

dna = typer.Typer(
    name="dna",
    help="What a model of DNA says of a genome.",
    epilog="Example: statescan dna track genome.fa.gz --model runs/genome -o likelihood.bedgraph",
    no_args_is_help=True,
)

Model = Annotated[Path, typer.Option("--model", help="Folder of a model of bases, e.g. of a run of --modality dna.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The file to write.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, ...")]
BothStrands = Annotated[bool, typer.Option("--both-strands", help="The mean over both strands.")]
SoftMasked = Annotated[
    str | None,
    typer.Option(
        "--soft-masked",
        show_default="as the model learnt",
        help="Lower-case bases: 'base', as any other, or 'n', unknown.",
    ),
]
Gaps = Annotated[
    str | None,
    typer.Option(
        "--gaps",
        show_default="an error",
        help="An alignment's - and .: 'n', unknown bases, 'drop', left out, or 'error'.",
    ),
]
Bed = Annotated[
    Path | None, typer.Option("--regions", show_default="whole records", help="BED file with what is read.")
]


def train_dna(
    out: Path,
    *,
    data: list[str],
    valid: list[str],
    overrides: list[str],
    resume: bool,
    as_json: bool,
    task: str | None,
    mixer: str | None,
    preset: str | None,
    tokenizer: str | None,
    config: Path | None,
) -> None:
    """Trains a model on next-base prediction; resumable."""
    from dataclasses import replace

    from statescan.data import DnaTokenizer
    from statescan.errors import ConfigError
    from statescan.models import preset as model_preset
    from statescan.train import DataConfig, RunConfig, load_run, train

    strange = {"--task": task, "--mixer": mixer, "--tokenizer": tokenizer}
    if named := [name for name in strange if strange[name] is not None]:
        raise ConfigError(f"train: {named[0]} is for texts and tasks, wanted none with --modality dna; leave it out")
    if config is not None or resume:
        run = RunConfig.from_json(config) if config is not None else load_run(out)
        if preset is not None:
            raise ConfigError(f"train: wanted no --preset with --resume or --config, got '{preset}'; leave it out")
        run = replace(run, data=replace(run.data, modality="dna", tokenizer="dna"))
    elif data:
        run = RunConfig(model_preset(preset or "tiny"), DataConfig(modality="dna", tokenizer="dna"))
        run = run.fit_vocabulary(DnaTokenizer())
    else:
        raise ConfigError("train: wanted FASTA or FASTQ, got none; name a file with --data genome.fa.gz")
    paths = {"paths": tuple(data or run.data.paths), "valid_paths": tuple(valid or run.data.valid_paths)}
    run = replace(run, data=replace(run.data, **paths)).apply_overrides(overrides)
    result = train(run, out, resume=resume)
    if not result.first_process:
        raise typer.Exit(INTERRUPTED if result.signalled else 0)
    held_out = result.evaluations[-1][1] if result.evaluations else None
    if as_json:
        emit_json(
            {
                "out": result.out,
                "steps": result.steps,
                "train_loss": result.train_loss,
                "bits_per_base": held_out,
                "evaluations": [{"step": step, "bits_per_base": bits} for step, bits in result.evaluations],
                "bases_per_second": result.tokens_per_second,
                "interrupted": result.interrupted,
            }
        )
    else:
        print_rows(
            ("run", str(result.out)),
            ("steps", f"{result.steps:,} of {run.train.steps:,}"),
            ("training loss", f"{result.train_loss:.4f} nats per base"),
            ("held out", "not judged" if held_out is None else f"{held_out:.4f} bits per base"),
            ("speed", f"{result.tokens_per_second:,.0f} bases/s"),
        )
    if result.signalled:
        raise typer.Exit(INTERRUPTED)
    note(f"next: statescan embed reads.fa --model {shlex.quote(str(out))} -o vectors.npy")


@command
def embed(
    sequences: Annotated[list[str], typer.Argument(help="FASTA or FASTQ files.", show_default=False)],
    model: Model,
    out: Out,
    both_strands: BothStrands = False,
    soft_masked: SoftMasked = None,
    gaps: Gaps = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """One vector for each sequence: (sequences, d_model) float32 as .npy, the names beside it as .names.txt."""
    import numpy as np

    from statescan.evaluate.genomes import embed_records
    from statescan.files import atomic_file, want_folder

    want_folder(out)
    language_model, genome = _open(model, sequences, device, soft_masked, gaps)
    vectors = np.empty((len(genome), language_model.config.d_model), np.float32)
    with progress("reading", unit="sequences") as bar:
        done = 0
        for numbers, some in embed_records(language_model, genome, both_strands=both_strands):
            vectors[numbers] = some
            done += len(numbers)
            bar(done, len(genome))
    names = out.with_name(out.name.removesuffix(".npy") + ".names.txt")
    with atomic_file(out) as temporary, open(temporary, "wb") as stream:
        np.save(stream, vectors)
    with atomic_file(names) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in genome.names), encoding="utf-8")
    if as_json:
        emit_json({"out": out, "names": names, "sequences": len(genome), "width": vectors.shape[1]})
        return
    print_rows(("vectors", f"{out}: {vectors.shape[0]:,} x {vectors.shape[1]}, float32"), ("names", str(names)))


@dna.command(epilog="Example: statescan dna track genome.fa --model runs/genome -o likelihood.bedgraph")
@command
def track(
    genome: Annotated[list[str], typer.Argument(help="FASTA files.", show_default=False)],
    model: Model,
    out: Out,
    regions: Bed = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, show_default="all that came before", help="Bases of a window."),
    ] = None,
    both_strands: BothStrands = False,
    soft_masked: SoftMasked = None,
    gaps: Gaps = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The log-likelihood of every base, nats, as a bedGraph track that a genome browser shows."""
    import numpy as np

    from statescan.data import read_bed
    from statescan.evaluate.genomes import bed_graph, region_log_likelihoods
    from statescan.files import atomic_file, want_folder

    want_folder(out)
    language_model, opened = _open(model, genome, device, soft_masked, gaps)
    asked = read_bed(regions) if regions else _records(opened)
    # A bedGraph says one thing of a base: what overlaps is one stretch.
    spans = [(int(start), int(end)) for start, end in opened.spans(asked)]
    total, count, done = 0.0, 0, 0
    bases = sum(end - start for start, end in spans)
    with (
        progress("reading", unit="bases") as bar,
        atomic_file(out) as temporary,
        open(temporary, "w", encoding="utf-8", newline="\n") as lines,
    ):
        lines.write(f'track type=bedGraph name="log-likelihood" description="{model.name}: nats per base"\n')
        for start, end in spans:
            number = int(np.searchsorted(opened.offsets, start, side="right")) - 1
            first, last = (int(bound) for bound in opened.offsets[number : number + 2])
            said = region_log_likelihoods(
                language_model,
                opened.tokens[first:last],
                start - first,
                end - first,
                context=context,
                both_strands=both_strands,
            )
            lines.writelines(bed_graph(opened.names[number], start - first, said))
            total, count = total + float(np.nansum(said)), count + int((~np.isnan(said)).sum())
            done += end - start
            bar(done, bases)
    mean = -total / count / float(np.log(2)) if count else None
    if as_json:
        emit_json({"out": out, "bases": count, "bits_per_base": mean})
        return
    shown = "nothing to judge" if mean is None else f"{mean:.4f} bits per base"
    print_rows(("track", str(out)), ("judged", f"{count:,} bases"), ("mean", shown))


@dna.command(epilog="Example: statescan dna variants calls.vcf --genome genome.fa --model runs/genome -o effects.vcf")
@command
def variants(
    vcf: Annotated[Path, typer.Argument(help="VCF, plain or .gz.", show_default=False)],
    genome: Annotated[list[str], typer.Option("--genome", help="FASTA of the reference; several times for several.")],
    model: Model,
    out: Out,
    context: Annotated[int, typer.Option("--context", min=1, help="Bases that are read on either side.")] = 512,
    one_strand: Annotated[bool, typer.Option("--one-strand", help="The given strand alone, not the mean.")] = False,
    soft_masked: SoftMasked = None,
    gaps: Gaps = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The effect of variants: the VCF again, with log p(ALT) - log p(REF) of every alternative, nats, as INFO/LLR."""
    from statescan.evaluate.genomes import Variant, read_vcf, variant_effects
    from statescan.files import atomic_file, want_folder

    want_folder(out)
    language_model, opened = _open(model, genome, device, soft_masked, gaps)
    head = (
        '##INFO=<ID=LLR,Number=A,Type=Float,Description="log p(ALT) - log p(REF) in nats, '
        f'{context} bases on either side, statescan {model.name}">\n'
    )
    count = unknown = 0
    with (
        progress("judging", unit="variants") as bar,
        atomic_file(out) as temporary,
        open(temporary, "w", encoding="utf-8", newline="\n") as lines,
    ):

        def judged() -> Iterator[Variant]:
            for line in read_vcf(vcf):
                if isinstance(line, Variant):
                    yield line
                else:
                    if line.startswith("#CHROM"):
                        lines.write(head)
                    # What an earlier run said is not said beside what this one says.
                    if not line.startswith("##INFO=<ID=LLR,"):
                        lines.write(line)

        effects = variant_effects(language_model, opened, judged(), context=context, both_strands=not one_strand)
        for variant, ratios in effects:
            shown = ",".join("." if ratio is None else f"{ratio:.4f}" for ratio in ratios)
            before = [
                field for field in variant.fields[7].split(";") if field.partition("=")[0] not in ("", ".", "LLR")
            ]
            info = ";".join([*before, f"LLR={shown}"])
            lines.write("\t".join([*variant.fields[:7], info, *variant.fields[8:]]) + "\n")
            count += 1
            unknown += all(ratio is None for ratio in ratios)
            bar(count, count)
    if as_json:
        emit_json({"out": out, "variants": count, "unknown": unknown})
        return
    shown = f"{count:,}, of {unknown:,} nothing is said" if count else f"none stand in '{vcf}'"
    print_rows(("variants", shown), ("written", str(out)))


@dna.command(epilog="Example: statescan dna window --length 1048576 --device cuda")
@command
def window(
    length: Annotated[int, typer.Option("--length", min=1, help="Bases of the window.")] = 1 << 20,
    recompute: Annotated[
        str, typer.Option("--recompute", help="What the backward pass makes again: none, cheap or block.")
    ] = "none",
    layers: Annotated[int, typer.Option("--layers", min=1, help="Mamba blocks of width 128; 12 are 1.4 M.")] = 12,
    device: Device = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """One window forward and backward through the 1.4 M-parameter model: seconds and memory."""
    import torch

    from statescan.bench.long_window import long_window
    from statescan.errors import ConfigError
    from statescan.models import CausalLM, MambaConfig

    config = MambaConfig(d_model=128, n_layer=layers, vocab_size=5, recompute=recompute)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"dna window: wanted --device {device}, which this machine has not; take --device cpu")
    try:
        found = long_window(config, length, device=device, precision="bf16" if device != "cpu" else "float32")
    except torch.OutOfMemoryError as problem:
        raise ConfigError(
            f"dna window: {length:,} bases with --recompute {recompute} don't fit ({problem}); take --recompute block"
        ) from None
    parameters = CausalLM(config, device="meta").parameter_count()
    if as_json:
        emit_json({"length": length, "recompute": recompute, "parameters": parameters, **found._asdict()})
        return
    peak = "not counted here" if found.peak_bytes is None else f"{found.peak_bytes / 1e9:.2f} GB at most"
    print_rows(
        ("window", f"{length:,} bases, {parameters:,} parameters, recompute {recompute}"),
        ("time", f"{found.seconds:.3f} s forward and backward, {length / found.seconds:,.0f} bases/s"),
        ("memory", peak),
    )


def _open(
    model: Path, paths: list[str], device: str, soft_masked: str | None, gaps: str | None
) -> tuple[CausalLM, Genome]:
    """The model, and the sequences as its tokenizer reads them, but for lower case and gaps where it is asked."""
    from statescan.cli.models import open_model
    from statescan.data import DnaTokenizer, Genome
    from statescan.errors import ConfigError

    language_model, tokenizer = open_model(model, device=device)
    if not isinstance(tokenizer, DnaTokenizer):
        raise ConfigError(
            f"dna: wanted a model of bases, got '{model}', which reads {tokenizer.name}; train one with "
            "statescan train --modality dna"
        )
    tokenizer = DnaTokenizer(soft_masked or tokenizer.soft_masked, gaps or tokenizer.gaps)
    return language_model, Genome(list(paths), tokenizer)


def _records(genome: Genome) -> list[Any]:
    import numpy as np

    from statescan.data import Region

    sizes = np.diff(genome.offsets).tolist()
    return [Region(name, 0, size) for name, size in zip(genome.names, sizes, strict=True)]
