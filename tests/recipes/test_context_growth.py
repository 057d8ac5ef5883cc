"""The curve over positions: every octave's mean is what the model's own bits give, and no text favours one of them.

And the rows: as many bytes as the scaling table's, judged once for each reach, and never reported for another."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from statescan.data import ByteTokenizer, build_token_file
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.evaluate import row_bits
from statescan.models import CausalLM, MambaConfig, TransformerConfig
from statescan.recipes import context_growth as recipe
from statescan.recipes import language_scaling
from statescan.train import RunConfig

VOCABULARY = 11


def _model(config) -> CausalLM:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = CausalLM(config).double().eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(40)  # sure enough of itself that positions differ
    return model


def _books() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, VOCABULARY, size) for size in (301, 100, 163)]


@pytest.mark.parametrize(
    "config",
    [MambaConfig(8, 2, VOCABULARY, d_state=4), TransformerConfig(8, 2, VOCABULARY, n_head=1, d_intermediate=8)],
)
def test_octaves_are_the_means_of_the_bits_read_one_by_one(config, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(recipe, "_LOGITS", 2 * 64 * 16)  # several batches of windows, and of places
    model, books = _model(config), _books()
    longest, span, stride, window = 64, 128, 32, 16
    bins = recipe.judge_positions(model, books, longest=longest, span=span, stride=stride, window=window)
    assert [(one.first, one.last) for one in bins] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]

    def bits(book: np.ndarray, start: int, length: int) -> np.ndarray:
        return next(row_bits(model, book, [start], length, length, torch.device("cpu")))[1][0]

    windows, more, by_place = [], [], []
    for book in books:
        for place in range(0, len(book) - span, stride):
            here = [bits(book, place + start, window) for start in range(0, span, window)]
            windows += here
            by_place.append(np.array(here))
            more.append(bits(book, place, longest) - np.concatenate(here)[:longest])
    assert len(more) == 6 + 2
    level = np.mean(windows)
    for one in bins:
        part = slice(one.first - 1, one.last)
        if one.first < window:
            values = np.array([row[part].mean() for row in windows])
            counted, wanted = span / stride, values.mean()
            there = [here[:, part].mean() - here.mean() for here in by_place]
            assert one.gains == pytest.approx(there, rel=1e-9, abs=1e-12)
            assert level + np.mean(one.gains) == pytest.approx(wanted, rel=1e-9)
        else:
            values = np.array([row[part].mean() for row in more])
            counted, wanted = max(1.0, one.first / stride), level + values.mean()
            assert one.gains == pytest.approx(values.tolist(), rel=1e-9, abs=1e-12)
        assert one.places == len(values)
        assert one.bits_per_byte == pytest.approx(wanted, rel=1e-9)
        error = values.std(ddof=1) / math.sqrt(len(values)) * math.sqrt(counted)
        assert one.standard_error == pytest.approx(error, rel=1e-9)


class _Forgetful(nn.Module):
    """Knows one byte back and no more, so that no position is better than another; text is harder by parts."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(1, 1)
        self.config = MambaConfig(8, 1, VOCABULARY)

    def init_state(self, rows: int) -> torch.Tensor:
        return torch.zeros(rows)

    def forward(self, ids, state=None):  # type: ignore[no-untyped-def]
        from statescan.models.causal_lm import CausalLMOutput

        surely = ids.double().unsqueeze(-1) * torch.linspace(0, 1, VOCABULARY, dtype=torch.float64)
        return CausalLMOutput(surely, None, state)


def test_no_octave_has_the_easier_text() -> None:
    book = np.concatenate([np.arange(600) % 2, np.arange(600) * 7 % VOCABULARY])
    bins = recipe.judge_positions(_Forgetful(), [book], longest=1024, span=1024, stride=64, window=16)  # type: ignore[arg-type]
    beyond = [one.bits_per_byte for one in bins if one.first >= 16]
    assert max(beyond) - min(beyond) < 1e-12
    # Read naively the second half of the book is another matter.
    plain = next(row_bits(_Forgetful(), book, [0], 1024, 1024, torch.device("cpu")))[1][0]
    assert abs(plain[512:].mean() - plain[:512].mean()) > 0.5


@torch.no_grad()
def test_all_of_a_book_is_set_beside_its_last_bytes_alone() -> None:
    model, near = _model(MambaConfig(8, 2, VOCABULARY, d_state=4)), 4
    for name, weight in model.named_parameters():
        if "x_proj" in name or "out_proj" in name:
            weight.mul_(30)  # so loud that what is far off is heard
    books = [np.random.default_rng(length).integers(0, VOCABULARY, length) for length in (19, 37, 15)]
    wanted: dict[int, list[float]] = {}
    for book in books[:2]:
        ids = torch.from_numpy(book)

        def bits(start: int, end: int, ids: torch.Tensor = ids) -> torch.Tensor:
            logits = model(ids[None, start:end]).logits[0]
            return torch.nn.functional.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none") / math.log(2)

        for first in range(2 * near, len(book) - 1 - near + 1, near):
            alone = bits(first - near, first + near)[near:]
            octave = 2 ** int(math.log2(first))
            wanted.setdefault(octave, []).append(float((bits(0, first + near)[first:] - alone).mean()))
    found = recipe.gains_beyond(model, books, near=near)
    assert [(octave, count) for octave, _, _, count in found] == [(8, 4), (16, 4), (32, 1)]
    assert sorted(wanted) == [8, 16, 32]
    assert max(abs(mean) for _, mean, _, _ in found) > 0.1, "a model that forgets at once would tell nothing"
    for octave, mean, error, count in found:
        here = np.array(wanted[octave])
        assert mean == pytest.approx(here.mean(), abs=1e-5)
        if count == 1:
            assert error is None
        else:
            assert error == pytest.approx(here.std(ddof=1) / math.sqrt(count), abs=1e-5)
    with pytest.raises(DataError, match="a book of 1024 bytes at least, got 37 at most"):
        recipe.gains_beyond(model, books, near=256)


def test_what_does_not_fit_is_refused() -> None:
    model, books = _model(MambaConfig(8, 1, VOCABULARY, d_state=2)), _books()
    for fields in ({"longest": 96}, {"longest": 16}, {"span": 40}, {"stride": 24}, {"window": 12}, {"longest": 256}):
        sizes = {"longest": 64, "span": 128, "stride": 32, "window": 16} | fields
        with pytest.raises(ConfigError, match="window < longest <= span; got"):
            recipe.judge_positions(model, books, **sizes)
    with pytest.raises(DataError, match="a book of more than 512 bytes, got 301 at most"):
        recipe.judge_positions(model, books, longest=64, span=512, stride=32, window=16)


def test_rows_share_bytes_and_schedule_with_the_scaling_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))
    for part in ("train", "valid"):
        (tmp_path / f"novels_{part}.txt").write_text("x, so Sophia met Lincoln " * 40_000)
    plain = language_scaling.scaling_run("mamba-1m", tmp_path)
    read = plain.train.steps * plain.train.batch_size * plain.train.length
    assert recipe.growth_run("mamba-2k", tmp_path) == plain
    plain_models = {
        name: language_scaling.ROWS[f"{name}-1m"].replace(dropout=language_scaling.DROPOUT[name])
        for name in ("mamba", "transformer++", "pythia")
    }
    for row, entry in recipe.ROWS.items():
        run = recipe.growth_run(row, tmp_path)
        settings = run.train
        assert all(getattr(settings, name) == value for name, value in entry.train.items())
        assert run.model == plain_models[entry.family].replace(**entry.model)
        assert abs(settings.steps * settings.batch_size * settings.length / read - 1) < 0.05
        assert settings.lr == language_scaling.learning_rate_of(f"{entry.family}-1m")
        assert dataclasses.replace(run.data, paths=run.data.paths[:1]) == plain.data
        assert len(run.data.paths) == 1 + entry.copies
        assert abs(settings.warmup / settings.steps - 0.1) < 0.04
        # Whatever moment it is killed at, an eighth of its updates are lost at most, but for a remainder.
        assert 0 < settings.checkpoint_every <= max(1, settings.steps / 8)
    with pytest.raises(ConfigError, match="got 'mamba-3k' and '1m'"):
        recipe.growth_run("mamba-3k", tmp_path)
    with pytest.raises(ConfigError, match="got 'mamba-2k' and '5m'"):
        recipe.growth_run("mamba-2k", tmp_path, size="5m")


def test_the_summary_tells_the_least_the_rise_and_the_gain() -> None:
    def curve(values: dict[int, float]) -> list[recipe.PositionBin]:
        return [
            recipe.PositionBin(first, 2 * first - 1, bits, None, 2, (bits - 1.7, bits - 1.5 + 1e-18 * first**3))
            for first, bits in values.items()
        ]

    told = recipe.summary(curve({1 << 14: 1.6, 1 << 15: 1.5, 1 << 16: 1.52, 1 << 17: 1.53, 1 << 18: 1.51}))
    assert told["least"] == 1 << 15
    assert told["rise"] == pytest.approx(0.02)
    # From 32k to 128k, by which the second place rises more; neighbours share half of the latter octave.
    apart = 1e-18 * ((1 << 17) ** 3 - (1 << 15) ** 3)
    assert told["rise_error"] == pytest.approx(apart / 2 * math.sqrt(2) / 1.5)
    # Of two places, of which the second differs by what was added; neighbours share half of the last octave.
    more = 1e-18 * ((1 << 17) ** 3 - (1 << 14) ** 3)
    gain, error = told["from_16k_to_256k"]
    assert gain == pytest.approx(-0.07 + more / 2)
    assert error == pytest.approx(more / 2 * math.sqrt(2))
    assert recipe.summary(curve({1: 5.0, 2: 4.0})) == {
        "least": 2, "rise": 0.0, "rise_error": None, "from_16k_to_256k": None,
    }  # fmt: skip
    # Within a window, every byte is behind all the places: 2 windows of 2,048 a place are no 2 readings of 65,536.
    inner = recipe.PositionBin(1024, 2047, 1.5, 0.1, 64, (-0.1, -0.2))
    later = recipe.PositionBin(2048, 4095, 1.6, 0.1, 2, (0.0, -0.2))
    told = recipe.summary([inner, later])
    assert told["rise"] == pytest.approx(0.1 / 1.5)
    assert told["rise_error"] == pytest.approx(0.1 / 2 / 1.5)
    overlapping = inner._replace(places=128)
    assert recipe.summary([overlapping, later])["rise_error"] == pytest.approx(0.1 / 2 * math.sqrt(2) / 1.5)
    # Files from before the places were kept.
    assert recipe.summary([inner._replace(gains=()), later])["rise_error"] is None


SMALL = {"mamba-1m": MambaConfig(8, 1, 256, d_state=2), "transformer++-1m": TransformerConfig(8, 1, 256, n_head=1)}


@pytest.fixture
def novels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small parts and models, and curves to a few hundred positions."""
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(language_scaling, "ROWS", SMALL)
    monkeypatch.setattr(recipe, "LONGEST_ATTENTION", 128)
    monkeypatch.setattr(recipe, "NEAR", 16)
    for name in ("judge_positions", "_places"):
        monkeypatch.setattr(recipe, name, functools.partial(getattr(recipe, name), stride=64, window=16))
    for part, size in (("train", 40_000), ("valid", 200), ("test", 900)):
        (tmp_path / f"novels_{part}.txt").write_text(" ".join(f"{i * i % 97} of them;" for i in range(size))[:size])
    return tmp_path


def _brief(run: RunConfig) -> RunConfig:
    lengths = {"length": 32, "shortest_length": 8 if run.train.shortest_length else 0}
    return dataclasses.replace(run, train=dataclasses.replace(run.train, steps=4, warmup=1, **lengths))


def test_a_curve_is_of_the_longest_that_was_asked_for(novels: Path) -> None:
    said: list[str] = []
    growth, scaling = novels / "growth", novels / "scaling"

    def call(longest: int, *rows: str) -> dict[str, Any]:
        said.clear()
        return recipe.context_growth(
            rows, novels, growth, scaling=scaling, longest=longest, change=_brief, say=said.append
        )

    first = call(256, "mamba-2k", "transformer++-2k", "mamba-mixed")
    assert (first["longest"], list(first["rows"])) == (256, ["mamba-2k", "mamba-mixed", "transformer++-2k"])
    assert [len(row["bins"]) for row in first["rows"].values()] == [8, 8, 7]
    # What all of a book is worth beside its last bytes is of models whose state doesn't grow.
    beyond = {octave: (mean, error) for octave, mean, error, _ in first["rows"]["mamba-2k"]["beyond"]}
    assert list(beyond) == [32, 64, 128, 256, 512]
    assert "beyond" not in first["rows"]["transformer++-2k"]
    _, _, *lines = (growth / "results.md").read_text().splitlines()
    cells = [line.split("|")[-2].strip() for line in lines[:3]]
    assert cells[0] == f"{beyond[128][0]:+.5f} ± {beyond[128][1]:.5f}"
    assert cells[2] == ""
    assert (scaling / "mamba-1m" / "run.json").exists(), "a row of the scaling table is trained there"
    assert [line for line in said if "judged to" in line] == [
        "mamba-2k: judged to position 256",
        "transformer++-2k: judged to position 128",
        "mamba-mixed: judged to position 256",
    ]
    # Farther: what is named is judged anew, from places that leave as much behind; the others are not told of.
    farther = call(512, "mamba-2k")
    assert said == ["mamba-2k: judged to position 512"]
    assert list(farther["rows"]) == ["mamba-2k"]
    assert "transformer++-2k" in farther["not_run"]
    assert len(farther["rows"]["mamba-2k"]["bins"]) == 9
    places = [results["rows"]["mamba-2k"]["bins"][-1]["places"] for results in (first, farther)]
    assert places == [len(range(0, 900 - span, 64)) for span in (256, 512)]
    # Nearer again: nothing is done twice, and nothing of the farther one is told.
    assert call(256, "mamba-2k", "mamba-mixed") == first
    assert said == []
    table = (growth / "results.md").read_text()
    assert "| Mamba, 2k, 4k and 8k mixed |" in table
    assert "Every place has 256 bytes behind it. By book they are 11; the standard errors" in table
    rise = first["rows"]["mamba-2k"]
    assert rise["rise_error"] > 0
    assert f" | {100 * rise['rise']:.2f} ± {100 * rise['rise_error']:.2f} % |" in table
    assert json.loads((growth / "results.json").read_text()) == json.loads(json.dumps(first))
    assert recipe.report(growth, 512) == farther
    assert (growth / "figure.svg").exists()
    # The farthest is told unless another one is asked for; one that nobody judged to is refused, and nothing is lost.
    assert recipe.report(growth) == farther
    with pytest.raises(
        ConfigError, match=r"got 1024; there are 256 \(mamba-2k, mamba-mixed, trans.*; 512 \(mamba-2k\)"
    ):
        recipe.report(growth, 1024)
    assert json.loads((growth / "results.json").read_text()) == json.loads(json.dumps(farther))
    assert (growth / "figure.svg").exists()
    empty = recipe.report(recipe.make_folder(growth / "empty"))
    assert (empty["rows"], empty["not_run"]) == ({}, list(recipe.ROWS))

    # What was judged of another run, or on other books, is refused.
    def otherwise(run: RunConfig) -> RunConfig:
        return _brief(run).apply_overrides(["train.seed=1"])

    with pytest.raises(CheckpointError, match=r"positions-256.json.*other settings \(config.train.seed"):
        recipe.context_growth(["mamba-2k"], novels, growth, scaling=novels / "other", longest=256, change=otherwise)
    assert not (novels / "other").exists(), "before anything is trained"
    (novels / "novels_test.txt").write_text("Another book. " * 40)
    with pytest.raises(CheckpointError, match=r"positions-256.json' is of a run with other settings \(digest"):
        call(256, "mamba-2k")


def test_copies_lie_beside_the_books_with_names_of_their_own(novels: Path) -> None:
    party = "with Arthur, Tulkinghorn, Jarndyce, Snagsby, Woodcourt, Guppy, Smallweed "
    books = [f"and Sophia met Lincoln; so Sophia left Lincoln, {party}" * 400, "and Sophia sat; so Sophia rose. " * 600]
    (novels / "novels_train.txt").unlink()
    (novels / "novels_train").mkdir()
    for number, book in enumerate(books):
        (novels / "novels_train" / f"{number}.txt").write_text(book)
    run = recipe.growth_run("mamba-2k-names", novels)
    assert [Path(path).name.rpartition("-")[2] for path in run.data.paths[1:]] == ["0.tar", "1.tar", "2.tar"]
    assert all("-names2-shuffled-" in path for path in run.data.paths[1:])
    with pytest.raises(ConfigError, match="go with fields of its training"):
        recipe.GrowthRow("a row", copies=1)
    held = [
        [bytes(book.tolist()).decode() for book in language_scaling.books_of(build_token_file([path]), ByteTokenizer())]
        for path in run.data.paths
    ]
    assert held[0] == books
    # Copies have orders of their own, so that rows at equal distances don't read the same pages together.
    assert len({" met " in copy[0] for copy in held[1:]}) == 2
    held[1:] = [sorted(copy, key=lambda book: " met " not in book) for copy in held[1:]]
    for copy in held[1:]:
        assert len(copy) == 2
        first, second = (re.match(r"and ([A-Za-z]+) ", book) for book in copy)
        assert first is not None
        assert second is not None
        assert len(re.findall(rf"\b(?:met|and) {first[1]}\b|, and {first[1]}\b", copy[0])) >= 400
        assert len(re.findall(rf"(?:and|so) {second[1]} ", copy[1])) == 1200
    assert len({copy[0] for copy in held}) == 4
    # They are made once, and what is read of other books is another's.
    before = Path(run.data.paths[1]).stat().st_mtime_ns
    assert recipe.growth_run("mamba-2k-names", novels) == run
    assert Path(run.data.paths[1]).stat().st_mtime_ns == before
    recipe.context_growth(["mamba-2k-names"], novels, novels / "out", scaling=novels, longest=256, change=_brief)
    assert json.loads((novels / "out" / "mamba-2k-names" / "run.json").read_text())["status"] == "finished"
    (novels / "novels_train" / "2.txt").write_text("a third one")
    assert recipe.growth_run("mamba-2k-names", novels).data.paths[1] != run.data.paths[1]


def test_what_cannot_be_judged_is_refused_before_it_is_trained(novels: Path) -> None:
    for longest, error, message in (
        (96, ConfigError, "powers of two"),
        (1024, DataError, "a book of more than 1024 bytes"),
    ):
        with pytest.raises(error, match=message):
            recipe.context_growth(
                ["mamba-2k-carry"], novels, novels / "out", scaling=novels, longest=longest, change=_brief
            )
    assert not list((novels / "out").glob("*/run.json"))


def test_no_row_is_trained_where_another_cannot_be(novels: Path) -> None:
    def short(run: RunConfig) -> RunConfig:
        return _brief(run).apply_overrides(["train.length=64"])

    def wrong(run: RunConfig) -> RunConfig:
        return run.apply_overrides(["train.steps=4", "train.warmup=1", "train.length=64"])

    rows = ["mamba-2k-carry", "mamba-mixed"]
    with pytest.raises(ConfigError, match="shortest_length"):
        recipe.context_growth(rows, novels, novels / "out", scaling=novels, longest=256, change=wrong)
    assert not list((novels / "out").glob("*/run.json"))
    recipe.context_growth(rows, novels, novels / "out", scaling=novels, longest=256, change=short, say=lambda _: None)
    assert len(list((novels / "out").glob("*/run.json"))) == 2
    # The second row's folder holds another run.
    (novels / "out" / "mamba-mixed" / "positions-256.json").unlink()

    def longer(run: RunConfig) -> RunConfig:
        return short(run).apply_overrides(["train.steps=9"])

    rows = ["mamba-2k-noise", "mamba-mixed"]
    with pytest.raises(CheckpointError, match="steps"):
        recipe.context_growth(rows, novels, novels / "out", scaling=novels, longest=256, change=longer)
    assert not (novels / "out" / "mamba-2k-noise" / "run.json").exists()


def test_the_curve_on_record_is_the_documents() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "reproduction.md").read_text(encoding="utf-8")
    held = json.loads((root / "benchmarks" / "results" / "reproduce" / "context-growth-4m.json").read_text())
    for row, reaches in held["rows"].items():
        at = {one["first"]: one for one in reaches["1048576"]["bins"]}
        octaves = (1 << 10, 1 << 12, 1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19)
        cells = [f"{at[octave]['bits_per_byte']:.4f}" for octave in octaves]
        cells[-1] += f" ± {at[1 << 19]['standard_error']:.4f}"
        (line,) = [line for line in text.splitlines() if f"(`{row}`) |" in line]
        assert f"| {' | '.join(cells)} | {100 * reaches['1048576']['rise']:.2f} %" in line.replace("**", "")
        gain, error = reaches["262144"]["from_16k_to_256k"]
        whose, way = "row with copies" if row == "mamba-2k-names" else "one without", "falls" if gain < 0 else "rises"
        assert f"{whose} {way} by {abs(gain):.4f} ± {error:.4f}" in " ".join(text.split())
    places = [held["rows"]["mamba-2k-names"][reach]["from_16k_to_256k"] for reach in ("1048576", "262144")]
    told = ["{:+.4f} ± {:.4f}".format(*gain) for gain in places]
    assert f"{told[0]} at the 16 places and {told[1]} at the 47" in " ".join(text.split())
    # The two rows beside each other: their level at the 16 places and at the 47.
    apart = {}
    for reach in ("1048576", "262144"):
        names, far = (held["rows"][row][reach]["bins"] for row in ("mamba-2k-names", "mamba-2k-far"))
        for one, two in zip(names, far, strict=True):
            apart[reach, one["first"]] = one["bits_per_byte"] - two["bits_per_byte"]
    told = f"by {-apart['1048576', 1 << 19]:.3f} at the end; at the 47 the one without copies is, "
    told += f"by {apart['262144', 1 << 12]:.4f} in the octave from 4k and {apart['262144', 1 << 17]:.4f} in that from"
    assert told in " ".join(text.split())
    same = held["same_bytes"]["mamba-2k-names"]
    for near, words in ((1 << 14, "16k to 32k"), (1 << 12, "4k to 8k")):
        found = [same[f"{near}:{1 << power}"] for power in range(15, 20)]
        assert all(one["mean"] + 2 * one["standard_error"] < 0 for one in found)
        cells = [f"{one['mean']:.4f} ± {one['standard_error']:.4f}" for one in found]
        assert f"| with copies: all of it, minus {words} alone | {' | '.join(cells)} |" in text.replace("**", "")
        counts = " | ".join(str(one["stretches"]) for one in found)
        assert text.count(f"| stretches | {counts} |") == 2
    # The packaged model, asked the same.
    packaged = held["last_stages"]["packaged"]["base"]["same_bytes"]
    for near, words in ((1 << 14, "16k to 32k"), (1 << 12, "4k to 8k")):
        found = [packaged[f"{near}:{1 << power}"] for power in range(15, 20)]
        cells = [f"{one['mean']:+.4f} ± {one['standard_error']:.4f}".replace("+0.0000", "0.0000") for one in found]
        assert f"| all of it, minus {words} alone | {' | '.join(cells)} |" in text
    # The row without copies: nothing up to a million, and apart from the one with them from 256k on.
    without = [held["same_bytes"]["mamba-2k-far"][f"{1 << 14}:{1 << power}"] for power in range(15, 20)]
    cells = [f"{one['mean']:+.4f} ± {one['standard_error']:.4f}" for one in without]
    assert f"| without: all of it, minus 16k to 32k alone | {' | '.join(cells)} |" in text
    octaves = held["beyond"]["mamba-2k-far"]
    assert all(mean + 2 * error > 0 for first, mean, error, _ in octaves if first < 1 << 20)
    told = " ".join(text.split())
    copies = [same[f"{1 << 14}:{1 << power}"] for power in range(15, 20)]
    for one, two in list(zip(without, copies, strict=True))[2:]:
        assert one["stretches"] == two["stretches"]
        error = math.hypot(one["standard_error"], two["standard_error"])
        assert one["mean"] - two["mean"] > 2 * error
        assert f"{one['mean'] - two['mean']:.4f} ± {error:.4f}" in told
    # What lies beyond 512k is of the two octaves that `gains_beyond` tells apart.
    last = [one for one in octaves if one[0] >= 1 << 19]
    counts = [count for *_, count in last]
    assert without[-1]["stretches"] == sum(counts)
    assert without[-1]["mean"] == pytest.approx(sum(mean * count for _, mean, _, count in last) / sum(counts))
    _, gain, error, count = octaves[-1]
    assert f"in {count} stretches" in told
    assert f"the row without gains, too, {-gain:.4f} ± {error:.4f}" in told
    assert [
        [octave, one["mean"], one["standard_error"], one["stretches"]]
        for octave, one in zip((1 << 15, 1 << 16, 1 << 17, 1 << 18), without[:-1], strict=True)
    ] == octaves[:4]
    assert f"{octaves[2][1]:.5f} ± {octaves[2][2]:.5f} in the octave from 128k" in told
    for words, (_, mean, error, _) in zip(("256k", "512k"), octaves[3:5], strict=True):
        assert f"{mean:+.4f} ± {error:.4f} from {words}" in told


def test_the_curve_of_a_million_parameters_on_record_is_the_documents() -> None:
    root = Path(__file__).parents[2]
    lines = (root / "docs" / "reproduction.md").read_text(encoding="utf-8").splitlines()
    held = json.loads((root / "benchmarks" / "results" / "reproduce" / "context-growth.json").read_text())
    names = {
        "mamba-2k": "Mamba, 2k",
        "mamba-2k-carry": "Mamba, 2k, state carried",
        "mamba-2k-far": "Mamba, 2k, carried far, slow steps",
        "mamba-8k-far": "Mamba, 8k, carried far, slow steps",
        "mamba-8k": "Mamba, 8k",
        "mamba-mixed": "Mamba, 2k, 4k and 8k mixed",
        "mamba-64k": "Mamba, 64k",
        "transformer++-2k": "Transformer++, 2k",
        "pythia-2k": "Transformer (Pythia), 2k",
    }
    assert list(held["rows"]) == list(names)
    octaves = (1 << 10, 1 << 12, 1 << 14, 1 << 17, 1 << 19)
    bits = {row: {one["first"]: one["bits_per_byte"] for one in facts["bins"]} for row, facts in held["rows"].items()}
    lowest = {octave: min(of_row.get(octave, math.inf) for of_row in bits.values()) for octave in octaves}
    for row, facts in held["rows"].items():
        cells = []
        for octave in octaves:
            cell = f"{bits[row][octave]:.4f}" if octave in bits[row] else ""
            cells.append(f"**{cell}**" if bits[row].get(octave) == lowest[octave] else cell)
        gain, rise, error = facts["from_16k_to_256k"], 100 * facts["rise"], facts["rise_error"]
        cells.append("{:+.4f} ± {:.4f}".format(*gain) if gain else "")
        told = f"{rise:.0f}" if rise > 100 else f"{rise:.2f}" if error is None else f"{rise:.2f} ± {100 * error:.2f}"
        assert f"| {names[row]} | {' | '.join(cells)} | {told} % |".replace("|  ", "| ") in lines
