# type: ignore  (what Triton compiles looks like Python, but has types of its own)
"""The residual addition and RMS norm in Triton. A row is read in pieces of BF features, twice where it is longer than
one piece; in the backward a program has ROWS rows, one after the other."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["norm_backward", "norm_forward"]


@triton.jit
def norm_forward(
    x, residual, weight, total, output, rstd, x_r, x_c, r_r, r_c, features, eps,
    BF: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    square = tl.full((BF,), 0.0, tl.float32)
    value = square  # what a loop makes is known behind it only if it was there before
    for p in range(PIECES):
        c = p * BF + tl.arange(0, BF)
        live = c < features
        at = c.to(tl.int64)
        value = tl.load(x + row * x_r + at * x_c, live, other=0.0).to(tl.float32)
        if residual is not None:
            value += tl.load(residual + row * r_r + at * r_c, live, other=0.0).to(tl.float32)
        if total is not None:
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + row * features + at, rounded, live)
            value = rounded.to(tl.float32)
        square += value * value
    scale = 1.0 / tl.sqrt_rn(tl.sum(square, 0) / features + eps)
    tl.store(rstd + row, scale)
    if PIECES > 1:
        tl.debug_barrier()  # `total` is read back below, where other threads may have written it
    for p in range(PIECES):
        c = p * BF + tl.arange(0, BF)
        live = c < features
        at = c.to(tl.int64)
        if PIECES > 1:
            if total is not None:
                value = tl.load(total + row * features + at, live, other=0.0).to(tl.float32)
            else:
                value = tl.load(x + row * x_r + at * x_c, live, other=0.0).to(tl.float32)
        out = value * scale * tl.load(weight + at, live, other=0.0)
        tl.store(output + row * features + at, out.to(output.dtype.element_ty), live)


@triton.jit
def norm_backward(
    doutput, dtotal, total, rstd, weight, dx, dresidual, dweight,
    o_r, o_c, d_r, d_c, t_r, t_c, rows, features,
    BF: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = rstd (w g - total rstd^2 mean(w g total)) + dtotal, also for the residual; ROWS rows' share of dweight."""
    first = tl.program_id(0) * ROWS
    share = tl.program_id(0).to(tl.int64) * features
    total_w = tl.full((BF,), 0.0, tl.float32)
    for q in range(ROWS):
        row = (first + q).to(tl.int64)
        limit = tl.where(first + q < rows, features, 0)
        scale = tl.load(rstd + tl.minimum(row, rows - 1))
        dot = tl.full((BF,), 0.0, tl.float32)
        value = dot
        g = dot
        w = dot
        for p in range(PIECES):
            c = p * BF + tl.arange(0, BF)
            live = c < limit
            at = c.to(tl.int64)
            value = tl.load(total + row * t_r + at * t_c, live, other=0.0).to(tl.float32)
            g = tl.load(doutput + row * o_r + at * o_c, live, other=0.0).to(tl.float32)
            w = tl.load(weight + at, live, other=0.0)
            dot += value * g * w
        mean = tl.sum(dot, 0) * (scale * scale) / features
        for p in range(PIECES):
            c = p * BF + tl.arange(0, BF)
            live = c < limit
            at = c.to(tl.int64)
            if PIECES > 1:
                value = tl.load(total + row * t_r + at * t_c, live, other=0.0).to(tl.float32)
                g = tl.load(doutput + row * o_r + at * o_c, live, other=0.0).to(tl.float32)
                w = tl.load(weight + at, live, other=0.0)
            out = scale * (w * g - value * mean)
            if dtotal is not None:
                out += tl.load(dtotal + row * d_r + at * d_c, live, other=0.0).to(tl.float32)
            tl.store(dx + row * features + at, out.to(dx.dtype.element_ty), live)
            if dresidual is not None:
                tl.store(dresidual + row * features + at, out.to(dresidual.dtype.element_ty), live)
            own = g * value * scale
            if PIECES == 1:
                total_w += own
            else:
                if q > 0:
                    own += tl.load(dweight + share + at, c < features, other=0.0)
                tl.store(dweight + share + at, own, c < features)
        if PIECES > 1:
            tl.debug_barrier()  # what this row has written the next one reads
    if PIECES == 1:
        c = tl.arange(0, BF)
        tl.store(dweight + share + c, total_w, c < features)
