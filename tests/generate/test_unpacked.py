"""The engine on models without a packed form: the tokens of the naive oracle, rows that come and go, sessions; what has
a packed form keeps it, and what needs one says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statescan.data import ByteTokenizer
from statescan.errors import ConfigError
from statescan.generate import Engine, PackedModel, SamplingParams, generate_naive
from statescan.generate.unpacked import ModelDecoder
from statescan.inspect import inspect_text
from statescan.models import CausalLM, MambaConfig

KINDS: list[dict[str, Any]] = [
    {"inner": "s4"},
    {"inner": "s4d-real", "block": "ungated"},
    {"inner": "none"},
    {"block": "h3", "inner": "s4d"},
    {"block": "h3"},
    {"selective": "none"},
    {"A_init": "s4d-lin"},
    {"dt_rank": "none"},
]
PROMPTS = ["Call me Ishmael.", "a", "The whale, " * 9]
PARAMS = [SamplingParams(seed=i, max_new_tokens=6 + 3 * i, temperature=0.8) for i in range(3)]


def make(dtype: torch.dtype | None = None, **fields: Any) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(MambaConfig(d_model=16, n_layer=2, vocab_size=256, d_state=4, **fields), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_the_engine_writes_as_the_naive_oracle(fields: dict[str, Any]) -> None:
    model = make(**fields)
    engine = Engine(model, max_batch=2)
    assert isinstance(engine.decoder, ModelDecoder)
    for prompt, own, result in zip(PROMPTS, PARAMS, engine.generate(PROMPTS, PARAMS), strict=True):
        assert result.tokens == generate_naive(model, prompt, own).tokens
    assert model.training  # the caller's model is left as it was


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_session_goes_on_from_its_state(fields: dict[str, Any]) -> None:
    model = make(**fields)
    engine = Engine(model, prefill_chunk=4)
    session = engine.open("Call me ")
    first = engine.resume(session, PARAMS[0])
    second = engine.resume(session, PARAMS[1], prompt=" the sea")
    text = [*b"Call me ", *first.tokens, *b" the sea"]
    assert first.tokens == generate_naive(model, "Call me ", PARAMS[0]).tokens
    assert second.tokens == generate_naive(model, text, PARAMS[1]).tokens


def test_weights_are_shared_where_they_are_as_wanted_and_copied_where_not() -> None:
    model = make(A_init="s4d-lin")
    same = ModelDecoder(model)._model
    assert all(a is b for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not same.training
    narrow = ModelDecoder(model, "bfloat16")._model
    mixer: Any = narrow.backbone.layers[0].mixer
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.A_imag.dtype == torch.float32
    assert narrow.lm_head.weight is narrow.backbone.embedding.weight
    assert model.backbone.embedding.weight.dtype == torch.float32
    wide = make(torch.float64, A_init="s4d-lin")
    assert next(ModelDecoder(wide)._model.parameters()).dtype == torch.float32
    assert Engine(model, dtype="bfloat16").generate("a", PARAMS[0])[0].tokens


def test_all_logits_and_the_last() -> None:
    decoder = ModelDecoder(make(inner="s4"))
    ids = torch.tensor([[1, 2, 3, 4]])
    every = decoder.prefill(ids, decoder.init_state(1), "all")
    last = decoder.prefill(ids, decoder.init_state(1))
    assert every.shape == (1, 4, 256)
    assert torch.allclose(every[:, -1], last, rtol=1e-5, atol=1e-6)


def test_what_is_published_keeps_its_packed_form() -> None:
    for fields in ({}, {"A_init": "random"}, {"selective": "dt,C,B"}):
        assert isinstance(Engine(make(**fields)).decoder, PackedModel)


def test_what_needs_the_published_layer_says_so() -> None:
    model = make(block="h3")
    with pytest.raises(ConfigError, match="PackedModel: model must have the published Mamba layer, got one with"):
        PackedModel(model)
    with pytest.raises(ConfigError, match="inspect: model must have the published Mamba layer"):
        inspect_text(model, ByteTokenizer(), "The whale")
    with pytest.raises(ConfigError, match=r"dtype must be one of float32, bfloat16, float16 .* got 'int8'"):
        Engine(model, dtype="int8")


def test_an_adapter_in_another_dtype_is_named() -> None:
    model = make(inner="s4")
    mixer: Any = model.backbone.layers[0].mixer
    mixer.in_proj = torch.nn.Sequential(mixer.in_proj)
    assert Engine(model).generate("a", PARAMS[0])[0].tokens  # as it is, it runs
    with pytest.raises(ConfigError, match=r"other parameters than its configuration's.*merge its adapters"):
        Engine(model, dtype="bfloat16")


@pytest.mark.parametrize("packed", [False, True])
def test_a_device_that_is_missing_is_named_with_a_cure(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = make() if packed else make(inner="none")
    with pytest.raises(ConfigError, match=r"^Engine: device must be .*, got 'cuda': torch sees no CUDA device"):
        Engine(model, device="cuda")
    Engine(model, device="cpu")
