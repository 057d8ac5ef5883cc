"""Kernels of a backward pass, and of a step that moves states on, are made before anything is done that another backend
can't take over. No GPU is needed: a double stands in for what compiles and launches."""

from __future__ import annotations

import contextlib
import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from statescan.errors import BackendUnavailableError
from statescan.ops import _cuda, _dispatch, mamba_step, pack_weight
from statescan.ops.add_norm import cuda as norm
from statescan.ops.causal_conv1d import cuda as conv
from statescan.ops.mamba_inner import LayerWeights, api
from statescan.ops.mamba_inner import cuda as inner
from statescan.ops.mamba_inner.layer import POLICIES, Kept, LayerGradients, Normed
from statescan.ops.mamba_step import cuda as step
from statescan.ops.mamba_step.validation import BlockWeights
from statescan.ops.selective_scan import cuda as scan


class Machine:
    """Makes kernels: keeps which, refuses some, and counts launches."""

    def __init__(self) -> None:
        self.made: set[tuple[Any, ...]] = set()
        self.refuses: Callable[..., bool] = lambda name, options: False
        self.launches: list[str] = []

    def kernel(self, file: Path, name: str, options: dict[str, int], threads: int, device: int, shared: int = 0) -> Any:
        if self.refuses(name, options):
            raise BackendUnavailableError(f"{name} did not compile; use backend='torch'")
        self.made.add((file.name, name, threads, device, shared, *sorted(options.items())))

        def launch(*_: Any) -> None:
            if not getattr(_cuda._thread, "rehearses", False):
                self.launches.append(name)

        return launch

    def makes(self, run: Callable[[], object]) -> set[tuple[Any, ...]]:
        """The kernels of one run."""
        self.made = set()
        run()
        return self.made


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    double = Machine()
    chip = types.SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=233472)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: chip)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_cuda, "kernel", double.kernel)
    monkeypatch.setattr(_cuda, "_ready", set())
    monkeypatch.setattr(_dispatch, "_broken", {})
    monkeypatch.setattr(api, "_broken", {})
    return double


# ------------------------------------------------------------------------------------------------------- the one helper


def launch_one(x: Tensor, option: int) -> None:
    _cuda.kernel(Path("one.cu"), "one", {"VEC": int(x.data_ptr() % 16 == 0), "OPTION": option}, 128, 0)((1, 1, 1), x)
    x._seen = True  # type: ignore[attr-defined]


def test_once_for_a_layout(machine: Machine) -> None:
    """What is compiled isn't launched; a call of another layout is looked at anew."""
    whole = torch.zeros(9)
    x = whole[:8]
    assert machine.makes(lambda: _cuda.make_ready(launch_one, x, 1)) == {
        ("one.cu", "one", 128, 0, 0, ("OPTION", 1), ("VEC", 1))
    }
    for again in (x, x.clone()):
        assert not machine.makes(lambda again=again: _cuda.make_ready(launch_one, again, 1))
    others = (whole[1:], 1), (x, 2), (x[:4], 1), (x[::2], 1), (x.double(), 1), (x.view(2, 4), 1)
    for other in others:
        assert len(machine.makes(lambda other=other: _cuda.make_ready(launch_one, *other))) == 1
    assert not machine.launches
    assert not hasattr(x, "_seen"), "what a rehearsal notes on a tensor would be believed by the call itself"
    launch_one(x, 1)
    assert machine.launches == ["one"]


def test_a_refusal_is_not_taken_for_ready(machine: Machine) -> None:
    machine.refuses = lambda name, options: options["OPTION"] == 2
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match="one did not compile"):
            _cuda.make_ready(launch_one, torch.zeros(8), 2)
    launch_one(torch.zeros(8), 1)
    assert machine.launches == ["one"], "a rehearsal ends where it fails"


def test_a_rehearsal_without_room_is_left_out(machine: Machine) -> None:
    tried: list[int] = []

    def launch(x: Tensor) -> None:
        tried.append(1)
        raise torch.OutOfMemoryError

    for count in (1, 2):
        _cuda.make_ready(launch, torch.zeros(8))
        assert len(tried) == count


def test_tensors_without_values_are_left_out(machine: Machine) -> None:
    """Where a call is traced there is no memory whose layout could be looked at."""

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: Tensor) -> Tensor:
        _cuda.make_ready(launch_one, x, 1)
        return x + 1

    def looked_at() -> None:
        compiled(torch.zeros(8))
        with FakeTensorMode():
            _cuda.make_ready(launch_one, torch.zeros(8), 1)

    assert not machine.makes(looked_at)


class Plain(Tensor):
    """A user's own, with no operators of its own."""


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.nn.Buffer, lambda x: x.as_subclass(Plain)])
def test_subclasses_that_have_memory_are_made_ready(kind: Callable[[Tensor], Tensor], machine: Machine) -> None:
    assert machine.makes(lambda: _cuda.make_ready(launch_one, kind(torch.zeros(8)), 1))


def test_no_mode_sees_a_rehearsal(machine: Machine) -> None:
    """Neither one that traces nor one that keeps results; the kernels are made nevertheless."""
    seen: list[object] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def launch(x: Tensor) -> None:
        launch_one(x + 1, 1)

    x = torch.zeros(8)
    with Watch():
        assert machine.makes(lambda: _cuda.make_ready(launch, x))
        assert not seen
        x.sum()
    assert seen


def test_a_gradient_in_a_layout_that_no_kernel_takes(machine: Machine) -> None:
    """It comes as a copy in the layout that was made ready."""
    machine.refuses = lambda name, options: options["VEC"] == 0
    whole = torch.arange(9.0)
    seen: list[Tensor | None] = []

    def launch(dy: Tensor, dfinal: Tensor | None) -> str:
        launch_one(dy, 1)
        seen.extend((dy, dfinal))
        return "gradients"

    assert _cuda.launch_ready(launch, whole[1:], None) == "gradients"
    assert seen[1] is None
    assert isinstance(seen[0], Tensor)
    assert torch.equal(seen[0], whole[1:])
    seen.clear()
    _cuda.launch_ready(launch, whole, None)
    assert seen[0] is whole, "no copy where none is needed"
    machine.refuses = lambda name, options: True
    with pytest.raises(BackendUnavailableError):
        _cuda.launch_ready(launch, whole, None)


# --------------------------------------------------------------------- what is made ready is what a backward pass takes


def tensors(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Tensors of one shape: with rows side by side, halves of wider ones, or such that begin at odd places."""
    while True:
        if layout == "halves":
            yield torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., shape[-1] :]
        elif layout == "odd":
            yield torch.zeros(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., 1:]
        else:
            yield torch.zeros(shape, dtype=dtype)


LAYOUTS = ("dense", "halves", "odd")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("d_state", [16, 5])
@pytest.mark.parametrize("length", [40, 2048])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_the_scan(
    dtype: torch.dtype, layout: str, length: int, d_state: int, packed: bool, machine: Machine
) -> None:
    """One pass and chunks of time, wide accesses and narrow ones."""
    wide, narrow = tensors((1, length, 64), layout, dtype), tensors((1, length, d_state), layout, dtype)
    u, dt, z = (next(wide) for _ in range(3))
    B, C = next(narrow), next(narrow)
    cu_seqlens = torch.tensor([0, 7, length], dtype=torch.int32) if packed else None
    call = (u, dt, -torch.ones(64, d_state), B, C, None, z, None, True, None, cu_seqlens, False)
    ready = machine.makes(lambda: _cuda.make_ready(scan._rehearse_backward, *call))
    checkpoints = torch.zeros(1, length, 64, d_state)
    taken = machine.makes(lambda: scan.launch_backward(*call, dy=torch.zeros(1, length, 64, dtype=dtype),
                                                       checkpoints=checkpoints))  # fmt: skip
    assert {name for _, name, *_ in taken} >= {"scan_backward", "scan_sums"}
    assert taken <= ready


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_the_scan_with_blocks_in_twos(layout: str, machine: Machine) -> None:
    """As they come where they fill the chip: halves of one block, where accesses can be wide."""
    wide, narrow = tensors((100, 33, 128), layout, torch.bfloat16), tensors((100, 33, 16), layout, torch.bfloat16)
    u, dt, z = (next(wide) for _ in range(3))
    call = (u, dt, -torch.ones(128, 16), next(narrow), next(narrow), None, z, None, True, None, None, False)
    ready = machine.makes(lambda: _cuda.make_ready(scan._rehearse_backward, *call))
    checkpoints, dy = torch.zeros(100, 2, 128, 16), torch.zeros(100, 33, 128, dtype=torch.bfloat16)
    taken = machine.makes(lambda: scan.launch_backward(*call, dy=dy, checkpoints=checkpoints))
    assert taken <= ready
    threads = {threads for _, name, threads, *_ in taken if name == "scan_backward"}
    assert threads == {256 if layout == "odd" else 512}


@pytest.mark.parametrize(("width", "final"), [(4, False), (4, True), (20, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_the_convolution(dtype: torch.dtype, layout: str, width: int, final: bool, machine: Machine) -> None:
    x = next(tensors((2, 150, 136), layout, dtype))
    weight, bias, initial = torch.zeros(136, width), torch.zeros(136), torch.zeros(2, width - 1, 136, dtype=dtype)
    call = (x, weight, bias, initial, None, True)
    ready = machine.makes(lambda: _cuda.make_ready(conv._rehearse_backward, *call, final))
    dy = torch.zeros(2, 150, 136, dtype=dtype)
    for dfinal in (None, torch.zeros_like(initial)) if final else (None,):
        taken = machine.makes(
            lambda dfinal=dfinal: conv.launch_backward(dy, dfinal, x, weight, bias, True, initial, None)
        )
        assert {name for _, name, *_ in taken} >= {"conv_sums", "conv_initial"}
        assert taken <= ready


@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_the_norm(dtype: torch.dtype, layout: str, residual: torch.dtype | None, machine: Machine) -> None:
    x = next(tensors((2, 30, 72), layout, dtype))
    before = None if residual is None else next(tensors((2, 30, 72), layout, residual))
    weight, stream = torch.zeros(72), residual or dtype
    ready = machine.makes(lambda: _cuda.make_ready(norm._rehearse_backward, x, weight, before, stream))
    total = x if residual is None else torch.zeros(2, 30, 72, dtype=stream)
    dy, rstd = torch.zeros(2, 30, 72, dtype=dtype), torch.zeros(2, 30)
    for onward in (None,) if residual is None else (None, torch.zeros_like(total)):
        taken = machine.makes(
            lambda onward=onward: norm._backward(dy, onward, total, rstd, weight, residual)  # type: ignore[misc]
        )
        assert {name for _, name, *_ in taken} == {"norm_backward", "norm_sums"}
        assert taken <= ready


def layer(dtype: torch.dtype) -> LayerWeights:
    """d_model 32, d_inner 64, d_state 16, dt_rank 2."""
    return LayerWeights(
        torch.zeros(128, 32, dtype=dtype), None, torch.zeros(64, 4, dtype=dtype), torch.zeros(64, dtype=dtype),
        torch.zeros(34, 64, dtype=dtype), torch.zeros(64, 2, dtype=dtype), torch.zeros(64), -torch.ones(64, 16),
        torch.ones(64), torch.zeros(32, 64, dtype=dtype), None,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_a_layer(dtype: torch.dtype, policy: str, packed: bool, machine: Machine) -> None:
    """Both passes of the layer as one function take the kernels that were made ready for it, and no others."""
    x, w = torch.zeros(1, 1024, 32, dtype=dtype), layer(dtype)
    cu_seqlens = torch.tensor([0, 7, 1024], dtype=torch.int32) if packed else None
    normed = Normed(torch.zeros(1, 1024, 32), torch.ones(32), 1e-5)
    again = (normed.stream, normed.weight) if policy == "block" else (None, None)
    ready = machine.makes(lambda: inner.make_ready(x, *again, 1e-5, *w, cu_seqlens))

    def passes() -> None:
        number = tuple(POLICIES).index(policy)
        out, *kept = inner.run_forward(x, *w, cu_seqlens, number)
        assert len(kept) == len(Kept._fields)
        source = None if policy == "block" else x
        wanted = (True,) * len(LayerGradients._fields)
        inner.run_backward(torch.zeros_like(out), source, *again, 1e-5, *w, cu_seqlens, *kept, number, wanted)

    taken = machine.makes(passes)
    names = {"conv_forward", "conv_backward", "scan_forward", "scan_backward", "scan_sums"}
    assert {name for _, name, *_ in taken} >= names | ({"norm_forward"} if policy == "block" else set())
    assert taken == ready


# -------------------------------------------------------------------------------------- where one of them can't be made


def backward_of(name: str) -> Callable[[str, dict[str, int]], bool]:
    return lambda kernel, options: kernel == name


@pytest.mark.parametrize(
    ("kernel", "call"),
    [
        ("conv_backward", lambda x, p: conv.causal_conv1d(x, p(64, 4), None, True, None, None, False)),
        ("norm_backward", lambda x, p: norm.add_rms_norm(x, p(64), None, 1e-5, torch.float32)),
    ],
)
def test_a_backward_that_cannot_be_made_is_told_in_the_forward(
    kernel: str, call: Callable[..., Any], machine: Machine
) -> None:
    machine.refuses = backward_of(kernel)
    with pytest.raises(BackendUnavailableError, match=f"{kernel} did not compile"):
        call(torch.zeros(2, 30, 64), lambda *shape: torch.zeros(*shape, requires_grad=True))
    assert not machine.launches


def test_so_is_that_of_the_scan(machine: Machine) -> None:
    machine.refuses = backward_of("scan_backward")
    u, matrix = torch.zeros(1, 40, 64), torch.zeros(1, 40, 16)
    call = (u, u, -torch.ones(64, 16), matrix, matrix, None, None, None, True, None, None, False)
    with pytest.raises(BackendUnavailableError, match="scan_backward did not compile"):
        scan._forward_op(*call, False, True)
    assert not machine.launches
    scan._forward_op(*call, False, False)  # no gradient will be asked for
    assert machine.launches == ["scan_forward"]


@pytest.mark.parametrize("kernel", ["conv_forward", "conv_backward", "scan_backward"])
def test_a_layer_goes_on_op_by_op(kernel: str, machine: Machine) -> None:
    """Also where it is a kernel of its backward pass; it is said once, with the cause, and remembered."""
    machine.refuses = backward_of(kernel)
    weights = LayerWeights(*(None if t is None else t.requires_grad_() for t in layer(torch.float32)))
    with pytest.warns(UserWarning, match=f"op by op instead of as one function: {kernel} did not compile") as caught:
        assert api.mamba_inner_or_none(torch.zeros(1, 40, 32), weights) is None
    assert len(caught) == 1
    assert not machine.launches
    assert list(api._broken) == [(torch.float32, 16, 4)]


def test_a_state_is_not_moved_on_by_a_step_that_ends_half_way(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's first kernels move the convolution's state on; where a later one can't be made they haven't run."""
    monkeypatch.setattr(importlib.import_module("statescan.ops.mamba_step.cpu"), "refuses", lambda facts: "not here")
    monkeypatch.setattr(step, "refuses", lambda facts: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    inner_kernel = machine.kernel
    monkeypatch.setattr(_cuda, "kernel", lambda *a, early=False, **more: inner_kernel(*a, **more))

    def on_any_device(x: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor, w: Any) -> Any:
        projections = [w.in_proj, w.x_proj, w.dt_proj, w.out_proj]
        return step._forward(
            *(x, residual, conv_state, ssm_state, w.norm, w.conv_weight, w.conv_bias, w.A, w.D),
            *([one.data for one in projections], [None] * 4, [w.in_bias, w.x_bias, w.dt_bias, w.out_bias], w.epsilon),
        )

    monkeypatch.setattr(step, "mamba_step", on_any_device)
    machine.refuses = backward_of("state_step")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    w = BlockWeights(
        draw(6), pack_weight(draw(16, 6)), draw(8, 4), pack_weight(draw(8, 8)), pack_weight(draw(8, 2)),
        -draw(8, 3).exp(), pack_weight(draw(6, 8)), dt_bias=draw(8), D=draw(8),
    )  # fmt: skip
    x, states = draw(2, 6), (draw(2, 3, 8), draw(2, 8, 3))
    mine, others = ([s.clone() for s in states] for _ in range(2))
    with pytest.warns(UserWarning, match="'cuda' is passed over, 'torch' runs instead: state_step did not") as caught:
        got = mamba_step(x, None, *mine, w)
    assert len(caught) == 1
    assert not machine.launches
    wanted = mamba_step(x, None, *others, w, backend="torch")
    for a, b in zip((*got, *mine), (*wanted, *others), strict=True):
        assert torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mamba_step(x, None, *mine, w)
