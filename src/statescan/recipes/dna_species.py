"""Which species is a stretch of DNA from: eight microbes, and four great apes that differ in few bases of a hundred.

A species is a file. Windows for training, for the choice of the epoch and for the test come from regions without a base
in common; of aligned genomes the same orthologous blocks are held out of every species.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from statescan.data.aligned import AlignedBlocks, mask_alike
from statescan.data.dna import Genome, refuse_repeats, split_regions, without_gaps
from statescan.data.text import find_sources
from statescan.data.tokenizer import DnaTokenizer
from statescan.data.windows import LabelledWindows, window_rows
from statescan.errors import ConfigError, DataError
from statescan.evaluate.kmers import kmer_regression
from statescan.files import atomic_file, make_folder, write_json, write_text
from statescan.models import MambaConfig
from statescan.models.backbone_classifier import BackboneClassifier, BackboneClassifierConfig
from statescan.recipes.synthetic import figure, percent, save_figure
from statescan.train.classify import ClassifyConfig, Splits, pick_device, predictions, train_classifier
from statescan.train.config import apply_overrides
from statescan.train.finished import run_status, weights_digest
from statescan.train.loop import RUN_FILE

__all__ = [
    "PAPER",
    "SpeciesRun",
    "ape_run",
    "ape_splits",
    "dna_species",
    "kept_apart",
    "microbe_run",
    "microbe_splits",
    "report",
    "resampled",
]

# The table of great apes in the paper (appendix E.3), five species (chance 20 %): length to accuracy in per cent.
PAPER = {
    "HyenaDNA 1.4 M": {2**10: 28.04, 2**12: 28.43, 2**14: 41.17, 2**16: 42.22, 2**18: 31.10, 2**20: 54.87},
    "Mamba 1.4 M": {2**10: 31.47, 2**12: 27.50, 2**14: 27.66, 2**16: 40.72, 2**18: 42.41, 2**20: 71.67},
    "Mamba 7 M": {2**10: 30.00, 2**12: 29.01, 2**14: 31.48, 2**16: 43.73, 2**18: 56.60, 2**20: 81.31},
}
# Of a species: what is held out for the test and for the choice of the epoch.
_TEST, _VALID = 0.1, 0.05
_PREDICTIONS = "predictions.npz"
# Bases of a stretch of a microbe's genome, as long as a block of the split.
_STRETCH = 1 << 14


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
        head = "" if self.model.head == "linear" else f"-{self.model.head}"
        return f"{self.task}-{self.length}-{self.origin}{head}-seed{self.train.seed}"


def microbe_splits(
    paths: str | Path | Sequence[str | Path],
    length: int,
    rows: int,
    *,
    seed: int = 0,
    tokenizer: DnaTokenizer | None = None,
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
        tokenizer: how letters become ids. Default: `DnaTokenizer()`.
        cache: folder of the token files. Default: the user's.

    All genomes lie in memory, a byte a base, and in training on the device.

    Raises:
        DataError: fewer than two files, one without a stretch of known bases as long as a window in a part, or a
            record that is there twice.
    """
    sources = find_sources(paths)
    if len(sources) < 2:
        raise DataError(f"species: wanted a file for each of at least two species, got {len(sources)}")
    genomes = [Genome(source.path, tokenizer, cache=cache) for source in sources]
    refuse_repeats(genomes)
    tokens, found, offset = [], [], 0
    for genome in genomes:
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


def ape_splits(aligned: AlignedBlocks, length: int, rows: int, *, seed: int = 0, mask: bool = True) -> Splits:
    """Windows of aligned genomes, parted by the blocks' numbers, which are the same for all species.

    The training windows of a species' homologues go through the model together, so that what they share cancels out of
    the gradient.

    Args:
        aligned: from `statescan.data.aligned.read_blocks`.
        length: bases of a window, which may reach over several blocks.
        rows: windows for training of each species and epoch; where they are fewer, they come several times.
        seed: of the choice.
        mask: mask unknown bases in all species alike, see `mask_alike`. Default True.

    Raises:
        DataError: a part is shorter than a window.
    """
    aligned = mask_alike(aligned) if mask else aligned
    made = []
    for part, wanted in (("train", rows), ("valid", None), ("test", None)):
        _, end = aligned.part(part)
        each = []
        for span in aligned.spans(part):
            each.append(window_rows(span[None], length))
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
                together=species,
            )
        )
    return Splits(*made)


def microbe_run(length: int, classes: int, *, seed: int = 0, overrides: Sequence[str] = ()) -> SpeciesRun:
    """The configuration that this package trains on microbes, with fields set as `apply_overrides` takes them.

    From 64 bases to 4,096 all lengths read as many bases: 5,120 updates of 65,536, of eight species. It learns to
    predict each species' bases and tells species by their likelihoods; the last quarter of the five epochs' updates
    minimises the species' own cross entropy over these ("train.labels_from"), each at the cost of as many others as
    there are species. With a linear head ("model.head=linear", "model.dropout=0.1", "train.labels_from=1") it learns
    the training windows by heart.
    """
    backbone = MambaConfig(d_model=128, n_layer=6, vocab_size=5)
    model = BackboneClassifierConfig(classes, backbone, reverse_complement=True, head="likelihood")
    batch = max(16, (1 << 16) // length)
    rows = 1 << 15
    train = ClassifyConfig(
        epochs=5,
        batch_size=batch,
        lr=2e-3,
        warmup=100,
        labels_from=0.75,
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
    apart: bool = False,
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
        apart: it is on record that this model read nothing of the test, see `kept_apart`; else the table says so.
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
        facts |= {"start": weights_digest(pretrained), "apart": apart}
    digests = {name: {"digest": part.digest} for name, part in zip(Splits._fields, splits, strict=True)}
    # What is on record of the weights is no part of them; earlier versions did not ask.
    same = {name: value for name, value in facts.items() if name != "apart"}
    status = run_status(folder, {"model": run.model, "train": run.train}, same | digests)
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
    _predict(run, folder, splits, kmers)
    test = done["test"]["best"]
    say(
        f"{run.name}: {percent(test['accuracy'])} % right on the test (epoch {test['epoch']}, chosen by validation), "
        f"{done['seconds']:.0f} s"
    )
    return done


def kept_apart(pretrained: str | os.PathLike[str], aligned: AlignedBlocks) -> bool:
    """Whether a model's run says that it was pretrained on the training part of aligned blocks, and so on none of
    their test, nor of what is homologous to it. Where it started from other weights, these must say so, too.

    Args:
        pretrained: folder of the model: that of its run, or ``best`` in it.
        aligned: the blocks, as they are read, nothing masked.

    Returns:
        False where the model has no such run: what it has read is not known.

    Raises:
        DataError: the run was trained on these very bases, parted otherwise: on the test, that is.
    """
    folder = Path(pretrained)
    path = (folder.parent if folder.name == "best" else folder) / RUN_FILE
    if not path.exists():
        return False
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        data, start = told["data"], told["config"]["train"].get("weights", "")
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    facts = aligned.facts()
    if data.get("aligned") == facts:
        return not start or kept_apart(start, aligned)
    if facts["digest"] in (data.get("digest"), (data.get("aligned") or {}).get("digest")):
        raise DataError(
            f"species: wanted a pretrained model that read nothing of the test, got '{pretrained}', which was trained "
            "on these very bases parted otherwise; pretrain with data.aligned=true, or on the .npz of the blocks"
        )
    return False


def _predict(run: SpeciesRun, folder: Path, splits: Splits, kmers: int) -> None:
    """Leaves what is said of each window of the test: by the model of the best and of the last epoch, and by k-mers."""
    path = folder / _PREDICTIONS
    if path.exists():
        with np.load(path) as held:
            if int(held["k"]) == kmers:
                return
    assert isinstance(splits.train, LabelledWindows)
    assert isinstance(splits.test, LabelledWindows)
    device = pick_device(run.train.accelerator)
    autocast = torch.bfloat16 if run.train.precision == "bf16" else None
    said: dict[str, Any] = {"kmers": kmer_regression(splits.train, splits.test, kmers)}
    for name, place in (("best", folder / "best"), ("final", folder)):
        model = BackboneClassifier.from_pretrained(place).to(device)
        said[name] = predictions(model, splits.test, autocast=autocast)
    with atomic_file(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, k=kmers, loci=_loci(splits.test), labels=splits.test.labels, **said)


def _loci(test: LabelledWindows) -> NDArray[np.int64]:
    """Which windows are drawn as one, (count,) int64 from 0: the homologous ones of aligned species, of others those of
    a stretch of one genome, where what came from elsewhere (a phage, a transposon) is misread as a whole."""
    if test.together > 1:
        return np.arange(len(test)) // test.together
    places = np.stack([test.labels.astype(np.int64), test.first // _STRETCH])
    return np.unique(places, axis=1, return_inverse=True)[1].ravel()


def report(out: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of all finished runs in a folder: results.json and results.md, and apes.svg where there are apes. Those
    without predictions, as earlier versions left them, are named below it."""
    out = Path(out)
    rows, missing = [], {}
    for path in sorted(out.glob(f"*/{RUN_FILE}")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        said = path.parent / _PREDICTIONS
        if facts.get("status") != "finished" or "species" not in facts.get("data", {}):
            continue
        if not said.exists():
            missing[path.parent.name] = facts["test"]["best"]["accuracy"]
            continue
        pretrained = facts["data"]["origin"] == "pretrained"
        rows.append(
            {
                "task": facts["data"]["task"],
                "length": facts["data"]["length"],
                "origin": facts["data"]["origin"],
                "apart": facts["data"].get("apart", False) if pretrained else None,
                "species": facts["data"]["species"],
                "head": facts["config"]["model"].get("head", "linear"),
                "seed": facts["config"]["train"]["seed"],
                "parameters": facts["parameters"],
                **_scores(said),
                "steps": facts["steps"],
                "seconds": round(facts["seconds"], 1),
                "device": facts["device"],
                "config": facts["config"],
                "versions": facts["versions"],
            }
        )
    rows.sort(key=lambda row: (row["task"], row["length"], row["origin"], row["head"], row["seed"]))
    results = {"benchmark": "dna-species", "rows": rows, "not_judged": missing, "paper": PAPER}
    write_json(out / "results.json", results)
    write_text(out / "results.md", _table(rows, missing))
    if any(row["task"] == "apes" for row in rows):
        _draw(rows, out / "apes.svg")
    return results


def _scores(path: Path) -> dict[str, Any]:
    """What the predictions of a run come to, with 95 % intervals in per cent."""
    with np.load(path) as held:
        loci, labels, k = held["loci"], held["labels"], int(held["k"])
        right = {name: held[name] == labels for name in ("best", "final", "kmers")}
        classes = int(labels.max()) + 1
        confusion = np.zeros((classes, classes), int)
        np.add.at(confusion, (labels, held["best"]), 1)
    return {
        "right": int(right["best"].sum()),
        "right_final": int(right["final"].sum()),
        "judged": len(labels),
        "loci": int(loci.max()) + 1,
        "interval": resampled(100.0 * right["best"], loci),
        "interval_final": resampled(100.0 * right["final"], loci),
        "kmers": {"k": k, "right": int(right["kmers"].sum()), "interval": resampled(100.0 * right["kmers"], loci)},
        # In points of a hundred, of the same windows.
        "above_kmers": 100 * float(right["best"].mean() - right["kmers"].mean()),
        "above_kmers_interval": resampled(100.0 * right["best"] - 100.0 * right["kmers"], loci),
        # Rows: the species that it is; columns: the one that is said.
        "confusion": confusion.tolist(),
    }


def resampled(values: NDArray[Any], loci: NDArray[np.int64]) -> tuple[float, float]:
    """The 95 % interval of a mean by the bootstrap, percentiles of 10,000 samples.

    Args:
        values: (count,).
        loci: (count,) from 0: what has the same number is drawn together.
    """
    sums, sizes = np.bincount(loci, values), np.bincount(loci)
    draw = np.random.Generator(np.random.PCG64(0))
    found = []
    for _ in range(100):  # in parts, of bounded size
        chosen = draw.integers(0, len(sums), (100, len(sums)))
        found.append(sums[chosen].sum(1) / sizes[chosen].sum(1))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)


def _table(rows: Sequence[Mapping[str, Any]], missing: Mapping[str, float]) -> str:
    head = [
        "task",
        "nt",
        "start",
        "head",
        "accuracy, %",
        "95 % interval",
        "last epoch, %",
        "k-mer regression, %",
        "95 % interval",
    ]
    head += ["above k-mers, points", "windows", "loci", "parameters", "updates", "s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        kmers, judged = row["kmers"], row["judged"]
        low, high = row["above_kmers_interval"]
        cells = [row["task"], f"{row['length']:,}", row["origin"] + ("*" if row["apart"] is False else "")]
        cells += [row["head"]]
        cells += [percent(row["right"] / judged), _bounds(row["interval"]), percent(row["right_final"] / judged)]
        cells += [f"{percent(kmers['right'] / judged)} (k = {kmers['k']})", _bounds(kmers["interval"])]
        cells += [f"{row['above_kmers']:+.2f} ({low:+.2f} to {high:+.2f})", f"{judged:,}", f"{row['loci']:,}"]
        cells += [f"{row['parameters']:,}", f"{row['steps']:,}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Accuracy: of the epoch that validation chose. Intervals: the bootstrap over loci: of apes the homologous",
    ]
    lines += [f"windows, of others those of a stretch of {_STRETCH:,} bases, are drawn together."]
    if any(row["apart"] is False for row in rows):
        lines += ["\\* whether the pretrained model has read the test, or what is homologous to it, is not on record."]
    for name, accuracy in missing.items():
        lines += [
            f"\n{name}: {percent(accuracy)} % right, not in the table for want of {_PREDICTIONS}. The command that",
            "trained it adds it, or refuses it where its windows are other ones by now; then train it in a new folder.",
        ]
    return "\n".join(lines) + "\n"


def _bounds(pair: Sequence[float]) -> str:
    return f"{pair[0]:.2f} to {pair[1]:.2f}"


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    made, axes = figure(7, 4.2)
    for name, curve in PAPER.items():
        axes.plot(list(curve), list(curve.values()), "--", linewidth=1.2, label=f"{name}, the paper (five species)")
    for origin, head in itertools.product(("scratch", "pretrained"), ("linear", "likelihood")):
        some = [row for row in rows if (row["task"], row["origin"], row["head"]) == ("apes", origin, head)]
        if not some:
            continue
        shown = [100 * row["right"] / row["judged"] for row in some]
        bounds = [row["interval"] for row in some]
        error = [[value - low for value, (low, _) in zip(shown, bounds, strict=True)]]
        error.append([high - value for value, (_, high) in zip(shown, bounds, strict=True)])
        axes.errorbar(
            [row["length"] for row in some],
            shown,
            yerr=error,
            fmt="o-",
            capsize=3,
            label=f"here, {origin}, {head} head",
        )
    axes.axhline(25, color="#777777", linewidth=0.8, label="chance of four species")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bases of a window")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    save_figure(made, path)
