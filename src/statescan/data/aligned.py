"""Aligned genomes: species whose blocks i are orthologous, parted by the blocks' numbers, which are the same for all.

A base of one species answers to one of every other. So a split that deals the blocks of each species out by itself
would hold out a stretch of one and train on its homologue in the next: here training, choice and test are the same
blocks of all of them, for whoever reads such a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statescan.data.dna import UNKNOWN, Genome, block_lengths, open_arrays, outside, without_gaps
from statescan.data.text import Source, find_sources
from statescan.data.tokenizer import DnaTokenizer
from statescan.errors import DataError

__all__ = ["AlignedBlocks", "holds_blocks", "mask_alike", "read_blocks"]

# The last tenth of the blocks is the test; the twentieth before it chooses the epoch, or is held out of pretraining.
_TEST, _VALID = 0.1, 0.05
PARTS = ("train", "valid", "test")


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

    def part(self, name: str) -> tuple[int, int]:
        """The numbers, [begin, end), of the blocks of a part: "train" (the first 85 %), "valid" (5 %), "test"."""
        test = int(self.blocks * (1 - _TEST))
        borders = [0, test - int(self.blocks * _VALID), test, self.blocks]
        number = PARTS.index(name)
        return borders[number], borders[number + 1]

    def spans(self, name: str) -> NDArray[np.int64]:
        """(species, 2) int64: where a part of each species lies in `tokens`."""
        begin, end = self.part(name)
        return self.offsets[:, [begin, end]]

    def facts(self) -> dict[str, Any]:
        """What a run.json says of the split: two are equal where the bases, the species and all three parts are.

        "digest" is the `TokenFile`'s of the same bases.
        """
        digest = hashlib.sha256(np.dtype("<u1").str.encode())
        digest.update(np.ascontiguousarray(self.tokens).data)
        parts = {name: self.spans(name).tolist() for name in PARTS}
        return {"digest": digest.hexdigest(), "species": list(self.names), **parts}


def holds_blocks(paths: str | Path | Sequence[str | Path]) -> bool:
    """Whether one of the files is a .npz of aligned blocks.

    Raises:
        DataError: a path does not exist, or a .npz can't be read.
    """
    return any(_is_aligned(source) for source in find_sources(paths))


def _is_aligned(source: Source) -> bool:
    if source.path.suffix != ".npz":
        return False
    with open_arrays(source.path) as held:
        return any(name.endswith("_blocklen") for name in held.files)


def read_blocks(
    paths: str | Path | Sequence[str | Path],
    tokenizer: DnaTokenizer | None = None,
    *,
    cache: str | Path | None = None,
) -> AlignedBlocks:
    """Aligned genomes: a .npz with NAME (bases,) uint8 and NAME_blocklen (blocks,) for each species, or a folder with a
    FASTA file a species whose i-th records are orthologous.

    Args:
        paths: the .npz, mapped into memory from a token file; or the folder or files of FASTA.
        tokenizer: how letters become ids. Default: `DnaTokenizer()`.
        cache: folder of the token files. Default: the user's.

    Raises:
        DataError: a file can't be read, holds no bases or blocks that don't add up to them, the species have not as
            many blocks, or two of them hold the same bases.
    """
    sources = find_sources(paths)
    shown = ", ".join(source.label for source in sources[:3]) + (" ..." if len(sources) > 3 else "")
    names: list[str] = []
    lengths: list[NDArray[np.int64]] = []
    if len(sources) == 1 and sources[0].path.suffix == ".npz":
        held = block_lengths(sources[0].path)
        if held is None:
            raise DataError(f"species: wanted NAME and NAME_blocklen of each species in '{shown}', got none")
        names, lengths = list(held), list(held.values())
        tokens = Genome(sources[0].path, tokenizer, cache=cache).tokens
    else:
        parts = []
        for source in sources:
            if _is_aligned(source):
                raise DataError(
                    f"species: wanted one .npz of aligned blocks by itself, got '{source.label}' in {shown}"
                )
            genome = Genome(source.path, tokenizer, cache=cache)
            names.append(source.path.name.split(".")[0])
            parts.append(np.asarray(genome.tokens))
            lengths.append(np.diff(genome.offsets))
        tokens = np.concatenate(parts)
    counts = {len(length) for length in lengths}
    if len(names) < 2 or len(counts) != 1:
        raise DataError(
            f"species: wanted at least two species with as many blocks each in '{shown}', got {len(names)} with "
            f"{sorted(counts)}"
        )
    offsets, start = [], 0
    for length in lengths:
        offsets.append(start + np.concatenate([[0], np.cumsum(length)]))
        start = int(offsets[-1][-1])
    for number, ends in enumerate(offsets):
        for other in range(number):
            if np.array_equal(tokens[ends[0] : ends[-1]], tokens[offsets[other][0] : offsets[other][-1]]):
                raise DataError(
                    f"species: wanted species of their own, got the same bases as {names[other]} and as "
                    f"{names[number]}; name each once"
                )
    return AlignedBlocks(names, tokens, np.stack(offsets))


def mask_alike(aligned: AlignedBlocks) -> AlignedBlocks:
    """The same with every base unknown, in all species, that is unknown in one of them.

    Which bases an assembly could not read tells the species: by their number alone half of all long windows are told
    apart. So the stretches of N in a block of one species are masked in that block of every other, in their order, as
    far into its known bases, and as many bases of each: were a stretch drawn out or rounded up with the block, its
    length would tell where it is from. At least a base stays between two of them where the block has room.

    So a block has as many unknown bases in every species, except where it is shorter than that in one: there it is
    unknown as a whole, and they are fewer. Where stretches of two species meet in a block, or it has no room to keep
    them apart, their bases are as many, but how long each stretch is may differ.
    """
    tokens = np.array(aligned.tokens)
    held: set[int] = set()
    for here, ends in enumerate(aligned.offsets):
        whole = ends[[0, -1]].reshape(1, 2)
        found: dict[int, list[tuple[int, int]]] = {}
        for start, end in outside(whole, without_gaps(aligned.tokens, whole, 0)).tolist():
            first, last = np.searchsorted(ends, [start, end - 1], side="right") - 1
            for block in range(int(first), int(last) + 1):
                low, high = max(start, int(ends[block])), min(end, int(ends[block + 1]))
                found.setdefault(block, []).append((low - int(ends[block]), high - low))
        for block, stretches in found.items():
            starts, sizes = np.array(stretches).T
            size = int(ends[block + 1] - ends[block])
            for species, other in enumerate(aligned.offsets):
                if species != here:
                    begin, end = other[block : block + 2]
                    for low, count in zip(_spread(starts, sizes, size, int(end - begin)), sizes, strict=True):
                        tokens[begin + low : min(begin + low + count, end)] = UNKNOWN
        held.update(found)
    # Stretches of two species that overlap in a block may by more or fewer bases in another, and the last of one has
    # been cut where there was no room for a base between any two.
    for block in held:
        views = [tokens[ends[block] : ends[block + 1]] for ends in aligned.offsets]
        counts = [int((view == UNKNOWN).sum()) for view in views]
        most = max(counts)
        for view, count in zip(views, counts, strict=True):
            if 0 < count < most:
                known = np.flatnonzero(view != UNKNOWN)
                nearest = np.argsort(np.abs(known - np.argmax(view == UNKNOWN)), kind="stable")
                view[known[nearest[: most - count]]] = UNKNOWN
    return replace(aligned, tokens=tokens)


def _spread(starts: NDArray[np.int64], sizes: NDArray[np.int64], size: int, length: int) -> NDArray[np.int64]:
    """Where stretches of a block of `size` bases begin in one of `length`: what lies between them is drawn out or drawn
    in, they are not. A stretch at an end of the block stays there."""
    taken = np.cumsum(sizes + 1) - sizes - 1  # by those before, and a base between any two
    least = int(sizes.sum()) + len(sizes) - 1
    return taken + (starts - taken) * max(0, length - least) // max(1, size - least)
