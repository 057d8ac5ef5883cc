"""What a model says of a genome, beside what its logits say one by one."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from statescan.data import DnaTokenizer, Genome, reverse_complement
from statescan.errors import ConfigError, DataError
from statescan.evaluate import evaluate_tokens, genomes
from statescan.evaluate.genomes import (
    Variant,
    base_log_likelihoods,
    bed_graph,
    embed_sequence,
    read_vcf,
    region_log_likelihoods,
    variant_effects,
)
from statescan.models import CausalLM, MambaConfig

pytest.importorskip("dnaio")


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    made = CausalLM(MambaConfig(d_model=16, n_layer=2, vocab_size=5, initializer_range=0.5)).double().eval()
    return made


def bases(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, count).astype(np.uint8)


def naive(model: CausalLM, ids: np.ndarray) -> np.ndarray:
    """log p of every base but the first, by the logits of the whole sequence."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits
    said = torch.log_softmax(logits.float(), -1)[0, :-1].double()
    return said.gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0].numpy()


def test_every_base_from_all_that_came_before_in_pieces(model, monkeypatch) -> None:
    ids = bases(101)
    ids[40:43] = 4
    expected = naive(model, ids)
    expected[ids[1:] == 4] = np.nan
    for piece in (7, 100, 1000):
        monkeypatch.setattr(genomes, "_PIECE", piece)
        said = base_log_likelihoods(model, ids)
        assert np.isnan(said[0])
        np.testing.assert_allclose(said[1:], expected, rtol=1e-5, atol=1e-6)


def test_windows_start_from_nothing(model) -> None:
    ids = bases(50)
    said = base_log_likelihoods(model, ids, context=20)
    for start, end in ((0, 21), (20, 41), (40, 50)):
        np.testing.assert_allclose(said[start + 1 : end], naive(model, ids[start:end]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="context must be at least 1, got 0"):
        base_log_likelihoods(model, ids, context=0)


def test_both_strands_are_the_mean_and_fill_the_ends(model) -> None:
    ids = bases(30)
    one, other = base_log_likelihoods(model, ids), base_log_likelihoods(model, reverse_complement(ids))[::-1]
    both = base_log_likelihoods(model, ids, both_strands=True)
    np.testing.assert_allclose(both[1:-1], (one + other)[1:-1] / 2)
    assert (both[0], both[-1]) == (other[0], one[-1])
    turned = base_log_likelihoods(model, reverse_complement(ids), both_strands=True)
    np.testing.assert_allclose(turned, both[::-1], rtol=1e-6)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("context", [None, 1, 20, 200])
def test_a_region_says_what_the_whole_record_says_of_it(model, context, both) -> None:
    ids = bases(101)
    ids[60:63] = 4
    whole = base_log_likelihoods(model, ids, context=context, both_strands=both)
    for start, end in ((0, 101), (0, 1), (1, 2), (20, 21), (21, 40), (55, 70), (100, 101)):
        said = region_log_likelihoods(model, ids, start, end, context=context, both_strands=both)
        np.testing.assert_allclose(said, whole[start:end], rtol=1e-5, atol=1e-6)


def test_track_lines() -> None:
    said = np.array([np.nan, -1.0, -1.00001, -2.0, np.nan, -0.5])
    assert list(bed_graph("chr", 10, said)) == [
        "chr\t11\t13\t-1.0000\n",
        "chr\t13\t14\t-2.0000\n",
        "chr\t15\t16\t-0.5000\n",
    ]
    assert list(bed_graph("chr", 0, np.array([np.nan]))) == []


def test_vector_of_a_sequence_in_pieces(model, monkeypatch) -> None:
    ids = bases(60)
    with torch.no_grad():
        expected = model.backbone(torch.from_numpy(ids.astype(np.int64))[None]).hidden[0].mean(0).numpy()
    for piece in (13, 60, 61):
        monkeypatch.setattr(genomes, "_PIECE", piece)
        vector = embed_sequence(model, ids)
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)
    both = embed_sequence(model, ids, both_strands=True)
    np.testing.assert_allclose(both, embed_sequence(model, reverse_complement(ids), both_strands=True), rtol=1e-5)


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    path = tmp_path / "g.fa"
    path.write_text(f">c1\n{DnaTokenizer().decode(bases(80, 1))}\n>c2\nAACCGGTT\n")
    return Genome(path, cache=tmp_path / "cache")


def lines(path: Path, *rows: str) -> list[Variant]:
    path.write_text(
        "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n" + "".join(rows), encoding="utf-8"
    )
    return [line for line in read_vcf(path) if isinstance(line, Variant)]


@pytest.mark.parametrize("both", [False, True])
def test_effects_of_variants(model, genome, tmp_path, both) -> None:
    letters = DnaTokenizer().decode(genome.fetch("c1"))
    other = {"A": "C", "C": "A", "G": "T", "T": "G"}
    reference = letters[29]
    found = lines(
        tmp_path / "v.vcf",
        f"c1\t30\t.\t{reference}\t{other[reference]},{reference}AC,<DEL>\t.\t.\tDP=3\n",
        f"c1\t1\trs1\t{letters[0]}\t{other[letters[0]]}\t.\t.\t.\n",
        f"c1\t40\t.\t{letters[39:42]}\t{letters[39].lower()}\t.\t.\t.\n",
        "c2\t8\t.\tT\tG\t.\t.\t.\n",
    )
    context = 10

    def total(text: str) -> float:
        ids = DnaTokenizer().encode(text)
        value = naive(model, ids).sum()
        return float((value + naive(model, reverse_complement(ids)).sum()) / 2 if both else value)

    def ratio(text: str, place: int, length: int, new: str) -> float:
        low, high = text[max(0, place - context) : place], text[place + length : place + length + context]
        return total(low + new + high) - total(low + text[place : place + length] + high)

    got = list(variant_effects(model, genome, found, context=context, both_strands=both, batch=3))
    assert [variant for variant, _ in got] == found
    first = got[0][1]
    assert first[2] is None
    expected = [ratio(letters, 29, 1, other[reference]), ratio(letters, 29, 1, reference + "AC")]
    np.testing.assert_allclose(first[:2], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1][1], [ratio(letters, 0, 1, other[letters[0]])], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[2][1], [ratio(letters, 39, 3, letters[39])], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[3][1], [ratio("AACCGGTT", 7, 1, "G")], rtol=1e-4, atol=1e-5)


def test_a_vcf_is_read_by_what_is_in_it(tmp_path) -> None:
    row = "c1\t2\t.\tC\tA\t.\t.\t.\n"
    plain = lines(tmp_path / "plain.vcf.gz", row)
    packed = tmp_path / "packed.vcf"
    packed.write_bytes(gzip.compress((tmp_path / "plain.vcf.gz").read_bytes()))
    assert [v.fields for v in plain] == [v.fields for v in read_vcf(packed) if isinstance(v, Variant)]
    assert len(plain) == 1


def test_nothing_is_said_of_alleles_with_unknown_bases(model, tmp_path) -> None:
    path = tmp_path / "n.fa"
    path.write_text(">c1\nACGTNACGT\n")
    genome = Genome(path, cache=tmp_path / "cache")
    found = lines(
        tmp_path / "v.vcf",
        "c1\t2\t.\tC\tN,A,AN\t.\t.\t.\n",
        "c1\t5\t.\tN\tA,N\t.\t.\t.\n",
        "c1\t4\t.\tTN\tT\t.\t.\t.\n",
    )
    ratios = [ratios for _, ratios in variant_effects(model, genome, found)]
    assert ratios[0][0] is None
    assert ratios[0][1] is not None
    assert ratios[0][2] is None
    assert ratios[1:] == [[None, None], [None]]


def test_soft_masked_bases_are_unknown_where_asked(model, tmp_path) -> None:
    path = tmp_path / "m.fa"
    path.write_text(">c1\nACGTacgtRCGTTGCA\n")
    masked = Genome(path, DnaTokenizer("n"), cache=tmp_path / "cache")
    plain = Genome(path, cache=tmp_path / "cache")
    # A VCF's letters mean the same in either case; a code of several bases is one of them in a VCF.
    found = lines(
        tmp_path / "v.vcf",
        "c1\t2\t.\tC\tt\t.\t.\t.\n",
        "c1\t6\t.\tC\tT\t.\t.\t.\n",
        "c1\t4\t.\tTA\tT\t.\t.\t.\n",
        "c1\t9\t.\tA\tG\t.\t.\t.\n",
        "c1\t12\t.\tT\tC\t.\t.\t.\n",
    )
    said = [ratios[0] for _, ratios in variant_effects(model, masked, found, context=4)]
    assert [value is None for value in said] == [False, True, True, True, False]
    seen = [ratios[0] for _, ratios in variant_effects(model, plain, found, context=4)]
    assert [value is None for value in seen] == [False, False, False, True, False]
    # The surroundings are read so, too: of the last one four unknown bases stand in its context of either.
    hidden = tmp_path / "h.fa"
    hidden.write_text(">c1\nACGTNNNNNCGTTGCA\n")
    expected = variant_effects(model, Genome(hidden, cache=tmp_path / "cache"), [found[0], found[4]], context=4)
    assert [said[0], said[4]] == [ratios[0] for _, ratios in expected]
    assert said[0] != seen[0]
    with pytest.raises(DataError, match="wanted a REF that the genome holds at c1:4, got 'CA', where it holds TN"):
        list(variant_effects(model, masked, lines(tmp_path / "v.vcf", "c1\t4\t.\tCA\tT\t.\t.\t.\n")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("c3\t1\t.\tA\tC\t.\t.\t.\n", r"v\.vcf:3: .*got 'c3', which none has"),
        (
            "c2\t1\t.\tG\tC\t.\t.\t.\n",
            r"v\.vcf:3: wanted a REF that the genome holds at c2:1, got 'G', where it holds A",
        ),
        ("c2\t8\t.\tTT\tC\t.\t.\t.\n", "where it holds the end of the record"),
        ("c2\t0\t.\tT\tC\t.\t.\t.\n", r"v\.vcf:3: wanted a variant"),
        ("c2\t\u00b2\t.\tA\tC\t.\t.\t.\n", r"v\.vcf:3: wanted a variant"),
        ("c2 8 T C\n", r"v\.vcf:3: wanted a variant, CHROM POS"),
    ],
)
def test_variants_that_do_not_fit(model, genome, tmp_path, row, message) -> None:
    with pytest.raises(DataError, match=message):
        list(variant_effects(model, genome, lines(tmp_path / "v.vcf", row)))


def test_records_are_judged_apart_and_unknown_bases_not_at_all(model) -> None:
    parts = [bases(n, n) for n in (30, 17, 1, 30)]
    parts[1][5:8] = 4
    bounds = np.cumsum([0, *map(len, parts)])
    tokenizer = DnaTokenizer()
    every = []
    for part in parts:
        for start in range(0, len(part) - 1, 12):
            window = part[start : start + 13]
            said = -naive(model, window) / np.log(2)
            every += said[window[1:] != 4].tolist()
    judged = evaluate_tokens(model, np.concatenate(parts), tokenizer=tokenizer, context=12, documents=bounds)
    assert judged.tokens == judged.bytes == len(every) == 30 + 17 + 1 + 30 - 4 - 3
    assert judged.bits_per_byte == pytest.approx(np.mean(every), rel=1e-5)
    assert sum(bucket.count for bucket in judged.by_position) == len(every)
    carried = evaluate_tokens(
        model, np.concatenate(parts), tokenizer=tokenizer, context=7, carry_state=True, documents=bounds
    )
    known = [-naive(model, part)[part[1:] != 4] / np.log(2) for part in parts]
    assert carried.bits_per_byte == pytest.approx(np.concatenate(known).mean(), rel=1e-5)
    with pytest.raises(DataError, match="got unknown ones alone"):
        evaluate_tokens(model, np.full(9, 4, np.uint8), tokenizer=tokenizer)
