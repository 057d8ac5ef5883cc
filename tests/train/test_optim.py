import copy
import itertools
import math

import pytest
import torch
from torch import nn

from statescan.models import CausalLM, MambaConfig
from statescan.train import GuardedAdamW, TrainConfig, learning_rate, parameter_groups

CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=32, d_state=4, bias=True)


def test_learning_rate_warms_up_in_a_line_and_falls_as_a_cosine():
    config = TrainConfig(steps=110, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)], rel=1e-15)
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, rel=1e-15)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    middle = 10 + 99 / 2
    halfway = (learning_rate(math.floor(middle), config) + learning_rate(math.ceil(middle), config)) / 2
    assert halfway == pytest.approx(0.55, rel=1e-12)
    assert learning_rate(500, config) == pytest.approx(0.1)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (2, 1), (5, 5), (3, 100)])
def test_learning_rate_of_the_shortest_runs_is_finite(steps, warmup):
    config = TrainConfig(steps=steps, warmup=warmup, lr=1.0, min_lr=0.1)
    assert all(0 < learning_rate(step, config) <= 1 for step in range(steps))


@pytest.mark.parametrize("tied", [True, False])
def test_groups_are_the_published_ones(tied):
    model = CausalLM(MambaConfig(**{**CONFIG.to_dict(), "tie_embeddings": tied}))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, plain = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    without = {names[parameter] for parameter in plain["params"]}
    assert without == model.undecayed_parameters()
    endings = {name.rpartition("mixer.")[2] for name in (names[parameter] for parameter in decay["params"])}
    matrices = {"in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}
    assert endings == matrices | {"backbone.embedding.weight"} | (set() if tied else {"lm_head.weight"})
    assert len(decay["params"]) + len(plain["params"]) == len(names), "every parameter once"


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_update_is_clipping_then_adamw(clip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    other = copy.deepcopy(model)
    config = TrainConfig(lr=1e-2, clip=clip)
    guarded = GuardedAdamW(model, config)
    plain = torch.optim.AdamW(parameter_groups(other, config.weight_decay), lr=1e-2, betas=config.betas, eps=config.eps)
    travelled = 0.0
    for step in range(5):
        x = torch.randn(4, 5, dtype=torch.float64)
        for one in (model, other):
            one(x).square().sum().backward()
        lr = 1e-2 / (step + 1)
        travelled += lr
        for group in plain.param_groups:
            group["lr"] = lr
        expected = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
        if clip:
            torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
        plain.step()
        plain.zero_grad()
        norm = guarded.step(lr)
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        assert all(parameter.grad is None for parameter in model.parameters())
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            # The norm, and with it the factor, is rounded to float32: one such rounding of every step, of size lr.
            assert (mine - theirs).abs().max() <= travelled * 2**-23


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad, fused):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    guarded = GuardedAdamW(model, TrainConfig())
    if not fused:
        guarded._fused = False
        guarded.optimizer = torch.optim.AdamW(model.parameters(), fused=False)

    def update(value):
        model.weight.grad = torch.full_like(model.weight, 0.1)
        model.bias.grad = torch.full_like(model.bias, 0.1)
        model.weight.grad[0, 0] = value
        return guarded.step(1e-2)

    update(0.1)
    weights = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(guarded.optimizer.state_dict()["state"])
    for number in (1, 2):
        assert not torch.isfinite(update(bad))
        assert (float(guarded.skipped), float(guarded.skipped_in_row)) == (number, number)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    for key, state in guarded.optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, moments[key][name]), name
    update(0.1)
    assert (float(guarded.skipped), float(guarded.skipped_in_row)) == (2, 0)
    assert not torch.equal(model.weight, weights["weight"])
    assert torch.isfinite(model.weight).all()


def test_parameters_with_a_highest_rate_of_their_own_keep_to_it():
    from statescan.nn import S4D

    torch.manual_seed(0)
    layer = S4D(4, 4)
    config = TrainConfig(lr=0.01, weight_decay=0.1)
    groups = parameter_groups(layer, 0.1)
    assert [group.get("max_lr") for group in groups] == [None, None, 1e-3]
    assert {id(p) for p in groups[2]["params"]} == {
        id(p) for p in (layer.log_dt, layer.log_A_real, layer.A_imag, layer.B)
    }
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = GuardedAdamW(layer, config)
    layer(torch.randn(2, 9, 4)).output.square().sum().backward()
    optimizer.step(0.01)
    # Adam's first update is the learning rate, whatever the gradient's size; what is decayed moves a little more.
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in layer.named_parameters()}
    assert moved["log_dt"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["C"] > 5e-3
    optimizer.step(5e-4)
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [5e-4] * 3
