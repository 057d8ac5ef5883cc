"""Spectrograms: a tone stands where its frequency is, as loud as it is, when it is."""

from __future__ import annotations

import numpy as np
import pytest

from statescan.errors import ConfigError
from statescan.inspect.spectrogram import draw_spectrograms, spectrogram


def test_a_tone_is_where_and_as_loud_as_it_is():
    rate = 8000
    time = np.arange(rate) / rate
    tone = np.where(time < 0.5, np.sin(2 * np.pi * 1000 * time), 0.1 * np.sin(2 * np.pi * 2000 * time))
    made = spectrogram(tone, rate, window=256, hop=128)
    assert made.decibels.shape == (129, len(made.seconds))
    early, late = made.decibels[:, made.seconds < 0.45], made.decibels[:, made.seconds > 0.55]
    assert (made.hertz[early.argmax(0)] == 1000).all()
    assert (made.hertz[late.argmax(0)] == 2000).all()
    np.testing.assert_allclose(early.max(0), 0, atol=0.01)
    np.testing.assert_allclose(late.max(0), -20, atol=0.01)
    assert spectrogram(np.ones(3), rate).decibels.shape == (129, 1)


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    sounds = [(f"{i}", np.random.default_rng(i).normal(size=(500 + i, 1)), 8000) for i in range(3)]
    for name in ("a.png", "b.png"):
        draw_spectrograms(tmp_path / name, sounds, columns=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    # A click in the middle of a short sound is drawn there, not where its column would be, stretched over all of it.
    from matplotlib.axes import Axes

    drawn, original = [], Axes.imshow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Axes, "imshow", lambda axes, values, **k: drawn.append((values, k["extent"])) or original(axes, values, **k)
        )
        click = np.zeros(1200)
        click[400] = 1
        draw_spectrograms(tmp_path / "d.png", [("click", click, 8000)], window=256, hop=16)
    values, (left, right, _, top) = drawn[0]
    column = int(np.abs(10 ** (values / 20)).sum(0).argmax())
    assert left + (column + 0.5) * (right - left) / values.shape[1] == pytest.approx(400 / 8000, abs=0.002)
    assert top == pytest.approx(4 + 4 / 256)
    with pytest.raises(ConfigError, match="at least one sound"):
        draw_spectrograms(tmp_path / "c.png", [])
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        draw_spectrograms(tmp_path / "c.jpg", sounds)
    with pytest.raises(ConfigError, match="wanted samples"):
        spectrogram(np.zeros(0), 8000)
