"""How much of a window of DNA tells which great ape it is from, by statistics alone, on the parts of `great-apes`:

    python benchmarks/ape_signal.py --data great_apes.npz --out ape-signal.json
    python benchmarks/ape_signal.py --data great_apes.npz --alignment chr22.maf.gz --out ape-signal.json

Judged are windows of the test, and by cross-validation windows of five consecutive parts of the training blocks. Those
of a locus begin as far into the same block, which the recipe's own test windows do not. Models and discriminants are
fitted without the part that is judged:

- markov-K: log-likelihoods by a Markov model of order K for each species, both strands, argmax; each less its mean over
  the other parts' windows, whose models have read the part that is judged;
- runs, words: a linear discriminant (ridge) on how many stretches of one base have which length, on 5-mers, on both;
- masked: lengths of the masked stretches, which must tell nothing.

Each is judged as the task is, by the window alone, and beside its homologues: fitted and judged on what is left when
the mean over the four windows of a locus is taken away, so that what the species share cancels out. With --alignment
(the .maf.gz that the blocks were taken from, Debian's maffilter-examples) it is also told what is private to one
species, and how far its kinds alone tell the species when the alignment says which bases these are.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statescan.bench.measure import machine_facts
from statescan.data.aligned import AlignedBlocks, mask_alike, read_blocks
from statescan.data.dna import UNKNOWN
from statescan.data.windows import LabelledWindows
from statescan.errors import DataError, StatescanError
from statescan.evaluate.kmers import kmer_regression, word_codes
from statescan.files import write_json
from statescan.recipes.dna_species import ape_splits, resampled

FOLDS = 5
ORDERS = (1, 2, 3, 4, 5, 6, 8)
WORD = 5
LONGEST_RUN = 24
# Least distance of two windows that are fitted to. Lengths are multiples of it, so that judged ones lie side by side in
# the first species, and in the others but for what they lack.
STEP = 1 << 12
# Counts that a species' own conditional distribution is shrunk by, towards that of all; and the discriminant's ridge,
# in variances of a feature. Neither was fitted to anything.
SHRINK, RIDGE = 300.0, 1.0

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Homologous windows: (loci, species) begins in each species' own bases, and which of the loci are judged."""

    starts: Ints
    judged: NDArray[np.bool_]


def other_strand(k: int) -> Ints:
    """(4^k,): the number of each word's reverse complement."""
    left, other = np.arange(4**k), np.zeros(4**k, np.int64)
    for _ in range(k):
        left, last = np.divmod(left, 4)
        other = 4 * other + 3 - last
    return other


def stretches(unknown: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Where stretches of True begin, and how long they are."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], unknown, [False]]).astype(np.int8)))
    return borders[::2], borders[1::2] - borders[::2]


class Signal:
    """The features of windows of one length.

    Args:
        aligned: blocks, unknown bases masked alike.
        length: bases of a window, a multiple of `STEP`.
    """

    def __init__(self, aligned: AlignedBlocks, length: int) -> None:
        self.length = length
        self.bases = [aligned.tokens[ends[0] : ends[-1]] for ends in aligned.offsets]
        self.ends = aligned.offsets - aligned.offsets[:, :1]
        begin, end = aligned.part("train")
        borders = np.linspace(begin, end, FOLDS + 1).astype(int)
        self.parts: list[tuple[int, int]] = [*itertools.pairwise(borders.tolist()), aligned.part("test")]
        stride = max(length // 4, STEP)
        self.windows = [self._homologous(first, last, stride) for first, last in self.parts[:FOLDS]]
        self.windows.append(self._homologous(*self.parts[FOLDS], length))

    def _homologous(self, begin: int, end: int, stride: int) -> Windows:
        """Windows that begin every so many bases of the first species, and as far into the same block of the others."""
        first = np.arange(self.ends[0][begin], self.ends[0][end] - self.length + 1, stride)
        block = np.searchsorted(self.ends[0], first, side="right") - 1
        inside = first - self.ends[0][block]
        starts = [
            np.minimum(ends[block] + np.minimum(inside, ends[block + 1] - ends[block]), ends[end] - self.length)
            for ends in self.ends
        ]
        return Windows(np.stack(starts, 1), np.arange(len(first)) % (self.length // stride) == 0)

    def counts(self, marks: Callable[[NDArray[np.uint8]], tuple[Ints, Ints]], kinds: int) -> list[Floats]:
        """For each part (loci, species, kinds): square roots of how many marks of each kind begin in a window.

        Args:
            marks: of a species' bases: where marks stand, ascending, and of which kind they are.
        """
        found = [np.empty((*windows.starts.shape, kinds)) for windows in self.windows]
        for species, bases in enumerate(self.bases):
            places, kind = marks(bases)
            for windows, out in zip(self.windows, found, strict=True):
                start = windows.starts[:, species]
                ranges = np.searchsorted(places, np.stack([start, start + self.length]))
                for locus, (low, high) in enumerate(ranges.T):
                    out[locus, species] = np.bincount(kind[low:high], minlength=kinds)
        return [np.sqrt(out + 0.375) for out in found]  # of about the same variance, rare or not

    def likelihoods(self, order: int) -> list[Floats]:
        """For each part (loci, species, models): log-likelihoods by each species' Markov model, mean of both strands,
        fitted to the other training parts."""
        size = 4 ** (order + 1)
        other = other_strand(order + 1)
        codes = [word_codes(bases, order + 1) for bases in self.bases]
        counted = np.zeros((FOLDS, len(codes), size))
        for fold, (begin, end) in enumerate(self.parts[:FOLDS]):
            for species, code in enumerate(codes):
                here = code[self.ends[species][begin] : self.ends[species][end] - order]
                once = np.bincount(here, minlength=size + 1)[:size]
                counted[fold, species] = once + once[other]
        found = []
        for part, windows in enumerate(self.windows):
            # Those of the test are fitted to all.
            counts = counted[[fold for fold in range(FOLDS) if fold != part]].sum(0).reshape(len(codes), -1, 4)
            pooled = counts.sum(0) + 1
            pooled = pooled / pooled.sum(1, keepdims=True)
            own = (counts + SHRINK * pooled) / (counts.sum(2, keepdims=True) + SHRINK)
            scores = np.log(own).reshape(len(codes), size)
            scores = np.pad((scores + scores[:, other]) / 2, ((0, 0), (0, 1)))  # nothing of words with unknown bases
            out = np.empty((*windows.starts.shape, len(codes)))
            for species, code in enumerate(codes):
                start = windows.starts[:, species]
                low, high = int(start.min()), int(start.max()) + self.length - order
                for model, score in enumerate(scores):
                    sums = np.concatenate([[0.0], np.cumsum(score[code[low:high]])])
                    out[:, species, model] = sums[start - low + self.length - order] - sums[start - low]
            found.append(out)
        return found


def words(bases: NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Every known word of `WORD` bases, a word and its reverse complement one kind."""
    codes = word_codes(bases, WORD)
    kinds = np.unique(np.minimum(np.arange(4**WORD), other_strand(WORD)), return_inverse=True)[1]
    places = np.flatnonzero(codes < 4**WORD)
    return places, kinds[codes[places]]


def runs(bases: NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Every stretch of one base, by its length and by whether it is of A or T, or of C or G."""
    places = np.concatenate([[0], np.flatnonzero(np.diff(bases)) + 1])
    lengths = np.minimum(np.diff(np.append(places, len(bases))), LONGEST_RUN) - 1
    of = bases[places]
    known = of != UNKNOWN
    return places[known], (LONGEST_RUN * ((of == 1) | (of == 2)) + lengths)[known]


def masked(bases: NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Every stretch of unknown bases by its length."""
    places, lengths = stretches(bases == UNKNOWN)
    return places, np.minimum(lengths, LONGEST_RUN) - 1


def discriminant(fitted: Floats, judged: Floats) -> Floats:
    """(loci, species, species): scores of each judged window for each species, by a linear discriminant with a ridge.

    Means of species are over the same loci, so that only what is private shifts them; the covariance is that within a
    species, of which most is that loci differ.
    """
    means = fitted.mean(0)
    within = (fitted - means).reshape(-1, fitted.shape[2])
    scale = within.std(0)
    used = scale > 0
    within = within[:, used] / scale[used]
    shifts = (means - means.mean(0))[:, used] / scale[used]
    weights = np.linalg.solve(within.T @ within / len(within) + RIDGE * np.eye(within.shape[1]), shifts.T)
    return (judged - means.mean(0))[..., used] / scale[used] @ weights - (shifts * weights.T).sum(1) / 2


def right(scores: Floats) -> Floats:
    """(loci * species,): 100 where a window's best score is its own species'; ties count in part."""
    best = scores >= scores.max(2, keepdims=True) - 1e-9
    return 100.0 * (np.diagonal(best, axis1=1, axis2=2) / best.sum(2)).ravel()


def judge(alone: Floats, beside: Floats) -> dict[str, Any]:
    """Accuracy by the window alone and beside its homologues, per cent, with 95 % intervals over loci, and of each
    species."""
    loci = np.repeat(np.arange(alone.shape[0]), alone.shape[1])
    found: dict[str, Any] = {"loci": len(alone)}
    for name, scores in (("", alone), ("beside_", beside)):
        told = right(scores)
        found[f"{name}accuracy"] = told.mean()
        found[f"{name}interval"] = resampled(told, loci)
        found[f"{name}of_each"] = told.reshape(scores.shape[:2]).mean(0).tolist()
    return found


def centred(values: Floats) -> Floats:
    """Less the mean over a locus' species."""
    return values - values.mean(1, keepdims=True)


def fit_and_judge(
    signal: Signal, parts: Sequence[Floats], fit: Callable[[Floats, Floats], Floats]
) -> tuple[dict[str, Any], Floats]:
    """Judges the test and, by cross-validation, the training blocks; also what is right of the test's windows.

    Args:
        signal: whose windows they are.
        parts: of each part (loci, species, features).
        fit: scores of the second, fitted to the first.
    """
    said = []
    for part, judged in enumerate(parts):
        fitted = np.concatenate([parts[fold] for fold in range(FOLDS) if fold != part])
        kept = judged[signal.windows[part].judged]
        said.append((fit(fitted, kept), fit(centred(fitted), centred(kept))))
    folds = [np.concatenate([pair[side] for pair in said[:FOLDS]]) for side in (0, 1)]
    return {"test": judge(*said[-1]), "folds": judge(*folds)}, right(said[-1][0])


def less_mean(fitted: Floats, judged: Floats) -> Floats:
    """Log-likelihoods, less the mean of each model's over the windows of all species."""
    return judged - fitted.mean((0, 1))


def by_training(signal: Signal, features: Sequence[Floats]) -> dict[str, float]:
    """Accuracy by cross-validation when fitted to one, two and four of the other parts, mean over all choices."""
    found = {}
    for count in (1, 2, FOLDS - 1):
        said = []
        for part in range(FOLDS):
            for chosen in itertools.combinations([fold for fold in range(FOLDS) if fold != part], count):
                scores = discriminant(np.concatenate([features[fold] for fold in chosen]), features[part])
                said.append(right(scores[signal.windows[part].judged]).mean())
        found[str(count)] = float(np.mean(said))
    return found


def at_length(aligned: AlignedBlocks, length: int) -> list[dict[str, Any]]:
    """The rows of one length."""
    signal = Signal(aligned, length)
    splits = ape_splits(aligned, length, (1 << 24) // length, mask=False)
    assert isinstance(splits.train, LabelledWindows)
    first = (signal.windows[FOLDS].starts + aligned.offsets[:, 0]).ravel()
    labels = np.tile(np.arange(len(aligned.names), dtype=np.uint8), len(first) // len(aligned.names))
    test = replace(splits.train, first=first, room=np.ones_like(first), labels=labels)
    said = kmer_regression(splits.train, test, WORD)
    yardstick = 100.0 * (said == labels)
    loci = np.arange(len(yardstick)) // len(aligned.names)
    regression = {"loci": int(loci[-1]) + 1, "accuracy": yardstick.mean(), "interval": resampled(yardstick, loci)}
    rows: list[dict[str, Any]] = [{"length": length, "by": "5-mer logistic regression", "test": regression}]

    def add(name: str, parts: Sequence[Floats], fit: Callable[[Floats, Floats], Floats] = discriminant) -> None:
        found, test = fit_and_judge(signal, parts, fit)
        above = test - yardstick
        found["above_regression"] = above.mean()
        found["above_regression_interval"] = resampled(above, loci)
        rows.append({"length": length, "by": name, **found})

    add("masked", signal.counts(masked, LONGEST_RUN))
    for order in ORDERS:
        scores = signal.likelihoods(order)
        add(f"markov-{order}", scores, less_mean)
        # Nats by which the last species' model is ahead of the first's: by how many more in its own windows, and how
        # far that varies over the loci of one species.
        ahead = np.concatenate(scores[:FOLDS])[..., -1] - np.concatenate(scores[:FOLDS])[..., 0]
        apart = {"mean": (ahead[:, -1] - ahead[:, 0]).mean(), "deviation": ahead[:, 0].std()}
        rows[-1]["last_against_first"] = {"species": [aligned.names[0], aligned.names[-1]], **apart}
    run, word = signal.counts(runs, 2 * LONGEST_RUN), signal.counts(words, (4**WORD) // 2)
    both = [np.dstack(pair) for pair in zip(word, run, strict=True)]
    add("runs", run)
    add("words", word)
    add("words and runs", both)
    rows[-1]["accuracy_by_training_parts"] = by_training(signal, both)
    return rows


def read_alignment(path: Path, aligned: AlignedBlocks) -> tuple[NDArray[np.uint8], Ints]:
    """(species, columns) uint8, A C G T N as 0 to 4 and gaps as 5; and where each block begins, and the end.

    Raises:
        DataError: they are not the blocks of `aligned`.
    """
    letters = np.full(256, UNKNOWN, np.uint8)
    for number, pair in enumerate(("Aa", "Cc", "Gg", "Tt")):
        letters[[ord(letter) for letter in pair]] = number
    letters[ord("-")] = 5
    blocks: list[dict[str, NDArray[np.uint8]]] = []
    with gzip.open(path, "rt") as stream:
        for line in stream:
            if line[:1] == "a":
                blocks.append({})
            elif line[:1] == "s":
                _, source, *_, text = line.split()
                blocks[-1][source.split(".")[0]] = letters[np.frombuffer(text.encode(), np.uint8)]
    wanted = f"--alignment: wanted the {aligned.blocks:,} blocks of --data"
    if len(blocks) != aligned.blocks:
        raise DataError(f"{wanted}, got {len(blocks):,} in {path}; give the .maf.gz that they were taken from")
    for number, block in enumerate(blocks):
        found = [int((block[name] != 5).sum()) if name in block else None for name in aligned.names]
        lengths = np.diff(aligned.offsets[:, number : number + 2])[:, 0].tolist()
        if found != lengths:
            raise DataError(
                f"{wanted}, got {found} bases of {', '.join(aligned.names)} in block {number} of {path} and {lengths} "
                "in --data; give the .maf.gz that they were taken from"
            )
    columns = np.concatenate([np.stack([block[name] for name in aligned.names]) for block in blocks], 1)
    return columns, np.cumsum([0, *(len(block[aligned.names[0]]) for block in blocks)])


def with_alignment(aligned: AlignedBlocks, path: Path, lengths: Sequence[int]) -> dict[str, Any]:
    """What is private to a species, and how far the kinds of its private substitutions tell it."""
    columns, begins = read_alignment(path, aligned)
    known = (columns < UNKNOWN).all(0)
    equal = known & (columns == columns[0]).all(0)
    flanked = np.zeros_like(known)
    flanked[1:-1] = equal[:-2] & equal[2:]
    train, test = (slice(*begins[list(aligned.part(name))]) for name in ("train", "test"))
    species, kinds = [], np.full(columns.shape, -1)
    for own, name in enumerate(aligned.names):
        others = np.delete(columns, own, 0)
        agree = (others == others[0]).all(0) & (others[0] != columns[own])
        private = agree & known
        gaps, inserts = (stretches(agree & (mask == 5))[1] for mask in (columns[own], others[0]))
        species.append(
            {
                "species": name,
                "substitutions_per_1000": 1000 * private.sum() / known.sum(),
                "deletions": len(gaps),
                "insertions": len(inserts),
                "longest_deletion": int(gaps.max()),
                "longest_insertion": int(inserts.max()),
            }
        )
        # Kinds: both neighbours, what stood there by the other three and what stands now, of either strand.
        at = np.flatnonzero(private & flanked)
        left, after, new = (columns[own, at + step].astype(int) for step in (-1, 1, 0))
        old = others[0, at].astype(int)
        kind = ((left * 4 + old) * 4 + after) * 4 + new
        turned = (((3 - after) * 4 + 3 - old) * 4 + 3 - left) * 4 + 3 - new
        kinds[own, at] = np.where(old < 2, kind, turned)
    counts = np.stack([np.bincount(row[train][row[train] >= 0], minlength=256) for row in kinds]) + 1.0
    logs = np.log(counts / counts.sum(1, keepdims=True))
    rows = []
    for length in lengths:
        rest = kinds[:, test]
        rest = rest[:, : rest.shape[1] // length * length].reshape(len(kinds), -1, length)
        scores = np.stack([np.stack([logs[:, window[window >= 0]].sum(1) for window in row]) for row in rest], 1)
        told = right(scores)
        loci = np.repeat(np.arange(len(scores)), len(kinds))
        rows.append({"length": length, "loci": len(scores), "accuracy": told.mean(), "interval": resampled(told, loci)})
    return {"species": species, "kinds_of_substitutions": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=".npz of aligned blocks")
    parser.add_argument("--alignment", type=Path, help=".maf.gz of the same blocks, gaps and all")
    parser.add_argument("--length", type=int, action="append", help="default: 8192, 32768 and 131072")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lengths = options.length or [1 << 13, 1 << 15, 1 << 17]
    for length in lengths:
        if length < STEP or length % STEP:
            parser.error(f"--length: wanted a multiple of {STEP}, got {length}")
    try:
        blocks = read_blocks(options.data)
        aligned = mask_alike(blocks)
        longest = min(int(np.diff(aligned.spans(part)).min()) for part in ("valid", "test"))
        if max(lengths) > longest:
            parser.error(f"--length: wanted at most {longest}, the bases of a part, got {max(lengths)}")
        found: dict[str, Any] = {"benchmark": "ape-signal", "machine": machine_facts(), "split": blocks.facts()}
        if options.alignment:
            found["alignment"] = with_alignment(aligned, options.alignment, lengths)
    except StatescanError as error:
        parser.error(str(error))
    found["rows"] = []
    print("| nt | by | test, % | beside homologues | five parts of training, % | beside homologues |\n|" + "---|" * 6)
    for length in lengths:
        for row in at_length(aligned, length):
            found["rows"].append(row)
            cells = [f"{row['length']:,}", row["by"]]
            for part in (row.get("test", {}), row.get("folds", {})):
                for value, bounds in (("accuracy", "interval"), ("beside_accuracy", "beside_interval")):
                    told = value in part
                    cells.append(f"{part[value]:.1f} ({part[bounds][0]:.1f} to {part[bounds][1]:.1f})" if told else "")
            print("| " + " | ".join(cells) + " |", flush=True)
    write_json(options.out, found)


if __name__ == "__main__":
    main()
