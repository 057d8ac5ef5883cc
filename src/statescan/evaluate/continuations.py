"""Log-likelihoods of continuations after contexts, every shared beginning read once: its state is copied."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from statescan.data.tokenizer import encode_texts
from statescan.errors import ConfigError, DataError
from statescan.models import CausalLM, MambaConfig
from statescan.ops._checks import mark_checked

__all__ = [
    "Likelihood",
    "LogitsReader",
    "Reader",
    "Request",
    "StateReader",
    "encode_pairs",
    "longest_input",
    "shorter",
]

Progress = Callable[[int, int], object]

# Numbers in one piece of logits: 256 MB in float32, and 1 GB on a GPU; their logarithms take as much again.
_LOGITS, _LOGITS_ON_GPU = 1 << 26, 1 << 28
# Tokens read at once (large: more than 40 GB), and bytes of the states that go into one reading (as many come out); on
# a GPU a tenth of its memory.
_TOKENS, _TOKENS_ON_GPU, _TOKENS_ON_LARGE_GPU = 4096, 32768, 65536
_STATES = 1 << 29
# A shared run shorter than this is read again: copying a state costs as much as some tokens, and on a GPU a small
# batch as much as a larger one.
_SHORTEST_SHARED, _SHORTEST_SHARED_ON_GPU = 4, 8
# Batches that a GPU may have before it.
_AHEAD = 3


class Request(NamedTuple):
    """What is asked: the log-likelihood of `continuation` after `context`, both token ids of at least one token."""

    context: Sequence[int] | NDArray[Any]
    continuation: Sequence[int] | NDArray[Any]


# What published configurations call the length of a model, in the order in which lm-eval asks for it.
_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")


def longest_input(config: Any) -> int | None:
    """The most tokens that a model's configuration says it reads, None where it says nothing.

    Args:
        config: with `transformers`' attributes, or one of this package's, where a table of positions alone is a limit.
    """
    if getattr(config, "positions", None) == "absolute":
        return config.max_positions
    lengths = (getattr(config, name, None) for name in _LENGTHS)
    return next((int(length) for length in lengths if isinstance(length, int)), None)


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

    A space at the context's end goes to the continuation; both are encoded together, with the tokens that the tokenizer
    adds, and cut where the context alone ends. A continuation without context is judged after `prefix`.

    Args:
        tokenizer: as in `statescan.data.tokenizer.encode_texts`.
        pairs: (context, continuation).
        prefix: id of the token that begins a text; see `statescan.data.tokenizer.prefix_token`.

    Raises:
        DataError: a continuation is empty or has no token of its own, or there is neither a context nor a prefix.
    """
    moved = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        moved.append((stripped, context[len(stripped) :] + continuation))
    # Where ids don't depend on what is on the other side of a space, a context is encoded once for all that follows.
    at_spaces = getattr(tokenizer, "splits_at_spaces", False) and not getattr(tokenizer, "adds_special_tokens", False)
    apart = [
        at_spaces and bool(context) and after[:1] == " " and not after[1:2].isspace() and len(after) > 1
        for context, after in moved
    ]
    # What follows a context alone, and what has none, is a piece of a text: nothing is added to it.
    alone = [given or context == "" for given, (context, _) in zip(apart, pairs, strict=True)]
    whole_texts, pieces = {}, {}
    for (context, after), piece in zip(moved, alone, strict=True):
        whole_texts[context] = None
        (pieces if piece else whole_texts)[after if piece else context + after] = None
    wholes = dict(zip(whole_texts, encode_texts(tokenizer, list(whole_texts), prefix), strict=True))
    plain = dict(zip(pieces, tokenizer.encode_batch(list(pieces)), strict=True))
    requests = []
    for (given, _), (context, continuation), piece in zip(pairs, moved, alone, strict=True):
        before = wholes[context] if given else ()
        after = plain[continuation] if piece else wholes[context + continuation][len(before) :]
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
        parts = [np.asarray(part) for request in requests for part in request]
        sizes = np.array([len(part) for part in parts], dtype=np.int64).reshape(-1, 2)
        context, after = sizes[:, 0], sizes[:, 1]
        for number in np.flatnonzero((context == 0) | (after == 0))[:1]:
            raise DataError(
                f"evaluate: a context and a continuation must hold at least one token each, got {context[number]} and "
                f"{after[number]}; begin with the tokenizer's end-of-text token"
            )
        for number in np.flatnonzero(after > max_length)[:1] if max_length is not None else ():
            raise DataError(
                f"evaluate: a continuation must be no longer than max_length = {max_length} tokens, got "
                f"{after[number]}; raise max_length (--context), but a model's own length is the most there is"
            )
        tokens = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
        if vocab is not None and len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab):
            raise DataError(
                f"evaluate: tokens must lie in the model's vocabulary [0, {vocab}), got {tokens.min()} to "
                f"{tokens.max()}; use the tokenizer that the model was trained with"
            )
        end = np.cumsum(context + after)
        begin = end - (context + after if max_length is None else np.minimum(context + after, max_length + 1))
        # Big-endian bytes sort as the tokens do, a beginning before what goes on from it.
        sortable = tokens.astype(">u4").tobytes()
        keys = [sortable[4 * low : 4 * (high - 1)] for low, high in zip(begin.tolist(), end.tolist(), strict=True)]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.order = order
        first = [i for i, index in enumerate(order) if i == 0 or keys[index] != keys[order[i - 1]]]
        # The request (in `order`) at which each sequence's begin, and the end.
        self.first = np.array([*first, len(order)], dtype=np.int64)
        low, high = begin[order], end[order]
        self.sequences = [tokens[low[i] : high[i] - 1] for i in first]
        self.common = _common(tokens, low[first], (high - low)[first] - 1)
        count = after[order]
        self.length = high - low - 1
        self.start = self.length - count
        self.offset = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
        self.targets = tokens[_ranges(high - count, count)]
        self.logprob = np.zeros(len(order))
        self.greedy = np.ones(len(order), dtype=bool)

    def wanted(self, nodes: Sequence[_Node]) -> tuple[NDArray[np.int64], ...]:
        """What is judged at the tokens of nodes that are read one after the other, in order of their places among them:
        (place, target, request), one entry each."""
        begin, end = (np.array([getattr(node, name) for node in nodes], dtype=np.int64) for name in ("begin", "end"))
        first, last = (self.first[[getattr(node, name) for node in nodes]] for name in ("first", "last"))
        request = _ranges(first, last - first)
        node = np.repeat(np.arange(len(nodes)), last - first)
        low = np.maximum(self.start[request], begin[node])
        counts = np.maximum(np.minimum(self.length[request], end[node]) - low, 0)
        position = _ranges(low, counts)
        node, request = np.repeat(node, counts), np.repeat(request, counts)
        place = position + (np.cumsum(end - begin) - end)[node]
        # What is judged at one token stands side by side: its logits are made once.
        order = np.argsort(place, kind="stable")
        target = self.targets[self.offset[request] + position - self.start[request]]
        return place[order], target[order], request[order]

    def take(self, request: NDArray[np.int64], logprob: NDArray[np.float64], greedy: NDArray[np.bool_]) -> None:
        np.add.at(self.logprob, request, logprob)
        np.logical_and.at(self.greedy, request, greedy)

    def results(self) -> list[Likelihood]:
        results: list[Any] = [None] * len(self.order)
        for index, logprob, greedy in zip(self.order, self.logprob.tolist(), self.greedy.tolist(), strict=True):
            results[index] = Likelihood(logprob, greedy)
        return results


def _ranges(begin: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """begin[i], begin[i] + 1, ..., count[i] numbers, for one i after the other."""
    return np.arange(count.sum()) + np.repeat(begin - (np.cumsum(count) - count), count)


def _common(tokens: NDArray[np.int64], begin: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many tokens each sequence and the next one begin with alike."""
    most = np.minimum(length[:-1], length[1:])
    alike = np.empty_like(most)
    # A million tokens at once, whose places take more memory than they do.
    pieces = np.searchsorted(np.cumsum(most), np.arange(0, most.sum() + 1, 1 << 20), side="right").tolist()
    for low, high in pairwise([*dict.fromkeys([0, *pieces]), len(most)]):
        count = most[low:high]
        differ = np.flatnonzero(
            tokens[_ranges(begin[low:high], count)] != tokens[_ranges(begin[low + 1 : high + 1], count)]
        )
        until = np.cumsum(count)
        # The first difference from where a pair's tokens begin on, if it lies before their end.
        found = np.append(differ, until[-1:])[np.searchsorted(differ, until - count)]
        alike[low:high] = np.minimum(found, until) - (until - count)
    return alike


@dataclass(slots=True)
class _Node:
    """A run of tokens that the sequences first..last have in common, after what its parent read."""

    first: int
    last: int
    begin: int
    end: int
    children: list[_Node] = field(default_factory=list)


def _tree(work: _Prepared, share: bool, longest: int, shortest: int) -> list[_Node]:
    """Sorted distinct sequences as runs of tokens to read, none longer than `longest`; beginnings that are shared on at
    least `shortest` tokens once."""
    sequences = work.sequences
    count = len(sequences)
    common: list[int] = work.common.tolist() if share else [0] * max(count - 1, 0)
    roots: list[_Node] = []
    open_runs = [(0, count, 0, roots)] if count else []
    while open_runs:
        first, last, depth, siblings = open_runs.pop()
        enough = depth + shortest
        bounds = [first, *(i + 1 for i in range(first, last - 1) if common[i] < enough), last]
        for low, high in pairwise(bounds):
            end = len(sequences[low]) if high - low == 1 else min(common[low : high - 1])
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


class StateReader:
    """Judges continuations with a statescan model: packed batches, shared beginnings read once.

    All requests' inputs form a tree; each run of tokens that several begin with (a question before its choices, the
    examples before a question) is read once, and those that go on from it start from a copy of its state. Sequences are
    packed end to end, so nothing is padded, and logits are made only where they are asked for.

    Args:
        model: a `CausalLM`, on any device; it is put into evaluation mode. Only Mamba's share beginnings.
        max_length: only the last so many tokens of an input are read, as lm-eval does; None: all. Default 2048, the
            length that the published models were judged at. Never more than a table of absolute positions has.
        batch_tokens: tokens read at once; longer inputs are read in pieces. Default 4096; on a GPU 32768, with
            more than 40 GB 65536.
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
        self.max_length = shorter(max_length, longest_input(model.config))
        # Other models' states are not copied row by row here: their inputs are read whole.
        self._carries = isinstance(model.config, MambaConfig)
        self.share = share and self._carries
        self.device = model.backbone.embedding.weight.device
        tokens, room, self._shortest = _TOKENS, _STATES, _SHORTEST_SHARED
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
            tokens = _TOKENS_ON_LARGE_GPU if memory > 40e9 else _TOKENS_ON_GPU
            room, self._shortest = memory // 10, _SHORTEST_SHARED_ON_GPU
        self.batch_tokens = batch_tokens or tokens
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
        roots = _tree(work, self.share, longest, self._shortest)
        total = sum(node.end - node.begin for node in _walk(roots))
        begun = self.tokens_read
        with torch.inference_mode():
            # Deepest first: what hangs on a batch is read before the next one, so that few states live at once, and
            # none for longer than something waits for it.
            waiting: list[tuple[deque[list[_Placed]], Any]] = [
                (self._batches([(node, 0) for node in roots if bool(node.children) == inner], inner), None)
                for inner in (True, False)
            ]
            answers: deque[_Answer] = deque()
            while waiting:
                group, before = waiting.pop()
                if not group:
                    continue
                batch = group.popleft()
                # A leaf at the root neither starts from a state nor leaves one.
                stateful = before is not None or bool(batch[0][0].children)
                waiting.append((group, before if group else None))
                state, answer = self._run(work, batch, before, stateful)
                hanging = [(child, row) for row, (node, _) in enumerate(batch) for child in node.children]
                waiting.append((self._batches(hanging, True), state))
                del before, state
                if answer is not None:
                    answers.append(answer)
                # A GPU computes while the host makes the next batches ready, a few ahead.
                while len(answers) > _AHEAD:
                    work.take(*answers.popleft().read())
                if progress is not None:
                    progress(self.tokens_read - begun, total)
            for answer in answers:
                work.take(*answer.read())
        return work.results()

    def _batches(self, nodes: list[_Placed], stateful: bool) -> deque[list[_Placed]]:
        """Nodes as batches of about one size, the longest first: what doesn't fit into memory fails at once."""
        if not nodes:
            return deque()
        nodes = sorted(nodes, key=lambda pair: pair[0].begin - pair[0].end)
        lengths = np.array([node.end - node.begin for node, _ in nodes])
        total = int(lengths.sum())
        even = max(math.ceil(total / math.ceil(total / self.batch_tokens)), int(lengths[0]))
        batches: deque[list[_Placed]] = deque()
        tokens = 0
        for pair, length in zip(nodes, lengths.tolist(), strict=True):
            full = tokens >= even or tokens + length > self.batch_tokens
            if not batches or full or (stateful and len(batches[-1]) == self._most_states):
                batches.append([])
                tokens = 0
            batches[-1].append(pair)
            tokens += length
        return batches

    def _run(self, work: _Prepared, batch: list[_Placed], before: Any, stateful: bool) -> tuple[Any, _Answer | None]:
        nodes = [node for node, _ in batch]
        tokens = np.concatenate([work.sequences[node.first][node.begin : node.end] for node in nodes])
        bounds = np.cumsum([0, *(node.end - node.begin for node in nodes)])
        place, target, request = work.wanted(nodes)
        distinct, which = np.unique(place, return_inverse=True)
        packed, offsets, rows, where, of_row, aim = _send(
            self.device, tokens, bounds, np.array([row for _, row in batch]), distinct, which, target
        )
        state = None
        if before is not None:
            state = tuple(type(one)(*(part.index_select(0, rows) for part in one)) for one in before)
        elif stateful:
            state = self.model.init_state(len(batch))
        cu_seqlens = None
        if len(batch) > 1:
            cu_seqlens = offsets.to(torch.int32)
            mark_checked(cu_seqlens, len(tokens))
        output = self.model.backbone(packed.unsqueeze(0), cu_seqlens=cu_seqlens, state=state)
        self.tokens_read += len(tokens)
        if not len(place):
            return output.state, None
        hidden = output.hidden[0].index_select(0, where)
        return output.state, _Answer(request, *_judge(hidden, which, of_row, aim, self.model.lm_head))


def _walk(nodes: list[_Node]) -> Iterator[_Node]:
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.children)


def _send(device: torch.device, *arrays: NDArray[np.int64]) -> tuple[Tensor, ...]:
    """Whole numbers to a device, in one copy that the host does not wait for."""
    tensor = torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device).split([len(array) for array in arrays])


class _Answer:
    """What is on its way to the host: log-probabilities and whether they are the largest, one a wanted token."""

    def __init__(self, request: NDArray[np.int64], logprob: Tensor, greedy: Tensor) -> None:
        self.request = request
        on_gpu = logprob.device.type == "cuda"
        self._values = torch.stack([logprob, greedy.to(logprob.dtype)]).to("cpu", non_blocking=on_gpu)
        self._there = torch.cuda.current_stream(logprob.device).record_event() if on_gpu else None

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
        if self._there is not None:
            self._there.synchronize()
        logprob, greedy = self._values.numpy()
        return self.request, logprob, greedy != 0


def _judge(
    rows: Tensor, which: NDArray[np.int64], of_row: Tensor, aim: Tensor, head: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and whether it is the likeliest, a piece of the vocabulary's table at a time.

    Args:
        rows: (rows, d_model) hidden states, or logits where there is no head.
        which: the row that each target is judged at, never falling; of_row: the same on the rows' device.
        aim: the targets.
        head: gives the logits of rows.
    """
    width = rows.shape[-1] if head is None else int(getattr(head, "out_features", rows.shape[-1]))
    size = max(1, _logits_at_once(rows.device) // width)
    bounds = np.searchsorted(which, np.arange(0, len(rows) + size, size)).tolist()
    logprobs, greedy = [], []
    for piece, (low, high) in enumerate(pairwise(bounds)):
        part = rows[piece * size : (piece + 1) * size]
        logits = part if head is None else head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        row, target = of_row[low:high] - piece * size, aim[low:high]
        logprobs.append(logits.log_softmax(-1)[row, target].double())
        greedy.append(logits.argmax(-1)[row] == target)
    return torch.cat(logprobs), torch.cat(greedy)


class LogitsReader:
    """Judges continuations with any causal model that gives logits for a batch of ids, reading every input whole.

    Inputs are batched by length and padded on the right, where no causal model looks.

    Args:
        model: called with (batch, length) int64 ids; gives logits (batch, length, vocabulary), or an object that holds
            them as `logits`.
        device: where the ids go. Default: that of the model's parameters.
        max_length: only the last so many tokens of an input are read; None: all. Default 2048. Never more than
            `longest_input` of the model's ``config``.
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
        config: Any = getattr(model, "config", None)
        self.max_length = shorter(max_length, longest_input(getattr(config, "text_config", None) or config))
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        tokens = batch_tokens or (_TOKENS_ON_GPU if self.device.type == "cuda" else _TOKENS)
        vocab = vocab_size or getattr(config, "vocab_size", None)
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
                for row, index in enumerate(batch):
                    ids[row, : len(work.sequences[index])] = work.sequences[index]
                # Each input padded to the batch's length, read as one node.
                nodes = [_Node(index, index + 1, 0, length) for index in batch]
                place, target, request = work.wanted(nodes)
                distinct, which = np.unique(place, return_inverse=True)
                flat, where, of_row, aim = _send(self.device, ids.reshape(-1), distinct, which, target)
                output = self.model(flat.view(len(batch), length))
                logits = getattr(output, "logits", output).flatten(0, 1).index_select(0, where)
                work.take(*_Answer(request, *_judge(logits, which, of_row, aim, None)).read())
                self.tokens_read += sum(len(work.sequences[index]) for index in batch)
                if progress is not None:
                    progress(self.tokens_read - begun, total)
        return work.results()


def shorter(max_length: int | None, longest: int | None) -> int | None:
    """The lesser of two limits, None where there is none."""
    return min((length for length in (max_length, longest) if length is not None), default=None)


def _logits_at_once(device: torch.device) -> int:
    return _LOGITS_ON_GPU if device.type == "cuda" else _LOGITS


def _check_sizes(max_length: int | None, batch_tokens: int | None) -> None:
    for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"evaluate: {name} must be at least 1, got {value}")
