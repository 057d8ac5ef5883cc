"""Measures a list of jobs in this process, one JSON line a job: ``python -m statescan.bench.device_worker < jobs``.

The jobs share the process, since a GPU's context and compiled kernels take seconds to make; one that ends the process
is reported by whoever started it, who starts another with the rest.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from statescan.bench import model_runs, subjects
from statescan.bench.measure import seconds_per_call
from statescan.bench.subjects import Verdict, worst

__all__ = ["MARK", "main", "measure"]

MARK = "statescan-bench "
_OPS = {
    "scan": subjects.scan,
    "conv": subjects.conv,
    "norm": subjects.norm,
    "attention": subjects.attention,
    "block": subjects.block,
}
_MODELS = {
    "train": model_runs.train,
    "generate": model_runs.generate,
    "prefill": model_runs.prefill,
    "read_long": model_runs.read_long,
}
Measured = dict[str, Any]


def measure(job: Mapping[str, Any]) -> Measured:
    """Checks and times one job; ``{"failure": ...}`` where its result is wrong or it can't run.

    Args:
        job: kind, implementation, dtype, device, max_seconds, and the kind's own options.
    """
    try:
        measured = _measure_op(job) if job["kind"] in _OPS else _MODELS[job["kind"]](job)
    except Exception as problem:  # whatever a peer or a backend raises is that row's failure, not the run's
        if isinstance(problem, torch.cuda.OutOfMemoryError):
            return {"failure": "out of memory"}
        text = " ".join(str(problem).split())
        return {"failure": f"{type(problem).__name__}: {text}"[:300], "fatal": "CUDA error" in text}
    verdicts: dict[str, Verdict] = measured.pop("verdicts")
    name, verdict = worst(verdicts)
    if not verdict.error <= verdict.limit:
        return {
            "failure": f"wrong result: {name} is off by {verdict.error:.2e}, {verdict.limit:.2e} is allowed",
            "errors": {k: list(v) for k, v in verdicts.items()},
        }
    measured["relative_error"], measured["error_limit"] = verdict
    measured["errors"] = {k: list(v) for k, v in verdicts.items()}
    return measured


def _measure_op(job: Mapping[str, Any]) -> Measured:
    subject, mode, seconds = _OPS[job["kind"]](job), job["mode"], job["max_seconds"]
    verdicts = subject.verdicts(mode)
    bad = worst(verdicts)[1]
    if not bad.error <= bad.limit:
        return {"verdicts": verdicts}
    if job["device"] == "cpu":
        call = subject.call(mode)
        return {"verdicts": verdicts, "samples": seconds_per_call(call, repeats=20, max_seconds=seconds)}
    from statescan.bench.gpu import gpu_samples

    torch.cuda.empty_cache()
    cold = gpu_samples(lambda: subject.call(mode), graph=subject.graph, max_seconds=seconds)
    found: Measured = {"verdicts": verdicts, "samples": cold.seconds, "how": cold.how}
    if job["kind"] == "block":
        found["peak_memory_bytes"] = cold.peak_bytes
    if min(cold.seconds) < 1e-3:  # where the second-level cache may hold a part of the inputs
        warm = gpu_samples(lambda: subject.call(mode), graph=subject.graph, cold=False, max_seconds=seconds)
        found["warm_samples"] = warm.seconds
    return found


def _clear(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    request = json.load(sys.stdin)
    device = request["device"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if device == "cpu":
        torch.set_num_threads(request["threads"])
    for job in request["jobs"]:
        if job["kind"] == "machine":
            from statescan.bench.gpu import gpu_ceilings, gpu_facts

            measured: Measured = {"ceilings": gpu_ceilings(), "facts": gpu_facts()}
        else:
            start = time.perf_counter()
            measured = measure(job)
            measured["took_seconds"] = round(time.perf_counter() - start, 2)
        print(MARK + json.dumps(measured), flush=True)
        if measured.get("fatal"):
            return  # the context is lost; the rest needs a new process
        _clear(device)


if __name__ == "__main__":
    main()
