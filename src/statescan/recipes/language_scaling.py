"""Language models of four sizes and five families on the same text with the same care: loss against parameters.

The paper's figure 4 asks whether an attention-free model keeps up with a strong Transformer as both grow. Here the text
is 54 MB of English novels of which whole books are held out, which is enough for models of up to some 16 million
parameters; ``statescan reproduce language-scaling`` trains, judges and tables them. Everything that decides how a row
is trained stands in this file.

Sizes are matched by the parameters outside of the embedding: two Mamba blocks stand beside one Transformer block, as in
the paper, and the MLP takes up the difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from statescan.data import TokenFile, Tokenizer, build_token_file, load_tokenizer, read_texts
from statescan.errors import ConfigError, MissingExtraError, TrainingError
from statescan.evaluate import row_bits
from statescan.evaluate.ratios import ratio_of_sums
from statescan.files import atomic_file, make_folder, write_json, write_text
from statescan.models import CausalLM, MambaConfig, ModelConfig
from statescan.models.baseline_config import RecurrentConfig, S4Config, TransformerConfig
from statescan.recipes.novels import NOVELS, find_text, read_corpus
from statescan.recipes.synthetic import figure, machine_facts, save_figure
from statescan.train import Callback, DataConfig, RunConfig, TrainConfig, load_run, train
from statescan.train.finished import check_same, run_status
from statescan.train.logs import read_csv
from statescan.train.loop import RUN_FILE
from statescan.train.utilization import utilization

__all__ = [
    "FACTORS",
    "FAMILIES",
    "GRID",
    "HALVINGS",
    "MOST_PASSES",
    "ROWS",
    "SIZES",
    "Judged",
    "PowerLaw",
    "best_tried",
    "bpe_tokenizer",
    "fit_power_law",
    "halvings",
    "initial_spread",
    "judge",
    "language_scaling",
    "loss_rise",
    "measure_speed",
    "own_settings",
    "paired_difference",
    "row_status",
    "scaling_run",
    "schedule",
    "settings_of",
    "train_row",
    "tune",
    "tuned",
    "tuned_at",
    "verified_at",
]

# Whatever tells one trial of a grid from another.
_Tried = TypeVar("_Tried", bound=Hashable)

FAMILIES = {
    "mamba": "Mamba",
    "transformer++": "Transformer++",
    "pythia": "Transformer (Pythia)",
    "lstm": "LSTM",
    "s4": "S4",
}
# Width of each size; the smallest is where learning rates are tuned.
SIZES = {"0.3m": 96, "1m": 160, "4m": 256, "16m": 448}
_BYTES = 256
_OF_ONE_SIZE = ("lstm", "s4")


def _mamba(d_model: int, n_layer: int) -> MambaConfig:
    return MambaConfig(d_model, n_layer, _BYTES)


def initial_spread(d_model: int) -> float:
    """Standard deviation of initial weights: 0.02, where GPT-2 has it, is too small for narrower models."""
    return round(0.02 * math.sqrt(768 / d_model), 4)


def _transformer(d_model: int, n_layer: int, n_head: int, d_intermediate: int) -> TransformerConfig:
    return TransformerConfig(
        d_model,
        n_layer,
        _BYTES,
        n_head=n_head,
        d_intermediate=d_intermediate,
        initializer_range=initial_spread(d_model),
    )


def _pythia(d_model: int, n_layer: int, n_head: int, d_intermediate: int) -> TransformerConfig:
    """LayerNorm, GELU, biases, attention beside the MLP, a quarter of each head turned, an untied head."""
    return TransformerConfig(
        d_model,
        n_layer,
        _BYTES,
        n_head=n_head,
        d_intermediate=d_intermediate,
        mlp="gelu",
        norm="layer",
        bias=True,
        parallel=True,
        rotary_fraction=0.25,
        tie_embeddings=False,
        init="neox",
        initializer_range=initial_spread(d_model),
    )


ROWS: dict[str, ModelConfig] = {
    "mamba-0.3m": _mamba(96, 4),
    "transformer++-0.3m": _transformer(96, 2, 3, 344),
    "pythia-0.3m": _pythia(96, 2, 3, 512),
    "mamba-1m": _mamba(160, 6),
    "transformer++-1m": _transformer(160, 3, 5, 528),
    "pythia-1m": _pythia(160, 3, 5, 784),
    "mamba-4m": _mamba(256, 10),
    "transformer++-4m": _transformer(256, 5, 4, 800),
    "pythia-4m": _pythia(256, 5, 4, 1192),
    "mamba-16m": _mamba(448, 12),
    "transformer++-16m": _transformer(448, 6, 7, 1344),
    "pythia-16m": _pythia(448, 6, 7, 2008),
    "lstm-1m": RecurrentConfig(192, 3, _BYTES),
    "s4-1m": S4Config(160, 3, _BYTES, mixer="s4", d_intermediate=512),
}

# The paper's recipe (appendix E.2): AdamW (0.9, 0.95), decay 0.1, clipping at 1, warm-up and a cosine to 1e-5.
_WINDOWS, _LENGTH, _WARMUP = 8, 2048, 0.1
_WEIGHT_DECAY, _BETAS, _CLIP, _MIN_LR = 0.1, (0.9, 0.95), 1.0, 1e-5
# An LSTM reads one token after the other: more rows of shorter windows, the state carried from each to the next.
_LSTM = {"batch_size": 32, "length": 512, "initial_state": "carry", "capture": False}
PASSES = 1.0
# More often read, 54 MB would be learnt by heart.
MOST_PASSES = 4.0
# Learning rates and dropout are tuned over the same grid for all, by the books held out for that (novels_valid), each
# run a quarter of a pass with a cosine of its own. LSTM and S4 at their own size.
GRID, DROPOUTS, TUNING_PASSES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2), (0.0, 0.1), 0.25
# A wider model's rate falls as 1 / width, beginning at width 96: Adam's rate of hidden matrices in muP (Yang et al.
# 2022, arXiv:2203.03466, table 3). Here it is the rate of all a model's weights, their initial values are not muP's,
# and depth grows, too. So the rule is tried where it may fail: which factor is best at one size holds from there on.
FACTORS, _VERIFIED, _FROM_THERE = (0.5, 1.0, 2.0), "4m", ("4m", "16m")
# Where a folder holds no tuning of its own: the grid's winners (docs/reproduction.md).
RATES = {"mamba": 3.2e-2, "transformer++": 8e-3, "pythia": 1.6e-2, "lstm": 3.2e-2, "s4": 1.6e-2}
DROPOUT = {"mamba": 0.0, "transformer++": 0.0, "pythia": 0.1, "lstm": 0.0, "s4": 0.0}
# A row of the training's log above the least before it by this factor is a loss that blew up: harder text, where books
# are read one after the other, comes to 1.2.
BLOWN_UP = 1.5
# Such a row of any family is set aside and trained anew at half its rate, so often at most.
HALVINGS, _ASIDE = 2, "blown-up"
# Tokens of a window that hold about as many bytes, where ids are of BPE.
_BPE_LENGTH, _BPE_VOCABULARY = 512, 8192

_SCORE, _WINDOW_BITS, _SPEED, _DIVERGED = "score.json", "windows.npz", "speed.json", "diverged.json"
# Fields of `DataConfig` that say where something lies.
_PLACES = ("paths", "valid_paths", "cache")
# Logits held at once while judging: those of 65,536 bytes.
_LOGITS = 1 << 24


def family_of(row: str) -> str:
    """The family that a row belongs to: "mamba-4m" is of "mamba"."""
    return row.rpartition("-")[0]


def learning_rate_of(row: str, rate: float | None = None, factor: float = 1.0) -> float:
    """A row's rate from its family's at width 96, ``factor * rate * 96 / d_model``; LSTM and S4 keep the family's.

    Args:
        row: of `ROWS`.
        rate: the family's. Default: that of `RATES`.
        factor: on the rule.

    Source: Yang et al., "Tensor Programs V" (2022), arXiv:2203.03466, table 3, of hidden matrices under Adam; here of
    all weights.
    """
    family = family_of(row)
    rate = RATES[family] if rate is None else rate
    return rate if family in _OF_ONE_SIZE else factor * rate * SIZES["0.3m"] / ROWS[row].d_model


def tuned_at(row: str) -> str:
    """The row by which another one's rate and dropout are tuned: its family's smallest; of LSTM and S4 their only."""
    family = family_of(row)
    return row if family in _OF_ONE_SIZE else f"{family}-0.3m"


def verified_at(row: str) -> str | None:
    """The row at which the rule that carries a rate to this one is tried; None of sizes that take it as it is."""
    family, _, size = row.rpartition("-")
    return f"{family}-{_VERIFIED}" if size in _FROM_THERE and family not in _OF_ONE_SIZE else None


def best_tried(bits: Mapping[_Tried, float | None], tried: Sequence[_Tried]) -> _Tried | None:
    """What of a grid came to the fewest bits.

    Args:
        bits: of what was tried so far; None where it diverged, which is worse than any other.
        tried: all that must have been.

    Returns:
        None where some of it is missing, or all of it diverged.
    """
    if not set(tried) <= bits.keys():
        return None
    found = {one: value for one in tried if (value := bits[one]) is not None and math.isfinite(value)}
    return min(found, key=found.__getitem__) if found else None


def tuned(row: str, out: str | os.PathLike[str]) -> dict[str, float]:
    """What `tune` found best for a row's family at its smallest size, carried to the row by the rule, and by the factor
    on the rule that it found best where that was tried; halved as often as the row's loss blew up there.

    Args:
        row: of `ROWS`.
        out: the folder that was tuned in.

    Returns:
        {"lr", "dropout"}; empty where the grid, or what verifies the rule for such a row, was not gone through: some of
        it is not the same care.
    """
    told = _read_json(Path(out) / "tuning.json") or ()
    bits = {(one["row"], one["lr"], one["dropout"]): one["bits_per_byte"] for one in told}
    smallest, larger, factor = tuned_at(row), verified_at(row), 1.0
    found = best_tried(bits, [(smallest, lr, DROPOUTS[0]) for lr in GRID])
    found = None if found is None else best_tried(bits, [(smallest, found[1], dropout) for dropout in DROPOUTS])
    if found is None:
        return {}
    _, rate, dropout = found
    if larger is not None:
        factors = {(larger, learning_rate_of(larger, rate, one), dropout): one for one in FACTORS}
        kept = best_tried(bits, list(factors))
        if kept is None:
            return {}
        factor = factors[kept]
    return {"lr": learning_rate_of(row, rate, factor) / 2 ** halvings(row, out), "dropout": dropout}


def halvings(row: str, out: str | os.PathLike[str]) -> int:
    """How often a row's rate is halved in a folder of the table: once for each of its runs that lies aside since its
    loss blew up."""
    return len(list((Path(out) / _ASIDE).glob(f"{row}-lr*")))


def own_settings(row: str, out: str | os.PathLike[str]) -> dict[str, float]:
    """What a folder of the table says of a row's rate and dropout: "lr" and "dropout" where it was tuned there, see
    `tuned`; else "lr" alone where it was halved; else nothing, and the recipe's own hold."""
    found = tuned(row, out)
    if not found and (halved := halvings(row, out)):
        found = {"lr": learning_rate_of(row) / 2**halved}
    return found


def schedule(steps: int) -> dict[str, int]:
    """The fields of `TrainConfig` that follow from the number of updates: a killed run loses an eighth at most."""
    return {
        "steps": steps,
        "warmup": round(_WARMUP * steps),
        "log_every": max(1, steps // 64),
        "checkpoint_every": max(1, steps // 8),
    }


def scaling_run(
    row: str,
    data: str | os.PathLike[str],
    *,
    tokenizer: str = "bytes",
    passes: float = PASSES,
    lr: float | None = None,
    dropout: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> RunConfig:
    """The whole run of a row of the table.

    Args:
        row: one of `ROWS`.
        data: folder of the novels, see `statescan.recipes.novels`.
        tokenizer: "bytes", or a `tokenizers` JSON file.
        passes: through the training books, `MOST_PASSES` at most.
        lr, dropout: in place of the row's own.
        seed: of weights and order.
        device: "cpu" or "cuda"; bfloat16 autocast on the latter.

    Raises:
        ConfigError: an unknown row, less than one update, or too many passes.
        DataError: the texts can't be found.
    """
    if row not in ROWS:
        raise ConfigError(f"language-scaling: the row must be one of {', '.join(ROWS)}, got {row!r}")
    if not passes <= MOST_PASSES:
        raise ConfigError(f"language-scaling: passes must be {MOST_PASSES:g} at most, got {passes:g}")
    family = family_of(row)
    ids = load_tokenizer(tokenizer)
    model = ROWS[row].replace(vocab_size=ids.vocab_size, dropout=DROPOUT[family] if dropout is None else dropout)
    length = _LENGTH if tokenizer == "bytes" else _BPE_LENGTH
    fields: dict[str, Any] = {"batch_size": _WINDOWS, "length": length}
    if family == "lstm":
        fields |= _LSTM
        fields["length"] = length // (_LENGTH // _LSTM["length"])
    tokens = len(read_corpus(data, NOVELS[0], tokenizer=ids))
    steps = round(passes * tokens / (fields["batch_size"] * fields["length"]))
    if steps < 1:
        raise ConfigError(f"language-scaling: passes must make at least one update of {tokens} ids, got {passes}")
    settings = TrainConfig(
        lr=learning_rate_of(row) if lr is None else lr,
        min_lr=_MIN_LR,
        weight_decay=_WEIGHT_DECAY,
        betas=_BETAS,
        clip=_CLIP,
        precision="bf16" if device == "cuda" else "float32",
        seed=seed,
        evaluate_every=0,
        evaluate_tokens=0,
        keep_checkpoints=1,
        accelerator="cuda" if device == "cuda" else "cpu",
        **schedule(steps),
        **fields,
    )
    texts = DataConfig(
        paths=(str(find_text(data, NOVELS[0])),), valid_paths=(str(find_text(data, NOVELS[1])),), tokenizer=tokenizer
    )
    return RunConfig(model, texts, settings)


class _Watch(Callback):
    """When each row of the log came: the device had done all steps up to it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float]] = []

    def on_log(self, row: dict[str, float]) -> None:
        self.rows.append((int(row["step"]), time.perf_counter()))

    def speed(self, tokens_per_step: int) -> float | None:
        """Median tokens a second between two rows, the first two (compiling, capturing) left out; None of too few."""
        steps, moments = np.array(self.rows[1:]).T if len(self.rows) > 2 else (np.zeros(1), np.zeros(1))
        if len(steps) < 2:
            return None
        return float(np.median(np.diff(steps) * tokens_per_step / np.diff(moments)))


def train_row(run: RunConfig, folder: str | os.PathLike[str], *, say: Callable[[str], object] = print) -> CausalLM:
    """Trains a run, or goes on with it, or reads it where it is done.

    Args:
        run: what `scaling_run` gave.
        folder: of this run alone.
        say: called with lines of progress.

    Returns:
        The model, in evaluation mode, on the run's device; `speed.json` in the folder holds pace and memory of the
        call that ended the training.

    Raises:
        CheckpointError: another run lies in the folder, or one of other texts.
        TrainingError: it diverged.
        KeyboardInterrupt: a signal came; what was trained is kept.
    """
    folder, device = Path(folder), run.train.accelerator
    status = row_status(run, folder)
    if status != "finished":
        say(f"training {folder.name}: {run.train.steps:,} updates, learning rate {run.train.lr:.4g}")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        # What earlier rows of this process left there, handles' workspaces, say, is not this one's.
        lying = torch.cuda.memory_allocated() if device == "cuda" else 0
        watch, begun = _Watch(), time.perf_counter()
        result = train(run, folder, resume=status is not None, progress=False, callbacks=[watch])
        if result.interrupted:
            raise KeyboardInterrupt
        pace = watch.speed(run.train.batch_size * run.train.length)
        used = None
        if pace is not None:
            used = utilization(run.model, run.train.length, pace, torch.device(device), run.train.precision)
        facts = {
            "tokens_per_second": pace,
            "model_flop_utilization": used,
            "peak_bytes": torch.cuda.max_memory_allocated() - lying if device == "cuda" else None,
            "seconds": round(time.perf_counter() - begun, 2),
            "machine": machine_facts(device),
        }
        write_json(folder / _SPEED, facts)
        bits = f"{result.evaluations[-1][1]:.4f} bits per byte of the held-out books, " if result.evaluations else ""
        share = "" if used is None else f", {100 * used:.1f} % of the peak in model operations"
        say(f"{folder.name}: {bits}{facts['seconds']:.1f} s, {pace or math.nan:,.0f} tokens/s{share}")
        if result.signalled:
            raise KeyboardInterrupt
    # Nobody goes on with a run that is done, and they take three times the room of the model.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return CausalLM.from_pretrained(folder, device=device).eval()


def row_status(run: RunConfig, folder: Path) -> str | None:
    """How far the run in a folder is; None where there is none.

    Args:
        run: what `scaling_run` gave.
        folder: of this run alone.

    Raises:
        CheckpointError: another run lies in the folder, or one of other texts.
    """
    ids = load_tokenizer(run.data.tokenizer)
    texts = {"digest": run.data.paths, "valid_digest": run.data.valid_paths}
    # A finished run is of these texts, too; whether one that goes on is, training asks.
    digests = {
        name: build_token_file(paths, ids, cache=run.data.cache).digest for name, paths in texts.items() if paths
    }
    status = run_status(folder, data=digests)
    if status is not None:
        # A finished run is known by what its texts hold, wherever they lie now; one that goes on reads them again.
        wanted = settings_of(run) if status == "finished" else run.to_dict()
        check_same(folder / RUN_FILE, load_run(folder).to_dict(), wanted)
    return status


def settings_of(run: RunConfig) -> dict[str, Any]:
    """All that decides what a run learns, without where its texts and their token files lie."""
    facts = run.to_dict()
    return facts | {"data": {name: value for name, value in facts["data"].items() if name not in _PLACES}}


class Judged(NamedTuple):
    """bits, bytes: what each window cost and holds; book: which book it is of. All (windows,)."""

    bits: NDArray[np.float64]
    bytes: NDArray[np.int64]
    book: NDArray[np.int64]

    def mean(self) -> tuple[float, float]:
        """(bits per byte, its standard error), the windows taken as independent."""
        return ratio_of_sums(self.bits, self.bytes)


def judge(model: CausalLM, file: TokenFile, tokenizer: Tokenizer, length: int) -> Judged:
    """Bits of every window of some books, each window read from an empty context, none across two books.

    Args:
        model: in evaluation mode.
        file: the books, each a document.
        tokenizer: theirs.
        length: predictions of a window; the last of a book is shorter.

    Returns:
        Judged: a book's first id is not judged, since nothing comes before it.
    """
    device = model.lm_head.weight.device
    at_once = max(1, _LOGITS // (length * model.config.padded_vocab_size))
    bits: list[float] = []
    sizes: list[int] = []
    books: list[int] = []
    for number, ids in enumerate(books_of(file, tokenizer)):
        whole, rest = divmod(len(ids) - 1, length)
        starts = [window * length for window in range(whole)]
        batches = [(starts[first : first + at_once], length) for first in range(0, whole, at_once)]
        if rest:
            batches.append(([whole * length], rest))
        for some, size in batches:
            pieces = [piece for _, piece in row_bits(model, ids, some, size, size, device)]
            bits += np.concatenate(pieces, axis=1).sum(1).tolist()
            sizes += [len(tokenizer.decode_bytes(ids[start + 1 : start + 1 + size])) for start in some]
            books += [number] * len(some)
    return Judged(np.array(bits), np.array(sizes), np.array(books))


def books_of(file: TokenFile, tokenizer: Tokenizer) -> list[NDArray[Any]]:
    """The ids of each book, without the mark that parts it from the next."""
    offsets = np.asarray(file.document_offsets)
    books = [file.tokens[start:end] for start, end in pairwise(offsets)]
    end = tokenizer.end_of_text
    return [book[:-1] if end is not None and len(book) and book[-1] == end else book for book in books]


def paired_difference(one: Judged, other: Judged) -> tuple[float, float]:
    """(mean difference in bits per byte of two models on the same windows, its standard error).

    Raises:
        ConfigError: they were judged on other windows.
    """
    if not np.array_equal(one.bytes, other.bytes):
        raise ConfigError("language-scaling: wanted two models judged on the same windows; judge both anew")
    return ratio_of_sums(one.bits - other.bits, one.bytes)


class PowerLaw(NamedTuple):
    """``bits = scale * parameters ** -exponent``; standard_error: of the exponent, None of two points."""

    scale: float
    exponent: float
    standard_error: float | None = None

    def at(self, parameters: float) -> float:
        """The bits that it says."""
        return self.scale * parameters**-self.exponent


def fit_power_law(parameters: Sequence[float], bits: Sequence[float]) -> PowerLaw:
    """The straight line of least squares through log bits over log parameters.

    Args:
        parameters: of at least two sizes.
        bits: per byte.

    Returns:
        PowerLaw: the exponent's standard error is that of a slope, by how far the points lie from the line.

    Raises:
        ConfigError: fewer than two points.
    """
    if len(parameters) != len(bits) or len(bits) < 2:
        raise ConfigError(f"fit_power_law: wanted at least two points, got {len(parameters)} and {len(bits)}")
    x, y = np.log(parameters), np.log(bits)
    slope, offset = np.polyfit(x, y, 1)
    error = None
    if len(x) > 2:
        left = float(((y - slope * x - offset) ** 2).sum())
        error = math.sqrt(left / (len(x) - 2) / float(((x - x.mean()) ** 2).sum()))
    return PowerLaw(float(np.exp(offset)), float(-slope), error)


def loss_rise(log: str | os.PathLike[str]) -> tuple[float, int] | None:
    """How far a training loss rose again after it had fallen.

    Args:
        log: a run's log.csv, whose rows are means over the updates since the row before.

    Returns:
        (the largest ratio of a row to the least before it, the update that row ends at); None of fewer than two rows.
    """
    rows = [(int(row["step"]), float(row["loss"])) for row in read_csv(log)]
    rows = [row for row in rows if math.isfinite(row[1])]
    losses = np.array([loss for _, loss in rows])
    if len(losses) < 2:
        return None
    rises = losses[1:] / np.minimum.accumulate(losses)[:-1]
    most = int(rises.argmax())
    return float(rises[most]), rows[most + 1][0]


def parameters_outside(model: CausalLM) -> int:
    """Parameters of a model but for its embedding and, where that is another, its head."""
    embedding = model.backbone.embedding.weight.numel()
    return model.parameter_count() - embedding * (1 if model.config.tie_embeddings else 2)


def bpe_tokenizer(
    data: str | os.PathLike[str], folder: str | os.PathLike[str], vocab_size: int = _BPE_VOCABULARY
) -> Path:
    """A byte-level BPE tokenizer trained on the training books; read where the folder has one.

    Args:
        data: folder of the novels.
        folder: where tokenizer.json stands or is written.
        vocab_size: ids, the mark between documents among them.

    Returns:
        The JSON file.

    Raises:
        MissingExtraError: `tokenizers` is not installed.
    """
    path = Path(folder) / "tokenizer.json"
    if path.exists():
        return path
    try:
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise MissingExtraError("training a tokenizer", "tokenizers", "hub") from None
    made = Model(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text("replace") for document in read_texts(str(find_text(data, NOVELS[0]))))
    made.train_from_iterator(texts, trainer)
    make_folder(Path(folder))
    with atomic_file(path) as temporary:
        temporary.write_text(made.to_str(), encoding="utf-8", newline="")
    return path


def tune(
    rows: Iterable[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str = "bytes",
    passes: float = TUNING_PASSES,
    device: str = "cpu",
    change: Callable[[RunConfig], RunConfig] = lambda run: run,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Trains each row with every rate of `GRID`, at the best one with every dropout, and larger ones with `FACTORS`.

    Args:
        rows: of `ROWS`; what is trained is the row that each is tuned by, see `tuned_at`, and the one by which the rule
            that carries the rate to it is verified, see `verified_at`.
        data: folder of the novels.
        out: a folder for each run in its ``tuning/``; what is done is not done again.
        tokenizer, passes, device: as for `scaling_run`.
        change: what is made of each run before it starts.
        say: called with lines of progress.

    Returns:
        All that lies in ``tuning/``: {"row", "lr", "dropout", "updates", "bits_per_byte"} of the held-out books, None
        where it diverged.
    """
    rows, parent = list(rows), Path(out) / "tuning"

    def bits(row: str, lr: float, dropout: float) -> float:
        run = change(scaling_run(row, data, tokenizer=tokenizer, passes=passes, lr=lr, dropout=dropout, device=device))
        if (run.train.lr, run.model.dropout) != (lr, dropout):
            raise ConfigError(
                f"language-scaling: tune tries rates and dropouts of its own, here {lr:g} and {dropout:g}, got "
                f"{run.train.lr:g} and {run.model.dropout:g} in their place; leave train.lr and model.dropout alone"
            )
        folder = parent / f"{row}-lr{lr:g}-dropout{dropout:g}"
        status = row_status(run, folder)
        # Of a run that is done its log tells all: its weights, which nobody needs, may be gone.
        if status != "finished" and not (status is not None and (folder / _DIVERGED).exists()):
            try:
                train_row(run, folder, say=say)
            except TrainingError as problem:
                write_json(folder / _DIVERGED, {"error": str(problem)})
                say(f"{folder.name}: diverged")
        found = _tuning_bits(folder)
        # A diverged run is worse than any other.
        return math.inf if found is None else found

    larger = {tuned_at(row): one for row in rows if (one := verified_at(row)) is not None}
    for row in dict.fromkeys(tuned_at(row) for row in rows):
        best = min(GRID, key=lambda lr: bits(row, lr, DROPOUTS[0]))
        if best in (GRID[0], GRID[-1]):
            say(f"{row}: {best:g} is the best of the grid and at its end; a rate beyond it may be better")
        dropout = min(DROPOUTS, key=lambda one: bits(row, best, one))
        carried = larger.get(row)
        if carried is not None:
            tried = {factor: bits(carried, learning_rate_of(carried, best, factor), dropout) for factor in FACTORS}
            factor = min(tried, key=lambda factor: tried[factor])
            if factor in (FACTORS[0], FACTORS[-1]):
                say(f"{carried}: {factor:g} times the rule is the best of what was tried and at its end")
    found = []
    for path in sorted(parent.glob(f"*/{RUN_FILE}")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["status"] == "finished" or (path.parent / _DIVERGED).exists():
            settings = facts["config"]["train"]
            found.append(
                {
                    "row": path.parent.name.partition("-lr")[0],
                    "lr": settings["lr"],
                    "dropout": facts["config"]["model"]["dropout"],
                    "updates": settings["steps"],
                    "bits_per_byte": _tuning_bits(path.parent),
                }
            )
    write_json(Path(out) / "tuning.json", found)
    return found


def _tuning_bits(folder: Path) -> float | None:
    """Bits per byte of the held-out books that a run of `tune` came to; None where it diverged."""
    if (folder / _DIVERGED).exists():
        return None
    found = _read_json(folder / RUN_FILE)["evaluations"][-1][1]
    return found if math.isfinite(found) else None


def measure_speed(
    row: str,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str = "bytes",
    device: str = "cpu",
    updates: int = 300,
    change: Callable[[RunConfig], RunConfig] = lambda run: run,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains a row for a moment, to time it while nothing else runs; kept in ``out/speed/ROW.json``.

    Args:
        row: of `ROWS`.
        data, tokenizer, device, change: as for `tune`.
        out: folder of the table.
        updates: how many; the median pace between sixths of them, the first two left out. At the end of each the host
            waits for the device, so few updates time the host.
        say: called with lines of progress.

    Returns:
        {"tokens_per_second", "bytes_per_second", "model_flop_utilization" (None where the peak isn't known),
        "peak_bytes", "seconds", "machine"}.
    """
    run = change(scaling_run(row, data, tokenizer=tokenizer, device=device))
    settings = dataclasses.replace(
        run.train,
        steps=updates,
        warmup=min(run.train.warmup, updates),
        log_every=max(1, updates // 6),
        checkpoint_every=0,
    )
    run = dataclasses.replace(
        run, train=settings, data=dataclasses.replace(run.data, valid_paths=(), valid_fraction=0.0)
    )
    place = Path(out) / "speed" / row
    shutil.rmtree(place, ignore_errors=True)
    train_row(run, place, say=say)
    facts = json.loads((place / _SPEED).read_text(encoding="utf-8"))
    file = read_corpus(data, NOVELS[0], tokenizer=load_tokenizer(tokenizer))
    pace = facts["tokens_per_second"]
    facts["bytes_per_second"] = None if pace is None else pace * file.bytes_per_token
    write_json(place.parent / f"{row}.json", facts)
    shutil.rmtree(place)
    return facts


def language_scaling(
    rows: Iterable[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str = "bytes",
    passes: float = PASSES,
    seed: int = 0,
    device: str = "cpu",
    change: Callable[[RunConfig], RunConfig] = lambda run: run,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains rows, or goes on with them, judges them on the unseen books and writes table and figure of all there are.

    Args:
        rows: of `ROWS`; none to write the report alone.
        data: folder of the novels.
        out: folder of the rows' folders, ``results.json``, ``results.md`` and ``figure.svg``; rates and dropouts come
            from its tuning, where it has one. A row whose loss blew up (`loss_rise` above `BLOWN_UP`) is kept in
            ``blown-up/`` and trained anew at half the rate, twice at most; other seeds take the rate as it is then.
        tokenizer, passes, seed, device: as for `scaling_run`.
        change: what is made of each run before it starts, for runs of another size.
        say: called with lines of progress.

    Returns:
        What `report` gives.

    Raises:
        CheckpointError: a folder holds another run, or one of other texts.
        KeyboardInterrupt: interrupted; what was trained is kept.
    """
    out = make_folder(Path(out))
    ids = load_tokenizer(tokenizer)

    def run_of(row: str) -> RunConfig:
        best: dict[str, Any] = own_settings(row, out)
        return change(scaling_run(row, data, tokenizer=tokenizer, passes=passes, seed=seed, device=device, **best))

    runs = {row: run_of(row) for row in rows}
    folders = {row: out / (row if seed == 0 else f"{row}-seed{seed}") for row in runs}
    # All of them before the first is trained: one that can't be is told at once.
    for row, run in runs.items():
        row_status(run, folders[row])
    for row, run in runs.items():
        books, folder = read_corpus(data, NOVELS[2], tokenizer=ids), folders[row]
        model = train_row(run, folder, say=say)
        while seed == 0 and _set_aside(row, run, out, say):
            run = run_of(row)
            model = train_row(run, folder, say=say)
        score = _read_json(folder / _SCORE)
        if score is None:
            write_score(
                folder, row, model, judge(model, books, ids, judged_length(row, run.train.length)), books.digest
            )
            say(f"{folder.name}: judged")
        else:
            check_same(folder / _SCORE, score, {"digest": books.digest}, "books")
    return report(out)


def _set_aside(row: str, run: RunConfig, out: Path, say: Callable[[str], object]) -> bool:
    """Moves a trained row out of the table where its loss blew up and its rate may be halved once more."""
    rise = loss_rise(out / row / "log.csv")
    if rise is None or rise[0] <= BLOWN_UP or halvings(row, out) >= HALVINGS:
        return False
    if run.train.lr != own_settings(row, out).get("lr", learning_rate_of(row)):
        return False  # a rate that was asked for
    place = make_folder(out / _ASIDE) / f"{row}-lr{run.train.lr:g}"
    os.replace(out / row, place)
    say(
        f"{row}: the loss rose to {rise[0]:.2f} times its least by update {rise[1]:,}; kept in '{place}', trained anew "
        "at half the rate"
    )
    return True


def judged_length(row: str, length: int) -> int:
    """Predictions of the windows a row is judged on, of those it learnt from: the same; an LSTM's as long as all's."""
    return length * (_LENGTH // _LSTM["length"] if family_of(row) == "lstm" else 1)


def write_score(folder: Path, row: str, model: CausalLM, judged: Judged, digest: str) -> None:
    """What a row came to: each window's bits, and their sum over all books and over each; `digest` is the books'."""
    with atomic_file(folder / _WINDOW_BITS) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(
            stream,
            bits=judged.bits.astype(np.float32),
            bytes=judged.bytes.astype(np.int32),
            book=judged.book.astype(np.int32),
        )
    mean, error = judged.mean()
    books = []
    for number in np.unique(judged.book):
        here = judged.book == number
        one, spread = ratio_of_sums(judged.bits[here], judged.bytes[here])
        books.append(
            {
                "bytes": int(judged.bytes[here].sum()),
                "bits_per_byte": one,
                "standard_error": spread if math.isfinite(spread) else None,
            }
        )
    write_json(
        folder / _SCORE,
        {
            "row": row,
            "digest": digest,
            "parameters": model.parameter_count(),
            "parameters_outside_embedding": parameters_outside(model),
            "bits_per_byte": mean,
            "standard_error": error if math.isfinite(error) else None,
            "books": books,
        },
    )


def read_judged(folder: Path) -> Judged:
    """The windows that `write_score` left."""
    with np.load(folder / _WINDOW_BITS) as held:
        return Judged(held["bits"].astype(np.float64), held["bytes"].astype(np.int64), held["book"].astype(np.int64))


def report(out: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes ``results.json``, ``results.md`` and, with matplotlib, ``figure.svg`` from the rows that lie in a folder.

    Rows are set beside Transformer++, beside their other seeds and on one line of a power law only where they read the
    same text, as many ids of the same tokenizer, and were judged on the same books in windows of one length. A law is
    of the basis that most rows share, of three rows at least that this folder's tuning told rate and dropout, and
    without those whose loss blew up.

    Args:
        out: folder of the rows' folders.

    Returns:
        {"rows", "power_laws", "basis": what most rows share, "apart": the rows of another one, "blown_up": those whose
        training loss rose to `BLOWN_UP` times its least, "not_tuned": those whose rate and dropout are not what the
        folder's tuning says, "not_run"}.

    Raises:
        ConfigError: there is no such folder.
    """
    out = Path(out)
    if not out.is_dir():
        raise ConfigError(f"language-scaling: wanted a folder of rows to report on, got '{out}', which is none")
    rows: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        folder = out / row
        if not (folder / _SCORE).exists() or not (folder / RUN_FILE).exists():
            continue
        facts, run = _read_json(folder / _SCORE), _read_json(folder / RUN_FILE)
        basis, rise = _basis(folder, row), loss_rise(folder / "log.csv")
        seeds = {path.parent.name.rpartition("-seed")[2]: path for path in sorted(out.glob(f"{row}-seed*/{_SCORE}"))}
        facts |= {
            "basis": basis,
            "held_out_bits_per_byte": run["evaluations"][-1][1] if run["evaluations"] else None,
            "training_nats_per_token": run["train_loss"],
            "loss_rise": None if rise is None else {"times": rise[0], "update": rise[1]},
            "updates": run["steps"],
            "passes": basis["ids"] / run["data"]["train_tokens"],
            "config": run["config"],
            "training": _read_json(folder / _SPEED),
            "alone": _read_json(out / "speed" / f"{row}.json"),
            "other_seeds": {
                seed: _read_json(path)["bits_per_byte"]
                for seed, path in seeds.items()
                if _basis(path.parent, row) == basis
            },
        }
        twin = f"transformer++-{row.rpartition('-')[2]}"
        if row != twin and (out / twin / _SCORE).exists() and _basis(out / twin, twin) == basis:
            facts["beside_transformer++"] = paired_difference(read_judged(folder), read_judged(out / twin))
        rows[row] = facts
    held = [facts["basis"] for facts in rows.values()]
    common = max(held, key=lambda basis: (held.count(basis), basis["ids"]), default=None)
    blown = [
        row for row, facts in rows.items() if (rise := facts["loss_rise"]) is not None and rise["times"] > BLOWN_UP
    ]
    not_tuned = [row for row, facts in rows.items() if _care(facts["config"]) != tuned(row, out)]
    laws = {}
    for family in FAMILIES:
        some = {
            row: facts
            for row, facts in rows.items()
            if family_of(row) == family and facts["basis"] == common and row not in (*blown, *not_tuned)
        }
        if len(some) > 2:
            sizes = [facts["parameters_outside_embedding"] for facts in some.values()]
            law = fit_power_law(sizes, [facts["bits_per_byte"] for facts in some.values()])
            laws[family] = law._asdict() | {"rows": list(some)}
    results = {
        "rows": rows,
        "power_laws": laws,
        "basis": common,
        "apart": [row for row, facts in rows.items() if facts["basis"] != common],
        "blown_up": blown,
        "not_tuned": not_tuned,
        "not_run": [row for row in ROWS if row not in rows],
    }
    write_json(out / "results.json", results)
    write_text(out / "results.md", _table(results))
    if rows:
        with contextlib.suppress(MissingExtraError):  # the table says all that the picture does
            _draw(results, out / "figure.svg")
    return results


def _basis(folder: Path, row: str) -> dict[str, Any]:
    """What a trained and judged row must have in common with those that it is compared with."""
    run = _read_json(folder / RUN_FILE)
    settings = run["config"]["train"]
    return {
        "text": run["data"]["digest"],
        "books": _read_json(folder / _SCORE)["digest"],
        "tokenizer": run["data"]["tokenizer"],
        "vocabulary": run["config"]["model"]["vocab_size"],
        "ids": run["steps"] * settings["batch_size"] * settings["length"],
        "window": judged_length(row, settings["length"]),
    }


def _care(config: Mapping[str, Any]) -> dict[str, float]:
    """What `tuned` tells, of a run as JSON has it."""
    return {"lr": config["train"]["lr"], "dropout": config["model"]["dropout"]}


def _table(results: Mapping[str, Any]) -> str:
    """What most rows share, the table in Markdown, a sentence for each power law, and which rows are special."""
    rows, common, lines = results["rows"], results["basis"], []
    if common is not None:
        lines += [f"{_shared(common)}.", ""]
    lines += [
        "| row | parameters outside the embedding | learning rate | dropout | passes | bits per byte, unseen books | "
        "other seeds | beside Transformer++ | training bytes/s alone (of the peak) | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row, facts in rows.items():
        alone, config = facts["alone"] or {}, facts["config"]
        beside = facts.get("beside_transformer++")
        error = facts["standard_error"]
        pace, peak, used = (alone.get(name) for name in ("bytes_per_second", "peak_bytes", "model_flop_utilization"))
        share = "" if used is None else f" ({100 * used:.1f} %)"
        cells = [
            f"{FAMILIES[family_of(row)]} {row.rpartition('-')[2].upper()}",
            f"{facts['parameters_outside_embedding']:,}",
            f"{config['train']['lr']:.3g}",
            f"{config['model']['dropout']:g}",
            f"{facts['passes']:.2f}",
            f"{facts['bits_per_byte']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            ", ".join(f"{bits:.4f}" for bits in facts["other_seeds"].values()),
            "" if beside is None else f"{beside[0]:+.4f} ± {beside[1]:.4f}",
            "not measured" if pace is None else f"{pace:,.0f}{share}",
            "not measured" if peak is None else f"{peak / 2**20:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for family, law in results["power_laws"].items():
        lines.append(
            f"{FAMILIES[family]}: bits per byte = {law['scale']:.3f} x parameters ^ {-law['exponent']:.4f}, "
            f"the exponent ± {law['standard_error']:.4f} by how far its {len(law['rows'])} rows lie from the line."
        )
    told = {
        f"Loss blew up, in training it rose to over {BLOWN_UP:g} times its least: a measure of the learning rate and "
        "not of the family, in no power law": [
            f"{row} ({rows[row]['loss_rise']['times']:.2f} times, by update {rows[row]['loss_rise']['update']:,})"
            for row in results["blown_up"]
        ],
        "Of other text, ids or windows than most rows, in no power law": [
            f"{row} ({_shared(rows[row]['basis'])})" for row in results["apart"]
        ],
        "Rate and dropout not from a grid gone through in this folder, in no power law": results["not_tuned"],
        "Not run": results["not_run"],
    }
    for what, which in told.items():
        if which:
            lines += ["", f"{what}: {', '.join(which)}."]
    return "\n".join(lines) + "\n"


def _shared(basis: Mapping[str, Any]) -> str:
    """A basis in words."""
    ids = "bytes" if basis["tokenizer"] == "bytes" else f"ids of {basis['tokenizer']} ({basis['vocabulary']:,})"
    return f"{basis['ids']:,} {ids} read in training, judged in windows of {basis['window']:,}"


_COLOURS = {"mamba": "#0072B2", "transformer++": "#D55E00", "pythia": "#009E73", "lstm": "#CC79A7", "s4": "#E69F00"}


def _draw(results: Mapping[str, Any], path: Path) -> None:
    """Bits per byte over parameters, both logarithmic, with the fitted lines, or joined by dots; hollow: rows apart."""
    made, axes = figure(7.0, 4.6)
    rows, laws = results["rows"], results["power_laws"]
    outside = {*results["blown_up"], *results["apart"]}
    for family, label in FAMILIES.items():
        some = {row: facts for row, facts in rows.items() if family_of(row) == family}
        if not some:
            continue
        colour, law = _COLOURS[family], laws.get(family)
        if law is not None:
            label += f": exponent {-law['exponent']:.3f} ± {law['standard_error']:.3f}"
            fitted = PowerLaw(law["scale"], law["exponent"])
            x = [rows[row]["parameters_outside_embedding"] for row in law["rows"]]
            axes.plot(x, [fitted.at(one) for one in x], color=colour, linewidth=1.2, linestyle="--")
        else:
            x = [facts["parameters_outside_embedding"] for facts in some.values()]
            axes.plot(x, [facts["bits_per_byte"] for facts in some.values()], ":", color=colour, linewidth=0.8)
        for row, facts in some.items():
            axes.errorbar(
                facts["parameters_outside_embedding"],
                facts["bits_per_byte"],
                facts["standard_error"] or 0.0,
                fmt="o",
                color=colour,
                markersize=5,
                markerfacecolor="white" if row in outside else colour,
                capsize=2,
            )
        axes.errorbar([], [], [], fmt="o", color=colour, markersize=5, capsize=2, label=label)
    for which, label in (("blown_up", "its loss blew up"), ("apart", "of other text, ids or windows")):
        if results[which]:
            axes.errorbar([], [], [], fmt="o", color="#555555", markersize=5, markerfacecolor="white", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.3f}")
    axes.yaxis.set_minor_formatter("{x:.3f}")
    axes.set_xlabel("parameters outside of the embedding")
    axes.set_ylabel("bits per byte of unseen books")
    axes.legend(frameon=False)
    save_figure(made, path)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
