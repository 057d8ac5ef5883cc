"""The byte-level Mamba that comes with the package: how it is trained, and its Transformer++ twin.

Both learn from the texts of `statescan.recipes.novels.SHIPPED_TEXTS` as bytes and are judged in bits per byte on whole
novels that neither has read. The text lies on the device from the first update to the last, windows are cut out of it
there, and an update is one CUDA graph: the host sends a few hundred bytes a step, so nothing ever waits for data.

Half of the windows are of copies of the texts in which names are given to others, so that a name that comes again is
looked up in what was read and not known by heart.

Mamba's last updates carry the state from window to window along the text, as the finished model does when it reads a
book: else it would meet states that no window of its training reached.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import operator
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statescan.data import ByteTokenizer, TokenFile
from statescan.data.names import swapped_copies
from statescan.errors import ConfigError, TrainingError
from statescan.evaluate import row_bits, window_bits
from statescan.files import atomic_file, make_folder, write_json, write_text
from statescan.models import CausalLM, MambaConfig, ModelConfig, TransformerConfig
from statescan.recipes.language_scaling import Judged, best_tried, initial_spread, paired_difference
from statescan.recipes.novels import NOVELS, SHIPPED_TEXTS, read_corpus
from statescan.recipes.synthetic import machine_facts, make_model
from statescan.train.capture import CapturedStep
from statescan.train.finished import check_same
from statescan.train.initial_state import InitialState
from statescan.train.optim import parameter_groups
from statescan.train.utilization import utilization

__all__ = [
    "DROPOUTS",
    "GRID",
    "ROWS",
    "SHARE",
    "UPDATES",
    "LanguageRun",
    "builtin_model",
    "compare",
    "judge",
    "train_language_model",
    "tune",
    "tuned",
]

_TRAINED, _LOG, _RESULTS, _TUNING, _DIVERGED = "trained.json", "log.csv", "results.json", "tuning.json", "diverged.json"
# Seconds between two rows of the log, at which alone the host waits for the device.
_LOOK_EVERY = 2.0
# Updates until a step is a graph, and updates that the host is ahead of the device at most.
_FIRST, _AHEAD = 4, 8
# Predictions of a piece where the state is carried through a whole novel.
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class LanguageRun:
    """One byte-level model and how it is trained.

    The learning rate rises over `warmup` updates and falls along a line to 0 at the end, which is after `steps` updates
    or `seconds` of them, whichever comes first: so a run is always fully decayed, however fast its machine.

    Args:
        row: its name in the table.
        model: what is trained.
        seconds: of updates, without compiling and judging; 0 for no limit. Default 430.
        steps: updates; 0 for no limit. Default 0.
        batch_size: windows of an update. Default 32.
        length: predictions of a window. Default 2048.
        lr: peak learning rate of AdamW.
        warmup: updates. Default 200.
        weight_decay: on matrices. Default 0.1.
        betas: AdamW's. Default (0.9, 0.95).
        clip: largest global norm of a gradient. Default 1.
        carried: the part of the run, its end, in which every row of a batch goes on where it ended, with its state.
            Default 0.
        fresh: the part of those rows that start from an empty state at each update, so that the start of a text stays
            known. Default 1/16.
        swapped: copies of the text with other names, see `statescan.data.names`, that lie beside it; half of the
            windows that begin anywhere are theirs. Default 0: none are.
        seed: of weights and order, and of the copies' names.
    """

    row: str
    model: ModelConfig
    seconds: float = 430.0
    steps: int = 0
    batch_size: int = 32
    length: int = 2048
    lr: float = 4e-3
    warmup: int = 200
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    carried: float = 0.0
    fresh: float = 1 / 16
    swapped: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps <= 0 and self.seconds <= 0:
            raise ConfigError("builtin-model: a run must end: wanted seconds > 0 or steps > 0, got neither")
        for name, least in (("batch_size", 1), ("length", 1), ("swapped", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"builtin-model: {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.carried <= 1 or not 0 <= self.fresh <= 1:
            raise ConfigError(
                f"builtin-model: carried and fresh must be in [0, 1], got {self.carried} and {self.fresh}"
            )
        if self.carried and not isinstance(self.model, MambaConfig):
            raise ConfigError(
                f"builtin-model: a state of fixed size is carried by Mamba alone, got {type(self.model).__name__} with "
                f"carried={self.carried}; set it to 0"
            )

    def progress(self, step: int, seconds: float) -> float:
        """The part of the run that is done, by updates or by time, whichever is further."""
        return max(step / self.steps if self.steps else 0.0, seconds / self.seconds if self.seconds else 0.0)

    def learning_rate(self, step: int, progress: float) -> float:
        """That of an update, from 0, at this part of the run."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * max(0.0, 1.0 - progress)

    def to_dict(self) -> dict[str, Any]:
        """All that decides how it is trained, as JSON takes it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["model"] = self.model.to_dict()
        return json.loads(json.dumps(fields))


# Updates of the packaged model's run, and so of its twin where no Mamba is trained beside it: 405 s of one H200.
UPDATES = 16_414
# The shape: what a GPU trains and a CPU decodes well at 16 MB in bfloat16. The Transformer++ has as many parameters,
# the same windows, copies with other names and as many updates (`builtin_model` sets them), and initial weights as wide
# as its width asks for; its rate and dropout are what the grid below chose. Mamba's row is the packaged run. The grid
# chose 8e-3 without dropout for it, which over all updates came out worse: 1.3434 bits per byte of the unseen novels
# with the state carried, 1.3380 with dropout 0.05, and 1.3367 for the row as it is (1.3720, 1.3646 and 1.3623 of the
# held-out ones in windows). A trial of an eighth meets its text once, which is no test of dropout.
ROWS: dict[str, LanguageRun] = {
    "mamba": LanguageRun(
        "mamba",
        MambaConfig(384, 8, 256, dropout=0.05),
        seconds=0.0,
        steps=UPDATES,
        lr=6e-3,
        carried=0.25,
        swapped=8,
    ),
    "transformer++": LanguageRun(
        "transformer++",
        TransformerConfig(
            320, 6, 256, n_head=5, d_intermediate=912, initializer_range=initial_spread(320), dropout=0.05
        ),
        seconds=0.0,
        steps=UPDATES,
        swapped=8,
    ),
}
# What `tune` tries of each row: every rate with the first dropout, and at the best rate the other ones; so many of the
# packaged run's updates each.
GRID, DROPOUTS, SHARE = (1e-3, 2e-3, 4e-3, 6e-3, 8e-3), (0.05, 0.0, 0.1, 0.2), 1 / 8
# The readings that two models are compared by: name, Mamba's, the Transformer's.
_PAIRS = (
    ("windows", "windows", "windows"),
    ("overlapping", "overlapping", "overlapping"),
    ("each as it reads best", "carried", "overlapping"),
)


class _Windows:
    """Where the rows of each update start in the text: anywhere, or on from where they ended."""

    def __init__(self, run: LanguageRun, tokens: int, copies: int) -> None:
        """`tokens` of the text, and after them `copies` of those with other names."""
        self._run, self._ends = run, [tokens - run.length, copies and tokens + copies - run.length]
        if tokens <= run.length:
            raise ConfigError(
                f"builtin-model: wanted a text of at least length + 1 = {run.length + 1} bytes, got {tokens}; take a "
                "longer one or a smaller length"
            )
        self._text = tokens
        self._random = np.random.default_rng(run.seed)
        self._lanes: NDArray[np.int64] | None = None

    def anywhere(self) -> NDArray[np.int64]:
        """(batch,) starts, independent of each other."""
        rows, (end, end_of_copies) = self._run.batch_size, self._ends
        starts = self._random.integers(0, end, rows)
        if not end_of_copies:
            return starts
        return np.where(
            self._random.random(rows) < 0.5,
            starts,
            self._random.integers(min(self._text, end_of_copies - 1), end_of_copies, rows),
        )

    def onwards(self) -> NDArray[np.int64]:
        """(batch,) starts, each where that row of the last such batch ended; at first anywhere, and so past the end."""
        if self._lanes is None:
            self._lanes = self.anywhere()
        else:
            following = self._lanes + self._run.length
            self._lanes = np.where(following >= max(self._ends), self.anywhere(), following)
        return self._lanes


class _Course:
    """A model in training: the text on its device, and the update as one graph."""

    def __init__(
        self,
        run: LanguageRun,
        tokens: NDArray[np.uint8],
        copies: NDArray[np.uint8],
        device: torch.device,
        bf16: bool,
    ) -> None:
        self.run = run
        self.model = make_model(run.model, run.seed, device).train()
        self.windows = _Windows(run, len(tokens), len(copies))
        # Windows that were read of the text itself, which has so many bytes.
        self.of_text, self._bytes = 0, len(tokens)
        self._text = torch.from_numpy(np.concatenate((tokens, copies))).to(device)
        self._places = torch.arange(run.length + 1, device=device)
        self._initial: InitialState | None = None
        if run.carried:
            self._initial = InitialState(self.model, run.batch_size, "carry", run.fresh)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, run.weight_decay), lr=run.lr, betas=run.betas, fused=True
        )
        shared: dict[str, Any] = {"clip": run.clip, "autocast": torch.bfloat16 if bf16 else None}
        self._apart = CapturedStep(optimizer, self._loss, **shared)
        # Made when it is needed: both use one memory.
        self._along: CapturedStep | None = None
        self._make_along = lambda: CapturedStep(optimizer, self._loss_along, beside=self._apart, **shared)
        self._pins = device.type == "cuda"

    def update(self, rate: float, carried: bool) -> Tensor:
        """One step; gives its loss, () on the device, without waiting for it."""
        if carried and self._along is None:
            self._along = self._make_along()
        step = self._along if carried and self._along is not None else self._apart
        step.set_lr(rate)
        rows = self.windows.onwards() if carried else self.windows.anywhere()
        self.of_text += int((rows < self._bytes).sum())
        starts = torch.from_numpy(rows)
        return step.step(starts.pin_memory() if self._pins else starts)

    @property
    def skipped(self) -> int:
        """Updates left out since their gradient was not finite."""
        return int(self._apart.skipped) + (0 if self._along is None else int(self._along.skipped))

    def _ids(self, starts: Tensor) -> Tensor:
        return self._text[starts[:, None] + self._places].long()

    def _loss(self, starts: Tensor) -> Tensor:
        ids = self._ids(starts)
        loss = self.model(ids[:, :-1], labels=ids).loss
        assert loss is not None
        return loss

    def _loss_along(self, starts: Tensor) -> Tensor:
        ids, initial = self._ids(starts), self._initial
        assert initial is not None
        output = self.model(ids[:, :-1], labels=ids, state=initial.before())
        initial.after(output.state)
        assert output.loss is not None
        return output.loss


def train_language_model(
    run: LanguageRun,
    tokens: NDArray[np.uint8],
    out: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    bf16: bool | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains one model and leaves it in a folder: weights in bfloat16, tokenizer, log.csv and trained.json.

    Args:
        run: what and how.
        tokens: (bytes,) uint8, the training text.
        out: its folder.
        device: where; on a GPU each update is one CUDA graph.
        bf16: compute under bfloat16 autocast, the weights in float32. Default: on a GPU.
        say: called with lines of progress.

    Returns:
        What trained.json holds.

    Raises:
        TrainingError: the loss is no number.
        ConfigError: the text is shorter than a window.
        DataError: it holds no names to swap.
    """
    out = make_folder(out)
    try:
        return _train(run, tokens, out, torch.device(device), bf16, say)
    except BaseException:
        # A run is kept whole or not at all; of one that was broken off no empty folder stays.
        with contextlib.suppress(OSError):
            out.rmdir()
        raise


def _train(
    run: LanguageRun,
    tokens: NDArray[np.uint8],
    out: Path,
    device: torch.device,
    bf16: bool | None,
    say: Callable[[str], object],
) -> dict[str, Any]:
    bf16 = device.type == "cuda" if bf16 is None else bf16
    begun = time.perf_counter()
    copies = _copies(tokens, run)
    making = time.perf_counter() - begun
    if run.swapped:
        say(f"{run.row}: {run.swapped} copies with other names, {making:.1f} s")
    course = _Course(run, tokens, copies, device, bf16)
    rows: list[tuple[int, float, float, float, float]] = []
    waiting: list[Tensor] = []
    flying: deque[torch.cuda.Event] = deque()
    steps, carried_at = 0, 0
    # Kernels are compiled and graphs taken first: time that says nothing about the run.
    say(f"{run.row}: {course.model.parameter_count():,} parameters on {device}; first updates, before the clock starts")
    for carried in [False] * _FIRST + [True] * (_FIRST if run.carried else 0):
        if run.steps and steps >= run.steps:
            break
        waiting.append(course.update(run.learning_rate(steps, 0.0), carried))
        steps += 1
    first = steps
    _wait(device)
    started, looked, looked_at = time.perf_counter(), 0.0, steps

    def look(rate: float) -> None:
        """A row of the log; waits for the device."""
        nonlocal looked, looked_at
        losses = torch.stack(waiting).tolist()
        waiting.clear()
        now, loss = time.perf_counter() - started, sum(losses) / len(losses)
        speed = (steps - looked_at) * run.batch_size * run.length / max(now - looked, 1e-9)
        rows.append((steps, now, loss, rate, speed))
        looked, looked_at = now, steps
        if not np.isfinite(loss):
            raise TrainingError(
                f"builtin-model: the loss of '{run.row}' is {loss} at step {steps}; lower lr ({run.lr}) or lengthen "
                "warmup"
            )
        if rate == 0.0 or len(rows) % 10 == 1:
            bits = loss / np.log(2)
            say(f"{now:7.1f} s  {run.row}  step {steps:,}  {bits:.4f} bits per byte  {speed / 1e6:.2f} MB/s")

    while (progress := run.progress(steps, time.perf_counter() - started)) < 1.0:
        carried = run.carried > 0 and progress >= 1 - run.carried
        rate = run.learning_rate(steps, progress)
        if carried and not carried_at:
            carried_at = steps
        waiting.append(course.update(rate, carried))
        steps += 1
        if device.type == "cuda":
            # The host stays a few updates ahead: enough to hide it, little enough that its clock is the device's.
            event = torch.cuda.Event()
            event.record()
            flying.append(event)
            if len(flying) > _AHEAD:
                flying.popleft().synchronize()
        now = time.perf_counter() - started
        if now - looked >= _LOOK_EVERY:
            look(rate)
    if waiting:
        look(0.0)
    seconds = time.perf_counter() - started
    skipped = course.skipped
    model = course.model.eval()
    # Matrices in bfloat16, as they are shipped; A_log and D stay float32.
    narrow = CausalLM(run.model, dtype=torch.bfloat16)
    narrow.load_state_dict(model.state_dict())
    narrow.save_pretrained(out)
    ByteTokenizer().save(out)
    with atomic_file(out / _LOG) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "seconds", "loss", "learning_rate", "bytes_per_second"))
        writer.writerows((step, f"{t:.2f}", f"{a:.5f}", f"{b:.6g}", f"{s:.0f}") for step, t, a, b, s in rows)
    read = (steps - first) * run.batch_size * run.length
    speed = read / max(seconds, 1e-9)
    trained = {
        "run": run.to_dict(),
        "parameters": model.parameter_count(),
        "file_bytes": (out / "model.safetensors").stat().st_size,
        "steps": steps,
        "carried_from_step": carried_at or None,
        "bytes_read": steps * run.batch_size * run.length,
        # Of the text itself, not of its copies.
        "epochs": course.of_text * run.length / len(tokens),
        "copies_seconds": round(making, 2),
        "seconds": round(seconds, 2),
        "bytes_per_second": round(speed),
        "model_flop_utilization": utilization(run.model, run.length, speed, device, "bf16" if bf16 else "float32"),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "skipped": skipped,
        "final_loss": rows[-1][2],
        "precision": "bf16" if bf16 else "float32",
        "machine": machine_facts(device),
    }
    write_json(out / _TRAINED, trained, indent=2)
    used = trained["model_flop_utilization"]
    share = "" if used is None else f", {100 * used:.1f} % of the peak in model operations"
    say(f"{run.row}: {steps:,} updates in {seconds:.1f} s, {speed / 1e6:.2f} MB/s{share}")
    return trained


_MADE: dict[tuple[str, int, int], NDArray[np.uint8]] = {}


def _copies(tokens: NDArray[np.uint8], run: LanguageRun) -> NDArray[np.uint8]:
    """A run's copies of its text; those of the last such run are kept, since a grid's runs have the same."""
    if not run.swapped:
        return tokens[:0]
    key = (hashlib.sha256(tokens.tobytes()).hexdigest(), run.swapped, run.seed)
    if key not in _MADE:
        _MADE.clear()
        _MADE[key] = swapped_copies(tokens, run.swapped, run.seed)
    return _MADE[key]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judge(model: CausalLM, text: TokenFile, length: int = 2048) -> tuple[dict[str, Any], dict[str, Judged]]:
    """Bits per byte of some books, in all the ways that a model can read them.

    Args:
        model: of bytes, in evaluation mode.
        text: the books one after the other, each a document.
        length: of the windows it was trained with.

    Returns:
        The scores: ``bytes`` judged, all but the first; ``windows``, windows that follow each other; ``overlapping``,
        windows that overlap by half; ``carried``, the state carried through all of the text (None for a model without
        such a state), and the mean over the octaves of its position; each with its ``_standard_error`` (blocks of
        `length` bytes of a book taken as independent of each other; None of one block) and, in ``books``, of each book.
        And for every reading the bits of those blocks, by which two models are compared.
    """
    tokens = np.asarray(text.tokens)
    # Windows of other lengths than trained are no windows of its training; a short text has but one.
    length = min(length, len(tokens) - 1)
    readings = {
        "windows": window_bits(model, tokens, length, length),
        "overlapping": window_bits(model, tokens, length, max(1, length // 2)),
    }
    scores: dict[str, Any] = {"bytes": len(tokens) - 1, "carried": None, "carried_standard_error": None}
    if isinstance(model.config, MambaConfig):
        where = model.lm_head.weight.device
        pieces = row_bits(model, tokens, [0], len(tokens) - 1, _PIECE, where)
        readings["carried"] = np.concatenate([piece[0] for _, piece in pieces])
        scores["carried_by_position"] = _octaves(readings["carried"])
    blocks = {name: _blocks(bits, np.asarray(text.document_offsets), length) for name, bits in readings.items()}
    for name, judged in blocks.items():
        mean, error = judged.mean()
        scores[name], scores[f"{name}_standard_error"] = mean, error if math.isfinite(error) else None
    scores["books"] = [
        {"bytes": int(blocks["windows"].bytes[here].sum())}
        | {name: float(judged.bits[here].sum() / judged.bytes[here].sum()) for name, judged in blocks.items()}
        for here in _of_each_book(blocks["windows"])
    ]
    return scores, blocks


def _blocks(bits: NDArray[np.float64], documents: NDArray[np.int64], length: int) -> Judged:
    """The bits (bytes - 1,) of a text, of which the first byte is not judged, by blocks of `length` bytes of a book."""
    first: list[int] = []
    book: list[int] = []
    for number, (start, end) in enumerate(itertools.pairwise(documents.tolist())):
        here = range(max(start - 1, 0), end - 1, length)
        first += here
        book += [number] * len(here)
    return Judged(np.add.reduceat(bits, first), np.diff([*first, len(bits)]), np.array(book))


def _of_each_book(judged: Judged) -> list[NDArray[np.bool_]]:
    return [judged.book == number for number in np.unique(judged.book)]


def _octaves(bits: NDArray[np.float64]) -> list[tuple[int, int, float]]:
    """(first, last, mean) over the octaves of a position, that of a text's second byte being 1."""
    edges = 2 ** np.arange(len(bits).bit_length())
    ends = np.append(edges[1:] - 1, len(bits))
    means = np.add.reduceat(bits, edges - 1) / (ends - edges + 1)
    return list(zip(edges.tolist(), ends.tolist(), means.tolist(), strict=True))


def compare(mamba: Mapping[str, Judged], twin: Mapping[str, Judged]) -> dict[str, Any]:
    """How many bits per byte more one model needs than another on the same blocks; less than 0: it is the better one.

    Args:
        mamba: what `judge` gave of one with a state.
        twin: of one without.

    Returns:
        For both in windows, both in overlapping windows, and each as it reads best (the state carried, overlapping
        windows): ``difference``, its ``standard_error`` (block by block), and ``books`` with both of each book.

    Raises:
        ConfigError: they were judged on other texts or blocks.
    """

    def told(one: Judged, other: Judged) -> dict[str, Any]:
        difference, error = paired_difference(one, other)
        return {"difference": difference, "standard_error": error if math.isfinite(error) else None}

    found: dict[str, Any] = {}
    for name, mine, theirs in _PAIRS:
        one, other = mamba[mine], twin[theirs]
        found[name] = told(one, other)
        found[name]["books"] = [
            told(*(Judged(j.bits[here], j.bytes[here], j.book[here]) for j in (one, other)))
            for here in _of_each_book(one)
        ]
    return found


def tuned(row: str, out: str | os.PathLike[str], run: Mapping[str, Any] | None = None) -> dict[str, float]:
    """The learning rate and dropout that `tune` found best for a row.

    Args:
        row: of `ROWS`.
        out: the folder that was tuned in.
        run: whom they are for, as `LanguageRun.to_dict` gives it: what was tuned with another batch, say, is left out.
            Default: the row's own.

    Returns:
        {"lr", "dropout"}; empty where the grid was not gone through: some of it is not the same care.
    """
    path = Path(out) / _TUNING
    told: list[dict[str, Any]] = [one for one in _read(path) if one["row"] == row] if path.exists() else []
    beyond = _beyond_the_grid(ROWS[row].to_dict() if run is None else run)
    # An older file doesn't say with what else it was tuned, but that it had no copies.
    told = [one for one in told if {"swapped": 0} | one.get("beyond", beyond | {"swapped": 0}) == beyond]
    bits = {(one["lr"], one["dropout"]): one["bits_per_byte"] for one in told}
    found = best_tried(bits, [(lr, DROPOUTS[0]) for lr in GRID])
    found = None if found is None else best_tried(bits, [(found[0], dropout) for dropout in DROPOUTS])
    return {} if found is None else {"lr": found[0], "dropout": found[1]}


def _beyond_the_grid(run: Mapping[str, Any]) -> dict[str, Any]:
    """What `tune` leaves as it is of a run."""
    rest = {name: value for name, value in run.items() if name not in ("lr", "steps", "seconds")}
    return rest | {"model": {name: value for name, value in run["model"].items() if name != "dropout"}}


def tune(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rows: Sequence[str] = tuple(ROWS),
    share: float = SHARE,
    change: Callable[[LanguageRun], LanguageRun] = lambda run: run,
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | None = None,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Trains each row at its full size with every rate of `GRID`, and at the best one with every dropout.

    All are judged on novels_valid, of which neither these models nor the table's have read anything, in windows of the
    training's length. Dropout tells more the more often a text is read: with a small share it is tried on few passes.

    Args:
        data: as for `builtin_model`.
        out: a folder for each run in its ``tuning/``; what is done is not done again.
        rows: of `ROWS`. Default: all, since the same care is what it is for.
        share: of the packaged run's updates that each run makes. Default 1/8.
        change: what is made of each run before it starts; rate, dropout and length of the run are the grid's.
        device, cache, say: as for `builtin_model`.

    Returns:
        What tuning.json holds, all that lies in ``tuning/``: {"row", "lr", "dropout", "updates", "bits_per_byte",
        "beyond"}, bits_per_byte None where it diverged, and beyond the run's other settings.

    Raises:
        ConfigError: an unknown row, a share that is not in (0, 1], or a change of what the grid sets.
        DataError: a text is missing, or holds no names to swap.
        CheckpointError: a folder holds such a run with other settings.
    """
    rows, out, device = _in_order(rows), make_folder(out), torch.device(device)
    if not 0 < share <= 1:
        raise ConfigError(f"builtin-model: share must be in (0, 1], got {share}")

    def run_of(row: str, lr: float, dropout: float) -> LanguageRun:
        run = _with_care(ROWS[row], lr, dropout)
        run = dataclasses.replace(run, steps=max(1, round(share * UPDATES)), seconds=0.0)
        asked = _changed(run, change)
        for name in ("lr", "steps", "seconds", "model.dropout"):
            wanted, got = (operator.attrgetter(name)(one) for one in (run, asked))
            if got != wanted:
                raise ConfigError(
                    f"builtin-model: tuning sets {name} itself, wanted {wanted:g} here, got {got:g}; leave it out"
                )
        return asked

    for row, lr, dropout in itertools.product(rows, GRID, DROPOUTS):
        run_of(row, lr, dropout)
    corpus = read_corpus(data, SHIPPED_TEXTS, cache=cache)
    text = read_corpus(data, NOVELS[1], cache=cache)
    held_out = np.asarray(text.tokens)

    def bits(row: str, lr: float, dropout: float) -> float:
        run, folder = run_of(row, lr, dropout), out / "tuning" / f"{row}-lr{lr:g}-dropout{dropout:g}"
        if (folder / _DIVERGED).exists():
            check_same(folder / _DIVERGED, _run_in(_read(folder / _DIVERGED)), run.to_dict())
            return math.inf
        try:
            trained = _trained(run, folder, corpus, device, say)
        except TrainingError as problem:
            write_json(make_folder(folder) / _DIVERGED, {"run": run.to_dict(), "error": str(problem)}, indent=2)
            say(f"{folder.name}: diverged")
        else:
            if "bits_per_byte" not in trained or trained.setdefault("text_digest", text.digest) != text.digest:
                model = CausalLM.from_pretrained(folder, device=device).eval()
                length = min(run.length, len(held_out) - 1)
                trained["bits_per_byte"] = float(window_bits(model, held_out, length, length).mean())
                trained["text_digest"] = text.digest
                write_json(folder / _TRAINED, trained, indent=2)
                say(f"{folder.name}: {trained['bits_per_byte']:.4f} bits per byte of {NOVELS[1]}")
        told = _tuning(out)
        write_json(out / _TUNING, told, indent=2)
        found = _read(folder / _TRAINED)["bits_per_byte"] if (folder / _TRAINED).exists() else math.inf
        return found if math.isfinite(found) else math.inf

    for row in rows:
        best = min(GRID, key=lambda lr: bits(row, lr, DROPOUTS[0]))
        if best in (GRID[0], GRID[-1]):
            say(f"{row}: {best:g} is the best of the grid and at its end; a rate beyond it may be better")
        for dropout in DROPOUTS[1:]:
            bits(row, best, dropout)
    return _tuning(out)


def _tuning(out: Path) -> list[dict[str, Any]]:
    """What the runs of `tune` in a folder came to."""
    found = []
    for path in sorted([*out.glob(f"tuning/*/{_TRAINED}"), *out.glob(f"tuning/*/{_DIVERGED}")]):
        facts = _read(path)
        run, bits = _run_in(facts), facts.get("bits_per_byte", math.nan)
        if path.name == _TRAINED and "bits_per_byte" not in facts:
            continue
        found.append(
            {
                "row": run["row"],
                "lr": run["lr"],
                "dropout": run["model"]["dropout"],
                "updates": run["steps"],
                "bits_per_byte": bits if math.isfinite(bits) else None,
                "beyond": _beyond_the_grid(run),
            }
        )
    return found


def builtin_model(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rows: Sequence[str] = ("mamba",),
    steps: int | None = None,
    seconds: float | None = None,
    change: Callable[[LanguageRun], LanguageRun] = lambda run: run,
    judged: str = NOVELS[2],
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains and judges rows; what lies finished in the folder is not done again.

    Mamba comes first. Its twin takes as many updates as the Mamba of the same folder, so that both have read the same
    number of bytes; where there is none, as many as the packaged one (`UPDATES`), or `steps`; a Mamba that comes after
    its twin must take as many as that. Rate and dropout come from the folder's tuning, see `tune`, where it has one of
    such runs. All rows are checked before the first is trained.

    Args:
        data: folder of the texts, see `statescan.recipes.novels`.
        out: a folder for each row, results.json and results.md.
        rows: of `ROWS`. Default: Mamba alone.
        steps: updates, in place of the rows' own.
        seconds: of Mamba's updates, in place of its own.
        change: what is made of each run before it starts.
        judged: the text of which the models have read nothing. Default: the test novels.
        device: where they are trained and judged.
        cache: folder of token files.
        say: called with lines of progress.

    Returns:
        What results.json holds: each row's facts and scores; in Mamba's, how it stands beside its twin.

    Raises:
        ConfigError: an unknown row, or two that would not read as many bytes as each other.
        DataError: a text is missing.
        CheckpointError: a folder holds a run of that name with other settings.
    """
    rows, out, device = _in_order(rows), make_folder(out), torch.device(device)
    if steps and seconds:
        raise ConfigError(f"builtin-model: a run ends by steps or by seconds, got {steps} and {seconds}; give one")
    if seconds and "mamba" not in rows:
        raise ConfigError(
            f"builtin-model: seconds ({seconds:g}) are for Mamba, whose updates its twin takes; give steps, or have "
            "Mamba trained too"
        )
    corpus = read_corpus(data, SHIPPED_TEXTS, cache=cache)
    unseen = read_corpus(data, judged, cache=cache)
    say(f"{len(corpus):,} bytes to learn from: {', '.join(SHIPPED_TEXTS)}; {len(unseen):,} to be judged on: {judged}")
    for row in rows:
        run, held = _run_of(row, out, steps, seconds, change), out / row / _TRAINED
        _check_as_long(run, out, corpus.digest)
        if held.exists():
            # But for the updates: the twin's are known only when Mamba is trained.
            check_same(held, _run_in(_read(held)), run.to_dict() | {"steps": _read(held)["run"]["steps"]})
    for row in rows:
        run = _run_of(row, out, steps, seconds, change)
        _check_as_long(run, out, corpus.digest)
        folder = out / row
        trained = _trained(run, folder, corpus, device, say)
        known = _judged_on(trained, judged, unseen.digest)
        # Read back, so that what is judged is what is shipped, its rounding included.
        if not known or (not _blocks_of(folder, judged).exists() and (folder / "model.safetensors").exists()):
            say(f"{row}: judging")
            model = CausalLM.from_pretrained(folder, device=device).eval()
            scores, blocks = judge(model, unseen, run.length)
            trained["scores"][judged] = scores | {"text_digest": unseen.digest}
            _write_blocks(_blocks_of(folder, judged), blocks)
            write_json(folder / _TRAINED, trained, indent=2)
        scores = trained["scores"][judged]
        best = scores["carried"] or scores["overlapping"]
        say(f"{row}: {trained['parameters']:,} parameters, {best:.4f} bits per byte of {judged}")
    results = {path.parent.name: _read(path) for path in sorted(out.glob(f"*/{_TRAINED}"))}
    for name, facts in results.items():
        if not _judged_on(facts, judged, unseen.digest) and facts["scores"].pop(judged, None):
            say(f"{name}: left out, since it was judged on another text named {judged}; name the row to judge it anew")
    both = [_blocks_of(out / row, judged) for row in ROWS if row in results and judged in results[row]["scores"]]
    if len(both) == len(ROWS) and all(path.exists() for path in both):
        results["mamba"]["beside_transformer++"] = {judged: compare(*map(_read_blocks, both))}
    write_json(out / _RESULTS, results, indent=2)
    write_text(out / "results.md", _table(results, judged, out))
    return results


def _in_order(rows: Sequence[str]) -> list[str]:
    """Rows as `ROWS` has them: Mamba before the twin that takes as many updates."""
    for name in rows:
        if name not in ROWS:
            raise ConfigError(f"builtin-model: a row must be one of {', '.join(ROWS)}, got '{name}'")
    return [name for name in ROWS if name in rows]


def _changed(run: LanguageRun, change: Callable[[LanguageRun], LanguageRun]) -> LanguageRun:
    """What a caller makes of a run, which stays the same row's."""
    asked = change(run)
    if asked.row != run.row:
        raise ConfigError(f"builtin-model: row must stay '{run.row}', got '{asked.row}'; leave it out")
    return asked


def _with_care(run: LanguageRun, lr: float, dropout: float) -> LanguageRun:
    return dataclasses.replace(run, lr=lr, model=run.model.replace(dropout=dropout))


def _run_of(
    row: str,
    out: Path,
    steps: int | None,
    seconds: float | None,
    change: Callable[[LanguageRun], LanguageRun],
) -> LanguageRun:
    """A row's run, with what its folder and the caller say of it."""
    run, beside = ROWS[row], out / "mamba" / _TRAINED
    if steps:
        run = dataclasses.replace(run, steps=steps, seconds=0.0)
    elif row != "mamba":
        run = dataclasses.replace(run, steps=_read(beside)["steps"] if beside.exists() else run.steps)
    elif seconds:
        run = dataclasses.replace(run, seconds=seconds, steps=0)
    asked = _changed(run, change)
    care = tuned(row, out, asked.to_dict())
    return _changed(_with_care(run, **care), change) if care else asked


def _check_as_long(run: LanguageRun, out: Path, corpus_digest: str) -> None:
    """Refuses a run that would not read as many bytes as the other row in its folder, or other ones."""
    if run.row != "mamba" and (run.seconds or not run.steps):
        raise ConfigError(
            f"builtin-model: '{run.row}' must end by steps, as many as Mamba's, got seconds = {run.seconds:g}; give "
            "steps"
        )
    (other,) = (row for row in ROWS if row != run.row)
    beside, own = out / other / _TRAINED, out / run.row / _TRAINED
    if not beside.exists():
        return
    facts = _read(beside)
    steps = run.steps
    if run.seconds:
        # How many they are is known only of a finished run.
        steps = _read(own)["steps"] if own.exists() else f"those of {run.seconds:g} seconds"
    held = _run_in(facts)
    wanted = (facts["steps"], held["batch_size"], held["length"], held["swapped"])
    got = (steps, run.batch_size, run.length, run.swapped)
    if got != wanted:
        raise ConfigError(
            f"builtin-model: '{run.row}' must read what '{other}' in '{beside.parent}' read, (steps, batch_size, "
            f"length, swapped) = {wanted}, got {got}; take as many, name another folder, or delete that one"
        )
    _check_texts(beside, facts, corpus_digest)


def _check_texts(path: Path, trained: Mapping[str, Any], digest: str) -> None:
    """Refuses a row that was trained on other texts; older ones, which don't say on which, are let be."""
    check_same(path, {"corpus_digest": trained.get("corpus_digest", digest)}, {"corpus_digest": digest}, "texts")


def _judged_on(trained: dict[str, Any], judged: str, digest: str) -> bool:
    """Whether a row has scores of just that text; older ones, which don't say of which, count."""
    scores = trained.setdefault("scores", {}).get(judged)
    return scores is not None and scores.get("text_digest", digest) == digest


def _trained(
    run: LanguageRun, folder: Path, corpus: TokenFile, device: torch.device, say: Callable[[str], object]
) -> dict[str, Any]:
    """What trained.json holds of a run that is trained here, or lies finished in its folder."""
    if (folder / _TRAINED).exists():
        trained = _read(folder / _TRAINED)
        check_same(folder / _TRAINED, _run_in(trained), run.to_dict())
        _check_texts(folder / _TRAINED, trained, corpus.digest)
        return trained
    trained = train_language_model(run, np.asarray(corpus.tokens), folder, device=device, say=say)
    trained["corpus_digest"] = corpus.digest
    write_json(folder / _TRAINED, trained, indent=2)
    return trained


def _run_in(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The run that a file tells of; older ones knew no other names."""
    return {"swapped": 0} | facts["run"]


def _blocks_of(folder: Path, judged: str) -> Path:
    return folder / f"{judged}.npz"


def _write_blocks(path: Path, blocks: Mapping[str, Judged]) -> None:
    arrays = {
        f"{name} {part}": getattr(judged, part) for name, judged in blocks.items() for part in ("bits", "bytes", "book")
    }
    with atomic_file(path) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **arrays)


def _read_blocks(path: Path) -> dict[str, Judged]:
    with np.load(path) as held:
        names = dict.fromkeys(key.rpartition(" ")[0] for key in held)
        return {name: Judged(*(held[f"{name} {part}"] for part in ("bits", "bytes", "book"))) for name in names}


def _table(results: Mapping[str, Any], judged: str, out: Path) -> str:
    lines = [
        f"Bits per byte of {judged}, none of which was read in training:\n",
        "| | parameters | MB | learning rate | dropout | updates | bytes read | MB/s | of the peak | state carried | "
        "windows | overlapping windows |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        scores, run, used = row["scores"].get(judged), row["run"], row["model_flop_utilization"]
        if scores is None:
            continue
        lines.append(
            f"| {name} | {row['parameters']:,} | {row['file_bytes'] / 1e6:.1f} | {run['lr']:g} | "
            f"{run['model']['dropout']:g} | {row['steps']:,} | {row['bytes_read']:,} | "
            f"{row['bytes_per_second'] / 1e6:.2f} | {'-' if used is None else f'{100 * used:.1f} %'} | "
            + " | ".join(
                _told(scores[how], scores.get(f"{how}_standard_error")) for how in ("carried", "windows", "overlapping")
            )
            + " |"
        )
    lines.append("")
    for name, beside in results.get("mamba", {}).get("beside_transformer++", {}).get(judged, {}).items():
        books = ", ".join(_told(one["difference"], one["standard_error"], "+") for one in beside["books"])
        lines.append(
            f"Mamba minus Transformer++, {name}: {_told(beside['difference'], beside['standard_error'], '+')} bits per "
            f"byte; book by book {books}.\n"
        )
    lines.append(
        "± one standard error, blocks as long as a window taken as independent: of these books and these weights, not "
        "of other books or seeds."
    )
    care = {name: {"lr": row["run"]["lr"], "dropout": row["run"]["model"]["dropout"]} for name, row in results.items()}
    untuned = [name for name in care if care[name] != tuned(name, out, _run_in(results[name]))]
    if untuned:
        lines.append(f"\nRate and dropout not from a grid gone through in this folder: {', '.join(untuned)}.")
    return "\n".join(lines) + "\n"


def _told(mean: float | None, error: float | None, sign: str = "") -> str:
    if mean is None:
        return "-"
    return f"{mean:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
