"""The byte-level Mamba that comes with the package: how it is trained, and its Transformer++ twin.

Both learn from the texts of `statescan.recipes.novels.SHIPPED_TEXTS` as bytes and are judged in bits per byte on whole
novels that neither has read. The text lies on the device from the first update to the last, windows are cut out of it
there, and an update is one CUDA graph: the host sends a few hundred bytes a step, so nothing ever waits for data.

Mamba's last updates carry the state from window to window along the text, as the finished model does when it reads a
book: else it would meet states that no window of its training reached.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statescan.data import ByteTokenizer
from statescan.errors import ConfigError, TrainingError
from statescan.evaluate import evaluate_tokens, row_bits
from statescan.files import atomic_file, make_folder
from statescan.models import CausalLM, MambaConfig, ModelConfig, TransformerConfig
from statescan.recipes.novels import SHIPPED_TEXTS, read_corpus
from statescan.recipes.synthetic import machine_facts, make_model
from statescan.train.capture import CapturedStep
from statescan.train.finished import check_same
from statescan.train.initial_state import InitialState
from statescan.train.optim import parameter_groups
from statescan.train.utilization import utilization

__all__ = ["ROWS", "LanguageRun", "builtin_model", "judge", "overlapping_bits", "train_language_model"]

_TRAINED, _LOG, _RESULTS = "trained.json", "log.csv", "results.json"
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
        seed: of weights and order.
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
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps <= 0 and self.seconds <= 0:
            raise ConfigError("builtin-model: a run must end: wanted seconds > 0 or steps > 0, got neither")
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


# The shape: what a GPU trains and a CPU decodes well at 16 MB in bfloat16. The Transformer++ has as many parameters,
# the same windows, rate and as many updates (`builtin_model` sets them). The rate was better than half of it for Mamba
# of 0.3 and 1 million parameters; neither was tried at this size. Dropout of 0, 0.05, 0.1 and 0.2 was tried on Mamba at
# a quarter of the parameters and of the text, five passes: 1.609, 1.609 (with three times the weight decay), 1.620 and
# 1.646 bits per byte of novels held out for it, and 1.434, 1.483, 1.520 and 1.565 in training, under dropout. So 0.05
# costs nothing where the passes are few; the packaged model's are three times as many.
ROWS: dict[str, LanguageRun] = {
    "mamba": LanguageRun("mamba", MambaConfig(384, 8, 256, dropout=0.05), carried=0.25),
    "transformer++": LanguageRun(
        "transformer++", TransformerConfig(320, 6, 256, n_head=5, d_intermediate=912, dropout=0.05)
    ),
}


class _Windows:
    """Where the rows of each update start in the text: anywhere, or on from where they ended."""

    def __init__(self, run: LanguageRun, tokens: int) -> None:
        self._run, self._last = run, tokens - run.length - 1
        if self._last < 0:
            raise ConfigError(
                f"builtin-model: wanted a text of at least length + 1 = {run.length + 1} bytes, got {tokens}; take a "
                "longer one or a smaller length"
            )
        self._random = np.random.default_rng(run.seed)
        self._lanes: NDArray[np.int64] | None = None

    def anywhere(self) -> NDArray[np.int64]:
        """(batch,) starts, independent of each other."""
        return self._random.integers(0, self._last + 1, self._run.batch_size)

    def onwards(self) -> NDArray[np.int64]:
        """(batch,) starts, each where that row of the last such batch ended; at first anywhere, and so past the end."""
        if self._lanes is None:
            self._lanes = self.anywhere()
        else:
            following = self._lanes + self._run.length
            self._lanes = np.where(following > self._last, self.anywhere(), following)
        return self._lanes


class _Course:
    """A model in training: the text on its device, and the update as one graph."""

    def __init__(self, run: LanguageRun, tokens: NDArray[np.uint8], device: torch.device, bf16: bool) -> None:
        self.run = run
        self.model = make_model(run.model, run.seed, device).train()
        self.windows = _Windows(run, len(tokens))
        self._text = torch.from_numpy(np.array(tokens)).to(device)
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
        starts = torch.from_numpy(self.windows.onwards() if carried else self.windows.anywhere())
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
    """
    out, device = make_folder(out), torch.device(device)
    bf16 = device.type == "cuda" if bf16 is None else bf16
    course = _Course(run, tokens, device, bf16)
    rows: list[tuple[int, float, float, float, float]] = []
    waiting: list[Tensor] = []
    flying: deque[torch.cuda.Event] = deque()
    steps, carried_at = 0, 0
    # Kernels are compiled and graphs taken first: time that says nothing about the run.
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
        "epochs": steps * run.batch_size * run.length / len(tokens),
        "seconds": round(seconds, 2),
        "bytes_per_second": round(speed),
        "model_flop_utilization": utilization(run.model, run.length, speed, device, "bf16" if bf16 else "float32"),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "skipped": skipped,
        "final_loss": rows[-1][2],
        "precision": "bf16" if bf16 else "float32",
        "machine": machine_facts(device),
    }
    _write(out / _TRAINED, trained)
    return trained


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def overlapping_bits(
    model: CausalLM, tokens: NDArray[np.uint8], length: int, stride: int, *, batch_size: int = 16
) -> float:
    """Bits per byte where every byte but the first `length` has at least length - stride bytes before it.

    Windows of `length` start every `stride` bytes and are judged on their last `stride` predictions alone (the first
    one on all): what a model without a state of fixed size is fairly judged by.

    Args:
        model: of bytes, on any device.
        tokens: (bytes,) uint8.
        length: predictions of a window.
        stride: new predictions of a window; length for windows that don't overlap.
        batch_size: windows at once. Default 16.

    Returns:
        Mean bits per byte over all bytes but the first and those of the last, unfinished stride.
    """
    if not 0 < stride <= length:
        raise ConfigError(f"overlapping_bits: stride must be in [1, length = {length}], got {stride}")
    starts = list(range(0, len(tokens) - length, stride))
    if not starts:
        raise ConfigError(f"overlapping_bits: wanted at least length + 1 = {length + 1} bytes, got {len(tokens)}")
    total, count = 0.0, 0
    for first in range(0, len(starts), batch_size):
        pieces = row_bits(
            model, tokens, starts[first : first + batch_size], length, length, model.lm_head.weight.device
        )
        bits = np.concatenate([piece for _, piece in pieces], axis=1)
        new = bits[:, -stride:]
        total, count = total + float(new.sum()), count + new.size
        if first == 0:
            total, count = total + float(bits[0, :-stride].sum()), count + length - stride
    return total / count


def judge(model: CausalLM, tokens: NDArray[np.uint8], length: int = 2048) -> dict[str, Any]:
    """Bits per byte of a text, in all the ways that a model can read it.

    Args:
        model: of bytes, in evaluation mode.
        tokens: (bytes,) uint8.
        length: of the windows it was trained with.

    Returns:
        ``carried`` and ``carried_standard_error``, the state carried through all of the text (None for a model without
        such a state); ``windows``, windows that follow each other; ``overlapping``, windows that overlap by half.
    """
    tokenizer = ByteTokenizer()
    # Windows of other lengths than trained are no windows of its training; a short text has but one.
    length = min(length, len(tokens) - 1)
    windows = evaluate_tokens(model, tokens, tokenizer=tokenizer, context=length, batch_size=16)
    scores: dict[str, Any] = {
        "bytes": windows.tokens,
        "carried": None,
        "carried_standard_error": None,
        "windows": windows.bits_per_byte,
        "windows_standard_error": windows.standard_error,
        "overlapping": overlapping_bits(model, tokens, length, max(1, length // 2)),
    }
    if isinstance(model.config, MambaConfig):
        carried = evaluate_tokens(model, tokens, tokenizer=tokenizer, context=_PIECE, carry_state=True)
        scores["carried"], scores["carried_standard_error"] = carried.bits_per_byte, carried.standard_error
        scores["carried_by_position"] = [
            [bucket.first, bucket.last, bucket.bits_per_byte] for bucket in carried.by_position
        ]
    return scores


def builtin_model(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rows: Sequence[str] = ("mamba",),
    runs: Sequence[LanguageRun] | None = None,
    judged: str = "novels_test",
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains and judges rows; what lies finished in the folder is not done again.

    A twin without a number of updates of its own takes as many as Mamba's run in the same folder, so that both have
    read the same number of bytes.

    Args:
        data: folder of the texts, see `statescan.recipes.novels`.
        out: a folder for each row, results.json and results.md.
        rows: of `ROWS`, in order. Default: Mamba alone.
        runs: runs of one's own in place of `rows`.
        judged: the text of which the models have read nothing. Default: the test novels.
        device: where they are trained and judged.
        cache: folder of token files.
        say: called with lines of progress.

    Returns:
        What results.json holds: each row's facts and scores.

    Raises:
        DataError: a text is missing.
        CheckpointError: a folder holds a run of that name with other settings.
    """
    out, device = make_folder(out), torch.device(device)
    for name in rows if runs is None else ():
        if name not in ROWS:
            raise ConfigError(f"builtin-model: a row must be one of {', '.join(ROWS)}, got '{name}'")
    runs = [ROWS[name] for name in rows] if runs is None else list(runs)
    corpus = read_corpus(data, SHIPPED_TEXTS, cache=cache)
    unseen = np.asarray(read_corpus(data, judged, cache=cache).tokens)
    say(f"{len(corpus):,} bytes to learn from: {', '.join(SHIPPED_TEXTS)}; {len(unseen):,} to be judged on: {judged}")
    for run in runs:
        folder = out / run.row
        if not isinstance(run.model, MambaConfig) and not run.steps and (out / "mamba" / _TRAINED).exists():
            run = dataclasses.replace(run, steps=_read(out / "mamba" / _TRAINED)["steps"], seconds=0.0)
        if (folder / _TRAINED).exists():
            trained = _read(folder / _TRAINED)
            check_same(folder / _TRAINED, trained["run"], run.to_dict())
            learnt = {"corpus_digest": trained.get("corpus_digest", corpus.digest)}
            check_same(folder / _TRAINED, learnt, {"corpus_digest": corpus.digest}, "texts")
        else:
            trained = train_language_model(run, np.asarray(corpus.tokens), folder, device=device, say=say)
        if judged not in trained.setdefault("scores", {}):
            # Read back, so that what is judged is what is shipped, its rounding included.
            model = CausalLM.from_pretrained(folder, device=device).eval()
            trained["scores"][judged] = judge(model, unseen, run.length)
            trained["corpus_digest"] = corpus.digest
            _write(folder / _TRAINED, trained)
        scores = trained["scores"][judged]
        best = scores["carried"] or scores["overlapping"]
        say(f"{run.row}: {trained['parameters']:,} parameters, {best:.4f} bits per byte of {judged}")
    results = {path.parent.name: _read(path) for path in sorted(out.glob(f"*/{_TRAINED}"))}
    _write(out / _RESULTS, results)
    with atomic_file(out / "results.md") as temporary:
        temporary.write_text(_table(results, judged), encoding="utf-8")
    return results


def _table(results: dict[str, Any], judged: str) -> str:
    lines = [
        f"Bits per byte of {judged}, none of which was read in training:\n",
        "| | parameters | MB | updates | bytes read | MB/s | state carried | windows | overlapping windows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        scores = row["scores"].get(judged)
        if scores is None:
            continue
        carried = (
            "-" if scores["carried"] is None else f"{scores['carried']:.4f} ± {scores['carried_standard_error']:.4f}"
        )
        lines.append(
            f"| {name} | {row['parameters']:,} | {row['file_bytes'] / 1e6:.1f} | {row['steps']:,} | "
            f"{row['bytes_read']:,} | {row['bytes_per_second'] / 1e6:.2f} | {carried} | {scores['windows']:.4f} | "
            f"{scores['overlapping']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, values: dict[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
