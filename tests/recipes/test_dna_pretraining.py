"""Next-base prediction of four families: as many parameters, the same windows, the loss over the context."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.evaluate import ByContext
from statescan.models import CausalLM
from statescan.recipes import dna_pretraining as recipe
from statescan.train import DataConfig, TrainConfig, loop
from statescan.train.config import build_config
from statescan.train.loop import read_genome


def test_rows_have_as_many_parameters() -> None:
    counts = {name: CausalLM(config, device="meta").parameter_count() for name, (config, _) in recipe.ROWS.items()}
    assert counts["mamba"] == 1_400_448
    assert all(abs(count / counts["mamba"] - 1) < 0.003 for count in counts.values()), counts


def test_the_length_doubles_over_the_first_half() -> None:
    config = recipe.pretraining_run("mamba", ["x.fa"], length=1 << 15, steps=1000).train
    assert (config.first_length, config.stage_steps, config.batch_size * config.length) == (1 << 10, 100, 1 << 17)
    assert recipe.pretraining_run("mamba", ["x.fa"], length=1 << 18, steps=1000).train.batch_size == 1
    short = recipe.pretraining_run("conv", ["x.fa"], length=512, steps=10).train
    assert (short.first_length, short.stage_steps) == (0, 0)
    with pytest.raises(ConfigError, match="--row must be one of mamba, s4, conv, transformer, got 'x'"):
        recipe.pretraining_run("x", ["x.fa"])


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    # Every second base says what the next one is.
    bases = draw.integers(0, 4, 12_000)
    bases[1::2] = (bases[::2] + 1) % 4
    path = tmp_path / "g.npz"
    np.savez(path, seq=bases.astype(np.uint8), reclen=np.array([8000, 4000]), names=np.array(["a", "b"]))
    return path


def test_trained_judged_tabled_and_gone_on_with(genome: Path, tmp_path: Path) -> None:
    bed, out = tmp_path / "v.bed", tmp_path / "out"
    bed.write_text("b\t500\t3000\n")
    small = ["model.d_model=16", "model.n_layer=2", "train.batch_size=4", "train.accelerator=cpu", "train.threads=1"]
    small += [f"data.cache={tmp_path / 'cache'}", "data.both_strands=false", "train.lr=2e-2"]

    def runs(steps: int, *rows: str) -> dict:
        return {
            row: recipe.pretraining_run(
                row, [str(genome)], length=256, valid_regions=str(bed), steps=steps, overrides=small
            )
            for row in rows
        }

    lines: list[str] = []
    recipe.dna_pretraining(runs(60, "mamba"), out, context=512, carried=2048, say=lines.append)
    before = (out / "mamba" / "model.safetensors").read_bytes()
    results = recipe.dna_pretraining(runs(60, "mamba", "conv"), out, context=512, carried=2048, say=lines.append)
    assert (out / "mamba" / "model.safetensors").read_bytes() == before, "a finished row is taken as it lies"
    assert [row["row"] for row in results["rows"]] == ["mamba", "conv"]
    mamba, conv = results["rows"]
    assert mamba["bases"] == conv["bases"] == 60 * 4 * 256
    corpus = read_genome(runs(60, "mamba")["mamba"])
    assert len(corpus.valid) == 2500
    # Windows of whole length within the region held out, every position of which is judged on the same ones.
    assert mamba["window"]["tokens"] == 4 * 512
    assert {bucket["count"] % 4 for bucket in mamba["window"]["by_position"]} == {0}
    # The second half of a window of 512 and what follows it, in windows of 4 to 512 and with the state carried.
    for row in (mamba, conv):
        assert row["by_context"]["lengths"] == [4, 8, 16, 32, 64, 128, 256, 512]
        assert sum(row["by_context"]["tokens"]) == 2500 - 257
        assert [point["last"] for point in row["curve"][:8]] == row["by_context"]["lengths"]
    assert [(point["first"], point["last"]) for point in mamba["curve"][8:]] == [(513, 1024), (1025, 2048)]
    assert [one["tokens"] for one in mamba["by_context"]["carried"]] == [[512], [1024]]
    assert len(conv["curve"]) == 8
    change = conv["curve"][7]["bits_per_token"] - conv["curve"][0]["bits_per_token"]
    assert conv["whole"]["change"] == pytest.approx(change)
    (compared,) = results["compared"]
    assert (compared["row"], compared["beside"]) == ("conv", "mamba")
    for step, one, other in zip(compared["by_context"], mamba["curve"], conv["curve"], strict=False):
        assert step["difference"] == pytest.approx(other["bits_per_token"] - one["bits_per_token"])
    # Half of the bases are known from the one before: 1 bit in place of 2.
    assert 0.95 < mamba["window"]["bits_per_token"] < 1.6
    table = (out / "results.md").read_text()
    assert "| Mamba | " in table
    assert "| dilated convolution | " in table
    assert "Bits per base more than Mamba on the same bases in the same windows:" in table
    assert "Judged of each row: 2,243 bases of 1 loci." in table
    assert "Mamba, state carried, beside windows of 512: 1,024: " in table
    assert (out / "context.svg").exists()
    assert json.loads((out / "results.json").read_text())["benchmark"] == "dna-pretraining"
    with pytest.raises(CheckpointError, match="is of a run with other settings"):
        recipe.dna_pretraining(runs(61, "mamba"), out, context=512, carried=2048, say=lines.append)
    # Judged anew at other lengths.
    results = recipe.dna_pretraining(runs(60, "mamba"), out, context=256, carried=2048, say=lines.append)
    assert results["rows"][0]["window"]["context"] == 256
    assert results["compared"] == []
    assert "Judged on other bases, and so not compared: dilated convolution." in (out / "results.md").read_text()
    # Longer than what is held out: nothing is trained that could not be judged.
    for name, lengths in (("context", {"context": 4096}), ("carried", {"context": 512, "carried": 4096})):
        wanted = f"of more than 4,096 bases, which --{name} judges together, got 2,500 at most; lower --{name}"
        with pytest.raises(DataError, match=wanted):
            recipe.dna_pretraining(runs(60, "mamba"), tmp_path / "none", **lengths, say=lines.append)
    assert not list((tmp_path / "none").iterdir())
    # As far as a region reaches, where nothing is said.
    results = recipe.dna_pretraining(runs(60, "mamba"), out, context=512, say=lines.append)
    assert next(row for row in results["rows"] if row["row"] == "mamba")["curve"][-1]["last"] == 2048
    # Other bases under the same name.
    with np.load(genome) as held:
        arrays = dict(held)
    arrays["seq"] = (arrays["seq"] + 1) % 4
    np.savez(genome, **arrays)
    with pytest.raises(CheckpointError, match=r"is of a run with other data \(digest = "):
        recipe.dna_pretraining(runs(60, "mamba"), out, context=256, carried=2048, say=lines.append)


def test_a_signal_with_a_rows_last_update_ends_the_call(
    genome: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["model.d_model=8", "model.n_layer=1", "train.batch_size=4", "train.accelerator=cpu", "train.threads=1"]
    small += [f"data.cache={tmp_path / 'cache'}"]
    runs = {
        row: recipe.pretraining_run(row, [str(genome)], length=64, steps=2, overrides=small)
        for row in ("mamba", "conv")
    }
    update = loop._Trainer._update

    def last_comes_with_a_signal(self: loop._Trainer) -> None:
        update(self)
        if self.done == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop._Trainer, "_update", last_comes_with_a_signal)
    with pytest.raises(KeyboardInterrupt):
        recipe.dna_pretraining(runs, tmp_path / "out", context=64, carried=128, say=lambda line: None)
    (told,) = (tmp_path / "out").glob("*/run.json")
    assert (told.parent.name, json.loads(told.read_text())["status"]) == ("mamba", "finished")


def test_what_is_held_out_is_long_enough_to_be_judged(tmp_path: Path) -> None:
    path = tmp_path / "g.npz"
    bases = np.random.default_rng(0).integers(0, 4, 4_000_000).astype(np.uint8)
    np.savez(path, seq=bases, reclen=np.array([4_000_000]), names=np.array(["a"]))
    more = [f"data.cache={tmp_path / 'cache'}", "train.length=1024", "train.first_length=0", "train.stage_steps=0"]
    run = recipe.pretraining_run("mamba", [str(path)], judged=1 << 17, overrides=more)
    regions = recipe._regions(read_genome(run))
    assert max(region.end - region.start for region in regions) > 1 << 17
    assert recipe._lengths("mamba", regions, 1 << 17, None) == {"context": 1 << 17, "carried": None}
    assert recipe._lengths("mamba", regions, 1 << 10, None) == {"context": 1 << 10, "carried": 1 << 17}
    assert recipe._lengths("conv", regions, 1 << 10, 1 << 12) == {"context": 1 << 10, "carried": None}


def test_a_finished_row_is_judged_in_other_windows(tmp_path: Path) -> None:
    path = tmp_path / "g.npz"
    bases = np.random.default_rng(0).integers(0, 4, 1_400_000).astype(np.uint8)
    np.savez(path, seq=bases, reclen=np.array([1_400_000]), names=np.array(["a"]))
    small = ["model.d_model=8", "model.n_layer=1", "train.batch_size=2", "train.accelerator=cpu", "train.threads=1"]
    small += [f"data.cache={tmp_path / 'cache'}", "train.precision=float32"]

    def judged(out: str, context: int, *more: str) -> dict:
        run = recipe.pretraining_run("conv", [str(path)], length=64, steps=1, judged=context, overrides=[*small, *more])
        recipe.dna_pretraining({"conv": run}, tmp_path / out, context=context, say=lambda line: None)
        folder = tmp_path / out / "conv"
        assert json.loads((folder / "context.json").read_text())["window"]["context"] == context
        return json.loads((folder / "run.json").read_text())

    begun = judged("far", 1 << 16)
    assert begun["config"]["data"]["valid_block"] == (1 << 16) + 1
    assert judged("far", 1 << 10) == begun, "a finished row is taken as it lies"
    # Blocks that were asked for.
    with pytest.raises(CheckpointError, match=r"data.valid_block = 65537, wanted 4096\)"):
        judged("far", 1 << 10, "data.valid_block=4096")
    # As earlier versions named none.
    older = judged("older", 1 << 10, "data.valid_block=0")
    assert judged("older", 1 << 11) == older
    # Nothing it held out is as long.
    with pytest.raises(CheckpointError, match=r"data.valid_block = 0, wanted 65537\)"):
        judged("older", 1 << 16)


def test_a_row_that_was_not_judged_is_named(genome: Path, tmp_path: Path) -> None:
    small = ["model.d_model=8", "model.n_layer=1", "train.batch_size=4", "train.accelerator=cpu", "train.threads=1"]
    small += [f"data.cache={tmp_path / 'cache'}"]
    out = tmp_path / "out"

    def judge(row: str) -> dict:
        run = recipe.pretraining_run(row, [str(genome)], length=64, steps=1, overrides=small)
        return recipe.dna_pretraining({row: run}, out, context=64, carried=128, say=lambda line: None)

    judge("mamba")
    path = out / "mamba" / "context.json"
    older = {"lengths": {"context": 1 << 17, "carried": 1 << 20}, "window": None, "carried": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | older))
    results = judge("conv")
    assert ([row["row"] for row in results["rows"]], results["not_judged"]) == (["conv"], ["mamba"])
    table = (out / "results.md").read_text()
    assert "| Mamba |" not in table
    assert "as long as a window: Mamba; lower --context." in table
    results = judge("mamba")
    assert ([row["row"] for row in results["rows"]], results["not_judged"]) == (["mamba", "conv"], [])
    assert "Not judged" not in (out / "results.md").read_text()


def test_what_is_judged_was_not_trained_on(tmp_path: Path) -> None:
    """A genome that says nothing where it is held out, and all where it is trained on."""
    bases = np.tile(np.arange(4), 3000)
    bases[8000:] = np.random.default_rng(0).integers(0, 4, 4000)
    path, bed = tmp_path / "g.npz", tmp_path / "v.bed"
    np.savez(path, seq=bases.astype(np.uint8), reclen=np.array([12_000]), names=np.array(["a"]))
    bed.write_text("a\t8000\t12000\n")
    small = ["model.d_model=16", "model.n_layer=1", "train.batch_size=4", "train.accelerator=cpu", "train.threads=1"]
    small += [f"data.cache={tmp_path / 'cache'}", "data.both_strands=false", "train.lr=2e-2"]
    run = recipe.pretraining_run("mamba", [str(path)], length=128, valid_regions=str(bed), steps=40, overrides=small)
    results = recipe.dna_pretraining({"mamba": run}, tmp_path / "out", context=512, carried=1024, say=lambda line: None)
    (row,) = results["rows"]
    assert row["train_loss"] < 0.7
    assert row["window"]["bits_per_token"] > 1.9
    assert min(point["bits_per_token"] for point in row["curve"]) > 1.9


def test_a_row_that_an_earlier_version_judged_is_read_again(genome: Path, tmp_path: Path) -> None:
    small = ["model.d_model=8", "model.n_layer=1", "train.batch_size=4", "train.accelerator=cpu", "train.threads=1"]
    small += [f"data.cache={tmp_path / 'cache'}"]
    out, lines = tmp_path / "out", []

    def judge(*rows: str) -> dict:
        runs = {row: recipe.pretraining_run(row, [str(genome)], length=64, steps=1, overrides=small) for row in rows}
        return recipe.dna_pretraining(runs, out, context=64, carried=128, say=lines.append)

    judge("mamba", "conv")
    path = out / "mamba" / "context.json"
    whole = path.read_text()
    older = json.loads(whole)
    del older["by_context"]
    path.write_text(json.dumps(older | {"carried": older["window"]}))
    # Shown with what it has.
    results = recipe.report(out)
    assert [(row["row"], row["curve"] is None) for row in results["rows"]] == [("mamba", True), ("conv", False)]
    assert results["compared"] == []
    table = (out / "results.md").read_text()
    assert "Not read again with other context, by an earlier version: Mamba; call again." in table
    assert table.count("| Mamba | ") == 1
    lines.clear()
    results = judge("mamba", "conv")
    assert lines == ["mamba: judged"], "nothing is trained again, and what is judged is not judged again"
    assert path.read_text() == whole
    assert [(one["row"], one["beside"]) for one in results["compared"]] == [("conv", "mamba")]


def test_homologues_lie_at_the_same_place(tmp_path: Path) -> None:
    """Of aligned species what is held out is of one group; a gap of one moves none of its bases to another locus."""
    draw = np.random.default_rng(0)
    arrays = {}
    for name in ("human", "gorilla"):
        bases = draw.integers(0, 4, 100_000).astype(np.uint8)
        arrays |= {name: bases, f"{name}_blocklen": np.full(100, 1000)}
    # 85 to 90 thousand are held out.
    arrays["human"][86_000:88_000] = 4
    path = tmp_path / "apes.npz"
    np.savez(path, **arrays)
    run = recipe.pretraining_run("mamba", [str(path)], length=64, overrides=[f"data.cache={tmp_path / 'cache'}"])
    regions = recipe._regions(read_genome(run))
    assert regions == [(0, 1000, 0, 0), (1000, 3000, 0, 3000), (3000, 8000, 0, 0)]
    # Records that no blocks align are not.
    flat = tmp_path / "flat.npz"
    np.savez(flat, seq=arrays["gorilla"], reclen=np.array([60_000, 40_000]), names=np.array(["a", "b"]))
    bed = tmp_path / "v.bed"
    bed.write_text("a\t100\t300\nb\t500\t900\n")
    run = recipe.pretraining_run(
        "mamba", [str(flat)], length=64, valid_regions=str(bed), overrides=[f"data.cache={tmp_path / 'cache'}"]
    )
    assert recipe._regions(read_genome(run)) == [(0, 200, 0, 0), (200, 600, 1, 0)]


@pytest.mark.parametrize(
    ("name", "rows", "unjudged"),
    [("", ["mamba", "s4", "conv", "transformer"], []), ("-apes", ["mamba", "conv"], ["transformer"])],
)
def test_the_runs_on_record_are_those_of_the_recipe(name: str, rows: list[str], unjudged: list[str]) -> None:
    """What the document tells was made by the recipe as it is, and follows from the sums that are kept."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "dna.md").read_text(encoding="utf-8")
    path = root / "benchmarks" / "results" / "reproduce" / f"dna-pretraining{name}.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    assert [row["row"] for row in held["rows"]] == rows
    assert [row["row"] for row in held["not_judged"]] == unjudged
    for row in [*held["rows"], *held["not_judged"]]:
        wanted = recipe.pretraining_run(
            row["row"], row["config"]["data"]["paths"], length=1 << 17, steps=1500, judged=1 << 17,
            overrides=["train.accelerator=cuda", "train.precision=bf16"],
        )  # fmt: skip
        assert wanted.model == type(wanted.model).from_dict(row["config"]["model"])
        assert wanted.train == build_config(TrainConfig, row["config"]["train"])
        assert wanted.data == build_config(DataConfig, row["config"]["data"])
        assert row["parameters"] == CausalLM(wanted.model, device="meta").parameter_count()
        assert row["train_loss"] == pytest.approx(held["training"]["loss"][row["row"]][-1][1], abs=1e-5)
    for row in held["rows"]:
        again = ByContext.from_dict(row["by_context"])
        assert [point._asdict() for point in again.curve()] == row["curve"]
        assert again.whole() == (row["whole"]["change"], row["whole"]["standard_error"])
    compared, apart = recipe._compare(held["rows"])
    assert (compared, apart) == (held["compared"], [])
    for line in recipe._table(held["rows"], compared, apart, []).splitlines():
        assert not line.startswith("| ") or line in text
    # What was not judged is told by the losses of training alone, and of the others they stand beside what was.
    at = {row: dict(map(tuple, losses)) for row, losses in held["training"]["loss"].items()}
    for losses in at.values():
        assert max(losses) == 1500
        mean = np.mean([losses[step] for step in range(1230, 1501, 30)])
        assert name or f"{mean:.4f}" in text
        assert not name or f"{losses[1500]:.4f}" in text
    assert all(at["transformer"][step] > at["mamba"][step] for step in at["transformer"])
    for bits in held["last_evaluation"]["bits"].values():
        assert not name or f"{bits:.4f}" in text
