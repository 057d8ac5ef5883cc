"""Times transformers' MambaForCausalLM with statescan's kernels (`enable()`) and without, the same random weights:

    python benchmarks/transformers_dropin.py --out dropin-cpu.json    # on the CPU: prefill, train, generate
    python benchmarks/transformers_dropin.py --device cuda --what train --out dropin-cuda.json

The package's own training step keeps and fills arrays of the whole length for every token, so that it takes time
quadratic in the length: where a whole step takes too long (the CPU), one of few layers is timed (--eager-layers 1,2)
and continued in a straight line to all layers; the report says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from statescan.bench.measure import machine_facts
from statescan.integrations import transformers as drop_in

VOCAB, WIDTH, LAYERS = 50280, 768, 24
Report = dict[str, Any]


def build(layers: int, device: str, **options: Any) -> Any:
    """mamba-130m's shape with `layers` layers."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=layers, initializer_range=0.02, **options
    )
    return transformers.MambaForCausalLM(config).to(device)


def timed(call: Callable[[], Any], device: str, repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` ones."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds


def step(model: Any, tokens: torch.Tensor, autocast: bool = False) -> Callable[[], None]:
    """A training step's forward and backward."""

    def run() -> None:
        model.zero_grad()
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()

    return run


def on_off(enabled: bool) -> None:
    drop_in.enable() if enabled else drop_in.disable()


def prefill(options: argparse.Namespace, keep: Callable[[], None], report: Report) -> None:
    model = build(LAYERS, options.device).eval()
    tokens = torch.randint(VOCAB, (1, options.length or 2048), device=options.device)
    sides: dict[str, list[float]] = {"with": [], "without": []}
    report["prefill"] = {"tokens": tokens.shape[1], "dtype": "float32", **sides}
    with torch.no_grad():
        for _ in range(options.rounds):
            for side in sides:
                on_off(side == "with")
                call = lambda: model(tokens, use_cache=True, logits_to_keep=1)
                sides[side] += timed(call, options.device, 1, warmup=int(not sides[side]))
                report["prefill"].update(sides)
                if sides["without"]:
                    report["prefill"]["ratio"] = min(sides["without"]) / min(sides["with"])
                keep()


def generate(options: argparse.Namespace, keep: Callable[[], None], report: Report) -> None:
    model = build(LAYERS, options.device).eval()
    model.generation_config.eos_token_id = None
    tokens = torch.randint(VOCAB, (1, 32), device=options.device)
    sides: dict[str, list[float]] = {"with": [], "without": []}
    report["generate"] = {"prompt": 32, "new_tokens": 128, "dtype": "float32"}
    with torch.no_grad():
        for _ in range(options.rounds):
            for side in sides:
                on_off(side == "with")
                call = lambda: model.generate(tokens, max_new_tokens=128, min_new_tokens=128, do_sample=False)
                sides[side] += timed(call, options.device, 1, warmup=int(not sides[side]))
                report["generate"].update(sides)
                if sides["without"]:
                    report["generate"]["ratio"] = min(sides["without"]) / min(sides["with"])
                keep()


def train(options: argparse.Namespace, keep: Callable[[], None], report: Report) -> None:
    length = options.length or (2048 if options.device == "cuda" else 1024)
    found: Report = {"tokens": length}
    report["train"] = found

    def measure(name: str, layers: int, batch: int, enabled: bool, repeats: int, **how: Any) -> None:
        on_off(enabled)
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = build(layers, options.device, use_associative_scan=how.get("compiled", False)).train()
        tokens = torch.randint(VOCAB, (batch, length), device=options.device)
        run = torch.compile(model) if how.get("compiled") else model
        autocast = how.get("autocast", False)
        entry: Report = {"layers": layers, "batch": batch, "dtype": "bf16 autocast" if autocast else "float32"}
        try:
            begun = time.perf_counter()
            seconds = timed(step(run, tokens, autocast), options.device, repeats, how.get("warmup", 1))
            entry |= {"seconds": seconds, "all": time.perf_counter() - begun}
        except torch.OutOfMemoryError as problem:
            entry["failed"] = str(problem).splitlines()[0]
        if options.device == "cuda":
            entry["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        found[name] = entry
        print(name, entry, flush=True)
        keep()

    cuda = options.device == "cuda"
    measure("with", LAYERS, 1, True, 5 if cuda else 3)
    if cuda:
        measure("with, bf16 autocast", LAYERS, 1, True, 5, autocast=True)
        measure("with, batch 8", LAYERS, 8, True, 3)
        measure("with, batch 8, bf16 autocast", LAYERS, 8, True, 3, autocast=True)
    for layers in sorted({*options.eager_layers, *options.compiled_layers}):
        measure(f"with, {layers} layers", layers, 1, True, 3)
    for number, layers in enumerate(options.eager_layers):
        measure(f"without, {layers} layers", layers, 1, False, 1, warmup=int(cuda and number == 0))
    compare(found, "eager", "without", options.eager_layers)
    keep()
    for layers in options.compiled_layers:
        measure(f"without, compiled, {layers} layers", layers, 1, False, 3, compiled=True)
    compare(found, "compiled", "without, compiled", options.compiled_layers)
    keep()


def compare(found: Report, what: str, side: str, counts: list[int]) -> None:
    """Ratios of the package's own step, of each number of layers and of all, to that with our kernels."""

    def best(name: str) -> float:
        return min(found[name].get("seconds", [float("nan")]))

    seconds = {layers: best(f"{side}, {layers} layers") for layers in counts}
    for layers, own in seconds.items():
        found[f"ratio to {what}, {layers} layers"] = own / best(f"with, {layers} layers")
    if LAYERS in seconds:
        found[f"ratio to {what}"] = seconds[LAYERS] / best("with")
    elif len(seconds) == 2:
        (low, a), (high, b) = sorted(seconds.items())
        whole = a + (b - a) / (high - low) * (LAYERS - low)
        found[f"{side}, continued to all layers"] = whole
        found[f"ratio to {what}, continued"] = whole / best("with")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--what", default="prefill,generate,train")
    parser.add_argument("--length", type=int, help="of prefill (2048) and training (1024; on a GPU 2048)")
    parser.add_argument("--rounds", type=int, default=3, help="of prefill and generate, both sides in turn")
    parser.add_argument("--eager-layers", help="layers of the package's own training step (1,2; on a GPU 24; 0: none)")
    parser.add_argument("--compiled-layers", default="", help="layers of its step under torch.compile (none)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    layers = options.eager_layers or ("24" if options.device == "cuda" else "1,2")
    options.eager_layers = [int(number) for number in layers.split(",") if number and number != "0"]
    options.compiled_layers = [int(number) for number in options.compiled_layers.split(",") if number]
    torch.set_num_threads(options.threads)
    facts = machine_facts()
    facts["versions"]["transformers"] = transformers.__version__
    report: Report = {
        "machine": {
            **facts,
            "device": options.device,
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
            "threads": options.threads,
        }
    }

    def keep() -> None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for name in options.what.split(","):
        {"prefill": prefill, "generate": generate, "train": train}[name](options, keep, report)
        print({key: value for key, value in report[name].items() if "ratio" in key}, flush=True)


if __name__ == "__main__":
    main()
