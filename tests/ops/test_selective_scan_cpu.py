"""What only the C++ scan can get wrong: its instruction sets, its threads, its exponential, its place in torch."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError, ShapeError
from statescan.ops import _native
from statescan.ops._dispatch import Facts
from statescan.ops.selective_scan.api import selective_scan
from statescan.ops.selective_scan.cpu import refuses
from statescan.ops.selective_state_update.api import selective_state_update

pytestmark = pytest.mark.skipif(
    _native.unavailable_reason() is not None, reason=f"C++ kernels: {_native.unavailable_reason()}"
)


def _inputs(
    batch: int = 2, length: int = 70, channels: int = 72, states: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    state = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "u": random(batch, length, channels).to(dtype),
        "dt": (random(batch, length, channels) * 0.5 - 1).to(dtype),
        "A": -4 * random(channels, states).abs().to(state),
        "B": random(batch, length, states).to(dtype),
        "C": random(batch, length, states).to(dtype),
        "D": random(channels).to(state),
        "z": random(batch, length, channels).to(dtype),
        "dt_bias": random(channels).to(state),
        "initial_state": random(batch, channels, states).to(state),
    }


def _everything(inputs: dict[str, Tensor], backend: str = "cpu") -> dict[str, Tensor]:
    """y, the final state and every gradient."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y, final_state = selective_scan(**leaves, dt_softplus=True, return_final_state=True, backend=backend)  # type: ignore[arg-type]
    assert final_state is not None
    g = torch.Generator().manual_seed(4)
    dy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    dfinal = torch.randn(final_state.shape, generator=g, dtype=torch.float64).to(final_state.dtype)
    torch.autograd.backward((y, final_state), (dy, dfinal))
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    assert all(value is not None for value in gradients.values())
    return {"y": y.detach(), "final_state": final_state.detach(), **gradients}  # type: ignore[dict-item]


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def _within_budget(inputs: dict[str, Tensor]) -> None:
    """Twice (the reference's own error in the same precision + one rounding of the output), against float64."""
    truth = _everything({name: value.double() for name, value in inputs.items()}, "reference")
    same = _everything(inputs, "reference")
    for name, value in _everything(inputs).items():
        budget = 2 * (_relative(same[name], truth[name]) + torch.finfo(value.dtype).eps / 2)
        assert _relative(value, truth[name]) <= budget, name


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_stays_within_the_budget(isa: str) -> None:
    if os.environ.get("_STATESCAN_TEST_ISA") == isa:  # the child
        assert _native.library().isa == isa
        _within_budget(_inputs(1, 37, 72, 16))
        _within_budget(_inputs(2, 33, 21, 7, torch.bfloat16))
        _within_budget(_inputs(1, 34, 9, 3, torch.float16))
        return
    if os.environ.get("_STATESCAN_TEST_ISA"):
        pytest.skip("another child's")
    order = ["generic", "avx2", "avx512"]
    if _native.library().isa not in order or order.index(_native.library().isa) < order.index(isa):
        pytest.skip(f"this machine runs {_native.library().isa}")
    environment = {**os.environ, "STATESCAN_CPU_ISA": isa, "_STATESCAN_TEST_ISA": isa}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", f"{__file__}::{_THIS_TEST}[{isa}]"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert "1 passed" in child.stdout, child.stdout


_THIS_TEST = "test_every_instruction_set_stays_within_the_budget"


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 257])
@pytest.mark.parametrize("length", [1, 31, 32, 33])
def test_edges_of_blocks_and_chunks(channels: int, length: int) -> None:
    inputs = _inputs(1, length, channels, 5, torch.float64)
    reference, value = _everything(inputs, "reference"), _everything(inputs)
    for name, truth in reference.items():
        # Both are float64 with sums in another order: a few dozen roundings, no more.
        assert _relative(value[name], truth) < 64 * torch.finfo(torch.float64).eps, name


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    inputs = _inputs(3, 150, 320, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _everything(inputs)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for name, value in _everything(inputs).items():
                assert torch.equal(value, alone[name]), (threads, name)
    finally:
        torch.set_num_threads(before)


def test_a_row_does_not_depend_on_its_batch() -> None:
    inputs = _inputs(3, 50, 72, 16)
    whole = _everything(inputs)
    alone = selective_scan(
        **{name: value[1:2] if value.shape[0] == 3 else value for name, value in inputs.items()},  # type: ignore[arg-type]
        dt_softplus=True,
        return_final_state=True,
        backend="cpu",
    )
    assert torch.equal(alone.y, whole["y"][1:2])
    assert alone.final_state is not None
    assert torch.equal(alone.final_state, whole["final_state"][1:2])


def _threads_used(run: str) -> int:
    """Threads of a fresh process after `run`, less those it had before."""
    code = (
        "import os, torch\n"
        "from statescan.ops.selective_scan.api import selective_scan\n"
        "torch.set_num_threads(THREADS)\n"
        "u = torch.randn(2, 64, 512); A = -torch.rand(512, 16); B = torch.randn(2, 64, 16)\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count()\n"
        "selective_scan(u, u, A, B, B, dt_softplus=True, backend='cpu')\n"
        "print(count() - before)\n"
    ).replace("THREADS", run)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_set_num_threads_is_obeyed() -> None:
    assert _threads_used("1") == 0
    assert _threads_used("3") == 2


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_one_thread_pool_is_mapped() -> None:
    _everything(_inputs(2, 64, 256))
    maps = Path("/proc/self/maps").read_text()
    assert Path(_native.library().path).name in maps
    pools = {
        line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line or "libiomp" in line
    }
    assert len(pools) <= 1, pools


def test_the_gil_is_released() -> None:
    u = torch.randn(1, 4000, 1024)
    A, B = -torch.rand(1024, 64), torch.randn(1, 4000, 64)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        begin = time.perf_counter()
        selective_scan(u, u, A, B, B, dt_softplus=True, backend="cpu")
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    # With the lock held the other thread would get one turn at most between the two clock readings.
    assert sum(begin < t < end for t in ticks) >= 5, (begin, end, len(ticks))


def _one_step_decay(x: Tensor) -> Tensor:
    """exp(x) as the kernel computes it: one step from a state of ones, with dt = 1 and A = x."""
    ones = torch.ones(1, 1, x.numel(), dtype=x.dtype)
    nothing = torch.zeros(1, 1, 1, dtype=x.dtype)
    out = selective_scan(
        ones,
        ones,
        x[:, None],
        nothing,
        nothing,
        initial_state=torch.ones(1, x.numel(), 1, dtype=x.dtype),
        return_final_state=True,
        backend="cpu",
    )
    assert out.final_state is not None
    return out.final_state.flatten()


def test_the_exponential_is_right_to_about_an_ulp() -> None:
    # A log2(e) and its product with dt are rounded, half an ulp of x each, which exp turns into |x| ulp of the result;
    # the exponential itself adds one.
    x = torch.linspace(-80, 80, 100_003, dtype=torch.float32)
    truth = x.double().exp()
    ulps = (_one_step_decay(x).double() - truth).abs() / truth / torch.finfo(torch.float32).eps
    assert bool((ulps <= 1.0 + x.double().abs()).all()), float((ulps - x.double().abs()).max())
    assert float(ulps[x.abs() < 1].max()) < 1.5
    x = torch.linspace(-700, 700, 100_003, dtype=torch.float64)
    error = (_one_step_decay(x) - x.exp()).abs() / x.exp() / torch.finfo(torch.float64).eps
    assert float(error.max()) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_beyond_its_range(dtype: torch.dtype) -> None:
    inf = float("inf")
    x = torch.tensor([-1e4, -inf, -1e30, 0.0, 1e4, inf, float("nan"), -1.0], dtype=dtype)
    got = _one_step_decay(x)
    assert got[:6].tolist() == [0.0, 0.0, 0.0, 1.0, inf, inf]
    assert bool(got[6].isnan())
    torch.testing.assert_close(got[7], x[7].exp())


def test_deep_underflow_and_huge_steps_leave_no_nan() -> None:
    inputs = _inputs(1, 40, 40, 16)
    inputs["dt"] = inputs["dt"] * 1000
    assert all(bool(value.isfinite().all()) for value in _everything(inputs).values())
    inputs["dt"] = torch.full_like(inputs["dt"], -1e30)  # softplus gives 0: the state stands still
    value = _everything(inputs)
    assert torch.equal(value["final_state"], inputs["initial_state"])


def test_a_nan_stays_in_its_channel() -> None:
    inputs = _inputs(1, 40, 72, 16)
    clean = selective_scan(**inputs, dt_softplus=True, backend="cpu").y  # type: ignore[arg-type]
    inputs["u"][0, 20, 17] = float("nan")
    y = selective_scan(**inputs, dt_softplus=True, backend="cpu").y  # type: ignore[arg-type]
    other = [c for c in range(72) if c != 17]
    assert torch.equal(y[..., other], clean[..., other])
    assert bool(y[0, 20:, 17].isnan().all())
    assert not bool(y[0, :20, 17].isnan().any())


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool) -> None:
    t = _inputs(1, 20, 24, 4)
    cu = torch.tensor([0, 7, 7, 20], dtype=torch.int32) if packed else None
    initial = torch.randn(3, 24, 4) if packed else t["initial_state"]
    B, C = t["B"].unsqueeze(2), t["C"].unsqueeze(2)
    common = (t["u"], t["dt"], t["A"], B, C, t["D"], t["z"], t["dt_bias"], True)
    forward = torch.ops.statescan.selective_scan_cpu.default
    torch.library.opcheck(forward, (*common, initial, cu, True, True))
    y, final_state, checkpoints = forward(*common, initial, cu, True, True)
    torch.library.opcheck(
        torch.ops.statescan.selective_scan_cpu_backward.default,
        (torch.randn_like(y), torch.randn_like(final_state), *common, cu, checkpoints, True),
    )


def test_opcheck_of_the_update() -> None:
    importlib.import_module("statescan.ops.selective_state_update.cpu")  # registers the ops
    t = {
        name: value[:, 0] if value.dim() == 3 and name != "initial_state" else value
        for name, value in _inputs(2, 1).items()
    }
    B, C = t["B"].unsqueeze(1), t["C"].unsqueeze(1)
    args = (t["initial_state"], t["u"], t["dt"], t["A"], B, C, t["D"], t["z"], t["dt_bias"], True)
    torch.library.opcheck(torch.ops.statescan.selective_state_update_cpu.default, args)
    torch.library.opcheck(torch.ops.statescan.selective_state_update_cpu_inplace.default, args)


def test_compiles_whole() -> None:
    inputs = _inputs(1, 20, 24, 4)

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip(inputs, values, strict=True))
        out = selective_scan(**named, dt_softplus=True, return_final_state=True, backend="cpu")  # type: ignore[arg-type]
        assert out.final_state is not None
        return out.y.square().sum() + out.final_state.sum()

    def run(function: object) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in inputs.values()]
        value = function(*leaves)  # type: ignore[operator]
        return (value.detach(), *torch.autograd.grad(value, leaves))

    # aot_eager: what is asked is that tracing goes through, not what another compiler makes of the sum of squares.
    for got, wanted in zip(run(torch.compile(loss, fullgraph=True, backend="aot_eager")), run(loss), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_second_derivative_is_refused_in_words() -> None:
    inputs = {name: value.requires_grad_() for name, value in _inputs(1, 9, 8, 4).items()}
    y = selective_scan(**inputs, dt_softplus=True, backend="cpu").y  # type: ignore[arg-type]
    (du,) = torch.autograd.grad(y.sum(), inputs["u"], create_graph=True)
    with pytest.raises(BackendUnavailableError, match="backend='torch'"):
        du.sum().backward()


def test_refusals_name_the_cure() -> None:
    for facts in (Facts("cuda", torch.float32), Facts("cpu", torch.float32, complex_A=True)):
        refusal = refuses(facts)
        assert refusal is not None
        assert "backend='torch'" in refusal
    assert refuses(Facts("cpu", torch.bfloat16)) is None


def test_bad_boundaries_are_caught_where_nobody_looked_before() -> None:
    t = _inputs(1, 20, 24, 4)
    op = torch.ops.statescan.selective_scan_cpu.default
    for boundaries in ([0, 12, 7, 20], [0, 19], [1, 20], [0, 40]):
        cu = torch.tensor(boundaries, dtype=torch.int32)
        with pytest.raises(ShapeError, match="cu_seqlens"):
            op(
                t["u"],
                t["dt"],
                t["A"],
                t["B"].unsqueeze(2),
                t["C"].unsqueeze(2),
                *(None,) * 3,
                True,
                None,
                cu,
                False,
                False,
            )


def test_update_in_place_writes_that_state() -> None:
    t = {
        name: value[:, 0] if value.dim() == 3 and name != "initial_state" else value
        for name, value in _inputs(2, 1).items()
    }
    state = t.pop("initial_state")
    fresh = selective_state_update(state, **t, dt_softplus=True, backend="cpu")  # type: ignore[arg-type]
    for given in (state.clone(), state.clone().transpose(1, 2).contiguous().transpose(1, 2)):
        out = selective_state_update(given, **t, dt_softplus=True, inplace=True, backend="cpu")  # type: ignore[arg-type]
        assert out.state is given
        assert torch.equal(given, fresh.state)
        assert torch.equal(out.y, fresh.y)
