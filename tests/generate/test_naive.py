"""The engine on a real model: what running everything again gives, and in a batch what it gives alone, to the bit."""

from __future__ import annotations

import pytest
import torch

from statescan.data import ByteTokenizer
from statescan.errors import ConfigError
from statescan.generate import Engine, SamplingParams, generate, generate_naive
from statescan.models import CausalLM, MambaConfig
from statescan.ops import explain

PROMPTS = ["Call me Ishmael.", "a", "", "Some years ago, never mind how long precisely. " * 3, "Wäl 🐋"]
SAMPLED = [
    SamplingParams(temperature=0, max_new_tokens=20),
    SamplingParams(seed=1, max_new_tokens=24),
    SamplingParams(seed=2, max_new_tokens=7, temperature=0.5, top_k=50, top_p=0.9),
    SamplingParams(seed=3, max_new_tokens=15, min_p=0.3, temperature=1.5, repetition_penalty=1.3),
    SamplingParams(temperature=0, max_new_tokens=12, repetition_penalty=1.5, stop_token_ids=(0, 255)),
]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(MambaConfig(d_model=48, n_layer=3, vocab_size=256))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights larger than at initialisation: logits that differ clearly, and a state that matters.
            if name.endswith(("proj.weight", "embedding.weight")):
                parameter.mul_(4)
    return model


def test_engine_gives_what_running_everything_again_gives(model):
    results = Engine(model, ByteTokenizer(), "float32", max_batch=3).generate(PROMPTS, SAMPLED)
    for prompt, params, result in zip(PROMPTS, SAMPLED, results, strict=True):
        assert result == generate_naive(model, prompt, params)


def test_stop_strings_agree_with_the_naive_search(model):
    whole = generate_naive(model, "sea", SamplingParams(seed=8, max_new_tokens=60))
    printable = [i for i in range(5, len(whole.text) - 1) if whole.text[i : i + 2].isascii()]
    stops = (whole.text[printable[-1] : printable[-1] + 2], whole.text[printable[3] : printable[3] + 2], "never there")
    params = SamplingParams(seed=8, max_new_tokens=60, stop=stops)
    wanted = generate_naive(model, "sea", params)
    assert wanted.finish_reason == "stop"
    assert len(wanted.tokens) < 60
    assert generate(model, "sea", params)[0] == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("max_batch", [2, 5, 16])
def test_a_batch_is_bit_equal_to_each_row_alone(model, dtype, max_batch):
    if explain("packed_linear", device="cpu").backend != "cpu":
        pytest.skip("torch's own products may round a row differently in another batch; needs the C++ kernels")
    params = [
        SamplingParams(
            seed=7, max_new_tokens=own.max_new_tokens, temperature=own.temperature, top_k=own.top_k, logprobs=True
        )
        for own in SAMPLED
    ]
    engine = Engine(model, ByteTokenizer(), dtype, max_batch=max_batch)
    together = engine.generate(PROMPTS, params)
    # The log probabilities are compared too, with ==: they show a difference of a bit in a logit.
    for prompt, own, result in zip(PROMPTS, params, together, strict=True):
        assert engine.generate([prompt], own)[0] == result


def test_sessions_agree_with_generating_from_all_tokens(model):
    engine = Engine(model, ByteTokenizer())
    session = engine.open("Call me")
    first = engine.resume(session, SamplingParams(seed=1, max_new_tokens=9))
    assert first.tokens == generate_naive(model, "Call me", SamplingParams(seed=1, max_new_tokens=9)).tokens
    before = list(session.tokens)
    second = engine.resume(session, SamplingParams(seed=1, max_new_tokens=9), prompt=" Ishmael")
    wanted = generate_naive(model, before + list(b" Ishmael"), SamplingParams(seed=1, max_new_tokens=9))
    assert second.tokens == wanted.tokens
    assert second.text == wanted.text


def test_a_session_survives_a_listener_that_fails(model):
    engine = Engine(model, ByteTokenizer())
    session = engine.open("Call me")
    params = SamplingParams(seed=1, max_new_tokens=9)

    def fail(row, text):
        raise RuntimeError("closed pipe")

    with pytest.raises(RuntimeError, match="closed pipe"):
        engine.resume(session, params, prompt=" Ishmael", stream=fail)
    assert session.tokens == list(b"Call me")
    assert engine.resume(session, params).tokens == generate_naive(model, "Call me", params).tokens


def test_naive_puts_the_training_mode_back(model):
    model.train()
    generate_naive(model, "a", SamplingParams(max_new_tokens=1))
    assert model.training
    model.eval()


def test_a_tokenizer_is_asked_for_where_tokens_are_no_bytes():
    model = CausalLM(MambaConfig(d_model=16, n_layer=1, vocab_size=300))
    with pytest.raises(ConfigError, match="model of 300 tokens"):
        generate(model, "a")
    with pytest.raises(ConfigError, match="model of 300 tokens"):
        generate_naive(model, "a")
