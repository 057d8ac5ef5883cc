"""Bits per byte and perplexity of held-out text, as one figure and as a curve over the position in the context."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from statescan.errors import ConfigError, DataError, MissingExtraError
from statescan.files import atomic_file

__all__ = ["Evaluation", "PositionBucket", "draw_by_position", "evaluate_tokens", "row_bits", "window_bits"]

# A forward pass holds at most so many logits (256 MB in float32, twice with their log-softmax): longer windows are cut,
# and the state is carried from piece to piece.
_LOGITS_AT_ONCE = 1 << 26
# Tokens decoded at once when bytes are counted.
_DECODE_AT_ONCE = 1 << 16
# With a carried state one long stretch is all there is, so its errors are grouped by blocks of so many positions, taken
# as independent of each other. A constant, so that the figure doesn't depend on the length of a chunk.
_BLOCK = 1024


class _Decoder(Protocol):
    def decode_bytes(self, ids: Any, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class PositionBucket:
    """The mean over the predictions made after `first` to `last` tokens of context.

    Args:
        first, last: number of tokens seen before the predicted one, both included.
        count: predictions in the bucket.
        bits_per_token: their mean.
        bits_per_byte: the same, divided by the mean bytes per token of the whole text.
        standard_error: of bits_per_byte; None for a single prediction.
    """

    first: int
    last: int
    count: int
    bits_per_token: float
    bits_per_byte: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model predicts a text.

    Args:
        bits_per_byte: mean bits spent on a byte of the judged text; comparable between tokenizers.
        bits_per_token: mean bits spent on a token.
        perplexity: 2 ** bits_per_token.
        standard_error: of bits_per_byte; None where there is only one token.
        tokens: tokens judged: all but the first, which has nothing before it to be predicted from.
        bytes: bytes of the judged tokens.
        context: length of a window, or of a chunk where the state is carried.
        carry_state: the state ran through the text, so that the context is all that came before.
        by_position: the curve over the position in the context, in buckets of half an octave.
    """

    bits_per_byte: float
    bits_per_token: float
    perplexity: float
    standard_error: float | None
    tokens: int
    bytes: int
    context: int
    carry_state: bool
    by_position: tuple[PositionBucket, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, as JSON takes them."""
        fields = asdict(self)
        fields["by_position"] = list(fields["by_position"])
        return fields

    def draw(self, path: str | os.PathLike[str], *, label: str = "model") -> None:
        """Writes the by-position curve as PNG; see `draw_by_position`."""
        draw_by_position({label: self}, path)


def evaluate_tokens(
    model: nn.Module,
    tokens: Any,
    *,
    tokenizer: _Decoder | None = None,
    bytes_per_token: float | None = None,
    total_bytes: int | None = None,
    context: int = 1024,
    carry_state: bool = False,
    batch_size: int | None = None,
    documents: Sequence[int] | NDArray[np.int64] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Evaluation:
    """Judges a model on held-out tokens: every token but the very first is predicted exactly once.

    ``bits_t = -log2 p(token_t | tokens before it in its context)``; ``bits_per_byte = sum_t bits_t / bytes``.

    Without `carry_state` the text is cut into windows of `context` predictions that follow each other; each starts from
    an empty state, so that a token's context is what came before it *in its window*. With it the state runs through the
    text in chunks of `context` tokens, in memory that doesn't grow with the text; the result doesn't depend on the
    chunk's length (to rounding).

    Args:
        model: a `statescan.models.CausalLM` or a wrapper with its forward; its training mode is put back.
        tokens: (tokens,) ids: an array, memory map, token file, list, or tensor.
        tokenizer: counts the bytes of the judged tokens. One that names an id `unjudged` (unknown bases of DNA) has no
            prediction of that id counted.
        bytes_per_token: or their mean bytes per token.
        total_bytes: or the bytes of the whole text (the first token's share is taken off). Exactly one of these three.
        context: length of a window or chunk in tokens. Default 1024.
        carry_state: default False.
        batch_size: windows judged together (default 8). With `carry_state` (default 1): the text is first cut into so
            many stretches of equal length, each of which carries a state of its own.
        documents: (documents + 1,) where each begins, from 0 to the number of tokens: no context reaches over a border,
            and the first token of each is not judged. Default: all is one.
        device: where the model computes (default: where its parameters are); the model is not moved.
        progress: called with (tokens judged, tokens to judge) after every forward pass.

    Returns:
        The `Evaluation`.

    Raises:
        DataError: fewer than two tokens, or an id outside the model's vocabulary.
        ConfigError: an argument is out of range, or not exactly one way to count bytes was given.
    """
    lanes = (1 if carry_state else 8) if batch_size is None else batch_size
    if context < 1 or lanes < 1:
        raise ConfigError(f"evaluate: context and batch_size must be at least 1, got {context} and {lanes}")
    given = [name for name, value in _ways(tokenizer, bytes_per_token, total_bytes).items() if value is not None]
    if len(given) != 1:
        raise ConfigError(
            "evaluate: exactly one of tokenizer, bytes_per_token, total_bytes must be given, "
            f"got {', '.join(given) or 'none'}"
        )
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.detach().cpu().numpy()
    elif isinstance(tokens, list):
        tokens = np.asarray(tokens)
    bounds = [0, len(tokens)] if documents is None else [int(bound) for bound in documents]
    sizes = [max(0, end - start - 1) for start, end in pairwise(bounds)]
    judged, longest = sum(sizes), max(sizes, default=0)
    if judged < 1:
        raise DataError(f"evaluate: tokens must hold at least 2 tokens, got {len(tokens)}")
    unjudged = getattr(tokenizer, "unjudged", None)
    where = torch.device(device) if device is not None else next(model.parameters()).device

    block = _BLOCK if carry_state else None
    curve, whole = _Curve(_half_octaves(longest), block), _Curve(np.array([1, longest + 1]), block)
    done = 0
    training = model.training
    model.eval()
    try:
        # Not inference_mode: the parameters of a sharded model (FSDP2) can't be gathered there.
        with torch.no_grad():
            for rows, starts, length in _stretches(bounds, context, carry_state, lanes):
                for offset, bits in row_bits(model, tokens, starts, length, context if carry_state else length, where):
                    if unjudged is not None:
                        ends = [start + offset + 1 for start in starts]
                        aims = np.stack([np.asarray(tokens[end : end + bits.shape[1]]) for end in ends])
                        bits = np.where(aims == unjudged, np.nan, bits)
                    curve.add(rows, offset + 1, bits)
                    whole.add(rows, offset + 1, bits)
                    done += bits.size
                    if progress is not None:
                        progress(done, judged)
                curve.close(rows)
                whole.close(rows)
    finally:
        model.train(training)

    judged = int(whole.count[0])
    if not judged:
        raise DataError("evaluate: wanted tokens to judge, got unknown ones alone")
    if unjudged is None:
        parts = [(0, judged)] if bytes_per_token or total_bytes else zip(bounds, sizes, strict=False)
        count = sum(
            _count_bytes(tokens[start:], size, tokenizer, bytes_per_token, total_bytes) for start, size in parts if size
        )
    else:
        count = judged  # each is a letter
    per_byte = judged / count
    bits_per_token = float(whole.mean()[0])
    error = whole.standard_error()[0]
    buckets = tuple(
        PositionBucket(
            int(curve.edges[i]),
            int(curve.reach[i]),
            int(curve.count[i]),
            float(mean),
            float(mean * per_byte),
            None if math.isnan(se) else float(se * per_byte),
        )
        for i, (mean, se) in enumerate(zip(curve.mean(), curve.standard_error(), strict=True))
        if curve.count[i]
    )
    return Evaluation(
        bits_per_byte=bits_per_token * per_byte,
        bits_per_token=bits_per_token,
        # A model far from any text may pass the largest float64.
        perplexity=2.0**bits_per_token if bits_per_token < 1024 else math.inf,
        standard_error=None if math.isnan(error) else float(error * per_byte),
        tokens=judged,
        bytes=round(count),
        context=context,
        carry_state=carry_state,
        by_position=buckets,
    )


def _ways(tokenizer: object, bytes_per_token: object, total_bytes: object) -> dict[str, object]:
    return {"tokenizer": tokenizer, "bytes_per_token": bytes_per_token, "total_bytes": total_bytes}


def _stretches(
    bounds: Sequence[int], context: int, carry_state: bool, lanes: int
) -> list[tuple[list[int], list[int], int]]:
    """What runs together: (numbers of the rows, where each row starts, predictions in each row)."""
    if len(bounds) == 2:
        parts = _parts(bounds[1] - 1, context, carry_state, lanes)
        return [(list(range(first, first + len(starts))), starts, length) for first, starts, length in parts]
    # Rows of several documents that are as long run together.
    alike: dict[int, list[tuple[int, int]]] = {}
    number = 0
    for start, end in pairwise(bounds):
        for _, starts, length in _parts(end - start - 1, context, carry_state, 1) if end - start > 1 else ():
            for place in starts:
                alike.setdefault(length, []).append((number, start + place))
                number += 1
    out = []
    for length, rows in alike.items():
        for first in range(0, len(rows), lanes):
            some = rows[first : first + lanes]
            out.append(([row for row, _ in some], [place for _, place in some], length))
    return out


def _parts(judged: int, context: int, carry_state: bool, lanes: int) -> list[tuple[int, list[int], int]]:
    """Of one document: (number of the first row, where each row starts, predictions in each row).

    Rows of one batch have one length, so that none is padded; what remains at the end is a row of its own.
    """
    length = min(context, judged) if not carry_state else max(judged // lanes, 1)
    rows = judged // length
    if carry_state:
        rows = min(rows, lanes)
    starts = [row * length for row in range(rows)]
    out = [(first, starts[first : first + lanes], length) for first in range(0, rows, lanes)]
    rest = judged - rows * length
    if rest and carry_state:
        # The last lane takes the few tokens that don't divide: it is run apart, so that every row keeps one length.
        out = [(0, starts[:-1], length)] if rows > 1 else []
        out.append((rows - 1, starts[-1:], length + rest))
    elif rest:
        out.append((rows, [rows * length], rest))
    return out


@torch.no_grad()
def row_bits(
    model: nn.Module, tokens: Any, starts: Sequence[int], length: int, chunk: int, where: torch.device
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Bits of every prediction in rows of a text, side by side, the state carried from piece to piece.

    Args:
        model: as in `evaluate_tokens`, in evaluation mode.
        tokens: (tokens,) ids.
        starts: where each row begins; a row may overlap another.
        length: predictions in each row: of tokens[start + 1] to tokens[start + length], all from an empty context.
        chunk: predictions of a piece; fewer where the logits would take too much memory.
        where: the device of the model.

    Yields:
        (offset of the piece in the row, its bits (rows, piece) float64).

    Raises:
        DataError: an id outside the model's vocabulary.
    """
    vocab = _vocab_size(model)
    if vocab is not None:
        chunk = min(chunk, max(1, _LOGITS_AT_ONCE // (len(starts) * vocab)))
    # One piece needs no state.
    state = None if chunk >= length else model.init_state(len(starts))  # type: ignore[operator]
    for offset in range(0, length, chunk):
        piece = min(chunk, length - offset)
        window = np.stack([np.asarray(tokens[s + offset : s + offset + piece + 1]) for s in starts]).astype(np.int64)
        if vocab is not None and (window.min() < 0 or window.max() >= vocab):
            raise DataError(
                f"evaluate: tokens must lie in the model's vocabulary [0, {vocab}), got {window.min()} to "
                f"{window.max()}; use the tokenizer that the model was trained with"
            )
        ids = torch.from_numpy(window).to(where)
        output = model(ids[:, :-1], state=state)
        state = output.state
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        yield offset, loss.double().cpu().numpy().reshape(len(starts), piece) / math.log(2)


def window_bits(
    model: nn.Module, tokens: Any, length: int, stride: int, *, batch_size: int = 16
) -> NDArray[np.float64]:
    """Bits of every token of a text but the first, each with length - stride + 1 to length tokens before it, but for
    those of the first window, which have what there is.

    Windows of `length` start every `stride` tokens, each from an empty state, and are judged on their last `stride`
    predictions alone (the first one on all): what a model without a state of fixed size is fairly judged by. With
    stride = length they follow each other. What is left at the end is a shorter window.

    Args:
        model: as in `evaluate_tokens`, in evaluation mode, on any device.
        tokens: (tokens,) ids.
        length: predictions of a window.
        stride: new predictions of a window.
        batch_size: windows at once. Default 16.

    Returns:
        (tokens - 1,) float64.

    Raises:
        ConfigError: the stride is out of range, or the text shorter than a window.
    """
    judged = len(tokens) - 1
    if not 0 < stride <= length:
        raise ConfigError(f"window_bits: stride must be in [1, length = {length}], got {stride}")
    if judged < length:
        raise ConfigError(f"window_bits: wanted at least length + 1 = {length + 1} tokens, got {len(tokens)}")
    starts = list(range(0, judged - length + 1, stride))
    bits, where = np.empty(judged), next(model.parameters()).device
    for first in range(0, len(starts), batch_size):
        some = starts[first : first + batch_size]
        pieces = [piece for _, piece in row_bits(model, tokens, some, length, length, where)]
        for start, row in zip(some, np.concatenate(pieces, axis=1), strict=True):
            new = stride if start else length
            bits[start + length - new : start + length] = row[-new:]
    end, last = starts[-1] + length, starts[-1] + stride
    if end < judged:
        ((_, row),) = row_bits(model, tokens, [last], judged - last, judged - last, where)
        bits[end:] = row[0, end - judged :]
    return bits


def _vocab_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "padded_vocab_size", getattr(config, "vocab_size", None))


def _count_bytes(
    tokens: Any, judged: int, tokenizer: _Decoder | None, bytes_per_token: float | None, total_bytes: int | None
) -> float:
    if bytes_per_token is not None:
        count = judged * bytes_per_token
    elif total_bytes is not None:
        count = total_bytes * judged / (judged + 1)
    else:
        assert tokenizer is not None
        count = -len(tokenizer.decode_bytes(np.asarray(tokens[:1])))
        for start in range(0, judged + 1, _DECODE_AT_ONCE):
            count += len(tokenizer.decode_bytes(np.asarray(tokens[start : start + _DECODE_AT_ONCE])))
    if not count > 0:
        raise DataError(f"evaluate: the judged tokens must stand for at least one byte, got {count}")
    return count


def _half_octaves(last: int) -> NDArray[np.int64]:
    """1, 2, 3, 4, 6, 8, 11, 16, 23, 32 ... up to past `last`: the first position of each bucket, and the end."""
    steps = 2 * math.ceil(math.log2(last + 1)) + 2
    return np.unique(np.round(2.0 ** (np.arange(steps + 1) / 2)).astype(np.int64))


class _Curve:
    """Sums per bucket of positions, in constant memory, with what a standard error by groups needs.

    Predictions of one row (and one block of positions, where `block` is given) form a group: their errors go together,
    as the words of one passage do, so only groups are taken as independent. For the mean m = sum s_g / sum n_g over
    groups, ``SE^2 = G / (G - 1) * sum (s_g - m n_g)^2 / (sum n_g)^2``.
    """

    def __init__(self, edges: NDArray[np.int64], block: int | None) -> None:
        self.edges = edges
        self.block = block
        buckets = len(edges) - 1
        self.count = np.zeros(buckets, dtype=np.int64)
        self.reach = np.zeros(buckets, dtype=np.int64)  # last position seen
        self._sum = np.zeros(buckets)
        self._squares = np.zeros(buckets)  # of single predictions
        self._groups = np.zeros((4, buckets))  # how many, sum s^2, sum s n, sum n^2
        self._open: dict[tuple[int, int, int], tuple[float, int]] = {}

    def add(self, rows: Sequence[int], first: int, bits: NDArray[np.float64]) -> None:
        """Adds predictions (rows, piece) whose first one is made after `first` tokens; NaN is none."""
        judged = ~np.isnan(bits)
        bits = np.where(judged, bits, 0.0)
        end = first + bits.shape[1]
        cuts = {first, end, *self.edges[(self.edges > first) & (self.edges < end)].tolist()}
        if self.block is not None:
            cuts |= set(range(-(-first // self.block) * self.block, end, self.block))
        cuts = sorted(cut for cut in cuts if cut >= first)
        for left, right in pairwise(cuts):
            bucket = int(np.searchsorted(self.edges, left, side="right")) - 1
            part = bits[:, left - first : right - first]
            sums, counts = part.sum(axis=1), judged[:, left - first : right - first].sum(axis=1)
            self.count[bucket] += counts.sum()
            self.reach[bucket] = max(self.reach[bucket], right - 1)
            self._sum[bucket] += sums.sum()
            self._squares[bucket] += (part * part).sum()
            group = 0 if self.block is None else left // self.block
            for row, value, more in zip(rows, sums.tolist(), counts.tolist(), strict=True):
                before, n = self._open.get((row, bucket, group), (0.0, 0))
                self._open[row, bucket, group] = (before + value, n + more)
        # A group that no later prediction can reach is closed, so that memory stays constant.
        for key in [k for k in self._open if k[0] in rows and self._ends(k) <= end]:
            self._close(key)

    def _ends(self, key: tuple[int, int, int]) -> int:
        end = int(self.edges[key[1] + 1])
        return end if self.block is None else min(end, (key[2] + 1) * self.block)

    def _close(self, key: tuple[int, int, int]) -> None:
        s, n = self._open.pop(key)
        self._groups[:, key[1]] += (1, s * s, s * n, n * n)

    def close(self, rows: Sequence[int]) -> None:
        """These rows are over."""
        for key in [k for k in self._open if k[0] in rows]:
            self._close(key)

    def mean(self) -> NDArray[np.float64]:
        """Mean bits per token of each bucket (NaN for an empty one)."""
        with np.errstate(invalid="ignore"):
            return self._sum / self.count

    def standard_error(self) -> NDArray[np.float64]:
        """Of each bucket's mean: by groups where there are several, else by single predictions; NaN for only one."""
        m, n = self.mean(), self.count.astype(np.float64)
        groups, ss, sn, nn_ = self._groups
        with np.errstate(invalid="ignore", divide="ignore"):
            by_group = groups / (groups - 1) * np.maximum(ss - 2 * m * sn + m * m * nn_, 0) / (n * n)
            single = np.maximum(self._squares / n - m * m, 0) / (n - 1)
            return np.sqrt(np.where(groups > 1, by_group, np.where(n > 1, single, np.nan)))


def draw_by_position(
    evaluations: Mapping[str, Evaluation],
    path: str | os.PathLike[str],
    *,
    yardsticks: Mapping[str, float] | None = None,
) -> None:
    """Draws bits per byte over the position in the context as PNG: a curve with its standard error for each evaluation.

    Args:
        evaluations: by the label that the legend shows.
        path: the PNG; written whole or not at all.
        yardsticks: bits per byte of something else on the same text, drawn as level lines by their label.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator
    except ImportError:
        raise MissingExtraError("drawing", "matplotlib", "plot") from None
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]  # Okabe and Ito's, colour-blind safe
    # A figure of its own, not pyplot's: nothing global is touched and no display is needed.
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (label, evaluation), colour in zip(evaluations.items(), colours * len(evaluations), strict=False):
        buckets = evaluation.by_position
        x = np.array([math.sqrt(bucket.first * bucket.last) for bucket in buckets])
        y = np.array([bucket.bits_per_byte for bucket in buckets])
        error = np.array([bucket.standard_error or 0.0 for bucket in buckets])
        axes.fill_between(x, y - error, y + error, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            x, y, "o-", color=colour, markersize=3.5, linewidth=1.6, label=f"{label}: {evaluation.bits_per_byte:.3f}"
        )
    for (label, value), style in zip((yardsticks or {}).items(), ["--", ":", "-."] * 8, strict=False):
        axes.axhline(value, color="#555555", linestyle=style, linewidth=1.2, label=f"{label}: {value:.3f}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=24))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:.0f}Ki" if x >= 1024 else f"{x:.0f}" if x >= 1 else "")
    )
    axes.set_xlabel("tokens of context before the predicted one (band: one standard error)")
    axes.set_ylabel("bits per byte")
    axes.set_title("What more context is worth", loc="left", fontsize=12, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, title="bits per byte of the whole text", alignment="left")
    with atomic_file(path, make_parents=False) as temporary:
        figure.savefig(temporary, format="png")
