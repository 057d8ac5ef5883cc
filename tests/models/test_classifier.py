"""The classifier of sequences: every mixer learns, padding is left out, what is saved comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statescan.errors import CheckpointError, ConfigError, DTypeError, ShapeError
from statescan.models import ClassifierConfig, SequenceClassifier
from statescan.models.classifier import MIXERS


def _model(mixer: str, **given: object) -> SequenceClassifier:
    torch.manual_seed(0)
    fields = {"classes": 3, "d_input": 2, "d_model": 16, "n_layer": 2, "d_state": 8, "mixer": mixer, **given}
    return SequenceClassifier(ClassifierConfig(**fields))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_learns_which_third_the_pulse_is_in(mixer: str) -> None:
    """Trained on pulses at random places; judged on fresh ones, far above the third that chance would give."""
    model = _model(mixer, pooling="last")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(1)

    def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        place = torch.randint(0, 12, (rows,), generator=draw)
        x = 0.1 * torch.randn(rows, 12, 2, generator=draw)
        x[torch.arange(rows), place, 0] += 2
        return x, place // 4

    for _ in range(60):
        loss = model(*batch(16)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    x, labels = batch(200)
    with torch.no_grad():
        right = (model(x).logits.argmax(-1) == labels).float().mean()
    assert right > 0.8


@pytest.mark.parametrize("mixer", ["mamba", "s4d", "lstm", "attention"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_behind_changes_nothing(mixer: str, pooling: str) -> None:
    model = _model(mixer, pooling=pooling, d_input=0, vocab_size=9).eval()
    ids = torch.randint(1, 9, (2, 10))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    padded = model(ids, mask=mask).logits
    assert torch.allclose(padded[0], model(ids[:1]).logits[0], atol=1e-5)
    assert torch.allclose(padded[1], model(ids[1:, :6]).logits[0], atol=1e-5)


def test_loss_is_the_cross_entropy_and_reaches_every_parameter() -> None:
    model = _model("s4", bidirectional=True)
    labels = torch.tensor([0, 2])
    output = model(torch.randn(2, 7, 2), labels)
    wanted = -torch.log_softmax(output.logits, -1)[torch.arange(2), labels].mean()
    assert torch.allclose(output.loss, wanted)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_saved_and_read(tmp_path: Path) -> None:
    model = _model("s4d")
    model.save_pretrained(tmp_path / "model")
    same = SequenceClassifier.from_pretrained(tmp_path / "model")
    assert same.config == model.config
    x = torch.randn(2, 7, 2)
    assert torch.equal(same(x).logits, model(x).logits)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        SequenceClassifier.from_pretrained(tmp_path / "model")


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="mixer must be one of"):
        ClassifierConfig(classes=2, d_input=1, mixer="magic")
    with pytest.raises(ConfigError, match="d_input must be > 0 or vocab_size > 0, and not both"):
        ClassifierConfig(classes=2)
    with pytest.raises(ConfigError, match="bidirectional must be False"):
        ClassifierConfig(classes=2, d_input=1, mixer="lstm", bidirectional=True)
    with pytest.raises(ConfigError, match="unknown field 'depth'"):
        ClassifierConfig.from_dict({"classes": 2, "d_input": 1, "depth": 3})
    model = _model("lstm")
    with pytest.raises(ShapeError, match="inputs must be"):
        model(torch.zeros(2, 7, 3))
    with pytest.raises(DTypeError, match="inputs must be float"):
        model(torch.zeros(2, 7, 2, dtype=torch.long))
    with pytest.raises(ShapeError, match="labels must be"):
        model(torch.zeros(2, 7, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ShapeError, match="mask must be"):
        model(torch.zeros(2, 7, 2), mask=torch.ones(2, 6))
    with pytest.raises(DTypeError, match="inputs must be token ids"):
        _model("lstm", d_input=0, vocab_size=4)(torch.zeros(2, 7))
