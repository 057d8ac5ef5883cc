"""What `statescan bench` runs: the list of measurements, the processes, the table and the file."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from statescan.bench.measure import ceilings, machine_facts
from statescan.checkpoint import atomic_file
from statescan.errors import ConfigError

__all__ = ["BENCHMARKS", "BenchRow", "run"]


@dataclass
class BenchRow:
    """One implementation of one benchmark.

    Args:
        bench: name of the benchmark. case: its shape and mode. implementation: ours or the peer's.
        dtype: of the activations, or of the stored weights when decoding.
        milliseconds: median over all samples of all rounds; best: the smallest.
        tokens_per_second: for the model's benchmarks.
        relative_error: of the output against the float64 reference (ops) or our float32 model (prefill, decode).
        floor_ms: the least time that this machine's measured ceilings allow; ratio: milliseconds over it.
        failure: why there is no figure.
    """

    bench: str
    case: str
    implementation: str
    dtype: str
    milliseconds: float | None = None
    best: float | None = None
    tokens_per_second: float | None = None
    relative_error: float | None = None
    peak_memory_bytes: int | None = None
    floor_ms: float | None = None
    ratio: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    failure: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Job:
    bench: str
    case: str
    implementation: str
    dtype: str
    options: dict[str, Any]
    floor: Callable[[dict[str, float]], float] | None = None
    rounds: int = 2
    needs: str | None = None


def _scan_jobs(o: dict[str, Any]) -> Iterable[_Job]:
    shape, n = o["scan_shape"], 16
    elements = shape[0] * shape[1] * shape[2]
    for mode in ("forward", "forward+backward"):
        both = mode != "forward"
        for dtype in ("float32", "bfloat16"):
            # The exponentials alone at torch's own rate: a yardstick, since our polynomial goes below it.
            floor = lambda c, both=both: (3 if both else 1) * elements * n / c["exp_g_s"] / 1e6
            names = ["statescan cpu", "statescan torch"]
            if dtype == "float32":
                names += ["transformers associative, compiled", "transformers mambapy pscan"]
                # The loop's backward is quadratic in the length (every step's slice has a gradient of full size).
                names += [] if both else ["transformers loop", "llama.cpp ggml"]
            for name in names:
                needs = name.split()[0] if name.split()[0] != "statescan" else None
                slow = needs == "transformers" or name == "statescan torch"
                yield _Job(
                    "scan",
                    f"{tuple(shape)} n={n} {mode}",
                    name,
                    dtype,
                    {"shape": shape, "d_state": n, "mode": mode},
                    floor,
                    1 if slow else 2,
                    needs,
                )


def _small_op_jobs(bench: str, key: str) -> Callable[[dict[str, Any]], Iterable[_Job]]:
    def jobs(o: dict[str, Any]) -> Iterable[_Job]:
        shape = o[key]
        elements = shape[0] * shape[1] * shape[2]
        for mode in ("forward", "forward+backward"):
            for dtype in ("float32", "bfloat16"):
                width = 4 if dtype == "float32" else 2
                passes = {("conv", "forward"): 2 * width, ("conv", "forward+backward"): 5 * width}
                norm = {"forward": 2 * width + 8, "forward+backward": 4 * width + 20}
                bytes_ = passes.get((bench, mode), norm[mode])
                floor = lambda c, b=bytes_: elements * b / c["read_gb_s"] / 1e6
                for name in ("statescan cpu", "statescan torch", "torch"):
                    yield _Job(bench, f"{tuple(shape)} {mode}", name, dtype, {"shape": shape, "mode": mode}, floor)

    return jobs


def _prefill_jobs(o: dict[str, Any]) -> Iterable[_Job]:
    from statescan.models import preset
    from statescan.models.counters import flops_per_token

    flops = flops_per_token(preset(o["preset"])).forward
    head = 2 * preset(o["preset"]).d_model * preset(o["preset"]).padded_vocab_size
    for length in o["prefill_lengths"]:
        whole = (flops - head) * length + head

        def floor(c: dict[str, float], rate: str, whole: float = whole) -> float:
            return whole / max(c.get(rate, 0.0), c["matmul_f32_gflops"]) / 1e6

        case = f"{o['preset']}, {length} tokens"
        for dtype in ("float32", "bfloat16", "int8"):
            rate = "matmul_f32_prepacked_gflops" if dtype == "float32" else "matmul_bf16_gflops"
            yield _Job("prefill", case, "statescan", dtype, {"length": length}, lambda c, r=rate, f=floor: f(c, r))
        for kind, dtype in (("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16"), ("q8_0", "q8_0")):
            options = {"length": length, "kind": kind}
            yield _Job("prefill", case, "llama.cpp", dtype, options, None, 1, "llama.cpp")
        yield _Job("prefill", case, "transformers", "float32", {"length": length}, None, 1, "transformers")
        yield _Job("prefill", case, "transformers", "bfloat16", {"length": length}, None, 1, "transformers")
        yield _Job("prefill", case, "mambapy pscan", "float32", {"length": length}, None, 1, "mambapy")


def _decode_jobs(o: dict[str, Any]) -> Iterable[_Job]:
    from statescan.models import preset
    from statescan.models.counters import parameter_count, state_bytes

    config = preset(o["preset"])
    weights = parameter_count(config)
    for batch in (1, 8):
        options = {"batch": batch, "count": o["decode_count"]}
        case = f"{o['preset']}, batch {batch}"

        def floor(c: dict[str, float], width: float, batch: int = batch) -> float:
            moved = weights * width + 2 * batch * state_bytes(config)
            return moved / c["read_gb_s"] / 1e6 * o["decode_count"]

        for dtype, width in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
            yield _Job("decode", case, "statescan", dtype, options, lambda c, w=width, f=floor: f(c, w))
        for kind, dtype in (("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16"), ("q8_0", "q8_0")):
            yield _Job("decode", case, "llama.cpp", dtype, {**options, "kind": kind}, None, 2, "llama.cpp")
        for dtype in ("float32", "bfloat16"):
            yield _Job("decode", case, "transformers", dtype, options, None, 1, "transformers")


def _train_jobs(o: dict[str, Any]) -> Iterable[_Job]:
    from statescan.models import preset
    from statescan.models.counters import flops_per_token

    length = o["train_length"]
    flops = flops_per_token(preset(o["preset"])).training * length
    case = f"{o['preset']}, 1 x {length}"
    for dtype, rate in (("float32", "matmul_f32_gflops"), ("bfloat16", "matmul_bf16_gflops")):
        floor = lambda c, r=rate: flops / c[r] / 1e6
        for recompute in ("none", "cheap", "block"):
            options = {"length": length, "recompute": recompute}
            yield _Job("train", case, f"statescan, recompute {recompute}", dtype, options, floor, 1)
    options = {"length": length}
    yield _Job("train", case, "transformers, compiled", "float32", options, None, 1, "transformers")
    yield _Job("train", case, "mambapy pscan", "float32", options, None, 1, "mambapy")


BENCHMARKS: dict[str, Callable[[dict[str, Any]], Iterable[_Job]]] = {
    "scan": _scan_jobs,
    "conv": _small_op_jobs("conv", "conv_shape"),
    "norm": _small_op_jobs("norm", "norm_shape"),
    "prefill": _prefill_jobs,
    "decode": _decode_jobs,
    "train": _train_jobs,
}

_FULL = {
    "preset": "130m",
    "scan_shape": [1, 2048, 1536],
    "conv_shape": [1, 2048, 1536],
    "norm_shape": [1, 2048, 768],
    "prefill_lengths": [128, 2048],
    "decode_count": 32,
    "train_length": 1024,
}
_QUICK = {
    "preset": "tiny",
    "scan_shape": [1, 256, 64],
    "conv_shape": [1, 256, 64],
    "norm_shape": [1, 256, 64],
    "prefill_lengths": [64],
    "decode_count": 4,
    "train_length": 64,
}
_IMPORTS = {"transformers": "transformers", "mambapy": "mambapy", "llama.cpp": "llama_cpp"}


def _installed(peer: str | None) -> bool:
    from importlib.util import find_spec

    return peer is None or find_spec(_IMPORTS[peer]) is not None


def _measure(job: _Job, options: dict[str, Any], threads: int) -> dict[str, Any]:
    message = {
        "bench": job.bench,
        "implementation": job.implementation,
        "dtype": job.dtype,
        "threads": threads,
        "preset": options["preset"],
        "max_seconds": options["max_seconds"],
        **job.options,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "statescan.bench.worker", json.dumps(message)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("statescan-bench "):
            return json.loads(line.removeprefix("statescan-bench "))
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"failure": reason[:300]}


def run(
    names: Iterable[str] = ("all",),
    *,
    threads: int | None = None,
    quick: bool = False,
    peers: bool = True,
    out: Path | None = None,
    only: str | None = None,
    max_seconds: float = 15.0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures the named benchmarks, ours and the peers' that are installed, and returns figures and machine facts.

    Args:
        names: of `BENCHMARKS`, or ``"all"``.
        threads: for every implementation alike; default torch's own number.
        quick: tiny shapes, to see that everything runs (its figures say nothing about speed).
        peers: also measure transformers, mambapy and llama.cpp where they are installed.
        out: JSON file to write.
        only: measure just the implementations whose name contains this.
        max_seconds: per implementation and round, warm-up apart.
        progress: called with a line before each measurement.

    Returns:
        ``{"machine": ..., "ceilings": ..., "rows": [BenchRow as a dict, ...]}``.

    Raises:
        ConfigError: an unknown benchmark.
    """
    chosen = list(BENCHMARKS) if "all" in names else list(names)
    for name in chosen:
        if name not in BENCHMARKS:
            raise ConfigError(f"bench: name must be one of {['all', *BENCHMARKS]}, got {name!r}")
    threads = threads or torch.get_num_threads()
    options: dict[str, Any] = {**(_QUICK if quick else _FULL), "max_seconds": 1.0 if quick else max_seconds}
    say = progress or (lambda _: None)
    say("this machine's ceilings")
    limits = ceilings()
    jobs = [job for name in chosen for job in BENCHMARKS[name](options)]
    jobs = [j for j in jobs if (peers or j.needs is None) and (only is None or only in j.implementation)]
    machine = {**machine_facts(), "threads": threads}
    found: list[tuple[_Job, BenchRow]] = []
    for job in jobs:
        row = BenchRow(job.bench, job.case, job.implementation, job.dtype)
        if not _installed(job.needs):
            row.failure = f"{job.needs} is not installed (pip install 'statescan[peers]')"
        found.append((job, row))
    for turn in range(max((j.rounds for j in jobs), default=0)):
        for job, row in found:
            if row.failure or turn >= (1 if quick else job.rounds):
                continue
            say(f"{job.bench}: {job.case}, {job.implementation}, {job.dtype}, round {turn + 1}")
            measured = _measure(job, options, threads)
            row.failure = measured.get("failure")
            row.samples_ms += [1e3 * s for s in measured.pop("samples", [])]
            tokens = measured.pop("tokens", None)
            row.relative_error = measured.pop("relative_error", None)
            row.peak_memory_bytes = measured.pop("peak_memory_bytes", None)
            row.notes = {k: v for k, v in measured.items() if k != "failure"}
            if row.samples_ms:
                row.milliseconds = statistics.median(row.samples_ms)
                row.best = min(row.samples_ms)
                row.tokens_per_second = tokens / row.milliseconds * 1e3 if tokens else None
                if job.floor:
                    row.floor_ms = job.floor(limits)
                    row.ratio = row.milliseconds / row.floor_ms
            if out is not None:  # after every figure: an interrupted run keeps what it measured
                _write(out, machine, limits, found)
    return _report(machine, limits, found)


def _report(machine: dict[str, Any], limits: dict[str, float], found: list[tuple[_Job, BenchRow]]) -> dict[str, Any]:
    return {"machine": machine, "ceilings": limits, "rows": [asdict(row) for _, row in found]}


def _write(out: Path, machine: dict[str, Any], limits: dict[str, float], found: list[tuple[_Job, BenchRow]]) -> None:
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps(_report(machine, limits, found), indent=1) + "\n")
