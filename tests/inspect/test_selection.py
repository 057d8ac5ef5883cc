"""What is said of the state is true of it: sums, Jacobians, finite differences, and plain definitions in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from statescan.data import ByteTokenizer
from statescan.errors import ConfigError, DataError, ShapeError
from statescan.inspect import inspect_text, layer_selection, token_contributions
from statescan.inspect.selection import _spaced
from statescan.models import CausalLM, MambaConfig
from statescan.ops import selective_scan

TOKENS, CHANNELS, STATES = 23, 5, 3


@pytest.fixture(scope="module")
def problem():
    g = torch.Generator().manual_seed(0)
    u = torch.randn(TOKENS, CHANNELS, generator=g, dtype=torch.float64)
    dt = torch.rand(TOKENS, CHANNELS, generator=g, dtype=torch.float64) * 0.2 + 0.01
    A = -torch.rand(CHANNELS, STATES, generator=g, dtype=torch.float64) * 9 - 0.3
    B = torch.randn(TOKENS, STATES, generator=g, dtype=torch.float64)
    return u, dt, A, B


def final_state(u, dt, A, B):
    out = selective_scan(
        u[None], dt[None], A, B[None], torch.zeros_like(B)[None], return_final_state=True, backend="reference"
    )
    return out.final_state[0]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(MambaConfig(d_model=32, n_layer=3, vocab_size=256), dtype=torch.float64)


def test_contributions_sum_to_the_final_state(problem):
    contributions = token_contributions(*problem)
    wanted = final_state(*problem)
    assert torch.allclose(contributions.sum(0), wanted, rtol=1e-12, atol=1e-14)
    shares = layer_selection(0, *problem).share
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-12)


def test_a_contribution_is_the_jacobian_times_the_input(problem):
    u, dt, A, B = problem
    jacobian = torch.autograd.functional.jacobian(lambda u: final_state(u, dt, A, B), u)
    # The state is linear in u, and channel d of u reaches channel d of the state alone.
    wanted = torch.einsum("dntd,td->tdn", jacobian, u)
    assert torch.allclose(token_contributions(*problem), wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("t", [0, 7, TOKENS - 1])
def test_a_contribution_is_what_the_state_loses_when_the_token_writes_nothing(problem, t):
    u, dt, A, B = problem
    without = u.clone()
    without[t] = 0
    lost = final_state(u, dt, A, B) - final_state(without, dt, A, B)
    assert torch.allclose(token_contributions(*problem)[t], lost, rtol=1e-10, atol=1e-13)
    left = layer_selection(0, *problem).left[t]
    wrote = dt[t, :, None] * u[t, :, None] * B[t]
    np.testing.assert_allclose(left, lost.norm() / wrote.norm(), rtol=1e-9)


def test_a_finite_difference_of_the_final_state_sees_the_same_influence(problem):
    u, dt, A, B = problem
    t, d, step = 4, 2, 1e-5
    up, down = u.clone(), u.clone()
    up[t, d] += step
    down[t, d] -= step
    slope = (final_state(up, dt, A, B) - final_state(down, dt, A, B)) / (2 * step)
    assert torch.allclose(token_contributions(*problem)[t, d] / u[t, d], slope[d], rtol=1e-8, atol=1e-10)
    assert slope[torch.arange(CHANNELS) != d].abs().max() == 0


def test_every_measure_by_its_definition_in_loops(problem):
    u, dt, A, B = (tensor.numpy() for tensor in problem)
    found = layer_selection(4, *problem)
    assert found.layer == 4
    h, states, wrote = np.zeros((CHANNELS, STATES)), [], []
    for t in range(TOKENS):
        w = dt[t][:, None] * u[t][:, None] * B[t]
        h = np.exp(dt[t][:, None] * A) * h + w
        wrote.append(w)
        states.append(h)
    for t in range(TOKENS):
        size = np.linalg.norm(wrote[t])
        np.testing.assert_allclose(found.delta[t], dt[t].mean(), rtol=1e-12)
        np.testing.assert_allclose(found.delta_median[t], np.median(dt[t]), rtol=1e-12)
        np.testing.assert_allclose(found.written[t], size / np.linalg.norm(states[t]), rtol=1e-12)
        lives = sorted(math.log(2) / (dt[t, d] * -A[d, n]) for d in range(CHANNELS) for n in range(STATES))
        np.testing.assert_allclose(found.half_life[t], lives[(len(lives) - 1) // 2], rtol=1e-12)
        c, parts = wrote[t], [1.0]
        for s in range(t + 1, TOKENS):
            c = np.exp(dt[s][:, None] * A) * c
            parts.append(np.linalg.norm(c) / size)
        np.testing.assert_allclose(found.left[t], parts[-1], rtol=1e-11)
        np.testing.assert_allclose(found.share[t], (c * h).sum() / (h * h).sum(), rtol=1e-10, atol=1e-14)
        after = next((k for k, part in enumerate(parts) if part <= 0.1), None)
        if after is None:
            assert found.remembered[t] == np.inf
        else:
            assert after - 1 <= found.remembered[t] <= after
            a, b = np.log2(parts[after - 1]), np.log2(parts[after])
            np.testing.assert_allclose(found.remembered[t], after - 1 + (a - np.log2(0.1)) / (a - b), rtol=1e-9)
    assert np.isinf(found.remembered).any()
    assert np.isfinite(found.remembered).any()


def test_pieces_of_the_work_do_not_change_the_numbers(problem, monkeypatch):
    whole = layer_selection(0, *problem)
    monkeypatch.setattr("statescan.inspect.selection._AT_ONCE", 4 * CHANNELS * STATES)
    cut = layer_selection(0, *problem)
    for name in ("written", "remembered", "left", "share"):
        np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), rtol=1e-13, atol=1e-16)


def test_a_constant_step_forgets_at_its_half_life():
    dt = torch.full((60, 1), 0.1, dtype=torch.float64)
    found = layer_selection(0, torch.ones_like(dt), dt, torch.tensor([[-2.0]]), torch.ones(60, 1))
    np.testing.assert_allclose(found.half_life, math.log(2) / 0.2, rtol=1e-7)
    np.testing.assert_allclose(found.remembered[:48], math.log(10) / 0.2, rtol=1e-7)
    assert np.isinf(found.remembered[49:]).all()


def test_a_token_that_writes_nothing_is_said_so():
    u = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    found = layer_selection(0, u, torch.ones_like(u) * 0.1, torch.tensor([[-1.0]]), torch.ones(3, 1))
    assert found.written.tolist()[0] == found.left[0] == found.remembered[0] == found.share[0] == 0
    assert np.isfinite(found.share).all()


def test_the_models_own_final_states_are_the_sum_of_what_is_reported(model):
    """The hooks see what the scan sees: contributions from them sum to the states that the model itself returns."""
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))
    held = {}

    def keep(index, mixer):
        def at_x_proj(_module, inputs, output):
            held[index] = [inputs[0][0], output[0, :, mixer.dt_rank : mixer.dt_rank + mixer.d_state]]

        def at_dt_proj(_module, _inputs, output):
            held[index].append(torch.nn.functional.softplus(output[0] + mixer.dt_proj.bias))

        return mixer.x_proj.register_forward_hook(at_x_proj), mixer.dt_proj.register_forward_hook(at_dt_proj)

    handles = [h for i, block in enumerate(model.backbone.layers) for h in keep(i, block.mixer)]
    with torch.no_grad():
        states = model(ids, state=model.init_state(1)).state
    for handle in handles:
        handle.remove()
    report = inspect_text(model, ByteTokenizer(), bytes(ids[0].tolist()), max_tokens=40)
    for index, block in enumerate(model.backbone.layers):
        u, B, dt = held[index]
        A = -torch.exp(block.mixer.A_log.detach())
        contributions = token_contributions(u, dt, A, B)
        wanted = states[index].ssm[0]
        assert (contributions.sum(0) - wanted).norm() <= 1e-12 * wanted.norm()
        share = torch.einsum("tdn,dn->t", contributions, wanted) / wanted.square().sum()
        np.testing.assert_allclose(report.layers[index].share, share.numpy(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(report.layers[index].delta, dt.mean(1).numpy(), rtol=1e-12)


def test_report_of_a_text(model):
    text = "Whale\n🐋 and\tsea"
    model.train()
    report = inspect_text(model, ByteTokenizer(), text, layer=-1)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert "".join(report.pieces) == text
    assert report.pieces[6:10] == ("", "", "", "🐋")
    assert [one.layer for one in report.layers] == [0, 1, 2]
    assert report.channels.layer == 2
    assert report.notes == ()
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[0].float(), -1)
    wanted = [-float(logp[t - 1, ids[0, t]]) / math.log(2) for t in range(1, ids.shape[1])]
    assert np.isnan(report.bits[0])
    np.testing.assert_allclose(report.bits[1:], wanted, rtol=1e-6)


def test_channel_map_averages_to_the_layer(model):
    report = inspect_text(model, ByteTokenizer(), "the whale and the sea", layer=1)
    channels = report.channels
    assert sorted(channels.channels.tolist()) == list(range(64))
    np.testing.assert_allclose(channels.delta.mean(0), report.layers[1].delta, rtol=1e-12)
    # Longest memory first: the slowest channels have the smallest steps times rates.
    A = np.exp(model.backbone.layers[1].mixer.A_log.detach().numpy())[channels.channels]
    forgetting = channels.delta.mean(1) * A.mean(1)
    assert (np.diff(forgetting) >= 0).all()
    assert channels.written.shape == channels.delta.shape


def test_what_is_left_out_is_said(model):
    report = inspect_text(model, ByteTokenizer(), "abcdef" * 20, max_tokens=50, max_layers=2, layer=1)
    assert len(report.pieces) == len(report.layers[0].delta) == 50
    assert [one.layer for one in report.layers] == [0, 1] or [one.layer for one in report.layers] == [1, 2]
    assert "120 tokens; shown are the first 50" in report.notes[0]
    assert "3 layers; shown are 2" in report.notes[1]


def test_layers_are_spaced_with_the_chosen_one_among_them():
    assert _spaced(4, 24, 2) == [0, 1, 2, 3]
    assert _spaced(64, 1, 17) == [17]
    for chosen in range(64):
        found = _spaced(64, 8, chosen)
        assert len(found) == 8
        assert chosen in found
        assert found[0] == 0
        assert found[-1] == 63


def test_errors_are_named(model, problem):
    with pytest.raises(DataError, match="empty text"):
        inspect_text(model, ByteTokenizer(), "")
    with pytest.raises(ConfigError, match="from -3 to 2, got 3"):
        inspect_text(model, ByteTokenizer(), "a", layer=3)
    with pytest.raises(ConfigError, match="at least 1"):
        inspect_text(model, ByteTokenizer(), "a", max_tokens=0)
    u, dt, A, B = problem
    with pytest.raises(ShapeError, match="B must be"):
        token_contributions(u, dt, A, B[:-1])


def test_one_token_is_enough(model):
    report = inspect_text(model, ByteTokenizer(), "a")
    assert report.layers[0].share.tolist() == [pytest.approx(1.0)]
    assert report.layers[0].written.tolist() == [pytest.approx(1.0)]
    assert report.layers[0].left.tolist() == [pytest.approx(1.0)]
