"""Likelihoods of continuations against one forward pass each, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from statescan.errors import ConfigError, DataError
from statescan.evaluate import LogitsReader, Request, StateReader, encode_pairs
from statescan.models import CausalLM, MambaConfig, TransformerConfig

VOCAB = 48


def mamba() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(MambaConfig(d_model=16, n_layer=2, vocab_size=VOCAB, d_state=4)).double().eval()


def requests() -> list[Request]:
    """Choices after one context, contexts that begin alike, single tokens, repeated and nested requests."""
    draw = np.random.default_rng(0)
    ask = []
    few = draw.integers(0, VOCAB, 20)
    for _ in range(12):
        context, shared = draw.integers(0, VOCAB, draw.integers(1, 30)), draw.integers(0, VOCAB, 6)
        for number in range(4):
            end = draw.integers(0, VOCAB, draw.integers(1, 9))
            ask.append(Request(context, np.concatenate([shared, end]) if number % 2 else end))
        # The same tokens cut elsewhere, and one that ends where others branch.
        ask.append(Request(np.concatenate([context, shared[:3]]), shared[3:]))
        ask.append(Request(np.concatenate([few, draw.integers(0, VOCAB, 5)]), draw.integers(0, VOCAB, 1)))
    return ask + ask[:3]


def one_by_one(model: CausalLM, ask: list[Request]) -> list[tuple[float, bool]]:
    answers = []
    for context, continuation in ask:
        whole = torch.tensor(np.concatenate([context, continuation]).astype(np.int64))
        with torch.no_grad():
            table = model(whole[None, :-1]).logits[0, -len(continuation) :].log_softmax(-1)
        wanted = whole[-len(continuation) :]
        logprob = float(table.gather(1, wanted[:, None]).sum())
        answers.append((logprob, bool((table.argmax(-1) == wanted).all())))
    return answers


@pytest.mark.parametrize(
    "options", [{}, {"share": False}, {"batch_tokens": 7}, {"batch_tokens": 50, "states": 3}], ids=str
)
def test_as_one_forward_pass_for_each(options: dict) -> None:
    model, ask = mamba(), requests()
    # Some that greedy decoding writes.
    with torch.no_grad():
        likeliest = [Request(c, [int(model(torch.tensor(c[None])).logits[0, -1].argmax())]) for c, _ in ask[:4]]
    ask += likeliest
    states = options.pop("states", None)
    reader = StateReader(model, **options)
    if states:
        reader._most_states = states
    wanted = one_by_one(model, ask)
    for got, (logprob, greedy) in zip(reader.score(ask), wanted, strict=True):
        assert got.logprob == pytest.approx(logprob, abs=1e-11)
        assert got.greedy == greedy
    assert any(greedy for _, greedy in wanted)


def test_shared_beginnings_are_read_once() -> None:
    context = np.arange(30) % VOCAB
    ask = [Request(context, [1, 2, 3, end]) for end in range(4)] + [Request(context, [9, 9, end]) for end in range(4)]
    reader, again = StateReader(mamba()), StateReader(mamba(), share=False)
    reader.score(ask), again.score(ask)
    # Inputs leave out the last token, so those of the first four are one, and those of the others.
    assert again.tokens_read == 33 + 32
    assert reader.tokens_read == 30 + 3 + 2


def test_other_models_and_any_function_of_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tables of logits in several pieces.
    monkeypatch.setattr("statescan.evaluate.continuations._LOGITS", 5 * VOCAB)
    torch.manual_seed(0)
    ask = requests()
    transformer = CausalLM(TransformerConfig(16, 2, VOCAB, n_head=2)).double().eval()
    for reader in (StateReader(transformer, batch_tokens=9), LogitsReader(transformer, batch_tokens=90)):
        for got, (logprob, greedy) in zip(reader.score(ask), one_by_one(transformer, ask), strict=True):
            assert got.logprob == pytest.approx(logprob, abs=1e-11)
            assert got.greedy == greedy


def test_batches_are_of_one_size_and_never_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    model = mamba()
    read = model.backbone.forward

    def count(ids, **arguments):
        bounds = arguments["cu_seqlens"]
        sizes.append((ids.shape[1], 1 if bounds is None else len(bounds) - 1))
        return read(ids, **arguments)

    monkeypatch.setattr(model.backbone, "forward", count)
    draw = np.random.default_rng(1)
    ask = [Request(draw.integers(0, VOCAB, 10), draw.integers(0, VOCAB, 2)) for _ in range(25)]
    StateReader(model, batch_tokens=100).score(ask)  # 275 tokens
    assert [tokens for tokens, _ in sizes] == [99, 99, 77]
    sizes.clear()
    reader = StateReader(model, batch_tokens=100)
    reader._most_states = 4
    reader.score([Request(ask[0].context, [first, 1, 2]) for first in range(30)])
    assert [rows for _, rows in sizes] == [1, 4, 4, 4, 4, 4, 4, 4, 2]


def test_only_the_last_tokens_are_read() -> None:
    model = mamba()
    long = Request(np.arange(40) % VOCAB, [3, 4])
    (got,) = StateReader(model, max_length=10).score([long])
    assert got.logprob == pytest.approx(one_by_one(model, [Request(long.context[-9:], [3, 4])])[0][0], abs=1e-11)


def test_what_cannot_be_judged_is_named() -> None:
    reader = StateReader(mamba(), max_length=4)
    for ask, words in (
        (Request([], [1]), "at least one token each, got 0 and 1"),
        (Request([1], []), "at least one token each, got 1 and 0"),
        (Request([1], [1, 2, 3, 4, 5]), "no longer than max_length = 4 tokens, got 5"),
        (Request([VOCAB], [1]), rf"vocabulary \[0, {VOCAB}\), got 1 to {VOCAB}"),
    ):
        with pytest.raises(DataError, match=words):
            reader.score([ask])
    with pytest.raises(ConfigError, match="batch_tokens must be at least 1, got 0"):
        StateReader(mamba(), batch_tokens=0)
    assert reader.score([]) == []


class Pairs:
    """A token for every two characters, so that what follows a space depends on what is before it."""

    def encode_batch(self, texts):
        return [
            np.array([int.from_bytes(text[i : i + 2].encode(), "big") for i in range(0, len(text), 2)])
            for text in texts
        ]


def test_texts_are_encoded_together_where_a_token_may_reach_over_a_space() -> None:
    tokenizer = Pairs()
    ab, c, c_, d = (int(tokenizer.encode_batch([text])[0][0]) for text in ("ab", "c", "c ", "d"))
    ((before, after),) = encode_pairs(tokenizer, [("abc", " d")], None)
    assert [*map(int, before)] == [ab, c]
    assert [*map(int, after)] == [d]
    ((before, after),) = encode_pairs(tokenizer, [("ab", "c d")], None)
    assert [*map(int, after)] == [c_, d]


class Around:
    """A token for each letter; 1 in front of a text and 2 behind it."""

    splits_at_spaces = adds_special_tokens = True

    def encode_batch(self, texts, *, add_special_tokens=False):
        ends = ([1], [2]) if add_special_tokens else ([], [])
        return [np.array([*ends[0], *map(ord, text), *ends[1]]) for text in texts]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_tokens_that_are_added_around_a_text_are_cut_as_the_harness_cuts_them() -> None:
    pairs = [("a", " b"), ("", " b"), ("\x01a", " b")]
    got = [tuple([*map(int, part)] for part in request) for request in encode_pairs(Around(), pairs, 1)]
    # The whole is 1 a _ b 2, the context 1 a 2, and it is cut after three; a text that begins with 1 gets nothing.
    assert got == [([1, 97, 2], [98, 2]), ([1], [32, 98]), ([1, 97], [32, 98])]
