"""The engine: prompts prefilled one by one, then all rows stepped together in constant memory."""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from statescan.data import ByteTokenizer
from statescan.data.tokenizer import encode_texts, prefix_token
from statescan.errors import BackendUnavailableError, ConfigError, DataError
from statescan.generate.ahead import run_ahead
from statescan.generate.drawing import DrawingSlots, bucket
from statescan.generate.sampling import SamplingParams, row_params, sample
from statescan.generate.stopping import Stop, TextStream
from statescan.ops import _cuda
from statescan.ops._checks import usable_device

__all__ = ["Decoder", "Engine", "Generation", "Piece", "Session", "generate"]

Prompt = str | Sequence[int] | np.ndarray | Tensor

_CHUNK, _CHUNK_ON_GPU = 2048, 16384


class Generation(NamedTuple):
    """What a row wrote.

    Args:
        text: the text of the tokens, up to the stop string or token; a character left unfinished at the end is left
            out.
        tokens: every token drawn, those of the stop included.
        finish_reason: ``"length"`` (max_new_tokens reached) or ``"stop"``.
        stop: the string or token id that ended the row, or None.
        prompt_tokens: number of tokens in the prompt.
        seed: the seed it was drawn with (of interest where none was given).
        logprobs: natural-log probability of each token by the model itself, where ``params.logprobs``; else None.
    """

    text: str
    tokens: list[int]
    finish_reason: Literal["length", "stop"]
    stop: str | int | None
    prompt_tokens: int
    seed: int | None
    logprobs: list[float] | None


class Piece(NamedTuple):
    """A piece of a stream: its row, its text (may be empty), and the whole result where it is the row's last."""

    row: int
    text: str
    generation: Generation | None


class Decoder(Protocol):
    """What the engine runs: `statescan.generate.PackedModel`, or anything with its three methods."""

    def init_state(self, batch: int, /) -> Any: ...

    def prefill(self, input_ids: Tensor, state: Any, /, logits: Literal["last", "all"] = "last") -> Tensor: ...

    def step(self, input_ids: Tensor, state: Any, /) -> Tensor: ...


class Session:
    """A text that goes on: the tokens so far and the state after them, so that nothing is read twice.

    Made by `Engine.open`; `Engine.resume` writes on and keeps it up to date.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._state: Any = None
        # The last token drawn is not in the state yet: it goes in with what follows.
        self._pending: list[int] = []


class _Row:
    """One prompt on its way."""

    def __init__(
        self, index: int, prompt: list[int], params: SamplingParams, tokenizer: Any, session: Session | None
    ) -> None:
        self.index = index
        self.params = params
        self.session = session
        before = prompt if session is None else session.tokens + prompt
        self.unread = prompt if session is None else session._pending + prompt
        self.prompt_tokens = len(before)
        self.tokens: list[int] = []
        self.logprobs: list[float] | None = [] if params.logprobs else None
        self.text: list[str] = []
        self.stream = TextStream(tokenizer, params.stop, before)
        self.stop_ids, self.limit = frozenset(params.stop_token_ids), params.max_new_tokens
        self.seen_before = before
        self.seen: Tensor | None = None
        self.result: Generation | None = None

    def draw(self, logits: Tensor) -> Piece:
        """Takes the logits (vocab,) of the next position: draws, and says what may be shown."""
        params = self.params
        if params.repetition_penalty != 1 and self.seen is None:
            self.seen = torch.zeros(logits.shape[0], dtype=torch.bool)
            self.seen[[token for token in self.seen_before if token < logits.shape[0]]] = True
        token = sample(logits, params, self.prompt_tokens + len(self.tokens), self.seen)
        if self.seen is not None:
            self.seen[token] = True
        logprob = 0.0 if self.logprobs is None else float(torch.log_softmax(logits.float(), -1)[token])
        return self.take(token, logprob)

    def take(self, token: int, logprob: float) -> Piece:
        """Takes the next token, drawn here or on the device, and says what may be shown."""
        if self.logprobs is not None:
            self.logprobs.append(logprob)
        self.tokens.append(token)
        if token in self.stop_ids:
            return self._end(self.stream.flush(), "stop", token)
        pushed = self.stream.push(token)
        if isinstance(pushed, Stop):
            return self._end(pushed.text, "stop", pushed.stop)
        if len(self.tokens) == self.limit:
            return self._end(pushed + self.stream.flush(), "length", None)
        self.text.append(pushed)
        return Piece(self.index, pushed, None)

    def _end(self, text: str, reason: Literal["length", "stop"], stop: str | int | None) -> Piece:
        self.text.append(text)
        self.result = Generation(
            "".join(self.text), self.tokens, reason, stop, self.prompt_tokens, self.params.seed, self.logprobs
        )
        return Piece(self.index, text, self.result)


class Engine:
    """Writes on from prompts: each is read once, in chunks of constant memory, then every token costs the same.

    A row gives the same tokens, to the bit, in any batch and alone: it is prefilled on its own, the steps treat every
    row alike whatever stands beside it (on the C++ kernels; torch's own products may round otherwise in another batch),
    and its random numbers belong to it. A row that has ended leaves the batch, and a waiting prompt takes its place.

    On an NVIDIA GPU a step of Mamba and of a Transformer is one CUDA graph, drawing included, and the host starts steps
    ahead of what it has read.
    There prompts of one length are read together, one row computes in float32 and several rows with activations in the
    weights' dtype, so that a row's last bits may depend on its company; its random numbers never do.

    Args:
        model: a `statescan.models.CausalLM`, packed here where it has the published Mamba layer and else run by its own
            forward and step (`statescan.generate.unpacked`), which is several times slower; or a `Decoder` as it is.
        tokenizer: turns prompts into tokens and back. Default: bytes, for a model of 256 tokens.
        dtype: of the packed weights, ``"float32"``, ``"bfloat16"``, on the CPU ``"int8"`` and on a GPU ``"float16"``.
            Default ``"float32"``.
        prefill_chunk: tokens of a prompt read at once. Default 2048, on a GPU 16384.
        max_batch: rows stepped together; further prompts wait. Default 16.
        device: where the packed weights go. Default: where the model is.

    Raises:
        ConfigError: an argument is out of range, or a tokenizer is needed.
    """

    def __init__(
        self,
        model: nn.Module | Decoder,
        tokenizer: Any = None,
        dtype: str = "float32",
        *,
        prefill_chunk: int | None = None,
        max_batch: int = 16,
        device: torch.device | str | None = None,
    ) -> None:
        if (prefill_chunk is not None and prefill_chunk < 1) or max_batch < 1:
            raise ConfigError(
                f"Engine: prefill_chunk and max_batch must be at least 1, got {prefill_chunk} and {max_batch}"
            )
        self.tokenizer = default_tokenizer(model) if tokenizer is None else tokenizer
        if isinstance(model, nn.Module):
            self.decoder: Any = _decoder(model, dtype, device)
        else:
            self.decoder = model
        self.device = getattr(self.decoder, "device", None)
        on_gpu = self.device is not None and torch.device(self.device).type == "cuda"
        self.prefill_chunk = prefill_chunk or (_CHUNK_ON_GPU if on_gpu else _CHUNK)
        self.max_batch = max_batch
        # Slots and graphs, where the decoder is a packed model or a Transformer on a GPU with kernels.
        self._slots: Any = None
        if on_gpu and isinstance(model, nn.Module) and not has_packed_form(model):
            from statescan.generate import attention_graphs

            if attention_graphs.refuses(self.decoder) is None:
                self._slots = self._slots_or_none(attention_graphs.AttentionGraphDecoder)
        elif on_gpu and isinstance(model, nn.Module):
            from statescan.generate import graphs

            if self.decoder.dtype == "int8":
                raise ConfigError(
                    f"Engine: dtype 'int8' runs on the CPU, got device {self.device}; use 'bfloat16' there"
                )
            if graphs.refuses(self.decoder) is None:
                self._slots = self._slots_or_none(graphs.GraphDecoder)

    def _slots_or_none(self, kind: Callable[..., DrawingSlots]) -> DrawingSlots | None:
        """Slots all of whose kernels are there, or None where one can't be made here: warned of, with the cause. A step
        that fails in the middle of a text would take it along."""
        try:
            slots = kind(self.decoder, self.max_batch, self.tokenizer.vocab_size)
            sizes = {bucket(rows, self.max_batch) for rows in range(1, self.max_batch + 1)}
            with _cuda.rehearsal(), torch.no_grad(), torch.cuda.device(self.device):
                # The largest first: what it takes for a moment, the smaller ones take again.
                for size in sorted(sizes, reverse=True):
                    with contextlib.suppress(torch.OutOfMemoryError):  # the step itself may yet have room
                        slots._rehearse(size)
                        slots._launch_draw(slots.logits, 0, size)
        except BackendUnavailableError as problem:
            warnings.warn(f"Engine: a step runs op by op instead of as one CUDA graph: {problem}", stacklevel=3)
            return None
        return slots

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        stream: Callable[[int, str], object] | None = None,
    ) -> list[Generation]:
        """Writes on from every prompt.

        Args:
            prompts: texts or token ids, of any lengths; a single text is a batch of one. A text gets the tokens that
                its tokenizer adds (a Llama's ``<s>``), ids are taken as they are. An empty prompt starts from the token
                that begins a text (else the one that ends it), bytes from a new line.
            params: one for all, or one each. Default: `SamplingParams()`.
            stream: called with (row, text) as text becomes safe to show; the texts of a row join to its result.

        Returns:
            One `Generation` a prompt, in their order.

        Raises:
            DataError: a prompt holds a token that the model doesn't know.
            ConfigError: another number of params than of prompts.
        """
        results: dict[int, Generation] = {}
        for piece in self.stream(prompts, params):
            if stream is not None and piece.text:
                stream(piece.row, piece.text)
            if piece.generation is not None:
                results[piece.row] = piece.generation
        return [results[row] for row in range(len(results))]

    def stream(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Piece]:
        """Yields the text of every row as it comes; arguments as in `generate`. Prompts are checked at once."""
        ids = [read_prompt(prompt, self.tokenizer) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        each = row_params(SamplingParams() if params is None else params, [tuple(prompt) for prompt in ids])
        rows = [
            _Row(index, prompt, own, self.tokenizer, None)
            for index, (prompt, own) in enumerate(zip(ids, each, strict=True))
        ]
        return self._run(rows)

    def open(self, prompt: Prompt = "") -> Session:
        """Reads a prompt and keeps the state after it; `resume` writes on from there. Nothing is read twice."""
        session = Session()
        tokens = read_prompt(prompt, self.tokenizer)
        session._state = self.decoder.init_state(1)
        # The last token stays out, since writing starts from the logits after it.
        if len(tokens) > 1:
            self._prefill(tokens[:-1], session._state)
        session.tokens, session._pending = tokens, tokens[-1:]
        return session

    def resume(
        self,
        session: Session,
        params: SamplingParams | None = None,
        *,
        prompt: Prompt | None = None,
        stream: Callable[[int, str], object] | None = None,
    ) -> Generation:
        """Writes on where a session stands, after reading `prompt` if there is one; the session then stands at its end.

        Equal to generating from all tokens so far, to rounding (they were read in other pieces). `prompt` goes on after
        them: no tokens are added to its text, and an empty one is nothing.
        """
        tokens = [] if prompt is None else read_prompt(prompt, self.tokenizer, begins=False)
        own = row_params(SamplingParams() if params is None else params, [()])[0]
        row = _Row(0, tokens, own, self.tokenizer, session)
        for piece in self._run([row]):
            if stream is not None and piece.text:
                stream(0, piece.text)
        assert row.result is not None
        return row.result

    def _run(self, rows: Sequence[_Row]) -> Iterator[Piece]:
        if self._slots is not None:
            return run_ahead(self._slots, rows, self.max_batch, self.prefill_chunk)
        return self._run_in_step(rows)

    def _run_in_step(self, rows: Sequence[_Row]) -> Iterator[Piece]:
        waiting, live = deque(rows), list[_Row]()
        state: Any = None
        with torch.inference_mode():
            while waiting or live:
                joining: list[tuple[_Row, Any]] = []
                while waiting and len(live) + len(joining) < self.max_batch:
                    row = waiting.popleft()
                    own = self.decoder.init_state(1) if row.session is None else row.session._state.select([0])
                    piece = row.draw(self._logits(self._prefill(row.unread, own))[0])
                    if row.result is None:
                        joining.append((row, own))
                    else:
                        self._leave(row, own)
                    yield piece
                if joining:
                    live, state = self._join(live, state, joining)
                if not live:
                    continue
                last = torch.tensor([row.tokens[-1] for row in live], device=self.device)
                logits = self._logits(self.decoder.step(last, state))
                # All rows draw before the first piece goes out, so that one who stops listening leaves nothing half
                # done.
                pieces = [row.draw(logits[i]) for i, row in enumerate(live)]
                stay = [i for i, row in enumerate(live) if row.result is None]
                if len(stay) < len(live):
                    for i, row in enumerate(live):
                        if row.result is not None and row.session is not None:
                            self._leave(row, state.select([i]))
                    state = state.select(stay) if stay else None
                    live = [live[i] for i in stay]
                yield from pieces

    def _prefill(self, tokens: list[int], state: Any) -> Tensor:
        """Reads tokens into a state of one row; returns the logits after the last one, (1, vocab)."""
        if self._slots is not None:
            return self._slots.prefill([tokens], state, self.prefill_chunk).reshape(1, -1)
        logits = None
        for start in range(0, len(tokens), self.prefill_chunk):
            ids = torch.tensor([tokens[start : start + self.prefill_chunk]], device=self.device)
            logits = self.decoder.prefill(ids, state, logits="last")
        assert logits is not None
        return logits.reshape(1, -1)

    def _logits(self, logits: Tensor) -> Tensor:
        """Without the columns that only pad the vocabulary."""
        return logits[:, : self.tokenizer.vocab_size].float().cpu()

    def _join(self, live: list[_Row], state: Any, joining: list[tuple[_Row, Any]]) -> tuple[list[_Row], Any]:
        together = self.decoder.init_state(len(live) + len(joining))
        for i in range(len(live)):
            together.assign(i, state.select([i]))
        for i, (_, own) in enumerate(joining, start=len(live)):
            together.assign(i, own)
        return live + [row for row, _ in joining], together

    @staticmethod
    def _leave(row: _Row, own: Any) -> None:
        if row.session is not None:
            row.session.tokens = row.seen_before + row.tokens
            row.session._state = own
            row.session._pending = row.tokens[-1:]


def has_packed_form(model: nn.Module) -> bool:
    """Whether `PackedModel` and the kernels over whole blocks know a language model's layers."""
    return getattr(getattr(model, "config", None), "is_plain_mamba", False)


def _decoder(model: nn.Module, dtype: str, device: torch.device | str | None) -> Any:
    from statescan.models import CausalLM

    device = None if device is None else usable_device("Engine: device", device)
    if isinstance(model, CausalLM) and not has_packed_form(model):
        from statescan.generate.unpacked import ModelDecoder

        return ModelDecoder(model, dtype, device=device)
    from statescan.generate.packed import PackedModel

    return PackedModel(model, dtype=dtype, device=device)  # type: ignore[arg-type]


def default_tokenizer(model: Any) -> ByteTokenizer:
    """Bytes, where the model has 256 tokens."""
    vocab = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab not in (None, 256):
        raise ConfigError(
            f"generate: tokenizer must be given for a model of {vocab} tokens (only 256 are bytes), got none; "
            "use statescan.data.load_tokenizer(path)"
        )
    return ByteTokenizer()


def read_prompt(prompt: Prompt, tokenizer: Any, *, begins: bool = True) -> list[int]:
    """Token ids of a prompt, checked.

    Args:
        prompt: a text or ids.
        tokenizer: the model's.
        begins: a text gets the tokens that the tokenizer adds to one, and nothing at all becomes the tokenizer's start;
            else the prompt goes on after other tokens, and is taken as it is. Default True.
    """
    if isinstance(prompt, str):
        adds = begins and getattr(tokenizer, "adds_special_tokens", False)
        encoded = encode_texts(tokenizer, [prompt], prefix_token(tokenizer))[0] if adds else tokenizer.encode(prompt)
        ids = [int(token) for token in encoded]
    elif isinstance(prompt, (np.ndarray, Tensor)):
        if prompt.ndim != 1:
            raise DataError(f"generate: a prompt of token ids must be one-dimensional, got {tuple(prompt.shape)}")
        ids = [int(token) for token in prompt.tolist()]
    else:
        ids = [int(token) for token in prompt]
    if not ids and not begins:
        return []
    if not ids:
        # A model predicts from at least one token. Bytes begin after a line's end, not after the NUL
        # between two documents.
        start = prefix_token(tokenizer)
        if start is None or tokenizer.decode([start]) == "\0":
            ids = [int(token) for token in tokenizer.encode("\n")]
        else:
            ids = [start]
    if min(ids) < 0 or max(ids) >= tokenizer.vocab_size:
        raise DataError(
            f"generate: a prompt's tokens must lie in [0, {tokenizer.vocab_size}), got {min(ids)} to {max(ids)}; "
            "encode it with the model's tokenizer"
        )
    return ids


def generate(
    model: nn.Module | Decoder,
    prompts: str | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    stream: Callable[[int, str], object] | None = None,
    device: torch.device | str | None = None,
) -> list[Generation]:
    """Writes on from every prompt with an `Engine` made for this call; see there for the arguments.

    Example:
        >>> from statescan.models import CausalLM, preset
        >>> from statescan.generate import SamplingParams, generate
        >>> result = generate(CausalLM(preset("tiny")), "Call me", SamplingParams(max_new_tokens=4))
        >>> len(result[0].tokens)
        4
    """
    return Engine(model, tokenizer, dtype, device=device).generate(prompts, params, stream)
