"""The scan's Triton kernels.

A program has BD channels of one sequence, or of one segment of it where time is cut (SPLIT), and walks time in order with
the states of its channels, (BD, NP), in registers. Elementwise work (softplus, gate) is done on tiles of BD channels and TS
positions, one number a thread where a channel's states lie over TS threads; one column of the tile at a time then enters
the recurrence. Nothing is summed over programs: what programs share they write apart, and the host adds.

Names ending in _b, _t, _g, _c are strides of the batch, of time, of groups, of channels or states. `a` is A log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from statescan.ops._triton_functions import LN2, LOG2E, add_up, column, decay, sigmoid, softplus

__all__ = ["scan_adjoint", "scan_backward", "scan_combine", "scan_combine_adjoint", "scan_forward"]

# Not told that channels lie side by side, the compiler gives the threads of a warp a channel's steps in turn, in the
# pattern of its states, so that numbers pass between tiles and states without moving to other threads.
_CHANNEL_STRIDES = ("u_c", "dt_c", "z_c", "dy_c", "y_c")


@triton.jit
def _span(part, cu, owners, length, segment, parts, EVERY: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr):
    """What a program walks: (sequence, row of the batch, where the sequence starts and stops, number of the segment,
    index of the sequence's first checkpoint)."""
    if PACKED:
        if SPLIT:
            sequence = tl.load(owners + part)
        else:
            sequence = part
        origin = tl.load(cu + sequence)
        stop = tl.load(cu + sequence + 1)
        if SPLIT:
            number = part - (origin // segment + sequence)
        else:
            number = part * 0
        row = part * 0
        first = origin // EVERY + sequence
    else:
        sequence = part // parts
        number = part % parts
        origin = part * 0
        stop = origin + length
        row = sequence
        first = sequence * ((length + EVERY - 1) // EVERY)
    return sequence.to(tl.int64), row.to(tl.int64), origin, stop, number, first.to(tl.int64)


@triton.jit
def _tile(x, x_at, t, x_t, here):
    """A tile from position t on; x_at (BD, TS) are its numbers' places behind that of t."""
    return tl.load(x + tl.cast(t, tl.int64) * x_t + x_at, here, other=0.0).to(tl.float32)


@triton.jit
def _inside(n, t, end, N: tl.constexpr, NP: tl.constexpr):
    """Which of a position's NP numbers exist: said so that the compiler sees that neighbours share one answer."""
    inside = tl.full((NP,), t, tl.int32) < end
    if N < NP:
        inside = inside & (n < N)
    return inside


@triton.jit
def _vector(x, x_at, t, s, end, x_t, n, N: tl.constexpr, NP: tl.constexpr):
    """B or C (1, NP) at position t + s; zeros where the sequence has ended."""
    place = x + tl.cast(t, tl.int64) * x_t + s * x_t + x_at
    return tl.load(place, _inside(n, t + s, end, N, NP), other=0.0).to(tl.float32)[None, :]


@triton.jit
def _steps(raw, bias, here, SOFTPLUS: tl.constexpr, GPU: tl.constexpr):
    """Step sizes of a tile; 0 where no position is, which leaves the state as it is."""
    if bias is not None:
        raw = raw + bias[:, None]
    if SOFTPLUS:
        return tl.where(here, softplus(raw, GPU), 0.0), raw
    return tl.where(here, raw, 0.0), raw


@triton.jit(do_not_specialize=_CHANNEL_STRIDES)
def scan_forward(
    u, dt, z, B, C, A, D, bias, initial, y, final, checkpoints, states, sums, cu, owners,
    u_b, u_t, u_c, dt_b, dt_t, dt_c, z_b, z_t, z_c, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    y_c, length, d_inner, group_channels, group_blocks, blocks, B_channels, C_channels, segment, parts,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, TS: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
    ENDS: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Outputs, final states, checkpoints; with ENDS only every segment's end state from zero and its sum of steps."""
    pid = tl.program_id(0)
    block = pid % blocks
    part = pid // blocks
    sequence, row, origin, stop, number, slot = _span(part, cu, owners, length, segment, parts, EVERY, PACKED, SPLIT)
    begin = origin + number * segment
    end = tl.minimum(begin + segment, stop)
    group = block // group_blocks
    lane = (block % group_blocks) * BD + tl.arange(0, BD)
    live = lane < group_channels
    c = (group * group_channels + lane).to(tl.int64)
    c0 = group * group_channels
    n = tl.arange(0, NP)
    some = live[:, None] & (n < N)[None, :]
    at_state = c[:, None] * N + n[None, :]
    size = d_inner * N
    a = tl.load(A + at_state, some, other=0.0) * LOG2E
    index = tl.arange(0, TS)[None, :]
    total = tl.full((BD, TS), 0.0, tl.float32)
    last = (begin + segment >= stop) & ((begin < stop) | (number == 0))
    if ENDS:
        h = tl.full((BD, NP), 0.0, tl.float32)
        end = tl.where(begin + segment >= stop, begin, end)  # nothing follows the last segment
    elif SPLIT:
        h = tl.load(states + part.to(tl.int64) * size + at_state, some, other=0.0)
    elif initial is not None:
        h = tl.load(initial + sequence * size + at_state, some, other=0.0)
    else:
        h = tl.full((BD, NP), 0.0, tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, live, other=0.0)
    else:
        shift = None
    if D is not None:
        skip = tl.load(D + c, live, other=0.0)
    if FIXED_B:
        b = tl.load(B + at_state, some, other=0.0)
    else:
        B += row * B_b + (c0 // B_channels).to(tl.int64) * B_g
        B_at = n * B_n
    if FIXED_C:
        k = tl.load(C + at_state, some, other=0.0)
    else:
        C += row * C_b + (c0 // C_channels).to(tl.int64) * C_g
        C_at = n * C_n
    u += row * u_b
    u_at = c[:, None] * u_c + index.to(tl.int64) * u_t
    dt += row * dt_b
    dt_at = c[:, None] * dt_c + index.to(tl.int64) * dt_t
    if z is not None:
        z += row * z_b
        z_at = c[:, None] * z_c + index.to(tl.int64) * z_t
    y += (row * length) * d_inner
    y_at = c[:, None] * y_c + index.to(tl.int64) * d_inner

    for t0 in range(begin, end, EVERY):
        if checkpoints is not None:
            tl.store(checkpoints + (slot + (t0 - origin) // EVERY) * size + at_state, h, some)
        for t1 in range(t0, tl.minimum(t0 + EVERY, end), TS):
            at = t1 + index
            here = live[:, None] & (at < end)
            x = _tile(u, u_at, t1, u_t, here)
            d, _raw = _steps(_tile(dt, dt_at, t1, dt_t, here), shift, here, SOFTPLUS, GPU)
            if not ENDS and z is not None:
                gate = _tile(z, z_at, t1, z_t, here)
            dx = d * x
            out = tl.full((BD, TS), 0.0, tl.float32)
            for s in tl.static_range(TS):
                if not FIXED_B:
                    b = _vector(B, B_at, t1, s, end, B_t, n, N, NP)
                h = decay(column(d, index, s)[:, None], a, GPU) * h + column(dx, index, s)[:, None] * b
                if not ENDS:
                    if not FIXED_C:
                        k = _vector(C, C_at, t1, s, end, C_t, n, N, NP)
                    out = tl.where(index == s, tl.sum(h * k, 1)[:, None], out)
            if ENDS:
                total += d
            else:
                if D is not None:
                    out += skip[:, None] * x
                if z is not None:
                    out *= gate * sigmoid(gate, GPU)
                tl.store(y + tl.cast(t1, tl.int64) * d_inner + y_at, out.to(y.dtype.element_ty), here)
    if ENDS:
        tl.store(states + part.to(tl.int64) * size + at_state, h, some)
        tl.store(sums + part.to(tl.int64) * d_inner + c, tl.sum(total, 1), live)
    elif final is not None:
        tl.store(final + sequence * size + at_state, h, live[:, None] & (n < tl.where(last, N, 0))[None, :])


@triton.jit
def scan_combine(
    states, sums, A, initial, cu, length, size, segment, parts,
    N: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Every segment's start state in place of its end state from zero. A program has BS states of one sequence."""
    sequence = tl.program_id(1)
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    live = at < size
    at = at.to(tl.int64)
    if PACKED:
        origin = tl.load(cu + sequence)
        stop = tl.load(cu + sequence + 1)
        first = origin // segment + sequence
    else:
        origin = sequence * 0
        stop = origin + length
        first = sequence * parts
    a = tl.load(A + at, live, other=0.0) * LOG2E
    if initial is not None:
        h = tl.load(initial + sequence.to(tl.int64) * size + at, live, other=0.0)
    else:
        h = tl.full((BS,), 0.0, tl.float32)
    # an empty sequence has a segment, too, whose program hands the state on
    for j in range(tl.maximum((stop - origin + segment - 1) // segment, 1)):
        i = (first + j).to(tl.int64)
        own = tl.load(states + i * size + at, live, other=0.0)
        steps = tl.load(sums + i * (size // N) + at // N, live, other=0.0)
        tl.store(states + i * size + at, h, live)
        h = decay(steps, a, GPU) * h + own


@triton.jit(do_not_specialize=_CHANNEL_STRIDES)
def scan_adjoint(
    dt, z, C, A, bias, dy, adjoints, sums, cu, owners,
    dt_b, dt_t, dt_c, z_b, z_t, z_c, C_b, C_t, C_g, C_n, dy_b, dy_t, dy_c,
    length, d_inner, group_channels, group_blocks, blocks, C_channels, segment, parts,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, TS: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, FIXED_C: tl.constexpr, PACKED: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """The adjoint that leaves a segment at its start where none enters at its end, and its sum of steps."""
    pid = tl.program_id(0)
    block = pid % blocks
    part = pid // blocks
    _, row, origin, stop, number, _slot = _span(part, cu, owners, length, segment, parts, EVERY, PACKED, True)
    begin = origin + number * segment
    end = tl.minimum(begin + segment, stop)
    end = tl.where(number == 0, begin, end)  # nothing comes before the first segment
    group = block // group_blocks
    lane = (block % group_blocks) * BD + tl.arange(0, BD)
    live = lane < group_channels
    c = (group * group_channels + lane).to(tl.int64)
    c0 = group * group_channels
    n = tl.arange(0, NP)
    some = live[:, None] & (n < N)[None, :]
    at_state = c[:, None] * N + n[None, :]
    size = d_inner * N
    a = tl.load(A + at_state, some, other=0.0) * LOG2E
    index = tl.arange(0, TS)[None, :]
    if bias is not None:
        shift = tl.load(bias + c, live, other=0.0)
    else:
        shift = None
    if FIXED_C:
        k = tl.load(C + at_state, some, other=0.0)
    else:
        C += row * C_b + (c0 // C_channels).to(tl.int64) * C_g
        C_at = n * C_n
    dt += row * dt_b
    dt_at = c[:, None] * dt_c + index.to(tl.int64) * dt_t
    dy += row * dy_b
    dy_at = c[:, None] * dy_c + index.to(tl.int64) * dy_t
    if z is not None:
        z += row * z_b
        z_at = c[:, None] * z_c + index.to(tl.int64) * z_t
    total = tl.full((BD, TS), 0.0, tl.float32)
    adjoint = tl.full((BD, NP), 0.0, tl.float32)
    tiles = (end - begin + TS - 1) // TS
    for i in range(tiles):
        t1 = begin + (tiles - 1 - i) * TS
        at = t1 + index
        here = live[:, None] & (at < end)
        d, _raw = _steps(_tile(dt, dt_at, t1, dt_t, here), shift, here, SOFTPLUS, GPU)
        g = _tile(dy, dy_at, t1, dy_t, here)
        if z is not None:
            gate = _tile(z, z_at, t1, z_t, here)
            g *= gate * sigmoid(gate, GPU)
        total += d
        for s in tl.static_range(TS - 1, -1, -1):
            if not FIXED_C:
                k = _vector(C, C_at, t1, s, end, C_t, n, N, NP)
            adjoint += column(g, index, s)[:, None] * k
            adjoint *= decay(column(d, index, s)[:, None], a, GPU)
    tl.store(adjoints + part.to(tl.int64) * size + at_state, adjoint, some)
    tl.store(sums + part.to(tl.int64) * d_inner + c, tl.sum(total, 1), live)


@triton.jit
def scan_combine_adjoint(
    adjoints, sums, A, dfinal, cu, length, size, segment, parts,
    N: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """The adjoint that enters every segment at its end, in place of the one that leaves it at its start."""
    sequence = tl.program_id(1)
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    live = at < size
    at = at.to(tl.int64)
    if PACKED:
        origin = tl.load(cu + sequence)
        stop = tl.load(cu + sequence + 1)
        first = origin // segment + sequence
    else:
        origin = sequence * 0
        stop = origin + length
        first = sequence * parts
    a = tl.load(A + at, live, other=0.0) * LOG2E
    if dfinal is not None:
        adjoint = tl.load(dfinal + sequence.to(tl.int64) * size + at, live, other=0.0)
    else:
        adjoint = tl.full((BS,), 0.0, tl.float32)
    count = tl.maximum((stop - origin + segment - 1) // segment, 1)
    for j in range(count):
        i = (first + count - 1 - j).to(tl.int64)
        own = tl.load(adjoints + i * size + at, live, other=0.0)
        steps = tl.load(sums + i * (size // N) + at // N, live, other=0.0)
        tl.store(adjoints + i * size + at, adjoint, live)
        adjoint = decay(steps, a, GPU) * adjoint + own


@triton.jit(do_not_specialize=_CHANNEL_STRIDES)
def scan_backward(
    u, dt, z, B, C, A, D, bias, dy, dfinal, checkpoints, adjoints, scratch,
    du, ddt, dz, dA, dB, dC, dD, dbias, dinitial, cu, owners,
    u_b, u_t, u_c, dt_b, dt_t, dt_c, z_b, z_t, z_c, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, dy_b, dy_t, dy_c,
    y_c, length, rows, d_inner, group_channels, group_blocks, blocks, B_channels, C_channels, segment, parts,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, TS: tl.constexpr, TILES: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    """Every gradient. From each checkpoint the states of TILES x TS positions are made again in registers, where
    checkpoints lie further apart after a first walk that leaves the states between them in `scratch`.

    dA, dB, dC, dD, dbias are one program's share each: of its segment, or for B and C of its block of channels.
    """
    RUN: tl.constexpr = TS * TILES
    RUNS: tl.constexpr = EVERY // RUN
    pid = tl.program_id(0)
    block = pid % blocks
    part = pid // blocks
    sequence, row, origin, stop, number, slot = _span(part, cu, owners, length, segment, parts, EVERY, PACKED, SPLIT)
    begin = origin + number * segment
    end = tl.minimum(begin + segment, stop)
    group = block // group_blocks
    lane = (block % group_blocks) * BD + tl.arange(0, BD)
    live = lane < group_channels
    c = (group * group_channels + lane).to(tl.int64)
    c0 = group * group_channels
    n = tl.arange(0, NP)
    some = live[:, None] & (n < N)[None, :]
    at_state = c[:, None] * N + n[None, :]
    size = d_inner * N
    a = tl.load(A + at_state, some, other=0.0) * LOG2E
    index = tl.arange(0, TS)[None, :]
    if SPLIT:
        adjoint = tl.load(adjoints + part.to(tl.int64) * size + at_state, some, other=0.0)
    elif dfinal is not None:
        adjoint = tl.load(dfinal + sequence * size + at_state, some, other=0.0)
    else:
        adjoint = tl.full((BD, NP), 0.0, tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, live, other=0.0)
    else:
        shift = None
    if D is not None:
        skip = tl.load(D + c, live, other=0.0)
    if FIXED_B:
        b = tl.load(B + at_state, some, other=0.0)
        sum_B, lost_B = tl.full((BD, NP), 0.0, tl.float32), tl.full((BD, NP), 0.0, tl.float32)
    else:
        B += row * B_b + (c0 // B_channels).to(tl.int64) * B_g
        B_at = n * B_n
        dB += (block.to(tl.int64) * rows + row) * length * N
    if FIXED_C:
        k = tl.load(C + at_state, some, other=0.0)
        sum_C, lost_C = tl.full((BD, NP), 0.0, tl.float32), tl.full((BD, NP), 0.0, tl.float32)
    else:
        C += row * C_b + (c0 // C_channels).to(tl.int64) * C_g
        C_at = n * C_n
        dC += (block.to(tl.int64) * rows + row) * length * N
    u += row * u_b
    u_at = c[:, None] * u_c + index.to(tl.int64) * u_t
    dt += row * dt_b
    dt_at = c[:, None] * dt_c + index.to(tl.int64) * dt_t
    dy += row * dy_b
    dy_at = c[:, None] * dy_c + index.to(tl.int64) * dy_t
    out = (row * length) * d_inner
    out_at = c[:, None] * y_c + index.to(tl.int64) * d_inner
    if z is not None:
        z += row * z_b
        z_at = c[:, None] * z_c + index.to(tl.int64) * z_t
    scratch += pid.to(tl.int64) * (RUNS * BD * NP) + tl.arange(0, BD)[:, None] * NP + n[None, :]
    sum_A, lost_A = tl.full((BD, NP), 0.0, tl.float32), tl.full((BD, NP), 0.0, tl.float32)
    sum_D, lost_D = tl.full((BD, TS), 0.0, tl.float32), tl.full((BD, TS), 0.0, tl.float32)
    sum_bias, lost_bias = tl.full((BD, TS), 0.0, tl.float32), tl.full((BD, TS), 0.0, tl.float32)

    spans = (end - begin + EVERY - 1) // EVERY
    for i in range(spans):
        t0 = begin + (spans - 1 - i) * EVERY
        kept = checkpoints + (slot + (t0 - origin) // EVERY) * size + at_state
        count = (tl.minimum(end - t0, EVERY) + RUN - 1) // RUN
        if RUNS > 1:
            tl.debug_barrier()  # the last span's states have been read
            h = tl.load(kept, some, other=0.0)
            for r in range(count - 1):
                for m in tl.static_range(TILES):
                    t1 = t0 + r * RUN + m * TS
                    at = t1 + index
                    here = live[:, None] & (at < end)
                    x = _tile(u, u_at, t1, u_t, here)
                    d, _raw = _steps(_tile(dt, dt_at, t1, dt_t, here), shift, here, SOFTPLUS, GPU)
                    dx = d * x
                    for s in tl.static_range(TS):
                        if not FIXED_B:
                            b = _vector(B, B_at, t1, s, end, B_t, n, N, NP)
                        h = decay(column(d, index, s)[:, None], a, GPU) * h + column(dx, index, s)[:, None] * b
                tl.store(scratch + (r + 1) * (BD * NP), h)
            tl.debug_barrier()
        for q in range(count):
            r = count - 1 - q
            t2 = t0 + r * RUN
            if RUNS > 1:
                if r == 0:
                    h = tl.load(kept, some, other=0.0)
                else:
                    h = tl.load(scratch + r * (BD * NP))
            else:
                h = tl.load(kept, some, other=0.0)
            # forwards once more: states before every step, and what the gate needs of the output
            hs = (h,)
            ds = ()
            xs = ()
            gs = ()
            raws = ()
            for m in tl.static_range(TILES):
                t1 = t2 + m * TS
                at = t1 + index
                here = live[:, None] & (at < end)
                x = _tile(u, u_at, t1, u_t, here)
                d, raw = _steps(_tile(dt, dt_at, t1, dt_t, here), shift, here, SOFTPLUS, GPU)
                g = _tile(dy, dy_at, t1, dy_t, here)
                if z is not None:
                    gate = _tile(z, z_at, t1, z_t, here)
                dx = d * x
                o = tl.full((BD, TS), 0.0, tl.float32)
                for s in tl.static_range(TS):
                    if not FIXED_B:
                        b = _vector(B, B_at, t1, s, end, B_t, n, N, NP)
                    h = decay(column(d, index, s)[:, None], a, GPU) * h + column(dx, index, s)[:, None] * b
                    hs = hs + (h,)
                    if z is not None:
                        if not FIXED_C:
                            k = _vector(C, C_at, t1, s, end, C_t, n, N, NP)
                        o = tl.where(index == s, tl.sum(h * k, 1)[:, None], o)
                if z is not None:
                    if D is not None:
                        o += skip[:, None] * x
                    open = sigmoid(gate, GPU)
                    o *= g * (open * (1.0 + gate * (1.0 - open)))
                    tl.store(dz + out + tl.cast(t1, tl.int64) * d_inner + out_at, o.to(dz.dtype.element_ty), here)
                    g *= gate * open
                ds = ds + (d,)
                xs = xs + (x,)
                gs = gs + (g,)
                raws = raws + (raw,)
            # backwards
            tile_A = tl.full((BD, NP), 0.0, tl.float32)
            if FIXED_B:
                tile_B = tl.full((BD, NP), 0.0, tl.float32)
            if FIXED_C:
                tile_C = tl.full((BD, NP), 0.0, tl.float32)
            for m in tl.static_range(TILES - 1, -1, -1):
                t1 = t2 + m * TS
                d = ds[m]
                x = xs[m]
                g = gs[m]
                dx = d * x
                to_drive = tl.full((BD, TS), 0.0, tl.float32)  # gradient of dt u, for du and ddt
                to_decay = tl.full((BD, TS), 0.0, tl.float32)  # gradient of dt through exp(dt A)
                for s in tl.static_range(TS - 1, -1, -1):
                    if not FIXED_B:
                        b = _vector(B, B_at, t1, s, end, B_t, n, N, NP)
                    if not FIXED_C:
                        k = _vector(C, C_at, t1, s, end, C_t, n, N, NP)
                    g_s = column(g, index, s)[:, None]
                    d_s = column(d, index, s)[:, None]
                    dx_s = column(dx, index, s)[:, None]
                    adjoint += g_s * k
                    if FIXED_C:
                        tile_C += g_s * hs[m * TS + s + 1]
                    else:
                        tl.store(dC + tl.cast(t1 + s, tl.int64) * N + n, tl.sum(g_s * hs[m * TS + s + 1], 0), _inside(n, t1 + s, end, N, NP))
                    if FIXED_B:
                        tile_B += adjoint * dx_s
                    else:
                        tl.store(dB + tl.cast(t1 + s, tl.int64) * N + n, tl.sum(adjoint * dx_s, 0), _inside(n, t1 + s, end, N, NP))
                    to_drive = tl.where(index == s, tl.sum(adjoint * b, 1)[:, None], to_drive)
                    adjoint *= decay(d_s, a, GPU)
                    w = adjoint * hs[m * TS + s]
                    tile_A += w * d_s
                    to_decay = tl.where(index == s, tl.sum(w * a, 1)[:, None], to_decay)
                here = live[:, None] & (t1 + index < end)
                along = out + tl.cast(t1, tl.int64) * d_inner + out_at
                to_u = to_drive * d
                if D is not None:
                    to_u += skip[:, None] * g
                    sum_D, lost_D = add_up(sum_D, lost_D, g * x)
                to_dt = to_decay * LN2 + to_drive * x
                if SOFTPLUS:
                    to_dt *= sigmoid(raws[m], GPU)
                to_dt = tl.where(here, to_dt, 0.0)
                if bias is not None:
                    sum_bias, lost_bias = add_up(sum_bias, lost_bias, to_dt)
                tl.store(du + along, to_u.to(du.dtype.element_ty), here)
                tl.store(ddt + along, to_dt.to(ddt.dtype.element_ty), here)
            sum_A, lost_A = add_up(sum_A, lost_A, tile_A)
            if FIXED_B:
                sum_B, lost_B = add_up(sum_B, lost_B, tile_B)
            if FIXED_C:
                sum_C, lost_C = add_up(sum_C, lost_C, tile_C)
    own = part.to(tl.int64)
    tl.store(dA + own * size + at_state, sum_A, some)
    if FIXED_B:
        tl.store(dB + own * size + at_state, sum_B, some)
    if FIXED_C:
        tl.store(dC + own * size + at_state, sum_C, some)
    if D is not None:
        tl.store(dD + own * d_inner + c, tl.sum(sum_D, 1), live)
    if bias is not None:
        tl.store(dbias + own * d_inner + c, tl.sum(sum_bias, 1), live)
    if dinitial is not None:
        tl.store(
            dinitial + sequence * size + at_state, adjoint, live[:, None] & (n < tl.where(number == 0, N, 0))[None, :]
        )
