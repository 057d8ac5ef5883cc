# type: ignore  (what Triton compiles looks like Python, but has types of its own)
"""The scan's Triton kernels.

A program is one warp with BD channels of one sequence, or of one segment of it where time is cut (SPLIT), and walks
time in order with its states in registers. A channel's states are G pieces of W neighbours, each a tensor (BD, W): up
to 16 states a channel every thread has a channel of its own with all its states, in pieces of four numbers that are
loaded at once; so sums over states need no other thread, and nothing of a channel's work is done twice.

Nothing is summed over programs: what programs share they write apart, and the host adds. Names that end in _b, _t, _g,
_c or _n are strides of the batch, of time, of groups, of channels and of states. `a` is A log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from statescan.ops._triton_functions import LN2, LOG2E, add_up, decay, sigmoid, softplus

__all__ = ["scan_adjoint", "scan_backward", "scan_combine", "scan_combine_adjoint", "scan_forward"]


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
def _pieces(x, c, live, N: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    """States or matrices (d_inner, N) of these channels, as G pieces; zeros where x is None."""
    pieces = ()
    for g in tl.static_range(G):
        n = g * W + tl.arange(0, W)
        if x is None:
            piece = tl.full((c.shape[0], W), 0.0, tl.float32)
        elif G * W == N:
            piece = tl.load(x + c[:, None] * N + n[None, :], live[:, None], other=0.0)
        else:
            piece = tl.load(x + c[:, None] * N + n[None, :], live[:, None] & (n < N)[None, :], other=0.0)
        pieces = pieces + (piece,)  # noqa: RUF005  (Triton knows no starred tuples)
    return pieces


@triton.jit
def _keep(x, pieces, c, live, N: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    """Stores what `_pieces` loads."""
    for g in tl.static_range(G):
        n = g * W + tl.arange(0, W)
        if G * W == N:
            tl.store(x + c[:, None] * N + n[None, :], pieces[g], live[:, None])
        else:
            tl.store(x + c[:, None] * N + n[None, :], pieces[g], live[:, None] & (n < N)[None, :])


@triton.jit
def _scaled(pieces, G: tl.constexpr):
    scaled = ()
    for g in tl.static_range(G):
        scaled = scaled + (pieces[g] * LOG2E,)  # noqa: RUF005
    return scaled


@triton.jit
def _vectors(x, x_n, t, end, x_t, N: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    """B or C at position t as G pieces (1, W); zeros where the sequence has ended."""
    pieces = ()
    for g in tl.static_range(G):
        n = g * W + tl.arange(0, W)
        inside = tl.full((W,), t, tl.int32) < end  # so that the compiler sees that neighbours share one answer
        if G * W > N:
            inside = inside & (n < N)
        piece = tl.load(x + tl.cast(t, tl.int64) * x_t + n * x_n, inside, other=0.0).to(tl.float32)[None, :]
        pieces = pieces + (piece,)  # noqa: RUF005
    return pieces


@triton.jit
def _row(x, t, end, x_t, live):
    """The channels' numbers at position t."""
    here = live & (tl.full(live.shape, t, tl.int32) < end)
    return tl.load(x + tl.cast(t, tl.int64) * x_t, here, other=0.0)


@triton.jit
def _rows(x, t, end, x_t, live, RUN: tl.constexpr):
    """The channels' numbers at RUN positions from t on, asked for early."""
    rows = ()
    for s in tl.static_range(RUN):
        rows = rows + (_row(x, t + s, end, x_t, live),)  # noqa: RUF005
    return rows


@triton.jit
def _step(raw, bias, t, end, live, SOFTPLUS: tl.constexpr, GPU: tl.constexpr):
    """(step sizes, 0 where no position is, which leaves the state as it is; what softplus was given)."""
    here = live & (tl.full(live.shape, t, tl.int32) < end)
    raw = raw.to(tl.float32)
    if bias is not None:
        raw = raw + bias
    if SOFTPLUS:
        return tl.where(here, softplus(raw, GPU), 0.0), raw
    return tl.where(here, raw, 0.0), raw


@triton.jit
def _forth(h, a, d, drive, b, G: tl.constexpr, GPU: tl.constexpr):
    """The states one position on."""
    new = ()
    for g in tl.static_range(G):
        new = new + (decay(d[:, None], a[g], GPU) * h[g] + drive[:, None] * b[g],)  # noqa: RUF005
    return new


@triton.jit
def _over_states(x, y, G: tl.constexpr):
    """The sum of x y over states."""
    total = x[0] * y[0]
    for g in tl.static_range(1, G):
        total += x[g] * y[g]
    return tl.sum(total, 1)


@triton.jit
def scan_forward(
    u, dt, z, B, C, A, D, bias, initial, y, final, checkpoints, states, sums, cu, owners,
    u_b, u_t, u_c, dt_b, dt_t, dt_c, z_b, z_t, z_c, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    length, d_inner, group_channels, group_blocks, blocks, B_channels, C_channels, segment, parts,
    N: tl.constexpr, W: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr, EVERY: tl.constexpr,
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
    last = (begin + segment >= stop) & ((begin < stop) | (number == 0))
    if ENDS:
        end = tl.where(begin + segment >= stop, begin, end)  # nothing follows the last segment
    group = block // group_blocks
    lane = (block % group_blocks) * BD + tl.arange(0, BD)
    live = lane < group_channels
    c0 = group * group_channels
    c = (c0 + lane).to(tl.int64)
    size = d_inner * N
    a = _scaled(_pieces(A, c, live, N, W, G), G)
    if ENDS:
        h = _pieces(None, c, live, N, W, G)
    elif SPLIT:
        h = _pieces(states + part.to(tl.int64) * size, c, live, N, W, G)
    elif initial is not None:
        h = _pieces(initial + sequence * size, c, live, N, W, G)
    else:
        h = _pieces(None, c, live, N, W, G)
    if bias is not None:
        shift = tl.load(bias + c, live, other=0.0)
    else:
        shift = None
    if D is not None:
        skip = tl.load(D + c, live, other=0.0)
    if FIXED_B:
        b = _pieces(B, c, live, N, W, G)
    else:
        B += row * B_b + (c0 // B_channels).to(tl.int64) * B_g
    if FIXED_C:
        k = _pieces(C, c, live, N, W, G)
    else:
        C += row * C_b + (c0 // C_channels).to(tl.int64) * C_g
    u += row * u_b + c * u_c
    dt += row * dt_b + c * dt_c
    if z is not None:
        z += row * z_b + c * z_c
    y += (row * length) * d_inner + c
    total = tl.full((BD,), 0.0, tl.float32)

    # a run's numbers are asked for while the run before it is computed
    next_u = _rows(u, begin, end, u_t, live, RUN)
    next_dt = _rows(dt, begin, end, dt_t, live, RUN)
    if not ENDS and z is not None:
        next_z = _rows(z, begin, end, z_t, live, RUN)
    for t in range(begin, end, RUN):
        us = next_u
        dts = next_dt
        next_u = _rows(u, t + RUN, end, u_t, live, RUN)
        next_dt = _rows(dt, t + RUN, end, dt_t, live, RUN)
        if not ENDS and z is not None:
            zs = next_z
            next_z = _rows(z, t + RUN, end, z_t, live, RUN)
        if checkpoints is not None:  # noqa: SIM102  (one is known to the compiler, the other is not)
            if (t - origin) % EVERY == 0:
                _keep(checkpoints + (slot + (t - origin) // EVERY) * size, h, c, live, N, W, G)
        for s in tl.static_range(RUN):
            x = us[s].to(tl.float32)
            d, _raw = _step(dts[s], shift, t + s, end, live, SOFTPLUS, GPU)
            if not FIXED_B:
                b = _vectors(B, B_n, t + s, end, B_t, N, W, G)
            h = _forth(h, a, d, d * x, b, G, GPU)
            if ENDS:
                total += d
            else:
                if not FIXED_C:
                    k = _vectors(C, C_n, t + s, end, C_t, N, W, G)
                out = _over_states(h, k, G)
                if D is not None:
                    out += skip * x
                if z is not None:
                    gate = zs[s].to(tl.float32)
                    out *= gate * sigmoid(gate, GPU)
                here = live & (tl.full((BD,), t + s, tl.int32) < end)
                tl.store(y + tl.cast(t + s, tl.int64) * d_inner, out.to(y.dtype.element_ty), here)
    if ENDS:
        _keep(states + part.to(tl.int64) * size, h, c, live, N, W, G)
        tl.store(sums + part.to(tl.int64) * d_inner + c, total, live)
    elif final is not None:
        _keep(final + sequence * size, h, c, lane < tl.where(last, group_channels, 0), N, W, G)


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


@triton.jit
def scan_adjoint(
    dt, z, C, A, bias, dy, adjoints, sums, cu, owners,
    dt_b, dt_t, dt_c, z_b, z_t, z_c, C_b, C_t, C_g, C_n, dy_b, dy_t, dy_c,
    length, d_inner, group_channels, group_blocks, blocks, C_channels, segment, parts,
    N: tl.constexpr, W: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr, EVERY: tl.constexpr,
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
    c0 = group * group_channels
    c = (c0 + lane).to(tl.int64)
    size = d_inner * N
    a = _scaled(_pieces(A, c, live, N, W, G), G)
    if bias is not None:
        shift = tl.load(bias + c, live, other=0.0)
    else:
        shift = None
    if FIXED_C:
        k = _pieces(C, c, live, N, W, G)
    else:
        C += row * C_b + (c0 // C_channels).to(tl.int64) * C_g
    dt += row * dt_b + c * dt_c
    dy += row * dy_b + c * dy_c
    if z is not None:
        z += row * z_b + c * z_c
    total = tl.full((BD,), 0.0, tl.float32)
    adjoint = _pieces(None, c, live, N, W, G)
    runs = (end - begin + RUN - 1) // RUN
    for i in range(runs):
        t = begin + (runs - 1 - i) * RUN
        dts = _rows(dt, t, end, dt_t, live, RUN)
        dys = _rows(dy, t, end, dy_t, live, RUN)
        if z is not None:
            zs = _rows(z, t, end, z_t, live, RUN)
        for s in tl.static_range(RUN - 1, -1, -1):
            d, _raw = _step(dts[s], shift, t + s, end, live, SOFTPLUS, GPU)
            grad = dys[s].to(tl.float32)
            if z is not None:
                gate = zs[s].to(tl.float32)
                grad *= gate * sigmoid(gate, GPU)
            total += d
            if not FIXED_C:
                k = _vectors(C, C_n, t + s, end, C_t, N, W, G)
            new = ()
            for g in tl.static_range(G):
                new = new + ((adjoint[g] + grad[:, None] * k[g]) * decay(d[:, None], a[g], GPU),)  # noqa: RUF005
            adjoint = new
    _keep(adjoints + part.to(tl.int64) * size, adjoint, c, live, N, W, G)
    tl.store(sums + part.to(tl.int64) * d_inner + c, total, live)


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


@triton.jit
def _add_up(totals, losts, values, G: tl.constexpr):
    new = ()
    lost = ()
    for g in tl.static_range(G):
        more, less = add_up(totals[g], losts[g], values[g])
        new = new + (more,)  # noqa: RUF005
        lost = lost + (less,)  # noqa: RUF005
    return new, lost


@triton.jit
def _over_channels(total, to_B, to_C, s, W: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr):
    """Adds sums over a program's channels as column s of `total` (2 G W, 16): a product with ones in one column, on
    tensor cores where there are any. Line ((g 2) + C) W + w is state w of piece g of dB, or where C is 1, of dC."""
    rows = tl.join(to_B[0], to_C[0])
    if G == 2:
        rows = tl.join(rows, tl.join(to_B[1], to_C[1]))
        rows = tl.permute(rows, (3, 2, 1, 0))
    elif G == 4:
        rows = tl.join(rows, tl.join(to_B[1], to_C[1]))
        rows = tl.join(rows, tl.join(tl.join(to_B[2], to_C[2]), tl.join(to_B[3], to_C[3])))
        rows = tl.permute(rows, (4, 3, 2, 1, 0))
    else:
        rows = tl.permute(rows, (2, 1, 0))
    rows = tl.reshape(rows, (2 * G * W, to_B[0].shape[0]))
    column = tl.arange(0, 16)[None, :] + tl.arange(0, to_B[0].shape[0])[:, None] * 0
    return tl.dot(rows, tl.where(column == s, 1.0, 0.0), total, input_precision=PRECISION)


@triton.jit
def _store_shares(shares, total, t, end, N: tl.constexpr, W: tl.constexpr, G: tl.constexpr, RUN: tl.constexpr):
    """Stores what `_over_channels` added up, into shares (position, 2, N)."""
    line = tl.arange(0, 2 * G * W)
    n = line // (2 * W) * W + line % W
    column = tl.arange(0, 16)
    limit = tl.minimum(end - t, RUN)
    place = ((line // W) % 2 * N + n)[:, None] + column[None, :] * (2 * N)
    tl.store(shares + tl.cast(t, tl.int64) * (2 * N) + place, total, (n < N)[:, None] & (column < limit)[None, :])


@triton.jit
def _store_sums(shares, to_B, to_C, t, end, N: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    """The same of one position without tensor cores, for programs of few channels."""
    at = shares + tl.cast(t, tl.int64) * (2 * N)
    for g in tl.static_range(G):
        n = g * W + tl.arange(0, W)
        inside = (tl.full((W,), t, tl.int32) < end) & (n < N)
        tl.store(at + n, tl.sum(to_B[g], 0), inside)
        tl.store(at + N + n, tl.sum(to_C[g], 0), inside)


@triton.jit
def scan_backward(
    u, dt, z, B, C, A, D, bias, dy, dfinal, checkpoints, adjoints, scratch,
    du, ddt, dz, dA, dBC, dB, dC, dD, dbias, dinitial, cu, owners,
    u_b, u_t, u_c, dt_b, dt_t, dt_c, z_b, z_t, z_c, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, dy_b, dy_t, dy_c,
    length, rows, d_inner, group_channels, group_blocks, blocks, B_channels, C_channels, segment, parts,
    N: tl.constexpr, W: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Every gradient. The states of RUN positions are made again in registers, from checkpoints or, where these lie
    further apart, from what a first walk leaves in `scratch`.

    dA, dD, dbias and the gradients of fixed B and C are a segment's share, dBC (2, N) that of a block of channels.
    """
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
    c0 = group * group_channels
    c = (c0 + lane).to(tl.int64)
    size = d_inner * N
    a = _scaled(_pieces(A, c, live, N, W, G), G)
    if SPLIT:
        adjoint = _pieces(adjoints + part.to(tl.int64) * size, c, live, N, W, G)
    elif dfinal is not None:
        adjoint = _pieces(dfinal + sequence * size, c, live, N, W, G)
    else:
        adjoint = _pieces(None, c, live, N, W, G)
    if bias is not None:
        shift = tl.load(bias + c, live, other=0.0)
    else:
        shift = None
    if D is not None:
        skip = tl.load(D + c, live, other=0.0)
    if FIXED_B:
        b = _pieces(B, c, live, N, W, G)
        sum_B = _pieces(None, c, live, N, W, G)
        lost_B = _pieces(None, c, live, N, W, G)
    else:
        B += row * B_b + (c0 // B_channels).to(tl.int64) * B_g
    if FIXED_C:
        k = _pieces(C, c, live, N, W, G)
        sum_C = _pieces(None, c, live, N, W, G)
        lost_C = _pieces(None, c, live, N, W, G)
    else:
        C += row * C_b + (c0 // C_channels).to(tl.int64) * C_g
    if dBC is not None:
        dBC += (block.to(tl.int64) * rows + row) * length * (2 * N)
    u += row * u_b + c * u_c
    dt += row * dt_b + c * dt_c
    dy += row * dy_b + c * dy_c
    out = (row * length) * d_inner + c
    if z is not None:
        z += row * z_b + c * z_c
    own = tl.arange(0, BD)
    scratch += pid.to(tl.int64) * (RUNS * BD * G * W)
    sum_A = _pieces(None, c, live, N, W, G)
    lost_A = _pieces(None, c, live, N, W, G)
    sum_D = tl.full((BD,), 0.0, tl.float32)
    lost_D = tl.full((BD,), 0.0, tl.float32)
    sum_bias = tl.full((BD,), 0.0, tl.float32)
    lost_bias = tl.full((BD,), 0.0, tl.float32)

    spans = (end - begin + EVERY - 1) // EVERY
    for i in range(spans):
        t0 = begin + (spans - 1 - i) * EVERY
        kept = checkpoints + (slot + (t0 - origin) // EVERY) * size
        count = (tl.minimum(end - t0, EVERY) + RUN - 1) // RUN
        if RUNS > 1:
            tl.debug_barrier()  # the last span's states have been read
            h = _pieces(kept, c, live, N, W, G)
            for r in range(count - 1):
                us = _rows(u, t0 + r * RUN, end, u_t, live, RUN)
                dts = _rows(dt, t0 + r * RUN, end, dt_t, live, RUN)
                _keep(scratch + r * (BD * G * W), h, own, own >= 0, G * W, W, G)
                for s in tl.static_range(RUN):
                    d, _raw = _step(dts[s], shift, t0 + r * RUN + s, end, live, SOFTPLUS, GPU)
                    if not FIXED_B:
                        b = _vectors(B, B_n, t0 + r * RUN + s, end, B_t, N, W, G)
                    h = _forth(h, a, d, d * us[s].to(tl.float32), b, G, GPU)
            _keep(scratch + (count - 1) * (BD * G * W), h, own, own >= 0, G * W, W, G)
            tl.debug_barrier()
        for q in range(count):
            r = count - 1 - q
            t = t0 + r * RUN
            us = _rows(u, t, end, u_t, live, RUN)
            dts = _rows(dt, t, end, dt_t, live, RUN)
            dys = _rows(dy, t, end, dy_t, live, RUN)
            if z is not None:
                zs = _rows(z, t, end, z_t, live, RUN)
            if RUNS > 1:
                h = _pieces(scratch + r * (BD * G * W), own, own >= 0, G * W, W, G)
            else:
                h = _pieces(kept, c, live, N, W, G)
            # forwards once more: the states before every step, and what the gate needs of the output
            hs = h
            ds = ()
            raws = ()
            gs = ()
            for s in tl.static_range(RUN):
                x = us[s].to(tl.float32)
                d, raw = _step(dts[s], shift, t + s, end, live, SOFTPLUS, GPU)
                if not FIXED_B:
                    b = _vectors(B, B_n, t + s, end, B_t, N, W, G)
                h = _forth(h, a, d, d * x, b, G, GPU)
                hs = hs + h
                grad = dys[s].to(tl.float32)
                if z is not None:
                    if not FIXED_C:
                        k = _vectors(C, C_n, t + s, end, C_t, N, W, G)
                    o = _over_states(h, k, G)
                    if D is not None:
                        o += skip * x
                    gate = zs[s].to(tl.float32)
                    open = sigmoid(gate, GPU)
                    o *= grad * (open * (1.0 + gate * (1.0 - open)))
                    here = live & (tl.full((BD,), t + s, tl.int32) < end)
                    tl.store(dz + out + tl.cast(t + s, tl.int64) * d_inner, o.to(dz.dtype.element_ty), here)
                    grad *= gate * open
                ds = ds + (d,)  # noqa: RUF005
                raws = raws + (raw,)  # noqa: RUF005
                gs = gs + (grad,)  # noqa: RUF005
            # backwards
            run_A = _pieces(None, c, live, N, W, G)
            if FIXED_B:
                run_B = _pieces(None, c, live, N, W, G)
            if FIXED_C:
                run_C = _pieces(None, c, live, N, W, G)
            run_D = tl.full((BD,), 0.0, tl.float32)
            run_bias = tl.full((BD,), 0.0, tl.float32)
            if DOT and dBC is not None:
                total = tl.full((2 * G * W, 16), 0.0, tl.float32)
            for s in tl.static_range(RUN - 1, -1, -1):
                x = us[s].to(tl.float32)
                d = ds[s]
                grad = gs[s]
                if not FIXED_B:
                    b = _vectors(B, B_n, t + s, end, B_t, N, W, G)
                if not FIXED_C:
                    k = _vectors(C, C_n, t + s, end, C_t, N, W, G)
                new = ()
                new_A = ()
                to_B = ()
                to_C = ()
                to_drive = tl.full((BD, W), 0.0, tl.float32)  # gradient of dt u, for du and ddt
                to_decay = tl.full((BD, W), 0.0, tl.float32)  # gradient of dt through exp(dt A)
                for g in tl.static_range(G):
                    here_now = adjoint[g] + grad[:, None] * k[g]
                    to_B = to_B + (here_now * (d * x)[:, None],)  # noqa: RUF005
                    to_C = to_C + (grad[:, None] * hs[(s + 1) * G + g],)  # noqa: RUF005
                    to_drive += here_now * b[g]
                    here_now *= decay(d[:, None], a[g], GPU)
                    w = here_now * hs[s * G + g]
                    new_A = new_A + (run_A[g] + w * d[:, None],)  # noqa: RUF005
                    to_decay += w * a[g]
                    new = new + (here_now,)  # noqa: RUF005
                adjoint = new
                run_A = new_A
                if dBC is not None:
                    if DOT:
                        total = _over_channels(total, to_B, to_C, s, W, G, PRECISION)
                    else:
                        _store_sums(dBC, to_B, to_C, t + s, end, N, W, G)
                if FIXED_B:
                    more = ()
                    for g in tl.static_range(G):
                        more = more + (run_B[g] + to_B[g],)  # noqa: RUF005
                    run_B = more
                if FIXED_C:
                    more_C = ()
                    for g in tl.static_range(G):
                        more_C = more_C + (run_C[g] + to_C[g],)  # noqa: RUF005
                    run_C = more_C
                driven = tl.sum(to_drive, 1)
                to_u = driven * d
                if D is not None:
                    to_u += skip * grad
                    run_D += grad * x
                to_dt = tl.sum(to_decay, 1) * LN2 + driven * x
                if SOFTPLUS:
                    to_dt *= sigmoid(raws[s], GPU)
                here = live & (tl.full((BD,), t + s, tl.int32) < end)
                to_dt = tl.where(here, to_dt, 0.0)
                run_bias += to_dt
                along = out + tl.cast(t + s, tl.int64) * d_inner
                tl.store(du + along, to_u.to(du.dtype.element_ty), here)
                tl.store(ddt + along, to_dt.to(ddt.dtype.element_ty), here)
            if DOT and dBC is not None:
                _store_shares(dBC, total, t, end, N, W, G, RUN)
            sum_A, lost_A = _add_up(sum_A, lost_A, run_A, G)
            if FIXED_B:
                sum_B, lost_B = _add_up(sum_B, lost_B, run_B, G)
            if FIXED_C:
                sum_C, lost_C = _add_up(sum_C, lost_C, run_C, G)
            if D is not None:
                sum_D, lost_D = add_up(sum_D, lost_D, run_D)
            if bias is not None:
                sum_bias, lost_bias = add_up(sum_bias, lost_bias, run_bias)
    here_part = part.to(tl.int64)
    _keep(dA + here_part * size, sum_A, c, live, N, W, G)
    if FIXED_B:
        _keep(dB + here_part * size, sum_B, c, live, N, W, G)
    if FIXED_C:
        _keep(dC + here_part * size, sum_C, c, live, N, W, G)
    if D is not None:
        tl.store(dD + here_part * d_inner + c, sum_D, live)
    if bias is not None:
        tl.store(dbias + here_part * d_inner + c, sum_bias, live)
    if dinitial is not None:
        _keep(dinitial + sequence * size, adjoint, c, lane < tl.where(number == 0, group_channels, 0), N, W, G)
