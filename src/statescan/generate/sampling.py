"""How the next token is drawn: filters as pure functions of logits, and random streams that belong to one row alone.

The order of the filters is fixed: repetition penalty, temperature, top-k, top-p, min-p, then one draw. A row's draw at
a position depends on (seed, stream, position) and its own logits, never on the batch it sits in or on what was drawn
before.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from statescan.errors import ConfigError

__all__ = [
    "SamplingParams",
    "filter_min_p",
    "filter_top_k",
    "filter_top_p",
    "filtered_logits",
    "penalise_repetition",
    "sample",
    "uniform",
]

_WORD = (1 << 64) - 1
# A fresh seed is reported to people and programs: a float64, which many readers of JSON take it for, holds it exactly.
_FRESH_SEED_BITS = 53
# Tokens that top-p puts in order; where those hold less than p the next number is taken, at last the vocabulary's.
_FIRST_OF_TOP_P = (512, 4096)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a row ends; checked when made.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token (greedy). Default 1.
        top_k: keep the k most likely tokens; 0 keeps all. Default 0.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all. Default 1.
        min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all. Default 0.
        repetition_penalty: logits of tokens seen in the prompt or written so far are divided by it where positive and
            multiplied where negative; 1 leaves them. Default 1.
        seed: names the random numbers; None takes a fresh one for every row, told in ``Generation.seed``. Default 0.
        stream: a second name beside the seed, for several samples of one prompt. Default 0.
        max_new_tokens: the row ends after so many tokens. Default 128.
        stop: the row ends where one of these strings is written; the string is not part of the text. Default none.
        stop_token_ids: the row ends where one of these tokens is drawn. Default none.
        logprobs: also return the model's own log probability of each token (before penalty, temperature and filters).

    Raises:
        ConfigError: a field is out of range; the text names it, what is wanted and what came.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    stream: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        # A single string or any sequence is taken and kept as a tuple, so that the dataclass stays hashable.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        ids = (self.stop_token_ids,) if isinstance(self.stop_token_ids, int) else tuple(self.stop_token_ids)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)
        if not _is_number(self.temperature) or self.temperature < 0:
            raise _wrong("temperature", "a number >= 0 (0 is greedy)", self.temperature)
        if not _is_int(self.top_k) or self.top_k < 0:
            raise _wrong("top_k", "an integer >= 0 (0 keeps all)", self.top_k)
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise _wrong("top_p", "a number above 0 and at most 1 (1 keeps all)", self.top_p)
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise _wrong("min_p", "a number from 0 to 1 (0 keeps all)", self.min_p)
        if not _is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise _wrong("repetition_penalty", "a number above 0 (1 is none)", self.repetition_penalty)
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed <= _WORD):
            raise _wrong("seed", "an integer from 0 to 2^64 - 1, or None", self.seed)
        if not _is_int(self.stream) or not 0 <= self.stream <= _WORD:
            raise _wrong("stream", "an integer from 0 to 2^64 - 1", self.stream)
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise _wrong("max_new_tokens", "an integer >= 1", self.max_new_tokens)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise _wrong("stop", "strings of at least one character", self.stop)
        if not all(_is_int(token) and token >= 0 for token in self.stop_token_ids):
            raise _wrong("stop_token_ids", "token ids >= 0", self.stop_token_ids)

    @property
    def greedy(self) -> bool:
        """The most likely token is taken; no random number is used."""
        return self.temperature == 0

    def with_seed(self) -> SamplingParams:
        """These parameters with a seed: its own, or a fresh one from the system where it is None."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(_FRESH_SEED_BITS))


def _wrong(field: str, wanted: str, got: object) -> ConfigError:
    return ConfigError(f"SamplingParams: {field} must be {wanted}, got {got!r}")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that were seen less likely (more likely where penalty < 1).

    ``x_v -> x_v / penalty`` where ``x_v > 0``, ``x_v * penalty`` where ``x_v <= 0``, for every seen token v, once.

    Args:
        logits: (..., vocab), any float dtype.
        seen: (..., vocab) bool, True where the token occurs in the prompt or in what was written.
        penalty: above 0; 1 changes nothing.

    Returns:
        (..., vocab), a new tensor.

    Source: Keskar et al., CTRL (2019), section 4.1, which divides only; negative logits are multiplied here, so that a
        penalty above 1 never makes a token likelier.
    """
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k largest logits and sets the others to minus infinity; of equals the lower token id stays.

    Args:
        logits: (..., vocab), any float dtype.
        k: 0 or at least vocab keeps all.
    """
    if k == 0 or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[..., -1:]
    return _keep_first(logits, kth, k)


def _keep_first(logits: Tensor, kth: Tensor, k: int | Tensor) -> Tensor:
    """Keeps exactly k logits a row, given the k-th largest (..., 1): all above it, of its equals the first few ids."""
    above = logits > kth
    equal = logits == kth
    room = k - above.sum(-1, keepdim=True)
    keep = above | (equal & (equal.cumsum(-1) <= room))
    return logits.masked_fill(~keep, -torch.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of most likely tokens whose probability reaches p; of equals the lower id goes first.

    A token stays where the tokens before it, in order of falling probability, hold less than p. The first always stays.

    Args:
        logits: (..., vocab), any float dtype; minus infinity where already filtered.
        p: above 0; 1 keeps all.
    """
    if p >= 1:
        return logits
    vocab = logits.shape[-1]
    # Only as many of the largest are put in order as it takes to reach p, a few of a vocabulary as a rule.
    wide = logits.double()
    largest = wide.amax(-1, keepdim=True)
    total = torch.exp(wide - largest).sum(-1, keepdim=True)
    ordered = probabilities = cumulative = wide
    for first in (*(k for k in _FIRST_OF_TOP_P if k < vocab), vocab):
        ordered = logits.topk(first, dim=-1).values
        probabilities = torch.exp(ordered.double() - largest) / total
        cumulative = probabilities.cumsum(-1)
        if bool((cumulative[..., -1] >= p).all()):
            break
    # Written so that a nan, which no comparison holds for, drops nothing.
    kept = (~(cumulative - probabilities >= p)).sum(-1, keepdim=True).clamp(min=1)
    return _keep_first(logits, ordered.gather(-1, kept - 1), kept)


def filter_min_p(logits: Tensor, p: float) -> Tensor:
    """Keeps tokens whose probability is at least p times that of the most likely token.

    ``softmax(x)_v >= p max softmax(x)`` is ``x_v >= max x + log p``: no softmax is needed.

    Args:
        logits: (..., vocab), any float dtype.
        p: from 0 (keeps all) to 1 (keeps the most likely, and its equals).

    Source: Nguyen et al., Turning Up the Heat: Min-p Sampling (2024).
    """
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


def filtered_logits(logits: Tensor, params: SamplingParams, seen: Tensor | None = None) -> Tensor:
    """Logits after repetition penalty, temperature, top-k, top-p and min-p, in this order.

    Args:
        logits: (..., vocab) float.
        params: temperature 0 leaves out temperature and filters, since the largest logit stays the largest.
        seen: (..., vocab) bool; needed where the repetition penalty is not 1.

    Returns:
        (..., vocab) float32 (float64 for float64), minus infinity where a token can't be drawn.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if params.repetition_penalty != 1:
        if seen is None:
            raise ConfigError("filtered_logits: seen must be given where repetition_penalty is not 1, got None")
        logits = penalise_repetition(logits, seen, params.repetition_penalty)
    if params.greedy:
        return logits
    if params.temperature != 1:
        # Shifted first, so that a tiny temperature overflows to minus infinity and never to plus infinity.
        logits = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    return filter_min_p(filter_top_p(filter_top_k(logits, params.top_k), params.top_p), params.min_p)


def uniform(seed: int, stream: int, position: int) -> float:
    """The random number in [0, 1) that belongs to (seed, stream, position): a counter-based generator, no state kept.

    Args:
        seed, stream: the two key words of Philox-4x64, from 0 to 2^64 - 1.
        position: the counter, here the number of tokens before the one drawn, prompt included.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """
    bits = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([position, 0, 0, 0], dtype=np.uint64)
    ).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def sample(logits: Tensor, params: SamplingParams, position: int, seen: Tensor | None = None) -> int:
    """Draws one token: the largest logit where greedy, else the distribution function inverted at one uniform number.

    Args:
        logits: (vocab,) float.
        params: must have a seed where it is not greedy (``params.with_seed()``).
        position: number of tokens before this one, prompt included.
        seen: (vocab,) bool, for the repetition penalty.

    Returns:
        The token id.

    Raises:
        ConfigError: a logit is nan or infinity, all are minus infinity, or a seed is wanting.
    """
    # One pass tells all of it: the largest is nan where any is. Minus infinity forbids a token, and is no defect.
    largest = float(logits.amax())
    if not math.isfinite(largest):
        raise ConfigError(
            f"sample: logits must be finite or minus infinity, one of them finite, got a largest of {largest} (the "
            "model's output is not finite); look at its weights, or decode them in float32"
        )
    logits = filtered_logits(logits, params, seen)
    if params.greedy:
        return int(logits.argmax())
    if params.seed is None:
        raise ConfigError("sample: params.seed must be an integer, got None; use params.with_seed()")
    kept = torch.nonzero(logits > -torch.inf).squeeze(-1)
    cumulative = torch.softmax(logits[kept].double(), dim=-1).cumsum(-1)
    threshold = uniform(params.seed, params.stream, position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, torch.tensor([threshold], dtype=torch.float64), right=True))
    return int(kept[min(index, kept.numel() - 1)])


def row_params(params: SamplingParams | Sequence[SamplingParams], prompts: Sequence[object]) -> list[SamplingParams]:
    """Parameters of every row: seeds filled in, and the k-th repeat of one prompt moved to the k-th stream.

    So rows of different prompts draw what each draws alone, and several samples of one prompt differ.

    Raises:
        ConfigError: a list of another length than the prompts.
    """
    rows = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(rows) != len(prompts):
        raise ConfigError(f"generate: params must be one or one per prompt ({len(prompts)}), got {len(rows)}")
    seen: dict[tuple[object, SamplingParams], int] = {}
    out = []
    for prompt, row in zip(prompts, rows, strict=True):
        repeat = seen.get((prompt, row), 0)
        seen[prompt, row] = repeat + 1
        out.append(replace(row.with_seed(), stream=(row.stream + repeat) & _WORD))
    return out
