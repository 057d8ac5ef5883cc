"""Windows that start from carried or drawn states: the states are those of the text, and a run resumes to the bit."""

from __future__ import annotations

import pytest
import torch
from test_loop import InterruptAt

from statescan.errors import CheckpointError, ConfigError
from statescan.models import CausalLM, MambaConfig, TransformerConfig
from statescan.models.baseline_config import RecurrentConfig
from statescan.train import loop, train
from statescan.train.initial_state import InitialState

MODEL = MambaConfig(16, 2, 32, d_state=4)


def _model(config=MODEL):
    torch.manual_seed(0)
    return CausalLM(config).double().eval()


@pytest.mark.parametrize("config", [MODEL, RecurrentConfig(16, 2, 32)])
def test_a_carried_text_is_judged_as_a_whole_one(config):
    model, ids = _model(config), torch.randint(32, (3, 37))
    carried = InitialState(model, 3, "carry", from_zero=0.0)
    losses = []
    for start in (0, 12, 24):
        piece = ids[:, start : start + 13]
        output = model(piece[:, :-1], labels=piece, state=carried.before())
        carried.after(output.state)
        losses.append(output.loss)
    whole = model(ids[:, :-1], labels=ids).loss
    assert torch.stack(losses).mean().item() == pytest.approx(whole.item(), rel=1e-12)


def test_what_a_batch_started_from_is_not_changed_by_what_comes_after():
    model = _model()
    carried = InitialState(model, 2, "carry", from_zero=0.0)
    ids = torch.randint(32, (2, 9))
    state = carried.before()
    output = model(ids[:, :-1], labels=ids, state=state)
    carried.after(output.state)
    assert all(not layer.ssm.any() for layer in state)
    assert not any(layer.ssm.requires_grad for layer in carried.before()), "no gradient goes into the text before"
    output.loss.backward()  # the start is kept for it


def test_the_share_that_starts_from_zeros_is_drawn_row_by_row():
    model = _model()
    carried = InitialState(model, 4000, "carry", from_zero=0.25)
    carried.after(tuple(type(layer)(*(torch.ones_like(part) for part in layer)) for layer in carried.before()))
    state = carried.before()
    zero = (state[0].ssm == 0).flatten(1).all(1)
    assert torch.equal(zero, (state[1].conv == 0).flatten(1).all(1)), "a row starts whole, or from zeros in all layers"
    # Binomial, 4000 draws: six standard deviations are 0.041.
    assert abs(zero.double().mean().item() - 0.25) < 0.041
    assert not torch.equal(zero, (carried.before()[0].ssm == 0).flatten(1).all(1))
    always = InitialState(model, 4, "carry", from_zero=1.0)
    always.load_state_dict([torch.ones_like(part) for part in always.state_dict()])
    assert all(not part.any() for layer in always.before() for part in layer)


def test_noise_has_the_size_of_the_final_states():
    model = _model()
    drawn = InitialState(model, 4000, "noise", from_zero=0.0)
    assert all(not part.any() for layer in drawn.before() for part in layer), "nothing is known before the first batch"
    final = tuple(type(layer)(*(torch.full_like(part, 3.0) for part in layer)) for layer in model.init_state(5))
    final[0].ssm[:, 7, 2] = torch.tensor([0.1, -0.1, 0.1, 0.1, -0.1])
    drawn.after(final)
    state = drawn.before()
    # The root mean square of 4000 normal numbers is within 7 % of their deviation, six of its own.
    assert state[1].ssm[:, 3, 1].square().mean().sqrt().item() == pytest.approx(3.0, rel=0.07)
    assert state[0].ssm[:, 7, 2].square().mean().sqrt().item() == pytest.approx(0.1, rel=0.07)
    assert abs(torch.corrcoef(torch.stack([state[0].ssm[:, 0, 0], state[1].ssm[:, 0, 0]]))[0, 1]) < 0.1


@pytest.mark.parametrize("kind", ["carry", "noise"])
def test_a_run_that_was_broken_off_goes_on_to_the_same_bits(make_run, tmp_path, assert_same_run, kind):
    run = make_run(initial_state=kind, from_zero=0.3)
    train(run, tmp_path / "whole", progress=False)
    assert train(run, tmp_path / "parts", progress=False, callbacks=[InterruptAt(6)]).interrupted
    train(run, tmp_path / "parts", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", run)
    with pytest.raises(CheckpointError, match=rf"wanted train\.initial_state = {kind}"):
        train(make_run(initial_state="zero"), tmp_path / "parts", resume=True, progress=False)


@pytest.mark.parametrize("captured", [False, True])
def test_autocast_leaves_the_carried_scan_in_float32(make_run, tmp_path, monkeypatch, captured):
    if captured:
        monkeypatch.setattr(loop._Trainer, "_capture_lacks", lambda self: None)
    real, met, left = CausalLM.forward, [], []

    def forward(self, *args, state=None, **fields):
        output = real(self, *args, state=state, **fields)
        if self.training:
            met.append(state[1].ssm.clone())
            left.append(output.state[1].ssm.clone())
        return output

    monkeypatch.setattr(CausalLM, "forward", forward)
    train(make_run(initial_state="carry", from_zero=0.0, precision="bf16", steps=4), tmp_path / "run", progress=False)
    assert len(met) == 4
    for before, after in zip(left, met[1:], strict=False):
        assert after.dtype == torch.float32
        assert torch.equal(before, after)
    assert not torch.equal(met[-1], met[-1].bfloat16().float())


def test_a_carried_run_is_another_one(make_run, tmp_path):
    losses = {
        kind: train(make_run(initial_state=kind, from_zero=0.0), tmp_path / kind, progress=False).train_loss
        for kind in ("zero", "carry", "noise")
    }
    assert len(set(losses.values())) == 3


def test_what_cannot_be_carried_is_refused(make_run, tmp_path):
    with pytest.raises(ConfigError, match=r"fixed size, got a Transformer; set train\.initial_state=zero"):
        InitialState(CausalLM(TransformerConfig(16, 1, 32, n_head=2)), 2, "carry", 0.0)
    with pytest.raises(ConfigError, match=r"initial_state must be 'carry' or 'noise' here, got 'zero'"):
        InitialState(CausalLM(MODEL), 2, "zero", 0.0)
    with pytest.raises(ConfigError, match=r"accumulate: wanted 1 with train\.initial_state=carry, got 2"):
        make_run(initial_state="carry", accumulate=2)
    with pytest.raises(ConfigError, match=r"from_zero: wanted in"):
        make_run(from_zero=1.5)
    with pytest.raises(ConfigError, match=r"wanted data\.packing=false with train\.initial_state=noise"):
        train(make_run(initial_state="noise", data__packing="true"), tmp_path / "packed", progress=False)
    carried = InitialState(CausalLM(MODEL), 2, "carry", 0.0)
    with pytest.raises(CheckpointError, match=r"wanted carried states of shapes"):
        carried.load_state_dict([part[:1] for part in carried.state_dict()])
