"""Figures drawn from result files alone: ``statescan bench figures benchmarks/results/h100-*.json --out FOLDER``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from statescan.checkpoint import atomic_file
from statescan.errors import DataError, MissingExtraError

__all__ = ["draw"]

Row = Mapping[str, Any]
# One colour a role: ours twice (plain, gated or the second model), peers in grey and warm tones.
_OURS = ("#1f5fa8", "#5aa0e0", "#0b8a6f", "#7cc6a4")
# Of the figure of floors: forms that are there for the scale, or that do work a second time on purpose.
_LEFT_OUT = ("torch", "triton", "plain", "invariant", "recompute cheap", "recompute block")
# Bars of more floors than this end there and say so.
_MOST_FLOORS = 8
_PEERS = ("#c8553d", "#e0a458", "#8a8a8a", "#b48ead")


def draw(files: Sequence[Path], out: Path) -> list[Path]:
    """Draws every figure that the files hold figures for, as SVG, and returns the paths.

    ``attention.svg``: the scan against attention over length. ``floors.svg``: time against its floor.
    ``throughput.svg``: tokens a second against batch, and of training. ``memory.svg``: peak memory against batch.

    Args:
        files: what `statescan bench --out` wrote; where several hold the same case the last one counts.
        out: folder.

    Raises:
        DataError: a file is no result file, or none holds anything to draw.
        MissingExtraError: matplotlib is not installed.
    """
    rows, machine = _read(files)
    try:
        import matplotlib
    except ImportError as missing:
        raise MissingExtraError("bench figures", "matplotlib", "plot") from missing
    matplotlib.use("Agg")
    style: Any = {
        "svg.hashsalt": "statescan",  # the same file from the same figures
        "svg.fonttype": "none",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "axes.axisbelow": True,
        "figure.facecolor": "white",
    }
    drawn = []
    with matplotlib.rc_context(style):
        for name, figure in (
            ("attention", _attention(rows)),
            ("floors", _floors(rows)),
            ("throughput", _throughput(rows)),
            ("memory", _memory(rows)),
        ):
            if figure is None:
                continue
            figure.text(0.995, -0.01, machine, ha="right", va="top", fontsize=7, color="#777777")
            path = out / f"{name}.svg"
            with atomic_file(path) as temporary:
                figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
            drawn.append(path)
    if not drawn:
        raise DataError(
            f"bench figures: none of {', '.join(map(str, files)) or 'no files'} holds rows of attention, train, "
            "generate or of anything with a floor; measure some: statescan bench attention --out FILE"
        )
    return drawn


def _read(files: Sequence[Path]) -> tuple[list[Row], str]:
    found: dict[tuple[str, ...], Row] = {}
    machine = ""
    for file in files:
        try:
            report = json.loads(file.read_text())
            rows, facts = report["rows"], report["machine"]
            keyed = {tuple(row[k] for k in ("bench", "case", "implementation", "dtype")): row for row in rows}
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(
                f"bench figures: {file} must be a result file of `statescan bench --out`, got one that can't be read "
                f"so ({type(problem).__name__}: {problem})"
            ) from problem
        found |= {key: row for key, row in keyed.items() if row.get("milliseconds") is not None and not row["failure"]}
        device = facts.get("gpu") or facts.get("cpu")
        machine = f"{device}, torch {facts.get('versions', {}).get('torch')}, {facts.get('date')}"
    return [row for row in found.values() if not _has_a_better(row, found)], machine


def _has_a_better(row: Row, found: Mapping[tuple[str, ...], Row]) -> bool:
    """Whether the same is there as one CUDA graph, which is how a user trains."""
    plain = row["implementation"].removesuffix(", compiled")
    return (row["bench"], row["case"], f"{plain}, captured", row["dtype"]) in found


def _axes(count: int, width: float = 5.2, height: float = 3.6) -> tuple[Any, list[Any]]:
    # Figures made without pyplot: no global state, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _colour(name: str, order: dict[str, str]) -> str:
    if name not in order:
        palette = _OURS if name.startswith("statescan") else _PEERS
        taken = sum(known.startswith("statescan") == name.startswith("statescan") for known in order)
        order[name] = palette[taken % len(palette)]
    return order[name]


def _series(rows: Iterable[Row], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        at = row["notes"].get(x)
        if at is not None and row.get(y) is not None:
            lines.setdefault(row["implementation"], []).append((at, row[y]))
    return {name: sorted(points) for name, points in lines.items()}


def _attention(rows: Sequence[Row]) -> Any:
    mine = [row for row in rows if row["bench"] == "attention"]
    if not mine:
        return None
    figure, axes = _axes(2)
    colours: dict[str, str] = {}
    for axis, mode in zip(axes, ("forward", "forward+backward"), strict=True):
        lines = _series((row for row in mine if row["notes"].get("mode") == mode), "length", "milliseconds")
        for name, points in lines.items():
            ours = name.startswith("statescan")
            axis.plot(
                *zip(*points, strict=True),
                marker="o" if ours else "s",
                markersize=4,
                linewidth=2 if ours else 1.5,
                color=_colour(name, colours),
                label=name,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        lengths = sorted({x for points in lines.values() for x, _ in points})
        axis.set_xticks(lengths, [_short(x) for x in lengths])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axis.set_title(mode.replace("+", " + "), loc="left")
        axis.set_xlabel("length of a sequence")
    width = re.search(r"width (\d+)", mine[0]["case"])
    tokens = re.match(r"(\d+) x (\d+)", mine[0]["case"])
    total = f"{int(tokens[1]) * int(tokens[2]):,} tokens" if tokens else "the same tokens"
    axes[0].set_ylabel(f"ms for {total}{f' of width {width[1]}' if width else ''}")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _short(value: float) -> str:
    return f"{value / 1024:g}K" if value >= 1024 else f"{value:g}"


def _floors(rows: Sequence[Row]) -> Any:
    kept = [
        row
        for row in rows
        if row.get("ratio")
        and row["implementation"].startswith("statescan")
        and not any(word in row["implementation"] for word in _LEFT_OUT)
        and row["bench"] in ("scan", "conv", "norm", "block", "train", "generate", "prefill")
    ]
    kept = [row for row in kept if not (row["bench"] == "scan" and "inference" in row["case"])]
    if not kept:
        return None
    figure, (axis,) = _axes(1, 8.2, 0.24 * len(kept) + 1.0)
    colours = {"bytes": "#5aa0e0", "flops": "#0b8a6f", "special": "#e0a458", "fma": "#b48ead", "time": "#8a8a8a"}
    names = {
        "bytes": "memory",
        "flops": "matrix products",
        "special": "special functions",
        "fma": "multiply-adds",
        "time": "floor",
    }
    shown: set[str] = set()
    for i, row in enumerate(kept):
        part = max(row["floors"], key=row["floors"].get) if row.get("floors") else "time"
        end = min(row["ratio"], _MOST_FLOORS)
        axis.barh(i, end, color="#dfe5ec", height=0.72)
        axis.barh(i, 1, color=colours[part], height=0.72, label=None if part in shown else names[part])
        shown.add(part)
        beyond = "\u2192 " if row["ratio"] > _MOST_FLOORS else ""
        axis.text(end, i, f" {beyond}{row['ratio']:.2f}  ({_time(row['milliseconds'])})", va="center", fontsize=7.5)
    labels = [
        f"{row['bench']} {row['case']}, {row['implementation'].removeprefix('statescan').strip(', ')} {row['dtype']}"
        for row in kept
    ]
    axis.set_yticks(range(len(kept)), [re.sub(r"\s+", " ", label) for label in labels], fontsize=7.5)
    axis.invert_yaxis()
    axis.set_xlim(0, min(max(row["ratio"] for row in kept), _MOST_FLOORS) * 1.25)
    axis.set_ylim(len(kept) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("measured time over its floor; the coloured part is the floor, by what sets it")
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, borderaxespad=0.2)
    return figure


def _time(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{milliseconds:.3f} ms"


def _throughput(rows: Sequence[Row]) -> Any:
    decoding = [row for row in rows if row["bench"] == "generate" and row.get("tokens_per_second")]
    training = [row for row in rows if row["bench"] == "train" and row.get("tokens_per_second")]
    panels = [panel for panel in ("decoding", "training") if {"decoding": decoding, "training": training}[panel]]
    if not panels:
        return None
    figure, axes = _axes(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        if panel == "decoding":
            _lines_by_model(axis, decoding, "tokens_per_second")
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
            axis.set_ylabel("tokens a second")
            axis.set_title("decoding", loc="left")
        else:
            _bars_by_case(axis, training, lambda row: row["tokens_per_second"] / 1e3, "{:.0f}")
            axis.set_ylabel("thousand tokens a second")
            axis.set_title("training step", loc="left")
    return figure


def _lines_by_model(axis: Any, rows: Sequence[Row], y: str) -> None:
    colours: dict[str, str] = {}
    names = sorted({(row["notes"]["preset"], row["implementation"], row["dtype"]) for row in rows})
    for model, implementation, dtype in names:
        points = sorted(
            (row["notes"]["batch"], row[y])
            for row in rows
            if (row["notes"]["preset"], row["implementation"], row["dtype"]) == (model, implementation, dtype)
        )
        label = f"{implementation}, {model}, {dtype}"
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=_colour(label, colours), label=label)
    axis.set_xscale("log", base=2)
    batches = sorted({row["notes"]["batch"] for row in rows})
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    axis.set_xlabel("sequences at once")
    axis.legend(frameon=False, fontsize=8)


def _bars_by_case(axis: Any, rows: Sequence[Row], value: Any, form: str) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    colours: dict[str, str] = {}
    each = 0.8 / len(names)
    for k, name in enumerate(names):
        for i, case in enumerate(cases):
            for row in rows:
                if (row["case"], row["implementation"]) == (case, name):
                    at = i + (k - (len(names) - 1) / 2) * each
                    axis.bar(at, value(row), each * 0.92, color=_colour(name, colours), label=name if i == 0 else None)
                    axis.text(at, value(row), form.format(value(row)), ha="center", va="bottom", fontsize=7.5)
    axis.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=8)
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.4)
    axis.legend(frameon=False, fontsize=8, loc="upper right")


def _memory(rows: Sequence[Row]) -> Any:
    training = [row for row in rows if row["bench"] == "train" and row.get("peak_memory_bytes")]
    decoding = [row for row in rows if row["bench"] == "generate" and row.get("peak_memory_bytes")]
    panels = [panel for panel in ("training", "decoding") if {"decoding": decoding, "training": training}[panel]]
    if not panels:
        return None
    figure, axes = _axes(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        if panel == "training":
            _bars_by_case(axis, training, lambda row: row["peak_memory_bytes"] / 2**30, "{:.1f}")
            axis.set_title("training step", loc="left")
        else:
            _lines_by_model(axis, [{**row, "gib": row["peak_memory_bytes"] / 2**30} for row in decoding], "gib")
            axis.set_ylim(bottom=0)
            axis.set_title("generation", loc="left")
        axis.set_ylabel("peak memory, GiB")
    return figure
