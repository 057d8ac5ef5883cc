"""Next-base prediction on genomes with the paper's length warm-up: the loss as a function of the context, of Mamba, S4,
a dilated convolution and a Transformer with as many parameters, trained on the same windows in the same order."""

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
from statescan.evaluate import Evaluation, evaluate_tokens
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
        context: bases of a window in which the loss is followed over the position.
        carried: bases over which a model with a state of fixed size is followed with the state carried. Default: the
            longest power of two above `context`, up to 2^20, that a region held out is long; none where there is none.
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
        scores = folder / _SCORES
        if not scores.exists() or json.loads(scores.read_text(encoding="utf-8")).get("lengths") != lengths[row]:
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


def _regions(corpus: Corpus) -> list[tuple[int, int]]:
    """Where the regions that are held out begin and end in the ids that are."""
    ends = corpus.valid_documents
    assert ends is not None
    return list(itertools.pairwise(ends.tolist()))


def _lengths(row: str, regions: Sequence[tuple[int, int]], context: int, carried: int | None) -> dict[str, int | None]:
    """The lengths at which a row is judged.

    Raises:
        DataError: no region holds a window.
    """
    longest = max((end - start for start, end in regions), default=0) - 1
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
    device = "cuda" if torch.cuda.is_available() and run.train.accelerator != "cpu" else "cpu"
    model = CausalLM.from_pretrained(folder, device=device).eval()

    def judge(length: int, carry: bool) -> Evaluation:
        # Regions that are whole windows long, so that every position is judged on the same ones.
        kept, bounds = [], [0]
        for start, end in _regions(corpus):
            for first in range(start, end - length, length):
                kept.append(corpus.valid[first : first + length + 1])
                bounds.append(bounds[-1] + length + 1)
        tokens = np.concatenate(kept)
        with torch.autocast(device, torch.bfloat16, enabled=run.train.precision == "bf16"):
            return evaluate_tokens(
                model,
                tokens,
                tokenizer=corpus.tokenizer,
                context=min(length, 1 << 16) if carry else length,
                carry_state=carry,
                batch_size=None if carry else 1,
                documents=bounds,
            )

    context, carried = lengths["context"], lengths["carried"]
    assert context is not None
    scores: dict[str, Any] = {"machine": machine_facts(device), "parameters": model.parameter_count()}
    scores["lengths"] = dict(lengths)
    scores["window"] = judge(context, False).to_dict()
    scores["carried"] = None if carried is None else judge(carried, True).to_dict()
    write_json(folder / _SCORES, scores)


def report(out: str | os.PathLike[str]) -> dict[str, Any]:
    """results.json, results.md and context.svg of all judged rows in a folder, and the names of those that were not."""
    out = Path(out)
    rows, missing = [], []
    for path in sorted(out.glob(f"*/{_SCORES}")):
        scores = json.loads(path.read_text(encoding="utf-8"))
        # Earlier versions trained rows that they could not judge.
        if scores["window"] is None:
            missing.append(path.parent.name)
            continue
        facts = json.loads((path.parent / RUN_FILE).read_text(encoding="utf-8"))
        rows.append(
            {
                "row": path.parent.name,
                **scores,
                "bases": facts["steps"] * facts["config"]["train"]["batch_size"] * facts["config"]["train"]["length"],
                "bases_per_second": facts.get("tokens_per_second"),
                "train_loss": facts["train_loss"],
                "config": facts["config"],
                "data": facts["data"],
            }
        )
    order = list(ROWS)
    rows.sort(key=lambda row: order.index(row["row"]) if row["row"] in order else len(order))
    results = {"benchmark": "dna-pretraining", "rows": rows, "not_judged": missing}
    write_json(out / "results.json", results)
    write_text(out / "results.md", _table(rows, missing))
    if rows:
        _draw(rows, out / "context.svg")
    return results


def octaves(judged: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    """Bits per base and standard error of the predictions after 2^i to 2^(i + 1) - 1 bases, by 2^i.

    Args:
        judged: an `Evaluation` as a dict, whose buckets are half octaves.
    """
    found: dict[int, list[Mapping[str, Any]]] = {}
    for bucket in judged["by_position"]:
        found.setdefault(1 << (int(bucket["first"]).bit_length() - 1), []).append(bucket)
    made = {}
    for start, buckets in found.items():
        if start > 1 and 2 * max(bucket["last"] for bucket in buckets) < 3 * start:
            continue  # the end of the windows, a few positions
        count = sum(bucket["count"] for bucket in buckets)
        mean = sum(bucket["bits_per_token"] * bucket["count"] for bucket in buckets) / count
        # Both halves stand in the same windows, so their errors are taken as going together.
        error = sum((bucket["standard_error"] or 0.0) * bucket["count"] for bucket in buckets) / count
        made[start] = (mean, error)
    return made


def _name(row: Mapping[str, Any]) -> str:
    return _NAMES.get(str(row["row"]), str(row["row"]))


def _table(rows: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> str:
    curves = {row["row"]: octaves(row["window"]) for row in rows}
    lengths = sorted({length for curve in curves.values() for length in curve if length >= 64})
    head = ["model", "parameters", "bases seen", "bits per base", *(f"{length:,}" for length in lengths)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        curve = curves[row["row"]]
        cells = [_name(row), f"{row['parameters']:,}", f"{row['bases']:,}"]
        cells.append(f"{row['window']['bits_per_token']:.4f}")
        cells += [_shown(curve[length]) if length in curve else "" for length in lengths]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Columns by length: bits per base after so many bases, to twice as many."]
    lines.append("± is the standard error over the windows, or over the bases where there is one window.")
    for row in rows:
        if row["carried"]:
            curve = octaves(row["carried"])
            shown = ", ".join(f"{length:,}: {_shown(curve[length])}" for length in sorted(curve) if length >= 1 << 10)
            lines.append(f"\n{_name(row)}, state carried: {shown}.")
    if missing:
        names = ", ".join(_NAMES.get(name, name) for name in missing)
        lines.append(
            f"\nNot judged, for nothing held out was as long as a window: {names}; call with a lower --context."
        )
    return "\n".join(lines) + "\n"


def _shown(point: tuple[float, float]) -> str:
    """A mean and its standard error, which is 0 where one window alone was judged."""
    mean, error = point
    return f"{mean:.4f} ± {error:.4f}" if error else f"{mean:.4f}"


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    made, axes = figure(7, 4.2)
    for number, row in enumerate(rows):
        for kind, style in (("window", "o-"), ("carried", "s:")):
            if not row[kind]:
                continue
            curve = {length: point for length, point in octaves(row[kind]).items() if length >= 16}
            label = _name(row) + (", state carried" if kind == "carried" else "")
            means, errors = zip(*curve.values(), strict=True)
            axes.errorbar(
                list(curve), means, errors, fmt=style, markersize=3, capsize=2, label=label, color=f"C{number}"
            )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bases of context")
    axes.set_ylabel("bits per base")
    axes.legend(frameon=False, fontsize=8)
    save_figure(made, path)
