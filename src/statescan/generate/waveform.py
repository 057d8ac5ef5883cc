"""Sound drawn sample by sample from a `WaveformModel`; on a GPU a whole period of its stages is one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from statescan.errors import ConfigError
from statescan.models.waveform import WaveformModel, check_below

__all__ = ["generate_waveforms"]


@torch.no_grad()
def generate_waveforms(
    model: WaveformModel,
    samples: int,
    *,
    rows: int = 1,
    labels: Sequence[int] | NDArray[Any] | Tensor | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    capture: bool | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> NDArray[np.uint8]:
    """Draws rows of samples, each sample from the model's distribution after those before it.

    The time for a sample does not grow with how many came before (but with attention in a stage it does).

    Args:
        model: on the device where it shall run.
        samples: of each row.
        rows: drawn side by side, each on its own.
        labels: (rows,), where the model is conditioned.
        temperature: the logits are divided by it; 0 takes the likeliest sample, which soon is silence or a hum.
        seed: names the random numbers; the same on the same device gives the same sound.
        capture: replay the steps as a CUDA graph. Default: on a CUDA device, without attention.
        progress: called with (samples drawn, samples).

    Returns:
        (rows, samples) uint8 codes; `statescan.data.audio.dequantize` makes sound of them.

    Raises:
        ConfigError: a number out of range, labels that the model has no use for or lacks, or a graph where there can be
            none.
        ShapeError, DTypeError: labels that are none of the model's.
    """
    if samples < 1 or rows < 1 or not 0 <= temperature < float("inf"):
        raise ConfigError(
            f"generate_waveforms: samples and rows must be at least 1 and temperature at least 0, got {samples}, "
            f"{rows} and {temperature}"
        )
    device = model.head.weight.device
    can = device.type == "cuda" and "attention" not in model.config.stages
    if capture and not can:
        raise ConfigError(
            f"generate_waveforms: capture=True wants a model on a CUDA device without attention, got one on '{device}' "
            f"with stages {model.config.stages}; leave it None"
        )
    known = None if labels is None else torch.as_tensor(labels)
    if known is not None and model.config.classes:
        check_below("labels", known, model.config.classes)  # here: a GPU is not waited for
    known = None if known is None else known.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        draw = _Draw(model, known, temperature, generator)
        last = torch.full((rows,), model.config.silence, device=device)
        state = model.init_state(rows)
        if can and capture is not False and samples >= 4 * model.config.period:
            return _captured(draw, last, state, samples, progress)
        made = torch.empty(rows, samples, dtype=torch.uint8, device=device)
        for t in range(samples):
            last, state = draw(last, state)
            made[:, t] = last
            if progress is not None and (t % 1000 == 999 or t + 1 == samples):
                progress(t + 1, samples)
        return made.cpu().numpy()
    finally:
        model.train(was_training)


class _Draw:
    """One step and one draw: the likeliest of logits to which Gumbel noise was added is a draw from their softmax."""

    def __init__(
        self, model: WaveformModel, labels: Tensor | None, temperature: float, generator: torch.Generator
    ) -> None:
        self.model, self.labels, self.temperature, self.generator = model, labels, temperature, generator

    def __call__(self, last: Tensor, state: Any) -> tuple[Tensor, Any]:
        output = self.model.step(last, state, self.labels)
        scores = output.logits.float()
        if self.temperature:
            uniform = torch.rand(scores.shape, device=scores.device, generator=self.generator)
            scores = scores / self.temperature - torch.log(-torch.log(uniform.clamp_min(1e-20)))
        return scores.argmax(-1), output.state


def _captured(
    draw: _Draw, last: Tensor, state: Any, samples: int, progress: Callable[[int, int], object] | None
) -> NDArray[np.uint8]:
    """As many steps as a period has in one graph, replayed: after them the state has its first shapes again."""
    period, device = draw.model.config.period, last.device
    # Unrolled so far that the host's start of a graph does not count.
    count = period * max(1, 16 // period)
    made = torch.empty(last.shape[0], count, dtype=torch.uint8, device=device)

    def run(last: Tensor, state: Any) -> tuple[Tensor, Any]:
        for t in range(count):
            last, state = draw(last, state)
            made[:, t] = last
        return last, state

    held_last = last.clone()
    leaves, shape = pytree.tree_flatten(state)
    held = [leaf.clone(memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    seed = draw.generator.initial_seed()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # What is made once (discretised systems, compiled kernels) is made before the capture.
        run(held_last, pytree.tree_unflatten(held, shape))
    torch.cuda.current_stream(device).wait_stream(stream)
    draw.generator.manual_seed(seed)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(draw.generator)
    with torch.cuda.graph(graph, stream=stream):
        after_last, after = run(held_last, pytree.tree_unflatten(held, shape))
        for place, value in zip((held_last, *held), (after_last, *pytree.tree_leaves(after)), strict=True):
            if isinstance(place, Tensor):
                place.copy_(value)
    pieces = []
    for start in range(0, samples, count):
        graph.replay()
        pieces.append(made.cpu().numpy())
        if progress is not None:
            progress(min(start + count, samples), samples)
    return np.concatenate(pieces, 1)[:, :samples]
