"""Bytes a second that a small byte-level Mamba is trained with, compiling left out:

    python benchmarks/train_bytes.py --data TEXTS --device cuda --out train-bytes.json

15.4 million parameters at a length of 2,048, 32 windows an update, bfloat16 autocast, the text on the device: each
window from an empty state, and with states carried from window to window.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from statescan.models import MambaConfig
from statescan.recipes.builtin_model import LanguageRun, train_language_model
from statescan.recipes.novels import read_corpus

_KEPT = (
    "parameters", "bytes_per_second", "model_flop_utilization", "peak_gib", "steps", "seconds", "precision", "machine",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds novels_train")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokens = np.asarray(read_corpus(options.data, "novels_train").tokens)
    found: list[dict[str, Any]] = []
    for carried in (0.0, 1.0):
        run = LanguageRun(
            "rate", MambaConfig(options.d_model, options.layers, 256), seconds=options.seconds, carried=carried,
            length=options.length, batch_size=options.batch_size,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            trained = train_language_model(run, tokens, folder, device=options.device)
        found.append({"carried": bool(carried), **{name: trained[name] for name in _KEPT}})
    text = json.dumps(found, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
