"""The report as one HTML file: markup, style, script and numbers inside, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from statescan.files import atomic_file
from statescan.inspect.page import PAGE

if TYPE_CHECKING:
    from statescan.inspect.selection import ChannelMap, InspectReport

__all__ = ["MEASURES", "save_html"]

# name of the field, short label, what it says, scale
MEASURES: tuple[tuple[str, str, str, str], ...] = (
    (
        "delta",
        "step size Δ",
        "mean of Δ over the channels: how far the layer opens for this character. A large Δ writes it down and forgets "
        "what came before; a small Δ lets it pass.",
        "linear",
    ),
    (
        "written",
        "written",
        "‖ΔBu‖ ÷ ‖h‖: how much of the state, right after this character, is this character.",
        "linear",
    ),
    (
        "remembered",
        "remembered for",
        "tokens until less than a tenth of what this one wrote is left. Where more is left at the end of the text, "
        "it is grey, and the distance to the end stands for it (≥).",
        "log",
    ),
    (
        "left",
        "left at the end",
        "the part of what this character wrote that is still in the state after the last one.",
        "linear",
    ),
    (
        "influence",
        "share of the final state",
        "the size of this character's share in the state after the last one; the signed shares sum to 1.",
        "log",
    ),
)

# The channel map has at most so many rows: neighbours, in the order of their memory, are averaged.
_MAP_ROWS = 160


def measure(layer: Any, name: str) -> np.ndarray:
    """A measure of a layer as it is drawn: what has no end yet is as long as the text allows."""
    if name == "influence":
        return np.abs(layer.share)
    values = np.asarray(getattr(layer, name))
    if name == "remembered":
        reach = np.arange(len(values), 0, -1, dtype=np.float64)
        return np.where(np.isinf(values), reach, values)
    return values


def _round(values: np.ndarray) -> list[float | None]:
    """Four digits, as JSON takes them."""
    return [None if not math.isfinite(v) else float(f"{v:.4g}") for v in values.tolist()]


def _json(data: Any) -> str:
    # Inside a script element the only thing that ends it is "</".
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")


def map_rows(values: np.ndarray) -> np.ndarray:
    """At most `_MAP_ROWS` rows: neighbouring channels are averaged."""
    parts = np.array_split(np.arange(len(values)), min(len(values), _MAP_ROWS))
    return np.stack([values[part].mean(0) for part in parts])


def map_delta(channels: ChannelMap) -> np.ndarray:
    """log2 of each channel's step size over its own median: channels differ more in size than in what they select."""
    logs = np.log2(np.maximum(channels.delta, 1e-12))
    return map_rows(logs - np.median(logs, axis=1, keepdims=True))


def _picture(values: np.ndarray, ends: tuple[float, float], **facts: Any) -> dict[str, Any]:
    low, high = ends
    scaled = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    return {
        "rows": values.shape[0],
        "columns": values.shape[1],
        "data": base64.b64encode(np.round(255 * scaled).astype(np.uint8).tobytes()).decode(),
        **facts,
    }


def _pictures(channels: ChannelMap) -> dict[str, Any]:
    """The channel maps as bytes between the ends of their colour scales."""
    delta = map_delta(channels)
    # The same distance above and below, so that the middle of the scale is the median.
    reach = max(float(np.percentile(np.abs(delta), 99)), 1e-3)
    written = np.log(np.maximum(map_rows(channels.written), 1e-6))
    low, high = (float(end) for end in np.percentile(written, [1, 99]))
    return {
        "delta": _picture(delta, (-reach, reach), diverging=True, low=f"÷ {2**reach:.2f}", high=f"× {2**reach:.2f}"),
        "written": _picture(
            written, (low, high), diverging=False, low=f"{math.exp(low):.2g}", high=f"{math.exp(high):.2g}"
        ),
    }


def save_html(report: InspectReport, path: str | Path) -> None:
    """Writes the report; see `InspectReport.save_html`."""
    channels = report.channels
    data = {
        "pieces": report.pieces,
        "ids": report.token_ids,
        "bits": _round(report.bits),
        "measures": [
            {"name": name, "label": label, "says": says, "scale": scale} for name, label, says, scale in MEASURES
        ],
        "layers": [
            {
                "layer": one.layer,
                "values": {name: _round(measure(one, name)) for name, *_ in MEASURES},
                "open": np.nonzero(np.isinf(one.remembered))[0].tolist(),
                "share": _round(one.share),
                "half_life": _round(one.half_life),
            }
            for one in report.layers
        ],
        "map": {
            "layer": channels.layer,
            "channels": len(channels.channels),
            **_pictures(channels),
        },
    }
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in report.notes)
    page = (
        PAGE.replace("{{title}}", html.escape(report.title))
        .replace("{{notes}}", notes)
        .replace("{{data}}", _json(data))
    )
    with atomic_file(path, make_parents=False) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="")
