"""``statescan generate``: writes on from prompts, as the text comes."""

from __future__ import annotations

import enum
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statescan.cli.audio import generate_audio
from statescan.cli.models import BUILTIN_MODEL, MODEL_HELP
from statescan.cli.terminal import command, emit_json, note, was_given
from statescan.errors import ConfigError

if TYPE_CHECKING:
    from statescan.generate import Generation, Piece

__all__ = ["generate"]

# Many readers of JSON keep a number as a float64: beyond this they would give back another seed than was printed.
_LARGEST_SEED = 2**53 - 1
_OF_TEXT = ("max_new_tokens", "dtype", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "echo", "tokenizer")
_OF_SOUND = ("seconds", "out", "label", "spectrogram")


class Weights(enum.StrEnum):
    """How the weights are packed for decoding."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


@command
def generate(
    context: typer.Context,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Text to write on from; may be given several times; '-' reads stdin."),
    ] = None,
    model: Annotated[Path, typer.Option("--model", help=MODEL_HELP)] = BUILTIN_MODEL,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to write at most.")] = 200,
    dtype: Annotated[
        Weights, typer.Option("--dtype", help="Of the packed weights; auto: as they are stored, or float32.")
    ] = Weights.auto,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="1: none.")] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, max=_LARGEST_SEED, show_default="a fresh one", help="Names the random numbers."),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End at this text; several times.")] = None,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="Print the prompt before what follows it.")] = True,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", show_default="the model's own", help="'bytes' or a tokenizer JSON.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, help="Of a model of sound: how long a sound to make, with -o.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Of a model of sound: the .wav or .flac.")] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="Of a model of sound that was trained with labels: one of them.")
    ] = None,
    spectrogram: Annotated[
        Path | None, typer.Option("--spectrogram", help="Of a model of sound: draw what was made into this PNG.")
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option("--modality", show_default="audio with --seconds or -o", help="What is made: text or audio."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of streaming.")] = False,
) -> None:
    """Writes on from a prompt, streamed to standard output as it comes; or makes sound with --seconds and -o."""
    if modality not in (None, "text", "audio"):
        raise ConfigError(f"generate: --modality must be text or audio, got '{modality}'")
    makes_sound = modality == "audio" or (modality is None and (seconds is not None or out is not None))
    _refuse_of_the_other_kind(context, makes_sound)
    if makes_sound:
        generate_audio(
            model, out, seconds=seconds, label=label, temperature=temperature, seed=seed, device=device,
            picture=spectrogram, as_json=as_json, prompt=prompt,
        )  # fmt: skip
        return
    if not prompt:
        raise ConfigError(
            "generate: wanted a --prompt to write on from, got none; give one, or --seconds and -o for a model of sound"
        )
    from statescan.cli.models import model_folder, open_model, stored_dtype
    from statescan.data import ByteTokenizer
    from statescan.generate import Engine, SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
    )
    prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
    language_model, text_to_ids = open_model(model, device=device, tokenizer=tokenizer)
    # A text ends where the model says so. Bytes have no token for it: the NUL between documents is one of them.
    end = text_to_ids.end_of_text
    if end is not None and not isinstance(text_to_ids, ByteTokenizer):
        params = replace(params, stop_token_ids=(end,))
    packed = stored_dtype(model_folder(model)) if dtype is Weights.auto else dtype.value
    engine = Engine(language_model, text_to_ids, dtype=packed)

    start = time.perf_counter()
    pieces = engine.stream(prompts, params)
    results = _silently(pieces) if as_json else _streaming(pieces, prompts, echo)
    seconds = time.perf_counter() - start
    if as_json:
        rows = [results[row]._asdict() for row in range(len(prompts))]
        emit_json([{"prompt": text, **row} for text, row in zip(prompts, rows, strict=True)])
    count = sum(len(result.tokens) for result in results.values())
    note(f"{count:,} tokens in {seconds:.2f} s with the prompt read, {count / seconds:,.0f} tokens/s, {packed}")


def _refuse_of_the_other_kind(context: typer.Context, makes_sound: bool) -> None:
    """An option that means nothing for what is made would be passed over in silence."""
    for name in _OF_TEXT if makes_sound else _OF_SOUND:
        if was_given(context, name):
            option = "--" + name.replace("_", "-")
            made, other = ("sound", "texts") if makes_sound else ("text", "models of sound")
            raise ConfigError(f"generate: {option} is for {other}, wanted none where {made} is made; leave it out")


def _silently(pieces: Iterator[Piece]) -> dict[int, Generation]:
    return {piece.row: piece.generation for piece in pieces if piece.generation is not None}


def _streaming(pieces: Iterator[Piece], prompts: list[str], echo: bool) -> dict[int, Generation]:
    """Prints one row after another: the first as it comes, what the others write meanwhile when their turn is there."""
    results: dict[int, Any] = {}
    waiting = dict.fromkeys(range(len(prompts)), "")
    several = len(prompts) > 1
    shown = 0

    def begin(row: int) -> None:
        write((f"== {row + 1} ==\n" if several else "") + (prompts[row] if echo else ""))

    begin(0)
    for piece in pieces:
        waiting[piece.row] += piece.text
        if piece.generation is not None:
            results[piece.row] = piece.generation
        while shown < len(prompts):
            write(waiting[shown])
            waiting[shown] = ""
            if shown not in results:
                break
            write("\n")
            shown += 1
            if shown < len(prompts):
                begin(shown)
    return results


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
