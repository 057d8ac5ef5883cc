"""The properties table, measured: what training and inference cost over length, for each kind of layer.

Stacks of equal parameters: an LSTM, a dilated convolution, a Transformer, S4 and Mamba. ``statescan bench properties``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statescan.bench.gpu import gpu_facts, gpu_samples
from statescan.bench.measure import machine_facts, seconds_per_call
from statescan.checkpoint import atomic_file
from statescan.errors import ConfigError, DataError, MissingExtraError
from statescan.files import write_json
from statescan.nn import LSTM, MLP, S4, CausalSelfAttention, DilatedConv, Mamba

__all__ = ["KINDS", "Stack", "draw_properties", "read_properties", "run_properties", "stacks"]

KINDS = ("LSTM", "CNN", "Transformer", "S4", "Mamba")
_COLOURS = {"LSTM": "#8a8a8a", "CNN": "#e0a458", "Transformer": "#c8553d", "S4": "#5aa0e0", "Mamba": "#1f5fa8"}
_STEPS = 8  # tokens of one measurement of inference
_PIECE = 2048  # tokens of a context that are read at once


class Stack(nn.Module):
    """Blocks of norm, mixer and residual, a Transformer's with norm, MLP and residual behind.

    Args:
        d_model: width of the residual stream.
        mixers: one a block.
        d_mlp: width of the MLPs; 0 for none.
    """

    def __init__(self, d_model: int, mixers: Sequence[nn.Module], d_mlp: int = 0) -> None:
        super().__init__()
        self.d_model = d_model
        self.mixers: Any = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in mixers)
        halves = len(mixers) if d_mlp else 0
        self.mlps = nn.ModuleList(MLP(d_model, d_mlp) for _ in range(halves))
        self.mlp_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(halves))

    def _through(self, x: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        for layer, norm in enumerate(self.norms):
            x = x + run(layer, norm(x))
            if len(self.mlps):
                x = x + self.mlps[layer](self.mlp_norms[layer](x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) to the same."""
        return self._through(x, lambda layer, y: self.mixers[layer](y).output)

    def read(self, x: Tensor, states: list[Any]) -> list[Any]:
        """The states after a context (batch, length, d_model)."""
        after = list(states)

        def run(layer: int, y: Tensor) -> Tensor:
            output, after[layer] = self.mixers[layer](y, states[layer])
            return output

        self._through(x, run)
        return after

    def step(self, x: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """One position (batch, d_model), and the states after it."""
        after = list(states)

        def run(layer: int, y: Tensor) -> Tensor:
            output, after[layer] = self.mixers[layer].step(y, states[layer])
            return output

        return self._through(x, run), after

    def init_states(self, batch: int, capacity: int) -> list[Any]:
        """Before the first position, with room for `capacity` of them in an attention's cache."""
        return [
            mixer.init_state(batch, capacity=capacity)
            if isinstance(mixer, CausalSelfAttention)
            else mixer.init_state(batch)
            for mixer in self.mixers
        ]

    def parameter_count(self) -> int:
        """Numbers in all parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


def _count(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def _nearest(target: int, make: Callable[[int], Callable[[], Stack]], sizes: range) -> Callable[[], Stack]:
    """The maker of the stack nearest to a number of parameters, among sizes in order."""
    low, high = 0, len(sizes) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(make(sizes[middle])) < target else (low, middle)
    return min((make(sizes[low]), make(sizes[high])), key=lambda made: abs(_count(made) - target))


def stacks(d_model: int, n_layer: int) -> dict[str, Callable[[], Stack]]:
    """Makers of one stack of each kind, with the parameters of `n_layer` Mamba layers of width `d_model`, to some %.

    A Transformer's block counts for two, as its MLP is one; S4, whose layer is small, has twice as many layers. Then
    the Transformer's MLP, the LSTM's state, and the width of S4 and of the convolution are what fits.

    Args:
        d_model: a multiple of 64.
        n_layer: even.
    """

    def mamba() -> Stack:
        return Stack(d_model, [Mamba(d_model) for _ in range(n_layer)])

    def transformer(d_mlp: int) -> Callable[[], Stack]:
        heads = d_model // 64
        return lambda: Stack(d_model, [CausalSelfAttention(d_model, heads) for _ in range(n_layer // 2)], d_mlp)

    def lstm(d_hidden: int) -> Callable[[], Stack]:
        return lambda: Stack(d_model, [LSTM(d_model, d_hidden) for _ in range(n_layer)])

    def s4(width: int) -> Callable[[], Stack]:
        return lambda: Stack(width, [S4(width) for _ in range(2 * n_layer)])

    def conv(width: int) -> Callable[[], Stack]:
        return lambda: Stack(width, [DilatedConv(width, width=3, dilation=3**layer) for layer in range(n_layer)])

    step = max(2, d_model // 64)
    target, widths = _count(mamba), range(step, 12 * d_model, step)
    return {
        "LSTM": _nearest(target, lstm, widths),
        "CNN": _nearest(target, conv, widths),
        "Transformer": _nearest(target, transformer, widths),
        "S4": _nearest(target, s4, widths),
        "Mamba": mamba,
    }


@dataclass(frozen=True)
class _Sizes:
    d_model: int
    n_layer: int
    tokens: int  # of a training step, in sequences of each length
    lengths: tuple[int, ...]
    rows: int  # sequences that are continued at once
    seconds: float  # that one call may take: a length whose predecessor says more is left out


_SIZES = {
    "cuda": _Sizes(512, 8, 65536, (256, 1024, 4096, 16384, 65536), 8, 3.0),
    "cpu": _Sizes(128, 4, 4096, (64, 256, 1024, 4096, 16384), 1, 8.0),
    "quick": _Sizes(64, 2, 128, (32, 128), 1, 5.0),
}


def run_properties(
    *,
    device: str | None = None,
    threads: int | None = None,
    quick: bool = False,
    only: str | None = None,
    out: Path | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Measures training and inference over length for every kind.

    Training: forward and backward of a stack, a fixed number of tokens in sequences of each length, or one sequence
    where it is longer; on a GPU bfloat16 autocast, on a CPU float32. Time and peak memory over the tokens; the weights'
    gradients, which no length changes, are not counted. Inference: a token after a context of each length, which every
    kind has read, a piece at a time, for some sequences at once; on a GPU bfloat16 weights (S4's and Mamba's systems
    float32) and one CUDA graph, so that the host's launches don't hide the layer's work. Time of a token, and the bytes
    of one sequence's state.

    Args:
        device: "cuda" or "cpu"; default: the GPU where there is one.
        threads: of the CPU.
        quick: tiny sizes, to see that it runs.
        only: kinds whose name contains this, in any case. Default: all.
        out: a JSON file for the report; a figure of its name is drawn beside it where matplotlib is installed.
        progress: called with a line for each measurement.

    Returns:
        machine, sizes, parameters of each kind, the kinds that read their context, rows.

    Raises:
        ConfigError: a device that is not there, or `only` names no kind.
    """
    kinds = [kind for kind in KINDS if (only or "").lower() in kind.lower()]
    if not kinds:
        raise ConfigError(f"bench properties: --only must be part of one of {', '.join(KINDS)}, got {only!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"bench properties: device must be cpu, or cuda where there is a GPU, got {device!r}")
    if threads:
        torch.set_num_threads(threads)
    sizes = _SIZES["quick" if quick else device]
    makers = stacks(sizes.d_model, sizes.n_layer)
    rows: list[dict[str, Any]] = []
    parameters = {}
    for kind in kinds:
        torch.manual_seed(0)
        stack = makers[kind]().to(device)
        parameters[kind] = stack.parameter_count()
        for use in ("training", "inference"):
            rows += _over_length(kind, use, stack, sizes, device, progress)
        del stack
        gc.collect()
    machine = {"device": device, **machine_facts(), **(gpu_facts() if device == "cuda" else {})}
    report = {
        "benchmark": "properties",
        "machine": machine | {"threads": torch.get_num_threads()},
        "sizes": {"d_model": sizes.d_model, "n_layer": sizes.n_layer, "tokens": sizes.tokens, "rows": sizes.rows},
        "parameters": parameters,
        "context_read": kinds,
        "rows": rows,
    }
    if out is not None:
        write_json(out, report)
        with contextlib.suppress(MissingExtraError):
            draw_properties(report, out.with_suffix(".svg"))
    return report


def read_properties(path: Path) -> dict[str, Any] | None:
    """The report in a file that `run_properties` wrote, None where it is another one."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("benchmark") == "properties" else None


def _over_length(
    kind: str, use: str, stack: Stack, sizes: _Sizes, device: str, progress: Callable[[str], object]
) -> Iterator[dict[str, Any]]:
    """A row for each length that takes no too long."""
    before: list[float] = []
    for length in sizes.lengths:
        row: dict[str, Any] = {"kind": kind, "use": use, "length": length, "failure": None}
        # As the last two lengths grew, so will the next, at least by as much as it has more work.
        growth = before[-1] / before[-2] if len(before) > 1 else 1.0
        if before and before[-1] * max(1.0, growth) > sizes.seconds:
            yield row | {"failure": f"left out: a call would take more than {sizes.seconds:g} s"}
            continue
        try:
            found = _TRAIN_OR_INFER[use](stack, length, sizes, device)
        except RuntimeError as problem:
            yield row | {"failure": " ".join(str(problem).split())[:200]}
            before.append(float("inf"))
            continue
        before.append(found["seconds"])
        progress(
            f"properties {kind}, {use}, {length}: {1e6 * found['seconds_per_token']:.3f} us and "
            f"{found['bytes'] / 1024:,.1f} KiB"
        )
        yield row | found


def _training(stack: Stack, length: int, sizes: _Sizes, device: str) -> dict[str, Any]:
    """seconds: of a pass forward and backward; bytes: its peak memory a token."""
    batch = max(1, sizes.tokens // length)
    stack.train().float()
    x = torch.randn(batch, length, stack.d_model, device=device)
    upward = torch.randn_like(x)

    def call() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            y = stack(x)
        y.backward(upward.to(y.dtype))

    call()  # the weights' gradients are there from now on
    if device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        found = gpu_samples(lambda: call, graph=False, cold=False, warmup=1, repeats=5, max_seconds=0.6)
        seconds, peak = found.seconds, found.peak_bytes - held
    else:
        seconds = seconds_per_call(call, warmup=0, repeats=4, max_seconds=3.0)
        with _Resident() as resident:
            call()
        peak = resident.grown
    stack.zero_grad(set_to_none=True)
    took = statistics.median(seconds)
    tokens = batch * length
    return {"batch": batch, "seconds": took, "seconds_per_token": took / tokens, "bytes": peak / tokens}


def _inference(stack: Stack, length: int, sizes: _Sizes, device: str) -> dict[str, Any]:
    """seconds: of a step; bytes: of one sequence's state after `length` tokens."""
    stack.eval()
    narrow = torch.bfloat16 if device == "cuda" else torch.float32
    for module in stack.modules():
        if isinstance(module, nn.Linear | nn.LSTM | nn.Conv1d | nn.LayerNorm):
            module.to(narrow)
    rows = sizes.rows
    with torch.no_grad():
        states = stack.init_states(rows, length + 64 * _STEPS)
        for start in range(0, length, _PIECE):
            piece = (rows, min(_PIECE, length - start), stack.d_model)
            states = stack.read(torch.randn(piece, device=device, dtype=narrow), states)
        held = sum(_bytes(state) for state in states) / rows
        x = torch.randn(rows, stack.d_model, device=device, dtype=narrow)

    def call() -> None:
        nonlocal states
        with torch.no_grad():
            for _ in range(_STEPS):
                _, states = stack.step(x, states)

    if device == "cuda":
        seconds, how, _ = gpu_samples(lambda: call, cold=False, warmup=2, repeats=10, max_seconds=0.3)
    else:
        how, seconds = "calls", seconds_per_call(call, warmup=1, repeats=20, max_seconds=2.0)
    took = statistics.median(seconds) / _STEPS
    return {"batch": rows, "seconds": took, "seconds_per_token": took / rows, "bytes": held, "how": how}


_TRAIN_OR_INFER = {"training": _training, "inference": _inference}


def _bytes(state: Any) -> int:
    """What a state holds; of an attention's cache the filled part."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if hasattr(state, "keys") and isinstance(state.keys, Tensor):
        return (_bytes(state.keys) + _bytes(state.values)) * state.length // state.keys.shape[2]
    return sum(_bytes(part) for part in state if part is not None)


class _Resident:
    """How much this process's memory grows meanwhile, looked at every few milliseconds.

    glibc is told to give freed tensors back to the system for that time, else what a call before needed would hide it.
    """

    def __enter__(self) -> _Resident:
        gc.collect()
        _map_from(1 << 16)
        self._start = self._peak = _resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, _resident_bytes())

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        _map_from(1 << 25)

    @property
    def grown(self) -> int:
        return self._peak - self._start


def _map_from(size: int) -> None:
    """From which size on glibc takes memory from the system by itself and gives it back at once."""
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(-3, size)  # M_MMAP_THRESHOLD
        glibc.malloc_trim(0)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        raise ConfigError("bench properties: memory on a CPU is read from /proc, which this system has not") from None


_PANELS = (
    ("training", "seconds_per_token", 1e6, "training: time a token", "microseconds"),
    ("training", "bytes", 1 / 1024, "training: memory a token", "KiB"),
    ("inference", "seconds", 1e3, "inference: time of the next token", "milliseconds"),
    ("inference", "bytes", 1 / 2**20, "inference: memory of one sequence", "MiB"),
)


def draw_properties(report: dict[str, Any], path: Path) -> Path:
    """Draws the four panels over length: what training and inference cost, in time and in memory.

    Args:
        report: what `run_properties` gave.
        path: an .svg or .png, written whole or not at all.

    Returns:
        The path.

    Raises:
        DataError: the report is no such one.
        MissingExtraError: matplotlib is not installed.
    """
    if report.get("benchmark") != "properties":
        raise DataError("bench properties: wanted a report of `statescan bench properties`, got another one")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtraError("bench properties' figure", "matplotlib", "plot") from missing
    with matplotlib.rc_context({"svg.hashsalt": "statescan", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(10.5, 7.4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (use, key, scale, title, unit) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
            _panel(axes, report["rows"], use, key, scale)
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
            axes.set_ylabel(unit)
            axes.set_xlabel("length of the sequences" if use == "training" else "tokens seen before")
        machine, sizes = report["machine"], report["sizes"]
        count = report["parameters"].get("Mamba", next(iter(report["parameters"].values()))) / 1e6
        figure.suptitle(
            f"{count:.1f} M parameters each; training steps of {sizes['tokens']:,} tokens or one sequence, "
            f"inference of {sizes['rows']} sequence{'s' if sizes['rows'] > 1 else ''} at once",
            x=0.01,
            ha="left",
            fontsize=10,
            color="#555555",
        )
        device = machine.get("gpu") or machine.get("cpu") if machine["device"] == "cuda" else machine.get("cpu")
        text = f"{device}, torch {machine['versions']['torch']}, {machine['date']}"
        figure.text(0.995, -0.015, text, ha="right", va="top", fontsize=7, color="#777777")
        # Files of before the others did don't say who read a context: the Transformer alone.
        read = report.get("context_read", ["Transformer"])
        if unread := [kind for kind in KINDS if kind in report["parameters"] and kind not in read]:
            text = f"inference of {', '.join(unread)}: measured after one token at every place of the axis"
            figure.text(0.005, -0.015, text, ha="left", va="top", fontsize=9, color="#333333")
        with atomic_file(path) as temporary:
            kind = path.suffix.removeprefix(".") or "svg"
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(temporary, format=kind, bbox_inches="tight", dpi=130, metadata=metadata)
    return path


def _panel(axes: Any, rows: Sequence[dict[str, Any]], use: str, key: str, scale: float) -> None:
    """One line a kind with its name at the end, on logarithmic axes; names that would meet are moved apart."""
    from matplotlib.ticker import LogLocator

    ends: list[tuple[float, float, str]] = []
    lengths = sorted({row["length"] for row in rows})
    values: list[float] = []
    for kind in KINDS:
        found = [row for row in rows if (row["kind"], row["use"]) == (kind, use) and not row["failure"]]
        points = [(row["length"], row[key] * scale) for row in found if row[key] > 0]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=_COLOURS[kind], linewidth=2, markersize=4)
        ends.append((y[-1], x[-1], kind))
        values += y
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    if values:
        # Numbers at 1, 2 and 5 where few powers of ten are in sight.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 200 * min(values) else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    if not ends:
        return
    low, high = min(values) / 1.6, max(values) * 1.6
    axes.set_ylim(low, high)
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.3)
    # A line of text takes about a fourteenth of the axis.
    gap = (high / low) ** (1 / 14)
    placed = 0.0
    for value, at, kind in sorted(ends):
        place = max(value, placed * gap)
        placed = place
        axes.annotate(
            kind,
            (at, value),
            (lengths[-1] * 1.25 if at == lengths[-1] else at * 1.25, place),
            color=_COLOURS[kind],
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )
