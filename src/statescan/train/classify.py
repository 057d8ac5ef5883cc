"""Training a classifier of sequences on one device, the data in its memory: resumable to the bit, captured on a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from statescan import __version__
from statescan.data.labelled import LabelledOrder, LabelledSequences
from statescan.data.windows import LabelledWindows
from statescan.errors import CheckpointError, ConfigError, TrainingError
from statescan.files import make_folder, write_json
from statescan.models import ClassifierConfig, SequenceClassifier
from statescan.models.backbone_classifier import BackboneClassifier, BackboneClassifierConfig
from statescan.nn.reverse_complement import complement_ids
from statescan.train.capture import CapturedStep
from statescan.train.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from statescan.train.config import TrainConfig, check_as_train_config
from statescan.train.logs import CsvLog, Progress
from statescan.train.loop import RUN_FILE, Interruption, check_folder
from statescan.train.optim import learning_rate, parameter_groups

__all__ = [
    "ClassifyConfig",
    "ClassifyResult",
    "Judgement",
    "Splits",
    "judge",
    "pick_device",
    "predictions",
    "train_classifier",
]

_LOG_COLUMNS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "skipped")
_EVALUATION_COLUMNS = ("step", "epoch", "accuracy", "loss")
# What a resumed run must share with the one it goes on from; all of the model and the data besides.
_FIXED = ("seed", "batch_size")
_JUDGED_AT_ONCE, _JUDGED_POSITIONS = 500, 1 << 20
# Numbers that live on the device between two rows of log.csv.
_COUNTERS = ("loss_sum", "norm", "skipped", "skipped_in_row")


class Splits(NamedTuple):
    """What is learnt from, what chooses the epoch, and what is looked at when all is over."""

    train: LabelledSequences | LabelledWindows
    valid: LabelledSequences | LabelledWindows
    test: LabelledSequences | LabelledWindows


class Judgement(NamedTuple):
    """accuracy: the part that was labelled right; loss: mean cross entropy, nats."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class ClassifyConfig:
    """How a classifier is trained. What a field of `TrainConfig` has the name of, it means here too.

    Args:
        epochs: times that all examples are gone through.
        batch_size: examples per update.
        lr: peak learning rate; parameters of S4's and S4D's systems have 0.001 at most.
        min_lr: learning rate at the end of the cosine.
        warmup: updates over which the learning rate rises in a line.
        labels_from: of a `BackboneClassifier` of head "likelihood", the part of the updates from which on the labels'
            cross entropy over the likelihoods is minimised, by which it is judged; before, each sequence's tokens are
            learnt under its own label. Such an update reads a sequence once a label, and so costs `classes` times one
            before; it is cut into passes that take no more memory than one before, as far as the batch can be cut.
            Dropout is drawn for each label anew. Tokens are learnt in ``floor(labels_from * updates)``, below 1 in all
            but the last at most. 1, none of them, for other models, which learn labels throughout.
        weight_decay: AdamW's, on matrices; none on the systems of S4 and S4D, norms and biases.
        betas: AdamW's.
        eps: AdamW's.
        clip: the largest global norm of a gradient; 0 for no clipping.
        precision: "float32", or "bf16" for autocast; S4's kernels, spectra and weights are float32 in both.
        seed: of the initial weights, the order of the data, and dropout.
        max_nonfinite: updates in a row with a gradient that is not finite, that end the run.
        checkpoint_every: epochs between two checkpoints; 0 for none but the last.
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: updates between two rows of log.csv.
        multiple: where rows are of unequal length, a batch's is rounded up to a multiple of it: each has its own graph.
        accelerator: "auto", "cpu", "cuda" or "mps".
        capture: on a CUDA device, run each update as one CUDA graph.
        threads: CPU threads; 0 leaves it to torch.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 4e-3
    min_lr: float = 1e-6
    warmup: int = 500
    labels_from: float = 1.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0
    precision: Literal["float32", "bf16"] = "float32"
    seed: int = 0
    max_nonfinite: int = 20
    checkpoint_every: int = 1
    keep_checkpoints: int = 1
    log_every: int = 100
    multiple: int = 512
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    capture: bool = True
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config: train.{name}: wanted >= 1, got {getattr(self, name)}")
        if not 0 <= self.labels_from <= 1:
            raise ConfigError(f"config: train.labels_from: wanted in [0, 1], got {self.labels_from}")
        check_as_train_config(self)


@dataclass(frozen=True)
class ClassifyResult:
    """What came out of `train_classifier`.

    Args:
        out: the run's folder: config.json and model.safetensors of the last weights, ``best/`` with those of the epoch
            that the validation split chose, run.json, log.csv, evaluations.csv, checkpoints/.
        steps: updates done; epochs: whole epochs done.
        evaluations: (epoch, accuracy on the validation split).
        final: the last weights on the test; None where the run was interrupted.
        best: the weights of the epoch with the highest validation accuracy (the first of them) on the test.
        best_epoch: that epoch.
        seconds: of training with its evaluations, those before a resume too.
        interrupted: a signal or the time given ended it early.
        signalled: a signal came, be it so late that the run is finished all the same.
    """

    out: Path
    steps: int
    epochs: int
    evaluations: list[tuple[int, float]]
    final: Judgement | None
    best: Judgement | None
    best_epoch: int | None
    seconds: float
    interrupted: bool
    signalled: bool = False


Classifier = SequenceClassifier | BackboneClassifier


def make_classifier(config: ClassifierConfig | BackboneClassifierConfig) -> Classifier:
    """The untrained classifier of a configuration."""
    return BackboneClassifier(config) if isinstance(config, BackboneClassifierConfig) else SequenceClassifier(config)


def _by_likelihood(config: ClassifierConfig | BackboneClassifierConfig) -> bool:
    """Whether labels are told apart by likelihoods, for which a sequence is read once a label."""
    return isinstance(config, BackboneClassifierConfig) and config.head == "likelihood"


def train_classifier(
    model: ClassifierConfig | BackboneClassifierConfig,
    train: ClassifyConfig,
    data: Splits,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    seconds: float | None = None,
    progress: bool = True,
    facts: Mapping[str, Any] | None = None,
    pretrained: str | os.PathLike[str] | None = None,
) -> ClassifyResult:
    """Trains a classifier and judges it; all of it is left in the folder `out`.

    After each epoch the validation split is judged. The test split is judged once, when the last epoch is over: with
    the last weights, and with those of the best epoch by validation. Interrupted by SIGINT or SIGTERM the run writes a
    checkpoint and returns; a resumed run goes on to the same bits as one that was never interrupted. What is drawn in
    an update (the order of the data, dropout) is given by the seed and the update's number.

    Args:
        model: what is trained; its inputs must be those of the data.
        train: how.
        data: the splits.
        out: the run's folder; made where it is missing.
        resume: go on with the run in `out`.
        seconds: stop after so many of this call, as if interrupted.
        progress: a line of progress on standard error, where that is a terminal.
        facts: what run.json shall say of the data besides.
        pretrained: whose weights it starts from: for a `BackboneClassifier` a language model of the backbone's own
            shape, for a `SequenceClassifier` one of the same configuration but for dropout.

    Returns:
        The `ClassifyResult`.

    Raises:
        ConfigError: settings that don't go together, or `out` holds anything and `resume` is False; or a run that
            learnt labels already would go back to tokens.
        CheckpointError: nothing to resume, a damaged checkpoint, or one of another model or data.
        DataError: fewer examples than a batch has.
        TrainingError: `max_nonfinite` gradients in a row were not finite.
    """
    out = Path(out)
    previous = check_folder(out, resume)
    _check_fits(model, data)
    if train.labels_from < 1 and not _by_likelihood(model):
        raise ConfigError(
            f"train: wanted train.labels_from=1 for a model that learns labels throughout, got {train.labels_from}; "
            "leave it at 1, or take a BackboneClassifier of head 'likelihood'"
        )
    if train.threads:
        torch.set_num_threads(train.threads)
    with Interruption() as interruption:
        trainer = _ClassifierTrainer(
            model, train, data, out, dict(facts or {}), previous, progress, interruption, pretrained
        )
        result = trainer.run(seconds)
    return dataclasses.replace(result, signalled=interruption.wished())


def _start_from(model: SequenceClassifier, folder: str | os.PathLike[str]) -> None:
    """Gives a classifier the weights of another one."""
    other = SequenceClassifier.from_pretrained(folder)
    for field in dataclasses.fields(model.config):
        wanted, got = getattr(model.config, field.name), getattr(other.config, field.name)
        if wanted != got and field.name != "dropout":
            raise ConfigError(
                f"train: wanted a classifier with {field.name} = {wanted!r} to start from, got {got!r} in '{folder}'; "
                f"set model.{field.name}={got}, or start from another one"
            )
    model.load_state_dict(other.state_dict())


def _check_fits(model: ClassifierConfig | BackboneClassifierConfig, data: Splits) -> None:
    for part in data:
        wanted = (part.classes, part.vocab_size, 0 if part.vocab_size else getattr(part, "frame", 1))
        got = (model.classes, model.vocab_size, model.d_input)
        if wanted != got:
            raise ConfigError(
                f"train: wanted a model with classes, vocab_size and d_input = {wanted}, as the data has, got {got}"
            )


def pick_device(accelerator: str) -> torch.device:
    """The device of a name in a run's settings; "auto" takes the fastest there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in there if there[kind]) if accelerator == "auto" else accelerator
    if not there[name]:
        raise ConfigError(f"train: wanted train.accelerator={name}, which this machine has not; leave it at auto")
    return torch.device(name)


class _Resident:
    """A split in the memory of the device, and its batches as the model takes them."""

    def __init__(self, data: LabelledSequences, device: torch.device) -> None:
        self.data = data
        self.values = torch.from_numpy(data.values).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self.lengths = None if data.lengths is None else torch.from_numpy(data.lengths).to(device)
        self.views = None if data.views is None else torch.from_numpy(data.views).to(device)

    def batch(self, rows: Tensor, length: int, *, vary: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, labels and mask of some rows, cut at a length: made on the device, without waiting for it.

        With `vary` each row is read through one of the data's views, or varied as the data says, where it does.
        """
        frame = self.data.frame
        length = -(-length // frame) * frame
        values, labels = self.values[rows, :length], self.labels[rows].long()
        lengths = None if self.lengths is None else self.lengths[rows]
        if vary and self.data.vary is not None and lengths is not None:
            values, lengths = self.data.vary(values, lengths)
        if vary and self.views is not None:
            chosen = torch.randint(len(self.views), rows.shape, device=rows.device)
            values = F.pad(values, (0, 1)).gather(1, self.views[chosen].long())
        if self.data.vocab_size:
            inputs = values.long()
        else:
            inputs = ((values.float() / 255 - self.data.mean) / self.data.deviation).unflatten(1, (-1, frame))
        if lengths is None:
            return inputs, labels, None
        mask = torch.arange(0, length, frame, device=values.device) < lengths.unsqueeze(-1)
        return inputs, labels, mask


def judge(
    model: Classifier,
    data: LabelledSequences | LabelledWindows,
    *,
    batch_size: int = 500,
    autocast: torch.dtype | None = None,
) -> Judgement:
    """The accuracy and the loss of a classifier on a split; dropout is off meanwhile.

    Args:
        model: on the device where it shall run.
        data: the split.
        batch_size: rows at once; where each is read once a label, so many readings.
        autocast: dtype of `torch.autocast`; None for none.
    """
    device = next(model.parameters()).device
    return _judge(model, _resident(data, device), batch_size, autocast)[0]


def predictions(
    model: Classifier, data: LabelledSequences | LabelledWindows, *, autocast: torch.dtype | None = None
) -> NDArray[np.int64]:
    """The label that a classifier gives each row of a split, (rows,) int64; arguments as of `judge`."""
    device = next(model.parameters()).device
    return _judge(model, _resident(data, device), _JUDGED_AT_ONCE, autocast)[1]


def _judge(
    model: Classifier, data: _Resident | _ResidentWindows, batch_size: int, autocast: torch.dtype | None
) -> tuple[Judgement, NDArray[np.int64]]:
    device, lengths = data.labels.device, data.data.lengths
    # Of long rows fewer at once, and of such as are read several times.
    readings = model.config.classes if _by_likelihood(model.config) else 1
    batch_size = max(1, min(batch_size, _JUDGED_POSITIONS // data.data.length) // readings)
    order = np.arange(len(data.data)) if lengths is None else np.argsort(lengths, kind="stable")
    loss = torch.zeros((), device=device, dtype=torch.float64)
    given: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                length = data.data.length if lengths is None else int(lengths[rows].max())
                inputs, labels, mask = data.batch(torch.from_numpy(rows).to(device), length)
                logits = model(inputs, mask=mask).logits
                given.append(logits.argmax(-1))
                loss += F.cross_entropy(logits, labels, reduction="sum")
    finally:
        model.train(was_training)
    chosen = np.empty(len(order), np.int64)
    chosen[order] = torch.cat(given).cpu().numpy()
    return Judgement(float((chosen == data.data.labels).mean()), float(loss) / len(order)), chosen


class _ResidentWindows:
    """The same for windows of genomes, cut on the device."""

    def __init__(self, data: LabelledWindows, device: torch.device) -> None:
        self.data = data
        self.tokens = torch.from_numpy(np.ascontiguousarray(data.tokens)).to(device)
        self.first, self.room = (torch.from_numpy(part).to(device) for part in (data.first, data.room))
        self.labels = torch.from_numpy(data.labels).to(device)
        self.device = device

    def batch(self, rows: Tensor, length: int, *, vary: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, labels and no mask; with `vary` each row begins somewhere in its room, on either strand."""
        rows = rows.to(self.device)
        starts, data = self.first[rows], self.data
        groups = rows.shape[0] // data.together
        if vary:
            place = torch.rand(groups, device=self.device).repeat_interleave(data.together)
            # One place for rows that go together, so in the smallest of their rooms.
            room = self.room[rows].view(groups, data.together).amin(1).repeat_interleave(data.together)
            starts = starts + torch.minimum((place * room).long(), room - 1)
        values = self.tokens[starts[:, None] + torch.arange(length, device=self.device)].long()
        if vary and data.both_strands:
            other = (torch.rand(groups, device=self.device) < 0.5).repeat_interleave(data.together)
            values = torch.where(other[:, None], complement_ids(values), values)
        return values, self.labels[rows].long(), None


def _resident(data: LabelledSequences | LabelledWindows, device: torch.device) -> _Resident | _ResidentWindows:
    return _ResidentWindows(data, device) if isinstance(data, LabelledWindows) else _Resident(data, device)


class _ClassifierTrainer:
    """One call of `train_classifier`."""

    def __init__(
        self,
        model: ClassifierConfig | BackboneClassifierConfig,
        config: ClassifyConfig,
        data: Splits,
        out: Path,
        facts: dict[str, Any],
        previous: dict[str, Any] | None,
        progress: bool,
        interruption: Interruption,
        pretrained: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config, self.out, self.interruption = config, out, interruption
        self.device = pick_device(config.accelerator)
        self.order = LabelledOrder(data.train, config.batch_size, config.seed, multiple=config.multiple)
        self.steps = config.epochs * self.order.batches
        self.schedule = TrainConfig(steps=self.steps, warmup=config.warmup, lr=config.lr, min_lr=config.min_lr)
        # So many updates learn tokens, the others labels: one at least, where it is below 1.
        self.generative = math.floor(config.labels_from * self.steps) if _by_likelihood(model) else 0
        self.label_passes = _label_passes(model, config.batch_size // getattr(data.train, "together", 1))
        self.facts = {"data": facts | _describe(data), "config": _plain(model, config)}
        self.history: list[dict[str, Any]] = []
        if previous is not None:
            _check_same(previous, self.facts)

        torch.manual_seed(config.seed)
        made = make_classifier(model)
        if pretrained is not None:
            if isinstance(made, BackboneClassifier):
                made.load_backbone(pretrained)
            else:
                _start_from(made, pretrained)
        self.model = made.to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.autocast = torch.bfloat16 if config.precision == "bf16" else None
        self.train_rows = _resident(data.train, self.device)
        self.valid, self.test = _resident(data.valid, self.device), data.test
        self.done, self.in_window, self.seconds = 0, 0, 0.0
        self.by_labels = False  # what the last update learnt, so whose loss the window sums
        self.loss_sum, self.norm, self.skipped, self.skipped_in_row = torch.zeros(4, device=self.device).unbind()
        self.evaluations: list[tuple[int, float]] = []

        checkpoint = latest_checkpoint(out) if previous is not None else None
        if checkpoint is not None:
            self._restore(checkpoint)
        if previous is not None:
            self.history = previous.get("history", []) + _changes(previous, self.facts, self.done)
        # One for each length that batches are padded to, and whether labels are learnt. Made after the moments are
        # restored, which they take as such.
        self.updates: dict[tuple[int, bool], CapturedStep] = {}
        make_folder(out)
        self._write_run("running")
        keep = None if checkpoint is None else self.done
        # A row at the checkpoint itself, within its window: where the loss changed in a resume from it before this one.
        rows = keep - 1 if keep and self.in_window else keep
        self.log = CsvLog(out / "log.csv", _LOG_COLUMNS, rows)
        self.evaluation_log = CsvLog(out / "evaluations.csv", _EVALUATION_COLUMNS, keep)
        self.progress = Progress(self.steps, self.done, progress, judged="% right", each="sequences")
        if previous is not None:
            origin = "from the start, since it has no checkpoint" if checkpoint is None else f"from step {self.done}"
            self.progress.note(f"resuming {out} {origin}")

    def _restore(self, checkpoint: Checkpoint) -> None:
        load_checkpoint(checkpoint, self.model, self.optimizer)
        state = checkpoint.trainer_state()
        if state["step"] > self.steps:
            raise ConfigError(
                f"resume: wanted train.epochs of at least {-(-state['step'] // self.order.batches)}, which are done in "
                f"'{self.out}', got {self.config.epochs}; raise train.epochs to go on"
            )
        # Earlier versions don't say what was learnt.
        self.by_labels = state.get("by_labels", state["step"] > self.generative)
        if self.by_labels and state["step"] < self.generative:
            most = math.floor(10_000 * state["step"] / self.steps) / 10_000
            raise ConfigError(
                f"resume: wanted train.labels_from of at most {most} with train.epochs={self.config.epochs}, since the "
                f"run in '{self.out}' learns labels by step {state['step']}, got {self.config.labels_from}, with which "
                f"it would go back to tokens until step {self.generative}; set train.labels_from={most} to go on with "
                "labels"
            )
        self.done, self.in_window, self.seconds = state["step"], state["in_window"], state["seconds"]
        for name in _COUNTERS:
            getattr(self, name).fill_(state[name])
        self.evaluations = [(epoch, accuracy) for epoch, accuracy in state["evaluations"]]

    def run(self, seconds: float | None = None) -> ClassifyResult:
        """Trains to the end, to an interruption, or until the time is up."""
        self.begun, self.before = time.perf_counter(), self.seconds
        self.logged_at, self.logged_step = self.begun, self.done
        interrupted = False
        try:
            while self.done < self.steps:
                self._update()
                self.progress.step(self.done)
                epoch, place = divmod(self.done, self.order.batches)
                # A row is of one loss.
                if self.done % self.config.log_every == 0 or self.done in (self.generative, self.steps):
                    self._log()
                if place == 0:
                    self._evaluate(epoch)
                late = seconds is not None and time.perf_counter() - self.begun >= seconds
                interrupted = (late or self.interruption.wished()) and self.done < self.steps
                every = self.config.checkpoint_every
                if interrupted or self.done == self.steps or (place == 0 and every and epoch % every == 0):
                    self._save()
                if interrupted:
                    break
            return self._finish(interrupted)
        finally:
            self.progress.close()

    def _update(self) -> None:
        rows, length = self.order[self.done]
        kind = length, self.done >= self.generative
        if self.in_window and kind[1] != self.by_labels:
            self._log()  # resumed with an earlier `labels_from` within a window
        self.by_labels = kind[1]
        update = self.updates.get(kind)
        if update is None:
            update = self.updates[kind] = self._make_update(*kind)
        # Dropout's numbers belong to the update, whatever was drawn before it.
        torch.manual_seed(self.config.seed + (self.done << 20))
        update.set_lr(learning_rate(self.done, self.schedule))
        loss = update.step(torch.from_numpy(rows))
        self.loss_sum += loss
        self.norm.copy_(update.norm)
        bad = (~torch.isfinite(self.norm)).float()
        self.skipped += bad
        self.skipped_in_row.add_(1).mul_(bad)
        self.in_window += 1
        self.done += 1

    def _make_update(self, length: int, by_labels: bool) -> CapturedStep:
        def loss(rows: Tensor) -> Tensor:
            inputs, labels, mask = self.train_rows.batch(rows, length, vary=True)
            if not by_labels:
                assert isinstance(self.model, BackboneClassifier)
                return self.model.generative_loss(inputs, labels, mask=mask)
            found = self.model(inputs, labels, mask=mask).loss
            assert found is not None
            return found

        return CapturedStep(
            self.optimizer,
            loss,
            clip=self.config.clip,
            autocast=self.autocast,
            accumulate=self.label_passes if by_labels else 1,
            beside=next(iter(self.updates.values()), None),
            capture=None if self.config.capture else False,
        )

    def _log(self) -> None:
        loss, norm = float(self.loss_sum) / self.in_window, float(self.norm)
        skipped, in_row = int(self.skipped), int(self.skipped_in_row)
        now = time.perf_counter()
        speed = (self.done - self.logged_step) * self.config.batch_size / max(now - self.logged_at, 1e-9)
        self.logged_at, self.logged_step = now, self.done
        self.loss_sum.zero_()
        self.in_window = 0
        rate = learning_rate(self.done - 1, self.schedule)
        self.log.append(
            step=self.done,
            epoch=self.done / self.order.batches,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            skipped=skipped,
        )
        self.progress.show(loss=f"{loss:.3f}", speed=f"{speed:,.0f}")
        if in_row >= self.config.max_nonfinite:
            raise TrainingError(
                f"train: the last {in_row} gradients up to step {self.done} were infinite or no numbers, "
                "and were left out; lower train.lr or lengthen train.warmup, then go on with resume"
            )

    def _evaluate(self, epoch: int) -> None:
        judged, _ = _judge(self.model, self.valid, _JUDGED_AT_ONCE, self.autocast)
        best = max((accuracy for _, accuracy in self.evaluations), default=-1.0)
        self.evaluations.append((epoch, judged.accuracy))
        if judged.accuracy > best:
            self.model.save_pretrained(self.out / "best")
        self.evaluation_log.append(step=self.done, epoch=epoch, accuracy=judged.accuracy, loss=judged.loss)
        self.progress.show(held_out=f"{100 * judged.accuracy:.2f}")

    def _save(self) -> None:
        self.seconds = self.before + time.perf_counter() - self.begun
        state = {
            "step": self.done,
            "in_window": self.in_window,
            "by_labels": self.by_labels,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            **{name: float(getattr(self, name)) for name in _COUNTERS},
        }
        keep = self.config.keep_checkpoints
        save_checkpoint(self.out, self.done, self.model, self.optimizer, trainer=state, rank_state={}, keep=keep)

    def _finish(self, interrupted: bool) -> ClassifyResult:
        self.model.save_pretrained(self.out)
        self.seconds = self.before + time.perf_counter() - self.begun
        best_epoch, best_accuracy = max(self.evaluations, key=lambda entry: entry[1], default=(None, None))
        final = best = None
        results: dict[str, Any] = {}
        if not interrupted:
            test = _resident(self.test, self.device)
            final, _ = _judge(self.model, test, _JUDGED_AT_ONCE, self.autocast)
            chosen = type(self.model).from_pretrained(self.out / "best").to(self.device)
            best, _ = _judge(chosen, test, _JUDGED_AT_ONCE, self.autocast)
            results["test"] = {
                "final": {"epoch": self.evaluations[-1][0], "valid": self.evaluations[-1][1], **final._asdict()},
                "best": {"epoch": best_epoch, "valid": best_accuracy, **best._asdict()},
            }
        self._write_run("interrupted" if interrupted else "finished", **results)
        if interrupted:
            self.progress.note(f"interrupted after step {self.done}, which is saved; go on with --resume")
        epochs = self.done // self.order.batches
        return ClassifyResult(
            self.out, self.done, epochs, self.evaluations, final, best, best_epoch, self.seconds, interrupted
        )

    def _write_run(self, status: str, **results: Any) -> None:
        cuda = self.device.type == "cuda"
        facts = {
            "status": status,
            "steps": self.done,
            "steps_an_epoch": self.order.batches,
            **self.facts,
            "history": self.history,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "versions": {"statescan": __version__, "torch": torch.__version__, "python": platform.python_version()},
            **results,
        }
        write_json(self.out / RUN_FILE, facts, indent=2)


def _label_passes(model: ClassifierConfig | BackboneClassifierConfig, parts: int) -> int:
    """Into how many passes an update that learns labels is cut, a divisor of the parts that its batch can be cut into:
    where each row is read once a label, so that a pass reads no more than the batch has rows, if it can be."""
    if not _by_likelihood(model):
        return 1
    return next((passes for passes in range(model.classes, parts) if parts % passes == 0), parts)


def _plain(model: ClassifierConfig | BackboneClassifierConfig, train: ClassifyConfig) -> dict[str, Any]:
    return json.loads(json.dumps({"model": model.to_dict(), "train": dataclasses.asdict(train)}))


def _describe(data: Splits) -> dict[str, Any]:
    """How many examples, and numbers by which other ones would be known as such."""
    return {
        name: {"examples": len(part), "length": part.length, "digest": part.digest}
        for name, part in zip(Splits._fields, data, strict=True)
    }


def _check_same(previous: dict[str, Any], now: dict[str, Any]) -> None:
    """A run may go on with another schedule, not with another model, other data or another order of them."""
    then = previous["config"]
    pairs = [(f"model.{name}", then["model"].get(name), value) for name, value in now["config"]["model"].items()]
    pairs += [(f"train.{name}", then["train"].get(name), now["config"]["train"][name]) for name in _FIXED]
    pairs += [(f"the {name} split", previous["data"].get(name), now["data"][name]) for name in Splits._fields]
    for name, before, value in pairs:
        if before != value:
            raise CheckpointError(
                f"resume: wanted {name} = {before}, with which the run began, got {value}; leave it as it was, or "
                "start a new run in another folder"
            )


def _changes(previous: dict[str, Any], now: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """What a resumed run does otherwise after a step, by the fields' names: [before, after]."""
    # A field that an earlier version did not know had what is its default by now.
    settings = dataclasses.asdict(ClassifyConfig()) | previous["config"]["train"]
    found = {
        name: [then.get(name), value]
        for then, here in ((settings, now["config"]["train"]), (previous["data"], now["data"]))
        for name, value in here.items()
        if then.get(name) != value
    }
    return [{"after_step": step, "changed": found}] if found else []
