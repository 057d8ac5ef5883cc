"""Next-base prediction on genomes with the paper's length warm-up: the loss as a function of the context, of Mamba, S4,
a dilated convolution and a Transformer with as many parameters, trained on the same windows in the same order.

Parts of a genome differ in how well they are predicted by far more than context is worth. So the same bases are read
with less and with more before them, and what is told, of contexts and of rows, is the mean of these differences.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from statescan.errors import ConfigError, DataError
from statescan.evaluate import ByContext, Region, evaluate_tokens, read_by_context
from statescan.files import make_folder, write_json, write_text
from statescan.models import CausalLM, MambaConfig, ModelConfig
from statescan.models.baseline_config import ConvConfig, S4Config, TransformerConfig
from statescan.recipes.synthetic import figure, machine_facts, save_figure
from statescan.train import DataConfig, RunConfig, TrainConfig, train
from statescan.train.config import apply_overrides
from statescan.train.finished import run_status
from statescan.train.loop import RUN_FILE, Corpus, read_genome

__all__ = ["ROWS", "dna_pretraining", "pretraining_run", "report"]

# 1.40 million parameters each (1.396 to 1.401), as the paper's smaller model of DNA, whose 12 blocks of width 128 these
# are; the rate is the paper's for Mamba and for what it is compared with.
ROWS: dict[str, tuple[ModelConfig, float]] = {
    "mamba": (MambaConfig(d_model=128, n_layer=12, vocab_size=5), 8e-3),
    "s4": (S4Config(d_model=128, n_layer=7, vocab_size=5, d_intermediate=368), 2e-3),
    "conv": (ConvConfig(d_model=128, n_layer=17, vocab_size=5), 2e-3),
    "transformer": (TransformerConfig(d_model=128, n_layer=7, vocab_size=5, d_intermediate=348), 2e-3),
}
_NAMES = {"mamba": "Mamba", "s4": "S4D", "conv": "dilated convolution", "transformer": "Transformer++"}
# Those whose state has a fixed size are judged with it carried through whole regions, too.
_CARRIED = ("mamba", "s4")
_SCORES = "context.json"
# Bases over which it is carried where a region held out is as long.
_FAR = 1 << 20


def pretraining_run(
    row: str,
    paths: Sequence[str],
    *,
    length: int = 1 << 15,
    valid_regions: str = "",
    steps: int = 1000,
    judged: int = 0,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """The configuration that this package pretrains a row with.

    Each update reads 2^17 bases, or one window where that is longer. The length starts at 2^10 and doubles in equal
    stages over the first half of the updates.

    Args:
        row: one of `ROWS`.
        paths: FASTA, FASTQ or .npz files; of aligned species (see `DataConfig`) the blocks give what is held out.
        length: bases of a window in the end, a power of two.
        valid_regions: BED file with what is held out; "" for a twentieth of all.
        steps: updates.
        judged: bases of the windows in which it will be judged: what is held out comes in blocks of one more.
        overrides: "model.d_model=64", "train.lr=1e-3", ...; see `statescan.train.apply_overrides`.

    Raises:
        ConfigError: an unknown row or field.
    """
    if row not in ROWS:
        raise ConfigError(f"pretraining: --row must be one of {', '.join(ROWS)}, got '{row}'")
    model, lr = ROWS[row]
    first = min(length, 1 << 10)
    stages = (length // first).bit_length() - 1
    stage = max(1, steps // 2 // stages) if stages else 0
    config = TrainConfig(
        steps=steps,
        batch_size=max(1, (1 << 17) // length),
        length=length,
        first_length=first if stages else 0,
        stage_steps=stage,
        lr=lr,
        warmup=max(1, steps // 20),
        precision="bf16" if torch.cuda.is_available() else "float32",
        evaluate_every=0,
        checkpoint_every=max(1, steps // 4),
        log_every=max(1, steps // 50),
        evaluate_tokens=1 << 17,
    )
    block = 0 if valid_regions else _block(length, judged)
    data = DataConfig(
        paths=tuple(paths), modality="dna", tokenizer="dna", valid_regions=valid_regions, valid_block=block
    )
    return apply_overrides(RunConfig(model, data, config), overrides)


def _block(length: int, judged: int) -> int:
    """Bases of a block that is held out."""
    return max(2 * length, 1 << 16, judged + 1)


def dna_pretraining(
    runs: Mapping[str, RunConfig],
    out: str | os.PathLike[str],
    *,
    context: int = 1 << 17,
    carried: int | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains rows, or goes on with them, judges each on what is held out, and leaves table and figure.

    A row that was begun for other windows keeps the blocks it holds out, where these are long enough.

    Args:
        runs: by the row's name.
        out: folder of the runs, each in a folder of its name, and of the report.
        context: bases of the longest window in which the bases are judged that are judged in all; see
            `statescan.evaluate.read_by_context`.
        carried: bases over which a model with a state of fixed size is followed with the state carried. Default: the
            longest power of two above `context`, up to 2^20, that a region held out is long; none where there is none.
            What the bases beyond `context` cost is set beside what they cost in windows of it.
        say: called with lines of progress.

    Returns:
        What results.json holds.

    Raises:
        DataError: nothing that is held out is as long as a window that shall be judged; nothing was trained.
        CheckpointError: the folder holds a finished run of a row with other settings, or of other bases.
        KeyboardInterrupt: interrupted; what was trained is kept.
    """
    out = make_folder(out)
    runs = {row: _as_begun(row, run, out / row, context, carried) for row, run in runs.items()}
    # Before anything is trained: what can't be judged.
    lengths = {row: _lengths(row, _regions(read_genome(run)), context, carried) for row, run in runs.items()}
    for row, run in runs.items():
        folder = out / row
        # A finished run is of these bases, too: files may have changed under their names.
        bases = read_genome(run).facts
        digests = {name: bases[name] for name in ("digest", "valid_digest", "train_tokens") if name in bases}
        status = run_status(folder, {"model": run.model, "data": run.data, "train": run.train}, digests)
        if status != "finished":
            result = train(run, folder, resume=status is not None)
            if result.signalled:
                raise KeyboardInterrupt
            say(f"{row}: trained, {result.tokens_per_second:,.0f} bases/s, loss {result.train_loss:.4f} nats")
        path = folder / _SCORES
        scores = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        # Earlier versions followed the position alone.
        if scores.get("lengths") != lengths[row] or not scores.get("by_context"):
            _judge(run, folder, lengths[row])
            say(f"{row}: judged")
        report(out)
    return report(out)


def _as_begun(row: str, run: RunConfig, folder: Path, context: int, carried: int | None) -> RunConfig:
    """The run with the blocks of the one in its folder, where it is only what is judged now that calls for others, and
    they are long enough for it."""
    usual = _block(run.train.length, max(context, carried or 0))
    if run_status(folder) is None or run.data.valid_block != usual:
        return run
    config = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["config"]
    begun = replace(run, data=replace(run.data, valid_block=config.get("data", {}).get("valid_block", 0)))
    try:
        _lengths(row, _regions(read_genome(begun)), context, carried)
    except DataError:
        return run
    return begun


def _regions(corpus: Corpus) -> list[Region]:
    """What is held out, in the ids that are; of aligned species what lies at about the same place is homologous."""
    ends, spans = corpus.valid_documents, corpus.valid_spans
    assert ends is not None
    assert spans is not None
    parts = corpus.facts.get("aligned", {}).get("valid")
    regions = []
    for number, ((start, end), (first, _)) in enumerate(zip(itertools.pairwise(ends.tolist()), spans, strict=True)):
        if parts:
            place = int(first) - max(part for part, _ in parts if part <= first)
            regions.append(Region(start, end, 0, place))
        else:
            regions.append(Region(start, end, number))
    return regions


def _lengths(row: str, regions: Sequence[Region], context: int, carried: int | None) -> dict[str, int | None]:
    """The lengths at which a row is judged.

    Raises:
        DataError: no region holds a window.
    """
    longest = max((region.end - region.start for region in regions), default=0) - 1
    for name, length in (("context", context), ("carried", carried)):
        if length is not None and length > longest:
            raise DataError(
                f"pretraining: wanted a region held out of more than {length:,} bases, which --{name} judges together, "
                f"got {max(0, longest + 1):,} at most; lower --{name}, hold out more with --set data.valid_fraction="
                "0.1, or longer regions with --valid-regions"
            )
    if carried is None:
        power = min(1 << (longest.bit_length() - 1), _FAR)
        carried = power if power > context else None
    return {"context": context, "carried": carried if row in _CARRIED else None}


def _judge(run: RunConfig, folder: Path, lengths: Mapping[str, int | None]) -> None:
    """Leaves the scores in a run's folder."""
    corpus = read_genome(run)
    regions = _regions(corpus)
    device = "cuda" if torch.cuda.is_available() and run.train.accelerator != "cpu" else "cpu"
    model = CausalLM.from_pretrained(folder, device=device).eval()
    context, carried = lengths["context"], lengths["carried"]
    assert context is not None
    # Regions that are whole windows long, so that every position is judged on the same ones.
    kept, bounds = [], [0]
    for start, end, *_ in regions:
        for first in range(start, end - context, context):
            kept.append(corpus.valid[first : first + context + 1])
            bounds.append(bounds[-1] + context + 1)
    with torch.autocast(device, torch.bfloat16, enabled=run.train.precision == "bf16"):
        windows = evaluate_tokens(
            model, np.concatenate(kept), tokenizer=corpus.tokenizer, context=context, batch_size=1, documents=bounds
        )
        unjudged = getattr(corpus.tokenizer, "unjudged", None)
        again = read_by_context(model, corpus.valid, regions, context=context, carried=carried, unjudged=unjudged)
    scores: dict[str, Any] = {"machine": machine_facts(device), "parameters": model.parameter_count()}
    scores |= {"lengths": dict(lengths), "window": windows.to_dict(), "by_context": again.to_dict()}
    write_json(folder / _SCORES, scores)


def report(out: str | os.PathLike[str]) -> dict[str, Any]:
    """results.json, results.md and context.svg of all judged rows in a folder, each two of which are compared that were
    judged on the same bases; and the names of those that were not judged."""
    out = Path(out)
    rows, missing = [], []
    for path in sorted(out.glob(f"*/{_SCORES}")):
        scores = json.loads(path.read_text(encoding="utf-8"))
        # Earlier versions trained rows that they could not judge.
        if scores["window"] is None:
            missing.append(path.parent.name)
            continue
        facts = json.loads((path.parent / RUN_FILE).read_text(encoding="utf-8"))
        again = ByContext.from_dict(scores["by_context"]) if scores.get("by_context") else None
        change, error = again.whole() if again else (None, None)
        rows.append(
            {
                "row": path.parent.name,
                **scores,
                "curve": [point._asdict() for point in again.curve()] if again else None,
                "whole": {"change": change, "standard_error": error} if again else None,
                "bases": facts["steps"] * facts["config"]["train"]["batch_size"] * facts["config"]["train"]["length"],
                "bases_per_second": facts.get("tokens_per_second"),
                "train_loss": facts["train_loss"],
                "config": facts["config"],
                "data": facts["data"],
            }
        )
    order = list(ROWS)
    rows.sort(key=lambda row: order.index(row["row"]) if row["row"] in order else len(order))
    compared, apart = _compare(rows)
    results = {"benchmark": "dna-pretraining", "rows": rows, "compared": compared, "not_judged": missing}
    write_json(out / "results.json", results)
    write_text(out / "results.md", _table(rows, compared, apart, missing))
    if any(row["curve"] for row in rows):
        _draw(rows, out / "context.svg")
    return results


def _compare(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(what each row needs more than each before it on the same bases, by the length of the windows; the rows that were
    judged on others than the first)."""
    read = {row["row"]: ByContext.from_dict(row["by_context"]) for row in rows if row["curve"]}
    compared, apart = [], []
    for beside, name in itertools.combinations(read, 2):
        one, other = read[name], read[beside]
        if one.paired(other):
            steps = [
                {"context": length, "difference": more, "standard_error": error}
                for length, (more, error) in zip(one.lengths, one.less(other), strict=True)
            ]
            compared.append({"row": name, "beside": beside, "by_context": steps})
        elif beside == next(iter(read)):
            apart.append(name)
    return compared, apart


def _name(row: str) -> str:
    return _NAMES.get(row, row)


def _table(
    rows: Sequence[Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
    apart: Sequence[str],
    missing: Sequence[str],
) -> str:
    points = {row["row"]: row["curve"] for row in rows if row["curve"]}
    windows = {name: [point for point in curve if not point["carried"]] for name, curve in points.items()}
    lengths = sorted({point["last"] for curve in windows.values() for point in curve})
    shown = [f"{length:,}" for length in lengths]

    def aligned(cells: Mapping[int, str]) -> list[str]:
        return [cells.get(length, "") for length in lengths]

    def lines_of(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
        return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]

    body = []
    for row in rows:
        cells = [_name(row["row"]), f"{row['parameters']:,}", f"{row['bases']:,}"]
        cells.append(f"{row['window']['bits_per_token']:.4f}")
        means = {point["last"]: f"{point['bits_per_token']:.4f}" for point in windows.get(row["row"], ())}
        body.append([*cells, *aligned(means)])
    lines = lines_of(["model", "parameters", "bases seen", "bits per base", *shown], body)
    lines += ["", "Bits per base: of all that is held out, in windows that follow each other."]
    if not points:
        return "\n".join([*lines, *_notes(rows, apart, missing)]) + "\n"
    lines.append(
        "Columns by length: of the same bases each, in windows of so many, of which the second half is judged: half as"
    )
    lines.append("many bases and more stand before each. Judged of each row: " + _judged(rows) + ".")

    lines += ["", "What twice the context brings, base by base (less than 0: the loss falls):", ""]
    body = []
    for name, curve in windows.items():
        changes = {point["last"]: _change(point) for point in curve if point["change"] is not None}
        (whole,) = (row["whole"] for row in rows if row["row"] == name)
        body.append([_name(name), *aligned(changes)[1:], _change(whole)])
    lines += lines_of(["model", *shown[1:], "longest beside shortest"], body)
    beside = next(iter(points))
    body = [
        [_name(one["row"]), *aligned({step["context"]: _change(step, "difference") for step in one["by_context"]})]
        for one in compared
        if one["beside"] == beside
    ]
    if body:
        lines += ["", f"Bits per base more than {_name(beside)} on the same bases in the same windows:", ""]
        lines += lines_of(["model", *shown], body)
    lines += ["", "± is the standard error over loci; homologous ones count as one."]
    for name, curve in points.items():
        far = [f"{point['last']:,}: {_change(point)}" for point in curve if point["carried"]]
        if far:
            longest = windows[name][-1]["last"]
            lines.append(f"\n{_name(name)}, state carried, beside windows of {longest:,}: {', '.join(far)}.")
    return "\n".join([*lines, *_notes(rows, apart, missing)]) + "\n"


def _judged(rows: Sequence[Mapping[str, Any]]) -> str:
    told: dict[str, list[str]] = {}
    for row in rows:
        if row["curve"]:
            tokens = row["by_context"]["tokens"]
            text = f"{sum(tokens):,} bases of {len(tokens):,} loci"
            told.setdefault(text, []).append(_name(row["row"]))
    if len(told) == 1:
        return next(iter(told))
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in told.items())


def _notes(rows: Sequence[Mapping[str, Any]], apart: Sequence[str], missing: Sequence[str]) -> list[str]:
    def named(names: Sequence[str]) -> str:
        return ", ".join(map(_name, names))

    lines = []
    if apart:
        lines.append(f"\nJudged on other bases, and so not compared: {named(apart)}.")
    older = [row["row"] for row in rows if not row["curve"]]
    if older:
        lines.append(f"\nNot read again with other context, by an earlier version: {named(older)}; call again.")
    if missing:
        lines.append(f"\nNot judged, for nothing held out was as long as a window: {named(missing)}; lower --context.")
    return lines


def _change(point: Mapping[str, Any], key: str = "change") -> str:
    """A difference and its standard error, which a single locus has none of."""
    error = point["standard_error"]
    return f"{point[key]:+.5f}" + ("" if error is None else f" ± {error:.5f}")


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    made, axes = figure(7, 4.2)
    for number, row in enumerate(rows):
        for carried, style in ((False, "o-"), (True, "s:")):
            curve = [point for point in row["curve"] or () if point["carried"] == carried]
            if not curve:
                continue
            axes.errorbar(
                [point["last"] for point in curve],
                [point["bits_per_token"] for point in curve],
                [point["standard_error"] or 0.0 for point in curve],
                fmt=style,
                markersize=3,
                capsize=2,
                label=_name(row["row"]) + (", state carried" if carried else ""),
                color=f"C{number}",
            )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bases of context, at most (bars: standard error of the change)")
    axes.set_ylabel("bits per base, the same bases")
    axes.legend(frameon=False, fontsize=8)
    save_figure(made, path)
