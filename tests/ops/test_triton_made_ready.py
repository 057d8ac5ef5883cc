"""Triton's kernels of a backward pass are made in the forward call, where another backend can still take it. No GPU is
needed: under the interpreter nothing is compiled, and a double notes what would be."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, nop
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from statescan import ops
from statescan.errors import BackendUnavailableError
from statescan.ops import _checks, _cuda, _dispatch, _triton
from statescan.ops.add_norm import triton_norm
from statescan.ops.causal_conv1d import triton_conv
from statescan.ops.selective_scan import triton_scan
from statescan.ops.ssm_kernel import cauchy_triton, triton_products
from statescan.testing import ScanCase, scan_problem
from statescan.testing.conv import ConvCase, conv_problem

EVERY: dict[str, Any] = {"D": True, "z": True, "dt_bias": True, "initial_state": True, "dt_softplus": True}
pytestmark = pytest.mark.usefixtures("interpreted")


def specialization(value: Any) -> Any:
    """What Triton compiles for: another one is another kernel."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return "1" if value == 1 else (value % 16 == 0, value >= 1 << 31)
    return type(value)


class Machine:
    """Makes kernels: keeps which, refuses some, and keeps what is launched."""

    def __init__(self) -> None:
        self.made: set[Any] = set()
        self.launched: set[Any] = set()
        self.refuses: set[str] = set()
        self.strict = False  # nothing is made at a launch
        self.noted: Callable[[str], None] = lambda kernel: None

    def run(self, real: Callable[..., Any], kernel: Any, arguments: Any, named: dict[str, Any], warmup: bool) -> Any:
        from triton.compiler.errors import CompilationError

        name = kernel.__name__
        if warmup:
            assert not any(isinstance(x, Tensor) and x.requires_grad for x in arguments), "no tensor of the caller's"
        key = (name, *map(specialization, arguments), *sorted(named.items()))
        if name in self.refuses or (self.strict and not warmup and key not in self.made):
            raise CompilationError(None, None, "no such thing")  # type: ignore[arg-type]
        (self.made if warmup else self.launched).add(key)
        self.noted(name)
        return real()

    def names(self, keys: set[Any]) -> set[str]:
        return {name for name, *_ in keys}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    from triton.runtime.interpreter import InterpretedFunction

    double, run = Machine(), InterpretedFunction.run

    def spy(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        real = functools.partial(run, self, *arguments, grid=grid, warmup=warmup, **named)
        return double.run(real, self, arguments, named, warmup)

    monkeypatch.setattr(InterpretedFunction, "run", spy)
    monkeypatch.setattr(_cuda, "_ready", set())
    monkeypatch.setattr(_dispatch, "_broken", {})
    return double


# ----------------------------------------------------------------------------------------------------------- the calls


def leaves_of(problem: dict[str, Any]) -> dict[str, Any]:
    floats = lambda value: isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return {k: v.detach().requires_grad_() if floats(v) else v for k, v in problem.items()}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def scan(case: ScanCase, dtype: torch.dtype = torch.float32, final: bool = True) -> Any:
    return functools.partial(ops.selective_scan, return_final_state=final), scan_problem(case, dtype)


def step() -> Any:
    """With a gradient it is the scan's, over one position."""
    given = {"state": draw(2, 8, 4), "u": draw(2, 8), "dt": draw(2, 8), "A": -draw(8, 4).exp()}
    return ops.selective_state_update, {**given, "B": draw(2, 4), "C": draw(2, 4)}


def convolution(case: ConvCase, dtype: torch.dtype = torch.float32, final: bool = True) -> Any:
    return functools.partial(ops.causal_conv1d, return_final_state=final), conv_problem(case, dtype)


def conv_step() -> Any:
    return ops.causal_conv1d_update, {"x": draw(2, 5), "state": draw(2, 3, 5), "weight": draw(5, 4)}


def norm(x: torch.dtype, residual: torch.dtype | None, width: int = 32) -> Any:
    problem: dict[str, Any] = {"x": draw(2, 9, width).to(x), "weight": draw(width)}
    if residual is not None:
        problem["residual"] = draw(2, 9, width).to(residual)
    return ops.add_rms_norm, problem


def pairs(*shape: int) -> Tensor:
    return torch.complex(draw(*shape), draw(*shape[::-1]).mT if len(shape) == 2 else draw(*shape).flip(0))


def s4d(states: int, length: int) -> Any:
    A = torch.complex(-draw(2, states).exp(), draw(2, states))
    given = {"A": A, "B": pairs(2, states), "C": pairs(2, states), "dt": draw(2).exp() / 9}
    return functools.partial(ops.s4d_kernel, length=length), given


def s4(states: int, rank: int, length: int) -> Any:
    given = s4d(states, length)[1]
    given["Lambda"] = given.pop("A")
    return functools.partial(ops.s4_kernel, length=length), {**given, "P": pairs(2, states, rank) / 4}


CALLS: dict[str, Any] = {
    "scan": lambda: scan(ScanCase(batch=2, length=18, d_inner=33, d_state=5, **EVERY)),
    "scan, bfloat16": lambda: scan(ScanCase(batch=1, length=16, d_inner=32, d_state=16, **EVERY), torch.bfloat16),
    "scan, no options": lambda: scan(ScanCase(batch=1, length=5, d_inner=8), final=False),
    "scan, groups": lambda: scan(ScanCase(batch=1, length=6, d_inner=36, B=3, C=2, **EVERY)),
    "scan, fixed": lambda: scan(ScanCase(batch=1, length=6, d_inner=32, B="fixed", C="fixed", **EVERY)),
    "scan, packed": lambda: scan(ScanCase(batch=1, length=20, d_inner=32, cu_seqlens=(0, 0, 7, 20), **EVERY)),
    "scan, segments": lambda: scan(ScanCase(batch=2, length=37, d_inner=32, **EVERY)),
    "scan, segments, packed": lambda: scan(ScanCase(batch=1, length=60, d_inner=32, cu_seqlens=(0, 5, 53, 60), z=True)),
    "step": step,
    "convolution": lambda: convolution(ConvCase(batch=2, length=19, features=16)),
    "convolution, plain": lambda: convolution(ConvCase(length=5, features=3, initial_state=False), final=False),
    "convolution, bfloat16": lambda: convolution(ConvCase(batch=1, length=16, features=131), torch.bfloat16),
    "convolution, packed": lambda: convolution(ConvCase(batch=1, length=23, features=7, offsets=(0, 2, 7, 7, 23))),
    "convolution, width 1": lambda: convolution(ConvCase(length=5, features=3, width=1)),
    "convolution's step": conv_step,
    "norm": lambda: norm(torch.float32, torch.float32),
    "norm, no residual": lambda: norm(torch.bfloat16, None, 37),
    "norm, mixed": lambda: norm(torch.bfloat16, torch.float32),
    "s4d": lambda: s4d(7, 45),
    "s4d, one state and lag": lambda: s4d(1, 1),
    "s4": lambda: s4(5, 1, 40),
    "s4, rank 2, in pieces": lambda: s4(3, 2, 45),
}


def options(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend; where the name says so, time or frequencies are cut as long ones are."""
    if "segments" in name:
        monkeypatch.setattr(triton_scan, "_segment", lambda programs, wanted, length: triton_scan._EVERY)
    if "pieces" in name:
        monkeypatch.setattr(cauchy_triton, "_SUMS", 10 * 2 * 9)  # ten frequencies of two channels and nine sums
    return "cauchy_triton" if name.startswith("s4,") or name == "s4" else "triton"


def results(found: Any) -> list[Tensor]:
    return [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor) and x.requires_grad]


def test_a_backward_launches_what_was_made(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of every backward pass, whichever results have gradients."""
    backwards: set[str] = set()
    for name, make in CALLS.items():
        with monkeypatch.context() as patch:
            backend = options(name, patch)
            run, problem = make()
            problem = leaves_of(problem)
            machine.made, machine.launched = set(), set()
            found = results(run(**problem, backend=backend))
            made, machine.made, machine.launched = machine.made, set(), set()
            inputs = [v for v in problem.values() if isinstance(v, Tensor) and v.requires_grad]
            for some in (found, *([one] for one in found)) if len(found) > 1 else (found,):
                grads = [torch.ones_like(x, memory_format=torch.contiguous_format) for x in some]
                torch.autograd.grad(some, inputs, grads, retain_graph=True, allow_unused=True)
            # A piece whose sums were not kept is made again.
            taken = {key for key in machine.launched if key[0] != "cauchy_forward"}
            assert taken, name
            assert taken <= made, f"{name}: {taken - made}"
            backwards |= machine.names(taken)
    assert backwards == {*BACKWARD, "vandermonde_states"}


# Kernel of a backward pass -> a call that launches it.
BACKWARD = {
    "scan_backward": "scan",
    "scan_adjoint": "scan, segments",
    "scan_combine_adjoint": "scan, segments",
    "conv_gradient": "convolution",
    "conv_backward": "convolution",
    "state_backward": "convolution",
    "norm_backward": "norm",
    "vandermonde_backward": "s4d",
    "cauchy_backward": "s4",
}


@pytest.mark.parametrize("kernel", BACKWARD)
def test_one_that_cannot_be_made_is_told_in_the_forward(
    kernel: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the cure, each time, before anything is launched; and only where a gradient may be asked for."""
    backend = options(BACKWARD[kernel], monkeypatch)
    run, problem = CALLS[BACKWARD[kernel]]()
    machine.refuses = {kernel}
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match=r"did not compile \(CompilationError.*use backend='torch'"):
            run(**leaves_of(problem), backend=backend)
    assert not machine.launched
    run(**problem, backend=backend)
    with torch.no_grad():
        run(**leaves_of(problem), backend=backend)
    assert machine.launched


@pytest.mark.parametrize("final", [False, True])
def test_a_gradient_that_no_one_can_ask_for(final: bool, machine: Machine) -> None:
    """No kernels are made for a final state that is not given."""
    run, problem = convolution(ConvCase(batch=1, length=16, features=8), final=final)
    run(**leaves_of(problem), backend="triton")
    assert sum(name == "conv_backward" for name, *_ in machine.made) == 1 + final


# Backward passes that add up shares behind their last kernel.
REHEARSALS: dict[str, Callable[[], Any]] = {
    "scan": lambda: triton_scan._rehearse_backward(
        *(draw(1, 6, 32), draw(1, 6, 32), draw(32, 4), draw(32, 4), draw(1, 6, 4), draw(32), None, draw(32)),
        *(True, None, None, True),
    ),
    "convolution": lambda: triton_conv._rehearse_backward(
        draw(1, 16, 8).bfloat16(), draw(8, 4), draw(8), None, None, True, True
    ),
    "norm": lambda: triton_norm._rehearse_backward(draw(2, 32).bfloat16(), draw(32).bfloat16(), None, torch.bfloat16),
    "s4d": lambda: triton_products._rehearse_vandermonde(draw(2, 7), 40_000),
    "s4": lambda: triton_products._rehearse_cauchy(draw(2, 7), 4, 5000),
}


@pytest.mark.parametrize("name", REHEARSALS)
def test_a_rehearsal_adds_nothing_up(name: str, machine: Machine) -> None:
    """What no kernel has written is not summed, nor cast: a rehearsal ends with its last kernel."""
    events: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            events.append(str(func))
            return func(*args, **(kwargs or {}))

    machine.noted = lambda kernel: events.append(kernel)
    with Watch(), _cuda.rehearsal():
        REHEARSALS[name]()
    last = max(i for i, event in enumerate(events) if event in BACKWARD)
    assert not [event for event in events if "sum" in event]
    assert not events[last + 1 :]


def test_a_capture_records_no_rehearsal(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are made where they are launched, as it was not warmed up; what is called later is made ready."""
    run, problem = CALLS["norm"]()
    captures = [True, False]
    monkeypatch.setattr(_triton, "in_capture", lambda x: captures[0])
    run(**leaves_of(problem), backend="triton")
    assert not machine.made
    captures.pop(0)
    run(**leaves_of(problem), backend="triton")
    assert machine.names(machine.made) == {"norm_backward"}


@pytest.mark.parametrize("name", ["scan", "step", "convolution", "convolution's step", "norm", "s4d"])
def test_auto_goes_on(name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning that names the cause; the gradients are those of the next backend."""
    run, problem = CALLS[name]()
    op = run.func.__name__ if isinstance(run, functools.partial) else run.__name__
    monkeypatch.setattr(_dispatch, "_only_if_named", lambda *_: False)
    cpu = importlib.import_module(_dispatch._module(op, "cpu"))
    monkeypatch.setattr(cpu, "refuses", lambda facts: "not here")
    machine.refuses = set(BACKWARD)

    def gradients(**named: Any) -> list[Tensor]:
        leaves = leaves_of(problem)
        found = results(run(**leaves, **named))
        inputs = [v for v in leaves.values() if isinstance(v, Tensor) and v.requires_grad]
        return list(torch.autograd.grad(found, inputs, [torch.ones_like(x) for x in found], materialize_grads=True))

    wanted = gradients(backend="torch")
    with pytest.warns(UserWarning, match=f"{op}: backend 'triton' is passed over, 'torch' runs instead: a Tri") as said:
        got = gradients()
    assert len(said) == 1
    assert not machine.launched
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients()


@pytest.mark.parametrize("name", ["scan", "convolution", "norm"])
def test_a_gradient_in_a_layout_that_no_kernel_takes(name: str, machine: Machine) -> None:
    """It comes as a copy in the layout that was made ready."""
    run, problem = CALLS[name]()
    wanted, got = ([x.requires_grad_() for x in (next(iter(problem.values())).clone(),)] for _ in range(2))
    first = next(iter(problem))
    run(**{**problem, first: wanted[0]}, backend="torch")[0].sum().backward()
    y = run(**{**problem, first: got[0]}, backend="triton")[0]
    machine.strict = True
    y.sum().backward()  # one number for all of them
    torch.testing.assert_close(got[0].grad, wanted[0].grad)


def test_what_is_made_is_made_once_a_layout(machine: Machine) -> None:
    run, problem = CALLS["norm"]()
    run(**leaves_of(problem), backend="triton")
    assert machine.names(machine.made) == {"norm_backward"}
    machine.made = set()
    run(**leaves_of(problem), backend="triton")
    assert not machine.made
    run(**leaves_of({**problem, "x": problem["x"].bfloat16()}), backend="triton")
    assert machine.made


def test_a_kernel_that_does_not_load() -> None:
    """Triton finds out about shared memory when a compiled kernel is loaded."""
    from triton.runtime.errors import OutOfResources

    class Compiled:
        def _init_handles(self) -> None:
            raise OutOfResources(300, 200, "shared memory")

    class Kernel:
        def warmup(self, *_: Any, grid: Any, **__: Any) -> Compiled:
            return Compiled()

    def launch(x: Tensor) -> None:
        with _triton.on_device_of(x):
            _triton._Made(Kernel())[(1,)](x, BLOCK=4)

    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match=r"\(OutOfResources: .*shared memory.*; use backend='torch'"):
            _triton.make_ready(launch, torch.zeros(4))


def test_boundaries_that_were_seen_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a device the kernel is launched nevertheless, since a capture could not bring it."""

    class OnGPU(Tensor):
        device = torch.device("cuda", 0)

    launched: list[Tensor] = []

    kernels = types.SimpleNamespace(check_boundaries={(1,): lambda cu_seqlens, *_, **__: launched.append(cu_seqlens)})
    monkeypatch.setattr(_triton, "_checking", set())
    monkeypatch.setattr(_triton, "_kernels_of", lambda module: kernels)
    seen, unseen = (torch.tensor([0, 7, 30], dtype=torch.int32).as_subclass(OnGPU) for _ in range(2))
    _checks.mark_checked(seen, 30)
    for given, count in ((seen, 1), (seen, 1), (unseen, 2), (seen, 2), (unseen, 3)):
        _triton.check_boundaries("selective_scan", given, 30)
        assert len(launched) == count


@pytest.mark.parametrize("failures", [1, 2])
def test_a_kernel_without_room(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded once more when torch has given back what it only keeps. Where that is too little the call may yet have
    room, and the next one tries anew."""
    events: list[str] = []

    class Kernel:
        def warmup(self, *_: Any, grid: Any, **__: Any) -> Any:
            return self

        def _init_handles(self) -> None:
            events.append("load")
            if events.count("load") <= failures:
                raise RuntimeError("Triton Error [CUDA]: out of memory")  # as its driver says it

    kernel = Kernel()

    def launch(x: Tensor) -> None:
        with _triton.on_device_of(x):
            _triton._Made(kernel)[(1,)](x, BLOCK=4)

    monkeypatch.setattr(_cuda, "_ready", set())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    _triton.make_ready(launch, torch.zeros(4))
    assert events == ["load", "emptied", "load"]
    _triton.make_ready(launch, torch.zeros(4))
    assert events[3:] == ([] if failures == 1 else ["load"])


def test_what_is_traced_is_left_out(machine: Machine) -> None:
    """The op is chosen when a graph is made, and tensors have no memory then."""
    torch.compiler.reset()
    run, problem = CALLS["norm"]()
    graph = torch.compile(functools.partial(run, backend="triton"), fullgraph=True, backend="aot_eager")
    graph(**leaves_of(problem))
    assert not machine.made
    with FakeTensorMode() as mode:
        run(**{k: mode.from_tensor(v).requires_grad_() for k, v in problem.items()}, backend="triton")
    assert not machine.made


def of_norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.add_rms_norm(x, weight, backend="triton")[0]


def test_other_tracers(machine: Machine) -> None:
    """AOTAutograd without torch.compile traces with functional tensors; make_fx with real ones, and records nothing."""
    x, weight = draw(2, 9, 32).requires_grad_(), draw(32).requires_grad_()
    traced = aot_function(of_norm, fw_compiler=nop)(x, weight)
    assert not machine.made
    graph = make_fx(of_norm, tracing_mode="real")(x, weight)
    assert machine.names(machine.made) == {"norm_backward"}
    again = make_fx(of_norm, tracing_mode="real")(x, weight)
    assert [node.target for node in graph.graph.nodes] == [node.target for node in again.graph.nodes]
    torch.testing.assert_close(traced, of_norm(x, weight))


def test_a_selective_checkpoint(machine: Machine) -> None:
    """It runs the call again, which is ready then, and has to find the same operators."""
    x, weight = draw(2, 9, 32).requires_grad_(), draw(32).requires_grad_()

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "sum" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return (of_norm(x, weight) * x.sum(0)).sum()

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    kept: Any = checkpoint(loss, x, weight, use_reentrant=False, context_fn=contexts)
    assert machine.names(machine.made) == {"norm_backward"}
    for a, b in zip(
        torch.autograd.grad(kept, (x, weight)), torch.autograd.grad(loss(x, weight), (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shared", [232448, 1])
def test_by_tritons_own_compiler(shared: int, tmp_path: Path) -> None:
    """What the forward call makes is compiled and loaded, and nothing is launched; where a block has too little shared
    memory, that is told each time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("rehearse_triton.py")), str(shared)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = {name: (loaded, reason) for name, loaded, reason in map(json.loads, run.stdout.splitlines())}
    assert set(found) == {"norm", "convolution", "s4d", "s4d again", "packed", "wrong"}
    loaded, reason = found["wrong"]
    assert not loaded
    assert "did not compile (CompileTimeAssertionFailure: " in reason
    assert found["packed"] == (["check_boundaries"], None)
    assert set(found["convolution"][0]) <= {"conv_gradient", "conv_backward", "state_backward"}
    if shared == 1:
        for name in ("s4d", "s4d again"):
            loaded, reason = found[name]
            assert "vandermonde_backward" not in loaded
            assert "did not compile (OutOfResources: out of resource: shared memory" in reason
    else:
        assert set(found["norm"][0]) == {"norm_backward"}
        assert set(found["s4d"][0]) == {"vandermonde_states", "vandermonde_backward"}
        assert found["s4d again"] == ([], None)
        assert [name for name, (_, reason) in found.items() if reason is not None] == ["wrong"]
