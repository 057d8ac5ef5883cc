"""A waveform model's training: windows, resuming to the bit, judging by context."""

from __future__ import annotations

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch

from statescan.data.audio import dequantize, quantize
from statescan.data.recordings import SILENCE, Recordings
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.evaluate.waveforms import bits_per_sample
from statescan.models.waveform import WaveformConfig, WaveformModel
from statescan.train import waveform
from statescan.train.waveform import AudioData, AudioRun, WaveformTraining, run_audio, train_waveform, window_batch

MODEL = WaveformConfig(stages=("s4d", "mamba"), d_model=8, n_layer=1, d_state=8, d_state_mamba=4, pool=2, dropout=0.1)
TRAIN = WaveformTraining(
    steps=6, batch_size=2, window=64, flip=True, warmup=2, evaluate_every=3, checkpoint_every=2, log_every=1
)


def sounds(count: int = 6, labels: bool = False) -> Recordings:
    rng = np.random.default_rng(0)
    lengths = rng.integers(30, 150, count)
    parts = [
        128 + 20 * np.sin(np.arange(length) / (2 + i % 3)) + rng.normal(size=length) for i, length in enumerate(lengths)
    ]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    names = tuple(f"{i}.wav" for i in range(count))
    known = (np.arange(count) % 2).astype(np.uint8) if labels else None
    codes = np.concatenate(parts).astype(np.uint8)
    return Recordings(codes, offsets, names, 8000, labels=known, classes=("a", "b") if labels else ())


def test_windows_lie_in_their_recordings_and_every_sample_comes():
    made, seen = sounds(), np.zeros(0, np.int64)
    assert made.lengths.min() < 40 < made.lengths.max()
    for step in range(200):
        codes, numbers = window_batch(made, 40, 4, 0, step)
        again, same = window_batch(made, 40, 4, 0, step)
        np.testing.assert_array_equal(codes, again)
        np.testing.assert_array_equal(numbers, same)
        for row, number in zip(codes, numbers, strict=True):
            whole = made[int(number)]
            if len(whole) <= 40:
                np.testing.assert_array_equal(row[: len(whole)], whole)
                assert (row[len(whole) :] == SILENCE).all()
            else:
                views = np.lib.stride_tricks.sliding_window_view(whole, 40)
                assert (views == row).all(1).any()
        seen = np.append(seen, numbers)
    counts = np.bincount(seen, minlength=len(made)) / len(seen)
    slots = -(-made.lengths // 40)
    np.testing.assert_allclose(counts, slots / slots.sum(), atol=0.05)


@pytest.mark.parametrize("quantization", ["mu-law", "linear"])
def test_every_second_window_is_turned_over_and_its_silence_is_not(quantization):
    made, turned = dataclasses.replace(sounds(), quantization=quantization), []
    for step in range(100):
        plain, numbers = window_batch(made, 100, 4, 0, step)
        codes, same = window_batch(made, 100, 4, 0, step, flip=True)
        np.testing.assert_array_equal(numbers, same)
        for row, before, number in zip(codes, plain, numbers, strict=True):
            real = made.lengths[number]
            assert (row[real:] == SILENCE).all()
            sound, was = (dequantize(one[:real], quantization) for one in (row, before))
            turned.append(bool((sound != was).any()))
            np.testing.assert_allclose(sound, -was if turned[-1] else was, atol=1e-6)
    assert 0.4 < np.mean(turned) < 0.6


@pytest.mark.parametrize("quantization", ["mu-law", "linear"])
def test_windows_are_played_faster_and_slower(quantization):
    """A tone is heard between 0.75 and 1.25 times as high, evenly; a short one ends as much earlier or later."""
    time = np.arange(400)
    tones = [quantize(0.8 * np.sin(2 * np.pi * 0.05 * time[:length]), quantization) for length in (400, 60)]
    made = Recordings(np.concatenate(tones), np.array([0, 400, 460]), ("long", "short"), 8000, quantization)
    rates = []
    for step in range(150):
        codes, numbers = window_batch(made, 100, 4, 0, step, stretch=0.25)
        again, same = window_batch(made, 100, 4, 0, step, stretch=0.25)
        np.testing.assert_array_equal(codes, again)
        np.testing.assert_array_equal(numbers, same)
        for row, number in zip(codes, numbers, strict=True):
            sound = dequantize(row, quantization)
            real = 100 if number == 0 else int(np.flatnonzero(row != SILENCE)[-1]) + 1
            spectrum = np.abs(np.fft.rfft(sound[:real] * np.hanning(real), 4000))
            rate = spectrum.argmax() / 4000 / 0.05
            if number == 1:
                # A sample or two at the end may be silent by themselves.
                assert 60 / rate - 4 <= real <= 60 / rate + 2
                assert (row[real:] == SILENCE).all()
            else:
                assert np.abs(sound).max() > 0.75
            rates.append(rate)
    assert 0.73 < min(rates) < 0.78
    assert 1.22 < max(rates) < 1.27
    assert np.std(rates) == pytest.approx(0.5 / np.sqrt(12), rel=0.15)
    # A window from inside of a recording is full, however slowly it is played.
    loud = Recordings(np.full(4000, 255, np.uint8), np.array([0, 4000]), ("loud",), 8000, quantization)
    for step in range(300):
        codes, _ = window_batch(loud, 100, 4, 0, step, stretch=0.9)
        assert (codes != SILENCE).all()
    for wrong in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"train\.stretch: wanted at least 0 and below 1"):
            WaveformTraining(stretch=wrong)


def test_resumed_is_uninterrupted(tmp_path):
    data = sounds(6, True).split(0.3)
    model = dataclasses.replace(MODEL, classes=2)
    whole = train_waveform(model, TRAIN, data, tmp_path / "whole", progress=False)
    assert whole.steps == 6
    assert not whole.interrupted
    assert [entry.step for entry in whole.evaluations] == [3, 6]
    part = train_waveform(model, TRAIN, data, tmp_path / "part", progress=False, seconds=0)
    assert part.interrupted
    assert part.steps == 1
    rest = train_waveform(model, TRAIN, data, tmp_path / "part", progress=False, resume=True)
    assert rest.steps == 6
    assert rest.evaluations == whole.evaluations
    one, other = (WaveformModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "part"))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "part")]
    assert logs[0] == logs[1]


def test_a_signal_with_the_last_update_leaves_a_finished_run_and_is_told(tmp_path, monkeypatch):
    update = waveform._WaveformTrainer._update

    def last_comes_with_a_signal(self):
        update(self)
        if self.done == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(waveform._WaveformTrainer, "_update", last_comes_with_a_signal)
    data = sounds(6, True).split(0.3)
    model = dataclasses.replace(MODEL, classes=2)
    result = train_waveform(model, TRAIN, data, tmp_path / "run", progress=False)
    assert (result.steps, result.interrupted, result.signalled) == (6, False, True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    late = train_waveform(model, TRAIN, data, tmp_path / "late", progress=False, seconds=0)
    assert (late.interrupted, late.signalled) == (True, False)


def test_it_learns(tmp_path):
    data = sounds(12).split(0.3)
    model = dataclasses.replace(MODEL, dropout=0.0)
    train = dataclasses.replace(TRAIN, steps=60, lr=1e-2, checkpoint_every=0, evaluate_every=0)
    result = train_waveform(model, train, data, tmp_path, progress=False)
    assert result.evaluations[-1].bits < 6.2
    assert result.evaluations[-1].samples == len(data[1].codes)


def test_what_does_not_fit(tmp_path):
    data = sounds().split(0.3)
    with pytest.raises(ConfigError, match="sample_rate and quantization"):
        train_waveform(dataclasses.replace(MODEL, sample_rate=16000), TRAIN, data, tmp_path / "a", progress=False)
    with pytest.raises(ConfigError, match="2 classes"):
        train_waveform(dataclasses.replace(MODEL, classes=2), TRAIN, data, tmp_path / "a", progress=False)
    with pytest.raises(ConfigError, match=r"train\.window"):
        WaveformTraining(window=1)
    with pytest.raises(ConfigError, match=r"train\.lr"):
        WaveformTraining(lr=-1)
    sounds().save(tmp_path / "plain.npz")
    asked = AudioRun(MODEL, AudioData((str(tmp_path / "plain.npz"),), labels="name"), TRAIN)
    with pytest.raises(ConfigError, match=r"data\.labels=name wanted recordings with labels"):
        run_audio(asked, tmp_path / "a", progress=False)
    train_waveform(MODEL, dataclasses.replace(TRAIN, steps=1), data, tmp_path / "b", progress=False)
    other = sounds(7).split(0.3)
    with pytest.raises(CheckpointError, match="the train recordings"):
        train_waveform(MODEL, TRAIN, other, tmp_path / "b", progress=False, resume=True)
    with pytest.raises(CheckpointError, match=r"model\.d_model"):
        train_waveform(dataclasses.replace(MODEL, d_model=4), TRAIN, data, tmp_path / "b", progress=False, resume=True)
    # A run from before the field was there was not turned over.
    record = tmp_path / "b" / "run.json"
    facts = json.loads(record.read_text())
    assert facts["config"]["train"].pop("flip")
    record.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"train\.flip = False, with which the run began, got True"):
        train_waveform(MODEL, TRAIN, data, tmp_path / "b", progress=False, resume=True)
    train_waveform(MODEL, dataclasses.replace(TRAIN, flip=False), data, tmp_path / "b", progress=False, resume=True)


def test_the_best_weights_by_validation_are_kept(tmp_path, monkeypatch):
    """Of bits that fall and rise again: the lowest evaluation's weights, through an interruption too."""
    bits = iter((7.0, 5.0, 6.0, 5.5))
    at_evaluation = {}
    judge = waveform.bits_per_sample

    def told(model, *rest, **options):
        value = next(bits)
        at_evaluation[value] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return judge(model, *rest, **options)._replace(bits=value)

    monkeypatch.setattr(waveform, "bits_per_sample", told)
    train = dataclasses.replace(TRAIN, steps=8, evaluate_every=2, evaluate_windows=0, keep_best=True, lr=1e-2)
    data = sounds().split(0.3)
    evaluate = waveform._WaveformTrainer._evaluate

    def interrupted_after_the_best(self, *, whole):
        evaluate(self, whole=whole)
        if self.done == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(waveform._WaveformTrainer, "_evaluate", interrupted_after_the_best)
    assert train_waveform(MODEL, train, data, tmp_path, progress=False).interrupted
    result = train_waveform(MODEL, train, data, tmp_path, progress=False, resume=True)
    assert [(entry.step, entry.bits) for entry in result.evaluations] == [(2, 7.0), (4, 5.0), (6, 6.0), (8, 5.5)]
    for folder, value in ((tmp_path / "best", 5.0), (tmp_path, 5.5)):
        held = WaveformModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(tensor, held[name]) for name, tensor in at_evaluation[value].items()), folder
    assert not torch.equal(at_evaluation[5.0]["head.weight"], at_evaluation[5.5]["head.weight"])
    with pytest.raises(ConfigError, match=r"train\.evaluate_windows: wanted 0 with train\.keep_best, got 64"):
        WaveformTraining(keep_best=True)


def test_only_bits_of_the_same_samples_are_compared_for_the_best(tmp_path, monkeypatch):
    """Few windows were judged before, and cost less: the first evaluation of all of them is the best so far."""
    bits, judge = iter((3.0, 5.0, 4.5, 4.6)), waveform.bits_per_sample
    monkeypatch.setattr(waveform, "bits_per_sample", lambda *a, **k: judge(*a, **k)._replace(bits=next(bits)))
    data = sounds().split(0.3)
    few = dataclasses.replace(TRAIN, steps=4, evaluate_every=2, evaluate_windows=1)
    first = train_waveform(MODEL, few, data, tmp_path, progress=False)
    assert not (tmp_path / "best").exists()
    every = dataclasses.replace(few, steps=8, evaluate_windows=0, keep_best=True)
    result = train_waveform(MODEL, every, data, tmp_path, progress=False, resume=True)
    assert first.evaluations[0].samples < result.evaluations[-1].samples
    assert (tmp_path / "best" / "model.safetensors").exists()


@torch.no_grad()
def test_bits_by_hand():
    made = sounds(3, True)
    model = WaveformModel(dataclasses.replace(MODEL, classes=2, dropout=0.0)).double().eval()
    assert made.labels is not None
    for longest in (7, 64, None):
        nats: list[list[float]] = [[] for _ in range(made.lengths.max())]
        whole_bits = np.zeros(len(made))
        for number in range(len(made)):
            whole = torch.from_numpy(made[number].astype(np.int64))
            for piece in whole.split(longest or 1000):
                inputs = torch.cat([torch.tensor([SILENCE]), piece[:-1]])[None]
                logits = model(inputs, torch.tensor([made.labels[number]])).logits[0]
                each = -logits.log_softmax(-1).gather(1, piece[:, None])[:, 0] / np.log(2)
                for before, bits in enumerate(each.tolist()):
                    nats[before].append(bits)
                    whole_bits[number] += bits
        contexts = (0, 5, 40, 5000)
        judged = bits_per_sample(model, made, longest=longest, contexts=contexts, at_once=200)
        assert judged.samples == sum(map(len, nats)) == len(made.codes)
        np.testing.assert_allclose(judged.each[:, 0], whole_bits, rtol=1e-12)
        np.testing.assert_array_equal(judged.each[:, 1], made.lengths)
        assert judged.bits == pytest.approx(np.mean(np.concatenate(nats)), rel=1e-12)
        # A sample is of the range of how many came before it in its recording; of none, where no recording is so long.
        assert list(judged.by_context) == ([0, 5] if longest == 7 else [0, 5, 40])
        for low, high in ((0, 5), (5, 40), (40, 5000)):
            those = np.concatenate([*nats[low:high], []])
            if len(those):
                of = len(nats[low])
                assert judged.by_context[low] == (pytest.approx(np.mean(those), rel=1e-12), len(those), of)
    assert bits_per_sample(model, made, longest=7, limit=3).samples <= 21
    assert bits_per_sample(model, made).by_context == {}
    with pytest.raises(ConfigError, match="longest must be at least 1"):
        bits_per_sample(model, made, longest=0)
    for wrong in ((4, 4), (8, 4), (-1, 4)):
        with pytest.raises(ConfigError, match="contexts must rise"):
            bits_per_sample(model, made, contexts=wrong)
    with pytest.raises(DataError, match="labels"):
        bits_per_sample(model, dataclasses.replace(made, labels=None))
