"""Pictures of sound: how loud each frequency is over time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statescan.errors import ConfigError, MissingExtraError
from statescan.files import atomic_file

__all__ = ["Spectrogram", "draw_spectrograms", "spectrogram", "want_png"]


class Spectrogram(NamedTuple):
    """decibels: (frequencies, times), 0 for a sine at full scale; hertz: (frequencies,); seconds: (times,), middles."""

    decibels: NDArray[Any]
    hertz: NDArray[Any]
    seconds: NDArray[Any]


def spectrogram(samples: NDArray[Any], sample_rate: int, *, window: int = 256, hop: int = 64) -> Spectrogram:
    """The short-time Fourier transform's size, under a Hann window.

    Args:
        samples: (frames,), or (frames, channels), of which the mean is taken; shorter than a window is padded by zeros.
        sample_rate: frames a second.
        window: frames of a window.
        hop: frames from one window to the next.

    Raises:
        ConfigError: no samples, or a window below 2 or a hop below 1.
    """
    samples = np.asarray(samples, np.float64)
    samples = samples.mean(1) if samples.ndim == 2 else samples
    if samples.size == 0 or window < 2 or hop < 1:
        raise ConfigError(
            f"spectrogram: wanted samples, a window of at least 2 and a hop of at least 1, got {samples.size} samples, "
            f"{window} and {hop}"
        )
    samples = np.pad(samples, (0, max(0, window - len(samples))))
    # Periodic: its values sum to half a window, which a sine at full scale shows as half of that again.
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]
    size = np.abs(np.fft.rfft(frames * hann, axis=1)) / (window / 4)
    seconds = (np.arange(len(frames)) * hop + window / 2) / sample_rate
    return Spectrogram(20 * np.log10(size.T.clip(1e-10)), np.fft.rfftfreq(window, 1 / sample_rate), seconds)


def want_png(path: str | os.PathLike[str]) -> None:
    """Refuses a picture's path that ends in anything but .png.

    Raises:
        ConfigError: it does.
    """
    if Path(path).suffix.lower() != ".png":
        raise ConfigError(f"spectrograms: the picture is a PNG, so wanted a name that ends in .png, got '{path}'")


def draw_spectrograms(
    path: str | os.PathLike[str],
    sounds: Sequence[tuple[str, NDArray[Any], int]],
    *,
    columns: int = 1,
    floor: float = -80.0,
    window: int = 256,
    hop: int = 64,
) -> None:
    """Spectrograms side by side on one scale, as a PNG, written whole or not at all.

    Args:
        path: the PNG.
        sounds: title, samples and rate of each.
        columns: pictures in a row.
        floor: decibels that are shown as nothing.
        window, hop: as in `spectrogram`.

    Raises:
        ConfigError: no sounds, or a path that does not end in .png.
        MissingExtraError: matplotlib is not installed.
    """
    want_png(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("drawing spectrograms", "matplotlib", "plot") from None
    if not sounds or columns < 1:
        raise ConfigError(f"spectrograms: wanted at least one sound and column, got {len(sounds)} and {columns}")
    columns = min(columns, len(sounds))
    rows = -(-len(sounds) // columns)
    figure = Figure(figsize=(max(4.5, 2.4 * columns), 0.5 + 1.7 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(rows, columns, squeeze=False)
    longest = max(len(samples) / rate for _, samples, rate in sounds)
    image = None
    for place, axes in enumerate(every.flat):
        if place >= len(sounds):
            axes.set_axis_off()
            continue
        title, samples, rate = sounds[place]
        made = spectrogram(samples, rate, window=window, hop=hop)
        # Each column stands at the middle of its window, each row at its frequency.
        across, up = hop / rate / 2, made.hertz[1] / 2
        extent = (made.seconds[0] - across, made.seconds[-1] + across, -up / 1000, (made.hertz[-1] + up) / 1000)
        image = axes.imshow(
            made.decibels, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=floor, vmax=0
        )
        axes.set_title(title, fontsize=8)
        axes.set_xlim(0, longest)
        axes.set_ylim(0, rate / 2000)
        axes.tick_params(labelsize=7)
        axes.set_facecolor("black")
        if place % columns == 0:
            axes.set_ylabel("kHz", fontsize=8)
        if place // columns == rows - 1:
            axes.set_xlabel("s", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=every, label="dB", shrink=0.8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
