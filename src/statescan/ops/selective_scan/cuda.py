"""The scan on NVIDIA GPUs: kernels in scan_forward.cu and scan_backward.cu, compiled at first use.

Where batch x channels fill the chip time is walked in one pass; where they don't it is cut into chunks: end states of
every chunk, a small scan over chunks, then the chunks again from the right state.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.errors import ConfigError, ShapeError
from statescan.ops import _cuda
from statescan.ops._checks import as_checked, is_checked, refuse_second_derivative, wants_gradients
from statescan.ops._cuda import i32
from statescan.ops._dispatch import Facts

__all__ = ["Plan", "describe", "launch_backward", "launch_forward", "plan", "refuses", "selective_scan"]

_FORWARD = Path(__file__).with_name("scan_forward.cu")
_BACKWARD = Path(__file__).with_name("scan_backward.cu")
_MARKS = Path(__file__).with_name("marks.cu")
_IN = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_SHARED_BYTES = 48 * 1024  # what a block has without asking
_SHARED_LIMIT = 99 * 1024  # what it can ask for on every architecture from 8.0 on
_SHARED_HALF = 113 * 1024  # what each of two blocks can have on a multiprocessor of an H100
_SHARED_WHOLE = 227 * 1024  # what one alone can have there


def refuses(facts: Facts) -> str | None:
    """CUDA devices, real A, d_state up to 256."""
    if facts.device != "cuda":
        return _cuda.elsewhere(facts.device)
    if facts.complex_A:
        return "its kernels take real A only; complex A runs on backend='torch'"
    if facts.d_state > 256:
        return (
            f"its kernels hold up to 256 states a channel in registers, d_state is {facts.d_state}; use backend='torch'"
        )
    if facts.dtype == torch.float64 and facts.d_state > 128:
        return (
            f"in float64 its kernels take up to 128 states a channel, d_state is {facts.d_state}; use backend='torch'"
        )
    return _cuda.unavailable_reason()


@dataclass(frozen=True)
class Plan:
    """How one call is cut.

    Args:
        lanes, states: lanes a channel, states a lane.
        threads_forward, threads_backward: threads a block.
        lanes_forward, states_forward: as lanes and states where the forward differs.
        channels_forward, channels_backward: channels a block.
        tile: steps whose inputs are in shared memory at once; a checkpoint of the state is kept at every tile's start.
        history: steps whose states the backward holds in registers.
        parts: runs of `history` steps whose partial dB and dC have room at once.
        shared: bytes of shared memory of a block of the backward.
        shared_ends: the same of its pass that finds what leaves a chunk.
        chunks_forward, chunks_backward: pieces of time that run side by side (1: one pass).
        chunk_len_forward, chunk_len_backward: steps of each.
        pieces_forward: in how many pieces the forward's first pass, which finds the states that chunks begin with, cuts
            a chunk.
        halves: whether two blocks of the backward are one, whose halves leave one partial of dB and dC, in a call of
            the form that models use.
    """

    lanes: int
    states: int
    threads_forward: int
    lanes_forward: int
    states_forward: int
    channels_forward: int
    channels_backward: int
    threads_backward: int
    tile: int
    history: int
    parts: int
    shared: int
    shared_ends: int
    chunks_forward: int
    chunks_backward: int
    chunk_len_forward: int
    chunk_len_backward: int
    pieces_forward: int
    halves: bool


_NT_FORWARD, _NT_BACKWARD, _NT_SUMS, _NT_MARKS = 256, 256, 256, 256  # threads a block
_RESIDENT_FORWARD, _RESIDENT_BACKWARD = 2, 2  # blocks that a multiprocessor holds at once
_LONGEST = 2**31 - 2**20  # positions are counted in 32 bits
# Two lanes a channel take fewer instructions a state than four, but give half the warps: worth it where there are this
# many blocks of 64 channels a multiprocessor, or where time is long enough to be cut into as many chunks as it takes.
_BLOCKS_FOR_TWO_LANES, _LENGTH_FOR_TWO_LANES = 3, 16384
_RESIDENT_ENDS = 4  # the same of the backward's pass that finds what leaves a chunk
_BASES = 17 * 3 * 8 + 16  # bytes of the addresses that a block of the backward keeps, and room for their alignment
_RING = 2 * 16  # bytes a thread of the sums that one half of a block hands to the other
_HISTORY = (8, 4, 2)  # steps whose states the backward keeps in registers, the most that fit


# Steps a chunk where the partition may depend on the length alone, and the most chunks.
_INVARIANT_LENGTH, _INVARIANT_CHUNKS = 512, 16
# Steps of a chunk from which on the backward takes more chunks, and in how many rounds of blocks they then run: the
# pass that finds what leaves a chunk can use more blocks, and the last round is a shorter one.
_LONG_CHUNK, _ROUNDS = 4096, 4
# The same of the forward's first pass, and the pieces of a chunk there: as many blocks as chunks leave some
# multiprocessors with a block less than others, three times as many share the work more evenly. (Not of packed rows,
# where it was not measured.)
_LONG_FORWARD, _PIECES_FORWARD = 2048, 3


def _chunks(blocks: int | None, wanted: int, length: int, tile: int) -> tuple[int, int]:
    """(chunks, their length): one where the grid already fills the chip, else as many as fill it, of whole tiles.
    `blocks` None: by the length alone."""
    if blocks is None:
        count = max(1, min(length // _INVARIANT_LENGTH, _INVARIANT_CHUNKS))
    elif blocks >= wanted * 3 // 8 or length < 8 * tile:
        count = 1
    else:
        count = max(1, min(wanted // blocks, length // (4 * tile), 128))
    if count == 1:
        return 1, max(length, 1)
    each = math.ceil(math.ceil(length / count) / tile) * tile
    return math.ceil(length / each), each


def _in_twos(blocks: int, multiprocessors: int) -> bool:
    """Whether a multiprocessor has two of the backward's blocks in the last round, too: it is over no sooner where all
    have two or none."""
    return (blocks - 1) % (_RESIDENT_BACKWARD * multiprocessors) >= multiprocessors


def _shared_of_two(shared: int, threads: int) -> int:
    """Shared memory of two blocks of the backward that are one."""
    return 2 * shared + _RING * threads


@functools.lru_cache(maxsize=256)
def plan(
    batch: int,
    length: int,
    d_inner: int,
    d_state: int,
    groups: int,
    multiprocessors: int,
    wide: bool,
    packed: bool,
    batch_invariant: bool = False,
    shared_limit: int = _SHARED_LIMIT,
    shared_whole: int = 0,
) -> Plan:
    """Cuts a call of this shape for a chip with this many multiprocessors; `wide`: float64 arithmetic;
    `packed`: with cu_seqlens; `batch_invariant`: without a look at the batch; `shared_limit`, `shared_whole`: bytes of
    shared memory that a block of the backward may have beside another one, and alone."""
    lanes = max(4, min(32, 1 << math.ceil(math.log2(max(1, math.ceil(d_state / 4))))))
    states = 4 if d_state <= 128 else 8
    group_channels = d_inner // groups
    filled = batch * groups * math.ceil(group_channels / 64) >= _BLOCKS_FOR_TWO_LANES * multiprocessors
    two = filled and not batch_invariant
    two = (two or length >= _LENGTH_FOR_TWO_LANES) and d_state <= 16 and not wide
    threads_forward, lanes_forward = (128, 2) if two else (_NT_FORWARD, lanes)
    states_forward = 8 if two and d_state > 8 else states
    resident_forward = _RESIDENT_FORWARD * _NT_FORWARD // threads_forward
    channels_forward = threads_forward // lanes_forward
    size = 8 if wide else 4
    padded = lanes * states

    def shared(threads: int, tile: int, history: int, parts: int) -> int:  # struct Shared in scan_backward.cu
        channels, warps = threads // lanes, threads // 32
        staged = 4 * tile * channels + 2 * tile * padded + 2 * channels
        beside = 8 * tile * packed + _BASES
        if parts == 0:  # no history, no sums
            return size * staged + beside
        kept = tile // history * states * threads
        sums = 2 * parts * warps * history * padded + 2 * states * threads
        shares = 16 * min(threads, tile * channels // 8)
        return size * (staged + kept + sums + shares + 16) + beside

    # The tile decides where checkpoints are, so it may depend on nothing but d_state and the arithmetic.
    options = [
        (threads, tile, history)
        for threads in (_NT_BACKWARD, 128)
        for tile in (32, 16, 8, 4)
        for history in _HISTORY
        if history <= tile and history * states <= 32 and threads // lanes >= 8
    ]
    threads, tile, history = next(o for o in options if shared(*o, 1) <= _SHARED_LIMIT)
    parts = next(q for q in (tile // history, 2, 1) if q == 1 or shared(threads, tile, history, q) <= shared_limit)
    channels_backward = threads // lanes
    forward_blocks = None if batch_invariant else batch * groups * math.ceil(group_channels / channels_forward)
    backward_blocks = None if batch_invariant else batch * groups * math.ceil(group_channels / channels_backward)
    unit, pieces_forward = max(tile, 32), 1
    forward = _chunks(forward_blocks, resident_forward * multiprocessors, length, unit)
    if forward[0] > 1 and forward[1] >= _LONG_FORWARD and not packed:
        pieces_forward = _PIECES_FORWARD
        each = math.ceil(forward[1] / unit / pieces_forward) * unit * pieces_forward
        forward = math.ceil(length / each), each
    backward = _chunks(backward_blocks, _RESIDENT_BACKWARD * multiprocessors, length, tile)
    if not batch_invariant and backward[0] > 1 and backward[1] >= _LONG_CHUNK:
        backward = _chunks(backward_blocks, _ROUNDS * _RESIDENT_BACKWARD * multiprocessors, length, tile)
    halves = (
        backward_blocks is not None
        and not packed
        and _in_twos(backward_blocks * backward[0], multiprocessors)
        and (lanes, states, history, parts) == (4, 4, 8, tile // 8)
        and d_state % 8 == group_channels % (2 * channels_backward) == 0
        and _shared_of_two(shared(threads, tile, history, parts), threads) <= shared_whole
    )
    return Plan(
        lanes,
        states,
        threads_forward,
        lanes_forward,
        states_forward,
        channels_forward,
        channels_backward,
        threads,
        tile,
        history,
        parts,
        shared(threads, tile, history, parts),
        shared(threads, tile, history, 0),
        forward[0],
        backward[0],
        forward[1],
        backward[1],
        pieces_forward,
        halves,
    )


def describe(
    facts: Facts,
    batch: int,
    length: int,
    d_inner: int,
    groups: int = 1,
    packed: bool = False,
    multiprocessors: int | None = None,
) -> str:
    """The plan of a call of these sizes in words, and why it is so; `multiprocessors`: those of this machine's GPU, if
    not given.

    Raises:
        ConfigError: a size is wrong, or there is no GPU to ask.
    """
    sizes = {"batch": batch, "length": length, "d_inner": d_inner, "groups": groups, "d_state": facts.d_state}
    if multiprocessors is not None:
        sizes["multiprocessors"] = multiprocessors
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"explain: {name} must be at least 1, got {size}; give the sizes of the call")
    if d_inner % groups:
        raise ConfigError(f"explain: groups must divide d_inner = {d_inner}, got {groups}; give the sizes of the call")
    room = _SHARED_HALF, _SHARED_WHOLE
    if multiprocessors is None:
        if not torch.cuda.is_available():
            raise ConfigError("explain: torch sees no CUDA device to ask; give multiprocessors, e.g. 132 for an H100")
        chip = torch.cuda.get_device_properties(torch.cuda.current_device())
        multiprocessors, room = int(chip.multi_processor_count), _room(chip)
    wide = facts.dtype == torch.float64
    p = plan(batch, length, d_inner, facts.d_state, groups, multiprocessors, wide, packed, facts.batch_invariant, *room)
    lines = []
    for name, lanes, states, threads, channels, chunks, steps, pieces in (
        ("forward", p.lanes_forward, p.states_forward, p.threads_forward, p.channels_forward,
         p.chunks_forward, p.chunk_len_forward, p.pieces_forward),
        ("backward", p.lanes, p.states, p.threads_backward, p.channels_backward,
         p.chunks_backward, p.chunk_len_backward, 1),
    ):  # fmt: skip
        blocks = batch * groups * math.ceil(d_inner // groups / channels)
        if chunks == 1:
            cut = "one pass over time"
        else:
            cut = f"time in {chunks} chunks of {steps} steps"
            if pieces > 1:
                cut += f", whose start states are found in pieces of {steps // pieces}"
        if facts.batch_invariant:
            why = "by the length alone, as batch_invariant asks"
        elif chunks > 1:
            why = f"{blocks} blocks do not fill {multiprocessors} multiprocessors"
        elif length < 8 * max(p.tile, 32):
            why = "too few steps to share out"
        else:
            why = f"{blocks} blocks keep {multiprocessors} multiprocessors busy"
        lines.append(
            f"{name}: {blocks} blocks of {channels} channels, {threads} threads ({lanes} lanes a channel, {states} "
            f"states a lane); {cut}: {why}"
        )
    lines.append(f"checkpoints every {p.tile} steps; backward: {p.shared} bytes of shared memory a block")
    if p.halves and facts.dtype == torch.bfloat16:
        lines.append("with z, B and C of every step and aligned inputs two blocks of the backward are one")
    return "; ".join(lines)


def _room(chip: Any) -> tuple[int, int]:
    """Shared memory that a block of the backward may have so that two of them fit a multiprocessor, where that is more
    than every chip gives, and what one alone may have; a block takes 1 KiB for itself."""
    whole = chip.shared_memory_per_multiprocessor
    return max(_SHARED_LIMIT, whole // 2 - 1024), whole - 1024


def _rows(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (x, 0, 0) if x is None else (x, x.stride(0), x.stride(1))


def _grouped(x: Tensor, fixed: bool) -> tuple[Tensor | None, int, int, int]:
    if fixed:
        return None, 0, 0, 0
    return x, x.stride(0), x.stride(1), x.stride(2) if x.dim() == 4 else 0


def _aligned(*tensors: Tensor | None) -> bool:
    for x in tensors:
        if x is None:
            continue
        unit = 16 // x.element_size()
        if x.data_ptr() % 16 or any(s % unit for s in x.stride()[:-1]):
            return False
    return True


def _close(*tensors: Tensor | None) -> bool:
    """Whether the rows of a tile, 32 at most, lie within the 4 GiB that the kernels' short offsets reach."""
    return all(x is None or 32 * x.stride(1) * x.element_size() < 2**32 for x in tensors)


def _contiguous_last(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@dataclass
class _Call:
    """What forward and backward share: tensors made ready, the plan, and the argument lists."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool
    initial: Tensor | None
    starts: Tensor | None
    ends: Tensor | None
    plan: Plan
    groups: int

    @property
    def real(self) -> torch.dtype:
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32

    @property
    def varlen(self) -> bool:
        return self.starts is not None

    @property
    def fixed_B(self) -> bool:
        return self.B.dim() == 2

    @property
    def fixed_C(self) -> bool:
        return self.C.dim() == 2

    def options(self, **more: int) -> dict[str, int]:
        p = self.plan
        return {
            "IN": _IN[self.u.dtype],
            "N": self.A.shape[1],
            "G": p.lanes,
            "NS": p.states,
            "VARLEN": int(self.varlen),
            "FIXB": int(self.fixed_B),
            "FIXC": int(self.fixed_C),
            "HASZ": int(self.z is not None),
            "SOFTPLUS": int(self.softplus),
            **more,
        }

    def inputs(self) -> list[Any]:
        fixed_B = self.B.to(self.real).contiguous() if self.fixed_B else None
        fixed_C = self.C.to(self.real).contiguous() if self.fixed_C else None
        self._held = (fixed_B, fixed_C)
        return [
            *_rows(self.u),
            *_rows(self.dt),
            *_rows(self.z),
            *_grouped(self.B, self.fixed_B),
            *_grouped(self.C, self.fixed_C),
            self.A,
            fixed_B,
            fixed_C,
            self.D,
            self.bias,
            self.initial,
            self.starts,
            self.ends,
        ]

    def wide_access(self, channels: int, *others: Tensor | None) -> dict[str, int]:
        """Whether the kernels may move eight neighbouring numbers at once: VEC for activations, VECB for B and C."""
        whole = (self.u.shape[2] // self.groups) % channels == 0
        rows = (self.u, self.dt, self.z, *others)
        matrices = [x for x, fixed in ((self.B, self.fixed_B), (self.C, self.fixed_C)) if not fixed]
        return {
            "VEC": int(whole and _aligned(*rows) and _close(*rows)),
            "VECB": int(self.A.shape[1] % 8 == 0 and _aligned(*matrices)),
        }

    def grid(self, channels: int, chunks: int) -> tuple[tuple[int, int, int], int]:
        per_group = math.ceil(self.u.shape[2] // self.groups / channels)
        return (self.groups * per_group, self.u.shape[0], chunks), per_group

    def part(self, rows: slice) -> _Call:
        """The same call for these rows of the batch alone."""
        B, C = (x if fixed else x[rows] for x, fixed in ((self.B, self.fixed_B), (self.C, self.fixed_C)))
        z, initial = (None if x is None else x[rows] for x in (self.z, self.initial))
        return replace(self, u=self.u[rows], dt=self.dt[rows], B=B, C=C, z=z, initial=initial)


def _spread(x: Tensor, groups: int) -> Tensor:
    """B or C with as many groups as the kernels run: without a copy where all groups share one."""
    if groups == 1 or x.dim() == 2 or (x.dim() == 4 and x.shape[2] == groups):
        return x
    x = x.unsqueeze(2) if x.dim() == 3 else x
    return x.expand(-1, -1, groups, -1) if x.shape[2] == 1 else x.repeat_interleave(groups // x.shape[2], dim=2)


def _marks(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """At each position the number of the sequence that starts there, and of the one that ends there, from 1, else 0.
    The kernel that makes them stops the program where the boundaries are wrong."""
    capturing = torch.cuda.is_current_stream_capturing()  # a graph makes them anew in every replay
    known = None if capturing else as_checked(cu_seqlens, length)
    kept = getattr(cu_seqlens, "_statescan_marks", None)
    if kept is not None and known is not None and kept[0] == known and is_checked(cu_seqlens, length):
        return kept[1]  # of the layer before: all have the same boundaries
    starts, ends = torch.zeros(2, length, dtype=torch.int32, device=cu_seqlens.device)
    sequences = cu_seqlens.shape[0] - 1
    run = _cuda.kernel(_MARKS, "scan_marks", {}, _NT_MARKS, cu_seqlens.device.index or 0)
    bounds = cu_seqlens.to(torch.int32).contiguous()
    run((math.ceil(sequences / _NT_MARKS), 1, 1), bounds, starts, ends, i32(sequences), i32(length))
    if known is not None:
        cu_seqlens._statescan_marks = known, (starts, ends)  # type: ignore[attr-defined]
    return starts, ends


def _prepare(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    batch_invariant: bool,
) -> _Call:
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, length, d_inner = u.shape
    if length > _LONGEST:
        raise ShapeError(
            f"selective_scan: u must have a length of at most {_LONGEST} on backend 'cuda', got {length}; "
            "cut it, and hand the final_state on as initial_state"
        )
    groups = math.lcm(*(x.shape[2] if x.dim() == 4 else 1 for x in (B, C)))
    B, C = (_spread(x, groups) for x in (B, C))
    u, dt, z, B, C = (_contiguous_last(x) for x in (u, dt, z, B, C))  # type: ignore[assignment]
    starts, ends = (None, None) if cu_seqlens is None else _marks(cu_seqlens, length)
    chip = torch.cuda.get_device_properties(u.device)
    wide, packed = real == torch.float64, cu_seqlens is not None
    count = chip.multi_processor_count
    cut = plan(batch, length, d_inner, A.shape[1], groups, count, wide, packed, batch_invariant, *_room(chip))

    def of(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(real).contiguous()

    return _Call(
        u, dt, A.to(real).contiguous(), B, C, of(D), z, of(bias), softplus, of(initial), starts, ends, cut, groups
    )


def _states(c: _Call, chunks: int) -> tuple[Tensor, Tensor]:
    batch, _, d_inner = c.u.shape
    return (
        torch.empty(batch, chunks, d_inner, c.A.shape[1], dtype=c.real, device=c.u.device),
        torch.empty(batch, chunks, d_inner, dtype=c.real, device=c.u.device),
    )


def _place(given: Tensor | None, like: Tensor, name: str) -> Tensor:
    """Where a result goes: a view that the caller gave, or fresh memory."""
    if given is None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if given.shape != like.shape or given.dtype != like.dtype or (given.stride(-1) != 1 and given.shape[-1] > 1):
        raise ShapeError(
            f"selective_scan: {name} must be {tuple(like.shape)} {like.dtype} with neighbouring channels side by side, "
            f"got {tuple(given.shape)} {given.dtype} with strides {given.stride()}; pass None or a slice"
        )
    return given


def _forward(
    c: _Call, cu_seqlens: Tensor | None, want_final: bool, want_checkpoints: bool, y: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, d_inner = c.u.shape
    n, p, device = c.A.shape[1], c.plan, c.u.device
    y = _place(y, c.u, "y")
    if batch > _cuda.MOST_BLOCKS:
        pieces = [_forward(c.part(r), None, want_final, want_checkpoints, y[r]) for r in _cuda.pieces(batch)]
        _, finals, kept = zip(*pieces, strict=True)
        return y, torch.cat(finals), torch.cat(kept)
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    final = torch.empty(0, dtype=c.real, device=device)
    if want_final:
        shape = (rows, d_inner, n)
        if c.varlen or length == 0:  # empty sequences keep what they had
            final = torch.zeros(shape, dtype=c.real, device=device) if c.initial is None else c.initial.clone()
        else:
            final = torch.empty(shape, dtype=c.real, device=device)
    checkpoints = torch.empty(0, dtype=c.real, device=device)
    if want_checkpoints:
        checkpoints = torch.empty(batch, math.ceil(length / p.tile), d_inner, n, dtype=c.real, device=device)
    tile = p.tile
    slot = 8 if c.real == torch.float64 else 4
    while (
        slot * 4 * tile * (p.channels_forward + 8 + p.lanes_forward * p.states_forward) + 16 * tile + 1024
        > _SHARED_BYTES
    ):
        tile //= 2
    states = sums = None
    starts = (p.chunks_forward - 1) * p.pieces_forward + 1  # of pieces, and of the last chunk, which is not cut
    if p.chunks_forward > 1:
        states, sums = _states(c, starts)

    def forward_options(**more: int) -> dict[str, int]:
        access = c.wide_access(p.channels_forward, y)
        lanes = {"G": p.lanes_forward, "NS": p.states_forward, "NT": p.threads_forward}
        resident = _RESIDENT_FORWARD * _NT_FORWARD // p.threads_forward
        return c.options(TILE=tile, MINB=resident, EVERY=p.tile, **lanes, **access, **more)

    def launch(part: int, blocks: int, chunks: int, chunk_len: int) -> None:
        grid, per_group = c.grid(p.channels_forward, blocks)
        options = forward_options(PASS=part, **({} if part else {"CUT": p.pieces_forward}))
        run = _cuda.kernel(_FORWARD, "scan_forward", options, p.threads_forward, device.index or 0)
        run(
            grid,
            *c.inputs(),
            *_rows(y),
            final if want_final else None,
            checkpoints if want_checkpoints else None,
            states,
            sums,
            *(i32(v) for v in (length, d_inner, d_inner // c.groups, per_group, chunk_len, chunks)),
        )

    if states is not None and sums is not None:
        launch(1, starts - 1, starts, p.chunk_len_forward // p.pieces_forward)
        options = forward_options(PASS=1)
        combine = _cuda.kernel(_FORWARD, "scan_combine", options, 128, device.index or 0)
        first = None if c.varlen else c.initial
        sizes = (i32(d_inner), i32(starts))
        combine((math.ceil(d_inner * n / 128), batch, 1), states, sums, c.A, first, *sizes)
    launch(0, p.chunks_forward, p.chunks_forward, p.chunk_len_forward)
    return y, final, checkpoints


def _backward_options(c: _Call, part: int, *beside: Tensor | None, again: bool = False) -> dict[str, int]:
    p = c.plan
    resident = _RESIDENT_ENDS if part == 1 and p.lanes == 4 else _RESIDENT_BACKWARD
    resident = 1 if c.real == torch.float64 else resident  # a double takes two registers
    sizes = {"TILE": p.tile, "HT": p.history, "PARTS": p.parts, "NT": p.threads_backward, "MINB": resident}
    options = c.options(PASS=part, HASY=int(again), **sizes, **c.wide_access(p.channels_backward, *beside))
    return options | {"HALVES": 2 if part == 0 and p.halves and _tuned(options) else 1}


def _tuned(options: dict[str, int]) -> bool:
    """Whether a call whose sizes allow halves has the form that models use, which scan_backward.cu has in an order of
    its own."""
    o = options
    return o["IN"] == o["HASZ"] == o["VEC"] == o["VECB"] == 1 and o["FIXB"] == o["FIXC"] == 0


def _backward_kernel(c: _Call, options: dict[str, int]) -> _cuda.Kernel:
    p, threads = c.plan, options["HALVES"] * c.plan.threads_backward
    shared = p.shared_ends if options["PASS"] else p.shared
    if options["HALVES"] == 2:
        shared = _shared_of_two(shared, p.threads_backward)
    return _cuda.kernel(_BACKWARD, "scan_backward", options, threads, c.u.device.index or 0, shared)


def _backward(
    c: _Call,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    checkpoints: Tensor,
    B: Tensor,
    C: Tensor,
    du: Tensor | None = None,
    ddt: Tensor | None = None,
    dz: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias, initial_state; an empty tensor for an input that isn't there."""
    batch, length, d_inner = c.u.shape
    if batch > _cuda.MOST_BLOCKS:
        return _backward_in_pieces(c, dy, dfinal, checkpoints, B, C, du, ddt, dz, dB, dC, y)
    n, p, device = c.A.shape[1], c.plan, c.u.device
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    gu, gdt = _place(du, c.u, "du"), _place(ddt, c.u, "ddt")
    chunks = p.chunks_backward

    def real(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=c.real, device=device)

    gz = _place(dz, c.u, "dz") if c.z is not None else real(0)
    beside = (dy, gu, gdt, gz if c.z is not None else None, y)
    options = _backward_options(c, 0, *beside, again=y is not None)
    (shares, *_), _ = c.grid(p.channels_backward * options["HALVES"], chunks)  # blocks that each leave one of dB and dC
    gA = real(batch, chunks, d_inner, n)
    gB = real(batch, chunks, d_inner, n) if c.fixed_B else real(shares, batch, length, n)
    gC = real(batch, chunks, d_inner, n) if c.fixed_C else real(shares, batch, length, n)
    gD, gbias = real(batch, chunks, d_inner), real(batch, chunks, d_inner)
    ginit = real(0)
    if c.initial is not None:
        # An empty sequence hands its final state's gradient through.
        if c.varlen:
            ginit = torch.zeros_like(c.initial) if dfinal is None else dfinal.to(c.real).clone()
        else:
            ginit = torch.empty_like(c.initial)
    if dfinal is not None:
        dfinal = dfinal.to(c.real).contiguous()
    states = sums = None
    if chunks > 1:
        states, sums = _states(c, chunks)

    def launch(options: dict[str, int]) -> None:
        grid, per_group = c.grid(p.channels_backward * options["HALVES"], chunks)
        run = _backward_kernel(c, options)
        run(
            (*grid[:2], chunks - options["PASS"]),  # what leaves the first chunk nobody asks
            *c.inputs(),
            *_rows(dy),
            dfinal,
            checkpoints,
            *_rows(gu),
            *_rows(gdt),
            *_rows(gz if c.z is not None else None),
            *_rows(y),
            gA,
            gB,
            gC,
            gD,
            gbias,
            ginit if c.initial is not None else None,
            states,
            sums,
            *(i32(v) for v in (length, d_inner, d_inner // c.groups, per_group, p.chunk_len_backward)),
            i32(chunks),
        )

    if states is not None and sums is not None:
        first = _backward_options(c, 1, *beside, again=y is not None)  # what leaves each chunk
        launch(first)
        combine = _cuda.kernel(_BACKWARD, "scan_combine_backward", first, 128, device.index or 0)
        last = None if c.varlen else dfinal
        sizes = (i32(d_inner), i32(chunks))
        combine((math.ceil(d_inner * n / 128), batch, 1), states, sums, c.A, last, *sizes)
    launch(options)

    # One launch adds up everything that blocks and chunks left apart.
    dA, dD, dbias = real(d_inner, n), real(d_inner if c.D is not None else 0), real(0 if c.bias is None else d_inner)
    outs: list[Tensor] = []
    places: list[Any] = []
    ends: list[int] = []
    for partial, like, fixed, given, name in ((gB, B, c.fixed_B, dB, "dB"), (gC, C, c.fixed_C, dC, "dC")):
        out = real(d_inner, n) if fixed else _place(given, like, name)
        outs.append(out)
        places += [None if fixed else partial, *_grouped(out, fixed), i32(out.shape[2] if out.dim() == 4 else 1)]
        ends.append(0 if fixed else math.ceil(out.numel() / (_NT_SUMS * (4 if n % 4 == 0 else 1))))
    ends.append(math.ceil(d_inner * n / (_NT_SUMS * (4 if n % 4 == 0 else 1))))
    ends += [math.ceil(d_inner / _NT_SUMS)] * 2
    add = _cuda.kernel(_BACKWARD, "scan_sums", options, _NT_SUMS, device.index or 0)
    add(
        (sum(ends), 1, 1),
        *places,
        *((gB, outs[0]) if c.fixed_B else (None, None)),
        *((gC, outs[1]) if c.fixed_C else (None, None)),
        gA,
        dA,
        gD,
        dD if c.D is not None else None,
        gbias,
        dbias if c.bias is not None else None,
        *(i32(v) for v in (batch, length, d_inner, shares, batch * chunks)),
        *(i32(sum(ends[: k + 1])) for k in range(4)),
    )
    return gu, gdt, dA, *outs, dD, gz, dbias, ginit


def _backward_in_pieces(
    c: _Call,
    dy: Tensor,
    dfinal: Tensor | None,
    checkpoints: Tensor,
    B: Tensor,
    C: Tensor,
    du: Tensor | None,
    ddt: Tensor | None,
    dz: Tensor | None,
    dB: Tensor | None,
    dC: Tensor | None,
    y: Tensor | None,
) -> tuple[Tensor, ...]:
    """`_backward` where one launch does not take all rows: the pieces' shares of what rows share are added in order."""
    du, ddt = _place(du, c.u, "du"), _place(ddt, c.u, "ddt")
    dz = None if c.z is None else _place(dz, c.u, "dz")
    dB = None if c.fixed_B else _place(dB, B, "dB")
    dC = None if c.fixed_C else _place(dC, C, "dC")

    def piece(r: slice) -> tuple[Tensor, ...]:
        B_, C_ = B if c.fixed_B else B[r], C if c.fixed_C else C[r]
        beside = (None if x is None else x[r] for x in (du, ddt, dz, dB, dC, y))
        return _backward(c.part(r), None, dy[r], None if dfinal is None else dfinal[r], checkpoints[r], B_, C_, *beside)

    pieces = zip(*(piece(r) for r in _cuda.pieces(c.u.shape[0])), strict=True)
    _, _, dA, gB, gC, dD, gz, dbias, ginit = (list(found) for found in pieces)

    def added(found: list[Tensor]) -> Tensor:
        return torch.stack(found).sum(0)

    dB, dC = added(gB) if dB is None else dB, added(gC) if dC is None else dC
    return du, ddt, added(dA), dB, dC, added(dD), gz[0] if dz is None else dz, added(dbias), torch.cat(ginit)


_SCHEMA = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "Tensor? initial_state, Tensor? cu_seqlens, bool batch_invariant"
)
_LIBRARY = torch.library.Library("statescan", "FRAGMENT")
_LIBRARY.define(f"selective_scan_cuda({_SCHEMA}, bool want_final, bool want_checkpoints) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"selective_scan_cuda_backward({_SCHEMA}, Tensor dy, Tensor? dfinal, Tensor checkpoints) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def launch_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    batch_invariant: bool = False,
    *,
    want_final: bool = False,
    want_checkpoints: bool = True,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward alone, for callers that keep their own graph: (y, final state, checkpoints), nothing differentiable.

    Arguments as in api.py, checked by the caller; u, dt, z, B, C may be slices of wider tensors, read where they stand
    as long as neighbouring channels are side by side. `y` may be such a slice too: the output is written there. What
    isn't wanted comes back empty.

    Raises:
        ShapeError: `y` does not fit.
        BackendUnavailableError: a kernel does not compile here.
    """
    with torch.cuda.device(u.device):
        c = _prepare(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, batch_invariant)
        return _forward(c, cu_seqlens, want_final, want_checkpoints, y)


def launch_backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    batch_invariant: bool = False,
    *,
    dy: Tensor,
    checkpoints: Tensor,
    dfinal: Tensor | None = None,
    du: Tensor | None = None,
    ddt: Tensor | None = None,
    dz: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The backward of `launch_forward`: gradients of u, dt, A, B, C, D, z, dt_bias, initial_state, in this order, an
    empty tensor for an input that isn't there. Those of u, dt, z and of B, C by position come in these tensors' dtypes,
    the others in the state's.

    du, ddt, dz, dB, dC: where to write these, slices of wider tensors with neighbouring channels side by side (so that
    d_xz needs no copy). dy may be such a slice. y: where to write the forward's output again, with z alone: the
    backward has it at hand, so that a caller need not keep it. It is rounded as the forward's is, but summed in another
    order.

    Raises:
        ShapeError: one of them does not fit.
        BackendUnavailableError: a kernel does not compile here.
    """
    with torch.cuda.device(u.device):
        c = _prepare(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, batch_invariant)
        assert y is None or z is not None
        y = None if y is None else _place(y, u, "y")
        return _backward(c, cu_seqlens, dy, dfinal, checkpoints, B, C, du, ddt, dz, dB, dC, y)


def _rehearse_backward(*a: Any) -> None:
    """The backward pass that may follow such a call."""
    u = a[0]
    launch_backward(*a, dy=u.new_empty(u.shape), checkpoints=u.new_empty(0))


def _forward_op(*a: Any) -> tuple[Tensor, Tensor, Tensor]:
    if a[13]:
        _cuda.make_ready(_rehearse_backward, *a[:12])
    with torch.cuda.device(a[0].device):
        return _forward(_prepare(*a[:12]), a[10], a[12], a[13])


def _backward_op(*a: Any) -> tuple[Tensor, ...]:
    def launch(dy: Tensor) -> tuple[Tensor, ...]:
        return launch_backward(*a[:12], dy=dy, dfinal=a[13], checkpoints=a[14])

    g = _cuda.launch_ready(launch, a[12])
    return (*g[:3], g[3].to(a[3].dtype), g[4].to(a[4].dtype), *g[5:])  # a fixed B or C has any dtype


_LIBRARY.impl("selective_scan_cuda", _forward_op, "CUDA")
_LIBRARY.impl("selective_scan_cuda_backward", _backward_op, "CUDA")


@torch.library.register_fake("statescan::selective_scan_cuda", lib=_LIBRARY)
def _(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, batch_invariant, want_final, want_checkpoints
):  # type: ignore[no-untyped-def]
    batch, length, d_inner = u.shape
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n = A.shape[1]
    cut = plan.__wrapped__(1, 1, 8, n, 1, 1, real == torch.float64, cu_seqlens is not None)  # n may be a symbol
    final = u.new_empty((rows, d_inner, n) if want_final else (0,), dtype=real)
    tiles = (length + cut.tile - 1) // cut.tile
    kept = u.new_empty((batch, tiles, d_inner, n) if want_checkpoints else (0,), dtype=real)
    return u.new_empty(u.shape), final, kept


@torch.library.register_fake("statescan::selective_scan_cuda_backward", lib=_LIBRARY)
def _(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, batch_invariant, dy, dfinal, checkpoints):  # type: ignore[no-untyped-def]
    real = torch.float64 if u.dtype == torch.float64 else torch.float32

    def like(x, dtype=None):  # type: ignore[no-untyped-def]
        return u.new_empty((0,), dtype=real) if x is None else u.new_empty(x.shape, dtype=dtype or real)

    gz = like(z, u.dtype)
    return (
        u.new_empty(u.shape),
        u.new_empty(u.shape),
        like(A),
        like(B, B.dtype),
        like(C, C.dtype),
        like(D),
        gz,
        like(dt_bias),
        like(initial_state),
    )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, invariant, want_final):  # type: ignore[no-untyped-def, override]
        inputs = (u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, invariant)
        y, final, checkpoints = torch.ops.statescan.selective_scan_cuda(*inputs, want_final, True)
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, checkpoints)
        ctx.softplus, ctx.want_final, ctx.invariant = dt_softplus, want_final, invariant
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        refuse_second_derivative("selective_scan", "cuda")
        u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, checkpoints = ctx.saved_tensors
        inputs = (u, dt, A, B, C, D, z, dt_bias, ctx.softplus, initial_state, cu_seqlens, ctx.invariant)
        dy = torch.zeros_like(u) if dy is None else dy
        g = torch.ops.statescan.selective_scan_cuda_backward(
            *inputs, dy, dfinal if ctx.want_final else None, checkpoints
        )
        given = (u, dt, A, B, C, D, z, dt_bias, initial_state)
        gradients = [None if x is None else v.to(x.dtype) for x, v in zip(given, g, strict=True)]
        return (*gradients[:8], None, gradients[8], None, None, None)


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
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The scan as described in api.py; its gradients are exact and once differentiable."""
    inputs = (u, dt, A, B, C, D, z, dt_bias)
    if wants_gradients(*inputs, initial_state):
        y, final = _Scan.apply(*inputs, dt_softplus, initial_state, cu_seqlens, batch_invariant, return_final_state)  # type: ignore[misc]
    else:
        y, final, _ = torch.ops.statescan.selective_scan_cuda(
            *inputs, dt_softplus, initial_state, cu_seqlens, batch_invariant, return_final_state, False
        )
    return y, final if return_final_state else None
