"""``statescan evaluate``: bits per byte of a text under a model, also over the position in the context."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from statescan.cli.terminal import command, emit_json, print_rows, progress, result_console

__all__ = ["evaluate", "position_table"]


@command
def evaluate(
    model: Annotated[
        Path, typer.Option("--model", help="Folder of a model or of a training run, or owner/name on the hub.")
    ],
    data: Annotated[
        list[str], typer.Option("--data", help="File, folder, glob or packaged:NAME; may be given several times.")
    ],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", show_default="the model's own", help="'bytes' or a tokenizer JSON.")
    ] = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of a window, or of a chunk.")] = 1024,
    carry_state: Annotated[
        bool, typer.Option("--carry-state", help="Carry the state through the whole text instead of windows.")
    ] = False,
    last: Annotated[float, typer.Option("--last", help="Judge only this last share of the text, e.g. 0.05.")] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=0, help="Judge at most so many tokens; 0: all.")] = 0,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Windows judged together.")] = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Draw bits per byte over the position into this file.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judges a model on a text: bits per byte and perplexity, and how they fall with the context."""
    from statescan.cli.models import open_model
    from statescan.data import build_token_file
    from statescan.errors import ConfigError
    from statescan.evaluate import evaluate_tokens
    from statescan.files import want_folder

    if not 0 < last <= 1:
        raise ConfigError(f"evaluate: --last must be a share of the text above 0 and at most 1, got {last}; e.g. 0.05")
    if png is not None:
        want_folder(png)
    language_model, text_to_ids = open_model(model, device=device, tokenizer=tokenizer)
    every = build_token_file(data, text_to_ids).tokens
    tokens = every[len(every) - round(len(every) * last) :]
    if last < 1 and len(tokens) < 2:
        # The first has nothing before it to be predicted from.
        raise ConfigError(
            f"evaluate: --last must leave at least 2 tokens to judge, got {last}, which leaves {len(tokens)} of "
            f"{len(every)}; take a larger share or a longer text"
        )
    if max_tokens:
        tokens = tokens[:max_tokens]
    with progress("judging", unit="tokens") as report:
        result = evaluate_tokens(
            language_model,
            tokens,
            tokenizer=text_to_ids,
            context=context,
            carry_state=carry_state,
            batch_size=batch_size,
            progress=report,
        )
    if png is not None:
        result.draw(png, label=str(model))
    if as_json:
        emit_json({"model": str(model), "data": data, **result.to_dict()})
        return
    error = "" if result.standard_error is None else f" +- {result.standard_error:.4f} (standard error)"
    what = "state carried through the text" if carry_state else f"windows of {context} tokens"
    print_rows(
        ("bits per byte", f"{result.bits_per_byte:.4f}{error}"),
        ("perplexity", f"{result.perplexity:.3f} per token ({result.bits_per_token:.4f} bits)"),
        ("judged", f"{result.tokens:,} tokens, {result.bytes:,} bytes, {what}"),
        *([("picture", str(png))] if png else []),
    )
    print()
    result_console().print(position_table(result.to_dict()["by_position"]))


def position_table(buckets: list[dict[str, Any]]) -> Any:
    """A rich table of bits per byte over the number of tokens of context."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    for title in ("tokens of context", "predictions", "bits per byte", "standard error"):
        table.add_column(title, justify="right")
    for bucket in buckets:
        first, last, error = bucket["first"], bucket["last"], bucket["standard_error"]
        table.add_row(
            f"{first}" if first == last else f"{first}-{last}",
            f"{bucket['count']:,}",
            f"{bucket['bits_per_byte']:.4f}",
            "" if error is None else f"{error:.4f}",
        )
    return table
