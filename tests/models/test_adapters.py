"""Low-rank adapters (PEFT) around every projection get their gradients, and those are the right ones."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from statescan.models import CausalLM, MambaConfig

peft = pytest.importorskip("peft")

TARGETS = ["in_proj", "x_proj", "dt_proj", "out_proj", "lm_head"]
CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=24, d_state=4, tie_embeddings=False)


def wrapped(config: MambaConfig, dtype: torch.dtype, dropout: float = 0.0) -> tuple[CausalLM, torch.nn.Module]:
    torch.manual_seed(0)
    plain = CausalLM(config, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            copy.deepcopy(plain), peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, lora_dropout=dropout)
        )
    return plain, adapted.to(dtype)


@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_gradients_of_adapters_are_those_of_the_merged_weights(recompute: str) -> None:
    plain, adapted = wrapped(CONFIG.replace(recompute=recompute), torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    ids = torch.randint(0, 24, (2, 300), generator=generator)
    adapted(ids, labels=ids).loss.backward()

    layers = {name.removeprefix("base_model.model."): m for name, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 2 * 4 + 1
    with torch.no_grad():
        for name, module in layers.items():
            delta = 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
            plain.get_parameter(f"{name}.weight").add_(delta)
    loss = plain(ids, labels=ids).loss
    loss.backward()
    for name, module in layers.items():
        dense = plain.get_parameter(f"{name}.weight").grad
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        for grad, wanted in ((a.grad, 2.0 * b.T @ dense), (b.grad, 2.0 * dense @ a.T)):
            wanted = wanted.detach()
            assert wanted.abs().max() > 0
            assert float((grad - wanted).abs().max() / wanted.abs().max()) <= 1e-10, name


@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_recomputation_draws_the_dropout_of_adapters_again(recompute: str, autocast: bool) -> None:
    # The passes must see one and the same dropout: else the gradients are those of another function.
    ids = torch.randint(0, 24, (2, 40), generator=torch.Generator().manual_seed(1))
    results = []
    for policy in ("none", recompute):
        _, adapted = wrapped(CONFIG.replace(recompute=policy), torch.float32, dropout=0.5)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = adapted(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in adapted.parameters() if p.requires_grad)])
    wanted, got = results
    assert len(wanted) == 1 + 2 * (2 * 4 + 1)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_training_adapters_alone_lowers_the_loss(tie: bool, autocast: bool) -> None:
    _, adapted = wrapped(CONFIG.replace(tie_embeddings=tie, vocab_size=64), torch.float32)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    frozen = {name: p.detach().clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    ids = torch.randint(0, 24, (1, 6), generator=torch.Generator().manual_seed(2)).repeat(4, 6)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = adapted(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all((p.grad != 0).any() for p in trained.values())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in adapted.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_steps_go_through_adapters_too() -> None:
    _, adapted = wrapped(CONFIG, torch.float64)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    ids = torch.randint(0, 24, (2, 7))
    model = adapted.base_model.model
    with torch.no_grad():
        whole, state = model(ids).logits, model.init_state(2)
        for t in range(7):
            output = model.step(ids[:, t], state)
            state = output.state
            assert float((output.logits - whole[:, t]).abs().max() / whole.abs().max()) <= 1e-12


def test_the_head_is_read_directly_only_when_it_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    import statescan.models.causal_lm as module

    calls: list[int] = []
    direct = module.linear_cross_entropy
    monkeypatch.setattr(module, "linear_cross_entropy", lambda *a, **k: (calls.append(1), direct(*a, **k))[1])
    plain, adapted = wrapped(CONFIG, torch.float64)
    ids = torch.randint(0, 24, (2, 7))
    wanted = plain(ids, labels=ids).loss
    assert len(calls) == 1
    assert float((adapted(ids, labels=ids).loss - wanted).abs().detach()) <= 1e-14
    handle = plain.lm_head.register_forward_hook(lambda m, i, o: o * 2)
    hooked = plain(ids, labels=ids).loss
    handle.remove()
    assert len(calls) == 1
    assert float((hooked - wanted).abs().detach()) > 1e-6


def test_a_wrapper_without_a_bias_of_its_own_changes_nothing() -> None:
    """The step's bias is found behind any module that wraps the projection."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inside: torch.nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x)

    torch.manual_seed(0)
    model = CausalLM(CONFIG)
    ids = torch.randint(0, 24, (2, 9))
    wanted = model(ids).logits
    for layer in model.backbone.layers:
        layer.mixer.dt_proj = Wrapped(layer.mixer.dt_proj)
    assert torch.equal(model(ids).logits, wanted)
    state = model.init_state(2)
    for t in range(9):
        step = model.step(ids[:, t], state)
        state = step.state
    assert torch.allclose(step.logits, wanted[:, -1], atol=1e-5)
