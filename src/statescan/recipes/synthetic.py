"""What the recipes of synthetic tasks share: many small runs trained side by side, resumed, judged and tabled.

Small models are bound by launches, not by arithmetic. So a run's whole step, its data included, is one CUDA graph of
many steps (`statescan.train.CapturedStep`), and several runs (seeds, rows of a table) are trained at once, each on its
own stream of one device.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import pickle
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan import __version__
from statescan.data.synthetic import InductionHeads, SyntheticBatch, SyntheticTask, example_keys
from statescan.errors import CheckpointError, ConfigError, MissingExtraError
from statescan.files import atomic_file, make_folder, write_json
from statescan.models import CausalLM
from statescan.nn import Mamba
from statescan.train.capture import CapturedStep, end_failed_capture
from statescan.train.finished import check_same
from statescan.train.loop import Interruption
from statescan.train.optim import parameter_groups

__all__ = [
    "Pooled",
    "Score",
    "Stage",
    "SyntheticRun",
    "TrainedRun",
    "judge",
    "judge_further",
    "judge_pieces",
    "train_runs",
    "wilson",
]

_TRAINED = "trained.json"
_SCORES = "scores.json"
_CHECKPOINT = "checkpoint.pt"
_LOG = "log.csv"
# What is kept of a score; files from before squares were counted have none.
_COUNTS = ("correct", "asked", "examples", "squares", "seconds")
# Seconds between checkpoints, and between two looks at the losses, for which the host waits.
_SAVE_EVERY, _LOOK_EVERY = 60.0, 2.0
# Steps in one graph: enough that the host starts each of many runs rarely, few enough to stop at any moment.
_UNROLLED = 20
# Graphs that the host may be ahead of the device: a look at the losses, and so a stop, waits for no more than these.
_AHEAD = 8
# Rows of a run's log.
_ROWS = 400
# Tokens of a row in a piece, where there are rows enough for that.
_PIECE = 512
# Tokens that are judged before the scores are written again: some seconds.
_JUDGED_AT_A_TIME, _JUDGED_ON_A_GPU = 1 << 21, 1 << 29
# Pieces of a row from which a CUDA graph of one pays for its making.
_WORTH_A_GRAPH = 16


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run: `steps` updates on fresh batches of `batch_size` examples of `task`."""

    task: SyntheticTask
    batch_size: int
    steps: int


@dataclass(frozen=True, slots=True)
class SyntheticRun:
    """One model trained on one task.

    Args:
        row: the name of the row of the table that it belongs to.
        model: what is trained.
        stages: what it is trained on, in order.
        seed: of weights and examples.
        lr: highest learning rate of Adam; there is no weight decay. Default 1e-3.
        warmup: updates of linear warm-up. Default 0.
        decay: share of the updates, the last ones, over which the rate falls to 0 along a line. Default 0: it stays.
        clip: largest global norm of a gradient; 0 for no clipping. Default 0.
        beta2: of Adam's second moment. Once nearly all answers are right, gradients are tiny but for the rare example
            that fails; with 0.999 such a one then moves every weight by some thirty times the rate. Default 0.999.
        bf16: train under bfloat16 autocast. Default False.
        quiet: weight in the loss of how far S6's steps lie above e^`quiet_floor`: of z - quiet_floor where that is
            positive, with z what goes into the step's softplus, its logarithm where it is small; the mean over tokens,
            channels and layers. Once every answer is right nothing pushes the steps at noise further down than the
            trained length needs, and over a million tokens what is left of them adds up; this pushes them, through
            ``dt_proj`` alone, and the answers hold up those that are needed. Default 0.
        quiet_floor: steps below e^this are small enough. Default -20: a million of them are 0.002.
        quiet_after: updates before that begins, with the biases: all steps of a channel sink alike, which costs the
            answers nothing. Default 0.
        quiet_weights_after: updates before it is the weights' turn too, which close a channel at the tokens of noise
            at which it still opens. Default 0.
    """

    row: str
    model: Any
    stages: tuple[Stage, ...]
    seed: int = 0
    lr: float = 1e-3
    warmup: int = 0
    decay: float = 0.0
    clip: float = 0.0
    beta2: float = 0.999
    bf16: bool = False
    quiet: float = 0.0
    quiet_floor: float = -20.0
    quiet_after: int = 0
    quiet_weights_after: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.row}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """Updates of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens read in all."""
        return sum(stage.steps * stage.batch_size * stage.task.total_length for stage in self.stages)

    def learning_rate(self, step: int) -> float:
        """That of an update, from 0."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup))
        return rate * min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))

    def to_dict(self) -> dict[str, Any]:
        """All that decides how it is trained, as JSON takes it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["model"] = {"kind": type(self.model).__name__, **self.model.to_dict()}
        fields["stages"] = [
            {
                "task": {"kind": type(stage.task).__name__, **dataclasses.asdict(cast(Any, stage.task))},
                "batch_size": stage.batch_size,
                "steps": stage.steps,
            }
            for stage in self.stages
        ]
        return fields


@dataclass
class TrainedRun:
    """What `train_runs` gives: the model, and how it came about.

    Args:
        run: what was asked for.
        model: in evaluation mode, on the device; as far as it got where `finished` is False.
        steps: updates done.
        seconds: of training, of this and earlier calls; of several runs side by side each counts all of them.
        finished: all stages are done.
        log: (step, mean loss since the row before, learning rate); the loss with the term of `SyntheticRun.quiet`,
            where a run has one.
    """

    run: SyntheticRun
    model: CausalLM
    steps: int
    seconds: float
    finished: bool
    log: list[tuple[int, float, float]] = field(default_factory=list)


class Score(NamedTuple):
    """Answers judged: how many were right, of how many; `examples` they came from.

    `squares` is the sum over the examples of the square of how many of its answers were right, which tells how far
    answers to one example hang together; None where it was not counted.
    """

    correct: int
    asked: int
    examples: int
    squares: int | None = None

    @property
    def accuracy(self) -> float:
        """The part that was right."""
        return self.correct / self.asked

    @property
    def trials(self) -> tuple[float, float]:
        """(successes, trials) for `wilson`; see `Pooled.trials`."""
        return Pooled((self,)).trials


@dataclass(frozen=True, slots=True)
class Pooled:
    """Scores of several models, all judged on the same examples, from the first one on."""

    scores: tuple[Score, ...]

    @property
    def accuracy(self) -> float:
        """The part of all answers that was right."""
        return sum(score.correct for score in self.scores) / sum(score.asked for score in self.scores)

    @property
    def trials(self) -> tuple[float, float]:
        """(successes, trials) for `wilson`: as many independent trials as tell as much as the judged examples.

        An example, not an answer, is what was drawn. So the variance of the accuracy is that between the examples'
        shares of right answers, and the trials are p (1 - p) over it, p the accuracy: the answers over their design
        effect. Where `Score.squares` is unknown a share varies as if all answers to an example were right or wrong
        together, which no mean in [0, 1] exceeds: each example is one trial. Where few answers are wrong (or few
        right), hardly anything shows how they hang together: an example with every answer right and one with every
        answer wrong are counted in, so that with no error the trials are the examples and become more as errors are
        seen to come apart. Models are judged on the same examples, and how their errors go together is not kept: their
        deviations are added as if they did so wholly. There are never more trials than answers to one model.

        Source: Kish, "Survey sampling", 1965, section 5.4 (clusters' variance, design effect); Korn and Graubard,
        "Confidence intervals for proportions with small expected number of positive counts estimated from survey
        data", 1998 (the effective sample size in a binomial interval). The two examples counted in are ours.
        """
        # Of each model, by examples: how many, the sum of their shares with the two, and the share's deviation.
        judged: list[tuple[int, float, float]] = []
        most = 0
        for correct, asked, examples, squares in self.scores:
            of_each = asked / examples
            right = correct / of_each + 1
            mean = right / (examples + 2)
            square = mean if squares is None else (squares / of_each**2 + 1) / (examples + 2)
            judged.append((examples, right * examples / (examples + 2), math.sqrt(square - mean * mean)))
            most = max(most, examples if squares is None else asked)
        judged.sort()
        count, done, variance = sum(examples for examples, _, _ in judged), 0, 0.0
        for number, (examples, _, _) in enumerate(judged):
            # Examples that this model and those after it were judged on.
            variance += (examples - done) * math.fsum(deviation for _, _, deviation in judged[number:]) ** 2
            done = examples
        mean = math.fsum(right for _, right, _ in judged) / count
        trials = min(float(most), (mean - mean * mean) * count * count / variance)
        return self.accuracy * trials, trials


def wilson(correct: float, asked: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval for a probability of which `asked` independent trials showed `correct` successes.

    Args:
        correct: successes; a mean of several answers a trial gives fractions of one.
        asked: trials, at least 1; fractions where it is an effective number.
        z: normal quantile; default: 95 %.

    Returns:
        (low, high), within [0, 1].

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    p, q = correct / asked, z * z / asked
    middle = (p + q / 2) / (1 + q)
    half = z / (1 + q) * math.sqrt(p * (1 - p) / asked + q / (4 * asked))
    # Exact at the ends, where rounding would leave them by an ulp.
    return (0.0 if correct == 0 else middle - half, 1.0 if correct == asked else middle + half)


def make_model(config: Any, seed: int, device: torch.device | str) -> CausalLM:
    """A model whose initial values depend on the seed alone, whatever the device; torch's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CausalLM(config).to(device)


@contextlib.contextmanager
def _steps_seen(model: CausalLM, *, weights: bool) -> Iterator[list[Tensor]]:
    """Collects, of every S6 layer that runs meanwhile, what goes into the softplus of its steps: (batch, length,
    d_inner) float32 each, differentiable in ``dt_proj``'s bias alone, or in its weight too."""
    seen: list[Tensor] = []

    def look(projection: nn.Linear, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        low, weight = inputs[0].detach(), projection.weight if weights else projection.weight.detach()
        seen.append(F.linear(low, weight.to(low.dtype)).float() + projection.bias)

    layers = [module for module in model.modules() if isinstance(module, Mamba) and hasattr(module, "dt_proj")]
    hooks = [layer.dt_proj.register_forward_hook(look) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class _Course:
    """One run on its way: model, optimiser, the graph of its stage, the losses not yet looked at."""

    def __init__(self, run: SyntheticRun, folder: Path, device: torch.device) -> None:
        self.run, self.folder, self.device = run, folder, device
        self.model = make_model(run.model, run.seed, device).train()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.steps, self.seconds, self.together = 0, 0.0, 1
        # False while steps are being made: what is interrupted there is neither the state before them nor after.
        self.whole = True
        self.log: list[tuple[int, float, float]] = []
        self._row = max(1, run.steps // _ROWS)
        self._waiting: list[Tensor] = []
        self._ahead: deque[torch.cuda.Event] = deque()
        self._losses: list[float] = []
        self._last: float | None = None
        self._stage, self._quiet = -1, ""
        self._optimizer_state: dict[str, Any] | None = None
        self._load()

    @property
    def finished(self) -> bool:
        """All stages are done."""
        return self.steps >= self.run.steps

    def advance(self) -> None:
        """Starts the next steps."""
        number, _, left = self._where()
        quiet = ""
        if self.run.quiet:
            for name, after in (("bias", self.run.quiet_after), ("weight", self.run.quiet_weights_after)):
                if self.steps < after:
                    left = min(left, after - self.steps)
                elif name == "bias" or quiet:
                    quiet = name
        self.whole = False
        with self._here():
            if number != self._stage or quiet != self._quiet or left < self._unrolled:
                self._enter(number, min(_UNROLLED, left), quiet)
            self._waiting.append(self._step.step().reshape(-1))
            if self.stream is not None:
                done = torch.cuda.Event()
                done.record(self.stream)
                self._ahead.append(done)
        self.steps += self._unrolled
        self.whole = True
        if len(self._ahead) > _AHEAD:
            self._ahead.popleft().synchronize()

    def look(self) -> float | None:
        """Waits for the steps that were started, and logs; gives the last loss, None where this call made no step."""
        if self._waiting:
            with self._here():
                self._losses += torch.cat(self._waiting).tolist()
            self._waiting.clear()
            self._last = self._losses[-1]
        while len(self._losses) >= self._row or (self.finished and self._losses):
            row, self._losses = self._losses[: self._row], self._losses[self._row :]
            step = (self.log[-1][0] if self.log else 0) + len(row)
            self.log.append((step, math.fsum(row) / len(row), self.run.learning_rate(step - 1)))
        return self._last

    def _here(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _where(self, steps: int | None = None) -> tuple[int, int, int]:
        """(stage, number of its first example that is not yet used, steps left in it) after `steps`; default: now."""
        done, examples = self.steps if steps is None else steps, 0
        for number, stage in enumerate(self.run.stages):
            if done < stage.steps:
                return number, examples + done * stage.batch_size, stage.steps - done
            done -= stage.steps
            examples += stage.steps * stage.batch_size
        raise AssertionError("a finished run goes no further")

    def _enter(self, number: int, unrolled: int, quiet: str) -> None:
        """Makes the step of a stage, whose steps of S6 are quietened by bias, by bias and weight, or not (""); the
        optimiser goes on as it was."""
        run, stage = self.run, self.run.stages[number]
        if self._stage >= 0:
            self._optimizer_state = self._step.state_dict()["optimizer"]
        optimizer = torch.optim.Adam(parameter_groups(self.model, 0.0), lr=run.lr, betas=(0.9, run.beta2), fused=True)
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        position = torch.tensor(self._where()[1], dtype=torch.int64, device=self.device)
        task, rows, seed, device, model = stage.task, stage.batch_size, run.seed, self.device, self.model

        made: list[SyntheticBatch] = []

        def loss() -> Tensor:
            if not made:
                # The batches of all steps of the graph at once: as many kernels as for one.
                inputs, answers = task.batch(seed, position, rows * unrolled, device)
                position.add_(rows * unrolled)
                made.extend(map(SyntheticBatch, inputs.split(rows), answers.split(rows)))
            batch = made.pop(0)
            with _steps_seen(model, weights=quiet == "weight") if quiet else contextlib.nullcontext([]) as seen:
                logits = model(batch.inputs, logits_to_keep=task.asked).logits
            assert logits is not None
            wrong = F.cross_entropy(logits.float().flatten(0, 1), batch.answers.flatten())
            if not seen:
                return wrong
            return wrong + run.quiet * torch.stack([F.relu(z - run.quiet_floor).mean() for z in seen]).mean()

        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
        self._step = CapturedStep(
            optimizer,
            loss,
            clip=run.clip,
            autocast=torch.bfloat16 if run.bf16 else None,
            steps_per_replay=unrolled,
            schedule=run.learning_rate,
        )
        self._step.steps = self.steps
        self._stage, self._unrolled, self._quiet = number, unrolled, quiet

    def save(self, seconds: float) -> None:
        """Writes a checkpoint, whole or not at all."""
        self.seconds = seconds
        state = {
            "run": self.run.to_dict(),
            "steps": self.steps,
            "seconds": seconds,
            "together": self.together,
            "log": self.log,
            "losses": self._losses,
            "model": self.model.state_dict(),
            "optimizer": self._step.state_dict()["optimizer"] if self._stage >= 0 else self._optimizer_state,
        }
        with atomic_file(self.folder / _CHECKPOINT) as temporary:
            torch.save(state, temporary)

    def _load(self) -> None:
        path = self.folder / _CHECKPOINT
        if not path.exists():
            return
        with _readable(path, "the run begins anew"):
            state = torch.load(path, map_location=self.device, weights_only=True)
            check_same(path, state["run"], self.run.to_dict())
            self.model.load_state_dict(state["model"])
            self.steps, self.seconds, self.together = state["steps"], state["seconds"], state.get("together", 1)
            self.log = [tuple(row) for row in state["log"]]
            self._losses = state["losses"]
            self._optimizer_state = state["optimizer"]

    def finish(self, seconds: float) -> None:
        """Leaves the model and its log in the folder; the checkpoint, no longer needed, goes, and so do the scores of
        a model that was there before.

        Args:
            seconds: of training.
        """
        self.seconds = seconds
        self.model.save_pretrained(self.folder)
        with atomic_file(self.folder / _LOG) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("step", "loss", "learning_rate"))
            rows.writerows((step, f"{loss:.6g}", f"{rate:.6g}") for step, loss, rate in self.log)
        trained = {
            "run": self.run.to_dict(),
            "parameters": self.model.parameter_count(),
            "steps": self.steps,
            "tokens": self.run.tokens,
            "seconds": round(seconds, 1),
            "together": self.together,
            "final_loss": self.log[-1][1],
            "machine": machine_facts(self.device),
        }
        (self.folder / _SCORES).unlink(missing_ok=True)
        write_json(self.folder / _TRAINED, trained, indent=2)
        (self.folder / _CHECKPOINT).unlink(missing_ok=True)


@contextlib.contextmanager
def _readable(path: Path, cure: str) -> Iterator[None]:
    """Tells which file is damaged, and what comes of its deletion."""
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,
        pickle.PickleError,
    ) as why:
        told = " ".join(f"{type(why).__name__}: {why}".split())[:200]
        raise CheckpointError(f"reproduce: '{path}' can't be read ({told}); delete it, and {cure}") from None


def _read_finished(run: SyntheticRun, folder: Path, device: torch.device) -> TrainedRun | None:
    """The run that lies finished in a folder."""
    path = folder / _TRAINED
    if not path.exists():
        return None
    with _readable(path, "the run is trained anew"):
        trained = json.loads(path.read_text(encoding="utf-8"))
        check_same(path, trained["run"], run.to_dict())
        steps, seconds = trained["steps"], trained["seconds"]
    with (
        _readable(folder / _LOG, f"'{path}' too, and the run is trained anew"),
        open(folder / _LOG, newline="", encoding="utf-8") as file,
    ):
        rows = [(int(row["step"]), float(row["loss"]), float(row["learning_rate"])) for row in csv.DictReader(file)]
        if not rows or rows[-1][0] != steps:
            raise ValueError(f"it does not end with step {steps}")
    model = CausalLM.from_pretrained(folder, device=device).eval()
    return TrainedRun(run, model, steps, seconds, True, rows)


def train_runs(
    runs: Sequence[SyntheticRun],
    out: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    seconds: float | None = None,
    say: Callable[[str], object] = print,
) -> list[TrainedRun]:
    """Trains several runs side by side, and goes on with those that an earlier call left unfinished.

    Each run has a folder of its name: the model, `trained.json` and `log.csv` when it is done, a checkpoint before. A
    checkpoint is written every minute, at the end of the time given, and on Ctrl-C or SIGTERM, once the twenty steps
    that are being made are done; a run that goes on from one ends with the weights that it would have had without the
    break, where the device's kernels give the same bits twice. A second Ctrl-C doesn't wait: what is then in the middle
    of its steps keeps the checkpoint before.

    Args:
        runs: with distinct names.
        out: folder of their folders.
        device: where all of them run, on a stream each where that is a GPU.
        seconds: stop after so many; looked at whenever a run has made twenty steps, so that one makes them in any case,
            the one that is furthest behind. Default: when all are done.
        say: called with lines of progress.

    Returns:
        A `TrainedRun` for each run, in order.

    Raises:
        CheckpointError: a folder holds a run of that name with other settings, or a damaged file.
        KeyboardInterrupt: interrupted, by Ctrl-C or SIGTERM; what was trained is kept.
    """
    if len({run.name for run in runs}) != len(runs):
        raise ConfigError(f"train_runs: wanted runs of distinct names, got {[run.name for run in runs]}")
    out, device = Path(out), torch.device(device)
    done: dict[str, TrainedRun] = {}
    going: list[_Course] = []
    for run in runs:
        folder = make_folder(out / run.name)
        finished = _read_finished(run, folder, device)
        if finished is None:
            going.append(_Course(run, folder, device))
        else:
            done[run.name] = finished
    for course in going:
        # The last steps were made, and a break came before they were told of.
        if course.finished:
            course.look()
            course.finish(course.seconds)
    begun = time.perf_counter()
    before = {course.run.name: course.seconds for course in going}
    looked = saved = begun
    # Those that are behind come first: a call that ends within a round left them there.
    under_way = sorted(
        (course for course in going if not course.finished), key=lambda course: course.steps / course.run.steps
    )
    for course in under_way:
        course.together = max(course.together, len(under_way))

    def elapsed(course: _Course) -> float:
        return before[course.run.name] + time.perf_counter() - begun

    with Interruption() as interruption:
        try:
            while under_way:
                late = False
                for course in under_way:
                    if interruption.wished():
                        raise KeyboardInterrupt
                    course.advance()
                    if late := seconds is not None and time.perf_counter() - begun >= seconds:
                        break
                now = time.perf_counter()
                ended = [course for course in under_way if course.finished]
                if not (ended or late or now - looked >= _LOOK_EVERY):
                    continue
                losses = [(course, course.look()) for course in under_way]
                looked = time.perf_counter()
                for course, loss in losses:
                    told = "" if loss is None else f"  loss {loss:.5f}"
                    say(
                        f"{elapsed(course):7.1f} s  {course.run.name}  step {course.steps:,} of {course.run.steps:,}"
                        + told
                    )
                for course in ended:
                    course.finish(elapsed(course))
                    under_way.remove(course)
                if late:
                    break
                if looked - saved >= _SAVE_EVERY:
                    for course in under_way:
                        course.save(elapsed(course))
                    saved = looked
        finally:
            for course in under_way:
                if course.whole and course.steps:
                    course.look()
                    course.save(elapsed(course))
    if interruption.wished():
        raise KeyboardInterrupt
    for course in going:
        model = course.model.eval()
        done[course.run.name] = TrainedRun(course.run, model, course.steps, course.seconds, course.finished, course.log)
    return [done[run.name] for run in runs]


@torch.no_grad()
def judge(
    model: CausalLM,
    task: SyntheticTask,
    examples: int,
    *,
    seed: int,
    first: int = 0,
    at_once: int = 1 << 19,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """How many answers a model gives right, on consecutive examples of a seed, whole sequences at a time.

    Args:
        model: gives one answer a judged position: the likeliest of all tokens.
        task: of any length.
        examples: how many.
        seed: none that the model was trained on.
        first: number of the first example.
        at_once: tokens of a batch, at least one example.
        progress: called with (examples done, examples).

    Returns:
        Score.
    """
    device = model.lm_head.weight.device
    rows = max(1, min(examples, at_once // task.total_length))
    correct, squares = torch.zeros(2, dtype=torch.int64, device=device)
    for start in range(0, examples, rows):
        batch = task.batch(seed, first + start, min(rows, examples - start), device)
        logits = model(batch.inputs, logits_to_keep=task.asked).logits
        assert logits is not None
        right = (logits.argmax(-1) == batch.answers).sum(-1)
        correct += right.sum()
        squares += right.square().sum()
        if progress is not None:
            progress(min(start + rows, examples), examples)
    return Score(int(correct), examples * task.asked, examples, int(squares))


class _Reader:
    """Reads rows of a task piece after piece, the state carried from each to the next.

    On a GPU a piece, the making of its tokens included, is one CUDA graph: the host has next to nothing to do. It waits
    every few pieces, so that what was told is done, and an interruption leaves little behind.
    """

    def __init__(self, model: CausalLM, task: InductionHeads, rows: int, piece: int) -> None:
        device = model.lm_head.weight.device
        self._model, self._task, self._piece = model, task, piece
        self._keys = torch.zeros(rows, dtype=torch.int64, device=device)
        self._start = torch.zeros((), dtype=torch.int64, device=device)
        self._state: Any = model.init_state(rows)
        self._logits = torch.empty(0, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = device.type == "cuda" and task.length // piece >= _WORTH_A_GRAPH

    def read(self, keys: Tensor, told: Callable[[int], object]) -> Tensor:
        """Whole examples, from the state before the first token: (rows, 1, vocabulary), logits at their last position.

        Args:
            keys: (rows,), of the examples.
            told: called with the tokens of each piece.
        """
        self._keys.copy_(keys)
        self._start.zero_()
        for tensor in _tensors(self._state):
            tensor.zero_()
        for number, start in enumerate(range(0, self._task.length, self._piece)):
            count = min(self._piece, self._task.length - start)
            if self._keys.is_cuda and number % _AHEAD == 0:
                torch.cuda.current_stream(self._keys.device).synchronize()
            if self._graph is not None and count == self._piece:
                self._graph.replay()
            else:
                self._advance(count)
                # What a first piece makes once (a kernel that is compiled) can't be made while capturing.
                if self._captures and self._graph is None:
                    self._capture()
            told(count * len(keys))
        return self._logits

    def _advance(self, count: int) -> None:
        inputs = self._task.piece(self._keys, self._start, count)
        self._start.add_(count)
        output = self._model(inputs, state=self._state, logits_to_keep=1)
        for held, new in zip(_tensors(self._state), _tensors(output.state), strict=True):
            held.copy_(new)
        assert output.logits is not None
        if self._logits.shape != output.logits.shape:
            self._logits = torch.empty_like(output.logits)
        self._logits.copy_(output.logits)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._advance(self._piece)
        except RuntimeError:
            # A layer that waits for the device in between runs kernel by kernel.
            end_failed_capture()
            self._captures = False
        else:
            self._graph = graph


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of a model's state, layer by layer."""
    if isinstance(state, Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from _tensors(part)


@torch.no_grad()
def judge_pieces(
    model: CausalLM,
    task: InductionHeads,
    examples: int,
    *,
    seed: int,
    first: int = 0,
    at_once: int = 1 << 19,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """As `judge`, with memory that doesn't grow with the length: piece after piece, the state carried from each to the
    next.

    Args:
        model: one whose state has a fixed size.
        task, examples, seed, first, progress: as in `judge`; progress counts tokens.
        at_once: tokens of a piece of all rows.

    Returns:
        Score.
    """
    device = model.lm_head.weight.device
    # Rows first: many short pieces of many rows keep all of a GPU busy, and one row is cut into long ones.
    rows = max(1, min(examples, at_once // min(task.length, _PIECE)))
    correct = torch.zeros((), dtype=torch.int64, device=device)
    done = 0

    def told(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(done, examples * task.length)

    reader: _Reader | None = None
    for start in range(0, examples, rows):
        count = min(rows, examples - start)
        if reader is None or count != rows:
            reader = _Reader(model, task, count, max(1, at_once // rows))
        keys = example_keys(seed, first + start, count, device)
        logits = reader.read(keys, told)
        correct += (logits.argmax(-1) == task.answers(keys)).sum()
    # One answer each: a count of 0 or 1 is its own square.
    return Score(int(correct), examples, examples, int(correct))


def seed_of_tests(length: int) -> int:
    """The seed of the test examples of a length: no training run has such a one."""
    return 1_000_000_007 + length


def read_scores(folder: Path) -> dict[int, dict[str, float]]:
    """What `write_scores` left in a run's folder."""
    path = folder / _SCORES
    if not path.exists():
        return {}
    with _readable(path, "the model is judged anew"):
        held = json.loads(path.read_text(encoding="utf-8"))
        return {int(length): _counted(length, score) for length, score in held.items()}


def _counted(length: str, score: Mapping[str, Any]) -> dict[str, float]:
    """A score as a file has it.

    Raises:
        ValueError: no examples can be counted so.
    """
    row = {name: score[name] for name in _COUNTS if name in score or name != "squares"}
    seconds = row["seconds"]
    correct, asked, examples = counts = [row[name] for name in ("correct", "asked", "examples")]
    squares = row.get("squares", 0)
    possible = int(length) > 0 and all(type(count) is int and count >= 0 for count in (*counts, squares))
    possible = possible and type(seconds) in (int, float) and 0 <= seconds < math.inf
    possible = possible and correct <= asked and examples > 0 and asked > 0 and asked % examples == 0
    if possible and "squares" in row:
        # Least where right answers lie as evenly as can be, most where as many examples as can be are all right.
        each, more = divmod(correct, examples)
        whole, rest = divmod(correct, asked // examples)
        most = whole * (asked // examples) ** 2 + rest**2
        possible = examples * each**2 + more * (2 * each + 1) <= squares <= most
    if not possible:
        raise ValueError(f"impossible counts at length {length}: {json.dumps(row)}")
    return row


def write_scores(folder: Path, scores: Mapping[int, Mapping[str, float]]) -> None:
    """Writes the scores of each length into a run's folder."""
    write_json(folder / _SCORES, {str(length): scores[length] for length in sorted(scores)}, indent=2)


def score_row(score: Score, seconds: float, before: Mapping[str, float] | None = None) -> dict[str, float]:
    """A score as it stands in a file, together with that of the examples before these; `Score.squares` where it was
    counted over all of them."""
    row = {**score._asdict(), "seconds": seconds}
    return {
        name: round(row[name] + (before[name] if before else 0), 3)
        for name in _COUNTS
        if row[name] is not None and (before is None or name in before)
    }


def judge_further(
    trained: TrainedRun,
    folder: Path,
    length: int,
    wanted: int,
    judged: Callable[[int, int], Score],
    *,
    say: Callable[[str], object] = print,
) -> None:
    """Judges a trained run at a length on top of the examples that an earlier call judged, in parts, each of which is
    kept at once.

    Args:
        trained: the run.
        folder: of the run.
        length: under which its scores are kept.
        wanted: how many examples in all.
        judged: gives the score of so many examples from the one of that number on: (first, count).
        say: called with a line a part.
    """
    scores = read_scores(folder)
    on_gpu = trained.model.lm_head.weight.is_cuda
    at_a_time = max(1, (_JUDGED_ON_A_GPU if on_gpu else _JUDGED_AT_A_TIME) // length)
    while (done := int(scores[length]["examples"]) if length in scores else 0) < wanted:
        part, begun = min(wanted - done, at_a_time), time.perf_counter()
        score = judged(done, part)
        took = time.perf_counter() - begun
        scores[length] = score_row(score, took, scores.get(length))
        write_scores(folder, scores)
        correct, asked = (int(scores[length][name]) for name in ("correct", "asked"))
        say(
            f"{trained.run.name}  length {length:,}  {percent(correct / asked)} % of {asked:,}  "
            f"{length * part / took / 1e6:.1f} M tokens/s"
        )


def machine_facts(device: torch.device | str) -> dict[str, Any]:
    """What a figure was measured on."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "statescan": __version__,
    }


def gather_runs(out: Path) -> list[dict[str, Any]]:
    """All finished and judged runs that lie in a folder, by name: what a report is made of."""
    found = []
    for path in sorted(out.glob(f"*/{_TRAINED}")):
        scores = read_scores(path.parent)
        if not scores:
            continue
        with _readable(path, "the run is trained anew"):
            trained = json.loads(path.read_text(encoding="utf-8"))
            run = trained.pop("run")
            found.append({"row": run["row"], "seed": run["seed"], "run": run, **trained, "scores": scores})
    return found


def unfinished_runs(out: Path) -> list[dict[str, Any]]:
    """The runs in a folder that `gather_runs` leaves out, by name: row, seed, steps done, and `of` how many; those that
    are trained and not yet judged have done all."""
    found = []
    for folder in sorted(path for path in out.glob("*") if path.is_dir()):
        if (path := folder / _TRAINED).exists():
            with _readable(path, "the run is trained anew"):
                held = None if read_scores(folder) else json.loads(path.read_text(encoding="utf-8"))
        elif (path := folder / _CHECKPOINT).exists():
            with _readable(path, "the run begins anew"):
                held = torch.load(path, map_location="cpu", weights_only=True)
        else:
            continue
        if held is not None:
            with _readable(path, "the run begins anew"):
                run = held["run"]
                of = sum(stage["steps"] for stage in run["stages"])
                found.append({"row": run["row"], "seed": run["seed"], "steps": held["steps"], "of": of})
    return found


def how_far(run: Mapping[str, Any]) -> str:
    """How far one of `unfinished_runs` is, for the tables."""
    if run["steps"] >= run["of"]:
        return "trained, not judged"
    return f"unfinished (step {run['steps']:,} of {run['of']:,})"


def pooled(runs: Iterable[Mapping[str, Any]], length: int) -> Pooled | None:
    """The answers of several runs at a length together; None where none was judged there."""
    scores = [run["scores"][length] for run in runs if length in run["scores"]]
    if not scores:
        return None
    return Pooled(tuple(Score(*(score.get(name) for name in Score._fields)) for score in scores))


def percent(accuracy: float) -> str:
    """An accuracy as the tables show it: rounded down, with one place, and more of them near 100, so that only what is
    perfect says 100."""
    # The shortest decimal that is this float: 0.29 for 29 of 100, where a hundred times the float is less than 29.
    value = 100 * Decimal(repr(float(accuracy)))
    if value == 100:
        return "100"
    places = 1 if value < Decimal("99.9") else 3 if value < Decimal("99.99") else 4
    return str(value.quantize(Decimal(1).scaleb(-places), rounding=ROUND_FLOOR))


def interval(correct: float, asked: float) -> tuple[str, str]:
    """Wilson's 95 % interval in per cent with two places, rounded outwards."""
    low, high = wilson(correct, asked)
    return f"{math.floor(1e4 * low) / 100:.2f}", f"{math.ceil(1e4 * high) / 100:.2f}"


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, with nothing global touched.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("drawing", "matplotlib", "plot") from None
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    return made, axes


def save_figure(made: Any, path: Path) -> None:
    """Writes a figure as SVG, the same file from the same numbers."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "statescan", "svg.fonttype": "none"}), atomic_file(path) as temporary:
        made.savefig(temporary, format="svg", metadata={"Date": None})
