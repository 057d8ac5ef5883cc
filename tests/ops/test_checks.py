"""Boundaries that were looked at once are not looked at again, unless something changed them; transforms of torch.func
and forward-mode AD, which kernels don't take part in, lose no derivative."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from statescan import ops
from statescan.errors import BackendUnavailableError, ConfigError, ShapeError
from statescan.ops import _cuda, _triton
from statescan.ops._checks import (
    check_cu_seqlens,
    mark_checked,
    no_device,
    transformed,
    transforms_active,
    usable_device,
)
from statescan.ops._dispatch import BACKENDS, choose


class Watched(torch.Tensor):
    """Counts how often its values are read on the host."""

    reads = 0

    def tolist(self):  # type: ignore[no-untyped-def]
        Watched.reads += 1
        return super().tolist()


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).as_subclass(Watched)


def test_boundaries_that_the_caller_made_are_not_read() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            marked = bounds(0, 3, 5)
            Watched.reads = 0
            mark_checked(marked, 5)
            check_cu_seqlens("op", marked, 1, 5)
            assert Watched.reads == 0
            # Of another length, or copied, they are others.
            with pytest.raises(ShapeError, match="must end at the length 6, got 5"):
                check_cu_seqlens("op", marked, 1, 6)
            check_cu_seqlens("op", marked.clone(), 1, 5)
            assert Watched.reads == 2


def test_boundaries_that_changed_are_read_again() -> None:
    marked = bounds(0, 3, 5)
    mark_checked(marked, 5)
    marked[1] = 6
    with pytest.raises(ShapeError, match="must never fall, got 6 followed by 5"):
        check_cu_seqlens("op", marked, 1, 5)


def test_on_the_cpu_a_look_costs_nothing_and_is_not_remembered() -> None:
    # Memory that numpy shares may change without torch's knowing.
    seen = bounds(0, 3, 5)
    Watched.reads = 0
    check_cu_seqlens("op", seen, 1, 5)
    check_cu_seqlens("op", seen, 1, 5)
    assert Watched.reads == 2


# offsets that are wrong for a length of 10: too short, no 0 in front, falling, negative, too long
WRONG = ([0, 5, 8], [2, 5, 10], [0, 7, 4, 10], [0, -3, 10], [0, 4, 20])


def packed_op(op: str, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """An op over ten packed positions as a function of their boundaries."""
    draw = torch.Generator().manual_seed(0)
    u, step = torch.randn(1, 10, 4, generator=draw), torch.rand(1, 10, 4, generator=draw)
    B, weight = torch.randn(1, 10, 3, generator=draw), torch.randn(4, 4, generator=draw)
    if op == "causal_conv1d":
        return lambda cu: ops.causal_conv1d(u, weight, cu_seqlens=cu, backend=backend).y
    return lambda cu: ops.selective_scan(u, step, -torch.ones(4, 3), B, B, cu_seqlens=cu, backend=backend).y


@pytest.mark.parametrize(
    ("op", "backend"),
    [
        *((op, backend) for op in ("selective_scan", "causal_conv1d") for backend in ("cpu", "torch")),
        ("selective_scan", "reference"),  # that of the convolution reads them on the host, which no graph can
    ],
)
def test_wrong_boundaries_stop_a_graph(op: str, backend: str, require_backend: Callable[..., None]) -> None:
    """A graph checks in every call, since the host has not seen what it is called with."""
    require_backend(op, backend, device="cpu", d_state=3)
    torch.compiler.reset()
    run = packed_op(op, backend)
    graph = torch.compile(run, fullgraph=True, backend="aot_eager")
    for right in ([0, 0, 4, 10], [0, 10, 10, 10]):
        torch.testing.assert_close(graph(torch.tensor(right)), run(torch.tensor(right)))
    for wrong in WRONG:
        with pytest.raises((ShapeError, RuntimeError), match=f"{op}: cu_seqlens must (go|run) from 0 to the length"):
            graph(torch.tensor(wrong))


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_wrong_boundaries_stop_an_exported_program(op: str) -> None:
    class Packed(torch.nn.Module):
        def forward(self, cu: torch.Tensor) -> torch.Tensor:
            return packed_op(op, "torch")(cu)

    right = torch.tensor([0, 4, 10])
    program = torch.export.export(Packed(), (right,)).module()
    torch.testing.assert_close(program(right), packed_op(op, "torch")(right))
    with pytest.raises(RuntimeError, match=f"{op}: cu_seqlens must go from 0 to the length and never fall"):
        program(torch.tensor([0, 4, 9]))


def test_a_device_that_is_missing_is_named_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    cures = {None: "this build has no CUDA; install one that has it", "13.0": "see what nvidia-smi shows"}
    for version, cure in cures.items():
        monkeypatch.setattr(torch.version, "cuda", version)
        _cuda.unavailable_reason.cache_clear()
        _triton._unavailable.cache_clear()
        refusal = str(_cuda.unavailable_reason())
        assert re.search(f"^torch sees no CUDA device.*{cure}.*, or use backend='torch'$", refusal)
        assert _triton._unavailable("cuda") == refusal
        with pytest.raises(ConfigError, match=f"^op: device must be .*, got 'cuda': torch sees no CUDA device.*{cure}"):
            usable_device("op: device", "cuda")
    _cuda.unavailable_reason.cache_clear()
    _triton._unavailable.cache_clear()
    assert "see to its driver" in no_device("xpu")
    with pytest.raises(ConfigError, match=r"got 'nowhere': .*; 'cpu' is always there$"):
        usable_device("op: device", "nowhere")
    assert usable_device("op: device", "cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "op",
    [
        *("selective_scan", "selective_state_update", "causal_conv1d", "causal_conv1d_update", "add_rms_norm"),
        *("linear_cross_entropy", "decode_attention"),
    ],
)
def test_a_cuda_backend_says_what_helps_tensors_that_are_elsewhere(op: str) -> None:
    with pytest.raises(
        BackendUnavailableError,
        match=r"runs on CUDA devices, the inputs are on 'cpu'; move them with \.to\('cuda'\), or use backend='torch'$",
    ):
        choose(op, "cuda", "cpu", torch.float32, d_state=64)


def _calls() -> dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]:
    """Every differentiable op as a function of some of its inputs."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    poles = torch.complex(-torch.rand(3, 4, generator=draw) - 0.1, randn(3, 4))
    B, C, P = (randn(3, 4, dtype=torch.complex64) for _ in range(3))
    u, step, by_position, A = (
        randn(2, 9, 3),
        torch.rand(3, generator=draw) * 0.1 + 0.01,
        randn(2, 9, 4),
        -(randn(3, 4) ** 2),
    )
    window, targets, packed = randn(2, 3, 3), torch.randint(0, 5, (2, 9), generator=draw), ops.pack_weight(randn(7, 3))
    return {
        "s4d_kernel": (lambda dt, **b: ops.s4d_kernel(poles, B, C, dt, 50, **b), (step,)),
        "s4_kernel": (lambda dt, **b: ops.s4_kernel(poles, P, B, C, dt, 50, **b), (step,)),
        "selective_scan": (
            lambda u, dt, **b: ops.selective_scan(u, dt, A, by_position, by_position, **b).y,
            (u, u.abs()),
        ),
        "selective_state_update": (
            lambda h, u, **b: ops.selective_state_update(h, u, u.abs(), A, by_position[:, 0], by_position[:, 1], **b).y,
            (randn(2, 3, 4), u[:, 0]),
        ),
        "causal_conv1d": (lambda x, w, **b: ops.causal_conv1d(x, w, activation="silu", **b).y, (u, randn(3, 4))),
        "causal_conv1d_update": (
            lambda x, w, **b: ops.causal_conv1d_update(x, window, w, **b).y,
            (u[:, 0], randn(3, 4)),
        ),
        "add_rms_norm": (lambda x, w, **b: ops.add_rms_norm(x, w, residual=u, **b).output, (u, randn(3))),
        "packed_linear": (lambda x, **b: ops.packed_linear(x, packed, **b), (u,)),
        "linear_cross_entropy": (lambda h, w, **b: ops.linear_cross_entropy(h, w, targets, **b), (u, randn(5, 3))),
        "fft_conv": (lambda u, k, **b: ops.fft_conv(u, k, reverse_kernel=2 * k, **b), (u, randn(3, 9))),
    }


CALLS = _calls()


@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_and_torch_func_lose_no_derivative(op: str) -> None:
    """<g, J v> = <J^T g, v>, with J^T g from the kernels' own backward pass; a missing tangent was 0 without a word."""
    call, inputs = CALLS[op]
    v = tuple(torch.sin(1 + 3 * x) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    plain = call(*leaves)
    g = torch.cos(torch.arange(plain.numel()) * 1.0).reshape(plain.shape)
    wanted = torch.autograd.grad(plain, leaves, g)
    y, tangent = torch.func.jvp(call, inputs, v)  # pyright: ignore[reportAssignmentType]
    torch.testing.assert_close(y, plain.detach(), rtol=1e-4, atol=1e-5)
    products = torch.cat([(a.double() * b.double()).flatten() for a, b in zip(wanted, v, strict=True)])
    across, scale = products.sum(), products.abs().sum()
    assert abs((g.double() * tangent.double()).sum() - across) <= 1e-5 * scale
    assert across.abs() > 1e-3 * scale

    with forward_ad.dual_level():
        duals = call(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, v, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(duals).tangent, tangent)
    for found in (
        torch.func.grad(lambda *x: (call(*x) * g).sum(), argnums=tuple(range(len(inputs))))(*inputs),
        torch.func.vjp(call, *inputs)[1](g),
    ):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    many = call(*inputs[:-1], inputs[-1] + v[-1])
    rows = torch.func.vmap(lambda x: call(*inputs[:-1], x))(torch.stack([inputs[-1], inputs[-1] + v[-1]]))
    torch.testing.assert_close(rows, torch.stack([plain.detach(), many]), rtol=1e-4, atol=1e-5)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        J = jacobian(lambda x: call(*inputs[:-1], x))(inputs[-1]).reshape(plain.numel(), -1)
        torch.testing.assert_close((g.reshape(1, -1) @ J).view_as(inputs[-1]), wanted[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [op for op in CALLS if "cpu" in BACKENDS[op]])
def test_a_named_backend_of_kernels_refuses_a_transform(require_backend: Any, op: str) -> None:
    require_backend(op, "cpu")
    call, inputs = CALLS[op]
    cure = "reference" if op == "selective_scan" else "torch"
    refused = rf"^{op}: backend 'cpu' can't run this call: it has reverse-mode .* at work; use backend='{cure}'$"

    def named(*x: Any) -> torch.Tensor:
        return call(*x, backend="cpu")

    with pytest.raises(BackendUnavailableError, match=refused):
        torch.func.jvp(named, inputs, inputs)
    with pytest.raises(BackendUnavailableError, match=refused):
        torch.func.grad(lambda *x: named(*x).sum())(*inputs)
    with forward_ad.dual_level(), pytest.raises(BackendUnavailableError, match=refused):
        named(*(forward_ad.make_dual(x, x) for x in inputs))
    # a trained weight that the transform doesn't see, inside it
    leaf = inputs[0].clone().requires_grad_()
    with pytest.raises(BackendUnavailableError, match=refused):
        torch.func.vmap(lambda s: named(leaf, *inputs[1:]) * s)(torch.ones(2))
    assert torch.equal(named(*inputs), call(*inputs, backend="cpu"))


@pytest.mark.parametrize("op", ["selective_scan", "linear_cross_entropy"])
def test_a_function_with_its_own_backward_refuses_too(op: str) -> None:
    call, inputs = CALLS[op]
    with pytest.raises(BackendUnavailableError, match=r"use backend='reference'$"):
        torch.func.grad(lambda *x: call(*x, backend="torch").sum())(*inputs)


def test_what_takes_part_in_a_transform() -> None:
    x = torch.ones(3)
    leaf = torch.ones(3, requires_grad=True)
    assert not transforms_active()
    assert not transformed(x, leaf, None)
    with forward_ad.dual_level():
        assert transforms_active()
        dual = forward_ad.make_dual(x, x)
        assert transformed(None, dual)
        assert not transformed(x, leaf, dual.detach())
        with torch.no_grad():
            assert transformed(dual)
        torch.func.vmap(lambda row: torch.ones(1) * transformed(row))(dual)
    seen: list[bool] = []

    def look(value: torch.Tensor) -> torch.Tensor:
        seen.append(transformed(value))
        return value.sum()

    torch.func.vmap(look)(x)
    torch.func.vmap(torch.func.grad(look))(x)
    torch.func.grad(lambda v: torch.func.vmap(look)(v).sum())(x)
    torch.func.jvp(torch.func.vmap(look), (x,), (x,))
    torch.func.vmap(lambda s: look(leaf) * s)(x)  # not wrapped, and yet no autograd.Function may run here
    torch.func.vmap(lambda s: look(x) * s)(x)
    assert seen == [False, True, True, True, True, False]


def test_compiled_ops_lose_no_tangent() -> None:
    call, (step,) = CALLS["s4d_kernel"]
    traced = torch.compile(call, fullgraph=True, backend="eager")
    wanted = torch.func.jvp(call, (step,), (step,))[1]
    torch.testing.assert_close(traced(step), call(step))
    with forward_ad.dual_level():  # after a trace without one
        found = forward_ad.unpack_dual(traced(forward_ad.make_dual(step, step))).tangent
    torch.testing.assert_close(found, wanted)
    inside = torch.compile(lambda dt: torch.func.jvp(call, (dt,), (dt,))[1], backend="eager")
    torch.testing.assert_close(inside(step), wanted)
