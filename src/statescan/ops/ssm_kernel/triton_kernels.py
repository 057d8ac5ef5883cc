# type: ignore  (what Triton compiles looks like Python, but has types of its own)
"""The Vandermonde and Cauchy products of S4D's and S4's kernels in Triton, forward and backward.

A Vandermonde tile is BA x BT lags ``l = start + a BT + b``: ``z^l = z^start z^(a BT) z^b``, two tables of BA and BT
powers of each state, made in registers, and between them a real matrix product of inner size 2 states. A phase is a
fixed-point fraction of a turn, in units of 2^-64: its multiples are integers that wrap around where turns do, so that
no power loses it. float64 is computed in once for each state, by a kernel of its own.

In the Cauchy product a thread of the forward has points, one of the backward has states; what it sums over is a loop.
``iy - c lambda`` and its conjugate pair's have the product q, and the sum over both is
``2 (iy Re(v) - c Re(v conj(lambda))) / q``. No number is added to by two programs: where several have a share, each
writes its own, and the host adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["cauchy_backward", "cauchy_forward", "vandermonde_backward", "vandermonde_forward", "vandermonde_states"]

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
TURN = tl.constexpr(0.15915494309189535)  # of a radian
HALF_RANGE = tl.constexpr(9223372036854775808.0)  # 2^63
EIGHTH = tl.constexpr(1 << 29)  # of 2^32 for a turn
SIGN = tl.constexpr(-(1 << 31))
RADIANS = tl.constexpr(1.4629180792671596e-9)  # of 2^-32 turn


@triton.jit
def vandermonde_states(log_re, log_im, turns, high, low, count, BLOCK: tl.constexpr):
    """The turns of a step, in units of 2^-64, and the log2 of its size: 16 bits of it, and ln(2) times the rest."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    re = tl.load(log_re + at, live, other=0.0)
    im = tl.load(log_im + at, live, other=0.0)
    phase = im * TURN
    phase = phase - tl.floor(phase + 0.5)
    tl.store(turns + at, (phase * HALF_RANGE).to(tl.int64) << 1, live)
    # A phase that is no number makes the power none.
    rate = (re + (im - im)) * LOG2E
    part = (rate.to(tl.float32).to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)
    tl.store(high + at, part, live)
    tl.store(low + at, ((rate - part.to(tl.float64)) * LN2).to(tl.float32), live)


@triton.jit
def _polar(phase, size):
    """Real and imaginary part of a number of this size >= 0 and phase, in units of 2^-32 turn."""
    turned = phase + EIGHTH  # bits 31 and 30 are the quarter, what is below them is within an eighth of its middle
    x = ((turned & (2 * EIGHTH - 1)) - EIGHTH).to(tl.float32) * RADIANS
    s = x * x
    sine = ((-1.9515295891e-4 * s + 8.3321608736e-3) * s - 1.6666654611e-1) * (s * x) + x
    cosine = ((2.443315711809948e-5 * s - 1.388731625493765e-3) * s + 4.166664568298827e-2) * s - 0.5
    cosine = cosine * s + 1.0
    odd = (turned & (2 * EIGHTH)) != 0
    bits = size.to(tl.int32, bitcast=True)
    re = (bits ^ ((turned + 2 * EIGHTH) & SIGN)).to(tl.float32, bitcast=True)
    im = (bits ^ (turned & SIGN)).to(tl.float32, bitcast=True)
    return re * tl.where(odd, sine, cosine), im * tl.where(odd, cosine, sine)


@triton.jit
def _size(k, high, low, GPU: tl.constexpr):
    """2^(k high) exp(k low): the first exponent is exact for k of 8 bits."""
    size = tl.exp2(k * high)
    nudge = 3e-8 if GPU == 1 else 0.0  # by that NVIDIA's exp2 is too low
    return tl.fma(size, tl.fma(k, low, nudge), size)


@triton.jit
def _power(k, turns, high, low, GPU: tl.constexpr):
    """z^k for any k, int64."""
    return _polar(((k * turns) >> 32).to(tl.int32), _size(k.to(tl.float32), high, low, GPU))


@triton.jit
def _table(k, turns, high, low, GPU: tl.constexpr):
    """z^k for k >= 0 of 32 bits, shapes as they broadcast."""
    fraction = tl.umulhi(k.to(tl.uint32), turns.to(tl.uint32)).to(tl.int32)
    return _polar(k * (turns >> 32).to(tl.int32) + fraction, _size(k.to(tl.float32), high, low, GPU))


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32: in three products of tensor float32, which has 11 bits, the small ones first; or as it is.

    Tensor cores cut off what they add up, where others round: their sums are kept short and added to others outside.
    """
    if PRECISION == "tf32":
        a_high = ((a.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        b_high = ((b.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        small = tl.dot(a_high, b - b_high, input_precision="tf32")
        small = tl.dot(a - a_high, b_high, small, input_precision="tf32")
        return tl.dot(a_high, b_high, small, input_precision="tf32")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _side_by_side(re, im):
    """(rows, 2 columns): the parts in turn, as a thread has them."""
    return tl.join(re, im).reshape(re.shape[0], 2 * re.shape[1])


@triton.jit
def _over_rows(x):
    """The sum over the first dimension, of at least 16, by eights: in short sums little is lost."""
    return tl.sum(tl.sum(x.reshape(x.shape[0] // 8, 8, x.shape[1]), 1), 0)


@triton.jit
def vandermonde_forward(
    steps, highs, lows, w_re, w_im, out, states, length, tiles,
    BA: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """out[d, l] = Re(sum_n w[d, n] z[d, n]^l) for a tile of lags."""
    pid = tl.program_id(0)
    d = (pid // tiles).to(tl.int64)
    row = d * states
    start = (pid % tiles).to(tl.int64) * (BA * BT)
    a = tl.arange(0, BA)
    b = tl.arange(0, BT)
    total = tl.full((BA, BT), 0.0, tl.float32)
    for first in range(0, states, BN):
        n = first + tl.arange(0, BN)
        live = n < states
        turns = tl.load(steps + row + n, live, other=0)
        high = tl.load(highs + row + n, live, other=0.0)
        low = tl.load(lows + row + n, live, other=0.0)
        start_re, start_im = _power(start, turns, high, low, GPU)
        wr = tl.load(w_re + row + n, live, other=0.0)
        wi = tl.load(w_im + row + n, live, other=0.0)
        re = (wr * start_re - wi * start_im)[None, :]
        im = (wr * start_im + wi * start_re)[None, :]
        far_re, far_im = _table(a[:, None], (turns * BT)[None, :], (high * BT)[None, :], (low * BT)[None, :], GPU)
        near_re, near_im = _table(b[:, None], turns[None, :], high[None, :], low[None, :], GPU)
        far = _side_by_side(re * far_re - im * far_im, -(re * far_im + im * far_re))
        total += _dot(far, _side_by_side(near_re, near_im).trans(1, 0), PRECISION)
    at = (a * BT)[:, None] + b[None, :]
    tl.store(out + (d * length + start) + at, total, at < length - start)


@triton.jit
def vandermonde_backward(
    steps, highs, lows, g, plain_re, plain_im, moved_re, moved_im, states, length, tiles, blocks, rows,
    BA: tl.constexpr, BT: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """A tile's share of sum_l g[d, l] z^l, plain, and sum_l l g[d, l] z^l, moved; `rows` is channels times states."""
    pid = tl.program_id(0)
    tile = (pid % tiles).to(tl.int64)
    n = pid // tiles % blocks * BN + tl.arange(0, BN)
    d = (pid // tiles // blocks).to(tl.int64)
    live = n < states
    start = tile * (BA * BT)
    a = tl.arange(0, BA)
    turns = tl.load(steps + d * states + n, live, other=0)
    high = tl.load(highs + d * states + n, live, other=0.0)
    low = tl.load(lows + d * states + n, live, other=0.0)
    # of every stretch of BT lags: sum_b g z^b and sum_b b g z^b
    plain = tl.full((BA, 2 * BN), 0.0, tl.float32)
    moved = plain
    for first in range(0, BT, BB):
        b = first + tl.arange(0, BB)
        at = (a * BT)[:, None] + b[None, :]
        grad = tl.load(g + (d * length + start) + at, at < length - start, other=0.0)
        near_re, near_im = _table(b[:, None], turns[None, :], high[None, :], low[None, :], GPU)
        near = _side_by_side(near_re, near_im)
        plain += _dot(grad, near, PRECISION)
        moved += _dot(grad, b.to(tl.float32)[:, None] * near, PRECISION)
    moved += (a * BT).to(tl.float32)[:, None] * plain
    p_re, p_im = plain.reshape(BA, BN, 2).split()
    m_re, m_im = moved.reshape(BA, BN, 2).split()
    far_re, far_im = _table(a[:, None], (turns * BT)[None, :], (high * BT)[None, :], (low * BT)[None, :], GPU)
    plain_r = _over_rows(far_re * p_re - far_im * p_im)
    plain_i = _over_rows(far_re * p_im + far_im * p_re)
    lag = start.to(tl.float32)
    moved_r = _over_rows(far_re * m_re - far_im * m_im) + lag * plain_r
    moved_i = _over_rows(far_re * m_im + far_im * m_re) + lag * plain_i
    re, im = _power(start, turns, high, low, GPU)
    place = tile * rows + d * states + n
    tl.store(plain_re + place, re * plain_r - im * plain_i, live)
    tl.store(plain_im + place, re * plain_i + im * plain_r, live)
    tl.store(moved_re + place, re * moved_r - im * moved_i, live)
    tl.store(moved_im + place, re * moved_i + im * moved_r, live)


@triton.jit
def _inverse(re, im, y, c, GPU: tl.constexpr):
    """1 / q of q = (iy - c lambda)(iy - c conj(lambda)); the differences next to a resonance are rounded once."""
    cr = c * re
    h = y * cr
    q = tl.fma(cr, cr, -(tl.fma(-c, im, y) * tl.fma(c, im, y)))
    size = q * q + 4.0 * (h * h)
    if GPU == 1:
        scale = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [size], tl.float32, True, 1)
    else:
        scale = 1.0 / size
    return q * scale, (h + h) * scale


@triton.jit
def cauchy_forward(
    lam_re, lam_im, v_re, v_im, y, c, out_re, out_im, states, sums, points, tiles, groups,
    BK: tl.constexpr, BS: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """out[d, s, k] = 2 iy sum_n Re(v) / q - 2 c sum_n Re(v conj(lambda)) / q for BK points and BS of the sums."""
    pid = tl.program_id(0)
    # Said not to be contiguous, a thread's points are those of its sums: nothing is exchanged within the loop.
    k = pid % tiles * BK + tl.max_contiguous(tl.arange(0, BK), 1)
    s = pid // tiles % groups * BS + tl.arange(0, BS)
    d = (pid // tiles // groups).to(tl.int64)
    here = k < points
    real = s < sums
    yk = tl.load(y + k, here, other=1.0)
    ck = tl.load(c + k, here, other=0.0)
    moved_re = tl.full((BS, BK), 0.0, tl.float32)
    moved_im = moved_re
    still_re = moved_re
    still_im = moved_re
    for n in range(states):
        re = tl.load(lam_re + d * states + n)
        im = tl.load(lam_im + d * states + n)
        place = (d * sums + s) * states + n
        vr = tl.load(v_re + place, real, other=0.0)
        vi = tl.load(v_im + place, real, other=0.0)
        level = (vr * re + vi * im)[:, None]
        slope = vr[:, None]
        ir, ii = _inverse(re, im, yk, ck, GPU)
        ir = ir[None, :]
        ii = ii[None, :]
        moved_re += slope * ir
        moved_im += slope * ii
        still_re += level * ir
        still_im += level * ii
    yk = 2.0 * yk[None, :]
    ck = -2.0 * ck[None, :]
    place = (d * sums + s)[:, None] * points + k[None, :]
    both = real[:, None] & here[None, :]
    tl.store(out_re + place, ck * still_re - yk * moved_im, both)
    tl.store(out_im + place, ck * still_im + yk * moved_re, both)


@triton.jit
def cauchy_backward(
    lam_re, lam_im, v_re, v_im, y, c, g_re, g_im, dlam_re, dlam_im, dv_re, dv_im,
    states, sums, points, rows, splits, reach, groups, blocks,
    BK: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """The share of `reach` points: dlam's of [split, group] and dv's of [split]; `rows` is channels times states.

    With r = 1 / q and G the gradient by r (its real and imaginary part), the gradient by q is -conj(r)^2 G.
    """
    pid = tl.program_id(0)
    split = (pid % splits).to(tl.int64)
    group = pid // splits % groups
    n = pid // splits // groups % blocks * BN + tl.arange(0, BN)
    d = (pid // splits // groups // blocks).to(tl.int64)
    s = group * BS + tl.arange(0, BS)
    real = s < sums
    live = n < states
    both = real[:, None] & live[None, :]
    re = tl.load(lam_re + d * states + n, live, other=-1.0)
    im = tl.load(lam_im + d * states + n, live, other=0.0)
    own = (d * sums + s)[:, None] * states + n[None, :]
    vr = tl.load(v_re + own, both, other=0.0)
    vi = tl.load(v_im + own, both, other=0.0)
    # (sums, points, states) from here on
    wide_re = re[None, None, :]
    wide_im = im[None, None, :]
    level = -(vr * re[None, :] + vi * im[None, :])[:, None, :]
    slope = vr[:, None, :]
    dslope = tl.full((BS, BK, BN), 0.0, tl.float32)
    dlevel = dslope
    straight = tl.full((1, BK, BN), 0.0, tl.float32)  # sum c^2 Re(dq)
    cross = straight  # sum y c Im(dq)
    start = pid % splits * reach
    end = tl.minimum(start + reach, points)
    for first in range(start, end, BK):
        k = first + tl.arange(0, BK)
        here = k < end
        yk = tl.load(y + k, here, other=1.0)[None, :, None]
        ck = tl.load(c + k, here, other=0.0)[None, :, None]
        cell = (d * sums + s)[:, None] * points + k[None, :]
        inside = real[:, None] & here[None, :]
        gr = tl.load(g_re + cell, inside, other=0.0)[:, :, None]
        gi = tl.load(g_im + cell, inside, other=0.0)[:, :, None]
        ir, ii = _inverse(wide_re, wide_im, yk, ck, GPU)
        dr_re = ck * tl.sum(gr * level, 0, True) + yk * tl.sum(gi * slope, 0, True)
        dr_im = ck * tl.sum(gi * level, 0, True) - yk * tl.sum(gr * slope, 0, True)
        square = ir * ir - ii * ii
        twice = 2.0 * ir * ii
        straight -= (ck * ck) * (square * dr_re + twice * dr_im)
        cross += (yk * ck) * (twice * dr_re - square * dr_im)
        dslope += (yk * ir) * gi
        dslope -= (yk * ii) * gr
        dlevel += (ck * ir) * gr
        dlevel += (ck * ii) * gi
    by_slope = tl.sum(dslope, 1)
    by_level = tl.sum(dlevel, 1)
    by_square = 2.0 * tl.sum(tl.sum(straight, 1), 0)  # slope and level were half of what they are
    by_cross = 2.0 * tl.sum(tl.sum(cross, 1), 0)
    place = split * sums * rows + own
    tl.store(dv_re + place, 2.0 * (by_slope - re[None, :] * by_level), both)
    tl.store(dv_im + place, -2.0 * im[None, :] * by_level, both)
    place = (split * groups + group) * rows + d * states + n
    tl.store(dlam_re + place, 2.0 * (re * by_square - by_cross - tl.sum(vr * by_level, 0)), live)
    tl.store(dlam_im + place, 2.0 * (im * by_square - tl.sum(vi * by_level, 0)), live)
