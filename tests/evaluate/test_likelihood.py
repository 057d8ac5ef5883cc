"""Bits per byte against plain definitions, on a small recurrent model whose every prediction needs the whole past."""

from __future__ import annotations

import errno
import json
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from statescan.data import ByteTokenizer
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.evaluate import Evaluation, draw_by_position, evaluate_tokens, window_bits


class Output(NamedTuple):
    logits: Tensor
    loss: Tensor | None
    state: Tensor | None


class Config(NamedTuple):
    vocab_size: int


class Recurrent(nn.Module):
    """``h_t = 0.9 h_{t-1} + E[token_t]``, logits ``W h_t``: CausalLM's forward in the smallest form with a memory."""

    def __init__(self, vocab: int = 256, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.config = Config(vocab)
        self.embedding = nn.Parameter(torch.randn(vocab, width, generator=generator, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(vocab, width, generator=generator, dtype=torch.float64))
        self.calls: list[tuple[int, int]] = []

    def init_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.embedding.shape[1], dtype=torch.float64)

    def forward(self, input_ids: Tensor, *, state: Tensor | None = None) -> Output:
        assert not self.training
        self.calls.append(tuple(input_ids.shape))
        h = self.init_state(len(input_ids)) if state is None else state
        hidden = []
        for token in input_ids.T:
            h = 0.9 * h + self.embedding[token]
            hidden.append(h)
        return Output(torch.stack(hidden, 1) @ self.head.T, None, None if state is None else h)


@pytest.fixture(scope="module")
def model() -> Recurrent:
    return Recurrent()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 1001).astype(np.uint8)


def naive_bits(model: Recurrent, tokens: np.ndarray, starts: list[int], lengths: list[int]) -> list[np.ndarray]:
    """Each row from an empty state, in one pass, log-softmax in float64 and by hand."""
    out = []
    model.eval()
    for start, length in zip(starts, lengths, strict=True):
        ids = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
        logits = model(ids[None, :-1]).logits[0].detach().numpy()
        p = np.exp(logits - logits.max(1, keepdims=True))
        p = p / p.sum(1, keepdims=True)
        out.append(-np.log2(p[np.arange(length), ids[1:].numpy()]))
    return out


# The logits are taken to float32 before the loss, as a trained model's are: two roundings of about 40 bits.
ROUNDING = {"rtol": 4 * np.finfo(np.float32).eps, "atol": 64 * np.finfo(np.float32).eps}


@pytest.mark.parametrize(("context", "batch"), [(100, 3), (64, 8), (1000, 8), (5000, 2), (1, 16)])
def test_windows_judge_every_token_but_the_first_once(model, tokens, context, batch):
    result = evaluate_tokens(model, tokens, tokenizer=ByteTokenizer(), context=context, batch_size=batch)
    starts = list(range(0, 1000, min(context, 1000)))
    bits = naive_bits(model, tokens, starts, [min(context, 1000 - start) for start in starts])
    everything = np.concatenate(bits)
    assert result.tokens == result.bytes == len(everything) == 1000
    np.testing.assert_allclose(result.bits_per_byte, everything.mean(), **ROUNDING)
    np.testing.assert_allclose(result.perplexity, 2 ** everything.mean(), rtol=1e-5)
    assert sum(bucket.count for bucket in result.by_position) == 1000
    for bucket in result.by_position:
        inside = np.concatenate([row[bucket.first - 1 : bucket.last] for row in bits])
        assert bucket.count == len(inside)
        np.testing.assert_allclose(bucket.bits_per_token, inside.mean(), **ROUNDING)


def test_standard_error_is_that_of_the_mean_over_windows(model, tokens):
    result = evaluate_tokens(model, tokens, tokenizer=ByteTokenizer(), context=100)
    means = np.array([row.mean() for row in naive_bits(model, tokens, list(range(0, 1000, 100)), [100] * 10)])
    np.testing.assert_allclose(result.standard_error, means.std(ddof=1) / math.sqrt(10), rtol=1e-4)


@pytest.mark.parametrize("context", [1, 7, 64, 333, 1000, 4096])
def test_carried_state_does_not_depend_on_the_chunk(model, tokens, context):
    result = evaluate_tokens(model, tokens, tokenizer=ByteTokenizer(), context=context, carry_state=True)
    whole = naive_bits(model, tokens, [0], [1000])[0]
    np.testing.assert_allclose(result.bits_per_byte, whole.mean(), **ROUNDING)
    assert [bucket.first for bucket in result.by_position][:8] == [1, 2, 3, 4, 6, 8, 11, 16]
    assert result.by_position[-1].last == 1000
    for bucket in result.by_position:
        inside = whole[bucket.first - 1 : bucket.last]
        np.testing.assert_allclose(bucket.bits_per_token, inside.mean(), **ROUNDING)
        if len(inside) > 1:
            np.testing.assert_allclose(
                bucket.standard_error, inside.std(ddof=1) / math.sqrt(len(inside)), rtol=1e-4, atol=1e-7
            )


def test_carried_state_standard_error_groups_by_blocks_whatever_the_chunk(model):
    tokens = np.random.default_rng(3).integers(0, 256, 5000).astype(np.uint8)
    bits = naive_bits(model, tokens, [0], [4999])[0]
    position = np.arange(1, 5000)
    inside = (position >= 2896) & (position < 4096)  # the half octave that holds parts of two blocks: 2896, 3072, 4096
    sums = np.array([bits[inside & (position < 3072)].sum(), bits[inside & (position >= 3072)].sum()])
    sizes = np.array([3072 - 2896, 4096 - 3072])
    mean = sums.sum() / sizes.sum()
    wanted = math.sqrt(2 * ((sums - mean * sizes) ** 2).sum()) / sizes.sum()
    for context in (100, 1024, 5000):
        result = evaluate_tokens(model, tokens, tokenizer=ByteTokenizer(), context=context, carry_state=True)
        bucket = next(bucket for bucket in result.by_position if bucket.first == 2896)
        assert bucket.last == 4095
        np.testing.assert_allclose(bucket.standard_error, wanted, rtol=1e-3)


def test_lanes_each_carry_a_state_of_their_own(model, tokens):
    result = evaluate_tokens(model, tokens, tokenizer=ByteTokenizer(), context=50, carry_state=True, batch_size=3)
    bits = naive_bits(model, tokens, [0, 333, 666], [333, 333, 334])
    np.testing.assert_allclose(result.bits_per_byte, np.concatenate(bits).mean(), **ROUNDING)
    assert result.tokens == 1000


def test_long_windows_are_cut_to_bound_the_logits(model, tokens, monkeypatch):
    whole = evaluate_tokens(model, tokens, tokenizer=ByteTokenizer(), context=250)
    model.calls.clear()
    monkeypatch.setattr("statescan.evaluate.likelihood._LOGITS_AT_ONCE", 4 * 256 * 32)
    cut = evaluate_tokens(model, tokens, tokenizer=ByteTokenizer(), context=250)
    assert max(b * length for b, length in model.calls) <= 4 * 32
    np.testing.assert_allclose(cut.bits_per_byte, whole.bits_per_byte, **ROUNDING)


def test_bytes_are_those_of_the_judged_tokens(model, tokens):
    class Pairs:
        """Token t stands for 1 + t % 3 bytes."""

        def decode_bytes(self, ids):
            return b"".join(b"x" * (1 + int(i) % 3) for i in ids)

    lengths = 1 + tokens.astype(int) % 3
    result = evaluate_tokens(model, tokens, tokenizer=Pairs())
    assert result.bytes == lengths[1:].sum()
    np.testing.assert_allclose(result.bits_per_byte * result.bytes, result.bits_per_token * 1000)
    by_ratio = evaluate_tokens(model, tokens, bytes_per_token=float(lengths[1:].mean()))
    np.testing.assert_allclose(by_ratio.bits_per_byte, result.bits_per_byte)
    by_total = evaluate_tokens(model, tokens, total_bytes=2002)
    assert by_total.bytes == 2000


def test_a_certain_model_pays_nothing_and_a_uniform_one_eight_bits(tokens):
    uniform = Recurrent()
    nn.init.zeros_(uniform.head)
    result = evaluate_tokens(uniform, tokens, tokenizer=ByteTokenizer())
    np.testing.assert_allclose(result.bits_per_byte, 8, rtol=1e-6)
    np.testing.assert_allclose(result.perplexity, 256, rtol=1e-5)
    assert all(abs(bucket.bits_per_byte - 8) < 1e-5 for bucket in result.by_position)


def test_training_mode_is_put_back_even_after_an_error(model, tokens):
    model.train()
    evaluate_tokens(model, tokens[:10], tokenizer=ByteTokenizer())
    assert model.training
    with pytest.raises(DataError, match="vocabulary"):
        evaluate_tokens(model, np.array([1, 999]), tokenizer=ByteTokenizer())
    assert model.training
    model.eval()


@pytest.mark.parametrize("form", [list, torch.from_numpy, lambda x: x.astype(np.uint16)])
def test_any_form_of_tokens(model, tokens, form):
    a = evaluate_tokens(model, form(tokens[:200]), bytes_per_token=1.0)
    b = evaluate_tokens(model, tokens[:200], bytes_per_token=1.0)
    assert a == b


def test_progress_reaches_the_end(model, tokens):
    seen = []
    evaluate_tokens(model, tokens, bytes_per_token=1, context=300, batch_size=2, progress=lambda *x: seen.append(x))
    assert seen == [(600, 1000), (900, 1000), (1000, 1000)]


def test_bad_arguments(model, tokens):
    with pytest.raises(DataError, match="at least 2 tokens, got 1"):
        evaluate_tokens(model, tokens[:1], bytes_per_token=1)
    with pytest.raises(ConfigError, match="got none"):
        evaluate_tokens(model, tokens)
    with pytest.raises(ConfigError, match="got tokenizer, total_bytes"):
        evaluate_tokens(model, tokens, tokenizer=ByteTokenizer(), total_bytes=5)
    with pytest.raises(ConfigError, match="at least 1"):
        evaluate_tokens(model, tokens, bytes_per_token=1, context=0)
    with pytest.raises(DataError, match="at least one byte"):
        evaluate_tokens(model, tokens, bytes_per_token=0)


def test_result_is_plain_json(model, tokens):
    result = evaluate_tokens(model, tokens, bytes_per_token=1)
    back = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert back["bits_per_byte"] == result.bits_per_byte
    assert back["by_position"][0]["standard_error"] is None
    assert back["by_position"][0]["count"] == 1


def test_the_curve_is_drawn_and_a_failure_leaves_the_old_file(model, tokens, tmp_path, monkeypatch):
    result = evaluate_tokens(model, tokens, bytes_per_token=1)
    path = tmp_path / "curve.png"
    draw_by_position({"model": result}, path, yardsticks={"xz": 7.5})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    before = path.read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device", "a temporary name")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(CheckpointError, match=rf"{path.name}: No space left.* is unharmed; free some space") as raised:
        result.draw(path)
    assert "temporary" not in str(raised.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert isinstance(result, Evaluation)


@pytest.fixture(scope="module")
def language_model():
    from statescan.models import CausalLM, MambaConfig

    torch.manual_seed(0)
    return CausalLM(MambaConfig(d_model=24, n_layer=2, vocab_size=256), dtype=torch.float64)


def test_a_language_model_carries_its_state_through_any_chunks(language_model, tokens):
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        loss = float(language_model(ids[:, :-1], labels=ids).loss) / math.log(2)
    for context in (17, 128, 4096):
        result = evaluate_tokens(language_model, tokens, tokenizer=ByteTokenizer(), context=context, carry_state=True)
        np.testing.assert_allclose(result.bits_per_byte, loss, **ROUNDING)


def test_a_language_models_windows_are_its_losses(language_model, tokens):
    ids = torch.from_numpy(tokens.astype(np.int64))
    windows = torch.stack([ids[start : start + 101] for start in range(0, 1000, 100)])
    with torch.no_grad():
        loss = float(language_model(windows[:, :-1], labels=windows).loss) / math.log(2)
    result = evaluate_tokens(language_model, tokens, tokenizer=ByteTokenizer(), context=100, batch_size=3)
    np.testing.assert_allclose(result.bits_per_byte, loss, **ROUNDING)


def test_windows_that_overlap_judge_every_token_once() -> None:
    model, text = Recurrent().eval(), np.random.default_rng(0).integers(0, 256, 200)
    # Of a length that no stride divides: the last window is a shorter one.
    for some in (text[: 1 + 16 * 5], text[: 1 + 16 * 5 + 11]):
        whole = evaluate_tokens(model, some, total_bytes=len(some), context=16)
        assert window_bits(model, some, 16, 16).mean() == pytest.approx(whole.bits_per_token, rel=1e-6)
        # By hand: the first window whole, then what is new in each.
        bits: list[float] = []
        for start in range(0, len(some) - 1 - 8, 8):
            ids = torch.from_numpy(some[start : start + 17].astype(np.int64))
            losses = torch.nn.functional.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
            bits += (losses / np.log(2)).tolist()[len(bits) - start :]
        np.testing.assert_allclose(window_bits(model, some, 16, 8, batch_size=3), bits, rtol=1e-4)
    with pytest.raises(ConfigError, match="stride must be in"):
        window_bits(model, text, 16, 17)
    with pytest.raises(ConfigError, match="at least length"):
        window_bits(model, text[:10], 16, 16)
