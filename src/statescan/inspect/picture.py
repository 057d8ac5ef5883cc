"""The report as one PNG: the text as a heat map, layers against tokens, and one layer's channels."""

from __future__ import annotations

import functools
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from statescan.errors import MissingExtraError
from statescan.files import atomic_file
from statescan.inspect.html import map_delta, measure

if TYPE_CHECKING:
    from statescan.inspect.selection import InspectReport

__all__ = ["save_png"]

_SEQUENTIAL = "YlGnBu"
_BOTH = "PuOr_r"
_FONT = "DejaVu Sans Mono"  # comes with matplotlib
_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "": "·"}
# The text is shown up to so many lines of so many characters; the heat maps below show all tokens.
_COLUMNS, _LINES = 96, 14
_SHOWN = (
    ("delta", "step size Δ", False),
    ("written", "written: ‖ΔBu‖ ÷ ‖h‖", False),
    ("remembered", "remembered for", True),
)


def _scaled(values: np.ndarray, log: bool) -> np.ndarray:
    """0 to 1 between the 2nd and 98th percentile."""
    values = np.log(np.maximum(values, 1e-9)) if log else values
    low, high = np.percentile(values, [2, 98])
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.full_like(values, 0.5)


def _sign(character: str) -> str:
    """What stands for a character: itself where the font has it."""
    if character in _SIGNS:
        return _SIGNS[character]
    return character if ord(character) in _glyphs() else "□"


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(_FONT)).get_charmap())


def _cells(pieces: tuple[str, ...]) -> tuple[list[tuple[int, int, int, str]], int]:
    """(line, column, token, sign) of every character shown, and the number of lines."""
    cells, line, column = [], 0, 0
    for token, piece in enumerate(pieces):
        for character in piece or [""]:
            if column == _COLUMNS:
                line, column = line + 1, 0
            if line == _LINES:
                return cells, line
            cells.append((line, column, token, _sign(character)))
            column += 1
            if character == "\n":
                line, column = line + 1, 0
    return cells, line + 1


def save_png(report: InspectReport, path: str | Path) -> None:
    """Draws the report; see `InspectReport.save_png`."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        raise MissingExtraError("drawing", "matplotlib", "plot") from None
    ramp = matplotlib.colormaps[_SEQUENTIAL].with_extremes(bad="#d3d8de")
    tokens, depth = len(report.pieces), len(report.layers)
    cells, lines = _cells(report.pieces)
    strip = 0.35 + 0.13 * depth
    heights = [0.27 * lines, *[strip] * len(_SHOWN), 2.6]
    # A figure of its own, not pyplot's: nothing global is touched and no display is needed.
    figure = Figure(figsize=(13, sum(heights) + 0.62 * len(heights) + 1.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes: Any = figure.subplots(len(heights), 1, height_ratios=heights)
    notes = [line for note in report.notes for line in textwrap.wrap(note, 150)]
    figure.suptitle(
        "\n".join(["What the model writes down, and what it lets pass", report.title, *notes]),
        x=0.01,
        ha="left",
        fontsize=12.5,
    )

    axes = all_axes[0]
    over_layers = np.mean([_scaled(measure(one, "delta"), False) for one in report.layers], axis=0)
    colour = _scaled(over_layers, False)
    for line, column, token, sign in cells:
        shade = ramp(0.85 * colour[token])
        axes.add_patch(Rectangle((column, line), 1, 1, facecolor=shade, linewidth=0))
        dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.55
        faint = sign in _SIGNS.values()
        axes.text(
            column + 0.5,
            line + 0.55,
            sign.replace("$", r"\$"),
            ha="center",
            va="center",
            family=_FONT,
            fontsize=10.5,
            alpha=0.5 if faint else 1,
            color="white" if dark else "#1b2230",
        )
    axes.set(xlim=(0, _COLUMNS), ylim=(lines, 0))
    axes.axis("off")
    cut = "" if cells[-1][2] == tokens - 1 else f"; the first {cells[-1][2] + 1:,} of {tokens:,} tokens"
    axes.set_title(
        f"step size Δ, mean of all layers: dark is written down, light is let pass{cut}", loc="left", fontsize=11
    )

    names = [str(one.layer) for one in report.layers]
    every = max(1, depth // 12)
    image = None
    for axes, (name, label, log) in zip(all_axes[1:-1], _SHOWN, strict=True):
        rows = np.stack([_scaled(measure(one, name), log) for one in report.layers])
        if name == "remembered":
            # What isn't forgotten by the end has no number yet: grey.
            rows[np.stack([np.isinf(one.remembered) for one in report.layers])] = np.nan
        image = axes.imshow(rows, aspect="auto", cmap=ramp, vmin=0, vmax=1, interpolation="nearest")
        # The scale of each row stands beside it, since the rows' scales differ.
        for row, one in enumerate(report.layers):
            if row % every == 0:
                low, high = np.percentile(measure(one, name), [2, 98])
                axes.text(tokens - 0.3, row, f" {low:.3g} … {high:.3g}", va="center", fontsize=7.5, color="#5c6675")
        axes.set_yticks(range(0, depth, every), names[::every], fontsize=8)
        axes.set_ylabel("layer")
        unit = ", tokens until a tenth is left, grey: not by the end" if name == "remembered" else ""
        title = f"{label}{unit} (colour: 2nd to 98th percentile of each row, at the right)"
        axes.set_title(title, loc="left", fontsize=11)
        _ticks(axes, report, tokens)
    if image is not None:
        bar = figure.colorbar(image, ax=list(all_axes[1:-1]), location="right", aspect=32, pad=0.075)
        bar.set_ticks([0, 1], labels=["low", "high"])

    axes = all_axes[-1]
    logs = map_delta(report.channels)
    reach = max(float(np.percentile(np.abs(logs), 99)), 1e-3)
    image = axes.imshow(logs, aspect="auto", cmap=_BOTH, vmin=-reach, vmax=reach, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, location="right", pad=0.09)
    bar.set_label("log2 (Δ / median Δ)")
    count = len(report.channels.channels)
    axes.set_yticks([0, len(logs) - 1], ["long", "short"])
    axes.set_ylabel(f"{count} channels, by memory")
    axes.set_xlabel("token")
    axes.set_title(
        f"layer {report.channels.layer}, channel by channel: Δ over the channel's own median", loc="left", fontsize=11
    )
    _ticks(axes, report, tokens)
    with atomic_file(path, make_parents=False) as temporary:
        figure.savefig(temporary, format="png")


def _ticks(axes: Any, report: InspectReport, tokens: int) -> None:
    """The characters themselves where there is room for them, else token numbers from 1."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2, color="#5c6675")
    if tokens <= 110 and all(len(piece) <= 1 for piece in report.pieces):
        signs = [_sign(piece).replace("$", r"\$") for piece in report.pieces]
        axes.set_xticks(range(tokens), signs, family=_FONT, fontsize=8)
        return
    step = max(1, round(tokens / 12 / 10) * 10)
    places = range(0, tokens, step)
    axes.set_xticks(list(places), [str(place + 1) for place in places], fontsize=8)
