"""Timing and the machine's facts."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["ceilings", "machine_facts", "peak_memory_bytes", "seconds_per_call"]


def seconds_per_call(
    call: Callable[[], Any], *, warmup: int = 2, repeats: int = 10, max_seconds: float = 20.0
) -> list[float]:
    """Wall-clock seconds of each of up to `repeats` calls after `warmup` ones; stops early past `max_seconds`."""
    for _ in range(warmup):
        call()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < repeats and (not samples or time.perf_counter() - begin < max_seconds):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def peak_memory_bytes() -> int:
    """Largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine_facts() -> dict[str, Any]:
    """What a figure depends on: processor, cores, threads, versions, instruction set, GPU."""
    from importlib.metadata import PackageNotFoundError, version

    from statescan.ops import _native

    versions = {}
    for name in ("statescan", "torch", "transformers", "mambapy", "llama-cpp-python"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    native = _native.unavailable_reason()
    return {
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_family_model": _cpu_family(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_kernels": native or _native.library().isa,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_family() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    found = {}
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("cpu family", "model") and key.strip() not in found:
            found[key.strip()] = value.strip()
    return f"family {found.get('cpu family', '?')} model {found.get('model', '?')}"


def ceilings(mebibytes: int = 512) -> dict[str, float]:
    """This machine's own limits, measured: memory read, float32 and bf16 matrix products, torch's exponential.

    Args:
        mebibytes: read for the memory's rate; what fits into a cache measures that.

    Returns:
        read_gb_s, matmul_f32_gflops, matmul_f32_prepacked_gflops, matmul_bf16_gflops, exp_g_s.
    """
    generator = torch.Generator().manual_seed(0)

    def best(call: Callable[[], Any], repeats: int = 7) -> float:
        return min(seconds_per_call(call, warmup=2, repeats=repeats))

    big = torch.empty(mebibytes * 2**20 // 4).uniform_(generator=generator)
    found = {"read_gb_s": big.numel() * 4 / best(big.sum) / 1e9}
    sample = big[: big.numel() // 3]
    found["exp_g_s"] = sample.numel() / best(lambda: torch.exp(sample)) / 1e9
    rows, inner, columns = 2048, 768, 3072
    x, w = torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator)
    flops = 2.0 * rows * inner * columns
    found["matmul_f32_gflops"] = flops / best(lambda: torch.nn.functional.linear(x, w)) / 1e9
    xb, wb = x.bfloat16(), w.bfloat16()
    found["matmul_bf16_gflops"] = flops / best(lambda: torch.nn.functional.linear(xb, wb)) / 1e9
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(w, rows)
        call = torch.ops.mkldnn._linear_pointwise
        found["matmul_f32_prepacked_gflops"] = flops / best(lambda: call(x, packed, None, "none", [], "")) / 1e9
    except (AttributeError, RuntimeError):
        pass
    return found
