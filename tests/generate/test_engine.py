"""The engine on a decoder whose every logit depends on the whole history, so that any slip of state or order shows."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from statescan.data import ByteTokenizer, load_tokenizer
from statescan.errors import BackendUnavailableError, ConfigError, DataError
from statescan.generate import Engine, Generation, SamplingParams, graphs, sample
from statescan.models import CausalLM, preset
from statescan.ops import _cuda

engine_module = importlib.import_module("statescan.generate.engine")

VOCAB = 256


def logits_of(history: tuple[int, ...]) -> torch.Tensor:
    """Logits that are as good as random, fixed by all tokens so far; printable characters are likelier."""
    seed = int.from_bytes(hashlib.sha256(repr(history).encode()).digest()[:8], "little")
    values = np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32)
    values[97:123] += 2
    return torch.from_numpy(values)


class History:
    def __init__(self, rows: list[tuple[int, ...]]) -> None:
        self.rows = rows

    def select(self, rows) -> History:
        return History([self.rows[i] for i in rows])

    def assign(self, row: int, other: History) -> None:
        assert len(other.rows) == 1
        self.rows[row] = other.rows[0]


class Recorder:
    """A decoder whose state is the history itself; it counts what is asked of it."""

    def __init__(self, width: int = VOCAB) -> None:
        self.width = width
        self.prefills: list[int] = []
        self.steps: list[int] = []

    def init_state(self, batch: int) -> History:
        return History([()] * batch)

    def prefill(self, input_ids, state, logits="last"):
        assert logits == "last"
        self.prefills.append(input_ids.shape[1])
        state.rows = [state.rows[0] + tuple(input_ids[0].tolist())]
        return self._logits(state)

    def step(self, input_ids, state):
        assert len(input_ids) == len(state.rows)
        self.steps.append(len(input_ids))
        state.rows = [(*row, int(token)) for row, token in zip(state.rows, input_ids, strict=True)]
        return self._logits(state)

    def _logits(self, state: History):
        padding = torch.full((len(state.rows), self.width - VOCAB), 99.0)
        return torch.cat([torch.stack([logits_of(row) for row in state.rows]), padding], 1)


def by_hand(prompt: str, params: SamplingParams) -> list[int]:
    ids = list(prompt.encode())
    for _ in range(params.max_new_tokens):
        seen = torch.zeros(VOCAB, dtype=torch.bool)
        seen[ids] = True
        ids.append(sample(logits_of(tuple(ids)), params, len(ids), seen))
    return ids[len(prompt.encode()) :]


PROMPTS = ["Call me Ishmael.", "a", "The whale, " * 30, "Ünïcode 🐋", "sea"]
PARAMS = [
    SamplingParams(temperature=0, max_new_tokens=9),
    SamplingParams(seed=3, max_new_tokens=14, top_k=40),
    SamplingParams(seed=3, max_new_tokens=1, temperature=0.7),
    SamplingParams(seed=9, max_new_tokens=11, top_p=0.9, repetition_penalty=1.4),
    SamplingParams(seed=9, max_new_tokens=5, min_p=0.1, stream=6),
]


@pytest.mark.parametrize("max_batch", [1, 2, 3, 16])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_a_batch_gives_what_each_gives_by_hand(max_batch, chunk):
    engine = Engine(Recorder(), ByteTokenizer(), prefill_chunk=chunk, max_batch=max_batch)
    results = engine.generate(PROMPTS, PARAMS)
    for prompt, params, result in zip(PROMPTS, PARAMS, results, strict=True):
        assert result.tokens == by_hand(prompt, params)
        assert result.prompt_tokens == len(prompt.encode())
        assert result.finish_reason == "length"
        assert result.seed == params.seed


def test_rows_that_have_ended_cost_nothing_and_waiting_prompts_take_their_place():
    recorder = Recorder()
    params = [SamplingParams(seed=i, max_new_tokens=n) for i, n in enumerate([2, 5, 9])]
    Engine(recorder, ByteTokenizer()).generate(["a", "b", "c"], params)
    # The first token of a row comes from its prefill.
    assert recorder.steps == [3, 2, 2, 2, 1, 1, 1, 1]
    recorder = Recorder()
    Engine(recorder, ByteTokenizer(), max_batch=2).generate(["a", "b", "c"], params)
    assert recorder.steps == [2, 2, 2, 2, 1, 1, 1, 1, 1]
    assert sum(recorder.steps) == 1 + 4 + 8


def test_prefill_is_chunked():
    recorder = Recorder()
    Engine(recorder, ByteTokenizer(), prefill_chunk=10).generate(["x" * 25], SamplingParams(max_new_tokens=1))
    assert recorder.prefills == [10, 10, 5]
    assert recorder.steps == []


def test_the_stream_joins_to_the_text_in_order_and_never_shows_a_stop():
    params = SamplingParams(seed=1, max_new_tokens=60)
    whole = Engine(Recorder(), ByteTokenizer()).generate(PROMPTS, params)
    # Three plain characters of each row's own text, so that every row meets its stop, or another row's before it.
    stops = tuple(
        next(result.text[i : i + 3] for i in range(15, 60) if result.text[i : i + 3].isalpha()) for result in whole
    )
    stopped = SamplingParams(seed=1, max_new_tokens=60, stop=stops)
    shown: dict[int, str] = {}

    def show(row, text):
        assert text
        shown[row] = shown.get(row, "") + text

    results = Engine(Recorder(), ByteTokenizer(), max_batch=3).generate(PROMPTS, stopped, stream=show)
    for row, (result, full) in enumerate(zip(results, whole, strict=True)):
        assert shown[row] == result.text
        assert result.finish_reason == "stop"
        assert result.stop in stops
        assert not any(stop in result.text for stop in stops)
        assert full.text.startswith(result.text + result.stop)
        assert full.tokens[: len(result.tokens)] == result.tokens
        # The row ended with the token that completed the stop string.
        assert ByteTokenizer().decode(result.tokens).endswith(result.stop)


def test_stop_tokens_end_a_row_without_showing():
    plain = Engine(Recorder(), ByteTokenizer()).generate("Call me", SamplingParams(seed=2, max_new_tokens=30))[0]
    token = plain.tokens[12]
    at = plain.tokens.index(token)
    params = SamplingParams(seed=2, max_new_tokens=30, stop_token_ids=(token,))
    result = Engine(Recorder(), ByteTokenizer()).generate("Call me", params)[0]
    assert (result.finish_reason, result.stop) == ("stop", token)
    assert result.tokens == plain.tokens[: at + 1]
    assert plain.text.startswith(result.text)
    assert result.text == ByteTokenizer().decode(result.tokens[:-1])


def test_samples_of_one_prompt_differ_and_each_can_be_had_alone():
    engine = Engine(Recorder(), ByteTokenizer())
    params = SamplingParams(seed=5, max_new_tokens=10)
    three = engine.generate(["sea", "sea", "land", "sea"], params)
    assert len({tuple(result.tokens) for result in three}) == 4
    for stream, row in ((0, 0), (1, 1), (2, 3)):
        alone = engine.generate("sea", SamplingParams(seed=5, stream=stream, max_new_tokens=10))[0]
        assert alone == three[row]


def test_without_a_seed_the_one_used_is_told():
    engine = Engine(Recorder(), ByteTokenizer())
    a = engine.generate("sea", SamplingParams(seed=None, max_new_tokens=12))[0]
    b = engine.generate("sea", SamplingParams(seed=None, max_new_tokens=12))[0]
    assert a.seed != b.seed
    assert a.tokens != b.tokens
    assert engine.generate("sea", SamplingParams(seed=a.seed, max_new_tokens=12))[0] == a


def test_columns_that_pad_the_vocabulary_are_never_drawn():
    params = SamplingParams(temperature=0, max_new_tokens=8)
    padded = Engine(Recorder(width=264), ByteTokenizer()).generate("sea", params)
    assert padded == Engine(Recorder(), ByteTokenizer()).generate("sea", params)


def test_logprobs_are_the_models_own():
    params = SamplingParams(seed=1, temperature=0.3, top_k=5, repetition_penalty=1.5, max_new_tokens=6, logprobs=True)
    result = Engine(Recorder(), ByteTokenizer()).generate("sea", params)[0]
    ids = list(b"sea")
    assert result.logprobs is not None
    for token, logprob in zip(result.tokens, result.logprobs, strict=True):
        assert logprob == float(torch.log_softmax(logits_of(tuple(ids)), -1)[token])
        ids.append(token)


def test_a_session_goes_on_without_reading_twice():
    recorder = Recorder()
    engine = Engine(recorder, ByteTokenizer())
    session = engine.open("Call me")
    first = engine.resume(session, SamplingParams(seed=1, max_new_tokens=6))
    assert session.tokens == list(b"Call me") + first.tokens
    second = engine.resume(session, SamplingParams(seed=1, max_new_tokens=5), prompt=" Ahab.")
    third = engine.resume(session, SamplingParams(seed=1, max_new_tokens=1))
    whole = engine.generate("Call me", SamplingParams(seed=1, max_new_tokens=6))[0]
    assert first == whole
    history = list(b"Call me") + first.tokens + list(b" Ahab.")
    assert second == engine.generate([history], SamplingParams(seed=1, max_new_tokens=5))[0]
    assert third == engine.generate([history + second.tokens], SamplingParams(seed=1, max_new_tokens=1))[0]
    assert session.tokens == history + second.tokens + third.tokens
    # The prompt, the last token of it, the last token drawn with the new text, the last token drawn.
    assert recorder.prefills[:4] == [6, 1, 7, 1]


@pytest.mark.parametrize("nothing", ["", [], np.empty(0, np.uint8), torch.empty(0, dtype=torch.long)])
def test_an_empty_prompt_adds_nothing_to_a_session(nothing):
    engine = Engine(Recorder(), ByteTokenizer())
    params = SamplingParams(seed=1, max_new_tokens=3)
    one, other = engine.open("Call me"), engine.open("Call me")
    assert engine.resume(one, params, prompt=nothing) == engine.resume(other, params)
    assert engine.resume(one, params, prompt=nothing) == engine.resume(other, params)
    assert one.tokens == other.tokens
    assert len(one.tokens) == len("Call me") + 6
    with pytest.raises(DataError, match="one-dimensional"):
        engine.resume(one, params, prompt=torch.tensor(3))


def test_a_stream_left_early_reads_no_more():
    recorder = Recorder()
    pieces = Engine(recorder, ByteTokenizer()).stream(["a", "b"], SamplingParams(max_new_tokens=50))
    for _, piece in zip(range(6), pieces, strict=False):
        assert piece.generation is None
    pieces.close()
    assert len(recorder.steps) <= 3


def test_prompts_of_every_kind():
    engine = Engine(Recorder(), ByteTokenizer())
    params = SamplingParams(seed=1, max_new_tokens=7)
    ids = list(b"sea")
    kinds = ["sea", ids, tuple(ids), np.array(ids, np.uint8), torch.tensor(ids)]
    results = [engine.generate([kind], params)[0] for kind in kinds]
    assert all(isinstance(result, Generation) and result == results[0] for result in results)
    assert engine.generate([], params) == []


def test_an_empty_prompt_starts_a_line():
    engine = Engine(Recorder(), ByteTokenizer())
    params = SamplingParams(seed=1, max_new_tokens=7)
    assert engine.generate("", params) == engine.generate("\n", params)

    class EndOfText(ByteTokenizer):
        end_of_text = 3

    ended = Engine(Recorder(), EndOfText()).generate([""], params)
    assert ended[0].tokens == engine.generate([[3]], params)[0].tokens


def words(folder, adds: bool, named: str):
    """A tokenizer of six words in a folder; `adds`: with <s> around a text; `named`: what is told beside the file."""
    tokenizers = pytest.importorskip("tokenizers")
    known = {"</s>": 0, "<s>": 1, "call": 2, "me": 3, "sea": 4, "?": 5}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<s>", "</s>"])
    if adds:
        inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(named)
    return load_tokenizer(folder)


def test_a_text_begins_with_what_its_tokenizer_adds(tmp_path):
    engine = Engine(Recorder(), words(tmp_path / "begun", True, '{"bos_token": "<s>", "eos_token": "</s>"}'))
    params = SamplingParams(seed=1, max_new_tokens=3)
    for text, ids in (("call me", [1, 2, 3]), ("<s> call me", [1, 2, 3]), ("", [1])):
        assert engine.generate(text, params) == engine.generate([ids], params), text
        assert engine.open(text).tokens == ids
    assert engine.generate([[2, 3]], params)[0].prompt_tokens == 2
    # What goes on is no new text.
    session = engine.open("call")
    first = engine.resume(session, params)
    second = engine.resume(session, params, prompt="me sea")
    assert session.tokens == [1, 2, *first.tokens, 3, 4, *second.tokens]
    before = list(session.tokens)
    third = engine.resume(session, params, prompt=" ")
    assert session.tokens == [*before, *third.tokens]


def test_an_empty_prompt_starts_from_the_token_that_begins_a_text(tmp_path):
    for name, adds, named, start in (
        ("begins", False, '{"bos_token": "<s>", "eos_token": "</s>"}', 1),
        ("ends", False, '{"eos_token": "</s>"}', 0),
        ("adds", True, "{}", 1),
    ):
        engine = Engine(Recorder(), words(tmp_path / name, adds, named))
        assert engine.open("").tokens == engine.open([]).tokens == [start], name


def test_errors_are_named():
    engine = Engine(Recorder(), ByteTokenizer())
    with pytest.raises(DataError, match=r"lie in \[0, 256\), got 5 to 256"):
        engine.generate([[5, 256]])
    with pytest.raises(DataError, match="one-dimensional"):
        engine.generate([torch.zeros(2, 3, dtype=torch.long)])
    with pytest.raises(ConfigError, match="one per prompt"):
        engine.stream(["a"], [])
    with pytest.raises(ConfigError, match="prefill_chunk and max_batch"):
        Engine(Recorder(), ByteTokenizer(), max_batch=0)


# ------------------------------------------------------------------------------- where a step's kernels can't be made


class Slots:
    """As much of a decoder of CUDA graphs as the engine asks before it trusts it."""

    def __init__(self, fails: str, size: int) -> None:
        self.fails, self.size = fails, size
        self.asked: list[tuple[str, int]] = []
        self.logits = torch.zeros(1)

    def _rehearse(self, rows: int) -> None:
        self._ask("step", rows)

    def _launch_draw(self, logits: torch.Tensor, first: int, rows: int) -> None:
        assert logits is self.logits
        assert first == 0
        self._ask("draw", rows)

    def _ask(self, what: str, rows: int) -> None:
        assert getattr(_cuda._thread, "rehearses", False), "kernels are compiled, not launched"
        self.asked.append((what, rows))
        if (what, rows) == (self.fails, self.size):
            raise BackendUnavailableError(f"{what} of {rows} did not compile; use backend='torch'")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Makes an engine on a packed model that says it is on a GPU, whose decoder is of the kind given."""

    def make(kind: Callable[..., object], max_batch: int) -> Engine:
        model = CausalLM(preset("tiny"))
        packed = engine_module._decoder(model, "float32", None)
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "_decoder", lambda *_: packed)
            patch.setattr(type(packed), "device", torch.device("cuda"))
            patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
            patch.setattr(graphs, "refuses", lambda packed: None)
            patch.setattr(graphs, "GraphDecoder", kind)
            engine = Engine(model, max_batch=max_batch)
        engine.device = packed.device
        return engine

    return make


def test_every_size_of_a_step_is_made_ready(on_gpu: Callable[..., Engine]) -> None:
    slots = Slots("", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = on_gpu(lambda *_: slots, 20)
    assert engine._slots is slots
    assert slots.asked == [(what, rows) for rows in (20, 16, 8, 4, 2, 1) for what in ("step", "draw")]
    assert not getattr(_cuda._thread, "rehearses", False)


@pytest.mark.parametrize("fails", ["make", "step", "draw"])
def test_an_engine_goes_on_op_by_op(fails: str, on_gpu: Callable[..., Engine]) -> None:
    def kind(*_: object) -> Slots:
        if fails == "make":
            raise BackendUnavailableError("decode.cu did not compile; use backend='torch'")
        return Slots(fails, 2)

    cause = "decode.cu" if fails == "make" else f"{fails} of 2"
    words = f"Engine: a step runs op by op instead of as one CUDA graph: {cause} did not compile"
    with pytest.warns(UserWarning, match=words) as caught:
        engine = on_gpu(kind, 4)
    assert len(caught) == 1
    assert engine._slots is None
    params = SamplingParams(max_new_tokens=5, seed=1)
    plain = Engine(engine.decoder, ByteTokenizer(), max_batch=4)
    assert engine.generate(["Call me", "It was"], params) == plain.generate(["Call me", "It was"], params)
