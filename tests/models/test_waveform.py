"""The waveform model: no look ahead, step by step the same as whole, kept and read, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch

from statescan.errors import CheckpointError, ConfigError, DTypeError, ShapeError
from statescan.models.waveform import WaveformConfig, WaveformModel

KINDS = [
    (("s4", "s4d", "mamba"), 2),
    (("mamba", "s4", "mamba-complex"), 2),
    (("s4", "attention"), 3),
    (("gru", "mamba"), 3),
    (("lstm",), 4),
    (("conv",), 4),
]
LENGTH = 23


def make(stages, pool=2, **fields) -> WaveformModel:
    torch.manual_seed(0)
    small = {"d_model": 6, "n_layer": 2, "d_state": 6, "d_state_mamba": 4, "pool": pool, **fields}
    model = WaveformModel(WaveformConfig(stages=stages, **small)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # What starts at zero would hide what is done with it.
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("stages", "pool"), KINDS)
@torch.no_grad()
def test_step_by_step_and_in_pieces_is_whole(stages, pool, codes):
    model = make(stages, pool, classes=3)
    labels = torch.tensor([0, 2])
    whole = model(codes, labels).logits
    state, steps = model.init_state(2), []
    for t in range(LENGTH):
        output = model.step(codes[:, t], state, labels)
        state = output.state
        steps.append(output.logits)
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=0, atol=1e-13)
    for cuts in ((0, 1, 4, 11, 12, LENGTH), (0, 16, LENGTH)):
        pieces, state = [], model.init_state(2)
        for start, stop in itertools.pairwise(cuts):
            output = model(codes[:, start:stop], labels, state=state)
            state = output.state
            pieces.append(output.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-13)
        # And on from there, at whatever point of the pooling, with steps.
        assert model.step(codes[:, 0], state, labels).logits.isfinite().all()


@pytest.mark.parametrize(("stages", "pool"), KINDS)
@torch.no_grad()
def test_nothing_looks_ahead_and_everything_behind_is_seen(stages, pool, codes):
    model = make(stages, pool)
    before = model(codes).logits
    for place in (0, 7, 8, 15):
        changed = codes.clone()
        changed[:, place] = (changed[:, place] + 100) % 256
        moved = (model(changed).logits - before).abs().amax((0, 2))
        assert moved[:place].max() < 1e-12 if place else True
        assert moved[place] > 1e-9
        if "conv" not in stages:
            assert moved[place:].min() > 1e-12


@torch.no_grad()
def test_a_long_memory_goes_through_the_centre(codes):
    # The way by the centre is the only one here: outside there is a short convolution alone.
    model = make(("conv", "s4"), 4, n_layer=1)
    changed = codes.clone()
    changed[:, 0] = (changed[:, 0] + 100) % 256
    moved = (model(changed).logits - model(codes).logits).abs().amax((0, 2))
    # Samples 0 to 3 make one vector, which is known from sample 4 on.
    assert moved[3] == 0
    assert moved[4:].min() > 0


@torch.no_grad()
def test_the_state_keeps_its_size(codes):
    from torch.utils import _pytree as pytree

    model = make(("s4", "mamba", "s4d"), 2)
    state = model.init_state(2)
    shapes = []
    for t in range(17):
        if t % model.config.period == 0:
            shapes.append([leaf.shape for leaf in pytree.tree_leaves(state) if leaf is not None])
        state = model.step(codes[:, t], state).state
    assert shapes[1:] == shapes[:-1]


def test_gradients_reach_every_parameter_and_the_loss_is_that_of_the_targets(codes):
    model = make(("s4", "mamba", "s4d"), 2, classes=2, dropout=0.0)
    targets = codes.roll(-1, 1).clone()
    targets[:, -1] = -100
    output = model(codes, torch.tensor([0, 1]), targets=targets)
    logits = output.logits.log_softmax(-1)
    kept = -logits[:, :-1].gather(2, targets[:, :-1, None]).mean()
    torch.testing.assert_close(output.loss, kept)
    output.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_kept_and_read(tmp_path, codes):
    model = make(("s4", "mamba"), 2, classes=2, quantization="linear", sample_rate=16000).float()
    model.save_pretrained(tmp_path)
    again = WaveformModel.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    labels = torch.tensor([1, 0])
    assert torch.equal(again(codes, labels).logits, model(codes, labels).logits)
    (tmp_path / "config.json").write_text('{"architecture": "CausalLM"}')
    with pytest.raises(CheckpointError, match="not a WaveformModel"):
        WaveformModel.from_pretrained(tmp_path)


def test_what_is_refused(codes):
    for name, value in (
        ("stages", ()),
        ("stages", ("s5",)),
        ("pool", 1),
        ("n_layer", 0),
        ("dropout", 1.0),
        ("quantization", "a-law"),
        ("classes", -1),
    ):
        with pytest.raises(ConfigError, match=name):
            WaveformConfig(**{name: value})
    with pytest.raises(ConfigError, match="unknown field 'poool'"):
        WaveformConfig.from_dict({"poool": 4})
    model, known = make(("s4",)), make(("s4",), classes=2)
    with pytest.raises(ShapeError, match="codes must be"):
        model(codes[0])
    with pytest.raises(ShapeError, match="codes must be"):
        model.step(codes, model.init_state(2))
    with pytest.raises(DTypeError, match="quantise"):
        model(codes.float())
    for wrong in (codes + 200, codes - 256):
        with pytest.raises(ShapeError, match=r"codes must be in \[0, 256\)"):
            model(wrong)
    for wrong in (torch.tensor([0, 2]), torch.tensor([-1, 0])):
        with pytest.raises(ShapeError, match=r"labels must be in \[0, 2\)"):
            known(codes, wrong)
    with pytest.raises(DTypeError, match="labels must be integers"):
        known(codes, torch.tensor([0.5, 1.0]))
    with pytest.raises(ShapeError, match="targets must be"):
        model(codes, targets=codes[:, 1:])
    with pytest.raises(ConfigError, match="no labels"):
        model(codes, torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="labels below 2"):
        known(codes)
    with pytest.raises(ShapeError, match="labels must be"):
        known(codes, torch.tensor([0]))
