"""FASTA, FASTQ and BED in; splits that share no base; windows that stay within them."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest

from statescan.data import (
    DnaTokenizer,
    Genome,
    GenomeSampler,
    Region,
    load_tokenizer,
    read_bed,
    reverse_complement,
    split_regions,
)
from statescan.data import dna as module
from statescan.data.dna import check_apart, outside, without_gaps
from statescan.data.windows import LabelledWindows, window_rows
from statescan.errors import ConfigError, DataError, MissingExtraError

pytest.importorskip("dnaio")


def made(count: int, seed: int = 0) -> str:
    return "".join("ACGT"[i] for i in np.random.default_rng(seed).integers(0, 4, count))


@pytest.fixture
def opened(tmp_path: Path):
    def open_(content: bytes | str, name: str = "a.fa", tokenizer: DnaTokenizer | None = None) -> Genome:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return Genome(path, tokenizer, cache=tmp_path / "cache")

    return open_


TEXT = ">one first record\nacgtN\nRYu\n\n>two\r\nGG\r\nTT\r\n"


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.fa", bytes),
        ("a.fa.gz", gzip.compress),
        ("a.fasta.xz", lzma.compress),
        ("reads", bytes),
        ("unpacked.fa.gz", bytes),
        ("packed.fa", gzip.compress),
    ],
)
def test_records_of_any_packing_by_name(opened, name, pack) -> None:
    genome = opened(pack(TEXT.encode()), name)
    assert genome.names == ["one", "two"]
    assert genome.offsets.tolist() == [0, 8, 12]
    assert genome.fetch("one").tolist() == [0, 1, 2, 3, 4, 4, 4, 3]
    assert genome.fetch("two", 1, 3).tolist() == [2, 3]
    assert genome.tokens.dtype == np.uint8
    assert isinstance(genome.tokens, np.memmap)


def test_blocked_gzip_is_several_members(opened) -> None:
    parts = [TEXT.encode()[i : i + 7] for i in range(0, len(TEXT), 7)]
    assert opened(b"".join(map(gzip.compress, parts)), "a.fa.gz").offsets.tolist() == [0, 8, 12]


def test_a_mark_of_the_byte_order_is_no_letter(opened) -> None:
    genome = opened(b"\xef\xbb\xbf" + TEXT.encode())
    assert (genome.names, genome.offsets.tolist()) == (["one", "two"], [0, 8, 12])
    reads = opened(b"\xef\xbb\xbf@r1\nACGT\n+\nIIII\n", "b.fa")
    assert (reads.names, reads.tokens.tolist()) == (["r1"], [0, 1, 2, 3])


def test_fastq(opened) -> None:
    genome = opened("@r1 x\nACGT\n+\nIIII\n@r2\nNN\n+\nII\n", "a.fq")
    assert (genome.names, genome.tokens.tolist()) == (["r1", "r2"], [0, 1, 2, 3, 4, 4])


def test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, seq=np.array([0, 1, 2, 3, 4], np.uint8), reclen=np.array([2, 3]), names=np.array(["a b", "c"]))
    genome = Genome(path, cache=tmp_path / "cache")
    assert (genome.names, genome.fetch("c").tolist()) == (["a", "c"], [2, 3, 4])
    np.savez(path, seq=np.array([0, 1], np.uint8), reclen=np.array([2, 3]), names=np.array(["a", "c"]))
    with pytest.raises(DataError, match=r"wanted seq .* 5, and 2 names, got 2 uint8"):
        Genome(path, cache=tmp_path / "cache")


def test_a_record_longer_than_a_piece_is_one_document(opened, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 10)
    bases = made(35)
    genome = opened(f">a\n{bases}\n>b\nAC\n")
    assert genome.offsets.tolist() == [0, 35, 37]
    assert DnaTokenizer().decode(genome.fetch("a")) == bases


GOOD = gzip.compress("".join(f">r{i}\n{made(200, i)}\n" for i in range(50)).encode(), mtime=0)  # its bytes name a test
BAD = {
    "empty": (b"", "a.fa", r"wanted records in '.*a\.fa', got an empty file"),
    "header alone": (b">a\n", "a.fa", r"wanted bases, got none"),
    "no header": (b"ACGT\nAC\n", "a.fa", r"wanted FASTA .*or FASTQ.*got neither.*line 1"),
    "prose": (b"hello\n", "a.txt", r"wanted FASTA .*or FASTQ"),
    "truncated": (GOOD[: len(GOOD) // 2], "a.fa.gz", r"a\.fa\.gz: wanted a whole file, got one that is cut short"),
    "damaged": (GOOD[:-8] + bytes([GOOD[-8] ^ 255]) + GOOD[-7:], "a.fa.gz", r"cut short or damaged"),
    "not gzip": (b"ACGT\nAC\n", "a.fa.gz", r"cut short or damaged"),
    "short quality": (b"@r\nACGT\n+\nIII\n", "a.fq", r"FASTQ file at line 4"),
    "protein": (b">p1\nACDEFGHIKLM\n", "a.fa", r"record 'p1', got 'E' at place 4; that looks like protein"),
    "gaps": (b">g\nAC-GT\n", "a.fa", r"record 'g', got '-' at place 3; gaps of an alignment.*data\.gaps=n"),
    "digits": (b">g\nAC1GT\n", "a.fa", r"got '1' at place 3; take it out"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_get_one_clear_line(opened, kind) -> None:
    content, name, message = BAD[kind]
    with pytest.raises(DataError, match=message) as caught:
        opened(content, name)
    assert "\n" not in str(caught.value)


def test_missing_package_is_named(opened, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "dnaio", None)
    with pytest.raises(MissingExtraError, match=r"statescan\[dna\]"):
        opened(TEXT)


def test_tokenizer_cases_gaps_and_its_file(tmp_path: Path) -> None:
    assert DnaTokenizer().encode("acGTuRnN").tolist() == [0, 1, 2, 3, 3, 4, 4, 4]
    assert DnaTokenizer("n").encode("acGTg").tolist() == [4, 4, 2, 3, 4]
    assert DnaTokenizer(gaps="n").encode("A-.C").tolist() == [0, 4, 4, 1]
    assert DnaTokenizer(gaps="drop").encode("A-.C").tolist() == [0, 1]
    assert DnaTokenizer().decode([0, 1, 2, 3, 4]) == "ACGTN"
    DnaTokenizer("n", "drop").save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (repr(again), again.fingerprint) == ("DnaTokenizer(soft_masked='n', gaps='drop')", "dna n drop")
    assert load_tokenizer("dna").fingerprint == DnaTokenizer().fingerprint != again.fingerprint
    with pytest.raises(ConfigError, match="gaps must be one of error, n, drop, got 'x'"):
        DnaTokenizer(gaps="x")
    with pytest.raises(DataError, match=r"ids in \[0, 5\), got 0 to 5"):
        DnaTokenizer().decode([0, 5])


def test_other_strand() -> None:
    tokenizer = DnaTokenizer()
    assert tokenizer.decode(reverse_complement(tokenizer.encode("AACGTN"))) == "NACGTT"
    rows = np.random.default_rng(0).integers(0, 5, (3, 7)).astype(np.uint8)
    assert (reverse_complement(reverse_complement(rows)) == rows).all()


def test_a_bed_by_what_is_in_it(tmp_path: Path) -> None:
    text = "browser position chr1\ntrack name=x\n# a note\ntrack1\t0\t5\nbrowsers\t1\t6\n"
    for name, content in (("a.bed.gz", text.encode()), ("b.bed", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(content)
        assert read_bed(tmp_path / name) == [Region("track1", 0, 5), Region("browsers", 1, 6)]
    (tmp_path / "c.bed.gz").write_bytes(gzip.compress(text.encode())[:30])
    with pytest.raises(DataError, match="cut short or damaged"):
        read_bed(tmp_path / "c.bed.gz")


def test_bed(tmp_path: Path, opened) -> None:
    path = tmp_path / "a.bed"
    path.write_text("track name=x\n# no\n\none\t1\t4\tpeak\t0\none 2 6\ntwo\t0\t4\n")
    regions = read_bed(path)
    assert regions == [Region("one", 1, 4, "peak"), Region("one", 2, 6), Region("two", 0, 4)]
    genome = opened(TEXT)
    # Overlaps are put together, and nothing reaches from one record into the next.
    assert genome.spans(regions).tolist() == [[1, 6], [8, 12]]
    assert genome.spans([Region("one", 4, 8), Region("two", 0, 2)]).tolist() == [[4, 8], [8, 10]]
    for line, message in (
        ("one\t4\t4", r"a\.bed:1: wanted .*0 <= start < end"),
        ("one\tx\t4", r"a\.bed:1: wanted"),
        ("one\t\u00b2\t4", r"a\.bed:1: wanted"),
        ("# nothing", r"wanted intervals in"),
    ):
        path.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_bed(path)
    with pytest.raises(DataError, match=r"0 <= start < end <= 8 in 'one', got 2 to 9"):
        genome.span(Region("one", 2, 9))
    with pytest.raises(DataError, match=r"got 'tow', which none has; is it 'two'\?"):
        genome.span(Region("tow", 0, 1))
    twice = opened(">a\nAC\n>b\nAC\n>none\n>a\nGT\n", "b.fa")
    with pytest.raises(
        DataError, match=r"got 'a', which several have: records 1, 3 of those with bases in '.*b\.fa'; give each a name"
    ):
        twice.number("a")
    # Who asks by place, or for another name, is answered.
    assert twice.number("b") == 1
    assert twice.spans().tolist() == [[0, 2], [2, 4], [4, 6]]
    with pytest.raises(DataError, match=r"records 1, 2, 3, 4 \.\.\. of those"):
        opened(">a\nAC\n" * 5, "c.fa").number("a")


def test_parts_share_no_base_and_hold_all() -> None:
    spans = np.array([[0, 1000], [1000, 1090], [1200, 5000]])
    parts = split_regions(spans, [0.2, 0.1], block=64, seed=3)
    seen = np.zeros(5000, int)
    for part in parts:
        for start, end in part:
            assert any(low <= start and end <= high for low, high in spans), "no stretch crosses the end of a record"
            seen[start:end] += 1
    wanted = np.zeros(5000, int)
    for start, end in spans:
        wanted[start:end] = 1
    assert (seen == wanted).all()
    sizes = [int((part[:, 1] - part[:, 0]).sum()) / wanted.sum() for part in parts]
    assert np.allclose(sizes, [0.2, 0.1, 0.7], atol=0.03)
    assert [p.tolist() for p in split_regions(spans, [0.2, 0.1], block=64, seed=3)] == [p.tolist() for p in parts]
    with pytest.raises(ConfigError, match="shares"):
        split_regions(spans, [0.5, 0.5])


def test_outside_and_overlaps() -> None:
    spans, others = np.array([[0, 10], [20, 30]]), np.array([[2, 4], [8, 22], [29, 40]])
    assert outside(spans, others).tolist() == [[0, 2], [4, 8], [22, 29]]
    check_apart(outside(spans, others), others)
    with pytest.raises(DataError, match="got 7 bases in both"):
        check_apart(spans, others)


@pytest.mark.parametrize("piece", [7, 16, 1 << 20])
def test_assembly_gaps_are_left_out_whatever_the_piece(monkeypatch, piece) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    tokens = np.zeros(120, np.uint8)
    for start, end in ((0, 6), (10, 40), (60, 62), (95, 100)):
        tokens[start:end] = 4
    assert without_gaps(tokens, np.array([[0, 50], [50, 120]]), 5).tolist() == [[6, 10], [40, 50], [50, 120]]


def test_sampler_visits_each_window_once_an_epoch_within_spans() -> None:
    tokens = np.random.default_rng(0).integers(0, 4, 2000).astype(np.uint8)
    # One of them is a base too short for a window and its last target.
    spans = np.array([[10, 333], [400, 432], [500, 1999]])
    sampler = GenomeSampler(tokens, spans, 32, seed=1)
    count = sampler.windows_per_epoch
    for epoch in range(3):
        starts = np.sort(sampler.starts(np.arange(epoch * count, (epoch + 1) * count), 32))
        for start in starts:
            assert any(low <= start and start + 33 <= high for low, high in spans)
        # Windows share one base, no more: no position is a target twice.
        assert (np.diff(starts) >= 32).all()
    batch = sampler.next_batch(4)
    assert batch.shape == (4, 33)
    assert (batch == np.stack([tokens[s : s + 33] for s in sampler.starts(np.arange(4), 32)])).all()


def test_sampler_resumes_and_parts_between_ranks() -> None:
    tokens = np.random.default_rng(0).integers(0, 4, 5000).astype(np.uint8)
    spans = np.array([[0, 5000]])

    def fresh(**more) -> GenomeSampler:
        return GenomeSampler(tokens, spans, 64, 5, both_strands=True, first_length=16, stage_steps=3, **more)

    whole = fresh()
    batches = [whole.next_batch(4) for _ in range(9)]
    # Length warm-up: as many bases in each update.
    assert [b.shape for b in batches] == [(16, 17)] * 3 + [(8, 33)] * 3 + [(4, 65)] * 3
    again = fresh()
    for _ in range(4):
        again.next_batch(4)
    late = fresh()
    late.load_state_dict(again.state_dict())
    assert all((late.next_batch(4) == batch).all() for batch in batches[4:])
    ranks = [fresh(rank=rank, world=2) for rank in range(2)]
    for batch in batches:
        assert (np.concatenate([rank.next_batch(2) for rank in ranks]) == batch).all()
    with pytest.raises(DataError, match="wanted a position saved with"):
        GenomeSampler(tokens, spans, 64, 5).load_state_dict(again.state_dict())


def test_about_half_of_the_windows_are_of_the_other_strand() -> None:
    tokens = np.random.default_rng(0).integers(0, 4, 50_000).astype(np.uint8)
    plain = GenomeSampler(tokens, np.array([[0, 50_000]]), 32, 2)
    both = GenomeSampler(tokens, np.array([[0, 50_000]]), 32, 2, both_strands=True)
    one, other = plain.next_batch(1000), both.next_batch(1000)
    same = (one == other).all(1)
    assert 430 < same.sum() < 570
    assert (reverse_complement(one[~same].astype(np.uint8)) == other[~same]).all()


def test_windows_longer_than_every_record() -> None:
    tokens, spans = np.zeros(100, np.uint8), np.array([[0, 40], [40, 100]])
    with pytest.raises(DataError, match=r"at least length \+ 1 = 65 bases, got 60 at most: the window is longer"):
        GenomeSampler(tokens, spans, 64, 0)
    with pytest.raises(DataError, match="at least 61 bases, got 60 at most"):
        window_rows(spans, 61)
    with pytest.raises(ConfigError, match="wanted a first length that doubles up to length = 32, got 5"):
        GenomeSampler(tokens, spans, 32, 0, first_length=5, stage_steps=1)


def test_rows_of_windows() -> None:
    first, room = window_rows(np.array([[0, 25], [30, 39], [50, 71]]), 10)
    assert first.tolist() == [0, 10, 50, 60]
    assert room.tolist() == [10, 6, 10, 2]
    many, _ = window_rows(np.array([[0, 25], [50, 71]]), 10, 9, seed=1)
    assert sorted(np.unique(many, return_counts=True)[1].tolist()) == [2, 2, 2, 3]
    tokens = np.arange(100, dtype=np.uint8) % 4
    windows = LabelledWindows(tokens, first, room, np.array([0, 0, 1, 1], np.uint8), 2, 10)
    assert (windows.values == np.stack([tokens[f : f + 10] for f in first])).all()
    assert windows.digest != windows.take([0, 1, 3, 2]).digest
    with pytest.raises(DataError, match="must lie within the 100 bases, got up to 101"):
        LabelledWindows(tokens, np.array([90]), np.array([2]), np.array([0], np.uint8), 2, 10)
    with pytest.raises(DataError, match="together must divide the 4 rows"):
        LabelledWindows(tokens, first, room, np.array([0, 0, 1, 1], np.uint8), 2, 10, together=3)
