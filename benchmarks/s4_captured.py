"""Times S4D's and S4's kernels on a GPU as replays of a CUDA graph, as a captured training step has them:

    python benchmarks/s4_captured.py --out s4-captured.json

Without the host's launches, which bound ``statescan bench s4-kernels``: d_model 512, 32 pairs of states, 16,384 lags,
float32; the public functions by backend, forward and with the gradients of A, B, C and dt, and the Triton products
alone. Median of 20 replays, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.bench.measure import machine_facts
from statescan.ops import s4_kernel, s4d_kernel
from statescan.ops.ssm_kernel import cauchy_triton, triton_vandermonde  # noqa: F401  (they register the products)

D_MODEL, PAIRS, LENGTH, SUMS = 512, 32, 16384, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("s4_captured: torch sees no CUDA device, and only there are calls captured; run it on a GPU")
    rows = {}
    for name, call in calls("cuda"):
        rows[name] = captured(call)
        print(f"{name}: {rows[name]:.3f} ms", flush=True)
    if options.out:
        shape = {"d_model": D_MODEL, "pairs": PAIRS, "length": LENGTH}
        report = {"machine": machine_facts(), "shape": shape, "milliseconds": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def captured(call: Callable[[], Any], replays: int = 20) -> float:
    """Median milliseconds of a replay."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def calls(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed, by its name."""
    torch.manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device)

    products = torch.ops.statescan
    log = -0.05 * uniform(D_MODEL, PAIRS).double(), 3 * uniform(D_MODEL, PAIRS).double()
    weight, g = (normal(D_MODEL, PAIRS), normal(D_MODEL, PAIRS)), normal(D_MODEL, LENGTH)
    yield "Vandermonde product, forward", lambda: products.vandermonde_product_triton(*log, *weight, LENGTH)
    yield "Vandermonde product, backward", lambda: products.vandermonde_product_triton_backward(*log, g)

    points = LENGTH // 2 + 1
    theta = torch.linspace(0, math.pi / 2, points, device=device)
    states = -uniform(D_MODEL, PAIRS) - 0.1, uniform(D_MODEL, PAIRS)
    v = normal(D_MODEL, SUMS, PAIRS), normal(D_MODEL, SUMS, PAIRS)
    grads = normal(D_MODEL, SUMS, points), normal(D_MODEL, SUMS, points)
    where = 2 * torch.sin(theta), torch.cos(theta)
    yield "Cauchy product, forward", lambda: products.cauchy_product_triton(*states, *v, *where)
    yield "Cauchy product, backward", lambda: products.cauchy_product_triton_backward(*states, *v, *where, *grads)

    frequency = math.pi * torch.arange(PAIRS, device=device).expand(D_MODEL, PAIRS)
    A = torch.complex(torch.full_like(frequency, -0.5), frequency).requires_grad_()
    B = torch.ones_like(A).requires_grad_()
    C = normal(D_MODEL, PAIRS, dtype=torch.complex64).requires_grad_()
    P = 0.5 * normal(D_MODEL, PAIRS, dtype=torch.complex64)
    dt = torch.exp(uniform(D_MODEL) * math.log(100) + math.log(1e-3)).requires_grad_()

    def forward(kernel: Callable[[], Tensor]) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                kernel()

        return call

    def both(kernel: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(kernel(), (A, B, C, dt), g)

    for backend in ("triton", "torch"):

        def s4d(backend: str = backend) -> Tensor:
            return s4d_kernel(A, B, C, dt, LENGTH, backend=backend)

        yield f"s4d_kernel, {backend}, forward", forward(s4d)
        yield f"s4d_kernel, {backend}, forward and backward", both(s4d)
    for backend in ("torch", "cauchy_triton", "cauchy"):

        def s4(backend: str = backend) -> Tensor:
            return s4_kernel(A, P, B, C, dt, LENGTH, backend=backend)

        yield f"s4_kernel, {backend}, forward", forward(s4)
        yield f"s4_kernel, {backend}, forward and backward", both(s4)


if __name__ == "__main__":
    main()
