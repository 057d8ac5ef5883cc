"""Training on genomes: what is held out is never read, of aligned species too; what is named twice is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from statescan.data import GenomeSampler
from statescan.errors import ConfigError, DataError
from statescan.models import MambaConfig
from statescan.train import DataConfig, RunConfig, TrainConfig, train
from statescan.train.loop import read_genome

MODEL = MambaConfig(d_model=8, n_layer=1, vocab_size=5)


def run_of(tmp_path: Path, *paths: Path, **data) -> RunConfig:
    config = TrainConfig(
        steps=6, batch_size=4, length=64, first_length=16, stage_steps=2, accelerator="cpu", threads=1, log_every=2
    )
    read = DataConfig(tuple(map(str, paths)), modality="dna", tokenizer="dna", cache=str(tmp_path / "cache"), **data)
    return RunConfig(MODEL, read, config)


def write(path: Path, *records: np.ndarray) -> Path:
    names = np.array([f"{path.stem}{i}" for i in range(len(records))])
    sizes = np.array([len(record) for record in records])
    np.savez(path, seq=np.concatenate(records).astype(np.uint8), reclen=sizes, names=names)
    return path


def draws(count: int, seed: int, letters: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, letters, count).astype(np.uint8)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """All batches that training reads."""
    batches: list[np.ndarray] = []
    original = GenomeSampler.next_batch

    def next_batch(self: GenomeSampler, size: int) -> np.ndarray:
        batches.append(original(self, size))
        return batches[-1]

    monkeypatch.setattr(GenomeSampler, "next_batch", next_batch)
    return batches


def test_regions_that_are_held_out_are_not_read(read: list[np.ndarray], tmp_path: Path) -> None:
    genome = draws(6000, 0, letters=3)
    genome[1000:4000] = 3  # T stands in the regions that are held out, and nowhere else
    path, bed = write(tmp_path / "g.npz", genome), tmp_path / "v.bed"
    bed.write_text("g0\t1000\t4000\n")
    run = run_of(tmp_path, path, valid_regions=str(bed), both_strands=False)
    train(run, tmp_path / "run", progress=False)
    assert len(read) == 6
    assert all(set(np.unique(batch)) <= {0, 1, 2} for batch in read)
    corpus = read_genome(run)
    assert (corpus.valid == 3).all()
    assert len(corpus.valid) == 3000


def aligned(path: Path, blocks: int = 100, size: int = 60) -> Path:
    """Two species, of which T stands in the blocks after the first 85 of 100, and nowhere else."""
    arrays = {}
    for seed, name in enumerate(("human", "chimp")):
        bases = draws(blocks * size, seed, letters=3)
        bases[85 * size :] = 3
        arrays |= {name: bases, f"{name}_blocklen": np.full(blocks, size)}
    np.savez(path, **arrays)
    return path


def test_of_aligned_species_the_same_blocks_are_held_out(read: list[np.ndarray], tmp_path: Path) -> None:
    path = aligned(tmp_path / "apes.npz")
    run = run_of(tmp_path, path, both_strands=False)
    train(run, tmp_path / "run", progress=False)
    assert len(read) == 6
    assert all(set(np.unique(batch)) <= {0, 1, 2} for batch in read)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert facts["aligned"]["species"] == ["human", "chimp"]
    assert facts["aligned"]["train"] == [[0, 5100], [6000, 11100]]
    assert facts["aligned"]["test"] == [[5400, 6000], [11400, 12000]]
    assert (facts["train_tokens"], facts["valid_tokens"]) == (10200, 600)
    bed = tmp_path / "v.bed"
    bed.write_text("human\t0\t100\n")
    with pytest.raises(ConfigError, match=r"wanted no data\.valid_regions with aligned species"):
        read_genome(run_of(tmp_path, path, valid_regions=str(bed)))


def test_of_aligned_records_too(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write(tmp_path / f"{name}.npz", *(draws(70 - seed, 20 * seed + i) for i in range(20)))
    run = run_of(tmp_path, tmp_path / "a.npz", tmp_path / "b.npz", aligned=True)
    corpus = read_genome(run)
    assert corpus.spans is not None
    assert corpus.spans.tolist() == [[0, 17 * 70], [20 * 70, 20 * 70 + 17 * 69]]
    assert corpus.facts["valid_tokens"] == 70 + 69
    assert "aligned" not in read_genome(run_of(tmp_path, tmp_path / "a.npz")).facts


def test_what_is_named_twice_would_be_held_out_and_trained_on(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.npz", draws(3000, 0), draws(500, 1)), write(tmp_path / "b.npz", draws(2000, 2))
    # A path that is named twice is read once.
    assert read_genome(run_of(tmp_path, one, one)).facts["tokens"] == 3500
    again = write(tmp_path / "c.npz", draws(3000, 0), draws(700, 3))
    turned = write(tmp_path / "d.npz", 3 - draws(3000, 0)[::-1])
    short = write(tmp_path / "e.npz", draws(500, 1))  # may be a read
    message = "wanted every record once, .* got the same 3,000 bases as record 1"
    for files, data in (
        ((one, again), {}),
        ((one, turned), {}),
        ((one,), {"valid_paths": (str(again),)}),
    ):
        with pytest.raises(DataError, match=message):
            read_genome(run_of(tmp_path, *files, **data))
    assert read_genome(run_of(tmp_path, one, short)).facts["tokens"] == 4000
    assert read_genome(run_of(tmp_path, one, again, valid_fraction=0.0)).facts["valid_tokens"] == 0
    with pytest.raises(DataError, match=r"held-out data that is not trained on, got '.*b\.npz' in both"):
        read_genome(run_of(tmp_path, one, other, valid_paths=(str(other),)))
    copy = tmp_path / "f.npz"
    copy.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="got the same content in both"):
        read_genome(run_of(tmp_path, other, valid_paths=(str(copy),)))


def test_texts_that_are_trained_on_are_not_held_out(tmp_path: Path) -> None:
    text, copy = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("it was the whale " * 100)
    copy.write_text(text.read_text())
    config = TrainConfig(steps=1, length=16, accelerator="cpu", threads=1)
    for valid, message in ((text, r"got '.*a\.txt' in both"), (copy, "got the same content in both")):
        data = DataConfig((str(text),), valid_paths=(str(valid),), cache=str(tmp_path / "cache"))
        with pytest.raises(DataError, match=message):
            train(
                RunConfig(MambaConfig(d_model=8, n_layer=1, vocab_size=256), data, config),
                tmp_path / "run",
                progress=False,
            )
    assert not (tmp_path / "run").exists()
