"""A whole training step as one CUDA graph: the host starts it once, whatever number of kernels it has."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from statescan.errors import ConfigError, ShapeError
from statescan.train.optim import guarded_update

__all__ = ["CapturedStep", "end_failed_capture"]


def end_failed_capture(generators: Iterable[torch.Generator] = ()) -> None:
    """Makes the random generators of the current device usable again after a capture that failed.

    Torch ends their part of a capture only with one that succeeds; until then every draw, dropout's too, is refused as
    one "outside graph capture". So here one succeeds.

    Args:
        generators: those that were registered with the failed graph, besides the device's own.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
    torch.cuda.synchronize()  # as `CapturedStep._capture` waits


class CapturedStep:
    """Forward, backward, clipping and the optimiser's update, captured in a CUDA graph and replayed.

    A step is ``loss(*batch).backward()``, the gradients divided by ``max(1, norm / clip)``, and the update; where the
    norm is not finite, weights, moments and step counts stay as they are and `skipped` counts it. The first `warmup`
    steps run one kernel after the other; they are steps like all others, so that nothing is done twice and nothing has
    to be put back. Then the step is captured: what the host does in it (Python, launches) is done that once. On a CPU,
    and with ``capture=False``, every step runs as those first ones, with the same results.

    What a replay does is what was captured: `loss` must not wait for the device (``.item()``, ``float(x)``, printing),
    nor change from step to step what it does by values that the host knows. Random numbers from torch's own generator
    of the device are fresh in every replay, those of another generator where it is named in `generators`.

    Args:
        optimizer: with a fused update: ``torch.optim.AdamW(..., fused=True)``, Adam or SGD. Its learning rates become
            tensors on the device, () float32.
        loss: from a batch, or from nothing, to a () tensor.
        parameters: over whose gradients the norm goes; None for all of the optimiser's.
        clip: the largest global norm of a gradient; 0 for no clipping.
        autocast: dtype of `torch.autocast` around `loss`; None for none.
        accumulate: passes whose gradients make one step: each batch is cut along its first axis into so many equal
            parts (a single number goes to all), and the step is that of the mean of their losses.
        warmup: steps before the capture, at least 1.
        steps_per_replay: steps unrolled in one graph, so that a call starts so many. Batches then have an axis more.
        schedule: from the number of a step, from 0, to its learning rate; None keeps the optimiser's until `set_lr`.
        generators: of the device, besides torch's own, that `loss` draws from.
        beside: one whose graph never runs at the same time, as for another shape of the same training: its memory
            serves this one's graph too.
        capture: False runs every step kernel by kernel, and takes batches of changing shape; True insists on a graph;
            None captures where the parameters are on a CUDA device.

    Attributes:
        steps: steps done; set it to go on with a schedule elsewhere.
        norm: () float32, the last step's global norm before clipping.
        skipped: () float32, how many steps were left out.
        skipped_in_row: () float32, how many of them end the sequence so far.

    Raises:
        ConfigError: an optimiser that isn't fused, parameters on several devices, numbers out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
        *,
        parameters: Sequence[Tensor] | None = None,
        clip: float = 0.0,
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
        warmup: int = 3,
        steps_per_replay: int = 1,
        schedule: Callable[[int], float] | None = None,
        generators: Sequence[torch.Generator] = (),
        beside: CapturedStep | None = None,
        capture: bool | None = None,
    ) -> None:
        groups = optimizer.param_groups
        own = [p for group in groups for p in group["params"]]
        self._parameters = own if parameters is None else list(parameters)
        devices = {p.device for p in (*own, *self._parameters)}
        if len(devices) != 1:
            raise ConfigError(
                f"CapturedStep: wanted all parameters on one device, got {sorted(map(str, devices)) or 'none'}; "
                "move the model before the optimiser is made"
            )
        if not all(group.get("fused") for group in groups):
            raise ConfigError(
                f"CapturedStep: wanted an optimiser with a fused update, got {type(optimizer).__name__} without; make "
                "it with fused=True, so that a gradient that is not finite is left out on the device"
            )
        self.device = devices.pop()
        for name, value in (("accumulate", accumulate), ("warmup", warmup), ("steps_per_replay", steps_per_replay)):
            if value < 1:
                raise ConfigError(f"CapturedStep: {name} must be at least 1, got {value}")
        if not 0 <= clip < float("inf"):
            raise ConfigError(f"CapturedStep: clip must be finite and not negative, got {clip}; 0 is no clipping")
        on_cuda = self.device.type == "cuda"
        if capture and not on_cuda:
            raise ConfigError(
                f"CapturedStep: capture=True wants parameters on a CUDA device, got them on '{self.device}'; leave "
                "it None"
            )
        self._optimizer, self._loss, self._clip, self._autocast = optimizer, loss, clip, autocast
        self._warmup, self._count, self._schedule, self._passes = warmup, steps_per_replay, schedule, accumulate
        self._generators = list(generators)
        self.captures = on_cuda and capture is not False
        self._any_shape = capture is False
        self.steps = 0
        self.norm, self.skipped, self.skipped_in_row = (torch.zeros((), device=self.device) for _ in range(3))
        self._losses = torch.zeros(self._count, device=self.device)
        self._rates = torch.zeros(self._count, len(groups), device=self.device)
        self._batch: list[Tensor] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: list[int] = []
        self._warm = 0
        # Those whose graphs never run at the same time.
        self._group: weakref.WeakSet[CapturedStep] = weakref.WeakSet() if beside is None else beside._group
        self._group.add(self)
        self._stream = None
        if self.captures:
            # Graphs share memory where they were captured on one stream.
            self._stream = torch.cuda.Stream(self.device) if beside is None else beside._stream
        self._adopt()
        weak = weakref.ref(self)

        def loaded(_: torch.optim.Optimizer) -> None:
            step = weak()
            if step is not None:
                step._adopt()

        # Its moments are other tensors then. The optimiser may outlive this object, and must not keep its memory.
        optimizer.register_load_state_dict_post_hook(loaded)

    def _adopt(self) -> None:
        """Takes the optimiser as it stands, after it was made or its state was loaded: a captured step is dropped."""
        self._graph = None
        self._warm = 0
        self._lr = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._held: list[list[float]] | None = None
        for number, group in enumerate(self._optimizer.param_groups):
            group["lr"] = self._rates[0, number]
            if self.captures and "capturable" in group:
                group["capturable"] = True
        # It would advise against what is meant here.
        self._optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
        self._write_rates()

    def set_lr(self, value: float) -> None:
        """Sets the learning rate of the next steps in every group, up to its "max_lr" where it has one.

        Raises:
            ConfigError: the learning rates come from a schedule.
        """
        if self._schedule is not None:
            raise ConfigError("CapturedStep.set_lr: the learning rates come from `schedule`; leave it None to set them")
        self._lr = [min(value, group.get("max_lr", value)) for group in self._optimizer.param_groups]

    def _write_rates(self) -> None:
        """Brings the learning rates of the next call to the device, where they are others than before."""
        groups = self._optimizer.param_groups
        if self._schedule is None:
            rates = [self._lr] * self._count
        else:
            values = [self._schedule(self.steps + i) for i in range(self._count)]
            rates = [[min(value, group.get("max_lr", value)) for group in groups] for value in values]
        if rates != self._held:
            self._held = rates
            new = torch.tensor(rates, dtype=torch.float32)
            self._rates.copy_(new.pin_memory() if self.device.type == "cuda" else new, non_blocking=True)

    def step(self, *batch: Tensor) -> Tensor:
        """Takes `steps_per_replay` steps.

        Args:
            batch: what `loss` takes, of the same shapes and dtypes in every call, on any device; with steps_per_replay
                above 1 each has a first axis of that size. Nothing, where `loss` makes its own data.

        Returns:
            The loss, () float32 on the device; (steps_per_replay,) where that is above 1. Nobody waited for it.

        Raises:
            ShapeError: a batch unlike the first one, or a loss that is not one number.
            ConfigError: `loss` does what can't be captured.
        """
        with self._here():
            # A rate written, or an input copied, comes after the replay before: they are on one stream.
            self._write_rates()
            held = self._place(batch)
            if not self.captures:
                self._run(held)
            else:
                self._run_captured(held)
            self.steps += self._count
            return self._losses.clone() if self._count > 1 else self._losses[0].clone()

    def _cast(self) -> Any:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._autocast)

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        with torch.enable_grad():
            if self.device.type != "cuda":
                yield
                return
            with torch.cuda.device(self.device):
                yield

    def _place(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """The batch on the device, where a graph finds it."""
        for number, tensor in enumerate(batch):
            if self._count > 1 and (tensor.ndim == 0 or tensor.shape[0] != self._count):
                raise ShapeError(
                    f"CapturedStep.step: batch[{number}] must have a first axis of steps_per_replay = {self._count}, "
                    f"got shape {tuple(tensor.shape)}; stack the batches of the steps"
                )
            shape = tensor.shape[int(self._count > 1) :]
            if shape and shape[0] % self._passes:
                raise ShapeError(
                    f"CapturedStep.step: batch[{number}] must have a multiple of accumulate = {self._passes} rows, got "
                    f"{shape[0]}; take as many more or another accumulate"
                )
        if self._any_shape:
            return [tensor.to(self.device, non_blocking=True) for tensor in batch]
        if self._batch is None:
            self._batch = [torch.empty_like(tensor, device=self.device) for tensor in batch]
        described = [[(tuple(t.shape), t.dtype) for t in tensors] for tensors in (self._batch, batch)]
        if described[0] != described[1]:
            wanted, got = (", ".join(f"{shape} {dtype}" for shape, dtype in those) for those in described)
            raise ShapeError(
                f"CapturedStep.step: the batch must be as the first one, {wanted or 'nothing'}, got {got or 'nothing'};"
                " make one CapturedStep for each shape (they may share an optimiser), or pass capture=False"
            )
        for held, tensor in zip(self._batch, batch, strict=True):
            held.copy_(tensor, non_blocking=True)
        return self._batch

    def _cut(self, tensor: Tensor) -> Sequence[Tensor]:
        """A step's tensor in equal parts, one for each pass; a single number is the same in all."""
        return tensor.chunk(self._passes) if tensor.ndim and self._passes > 1 else [tensor] * self._passes

    def _run(self, batch: Sequence[Tensor]) -> None:
        """The steps, kernel by kernel, or into the graph that is being captured."""
        for i in range(self._count):
            for number, group in enumerate(self._optimizer.param_groups):
                group["lr"] = self._rates[i, number]
            chosen = batch if self._count == 1 else [tensor[i] for tensor in batch]
            cut = zip(*(self._cut(tensor) for tensor in chosen), strict=True)
            for number, part in enumerate(cut if chosen else [()] * self._passes):
                with self._cast():
                    loss = self._loss(*part)
                if loss.ndim:
                    raise ShapeError(
                        f"CapturedStep: loss must return one number, got shape {tuple(loss.shape)}; take its mean"
                    )
                if self._passes > 1:
                    loss = loss / self._passes
                loss.backward()
                self._losses[i].copy_(loss.detach()) if number == 0 else self._losses[i].add_(loss.detach())
                del loss
            norm, bad = guarded_update(self._optimizer, self._parameters, self._clip, True)
            self.norm.copy_(norm)
            self.skipped.add_(bad)
            self.skipped_in_row.add_(1).mul_(bad)

    def _run_captured(self, batch: Sequence[Tensor]) -> None:
        addresses = [p.data_ptr() for p in self._parameters]
        if addresses != self._addresses:
            # Weights that were put elsewhere (``p.data = ...``) are not those that the graph writes.
            self._addresses, self._graph, self._warm = addresses, None, 0
        if self._graph is None:
            assert self._stream is not None
            if self._warm < self._warmup:
                self._warm += self._count
                current = torch.cuda.current_stream(self.device)
                self._stream.wait_stream(current)
                with torch.cuda.stream(self._stream):
                    self._run(batch)
                current.wait_stream(self._stream)
                return
            self._graph = self._capture(batch)
        self._graph.replay()

    def _capture(self, batch: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        assert self._stream is not None
        graph = torch.cuda.CUDAGraph()
        others = (step._graph for step in self._group)
        pool = next((other.pool() for other in others if other is not None), None)
        for generator in self._generators:
            graph.register_generator_state(generator)
        self._optimizer.zero_grad(set_to_none=True)
        # Casts of an autocast around this call would be read, not made, by the graph.
        torch.clear_autocast_cache()
        gc.collect()
        collects, current = gc.isenabled(), torch.cuda.current_stream(self.device)
        # A graph or an event that the collector frees in the middle would end the capture.
        gc.disable()
        try:
            # The other threads of the process (a loader that pins memory) may go on with what they do.
            with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                self._run(batch)
        except RuntimeError as problem:
            end_failed_capture(self._generators)
            # What ends a capture early is told first; that it ended early is raised on top of it.
            first = problem.__context__ or problem
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            text = " ".join(str(first).split())
            raise ConfigError(
                f"CapturedStep: the step can't be captured in a CUDA graph ({text[:300]}); loss must not wait for the "
                "device (.item(), float(x), printing, indexing by a mask), or pass capture=False"
            ) from problem
        finally:
            torch.cuda.set_stream(current)
            if collects:
                gc.enable()
        # A capture begins by setting the place in the generator's stream that replays read from to zero, on its own
        # stream; on a busy device that may come to be later than what a replay on the current stream sets it to.
        current.wait_stream(self._stream)
        return graph

    def state_dict(self) -> dict[str, Any]:
        """What going on needs besides the weights and the random states: the optimiser's state and the counts."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "steps": self.steps,
            "skipped": self.skipped.clone(),
            "skipped_in_row": self.skipped_in_row.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; the step is captured again."""
        self._optimizer.load_state_dict(state["optimizer"])
        self.steps = int(state["steps"])
        self.skipped.copy_(state["skipped"])
        self.skipped_in_row.copy_(state["skipped_in_row"])
