"""Recordings as codes: from folders, kept in one file, split, trimmed, varied."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from statescan.data.audio import dequantize, quantize, read_audio, write_audio
from statescan.data.augment import VaryWaveforms
from statescan.data.recordings import (
    SILENCE,
    Recordings,
    labelled_recordings,
    load_recordings,
    read_recordings,
    refuse_repeats,
    trim_silence,
)
from statescan.errors import ConfigError, DataError


def noise(length: int, seed: int = 0, size: float = 0.25) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-size, size, length).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("soundfile")
    for number, name in enumerate(("yes_ann_0.wav", "no_ann_0.wav", "yes_bob_1.flac")):
        path = tmp_path / name.split("_")[1] / name
        path.parent.mkdir(exist_ok=True)
        write_audio(path, noise(300 + 100 * number, number), 8000)
    return tmp_path


def test_a_folder_becomes_codes(folder):
    made = read_recordings([folder], labels="name")
    assert made.names == ("no_ann_0.wav", "yes_ann_0.wav", "yes_bob_1.flac")
    assert made.classes == ("no", "yes")
    assert made.labels is not None
    assert made.labels.tolist() == [0, 1, 1]
    assert made.lengths.tolist() == [400, 300, 500]
    np.testing.assert_array_equal(made[1], quantize(read_audio(folder / "ann" / "yes_ann_0.wav").samples[:, 0]))
    assert read_recordings([folder], labels="folder").classes == ("ann", "bob")
    assert read_recordings([folder]).labels is None


def test_on_disk_is_the_same(folder):
    one, other = read_recordings([folder]), read_recordings([folder], on_disk=True)
    assert isinstance(other.codes, np.memmap)
    np.testing.assert_array_equal(one.codes, other.codes)
    assert one.digest == other.digest
    # And what is made of them stays there, split for training above all.
    for part, same in zip((*other.split(0.4), other.cut(350), other.outside(0.4, 0.5)),
                          (*one.split(0.4), one.cut(350), one.outside(0.4, 0.5)), strict=True):  # fmt: skip
        assert isinstance(part.codes, np.memmap)
        assert part.digest == same.digest


def test_clipping_is_counted_as_recorded(folder):
    pytest.importorskip("soxr")
    import soundfile

    loud = np.clip(3 * np.sin(2 * np.pi * 200 * np.arange(8820) / 44100), -1, 1)
    share = read_one(folder / "mono.wav", loud)
    assert 0.7 < share < 0.9
    # Neither another rate nor a quiet channel beside it hides it.
    assert read_recordings([folder / "mono.wav"], sample_rate=8000).clipped == share
    soundfile.write(folder / "stereo.wav", np.stack([loud, 0 * loud], 1), 44100)
    assert read_recordings([folder / "stereo.wav"]).clipped == pytest.approx(share / 2)


def read_one(path, samples) -> float:
    write_audio(path, samples, 44100)
    return read_recordings([path]).clipped


def test_normalised_the_loudest_sample_is_one(folder):
    write_audio(folder / "silent.wav", np.zeros(50), 8000)
    made = read_recordings([folder], normalize=True)
    for number in range(len(made) - 1):
        assert np.abs(made.waveform(number)).max() == 1
    assert (made[len(made) - 1] == SILENCE).all()


def test_other_rates_come_to_one(folder):
    pytest.importorskip("soxr")
    write_audio(folder / "fast.wav", noise(1600), 16000)
    assert read_recordings([folder], sample_rate=4000).lengths.tolist() == [200, 150, 250, 400]
    assert read_recordings([folder]).sample_rate == 8000  # of the first


def test_kept_in_a_file(folder, tmp_path):
    made = read_recordings([folder], labels="name")
    made.save(tmp_path / "kept.npz")
    again = load_recordings(tmp_path / "kept.npz")
    np.testing.assert_array_equal(again.codes, made.codes)
    assert (again.names, again.classes, again.digest) == (made.names, made.classes, made.digest)
    assert read_recordings([tmp_path / "kept.npz"]).digest == made.digest
    plain = read_recordings([folder])
    plain.save(tmp_path / "plain.npz")
    assert load_recordings(tmp_path / "plain.npz").labels is None


def test_files_that_hold_none(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", codes=np.zeros(3))
    for name, words in (("text.npz", "can't be read"), ("other.npz", "got no classes"), ("none.npz", "can't be read")):
        with pytest.raises(DataError, match=words):
            load_recordings(tmp_path / name)


GOOD: dict[str, object] = {
    "codes": np.full(5, 9, np.uint8),
    "offsets": np.array([0, 2, 5]),
    "names": np.array(["a", "b"]),
    "labels": np.array([0, 1], np.uint8),
    "classes": np.array(["x", "y"]),
    "sample_rate": 8000,
    "quantization": "mu-law",
}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("codes", np.full(5, 9), "must hold codes as uint8 with 1 axes, got int64"),
        ("codes", np.full((5, 1), 9, np.uint8), r"must hold codes as uint8 with 1 axes, got uint8 \(5, 1\)"),
        ("offsets", np.array([0.0, 2, 5]), "must hold offsets as integers"),
        ("offsets", np.array([0, 4, 2]), "offsets must rise from 0 to the 5 codes"),
        ("names", np.array([1, 2]), "must hold names as text"),
        ("names", np.array(["a"]), "one more than the 1 names"),
        ("labels", np.array([0.0, 1.0]), "must hold labels as uint8"),
        ("labels", np.array([0, 2], np.uint8), "below the 2 classes"),
        ("sample_rate", np.array([8000]), "must hold sample_rate as integers with 0 axes"),
        ("sample_rate", 8000.5, "must hold sample_rate as integers"),
        ("sample_rate", -8000, "wanted a sample_rate of at least 1"),
        ("quantization", "a-law", "got 8000 and 'a-law'"),
    ],
)
def test_arrays_that_are_not_as_saved(tmp_path, name, value, words):
    path = tmp_path / "a.npz"
    np.savez(path, **GOOD)
    assert load_recordings(path).names == ("a", "b")
    np.savez(path, **{**GOOD, name: value})
    with pytest.raises(DataError, match=words) as caught:
        load_recordings(path)
    assert str(path) in str(caught.value)


def test_a_kept_file_of_another_rate(tmp_path):
    np.savez(tmp_path / "a.npz", **GOOD)
    with pytest.raises(DataError, match="must hold sound at 16000 Hz, got 8000 Hz"):
        read_recordings([tmp_path / "a.npz"], sample_rate=16000)


def made_of(lengths, labels=None) -> Recordings:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    codes = np.random.default_rng(1).integers(0, 256, offsets[-1]).astype(np.uint8)
    names = tuple(f"{i}.wav" for i in range(len(lengths)))
    classes = () if labels is None else tuple(map(str, range(max(labels) + 1)))
    return Recordings(
        codes, offsets, names, 8000, labels=None if labels is None else np.array(labels, np.uint8), classes=classes
    )


def test_taken_cut_and_split():
    made = made_of([5, 3, 9, 4], [0, 1, 0, 1])
    taken = made.take([2, 0])
    np.testing.assert_array_equal(taken[0], made[2])
    assert taken.labels is not None
    assert taken.labels.tolist() == [0, 0]
    cut = made.cut(4)
    assert cut.lengths.tolist() == [4, 3, 4, 4]
    np.testing.assert_array_equal(cut[2], made[2][:4])
    assert made.cut(9) is made
    ends = made.between(0.5, 1)
    assert ends.lengths.tolist() == [3, 1, 5, 2]
    np.testing.assert_array_equal(ends[2], made[2][4:])
    assert len(made.between(0, 0.12)) == 2  # of 5 and 9 samples one is left, of 3 and 4 none
    around = made.outside(0.4, 0.6)
    assert around.lengths.tolist() == [2, 2, 1, 1, 4, 4, 2, 2]
    np.testing.assert_array_equal(around[4], made[2][:4])
    np.testing.assert_array_equal(around[5], made[2][5:])
    assert around.names == tuple(np.repeat(made.names, 2))
    assert around.labels is not None
    assert around.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert made.outside(0, 0.9).lengths.tolist() == [1, 1]  # of 3 and 4 samples nothing is left, and nothing before
    for shares in (made.between, made.outside):
        with pytest.raises(DataError, match="shares must be"):
            shares(0.5, 0.5)
    with pytest.raises(DataError, match="nothing is left"):
        made.outside(0, 1)
    learnt, held = made.split(0.25)
    assert sorted(learnt.names + held.names) == sorted(made.names)
    assert len(held) == 1
    begin, end = made_of([100]).split(0.1)
    assert (len(begin.codes), len(end.codes)) == (90, 10)
    for wrong in (0, 1, -1):
        with pytest.raises(DataError, match="held-out share"):
            made.split(wrong)


def test_a_recording_that_is_there_twice(folder):
    (folder / "copy").mkdir()
    (folder / "copy" / "other.wav").write_bytes((folder / "ann" / "yes_ann_0.wav").read_bytes())
    for name in ("a.wav", "b.wav"):
        write_audio(folder / "silent" / name, np.zeros(100), 8000)
    one, other = read_recordings([folder / "ann"]), read_recordings([folder / "bob"])
    copy, silent = read_recordings([folder / "copy"]), read_recordings([folder / "silent"])
    for parts in ((one, other), (silent, silent), (one,), (one, silent)):
        refuse_repeats(parts)
    for parts in ((one, copy), (read_recordings([folder]),)):
        with pytest.raises(DataError, match=r"the same 300 samples as '\w+.wav' and as '\w+.wav'"):
            refuse_repeats(parts)
    # Twice in what is learnt from alone does no harm to what is held out.
    both = read_recordings([folder / "ann", folder / "copy"])
    refuse_repeats((both, other), within=False)
    with pytest.raises(DataError, match=r"as 'yes_ann_0\.wav' and as 'other\.wav'"):
        refuse_repeats((one, copy), within=False)
    with pytest.raises(DataError, match=r"wanted each sound file once, got '.*no_ann_0\.wav' twice"):
        read_recordings([folder / "ann", folder / "bob" / ".." / "ann"])


def test_channels_that_cancel_each_other_out(folder):
    left = noise(400, 7)
    for name, right in (("same", left), ("other", noise(400, 8)), ("none", 0 * left), ("turned", -0.9 * left)):
        write_audio(folder / "stereo" / f"{name}.wav", np.stack([left, right], 1), 8000)
    write_audio(folder / "stereo" / "silent.wav", np.zeros((100, 2)), 8000)
    assert read_recordings([folder / "stereo"], sample_rate=4000).cancelled == ("turned.wav",)
    assert read_recordings([folder / "ann"]).cancelled == ()


def test_what_does_not_go_together():
    made = made_of([5, 3], [0, 1])
    with pytest.raises(DataError, match="offsets must rise"):
        Recordings(made.codes, made.offsets[:-1], made.names, 8000)
    with pytest.raises(DataError, match="labels must be"):
        Recordings(made.codes, made.offsets, made.names, 8000, labels=np.array([0, 2], np.uint8), classes=("a", "b"))
    with pytest.raises(DataError, match="wants labels"):
        labelled_recordings(made_of([3, 4]), 10)
    with pytest.raises(DataError, match="got none"):
        made.take([])


def test_rows_for_a_classifier():
    made = made_of([5, 3, 9], [0, 1, 0])
    rows = labelled_recordings(made, 6)
    assert rows.values.shape == (3, 6)
    assert rows.lengths is not None
    assert rows.lengths.tolist() == [5, 3, 6]
    np.testing.assert_array_equal(rows.values[1], [*made[1], SILENCE, SILENCE, SILENCE])
    framed = labelled_recordings(made, 9, 4)
    assert framed.values.shape == (3, 12)
    with pytest.raises(DataError, match="frame must divide"):
        dataclasses.replace(framed, frame=5)
    # Silence is read as 0.
    assert (SILENCE / 255 - rows.mean) / rows.deviation == 0


def test_where_a_sound_ends():
    def code(*runs):
        return np.concatenate([np.full(length, value, np.uint8) for value, length in runs])

    assert trim_silence(code((7, 5), (SILENCE, 20)), 10) == 5
    assert trim_silence(code((7, 5), (SILENCE, 8), (9, 3), (SILENCE, 20)), 10) == 16
    assert trim_silence(code((7, 5), (SILENCE, 12), (9, 3)), 10) == 5
    assert trim_silence(code((SILENCE, 30)), 10) == 1
    assert trim_silence(code((7, 30)), 10) == 30


def rows(batch: int = 4, length: int = 400, real: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    wave = np.sin(np.arange(real) / 9) * 0.5
    codes = np.full((batch, length), SILENCE, np.uint8)
    codes[:, :real] = quantize(wave)
    return torch.from_numpy(codes), torch.full((batch,), real)


def test_no_variation_changes_nothing():
    codes, lengths = rows()
    values, after = VaryWaveforms(gain=0, speed=0, shift=0, noise=0, flip=False)(codes, lengths)
    torch.testing.assert_close(values, codes.float(), atol=0, rtol=0)
    assert after.tolist() == lengths.tolist()
    assert (values[:, 300:] == SILENCE).all()


def test_no_variation_moves_the_mean():
    # Noise too quiet to leave the two levels beside 0, between which it has its mean.
    codes = torch.from_numpy(np.random.default_rng(0).integers(127, 129, (64, 4000)).astype(np.uint8))
    lengths = torch.full((64,), 4000)
    torch.manual_seed(0)
    for vary in (VaryWaveforms(gain=0, speed=0, shift=0, noise=0), VaryWaveforms(gain=20, speed=0, shift=0, noise=0.5)):
        values, _ = vary(codes, lengths)
        assert (values == values.round()).all(), "codes, as recordings hold"
        # 4,000 draws of half a level's deviation or, louder, of some.
        spread = values.std(1) / 4000**0.5
        assert ((values.mean(1) - 127.5).abs() < 5 * spread).all()


def test_each_variation_is_what_it_says():
    codes, lengths = rows(64)
    torch.manual_seed(0)
    louder, _ = VaryWaveforms(gain=1, speed=0, shift=0, noise=0, flip=False)(codes, lengths)
    before = np.abs(dequantize(codes.numpy())).max(1)
    peak = np.abs(dequantize(louder.numpy().round())).max(1) / before
    assert peak.min() > 0.45
    assert peak.max() < 2.1
    assert peak.max() / peak.min() > 2
    _, after = VaryWaveforms(gain=0, speed=0.2, shift=0, noise=0, flip=False)(codes, lengths)
    assert 300 / 1.21 <= int(after.min()) < 270
    assert 330 < int(after.max()) <= 361
    moved, after = VaryWaveforms(gain=0, speed=0, shift=80, noise=0, flip=False)(codes, lengths)
    for row, length in zip(moved, after.tolist(), strict=True):
        lead = length - 300
        assert -20 <= lead <= 80
        assert (row[length:] == SILENCE).all()
        if lead > 0:
            assert (row[:lead] == SILENCE).all()
            torch.testing.assert_close(row[lead:length], codes[0, :300].float(), atol=0, rtol=0)
    flipped, _ = VaryWaveforms(gain=0, speed=0, shift=0, noise=0)(codes, lengths)
    turned = (flipped[:, :300] == 255 - codes[:, :300].float()).all(1)
    assert 10 < int(turned.sum()) < 54
    assert ((flipped == codes).all(1) | turned).all()
    noisy, _ = VaryWaveforms(gain=0, speed=0, shift=0, noise=0.5, flip=False)(codes, lengths)
    assert (noisy[:, 300:] == SILENCE).all()
    assert (noisy[:, :300] - codes[:, :300]).abs().mean() > 1


def test_a_row_never_outgrows_its_batch():
    codes, lengths = rows(32, 300, 300)
    torch.manual_seed(0)
    values, after = VaryWaveforms(speed=0.5, shift=200)(codes, lengths)
    assert values.shape == codes.shape
    assert int(after.max()) == 300
    assert torch.isfinite(values).all()
    assert float(values.min()) >= 0
    assert float(values.max()) <= 255


def test_variations_out_of_range():
    for name, value in (("gain", -1), ("noise", float("inf")), ("shift", -3), ("speed", 1)):
        with pytest.raises(ConfigError, match=name):
            VaryWaveforms(**{name: value})
