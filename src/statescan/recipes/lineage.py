"""The pictures of ``docs/from-ssm-to-mamba.md``: from a differential equation to a model that chooses what to keep.

``python -m statescan.recipes.lineage --out docs/images`` draws them all.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from statescan.errors import MissingExtraError
from statescan.files import atomic_file
from statescan.ops import selective_scan
from statescan.ops.discretization import DISCRETIZATIONS, discretize
from statescan.ops.hippo import hippo_legs, hippo_project, hippo_reconstruct
from statescan.ops.linear_ssm import ssm_kernel, ssm_recurrence, ssm_simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_lineage", "linear_memory", "random_system", "readable_part", "selective_memory", "signal"]


def signal(length: int, seed: int = 0) -> Tensor:
    """A band-limited random signal, (length,), float64, of size about 1: something worth remembering."""
    draw = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, length, dtype=torch.float64)
    waves = torch.arange(1, 13, dtype=torch.float64)
    size, phase = torch.randn(12, generator=draw, dtype=torch.float64), torch.rand(12, generator=draw).double()
    return (size * torch.sin(2 * math.pi * (waves * time.unsqueeze(-1) + phase))).sum(-1) / 3


def random_system(d_state: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random A, moved so that it is stable, and a random B: what one would try without knowing better."""
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(d_state, d_state, generator=draw, dtype=torch.float64) / math.sqrt(d_state)
    A = A - (torch.linalg.eigvals(A).real.max() + 0.05) * torch.eye(d_state, dtype=torch.float64)
    return A, torch.randn(d_state, generator=draw, dtype=torch.float64)


def readable_part(kernel: Tensor, u: Tensor, noise: float = 1e-6) -> Tensor:
    """The best that any linear reading of the last state knows about each past input: least squares, tiny noise.

    Args:
        kernel: (length, d_state), what an input of 1 leaves in the state after 0, 1, ... steps.
        u: (length,), the inputs, oldest first.
        noise: relative size of the noise a state is read with; without one, numerical dust would count as memory.

    Returns:
        (length,), the inputs as they are read, oldest first.
    """
    ahead = kernel.flip(0)  # input t sits in the state by its age
    state = ahead.T @ u
    gram = ahead.T @ ahead
    level = noise * torch.linalg.matrix_norm(gram, 2)
    return ahead @ torch.linalg.solve(gram + level * torch.eye(gram.shape[0], dtype=gram.dtype), state)


def _tokens(length: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """A line of small numbers of which a few are marked: (values, marks), both (length,)."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.rand(length, generator=draw, dtype=torch.float64) * 2 - 1
    marks = torch.zeros(length, dtype=torch.float64)
    marks[torch.tensor([6, 17, 41])] = 1
    return values, marks


def selective_memory(values: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """An S6 channel whose step follows the marks: (step sizes, state after each position), both (length,).

    One state with A = -1. A large step writes the input and forgets what was; a step near 0 leaves the state alone.
    The scan is this package's own.
    """
    u = values.view(1, -1, 1)
    dt = (6.0 * marks + 1e-3).view(1, -1, 1)
    A = -torch.ones(1, 1, dtype=torch.float64)
    ones = torch.ones(1, len(values), 1, dtype=torch.float64)
    # dt B u with B = (1 - exp(-dt)) / dt is the exact zero-order hold: a large step writes u itself
    B = (1 - torch.exp(-dt)) / dt
    return dt.flatten(), selective_scan(u, dt, A, B, ones).y.flatten()


def linear_memory(values: Tensor, step: float) -> Tensor:
    """The same state with one step for every position: (length,)."""
    A_bar, B_bar = discretize(-torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), step)
    return ssm_recurrence(A_bar, B_bar, torch.ones(1, dtype=torch.float64), values.view(1, -1, 1)).y.flatten()


def draw_lineage(out: Path) -> list[Path]:
    """Draws every picture into a folder.

    Args:
        out: the folder, made where it is missing; pictures of these names are replaced.

    Returns:
        The files, in the order of the page.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError:
        raise MissingExtraError("drawing", "matplotlib", "plot") from None
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "lineage-discretization.png": _discretization,
        "lineage-memory.png": _memory,
        "lineage-reconstruction.png": _reconstruction,
        "lineage-selection.png": _selection,
    }
    written = []
    for name, draw in pictures.items():
        with atomic_file(out / name) as temporary:
            draw().savefig(temporary, dpi=110, format="png")
        written.append(out / name)
    return written


def _figure(width: float, height: float, **given: Any) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**given)


def _discretization() -> Figure:
    figure, axis = _figure(8, 3.2)
    A = torch.tensor([[-0.4, 6.0], [-6.0, -0.4]], dtype=torch.float64)
    B, C = torch.tensor([0.0, 6.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    fine = ssm_simulate(A, B, C, torch.ones(1, 601, 1, dtype=torch.float64), 0.005, hold="zero").flatten()
    axis.plot(torch.arange(601) * 0.005, fine, color="0.2", linewidth=2, label="the differential equation")
    dt, marks = 0.12, {"zoh": "o", "bilinear": "s", "forward_euler": "^", "backward_euler": "v"}
    for method in DISCRETIZATIONS:
        A_bar, B_bar = discretize(A, B, dt, method)
        y = ssm_recurrence(A_bar, B_bar, C, torch.ones(1, 25, 1, dtype=torch.float64)).y.flatten()
        name = method.replace("_", " ").replace("zoh", "zero-order hold")
        axis.plot((torch.arange(25) + 1) * dt, y, marks[method], markersize=4, alpha=0.85, label=name)
    axis.set(
        xlabel="time", ylabel="output", ylim=(-1.2, 3.2), title="One system, switched on, and four recurrences of it"
    )
    axis.legend(fontsize=8, ncols=2)
    return figure


def _memory() -> Figure:
    figure, axes = _figure(8, 3.4, ncols=2, sharey=True)
    length, n = 1000, 32
    systems = {"a random A": random_system(n), "HiPPO-LegS": hippo_legs(n)}
    for axis, (name, (A, B)) in zip(axes, systems.items(), strict=True):
        step = 1 / length if name != "a random A" else 40 / length
        A_bar, B_bar = discretize(A, B, step)
        kernel = ssm_kernel(A_bar, B_bar, torch.eye(n, dtype=torch.float64), 4 * length).squeeze(-1)
        kernel = kernel / kernel.abs().max()
        axis.plot(torch.arange(4 * length) / length, kernel[:, ::4], linewidth=0.9)
        axis.set(title=name, xlabel="age of the input")
    axes[0].set_ylabel("what is left of it, state by state")
    return figure


def _reconstruction() -> Figure:
    figure, axes = _figure(8, 5.6, nrows=3, sharex=True, sharey=True)
    length = 1000
    u = signal(length)
    time = torch.arange(length) / length
    for axis, n in zip(axes[:2], (16, 64), strict=True):
        state = hippo_project(u, n)[-1]
        back = hippo_reconstruct(state, 1 - time.double() - 1 / length)
        axis.plot(time, u, color="0.6", linewidth=2.5, label="the signal")
        axis.plot(time, back, color="C0", linewidth=1, label=f"read from {n} numbers of HiPPO-LegS")
        axis.legend(fontsize=8, loc="upper left")
    A, B = random_system(64)
    A_bar, B_bar = discretize(A, B, 40 / length)
    kernel = ssm_kernel(A_bar, B_bar, torch.eye(64, dtype=torch.float64), length).squeeze(-1)
    axes[2].plot(time, u, color="0.6", linewidth=2.5, label="the signal")
    axes[2].plot(time, readable_part(kernel, u), color="C3", linewidth=1, label="the best reading of a random A's 64")
    axes[2].legend(fontsize=8, loc="upper left")
    axes[2].set(xlabel="time; the state is read at 1", ylim=(-2.6, 3.6))
    return figure


def _selection() -> Figure:
    figure, axes = _figure(8, 5, nrows=3, sharex=True)
    values, marks = _tokens(64)
    place = torch.arange(64)
    chosen = marks > 0
    axes[0].bar(place.tolist(), values.tolist(), color=["C1" if c else "0.75" for c in chosen])
    axes[0].set_ylabel("input\n(orange: to keep)", fontsize=8)
    for step, color in ((0.05, "C3"), (1.0, "C4")):
        axes[1].plot(place, linear_memory(values, step), color=color, linewidth=1.2, label=f"fixed step {step:g}")
    axes[1].set_ylabel("state of a fixed\nsystem", fontsize=8)
    axes[1].legend(fontsize=8, loc="upper right")
    step, state = selective_memory(values, marks)
    axes[2].plot(place, state, color="C0", linewidth=1.6, label="state")
    axes[2].plot(place[chosen], values[chosen], "o", color="C1", markersize=5, label="the inputs to keep")
    axes[2].fill_between(place, -1, -1 + step / 12, color="C2", alpha=0.4, step="mid", label="step size (scaled)")
    axes[2].set_ylabel("state when the step\nfollows the input", fontsize=8)
    axes[2].legend(fontsize=8, loc="upper right", ncols=3)
    axes[2].set(xlabel="position", ylim=(-1.05, 1.35))
    return figure


def main() -> None:
    """``python -m statescan.recipes.lineage --out FOLDER``."""
    parser = argparse.ArgumentParser(description="Draws the pictures of docs/from-ssm-to-mamba.md.")
    parser.add_argument("--out", type=Path, default=Path("lineage"), help="folder for the pictures")
    for path in draw_lineage(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
