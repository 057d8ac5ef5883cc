"""The scan in Triton: portable to the GPUs that Triton knows, and run on the CPU by its interpreter for tests.

A program walks one sequence for a block of channels. Where sequences x channels are too few programs for the chip, time
is cut into segments: end states of every segment, a small scan over segments, then the segments again from the right
state. States are kept at checkpoints alone and made again in the backward. No atomics: two runs give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statescan.ops import _triton
from statescan.ops._checks import refuse_second_derivative, wants_gradients
from statescan.ops._dispatch import Facts

__all__ = ["Plan", "plan", "refuses", "selective_scan"]


def refuses(facts: Facts) -> str | None:
    """Triton's devices, real A, float32 arithmetic, d_state up to 256."""
    if facts.complex_A:
        return "its kernels take real A only; complex A runs on backend='torch'"
    if facts.d_state > 256:
        return f"its kernels hold up to 256 states a channel, d_state is {facts.d_state}; use backend='torch'"
    if facts.batch_invariant:
        return "its partition of time depends on the batch, so batch_invariant can't be kept; use backend='cuda'"
    return _triton.refusal(facts)


@dataclass(frozen=True)
class Plan:
    """How one call is cut.

    Args:
        pieces, width: d_state, rounded up to a power of two, as so many pieces of so many states.
        channels: channels of a program, which is one warp.
        run: positions whose states the backward holds in registers, and whose inputs are asked for at once.
        every: positions between checkpoints.
        segment_forward, segment_backward: positions a program walks; 0 where it walks whole sequences.
        dot: sums over channels are products with ones, on tensor cores.
    """

    pieces: int
    width: int
    channels: int
    run: int
    every: int
    segment_forward: int
    segment_backward: int
    dot: bool


_EVERY = 16  # positions between checkpoints: four bytes a position and channel at 16 states
_RUN = 4
_PROGRAMS = 6  # a multiprocessor; where sequences and channels make less than half of it, time is cut


def _segment(programs: int, wanted: int, length: int) -> int:
    """Positions of a segment: 0 (no cut) where the programs are enough, else whole spans of checkpoints."""
    if 2 * programs >= wanted or length < 8 * _EVERY:
        return 0
    count = max(1, min(wanted // programs, length // (4 * _EVERY), 256))
    return math.ceil(math.ceil(length / count) / _EVERY) * _EVERY if count > 1 else 0


def plan(sequences: int, length: int, d_inner: int, d_state: int, groups: int, multiprocessors: int) -> Plan:
    """Cuts a call of this shape for a GPU with this many multiprocessors."""
    states = _triton.power_of_2(d_state)
    width = max(min(states, 4), states // 4)  # 16 states a thread at most
    per_group = d_inner // groups
    channels = min(32, max(1, 128 // width), _triton.power_of_2(per_group))
    programs = sequences * groups * math.ceil(per_group / channels)
    segment = _segment(programs, _PROGRAMS * multiprocessors, length)
    return Plan(states // width, width, channels, _RUN, _EVERY, segment, segment, channels >= 16 and states >= 8)


def _checkpoints(batch: int, length: int, sequences: int | None) -> int:
    """Checkpoints of a call. With packed sequences an upper bound that doesn't look at their lengths."""
    return batch * -(-length // _EVERY) if sequences is None else length // _EVERY + sequences


def _strides(x: Tensor | None, fixed: bool = False) -> tuple[int, ...]:
    """Strides as the kernels take them, of an activation (3) or of B or C (4)."""
    return (0,) * (4 if fixed else 3) if x is None or fixed else x.stride()


class _Call:
    """What forward and backward share: tensors made ready, and how they are cut."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        def of(x: Tensor) -> Tensor:
            return x.float().contiguous()

        def maybe(x: Tensor | None) -> Tensor | None:
            return None if x is None else of(x)

        self.u, self.dt, self.z, self.cu = u, dt, z, None if cu_seqlens is None else cu_seqlens.contiguous()
        self.A, self.D, self.bias, self.initial = of(A), maybe(D), maybe(dt_bias), maybe(initial_state)
        self.B, self.C = (of(x) if x.dim() == 2 else x for x in (B, C))
        self.softplus = dt_softplus
        self.batch, self.length, self.d_inner = u.shape
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.d_state = A.shape[1]
        groups = [1 if x.dim() == 2 else x.shape[2] for x in (B, C)]
        self.channels_B, self.channels_C = (self.d_inner // g for g in groups)
        self.groups = math.lcm(*groups)
        self.plan = plan(
            self.sequences, self.length, self.d_inner, self.d_state, self.groups, _triton.multiprocessors(u)
        )
        self.slots = _checkpoints(self.batch, self.length, None if cu_seqlens is None else self.sequences)

    def real(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def parts(self, segment: int) -> tuple[int, int, Tensor | None]:
        """(walks of time, of which each sequence has this many, the sequence of every walk where they are packed)."""
        if not segment:
            return self.sequences, 1, None
        if self.cu is None:
            each = -(-self.length // segment)
            return self.batch * each, each, None
        # sequence s begins at walk cu[s] // segment + s; some walks are past their sequence's end and do nothing
        total = self.length // segment + self.sequences
        first = self.cu[:-1] // segment + torch.arange(self.sequences, device=self.cu.device, dtype=torch.int32)
        walks = torch.arange(total, device=self.cu.device, dtype=torch.int32)
        return total, 1, torch.searchsorted(first, walks, right=True, out_int32=True) - 1

    def blocks(self) -> tuple[int, int]:
        """Blocks of channels: (of a group, in all)."""
        each = -(-(self.d_inner // self.groups) // self.plan.channels)
        return each, each * self.groups

    def options(self, **more: Any) -> dict[str, Any]:
        return {
            "N": self.d_state,
            "W": self.plan.width,
            "G": self.plan.pieces,
            "BD": self.plan.channels,
            "RUN": self.plan.run,
            "EVERY": self.plan.every,
            "SOFTPLUS": self.softplus,
            "FIXED_C": self.C.dim() == 2,
            "PACKED": self.cu is not None,
            "GPU": _triton.hardware(self.u),
            "num_warps": 1,
            "num_stages": 1,
            **more,
        }

    def combine(self, segment: int, each: int) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
        """Grid and the last arguments of the small scans over segments."""
        size = self.d_inner * self.d_state
        options = {"N": self.d_state, "BS": 128, "PACKED": self.cu is not None, "GPU": _triton.hardware(self.u)}
        return (-(-size // 128), self.sequences), (self.cu, self.length, size, segment, each), options


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_state: bool,
    with_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    c = _Call(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    run = _triton.kernels("selective_scan")
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final = c.real(c.sequences, c.d_inner, c.d_state) if with_state else c.real(0)
    # a slot of an empty sequence stays as it is, so that two runs return the same
    checkpoints = c.real(0)
    if with_checkpoints:
        checkpoints = c.real(c.slots, c.d_inner, c.d_state)
        if cu_seqlens is not None:
            checkpoints.zero_()
    segment = c.plan.segment_forward
    each_group, blocks = c.blocks()
    walks, each, owners = c.parts(segment)
    states = sums = None
    if segment:
        states, sums = c.real(walks, c.d_inner, c.d_state), c.real(walks, c.d_inner)

    def launch(ends: bool) -> None:
        run.scan_forward[(blocks * walks,)](
            u, dt, z, c.B, c.C, c.A, c.D, c.bias, c.initial, y,
            final if with_state else None, checkpoints if with_checkpoints and not ends else None,
            states, sums, c.cu, owners,
            *_strides(u), *_strides(dt), *_strides(z), *_strides(c.B, c.B.dim() == 2), *_strides(c.C, c.C.dim() == 2),
            c.length, c.d_inner, c.d_inner // c.groups, each_group, blocks, c.channels_B, c.channels_C,
            segment or c.length, each,
            **c.options(FIXED_B=c.B.dim() == 2, SPLIT=bool(segment), ENDS=ends),
        )  # fmt: skip

    with _triton.on_device_of(u):
        if c.cu is not None:
            _triton.check_boundaries("selective_scan", c.cu, c.length)
        if segment:
            launch(True)
            grid, sizes, options = c.combine(segment, each)
            run.scan_combine[grid](states, sums, c.A, c.initial, *sizes, **options)
        launch(False)
    return y, final, checkpoints


def _forward_fake(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_state: bool,
    with_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, d_inner = u.shape
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = batch if sequences is None else sequences
    final = A.new_empty((rows, d_inner, A.shape[1]) if with_state else (0,), dtype=torch.float32)
    slots = _checkpoints(batch, length, sequences)
    kept = A.new_empty((slots, d_inner, A.shape[1]) if with_checkpoints else (0,), dtype=torch.float32)
    return u.new_empty(u.shape), final, kept


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    with_initial: bool,
) -> _Gradients:
    c = _Call(u, dt, A, B, C, D, z, dt_bias, dt_softplus, None, cu_seqlens)
    run = _triton.kernels("selective_scan")
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    checkpoints = checkpoints.contiguous()
    segment = c.plan.segment_backward
    each_group, blocks = c.blocks()
    walks, each, owners = c.parts(segment)
    fixed_B, fixed_C = B.dim() == 2, C.dim() == 2
    du, ddt, dz = (torch.empty(u.shape, dtype=u.dtype, device=u.device) for _ in range(3))
    dA = c.real(walks, c.d_inner, c.d_state)
    dBC = c.real(blocks, c.batch, c.length, 2, c.d_state) if not (fixed_B and fixed_C) else None
    dB, dC = (c.real(walks, c.d_inner, c.d_state) if fixed else None for fixed in (fixed_B, fixed_C))
    dD, dbias = c.real(walks, c.d_inner), c.real(walks, c.d_inner)
    dinitial = c.real(c.sequences, c.d_inner, c.d_state) if with_initial else c.real(0)
    runs = c.plan.every // c.plan.run
    states = c.plan.pieces * c.plan.width
    scratch = c.real(blocks * walks * runs * c.plan.channels * states if runs > 1 else 1)
    sizes = (c.d_inner, c.d_inner // c.groups, each_group, blocks)
    strides_C, strides_dy = _strides(c.C, fixed_C), _strides(dy)
    adjoints = None
    with _triton.on_device_of(u):
        if c.cu is not None:
            _triton.check_boundaries("selective_scan", c.cu, c.length)
        if segment:
            adjoints, sums = c.real(walks, c.d_inner, c.d_state), c.real(walks, c.d_inner)
            run.scan_adjoint[(blocks * walks,)](
                dt, z, c.C, c.A, c.bias, dy, adjoints, sums, c.cu, owners,
                *_strides(dt), *_strides(z), *strides_C, *strides_dy,
                c.length, *sizes, c.channels_C, segment, each, **c.options(),
            )  # fmt: skip
            grid, last, options = c.combine(segment, each)
            run.scan_combine_adjoint[grid](adjoints, sums, c.A, dfinal, *last, **options)
        run.scan_backward[(blocks * walks,)](
            u, dt, z, c.B, c.C, c.A, c.D, c.bias, dy, dfinal, checkpoints, adjoints, scratch,
            du, ddt, dz, dA, dBC, dB, dC, dD, dbias, dinitial if with_initial else None, c.cu, owners,
            *_strides(u), *_strides(dt), *_strides(z), *_strides(c.B, fixed_B), *strides_C, *strides_dy,
            c.length, c.batch, *sizes, c.channels_B, c.channels_C, segment or c.length, each,
            **c.options(FIXED_B=fixed_B, SPLIT=bool(segment), DOT=c.plan.dot,
                        PRECISION="tf32x3" if u.dtype == torch.float32 else "tf32"),
        )  # fmt: skip

    if _triton.rehearsing():
        return du, ddt, dA, du, ddt, dD, dz, dbias, dinitial  # looked at by no one

    def of(shares: Tensor | None, which: int, like: Tensor) -> Tensor:
        if shares is not None:
            return shares.sum(0).to(like.dtype)
        assert dBC is not None
        grouped = dBC[..., which, :].unflatten(0, (like.shape[2], -1))
        return grouped.sum(1).permute(1, 2, 0, 3).to(like.dtype).contiguous()

    nothing = c.real(0)
    return (
        du,
        ddt,
        dA.sum(0),
        of(dB, 0, B),
        of(dC, 1, C),
        dD.sum(0) if D is not None else nothing,
        dz if z is not None else u.new_empty(0),
        dbias.sum(0) if dt_bias is not None else nothing.clone(),
        dinitial,
    )


def _backward_fake(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    with_initial: bool,
) -> _Gradients:
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def real(shape: tuple[int, ...]) -> Tensor:
        return A.new_empty(shape, dtype=torch.float32)

    return (
        u.new_empty(u.shape),
        u.new_empty(u.shape),
        real(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        real((0,) if D is None else D.shape),
        u.new_empty((0,) if z is None else u.shape),
        real((0,) if dt_bias is None else dt_bias.shape),
        real((rows, u.shape[2], A.shape[1]) if with_initial else (0,)),
    )


def _backward_op(dy: Tensor, dfinal: Tensor | None, *saved: Any) -> _Gradients:
    def launch(dy: Tensor, dfinal: Tensor | None) -> _Gradients:
        return _backward(dy, dfinal, *saved)

    return _triton.launch_ready(launch, dy, dfinal)


def _rehearse_backward(*arguments: Any) -> None:
    """The backward passes that may follow a call with these arguments: the final state's gradient may come or not."""
    initial_state, cu_seqlens, with_state = arguments[9:]
    y, final, checkpoints = _forward_fake(*arguments, with_checkpoints=True)
    saved = [*arguments[:9], cu_seqlens, checkpoints, initial_state is not None]
    for dfinal in (None, final) if with_state else (None,):
        _backward(y, dfinal, *saved)


_INPUTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus"
_triton.register(
    "selective_scan_triton",
    f"({_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens, bool with_state, bool with_checkpoints) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_triton.register(
    "selective_scan_triton_backward",
    f"(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor? cu_seqlens, Tensor checkpoints, bool with_initial) "
    f"-> ({', '.join(['Tensor'] * 9)})",
    _backward_op,
    _backward_fake,
)
_forward_op = torch.ops.statescan.selective_scan_triton.default


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        with_state: bool,
    ) -> tuple[Tensor, Tensor]:
        y, final_state, checkpoints = _forward_op(
            u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, with_state, True
        )
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, cu_seqlens, checkpoints)
        ctx.dt_softplus, ctx.with_state, ctx.with_initial = dt_softplus, with_state, initial_state is not None
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> Any:  # type: ignore[override]
        refuse_second_derivative("selective_scan", "triton")
        u, dt, A, B, C, D, z, dt_bias, cu_seqlens, checkpoints = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else dy
        du, ddt, dA, dB, dC, dD, dz, dbias, dinitial = torch.ops.statescan.selective_scan_triton_backward.default(
            *(dy, dfinal if ctx.with_state else None, u, dt, A, B, C, D, z, dt_bias),
            *(ctx.dt_softplus, cu_seqlens, checkpoints, ctx.with_initial),
        )
        return (
            *(du, ddt, dA, dB, dC),
            None if D is None else dD,
            None if z is None else dz,
            None if dt_bias is None else dbias,
            *(None, dinitial if ctx.with_initial else None, None, None),
        )


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`statescan.ops.selective_scan` in Triton, from settled arguments.

    Without a gradient to come nothing is kept; with one, the state before every 16th position.
    """
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    if wants_gradients(*inputs):
        arguments = (u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, return_final_state)
        _triton.make_ready(_rehearse_backward, *arguments)
        y, final_state = _Scan.apply(*arguments)
    else:
        y, final_state, _ = _forward_op(
            u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, return_final_state, False
        )
    return y, final_state if return_final_state else None
