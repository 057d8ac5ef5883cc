"""What the shipped models write into their states: the step Δ opens at the tokens to keep and stays shut on noise.

``python -m statescan.recipes.selection_figure --out docs/figures`` draws it from the packaged models.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from statescan.data.synthetic import InductionHeads, SelectiveCopying, SyntheticTask
from statescan.inspect.selection import step_sizes
from statescan.models import CausalLM
from statescan.recipes.shipped import shipped_model
from statescan.recipes.synthetic import figure, save_figure

__all__ = ["Opening", "draw_selection", "openings"]

_KEPT, _NOISE = "#d55e00", "#9aa3af"


class Opening(NamedTuple):
    """One example under a model, at the layer and channel that tell the tokens to keep best from the others.

    Args:
        ids: (tokens,) the example.
        kept: (tokens,) bool, the tokens that an answer needs.
        layer: index of the layer.
        channel: index of the channel.
        delta: (tokens,) that channel's step sizes.
        half_life: tokens until the slowest state of the channel would be half forgotten at the median step of noise.
    """

    ids: NDArray[np.int64]
    kept: NDArray[np.bool_]
    layer: int
    channel: int
    delta: NDArray[np.float64]
    half_life: float


def _steps(model: CausalLM, ids: Tensor) -> list[Tensor]:
    """Step sizes of every layer, (tokens, d_inner) float64 each."""
    found: list[Tensor] = []
    handles = []
    for block in model.backbone.layers:
        mixer: Any = block.mixer

        def keep(_module: nn.Module, _inputs: Any, output: Tensor, mixer: Any = mixer) -> None:
            found.append(step_sizes(mixer, output[0]))

        handles.append(mixer.dt_proj.register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(ids[None])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _to_keep(task: SyntheticTask, ids: Tensor) -> Tensor:
    if isinstance(task, SelectiveCopying):
        return (ids > 0) & (ids < task.vocab_size - 1)
    kept = torch.zeros_like(ids, dtype=torch.bool)
    trigger = ids == task.vocab_size - 1
    # The last trigger asks; it is the one before that marks what to keep.
    kept[1:] = trigger[:-1]
    return kept


def openings(model: CausalLM, task: SyntheticTask, *, seed: int, example: int = 0) -> Opening:
    """Looks for the channel whose smallest step at a token to keep is largest beside its steps at all other tokens.

    Args:
        model: a Mamba with S6 that was trained on the task.
        task: selective copying or induction heads.
        seed, example: which example.

    Returns:
        Opening.
    """
    ids = task.batch(seed, example, 1).inputs[0]
    kept = _to_keep(task, ids)
    asked = torch.zeros_like(kept)
    asked[-task.asked :] = True
    best: tuple[float, int, int] = (-math.inf, 0, 0)
    steps = _steps(model, ids)
    for layer, delta in enumerate(steps):
        # Positions that ask come after all that is kept: what they do to the state is another matter.
        contrast = delta[kept].log().amin(0) - delta[~kept & ~asked].log().quantile(0.99, 0)
        value, channel = contrast.max(0)
        best = max(best, (float(value), layer, int(channel)))
    _, layer, channel = best
    delta = steps[layer][:, channel]
    mixer: Any = model.backbone.layers[layer].mixer
    slowest = float(mixer.A_log[channel].detach().double().exp().min())
    quiet = float(delta[~kept & ~asked].median())
    return Opening(ids.numpy(), kept.numpy(), layer, channel, delta.numpy(), math.log(2) / (quiet * slowest))


def draw_selection(out: Path) -> list[Path]:
    """Draws both packaged models into a folder: ``selection-induction-heads.svg``, ``selection-copying.svg``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    written = []
    heads = InductionHeads(96)
    model = CausalLM.from_pretrained(shipped_model("induction-heads")).eval()
    found = openings(model, heads, seed=5, example=3)
    made, axes = figure(11, 3.0)
    _stems(axes, found)
    axes.set_xticks(range(len(found.ids)), [heads.symbols[i] for i in found.ids], family="DejaVu Sans Mono", fontsize=8)
    axes.set_xlim(-1, len(found.ids))
    axes.set_title(_title("Induction heads: keep what follows the first *", found), loc="left", fontsize=10)
    written.append(out / "selection-induction-heads.svg")
    save_figure(made, written[-1])

    copying = SelectiveCopying()
    model = CausalLM.from_pretrained(shipped_model("selective-copying")).eval()
    found = openings(model, copying, seed=5)
    made, axes = figure(11, 3.0)
    _stems(axes, found)
    for place in np.flatnonzero(found.kept):
        sign = copying.symbols[found.ids[place]]
        axes.annotate(
            sign, (place, found.delta[place]), (0, 4), textcoords="offset points", ha="center", fontsize=9, color=_KEPT
        )
    axes.set_xlim(-20, len(found.ids) + 20)
    axes.set_xlabel("position; the last 16 ask for the answer")
    axes.set_title(_title("Selective copying: keep 16 tokens among 4,096", found), loc="left", fontsize=10)
    written.append(out / "selection-copying.svg")
    save_figure(made, written[-1])
    return written


def _title(what: str, found: Opening) -> str:
    return f"{what} (layer {found.layer}, channel {found.channel}; half-life at noise {found.half_life:.1e} tokens)"


def _stems(axes: Any, found: Opening) -> None:
    places = np.arange(len(found.ids))
    floor = float(found.delta.min()) / 3
    noise = ~found.kept
    axes.vlines(places[noise], floor, found.delta[noise], color=_NOISE, linewidth=0.6)
    axes.plot(places[noise], found.delta[noise], ".", color=_NOISE, markersize=3, label="other tokens")
    axes.vlines(places[found.kept], floor, found.delta[found.kept], color=_KEPT, linewidth=1.6)
    axes.plot(places[found.kept], found.delta[found.kept], "o", color=_KEPT, markersize=5, label="tokens to keep")
    axes.set_yscale("log")
    axes.set(ylabel="step size Δ", ylim=(floor, float(found.delta.max()) * 30))
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)


def main() -> None:
    """``python -m statescan.recipes.selection_figure --out FOLDER``."""
    parser = argparse.ArgumentParser(description="Draws what the packaged models select.")
    parser.add_argument("--out", type=Path, default=Path("selection"), help="folder for the figures")
    for path in draw_selection(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
