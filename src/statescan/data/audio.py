"""Sound in and out: WAV, FLAC and what else libsndfile reads, resampled, mixed to one channel, in 256 levels."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statescan.errors import DataError, MissingExtraError
from statescan.files import atomic_file

__all__ = [
    "AUDIO_SUFFIXES",
    "LEVELS",
    "QUANTIZATIONS",
    "Audio",
    "AudioFacts",
    "audio_blocks",
    "audio_facts",
    "clipped_share",
    "dequantize",
    "find_audio",
    "linear_decode",
    "linear_encode",
    "mu_law_decode",
    "mu_law_encode",
    "quantize",
    "read_audio",
    "resample",
    "write_audio",
]

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".aiff", ".aif")
LEVELS = 256
_MU = LEVELS - 1
# Samples that are read at once from a long file.
_BLOCK = 1 << 18
_WRITTEN = {".wav": "WAV", ".flac": "FLAC"}
_RATES = (1, 1_000_000)
# libsndfile's number of frames where a FLAC file's header names none.
_UNKNOWN = (1 << 63) - 1


class Audio(NamedTuple):
    """samples: (frames, channels) float32 in [-1, 1]; sample_rate: frames a second."""

    samples: NDArray[np.float32]
    sample_rate: int


class AudioFacts(NamedTuple):
    """What a file's header says: its path, frames, channels, frames a second, and libsndfile's name of the format."""

    path: Path
    frames: int
    channels: int
    sample_rate: int
    subtype: str

    @property
    def seconds(self) -> float:
        """Length in time."""
        return self.frames / self.sample_rate


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError:
        raise MissingExtraError("reading and writing sound", "soundfile", "audio") from None
    return soundfile


def _soxr() -> Any:
    try:
        import soxr
    except ImportError:
        raise MissingExtraError("resampling", "soxr", "audio") from None
    return soxr


def _check_rate(caller: str, rate: int) -> int:
    if isinstance(rate, bool) or not isinstance(rate, int) or not _RATES[0] <= rate <= _RATES[1]:
        raise DataError(
            f"{caller}: sample_rate must be an integer of {_RATES[0]} .. {_RATES[1]:,} samples a second, got {rate!r}; "
            "8000, 16000 and 44100 are usual"
        )
    return rate


def _open(path: Path) -> Any:
    soundfile = _soundfile()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"audio: '{path}' {what}; name a file such as speech.wav")
    if not path.stat().st_size:
        # What libsndfile itself writes as a FLAC file without samples.
        raise DataError(f"audio: '{path}' holds no samples, and nothing else; leave it out or record it again")
    with _naming(path):
        return soundfile.SoundFile(path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns libsndfile's complaints into one that names the file."""
    soundfile = _soundfile()
    try:
        yield
    except (soundfile.LibsndfileError, TypeError) as problem:
        why = str(getattr(problem, "error_string", problem)).rstrip(".")
        raise DataError(
            f"audio: '{path}' can't be read ({why}); wanted a whole {', '.join(AUDIO_SUFFIXES)} file"
        ) from None


def audio_facts(path: str | os.PathLike[str]) -> AudioFacts:
    """What the header of a file says.

    Raises:
        DataError: it can't be read, or holds no samples.
    """
    with _open(Path(path)) as file:
        facts = AudioFacts(Path(path), file.frames, file.channels, file.samplerate, file.subtype)
        is_wav = file.format in ("WAV", "WAVEX")
    if facts.frames == _UNKNOWN:
        raise DataError(
            f"audio: '{path}' does not say how many samples it holds, as a stream that was written to a pipe; make a "
            "whole file of it, as flac and ffmpeg do where they write to one"
        )
    if facts.frames < 1:
        raise DataError(f"audio: '{path}' holds no samples; leave it out or record it again")
    if is_wav:
        _check_whole(facts.path)
    return facts


def _check_whole(path: Path) -> None:
    """libsndfile reads what is left of a WAV file that was cut short, and says nothing: its chunks say how long it was.

    Writers that can't go back leave lengths of 0 or the largest number, which say nothing.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        order = {b"RIFF": "little", b"RIFX": "big"}.get(file.read(12)[:4])
        while order is not None and len(head := file.read(8)) == 8:
            length = int.from_bytes(head[4:], order)  # pyright: ignore[reportArgumentType]
            if head[:4] != b"data":
                file.seek(length + length % 2, os.SEEK_CUR)
                continue
            there = size - file.tell()
            if there < length < 0x7FFFF000:
                raise DataError(
                    f"audio: '{path}' says it holds {length:,} bytes of samples, got {there:,}; it was cut short, "
                    "copy it again"
                )
            return


def audio_blocks(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = None,
    mono: bool = True,
    block: int = _BLOCK,
    heard: Callable[[NDArray[np.float32]], object] | None = None,
) -> Iterator[NDArray[np.float32]]:
    """The samples of a file of any length, piece by piece: memory does not grow with the file.

    Args:
        path: the file.
        sample_rate: to which it is resampled. Default: its own.
        mono: the channels' mean; else all of them.
        block: frames read at once.
        heard: called with each piece as it stands in the file, (frames, channels), before it is mixed and resampled.

    Yields:
        (frames, channels) float32 in [-1, 1]; values beyond, which files of floats may hold, are cut off there.

    Raises:
        DataError: the file can't be read, holds no samples, or is cut short.
    """
    facts = audio_facts(path)
    wanted = facts.sample_rate if sample_rate is None else _check_rate("audio", sample_rate)
    channels = 1 if mono else facts.channels
    stream = None
    if wanted != facts.sample_rate:
        stream = _soxr().ResampleStream(facts.sample_rate, wanted, channels, dtype="float32", quality="HQ")
    left = facts.frames
    with _open(facts.path) as file:
        while left:
            with _naming(facts.path):
                piece = file.read(min(block, left), dtype="float32", always_2d=True)
            if not len(piece):
                raise DataError(
                    f"audio: '{path}' says it holds {facts.frames:,} frames, got {facts.frames - left:,}; it was cut "
                    "short, copy it again"
                )
            left -= len(piece)
            if not np.isfinite(piece).all():
                raise DataError(f"audio: '{path}' must hold finite samples, got infinite ones or no numbers")
            if heard is not None:
                heard(piece)
            if mono:
                piece = piece.mean(1, keepdims=True, dtype=np.float32)
            if stream is not None:
                piece = stream.resample_chunk(np.ascontiguousarray(piece), last=not left).reshape(-1, channels)
            if len(piece):
                yield np.clip(piece, -1, 1)


def read_audio(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = None,
    mono: bool = True,
    start: int = 0,
    frames: int | None = None,
) -> Audio:
    """A whole file, or a window of one.

    Args:
        path: WAV (8 to 32 bits, floats), FLAC, and what else libsndfile reads.
        sample_rate: to which it is resampled. Default: its own.
        mono: the channels' mean, (frames, 1); else (frames, channels).
        start: first frame of a window, counted at the file's own rate.
        frames: how many, at the file's own rate. Default: to the end.

    Returns:
        Audio.

    Raises:
        DataError: the file can't be read or holds no samples, or the window lies outside of it.
        MissingExtraError: soundfile, or (for another rate) soxr, is not installed.
    """
    facts = audio_facts(path)
    wanted = facts.sample_rate if sample_rate is None else _check_rate("read_audio", sample_rate)
    if start == 0 and frames is None:
        return Audio(np.concatenate(list(audio_blocks(path, sample_rate=sample_rate, mono=mono))), wanted)
    count = facts.frames - start if frames is None else frames
    if start < 0 or count < 1 or start + count > facts.frames:
        raise DataError(
            f"read_audio: the window must lie within the {facts.frames:,} frames of '{path}', got start = {start:,} "
            f"and frames = {frames}; take a smaller one"
        )
    with _open(facts.path) as file, _naming(facts.path):
        file.seek(start)
        samples = file.read(count, dtype="float32", always_2d=True)
    samples = samples.mean(1, keepdims=True, dtype=np.float32) if mono else samples
    return Audio(np.clip(resample(samples, facts.sample_rate, wanted), -1, 1), wanted)


def resample(samples: NDArray[np.float32], before: int, after: int) -> NDArray[np.float32]:
    """Samples (frames, channels) or (frames,) at another rate, band-limited (soxr, high quality).

    Args:
        samples: float32.
        before: their rate.
        after: the wanted rate.
    """
    _check_rate("resample", before)
    _check_rate("resample", after)
    return samples if before == after else _soxr().resample(samples, before, after, quality="HQ")


def clipped_share(samples: NDArray[np.float32]) -> float:
    """The part of samples that stands in runs of three or more at full scale: what was too loud for the recorder."""
    flat = np.abs(samples.reshape(len(samples), -1)) >= 32766 / 32768
    if len(flat) < 3:
        return 0.0
    middle = flat[:-2] & flat[1:-1] & flat[2:]
    run = np.zeros_like(flat)
    for shift in range(3):
        run[shift : len(flat) - 2 + shift] |= middle
    return float(run.mean())


def find_audio(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that paths name: files themselves, and all sound files below folders, in the order of their names with
    numbers counted (take 2 before take 10).

    Raises:
        DataError: a path does not exist, or nothing is found.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            below = [p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file()]
            if not below:
                raise DataError(f"audio: '{path}' holds no {', '.join(AUDIO_SUFFIXES)} file; name a folder with some")
            found += sorted(below, key=lambda p: _natural(p.as_posix()))
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"audio: '{path}' does not exist; name a sound file or a folder of them")
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def write_audio(path: str | os.PathLike[str], samples: NDArray[Any], sample_rate: int) -> None:
    """Writes 16-bit WAV or FLAC, by the path's suffix, whole or not at all.

    Args:
        path: ends in .wav or .flac.
        samples: (frames,) or (frames, channels), float in [-1, 1]; beyond is cut off.
        sample_rate: frames a second.

    Raises:
        DataError: another suffix, no samples, or samples that are no numbers.
    """
    soundfile, path = _soundfile(), Path(path)
    _check_rate("write_audio", sample_rate)
    kind = _WRITTEN.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"write_audio: the file must end in {' or '.join(_WRITTEN)}, got '{path}'")
    samples = np.asarray(samples, np.float32)
    if samples.ndim not in (1, 2) or samples.size == 0 or not np.isfinite(samples).all():
        raise DataError(
            f"write_audio: samples must be (frames,) or (frames, channels), finite and not empty, got {samples.shape}"
        )
    # Rounded here: libsndfile rounds otherwise for one format than for the other.
    whole = np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)
    with atomic_file(path) as temporary:
        soundfile.write(temporary, whole, sample_rate, format=kind, subtype="PCM_16")


def mu_law_encode(samples: NDArray[Any]) -> NDArray[np.uint8]:
    """Samples in [-1, 1] as 256 levels that are finer where it is quieter; silence is 128.

    ``f = sign(x) log(1 + 255 |x|) / log(256); code = floor((f + 1) / 2 * 255 + 1/2)``

    Source: ITU-T G.711's curve; van den Oord et al. (2016), arXiv:1609.03499, section 2.2.
    """
    x = np.clip(np.asarray(samples, np.float32), -1, 1)
    companded = np.sign(x) * np.log1p(_MU * np.abs(x)) / np.float32(np.log1p(_MU))
    return np.floor((companded + 1) / 2 * _MU + 0.5).astype(np.uint8)


def mu_law_decode(codes: NDArray[Any]) -> NDArray[np.float32]:
    """The sample, float32 in [-1, 1], in the middle of each of `mu_law_encode`'s levels."""
    companded = np.asarray(codes, np.float32) * (2 / _MU) - 1
    return (np.sign(companded) * np.expm1(np.abs(companded) * np.log1p(_MU)) / _MU).astype(np.float32)


def linear_encode(samples: NDArray[Any]) -> NDArray[np.uint8]:
    """Samples in [-1, 1] as 256 equal levels; silence is 128."""
    return np.floor((np.clip(np.asarray(samples, np.float32), -1, 1) + 1) / 2 * _MU + 0.5).astype(np.uint8)


def linear_decode(codes: NDArray[Any]) -> NDArray[np.float32]:
    """The sample, float32 in [-1, 1], in the middle of each of `linear_encode`'s levels."""
    return np.asarray(codes, np.float32) * np.float32(2 / _MU) - 1


QUANTIZATIONS: dict[
    str, tuple[Callable[[NDArray[Any]], NDArray[np.uint8]], Callable[[NDArray[Any]], NDArray[np.float32]]]
] = {"mu-law": (mu_law_encode, mu_law_decode), "linear": (linear_encode, linear_decode)}


def _quantization(name: str) -> Any:
    if name not in QUANTIZATIONS:
        raise DataError(f"audio: quantization must be one of {', '.join(QUANTIZATIONS)}, got {name!r}")
    return QUANTIZATIONS[name]


def quantize(samples: NDArray[Any], quantization: str = "mu-law") -> NDArray[np.uint8]:
    """Samples in [-1, 1] as one of 256 codes, by a name of `QUANTIZATIONS`."""
    return _quantization(quantization)[0](samples)


def dequantize(codes: NDArray[Any], quantization: str = "mu-law") -> NDArray[np.float32]:
    """Codes as samples in [-1, 1]; what `quantize` took away stays away."""
    return _quantization(quantization)[1](codes)
