"""What the scan's cuda backend hands to its kernels, without a GPU.

The large kernels are stand-ins in plain PyTorch that read and write the memory which they are handed; the one that
marks packed sequences is its own source, compiled as C++.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checks import WRONG
from torch import Tensor

from statescan.errors import BackendUnavailableError, ShapeError
from statescan.ops import _cuda, selective_scan
from statescan.ops._checks import mark_checked
from statescan.ops.selective_scan import cuda as backend
from statescan.testing import ScanCase, derivatives, scan_problem

SKELETON = """
#include <cstdio>
struct Dim { unsigned x; };
static Dim blockIdx, blockDim, threadIdx;
static int stopped;
static char said[512];
#define __global__
#define __trap() (stopped = 1)
#define printf(...) snprintf(said, sizeof said, __VA_ARGS__)
SOURCE
extern "C" const char* launch(unsigned blocks, unsigned threads, const int* cu, int* starts, int* ends, int sequences,
                              int length) {
  stopped = 0;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) scan_marks(cu, starts, ends, sequences, length);
  return stopped ? said : nullptr;
}
"""


class StoppedError(Exception):
    """The kernel has stopped the program."""


@pytest.fixture(scope="module")
def marks_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """marks.cu on the CPU, thread after thread; all of them run on when one has stopped the program."""
    named = os.environ.get("CXX")
    compiler = named or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("marks")
    (folder / "marks.cpp").write_text(SKELETON.replace("SOURCE", backend._MARKS.read_text()))
    library = folder / "marks.so"
    built = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "marks.cpp")]
    subprocess.run(built, check=True, capture_output=True)
    launch = ctypes.CDLL(str(library)).launch
    launch.restype = ctypes.c_char_p
    launch.argtypes = (*(ctypes.c_uint,) * 2, *(ctypes.c_void_p,) * 3, *(ctypes.c_int,) * 2)

    def run(grid: tuple[int, int, int], cu: Tensor, starts: Tensor, ends: Tensor, *sizes: Any) -> None:
        assert cu.dtype == starts.dtype == ends.dtype == torch.int32
        assert grid[1:] == (1, 1)
        said = launch(
            grid[0], backend._NT_MARKS, *(x.data_ptr() for x in (cu, starts, ends)), *(s.value for s in sizes)
        )
        if said is not None:
            raise StoppedError(said.decode())

    return run


class Machine:
    """A GPU of 132 multiprocessors; counts launches by the kernel's name."""

    def __init__(self, marks: Callable[..., None] | None = None) -> None:
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        self.marks = marks
        self.capturing = False

    def kernel(self, file: Path, name: str, options: dict[str, int], *_: Any) -> Callable[..., None]:
        run = {"scan_forward": scan_forward, "scan_backward": scan_backward, "scan_sums": scan_sums}.get(
            name, self.marks
        )
        assert run is not None, name

        def launch(grid: tuple[int, int, int], *arguments: Any) -> None:
            if getattr(_cuda._thread, "rehearses", False):
                return
            assert grid[1] <= _cuda.MOST_BLOCKS
            assert grid[2] <= 65535
            self.launches.append((name, grid))
            if run is self.marks:
                run(grid, *arguments)
            else:
                run(options, *arguments)

        return launch


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Calls of the backend with tensors on the CPU go all the way to the launches."""
    made = Machine()
    chip = types.SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: chip)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(_cuda, "kernel", made.kernel)
    with torch.library._scoped_library("statescan", "IMPL") as library:
        library.impl("selective_scan_cuda", backend._forward_op, "CPU")
        library.impl("selective_scan_cuda_backward", backend._backward_op, "CPU")
        yield made


# What the kernels' first arguments are, see _Call.inputs.
INPUTS = (
    *("u", "u_b", "u_l", "dt", "dt_b", "dt_l", "z", "z_b", "z_l", "B", "B_b", "B_l", "B_g", "C", "C_b", "C_l", "C_g"),
    *("A", "fixed_B", "fixed_C", "D", "dt_bias", "initial_state", "starts", "ends"),
)


def problem_of(options: dict[str, int], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `selective_scan` that a launch was handed."""
    for name in ("u", "dt", "z", "B", "C"):
        if given[name] is not None:
            assert given[f"{name}_b"], given[f"{name}_l"] == given[name].stride()[:2]
    names = ("u", "dt", "A", "D", "z", "dt_bias", "initial_state")
    problem = {name: given[name] for name in names}
    for name in ("B", "C"):
        fixed = given[f"fixed_{name}"]
        assert (fixed is None) != (given[name] is None)
        problem[name] = given[name] if fixed is None else fixed
    assert bool(options["HASZ"]) == (problem["z"] is not None)
    return {**problem, "dt_softplus": bool(options["SOFTPLUS"])}


def token(u: Tensor, like: Tensor) -> Tensor:
    """Stands for the checkpoints: tells rows apart."""
    return u.sum((1, 2)).to(like.dtype).view(-1, 1, 1, 1).expand_as(like)


def scan_forward(options: dict[str, int], *arguments: Any) -> None:
    given = dict(zip(INPUTS, arguments, strict=False))
    y, y_b, y_l, final, checkpoints, *_ = arguments[len(INPUTS) :]
    assert (y_b, y_l) == y.stride()[:2]
    out = selective_scan(**problem_of(options, given), return_final_state=True, backend="reference")
    y.copy_(out.y)
    if final is not None:
        final.copy_(out.final_state)
    if checkpoints is not None:
        checkpoints.copy_(token(given["u"], checkpoints))


def scan_backward(options: dict[str, int], *arguments: Any) -> None:
    given = dict(zip(INPUTS, arguments, strict=False))
    dy, _, _, dfinal, checkpoints, *rest = arguments[len(INPUTS) :]
    gu, _, _, gdt, _, _, gz, _, _, y, _, _, gA, gB, gC, gD, gbias, ginit = rest[:18]
    assert torch.equal(checkpoints, token(given["u"], checkpoints))
    assert y is None
    for partial in (gB, gC):
        partial.zero_()
    problem = problem_of(options, given)
    for row in range(len(dy)):
        own = ("u", "dt", "z", "initial_state", *(m for m in ("B", "C") if given[m] is not None))
        one = {k: v[row : row + 1] if k in own and v is not None else v for k, v in problem.items()}
        leaves = {k: v.detach().requires_grad_() for k, v in one.items() if isinstance(v, Tensor)}
        with torch.enable_grad():
            out = selective_scan(**{**one, **leaves}, return_final_state=True, backend="reference")
            state = torch.zeros_like(out.final_state) if dfinal is None else dfinal[row : row + 1]
            found = torch.autograd.grad(
                (out.y, out.final_state), list(leaves.values()), (dy[row : row + 1], state), allow_unused=True
            )
        g = dict(zip(leaves, found, strict=True))
        for name, place in (("u", gu), ("dt", gdt), ("z", gz), ("initial_state", ginit)):
            if name in leaves:
                place[row] = g[name][0]
        gA[row, 0], gD[row, 0], gbias[row, 0] = g["A"], g.get("D", 0), g.get("dt_bias", 0)
        for name, partial in (("B", gB), ("C", gC)):
            if given[name] is None:
                partial[row, 0] = g[name]
            else:  # a block's share by position; those of the other blocks are zero
                partial[0, row] = g[name][0, :, 0]


def scan_sums(options: dict[str, int], *arguments: Any) -> None:
    pB, dB, _, _, _, _, pC, dC, _, _, _, _, pBfix, dBfix, pCfix, dCfix, gA, dA, gD, dD, gbias, dbias, *_ = arguments
    for partial, out in ((pB, dB), (pC, dC)):
        if partial is not None:
            out.copy_(partial.sum(0).view(out.shape))
    for partial, out in ((pBfix, dBfix), (pCfix, dCfix), (gA, dA), (gD, dD), (gbias, dbias)):
        if out is not None:
            out.copy_(partial.sum((0, 1)))


def on_cuda(**problem: Any) -> tuple[Tensor, Tensor | None]:
    """The backend itself on tensors that are settled already."""
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus", "initial_state", "cu_seqlens")
    problem["B"], problem["C"] = (m.unsqueeze(2) if m.dim() == 3 else m for m in (problem["B"], problem["C"]))
    return backend.selective_scan(*(problem.get(name) for name in names), True)  # type: ignore[arg-type]


CASES = {
    "every option": ScanCase(
        batch=5, length=6, d_inner=8, d_state=4, D=True, z=True, dt_bias=True, initial_state=True, dt_softplus=True
    ),
    "fixed C": ScanCase(batch=5, length=6, d_inner=8, d_state=4, C="fixed"),
    "fixed B and C": ScanCase(batch=4, length=3, d_inner=8, d_state=4, B="fixed", C="fixed", z=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_batch_above_what_a_launch_takes(name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond the grid's second axis go in further launches, with the same results and gradients."""
    problem = scan_problem(CASES[name], torch.float64)
    wanted = derivatives(lambda **p: selective_scan(**p, return_final_state=True, backend="torch"), problem)
    once = derivatives(on_cuda, problem)
    assert [launched for launched, _ in machine.launches if launched.startswith("scan_")].count("scan_forward") == 1
    machine.launches.clear()
    monkeypatch.setattr(_cuda, "MOST_BLOCKS", 2)
    pieces = derivatives(on_cuda, problem)
    rows = [2] * (CASES[name].batch // 2) + [1] * (CASES[name].batch % 2)
    for kernel in ("scan_forward", "scan_backward"):
        assert [grid[1] for launched, grid in machine.launches if launched == kernel] == rows
    assert once.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(once[key], value, msg=lambda text, key=key: f"{key}: {text}")
        torch.testing.assert_close(pieces[key], value, msg=lambda text, key=key: f"{key}, in pieces: {text}")


def test_pieces_write_where_the_caller_wants_them(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of wider tensors, as the whole layer's function gives them."""
    monkeypatch.setattr(_cuda, "MOST_BLOCKS", 2)
    problem = scan_problem(ScanCase(batch=3, length=5, d_inner=8, d_state=4), torch.float32)
    inputs = [problem[name] for name in ("u", "dt", "A")] + [problem[name].unsqueeze(2) for name in ("B", "C")]
    u, wide = inputs[0], torch.full((3, 5, 16), float("nan"))
    y, _, checkpoints = backend.launch_forward(*inputs, y=wide[..., 8:])
    assert y.data_ptr() == wide[..., 8:].data_ptr()
    torch.testing.assert_close(y, selective_scan(**problem, backend="torch").y)
    assert checkpoints.shape == (3, 1, 8, 4)
    places = torch.full((3, 5, 16), float("nan"))
    places_BC = torch.full((3, 5, 1, 8), float("nan"))
    where = {"du": places[..., :8], "ddt": places[..., 8:], "dB": places_BC[..., :4], "dC": places_BC[..., 4:]}
    du, ddt, _, dB, dC, *_ = backend.launch_backward(*inputs, dy=torch.ones_like(u), checkpoints=checkpoints, **where)
    assert [x.data_ptr() for x in (du, ddt, dB, dC)] == [x.data_ptr() for x in where.values()]
    assert places.isfinite().all()
    assert places_BC.isfinite().all()


def test_a_length_that_positions_cannot_count_is_refused(machine: Machine) -> None:
    long = 2**31 - 2**20 + 1
    u, B = torch.empty(1).expand(1, long, 1), torch.empty(1).expand(1, long, 1, 1)
    wanted = (
        f"selective_scan: u must have a length of at most {long - 1} on backend 'cuda', got {long}; "
        "cut it, and hand the final_state on as initial_state"
    )
    with pytest.raises(ShapeError, match=re.escape(wanted)):
        backend.launch_forward(u, u, torch.ones(1, 1), B, B)
    assert not machine.launches


def test_second_derivatives_are_refused_not_wrong(machine: Machine) -> None:
    problem = scan_problem(ScanCase(batch=1, length=4, d_inner=8, d_state=4), torch.float32)
    problem["u"].requires_grad_()
    y, _ = on_cuda(**problem)
    torch.autograd.grad(y.sum(), problem["u"], retain_graph=True)  # the first is there
    with pytest.raises(BackendUnavailableError, match="'cuda' has no second derivatives; use backend='torch'"):
        torch.autograd.grad(y.sum(), problem["u"], create_graph=True)


# -------------------------------------------------------------------------------------------- marks of packed sequences


def marked(values: list[int], length: int) -> tuple[list[int], list[int]]:
    """What the marks of these boundaries have to be."""
    starts, ends = [0] * length, [0] * length
    for number, (begin, end) in enumerate(pairwise(values), start=1):
        if end > begin:
            starts[begin], ends[end - 1] = number, number
    return starts, ends


def made(tensor: Tensor, length: int = 9) -> tuple[list[int], list[int]]:
    starts, ends = backend._marks(tensor, length)
    assert starts.shape == ends.shape == (length,)
    return starts.tolist(), ends.tolist()


def test_marks_are_made_once_for_the_same_boundaries(machine: Machine, marks_kernel: Callable[..., None]) -> None:
    machine.marks = marks_kernel
    values = [0, 0, 1, 4, 4, 9]  # some are empty, one of a single step
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            tensor = torch.tensor(values, dtype=torch.int32)
            assert made(tensor) == marked(values, 9)
            assert backend._marks(tensor, 9)[0] is not backend._marks(tensor, 9)[0]  # nobody said that they are right
            mark_checked(tensor, 9)
            first = backend._marks(tensor, 9)
            assert backend._marks(tensor, 9)[0] is first[0]
            machine.capturing = True
            assert backend._marks(tensor, 9)[0] is not first[0]
            machine.capturing = False
    tensor = torch.tensor(values, dtype=torch.int32)
    mark_checked(tensor, 9)
    assert made(tensor) == marked(values, 9)
    tensor[2] = 3
    assert made(tensor) == marked([0, 0, 3, 4, 4, 9], 9)


def test_marks_of_many_sequences_and_strided_boundaries(machine: Machine, marks_kernel: Callable[..., None]) -> None:
    machine.marks = marks_kernel
    sizes = torch.randint(0, 4, (1000,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    length = int(bounds[-1])
    strided = torch.stack([bounds, bounds + 1], 1)[:, 0]
    for tensor in (bounds, bounds.int(), strided, strided.int()):
        assert made(tensor, length) == marked(bounds.tolist(), length)
    assert machine.launches[-1] == ("scan_marks", (4, 1, 1))


@pytest.mark.parametrize("capturing", [False, True], ids=["compiled", "captured"])
def test_wrong_boundaries_stop_the_program(
    capturing: bool, machine: Machine, marks_kernel: Callable[..., None]
) -> None:
    """The first kernel of forward and of backward does so, before the scan's own is launched."""
    machine.marks, machine.capturing = marks_kernel, capturing
    problem = scan_problem(ScanCase(batch=1, length=10, d_inner=8, d_state=4), torch.float32)
    inputs = [problem[name] for name in ("u", "dt", "A")] + [problem[name].unsqueeze(2) for name in ("B", "C")]
    for wrong in WRONG:
        machine.launches.clear()
        packed = [*inputs, None, None, None, False, None, torch.tensor(wrong, dtype=torch.int32)]
        said = "selective_scan: cu_seqlens must go from 0 to the length of u, 10, and never fall, got"
        with pytest.raises(StoppedError, match=said):
            backend.launch_forward(*packed)
        with pytest.raises(StoppedError, match=said):
            backend.launch_backward(*packed, dy=torch.ones_like(inputs[0]), checkpoints=torch.empty(1, 1, 8, 4))
        assert {name for name, _ in machine.launches} == {"scan_marks"}


def test_wrong_boundaries_write_nothing_out_of_bounds(marks_kernel: Callable[..., None]) -> None:
    """Whatever stands there, threads that run on write inside of the marks alone; good ones never stop."""
    draw = torch.Generator().manual_seed(0)
    length, beside = 12, 40
    extremes = torch.tensor([-(2**31), -1, 0, 1, length - 1, length, length + 1, 2**31 - 1])
    stopped = 0
    for _ in range(400):
        count = int(torch.randint(2, 7, (1,), generator=draw))
        bounds = extremes[torch.randint(0, len(extremes), (count,), generator=draw)].int()
        guarded = torch.zeros(2, length + 2 * beside, dtype=torch.int32)
        starts, ends = guarded[:, beside : beside + length].unbind()
        good = bounds[0] == 0 and bounds[-1] == length and bool((bounds.diff() >= 0).all())
        sizes = (_cuda.i32(count - 1), _cuda.i32(length))
        if good and (bounds >= 0).all():
            marks_kernel((1, 1, 1), bounds, starts, ends, *sizes)
            assert (starts.tolist(), ends.tolist()) == marked(bounds.tolist(), length)
        else:
            stopped += 1
            with pytest.raises(StoppedError):
                marks_kernel((1, 1, 1), bounds, starts, ends, *sizes)
        guarded[:, beside : beside + length] = 0
        assert not guarded.any()
    assert 0 < stopped < 400
