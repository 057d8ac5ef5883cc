"""Times the model in the box from the command on, each start in a fresh process, as a user meets it:

    python benchmarks/first_byte.py --rounds 7 --threads 2 --out first-byte.json

Seconds until ``statescan generate`` shows its first byte, beside those that ``import torch`` takes alone (in turn, the
median of each), and bytes a second at batch 1, without the start, for each form of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from statescan.bench.measure import machine_facts
from statescan.cli.models import BUILTIN_MODEL, open_model
from statescan.generate import Engine, SamplingParams

_COMMAND = (sys.executable, "-m", "statescan", "generate", "--no-echo", "--prompt", "It was the ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN_MODEL)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bytes", type=int, default=1000, help="written for the rate")
    parser.add_argument("--dtypes", default="float32,bfloat16,int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONUNBUFFERED": "1"}

    first, torch_alone = [], []
    for number in range(options.rounds + 1):
        start = time.perf_counter()
        subprocess.run((sys.executable, "-c", "import torch"), env=environment, check=True)
        alone = time.perf_counter() - start
        command = (*_COMMAND, "--model", str(options.model), "--max-new-tokens", "8", "--seed", str(number))
        start = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode:
            raise SystemExit(f"first_byte: {' '.join(command)} ended with {process.returncode}")
        if number:  # the first round brings the files into the system's cache
            first.append(seconds)
            torch_alone.append(alone)

    import torch

    torch.set_num_threads(options.threads)
    model, tokenizer = open_model(options.model)
    rates = {}
    for dtype in options.dtypes.split(","):
        engine = Engine(model, tokenizer, dtype=dtype)
        engine.generate(["It was the "], SamplingParams(max_new_tokens=50, seed=0))
        taken = []
        for seed in range(3):
            start = time.perf_counter()
            engine.generate(["It was the "], SamplingParams(max_new_tokens=options.bytes, seed=seed))
            taken.append(options.bytes / (time.perf_counter() - start))
        rates[dtype] = {"bytes_per_second": statistics.median(taken), "best": max(taken)}
    found: dict[str, Any] = {
        "machine": {**machine_facts(), "threads": options.threads},
        "model": str(options.model),
        "rounds": options.rounds,
        "first_byte_seconds": {"median": statistics.median(first), "best": min(first), "all": first},
        "import_torch_seconds": {
            "median": statistics.median(torch_alone), "best": min(torch_alone), "all": torch_alone,
        },
        "after_torch_seconds": {
            "median": statistics.median(a - b for a, b in zip(first, torch_alone, strict=True)),
            "best": min(first) - min(torch_alone),
        },
        "generation": rates,
    }  # fmt: skip
    text = json.dumps(found, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
