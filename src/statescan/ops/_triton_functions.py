# type: ignore  (what Triton compiles looks like Python, but has types of its own)
"""Functions that the Triton kernels of several ops share.

GPU is 0 for the interpreter, whose exponentials are exact; 1 for NVIDIA, whose hardware exponential is low by 1.6e-8 to
5e-8 on average, which sums over thousands of positions would add up; 2 for others.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_up", "check_boundaries", "column", "decay", "exp_down", "probe", "sigmoid", "softplus"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def probe(x):
    """An empty kernel's worth of work: shows whether kernels can be compiled and run."""
    tl.store(x, 1.0)


# Without `debug` Triton leaves assertions out. One binary takes all sizes, so that it is there before any capture.
@triton.jit(debug=True, do_not_specialize=["sequences", "length"], do_not_specialize_on_alignment=["cu"])
def check_boundaries(cu, sequences, length, BLOCK: tl.constexpr):
    """Stops where the boundaries of packed sequences don't go from 0 to the length without falling."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(cu + i, i < sequences, other=0)
    after = tl.load(cu + i + 1, i < sequences, other=0)
    good = (before <= after) & ((i > 0) | (before == 0)) & ((i != sequences - 1) | (after == length))
    tl.device_assert(good, "statescan: cu_seqlens must go from 0 to the length and never fall, got other offsets")


@triton.jit
def decay(step, a, GPU: tl.constexpr):
    """exp2(step a) for step a <= 0; a step of zero gives exactly 1."""
    if GPU == 1:
        return tl.exp2(tl.fma(step, a, 2.9e-8))
    return tl.exp2(step * a)


@triton.jit
def exp_down(x, GPU: tl.constexpr):
    """exp(x) for x <= 0, good to a unit in the last place; NaN stays NaN."""
    if GPU == 0:
        return tl.exp(x)
    x = tl.where(x < -126.0, -126.0, x)
    t = x * 1.44269502
    rest = tl.fma(x, 1.92596299e-8, tl.fma(x, 1.44269502, -t))  # what rounding took from x * log2(e)
    e = tl.exp2(t)
    nudge = 5e-8 if GPU == 1 else 0.0
    return tl.fma(e, tl.fma(rest, 0.693147181, nudge), e)


@triton.jit
def softplus(x, GPU: tl.constexpr):
    """log(1 + exp(x)) = max(x, 0) + log1p(e), e = exp(-|x|); log1p(e) / e is a polynomial good to 5e-9 on [0, 1]."""
    e = exp_down(-tl.abs(x), GPU)
    p = e * -3.244004445e-03 + 1.985136978e-02
    p = e * p + -5.695936084e-02
    p = e * p + 1.060363725e-01
    p = e * p + -1.530558169e-01
    p = e * p + 1.967593580e-01
    p = e * p + -2.495413274e-01
    p = e * p + 3.332996368e-01
    p = e * p + -4.999990165e-01
    p = e * p + 1.0
    return e * p + tl.where(x < 0.0, 0.0, x)


@triton.jit
def sigmoid(x, GPU: tl.constexpr):
    """1 / (1 + exp(-x)) with no overflow on either side."""
    e = exp_down(-tl.abs(x), GPU)
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def column(tile, at, s):
    """Column s of a tile whose columns are numbered `at` (1, columns)."""
    return tl.sum(tl.where(at == s, tile, 0.0), 1)


@triton.jit
def add_up(total, lost, value):
    """(total + value, what its rounding lost): compensated summation over many positions."""
    value = value - lost
    new = total + value
    return new, (new - total) - value
