"""``statescan evaluate``: bits per byte of a text under a model, over the position in the context; zero-shot tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from statescan.cli.models import BUILTIN_MODEL, MODEL_HELP, or_packaged
from statescan.cli.terminal import command, emit_json, print_rows, progress, result_console

__all__ = ["evaluate", "position_table"]


@command
def evaluate(
    model: Annotated[Path, typer.Option("--model", help=MODEL_HELP)] = BUILTIN_MODEL,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="File, folder, glob or packaged:NAME; FASTA for a model of bases; may be given several times.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Instead of --data, zero-shot tasks with commas between: lambada, hellaswag, piqa, arc_easy, "
            "arc_challenge, winogrande, blimp.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir", show_default="lm-eval fetches them", help="Folder of the tasks' files, NAME.jsonl or .xz."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, show_default="all", help="Judge the first N questions of a task.")
    ] = None,
    runs_on: Annotated[
        str, typer.Option("--runs-on", help="For tasks: statescan, transformers (any causal model), or auto.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="For tasks, of the weights: float32, bfloat16 or float16.")
    ] = "float32",
    out: Annotated[
        Path | None, typer.Option("--out", help="For tasks: write the report here, question by question.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", show_default="the model's own", help="'bytes' or a tokenizer JSON.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            show_default="1024; 2048 for tasks",
            help="Tokens of a window or chunk; of tasks, the last that are read, at most the model's own length.",
        ),
    ] = None,
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
    """Judges a model on a text (bits per byte and perplexity, and how they fall with the context) or on tasks."""
    from statescan.errors import ConfigError

    if (data is None) == (tasks is None):
        both = "both" if data else "neither"
        raise ConfigError(f"evaluate: exactly one of --data and --tasks must be given, got {both}; pass one")
    if tasks is not None:
        of_texts = {"--carry-state": carry_state, "--last": last != 1.0, "--max-tokens": max_tokens, "--png": png}
        if unfit := [name for name, given in {**of_texts, "--batch-size": batch_size}.items() if given]:
            raise ConfigError(f"evaluate: {', '.join(unfit)} is for --data, got it with --tasks; leave it out")
        _evaluate_tasks(
            model, tasks, data_dir, limit=limit, out=out, as_json=as_json, device=device, dtype=dtype,
            tokenizer=tokenizer, runs_on=runs_on, max_length=context or 2048,
        )  # fmt: skip
        return
    assert data is not None
    context = context or 1024
    of_tasks = {"--data-dir": data_dir, "--limit": limit, "--out": out}
    of_tasks |= {"--runs-on": runs_on != "auto", "--dtype": dtype != "float32"}
    if unfit := [name for name, given in of_tasks.items() if given]:
        raise ConfigError(f"evaluate: {', '.join(unfit)} is for --tasks, got it with --data; leave it out")
    import numpy as np

    from statescan.cli.models import open_model
    from statescan.data import DnaTokenizer, build_token_file
    from statescan.evaluate import evaluate_tokens
    from statescan.files import want_folder

    if not 0 < last <= 1:
        raise ConfigError(f"evaluate: --last must be a share of the text above 0 and at most 1, got {last}; e.g. 0.05")
    if png is not None:
        want_folder(png)
    language_model, text_to_ids = open_model(model, device=device, tokenizer=tokenizer)
    file = build_token_file(data, text_to_ids)
    every = file.tokens
    cut = len(every) - round(len(every) * last)
    tokens = every[cut:]
    if last < 1 and len(tokens) < 2:
        # The first has nothing before it to be predicted from.
        raise ConfigError(
            f"evaluate: --last must leave at least 2 tokens to judge, got {last}, which leaves {len(tokens)} of "
            f"{len(every)}; take a larger share or a longer text"
        )
    if max_tokens:
        tokens = tokens[:max_tokens]
    of_bases = isinstance(text_to_ids, DnaTokenizer)
    # Of bases no context reaches from one record into the next.
    records = np.unique(np.clip(np.asarray(file.document_offsets) - cut, 0, len(tokens))) if of_bases else None
    with progress("judging", unit="tokens") as report:
        result = evaluate_tokens(
            language_model,
            tokens,
            tokenizer=text_to_ids,
            context=context,
            carry_state=carry_state,
            batch_size=batch_size,
            documents=records,
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
        ("bits per base" if of_bases else "bits per byte", f"{result.bits_per_byte:.4f}{error}"),
        ("perplexity", f"{result.perplexity:.3f} per token ({result.bits_per_token:.4f} bits)"),
        ("judged", f"{result.tokens:,} tokens, {result.bytes:,} bytes, {what}"),
        *([("picture", str(png))] if png else []),
    )
    print()
    result_console().print(position_table(result.to_dict()["by_position"]))


def _evaluate_tasks(
    model: Path,
    tasks: str,
    data_dir: Path | None,
    *,
    limit: int | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    from statescan.cli.zero_shot import print_table, split_names
    from statescan.evaluate import evaluate_tasks
    from statescan.evaluate.tasks import named_tasks
    from statescan.files import atomic_file, want_folder
    from statescan.integrations.language_models import open_judged
    from statescan.recipes.zero_shot import beside_paper, report

    names = [task.name for task in named_tasks(split_names(tasks))]
    if out is not None:
        want_folder(out)
    judged = open_judged(or_packaged(model).as_posix(), **options)
    if data_dir is None:
        from statescan.integrations.lm_eval import evaluate_online

        results = evaluate_online(judged, names, limit=limit)
    else:
        with progress("judging", unit="questions") as bar:
            results = evaluate_tasks(
                judged.reader,
                judged.tokenizer,
                names,
                data_dir,
                limit=limit,
                progress=lambda _, done, total: bar(done, total),
            )
    if out is not None:
        with atomic_file(out) as temporary:
            text = json.dumps(report(judged, results, items=True), indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
    told = report(judged, results)
    if as_json:
        emit_json(told)
        return
    print_table([told], beside_paper(judged.parameters))
    for result in results:
        if result.parts:
            worst = sorted(result.parts.items(), key=lambda pair: pair[1].value)
            shown = ", ".join(f"{name} {100 * metric.value:.1f}" for name, metric in (worst[0], worst[-1]))
            print(f"{result.task}: {len(result.parts)} parts, from {shown} (all with --json)")
    if out is not None:
        print(f"wrote {out}")


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
