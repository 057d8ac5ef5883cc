"""Sound on the command line: trained, interrupted by its time, resumed, generated, drawn; and what goes wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from statescan.cli.app import app

sf = pytest.importorskip("soundfile")
TINY = ["--set", "model.d_model=4", "--set", "model.n_layer=1", "--set", "model.d_state=4", "--set", "model.pool=2"]
TINY += ["--set", "train.window=128", "--set", "train.batch_size=2", "--set", "train.steps=3"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, rate in (("a/yes_0.wav", 8000), ("a/no_0.wav", 8000), ("b/yes_1.flac", 8000), ("b/no_1.wav", 8000)):
        (tmp_path / "sounds" / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(tmp_path / "sounds" / name, rng.uniform(-0.3, 0.3, 300).astype(np.float32), rate)
    return tmp_path / "sounds"


def test_trained_resumed_and_made_to_sound(folder, tmp_path):
    out = tmp_path / "run"
    line = ["train", "--modality", "audio", "--data", folder, "--out", out, *TINY, "--set", "data.labels=name"]
    first = run(*line, "--json")
    assert first.exit_code == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["steps"] == 3
    assert 6 < result["bits_per_sample"] < 10
    assert "3 recordings, 0.1 s at 8,000 Hz to learn from, 0.0 s held out" in first.stderr
    # A folder that is taken is told before sound is read.
    refused = run(*line)
    assert (refused.exit_code, "which holds one" in refused.stderr) == (1, True)
    assert "recordings" not in refused.stderr
    again = run("train", "--modality", "audio", "--out", out, "--resume", "--set", "train.steps=5")
    assert again.exit_code == 0, again.stderr
    assert "5 of 5" in again.stdout
    wave = tmp_path / "yes.wav"
    made = run("generate", "--model", out, "--seconds", 0.01, "--label", "yes", "-o", wave, "--seed", 3,
               "--spectrogram", tmp_path / "yes.png")  # fmt: skip
    assert made.exit_code == 0, made.stderr
    samples, rate = sf.read(wave)
    assert (len(samples), rate) == (80, 8000)
    assert (tmp_path / "yes.png").read_bytes().startswith(b"\x89PNG")
    run("generate", "--modality", "audio", "--model", out, "--seconds", 0.01, "--label", "yes", "--seed", 3,
        "-o", tmp_path / "2.flac")  # fmt: skip
    np.testing.assert_array_equal(sf.read(tmp_path / "2.flac")[0], samples)


def test_what_is_wrong_gets_one_line(folder, tmp_path):
    (tmp_path / "none").mkdir()
    sf.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 8000)
    (tmp_path / "copy.wav").write_bytes((folder / "a" / "no_0.wav").read_bytes())
    train = ["train", "--modality", "audio", "--out", tmp_path / "run", *TINY]
    for arguments, words in (
        ([*train], "wanted sound files, got none"),
        ([*train, "--data", tmp_path / "none"], "holds no .wav"),
        ([*train, "--data", tmp_path / "empty.wav"], "holds no samples"),
        ([*train, "--data", folder, "--preset", "tiny"], "--preset has no use"),
        ([*train, "--data", folder, "--from", "builtin"], "--from has no use with --modality audio"),
        ([*train, "--data", folder, "--lora", 2], "--lora has no use with --modality audio"),
        ([*train, "--data", folder, "--set", "model.stages=s5"], "stages must be"),
        ([*train, "--data", folder, "--set", "data.sample_rate=-1"], "sample_rate must be"),
        (["train", "--modality", "video", "--data", folder, "--out", tmp_path / "run"], "--modality must be"),
        (["generate", "--model", tmp_path / "none", "--seconds", 1, "-o", tmp_path / "a.wav"], "config.json"),
        (["generate", "--model", tmp_path / "none", "--seconds", 1], "got no -o"),
        (["generate", "--model", tmp_path / "none", "-o", tmp_path / "a.wav"], "got no --seconds"),
        (["generate", "--model", tmp_path / "none", "--seconds", 1, "-o", tmp_path / "a.mp3"], "must end in"),
        (["generate", "--model", tmp_path / "none"], "--prompt"),
        (["generate", "--modality", "audio", "--model", tmp_path / "none"], "got no -o"),
        (["generate", "--modality", "audio", "--seconds", 2, "-o", tmp_path / "a.wav"], "named with --model, got none"),
        (
            [
                "generate",
                "--model",
                tmp_path / "none",
                "--seconds",
                1,
                "-o",
                tmp_path / "a.wav",
                "--spectrogram",
                tmp_path / "a.jpg",
            ],
            "ends in .png",
        ),
        (["spectrogram", folder, "-o", tmp_path / "a.jpg"], "ends in .png, got"),
        ([*train, "--data", folder, "--data", folder / "a"], "wanted each sound file once"),
        ([*train, "--data", folder / "a", "--valid", folder / "a" / ".." / "a" / "no_0.wav"], "no_0.wav' in both"),
        ([*train, "--data", folder / "a", "--valid", tmp_path / "copy.wav"], "as 'no_0.wav' and as 'copy.wav'"),
        ([*train, "--data", folder / "a", "--data", tmp_path / "copy.wav"], "as 'no_0.wav' and as 'copy.wav'"),
        (["generate", "--modality", "dna", "--prompt", "A"], "--modality must be text or audio"),
        (["generate", "--seconds", 1, "-o", tmp_path / "a.wav", "--top-k", 5], "--top-k is for texts"),
        (["generate", "--prompt", "A", "--label", "yes"], "--label is for models of sound"),
        (["generate", "--prompt", "A", "--modality", "text", "--seconds", 1], "--seconds is for models of sound"),
        (["spectrogram", tmp_path / "empty.wav", "-o", tmp_path / "a.png"], "holds no samples"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, (arguments, result.stdout, result.stderr)
        assert words in result.stderr
        assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("a.*"))


def test_a_model_of_sound_is_told_from_one_of_text(folder, tmp_path):
    out = tmp_path / "run"
    best = ["--set", "train.keep_best=true", "--set", "train.evaluate_windows=0", "--set", "data.labels=name"]
    line = ["train", "--modality", "audio", "--data", folder, "--out", out, *TINY, *best]
    made = run(*line)
    assert made.exit_code == 0, made.stderr
    # A window of 500 samples is longer than every file.
    assert run(*line, "--set", "train.window=500", "--out", tmp_path / "long").exit_code == 0
    for arguments in (["info", out], ["evaluate", "--model", out, "--data", folder / "a" / "no_0.wav"]):
        result = run(*arguments)
        assert result.exit_code == 1
        assert f"statescan generate --model {out} --seconds 2 -o out.wav" in result.stderr
    # The weights that validation chose know the labels by their names, too.
    told = run("generate", "--model", out / "best", "--seconds", 0.01, "--label", "yes", "-o", tmp_path / "a.wav")
    assert told.exit_code == 0, told.stderr


def test_labels_that_the_model_has_not(folder, tmp_path):
    out = tmp_path / "run"
    assert run("train", "--modality", "audio", "--data", folder, "--out", out, *TINY).exit_code == 0
    result = run("generate", "--model", out, "--seconds", 0.01, "--label", "yes", "-o", tmp_path / "a.wav")
    assert result.exit_code == 1
    assert "the model has no labels" in result.stderr
    assert not (tmp_path / "a.wav").exists()


def test_clipped_stereo_and_other_rates_are_read(tmp_path):
    rng = np.random.default_rng(0)
    loud = np.clip(rng.normal(size=(600, 2)).cumsum(0), -1, 1)
    sf.write(tmp_path / "loud.wav", loud, 16000, subtype="PCM_24")
    line = ["train", "--modality", "audio", "--data", tmp_path / "loud.wav", "--out", tmp_path / "run", *TINY]
    result = run(*line, "--set", "data.sample_rate=8000", "--set", "data.held_out=0.5")
    assert result.exit_code == 0, result.stderr
    assert "clipped" in result.stderr
    assert "at 8,000 Hz" in result.stderr
    assert "cancel" not in result.stderr
    turned = np.random.default_rng(1).uniform(-0.5, 0.5, 600)
    (tmp_path / "turned").mkdir()
    for name, sound in (("one.wav", turned), ("two.wav", turned[::-1])):
        sf.write(tmp_path / "turned" / name, np.stack([sound, -0.95 * sound], 1), 8000)
    result = run(*line[:3], "--data", tmp_path / "turned", "--out", tmp_path / "run2", *TINY)
    assert result.exit_code == 0, result.stderr
    assert "the channels of one.wav and 1 more cancel each other out" in result.stderr


def test_sounds_are_drawn(folder, tmp_path):
    result = run("spectrogram", folder, "-o", tmp_path / "all.png", "--columns", 2)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
