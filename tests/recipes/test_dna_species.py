"""Species from windows: splits without a base in common, homologues together, unknown bases alike, runs that go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from statescan.data.aligned import AlignedBlocks
from statescan.data.windows import LabelledWindows, window_rows
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.evaluate.kmers import kmer_frequencies, kmer_regression
from statescan.models import BackboneClassifierConfig, CausalLM, MambaConfig
from statescan.recipes import dna_species as recipe
from statescan.recipes.synthetic import interval
from statescan.train.classify import ClassifyConfig, Splits
from statescan.train.config import build_config
from statescan.train.logs import read_csv


def write(path: Path, records: list[np.ndarray]) -> None:
    np.savez(
        path,
        seq=np.concatenate(records).astype(np.uint8),
        reclen=np.array([len(record) for record in records]),
        names=np.array([f"r{i}" for i in range(len(records))]),
    )


@pytest.fixture
def genomes(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    folder = tmp_path / "genomes"
    folder.mkdir()
    for name, gc, size in (("aa", 0.3, 90_000), ("bb", 0.5, 200_000), ("cc", 0.7, 120_000)):
        p = np.array([1 - gc, gc, gc, 1 - gc]) / 2
        write(folder / f"{name}.npz", [draw.choice(4, size - 3000, p=p), draw.choice(4, 3000, p=p)])
    return folder


def shown(windows: LabelledWindows) -> np.ndarray:
    """Which bases any window may show."""
    seen = np.zeros(len(windows.tokens), bool)
    for first, room in zip(windows.first, windows.room, strict=True):
        seen[first : first + room - 1 + windows.length] = True
    return seen


def test_microbes_are_parted_without_a_base_in_common(genomes: Path, tmp_path: Path) -> None:
    splits, names = recipe.microbe_splits(genomes, 256, 100, cache=tmp_path / "cache")
    assert names == ["aa", "bb", "cc"]
    train, valid, test = map(shown, splits)
    assert not (train & valid).any()
    assert not (train & test).any()
    assert not (valid & test).any()
    for part in splits:
        counts = np.bincount(part.labels)
        assert len(set(counts)) == 1, "every species as often"
        ends = np.cumsum([90_000, 200_000, 120_000])
        assert (np.searchsorted(ends, part.first, side="right") == part.labels).all()
    assert len(splits.train) == 300
    with pytest.raises(DataError, match="file for each of at least two species, got 1"):
        recipe.microbe_splits(genomes / "aa.npz", 256, 10, cache=tmp_path / "cache")


def told_by_unknown_bases(splits: Splits) -> float:
    """How many windows of the test are told apart by their number of unknown bases alone, each number standing for the
    label that most training windows with it have (of equals, and of a number never seen, the first)."""
    train, test = splits.train, splits.test
    assert isinstance(train, LabelledWindows)
    assert isinstance(test, LabelledWindows)
    table = np.zeros((train.length + 1, train.classes), int)
    np.add.at(table, ((train.values == 4).sum(1), train.labels), 1)
    return float((table.argmax(1)[(test.values == 4).sum(1)] == test.labels).mean())


def test_unknown_bases_of_microbes_tell_nothing(tmp_path: Path) -> None:
    """N, codes of several bases and lower case differ from assembly to assembly, whatever the species is."""
    pytest.importorskip("dnaio")
    draw = np.random.default_rng(0)
    letters = np.array(list("ACGT"))
    folder = tmp_path / "genomes"
    folder.mkdir()
    for name, share, code in (("aa", 0.0, "N"), ("bb", 0.002, "N"), ("cc", 0.002, "R")):
        bases = letters[draw.integers(0, 4, 120_000)]
        for start in np.flatnonzero(draw.random(len(bases)) < share):
            bases[start : start + draw.integers(1, 40)] = code
        text = "".join(bases)
        (folder / f"{name}.fa").write_text(f">{name}\n{text.lower() if name == 'aa' else text}\n")
    splits, _ = recipe.microbe_splits(folder, 128, 200, cache=tmp_path / "cache")
    assert told_by_unknown_bases(splits) == pytest.approx(1 / 3)
    for part in splits:
        assert isinstance(part, LabelledWindows)
        assert (part.tokens[shown(part)] != 4).all()
        assert (np.bincount(part.labels) == len(part) // 3).all()
    # Lower case is the same base.
    (folder / "aa.fa").write_text((folder / "aa.fa").read_text().upper())
    again, _ = recipe.microbe_splits(folder, 128, 200, cache=tmp_path / "other")
    assert [part.digest for part in again] == [part.digest for part in splits]
    bases = "ACGTN" * 30_000
    (folder / "dd.fa").write_text(f">dd\n{bases}\n")
    with pytest.raises(DataError, match="a stretch of at least 128 bases"):
        recipe.microbe_splits(folder, 128, 200, cache=tmp_path / "cache")


def test_unknown_bases_of_apes_tell_nothing() -> None:
    blocks = aligned(blocks=3000)
    tokens = blocks.tokens.copy()
    draw = np.random.default_rng(1)
    own = blocks.offsets[1]
    for start in draw.integers(own[0], own[-1] - 40, 1200).tolist():
        tokens[start : start + draw.integers(5, 40)] = 4
    blocks = replace(blocks, tokens=tokens)
    assert told_by_unknown_bases(recipe.ape_splits(blocks, 256, 600, mask=False)) > 0.5
    assert told_by_unknown_bases(recipe.ape_splits(blocks, 256, 600)) < 0.4


def aligned(seed: int = 0, species: int = 3, blocks: int = 60) -> AlignedBlocks:
    """Species that differ in one base of twenty and in the lengths of their blocks."""
    draw = np.random.default_rng(seed)
    ancestor = [draw.integers(0, 4, draw.integers(40, 120)) for _ in range(blocks)]
    tokens, offsets, start = [], [], 0
    for number in range(species):
        own = [
            np.where(draw.random(len(b)) < 0.05, draw.integers(0, 4, len(b)), b)[: len(b) - number] for b in ancestor
        ]
        lengths = np.array([len(block) for block in own])
        offsets.append(start + np.concatenate([[0], np.cumsum(lengths)]))
        tokens.append(np.concatenate(own))
        start = int(offsets[-1][-1])
    return AlignedBlocks(list("abc")[:species], np.concatenate(tokens).astype(np.uint8), np.stack(offsets))


def test_apes_are_parted_by_block_and_homologues_go_together() -> None:
    blocks = aligned(blocks=200)
    splits = recipe.ape_splits(blocks, 64, 50, seed=1)
    for number, (low, high) in enumerate(((0, 170), (170, 180), (180, 200))):
        part = splits[number]
        assert isinstance(part, LabelledWindows)
        for first, room, label in zip(part.first, part.room, part.labels, strict=True):
            ends = blocks.offsets[label]
            assert ends[low] <= first
            assert first + room - 1 + 64 <= ends[high]
        assert len(set(np.bincount(part.labels))) == 1
    assert splits.train.together == 3  # type: ignore[union-attr]
    assert len(splits.train) == 150
    rows = splits.train.values.reshape(-1, 3, 64)
    # Of one place, so that most bases agree, up to where a block of one species is shorter; of others a quarter would.
    assert (rows[:, 0, :10] == rows[:, 1, :10]).mean() > 0.75
    with pytest.raises(DataError, match="the window is longer than every record or block"):
        recipe.ape_splits(blocks, 100_000, 1)


def test_words_of_bases() -> None:
    ids = np.array([[0, 1, 0, 1, 4, 3]], np.uint8)  # AC CA AC, then words with an unknown base
    found = kmer_frequencies(ids, 2)
    assert found.shape == (1, 16)
    assert found[0, [1, 4]].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert found.sum() == pytest.approx(1)
    with pytest.raises(ConfigError, match=r"k must be within 1 \.\. 8"):
        kmer_frequencies(ids, 9)


def test_regression_tells_compositions_apart_and_nothing_from_noise(genomes: Path, tmp_path: Path) -> None:
    splits, _ = recipe.microbe_splits(genomes, 256, 60, cache=tmp_path / "cache")
    said = kmer_regression(splits.train, splits.test, 2)  # type: ignore[arg-type]
    assert (said == splits.test.labels).mean() > 0.95
    noise = np.random.default_rng(0).integers(0, 4, 40_000).astype(np.uint8)
    first, room = window_rows(np.array([[0, 40_000]]), 100)
    labels = np.random.default_rng(1).integers(0, 2, len(first)).astype(np.uint8)
    alike = LabelledWindows(noise, first, room, labels, 2, 100)
    said = kmer_regression(alike.take(slice(0, 200)), alike.take(slice(200, 400)), 2)
    assert abs((said == labels[200:400]).mean() - 0.5) < 0.15


def test_regression_on_some_of_the_windows_sees_every_label() -> None:
    draw = np.random.default_rng(0)
    # Four homologues together, each of its own composition; a step of two or four over rows would pass over labels.
    shares = np.full((4, 4), 0.1) + 0.6 * np.eye(4)
    bases = np.concatenate([draw.choice(4, 64, p=shares[i % 4]) for i in range(160)]).astype(np.uint8)
    first = 64 * np.arange(160)
    labels = np.tile(np.arange(4, dtype=np.uint8), 40)
    windows = LabelledWindows(bases, first, np.ones_like(first), labels, 4, 64, together=4)
    test = windows.take(slice(80, 160))
    for most in (80, 40):
        said = kmer_regression(windows.take(slice(0, 160)), test, 1, most=most)
        assert (said == test.labels).mean() > 0.9


# The head of the runs on record, which were there before the other one.
LINEAR = ["model.head=linear", "model.dropout=0.1", "train.labels_from=1"]
SMALL = ["model.backbone.d_model=8", "model.backbone.n_layer=1", "train.batch_size=12", "train.epochs=1"]
SMALL += ["train.precision=float32", "train.accelerator=cpu", "train.threads=1", "rows=24"]


@pytest.mark.parametrize("length", [64, 256, 1024, 4096])
def test_microbes_of_every_length_cost_as_many_bases(length: int) -> None:
    run = recipe.microbe_run(length, 8)
    assert run.train.epochs * (8 * run.rows // run.train.batch_size) == 5120
    assert run.train.batch_size * length == 65_536
    assert run.train.labels_from == 0.75, "the last quarter of the updates learns labels"


def test_heads_and_dropout_are_set_by_overrides() -> None:
    plain, run = recipe.microbe_run(256, 8), recipe.microbe_run(256, 8, overrides=LINEAR)
    assert (plain.model.head, run.model.head, run.model.dropout) == ("likelihood", "linear", 0.1)
    assert plain.name == "microbes-256-scratch-likelihood-seed0"
    assert run.name == "microbes-256-scratch-seed0"
    run = recipe.microbe_run(256, 8, overrides=["model.backbone.embedding_dropout=0.1"])
    assert run.model.backbone.embedding_dropout == 0.1
    assert (plain.train.labels_from, recipe.microbe_run(256, 8, overrides=LINEAR).train.labels_from) == (0.75, 1)


def test_runs_go_on_and_are_tabled(genomes: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", []
    run = recipe.microbe_run(256, 3, overrides=SMALL)
    splits, names = recipe.microbe_splits(genomes, 256, run.rows, cache=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        recipe.dna_species(run, splits, out, species=names, seconds=0, say=lines.append)
    assert recipe.report(out)["rows"] == []
    recipe.dna_species(run, splits, out, species=names, say=lines.append)
    losses = [float(row["loss"]) for row in read_csv(out / run.name / "log.csv")]
    assert len(losses) == 2, "four updates of bases, and two of species"
    assert losses[1] < 1.2 < losses[0]
    stamp = (out / run.name / "model.safetensors").stat().st_mtime_ns
    recipe.dna_species(run, splits, out, species=names, say=lines.append)
    assert (out / run.name / "model.safetensors").stat().st_mtime_ns == stamp, "a finished run is taken as it lies"
    with pytest.raises(CheckpointError, match="is of a run with other settings"):
        recipe.dna_species(recipe.microbe_run(256, 3, overrides=[*SMALL, "train.lr=1e-3"]), splits, out, species=names)
    others, _ = recipe.microbe_splits(genomes, 256, run.rows, seed=1, cache=tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"is of a run with other data \(train.digest = "):
        recipe.dna_species(run, others, out, species=names)
    said = out / run.name / "predictions.npz"
    recipe.dna_species(run, splits, out, species=names, kmers=2, say=lines.append)
    with np.load(said) as held:
        assert int(held["k"]) == 2
    recipe.dna_species(run, splits, out, species=names, say=lines.append)
    blocks = aligned(blocks=200)
    backbone = MambaConfig(d_model=8, n_layer=1, vocab_size=5)
    CausalLM(backbone).save_pretrained(tmp_path / "lm")
    for start in (None, tmp_path / "lm"):
        ape = recipe.ape_run(
            64, backbone, classes=3, pretrained=start is not None, overrides=[o for o in SMALL if "backbone" not in o]
        )
        recipe.dna_species(
            ape, recipe.ape_splits(blocks, 64, ape.rows), out, species=blocks.names, pretrained=start, kmers=2,
            say=lines.append,
        )  # fmt: skip
    # What it started from belongs to it.
    CausalLM(backbone).save_pretrained(tmp_path / "lm")
    with pytest.raises(CheckpointError, match=r"is of a run with other data \(start = "):
        recipe.dna_species(
            ape, recipe.ape_splits(blocks, 64, ape.rows), out, species=blocks.names, pretrained=tmp_path / "lm"
        )
    results = recipe.report(out)
    assert [(row["task"], row["origin"]) for row in results["rows"]] == [
        ("apes", "pretrained"),
        ("apes", "scratch"),
        ("microbes", "scratch"),
    ]
    row = results["rows"][2]
    told = json.loads((out / run.name / "run.json").read_text())["test"]["best"]["accuracy"]
    assert row["right"] / row["judged"] == told
    last = json.loads((out / run.name / "run.json").read_text())["test"]["final"]["accuracy"]
    assert row["right_final"] / row["judged"] == last
    assert np.trace(row["confusion"]) == row["right"]
    assert np.sum(row["confusion"], 1).tolist() == np.bincount(splits.test.labels).tolist()
    with np.load(said) as held:
        words = kmer_regression(splits.train, splits.test, 4)  # type: ignore[arg-type]
        assert (held["kmers"] == words).all()
        assert row["kmers"]["right"] == (words == splits.test.labels).sum()
    # Homologous windows are one draw.
    assert all(ape["judged"] == 3 * ape["loci"] for ape in results["rows"][:2])
    assert isinstance(splits.test, LabelledWindows)
    stretches = set(zip(splits.test.labels.tolist(), (splits.test.first >> 14).tolist(), strict=True))
    assert row["loci"] == len(stretches) < row["judged"]
    assert row["judged"] == len(splits.test)
    table = (out / "results.md").read_text()
    assert f"| microbes | 256 | scratch | likelihood | {recipe.percent(told)} |" in table
    assert "(k = 4)" in table
    # Started from a model of which nothing is known, and from none.
    assert "| apes | 64 | pretrained* | linear |" in table
    assert "| apes | 64 | scratch | linear |" in table
    assert (out / "apes.svg").read_text().count("the paper") == 3
    with pytest.raises(ConfigError, match="just for a run that starts from one, got scratch"):
        recipe.dna_species(run, splits, out, species=names, pretrained=tmp_path / "lm")


def test_finished_runs_of_earlier_versions(tmp_path: Path) -> None:
    """They lack predictions, or what is on record of the model they started from."""
    blocks, backbone, out = aligned(blocks=200), MambaConfig(d_model=8, n_layer=1, vocab_size=5), tmp_path / "out"
    CausalLM(backbone).save_pretrained(tmp_path / "lm")
    run = recipe.ape_run(64, backbone, classes=3, pretrained=True, overrides=[o for o in SMALL if "backbone" not in o])
    splits = recipe.ape_splits(blocks, 64, run.rows)

    def call(apart: bool) -> dict:
        recipe.dna_species(
            run, splits, out, species=blocks.names, pretrained=tmp_path / "lm", apart=apart, kmers=2,
            say=lambda line: None,
        )  # fmt: skip
        return recipe.report(out)

    assert call(apart=True)["rows"][0]["apart"] is True
    path = out / run.name / "run.json"
    facts = json.loads(path.read_text())
    del facts["data"]["apart"]
    path.write_text(json.dumps(facts))
    (out / run.name / "predictions.npz").unlink()
    results = recipe.report(out)
    assert (results["rows"], results["not_judged"]) == ([], {run.name: facts["test"]["best"]["accuracy"]})
    told = f"{run.name}: {recipe.percent(facts['test']['best']['accuracy'])} % right, not in the table for want of"
    assert told in (out / "results.md").read_text()
    for apart in (False, True):
        results = call(apart)
        assert (results["rows"][0]["apart"], results["not_judged"]) == (False, {})
        assert "| apes | 64 | pretrained* | linear |" in (out / "results.md").read_text()
    assert json.loads(path.read_text()) == facts, "taken as they lie"


def test_the_runs_on_record_are_those_of_the_recipe() -> None:
    """What the document tells was made by the recipe as it is, with the settings that stand beside it."""
    record = Path(__file__).parents[2]
    text = (record / "docs" / "dna.md").read_text(encoding="utf-8")
    held = json.loads((record / "benchmarks" / "results" / "reproduce" / "microbes.json").read_text(encoding="utf-8"))
    assert [row["length"] for row in held["rows"]] == [256, 1024, 256, 1024]
    linear, likelihood = held["rows"][:2], held["rows"][2:]
    for row, was in zip(likelihood, linear, strict=True):
        wanted = recipe.microbe_run(row["length"], 8, overrides=["train.accelerator=cuda"])
        assert wanted.model == BackboneClassifierConfig.from_dict(row["config"]["model"])
        assert wanted.train == build_config(ClassifyConfig, row["config"]["train"])
        assert wanted.rows == row["data"]["rows"]
        assert row["data"]["test"] == was["data"]["test"], "the same windows"
        confusion, judged, kmers = np.array(row["confusion"]), row["judged"], row["kmers"]
        assert (int(np.trace(confusion)), int(confusion.sum())) == (row["right"], judged)
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['length']:,} | **"))
        (low, high), (less, more), (first, last) = row["interval"], kmers["interval"], row["above_kmers_interval"]
        assert f"**{recipe.percent(row['right'] / judged)}** ({row['right']:,} of {judged:,}; epoch" in line
        assert f"epoch {row['test']['best']['epoch']}) | {low:.2f} to {high:.2f} |" in line
        assert f"| {recipe.percent(kmers['right'] / judged)} ({less:.2f} to {more:.2f}) |" in line
        above = f"+{row['above_kmers']:.2f} (+{first:.2f} to +{last:.2f})"
        assert f"| {above} | {row['loci']} | {row['seconds']:.0f} |" in line
        each = [f"{100 * part:.1f}".removesuffix(".0") for part in np.diag(confusion) / confusion.sum(1)]
        assert f"| {row['length']:,} | {' | '.join(each)} |" in text
    for row, (rows, epochs) in zip(linear, ((8192, 16), (4096, 4)), strict=True):
        wanted = recipe.microbe_run(row["length"], 8, overrides=[f"rows={rows}", f"train.epochs={epochs}", *LINEAR])
        assert wanted.model == BackboneClassifierConfig.from_dict(row["config"]["model"])
        assert wanted.train == build_config(ClassifyConfig, row["config"]["train"])
        assert wanted.rows == row["data"]["rows"] == rows
        judged, best = row["judged"], row["test"]["best"]
        assert row["right"] == round(best["accuracy"] * judged)
        low, high = interval(row["right"], judged)
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['length']:,} | {8 * rows:,} "))
        assert f"| {row['steps']:,} | {row['seconds']:.0f} | {recipe.percent(row['right'] / judged)} (epoch" in line
        assert f"(epoch {best['epoch']}" in line
        assert f"| {low} to {high} | {recipe.percent(row['right_final'] / judged)} |" in line
        assert f"| {recipe.percent(row['kmers']['right'] / judged)} | {judged:,} |" in line


def test_the_apes_on_record_are_the_recipes_and_the_documents() -> None:
    record = Path(__file__).parents[2]
    text = (record / "docs" / "dna.md").read_text(encoding="utf-8")
    held = json.loads((record / "benchmarks" / "results" / "reproduce" / "great-apes.json").read_text(encoding="utf-8"))
    above = []
    for row in held["rows"]:
        length, head, judged, kmers = row["length"], row["head"], row["judged"], row["kmers"]
        confusion, (low, high), (less, more) = np.array(row["confusion"]), row["interval"], kmers["interval"]
        assert (int(np.trace(confusion)), int(confusion.sum())) == (row["right"], judged)
        start = "from scratch" if row["origin"] == "scratch" else row["origin"]
        line = (
            f"| {length:,} | {start} | {head} | {recipe.percent(row['right'] / judged)} | {low:.2f} to {high:.2f} | "
            f"{recipe.percent(kmers['right'] / judged)} | {less:.2f} to {more:.2f} | {judged}, {row['loci']} | "
            f"{row['seconds']:.0f} |"
        )
        assert line in text.replace("**", "")
        if low > 25:
            above.append((length, head))
        # As far as it goes the bar is missed: above the regression from 8,192 on, 40 % at 32,768.
        assert row["above_kmers_interval"][0] < 0
        assert length < 32768 or row["right"] < 0.4 * judged
        if head == "likelihood":
            wanted = recipe.ape_run(
                length,
                MambaConfig(d_model=128, n_layer=12, vocab_size=5),
                overrides=[
                    "model.head=likelihood",
                    "train.labels_from=0.75",
                    f"train.batch_size={131072 // length}",
                    "train.accelerator=cuda",
                ],
            )
            assert wanted.model == BackboneClassifierConfig.from_dict(row["config"]["model"])
            assert wanted.train == build_config(ClassifyConfig, row["config"]["train"])
    assert above == [(8192, "likelihood")]
    (best,) = [row for row in held["rows"] if (row["length"], row["head"]) == above[0]]
    words, (low, high), (first, last) = " ".join(text.split()), best["interval_final"], best["above_kmers_interval"]
    assert (
        f"have {recipe.percent(best['right_final'] / best['judged'])} % of the test ({low:.2f} to {high:.2f})" in words
    )
    assert f": {best['above_kmers']:.2f} points above them on the same windows ({first:.2f} to +{last:.2f})" in words
    shares = [recipe.percent(share) for share in best["validation"]["accuracy"]]
    assert f"at {max(shares)} % of its {best['validation']['windows']} windows" in words
    assert f"the four epochs had {', '.join(shares[:3])} and {shares[3]} % there" in words
    (longer,) = [row for row in held["rows"] if (row["length"], row["head"]) == (32768, "likelihood")]
    low, high = longer["above_kmers_interval"]
    assert f"below the 5-mers by {-longer['above_kmers']:.2f} points ({low:.2f} to +{high:.2f})" in words
    assert (
        f"Of the {best['judged']} windows {np.array(best['confusion']).sum(0)[1]} are taken for chimpanzee's" in words
    )


def test_intervals_draw_homologous_windows_together() -> None:
    draw = np.random.default_rng(0)
    loci = draw.random(300) < 0.5
    alone = np.where(draw.random((300, 4)) < 0.5, 1.0, 0.0)
    together = np.repeat(loci[:, None], 4, 1).astype(float)

    def width(values: np.ndarray, many: int) -> float:
        low, high = recipe.resampled(values.ravel(), np.arange(1200) // many)
        assert low < values.mean() < high
        return high - low

    # Right or wrong together they say as much as a quarter of them: an interval twice as wide.
    assert width(together, 4) == pytest.approx(4 * 1.96 * np.sqrt(0.25 / 1200), rel=0.1)
    assert width(together, 1) == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 1200), rel=0.1)
    assert width(alone, 4) == pytest.approx(width(alone, 1), rel=0.15)
    # A locus weighs as much as the windows it holds.
    assert recipe.resampled(np.array([1.0, 0.0, 0.0, 0.0]), np.array([0, 1, 1, 1])) == (0, 1)
    sizes = [1, 3] * 200
    low, high = recipe.resampled(np.repeat([1.0, 0.0] * 200, sizes), np.repeat(np.arange(400), sizes))
    assert 0.2 < low < 0.25 < high < 0.3


def test_what_a_pretrained_model_has_read(tmp_path: Path) -> None:
    blocks = aligned(blocks=200)
    folder = tmp_path / "run"
    (folder / "best").mkdir(parents=True)
    assert not recipe.kept_apart(folder, blocks), "no run is there"

    def told(data: dict, weights: str = "") -> Path:
        (folder / "run.json").write_text(json.dumps({"data": data, "config": {"train": {"weights": weights}}}))
        return folder

    facts = blocks.facts()
    assert recipe.kept_apart(told({"digest": facts["digest"], "aligned": facts}), blocks)
    assert recipe.kept_apart(folder / "best", blocks)
    assert not recipe.kept_apart(told({"aligned": facts}, weights=str(tmp_path / "other")), blocks)
    assert not recipe.kept_apart(told({"digest": "of other bases"}), blocks)
    for data in ({"digest": facts["digest"]}, {"aligned": {**facts, "train": facts["test"]}}):
        with pytest.raises(DataError, match="trained on these very bases parted otherwise"):
            recipe.kept_apart(told(data), blocks)


def test_a_genome_that_is_two_species(genomes: Path, tmp_path: Path) -> None:
    (genomes / "dd.npz").write_bytes((genomes / "aa.npz").read_bytes())
    with pytest.raises(DataError, match=r"same 87,000 bases as record 1 \('r0'\) of .*aa.npz' and as .*dd.npz'"):
        recipe.microbe_splits(genomes, 256, 10, cache=tmp_path / "cache")
