"""``statescan reproduce``: tables and figures of the paper, each by a command of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from statescan.cli.reproduce_audio import raw_audio, spoken_digits
from statescan.cli.reproduce_dna import dna_pretraining, great_apes, microbes
from statescan.cli.reproduce_language import context_growth, language_scaling, print_tuning
from statescan.cli.reproducing import Json, Seconds, chosen_rows, default_device, going_on, print_results
from statescan.cli.terminal import command, emit_json, note, progress, result_console, was_given
from statescan.cli.zero_shot import zero_shot

if TYPE_CHECKING:
    from statescan.data import SyntheticTask
    from statescan.models import CausalLM
    from statescan.recipes.synthetic import Score

__all__ = ["reproduce"]

reproduce = typer.Typer(
    name="reproduce",
    help="Reproduces tables and figures of the Mamba paper, each beside the paper's numbers.",
    epilog="Example: statescan reproduce induction-heads --evaluate-only",
    no_args_is_help=True,
)

# Tokens of a length that --evaluate-only judges, so that two cores judge all lengths up to 2^16 in under a minute.
_TOKENS, _SHORT = 1 << 20, 2**16
_COPYING_EXAMPLES = 512

Rows = Annotated[
    list[str] | None,
    typer.Option("--row", show_default="the headline", help="Row of the table; several times for several, or 'all'."),
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Train each row with the seeds 0 to N - 1.")]
Device = Annotated[
    str | None, typer.Option("--device", show_default="cuda where there is one", help="cpu, cuda, cuda:1, ...")
]
EvaluateOnly = Annotated[
    bool, typer.Option("--evaluate-only", help="Train nothing: judge the packaged model, or --model.")
]
Model = Annotated[
    Path | None,
    typer.Option("--model", show_default="the packaged one", help="With --evaluate-only: folder of a trained model."),
]


# Options that mean nothing where nothing is trained, or where something is.
_OF_TRAINING, _OF_JUDGING = ("out", "row", "seeds", "seconds", "share"), ("model", "full")


def _refuse_idle(context: typer.Context, evaluate_only: bool) -> None:
    """An option without an effect would be passed over in silence."""
    from statescan.errors import ConfigError

    for name in _OF_TRAINING if evaluate_only else _OF_JUDGING:
        if was_given(context, name):
            why = "is of training, and --evaluate-only trains nothing" if evaluate_only else "is for --evaluate-only"
            cure = "leave one of them out" if evaluate_only else "leave it out, or give both"
            raise ConfigError(f"reproduce: --{name} {why}; {cure}")


def _judged(examples: int, tokens: int | None) -> Callable[[int], int]:
    """How many examples of a length to judge: as many as asked for, but fewer where that many tokens are less, 2 at
    least."""
    return lambda length: examples if tokens is None else min(examples, max(2, tokens // length))


@command
def induction_heads(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder of runs, table and figure; resumable.")] = Path(
        "reproduce/induction-heads"
    ),
    row: Rows = None,
    seeds: Seeds = 3,
    device: Device = None,
    seconds: Seconds = None,
    evaluate_only: EvaluateOnly = False,
    model: Model = None,
    full: Annotated[
        bool, typer.Option("--full", help="With --evaluate-only: go on from length 65,536 to 1,048,576.")
    ] = False,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            min=1,
            show_default="4096; a million tokens with --evaluate-only",
            help="Fresh sequences judged of every length.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, show_default="no end", help="Judge so many tokens of a length at most."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Table 11: recall the token after a trigger, trained at length 256, judged from 64 to 1,048,576."""
    from statescan.data import InductionHeads
    from statescan.recipes import induction_heads as recipe

    _refuse_idle(context, evaluate_only)
    if evaluate_only:
        language_model, name = _model(model, "induction-heads", device, InductionHeads())
        count = _judged(recipe.EXAMPLES if examples is None else examples, tokens or (None if examples else _TOKENS))

        def wanted(length: int) -> int:
            return recipe.judged_examples(language_model.config, length, count(length))

        asked = [length for length in recipe.LENGTHS if full or length <= _SHORT]
        lengths = [length for length in asked if wanted(length)]
        if lengths != asked:
            note(f"attention is judged up to length {lengths[-1]:,}: its cost grows with the square of the length")
        scores = {}
        with progress("judging", unit="tokens") as bar:
            for length in lengths:
                scores |= recipe.evaluate(
                    language_model, lengths=[length], examples=wanted, progress=lambda _, done, total: bar(done, total)
                )
        paper = {length: f"{value:g}" for length, value in zip(recipe.LENGTHS, recipe.PAPER["mamba"][1], strict=True)}
        _print_scores(name, scores, paper, as_json)
        return
    rows = chosen_rows(row, recipe.ROWS, "mamba")
    with going_on():
        results = recipe.induction_heads(
            out, rows=rows, seeds=range(seeds), device=default_device(device), seconds=seconds,
            examples=_judged(examples or recipe.EXAMPLES, tokens), say=note,
        )  # fmt: skip
    print_results(out, results, as_json)


@command
def selective_copying(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder of runs, table and figure; resumable.")] = Path(
        "reproduce/selective-copying"
    ),
    row: Rows = None,
    seeds: Seeds = 3,
    device: Device = None,
    seconds: Seconds = None,
    evaluate_only: EvaluateOnly = False,
    model: Model = None,
    examples: Annotated[
        int | None,
        typer.Option("--examples", min=1, show_default="4096; 512 with --evaluate-only", help="Sequences judged."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", show_default="4096", help="End the curriculum here, and judge here: 128, 256, ..."),
    ] = None,
    share: Annotated[
        float, typer.Option("--share", min=0, max=1, help="Of the recipe's updates, for a quicker table.")
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Table 1: sixteen tokens among 4,096 of noise, to be said in order; and what S6 must select by for it."""
    import time

    from statescan.data import SelectiveCopying
    from statescan.recipes import selective_copying as recipe
    from statescan.recipes.synthetic import judge, seed_of_tests

    _refuse_idle(context, evaluate_only)
    length = recipe.LENGTH if length is None else length
    if evaluate_only:
        task = SelectiveCopying(length)
        language_model, name = _model(model, "selective-copying", device, task)
        begun = time.perf_counter()
        with progress("judging", unit="sequences") as bar:
            score = judge(
                language_model,
                task,
                examples or _COPYING_EXAMPLES,
                seed=seed_of_tests(length),
                at_once=1 << (19 if language_model.lm_head.weight.is_cuda else 16),
                progress=bar,
            )
        paper = {recipe.LENGTH: f"{recipe.PAPER['mamba-s6']:g}"}
        _print_scores(name, {length: (score, time.perf_counter() - begun)}, paper, as_json)
        return
    rows = chosen_rows(row, {**recipe.ROWS, **recipe.ABLATION}, "mamba-s6")
    with going_on():
        results = recipe.selective_copying(
            out, rows=rows, seeds=range(seeds), device=default_device(device), seconds=seconds,
            examples=examples or recipe.EXAMPLES, length=length, share=share, say=note,
        )  # fmt: skip
    print_results(out, results, as_json)


@command
def builtin_model(
    data: Annotated[Path, typer.Option("--data", help="Folder of the texts, see docs/reproduction.md.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of a folder a row, and of the table.")] = Path(
        "reproduce/builtin-model"
    ),
    row: Rows = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, show_default="the row's", help="Updates; the learning rate ends with them."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=1, show_default="the row's", help="Of Mamba's updates, instead of --steps."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", min=0, show_default="tuned, or the row's", help="Peak learning rate.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Train both rows, or --row, over one grid of learning rates and dropouts; later calls use it.",
        ),
    ] = False,
    share: Annotated[
        float | None,
        typer.Option("--share", min=0, max=1, show_default="1/8", help="With --tune: of the packaged run's updates."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of every run, e.g. batch_size=8."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """The byte-level Mamba that comes with the package, and its Transformer++ twin, judged on unseen novels."""
    from statescan.errors import ConfigError
    from statescan.recipes import builtin_model as recipe
    from statescan.train.config import apply_overrides

    fields = [*(overrides or []), *([] if learning_rate is None else [f"lr={learning_rate!r}"])]

    def change(run: recipe.LanguageRun) -> recipe.LanguageRun:
        return apply_overrides(run, fields)

    clash = {"--steps": steps, "--seconds": seconds, "--lr": learning_rate} if tune else {"--share": share}
    for name, value in clash.items():
        if value is not None:
            raise ConfigError(f"reproduce: {name} is for a call {'without' if tune else 'with'} --tune; leave it out")
    kept = "rows that were finished are kept, the one that was being trained begins anew"
    if tune:
        rows = chosen_rows(row, recipe.ROWS)
        with going_on(kept):
            found = recipe.tune(
                data, out, rows=rows, share=recipe.SHARE if share is None else share, change=change,
                device=default_device(device), say=note,
            )  # fmt: skip
        print_tuning(found, as_json)
        return
    rows = chosen_rows(row, recipe.ROWS, "mamba")
    with going_on(kept):
        results = recipe.builtin_model(
            data, out, rows=rows, steps=steps, seconds=seconds, change=change, device=default_device(device), say=note
        )
    print_results(out, results, as_json)


reproduce.command("induction-heads", epilog="Example: statescan reproduce induction-heads --evaluate-only --full")(
    induction_heads
)
reproduce.command("selective-copying", epilog="Example: statescan reproduce selective-copying --row all --seeds 1")(
    selective_copying
)
reproduce.command("builtin-model", epilog="Example: statescan reproduce builtin-model --data texts --row all")(
    builtin_model
)
reproduce.command("zero-shot", epilog="Example: statescan reproduce zero-shot --models a,b --data-dir questions")(
    zero_shot
)
reproduce.command("context-growth", epilog="Example: statescan reproduce context-growth --data texts --row mamba-2k")(
    context_growth
)
reproduce.command(
    "language-scaling", epilog="Example: statescan reproduce language-scaling --data texts --row mamba-1m"
)(language_scaling)

reproduce.command(
    "dna-pretraining", epilog="Example: statescan reproduce dna-pretraining --data genome.fa.gz --row mamba"
)(dna_pretraining)
reproduce.command("microbes", epilog="Example: statescan reproduce microbes --data genomes --length 256")(microbes)
reproduce.command("great-apes", epilog="Example: statescan reproduce great-apes --data apes.npz --length 8192")(
    great_apes
)
reproduce.command("spoken-digits", epilog="Example: statescan reproduce spoken-digits --data recordings --row all")(
    spoken_digits
)
reproduce.command("raw-audio", epilog="Example: statescan reproduce raw-audio --data recordings --row all")(raw_audio)


def _model(path: Path | None, packaged: str, device: str | None, task: SyntheticTask) -> tuple[CausalLM, str]:
    """The model that is judged, and its name.

    Raises:
        ConfigError: it has another vocabulary than the task, or was trained on another one.
    """
    from statescan.cli.models import model_folder
    from statescan.data import load_tokenizer
    from statescan.errors import ConfigError, DataError, MissingExtraError
    from statescan.models import CausalLM
    from statescan.recipes.shipped import PACKAGED, shipped_model

    folder = shipped_model(packaged) if path is None else model_folder(path)
    model = CausalLM.from_pretrained(folder, device=default_device(device)).eval()
    try:
        symbols = getattr(load_tokenizer(folder), "symbols", None)
    except (DataError, MissingExtraError):
        # A model without a tokenizer is taken at its word.
        symbols = task.symbols
    if (model.config.vocab_size, symbols) != (task.vocab_size, task.symbols):
        raise ConfigError(
            f"reproduce: --model must have the task's vocabulary, {task.vocab_size} ids ({task.symbols}), got "
            f"'{folder}' with {model.config.vocab_size} ({symbols or 'no symbols'}); name a model that learnt this task"
        )
    return model, f"{PACKAGED}{packaged}" if path is None else str(path)


def _print_scores(
    model: str, scores: Mapping[int, tuple[Score, float]], paper: Mapping[int, str], as_json: bool
) -> None:
    from rich.table import Table

    from statescan.recipes.synthetic import interval, percent, wilson

    if as_json:
        emit_json(
            {
                "model": model,
                "lengths": {
                    length: {
                        **score._asdict(),
                        "accuracy": score.accuracy,
                        "interval": wilson(*score.trials),
                        "paper": float(paper[length]) / 100 if length in paper else None,
                        "seconds": seconds,
                    }
                    for length, (score, seconds) in scores.items()
                },
            }
        )
        return
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for title in ("length", "accuracy, %", "95 % interval", "judged", "paper, %", "tokens/s"):
        table.add_column(title, justify="right")
    for length, (score, seconds) in scores.items():
        table.add_row(
            f"{length:,}",
            percent(score.accuracy),
            " to ".join(interval(*score.trials)),
            f"{score.correct:,} of {score.asked:,}",
            paper.get(length, ""),
            f"{length * score.examples / seconds:,.0f}",
        )
    result_console().print(table)
