"""Classifiers on a GPU: an update captured in a graph gives the bits of one that runs kernel by kernel."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from statescan.data.labelled import LabelledSequences
from statescan.models import ClassifierConfig
from statescan.nn import S4, S4D
from statescan.train.classify import ClassifyConfig, Splits, train_classifier
from statescan.train.classify import _ClassifierTrainer as Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TRAIN = ClassifyConfig(epochs=3, batch_size=16, lr=1e-2, warmup=5, log_every=4, accelerator="cuda", precision="bf16")


def _rows(count: int, seed: int, tokens: bool) -> LabelledSequences:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(200, 900, count).astype(np.int32)
    values = draw.integers(1, 9, (count, 900)).astype(np.uint8)
    labels = (values[:, :100].sum(1) % 3).astype(np.uint8)
    if not tokens:
        return LabelledSequences(values, labels, 3, mean=0.02, deviation=0.01)
    values[np.arange(900) >= lengths[:, None]] = 0
    return LabelledSequences(values, labels, 3, lengths, vocab_size=9)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("mixer", ["s4", "s4d", "mamba"])
def test_captured_or_not_and_stopped_or_not_the_bits_are_the_same(mixer: str, tokens: bool, tmp_path: Path) -> None:
    model = ClassifierConfig(
        classes=3, d_input=0 if tokens else 1, vocab_size=9 if tokens else 0, d_model=32, n_layer=2, d_state=16,
        mixer=mixer, dropout=0.1, bidirectional=tokens and mixer != "mamba",
    )  # fmt: skip
    data = Splits(_rows(130, 0, tokens), _rows(40, 1, tokens), _rows(50, 2, tokens))
    captured = train_classifier(model, TRAIN, data, tmp_path / "captured", progress=False)
    plain = train_classifier(model, replace(TRAIN, capture=False), data, tmp_path / "plain", progress=False)
    assert (captured.final, captured.evaluations) == (plain.final, plain.evaluations)

    original = Trainer._update

    def update(self: Trainer) -> None:
        original(self)
        if self.done == 13:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        assert train_classifier(model, TRAIN, data, tmp_path / "parts", progress=False).interrupted
    train_classifier(model, TRAIN, data, tmp_path / "parts", resume=True, progress=False)
    for name in ("log.csv", "evaluations.csv", "model.safetensors"):
        bits = [(tmp_path / run / name).read_bytes() for run in ("captured", "plain", "parts")]
        assert bits[0] == bits[1] == bits[2], name


@pytest.mark.parametrize("kind", [S4, S4D])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_layer_and_its_gradients_are_those_in_float64_on_the_cpu(kind: type, bidirectional: bool) -> None:
    torch.manual_seed(0)
    layer = kind(24, 16, bidirectional=bidirectional)
    truth = kind(24, 16, bidirectional=bidirectional).double()
    truth.load_state_dict(layer.state_dict())
    layer = layer.cuda()
    u, upward = torch.randn(3, 777, 24), torch.randn(3, 777, 24)
    ours, wide = u.clone().cuda().requires_grad_(), u.double().requires_grad_()
    y, y_wide = layer(ours).output, truth(wide).output
    y.backward(upward.cuda())
    y_wide.backward(upward.double())

    def near(got: torch.Tensor, wanted: torch.Tensor) -> bool:
        return bool((got.cpu().double() - wanted).norm() <= 2e-5 * wanted.norm())

    assert near(y, y_wide)
    assert ours.grad is not None
    assert wide.grad is not None
    assert near(ours.grad, wide.grad)
    for (name, got), (_, wanted) in zip(layer.named_parameters(), truth.named_parameters(), strict=True):
        assert near(got.grad, wanted.grad), name
