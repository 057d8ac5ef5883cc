"""PackedModel: the model's own logits from packed weights, prefill as steps, rows that no company changes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statescan import errors
from statescan.generate.packed import DecodeState, PackedModel, effective_linear
from statescan.models import CausalLM, MambaConfig
from statescan.nn import StepProjection
from statescan.testing import assert_within_budget

PACKED: list[Any] = ["float32", "bfloat16", "int8"]


@functools.cache
def model(tied: bool = True, bias: bool = False) -> CausalLM:
    torch.manual_seed(0)
    # 200 symbols pad to 200, 45 channels of state and a width off every vector's size
    made = CausalLM(MambaConfig(d_model=45, n_layer=3, vocab_size=203, d_state=11, tie_embeddings=tied, bias=bias))
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval()


def ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 203, (batch, length), generator=torch.Generator().manual_seed(seed))


def steps(packed: PackedModel, tokens: Tensor, state: DecodeState) -> Tensor:
    return torch.stack([packed.step(tokens[:, t], state) for t in range(tokens.shape[1])], 1)


def rounded(dtype: str, bias: bool, tied: bool) -> CausalLM:
    """A float64 model whose large weights are rounded as packing rounds them."""
    from statescan.ops import pack_weight

    exact = CausalLM(model(tied, bias).config, dtype=torch.float64)
    exact.load_state_dict(model(tied, bias).state_dict())
    for name, module in exact.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            fine = "bfloat16" if dtype == "int8" and ("x_proj" in name or "dt_proj" in name) else dtype
            module.weight.data = pack_weight(module.weight.data.float(), fine).unpack(dtype=torch.float64)  # type: ignore
    exact.tie_weights()
    return exact


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", PACKED)
def test_steps_and_short_prompts_are_the_model_in_float32(dtype: Any, tied: bool, bias: bool) -> None:
    """Against a float64 model with the very same rounded weights: what is left is float32 arithmetic."""
    exact = rounded(dtype, bias, tied)
    plain = CausalLM(exact.config)
    plain.load_state_dict(exact.state_dict())
    tokens = ids(3, 20)
    with torch.no_grad():
        truth, own = exact(tokens).logits, plain(tokens).logits
    packed = PackedModel(model(tied, bias), dtype)
    stepped, prefilled = packed.init_state(3), packed.init_state(3)
    assert_within_budget(steps(packed, tokens, stepped), truth, own, "steps")
    assert_within_budget(packed.prefill(tokens, prefilled, "all"), truth, own, "prefill")


@pytest.mark.parametrize("dtype", PACKED)
def test_long_prompts(dtype: Any) -> None:
    """float32 within the float32 budget; bfloat16 products within that of a bfloat16 model."""
    tokens = ids(2, 60)
    exact = rounded(dtype, False, True)
    packed = PackedModel(model(), dtype)
    low = torch.float32 if dtype == "float32" else torch.bfloat16
    plain = CausalLM(exact.config, dtype=low)
    plain.load_state_dict(exact.state_dict())
    with torch.no_grad():
        truth, own = exact(tokens).logits, plain(tokens).logits
    assert_within_budget(packed.prefill(tokens, packed.init_state(2), "all").to(low), truth, own)


@pytest.mark.parametrize("dtype", PACKED)
def test_a_prompt_in_parts_and_its_continuation(dtype: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("statescan.generate.packed._CHUNK", 32)
    packed, tokens = PackedModel(model(), dtype), ids(2, 100)
    whole, parts, last = packed.init_state(2), packed.init_state(2), packed.init_state(2)
    logits = packed.prefill(tokens, whole, "all")
    assert logits.shape == (2, 100, packed.vocab_size)
    # cut where a chunk ends: the same work
    first = packed.prefill(tokens[:, :64], parts, "all")
    assert torch.equal(torch.cat([first, packed.prefill(tokens[:, 64:], parts, "all")], 1), logits)
    assert torch.equal(parts.ssm, whole.ssm)
    assert torch.equal(parts.conv, whole.conv)
    assert torch.equal(packed.prefill(tokens, last), logits[:, -1])
    # and where none does, then step by step: the same up to arithmetic
    exact = rounded(dtype, False, True)
    state = packed.init_state(2)
    a, b = packed.prefill(tokens[:, :41], state, "all"), steps(packed, tokens[:, 41:], state)
    with torch.no_grad():
        truth = exact(tokens).logits
    assert_within_budget(torch.cat([a, b], 1), truth, logits)


@pytest.mark.parametrize("dtype", PACKED)
def test_rows_are_what_each_alone_is(dtype: Any) -> None:
    packed = PackedModel(model(), dtype)
    for length in (1, 7, 24, 50):
        tokens = ids(5, length + 3)
        state = packed.init_state(5)
        together = [packed.prefill(tokens[:, :length], state, "all"), steps(packed, tokens[:, length:], state)]
        for row in range(5):
            single = packed.init_state(1)
            one = tokens[row : row + 1]
            alone = [packed.prefill(one[:, :length], single, "all"), steps(packed, one[:, length:], single)]
            assert torch.equal(torch.cat(alone, 1)[0], torch.cat(together, 1)[row]), (length, row)
            assert torch.equal(single.ssm[:, 0], state.ssm[:, row])


def test_select_and_assign() -> None:
    packed = PackedModel(model())
    state, other = packed.init_state(3), packed.init_state(2)
    packed.prefill(ids(3, 9), state)
    packed.prefill(ids(2, 4, seed=5), other)
    picked = state.select([2, 0, 2])
    assert torch.equal(picked.ssm, state.ssm[:, [2, 0, 2]])
    assert torch.equal(picked.conv, state.conv[:, [2, 0, 2]])
    kept = picked.clone()
    state.ssm.zero_()
    assert torch.equal(picked.ssm, kept.ssm)
    picked.assign(1, other, 1)
    assert torch.equal(picked.ssm[:, 1], other.ssm[:, 1])
    assert torch.equal(picked.conv[:, 1], other.conv[:, 1])
    assert torch.equal(picked.ssm[:, 0], kept.ssm[:, 0])
    assert picked.nbytes == kept.nbytes == 4 * 3 * 3 * (3 * 90 + 90 * 11)


def test_every_module_but_a_plain_linear_is_measured() -> None:
    torch.manual_seed(0)

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(self.drop(x)))

    base = nn.Linear(7, 5).double()
    adapted = Adapted(base).double().train()
    weight, bias = effective_linear(adapted, 7)
    assert bias is not None
    x = torch.randn(3, 7, dtype=torch.float64)
    assert adapted.training
    assert adapted.drop.training
    torch.testing.assert_close(x @ weight.T + bias, adapted.eval()(x))
    assert effective_linear(base, 7)[0].data_ptr() == base.weight.data_ptr()
    step = StepProjection(3, 4)
    assert effective_linear(step, 3)[1] is None
    handle = base.register_forward_hook(lambda module, given, output: 2 * output)
    torch.testing.assert_close(effective_linear(base, 7)[0], 2 * base.weight.detach())
    handle.remove()


def test_adapters_are_merged() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = CausalLM(model().config)
    base.load_state_dict(model().state_dict())
    config = peft.LoraConfig(r=2, target_modules=["in_proj", "x_proj", "dt_proj", "out_proj"], lora_dropout=0.3)
    adapted = peft.inject_adapter_in_model(config, base)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    tokens = ids(2, 12)
    packed = PackedModel(adapted)
    adapted.eval()
    with torch.no_grad():
        own = adapted(tokens).logits
        truth = adapted.double()(tokens).logits
    assert_within_budget(steps(packed, tokens, packed.init_state(2)), truth, own)
    assert not torch.allclose(own, model()(tokens).logits, atol=1e-3)


def test_bytes() -> None:
    packed = PackedModel(model())
    shared = {p.data_ptr(): p.nbytes for p in model().parameters()}
    assert packed.head.data.data_ptr() == packed.embedding.data.data_ptr() == model().lm_head.weight.data_ptr()
    assert packed.nbytes == sum(shared.values())
    sizes = [PackedModel(model(), dtype).nbytes for dtype in PACKED]
    assert sizes[0] > sizes[1] > sizes[2]


def test_errors() -> None:
    packed = PackedModel(model())
    state = packed.init_state(2)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: PackedModel(model(), "int4"), errors.ConfigError, "dtype must be one of"),  # type: ignore[arg-type]
        (lambda: PackedModel(model(), "float16"), errors.ConfigError, "'float16' runs on GPUs.*'bfloat16'"),
        (lambda: PackedModel(nn.Linear(2, 2)), errors.ConfigError, "model must be a CausalLM"),  # type: ignore[arg-type]
        (lambda: packed.init_state(0), errors.ShapeError, "batch must be >= 1, got 0"),
        (lambda: packed.step(torch.zeros(3, dtype=torch.long), state), errors.ShapeError, "state.conv must be"),
        (lambda: packed.step(torch.zeros(2), state), errors.DTypeError, "input_ids must be int64"),
        (lambda: packed.step(torch.zeros(2, 1).long(), state), errors.ShapeError, r"input_ids must be \(batch,\)"),
        (lambda: packed.step(torch.tensor([0, 999]), state), errors.ShapeError, "got 0 to 999"),
        (lambda: packed.prefill(torch.zeros(2, 0).long(), state), errors.ShapeError, "length >= 1"),
        (lambda: packed.prefill(ids(2, 3), state, "first"), errors.ConfigError, "'last' or 'all'"),  # type: ignore
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not state.ssm.any()


@pytest.mark.parametrize("rows", [1, 3])
def test_norms_on_dt_b_and_c(rows: int) -> None:
    """FalconMamba's variant: short and long prompts and steps are the float64 model's, no row depends on company."""
    config = model().config.replace(mixer_rms_eps=1e-6)
    plain = CausalLM(config)
    plain.load_state_dict(model().state_dict())
    exact = CausalLM(config, dtype=torch.float64)
    exact.load_state_dict(model().state_dict())
    packed, tokens = PackedModel(plain), ids(rows, 40)
    state = packed.init_state(rows)
    got = torch.cat([packed.prefill(tokens[:, :30], state, "all"), packed.prefill(tokens[:, 30:35], state, "all")], 1)
    got = torch.cat([got, steps(packed, tokens[:, 35:], state)], 1)
    with torch.no_grad():
        assert_within_budget(got, exact(tokens).logits, plain(tokens).logits)
        assert not torch.allclose(got, model()(tokens).logits, atol=1e-2)
    alone = packed.init_state(1)
    packed.prefill(tokens[:1, :30], alone)
    packed.prefill(tokens[:1, 30:35], alone)
    assert torch.equal(steps(packed, tokens[:1, 35:], alone)[0], got[0, 35:])
