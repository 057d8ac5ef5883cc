"""Nucleotides in: FASTA and FASTQ files as ids, intervals by BED, splits by region, windows of one strand or the other.

A file is read once, record by record, into a token file (`statescan.data.tokens`), which every run then maps into
memory: a window of a genome of any size costs what the window holds.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import gzip
import hashlib
import itertools
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from statescan.data.sampler import check_state, hashed, permute
from statescan.data.text import Chunk, Source
from statescan.data.tokenizer import DNA_LETTERS, DnaTokenizer
from statescan.errors import ConfigError, DataError, MissingExtraError

__all__ = [
    "Genome",
    "GenomeSampler",
    "Region",
    "read_bed",
    "read_records",
    "reverse_complement",
    "split_regions",
    "without_gaps",
]

UNKNOWN = DNA_LETTERS.index("N")
# A record goes on in pieces, so that its ids are never all in memory.
_PIECE = 8 << 20
# So many unknown bases in a row are a gap of the assembly, which no window reads.
_GAP = 1024
# Two sequences of fewer bases may be equal by chance, as reads are.
_READ = 1000
_COMPLEMENT = np.array([3, 2, 1, 0, 4], np.uint8)
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)


class Region(NamedTuple):
    """Bases [start, end) of a record, from 0; name is BED's fourth column, "" without one."""

    record: str
    start: int
    end: int
    name: str = ""


def reverse_complement(ids: NDArray[Any]) -> NDArray[Any]:
    """The other strand of ids in A C G T N, read from its own start; along the last axis."""
    return _COMPLEMENT[ids[..., ::-1]].astype(ids.dtype)


def read_records(sources: Iterable[Source]) -> Iterator[Chunk]:
    """The records of FASTA and FASTQ files as pieces of bytes, each record a document under its own name.

    Args:
        sources: files as `find_sources` gives them: FASTA or FASTQ (told apart by what is in them), plain, gzipped
            (bgzip too) or compressed as .xz, .bz2 or .zst; or .npz with `seq` (ids uint8, A C G T N as 0 to 4),
            `reclen` (bases of each record) and `names`, or with NAME and NAME_blocklen of aligned species
            (`statescan.data.aligned`), each of which is a record.

    Yields:
        Chunks: `source` is the record's name up to its first blank.

    Raises:
        MissingExtraError: dnaio is not installed.
        DataError: a file is missing, of another format, empty, cut short or damaged.
    """
    for source in sources:
        count = 0
        for name, sequence in _read_arrays(source) if source.path.suffix == ".npz" else _read_fasta(source):
            count += 1
            for start in range(0, len(sequence), _PIECE):
                yield Chunk(name, sequence[start : start + _PIECE], start == 0, start)
        if not count:
            raise DataError(f"dna: wanted records in '{source.label}', got an empty file; name another one")


def _read_fasta(source: Source) -> Iterator[tuple[str, bytes]]:
    try:
        import dnaio
    except ImportError:
        raise MissingExtraError("reading FASTA and FASTQ", "dnaio", "dna") from None
    label = source.label
    try:
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(open(source.path, "rb"))
            # What is in it says how it is read: browsers unpack a .gz and leave it its name.
            begin = file.read(4)
            # A mark of the byte order, which some editors write, is no part of the first record.
            mark = len(codecs.BOM_UTF8) if begin.startswith(codecs.BOM_UTF8) else 0
            form = {b">": "fasta", b"@": "fastq"}.get(begin[mark : mark + 1])
            file.seek(mark)
            # Without a second process or thread, so that what goes wrong is raised here.
            records = opened.enter_context(
                dnaio.open(source.path, open_threads=0) if form is None else dnaio.open(file, fileformat=form)
            )
            for record in records:
                name = record.name.split(maxsplit=1)[0] if record.name.strip() else ""
                yield name, record.sequence.encode("latin-1", "replace")
    except (dnaio.FileFormatError, dnaio.UnknownFileFormat, UnicodeDecodeError) as problem:
        raise DataError(
            f"dna: wanted FASTA (>name, then bases) or FASTQ in '{label}', got neither: {_first_line(problem)}; name "
            "files of sequences alone, those of a folder by a glob such as 'genomes/*.fa.gz'"
        ) from None
    except _DAMAGE as problem:
        raise DataError(
            f"dna: {label}: wanted a whole file, got one that is cut short or damaged ({_first_line(problem)}); copy "
            "or download it again"
        ) from None
    except OSError as problem:
        raise DataError(f"dna: {label} can't be read ({problem.strerror or problem}); check its path") from None


def _read_arrays(source: Source) -> Iterator[tuple[str, bytes]]:
    letters = np.frombuffer(DNA_LETTERS.encode(), np.uint8)
    if (blocks := block_lengths(source.path)) is not None:
        # A species is a record.
        with np.load(str(source.path), allow_pickle=False) as held:
            for name in blocks:
                yield name, letters[held[name]].tobytes()
        return
    with open_arrays(source.path) as held:
        if missing := [name for name in ("seq", "reclen", "names") if name not in held.files]:
            raise DataError(
                f"dna: '{source.label}' must hold seq, reclen and names, or NAME and NAME_blocklen of aligned species, "
                f"got no {missing[0]}"
            )
        sequence, lengths, names = held["seq"], held["reclen"], held["names"]
    if sequence.dtype != np.uint8 or int(lengths.sum()) != len(sequence) or len(names) != len(lengths):
        raise DataError(
            f"dna: '{source.label}': wanted seq (bases,) uint8 with as many bases as reclen adds up to, "
            f"{int(lengths.sum()):,}, and {len(lengths)} names, got {len(sequence):,} {sequence.dtype} and {len(names)}"
        )
    if len(sequence) and int(sequence.max()) >= len(letters):
        raise DataError(f"dna: '{source.label}': wanted ids 0 to 4 (A C G T N), got {int(sequence.max())}")
    starts = np.cumsum(lengths) - lengths
    for name, start, length in zip(names, starts, lengths, strict=True):
        yield str(name).split(maxsplit=1)[0], letters[sequence[start : start + length]].tobytes()


@contextlib.contextmanager
def open_arrays(path: Path) -> Iterator[Any]:
    """A .npz that is open, with one line for what is wrong with it."""
    try:
        with np.load(str(path), allow_pickle=False) as held:
            yield held
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(f"dna: '{path}' can't be read as .npz: {_first_line(problem)}") from None


def block_lengths(path: str | os.PathLike[str]) -> dict[str, NDArray[np.int64]] | None:
    """Bases of each block of each species in a .npz of aligned blocks, NAME (bases,) uint8 and NAME_blocklen (blocks,);
    None where it holds something else.

    Raises:
        DataError: the file can't be read, or the blocks don't add up to the bases.
    """
    with open_arrays(Path(path)) as held:
        names = [name.removesuffix("_blocklen") for name in held.files if name.endswith("_blocklen")]
        found = {}
        for name in names:
            bases, length = held[name], held[f"{name}_blocklen"].astype(np.int64)
            whole = bases.dtype == np.uint8 and bases.ndim == 1 and length.ndim == 1 and (length > 0).all()
            if not whole or int(length.sum()) != len(bases) or int(bases.max(initial=0)) > UNKNOWN:
                raise DataError(
                    f"dna: '{path}' must hold {name} as (bases,) uint8 of A C G T N as 0 to 4, and {name}_blocklen "
                    f"as the bases of each block, at least 1, got {bases.dtype} {bases.shape} up to "
                    f"{bases.max(initial=0)}, and {int(length.sum()):,} bases in {length.size:,} blocks"
                )
            found[name] = length
    return found or None


def _first_line(problem: BaseException) -> str:
    return " ".join((str(problem) or type(problem).__name__).split())


class Genome:
    """The records of FASTA or FASTQ files by name: any stretch of any of them, from a file mapped into memory.

    Args:
        paths: files, folders or globs, as `find_sources` takes them; see `read_records` for the formats.
        tokenizer: how letters become ids. Default: `DnaTokenizer()`.
        cache: folder of the token files. Default: the user's.

    Attributes:
        tokens: all ids, (bases,) uint8, records end to end, memory-mapped.
        offsets: (records + 1,) int64, where each record starts in them.
        names: of the records that hold bases.
        file: the `TokenFile`.

    Raises:
        DataError: as `read_records`; a letter that stands for no base.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        tokenizer: DnaTokenizer | None = None,
        *,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        from statescan.data.tokens import build_token_file

        self.file = build_token_file(paths, tokenizer or DnaTokenizer(), cache=cache)
        self.tokens: NDArray[np.uint8] = self.file.tokens
        self.offsets = np.asarray(self.file.document_offsets)
        self.names: list[str] = self.file.facts["documents"]
        self._number: dict[str, int] = {}
        self._twice: set[str] = set()
        for number, name in enumerate(self.names):
            if self._number.setdefault(name, number) != number:
                self._twice.add(name)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def label(self) -> str:
        """How messages call it: by its files."""
        labels = self.file.facts["sources"]
        return ", ".join(f"'{label}'" for label in labels[:3]) + (" ..." if len(labels) > 3 else "")

    def number(self, record: str) -> int:
        """Which record has a name; one that several have, or none, is a DataError."""
        if record in self._twice:
            places = [str(number) for number, name in enumerate(self.names, 1) if name == record]
            more = " ..." if len(places) > 4 else ""
            raise DataError(
                f"dna: wanted a name that one record has, got '{record}', which several have: records "
                f"{', '.join(places[:4])}{more} of those with bases in {self.label}; give each a name of its own "
                "(the word after > or @), and name no file twice"
            )
        if record not in self._number:
            near = difflib.get_close_matches(record, self._number, 1, 0.4) or self.names[:1]
            raise DataError(f"dna: wanted the name of a record, got '{record}', which none has; is it '{near[0]}'?")
        return self._number[record]

    def span(self, region: Region) -> tuple[int, int]:
        """Where a region lies in `tokens`."""
        first, end = (int(bound) for bound in self.offsets[self.number(region.record) :][:2])
        if not 0 <= region.start < region.end <= end - first:
            raise DataError(
                f"dna: wanted 0 <= start < end <= {end - first} in '{region.record}', got {region.start} to "
                f"{region.end}"
            )
        return first + region.start, first + region.end

    def fetch(self, record: str, start: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """The ids of bases [start, end) of a record."""
        number = self.number(record)
        stop = int(self.offsets[number + 1] - self.offsets[number]) if end is None else end
        first, last = self.span(Region(record, start, stop))
        return np.asarray(self.tokens[first:last])

    def spans(self, regions: Iterable[Region] | None = None) -> NDArray[np.int64]:
        """(spans, 2) int64, the places in `tokens` of regions, sorted and with what overlaps put together.

        Args:
            regions: default: whole records.
        """
        if regions is None:
            return np.stack([self.offsets[:-1], self.offsets[1:]], 1)
        found = sorted(self.span(region) for region in regions)
        borders = set(self.offsets.tolist())
        merged: list[list[int]] = []
        for start, end in found:
            # Two records that touch are two spans: nothing reads across their border.
            if merged and start <= merged[-1][1] and start not in borders:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        return np.array(merged, np.int64).reshape(-1, 2)


def open_lines(path: str | os.PathLike[str]) -> TextIO:
    """A text that is plain or gzipped, whatever it is called: what is in it says how it is read.

    Raises:
        OSError: the file can't be opened.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    # A mark of the byte order, which some editors write, is no letter.
    if packed:
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig"))
    return open(path, encoding="utf-8-sig")


def read_bed(path: str | os.PathLike[str]) -> list[Region]:
    """The intervals of a BED file, plain or .gz: record, start, end (from 0, half open), and the name if there is one.

    Raises:
        DataError: the file can't be read, a line is no interval, or there is none.
    """
    path = Path(path)
    regions: list[Region] = []
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                fields = line.rstrip("\r\n").split("\t")
                fields = fields if len(fields) > 1 else line.split()
                # Lines of a genome browser begin with the words; a record may begin with the letters.
                if not fields or not fields[0] or fields[0][0] == "#" or line.split()[0] in ("track", "browser"):
                    continue
                bounds = [field for field in fields[1:3] if field.strip().isdecimal()]
                if len(bounds) != 2 or not int(bounds[0]) < int(bounds[1]):
                    raise DataError(
                        f"bed: {path}:{number}: wanted a record's name, start and end with 0 <= start < end, got "
                        f"{line.strip()!r}"
                    )
                regions.append(Region(fields[0], int(bounds[0]), int(bounds[1]), *fields[3:4]))
    except _DAMAGE as problem:
        raise DataError(f"bed: '{path}' is cut short or damaged ({_first_line(problem)})") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"bed: '{path}' can't be read ({_first_line(problem)})") from None
    if not regions:
        raise DataError(f"bed: wanted intervals in '{path}', got none")
    return regions


def split_regions(
    spans: NDArray[np.int64], shares: Sequence[float], *, block: int = 1 << 16, seed: int = 0
) -> list[NDArray[np.int64]]:
    """Cuts spans into blocks and deals the blocks out, so that no base, of either strand, is in two parts.

    Args:
        spans: (spans, 2) starts and ends; a block never reaches over the end of one.
        shares: of each part but the last, which gets the rest: of the number of blocks, not of bases, so that a part
            holds fewer bases where more of its blocks are short ones, as the last of a span may be.
        block: bases of a block; it is the longest stretch that is sure to be whole somewhere, so it should be some
            windows long.
        seed: of the choice.

    Returns:
        A (spans, 2) array for each part, neighbouring blocks of a part put together.

    Raises:
        ConfigError: shares that don't leave anything, a block of no base.
    """
    if block < 1 or any(share <= 0 for share in shares) or sum(shares) >= 1:
        raise ConfigError(f"split: wanted block >= 1 and shares > 0 below 1 together, got {block} and {list(shares)}")
    starts = np.concatenate([np.arange(start, end, block) for start, end in spans.tolist()] or [np.empty(0, np.int64)])
    ends = np.concatenate(
        [np.minimum(np.arange(start, end, block) + block, end) for start, end in spans.tolist()] or [starts]
    )
    place = permute(np.arange(len(starts)), max(1, len(starts)), seed, 0)
    bounds = [0, *(round(len(starts) * float(share)) for share in np.cumsum(shares)), len(starts)]
    limits = set(spans[:, 0].tolist())
    parts = []
    for low, high in itertools.pairwise(bounds):
        chosen = (place >= low) & (place < high)
        joined: list[list[int]] = []
        for start, end in zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True):
            if joined and joined[-1][1] == start and start not in limits:
                joined[-1][1] = end
            else:
                joined.append([start, end])
        parts.append(np.array(joined, np.int64).reshape(-1, 2))
    return parts


def refuse_repeats(genomes: Sequence[Genome], *, within: bool = True) -> None:
    """Refuses a record that is there twice, on either strand: one copy would be held out, the other trained on.

    Records of fewer than 1,000 bases are let be: reads of a sequencer may well be equal.

    Args:
        genomes: that are parted, or of which some are trained on and others held out.
        within: also within each of them. Default True.

    Raises:
        DataError: two records are equal.
    """
    sizes = [np.diff(genome.offsets) for genome in genomes]
    every, counts = np.unique(np.concatenate(sizes), return_counts=True)
    several = every[(counts > 1) & (every >= _READ)]
    seen: dict[bytes, tuple[int, str]] = {}
    for here, genome in enumerate(genomes):
        for number in np.flatnonzero(np.isin(sizes[here], several)).tolist():
            bases = np.asarray(genome.tokens[genome.offsets[number] : genome.offsets[number + 1]])
            if int(bases.min()) == UNKNOWN:
                continue
            place = f"record {number + 1} ('{genome.names[number]}') of {genome.label}"
            digest = min(hashlib.sha256(strand.tobytes()).digest() for strand in (bases, reverse_complement(bases)))
            if digest not in seen:
                seen[digest] = here, place
            elif within or seen[digest][0] != here:
                raise DataError(
                    f"dna: wanted every record once, since a copy of what is held out would be trained on, got the "
                    f"same {len(bases):,} bases as {seen[digest][1]} and as {place}; leave one of them out"
                )


def outside(spans: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """What of some spans lies in none of the others; both (spans, 2), sorted and without overlaps."""
    found: list[tuple[int, int]] = []
    for start, end in spans.tolist():
        for low, high in others[(others[:, 1] > start) & (others[:, 0] < end)].tolist():
            if low > start:
                found.append((start, low))
            start = max(start, high)
        if end > start:
            found.append((start, end))
    return np.array(found, np.int64).reshape(-1, 2)


def check_apart(spans: NDArray[np.int64], others: NDArray[np.int64]) -> None:
    """Refuses held-out regions of which a base is trained on.

    Raises:
        DataError: they overlap.
    """
    shared = int((spans[:, 1] - spans[:, 0]).sum()) - sum(end - start for start, end in outside(spans, others).tolist())
    if shared:
        raise DataError(
            f"dna: wanted data.regions and data.valid_regions without a base in common, got {shared:,} bases in both; "
            "leave data.regions out to train on all that is not held out"
        )


def without_gaps(tokens: NDArray[np.uint8], spans: NDArray[np.int64], longest: int = _GAP) -> NDArray[np.int64]:
    """The spans cut at gaps of the assembly: more than `longest` unknown bases in a row, which are left out."""
    found: list[tuple[int, int]] = []
    for start, end in spans.tolist():
        runs: list[list[int]] = []
        for low in range(start, end, _PIECE):
            high = min(low + _PIECE, end)
            unknown = np.asarray(tokens[low:high]) == UNKNOWN
            edges = low + np.flatnonzero(np.diff(unknown, prepend=False, append=False))
            for first, last in edges.reshape(-1, 2).tolist():
                if runs and runs[-1][1] == first:
                    runs[-1][1] = last
                elif last - first > longest or first == low or last == high:
                    # A run that reaches the end of a piece may go on in the next.
                    runs.append([first, last])
        begun = start
        for first, last in runs:
            if last - first > longest:
                found.append((begun, first))
                begun = last
        found.append((begun, end))
    return np.array([span for span in found if span[1] > span[0]], np.int64).reshape(-1, 2)


class GenomeSampler:
    """Batches of windows of ``length + 1`` bases, each within one span: ``length`` inputs and, one further, targets.

    A span is cut into windows that share one base with their neighbours, from a phase of the epoch's own; an epoch
    visits each once, in an order of its own. With `both_strands` every second window, drawn by the window's place in
    the endless order, is read from the other strand.

    Length warm-up: the first updates read windows of `first_length`, as many more of them as make up for it; the length
    doubles after every `stage_steps` updates until it is `length`. So each update reads as many bases.

    The state is one number, as with `WindowSampler`.

    Args:
        tokens: (bases,) uint8 ids, memory-mapped or not.
        spans: (spans, 2) stretches of them that may be read.
        length: inputs per window.
        seed: picks the orders, the phases and the strands.
        both_strands: read both. Default False.
        first_length: `length` divided by a power of two; 0 for no warm-up. Default 0.
        stage_steps: updates at each length of the warm-up.
        rank: this process, in [0, world).
        world: how many processes draw from the same order; each takes an equal, disjoint part of every batch.

    Raises:
        ConfigError: a length out of range.
        DataError: no span holds ``length + 1`` bases.

    Source: the warm-up is of Nguyen et al. (2023), arXiv:2306.15794, section 3.2; Gu and Dao (2023), appendix E.3.2.
    """

    def __init__(
        self,
        tokens: NDArray[np.uint8],
        spans: NDArray[np.int64],
        length: int,
        seed: int,
        *,
        both_strands: bool = False,
        first_length: int = 0,
        stage_steps: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        first_length = first_length or length
        doublings = max(0, (length // max(1, first_length)).bit_length() - 1)
        if length < 1 or first_length << doublings != length:
            raise ConfigError(
                f"sampler: wanted a first length that doubles up to length = {length}, got {first_length}; e.g. "
                f"{length // 8}"
            )
        self.tokens, self.length, self.seed, self.both_strands = tokens, length, seed, both_strands
        self.first_length, self.stage_steps = first_length, stage_steps
        self.rank, self.world, self.position = rank, world, 0
        sizes = spans[:, 1] - spans[:, 0]
        longest = int(sizes.max()) if len(sizes) else 0
        if longest < length + 1:
            raise DataError(
                f"dna: wanted a stretch of at least length + 1 = {length + 1} bases, got {longest} at most: the window "
                "is longer than every record; take a smaller train.length"
            )
        self._bases = int(sizes.sum())
        self._layouts: dict[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = {}
        for lengths in range(doublings + 1):
            window = first_length << lengths
            whole = (sizes - 1) // window
            # One window less leaves room for a phase of up to a window, where there are several.
            count = np.where(whole > 1, whole - 1, np.maximum(whole, 0))
            kept = count > 0
            slack = np.minimum(sizes[kept] - 1 - count[kept] * window, window)
            self._layouts[window] = spans[kept, 0], np.cumsum(count[kept]), slack
        self.windows_per_epoch = int(self._layouts[length][1][-1])

    @property
    def epoch(self) -> float:
        """How many times the spans have been gone through."""
        return self.position / self.windows_per_epoch

    def starts(self, positions: NDArray[np.int64], window: int) -> NDArray[np.int64]:
        """The first base of the windows of a length at these places of the endless order."""
        begin, until, slack = self._layouts[window]
        total = int(until[-1])
        starts = np.empty_like(positions)
        for epoch in np.unique(positions // total):
            here = positions // total == epoch
            number = permute(positions[here] % total, total, self.seed ^ window, int(epoch))
            span = np.searchsorted(until, number, side="right")
            place = number - np.where(span > 0, until[span - 1], 0)
            phase = hashed(self.seed ^ window, np.array([epoch], np.int64))[0]
            starts[here] = begin[span] + place * window + (phase * (slack[span] + 1)).astype(np.int64)
        return starts

    def next_batch(self, batch_size: int) -> NDArray[np.int64]:
        """The next windows of this rank; all ranks must ask for as many, and together they get `world` times that.

        Args:
            batch_size: windows of the full length for this rank, the same in every call.

        Returns:
            (batch_size, length + 1) int64; in the warm-up (batch_size k, length / k + 1).
        """
        window = self.length
        if self.stage_steps:
            update = self.position // (batch_size * self.world)
            window = min(self.first_length << min(update // self.stage_steps, 62), self.length)
        more = self.length // window
        first = (self.position + self.rank * batch_size) * more
        self.position += batch_size * self.world
        positions = np.arange(first, first + batch_size * more, dtype=np.int64)
        starts = self.starts(positions, window)
        windows = np.stack([self.tokens[start : start + window + 1] for start in starts])
        if self.both_strands:
            other = hashed(~self.seed, positions) < 0.5
            windows[other] = reverse_complement(windows[other])
        return windows.astype(np.int64)

    def state_dict(self) -> dict[str, int]:
        """The position, and what it counts in."""
        return {
            "position": self.position,
            "length": self.length,
            "seed": self.seed,
            "tokens": self._bases,
            "first_length": self.first_length,
            "stage_steps": self.stage_steps,
            "both_strands": int(self.both_strands),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position.

        Raises:
            DataError: the state counts windows of another length, seed or genome.
        """
        check_state(self.state_dict(), state)
        self.position = state["position"]
