"""Which species is a stretch of DNA from: eight microbes, and four great apes that differ in few bases of a hundred.

A species is a file. Windows for training, for the choice of the epoch and for the test come from regions without a base
in common; of aligned genomes the same orthologous blocks are held out of every species.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statescan.data.dna import UNKNOWN, Genome, outside, split_regions, without_gaps
from statescan.data.text import find_sources
from statescan.data.windows import LabelledWindows, window_rows
from statescan.errors import ConfigError, DataError
from statescan.evaluate.kmers import kmer_regression
from statescan.files import atomic_file, make_folder
from statescan.models import MambaConfig
from statescan.models.backbone_classifier import BackboneClassifierConfig
from statescan.recipes.synthetic import figure, interval, percent, save_figure
from statescan.train.classify import ClassifyConfig, Splits, train_classifier
from statescan.train.config import apply_overrides
from statescan.train.finished import run_status, weights_digest
from statescan.train.loop import RUN_FILE

__all__ = [
    "PAPER",
    "AlignedBlocks",
    "SpeciesRun",
    "ape_run",
    "ape_splits",
    "dna_species",
    "mask_alike",
    "microbe_run",
    "microbe_splits",
    "read_blocks",
    "report",
]

# The table of great apes in the paper (appendix E.3), five species (chance 20 %): length to accuracy in per cent.
PAPER = {
    "HyenaDNA 1.4 M": {2**10: 28.04, 2**12: 28.43, 2**14: 41.17, 2**16: 42.22, 2**18: 31.10, 2**20: 54.87},
    "Mamba 1.4 M": {2**10: 31.47, 2**12: 27.50, 2**14: 27.66, 2**16: 40.72, 2**18: 42.41, 2**20: 71.67},
    "Mamba 7 M": {2**10: 30.00, 2**12: 29.01, 2**14: 31.48, 2**16: 43.73, 2**18: 56.60, 2**20: 81.31},
}
# Of a species: what is held out for the test and for the choice of the epoch.
_TEST, _VALID = 0.1, 0.05
# Of aligned genomes: the first 90 % of the blocks are for training, their last twentieth for the choice of the epoch.
_TEST_BLOCKS = 0.9
_KMERS = "kmers.json"


@dataclass(frozen=True)
class SpeciesRun:
    """One classifier on one task at one length.

    Args:
        task: "microbes" or "apes", which names the table.
        length: bases of a window.
        model: the classifier.
        train: how it is trained.
        rows: windows for training, of each species and epoch.
        origin: "scratch", or "pretrained".
        data_seed: of the split and of which windows are taken.
    """

    task: str
    length: int
    model: BackboneClassifierConfig
    train: ClassifyConfig
    rows: int
    origin: str = "scratch"
    data_seed: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.task}-{self.length}-{self.origin}-seed{self.train.seed}"


@dataclass(frozen=True)
class AlignedBlocks:
    """Genomes whose blocks i are orthologous.

    Args:
        names: of the species.
        tokens: (bases,) uint8, all species end to end.
        offsets: (species, blocks + 1) int64, where each block of each species begins in them, and the end.
    """

    names: list[str]
    tokens: NDArray[np.uint8]
    offsets: NDArray[np.int64] = field(repr=False)

    @property
    def blocks(self) -> int:
        """Blocks of each species."""
        return self.offsets.shape[1] - 1


def microbe_splits(
    paths: str | Path | Sequence[str | Path],
    length: int,
    rows: int,
    *,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> tuple[Splits, list[str]]:
    """Windows of several genomes, one file a species, parted by blocks of the genomes; none with an unknown base.

    No base of one species answers to one of another here, so that `mask_alike` has nothing to go by.

    Args:
        paths: files or folders; a species is called by its file.
        length: bases of a window.
        rows: windows for training of each species and epoch. Judged are all windows that lie side by side in the parts
            held out, of every species as many as of the one that has fewest.
        seed: of the split.
        cache: folder of the token files. Default: the user's.

    Raises:
        DataError: fewer than two files, or one without a stretch of known bases as long as a window in a part.
    """
    sources = find_sources(paths)
    if len(sources) < 2:
        raise DataError(f"species: wanted a file for each of at least two species, got {len(sources)}")
    tokens, found, offset = [], [], 0
    for source in sources:
        genome = Genome(source.path, cache=cache)
        # Blocks of many windows, and enough of them in a small genome.
        block = max(min(1 << 14, len(genome.tokens) // 64), 4 * length)
        parts = split_regions(genome.spans(), [_TEST, _VALID], block=block, seed=seed)
        # How many bases an assembly could not read tells the species: no window of any of them holds such a one.
        known = [without_gaps(genome.tokens, part, 0) for part in parts]
        found.append([part + offset for part in known])
        tokens.append(np.asarray(genome.tokens))
        offset += len(genome.tokens)
    bases = np.concatenate(tokens)
    made = []
    for number, wanted in ((2, rows), (1, None), (0, None)):
        each = [window_rows(parts[number], length, wanted, seed=seed) for parts in found]
        fewest = min(len(first) for first, _ in each)
        draw = np.random.Generator(np.random.PCG64(seed))
        chosen = [np.sort(draw.permutation(len(first))[:fewest]) for first, _ in each]
        made.append(
            LabelledWindows(
                bases,
                np.concatenate([first[some] for (first, _), some in zip(each, chosen, strict=True)]),
                np.concatenate([room[some] for (_, room), some in zip(each, chosen, strict=True)]),
                np.repeat(np.arange(len(each), dtype=np.uint8), fewest),
                len(each),
                length,
            )
        )
    return Splits(*made), [source.path.name.split(".")[0] for source in sources]


def read_blocks(path: str | Path, *, cache: str | os.PathLike[str] | None = None) -> AlignedBlocks:
    """Aligned genomes: a .npz with NAME (bases,) uint8 and NAME_blocklen (blocks,) for each species, or a folder with a
    FASTA file a species whose i-th records are orthologous.

    Raises:
        DataError: the file can't be read, holds no bases or blocks that don't add up to them, or the species have not
            as many blocks.
    """
    path = Path(path)
    names: list[str] = []
    tokens: list[NDArray[np.uint8]] = []
    lengths: list[NDArray[np.int64]] = []
    if path.suffix == ".npz":
        try:
            with np.load(str(path), allow_pickle=False) as held:
                names = [name.removesuffix("_blocklen") for name in held.files if name.endswith("_blocklen")]
                for name in names:
                    tokens.append(held[name])
                    lengths.append(held[f"{name}_blocklen"].astype(np.int64))
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as problem:
            raise DataError(f"species: '{path}' can't be read as aligned blocks: {problem}") from None
        for name, bases, length in zip(names, tokens, lengths, strict=True):
            whole = bases.dtype == np.uint8 and bases.ndim == 1 and length.ndim == 1 and (length > 0).all()
            if not whole or int(length.sum()) != len(bases) or int(bases.max(initial=0)) > UNKNOWN:
                raise DataError(
                    f"species: '{path}' must hold {name} as (bases,) uint8 of A C G T N as 0 to 4, and {name}_blocklen "
                    f"as the bases of each block, at least 1, got {bases.dtype} {bases.shape} up to "
                    f"{bases.max(initial=0)}, and {int(length.sum()):,} bases in {length.size:,} blocks"
                )
    else:
        for source in find_sources(path):
            genome = Genome(source.path, cache=cache)
            names.append(source.path.name.split(".")[0])
            tokens.append(np.asarray(genome.tokens))
            lengths.append(np.diff(genome.offsets))
    counts = {len(length) for length in lengths}
    if len(names) < 2 or len(counts) != 1:
        raise DataError(
            f"species: wanted at least two species with as many blocks each in '{path}', got {len(names)} with "
            f"{sorted(counts)}"
        )
    offsets, start = [], 0
    for length in lengths:
        offsets.append(start + np.concatenate([[0], np.cumsum(length)]))
        start = int(offsets[-1][-1])
    return AlignedBlocks(names, np.concatenate(tokens), np.stack(offsets))


def mask_alike(aligned: AlignedBlocks) -> AlignedBlocks:
    """The same with every base unknown, in all species, that is unknown in one of them.

    Which bases an assembly could not read tells the species: by their number alone half of all long windows are told
    apart. So a stretch of N in a block of one species is masked at the same part of that block in every other.
    """
    tokens = aligned.tokens.copy()
    for here, ends in enumerate(aligned.offsets):
        whole = ends[[0, -1]].reshape(1, 2)
        for start, end in outside(whole, without_gaps(aligned.tokens, whole, 0)).tolist():
            first, last = np.searchsorted(ends, [start, end - 1], side="right") - 1
            for block in range(int(first), int(last) + 1):
                size = int(ends[block + 1] - ends[block])
                low, high = max(start, int(ends[block])) - ends[block], min(end, int(ends[block + 1])) - ends[block]
                for species, other in enumerate(aligned.offsets):
                    if species != here:
                        length = int(other[block + 1] - other[block])
                        from_, to = other[block] + int(low) * length // size, -(-int(high) * length // size)
                        tokens[from_ : other[block] + to] = UNKNOWN
    return replace(aligned, tokens=tokens)


def ape_splits(aligned: AlignedBlocks, length: int, rows: int, *, seed: int = 0, mask: bool = True) -> Splits:
    """Windows of aligned genomes, parted by the blocks' numbers, which are the same for all species.

    The training windows of a species' homologues go through the model together, so that what they share cancels out of
    the gradient.

    Args:
        aligned: from `read_blocks`.
        length: bases of a window, which may reach over several blocks.
        rows: windows for training of each species and epoch; where they are fewer, they come several times.
        seed: of the choice.
        mask: mask unknown bases in all species alike, see `mask_alike`. Default True.

    Raises:
        DataError: a part is shorter than a window.
    """
    aligned = mask_alike(aligned) if mask else aligned
    last = int(aligned.blocks * _TEST_BLOCKS)
    valid = last - int(aligned.blocks * _VALID)
    made = []
    for begin, end, wanted in ((0, valid, rows), (valid, last, None), (last, aligned.blocks, None)):
        each = []
        for ends in aligned.offsets:
            span = np.array([[ends[begin], ends[end]]])
            each.append(window_rows(span, length))
        count = min(len(first) for first, _ in each)
        chosen = np.arange(count)
        if wanted is not None:
            draw = np.random.Generator(np.random.PCG64(seed))
            chosen = np.concatenate([draw.permutation(count) for _ in range(-(-wanted // count))])[:wanted]
        firsts = []
        for (first, _), ends in zip(each, aligned.offsets, strict=True):
            if wanted is None:
                firsts.append(first[chosen])
                continue
            # The homologue begins as many bases into the same block as the first species' window.
            start = each[0][0][chosen]
            block = np.searchsorted(aligned.offsets[0], start, side="right") - 1
            inside = np.minimum(start - aligned.offsets[0][block], ends[block + 1] - ends[block])
            firsts.append(np.minimum(ends[block] + inside, ends[end] - length))
        first = np.stack(firsts, 1)
        room = np.minimum(
            length, np.stack([ends[end] - length - first[:, i] + 1 for i, ends in enumerate(aligned.offsets)], 1)
        )
        species = len(aligned.names)
        made.append(
            LabelledWindows(
                aligned.tokens,
                first.ravel(),
                np.maximum(1, room).ravel(),
                np.tile(np.arange(species, dtype=np.uint8), len(first)),
                species,
                length,
                together=species if wanted is not None else 1,
            )
        )
    return Splits(*made)


def microbe_run(length: int, classes: int, *, seed: int = 0, overrides: Sequence[str] = ()) -> SpeciesRun:
    """The configuration that this package trains on microbes, with fields set as `apply_overrides` takes them."""
    backbone = MambaConfig(d_model=128, n_layer=6, vocab_size=5)
    model = BackboneClassifierConfig(classes, backbone, reverse_complement=True, dropout=0.1)
    batch = max(16, (1 << 16) // length)
    rows = 1 << 15
    train = ClassifyConfig(
        epochs=max(1, 8 * length // 256),
        batch_size=batch,
        lr=2e-3,
        warmup=100,
        clip=1.0,
        betas=(0.9, 0.95),
        precision="bf16",
        seed=seed,
        log_every=50,
    )
    rows = rows * 256 // length
    return apply_overrides(SpeciesRun("microbes", length, model, train, rows), overrides)


def ape_run(
    length: int,
    backbone: Any,
    *,
    classes: int = 4,
    pretrained: bool = False,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> SpeciesRun:
    """The configuration that this package trains on great apes, with fields set as `apply_overrides` takes them."""
    model = BackboneClassifierConfig(classes, backbone, reverse_complement=True)
    train = ClassifyConfig(
        epochs=4,
        batch_size=max(classes, (1 << 18) // length // classes * classes),
        lr=1e-3,
        warmup=20,
        clip=1.0,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        precision="bf16",
        seed=seed,
        log_every=10,
    )
    origin = "pretrained" if pretrained else "scratch"
    return apply_overrides(SpeciesRun("apes", length, model, train, (1 << 24) // length, origin), overrides)


def dna_species(
    run: SpeciesRun,
    splits: Splits,
    out: str | os.PathLike[str],
    *,
    species: Sequence[str],
    pretrained: str | os.PathLike[str] | None = None,
    kmers: int = 4,
    seconds: float | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains a classifier, or goes on with it, or takes it as it lies finished; and the k-mer regression beside it.

    Args:
        run: what is trained.
        splits: on what.
        out: folder of all runs, each in a folder of its name.
        species: the names of the labels.
        pretrained: a language model whose backbone it starts from.
        kmers: bases of the regression's words.
        seconds: leave off training after so many; the next call goes on.
        say: called with a line when there is something to tell.

    Returns:
        What the run's run.json says.

    Raises:
        ConfigError: a run said to be pretrained without a model, or the other way round.
        CheckpointError: the folder holds a run of that name with other settings, windows or weights to start from.
        KeyboardInterrupt: interrupted; what was trained is kept.
    """
    if (run.origin == "pretrained") != (pretrained is not None):
        raise ConfigError(f"species: wanted a pretrained model just for a run that starts from one, got {run.origin}")
    folder = make_folder(Path(out)) / run.name
    path = folder / RUN_FILE
    facts = {"species": list(species), "length": run.length, "rows": run.rows, "data_seed": run.data_seed}
    facts |= {"task": run.task, "origin": run.origin}
    if pretrained is not None:
        facts["start"] = weights_digest(pretrained)
    digests = {name: {"digest": part.digest} for name, part in zip(Splits._fields, splits, strict=True)}
    status = run_status(folder, {"model": run.model, "train": run.train}, facts | digests)
    if status != "finished":
        result = train_classifier(
            run.model,
            run.train,
            splits,
            folder,
            resume=status is not None,
            facts=facts,
            pretrained=pretrained,
            seconds=seconds,
        )
        if result.interrupted or result.signalled:
            raise KeyboardInterrupt
    done = json.loads(path.read_text(encoding="utf-8"))
    words = folder / _KMERS
    if not words.exists() or json.loads(words.read_text(encoding="utf-8"))["k"] != kmers:
        assert isinstance(splits.train, LabelledWindows)
        assert isinstance(splits.test, LabelledWindows)
        right, judged = kmer_regression(splits.train, splits.test, kmers)
        with atomic_file(words) as temporary:
            temporary.write_text(json.dumps({"k": kmers, "right": right, "judged": judged}) + "\n", encoding="utf-8")
    test = done["test"]["best"]
    say(
        f"{run.name}: {percent(test['accuracy'])} % right on the test (epoch {test['epoch']}, chosen by validation), "
        f"{done['seconds']:.0f} s"
    )
    return done


def report(out: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of all finished runs in a folder: results.json and results.md, and apes.svg where there are apes."""
    out = Path(out)
    rows = []
    for path in sorted(out.glob(f"*/{RUN_FILE}")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.get("status") != "finished" or "species" not in facts.get("data", {}):
            continue
        kmers = json.loads((path.parent / _KMERS).read_text(encoding="utf-8"))
        judged = facts["data"]["test"]["examples"]
        rows.append(
            {
                "task": facts["data"]["task"],
                "length": facts["data"]["length"],
                "origin": facts["data"]["origin"],
                "species": facts["data"]["species"],
                "seed": facts["config"]["train"]["seed"],
                "parameters": facts["parameters"],
                "right": round(facts["test"]["best"]["accuracy"] * judged),
                "right_final": round(facts["test"]["final"]["accuracy"] * judged),
                "judged": judged,
                "kmers": kmers,
                "steps": facts["steps"],
                "seconds": round(facts["seconds"], 1),
                "device": facts["device"],
                "config": facts["config"],
                "versions": facts["versions"],
            }
        )
    rows.sort(key=lambda row: (row["task"], row["length"], row["origin"], row["seed"]))
    results = {"benchmark": "dna-species", "rows": rows, "paper": PAPER}
    with atomic_file(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with atomic_file(out / "results.md") as temporary:
        temporary.write_text(_table(rows), encoding="utf-8")
    if any(row["task"] == "apes" for row in rows):
        _draw(rows, out / "apes.svg")
    return results


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| task | nt | start | accuracy, % | 95 % interval | judged | k-mer regression, % | parameters | updates | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kmers = row["kmers"]
        lines.append(
            f"| {row['task']} | {row['length']:,} | {row['origin']} | {percent(row['right'] / row['judged'])} | "
            f"{' to '.join(interval(row['right'], row['judged']))} | {row['judged']:,} | "
            f"{percent(kmers['right'] / kmers['judged'])} (k = {kmers['k']}) | {row['parameters']:,} | "
            f"{row['steps']:,} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    made, axes = figure(7, 4.2)
    for name, curve in PAPER.items():
        axes.plot(list(curve), list(curve.values()), "--", linewidth=1.2, label=f"{name}, the paper (five species)")
    for origin in ("scratch", "pretrained"):
        some = [row for row in rows if row["task"] == "apes" and row["origin"] == origin]
        if not some:
            continue
        shown = [100 * row["right"] / row["judged"] for row in some]
        bounds = [[float(bound) for bound in interval(row["right"], row["judged"])] for row in some]
        error = [[value - low for value, (low, _) in zip(shown, bounds, strict=True)]]
        error.append([high - value for value, (_, high) in zip(shown, bounds, strict=True)])
        axes.errorbar([row["length"] for row in some], shown, yerr=error, fmt="o-", capsize=3, label=f"here, {origin}")
    axes.axhline(25, color="#777777", linewidth=0.8, label="chance of four species")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bases of a window")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    save_figure(made, path)
