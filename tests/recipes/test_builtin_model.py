"""The run of the model in the box, in seconds: it ends in time and decayed, carries states, judges fairly."""

from __future__ import annotations

import csv
import itertools
import json
import lzma
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from statescan.data import ByteTokenizer, TokenFile, build_token_file
from statescan.errors import CheckpointError, ConfigError, DataError, TrainingError
from statescan.evaluate import evaluate_tokens, window_bits
from statescan.models import CausalLM, MambaConfig, TransformerConfig
from statescan.recipes import builtin_model as recipe
from statescan.recipes.builtin_model import (
    DROPOUTS,
    GRID,
    ROWS,
    UPDATES,
    LanguageRun,
    builtin_model,
    compare,
    judge,
    train_language_model,
    tune,
    tuned,
)
from statescan.recipes.language_scaling import initial_spread
from statescan.train.config import apply_overrides

SMALL = LanguageRun(
    "mamba", MambaConfig(16, 1, 256), seconds=0.0, steps=12, batch_size=2, length=16, warmup=3, lr=1e-2, carried=0.5
)
TWIN = replace(SMALL, row="transformer++", model=TransformerConfig(16, 1, 256, n_head=2), steps=9, carried=0)


@pytest.fixture
def text() -> np.ndarray:
    return np.frombuffer(b"A rose is a rose is a rose. " * 200, np.uint8)


@pytest.fixture
def small(tmp_path: Path, text: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Small rows, and the arguments of a call on small texts."""
    monkeypatch.setitem(ROWS, "mamba", SMALL)
    monkeypatch.setitem(ROWS, "transformer++", TWIN)
    data = tmp_path / "texts"
    data.mkdir()
    for name in (*recipe.SHIPPED_TEXTS, "novels_valid", "novels_test"):
        (data / f"{name}.txt.xz").write_bytes(lzma.compress(text.tobytes()[:600]))
    return {"data": data, "out": tmp_path / "out", "cache": tmp_path / "cache", "say": lambda line: None}


def test_the_models_are_of_one_size_and_fit_the_box() -> None:
    counts = {name: CausalLM(run.model, device="meta").parameter_count() for name, run in ROWS.items()}
    assert counts["transformer++"] == pytest.approx(counts["mamba"], rel=0.005)
    mamba = CausalLM(ROWS["mamba"].model, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in mamba.parameters()) < 16e6


def test_the_twin_gets_what_the_packaged_model_got_and_the_spread_of_its_width() -> None:
    record = Path(__file__).parents[2] / "benchmarks" / "results" / "reproduce" / "builtin-model.json"
    packaged = json.loads(record.read_text(encoding="utf-8"))["runs"][0]
    twin = ROWS["transformer++"]
    assert (twin.steps, twin.seconds) == (packaged["steps"], 0.0)
    assert packaged["steps"] == UPDATES
    assert (
        twin.model.to_dict()["initializer_range"]
        == initial_spread(320)
        == pytest.approx(0.02 * (768 / 320) ** 0.5, abs=1e-4)
    )
    # The rate is each one's own: the grid is what makes the same care of it.
    same = ("batch_size", "length", "warmup", "weight_decay", "betas", "clip", "swapped", "seed")
    assert {name: twin.to_dict()[name] for name in same} == {name: packaged["run"][name] for name in same}
    assert twin.model.to_dict()["dropout"] == packaged["run"]["model"]["dropout"]
    assert {row: run.lr for row, run in ROWS.items()} == {"mamba": packaged["run"]["lr"], "transformer++": 4e-3}


def test_seconds_take_the_place_of_a_rows_updates(small: dict[str, Any]) -> None:
    run = builtin_model(**small, seconds=0.1)["mamba"]["run"]
    assert (run["seconds"], run["steps"], SMALL.steps) == (0.1, 0, 12)


def test_the_rate_rises_and_ends_at_zero_by_updates_or_by_time() -> None:
    run = replace(SMALL, steps=100, seconds=10.0, warmup=10, lr=1.0)
    assert run.learning_rate(0, 0.0) == pytest.approx(0.1)
    assert run.learning_rate(50, run.progress(50, 0.0)) == pytest.approx(0.5)
    assert run.learning_rate(50, run.progress(50, 7.5)) == pytest.approx(0.25)
    assert run.learning_rate(50, run.progress(50, 10.0)) == 0.0
    assert replace(run, steps=0).progress(10**6, 5.0) == 0.5


def test_a_run_by_time_ends_with_it(tmp_path: Path, text: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count()
    # A clock that is read twice an update, and so gives each a twentieth of the run.
    monkeypatch.setattr(recipe, "time", SimpleNamespace(perf_counter=lambda: 0.5 * next(readings)))
    trained = train_language_model(replace(SMALL, steps=0, seconds=20.0), text, tmp_path, say=lambda line: None)
    assert 8 + 14 <= trained["steps"] <= 8 + 20
    assert 20.0 <= trained["seconds"] < 22.0
    with open(tmp_path / "log.csv", newline="", encoding="utf-8") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates[-1] <= 0.1 * max(rates)
    assert 0 < trained["carried_from_step"] < trained["steps"]


def test_a_run_learns_and_is_rounded_as_it_is_shipped(tmp_path: Path, text: np.ndarray) -> None:
    trained = train_language_model(replace(SMALL, steps=60), text, tmp_path, say=lambda line: None)
    assert trained["final_loss"] < 5.0 < np.log(256)
    stored = CausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = CausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a.float(), b) for a, b in zip(stored.parameters(), wide.parameters(), strict=True))
    assert trained["file_bytes"] < 3 * trained["parameters"]


def test_rows_go_on_where_they_ended() -> None:
    windows = recipe._Windows(replace(SMALL, batch_size=4), 1000, 0)
    first, second = windows.onwards(), windows.onwards()
    inside = first + SMALL.length <= 1000 - SMALL.length - 1
    assert inside.any()
    assert (second[inside] == first[inside] + SMALL.length).all()
    assert ((second >= 0) & (second < 1000 - SMALL.length)).all()


def test_half_of_the_windows_have_other_names() -> None:
    windows = recipe._Windows(replace(SMALL, batch_size=2000), 1000, 3000)
    starts = windows.anywhere()
    assert 0.45 < (starts < 1000).mean() < 0.55
    assert starts.max() < 4000 - SMALL.length
    assert not ((starts >= 1000 - SMALL.length) & (starts < 1000)).any()
    first, second = windows.onwards(), windows.onwards()
    inside = first + SMALL.length < 4000 - SMALL.length
    assert (second[inside] == first[inside] + SMALL.length).all()
    # fewer bytes than a window beside the text: nothing past their end
    assert recipe._Windows(replace(SMALL, batch_size=2000), 1000, 5).anywhere().max() <= 1005 - SMALL.length - 1


def test_epochs_are_of_the_text_and_a_text_without_names_is_refused(tmp_path: Path, text: np.ndarray) -> None:
    plain = train_language_model(SMALL, text, tmp_path / "plain", say=lambda line: None)
    assert plain["epochs"] == pytest.approx(12 * 2 * 16 / len(text))
    page = np.frombuffer(b"and Sophia met Sophia; so Lincoln, so Lincoln went\n" * 40, np.uint8)
    run = replace(SMALL, swapped=3, steps=300, carried=0.0)
    trained = train_language_model(run, page, tmp_path / "beside", say=lambda line: None)
    whole = 300 * 2 * 16 / len(page)
    assert 0.4 * whole < trained["epochs"] < 0.6 * whole
    with pytest.raises(DataError, match=r"two names at least, .*; got 0; train without"):
        train_language_model(run, np.frombuffer(b"no name " * 40, np.uint8), tmp_path / "none", say=lambda line: None)
    assert not (tmp_path / "none").exists()


def test_copies_with_other_names_lie_behind_the_text() -> None:
    page = np.frombuffer(b"and Sophia met Sophia; so Lincoln, so Lincoln went\n" * 4, np.uint8)
    run = replace(SMALL, swapped=2)
    copies = recipe._copies(page, run)
    assert recipe._copies(page.copy(), run) is copies, "a grid's runs make them once"
    assert recipe._copies(page, replace(run, seed=1)).tobytes() != copies.tobytes()
    held = recipe._Course(run, page, copies, torch.device("cpu"), False)._text.numpy().tobytes()
    assert held.startswith(page.tobytes())
    assert held.count(b"and ") == 12
    assert held[len(page) :] != page.tobytes() * 2
    with pytest.raises(ConfigError, match="swapped must be at least 0, got -1"):
        replace(SMALL, swapped=-1)


def test_carried_states_reach_the_next_window(text: np.ndarray) -> None:
    run = replace(SMALL, fresh=0.0)
    course = recipe._Course(run, text, text[:0], torch.device("cpu"), False)
    start = course.windows.onwards().copy()
    course.windows._lanes = start.copy() - run.length
    course.update(0.0, True)
    course.update(0.0, True)
    ids = torch.from_numpy(np.stack([text[s : s + 2 * run.length] for s in start]).astype(np.int64))
    with torch.no_grad():
        whole = course.model(ids, state=course.model.init_state(run.batch_size)).state
    assert course._initial is not None
    for held, wanted in zip(course._initial._held, whole, strict=True):
        torch.testing.assert_close(held.ssm, wanted.ssm, rtol=1e-4, atol=1e-5)


@pytest.fixture
def books(tmp_path: Path, text: np.ndarray) -> TokenFile:
    """Two books, of 110 and 70 bytes."""
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, size in zip(paths, (110, 70), strict=True):
        path.write_bytes(text.tobytes()[:size])
    return build_token_file(paths, cache=tmp_path / "books")


def test_scores_are_those_of_the_whole_and_of_each_book(books: TokenFile) -> None:
    torch.manual_seed(0)
    model, tokens = CausalLM(MambaConfig(16, 1, 256)).eval(), np.asarray(books.tokens)
    scores, blocks = judge(model, books, 16)
    told: dict[str, Any] = {"tokenizer": ByteTokenizer()}
    assert scores["windows"] == pytest.approx(evaluate_tokens(model, tokens, context=16, **told).bits_per_byte)
    carried = evaluate_tokens(model, tokens, context=64, carry_state=True, **told).bits_per_byte
    assert scores["carried"] == pytest.approx(carried, rel=1e-6)
    assert scores["overlapping"] == pytest.approx(window_bits(model, tokens, 16, 8).mean())
    assert scores["bytes"] == len(tokens) - 1 == sum(book["bytes"] for book in scores["books"])
    start = int(books.document_offsets[1])
    # The first book's first byte is not judged; the second's is, after the mark between them.
    assert [book["bytes"] for book in scores["books"]] == [start - 1, len(tokens) - start]
    bits = window_bits(model, tokens, 16, 16)
    assert scores["books"][1]["windows"] == pytest.approx(bits[start - 1 :].mean())
    assert all(scores[f"{name}_standard_error"] > 0 for name in ("windows", "overlapping", "carried"))
    first = [list(map(int, octave[:2])) for octave in scores["carried_by_position"]]
    assert first[:3] == [[1, 1], [2, 3], [4, 7]]
    assert first[-1][1] == len(tokens) - 1
    assert blocks["windows"].bytes.max() == 16


def test_two_models_are_compared_block_by_block(books: TokenFile) -> None:
    torch.manual_seed(0)
    mamba, twin = CausalLM(SMALL.model).eval(), CausalLM(TWIN.model).eval()
    (mine, one), (theirs, other) = judge(mamba, books, 16), judge(twin, books, 16)
    found = compare(one, other)
    assert found["windows"]["difference"] == pytest.approx(mine["windows"] - theirs["windows"])
    assert found["each as it reads best"]["difference"] == pytest.approx(mine["carried"] - theirs["overlapping"])
    for number, book in enumerate(found["overlapping"]["books"]):
        wanted = mine["books"][number]["overlapping"] - theirs["books"][number]["overlapping"]
        assert book["difference"] == pytest.approx(wanted)
    # A model that is everywhere worse by as much is so without a doubt, however hard the passages differ.
    worse = {name: judged._replace(bits=judged.bits + 0.5 * judged.bytes) for name, judged in other.items()}
    worse["carried"] = worse["overlapping"]
    found = compare(worse, other)
    assert found["windows"]["difference"] == pytest.approx(0.5)
    assert found["windows"]["standard_error"] == pytest.approx(0.0, abs=1e-9)
    assert theirs["windows_standard_error"] > 1e-4


def test_rows_of_a_folder_are_trained_once_and_the_twin_as_long_as_mamba(
    small: dict[str, Any], text: np.ndarray
) -> None:
    out = small["out"]
    results = builtin_model(**small, rows=["transformer++", "mamba"])
    assert results["transformer++"]["steps"] == results["mamba"]["steps"] == 12
    scores = results["mamba"]["scores"]["novels_test"]
    assert scores["carried"] is not None
    assert results["transformer++"]["scores"]["novels_test"]["carried"] is None
    table = (out / "results.md").read_text(encoding="utf-8")
    assert f"{scores['carried']:.4f}" in table
    beside = results["mamba"]["beside_transformer++"]["novels_test"]["windows"]
    assert f"{beside['difference']:+.4f} ± {beside['standard_error']:.4f}" in table
    assert beside["difference"] == pytest.approx(
        scores["windows"] - results["transformer++"]["scores"]["novels_test"]["windows"]
    )

    before = (out / "mamba" / "model.safetensors").stat().st_mtime_ns
    assert builtin_model(**small) == json.loads((out / "results.json").read_text())
    assert (out / "mamba" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="other settings"):
        builtin_model(**small, change=lambda run: replace(run, lr=1.0))
    with pytest.raises(ConfigError, match="must read what 'mamba'"):
        builtin_model(**small, rows=["transformer++"], steps=13)
    with pytest.raises(ConfigError, match="must read what 'mamba'"):
        builtin_model(**small, rows=["transformer++"], change=lambda run: replace(run, batch_size=4))
    (small["data"] / f"{recipe.SHIPPED_TEXTS[0]}.txt.xz").write_bytes(lzma.compress(text.tobytes()[:700]))
    with pytest.raises(CheckpointError, match="other texts"):
        builtin_model(**small)


def test_a_twin_alone_takes_the_updates_of_its_row_or_those_asked_for(small: dict[str, Any]) -> None:
    assert builtin_model(**small, rows=["transformer++"])["transformer++"]["steps"] == TWIN.steps
    with pytest.raises(ConfigError, match="seconds"):
        builtin_model(**small, rows=["transformer++"], seconds=1.0)
    with pytest.raises(ConfigError, match="must end by steps"):
        builtin_model(**small, rows=["transformer++"], change=lambda run: replace(run, seconds=1.0))
    small["out"] = small["out"].with_name("other")
    assert builtin_model(**small, rows=["transformer++"], steps=3)["transformer++"]["steps"] == 3


def test_a_mamba_after_its_twin_takes_as_many_updates(small: dict[str, Any], text: np.ndarray) -> None:
    out = small["out"]
    builtin_model(**small, rows=["transformer++"])
    asked: list[dict[str, Any]] = [
        {"steps": 12},
        {"seconds": 1.0},
        # As many, if the time is long enough for them.
        {"steps": 9, "change": lambda run: replace(run, seconds=1.0)},
        {"steps": 9, "change": lambda run: replace(run, length=8)},
    ]
    for wrong in asked:
        with pytest.raises(ConfigError, match=r"'mamba' must read what 'transformer\+\+' in .*name another folder"):
            builtin_model(**small, **wrong)
    path = small["data"] / f"{recipe.SHIPPED_TEXTS[0]}.txt.xz"
    before = path.read_bytes()
    path.write_bytes(lzma.compress(text.tobytes()[:700]))
    with pytest.raises(CheckpointError, match="other texts"):
        builtin_model(**small, steps=9)
    assert not (out / "mamba").exists()
    path.write_bytes(before)
    assert "beside_transformer++" in builtin_model(**small, steps=9)["mamba"]


def test_a_mamba_by_time_is_told_again_beside_its_twin(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "mamba", replace(SMALL, steps=0, seconds=0.1))
    results = builtin_model(**small, rows=list(ROWS))
    assert results["transformer++"]["steps"] == results["mamba"]["steps"] > 0
    assert builtin_model(**small) == results


def test_all_rows_are_checked_before_the_first_is_trained(small: dict[str, Any]) -> None:
    def carried(run: LanguageRun) -> LanguageRun:
        return replace(run, carried=0.25)

    for call in (builtin_model, tune):
        with pytest.raises(ConfigError, match="carried by Mamba alone"):
            call(**small, rows=list(ROWS), change=carried)
        with pytest.raises(ConfigError, match="row must stay 'mamba', got 'rose'"):
            call(**small, rows=["mamba"], change=lambda run: replace(run, row="rose"))
    assert not list(small["out"].iterdir())
    builtin_model(**small, rows=["transformer++"], steps=12)
    with pytest.raises(CheckpointError, match="other settings"):
        builtin_model(**small, rows=list(ROWS), change=lambda run: replace(run, lr=1.0))
    assert not (small["out"] / "mamba").exists()
    # How many updates the twin takes is known when Mamba is trained.
    assert builtin_model(**small, rows=list(ROWS))["mamba"]["steps"] == 12


def test_scores_are_of_the_text_as_it_is(small: dict[str, Any], text: np.ndarray) -> None:
    lines: list[str] = []
    small["say"] = lines.append
    before = builtin_model(**small, rows=list(ROWS))["mamba"]["scores"]["novels_test"]
    assert builtin_model(**small)["mamba"]["scores"]["novels_test"] == before
    (small["data"] / "novels_test.txt.xz").write_bytes(lzma.compress(text.tobytes()[:500]))
    lines.clear()
    results = builtin_model(**small)
    assert results["mamba"]["scores"]["novels_test"]["bytes"] < before["bytes"]
    assert results["transformer++"]["scores"] == {}
    assert "beside_transformer++" not in results["mamba"]
    assert any(line.startswith("transformer++: left out") for line in lines)
    assert "beside_transformer++" in builtin_model(**small, rows=list(ROWS))["mamba"]


def test_a_twin_is_told_where_mamba_is_gone_or_not_judged(small: dict[str, Any]) -> None:
    builtin_model(**small, rows=list(ROWS))
    path = small["out"] / "mamba" / "trained.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    # As a run that was broken off before it was judged.
    path.write_text(json.dumps({name: value for name, value in facts.items() if name != "scores"}))
    assert "beside_transformer++" not in builtin_model(**small, rows=["transformer++"])["mamba"]
    path.unlink()
    assert list(builtin_model(**small, rows=["transformer++"], steps=12)) == ["transformer++"]


def test_what_was_tuned_with_other_settings_is_no_care_of_this_run(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def single(run: LanguageRun) -> LanguageRun:
        return replace(run, batch_size=1)

    out = small["out"]
    monkeypatch.setattr(recipe, "UPDATES", 4)
    tune(**small, rows=["mamba"], share=0.5, change=single)
    care = tuned("mamba", out, single(SMALL).to_dict())
    assert set(care) == {"lr", "dropout"}
    assert care["lr"] != SMALL.lr
    assert tuned("mamba", out) == {}
    assert builtin_model(**small)["mamba"]["run"]["lr"] == SMALL.lr
    assert "not from a grid gone through in this folder: mamba" in (out / "results.md").read_text(encoding="utf-8")
    (out / "mamba" / "trained.json").unlink()
    assert builtin_model(**small, change=single)["mamba"]["run"]["lr"] == care["lr"]
    assert "not from a grid" not in (out / "results.md").read_text(encoding="utf-8")
    # Older files don't say with what.
    told = json.loads((out / "tuning.json").read_text(encoding="utf-8"))
    for one in told:
        del one["beyond"]
    (out / "tuning.json").write_text(json.dumps(told))
    assert tuned("mamba", out) == care


@pytest.mark.parametrize("field", ["lr", "steps", "seconds", "model.dropout"])
def test_what_the_grid_sets_cannot_be_changed(small: dict[str, Any], field: str) -> None:
    # A rate and a dropout of the grid itself: some of its points stay as they are.
    value = {"lr": GRID[0], "steps": 2, "seconds": 1.0, "model.dropout": DROPOUTS[0]}[field]
    with pytest.raises(ConfigError, match=f"tuning sets {field} itself"):
        tune(**small, rows=["mamba"], change=lambda run: apply_overrides(run, [f"{field}={value}"]))
    assert not list(small["out"].iterdir())


def test_a_diverged_run_of_other_settings_is_not_taken(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(*_: Any, **__: Any) -> dict[str, Any]:
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(recipe, "train_language_model", diverges)
    assert {one["bits_per_byte"] for one in tune(**small, rows=["mamba"])} == {None}
    with pytest.raises(CheckpointError, match=r"diverged\.json.* \(batch_size = 2, wanted 1\)"):
        tune(**small, rows=["mamba"], change=lambda run: replace(run, batch_size=1))


def test_a_grid_is_judged_on_the_text_as_it_is(
    small: dict[str, Any], text: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "UPDATES", 4)

    def bits() -> set[float]:
        told = tune(**small, rows=["mamba"], share=0.5)
        return {one["bits_per_byte"] for one in told if one["dropout"] == DROPOUTS[0]}

    before = bits()
    (small["data"] / "novels_valid.txt.xz").write_bytes(lzma.compress(text.tobytes()[:100]))
    assert not before & bits()


def test_both_rows_are_tuned_over_one_grid_and_go_by_it(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    out, lines, trained = small["out"], [], []
    small["say"] = lines.append
    real = recipe.train_language_model

    def counted(run: LanguageRun, *args: Any, **fields: Any) -> dict[str, Any]:
        trained.append(run.row)
        if run.row == "mamba" and run.lr == GRID[-1]:
            raise TrainingError("the loss is nan")
        return real(run, *args, **fields)

    monkeypatch.setattr(recipe, "train_language_model", counted)
    monkeypatch.setattr(recipe, "UPDATES", 16)
    told = tune(**small, share=0.5)
    assert trained.count("mamba") == trained.count("transformer++") == len(GRID) + len(DROPOUTS) - 1
    assert {one["updates"] for one in told} == {8}
    assert json.loads((out / "tuning.json").read_text()) == told
    assert [one["lr"] for one in told if one["bits_per_byte"] is None] == [GRID[-1]]
    tune(**small, share=0.5)
    # The run that diverged isn't tried again either.
    assert len(trained) == 2 * (len(GRID) + len(DROPOUTS) - 1)

    for row in ROWS:
        mine = [one for one in told if one["row"] == row]
        first = [one for one in mine if one["dropout"] == DROPOUTS[0] and one["bits_per_byte"] is not None]
        lr = min(first, key=lambda one: one["bits_per_byte"])["lr"]
        at_it = [one for one in mine if one["lr"] == lr]
        assert {one["dropout"] for one in at_it} == set(DROPOUTS)
        dropout = min(at_it, key=lambda one: one["bits_per_byte"])["dropout"]
        assert tuned(row, out) == {"lr": lr, "dropout": dropout}
    results = builtin_model(**small, rows=list(ROWS))
    for row, facts in results.items():
        assert (facts["run"]["lr"], facts["run"]["model"]["dropout"]) == tuple(tuned(row, out).values())
    assert "not from a grid" not in (out / "results.md").read_text(encoding="utf-8")

    # Half of a grid is not the same care: the row keeps its own, and the table says so.
    (out / "tuning.json").write_text(json.dumps([one for one in told if one["row"] == "mamba" or one["lr"] > GRID[0]]))
    assert tuned("transformer++", out) == {}
    builtin_model(**small)
    table = (out / "results.md").read_text(encoding="utf-8")
    assert "not from a grid gone through in this folder: transformer++." in table
    with pytest.raises(ConfigError, match="share must be in"):
        tune(**small, share=0.0)


def test_a_run_that_is_broken_off_leaves_no_folder(
    tmp_path: Path, text: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe._Course, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_language_model(SMALL, text, tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_runs_that_cannot_be_are_refused(text: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="a run must end"):
        replace(SMALL, steps=0, seconds=0.0)
    with pytest.raises(ConfigError, match="carried by Mamba alone"):
        replace(TWIN, carried=0.5)
    with pytest.raises(ConfigError, match="at least length"):
        recipe._Windows(SMALL, 10, 0)
    for name, value in {"batch_size": 0, "length": 0, "seed": -1}.items():
        with pytest.raises(ConfigError, match=f"{name} must be at least {value + 1}, got {value}"):
            replace(SMALL, **{name: value})


def test_the_pairs_and_the_grid_on_record_are_the_documents() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "reproduction.md").read_text(encoding="utf-8").replace("**", "")
    lines, words = text.splitlines(), " ".join(text.split())
    held = json.loads((root / "benchmarks" / "results" / "reproduce" / "builtin-model.json").read_text())
    beside = held["beside_the_tuned_twin"]
    for model, whose in (("packaged", "packaged"), ("tuned_mamba", "the grid chose")):
        readings = [("each as it reads best", "as it reads best"), ("windows", "in windows of 2,048")]
        if model == "packaged":
            readings.append(("overlapping", "overlap by half"))
        for reading, how in readings:
            pair = beside[model][reading]
            cells = [f"{pair['difference']:+.4f} ± {pair['standard_error']:.4f}"]
            cells += [f"{book['difference']:+.4f}" for book in pair["books"]]
            (line,) = [line for line in lines if line.endswith(f" | {' | '.join(cells)} |")]
            assert whose in line
            assert how in line
    full = beside["nearly_full"]
    assert full["difference"] == pytest.approx(full["packaged"] - full["twin"])
    assert f"({full['windows']} windows, their last 256 bytes" in words
    assert f"it is still {-full['difference']:.4f} ± {full['standard_error']:.4f} above the packaged Mamba" in words
    starts = {
        "| 405 s, one H200: the weights": 0,
        "| Transformer++ twin at ": 1,
        "| Mamba at what the grid chose": 2,
        "| Mamba at 8e-3, dropout": 3,
        "| 405 s, one H200, without copies": 4,
        "| 165 s, one H100, without copies": 5,
        "| Transformer++ without copies": 7,
    }
    for start, number in starts.items():
        (line,) = [line for line in lines if line.startswith(start)]
        run = held["runs"][number]
        scores, cells = run["scores"]["novels_test"], []
        for way in ("carried", "windows", "overlapping"):
            bits, error = (scores.get(key) for key in (way, f"{way}_standard_error"))
            cells.append(f" {bits:.4f} " + (f"± {error:.4f} " if error else "") if bits else " ")
        assert line.endswith(f"|{'|'.join(cells)}|")
        _, updates, _, pace, *_ = line.split(" | ")
        assert updates == f"{run['steps']:,}"
        assert pace.partition(",")[0] == f"{run['bytes_per_second'] / 1e6:.2f}"
    # The grid: five rates at the dropout of 0.05, and at the best one three more dropouts.
    for row, start in (("mamba", "| Mamba | "), ("transformer++", "| Transformer++ | ")):
        found = {(one["lr"], one["dropout"]): one["bits_per_byte"] for one in held["tuning"] if one["row"] == row}
        best = min(GRID, key=lambda lr: found[lr, DROPOUTS[0]])
        rates = [f"{found[lr, DROPOUTS[0]]:.4f}" for lr in GRID]
        dropouts = [f"{found[best, dropout]:.4f}" for dropout in DROPOUTS[1:]]
        assert f"{start}{' | '.join(rates)} | {' / '.join(dropouts)} |" in lines
    assert f"| | {' | '.join(f'{lr:.0e}'.replace('e-0', 'e-') for lr in GRID)} | at the best rate, dropout " in text
    # The state carried, beside windows of the same bytes, by octaves from 4k on.
    octaves = held["runs"][0]["position"]["rows"][1:]
    assert [one["first"] for one in octaves] == [1 << power for power in range(12, 20)]
    for name, key in (("state carried", "carried"), ("windows of 2,048", "windows")):
        assert f"| {name} | {' | '.join(f'{one[key]:.3f}' for one in octaves)} |" in lines
    gained = [(f"{one['gain']:.3f}", f"{one['standard_error']:.3f}") for one in octaves[:-1]]
    gained.append((f"{octaves[-1]['gain']:.4f}", f"{octaves[-1]['standard_error']:.4f}"))
    assert f"| gained | {' | '.join(f'{gain} ± {error}' for gain, error in gained)} |" in lines
