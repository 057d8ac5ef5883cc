"""Training a waveform model on windows of recordings, on one device: resumable to the bit, captured on a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from statescan import __version__
from statescan.data.audio import LEVELS, dequantize, find_audio, quantize
from statescan.data.recordings import SILENCE, Recordings, read_recordings, refuse_repeats
from statescan.errors import CheckpointError, ConfigError, DataError, TrainingError
from statescan.evaluate.waveforms import bits_per_sample
from statescan.files import make_folder, write_json
from statescan.models.waveform import WaveformConfig, WaveformModel
from statescan.train.capture import CapturedStep
from statescan.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from statescan.train.classify import pick_device
from statescan.train.config import TrainConfig, build_config, check_as_train_config
from statescan.train.logs import CsvLog, Progress
from statescan.train.loop import RUN_FILE, Interruption, check_folder
from statescan.train.optim import learning_rate, parameter_groups

__all__ = [
    "BEST",
    "AudioData",
    "AudioRun",
    "HeldOut",
    "WaveformResult",
    "WaveformTraining",
    "load_audio_run",
    "run_audio",
    "train_waveform",
    "window_batch",
]

_LOG_COLUMNS = ("step", "bits", "learning_rate", "gradient_norm", "skipped")
_EVALUATION_COLUMNS = ("step", "bits_per_sample", "samples")
# What a resumed run must share with the one it goes on from; all of the model and the data besides.
_FIXED = ("seed", "batch_size", "window", "flip", "stretch")
# Folder of the weights that the held-out recordings chose, in the run's.
BEST = "best"


@dataclass(frozen=True)
class WaveformTraining:
    """How a waveform model is trained. What a field of `TrainConfig` has the name of, it means here too.

    Args:
        steps: updates of the weights.
        batch_size: windows of an update.
        window: samples of a window. A longer recording gives windows from anywhere in it, as many as fill it; a shorter
            one is heard whole, with silence behind it, which the model learns too.
        flip: turn every second window upside down, by chance, which no one hears: twice as many sounds to learn from.
            Silence behind a recording stays what it is.
        stretch: play each window up to this part faster or slower, by chance, as a tape would, pitch and all: other
            voices to learn from. 0 to below 1.
        lr: peak learning rate; parameters of S4's and S4D's systems have 0.001 at most.
        min_lr: learning rate at the end of the cosine.
        warmup: updates over which the learning rate rises in a line.
        weight_decay: AdamW's, on matrices.
        betas, eps: AdamW's.
        clip: the largest global norm of a gradient; 0 for no clipping.
        precision: "float32", or "bf16" for autocast; S4's kernels and spectra are float32 in both.
        seed: of the initial weights, the windows, and dropout.
        max_nonfinite: updates in a row with a gradient that is not finite, that end the run.
        evaluate_every: updates between two evaluations of the held-out recordings; 0 for none but the last.
        evaluate_windows: pieces of held-out recordings that are judged on the way; at the end all are. 0 for all.
        keep_best: leave the weights of the evaluation with the fewest bits in ``best/``; evaluate_windows must be 0, so
            that all evaluations are of the same samples.
        checkpoint_every: updates between two checkpoints; 0 for none but the last.
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: updates between two rows of log.csv.
        accelerator: "auto", "cpu", "cuda" or "mps".
        capture: on a CUDA device, run each update as one CUDA graph.
        threads: CPU threads; 0 leaves it to torch.
    """

    steps: int = 2000
    batch_size: int = 16
    window: int = 8192
    flip: bool = False
    stretch: float = 0.0
    lr: float = 2e-3
    min_lr: float = 1e-5
    warmup: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    precision: Literal["float32", "bf16"] = "float32"
    seed: int = 0
    max_nonfinite: int = 20
    evaluate_every: int = 500
    evaluate_windows: int = 64
    keep_best: bool = False
    checkpoint_every: int = 500
    keep_checkpoints: int = 1
    log_every: int = 20
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    capture: bool = True
    threads: int = 0

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("evaluate_windows", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"config: train.{name}: wanted >= {least}, got {getattr(self, name)}")
        if not 0 <= self.stretch < 1:
            raise ConfigError(f"config: train.stretch: wanted at least 0 and below 1, got {self.stretch}")
        if self.keep_best and self.evaluate_windows:
            raise ConfigError(
                f"config: train.evaluate_windows: wanted 0 with train.keep_best, got {self.evaluate_windows}; "
                "set it to 0, so that every evaluation is of the same recordings"
            )
        check_as_train_config(self)


class HeldOut(NamedTuple):
    """bits: a sample of the held-out recordings, judged by windows; samples: how many; step: after which update."""

    bits: float
    samples: int
    step: int


@dataclass(frozen=True)
class WaveformResult:
    """What came out of `train_waveform`.

    Args:
        out: the run's folder: config.json and model.safetensors, run.json, log.csv, evaluations.csv, checkpoints/; with
            `keep_best` also ``best/``.
        steps: updates done.
        train_bits: of the last updates, silence behind short recordings included.
        evaluations: on the way and at the end, where all held-out recordings are judged.
        seconds: of training with its evaluations, those before a resume too.
        samples_per_second: of this call's updates alone, where there are more without the first `log_every`, which
            compile and capture.
        peak_bytes: of the device's memory; 0 where that is not known.
        interrupted: a signal or the time given ended it early.
        signalled: a signal came, be it so late that the run is finished all the same.
    """

    out: Path
    steps: int
    train_bits: float
    evaluations: list[HeldOut]
    seconds: float
    samples_per_second: float
    peak_bytes: int
    interrupted: bool
    signalled: bool = False


@dataclass(frozen=True)
class AudioData:
    """Which sound files, and as what they are read; see `statescan.data.recordings.read_recordings`.

    Args:
        paths: files and folders to learn from.
        valid_paths: held out; none: a share of the others.
        sample_rate: of all; 0 for that of the first file.
        quantization: "mu-law" or "linear".
        labels: what the model is conditioned by: "none", "name" (a file's name up to the first "_") or "folder".
        normalize: scale each file so that its loudest sample is 1.
        held_out: the share of the files that is held out, where no others are named; of one file alone, its end.
        on_disk: keep the codes in a temporary file instead of memory.
    """

    paths: tuple[str, ...] = ()
    valid_paths: tuple[str, ...] = ()
    sample_rate: int = 0
    quantization: Literal["mu-law", "linear"] = "mu-law"
    labels: Literal["none", "name", "folder"] = "none"
    normalize: bool = False
    held_out: float = 0.05
    on_disk: bool = False


@dataclass(frozen=True)
class AudioRun:
    """A whole run of a waveform model: the model, whose rate, quantisation and classes come from the data; the data;
    how it is trained."""

    model: WaveformConfig
    data: AudioData
    train: WaveformTraining


def run_audio(
    run: AudioRun,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    seconds: float | None = None,
    progress: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> WaveformResult:
    """Reads the sound files of a run and trains; see `train_waveform`.

    Args:
        run: what is trained, on what, how.
        out, resume, seconds, progress: as in `train_waveform`.
        say: called with remarks: how much was read, and whether it is clipped.

    Raises:
        DataError: a file can't be read, there is nothing to hold out, or what is held out is learnt from as well.
        ConfigError, CheckpointError, TrainingError: as `train_waveform`.
    """
    data = run.data
    if not data.paths:
        raise ConfigError("train: --modality audio wanted sound files, got none; name some with --data FOLDER")
    # Before what may be hours of sound are read.
    check_folder(Path(out), resume)
    if data.valid_paths:
        known = {path.resolve() for path in find_audio(data.paths)}
        for path in find_audio(data.valid_paths):
            if path.resolve() in known:
                raise DataError(
                    f"train: wanted other recordings in --valid than in --data, got '{path}' in both; "
                    "leave it out of one"
                )

    def read(paths: tuple[str, ...], rate: int) -> Recordings:
        made = read_recordings(
            paths,
            sample_rate=rate or None,
            quantization=data.quantization,
            labels=data.labels,
            normalize=data.normalize,
            on_disk=data.on_disk,
        )
        if data.labels != "none" and made.labels is None:
            raise ConfigError(
                f"train: data.labels={data.labels} wanted recordings with labels, got '{paths[0]}' without; make it "
                "anew with labels, or leave data.labels out"
            )
        if made.clipped > 0.001:
            say(f"{100 * made.clipped:.1f} % of the samples are clipped: they were recorded too loud")
        if made.cancelled:
            others = f" and {len(made.cancelled) - 1} more" if made.cancelled[1:] else ""
            say(
                f"the channels of {made.cancelled[0]}{others} cancel each other out when mixed to one, as with one of "
                "them upside down: little is left; turn one over, or keep one alone"
            )
        return made if data.labels != "none" else dataclasses.replace(made, labels=None, classes=())

    learnt = read(data.paths, data.sample_rate)
    if data.valid_paths:
        valid = read(data.valid_paths, learnt.sample_rate)
        if valid.classes != learnt.classes:
            raise ConfigError(
                f"train: --valid wanted the labels {', '.join(learnt.classes)} that --data has, got "
                f"{', '.join(valid.classes)}"
            )
        refuse_repeats((learnt, valid), within=False)
    else:
        refuse_repeats((learnt,))
        learnt, valid = learnt.split(data.held_out, run.train.seed)
    say(
        f"{len(learnt):,} recordings, {_time(learnt)} at {learnt.sample_rate:,} Hz to learn from, "
        f"{_time(valid)} held out"
    )
    model = dataclasses.replace(
        run.model, sample_rate=learnt.sample_rate, quantization=learnt.quantization, classes=len(learnt.classes)
    )
    facts = {"settings": dataclasses.asdict(data)}
    return train_waveform(
        model, run.train, (learnt, valid), out, resume=resume, seconds=seconds, progress=progress, facts=facts
    )


def _time(recordings: Recordings) -> str:
    minutes = recordings.seconds / 60
    return f"{minutes:,.1f} minutes" if minutes >= 2 else f"{recordings.seconds:.1f} s"


def load_audio_run(out: str | os.PathLike[str]) -> AudioRun:
    """The run in a folder, from its run.json.

    Raises:
        CheckpointError: no run of `run_audio` stands there.
    """
    path = Path(out) / RUN_FILE
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        values = {
            "model": held["config"]["model"],
            "data": held["data"]["settings"],
            "train": held["config"]["train"],
        }
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"train: wanted a run of --modality audio in '{out}', got none there; name a folder that such a run wrote"
        ) from None
    return build_config(AudioRun, values)


def window_batch(
    recordings: Recordings,
    window: int,
    rows: int,
    seed: int,
    step: int,
    *,
    flip: bool = False,
    stretch: float = 0.0,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The windows of an update, given by the seed and its number alone.

    A recording is drawn as often as windows fill it, and its window begins anywhere in it, each place alike: so the
    samples less than a window from its ends are heard less often than those between.

    Args:
        recordings: of any lengths.
        window: samples of a window.
        rows: windows.
        seed, step: of the draw.
        flip: turn half of the windows upside down; which, is drawn as well. Default False.
        stretch: play each window between 1 - stretch and 1 + stretch times as fast, drawn evenly, by linear
            interpolation between its samples. Default 0.

    Returns:
        (codes, numbers): (rows, window) uint8 with silence behind short recordings, and the recording each is of.
    """
    draw = np.random.Generator(np.random.PCG64([seed, step]))
    lengths = recordings.lengths
    places = np.cumsum(-(-lengths // window))
    numbers = np.searchsorted(places, draw.integers(places[-1], size=rows), side="right")
    codes = np.full((rows, window), SILENCE, np.uint8)
    rates = 1 + stretch * draw.uniform(-1, 1, rows) if stretch else np.ones(rows)
    heard = np.empty(rows, np.int64)
    for row, (number, rate) in enumerate(zip(numbers, rates, strict=True)):
        begin, length = int(recordings.offsets[number]), int(lengths[number])
        reach = min(length, math.ceil((window - 1) * rate) + 1)
        begin += int(draw.integers(length - reach + 1))
        real = heard[row] = min(window, max(1, int((reach - 1) / rate) + 1))
        piece = recordings.codes[begin : begin + reach]
        codes[row, :real] = piece if rate == 1 else _faster(piece, float(rate), real, recordings.quantization)
    if flip:
        # Both quantisations have their zero between the two codes in the middle.
        for row in np.flatnonzero(draw.integers(2, size=rows)):
            codes[row, : heard[row]] = LEVELS - 1 - codes[row, : heard[row]]
    return codes, numbers


def _faster(codes: NDArray[np.uint8], rate: float, samples: int, quantization: str) -> NDArray[np.uint8]:
    """The first so many samples of a sound played `rate` times as fast."""
    sound = dequantize(codes, quantization)
    return quantize(np.interp(np.arange(samples) * rate, np.arange(len(sound)), sound), quantization)


def train_waveform(
    model: WaveformConfig,
    train: WaveformTraining,
    data: tuple[Recordings, Recordings],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    seconds: float | None = None,
    progress: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> WaveformResult:
    """Trains a `WaveformModel` and judges it on recordings held out; all of it is left in the folder `out`.

    Interrupted by SIGINT or SIGTERM, or when its time is up, the run writes a checkpoint and returns; a resumed run
    goes on to the same bits as one that was never interrupted.

    Args:
        model: what is trained; its quantisation, rate and classes must be those of the data.
        train: how.
        data: recordings to learn from, and held out.
        out: the run's folder; made where it is missing.
        resume: go on with the run in `out`.
        seconds: stop after so many of this call.
        progress: a line of progress on standard error, where that is a terminal.
        facts: what run.json shall say of the data besides.

    Returns:
        The `WaveformResult`.

    Raises:
        ConfigError: settings that don't go together, or `out` holds anything and `resume` is False.
        CheckpointError: nothing to resume, a damaged checkpoint, or one of another model or data.
        TrainingError: `max_nonfinite` gradients in a row were not finite.
    """
    out = Path(out)
    previous = check_folder(out, resume)
    for part in data:
        wanted = (part.sample_rate, part.quantization)
        if wanted != (model.sample_rate, model.quantization):
            raise ConfigError(
                f"train: wanted a model with sample_rate and quantization = {wanted}, as the recordings have, got "
                f"{(model.sample_rate, model.quantization)}"
            )
        if model.classes and (part.labels is None or len(part.classes) != model.classes):
            raise ConfigError(
                f"train: wanted recordings with {model.classes} classes, as the model has, got {len(part.classes)}"
            )
    if train.threads:
        torch.set_num_threads(train.threads)
    with Interruption() as interruption:
        trainer = _WaveformTrainer(model, train, data, out, dict(facts or {}), previous, progress, interruption)
        result = trainer.run(seconds)
    return dataclasses.replace(result, signalled=interruption.wished())


class _WaveformTrainer:
    """One call of `train_waveform`."""

    def __init__(
        self,
        model: WaveformConfig,
        config: WaveformTraining,
        data: tuple[Recordings, Recordings],
        out: Path,
        facts: dict[str, Any],
        previous: dict[str, Any] | None,
        progress: bool,
        interruption: Interruption,
    ) -> None:
        self.config, self.data, self.out, self.interruption = config, data, out, interruption
        self.device = pick_device(config.accelerator)
        described = {
            name: {"recordings": len(part), "samples": len(part.codes), "digest": part.digest}
            for name, part in zip(("train", "valid"), data, strict=True)
        }
        plain = json.loads(json.dumps({"model": model.to_dict(), "train": dataclasses.asdict(config)}))
        self.facts = {
            "kind": "waveform",
            "data": {**facts, "classes": list(data[0].classes), **described},
            "config": plain,
        }
        if previous is not None:
            _check_same(previous, self.facts)
        torch.manual_seed(config.seed)
        self.model = WaveformModel(model, device=self.device).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.autocast = torch.bfloat16 if config.precision == "bf16" else None
        self.schedule = TrainConfig(steps=config.steps, warmup=config.warmup, lr=config.lr, min_lr=config.min_lr)
        self.done, self.in_window, self.seconds = 0, 0, 0.0
        self.bits = math.nan
        self.loss_sum, self.skipped, self.skipped_in_row = torch.zeros(3, device=self.device).unbind()
        self.evaluations: list[HeldOut] = []
        checkpoint = latest_checkpoint(out) if previous is not None else None
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.model, self.optimizer)
            state = checkpoint.trainer_state()
            if state["step"] > config.steps:
                raise ConfigError(
                    f"resume: wanted train.steps of at least {state['step']}, which are done in '{out}', got "
                    f"{config.steps}; raise train.steps to go on"
                )
            self.done, self.in_window, self.seconds = state["step"], state["in_window"], state["seconds"]
            self.loss_sum.fill_(state["loss_sum"])
            self.skipped.fill_(state["skipped"])
            self.skipped_in_row.fill_(state["skipped_in_row"])
            self.bits = state["bits"]
            self.evaluations = [HeldOut(*entry) for entry in state["evaluations"]]
        self.update = CapturedStep(
            self.optimizer,
            self._loss,
            clip=config.clip,
            autocast=self.autocast,
            capture=None if config.capture else False,
        )
        make_folder(out)
        self._write_run("running")
        keep = None if checkpoint is None else self.done
        self.log = CsvLog(out / "log.csv", _LOG_COLUMNS, keep)
        self.evaluation_log = CsvLog(out / "evaluations.csv", _EVALUATION_COLUMNS, keep)
        self.progress = Progress(config.steps, self.done, progress, judged="bits per sample", each="samples")
        if previous is not None:
            origin = "from the start, since it has no checkpoint" if checkpoint is None else f"from step {self.done}"
            self.progress.note(f"resuming {out} {origin}")

    def _loss(self, codes: Tensor, labels: Tensor) -> Tensor:
        heard = codes.long()
        inputs = F.pad(heard[:, :-1], (1, 0), value=self.model.config.silence)
        output = self.model(inputs, labels if self.model.config.classes else None, targets=heard)
        assert output.loss is not None
        return output.loss

    def run(self, seconds: float | None) -> WaveformResult:
        """Trains to the end, to an interruption, or until the time is up."""
        config = self.config
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        begun, before = time.perf_counter(), self.seconds
        self.logged_at, self.logged_step = begun, self.done
        self.timed: list[tuple[int, float]] = []
        stopped = self.done >= config.steps
        interrupted = False
        try:
            while not stopped:
                self._update()
                self.progress.step(self.done)
                last = self.done == config.steps
                if self.done % config.log_every == 0 or last:
                    self._log()
                if last or (config.evaluate_every and self.done % config.evaluate_every == 0):
                    self._evaluate(whole=last)
                late = seconds is not None and time.perf_counter() - begun >= seconds
                interrupted = (late or self.interruption.wished()) and not last
                stopped = last or interrupted
                if interrupted:
                    float(self.loss_sum)  # waits for the device
                    self._time()
                if stopped or (config.checkpoint_every and self.done % config.checkpoint_every == 0):
                    self.seconds = before + time.perf_counter() - begun
                    self._save()
            self.model.save_pretrained(self.out)
            self.seconds = before + time.perf_counter() - begun
            peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
            timed = [entry for entry in self.timed if entry[0]]
            timed = timed[1:] or timed or [(0, 1.0)]
            updates, taken = (sum(column) for column in zip(*timed, strict=True))
            speed = updates * config.batch_size * config.window / taken
            self._write_run("interrupted" if interrupted else "finished", samples_per_second=speed, peak_bytes=peak)
            if interrupted:
                self.progress.note(f"interrupted after step {self.done}, which is saved; go on with --resume")
            return WaveformResult(
                self.out, self.done, self.bits, self.evaluations, self.seconds, speed, peak, interrupted
            )
        finally:
            self.progress.close()

    def _update(self) -> None:
        config, train = self.config, self.data[0]
        codes, numbers = window_batch(
            train, config.window, config.batch_size, config.seed, self.done, flip=config.flip, stretch=config.stretch
        )
        labels = np.zeros(config.batch_size, np.uint8) if train.labels is None else train.labels[numbers]
        # Dropout's numbers belong to the update, whatever was drawn before it.
        torch.manual_seed(config.seed + (self.done << 20))
        self.update.set_lr(learning_rate(self.done, self.schedule))
        self.loss_sum += self.update.step(torch.from_numpy(codes), torch.from_numpy(labels.astype(np.int64)))
        bad = (~torch.isfinite(self.update.norm)).float()
        self.skipped += bad
        self.skipped_in_row.add_(1).mul_(bad)
        self.in_window += 1
        self.done += 1

    def _log(self) -> None:
        config = self.config
        self.bits = float(self.loss_sum) / self.in_window / math.log(2)
        updates, taken = self._time()
        self.loss_sum.zero_()
        self.in_window = 0
        self.log.append(
            step=self.done,
            bits=self.bits,
            learning_rate=learning_rate(self.done - 1, self.schedule),
            gradient_norm=float(self.update.norm),
            skipped=int(self.skipped),
        )
        speed = updates * config.batch_size * config.window / taken
        self.progress.show(loss=f"{self.bits:.3f}", speed=f"{speed:,.0f}")
        if (in_row := int(self.skipped_in_row)) >= config.max_nonfinite:
            raise TrainingError(
                f"train: the last {in_row} gradients up to step {self.done} were infinite or no numbers, "
                "and were left out; lower train.lr or lengthen train.warmup, then go on with resume"
            )

    def _time(self) -> tuple[int, float]:
        """Notes the updates since the last time, and the seconds that they took."""
        now = time.perf_counter()
        self.timed.append((self.done - self.logged_step, max(now - self.logged_at, 1e-9)))
        self.logged_at, self.logged_step = now, self.done
        return self.timed[-1]

    def _evaluate(self, *, whole: bool) -> None:
        started = time.perf_counter()
        judged = bits_per_sample(
            self.model,
            self.data[1],
            longest=self.config.window,
            limit=0 if whole else self.config.evaluate_windows,
            autocast=self.autocast,
        )
        # Bits of other samples, from before a resumed run's settings changed, don't compare.
        fewest = min((entry.bits for entry in self.evaluations if entry.samples == judged.samples), default=math.inf)
        self.evaluations.append(HeldOut(judged.bits, judged.samples, self.done))
        if self.config.keep_best and judged.bits < fewest:
            self.model.save_pretrained(self.out / BEST)
        self.evaluation_log.append(step=self.done, bits_per_sample=judged.bits, samples=judged.samples)
        self.progress.show(held_out=f"{judged.bits:.3f}")
        self.logged_at += time.perf_counter() - started

    def _save(self) -> None:
        started = time.perf_counter()
        state = {
            "step": self.done,
            "in_window": self.in_window,
            "seconds": self.seconds,
            "bits": self.bits,
            "loss_sum": float(self.loss_sum),
            "skipped": float(self.skipped),
            "skipped_in_row": float(self.skipped_in_row),
            "evaluations": [list(entry) for entry in self.evaluations],
        }
        keep = self.config.keep_checkpoints
        save_checkpoint(self.out, self.done, self.model, self.optimizer, trainer=state, rank_state={}, keep=keep)
        self.logged_at += time.perf_counter() - started

    def _write_run(self, status: str, **results: Any) -> None:
        cuda = self.device.type == "cuda"
        facts = {
            "status": status,
            "steps": self.done,
            **self.facts,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "train_bits": None if math.isnan(self.bits) else self.bits,
            "evaluations": [entry._asdict() for entry in self.evaluations],
            "seconds": self.seconds,
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "versions": {"statescan": __version__, "torch": torch.__version__, "python": platform.python_version()},
            **results,
        }
        write_json(self.out / RUN_FILE, facts, indent=2)


def _check_same(previous: dict[str, Any], now: dict[str, Any]) -> None:
    """A run may go on with another schedule, not with another model, other data or another order of them."""
    if previous.get("kind") != "waveform":
        raise CheckpointError("resume: wanted a run of --modality audio, got another kind; name another folder")
    then = previous["config"]
    pairs = [(f"model.{name}", then["model"].get(name), value) for name, value in now["config"]["model"].items()]
    # Of a run from before a field was there, its default.
    before_it = {name: getattr(WaveformTraining, name) for name in _FIXED} | then["train"]
    pairs += [(f"train.{name}", before_it[name], now["config"]["train"][name]) for name in _FIXED]
    pairs += [(f"the {name} recordings", previous["data"].get(name), now["data"][name]) for name in ("train", "valid")]
    for name, before, value in pairs:
        if before != value:
            raise CheckpointError(
                f"resume: wanted {name} = {before}, with which the run began, got {value}; leave it as it was, or "
                "start a new run in another folder"
            )
