"""``statescan reproduce`` of DNA: each command trains, tables, and goes on where it was broken off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from statescan.data.aligned import mask_alike, read_blocks
from statescan.recipes.dna_species import ape_splits

Run = Callable[..., tuple[int, str, str]]
TINY = ["--device", "cpu", "--set", "train.threads=1", "--set", "train.precision=float32"]
CLASSIFIER = [*TINY, "--set", "train.epochs=1", "--set", "rows=8", "--set", "train.batch_size=8"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))


def bases(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, count).astype(np.uint8)


def genome(path: Path, count: int, seed: int) -> Path:
    np.savez(path, seq=bases(count, seed), reclen=np.array([count]), names=np.array([path.stem]))
    return path


def test_microbes(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "genomes"
    folder.mkdir()
    for seed, name in enumerate("ab"):
        genome(folder / f"{name}.npz", 80_000, seed)
    small = ["--set", "model.backbone.d_model=8", "--set", "model.backbone.n_layer=1"]
    line = ("reproduce", "microbes", "--data", folder, "--length", 64, "--out", tmp_path / "out", *CLASSIFIER, *small)
    code, _, err = run(*line, "--seconds", 0)
    assert (code, "the same command goes on" in err) == (130, True)
    code, shown, err = run(*line)
    assert code == 0, err
    assert "| microbes | 64 | scratch | " in shown
    assert "results.json" in shown
    code, shown, _ = run(*line, "--json")
    assert [row["species"] for row in json.loads(shown)["rows"]] == [["a", "b"]]


def test_great_apes_from_scratch_and_from_a_pretrained_model(run: Run, tmp_path: Path) -> None:
    lengths = np.full(60, 50)
    apes = tmp_path / "apes.npz"
    arrays = {}
    for seed, name in enumerate(("human", "gorilla")):
        arrays[name], arrays[f"{name}_blocklen"] = bases(3000, seed), lengths
    # One assembly knows less than the other.
    arrays["human"][100:140] = arrays["human"][2000:2010] = 4
    np.savez(apes, **arrays)

    def pretrain(data: Path, out: Path, *more: str) -> str:
        code, shown, err = run(
            "reproduce", "dna-pretraining", "--data", data, "--row", "mamba", "--out", out, "--length", 64,
            "--steps", 2, "--context", 128, "--device", "cpu", "--set", "train.batch_size=2",
            "--set", "model.d_model=8", "--set", "model.n_layer=1", *more,
        )  # fmt: skip
        assert code == 0, err
        return shown

    # On the same blocks, less those of the test.
    shown = pretrain(apes, tmp_path / "pretraining")
    assert "| Mamba | 1,376 | 256 |" in shown
    line = ("reproduce", "great-apes", "--data", apes, "--length", 32, "--out", tmp_path / "out", *CLASSIFIER)
    code, shown, err = run(*line, "--pretrained", tmp_path / "pretraining" / "mamba")
    assert code == 0, err
    assert "| apes | 32 | pretrained | " in shown
    assert "no record says" not in err
    assert (tmp_path / "out" / "apes.svg").exists()
    # Unknown bases are masked alike before anything is cut.
    data = json.loads((tmp_path / "out" / "apes-32-pretrained-seed0" / "run.json").read_text())["data"]
    blocks = read_blocks(apes)
    masked, as_read = (ape_splits(some, 32, 8, mask=False) for some in (mask_alike(blocks), blocks))
    assert data["train"]["digest"] == masked.train.digest != as_read.train.digest
    # On something else, of which nothing is known.
    pretrain(genome(tmp_path / "g.npz", 20_000, 9), tmp_path / "elsewhere", "--carried", "256")
    code, shown, err = run(*line, "--pretrained", tmp_path / "elsewhere" / "mamba", "--seed", 1)
    assert code == 0, err
    assert "| apes | 32 | pretrained* | " in shown
    assert "no record says" in err
    # On the same bases as records of their own: homologues of the test, if not the test, are trained on.
    flat = tmp_path / "flat.npz"
    names = np.array(["human", "gorilla"])
    np.savez(flat, seq=np.concatenate([arrays[name] for name in names]), reclen=np.array([3000, 3000]), names=names)
    pretrain(flat, tmp_path / "leaking")
    code, _, err = run(*line, "--pretrained", tmp_path / "leaking" / "mamba", "--seed", 2)
    assert (code, "which was trained on these very bases parted otherwise" in err) == (1, True), err
    code, _, err = run(*line, "--pretrained", tmp_path / "none")
    assert (code, "which does not exist" in err) == (1, True)
    code, _, err = run(
        "reproduce", "great-apes", "--data", apes, "--length", 5000, "--out", tmp_path / "x", *CLASSIFIER
    )
    assert (code, "the window is longer than every record or block" in err) == (1, True)


def test_pretraining_that_could_not_be_judged_is_not_begun(run: Run, tmp_path: Path) -> None:
    data = genome(tmp_path / "g.npz", 20_000, 0)
    code, shown, err = run(
        "reproduce", "dna-pretraining", "--data", data, "--out", tmp_path / "out", "--length", 64, "--device", "cpu"
    )
    assert (code, shown) == (1, "")
    assert "wanted a region held out of more than 131,072 bases, which --context judges together, got 1,000" in err
    assert err.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())
