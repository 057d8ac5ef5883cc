"""transformers' Mamba models on statescan's kernels, beside the package's own path on the same weights."""

from __future__ import annotations

import copy
import importlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statescan.errors import ConfigError, MissingExtraError, ShapeError
from statescan.integrations import transformers as drop_in

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, LAYERS = 97, 32, 3
KINDS = ("mamba", "falcon", "jamba")
# Options that another shape or another path hangs on.
VARIANTS = [
    pytest.param(kind, options, id=f"{kind}-{'-'.join(options) or 'published'}")
    for kind, options in [
        ("mamba", {}),
        ("mamba", {"use_bias": True, "use_conv_bias": False}),
        ("mamba", {"state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7}),
        ("mamba", {"conv_kernel": 1}),
        ("mamba", {"hidden_act": "gelu"}),
        ("falcon", {}),
        ("falcon", {"use_bias": True, "mixer_rms_eps": 1e-2}),
        ("jamba", {}),
        ("jamba", {"mamba_proj_bias": True, "mamba_d_conv": 2, "mamba_d_state": 8}),
    ]
]
# The argument that takes a cache and the field that gives it changed their names within the versions that are taken.
MIXER = importlib.import_module("transformers.models.mamba.modeling_mamba").MambaMixer


def _build(kind: str, **options: Any) -> Any:
    torch.manual_seed(1)
    if kind == "jamba":
        config = transformers.JambaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=2,
            num_experts_per_tok=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=3,
            attn_layer_offset=1,
            mamba_dt_rank=4,
            pad_token_id=0,
            use_mamba_kernels=False,
            **{"mamba_d_state": 16, "mamba_d_conv": 4, **options},
        )
        model = transformers.JambaForCausalLM(config)
    else:
        Config, Model = (
            (transformers.MambaConfig, transformers.MambaForCausalLM)
            if kind == "mamba"
            else (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM)
        )
        model = Model(
            Config(
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=None,
                **{"state_size": 16, **options},
            )
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                (parameter.ndim > 1 and "A_log" not in name)
                or name.endswith("conv1d.bias")
                or (name.endswith("_proj.bias") and "dt_proj" not in name)
            ):
                parameter.normal_(0, 0.02)
    model.generation_config.eos_token_id = None
    return model.eval()


def _relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).double().norm() / wanted.double().norm().clamp_min(1e-30)).item()


def _tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(7))


def _cache(output: Any) -> Any:
    for name in ("cache", "cache_params", "past_key_values"):
        if getattr(output, name, None) is not None:
            return output[name]
    raise AssertionError("the model gave no cache")


def _go_on(model: Any, tokens: Tensor, output: Any, **arguments: Any) -> Any:
    name = next(
        name for name in ("cache", "cache_params", "past_key_values") if getattr(output, name, None) is not None
    )
    return model(tokens, use_cache=True, **{name: _cache(output)}, **arguments)


def _gradients(model: Any, tokens: Tensor, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    output = model(tokens, labels=tokens, **arguments)
    output.loss.backward()
    model.eval()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _off_before_and_after() -> Iterator[None]:
    drop_in.disable()
    yield
    drop_in.disable()


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_logits_and_gradients_are_those_of_the_package(kind: str, options: dict[str, Any]) -> None:
    model, tokens = _build(kind, **options), _tokens(2, 19)
    logits, wanted = _gradients(model, tokens)
    drop_in.enable()
    got_logits, got = _gradients(model, tokens)
    assert got.keys() == wanted.keys()
    assert _relative(got_logits, logits) <= 1e-5
    for name in wanted:
        assert _relative(got[name], wanted[name]) <= 5e-5, name


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_generate_writes_the_package_s_tokens(kind: str, options: dict[str, Any]) -> None:
    model, prompt = _build(kind, **options), _tokens(2, 6)
    arguments = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    wanted = model.generate(prompt, **arguments)
    drop_in.enable()
    got = model.generate(prompt, **arguments)
    assert torch.equal(got.sequences, wanted.sequences)
    assert _relative(torch.stack(got.logits), torch.stack(wanted.logits)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_generate_from_a_left_padded_batch_is_each_row_s_own(kind: str) -> None:
    drop_in.enable()
    model, tokens = _build(kind), _tokens(2, 9)
    short = tokens[1:, 4:]
    padded = torch.cat([tokens[:1], torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    arguments = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    both = torch.stack(model.generate(padded, attention_mask=mask, **arguments).logits, 1)
    for row, alone in enumerate((tokens[:1], short)):
        wanted = torch.stack(model.generate(alone, **arguments).logits, 1)
        assert _relative(both[row : row + 1], wanted) <= 1e-5


def _padded(side: str) -> tuple[Tensor, Tensor, list[Tensor], list[slice]]:
    tokens, lengths = _tokens(3, 11), (11, 6, 2)
    padded, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    rows, places = [], []
    for row, length in enumerate(lengths):
        place = slice(11 - length, 11) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = tokens[row, :length], 1
        rows.append(tokens[row : row + 1, :length])
        places.append(place)
    return padded, mask, rows, places


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in KINDS), ("mamba", {"use_bias": True})])
def test_padded_rows_give_what_each_gives_alone(kind: str, options: dict[str, Any], side: str) -> None:
    model = _build(kind, **options)
    padded, mask, rows, places = _padded(side)
    weights = torch.randn(3, 11, VOCAB, generator=torch.Generator().manual_seed(3))

    # The package's own path judges, row by row, where nothing is padded.
    model.train()
    wanted = []
    for row, (alone, place) in enumerate(zip(rows, places, strict=True)):
        logits = model(alone, use_cache=False).logits
        (logits * weights[row : row + 1, place]).sum().backward()
        wanted.append(logits.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    drop_in.enable()
    logits = model(padded, attention_mask=mask, use_cache=False).logits
    (logits * weights * mask.unsqueeze(-1)).sum().backward()
    for row, place in enumerate(places):
        assert _relative(logits[row : row + 1, place].detach(), wanted[row]) <= 1e-5
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert _relative(parameter.grad, gradients[name]) <= 5e-5, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["mamba", "falcon"])
def test_a_padded_prefill_leaves_each_row_s_own_state(kind: str, side: str) -> None:
    drop_in.enable()
    model, after = _build(kind), _tokens(3, 5)
    padded, mask, rows, _ = _padded(side)
    with torch.no_grad():
        prefill = model(padded, attention_mask=mask, use_cache=True)
        one = _go_on(model, after[:, :1], prefill)
        rest = _go_on(model, after[:, 1:], one, attention_mask=torch.cat([mask, torch.ones_like(after)], 1))
        for row, alone in enumerate(rows):
            wanted = model(torch.cat([alone, after[row : row + 1]], 1), use_cache=False).logits[:, -5:]
            got = torch.cat([one.logits, rest.logits], 1)[row : row + 1]
            assert _relative(got, wanted) <= 1e-5


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_several_tokens_from_a_cache_are_one_pass(kind: str, options: dict[str, Any]) -> None:
    model, tokens = _build(kind, **options), _tokens(2, 17)
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        drop_in.enable()
        output, parts = None, []
        for chunk in tokens.split([2, 7, 1, 3, 1, 3], dim=1):
            output = model(chunk, use_cache=True) if output is None else _go_on(model, chunk, output)
            parts.append(output.logits)
    assert _relative(torch.cat(parts, 1), wanted) <= 1e-5


def test_gradients_pass_through_a_cache() -> None:
    drop_in.enable()
    model, tokens = _build("mamba"), _tokens(2, 12)
    wanted = torch.autograd.grad(model(tokens, use_cache=False).logits.square().sum(), list(model.parameters()))
    first = model(tokens[:, :7], use_cache=True)
    second = _go_on(model, tokens[:, 7:8], first)
    third = _go_on(model, tokens[:, 8:], second)
    loss = sum(part.logits.square().sum() for part in (first, second, third))
    for got, want in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
        assert _relative(got, want) <= 5e-5


def test_rows_and_calls_without_a_token() -> None:
    drop_in.enable()
    model, tokens = _build("mamba"), _tokens(2, 5)
    with torch.no_grad():
        nothing = model(tokens, attention_mask=torch.zeros_like(tokens), use_cache=True)
        assert torch.isfinite(nothing.logits).all()
        assert _relative(_go_on(model, tokens, nothing).logits, model(tokens).logits) <= 1e-6
        mask = torch.tensor([[0] * 5, [1] * 5])
        half = model(tokens, attention_mask=mask, use_cache=True)
        after = _go_on(model, tokens[:, :1], half).logits
        assert _relative(after[:1], model(tokens[:1, :1]).logits) <= 1e-5
        # A row whose single new token is padding stays where it is.
        stay = _go_on(model, tokens[:, :1], half, attention_mask=torch.tensor([[0], [1]]))
        assert _relative(_go_on(model, tokens[:1].repeat(2, 1), stay).logits[0, 0], after[0, 0]) > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    drop_in.enable()
    model, tokens = _build(kind), _tokens(2, 13)
    _, wanted = _gradients(model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # Reentrant checkpointing needs an input that wants a gradient.
    model.enable_input_require_grads()
    _, got = _gradients(model, tokens)
    for name in wanted:
        assert _relative(got[name], wanted[name]) <= 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_get_the_gradients_of_the_weights_they_add_to(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model, tokens = _build(kind), _tokens(2, 13)
    names = ["in_proj", "x_proj", "dt_proj"]
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM")
    )
    layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in layers} == set(names)
    with torch.no_grad():
        for module in layers.values():
            module.lora_B["default"].weight.normal_(0, 0.02)
    # The package's path on the sum of weight and adapter: dL/dB = 2 (dL/dW) A^T, dL/dA = 2 B^T (dL/dW).
    merged = copy.deepcopy(adapted).merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    logits, of_weights = _gradients(merged, tokens)
    drop_in.enable()
    got_logits, got = _gradients(adapted, tokens)
    assert _relative(got_logits, logits) <= 1e-5
    for name, module in layers.items():
        a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
        dW = of_weights[name.removeprefix("base_model.model.") + ".weight"]
        assert _relative(got[f"{name}.lora_B.default.weight"], 2 * dW @ a.T) <= 5e-5, name
        assert _relative(got[f"{name}.lora_A.default.weight"], 2 * b.T @ dW) <= 5e-5, name


class _Shifted(nn.Module):
    """A parametrization: the filter is what it was, and a hundredth."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.01


@pytest.mark.parametrize("padded", [False, True])
def test_a_convolution_behind_which_somebody_stands_is_called(padded: bool) -> None:
    drop_in.enable()
    model, tokens = _build("mamba"), _tokens(3, 11)
    shifted = copy.deepcopy(model)
    for block in shifted.backbone.layers:
        torch.nn.utils.parametrize.register_parametrization(block.mixer.conv1d, "weight", _Shifted())
        with torch.no_grad():
            own = model.backbone.layers[block.layer_idx].mixer.conv1d.weight
            own += 0.01
    mask = _padded("left")[1] if padded else None
    with torch.no_grad():
        first, wanted = (m(tokens, attention_mask=mask, use_cache=True) for m in (shifted, model))
        assert _relative(first.logits, wanted.logits) <= 1e-6
        for chunk in (tokens[:, :1], tokens[:, :4]):
            first, wanted = _go_on(shifted, chunk, first), _go_on(model, chunk, wanted)
            assert _relative(first.logits, wanted.logits) <= 1e-6


def test_bfloat16_is_near_float32() -> None:
    model, tokens = _build("mamba"), _tokens(2, 24)
    with torch.no_grad():
        exact = model(tokens).logits
        low = copy.deepcopy(model).to(torch.bfloat16)
        stock = _relative(low(tokens).logits, exact)
        drop_in.enable()
        assert _relative(low(tokens).logits, exact) <= 1.1 * stock
        with torch.autocast("cpu", torch.bfloat16):
            assert _relative(model(tokens).logits, exact) <= 1.1 * stock
        got = low.generate(tokens, max_new_tokens=3, do_sample=False)
    assert got.shape == (2, 27)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_state_in_the_cache_is_float32_whatever_the_weights_are(kind: str, dtype: torch.dtype) -> None:
    drop_in.enable()
    model, tokens = _build(kind).to(dtype), _tokens(2, 9)

    def states(output: Any) -> list[Tensor]:
        layers = _cache(output).layers
        return [layer.recurrent_states[0] for layer in layers if getattr(layer, "recurrent_states", None)]

    with torch.no_grad():
        output = model(tokens[:, :6], use_cache=True)
        for chunk in (tokens[:, 6:7], tokens[:, 7:]):
            assert {state.dtype for state in states(output)} == {torch.float32}
            # More than a 16-bit number holds.
            assert any(not torch.equal(state, state.to(dtype).float()) for state in states(output))
            output = _go_on(model, chunk, output)
        assert {state.dtype for state in states(output)} == {torch.float32}
        # Steps and chunks move on the same state as one pass, but for roundings of the layers' inputs.
        for state, wanted in zip(states(output), states(model(tokens, use_cache=True)), strict=True):
            assert _relative(state, wanted) <= 4 * torch.finfo(dtype).eps


def test_a_mask_that_was_changed_in_place_is_read_again() -> None:
    drop_in.enable()
    mixer, x = _build("mamba", use_bias=True).backbone.layers[0].mixer, torch.randn(2, 7, WIDTH)
    mask = torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        whole = mixer(x, attention_mask=mask)
        mask[1, :3] = 0
        padded = mixer(x, attention_mask=mask)
        assert _relative(padded, mixer(x, attention_mask=mask.clone())) <= 1e-6
        assert _relative(padded[1, 3:], whole[1, 3:]) > 1e-4
        assert _relative(padded[1:, 3:], mixer(x[1:, 3:])) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_beams_reorder_the_states(kind: str) -> None:
    model, prompt = _build(kind), _tokens(2, 5)
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False, num_beams=3)
    drop_in.enable()
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False, num_beams=3), wanted)


def test_disable_gives_the_package_its_methods_back() -> None:
    stock = MIXER.forward
    model, tokens = _build("mamba"), _tokens(1, 9)
    before = model(tokens).logits
    drop_in.enable()
    drop_in.enable(backend="reference")  # twice is once
    assert drop_in.is_enabled()
    assert MIXER.forward is not stock
    model(tokens)
    drop_in.disable()
    assert not drop_in.is_enabled()
    assert MIXER.forward is stock
    assert torch.equal(model(tokens).logits, before)


def test_the_kernels_run_in_models_made_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    scan = drop_in.selective_scan

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(named["backend"])
        return scan(*arguments, **named)

    monkeypatch.setattr(drop_in, "selective_scan", counted)
    made_before, tokens = _build("mamba"), _tokens(1, 4)
    drop_in.enable(backend="torch")
    made_before(tokens)
    assert calls == ["torch"] * LAYERS
    _build("mamba")(tokens)
    assert len(calls) == 2 * LAYERS
    drop_in.disable()
    made_before(tokens)
    assert len(calls) == 2 * LAYERS


def test_layers_that_accelerate_holds_are_taken_and_given_back() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, tokens = _build("mamba"), _tokens(1, 9)
    stock = MIXER.forward
    mixers = [block.mixer for block in model.backbone.layers]
    wanted = model(tokens).logits
    hooks.add_hook_to_module(mixers[0], hooks.ModelHook())
    drop_in.enable()
    hooks.add_hook_to_module(mixers[1], hooks.ModelHook())
    assert all(mixer._old_forward.__func__ is MIXER.forward for mixer in mixers[:2])
    assert _relative(model(tokens).logits, wanted) <= 1e-5
    drop_in.disable()
    assert all(mixer._old_forward.__func__ is stock for mixer in mixers[:2])
    assert torch.equal(model(tokens).logits, wanted)


def test_what_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = MIXER.forward
    for version in ("5.16.2", "4.57.0", "6.0.0", "soon"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("transformers"), "__version__", version)
            with pytest.raises(ConfigError, match=rf"got {re.escape(version)}; install"):
                drop_in.enable()
    with monkeypatch.context() as patch:
        patch.setattr(MIXER, "forward", lambda self, hidden_states: hidden_states)
        with pytest.raises(ConfigError, match="not the package's own"):
            drop_in.enable()
    with monkeypatch.context() as patch:

        def other(self: Any, hidden_states: Tensor, state: Any) -> Tensor:
            return hidden_states

        other.__module__ = MIXER.__module__
        patch.setattr(MIXER, "forward", other)
        with pytest.raises(ConfigError, match="must take"):
            drop_in.enable()
    with pytest.raises(ConfigError, match="backend must be one of"):
        drop_in.enable(backend="fast")
    model = _build("mamba")
    mixer = model.backbone.layers[0].mixer
    mixer.forward = types.MethodType(lambda self, hidden_states, **_: hidden_states, mixer)
    with pytest.raises(ConfigError, match="forward method of its own"):
        drop_in.enable()
    del mixer.forward
    assert not drop_in.is_enabled()
    assert MIXER.forward is stock


def test_an_argument_that_is_not_understood_is_named() -> None:
    drop_in.enable()
    model, x = _build("mamba"), torch.randn(2, 5, WIDTH)
    mixer = model.backbone.layers[0].mixer
    with pytest.raises(ConfigError, match="takes no seq_idx"):
        mixer(x, seq_idx=torch.zeros(2, 5))
    with pytest.raises(ShapeError, match="attention_mask must be"):
        mixer(x, attention_mask=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ShapeError, match="mask must be"):
        mixer(x, attention_mask=torch.ones(3, 5, dtype=torch.long))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"statescan\[hf\]"):
        drop_in.enable()
