"""Waveform models on a GPU: a captured update and captured generation give what kernel by kernel gives; bfloat16."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from statescan.data.augment import VaryWaveforms
from statescan.data.recordings import Recordings
from statescan.generate.waveform import generate_waveforms
from statescan.models.waveform import WaveformConfig, WaveformModel
from statescan.train.waveform import WaveformTraining, train_waveform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

KINDS = [("s4", "s4d", "mamba"), ("mamba", "s4"), ("lstm",), ("conv", "mamba-complex")]


def config(stages, **fields) -> WaveformConfig:
    return WaveformConfig(**{"stages": stages, "d_model": 32, "n_layer": 2, "d_state": 16, "classes": 2, **fields})


def sounds() -> Recordings:
    rng = np.random.default_rng(0)
    codes = (128 + 20 * np.sin(np.arange(20_000) / 7) + rng.normal(size=20_000)).astype(np.uint8)
    offsets = np.arange(0, 20_001, 1000)
    labels = (np.arange(20) % 2).astype(np.uint8)
    names = tuple(f"{i}.wav" for i in range(20))
    return Recordings(codes, offsets, names, 8000, labels=labels, classes=("a", "b"))


@pytest.mark.parametrize("stages", KINDS)
@torch.no_grad()
def test_forward_and_steps_are_the_cpus(stages):
    torch.manual_seed(0)
    model = WaveformModel(config(stages)).eval()
    codes, labels = torch.randint(256, (3, 50)), torch.tensor([0, 1, 1])
    wanted = model.double()(codes, labels).logits
    model = model.float().cuda()
    torch.testing.assert_close(model(codes.cuda(), labels.cuda()).logits.cpu().double(), wanted, atol=2e-3, rtol=2e-3)
    state, steps = model.init_state(3), []
    for t in range(50):
        output = model.step(codes[:, t].cuda(), state, labels.cuda())
        state = output.state
        steps.append(output.logits.cpu().double())
    torch.testing.assert_close(torch.stack(steps, 1), wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("stages", KINDS)
def test_captured_generation_is_eager_generation(stages):
    torch.manual_seed(0)
    model = WaveformModel(config(stages)).cuda().eval()
    labels = [0, 1, 1, 0]
    one = generate_waveforms(model, 100, rows=4, labels=labels, seed=3, capture=True)
    other = generate_waveforms(model, 100, rows=4, labels=labels, seed=3, capture=False)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, generate_waveforms(model, 100, rows=4, labels=labels, seed=3))
    assert (one != generate_waveforms(model, 100, rows=4, labels=labels, seed=4)).any()
    assert (one[0] != one[3]).any()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_captured_run_is_one_kernel_by_kernel(tmp_path, precision):
    train = WaveformTraining(
        steps=8, batch_size=4, window=256, warmup=2, evaluate_every=4, checkpoint_every=0, precision=precision
    )
    data = sounds().split(0.2)
    model = config(("s4", "mamba"), dropout=0.1)
    one = train_waveform(model, train, data, tmp_path / "one", progress=False)
    other = train_waveform(model, dataclasses.replace(train, capture=False), data, tmp_path / "other", progress=False)
    assert one.evaluations == other.evaluations
    assert one.peak_bytes > 0
    weights = [WaveformModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "other")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_variations_are_captured_and_fresh():
    codes = torch.randint(100, 150, (4, 500), dtype=torch.uint8, device="cuda")
    lengths = torch.full((4,), 400, device="cuda", dtype=torch.int32)
    vary = VaryWaveforms()
    vary(codes, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, after = vary(codes, lengths)
    graph.replay()
    first = values.clone()
    graph.replay()
    assert not torch.equal(first, values)
    assert torch.isfinite(values).all()
    assert int(after.max()) <= 500
