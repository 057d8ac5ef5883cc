"""Many recordings as one row of codes: what a waveform model learns from, and a classifier of sounds."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from statescan.data.audio import (
    LEVELS,
    QUANTIZATIONS,
    audio_blocks,
    audio_facts,
    clipped_share,
    dequantize,
    find_audio,
    quantize,
)
from statescan.data.labelled import LabelledSequences
from statescan.errors import DataError
from statescan.files import atomic_file

__all__ = [
    "LABELS",
    "SILENCE",
    "Recordings",
    "labelled_recordings",
    "load_recordings",
    "read_recordings",
    "refuse_repeats",
    "trim_silence",
]

# Where the label of a file comes from.
LABELS = ("none", "name", "folder")
# Below this share of the channels' mean power a mix has lost nearly all of them: channels without anything in common
# leave a half, or of n one n-th.
_CANCELLED = 0.01
# The code of silence in both quantisations.
SILENCE = LEVELS // 2
# What a file of them holds: the dtype's kind, as numpy's letters, and the axes of each array.
_ARRAYS = {
    "codes": ("u", 1),
    "offsets": ("iu", 1),
    "names": ("U", 1),
    "labels": ("u", 1),
    "classes": ("U", 1),
    "sample_rate": ("iu", 0),
    "quantization": ("U", 0),
}
_KINDS = {"u": "uint8", "iu": "integers", "U": "text"}


@dataclass(frozen=True)
class Recordings:
    """Recordings one behind the other, one byte a sample.

    Args:
        codes: (samples,) uint8, all recordings; may be memory-mapped.
        offsets: (recordings + 1,) int64, where each begins, and the end.
        names: of the files, without folder.
        sample_rate: samples a second.
        quantization: what the codes mean, see `statescan.data.audio.QUANTIZATIONS`.
        labels: (recordings,) uint8, None where there are none.
        classes: names of the labels, in their order.
        clipped: share of samples that stood clipped in the files.
        cancelled: names of the files whose channels, mixed to one, nearly cancel each other out.

    Raises:
        DataError: what doesn't go together.
    """

    codes: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    names: tuple[str, ...]
    sample_rate: int
    quantization: str = "mu-law"
    labels: NDArray[np.uint8] | None = None
    classes: tuple[str, ...] = ()
    clipped: float = 0.0
    cancelled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.names)
        fits = self.offsets.shape == (count + 1,) and count > 0 and self.codes.dtype == np.uint8
        fits = (
            fits and self.offsets[0] == 0 and self.offsets[-1] == len(self.codes) and (np.diff(self.offsets) > 0).all()
        )
        if not fits:
            raise DataError(
                f"recordings: offsets must rise from 0 to the {len(self.codes):,} codes, one more than the {count} "
                f"names, got {self.offsets.shape}"
            )
        if self.sample_rate < 1 or self.quantization not in QUANTIZATIONS:
            raise DataError(
                f"recordings: wanted a sample_rate of at least 1 and a quantization of {', '.join(QUANTIZATIONS)}, got "
                f"{self.sample_rate} and {self.quantization!r}"
            )
        if self.labels is not None and (self.labels.shape != (count,) or int(self.labels.max()) >= len(self.classes)):
            raise DataError(
                f"recordings: labels must be ({count},) below the {len(self.classes)} classes, got "
                f"{self.labels.shape} up to {int(self.labels.max(initial=0))}"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(recordings,) samples of each."""
        return np.diff(self.offsets)

    @property
    def seconds(self) -> float:
        """Of all recordings."""
        return len(self.codes) / self.sample_rate

    @property
    def digest(self) -> int:
        """By which other recordings, or others' labels, would be known as such."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        codes = zlib.crc32(self.codes)  # pyright: ignore[reportArgumentType]
        return zlib.crc32(labels, zlib.crc32(self.offsets.tobytes(), codes))

    def __getitem__(self, number: int) -> NDArray[np.uint8]:
        """The codes of one recording."""
        return self.codes[self.offsets[number] : self.offsets[number + 1]]

    def waveform(self, number: int) -> NDArray[np.float32]:
        """The samples of one recording, (samples,) in [-1, 1]."""
        return dequantize(self[number], self.quantization)

    def _joined(self, parts: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Pieces of these codes one behind the other: in memory, or on disk where these are."""
        if not isinstance(self.codes, np.memmap):
            return np.concatenate(list(parts))
        with _code_store() as store:
            for part in parts:
                store.write(part.tobytes())
            return _mapped(store)

    def take(self, rows: Sequence[int] | NDArray[Any]) -> Recordings:
        """Some recordings, by their numbers."""
        rows = np.asarray(rows)
        if not len(rows):
            raise DataError("recordings: wanted some of them, got none; choose other splits")
        return Recordings(
            self._joined(self[int(row)] for row in rows),
            np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64),
            tuple(self.names[int(row)] for row in rows),
            self.sample_rate,
            self.quantization,
            None if self.labels is None else self.labels[rows],
            self.classes,
            self.clipped,
        )

    def cut(self, longest: int) -> Recordings:
        """The first `longest` samples of each recording; all of those that are shorter."""
        lengths = np.minimum(self.lengths, longest)
        if (lengths == self.lengths).all():
            return self
        codes = self._joined(self[number][:length] for number, length in enumerate(lengths))
        return replace(self, codes=codes, offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def between(self, low: float, high: float) -> Recordings:
        """The part of each recording from a share of its length to another one; those that it leaves empty are gone."""
        return self._shares(low, high, [(low, high)])

    def outside(self, low: float, high: float) -> Recordings:
        """What `between` leaves of each recording: what is before it and what is behind it, two recordings of one name.

        Those that are empty are gone.
        """
        return self._shares(low, high, [(0.0, low), (high, 1.0)])

    def _shares(self, low: float, high: float, wanted: Sequence[tuple[float, float]]) -> Recordings:
        """The wanted parts of each recording, by shares of its length."""
        if not 0 <= low < high <= 1:
            raise DataError(f"recordings: the shares must be 0 <= low < high <= 1, got {low} and {high}")
        bounds = (np.array(wanted) * self.lengths[:, None, None]).round().astype(np.int64).reshape(-1, 2)
        rows = np.repeat(np.arange(len(self)), len(wanted))
        kept = bounds[:, 1] > bounds[:, 0]
        if not kept.any():
            raise DataError("recordings: nothing is left between these shares; take longer recordings")
        rows, bounds = rows[kept], bounds[kept]
        codes = self._joined(self[int(row)][start:stop] for row, (start, stop) in zip(rows, bounds, strict=True))
        offsets = np.concatenate([[0], np.cumsum(bounds[:, 1] - bounds[:, 0])]).astype(np.int64)
        labels = None if self.labels is None else self.labels[rows]
        names = tuple(self.names[int(row)] for row in rows)
        return replace(self, codes=codes, offsets=offsets, names=names, labels=labels)

    def split(self, share: float, seed: int = 0) -> tuple[Recordings, Recordings]:
        """Most of the recordings, and a random share of them that is held out.

        One recording alone is cut instead: its end is held out.
        """
        if not 0 < share < 1:
            raise DataError(f"recordings: the held-out share must be within (0, 1), got {share}")
        if len(self) > 1:
            order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self))
            held = max(1, round(share * len(self)))
            return self.take(np.sort(order[held:])), self.take(np.sort(order[:held]))
        cut = len(self.codes) - max(1, round(share * len(self.codes)))
        if cut < 1:
            raise DataError("recordings: one recording of one sample can't be split; take more data")
        return tuple(  # pyright: ignore[reportReturnType]
            Recordings(
                part,
                np.array([0, len(part)]),
                self.names,
                self.sample_rate,
                self.quantization,
                self.labels,
                self.classes,
            )
            for part in (self.codes[:cut], self.codes[cut:])
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it into one compressed .npz file, which needs no audio library to be read again."""
        labels = np.empty(0, np.uint8) if self.labels is None else self.labels
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                codes=self.codes,
                offsets=self.offsets,
                names=np.array(self.names),
                labels=labels,
                classes=np.array(self.classes, dtype=np.str_),
                sample_rate=self.sample_rate,
                quantization=self.quantization,
            )


def _code_store() -> IO[bytes]:
    """A file without a name, which goes when nobody has it open or mapped."""
    return tempfile.TemporaryFile(prefix="statescan-codes-")


def _mapped(store: IO[bytes]) -> NDArray[np.uint8]:
    store.flush()
    return np.memmap(store, np.uint8, mode="r")  # pyright: ignore[reportArgumentType, reportCallIssue]


def load_recordings(path: str | os.PathLike[str]) -> Recordings:
    """Reads what `Recordings.save` wrote.

    Raises:
        DataError: no such file, or not one of these: an array is missing, or of another dtype or shape.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            if missing := sorted(set(_ARRAYS) - set(held.files)):
                raise DataError(f"recordings: '{path}' must hold {', '.join(_ARRAYS)}, got no {missing[0]}")
            arrays = {name: held[name] for name in _ARRAYS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(f"recordings: '{path}' can't be read as .npz ({problem}); write it again") from None
    for name, (kind, axes) in _ARRAYS.items():
        dtype, shape = arrays[name].dtype, arrays[name].shape
        if dtype.kind not in kind or len(shape) != axes or (kind == "u" and dtype != np.uint8):
            raise DataError(
                f"recordings: '{path}' must hold {name} as {_KINDS[kind]} with {axes} axes, got {dtype} {shape}; write "
                "it with Recordings.save"
            )
    labels = arrays["labels"]
    try:
        return Recordings(
            arrays["codes"],
            arrays["offsets"].astype(np.int64),
            tuple(map(str, arrays["names"])),
            int(arrays["sample_rate"]),
            str(arrays["quantization"]),
            labels if len(labels) else None,
            tuple(map(str, arrays["classes"])),
        )
    except DataError as problem:
        raise DataError(f"recordings: '{path}': {str(problem).removeprefix('recordings: ')}") from None


def read_recordings(
    paths: Sequence[str | os.PathLike[str]],
    *,
    sample_rate: int | None = None,
    quantization: str = "mu-law",
    labels: str = "none",
    normalize: bool = False,
    on_disk: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Recordings:
    """Sound files as codes: resampled to one rate, mixed to one channel, quantised; read piece by piece.

    Args:
        paths: files and folders; or one .npz file that `Recordings.save` wrote, which is taken as it is.
        sample_rate: of all; that of an .npz must be the same. Default: that of the first file.
        quantization: "mu-law" or "linear".
        labels: "none"; "name", the part of a file's name before the first "_"; "folder", the name of its folder.
        normalize: scale each recording so that its loudest sample is 1. One of silence stays as it is.
        on_disk: keep the codes in a temporary file that is memory-mapped and goes with the process, so that memory does
            not grow with the data.
        progress: called with (files done, files).

    Returns:
        Recordings.

    Raises:
        DataError: nothing is found, a file is named twice, can't be read or holds no samples: its name is told.
    """
    if len(paths) == 1 and Path(paths[0]).suffix == ".npz":
        kept = load_recordings(paths[0])
        if sample_rate not in (None, kept.sample_rate):
            raise DataError(
                f"recordings: '{paths[0]}' must hold sound at {sample_rate} Hz, got {kept.sample_rate} Hz; read the "
                "sound files anew at that rate"
            )
        return kept
    if labels not in LABELS:
        raise DataError(f"recordings: labels must be one of {', '.join(LABELS)}, got {labels!r}")
    files = find_audio(paths)
    seen: set[Path] = set()
    for path in files:
        if (place := path.resolve()) in seen:
            raise DataError(
                f"recordings: wanted each sound file once, got '{path}' twice; name it, or its folder, once"
            )
        seen.add(place)
    rate = audio_facts(files[0]).sample_rate if sample_rate is None else sample_rate
    offsets, loud = [0], [0.0, 0]
    power, cancelled = np.zeros(2), list[str]()

    def note_faults(piece: NDArray[np.float32]) -> None:
        # As recorded: mixing channels and resampling round off what stood at full scale.
        loud[0] += clipped_share(piece) * piece.size
        loud[1] += piece.size
        power[:] += np.square(piece).sum(dtype=np.float64) / piece.shape[1], np.square(piece.mean(1)).sum()

    with _code_store() as store:
        for number, path in enumerate(files):
            peak = 1.0
            if normalize:
                peak = max(float(np.abs(block).max()) for block in audio_blocks(path, sample_rate=rate)) or 1.0
            count = 0
            power[:] = 0
            for block in audio_blocks(path, sample_rate=rate, heard=note_faults):
                store.write(quantize(block[:, 0] / np.float32(peak), quantization).tobytes())
                count += len(block)
            if not count:
                raise DataError(f"audio: '{path}' is shorter than one sample at {rate} Hz; leave it out")
            offsets.append(offsets[-1] + count)
            if power[1] < _CANCELLED * power[0]:
                cancelled.append(path.name)
            if progress is not None:
                progress(number + 1, len(files))
        store.seek(0)
        codes = _mapped(store) if on_disk else np.frombuffer(store.read(), np.uint8)
    found: list[str] = []
    if labels != "none":
        found = [path.name.partition("_")[0] if labels == "name" else path.parent.name for path in files]
    classes = tuple(sorted(set(found)))
    if len(classes) > LEVELS:
        raise DataError(f"recordings: labels={labels!r} gives {len(classes)} classes, wanted {LEVELS} at most")
    place = {name: number for number, name in enumerate(classes)}
    return Recordings(
        codes,
        np.array(offsets, np.int64),
        tuple(path.name for path in files),
        rate,
        quantization,
        np.array([place[name] for name in found], np.uint8) if found else None,
        classes,
        loud[0] / loud[1],
        tuple(cancelled),
    )


def refuse_repeats(parts: Sequence[Recordings], *, within: bool = True) -> None:
    """Refuses a recording that is there twice: one copy would be held out, the other learnt from.

    Recordings of nothing but one level, as of silence, are let be.

    Args:
        parts: that are split, or of which some are learnt from and others held out.
        within: also within each of them. Default True.

    Raises:
        DataError: two recordings are equal, sample by sample.
    """
    seen: dict[bytes, tuple[int, str]] = {}
    for here, part in enumerate(parts):
        for number, name in enumerate(part.names):
            codes = part[number]
            if (codes == codes[0]).all():
                continue
            digest = hashlib.sha256(codes.tobytes()).digest()
            if digest not in seen:
                seen[digest] = here, name
            elif within or seen[digest][0] != here:
                raise DataError(
                    "recordings: wanted each recording once, since a copy of what is held out would be learnt from, "
                    f"got the same {len(codes):,} samples as '{seen[digest][1]}' and as '{name}'; leave one of them out"
                )


def labelled_recordings(recordings: Recordings, longest: int, frame: int = 1) -> LabelledSequences:
    """Recordings as a classifier takes them: rows of codes with silence behind each, and how much of it is real.

    A model reads the companded sample, about -1 to 1 with silence at 0, divided by the deviation over all recordings.

    Args:
        recordings: with labels.
        longest: samples of a row; what a longer recording has beyond is left away.
        frame: samples that a model reads at each position, side by side.

    Raises:
        DataError: recordings without labels.
    """
    if recordings.labels is None:
        raise DataError("recordings: a classifier wants labels, got none; read them with labels='name' or 'folder'")
    lengths = np.minimum(recordings.lengths, longest).astype(np.int32)
    values = np.full((len(recordings), -(-int(lengths.max()) // frame) * frame), SILENCE, np.uint8)
    for row, length in enumerate(lengths):
        values[row, :length] = recordings[row][:length]
    middle = SILENCE / (LEVELS - 1)
    deviation = float(np.sqrt(np.mean((recordings.codes / np.float32(LEVELS - 1) - np.float32(middle)) ** 2))) or 1.0
    return LabelledSequences(
        values,
        recordings.labels,
        len(recordings.classes),
        lengths=lengths,
        mean=middle,
        deviation=deviation,
        frame=frame,
    )


def trim_silence(codes: NDArray[np.uint8], rest: int) -> int:
    """How long the sound at the start of a row is: up to where `rest` codes of digital silence follow each other, or
    silence lasts to the end; at least 1.

    Args:
        codes: (samples,) uint8.
        rest: samples of silence that end it.
    """
    sound = np.flatnonzero(codes != SILENCE)
    if not len(sound):
        return 1
    gaps = np.flatnonzero(np.diff(sound) > rest)
    return int(sound[gaps[0]] if len(gaps) else sound[-1]) + 1
