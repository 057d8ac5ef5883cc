"""A GPU's facts, its limits, and the time of work on it."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = ["GpuSamples", "gpu_ceilings", "gpu_facts", "gpu_samples"]

# Special functions and float32 lanes a clock and multiprocessor, by compute capability (CUDA C++ Programming Guide,
# throughput of native arithmetic instructions).
_SPECIAL = 16
_FMA = {(8, 0): 64}
_FMA_OTHERS = 128


class GpuSamples(NamedTuple):
    """seconds: of each repetition; how: ``"graph"`` or ``"events"``, and why no graph could be taken, if one was
    wanted; peak_bytes: the most memory that was allocated while it ran, inputs included."""

    seconds: list[float]
    how: str
    peak_bytes: int


def gpu_samples(
    make: Callable[[], Callable[[], Any]],
    *,
    graph: bool = True,
    cold: bool = True,
    warmup: int = 3,
    repeats: int = 40,
    max_seconds: float = 1.0,
) -> GpuSamples:
    """Times a call on the current GPU between events.

    Args:
        make: gives the call; run once on the measuring stream (so that autograd remembers that stream).
        graph: replay a CUDA graph of the call, so that launches cost nothing; without one where capture fails.
        cold: overwrite the second-level cache before each repetition.
        warmup: calls before anything is timed (compilation, caches, the allocator).
        repeats: at most so many, fewer where they would take longer than `max_seconds`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    flush = _flush_buffer() if cold else None
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(warmup):
            call()
        stream.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run, how = call, "events"
        if graph:
            captured = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(captured, stream=stream):
                    call()
                run, how = captured.replay, "graph"
            except RuntimeError as problem:
                how = f"events (no graph: {str(problem).splitlines()[0][:120]})"
                torch.cuda.synchronize()
        run()
        stream.synchronize()
        begin = time.perf_counter()
        run()
        stream.synchronize()
        once = max(time.perf_counter() - begin, 1e-5) + (1e-4 if cold else 0)
        count = max(3, min(repeats, int(max_seconds / once)))
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in pairs:
            if flush is not None:
                flush.zero_()
            start.record(stream)
            run()
            end.record(stream)
        stream.synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    seconds = [start.elapsed_time(end) / 1e3 for start, end in pairs]
    return GpuSamples(seconds, how, torch.cuda.max_memory_allocated())


def _flush_buffer() -> torch.Tensor:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    size = 2 * int(getattr(properties, "L2_cache_size", 0) or 64 * 2**20)
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def _query(fields: str) -> dict[str, str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    which = str(torch.cuda.current_device())
    # The index that nvidia-smi counts by is torch's only where CUDA_VISIBLE_DEVICES hides none; the uuid always fits.
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    if uuid is not None:
        which = f"GPU-{uuid}"
    try:
        done = subprocess.run(
            [program, f"--id={which}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    names = fields.split(",")
    return dict(zip(names, values, strict=True)) if done.returncode == 0 and len(values) == len(names) else {}


def gpu_facts() -> dict[str, Any]:
    """What a GPU's figure depends on: card, clocks, driver, versions. Call it while the GPU is warm."""
    from importlib.metadata import PackageNotFoundError, version

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    asked = _query("driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,power.limit,temperature.gpu")
    versions = {}
    for name in ("statescan", "torch", "triton", "cuda-core", "transformers", "mamba-ssm", "causal-conv1d"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(int(getattr(properties, "L2_cache_size", 0)) / 2**20),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": asked.get("driver_version"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "clock_mhz": {key: asked.get(f"clocks.{name}") for key, name in (("max", "max.sm"), ("memory", "max.mem"))},
        "power_limit_w": asked.get("power.limit"),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def gpu_ceilings() -> dict[str, float]:
    """This GPU's own limits, in 1e9 a second.

    Returns:
        copy_gb_s: device to device, bytes read and written, 2 GiB (or an eighth of the memory). matmul_bf16_gflops,
        matmul_f32_gflops (without tf32): 8192 cubed (f32: 4096). clock_ghz: the highest that the driver allows, else
        measured. special_g_s, fma_g_s: counted, what a clock and multiprocessor allows times the clock.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found: dict[str, float] = {}

    def best(call: Callable[[], Any], repeats: int) -> float:
        return min(gpu_samples(lambda: call, graph=False, cold=False, repeats=repeats).seconds)

    size = min(2**31, properties.total_memory // 8)
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = lambda source=source, target=target: target.copy_(source)
    found["copy_gb_s"] = 2 * size / best(copy, 10) / 1e9
    del source, target, copy
    for name, dtype, n in (("matmul_bf16_gflops", torch.bfloat16, 8192), ("matmul_f32_gflops", torch.float32, 4096)):
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)  # torch's default keeps tf32 off
        found[name] = 2.0 * n**3 / best(product, 20) / 1e9
    found["clock_ghz"] = _clock_ghz()
    units = properties.multi_processor_count * found["clock_ghz"]
    found["special_g_s"] = _SPECIAL * units
    found["fma_g_s"] = _FMA.get((properties.major, properties.minor), _FMA_OTHERS) * units
    torch.cuda.empty_cache()
    return found


def _clock_ghz() -> float:
    asked = _query("clocks.max.sm").get("clocks.max.sm", "")
    if asked.replace(".", "").isdigit():
        return float(asked) / 1e3
    cycles = 20_000_000
    return cycles / min(gpu_samples(lambda: lambda: torch.cuda._sleep(cycles), graph=False, repeats=5).seconds) / 1e9
