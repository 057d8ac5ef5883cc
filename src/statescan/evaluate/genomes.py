"""What a model of DNA says of a genome: the likelihood of each base, the effect of variants, vectors of sequences."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from statescan.data.dna import UNKNOWN, Genome, open_lines, reverse_complement
from statescan.data.tokenizer import DNA_LETTERS, DnaTokenizer
from statescan.errors import ConfigError, DataError
from statescan.evaluate.likelihood import row_bits

__all__ = [
    "Variant",
    "base_log_likelihoods",
    "bed_graph",
    "embed_records",
    "embed_sequence",
    "read_vcf",
    "region_log_likelihoods",
    "variant_effects",
]

# Bases of a piece where the state is carried.
_PIECE = 1 << 16


def base_log_likelihoods(
    model: nn.Module, ids: NDArray[Any], *, context: int | None = None, both_strands: bool = False
) -> NDArray[np.float64]:
    """log p(base | the bases before it), nats, of every base of a sequence.

    Args:
        model: a `statescan.models.CausalLM` of bases, in evaluation mode.
        ids: (bases,) A C G T N as 0 to 4.
        context: bases of a window, which follow each other, each from an empty context. Default: the state is carried
            through the sequence, so that the context is all that came before.
        both_strands: the mean with what the model says of the same base reading the other strand.

    Returns:
        (bases,): NaN where nothing is said: on the first base read, and on unknown ones.

    Raises:
        ConfigError: a context below 1.
    """
    if context is not None and context < 1:
        raise ConfigError(f"likelihoods: context must be at least 1, got {context}")
    said = np.full(len(ids), np.nan)
    where = next(model.parameters()).device
    stretches = [(0, len(ids) - 1)]
    if context is not None:
        stretches = [(start, min(context, len(ids) - 1 - start)) for start in range(0, len(ids) - 1, context)]
    with torch.no_grad():
        for start, length in stretches:
            if length < 1:
                continue
            for offset, bits in row_bits(model, ids, [start], length, min(length, _PIECE), where):
                first = start + 1 + offset
                said[first : first + bits.shape[1]] = -math.log(2) * bits[0]
    said[np.asarray(ids) == UNKNOWN] = np.nan
    if both_strands:
        other = base_log_likelihoods(model, reverse_complement(np.asarray(ids)), context=context)[::-1]
        said = _both(said, other)
    return said


def region_log_likelihoods(
    model: nn.Module,
    record: NDArray[Any],
    start: int,
    end: int,
    *,
    context: int | None = None,
    both_strands: bool = False,
) -> NDArray[np.float64]:
    """What `base_log_likelihoods` of a whole record says of the bases [start, end), read no further than that takes.

    Args:
        model, context, both_strands: as there. With a context the windows are those of the record, the first at its
            start, so that a base is said to be as likely whatever is asked for beside it.
        record: (bases,) ids of the whole record, memory-mapped or not.
        start, end: 0 <= start < end <= bases.

    Returns:
        (end - start,).
    """
    # The window that predicts the base at `start`; without a context all before it.
    first = 0 if context is None else max(0, (start - 1) // context * context)
    said = base_log_likelihoods(model, record[first:end], context=context)[start - first :]
    if not both_strands:
        return said
    # The same from the record's other end.
    low, high = len(record) - end, len(record) - start
    first = 0 if context is None else max(0, (low - 1) // context * context)
    turned = reverse_complement(np.asarray(record[start : len(record) - first]))
    other = base_log_likelihoods(model, turned, context=context)[low - first : high - first][::-1]
    return _both(said, other)


def _both(said: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    # Where one strand says nothing, at an end, the other one does.
    return np.where(np.isnan(said), other, np.where(np.isnan(other), said, (said + other) / 2))


def bed_graph(record: str, start: int, said: NDArray[np.float64]) -> Iterator[str]:
    """Lines of a bedGraph: record, start, end, log-likelihood to four digits; bases that say the same become one line.

    Args:
        record: name of the record.
        start: where in it the first base of `said` lies.
        said: from `base_log_likelihoods`; where it is NaN there is no line.
    """
    texts = [None if math.isnan(value) else f"{value:.4f}" for value in said.tolist()]
    begun = 0
    for place in range(1, len(texts) + 1):
        if place == len(texts) or texts[place] != texts[begun]:
            if texts[begun] is not None:
                yield f"{record}\t{start + begun}\t{start + place}\t{texts[begun]}\n"
            begun = place


def embed_sequence(model: nn.Module, ids: NDArray[Any], *, both_strands: bool = False) -> NDArray[np.float32]:
    """One vector for a sequence of any length: the mean over its bases of what the model's last norm gives.

    Args:
        model: a `statescan.models.CausalLM` of bases, in evaluation mode.
        ids: (bases,) A C G T N as 0 to 4, at least one.
        both_strands: the mean with the vector of the other strand.

    Returns:
        (d_model,) float32.
    """
    return _embed(model, np.asarray(ids)[None], both_strands)[0]


def embed_records(
    model: nn.Module, genome: Genome, *, both_strands: bool = False
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """What `embed_sequence` gives of every record; records of one length go through the model together.

    Yields:
        The numbers of some records, (rows,), and their vectors, (rows, d_model). Each record comes once.
    """
    sizes = np.diff(genome.offsets)
    order = np.argsort(sizes, kind="stable")
    for alike in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1):
        size = int(sizes[alike[0]])
        rows = max(1, _PIECE // size)
        for start in range(0, len(alike), rows):
            some = alike[start : start + rows]
            ids = genome.tokens[genome.offsets[some, None] + np.arange(size)]
            yield some, _embed(model, ids, both_strands)


@torch.no_grad()
def _embed(model: nn.Module, ids: NDArray[Any], both_strands: bool) -> NDArray[np.float32]:
    """(rows, d_model) of sequences of one length, (rows, bases)."""
    where, (rows, length) = next(model.parameters()).device, ids.shape
    state: Any = None if length <= _PIECE else model.init_state(rows)  # type: ignore[operator]
    total: Any = 0.0
    for start in range(0, length, _PIECE):
        piece = torch.from_numpy(ids[:, start : start + _PIECE].astype(np.int64)).to(where)
        output = model.backbone(piece, state=state)  # type: ignore[operator]
        state = output.state
        total = total + output.hidden.double().sum(1)
    vectors = (total / length).float().cpu().numpy()
    if both_strands:
        return (vectors + _embed(model, reverse_complement(ids), False)) / 2
    return vectors


class Variant(NamedTuple):
    """A line of a VCF: its fields as they stand, and where it stood ("file:number")."""

    fields: list[str]
    where: str

    @property
    def alternatives(self) -> list[str]:
        """The alleles beside the reference."""
        return self.fields[4].split(",")


def read_vcf(path: str | os.PathLike[str]) -> Iterator[str | Variant]:
    """The lines of a VCF, plain or .gz: those of its head as text, then its variants, one at a time.

    Raises:
        DataError: the file can't be read, is cut short, has no line #CHROM before its variants, or a line is no
            variant.
    """
    headed = False
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.startswith("#"):
                    headed = headed or line.startswith("#CHROM")
                    yield line
                    continue
                if not line.strip():
                    continue
                fields = line.rstrip("\r\n").split("\t")
                if not headed or len(fields) < 8 or not fields[1].isdecimal() or int(fields[1]) < 1:
                    wanted = "a variant" if headed else "the line that begins with #CHROM, and then variants"
                    raise DataError(
                        f"vcf: {path}:{number}: wanted {wanted}, CHROM POS ID REF ALT QUAL FILTER INFO with tabs "
                        f"between, got {line.strip()[:80]!r}"
                    )
                yield Variant(fields, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise DataError(f"vcf: '{path}' is cut short or damaged ({problem}); copy it again") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"vcf: '{path}' can't be read ({problem})") from None
    if not headed:
        raise DataError(f"vcf: wanted a VCF, whose head ends with a line #CHROM, in '{path}', got none; is it whole?")


def variant_effects(
    model: nn.Module,
    genome: Genome,
    variants: Iterable[Variant],
    *,
    context: int = 512,
    both_strands: bool = True,
    batch: int = 64,
) -> Iterator[tuple[Variant, list[float | None]]]:
    """log p(alternative) - log p(reference), nats, of every alternative of variants.

    Both alleles are read within `context` bases of the reference on either side, as many as there are, and the
    log-likelihoods of all bases are summed: so the ratio holds how likely the allele is after what comes before it, and
    how likely it makes what follows. Negative: the model expects the alternative less.

    Args:
        model: a `statescan.models.CausalLM` of bases, in evaluation mode.
        genome: the reference.
        variants: on it.
        context: bases on either side.
        both_strands: the mean of the ratios of both strands. Default True.
        batch: variants that are judged together.

    Yields:
        Each variant with a number for each alternative; None where it is not spelt out (<DEL>, *, breakends), or where
        one of the two holds an unknown base, of whose likelihood nothing is said. Unknown is what the genome was read
        so: N, codes of several bases, and lower case where its tokenizer has soft_masked="n".

    Raises:
        DataError: no such record, or the reference allele is not what the genome holds there, as far as that is known.
        ConfigError: a context below 1.
    """
    if context < 1:
        raise ConfigError(f"variants: context must be at least 1, got {context}")
    tokenizer = DnaTokenizer()
    some: list[tuple[Variant, list[NDArray[np.uint8] | None]]] = []
    for variant in variants:
        some.append((variant, _alleles(genome, variant, context, tokenizer)))
        if len(some) == batch:
            yield from _effects(model, some, both_strands)
            some = []
    if some:
        yield from _effects(model, some, both_strands)


def _alleles(genome: Genome, variant: Variant, context: int, tokenizer: DnaTokenizer) -> list[NDArray[np.uint8] | None]:
    """What is read of a variant: the reference's allele in its surroundings, then each alternative's."""
    record, position, reference = variant.fields[0], int(variant.fields[1]) - 1, variant.fields[3]
    try:
        number = genome.number(record)
    except DataError as problem:
        raise DataError(f"vcf: {variant.where}: {problem}") from None
    size = int(genome.offsets[number + 1] - genome.offsets[number])
    end = position + len(reference)
    expected = _spelt(reference, tokenizer)
    there = genome.fetch(record, position, end) if end <= size else None
    if expected is None or there is None or ((expected != there) & (there != UNKNOWN)).any():
        got = "the end of the record" if there is None else tokenizer.decode(there)
        raise DataError(
            f"vcf: {variant.where}: wanted a REF that the genome holds at {record}:{position + 1}, got '{reference}', "
            f"where it holds {got}; is it the genome that the variants were called on?"
        )
    before = genome.fetch(record, max(0, position - context), position) if position else expected[:0]
    after = genome.fetch(record, end, min(size, end + context)) if end < size else expected[:0]
    alleles: list[NDArray[np.uint8] | None] = [there, *(_spelt(text, tokenizer) for text in variant.alternatives)]
    # Unknown bases count nothing, so that an allele with one would seem likelier than any without.
    alleles = [None if allele is None or UNKNOWN in allele else allele for allele in alleles]
    return [None if allele is None else np.concatenate([before, allele, after]) for allele in alleles]


def _spelt(text: str, tokenizer: DnaTokenizer) -> NDArray[np.uint8] | None:
    """The ids of an allele; None where it is not written in bases."""
    if not text or set(text.upper()) - set(DNA_LETTERS):
        return None
    return tokenizer.encode(text)


def _effects(
    model: nn.Module, some: Sequence[tuple[Variant, list[NDArray[np.uint8] | None]]], both_strands: bool
) -> Iterator[tuple[Variant, list[float | None]]]:
    where = next(model.parameters()).device
    # Sequences of one length go through the model together.
    alike: dict[int, list[tuple[int, int]]] = {}
    for row, (_, alleles) in enumerate(some):
        for column, allele in enumerate(alleles):
            if allele is not None:
                alike.setdefault(len(allele), []).append((row, column))
    said: dict[tuple[int, int], float] = {}
    for length, places in alike.items():
        rows = np.array([some[row][1][column] for row, column in places], np.uint8)
        total = _totals(model, rows, length, where)
        if both_strands:
            total = (total + _totals(model, reverse_complement(rows), length, where)) / 2
        said.update(zip(places, total.tolist(), strict=True))
    for row, (variant, alleles) in enumerate(some):
        reference = said.get((row, 0))
        yield (
            variant,
            [
                None if alleles[i] is None or reference is None else said[row, i] - reference
                for i in range(1, len(alleles))
            ],
        )


def _totals(model: nn.Module, rows: NDArray[np.uint8], length: int, where: torch.device) -> NDArray[np.float64]:
    """(rows,): the log-likelihood of each, without its first base and the unknown ones."""
    total = np.zeros(len(rows))
    if length < 2:
        return total
    flat, starts = rows.ravel(), [length * row for row in range(len(rows))]
    with torch.no_grad():
        for offset, bits in row_bits(model, flat, starts, length - 1, length - 1, where):
            known = rows[:, offset + 1 : offset + 1 + bits.shape[1]] != UNKNOWN
            total -= math.log(2) * np.where(known, bits, 0.0).sum(1)
    return total
