"""What more context is worth: bits per byte over the position in a novel, to a million bytes and far beyond training.

A state space model trained on windows of 2,048 bytes meets, after a hundred thousand, states that no window ever came
to. ``statescan reproduce context-growth`` trains a Mamba on windows of 2,048, 8,192 and 65,536 bytes, and with five
remedies: on windows of 2,048 the state carried along the text, or noise in its place; windows of 2,048, 4,096 and 8,192
mixed; on windows of 2,048 and of 8,192, the state carried further and channels that begin with a memory as long; and
that with copies of the books beside them whose names no model can know by heart. All are judged, beside Transformers,
at every position of the two unseen novels that are long enough.

Text is not equally hard everywhere, by far more than context is worth. So each byte read after a long context is set
beside the same byte read by the same model in a window of 2,048, and a bin of positions tells the mean of these
differences on top of the mean over all windows: no bin has the easier text. What 2,048 bytes miss differs from passage
to passage, too, and by more than what comes after 16k: whether the curve goes on falling there is told by the same
bytes after 16k to 32k alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statescan.data import ByteTokenizer, names
from statescan.errors import ConfigError, DataError, MissingExtraError
from statescan.evaluate import row_bits, window_bits
from statescan.files import atomic_file, default_cache_folder, make_folder, write_json, write_text
from statescan.models import CausalLM
from statescan.recipes.language_scaling import (
    PASSES,
    SIZES,
    books_of,
    own_settings,
    row_status,
    scaling_run,
    schedule,
    settings_of,
    train_row,
)
from statescan.recipes.novels import NOVELS, read_corpus
from statescan.recipes.synthetic import figure, save_figure
from statescan.train import RunConfig
from statescan.train.finished import check_same

__all__ = ["ROWS", "GrowthRow", "PositionBin", "context_growth", "gains_beyond", "growth_run", "judge_positions"]

# Positions to which each kind is judged: a state stays as large as it is, keys and values don't.
LONGEST, LONGEST_ATTENTION = 1 << 20, 1 << 15
# Bytes between the places from which a novel is read, a multiple of the window.
STRIDE, WINDOW = 1 << 16, 2048
# Bytes of context, and up to twice as many, beside which all that a novel has is set.
NEAR = 1 << 14
SIZE = "1m"
# Logits held at once: those of 65,536 bytes.
_LOGITS = 1 << 24


@dataclasses.dataclass(frozen=True, slots=True)
class GrowthRow:
    """How a row is trained.

    Args:
        label: its name in table and figure.
        family: "mamba", "transformer++" or "pythia", of `language_scaling`.
        train: fields of `TrainConfig` that differ from the scaling table's row; none: it is that row.
        model: fields of its model that do; only beside some of `train`.
        copies: of the training books beside them, each book with names of its own, see `statescan.data.names`; only
            beside some of `train`. As many bytes are read as without.
    """

    label: str
    family: str = "mamba"
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    copies: int = 0

    def __post_init__(self) -> None:
        if (self.model or self.copies) and not self.train:
            raise ConfigError("context-growth: a row's model and copies go with fields of its training, got none")


# A channel of step dt forgets in 1 / dt positions at A = -1: with the published 1e-3 to 0.1 none of them begins with
# more than a thousand, and here half of them do, up to a hundred thousand.
_SLOW = {"dt_min": 1e-5, "dt_init_floor": 1e-6}


# As many bytes an update in all, but for windows of 65,536, one of which is four updates' worth.
ROWS: dict[str, GrowthRow] = {
    "mamba-2k": GrowthRow("Mamba, 2k"),
    "mamba-2k-carry": GrowthRow("Mamba, 2k, state carried", train={"initial_state": "carry"}),
    # Carried for a million bytes on average, where the row above has 131,072.
    "mamba-2k-far": GrowthRow(
        "Mamba, 2k, carried far, slow steps", train={"initial_state": "carry", "from_zero": 1 / 512}, model=_SLOW
    ),
    # Names are a reason to look back, and as far as a book goes.
    "mamba-2k-names": GrowthRow(
        "Mamba, 2k, carried far, slow steps, other names",
        train={"initial_state": "carry", "from_zero": 1 / 512},
        model=_SLOW,
        copies=3,
    ),
    "mamba-8k-far": GrowthRow(
        "Mamba, 8k, carried far, slow steps",
        train={"length": 8192, "batch_size": 2, "initial_state": "carry", "from_zero": 1 / 128},
        model=_SLOW,
    ),
    "mamba-8k": GrowthRow("Mamba, 8k", train={"length": 8192, "batch_size": 2}),
    "mamba-2k-noise": GrowthRow("Mamba, 2k, noise", train={"initial_state": "noise", "from_zero": 0.5}),
    # Between the rows of its shortest and its longest windows, which read as many bytes.
    "mamba-mixed": GrowthRow(
        "Mamba, 2k, 4k and 8k mixed", train={"length": 8192, "batch_size": 2, "shortest_length": 2048}
    ),
    "mamba-64k": GrowthRow("Mamba, 64k", train={"length": 65536, "batch_size": 1}),
    "transformer++-2k": GrowthRow("Transformer++, 2k", "transformer++"),
    "pythia-2k": GrowthRow("Transformer (Pythia), 2k", "pythia"),
    "transformer++-8k": GrowthRow("Transformer++, 8k", "transformer++", {"length": 8192, "batch_size": 2}),
}


def growth_run(
    row: str,
    data: str | os.PathLike[str],
    *,
    size: str = SIZE,
    passes: float = PASSES,
    device: str = "cpu",
    scaling: str | os.PathLike[str] | None = None,
) -> RunConfig:
    """The whole run of a row: `scaling_run`'s of its family and size, with the row's own fields.

    Args:
        row: one of `ROWS`.
        data: folder of the novels.
        size: of `language_scaling.SIZES`.
        passes, device: as for `scaling_run`.
        scaling: folder of the scaling table, whose tuning holds here too. Default: none.

    Raises:
        ConfigError: an unknown row or size.
    """
    if row not in ROWS or size not in SIZES:
        raise ConfigError(
            f"context-growth: the row must be one of {', '.join(ROWS)}, and the size of {', '.join(SIZES)}; "
            f"got {row!r} and {size!r}"
        )
    entry = ROWS[row]
    name = f"{entry.family}-{size}"
    best: dict[str, Any] = {} if scaling is None else own_settings(name, scaling)
    run = scaling_run(name, data, passes=passes, device=device, **best)
    if not entry.train:
        return run
    plain = run.train
    length, rows = entry.train.get("length", plain.length), entry.train.get("batch_size", plain.batch_size)
    steps = max(1, round(plain.steps * plain.batch_size * plain.length / (rows * length)))
    settings = dataclasses.replace(plain, **schedule(steps), **entry.train)
    texts = run.data
    if entry.copies:
        texts = dataclasses.replace(texts, paths=texts.paths + _with_other_names(data, entry.copies))
    return dataclasses.replace(run, data=texts, model=run.model.replace(**entry.model), train=settings)


def _with_other_names(data: str | os.PathLike[str], copies: int) -> tuple[str, ...]:
    """Archives of the training books in which each has names of its own, in the user's cache folder, made where they
    aren't there.

    Each has the books in another order: rows that carry their states read at equal distances, copies in one order would
    be read at the same page at the same time, and what one row was just taught another would know.
    """
    text = read_corpus(data, NOVELS[0])
    folder = make_folder(default_cache_folder() / "texts")
    stem = f"{NOVELS[0]}-names{names.VERSION}-shuffled-{text.digest[:16]}"
    paths = [folder / f"{stem}-{copy}.tar" for copy in range(copies)]
    if not all(path.exists() for path in paths):
        books = [book.tobytes() for book in books_of(text, ByteTokenizer())]
        for copy, (path, swapped) in enumerate(zip(paths, names.swap_books(books, copies), strict=True)):
            order = np.random.default_rng((1, copy)).permutation(len(swapped))
            with atomic_file(path) as temporary, tarfile.open(temporary, "w") as archive:
                for place, number in enumerate(order):
                    member = tarfile.TarInfo(f"{place:04d}.txt")
                    member.size = len(swapped[number])
                    archive.addfile(member, io.BytesIO(swapped[number]))
    return tuple(map(str, paths))


class PositionBin(NamedTuple):
    """The predictions made after `first` to `last` bytes of context.

    bits_per_byte: their mean as told above; standard_error: of that mean's difference from the mean over all windows,
    None of a single place; places: from how many the text was read, within a window how many windows; gains: the
    difference from the windows at each place, none in files from before it was kept of positions within a window.
    """

    first: int
    last: int
    bits_per_byte: float
    standard_error: float | None
    places: int
    gains: Sequence[float] = ()


def judge_positions(
    model: CausalLM,
    books: Sequence[NDArray[Any]],
    *,
    longest: int = LONGEST,
    span: int = LONGEST,
    stride: int = STRIDE,
    window: int = WINDOW,
) -> list[PositionBin]:
    """Bits per byte over the position, by octaves.

    Every book of more than `span` bytes is read from every `stride`-th byte on that leaves `span` bytes, `longest`
    bytes far, the state carried; and all of these spans in windows. Octaves within a window are the windows' own
    means; beyond, the mean over all windows plus the mean difference of each byte's bits from those that it costs in
    its window. Where readings overlap their errors are not independent: the standard error over the readings is widened
    by the root of how often a byte was counted.

    Args:
        model: of bytes, in evaluation mode. One whose state grows reads each place in one piece.
        books: ids of each.
        longest: positions, a power of two, at least two windows.
        span: bytes that each place has behind it; the same for all models that are to be compared.
        stride: between places, a multiple of `window`.
        window: a power of two.

    Returns:
        The octaves from 1 on.

    Raises:
        ConfigError: lengths that don't divide.
        DataError: no book is long enough.
    """
    where = _places(books, longest, span, stride=stride, window=window)
    device, vocabulary = model.lm_head.weight.device, model.config.padded_vocab_size
    carried = getattr(model.config, "family", None) != "transformer"
    piece = max(window, longest // 64) if carried else longest
    octaves = [1 << power for power in range(longest.bit_length() - 1)]
    bounds = np.array([octave - 1 for octave in octaves if octave >= window])
    # Of each place the windows behind it, (places, windows, window).
    inside: list[NDArray[np.float64]] = []
    gains: list[NDArray[np.float64]] = []
    for book, places in where:
        read = book[: places[-1] + span + 1]
        plain = window_bits(model, read, window, window, batch_size=max(1, _LOGITS // (window * vocabulary)))
        inside += [plain[start : start + span].reshape(1, -1, window) for start in places]
        for some in _batches(places, max(1, _LOGITS // (piece * vocabulary))):
            pieces = [bits for _, bits in row_bits(model, book, some, longest, piece, device)]
            more = np.concatenate(pieces, axis=1) - np.stack([plain[start : start + longest] for start in some])
            # The last position belongs to an octave that is not read.
            gains.append(np.add.reduceat(more[:, :-1], bounds, axis=1) / (bounds + 1))
    windows, beyond = np.concatenate(inside), np.concatenate(gains)
    level, repeated = float(windows.mean()), max(1.0, span / stride)
    bins = []
    for first in (octave for octave in octaves if octave < window):
        part = windows[..., first - 1 : 2 * first - 1].mean(2)
        mean, error = _mean(part.ravel(), repeated)
        there = part.mean(1) - windows.mean((1, 2))
        bins.append(PositionBin(first, 2 * first - 1, mean, error, part.size, there.tolist()))
    for number, first in enumerate(octave for octave in octaves if octave >= window):
        mean, error = _mean(beyond[:, number], first / stride)
        bins.append(PositionBin(first, 2 * first - 1, level + mean, error, len(beyond), beyond[:, number].tolist()))
    return bins


def gains_beyond(
    model: CausalLM, books: Sequence[NDArray[Any]], *, near: int = NEAR
) -> list[tuple[int, float, float | None, int]]:
    """What all that a book has before a byte is worth beside `near` to twice as many bytes, on the same bytes.

    Every book of four times `near` bytes and more is read from its first byte to its last with the state carried, and
    in windows of twice `near` that begin anew, each judged on its second half.

    Args:
        model: of bytes, in evaluation mode, with a state of fixed size.
        books: ids of each.
        near: bytes of context, and of the stretches that count as independent of each other.

    Returns:
        Of each octave of the position in a book from 2 `near` on: (its first position, the mean of bits per byte with
        all that the book has, minus those after `near` to twice as many, its standard error over the stretches, None of
        a single one, how many they are). A stretch belongs to the octave that it begins in.

    Raises:
        DataError: no book is long enough.
    """
    device = model.lm_head.weight.device
    found: dict[int, list[float]] = {}
    for book in books:
        if len(book) < 4 * near:
            continue
        whole = np.concatenate([bits[0] for _, bits in row_bits(model, book, [0], len(book) - 1, 4 * near, device)])
        gains = whole - window_bits(model, book, 2 * near, near, batch_size=2)
        for first in range(2 * near, len(gains) - near + 1, near):
            octave = 1 << (first.bit_length() - 1)
            found.setdefault(octave, []).append(float(gains[first : first + near].mean()))
    if not found:
        raise DataError(
            f"context-growth: wanted a book of {4 * near} bytes at least, got {max(map(len, books), default=0)} at "
            "most; take a longer text or a smaller near"
        )
    return [(octave, *_mean(np.array(gains), 1.0), len(gains)) for octave, gains in sorted(found.items())]


def _places(
    books: Sequence[NDArray[Any]], longest: int, span: int, *, stride: int = STRIDE, window: int = WINDOW
) -> list[tuple[NDArray[Any], range]]:
    """The books that are long enough, each with the places it is read from; refuses what `judge_positions` does."""
    powers = all(length & (length - 1) == 0 for length in (longest, window))
    if not powers or not window < longest <= span or stride % window or span % window:
        raise ConfigError(
            "context-growth: longest and window must be powers of two, stride and span multiples of window, and "
            f"window < longest <= span; got longest={longest}, window={window}, stride={stride}, span={span}"
        )
    found = [(book, range(0, len(book) - span, stride)) for book in books if len(book) > span]
    if not found:
        raise DataError(
            f"context-growth: wanted a book of more than {span} bytes, got {max(map(len, books), default=0)} at most; "
            "take a longer text or fewer positions"
        )
    return found


def _batches(starts: Sequence[int], rows: int) -> list[list[int]]:
    return [list(starts[first : first + rows]) for first in range(0, len(starts), rows)]


def _mean(values: NDArray[np.float64], counted: float) -> tuple[float, float | None]:
    """(mean, its standard error) of values of which neighbours hold each byte `counted` times; None of a single one."""
    places = len(values)
    widened = math.sqrt(min(max(1.0, counted), places))
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(places) * widened if places > 1 else None


def context_growth(
    rows: Iterable[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scaling: str | os.PathLike[str],
    size: str = SIZE,
    passes: float = PASSES,
    longest: int = LONGEST,
    device: str = "cpu",
    change: Callable[[RunConfig], RunConfig] = lambda run: run,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains rows, or goes on with them, judges them at every position and writes table and figure of all there are.

    Args:
        rows: of `ROWS`; none to write the report alone.
        data: folder of the novels.
        out: folder of the rows' folders, ``results.json``, ``results.md`` and ``figure.svg``. What was judged to
            another `longest` stays in the rows' folders, and is not in these.
        scaling: folder of the scaling table, whose rows some of these are; trained there where they aren't yet.
        size, passes, device: as for `growth_run`.
        longest: positions judged, a power of two; of Transformers 32,768 at most.
        change: what is made of each run before it starts, for runs of another size.
        say: called with lines of progress.

    Returns:
        What `report` gives.

    Raises:
        CheckpointError: a folder holds another run, or one of other texts.
        ConfigError, DataError: `longest` is no power of two above a window, or no book is long enough for it.
        KeyboardInterrupt: interrupted; what was trained is kept.
    """
    out = make_folder(Path(out))

    def run_of(row: str) -> RunConfig:
        return change(growth_run(row, data, size=size, passes=passes, device=device, scaling=scaling))

    text = read_corpus(data, NOVELS[2])
    books = books_of(text, ByteTokenizer())

    def far(row: str) -> int:
        return longest if ROWS[row].family == "mamba" else min(longest, LONGEST_ATTENTION)

    def trained_in(row: str) -> Path:
        return out / row if ROWS[row].train else Path(scaling) / f"{ROWS[row].family}-{size}"

    # All of them before hours of training: one that can't be trained or judged is told at once.
    runs = {row: run_of(row) for row in rows}
    for row, run in runs.items():
        _places(books, far(row), longest)
        curve = _curve(out / row, longest)
        if curve.exists():
            check_same(curve, json.loads(curve.read_text(encoding="utf-8")), _told(run, text.digest))
        row_status(run, trained_in(row))
    for row, run in runs.items():
        curve = _curve(make_folder(out / row), longest)
        model = train_row(run, trained_in(row), say=say)
        if not curve.exists():
            bins = judge_positions(model, books, longest=far(row), span=longest)
            read_from = [len(places) for _, places in _places(books, far(row), longest)]
            told = _told(run, text.digest)
            facts = {"row": row, **told, "parameters": model.parameter_count(), "places_of_each_book": read_from}
            if ROWS[row].family == "mamba" and longest >= 4 * NEAR:
                facts["beyond"] = gains_beyond(model, books, near=NEAR)
            write_json(curve, facts | {"bins": [one._asdict() for one in bins]})
            say(f"{row}: judged to position {far(row):,}")
    return report(out, longest)


def _told(run: RunConfig, digest: str) -> dict[str, Any]:
    """What a curve is of: a run, and the books that it was judged on."""
    return {"config": settings_of(run), "digest": digest}


def _curve(folder: Path, longest: int) -> Path:
    """What a row was judged to; places that leave other many bytes behind them are other places."""
    return folder / f"positions-{longest}.json"


def report(out: str | os.PathLike[str], longest: int | None = None) -> dict[str, Any]:
    """Writes ``results.json``, ``results.md`` and, with matplotlib, ``figure.svg`` from the rows in a folder.

    Args:
        out: folder of the rows' folders.
        longest: of the rows that were judged to so many positions; others are not comparable. Default: the farthest
            that any was.

    Returns:
        {"longest", "rows", "not_run"}.

    Raises:
        ConfigError: the folder has rows, but none of that `longest`; nothing is written over.
    """
    out = Path(out)
    reaches: dict[int, list[str]] = {}
    for row in ROWS:
        for path in sorted((out / row).glob("positions-*.json")):
            reaches.setdefault(int(path.stem.rpartition("-")[2]), []).append(row)
    longest = max(reaches, default=LONGEST) if longest is None else longest
    if reaches and longest not in reaches:
        held = "; ".join(f"{reach} ({', '.join(there)})" for reach, there in sorted(reaches.items()))
        raise ConfigError(
            f"context-growth: longest must be one that rows in '{out}' were judged to, got {longest}; there are {held}"
        )
    rows = {}
    for row in reaches.get(longest, ()):
        facts = json.loads(_curve(out / row, longest).read_text(encoding="utf-8"))
        rows[row] = facts | summary([PositionBin(**one) for one in facts["bins"]])
    results = {"longest": longest, "rows": rows, "not_run": [row for row in ROWS if row not in rows]}
    write_json(out / "results.json", results)
    write_text(out / "results.md", _table(results))
    # It may be of another `longest`.
    (out / "figure.svg").unlink(missing_ok=True)
    if rows:
        with contextlib.suppress(MissingExtraError):  # the table says all that the picture does
            _draw(rows, out / "figure.svg")
    return results


def summary(bins: Sequence[PositionBin]) -> dict[str, Any]:
    """The least of a curve, how far it rises again, and what the octaves from 16k to 256k bring.

    Returns:
        {"least": first byte of the octave, "rise": highest later octave over the least, minus 1, "rise_error": its
        standard error, place by place, None where a file doesn't hold the places, "from_16k_to_256k": (the octave that
        ends at 256k minus the one that begins at 16k, its standard error, place by place), None where the curve ends
        before}.
    """
    number = min(range(len(bins)), key=lambda number: bins[number].bits_per_byte)
    least, highest = bins[number], max(bins[number:], key=lambda one: one.bits_per_byte)
    error = None
    if highest is not least and least.gains and highest.gains:
        # Within a window a byte is counted as often as places have it behind them.
        spans = [
            one.first if one.first >= WINDOW else one.places // len(one.gains) * WINDOW for one in (least, highest)
        ]
        _, error = _mean(np.array(highest.gains) - np.array(least.gains), max(spans) / STRIDE)
    at = {one.first: np.array(one.gains) for one in bins}
    begin, end = 1 << 14, 1 << 17
    return {
        "least": least.first,
        "rise": highest.bits_per_byte / least.bits_per_byte - 1,
        "rise_error": None if error is None else error / least.bits_per_byte,
        "from_16k_to_256k": _mean(at[end] - at[begin], end / STRIDE) if end in at else None,
    }


_SHOWN = (1 << 10, 1 << 12, 1 << 14, 1 << 15, 1 << 17, 1 << 19)


def _percent(share: float, error: float | None) -> str:
    return f"{100 * share:.2f} %" if error is None else f"{100 * share:.2f} ± {100 * error:.2f} %"


def _table(results: Mapping[str, Any]) -> str:
    def short(count: int) -> str:
        return f"{count >> 20}M" if count >= 1 << 20 else f"{count >> 10}k" if count >= 1 << 10 else str(count)

    def spread(error: float | None, digits: int = 4) -> str:
        return "" if error is None else f" ± {error:.{digits}f}"

    heads = [f"{short(first)} to {short(2 * first)}" for first in _SHOWN]
    lines = [
        "| trained | parameters | bytes read | " + " | ".join(heads) + " | 16k to 256k | rise above the least | "
        f"all of {short(8 * NEAR)} to {short(16 * NEAR)} beside {short(NEAR)} to {short(2 * NEAR)}, the same bytes |",
        "|---" + "|---:" * (len(heads) + 5) + "|",
    ]
    for row, facts in results["rows"].items():
        at = {one["first"]: one for one in facts["bins"]}
        settings = facts["config"]["train"]
        read = settings["steps"] * settings["batch_size"] * settings["length"]
        cells = [ROWS[row].label, f"{facts['parameters']:,}", f"{read:,}"]
        for first in _SHOWN:
            one = at.get(first)
            cells.append("" if one is None else f"{one['bits_per_byte']:.4f}{spread(one['standard_error'])}")
        gain = facts["from_16k_to_256k"]
        cells += [
            "" if gain is None else f"{gain[0]:+.4f}{spread(gain[1])}",
            _percent(facts["rise"], facts["rise_error"]),
        ]
        beyond = {octave: (mean, error) for octave, mean, error, _ in facts.get("beyond", ())}.get(8 * NEAR)
        cells.append("" if beyond is None else f"{beyond[0]:+.5f}{spread(beyond[1], 5)}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Every place has {results['longest']:,} bytes behind it."]
    held = {tuple(facts.get("places_of_each_book", ())) for facts in results["rows"].values()} - {()}
    if held:
        places = " or ".join(" + ".join(map(str, one)) for one in sorted(held))
        lines[-1] += f" By book they are {places}; the standard errors are of these books, not of others."
    if any(facts.get("beyond") for facts in results["rows"].values()):
        lines[-1] += (
            f" The last column is of stretches of {NEAR:,} bytes of all books that are long enough, read from their "
            "first byte on; rows judged before it was there have none."
        )
    if results["not_run"]:
        lines += ["", f"Not run: {', '.join(results['not_run'])}."]
    return "\n".join(lines) + "\n"


_COLOURS = (
    "#0072B2", "#56B4E9", "#009E73", "#44AA99", "#CC79A7", "#882255", "#332288", "#117733", "#000000", "#D55E00",
    "#E69F00", "#999999",
)  # fmt: skip


def _draw(rows: Mapping[str, Any], path: Path) -> None:
    """Bits per byte over the position, from 64 on, one line a row."""
    made, axes = figure(8.0, 4.8)
    lowest = math.inf
    for row, colour in zip(ROWS, _COLOURS, strict=True):
        if row not in rows:
            continue
        facts = rows[row]
        bins = [one for one in facts["bins"] if one["first"] >= 64]
        x = [math.sqrt(one["first"] * one["last"]) for one in bins]
        y = np.array([one["bits_per_byte"] for one in bins])
        error = np.array([one["standard_error"] or 0.0 for one in bins])
        axes.fill_between(x, y - error, y + error, color=colour, alpha=0.15, linewidth=0)
        style = "-" if ROWS[row].family == "mamba" else "--"
        axes.plot(x, y, style, marker="o", markersize=3, color=colour, linewidth=1.5, label=ROWS[row].label)
        lowest = min(lowest, float(y.min()))
    axes.set_xscale("log", base=2)
    # What leaves the picture at the top has left its training length behind.
    axes.set_ylim(lowest - 0.02, lowest + 0.3)
    axes.set_xlabel("bytes of context before the predicted one (band: one standard error)")
    axes.set_ylabel("bits per byte of unseen novels")
    axes.legend(frameon=False, fontsize=8)
    save_figure(made, path)
