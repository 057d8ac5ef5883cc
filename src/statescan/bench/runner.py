"""What `statescan bench` runs: the list of measurements, the processes, the table and the file."""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from statescan.bench.device_jobs import DEVICE_BENCHMARKS, DeviceJob, device_jobs
from statescan.bench.measure import ceilings, machine_facts
from statescan.errors import BackendUnavailableError, ConfigError
from statescan.files import write_json

__all__ = ["BENCHMARKS", "BenchRow", "run"]


@dataclass
class BenchRow:
    """One implementation of one benchmark.

    Args:
        bench: name of the benchmark. case: its shape and mode. implementation: ours or the peer's.
        dtype: of the activations, or of the stored weights when decoding.
        milliseconds: median over all samples of all rounds; best: the smallest; spread: between the quartiles.
        warm_milliseconds: the same on a GPU with the inputs where the call before left them, in its cache.
        tokens_per_second: for the model's benchmarks.
        relative_error: of the output against the float64 reference (ops) or our float32 model (CPU prefill, decode);
            where gradients are checked too, that of the tensor nearest to its limit.
        error_limit: what that may be: a run past it gives no figure.
        floor_ms: the least time that this machine's measured ceilings allow; ratio: milliseconds over it.
        floors: milliseconds of each part of the floor, which is the largest of them.
        failure: why there is no figure.
        notes: whatever else was measured, and the job's own options (shape, mode, batch, ...).
    """

    bench: str
    case: str
    implementation: str
    dtype: str
    milliseconds: float | None = None
    best: float | None = None
    spread: float | None = None
    warm_milliseconds: float | None = None
    tokens_per_second: float | None = None
    relative_error: float | None = None
    error_limit: float | None = None
    peak_memory_bytes: int | None = None
    floor_ms: float | None = None
    ratio: float | None = None
    floors: dict[str, float] = field(default_factory=dict)
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
                if "mambapy" in name:
                    needs = "mambapy"  # without it transformers runs its loop under this name
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
_IMPORTS = {
    "transformers": "transformers",
    "mambapy": "mambapy",
    "llama.cpp": "llama_cpp",
    "mamba_ssm": "mamba_ssm",
    "causal_conv1d": "causal_conv1d",
}
_CURES = {
    "transformers": "pip install 'statescan[peers]'",
    "mambapy": "pip install 'statescan[peers]'",
    "llama.cpp": "pip install 'statescan[peers]'",
    "mamba_ssm": "pip install mamba-ssm; it builds with a CUDA toolkit",
    "causal_conv1d": "pip install causal-conv1d; it builds with a CUDA toolkit",
}


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


def _seconds_for(job: DeviceJob, device: str) -> float:
    """After which a job is given up: it hangs, or its peer takes longer than anybody waits for."""
    whole = job.kind in ("train", "generate", "prefill", "read_long")
    return (90.0 if whole else 40.0) if device == "cuda" else (600.0 if whole else 120.0)


def _ask(jobs: list[dict[str, Any]], device: str, threads: int, seconds: list[float]) -> Iterator[dict[str, Any]]:
    """One measurement a job, from worker processes: where one ends early its job has failed; another takes the rest."""
    done = 0
    while done < len(jobs):
        request = json.dumps({"device": device, "threads": threads, "jobs": jobs[done:]})
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if device == "cpu" else None
        worker = subprocess.Popen(
            [sys.executable, "-m", "statescan.bench.device_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        errors: queue.Queue[str | None] = queue.Queue()
        assert worker.stdin is not None
        readers = [
            threading.Thread(target=_pass_on, args=(worker.stdout, lines.put), daemon=True),
            threading.Thread(target=_pass_on, args=(worker.stderr, errors.put), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            with worker.stdin:
                worker.stdin.write(request)
            start = done
            while done < len(jobs):
                try:
                    line = lines.get(timeout=seconds[done])
                except queue.Empty:
                    yield {"failure": f"no result within {seconds[done]:.0f} s"}
                    done += 1
                    break
                if line is None:
                    worker.wait()
                    readers[1].join(timeout=5)
                    # A worker that stops by itself, after a lost context, has reported that job already.
                    if done == start or worker.returncode != 0:
                        yield {"failure": (_last_line(errors) or f"exit code {worker.returncode}")[:300]}
                        done += 1
                    break
                if line.startswith(_MARK):
                    yield json.loads(line.removeprefix(_MARK))
                    done += 1
        except BrokenPipeError:
            yield {"failure": (_last_line(errors) or "the worker ended at once")[:300]}
            done += 1
        finally:
            worker.kill()
            worker.wait()


_MARK = "statescan-bench "


def _last_line(lines: queue.Queue[str | None]) -> str:
    said = ""
    while not lines.empty():
        line = (lines.get() or "").strip()
        said = line or said
    return said


def _pass_on(stream: Any, give: Callable[[str | None], Any]) -> None:
    for line in stream:
        give(line)
    give(None)


def _fill(row: BenchRow, measured: dict[str, Any], floors: dict[str, float]) -> None:
    """Puts one measurement into its row."""
    row.failure = measured.pop("failure", None)
    row.samples_ms += [1e3 * s for s in measured.pop("samples", [])]
    warm = [1e3 * s for s in measured.pop("warm_samples", [])]
    tokens = measured.pop("tokens", None)
    row.relative_error = measured.pop("relative_error", None)
    row.error_limit = measured.pop("error_limit", None)
    row.peak_memory_bytes = measured.pop("peak_memory_bytes", None)
    row.notes |= {k: v for k, v in measured.items() if k != "fatal"}
    if not row.samples_ms:
        return
    row.milliseconds, row.best = statistics.median(row.samples_ms), min(row.samples_ms)
    if len(row.samples_ms) > 1:
        low, _, high = statistics.quantiles(row.samples_ms, n=4, method="inclusive")
        row.spread = high - low
    row.warm_milliseconds = statistics.median(warm) if warm else None
    row.tokens_per_second = tokens / row.milliseconds * 1e3 if tokens else None
    if floors:
        row.floors, row.floor_ms = floors, max(floors.values())
        row.ratio = row.milliseconds / row.floor_ms


def _device_rows(
    jobs: list[DeviceJob],
    device: str,
    threads: int,
    max_seconds: float,
    limits: dict[str, float],
    machine: dict[str, Any],
    say: Callable[[str], None],
    keep: Callable[[list[BenchRow]], None],
) -> list[BenchRow]:
    """Measures jobs in worker processes; on a GPU the first of them also fills `machine` and `limits`."""
    rows = [BenchRow(j.bench, j.case, j.implementation, j.dtype, notes=dict(j.options)) for j in jobs]
    waiting: list[tuple[DeviceJob, BenchRow]] = []
    for job, row in zip(jobs, rows, strict=True):
        if _installed(job.needs):
            waiting.append((job, row))
        else:
            row.failure = f"{job.needs} is not installed ({_CURES[job.needs or '']})"
    shared = {"device": device, "max_seconds": max_seconds}
    asked: list[dict[str, Any]] = [
        {**shared, "kind": job.kind, "implementation": job.implementation, "dtype": job.dtype, **job.options}
        for job, _ in waiting
    ]
    seconds = [_seconds_for(job, device) for job, _ in waiting]
    gpu = device == "cuda"
    answers = _ask(
        [{"kind": "machine"}, *asked] if gpu else asked, device, threads, [120.0, *seconds] if gpu else seconds
    )
    if gpu:
        say("this GPU's ceilings")
        first = next(answers)
        if "failure" in first:
            raise BackendUnavailableError(f"bench: the GPU can't be measured: {first['failure']}")
        limits |= first["ceilings"]
        machine |= first["facts"]
    for job, row in waiting:
        say(f"{job.bench}: {job.case}, {job.implementation}, {job.dtype}")
        _fill(row, next(answers), job.cost.floors(limits, job.dtype) if job.cost else {})
        keep(rows)  # after every figure: an interrupted run keeps what it measured
    answers.close()  # type: ignore[attr-defined]
    return rows


def resolve_device(device: str | None) -> str:
    """``"cuda"`` or ``"cpu"``; None takes the GPU where torch sees one.

    Raises:
        ConfigError: another name. BackendUnavailableError: there is no GPU.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"bench: --device must be 'cuda' or 'cpu', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError("bench: --device is cuda, but torch sees no CUDA device; use --device cpu")
    return device


def run(
    names: Iterable[str] = ("all",),
    *,
    device: str | None = None,
    threads: int | None = None,
    quick: bool = False,
    peers: bool = True,
    out: Path | None = None,
    only: str | None = None,
    case: str | None = None,
    model: str | None = None,
    max_seconds: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures the named benchmarks, ours and the peers' that are installed, and returns figures and machine facts.

    Args:
        names: of `BENCHMARKS` and of what is measured on this device, or ``"all"``.
        device: ``"cuda"`` or ``"cpu"``; default the GPU where torch sees one.
        threads: on a CPU, for every implementation alike; default torch's own number.
        quick: tiny shapes, to see that everything runs (its figures say nothing about speed).
        peers: also measure the peers that are installed.
        out: JSON file to write.
        only: measure just the implementations whose name contains this.
        case: measure just the cases (shape and mode, as the table shows them) that contain this.
        model: a preset in place of those that "generate" measures.
        max_seconds: of repetitions of one implementation (CPU: of each round); default 15 on a CPU, 1 on a GPU.
        progress: called with a line before each measurement.

    Returns:
        ``{"machine": ..., "ceilings": ..., "rows": [BenchRow as a dict, ...]}``.

    Raises:
        ConfigError: an unknown benchmark or device.
        BackendUnavailableError: the GPU asked for is not there.
    """
    device = resolve_device(device)
    here = DEVICE_BENCHMARKS[device] if device == "cuda" else (*BENCHMARKS, *DEVICE_BENCHMARKS["cpu"])
    every = tuple(dict.fromkeys((*here, *BENCHMARKS, *DEVICE_BENCHMARKS["cuda"])))
    names = list(names)
    chosen = list(here) if "all" in names else names
    for name in chosen:
        if name not in every:
            raise ConfigError(f"bench: name must be one of {['all', *here]}, got {name!r}")
        if name not in here:
            other = "cpu" if device == "cuda" else "cuda"
            raise ConfigError(f"bench: {name!r} is measured on a {other} device only; use --device {other}")
    if model is not None and chosen != ["generate"]:
        raise ConfigError(f"bench: a model is named for 'generate' alone, got {model!r} with {chosen}; leave it out")
    threads = threads or torch.get_num_threads()
    seconds = max_seconds or (0.2 if quick else 1.0 if device == "cuda" else 15.0)
    say = progress or (lambda _: None)
    limits: dict[str, float] = {}
    machine: dict[str, Any] = {"device": device, "quick": quick, **machine_facts(), "threads": threads}

    def wanted(job: Any) -> bool:
        named = (only is None or only in job.implementation) and (case is None or case in job.case)
        return named and (peers or job.needs is None)  # torch's own functions need nobody

    found: list[BenchRow] = []

    def keep(rows: list[BenchRow]) -> None:
        if out is not None:
            _write(out, machine, limits, [*found, *rows])

    if device == "cpu":
        say("this machine's ceilings")
        limits |= ceilings(32) if quick else ceilings()
        options: dict[str, Any] = {**(_QUICK if quick else _FULL), "max_seconds": 1.0 if quick else seconds}
        jobs = [job for name in chosen if name in BENCHMARKS for job in BENCHMARKS[name](options) if wanted(job)]
        found += _process_rows(jobs, options, threads, quick, limits, say, keep)
    those = [name for name in chosen if name in DEVICE_BENCHMARKS[device]]
    jobs_here = [job for name in those for job in device_jobs(name, device, quick, model) if wanted(job)]
    found += _device_rows(jobs_here, device, threads, seconds, limits, machine, say, keep)
    keep([])
    return _report(machine, limits, found)


def _process_rows(
    jobs: list[_Job],
    options: dict[str, Any],
    threads: int,
    quick: bool,
    limits: dict[str, float],
    say: Callable[[str], None],
    keep: Callable[[list[BenchRow]], None],
) -> list[BenchRow]:
    """Measures jobs on the CPU, each in a process of its own, in interleaved rounds."""
    rows = [BenchRow(job.bench, job.case, job.implementation, job.dtype) for job in jobs]
    for job, row in zip(jobs, rows, strict=True):
        if not _installed(job.needs):
            row.failure = f"{job.needs} is not installed ({_CURES[job.needs or '']})"
    for turn in range(max((j.rounds for j in jobs), default=0)):
        for job, row in zip(jobs, rows, strict=True):
            if row.failure or turn >= (1 if quick else job.rounds):
                continue
            say(f"{job.bench}: {job.case}, {job.implementation}, {job.dtype}, round {turn + 1}")
            floors = {"time": job.floor(limits)} if job.floor else {}
            _fill(row, _measure(job, options, threads), floors)
            keep(rows)  # after every figure: an interrupted run keeps what it measured
    return rows


def _report(machine: dict[str, Any], limits: dict[str, float], rows: list[BenchRow]) -> dict[str, Any]:
    return {"machine": machine, "ceilings": limits, "rows": [asdict(row) for row in rows]}


def _write(out: Path, machine: dict[str, Any], limits: dict[str, float], rows: list[BenchRow]) -> None:
    write_json(out, _report(machine, limits, rows))
