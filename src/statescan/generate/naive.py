"""The oracle: everything is run again from the first token for each new one, and text is decoded whole each time."""

from __future__ import annotations

import codecs
from typing import Any, Literal

import torch
from torch import nn

from statescan.generate.engine import Generation, Prompt, default_tokenizer, read_prompt
from statescan.generate.sampling import SamplingParams, sample

__all__ = ["generate_naive"]


def generate_naive(
    model: nn.Module, prompt: Prompt, params: SamplingParams | None = None, *, tokenizer: Any = None
) -> Generation:
    """Writes on from one prompt by ``CausalLM.forward`` over all tokens at every step, without any state.

    Its cost grows with the square of the length; it is here to say what `Engine` must give. In float32 the two agree
    token for token unless two tokens' logits (or a draw and the edge between two tokens) lie within rounding of each
    other.

    Args:
        model: a `statescan.models.CausalLM`.
        prompt: text or token ids; an empty one is treated as in `Engine.generate`.
        params: default `SamplingParams()`.
        tokenizer: default bytes, for a model of 256 tokens.
    """
    tokenizer = default_tokenizer(model) if tokenizer is None else tokenizer
    params = (params or SamplingParams()).with_seed()
    prompt_ids = read_prompt(prompt, tokenizer)
    device = next(model.parameters()).device
    ids, logprobs = list(prompt_ids), []
    reason: Literal["length", "stop"] = "length"
    stop: str | int | None = None
    text = ""
    training = model.training
    model.eval()
    try:
        while len(ids) < len(prompt_ids) + params.max_new_tokens:
            with torch.no_grad():
                output = model(torch.tensor([ids], device=device), logits_to_keep=1)
            logits = output.logits[0, -1, : tokenizer.vocab_size].float().cpu()
            seen = torch.zeros(logits.shape[0], dtype=torch.bool)
            seen[ids] = True
            token = sample(logits, params, len(ids), seen)
            logprobs.append(float(torch.log_softmax(logits, -1)[token]))
            ids.append(token)
            if token in params.stop_token_ids:
                reason, stop = "stop", token
                break
            text = _text(tokenizer, prompt_ids, ids)
            found = _first_stop(text, params.stop)
            if found is not None:
                text, stop = found
                reason = "stop"
                break
    finally:
        model.train(training)
    return Generation(
        text,
        ids[len(prompt_ids) :],
        reason,
        stop,
        len(prompt_ids),
        params.seed,
        logprobs if params.logprobs else None,
    )


def _text(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """What follows the prompt's characters in the whole text, without a character that is unfinished at the end."""
    shown = len(_whole_characters(tokenizer.decode_bytes(prompt)))
    return _whole_characters(tokenizer.decode_bytes(ids))[shown:]


def _whole_characters(data: bytes) -> str:
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str] | None:
    """The text before the first stop string to be complete, reading character by character, and that string."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return None
