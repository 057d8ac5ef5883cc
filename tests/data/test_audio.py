"""Sound files of every kind that users have, in and out; the two quantisations."""

from __future__ import annotations

import numpy as np
import pytest

from statescan.data import audio
from statescan.errors import CheckpointError, DataError, MissingExtraError

sf = pytest.importorskip("soundfile")


def tone(seconds: float = 0.25, rate: int = 8000, hertz: float = 440.0, size: float = 0.5) -> np.ndarray:
    return (size * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    audio.write_audio(path, tone(), 8000)
    samples, rate = audio.read_audio(path)
    assert rate == 8000
    assert samples.shape == (2000, 1)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples[:, 0], tone(), atol=1.1 / 32768)
    assert audio.audio_facts(path).seconds == 0.25


@pytest.mark.parametrize(
    ("subtype", "error"),
    [("PCM_U8", 1 / 128), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-23), ("FLOAT", 0), ("ULAW", 0.02)],
)
def test_every_width_of_sample(tmp_path, subtype, error):
    sf.write(tmp_path / "a.wav", tone(), 8000, subtype=subtype)
    np.testing.assert_allclose(audio.read_audio(tmp_path / "a.wav").samples[:, 0], tone(), atol=error + 1e-7)


def test_stereo_is_mixed_or_kept(tmp_path):
    both = np.stack([tone(), tone(hertz=1000)], 1)
    sf.write(tmp_path / "a.wav", both, 8000, subtype="FLOAT")
    np.testing.assert_allclose(audio.read_audio(tmp_path / "a.wav").samples[:, 0], both.mean(1), atol=1e-7)
    np.testing.assert_array_equal(audio.read_audio(tmp_path / "a.wav", mono=False).samples, both)


def test_another_rate_is_resampled_and_nothing_folds_back(tmp_path):
    # 7 kHz can't be held at 8 kHz: it must go, not come back as 1 kHz.
    low, high = tone(1, 44100, 500), tone(1, 44100, 7000)
    sf.write(tmp_path / "a.wav", low + high, 44100, subtype="FLOAT")
    samples, rate = audio.read_audio(tmp_path / "a.wav", sample_rate=8000)
    assert rate == 8000
    assert abs(len(samples) - 8000) <= 1
    middle = samples[500:7500, 0]
    np.testing.assert_allclose(middle, tone(1, 8000, 500)[500:7500], atol=2e-3)


def test_a_long_file_in_pieces_is_the_file(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.5, 0.5, (50_000, 2)).astype(np.float32)
    sf.write(tmp_path / "a.wav", noise, 16000, subtype="FLOAT")
    whole = audio.read_audio(tmp_path / "a.wav", sample_rate=8000).samples
    pieces = list(audio.audio_blocks(tmp_path / "a.wav", sample_rate=8000, block=3000))
    assert len(pieces) > 5
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)
    plain = list(audio.audio_blocks(tmp_path / "a.wav", mono=False, block=7001))
    np.testing.assert_array_equal(np.concatenate(plain), noise)


def test_a_window_of_a_file(tmp_path):
    audio.write_audio(tmp_path / "a.wav", tone(1), 8000)
    window = audio.read_audio(tmp_path / "a.wav", start=1000, frames=500)
    np.testing.assert_array_equal(window.samples, audio.read_audio(tmp_path / "a.wav").samples[1000:1500])
    with pytest.raises(DataError, match=r"window must lie within the 8,000 frames"):
        audio.read_audio(tmp_path / "a.wav", start=7000, frames=2000)


def test_clipped_sound_is_found(tmp_path):
    loud = np.clip(4 * tone(1), -1, 1)
    sf.write(tmp_path / "a.wav", loud, 8000, subtype="PCM_16")
    assert audio.clipped_share(audio.read_audio(tmp_path / "a.wav").samples) > 0.5
    assert audio.clipped_share(tone()[:, None]) == 0
    assert audio.clipped_share(np.ones((2, 1), np.float32)) == 0


def test_floats_beyond_full_scale_are_cut_off(tmp_path):
    sf.write(tmp_path / "a.wav", 3 * tone(), 8000, subtype="FLOAT")
    assert np.abs(audio.read_audio(tmp_path / "a.wav").samples).max() == 1


def test_each_bad_file_gets_a_line_that_names_it(tmp_path):
    (tmp_path / "text.wav").write_text("no sound", encoding="utf-8")
    sf.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 8000)
    (tmp_path / "nothing.flac").touch()
    # A FLAC file whose header names no number of samples (36 bits of its first block).
    sf.write(tmp_path / "piped.flac", tone(), 8000)
    piped = bytearray((tmp_path / "piped.flac").read_bytes())
    piped[21] &= 0xF0
    piped[22:26] = bytes(4)
    (tmp_path / "piped.flac").write_bytes(piped)
    sf.write(tmp_path / "nan.wav", np.full(10, np.nan, np.float32), 8000, subtype="FLOAT")
    for name, words in {
        "text.wav": "can't be read",
        "empty.wav": "holds no samples",
        "nothing.flac": "holds no samples",
        "piped.flac": "does not say how many samples",
        "nan.wav": "must hold finite samples",
        "missing.wav": "does not exist",
        ".": "is a folder",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            audio.read_audio(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.flac", "a.wav"])
def test_a_file_that_was_cut_short(tmp_path, name):
    audio.write_audio(tmp_path / name, np.random.default_rng(0).uniform(-1, 1, 20_000), 8000)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=name):
        audio.read_audio(tmp_path / name)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_of_a_writer_that_did_not_know_its_length(tmp_path, size):
    sf.write(tmp_path / "a.wav", tone(), 8000, subtype="PCM_16")
    whole = (tmp_path / "a.wav").read_bytes()
    place = whole.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(whole[:place] + size.to_bytes(4, "little") + whole[place + 4 :])
    np.testing.assert_allclose(audio.read_audio(tmp_path / "a.wav").samples[:, 0], tone(), atol=1.1 / 32768)


@pytest.mark.parametrize("rate", [0, -8000, 8000.0, True, 10**7])
def test_rates_that_are_none(tmp_path, rate):
    audio.write_audio(tmp_path / "a.wav", tone(), 8000)
    with pytest.raises(DataError, match="sample_rate must be an integer"):
        audio.read_audio(tmp_path / "a.wav", sample_rate=rate)


def test_what_can_not_be_written(tmp_path):
    for samples, name, words in ((tone(), "a.mp3", r"must end in \.wav or \.flac"), ([], "a.wav", "not empty")):
        with pytest.raises(DataError, match=words):
            audio.write_audio(tmp_path / name, samples, 8000)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        audio.write_audio(tmp_path / "file" / "a.wav", tone(), 8000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_of_a_folder_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/take10.wav", "b/take2.WAV", "a.flac"):
        audio.write_audio(tmp_path / name.lower(), tone(), 8000)
    (tmp_path / "b" / "take2.wav").rename(tmp_path / "b" / "take2.WAV")
    (tmp_path / "notes.txt").write_text("")
    assert [path.name for path in audio.find_audio([tmp_path])] == ["a.flac", "take2.WAV", "take10.wav"]
    with pytest.raises(DataError, match="does not exist"):
        audio.find_audio([tmp_path / "none"])
    with pytest.raises(DataError, match="holds no"):
        audio.find_audio([(tmp_path / "empty").mkdir() or tmp_path / "empty"])


@pytest.mark.parametrize("name", ["mu-law", "linear"])
def test_codes_are_the_nearest_level(name):
    codes = np.arange(256, dtype=np.uint8)
    levels = audio.dequantize(codes, name)
    np.testing.assert_array_equal(audio.quantize(levels, name), codes)
    assert (np.diff(levels) > 0).all()
    assert levels[0] == -1
    assert levels[-1] == 1
    assert audio.quantize(np.zeros(1), name)[0] == 128
    samples = np.linspace(-1, 1, 1001)
    error = np.abs(audio.dequantize(audio.quantize(samples, name), name) - samples)
    assert error.max() <= (0.0221 if name == "mu-law" else 1 / 255 + 1e-6)
    with pytest.raises(DataError, match="quantization must be one of"):
        audio.quantize(samples, "a-law")


def test_mu_law_is_finer_where_it_is_quiet():
    quiet = np.linspace(-0.01, 0.01, 101)
    error = [np.abs(audio.dequantize(audio.quantize(quiet, name), name) - quiet).max() for name in ("mu-law", "linear")]
    assert error[0] < error[1] / 10


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    import sys

    audio.write_audio(tmp_path / "a.wav", tone(), 8000)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(MissingExtraError, match=r"soxr.*statescan\[audio\]"):
        audio.read_audio(tmp_path / "a.wav", sample_rate=16000)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingExtraError, match=r"soundfile.*statescan\[audio\]"):
        audio.read_audio(tmp_path / "a.wav")
