"""Where one byte-level model reads better than another, on the same windows of unseen books:

    python benchmarks/compare_models.py --data TEXTS --model packaged:builtin --other runs/twin --every 6

Every window is read from an empty context by both, and the differences in bits per byte are taken window by window: of
all bytes, of each book, by the position in the window, and by whether a byte belongs to a word that the window has held
before (which a model may copy) or to one that is new in it. A word is letters alone, equal to the byte; it is long from
seven bytes on.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from statescan.evaluate import row_bits
from statescan.models import CausalLM
from statescan.recipes.language_scaling import Judged, paired_difference
from statescan.recipes.novels import read_corpus
from statescan.recipes.shipped import PACKAGED, shipped_model

_WORD, _LONG = re.compile(rb"[A-Za-z\x80-\xff]+"), 7
_POSITIONS = (0, 16, 64, 256, 512, 1024, 2048)


def read(model: CausalLM, tokens: NDArray[np.uint8], starts: Sequence[int], length: int) -> NDArray[np.float64]:
    """(windows, length) bits of every prediction of windows that begin at `starts`."""
    where, rows = model.lm_head.weight.device, []
    for first in range(0, len(starts), 4):
        some = starts[first : first + 4]
        rows.append(np.concatenate([bits for _, bits in row_bits(model, tokens, some, length, length, where)], axis=1))
    return np.concatenate(rows)


def kinds_of(window: bytes) -> NDArray[np.str_]:
    """What each byte of a window but its first belongs to: a "short" or "long" word that is "new" or held "before", or
    "between" words. A word that the window's end cuts off counts as the letters that are left."""
    kinds = np.full(len(window), "between", dtype="<U16")
    seen: set[bytes] = set()
    for match in _WORD.finditer(window):
        word = match.group()
        size = "long" if len(word) >= _LONG else "short"
        kinds[match.start() : match.end()] = f"{size}, {'before' if word in seen else 'new'}"
        seen.add(word)
    return kinds[1:]


def compare(
    tokens: NDArray[np.uint8], documents: Sequence[int], starts: Sequence[int], one: NDArray[Any], other: NDArray[Any]
) -> dict[str, Any]:
    """The differences, one minus other, of what `read` gave of both.

    Args:
        tokens: (bytes,) the text.
        documents: where each book begins, and the end.
        starts: of the windows.
        one, other: (windows, length) bits.

    Returns:
        {"windows", "all", "books", "positions", "words"}, each of the last three a list.
    """
    length = one.shape[1]
    book = np.searchsorted(np.asarray(documents), starts, side="right") - 1
    kinds = np.stack([kinds_of(tokens[start : start + length + 1].tobytes()) for start in starts])
    everything = np.ones_like(kinds, dtype=bool)
    total = float((one - other).sum())

    def told(where: NDArray[np.bool_]) -> dict[str, Any]:
        some = where.any(axis=1)
        sizes = where[some].sum(axis=1)
        mine, theirs = (Judged((bits * where).sum(axis=1)[some], sizes, book[some]) for bits in (one, other))
        difference, error = paired_difference(mine, theirs)
        return {
            "windows": int(some.sum()),
            "bytes": int(sizes.sum()),
            "one": mine.mean()[0],
            "other": theirs.mean()[0],
            "difference": difference,
            "standard_error": error,
            "share_of_the_difference": float(((one - other) * where).sum()) / total,
        }

    within = np.arange(length)[None] * everything
    places = [place for place in _POSITIONS if place < length] + [length]
    return {
        "length": length,
        "all": told(everything),
        "books": [told(everything & (book == number)[:, None]) for number in np.unique(book)],
        "positions": [
            {"first": low + 1, "last": high, **told((within >= low) & (within < high))}
            for low, high in pairwise(places)
        ],
        "words": [{"kind": str(kind), **told(kinds == kind)} for kind in np.unique(kinds)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--model", required=True, help="a model's folder, or packaged:NAME")
    parser.add_argument("--other", required=True, help="the same")
    parser.add_argument("--text", default="novels_test")
    parser.add_argument("--length", type=int, default=2048, help="predictions of a window")
    parser.add_argument("--every", type=int, default=1, help="read one window of so many")
    parser.add_argument("--first", type=int, default=0, help="number of the first window that is read")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = read_corpus(options.data, options.text)
    tokens = np.asarray(text.tokens)
    starts = list(range(0, len(tokens) - options.length, options.length))[options.first :: options.every]
    bits = []
    for name in (options.model, options.other):
        folder = shipped_model(name) if name.startswith(PACKAGED) else name
        model = CausalLM.from_pretrained(folder, device=torch.device(options.device)).eval()
        bits.append(read(model, tokens, starts, options.length))
    found = {"text": options.text, **compare(tokens, text.document_offsets.tolist(), starts, *bits)}
    told = json.dumps(found, indent=1)
    print(told)
    if options.out is not None:
        options.out.write_text(told + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
