"""The sound recipes on a few made recordings: the splits, a resumed table, digits made and judged."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from statescan.cli.app import app
from statescan.data.audio import dequantize, quantize, write_audio
from statescan.data.augment import VaryWaveforms
from statescan.data.recordings import SILENCE, Recordings, load_recordings
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.evaluate.waveforms import paired_difference
from statescan.models import ClassifierConfig
from statescan.recipes import raw_audio, spoken_digits
from statescan.recipes.spoken_digits import digit_parts, digit_run, read_digits, speaker_and_take
from statescan.recipes.synthetic import percent, wilson
from statescan.train import classify, waveform
from statescan.train.config import build_config
from statescan.train.finished import weights_digest


def digit(number: int, speaker: int, take: int) -> np.ndarray:
    """A tone whose pitch says the digit: what even a tiny model hears."""
    rng = np.random.default_rng([number, speaker, take])
    time = np.arange(160 + 8 * take)
    wave = 0.2 * np.sin(time * 0.08 * (number + 1) + speaker) + 0.01 * rng.normal(size=len(time))
    return wave / np.abs(wave).max()


def digits(shift: int = 0) -> Recordings:
    """Recordings as `read_digits` wants them, others with another shift."""
    parts, names, labels = [], [], []
    for number in range(10):
        for speaker, name in enumerate(("ann", "bob")):
            for take in (0, 1, 5, 7, 8, 9, 10):
                parts.append(quantize(digit(number, speaker + shift, take)))
                names.append(f"{number}_{name}_{take}.wav")
                labels.append(number)
    return Recordings(
        np.concatenate(parts),
        np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
        tuple(names),
        8000,
        labels=np.array(labels, np.uint8),
        classes=tuple("0123456789"),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    digits().save(path)
    return str(path)


CLASSIFIER = ["train.epochs=1", "train.batch_size=16", "model.d_model=8", "model.n_layer=1", "train.warmup=2"]
WAVEFORM = ["train.steps=2", "train.window=64", "train.batch_size=2", "model.d_model=4", "model.n_layer=1"]


def test_the_splits_share_nothing(data):
    recordings = read_digits(data)
    assert len(recordings) == 140
    for split, sizes in (("official", (80, 20, 40)), ("bob", (50, 20, 70))):
        parts = digit_parts(recordings, split)
        assert tuple(map(len, parts)) == sizes
        names = [set(part.names) for part in parts]
        assert sum(map(len, names)) == len(set.union(*names)) == 140
    official = digit_parts(recordings, "official")[2]
    assert all(speaker_and_take(name)[1] < 5 for name in official.names)
    assert all(speaker_and_take(name)[0] == "bob" for name in digit_parts(recordings, "bob")[2].names)
    assert not any(
        speaker_and_take(name)[0] == "bob" for part in digit_parts(recordings, "bob")[:2] for name in part.names
    )
    with pytest.raises(ConfigError, match="split must be official or one of"):
        digit_parts(recordings, "carl")


def test_only_what_is_learnt_from_is_varied_and_sets_the_scale(data):
    recordings, vary = read_digits(data), VaryWaveforms()
    parts = digit_parts(recordings, "official")
    splits = spoken_digits.digit_splits(recordings, "official", vary)
    assert [split.vary for split in splits] == [vary, None, None]
    spread = [np.sqrt(np.mean((part.codes / 255 - SILENCE / 255) ** 2)) for part in parts]
    assert len(set(np.round(spread, 4))) == 3, "each part's own scale would be another"
    for split, part in zip(splits, parts, strict=True):
        assert split.deviation == pytest.approx(spread[0], rel=1e-6)
        assert split.mean == SILENCE / 255
        np.testing.assert_array_equal(split.labels, part.labels)
        np.testing.assert_array_equal(split.values[0, : split.lengths[0]], part[0])


def test_a_folder_is_read_as_the_file(data, tmp_path):
    pytest.importorskip("soundfile")
    made = load_recordings(data)
    for number in range(10):
        wave = dequantize(made[14 * number])
        write_audio(tmp_path / "wav" / made.names[14 * number], 0.1 * wave, 8000)
    read = read_digits(tmp_path / "wav")
    assert read.classes == made.classes
    assert all(np.abs(read.waveform(number)).max() == 1 for number in range(10))
    write_audio(tmp_path / "wav" / "noise.wav", wave, 8000)
    with pytest.raises(DataError, match="named digit_speaker_take"):
        read_digits(tmp_path / "wav")
    for name in ("7_ann.wav", "7_ann_x.wav"):
        with pytest.raises(DataError, match="names must be"):
            speaker_and_take(name)


def test_a_file_of_other_recordings_is_refused(tmp_path):
    good = digits()
    path = tmp_path / "digits.npz"
    copied = good.codes.copy()
    copied[good.offsets[8] : good.offsets[9]] = good[1]
    wrong = (
        ({"sample_rate": 16000}, "must hold sound at 8000 Hz, got 16000"),
        ({"quantization": "linear"}, "must hold mu-law's levels"),
        ({"labels": good.labels[::-1].copy()}, "must hold the labels that its names tell"),
        ({"labels": None}, "must hold the labels that its names tell"),
        ({"classes": tuple("abcdefghij")}, "got labels a, b, c"),
        ({"names": (good.names[1], *good.names[1:])}, "got a name twice"),
        ({"names": ("zero.wav", *good.names[1:])}, "names must be digit_speaker_take"),
        ({"codes": copied}, "the same 168 samples as '0_ann_1.wav' and as '0_bob_1.wav'"),
        ({"codes": np.clip(good.codes, 9, 246)}, "scaled to a loudest sample of 1"),
    )
    good.save(path)
    assert read_digits(path).digest == good.digest
    for change, words in wrong:
        dataclasses.replace(good, **change).save(path)
        with pytest.raises(DataError, match=words):
            read_digits(path)
    # Silence can't be scaled.
    codes = good.codes.copy()
    codes[: good.offsets[1]] = SILENCE
    dataclasses.replace(good, codes=codes).save(path)
    assert len(read_digits(path)) == 140


def test_rows_that_are_none():
    with pytest.raises(ConfigError, match="row must be"):
        digit_run("s5")
    with pytest.raises(ConfigError, match="frame must divide"):
        digit_run("s4", frame=7)
    assert digit_run("s4", frame=16).model.d_input == 16
    with pytest.raises(ConfigError, match="row must be"):
        raw_audio.waveform_run("s5")
    with pytest.raises(ConfigError, match="task must be"):
        raw_audio.waveform_run("s4-s4", task="noise")
    with pytest.raises(ConfigError, match="task must be digits"):
        raw_audio.waveform_run("conditional", task="music")
    sizes = []
    for row in raw_audio.ROWS:
        run = raw_audio.waveform_run(row)
        model = raw_audio.WaveformModel(run.model, device="meta")
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        # As many samples an update.
        assert run.train.window * run.train.batch_size == 4096 * 16
    assert max(sizes) < 1.15 * min(sizes)


def test_digits_are_learnt_resumed_and_tabled(data, tmp_path):
    options = {
        "rows": ("s4d", "mamba"),
        "splits": ("official", "bob"),
        "overrides": CLASSIFIER,
        "say": lambda text: None,
    }
    part = spoken_digits.spoken_digits(tmp_path, data, seconds=0, **options)
    assert part["runs"] == []
    spoken_digits.spoken_digits(tmp_path, data, **{**options, "rows": ("s4d",), "splits": ("official",)})
    whole = spoken_digits.spoken_digits(tmp_path, data, **options)
    assert [(run["row"], run["split"]) for run in whole["runs"]] == [
        ("s4d", "official"), ("mamba", "official"), ("s4d", "bob"), ("mamba", "bob")
    ]  # fmt: skip
    assert all(run["status"] == "finished" for run in whole["runs"])
    assert whole["runs"][0]["examples"] == {"train": 80, "valid": 20, "test": 40}
    table = (tmp_path / "results.md").read_text()
    assert "| S4D | 1 | official |" in table
    # 80 recordings learnt from, 16 an update.
    assert table.count("| 5 of 16 |") == 2
    assert table.count("| 3 of 16 |") == 2
    assert "| Mamba | 1 | speaker bob |" in table
    digits(7).save(tmp_path / "other.npz")
    with pytest.raises(CheckpointError, match=r"with other data \(train.digest = "):
        spoken_digits.spoken_digits(tmp_path, tmp_path / "other.npz", **options)
    with pytest.raises(CheckpointError, match=r"with other data \(vary.gain = 1.0, wanted 0.0\)"):
        spoken_digits.spoken_digits(tmp_path, data, vary=VaryWaveforms(gain=0.0), **options)
    facts = tmp_path / "mamba-bob" / "run.json"
    facts.write_text(facts.read_text().replace('"finished"', '"interrupted"'))
    other = {**options, "overrides": [*CLASSIFIER, "model.d_model=4"]}
    with pytest.raises(CheckpointError, match="other settings"):
        spoken_digits.spoken_digits(tmp_path, data, **other)
    with pytest.raises(CheckpointError, match=r"model\.d_model"):
        spoken_digits.spoken_digits(tmp_path, data, **{**other, "rows": ("mamba",), "splits": ("bob",)})


def test_what_is_held_out_of_music_is_its_middle(tmp_path):
    # Codes that tell the place, from two tracks of unlike length.
    lengths = (200, 120)
    codes = np.concatenate([np.arange(length, dtype=np.uint8) for length in lengths])
    Recordings(codes, np.array([0, 200, 320]), ("long.wav", "short.wav"), 8000).save(tmp_path / "tracks.npz")
    learnt, valid, test = raw_audio.music_parts(tmp_path / "tracks.npz")
    assert [(part[0], part[-1]) for part in map(learnt.__getitem__, range(4))] == [
        (0, 89),
        (110, 199),
        (0, 53),
        (66, 119),
    ]
    assert learnt.names == ("long.wav", "long.wav", "short.wav", "short.wav")
    np.testing.assert_array_equal(valid.codes, [*range(90, 100), *range(54, 60)])
    np.testing.assert_array_equal(test.codes, [*range(100, 110), *range(60, 66)])
    assert test.names == valid.names == ("long.wav", "short.wav")
    # No window of training reads on from one side of the middle to the other: each goes on by one, or is silence.
    for step in range(200):
        windows, numbers = waveform.window_batch(learnt, 64, 4, 0, step)
        for window, number in zip(windows, numbers, strict=True):
            heard = window[: min(64, learnt.lengths[number])].astype(int)
            assert (np.diff(heard) == 1).all()
            assert set(heard) <= set(learnt[int(number)].tolist())


def test_music_judged_at_its_ends_is_not_mixed_with_its_middle(data, tmp_path):
    options = {"rows": ("conv",), "task": "music", "overrides": WAVEFORM, "contexts": (8,), "say": str}
    now = raw_audio.raw_audio(tmp_path, data, **options)
    assert (len(now["runs"]), now["judged_at_ends"]) == (1, [])
    path = tmp_path / "conv" / "run.json"
    facts = json.loads(path.read_text())
    assert facts["data"].pop("middle") == [0.45, 0.5, 0.55]
    # As an earlier version left it, finished; and broken off, of which the recordings tell.
    path.write_text(json.dumps(facts))
    earlier = raw_audio.report(tmp_path)
    assert (earlier["runs"], earlier["judged_at_ends"]) == ([], ["conv"])
    assert "an earlier version judged them at the tracks' ends: conv." in (tmp_path / "results.md").read_text()
    with pytest.raises(CheckpointError, match=r"with other data \(middle = nothing, wanted \[0\.45, 0\.5, 0\.55\]\)"):
        raw_audio.raw_audio(tmp_path, data, **options)
    whole = load_recordings(data)
    ends = whole.between(0, 0.9), whole.between(0.9, 0.95)
    facts["status"] = "interrupted"
    for name, part in zip(("train", "valid"), ends, strict=True):
        facts["data"][name] = {"recordings": len(part), "samples": len(part.codes), "digest": part.digest}
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="wanted the train recordings = "):
        raw_audio.raw_audio(tmp_path, data, **options)


def test_music_is_learnt_by_time(data, tmp_path):
    parts = raw_audio.music_parts(data)
    whole = load_recordings(data)
    assert sum(len(part.codes) for part in parts) == len(whole.codes)
    before, behind = parts[0][0], parts[0][1]
    np.testing.assert_array_equal(np.concatenate([before, parts[1][0], parts[2][0], behind]), whole[0])
    options = {"rows": ("conv",), "task": "music", "overrides": WAVEFORM, "contexts": (8, 64), "say": str}
    results = raw_audio.raw_audio(tmp_path, data, **options)
    assert [run["task"] for run in results["runs"]] == ["music"]
    told = (tmp_path / "results.md").read_text()
    assert "the twentieth of each track behind its middle" in told
    assert "learnt from; the tracks' beginnings and ends are in it" in told
    assert "{" not in told
    scores = tmp_path / "conv" / "scores.json"
    stamp = scores.stat().st_mtime_ns
    raw_audio.raw_audio(tmp_path, data, **options)
    assert scores.stat().st_mtime_ns == stamp
    held = results["runs"][0]["scores"]
    # A twentieth of recordings of 160 to 240 samples: all of it, and what has at least 8 samples before it.
    assert held["all"]["samples"] == len(parts[2].codes)
    assert held["8"]["samples"] == int((parts[2].lengths - 8).clip(0).sum())
    assert list(held) == ["all", "8"]
    # Judged anew where something else is asked for, or the file is of an older form.
    raw_audio.raw_audio(tmp_path, data, **{**options, "contexts": (0, 4)})
    assert list(json.loads(scores.read_text())["scores"]) == ["all", "0", "4"]
    scores.write_text(json.dumps({"8": {"bits": 1.0, "samples": 2}}))
    assert raw_audio.report(tmp_path)["runs"][0]["scores"] == {}
    assert raw_audio.raw_audio(tmp_path, data, **options)["runs"][0]["scores"] == held
    with pytest.raises(CheckpointError, match=r"with other settings \(train.steps = 2, wanted 3\)"):
        raw_audio.raw_audio(tmp_path, data, **{**options, "overrides": [*WAVEFORM, "train.steps=3"]})
    digits(7).save(tmp_path / "other.npz")
    with pytest.raises(CheckpointError, match=r"with other data \(train.digest = "):
        raw_audio.raw_audio(tmp_path, tmp_path / "other.npz", **options)


def test_rows_are_compared_recording_by_recording(data, tmp_path):
    options = {"overrides": WAVEFORM, "contexts": (16, 164), "say": str}
    alone = raw_audio.raw_audio(tmp_path, data, rows=("conv",), **options)
    assert alone["runs"][0]["difference"] is None
    first, other = raw_audio.raw_audio(tmp_path, data, rows=("conv", "s4-s4"), **options)["runs"]
    assert (first["row"], other["row"]) == ("s4-s4", "conv")
    test = digit_parts(read_digits(data), "official")[2]
    for run in (first, other):
        each = np.array(run["each"])
        np.testing.assert_array_equal(each[:, 1], test.lengths)
        assert each[:, 0].sum() / each[:, 1].sum() == pytest.approx(run["scores"]["all"]["bits"], rel=1e-5)
        assert 5 < run["learnt_from"]["bits"] < 10
        assert run["learnt_from"]["samples"] == len(digit_parts(read_digits(data), "official")[0].codes)
    away = other["difference"]
    assert first["difference"] is None
    assert away["from"] == "s4-s4"
    assert away["bits"] == pytest.approx(other["scores"]["all"]["bits"] - first["scores"]["all"]["bits"], abs=1e-4)
    more = np.array(other["each"])[:, 0] - np.array(first["each"])[:, 0]
    rest = more - away["bits"] * test.lengths
    assert away["standard_error"] == pytest.approx(np.sqrt(40 / 39 * (rest**2).sum()) / test.lengths.sum())
    table = (tmp_path / "results.md").read_text()
    assert f"| {away['bits']:+.3f} ± {1.96 * away['standard_error']:.3f} |" in table
    # Half of the test's recordings are 160 samples long, the others 168.
    assert "| 6,560 of 40 | | | 5,840 of 40 | 80 of 20 |" in table


def test_sound_is_learnt_made_judged_and_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(raw_audio, "LONGEST", 64)
    monkeypatch.setattr(raw_audio, "CONTEXTS", (16, 64))
    out = tmp_path / "raw"
    line = ["reproduce", "raw-audio", "--data", data, "--out", str(out)]
    changes = [part for change in WAVEFORM for part in ("--set", change)]
    for row in ("s4d-mamba", "conditional"):
        result = CliRunner().invoke(app, [*line, "--row", row, *changes, "--json"])
        assert result.exit_code == 0, result.stderr
    runs = json.loads(result.stdout)["runs"]
    assert [run["row"] for run in runs] == ["s4d-mamba", "conditional"]
    assert 5 < runs[0]["scores"]["64"]["bits"] < 10
    # The conditioned model has learnt 64 samples from where a recording begins on, and is judged on them.
    assert runs[1]["scores"]["all"]["samples"] == 40 * 64
    # Neither has learnt from the test, nor chosen by it.
    learnt, valid, _ = digit_parts(read_digits(data), "official")
    for row, longest in (("s4d-mamba", None), ("conditional", 64)):
        facts = json.loads((out / row / "run.json").read_text())["data"]
        for name, part in (("train", learnt), ("valid", valid)):
            part = part if longest is None else part.cut(longest)
            assert facts[name] == {"recordings": len(part), "samples": len(part.codes), "digest": part.digest}
    # The weights that validation chose are those that count: here ones that know nothing.
    assert [run["weights"] for run in runs] == ["last", "best"]
    chosen = raw_audio.WaveformModel.from_pretrained(out / "conditional" / "best")
    for parameter in chosen.head.parameters():
        parameter.data.zero_()
    chosen.save_pretrained(out / "conditional" / "best")
    (out / "conditional" / "scores.json").unlink()
    assert list(runs[1]["scores"]) == ["all", "16"]
    folder = tmp_path / "digits"
    result = CliRunner().invoke(
        app,
        ["reproduce", "spoken-digits", "--data", data, "--out", str(folder), "--row", "s4d", "--frame", "16", "--json"]
        + [part for change in CLASSIFIER for part in ("--set", change)],
    )
    assert result.exit_code == 0, result.stderr
    pytest.importorskip("soundfile")
    judging = ["--classifier", str(folder / "s4d-official-frame16"), "--each", "2", "--wav", str(tmp_path / "wav")]
    result = CliRunner().invoke(app, [*line, "--row", "conditional", *changes, *judging])
    assert result.exit_code == 0, result.stderr
    judged = json.loads((out / "results.json").read_text())["judged"]
    assert [judged[name]["sounds"] for name in ("made", "test", "train")] == [20, 40, 80]
    assert json.loads((out / "results.json").read_text())["runs"][1]["scores"]["all"]["bits"] == pytest.approx(8)
    assert json.loads((out / "made.json").read_text())["model"] == weights_digest(out / "conditional" / "best")
    assert judged["train"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert np.sum(judged["confused"]) == 20
    # Of a model that knows nothing no sound ends; and all are shorter than recordings of 160 samples.
    right = round(20 * judged["made"]["accuracy"])
    assert judged["endless"] == judged["early"] == {"sounds": 20, "recognised": right}
    assert f"20 did not end within 64 samples; {right} of them were recognised." in (out / "results.md").read_text()
    assert "| made (20) |" in (out / "results.md").read_text()
    assert len(list((tmp_path / "wav").glob("*.wav"))) == 10
    assert (tmp_path / "wav" / "spectrograms.png").exists()
    with pytest.raises(CheckpointError, match="row conditional"):
        raw_audio.judge_digits(tmp_path / "none", data, folder / "s4d-official-frame16")
    # A classifier that may have heard the test judges nothing.
    sounds, kept = load_recordings(out / "made.npz"), read_digits(data)
    spoken_digits.spoken_digits(folder, data, rows=("conv",), splits=("bob",), overrides=CLASSIFIER, say=str)
    with pytest.raises(CheckpointError, match=r"with other data \(split = bob, wanted official\)"):
        raw_audio.judge_sounds(sounds, folder / "conv-bob", kept)
    with pytest.raises(CheckpointError, match=r"with other data \(train.digest = "):
        raw_audio.judge_sounds(sounds, folder / "s4d-official-frame16", digits(7))
    made = (out / "made.npz").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="wanted official"):
        raw_audio.judge_digits(out, data, folder / "conv-bob", seed=9)
    assert (out / "made.npz").stat().st_mtime_ns == made, "refused before digits are made"
    for none in (out / "s4d-mamba", tmp_path / "none"):
        with pytest.raises(CheckpointError, match="must hold a run of reproduce spoken-digits"):
            raw_audio.judge_sounds(sounds, none, kept)
    with pytest.raises(ConfigError, match="conditioned by labels"):
        raw_audio.make_digits(tmp_path / "made.npz", out / "s4d-mamba")
    # Made once, and anew where something else is asked for.
    lines: list[str] = []
    best = out / "conditional" / "best"
    kept = raw_audio.make_digits(out / "made.npz", best, each=2, say=lines.append)
    assert (len(kept), lines) == (20, [])
    assert len(raw_audio.make_digits(out / "made.npz", best, each=1, seed=3, say=lines.append)) == 10
    assert len(lines) == 1


RECORD = Path(__file__).resolve().parents[2]


def test_the_runs_on_record_are_the_recipes_and_the_documents_numbers():
    """What the documents tell was made by the recipes as they are, with the settings that stand beside it."""
    text = (RECORD / "docs" / "audio.md").read_text(encoding="utf-8")
    held = [
        json.loads((RECORD / "benchmarks" / "results" / "reproduce" / name).read_text(encoding="utf-8"))
        for name in ("spoken-digits.json", "raw-audio.json")
    ]
    epochs = {"s4": 45, "mamba": 40, "conv": 30, "lstm": 6}
    for run in held[0]["runs"]:
        asked = epochs[run["row"]] if run["split"] == "official" else 20
        wanted = digit_run(run["row"], [f"train.epochs={asked}"])
        assert wanted.model == ClassifierConfig.from_dict(run["config"]["model"])
        plain = build_config(classify.ClassifyConfig, run["config"]["train"])
        assert dataclasses.replace(wanted.train, checkpoint_every=0) == plain
        assert run["vary"] == dataclasses.asdict(VaryWaveforms())
        last, chosen = (run["test"][name] for name in ("final", "best"))
        right = round(last["accuracy"] * run["examples"]["test"])
        assert f"{percent(last['accuracy'])}" in text
        assert f"({right} of {run['examples']['test']})" in text or f"({right})" in text
        assert f"{percent(chosen['accuracy'])} ({chosen['epoch']})" in text
    shorter = {"s4d-mamba": ["train.steps=441"], "s4-attention": ["train.steps=441"]}
    shorter["conditional"] = ["train.steps=3335", "train.evaluate_every=667", "train.evaluate_windows=64"]
    shorter["conditional"] += ["train.keep_best=false", "train.stretch=0"]
    assert {run["row"] for run in held[1]["runs"]} == {*raw_audio.ROWS, "conditional"}
    (reference,) = (run for run in held[1]["runs"] if run["row"] == "s4-s4")
    for run in held[1]["runs"]:
        wanted = raw_audio.waveform_run(run["row"], shorter.get(run["row"], ()))
        assert wanted.model == raw_audio.WaveformConfig.from_dict(run["config"]["model"])
        plain = build_config(waveform.WaveformTraining, run["config"]["train"])
        assert plain in (wanted.train, dataclasses.replace(wanted.train, checkpoint_every=0))
        scores = run["scores"]
        if run["row"] == "conditional":
            continue
        whole, long, away, known = f"{scores['all']['bits']:.3f}", scores["4096"]["bits"], "", ""
        if run["steps"] == 441:
            # These have a range from 8,192 on, of two recordings; here it is with the one before.
            ends = [scores["4096"], scores["8192"]]
            long = sum(end["bits"] * end["samples"] for end in ends) / sum(end["samples"] for end in ends)
        else:
            bits, samples = np.array(run["each"]).sum(0)
            assert (len(run["each"]), samples) == (300, scores["all"]["samples"])
            assert bits / samples == pytest.approx(scores["all"]["bits"], abs=1e-5)
            known = f" {run['learnt_from']['bits']:.3f}"
            assert run["test"] == reference["test"]
            if run is not reference:
                more, error = paired_difference(np.array(run["each"]), np.array(reference["each"]))
                away = f" {more:+.3f} ± {error:.4f}"
                kept = {"bits": pytest.approx(more), "standard_error": pytest.approx(error)}
                assert run["difference"] == {"from": "s4-s4", **kept}
        cells = [f"{scores[name]['bits']:.3f}" for name in ("16", "64", "256", "1024")] + [f"{long:.3f}"]
        bold = f"**{whole}**" if run["steps"] == 2000 else whole
        paper = f" {raw_audio.ROWS[run['row']].paper}".rstrip()
        line = f"|{paper} | {bold} |{away} |{known} | {' | '.join(cells)} | {run['parameters']:,} | {run['steps']:,} |"
        assert line in text
    # Every difference with its error that the part tells is one of two rows'.
    each = [np.array(run["each"]) for run in held[1]["runs"] if run.get("each")]
    pairs = (paired_difference(*pair) for pair in itertools.permutations(each, 2))
    told = re.findall(
        r"\d\.\d{3}\s+± \d\.\d{4}", text[text.index("| outside, centre | paper") : text.index("### Music\n")]
    )
    assert {" ".join(one.split()) for one in told} <= {f"{bits:.3f} ± {error:.4f}" for bits, error in pairs}
    runs = {run["row"]: run for run in held[1]["runs"]}
    real, imaginary = runs["s4-mamba"], runs["s4-complex"]
    assert real["parameters"] == imaginary["parameters"]
    more, error = paired_difference(np.array(imaginary["each"]), np.array(real["each"]))
    words = " ".join(text.split())
    assert f"it is above the real A by {more:.3f} ± {error:.4f} bits" in words
    more, error = paired_difference(np.array(reference["each"]), np.array(imaginary["each"]))
    assert f"and below S4 by {more:.3f} ± {error:.4f}." in words
    ahead = {name: real["scores"][name]["bits"] - imaginary["scores"][name]["bits"] for name in real["scores"]}
    assert [name for name in ahead if ahead[name] > 0] == ["16", "64"]
    assert f"(by {ahead['16']:.3f} from 16 on and {ahead['64']:.3f} from 64 on)" in words
    assert f"{real['learnt_from']['bits']:.3f}" == f"{imaginary['learnt_from']['bits']:.3f}"
    for was in held[1]["earlier"].values():
        assert f"{was['bits']:.3f}" in text
    for judged in held[1]["judged"].values():
        assert f"{percent(judged['made']['accuracy'])} %" in text
    longer = json.loads((RECORD / "benchmarks" / "results" / "reproduce" / "raw-audio-conditional.json").read_text())
    (run,), judged = longer["runs"], longer["judged"]
    wanted = raw_audio.waveform_run("conditional")
    assert wanted.model == raw_audio.WaveformConfig.from_dict(run["config"]["model"])
    assert wanted.train == build_config(waveform.WaveformTraining, run["config"]["train"])
    made = judged["made"]
    right = int(np.trace(judged["confused"]))
    assert made["accuracy"] == right / np.sum(judged["confused"]) == right / made["sounds"]
    low, high = (100 * bound for bound in wilson(right, made["sounds"]))
    scores = f"{made['inception']:.2f} | {made['activation_maximization']:.2f} | {made['frechet']:.2f}"
    line = f"| **{percent(made['accuracy'])}** ({right}; {low:.1f} to {high:.1f}) | {scores} |"
    assert f"{line} {judged['seconds']['made']:.2f} |" in text
    *most, last = [f"{100 * part:.3g}" for part in judged["each"]]
    assert f"{', '.join(most)} and {last} %" in text
    assert f"{run['scores']['all']['bits']:.3f} bits for a sample of the test" in text


def music_on_record(name: str, rows: list[str]) -> tuple[dict[str, dict], dict[tuple[str, str], str]]:
    """A file's runs by row, held to the recipe and to what they were judged on, and how far each is from each."""
    held = json.loads((RECORD / "benchmarks" / "results" / "reproduce" / name).read_text(encoding="utf-8"))
    assert [run["row"] for run in held["runs"]] == rows
    for run in [*held["runs"], *held["not_judged"]]:
        wanted = raw_audio.waveform_run(run["row"], ["train.steps=1000"], task="music")
        assert wanted.model == raw_audio.WaveformConfig.from_dict(run["config"]["model"])
        assert wanted.train == build_config(waveform.WaveformTraining, run["config"]["train"])
    each = {run["row"]: np.array(run["each"]) for run in held["runs"]}
    for run in held["runs"]:
        assert (run["task"], run["status"], run["steps"]) == ("music", "finished", 1000)
        assert run["test"] == held["data"]["test"]["digest"]
        assert each[run["row"]][:, 1].tolist() == held["data"]["test"]["samples"]
        assert run["learnt_from"]["samples"] == sum(held["data"]["learnt"]["samples"])
        assert [part["samples"] for part in run["valid"]] == [sum(held["data"]["valid"]["samples"])]
        bits, samples = each[run["row"]].sum(0)
        assert bits / samples == pytest.approx(run["scores"]["all"]["bits"], abs=1e-5)
        away = None
        if run["row"] != "s4-s4":
            bits, error = paired_difference(each[run["row"]], each["s4-s4"])
            away = {"from": "s4-s4", "bits": pytest.approx(bits), "standard_error": pytest.approx(error)}
        assert run["difference"] == away
    told = {}
    for row, beside in itertools.permutations(each, 2):
        bits, error = paired_difference(each[row], each[beside])
        told[row, beside] = f"{bits:+.3f} ± {error:.4f}"
    return {run["row"]: run for run in held["runs"]}, told


def music_document() -> str:
    text = (RECORD / "docs" / "audio.md").read_text(encoding="utf-8")
    part = text[text.index("### Music\n") : text.index("### Digits made by label")]
    return " ".join(part.split())


def test_the_music_on_record_is_the_recipes_and_the_documents_numbers():
    text = music_document()
    rows = ["s4-mamba", "s4-s4", "mamba-mamba", "mamba-s4", "conv"]
    runs, told = music_on_record("raw-audio-music-middle.json", rows)
    by_track = {row: np.divide(*np.array(run["each"]).T) for row, run in runs.items()}
    columns = {}
    for row, run in runs.items():
        scores = run["scores"]
        cells = [run["valid"][-1]["bits"], run["learnt_from"]["bits"]]
        cells += [scores[str(context)]["bits"] for context in raw_audio.MUSIC_CONTEXTS]
        columns[row] = [scores["all"]["bits"], *by_track[row], *cells]
        away = "" if row == "s4-s4" else f" {told[row, 's4-s4']}"
        tracks = ", ".join(f"{bits:.3f}" for bits in by_track[row])
        line = " | ".join(f"{cell:.3f}" for cell in cells)
        assert f"| **{scores['all']['bits']:.3f}** |{away} | {tracks} | {line} | {run['parameters']:,} |" in text
    # What is said of every row with a Mamba holds in each track and each column.
    mixed = [row for row in rows if "mamba" in row]
    assert (np.array([columns[row] for row in mixed]) < np.minimum(columns["s4-s4"], columns["conv"])).all()

    def apart(row: str, beside: str) -> tuple[str, list[str], str, bool]:
        """By how much one is below another: on the test, in each track, on the twentieth before; and whether the 95 %
        interval over three tracks, 4.3 errors, leaves 0 out."""
        bits, error = (abs(float(part)) for part in told[row, beside].split(" ± "))
        tracks = [f"{more:.3f}" for more in by_track[beside] - by_track[row]]
        before = runs[beside]["valid"][-1]["bits"] - runs[row]["valid"][-1]["bits"]
        assert told[row, beside][0] == "-"
        return told[row, beside][1:], tracks, f"{before:.3f}", bool(bits > 4.3 * error)

    def one_by_one(tracks: list[str]) -> str:
        return f"({tracks[0]}, {tracks[1]} and {tracks[2]}"

    cnn = {row: apart(row, "conv") for row in mixed}
    assert all(beyond for *_, beyond in cnn.values())
    assert f"the CNN is above it by {cnn['s4-mamba'][0]}." in text
    assert f"(by {cnn['mamba-s4'][0]} and {cnn['mamba-mamba'][0]})" in text
    assert [apart(row, "s4-s4")[3] for row in mixed] == [True, False, False]
    # The centre exchanged with the same outside, and the outer stages with the same centre.
    centre = apart("s4-mamba", "s4-s4"), apart("mamba-mamba", "mamba-s4")
    outside = apart("mamba-s4", "s4-s4"), apart("mamba-mamba", "s4-mamba")
    assert f"{centre[0][0]} bits with S4 outside {one_by_one(centre[0][1])} by track)" in text
    assert f"{centre[1][0]} with Mamba outside {one_by_one(centre[1][1])}; that interval holds 0)" in text
    assert f"{outside[0][0]} {one_by_one(outside[0][1])}; that interval holds 0 too)" in text
    assert (centre[1][3], outside[0][3]) == (False, False)
    assert f"nothing to tell: {outside[1][0]}, and the second track the other way" in text
    assert [float(bits) < 0 for bits in outside[1][1]] == [False, True, False]
    assert f"{centre[0][2]} and {centre[1][2]} for the centre, {outside[0][2]} and {outside[1][2]} for outside" in text
    known = {row: run["valid"][-1]["bits"] - run["learnt_from"]["bits"] for row, run in runs.items()}
    assert f"costs {known.pop('conv'):.3f} bits less than the twentieth before" in text
    assert f"from {max(known.values()):.3f} less to {-min(known.values()):.3f} more" in text
    # Of the spoken digits, beside which the stages stand here.
    digits = json.loads((RECORD / "benchmarks" / "results" / "reproduce" / "raw-audio.json").read_text("utf-8"))
    bits = {run["row"]: run["scores"]["all"]["bits"] for run in digits["runs"]}
    beside = [("s4-s4", "mamba-s4"), ("s4-mamba", "mamba-mamba"), ("s4-s4", "s4-mamba"), ("mamba-s4", "mamba-mamba")]
    more = [f"{bits[first] - bits[second]:.3f}" for first, second in beside]
    assert f"there outside is worth {more[0]} and {more[1]}, the centre {more[2]} and {more[3]}" in text
    text = " ".join((RECORD / "docs" / "reproduction.md").read_text(encoding="utf-8").split())
    assert f"({bits['s4-complex']:.3f} beside the real A's {bits['s4-mamba']:.3f})" in text
    bits = {row: run["scores"]["all"]["bits"] for row, run in runs.items()}
    assert f"every row with a Mamba is below S4 ({bits['s4-s4']:.3f}) and the CNN ({bits['conv']:.3f})" in text
    line = f"with Mamba in the centre {bits['s4-mamba']:.3f}, outside {bits['mamba-s4']:.3f}"
    assert f"{line}, everywhere {bits['mamba-mamba']:.3f}" in text


def test_the_music_at_the_tracks_ends_is_the_recipes_and_the_documents_numbers():
    text = music_document()
    runs, told = music_on_record("raw-audio-music.json", ["s4-mamba", "s4-s4", "mamba-mamba", "mamba-s4"])
    # The outer stages exchanged with the same centre, and the centre with the same outside.
    outside = told["mamba-s4", "s4-s4"][1:], told["mamba-mamba", "s4-mamba"][1:]
    assert f"{outside[0]} (S4 in the centre) and {outside[1]} (Mamba)" in text
    assert f"{told['s4-mamba', 's4-s4']} with S4 outside, {told['mamba-mamba', 'mamba-s4']} with Mamba outside" in text
    before = {row: run["valid"][-1]["bits"] for row, run in runs.items()}
    more = [before["s4-s4"] - before["mamba-s4"], before["s4-mamba"] - before["mamba-mamba"]]
    more += [before["s4-s4"] - before["s4-mamba"], before["mamba-s4"] - before["mamba-mamba"]]
    assert "outside by {:.3f} and {:.3f}, in the centre by {:.3f} and {:.3f}".format(*more) in text


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_signal_ends_the_call_and_not_the_row_alone(data, tmp_path, monkeypatch, at):
    """`statescan reproduce` exits with 130 and goes on with the next row when it is called again."""

    def signalled(trainer):
        update = trainer._update

        def with_a_signal(self):
            update(self)
            if self.done == (1 if at == "first" else getattr(self, "steps", None) or self.config.steps):
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(trainer, "_update", with_a_signal)

    signalled(classify._ClassifierTrainer)
    signalled(waveform._WaveformTrainer)
    status = "interrupted" if at == "first" else "finished"
    for command, rows, settings in (
        ("spoken-digits", ("s4d", "mamba"), CLASSIFIER),
        ("raw-audio", ("conv", "lstm"), [*WAVEFORM, "train.steps=3"]),
    ):
        out = tmp_path / command
        line = ["reproduce", command, "--data", data, "--out", str(out)]
        line += [part for row in rows for part in ("--row", row)]
        line += [part for setting in settings for part in ("--set", setting)]
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 130, result.output
        assert "interrupted; what was trained is kept, and the same command goes on" in result.stderr
        folders = sorted(out.glob("*/run.json"))
        assert [json.loads(path.read_text())["status"] for path in folders] == [status], command
        assert folders[0].parent.name.startswith(rows[0])
