"""Boundaries of packed sequences that only a graph meets: wrong ones stop the program, on every backend, in words.

A kernel that stops takes its process along, so each case is a process of its own.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from statescan.testing import refusal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

PROGRAM = """
import sys
import torch
from statescan.ops import causal_conv1d, selective_scan

op, backend, way, values = sys.argv[1], sys.argv[2], sys.argv[3], [int(v) for v in sys.argv[4].split()]
torch.manual_seed(0)
u = torch.randn(1, 10, 64, device="cuda", requires_grad=True)
B = torch.randn(1, 10, 16, device="cuda")
A, weight = -torch.ones(64, 16, device="cuda"), torch.randn(64, 4, device="cuda")
state = torch.zeros(3, *((64, 16) if op == "selective_scan" else (3, 64)), device="cuda")

def run(cu):
    if op == "selective_scan":
        return selective_scan(u, u, A, B, B, dt_softplus=True, initial_state=state, cu_seqlens=cu, backend=backend).y
    return causal_conv1d(u, weight, initial_state=state, cu_seqlens=cu, backend=backend).y

right = torch.tensor([0, 5, 5, 10], dtype=torch.int32, device="cuda")
wrong = torch.tensor(values, dtype=torch.int32, device="cuda")
# where a graph is captured all is done on its stream: autograd goes back to the one on which it first met a tensor
torch.cuda.synchronize()
stream = torch.cuda.Stream() if way == "captured" else torch.cuda.current_stream()
torch.cuda.set_stream(stream)
expected = run(right)
torch.autograd.grad(expected.sum(), u)
torch.cuda.synchronize()
if way == "compiled":
    graph = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(graph(right), expected)
    print("right ones pass", flush=True)
    torch.autograd.grad(graph(wrong).sum(), u)
else:
    graph, cu = torch.cuda.CUDAGraph(), right.clone()
    with torch.cuda.graph(graph, stream=stream):
        y = run(cu)
        gradient = torch.autograd.grad(y.sum(), u)
    graph.replay()
    torch.testing.assert_close(y, expected)
    print("right ones pass", flush=True)
    cu.copy_(wrong)
    graph.replay()
torch.cuda.synchronize()
print("went on")
"""

# too short, no 0 in front, falling, negative, too long: another for each op, backend and way, all for the scan's own
WRONG = ("0 5 5 8", "2 5 5 10", "0 7 4 10", "0 -3 5 10", "0 4 4 20")
WAYS = list(
    itertools.product(("selective_scan", "causal_conv1d"), ("cuda", "triton", "torch"), ("compiled", "captured"))
)
CASES = [(*way, WRONG[number % len(WRONG)]) for number, way in enumerate(WAYS)]
CASES += [("selective_scan", "cuda", "captured", wrong) for wrong in WRONG if wrong != CASES[1][3]]


@pytest.mark.parametrize(("op", "backend", "way", "wrong"), CASES)
def test_wrong_boundaries_stop_a_graph(op: str, backend: str, way: str, wrong: str) -> None:
    reason = refusal(op, backend, device="cuda", d_state=16)
    if reason is not None:
        pytest.skip(reason)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, op, backend, way, wrong], capture_output=True, text=True, timeout=300
    )
    said = run.stdout + run.stderr
    assert "right ones pass" in said, said
    assert run.returncode != 0
    assert "went on" not in said
    # in plain PyTorch an index out of bounds may be found before
    words = "cu_seqlens must go from 0 to the length" if backend != "torch" else "assert"
    assert words in said, said
