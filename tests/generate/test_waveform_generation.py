"""Sound drawn from a model: named by its seed, from the model's own distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.generate.waveform import generate_waveforms
from statescan.models.waveform import WaveformConfig, WaveformModel


def make(**fields) -> WaveformModel:
    torch.manual_seed(0)
    small = {"stages": ("s4", "mamba"), "d_model": 8, "n_layer": 1, "d_state": 4, "d_state_mamba": 4, "pool": 2}
    return WaveformModel(WaveformConfig(**{**small, **fields})).eval()


def test_the_seed_names_the_sound():
    model = make(classes=2)
    one = generate_waveforms(model, 40, rows=3, labels=[0, 1, 1], seed=5)
    assert one.shape == (3, 40)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one, generate_waveforms(model, 40, rows=3, labels=[0, 1, 1], seed=5))
    assert (one != generate_waveforms(model, 40, rows=3, labels=[0, 1, 1], seed=6)).any()
    assert not model.training


@torch.no_grad()
def test_without_temperature_each_sample_is_the_likeliest():
    model = make()
    made = torch.from_numpy(generate_waveforms(model, 30, temperature=0).astype(np.int64))
    inputs = torch.cat([torch.tensor([[model.config.silence]]), made[:, :-1]], 1)
    assert torch.equal(model(inputs).logits.argmax(-1), made)


@torch.no_grad()
def test_the_first_sample_is_drawn_from_the_softmax():
    model = make(levels=4)
    rows = 20_000
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.0, 1.0, 2.0, -1.0]))
    for temperature in (1.0, 0.5):
        first = generate_waveforms(model, 1, rows=rows, temperature=temperature, seed=1)[:, 0]
        logits = model(torch.tensor([[2]])).logits[0, 0] / temperature
        share = np.bincount(first, minlength=4) / rows
        np.testing.assert_allclose(share, logits.softmax(-1), atol=4 * 0.5 / np.sqrt(rows))


def test_numbers_out_of_range():
    model = make()
    for name, value in (("samples", 0), ("rows", 0), ("temperature", -1.0)):
        with pytest.raises(ConfigError, match=name):
            generate_waveforms(model, **{"samples": 4, name: value})
    with pytest.raises(ConfigError, match="CUDA"):
        generate_waveforms(model, 4, capture=True)
    with pytest.raises(ConfigError, match="labels"):
        generate_waveforms(model, 4, labels=[1])
    with pytest.raises(ShapeError, match=r"labels must be in \[0, 2\), got 2 to 2"):
        generate_waveforms(make(classes=2), 4, labels=[2])
    with pytest.raises(DTypeError, match="labels must be integers"):
        generate_waveforms(make(classes=2), 4, labels=[0.5])
