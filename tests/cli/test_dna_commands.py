"""DNA on the command line: from FASTA to a trained, judged model, vectors, a track and variants' effects."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from statescan.data import DnaTokenizer
from statescan.evaluate.genomes import embed_sequence
from statescan.models import CausalLM, MambaConfig

pytest.importorskip("dnaio")

Run = Callable[..., tuple[int, str, str]]
SMALL = [
    f"--set={text}"
    for text in (
        "model.d_model=8",
        "model.n_layer=1",
        "train.steps=6",
        "train.batch_size=4",
        "train.length=64",
        "train.first_length=16",
        "train.stage_steps=2",
        "train.log_every=2",
        "train.accelerator=cpu",
        "train.threads=1",
    )
]


def letters(count: int, seed: int) -> str:
    return "".join("ACGT"[i] for i in np.random.default_rng(seed).integers(0, 4, count))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("genome") / "genome.fa.gz"
    # Soft-masked and unknown bases and a record shorter than a window are what genomes hold.
    text = f">chr1 first\n{letters(3000, 0)}\n>chr2\n{letters(900, 1).lower()}NNNRY\n>scrap\nACGT\n"
    path.write_bytes(gzip.compress(text.encode()))
    return path


@pytest.fixture(scope="module")
def trained(genome: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that some tests read."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    CausalLM(MambaConfig(d_model=8, n_layer=1, vocab_size=5)).save_pretrained(folder)
    DnaTokenizer().save(folder)
    return folder


def test_trains_tells_and_goes_on_to_the_same_bits(run: Run, genome: Path, tmp_path: Path) -> None:
    trained = tmp_path / "run"
    code, _, err = run("train", "--modality", "dna", "--data", genome, "--out", trained, *SMALL)
    assert code == 0, err
    held = json.loads((trained / "run.json").read_text())
    assert held["config"]["model"]["vocab_size"] == 5
    assert held["data"]["records"] == 3
    code, shown, err = run(
        "train", "--resume", "--modality", "dna", "--out", trained, "--set", "train.steps=8", "--json"
    )
    assert code == 0
    told = json.loads(shown)
    assert told["steps"] == 8
    assert 1.5 < told["bits_per_base"] < 4
    assert "resuming" in err
    # The same in one go; --resume without the modality knows it from the run.
    other = tmp_path / "other"
    code, shown, _ = run(
        "train", "--modality", "dna", "--data", genome, "--out", other, *SMALL, "--set", "train.steps=4"
    )
    assert (code, "bits per base" in shown, "nats per base" in shown) == (0, True, True)
    code, _, err = run("train", "--resume", "--out", other, "--set", "train.steps=6", "--set", "train.stage_steps=1")
    assert (code, "wanted train.stage_steps = 2, with which the run began, got 1" in err) == (1, True), err
    code, _, _ = run("train", "--resume", "--out", other, "--set", "train.steps=6")
    assert code == 0
    assert (other / "log.csv").read_text().splitlines()[1:3] == (trained / "log.csv").read_text().splitlines()[1:3]


def test_unknown_bases_are_read_and_not_learnt(run: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "n.fa", tmp_path / "run"
    path.write_text(">n\n" + "AN" * 2000 + "\n")
    more = ["--set", "train.steps=40", "--set", "train.lr=0.03", "--set", "train.warmup=0"]
    code, _, err = run("train", "--modality", "dna", "--data", path, "--out", out, *SMALL, *more)
    assert code == 0, err
    model = CausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        said = model(torch.tensor([[0, 4] * 20])).logits.float().softmax(-1)[0]
    # Every second base is unknown; what comes after an unknown one is A, or T on the other strand.
    assert float(said[:, 4].max()) < 0.1
    assert float(said[1::2, [0, 3]].sum(-1).min()) > 0.8


def test_regions_of_bed_files_are_held_out_and_trained_on(run: Run, genome: Path, tmp_path: Path) -> None:
    bed = tmp_path / "valid.bed"
    bed.write_text("chr1\t0\t500\nchr2\t100\t300\n")
    line = ("train", "--modality", "dna", "--data", genome, *SMALL, "--set", f"data.valid_regions={bed}")
    code, _, err = run(*line, "--out", tmp_path / "run")
    assert code == 0, err
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (data["valid_tokens"], data["train_tokens"]) == (700, 3000 + 905 + 4 - 700)
    train = tmp_path / "train.bed"
    train.write_text("chr1\t499\t900\n")
    code, _, err = run(*line, "--set", f"data.regions={train}", "--out", tmp_path / "no")
    assert code == 1
    assert "without a base in common, got 1 bases in both" in err
    assert not (tmp_path / "no").exists()


def test_judged_by_record_in_bits_per_base(run: Run, genome: Path, trained: Path) -> None:
    code, shown, _ = run("evaluate", "--model", trained, "--data", genome, "--context", 100, "--json")
    told = json.loads(shown)
    # All bases but the first of each record and the five that are unknown.
    assert (code, told["tokens"]) == (0, 3000 + 900 + 4 - 3)
    assert told["bits_per_byte"] == told["bits_per_token"]
    code, shown, _ = run("evaluate", "--model", trained, "--data", genome, "--carry-state")
    assert (code, "bits per base" in shown) == (0, True)


def test_gaps_are_neither_trained_nor_judged_on(run: Run, tmp_path: Path) -> None:
    path, bed = tmp_path / "g.fa", tmp_path / "v.bed"
    # A chromosome as assemblies have it: the gap before it would be held out, and cut into parts that are no gaps.
    path.write_text(f">chr1\n{'N' * 20000}{letters(2000, 0)}\n>chr2\n{letters(2000, 1).lower()}\n")
    line = ("train", "--modality", "dna", "--data", path, *SMALL)
    code, _, err = run(*line, "--out", tmp_path / "run", "--set", "data.valid_fraction=0.1")
    assert code == 0, err
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert data["train_tokens"] + data["valid_tokens"] == 4000
    bed.write_text("chr1\t100\t20100\n")
    code, _, err = run(*line, "--out", tmp_path / "bed", "--set", f"data.valid_regions={bed}")
    assert code == 0, err
    data = json.loads((tmp_path / "bed" / "run.json").read_text())["data"]
    assert (data["train_tokens"], data["valid_tokens"]) == (3900, 100)
    bed.write_text("chr1\t100\t2100\n")
    code, _, err = run(*line, "--out", tmp_path / "none", "--set", f"data.valid_regions={bed}")
    assert (code, "wanted known bases to judge on, got runs of unknown ones alone; name" in err) == (1, True), err
    path.write_text(f">chr2\n{letters(2000, 1).lower()}\n")
    code, _, err = run(*line, "--out", tmp_path / "none", "--set", "data.soft_masked=n")
    assert (code, "to train on, got runs of unknown ones alone, as lower case is" in err) == (1, True), err
    assert not (tmp_path / "none").exists()


def test_vectors(run: Run, genome: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    code, shown, err = run("embed", genome, "--model", trained, "-o", out, "--json")
    assert code == 0, err
    vectors = np.load(out)
    assert (vectors.shape, vectors.dtype) == ((3, 8), np.float32)
    assert (tmp_path / "vectors.names.txt").read_text() == "chr1\nchr2\nscrap\n"
    assert json.loads(shown)["sequences"] == 3
    assert np.isfinite(vectors).all()
    assert len(np.unique(vectors, axis=0)) == 3


def test_vectors_of_reads_stand_in_their_order(run: Run, trained: Path, tmp_path: Path) -> None:
    """Reads of one length go through the model together, whatever stands between them."""
    reads = [letters(size, seed) for seed, size in enumerate((50, 30, 50, 7, 30, 50))]
    path, out = tmp_path / "r.fa", tmp_path / "v.npy"
    path.write_text("".join(f">r{i}\n{text}\n" for i, text in enumerate(reads)))
    model = CausalLM.from_pretrained(trained).eval()
    for more in ((), ("--both-strands",)):
        code, _, err = run("embed", path, "--model", trained, "-o", out, *more)
        assert code == 0, err
        expected = [embed_sequence(model, DnaTokenizer().encode(text), both_strands=bool(more)) for text in reads]
        np.testing.assert_allclose(np.load(out), expected, rtol=1e-5, atol=1e-6)


def test_track(run: Run, genome: Path, trained: Path, tmp_path: Path) -> None:
    out, bed = tmp_path / "a.bedgraph", tmp_path / "a.bed"
    bed.write_text("chr2\t20\t40\nchr2\t10\t30\n")
    code, shown, err = run("dna", "track", genome, "--model", trained, "-o", out, "--regions", bed)
    assert code == 0, err
    lines = out.read_text().splitlines()
    assert lines[0].startswith("track type=bedGraph")
    covered = [(int(start), int(end)) for _, start, end, _ in (line.split("\t") for line in lines[1:])]
    assert (covered[0][0], covered[-1][1]) == (10, 40)
    assert all(before[1] == after[0] for before, after in pairwise(covered))
    assert "30 bases" in shown
    # The track of all says the same of them.
    code, _, err = run("dna", "track", genome, "--model", trained, "-o", tmp_path / "b.bedgraph")
    assert code == 0, err

    def each(path: Path) -> dict[tuple[str, int], float]:
        rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
        return {(record, place): float(value) for record, a, b, value in rows for place in range(int(a), int(b))}

    some, every = each(out), each(tmp_path / "b.bedgraph")
    assert len(some) == 30
    assert all(abs(value - every[place]) < 2e-4 for place, value in some.items())


def test_records_of_one_name(run: Run, trained: Path, tmp_path: Path) -> None:
    """What goes by the records' order takes them as any others; a track or a VCF, whose lines go by name, can't."""
    path, out = tmp_path / "twice.fa", tmp_path / "out"
    path.write_text(f">chr1\n{letters(40, 0)}\n>chr2\n{letters(30, 1)}\n>chr1 again\n{letters(20, 2)}\n")
    code, _, err = run("embed", path, "--model", trained, "-o", out.with_suffix(".npy"))
    assert code == 0, err
    assert len(np.load(out.with_suffix(".npy"))) == 3
    assert out.with_suffix(".names.txt").read_text().split() == ["chr1", "chr2", "chr1"]
    code, _, err = run("evaluate", "--model", trained, "--data", path)
    assert code == 0, err
    track = ("dna", "track", path, "--model", trained, "-o", out.with_suffix(".bedgraph"))
    code, _, err = run(*track)
    assert code == 1
    assert "got 'chr1', which several have: records 1, 3 of those with bases in " in err
    assert "give each a name of its own" in err
    assert not out.with_suffix(".bedgraph").exists()
    # The one that has its name alone can be asked for.
    bed = tmp_path / "chr2.bed"
    bed.write_text("chr2\t0\t30\n")
    code, _, err = run(*track, "--regions", bed)
    assert code == 0, err


def test_variants(run: Run, genome: Path, trained: Path, tmp_path: Path) -> None:
    reference = letters(3000, 0)[99]
    other = "A" if reference != "A" else "C"
    vcf, out = tmp_path / "a.vcf", tmp_path / "b.vcf"
    head = '##fileformat=VCFv4.2\n##INFO=<ID=DP,Number=1,Type=Integer,Description="x">\n'
    head += "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tS1\n"
    vcf.write_text(
        f"{head}chr1\t100\trs1\t{reference}\t{other},<DEL>\t9\tPASS\tDP=4\tGT\t0/1\n"
        f"chr1\t100\t.\t{reference}\t{reference}\t.\t.\t.\tGT\t0/0\n"
    )
    code, shown, err = run("dna", "variants", vcf, "--genome", genome, "--model", trained, "-o", out)
    assert code == 0, err
    lines = out.read_text().splitlines()
    assert lines[2].startswith("##INFO=<ID=LLR,Number=A,Type=Float")
    assert lines[3].startswith("#CHROM")
    first, second = (line.split("\t") for line in lines[4:])
    assert first[:7] == ["chr1", "100", "rs1", reference, f"{other},<DEL>", "9", "PASS"]
    assert first[7].startswith("DP=4;LLR=")
    assert first[7].endswith(",.")
    assert first[8:] == ["GT", "0/1"]
    assert second[7] in ("LLR=0.0000", "LLR=-0.0000")
    assert "2" in shown
    # Once more, of what came: the same, with nothing said twice.
    again = tmp_path / "c.vcf"
    code, _, err = run("dna", "variants", out, "--genome", genome, "--model", trained, "-o", again)
    assert code == 0, err
    assert again.read_text() == out.read_text()
    # Without variants, and without a head.
    empty = tmp_path / "e.vcf"
    for text, code_, message in (
        (head, 0, "none stand in"),
        ("", 1, "whose head ends with a line #CHROM"),
        ("##fileformat=VCFv4.2\n", 1, "whose head ends with a line #CHROM"),
        ("chr1\t1\t.\tA\tC\t.\t.\t.\n", 1, "wanted the line that begins with #CHROM"),
    ):
        empty.write_text(text)
        code, shown, err = run("dna", "variants", empty, "--genome", genome, "--model", trained, "-o", tmp_path / "e")
        assert (code, message in shown + err) == (code_, True), err
        assert (tmp_path / "e").exists() == (code_ == 0)
        (tmp_path / "e").unlink(missing_ok=True)
    # What goes wrong on the way leaves the file that stood there.
    before = out.read_text()
    vcf.write_text(vcf.read_text() + "chr9\t1\t.\tA\tC\t.\t.\t.\n")
    code, _, err = run("dna", "variants", vcf, "--genome", genome, "--model", trained, "-o", out)
    assert (code, out.read_text()) == (1, before)
    assert f"{vcf}:6: dna: wanted the name of a record, got 'chr9'" in err


def test_lower_case_is_unknown_where_asked(run: Run, genome: Path, trained: Path, tmp_path: Path) -> None:
    # chr2 is soft-masked, its first 900 bases; the model was trained on all.
    hard = tmp_path / "hard.fa"
    hard.write_text(f">chr1\n{letters(3000, 0)}\n>chr2\n{'N' * 905}\n>scrap\nACGT\n")
    vcf = tmp_path / "a.vcf"
    rows = ((name, text[99]) for name, text in (("chr1", letters(3000, 0)), ("chr2", letters(900, 1))))
    vcf.write_text("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
                   + "".join(f"{name}\t100\t.\t{ref}\t{ref}A\t.\t.\t.\n" for name, ref in rows))  # fmt: skip

    def all_of(path: Path, *more: object) -> tuple[np.ndarray, str, str]:
        for line in (
            ("embed", path, "-o", tmp_path / "v.npy"),
            ("dna", "track", path, "-o", tmp_path / "t.bedgraph"),
            ("dna", "variants", vcf, "--genome", path, "-o", tmp_path / "o.vcf", "--json"),
        ):
            code, shown, err = run(*line, "--model", trained, *more)
            assert code == 0, err
        last = (tmp_path / "o.vcf").read_text()
        assert json.loads(shown)["unknown"] == last.count("LLR=.\n")
        return np.load(tmp_path / "v.npy"), (tmp_path / "t.bedgraph").read_text(), last

    asked, expected = all_of(genome, "--soft-masked", "n"), all_of(hard)
    np.testing.assert_array_equal(asked[0], expected[0])
    assert asked[1:] == expected[1:]
    plain = all_of(genome)
    assert (plain[0][1] != asked[0][1]).any()
    assert ("chr2" in plain[1], "chr2" in asked[1]) == (True, False)
    assert (plain[2].count("LLR=.\n"), asked[2].count("LLR=.\n")) == (0, 1)
    code, _, err = run("embed", genome, "--model", trained, "-o", tmp_path / "w.npy", "--soft-masked", "x")
    assert (code, "soft_masked must be one of base, n, got 'x'" in err) == (1, True)


def test_a_long_window_is_timed(run: Run) -> None:
    code, shown, err = run("dna", "window", "--length", 512, "--layers", 1, "--device", "cpu", "--json")
    assert code == 0, err
    told = json.loads(shown)
    assert (told["length"], told["peak_bytes"]) == (512, None)
    assert 1 < told["loss"] < 4


GOOD = gzip.compress(f">a\n{letters(500, 3)}\n".encode(), mtime=0)  # its bytes name a test, alike in all workers


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.fa", b"", "got an empty file"),
        ("p.fa", b">p\nMKLVEFIRST\n", "looks like protein"),
        ("g.fa", b">g\nACGT--ACGT\n", "data.gaps=n"),
        ("t.fa.gz", GOOD[:100], "cut short or damaged"),
        ("s.fa", b">s\nACGTACGT\n", "the window is longer than every record"),
    ],
)
def test_bad_files_get_one_line_and_leave_nothing(run: Run, tmp_path: Path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    code, shown, err = run("train", "--modality", "dna", "--data", tmp_path / name, "--out", tmp_path / "run", *SMALL)
    assert (code, shown) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_gaps_are_read_as_asked(run: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "g.fa").write_text(f">g\n{letters(300, 0)}--{letters(300, 1)}\n")
    code, _, err = run(
        "train", "--modality", "dna", "--data", tmp_path / "g.fa", "--out", tmp_path / "run", *SMALL,
        "--set", "data.gaps=drop", "--set", "data.valid_fraction=0",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["tokens"] == 600
    # The same of a model that reads.
    out = tmp_path / "v.npy"
    line = ("embed", tmp_path / "g.fa", "--model", trained, "-o", out)
    code, _, err = run(*line)
    assert (code, "read as unknown with --gaps n, left out with --gaps drop" in err) == (1, True), err
    (tmp_path / "d.fa").write_text(f">g\n{letters(300, 0)}{letters(300, 1)}\n")
    assert run("embed", tmp_path / "d.fa", "--model", trained, "-o", tmp_path / "d.npy")[0] == 0
    for gaps, same in (("drop", True), ("n", False)):
        code, _, err = run(*line, "--gaps", gaps)
        assert code == 0, err
        assert np.array_equal(np.load(out), np.load(tmp_path / "d.npy")) == same
    code, _, err = run("dna", "track", tmp_path / "g.fa", "--model", trained, "-o", tmp_path / "t.bg", "--gaps", "n")
    assert code == 0, err


def test_wrong_lines(run: Run, genome: Path, trained: Path, tmp_path: Path) -> None:
    line = ("train", "--modality", "dna", "--out", tmp_path / "x")
    for more, message in (
        ((), "wanted FASTA or FASTQ, got none"),
        (("--data", genome, "--tokenizer", "bytes"), "--tokenizer is for texts and tasks"),
        (("--data", genome, "--task", "smnist"), "--task is for texts and tasks"),
        (("--data", genome, "--set", "data.packing=true"), "wanted data.packing=false"),
        (("--data", genome, "--set", "train.first_length=8"), "train.stage_steps: wanted > 0 just where"),
    ):
        code, _, err = run(*line, *more)
        assert (code, message in err) == (1, True), err
    code, _, err = run("train", "--modality", "film", "--data", genome, "--out", tmp_path / "x")
    assert "--modality must be one of text, dna" in err
    words = tmp_path / "words"
    small = [text for text in SMALL if "first_length" not in text and "stage_steps" not in text]
    (tmp_path / "a.txt").write_text("it was the whale " * 200)
    assert run("train", "--data", tmp_path / "a.txt", "--out", words, *small)[0] == 0
    code, _, err = run("embed", genome, "--model", words, "-o", tmp_path / "v.npy")
    assert (code, "wanted a model of bases, got" in err) == (1, True)
    code, _, err = run("embed", genome, "--model", trained, "-o", tmp_path / "none" / "v.npy")
    assert (code, "there is no folder" in err) == (1, True)
