"""Log-likelihoods of continuations after contexts, every shared beginning read once: its state is copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from statescan.errors import ConfigError, DataError
from statescan.models import CausalLM, MambaConfig

__all__ = ["Likelihood", "LogitsReader", "Reader", "Request", "StateReader", "encode_pairs"]

Progress = Callable[[int, int], object]

# Numbers in one piece of logits: 256 MB in float32, and 1 GB on a GPU.
_LOGITS, _LOGITS_ON_GPU = 1 << 26, 1 << 28
# Tokens read at once, and bytes of the states that go into one reading (as many come out).
_TOKENS, _TOKENS_ON_GPU = 4096, 32768
_STATES, _STATES_ON_GPU = 1 << 29, 1 << 32
# A shared run shorter than this is read again: copying a state costs as much as some tokens.
_SHORTEST_SHARED = 4


class Request(NamedTuple):
    """What is asked: the log-likelihood of `continuation` after `context`, both token ids of at least one token."""

    context: Sequence[int] | NDArray[Any]
    continuation: Sequence[int] | NDArray[Any]


class Likelihood(NamedTuple):
    """logprob: sum of the natural-log probabilities of the continuation's tokens; greedy: each was the likeliest."""

    logprob: float
    greedy: bool


class Reader(Protocol):
    """What judges continuations: `StateReader`, `LogitsReader`, or anything with this method."""

    def score(self, requests: Sequence[Request], /, progress: Progress | None = None) -> list[Likelihood]: ...


class _Encoder(Protocol):
    def encode_batch(self, texts: Sequence[str], /) -> list[NDArray[Any]]: ...


def encode_pairs(tokenizer: _Encoder, pairs: Sequence[tuple[str, str]], prefix: int | None) -> list[Request]:
    """Texts to requests, as lm-eval cuts them.

    A space at the context's end goes to the continuation; both are encoded together and cut where the context alone
    ends. A continuation without context is judged after `prefix`.

    Args:
        tokenizer: with ``encode_batch``.
        pairs: (context, continuation).
        prefix: id of the token that begins a text (its end-of-text token, as a rule).

    Raises:
        DataError: a continuation is empty or has no token of its own, or there is neither a context nor a prefix.
    """
    moved = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        moved.append((stripped, context[len(stripped) :] + continuation))
    contexts = sorted({context for context, _ in moved if context})
    ids_of = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    requests = []
    for (context, continuation), whole in zip(moved, wholes, strict=True):
        before = ids_of[context] if context else whole[:0]
        after = whole[len(before) :]
        if len(before) == 0 and len(after):
            if prefix is None:
                raise DataError(
                    f"evaluate: the continuation {_short(continuation)} has no context, and the tokenizer has no token "
                    "that begins a text; give a context"
                )
            # A text that begins with that very token is judged on what follows it.
            before, after = (after[:1], after[1:]) if after[0] == prefix else ([prefix], after)
        if len(after) == 0:
            raise DataError(
                f"evaluate: a continuation must hold a token of its own, got {_short(continuation)} after "
                f"{_short(context)}; cut the text elsewhere"
            )
        requests.append(Request(before, after))
    return requests


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


class _Prepared:
    """Requests as arrays: distinct inputs in order of their tokens, and what each request reads of which.

    A request's input is context + continuation without its last token; from position ``start`` on each is judged.
    """

    def __init__(self, requests: Sequence[Request], max_length: int | None, vocab: int | None) -> None:
        inputs, starts, targets = [], [], []
        for request in requests:
            context = np.asarray(request.context, dtype=np.int64)
            after = np.asarray(request.continuation, dtype=np.int64)
            if len(context) == 0 or len(after) == 0:
                raise DataError(
                    f"evaluate: a context and a continuation must hold at least one token each, got {len(context)} and "
                    f"{len(after)}; begin with the tokenizer's end-of-text token"
                )
            whole = np.concatenate([context, after])
            if max_length is not None:
                if len(after) > max_length:
                    raise DataError(
                        f"evaluate: a continuation must be no longer than max_length = {max_length} tokens, got "
                        f"{len(after)}; raise max_length"
                    )
                whole = whole[-(max_length + 1) :]
            if vocab is not None and (whole.min() < 0 or whole.max() >= vocab):
                raise DataError(
                    f"evaluate: tokens must lie in the model's vocabulary [0, {vocab}), got {whole.min()} to "
                    f"{whole.max()}; use the tokenizer that the model was trained with"
                )
            inputs.append(whole[:-1])
            starts.append(len(whole) - 1 - len(after))
            targets.append(after)
        # Big-endian bytes sort as the tokens do, a beginning before what goes on from it.
        keys = [tokens.astype(">u4").tobytes() for tokens in inputs]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.order = order
        self.sequences: list[NDArray[np.int64]] = []
        self.first: list[int] = []  # request (in `order`) at which each sequence's begin, and the end
        for place, index in enumerate(order):
            if place == 0 or keys[index] != keys[order[place - 1]]:
                self.sequences.append(inputs[index])
                self.first.append(place)
        self.first.append(len(order))
        self.start = np.array([starts[index] for index in order], dtype=np.int64)
        self.targets = np.concatenate([targets[index] for index in order]) if order else np.empty(0, np.int64)
        self.offset = np.concatenate([[0], np.cumsum([len(targets[index]) for index in order])]).astype(np.int64)
        self.length = self.start + np.diff(self.offset)
        self.logprob = np.zeros(len(order))
        self.greedy = np.ones(len(order), dtype=bool)

    def wanted(self, first: int, last: int, begin: int, end: int) -> tuple[NDArray[np.int64], ...]:
        """What requests first..last read at positions begin..end: (position, target, request), one entry each."""
        low = np.maximum(self.start[first:last], begin)
        high = np.minimum(self.length[first:last], end)
        counts = np.maximum(high - low, 0)
        request = np.repeat(np.arange(first, last), counts)
        within = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
        position = np.repeat(low, counts) + within
        return position, self.targets[self.offset[request] + position - self.start[request]], request

    def take(self, request: NDArray[np.int64], logprob: NDArray[np.float64], greedy: NDArray[np.bool_]) -> None:
        np.add.at(self.logprob, request, logprob)
        np.logical_and.at(self.greedy, request, greedy)

    def results(self) -> list[Likelihood]:
        results: list[Any] = [None] * len(self.order)
        for place, index in enumerate(self.order):
            results[index] = Likelihood(float(self.logprob[place]), bool(self.greedy[place]))
        return results


@dataclass
class _Node:
    """A run of tokens that the sequences first..last have in common, after what its parent read."""

    first: int
    last: int
    begin: int
    end: int
    children: list[_Node] = field(default_factory=list)


def _tree(sequences: Sequence[NDArray[np.int64]], share: bool, longest: int) -> list[_Node]:
    """Sorted distinct sequences as runs of tokens to read, none longer than `longest`, shared beginnings once."""
    count = len(sequences)
    common = np.zeros(max(count - 1, 0), dtype=np.int64)
    for i in range(count - 1) if share else ():
        a, b = sequences[i], sequences[i + 1]
        length = min(len(a), len(b))
        differ = np.flatnonzero(a[:length] != b[:length])
        common[i] = differ[0] if len(differ) else length
    roots: list[_Node] = []
    open_runs = [(0, count, 0, roots)] if count else []
    while open_runs:
        first, last, depth, siblings = open_runs.pop()
        cuts = np.flatnonzero(common[first : max(last - 1, first)] - depth < _SHORTEST_SHARED) + first + 1
        bounds = [first, *cuts.tolist(), last]
        for low, high in pairwise(bounds):
            end = len(sequences[low]) if high - low == 1 else int(common[low : high - 1].min())
            place = siblings
            for begin in range(depth, end, longest):
                node = _Node(low, high, begin, min(begin + longest, end))
                place.append(node)
                place = node.children
            if high - low > 1:
                # A sequence that ends here is read; it sorts before those that go on.
                rest = low + (len(sequences[low]) == end)
                open_runs.append((rest, high, end, place))
    return roots


# A node and the row of its parent's states that it starts from.
_Placed = tuple[_Node, int]


def _by_length(nodes: Iterable[_Placed]) -> deque[_Placed]:
    """Longest first: what doesn't fit into memory fails at once."""
    return deque(sorted(nodes, key=lambda pair: pair[0].begin - pair[0].end))


class StateReader:
    """Judges continuations with a statescan model: packed batches, shared beginnings read once.

    All requests' inputs form a tree; each run of tokens that several begin with (a question before its choices, the
    examples before a question) is read once, and those that go on from it start from a copy of its state. Sequences are
    packed end to end, so nothing is padded, and logits are made only where they are asked for.

    Args:
        model: a `CausalLM`, on any device; it is put into evaluation mode. Only Mamba's share beginnings.
        max_length: only the last so many tokens of an input are read, as lm-eval does; None: all. Default 2048, the
            length that the published models were judged at.
        batch_tokens: tokens read at once; longer inputs are read in pieces. Default 4096, on a GPU 32768.
        share: False reads every context again for every continuation. Default True.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        max_length: int | None = 2048,
        batch_tokens: int | None = None,
        share: bool = True,
    ) -> None:
        _check_sizes(max_length, batch_tokens)
        self.model = model.eval()
        self.max_length = max_length
        # Other models' states are not copied row by row here: their inputs are read whole.
        self._carries = isinstance(model.config, MambaConfig)
        self.share = share and self._carries
        self.device = model.backbone.embedding.weight.device
        on_gpu = self.device.type == "cuda"
        self.batch_tokens = batch_tokens or (_TOKENS_ON_GPU if on_gpu else _TOKENS)
        room = _STATES_ON_GPU if on_gpu else _STATES
        self._most_states = max(1, room // model.state_bytes(1)) if self._carries else 1
        self.tokens_read = 0

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Likelihood]:
        """The log-likelihood of each request's continuation, in their order.

        Args:
            requests: tokens of the model's vocabulary.
            progress: called with (tokens read, tokens to read).

        Raises:
            DataError: an empty context or continuation, one longer than `max_length`, or an unknown token.
        """
        work = _Prepared(requests, self.max_length, self.model.config.padded_vocab_size)
        longest = self.batch_tokens if self._carries else max(map(len, work.sequences), default=1)
        roots = _tree(work.sequences, self.share, longest)
        total = sum(node.end - node.begin for node in _walk(roots))
        begun = self.tokens_read
        with torch.inference_mode():
            # Deepest first: what hangs on a batch is read before the next one, so that few states live at once, and
            # none for longer than something waits for it.
            waiting: list[tuple[deque[_Placed], Any]] = [
                (_by_length((node, 0) for node in roots if bool(node.children) == inner), None)
                for inner in (True, False)
            ]
            while waiting:
                group, before = waiting.pop()
                if not group:
                    continue
                # A leaf at the root neither starts from a state nor leaves one.
                stateful = before is not None or bool(group[0][0].children)
                batch = self._next_batch(group, stateful)
                waiting.append((group, before if group else None))
                state = self._run(work, batch, before, stateful)
                waiting.append(
                    (_by_length((child, r) for r, (n, _) in enumerate(batch) for child in n.children), state)
                )
                del before, state
                if progress is not None:
                    progress(self.tokens_read - begun, total)
        return work.results()

    def _next_batch(self, group: deque[_Placed], stateful: bool) -> list[_Placed]:
        batch: list[_Placed] = []
        tokens = 0
        while group:
            tokens += group[0][0].end - group[0][0].begin
            if batch and (tokens > self.batch_tokens or (stateful and len(batch) == self._most_states)):
                break
            batch.append(group.popleft())
        return batch

    def _run(self, work: _Prepared, batch: list[_Placed], before: Any, stateful: bool) -> Any:
        lengths = np.array([node.end - node.begin for node, _ in batch])
        ends = np.cumsum(lengths)
        tokens = np.concatenate([work.sequences[node.first][node.begin : node.end] for node, _ in batch])
        state = None
        if before is not None:
            rows = torch.tensor([row for _, row in batch], device=self.device)
            state = tuple(type(one)(*(part.index_select(0, rows) for part in one)) for one in before)
        elif stateful:
            state = self.model.init_state(len(batch))
        packed = torch.from_numpy(tokens).to(self.device).unsqueeze(0)
        cu_seqlens = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(self.device)
        output = self.model.backbone(packed, cu_seqlens=cu_seqlens if len(batch) > 1 else None, state=state)
        self.tokens_read += len(tokens)
        found = []
        for (node, _), shift in zip(batch, ends - lengths, strict=True):
            position, target, request = work.wanted(work.first[node.first], work.first[node.last], node.begin, node.end)
            found.append((position - node.begin + shift, target, request))
        place, target, request = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if len(place):
            work.take(request, *_judge(output.hidden[0], place, target, self.model.lm_head))
        return output.state


def _walk(nodes: list[_Node]) -> Iterator[_Node]:
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.children)


def _judge(
    rows: Tensor, place: NDArray[np.int64], target: NDArray[np.int64], head: Callable[[Tensor], Tensor] | None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probability of each target at its row of hidden states (or of logits, without a head), and whether it is the
    likeliest; a row that several targets ask for is computed once."""
    distinct, which = np.unique(place, return_inverse=True)
    order = np.argsort(which, kind="stable")
    where, wanted = torch.from_numpy(which[order]).to(rows.device), torch.from_numpy(target[order]).to(rows.device)
    rows = rows.index_select(0, torch.from_numpy(distinct).to(rows.device))
    width = rows.shape[-1] if head is None else int(getattr(head, "out_features", rows.shape[-1]))
    size = max(1, _logits_at_once(rows.device) // width)
    bounds = np.searchsorted(which[order], np.arange(0, len(distinct) + size, size)).tolist()
    logprobs, greedy = [], []
    for piece, (low, high) in enumerate(pairwise(bounds)):
        part = rows[piece * size : (piece + 1) * size]
        logits = part if head is None else head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        row, aim = where[low:high] - piece * size, wanted[low:high]
        # The same as log_softmax at the target, without a second table of the logits' size.
        logprobs.append((logits[row, aim] - logits.logsumexp(-1)[row]).double())
        greedy.append(logits.argmax(-1)[row] == aim)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return torch.cat(logprobs).cpu().numpy()[back], torch.cat(greedy).cpu().numpy()[back]


class LogitsReader:
    """Judges continuations with any causal model that gives logits for a batch of ids, reading every input whole.

    Inputs are batched by length and padded on the right, where no causal model looks.

    Args:
        model: called with (batch, length) int64 ids; gives logits (batch, length, vocabulary), or an object that holds
            them as `logits`.
        device: where the ids go. Default: that of the model's parameters.
        max_length: only the last so many tokens of an input are read; None: all. Default 2048.
        batch_tokens: tokens read at once, padding included. Default 4096, on a GPU 32768; fewer where their logits
            would not fit into 256 MB (1 GB there).
        vocab_size: logits at a position; tells how many fit. Default: the model's ``config.vocab_size``.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        max_length: int | None = 2048,
        batch_tokens: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        _check_sizes(max_length, batch_tokens)
        self.model = model.eval()
        self.max_length = max_length
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        tokens = batch_tokens or (_TOKENS_ON_GPU if self.device.type == "cuda" else _TOKENS)
        vocab = vocab_size or getattr(getattr(model, "config", None), "vocab_size", None)
        self.vocab_size = vocab
        self.batch_tokens = tokens if vocab is None else max(1, min(tokens, _logits_at_once(self.device) // vocab))
        self.tokens_read = 0

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Likelihood]:
        """The log-likelihood of each request's continuation, in their order; see `StateReader.score`."""
        work = _Prepared(requests, self.max_length, self.vocab_size)
        order = sorted(range(len(work.sequences)), key=lambda i: -len(work.sequences[i]))
        total = sum(map(len, work.sequences))
        begun, done = self.tokens_read, 0
        with torch.inference_mode():
            while done < len(order):
                length = len(work.sequences[order[done]])
                batch = order[done : done + max(1, self.batch_tokens // length)]
                done += len(batch)
                ids = np.zeros((len(batch), length), dtype=np.int64)
                found = []
                for row, index in enumerate(batch):
                    sequence = work.sequences[index]
                    ids[row, : len(sequence)] = sequence
                    position, target, request = work.wanted(work.first[index], work.first[index + 1], 0, len(sequence))
                    found.append((position + row * length, target, request))
                    self.tokens_read += len(sequence)
                output = self.model(torch.from_numpy(ids).to(self.device))
                logits = getattr(output, "logits", output)
                place, target, request = (np.concatenate(parts) for parts in zip(*found, strict=True))
                work.take(request, *_judge(logits.flatten(0, 1), place, target, None))
                if progress is not None:
                    progress(self.tokens_read - begun, total)
        return work.results()


def _logits_at_once(device: torch.device) -> int:
    return _LOGITS_ON_GPU if device.type == "cuda" else _LOGITS


def _check_sizes(max_length: int | None, batch_tokens: int | None) -> None:
    for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"evaluate: {name} must be at least 1, got {value}")
