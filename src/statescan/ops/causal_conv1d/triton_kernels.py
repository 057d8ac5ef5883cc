# type: ignore  (what Triton compiles looks like Python, but has types of its own)
"""The causal convolution's Triton kernels: tiles of BT positions and BD channels, channels side by side.

`owners` is the sequence of every position where several are packed in one row (PACKED). PAST is the filter's width less
one. What several programs share (the weights' gradients) each writes apart, and the host adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statescan.ops._triton_functions import sigmoid

__all__ = ["conv_backward", "conv_forward", "conv_gradient", "conv_step", "state_backward", "state_forward"]


@triton.jit
def _bounds(row, t, here, cu, owners, length, PACKED: tl.constexpr):
    """(sequence, its start, its end) of every position of a tile."""
    if PACKED:
        sequence = tl.load(owners + t, here, other=0)
        return sequence.to(tl.int64), tl.load(cu + sequence), tl.load(cu + sequence + 1)
    nothing = t * 0
    return nothing.to(tl.int64) + row, nothing, nothing + length


@triton.jit
def _tap(x, initial, row, at, sequence, start, here, c, live, x_b, x_t, x_c, i_b, i_t, i_c, PAST: tl.constexpr):
    """The inputs at positions `at` (BT,), from the sequences' initial states where that is before their start."""
    own = here & (at >= start)
    place = row * x_b + at.to(tl.int64)[:, None] * x_t + c[None, :] * x_c
    value = tl.load(x + place, own[:, None] & live[None, :], other=0.0).to(tl.float32)
    if initial is not None:
        before = here & (at < start)
        place = (sequence * i_b + (at - start + PAST).to(tl.int64) * i_t)[:, None] + c[None, :] * i_c
        value += tl.load(initial + place, before[:, None] & live[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def conv_forward(
    x, weight, bias, initial, cu, owners, y,
    x_b, x_t, x_c, i_b, i_t, i_c, w_c, w_k, length, features, times, blocks,
    PAST: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = (pid % blocks) * BD + tl.arange(0, BD)
    t = (pid // blocks % times) * BT + tl.arange(0, BT)
    row = (pid // blocks // times).to(tl.int64)
    live = c < features
    here = t < length
    c = c.to(tl.int64)
    sequence, start, _ = _bounds(row, t, here, cu, owners, length, PACKED)
    out = tl.full((BT, BD), 0.0, tl.float32)
    for k in tl.static_range(PAST + 1):
        w = tl.load(weight + c * w_c + k * w_k, live, other=0.0).to(tl.float32)
        out += w[None, :] * _tap(
            x, initial, row, t - PAST + k, sequence, start, here, c, live, x_b, x_t, x_c, i_b, i_t, i_c, PAST
        )
    if bias is not None:
        out += tl.load(bias + c, live, other=0.0)[None, :]
    if SILU:
        out *= sigmoid(out, GPU)
    place = (row * length + t)[:, None] * features + c[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), here[:, None] & live[None, :])


@triton.jit
def conv_gradient(
    x, weight, bias, initial, cu, owners, dy, g, dweight, dbias,
    x_b, x_t, x_c, i_b, i_t, i_c, w_c, w_k, dy_b, dy_t, dy_c, length, features, times, blocks,
    PAST: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, `g` (only with SILU), and a tile's share of the weights' gradients."""
    pid = tl.program_id(0)
    c = (pid % blocks) * BD + tl.arange(0, BD)
    t = (pid // blocks % times) * BT + tl.arange(0, BT)
    row = (pid // blocks // times).to(tl.int64)
    live = c < features
    here = t < length
    c = c.to(tl.int64)
    both = here[:, None] & live[None, :]
    sequence, start, _ = _bounds(row, t, here, cu, owners, length, PACKED)
    grad = tl.load(dy + row * dy_b + t.to(tl.int64)[:, None] * dy_t + c[None, :] * dy_c, both, other=0.0)
    grad = grad.to(tl.float32)
    if SILU:
        out = tl.full((BT, BD), 0.0, tl.float32)
        for k in tl.static_range(PAST + 1):
            w = tl.load(weight + c * w_c + k * w_k, live, other=0.0).to(tl.float32)
            out += w[None, :] * _tap(
                x, initial, row, t - PAST + k, sequence, start, here, c, live, x_b, x_t, x_c, i_b, i_t, i_c, PAST
            )
        if bias is not None:
            out += tl.load(bias + c, live, other=0.0)[None, :]
        open = sigmoid(out, GPU)
        # where the gate is shut its factor is 0, and 0 times an overflown input would be NaN
        grad *= tl.where(open == 0.0, 0.0, open * (1.0 + out * (1.0 - open)))
        grad = tl.where(both, grad, 0.0)
        tl.store(g + (row * length + t)[:, None] * features + c[None, :], grad, both)
    share = (pid // blocks).to(tl.int64) * features + c
    if dbias is not None:
        tl.store(dbias + share, tl.sum(grad, 0), live)
    for k in tl.static_range(PAST + 1):
        tap = _tap(x, initial, row, t - PAST + k, sequence, start, here, c, live, x_b, x_t, x_c, i_b, i_t, i_c, PAST)
        tl.store(dweight + share * (PAST + 1) + k, tl.sum(grad * tap, 0), live)


@triton.jit
def conv_backward(
    g, weight, cu, owners, dfinal, dx,
    g_b, g_t, g_c, w_c, w_k, length, features, times, blocks,
    PAST: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dx[t] = sum_k weight[k] g[t + PAST - k], as far as t's sequence goes, plus the final state's gradient."""
    pid = tl.program_id(0)
    c = (pid % blocks) * BD + tl.arange(0, BD)
    t = (pid // blocks % times) * BT + tl.arange(0, BT)
    row = (pid // blocks // times).to(tl.int64)
    live = c < features
    here = t < length
    c = c.to(tl.int64)
    sequence, _, end = _bounds(row, t, here, cu, owners, length, PACKED)
    out = tl.full((BT, BD), 0.0, tl.float32)
    for k in tl.static_range(PAST + 1):
        w = tl.load(weight + c * w_c + k * w_k, live, other=0.0).to(tl.float32)
        at = t + PAST - k
        inside = (here & (at < end))[:, None] & live[None, :]
        value = tl.load(g + row * g_b + at.to(tl.int64)[:, None] * g_t + c[None, :] * g_c, inside, other=0.0)
        out += w[None, :] * value.to(tl.float32)
    if dfinal is not None:
        slot = t - (end - PAST)
        kept = (here & (slot >= 0))[:, None] & live[None, :]
        place = (sequence * PAST + slot)[:, None] * features + c[None, :]
        out += tl.load(dfinal + place, kept, other=0.0).to(tl.float32)
    place = (row * length + t)[:, None] * features + c[None, :]
    tl.store(dx + place, out.to(dx.dtype.element_ty), here[:, None] & live[None, :])


@triton.jit
def state_forward(
    x, initial, cu, final, x_b, x_t, x_c, i_b, i_t, i_c, length, features, blocks,
    PAST: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The last PAST inputs of every sequence."""
    pid = tl.program_id(0)
    c = (pid % blocks) * BD + tl.arange(0, BD)
    live = c < features
    c = c.to(tl.int64)
    number = pid // blocks
    sequence = number.to(tl.int64)
    if PACKED:
        start = tl.load(cu + number)
        end = tl.load(cu + number + 1)
        row = sequence * 0
    else:
        start = number * 0
        end = start + length
        row = sequence
    for m in tl.static_range(PAST):
        at = end - PAST + m
        value = tl.load(
            x + row * x_b + at.to(tl.int64) * x_t + c * x_c, c < tl.where(at >= start, features, 0), other=0.0
        )
        if initial is not None:
            place = sequence * i_b + (at - start + PAST).to(tl.int64) * i_t + c * i_c
            value += tl.load(initial + place, c < tl.where(at < start, features, 0), other=0.0)
        tl.store(final + (sequence * PAST + m) * features + c, value, live)


@triton.jit
def state_backward(
    g, weight, cu, dfinal, dinitial, g_b, g_t, g_c, w_c, w_k, length, features, blocks,
    PAST: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of every sequence's initial state: through its first PAST outputs, and, where it is shorter than the
    filter, through its final state."""
    pid = tl.program_id(0)
    c = (pid % blocks) * BD + tl.arange(0, BD)
    live = c < features
    c = c.to(tl.int64)
    number = pid // blocks
    sequence = number.to(tl.int64)
    if PACKED:
        start = tl.load(cu + number)
        end = tl.load(cu + number + 1)
        row = sequence * 0
    else:
        start = number * 0
        end = start + length
        row = sequence
    for m in tl.static_range(PAST):
        out = tl.full((BD,), 0.0, tl.float32)
        for i in tl.static_range(m + 1):
            at = start + i
            w = tl.load(weight + c * w_c + (m - i) * w_k, live, other=0.0).to(tl.float32)
            inside = c < tl.where(at < end, features, 0)
            out += w * tl.load(g + row * g_b + at.to(tl.int64) * g_t + c * g_c, inside, other=0.0).to(tl.float32)
        if dfinal is not None:
            slot = m - (end - start)
            place = (sequence * PAST + slot) * features + c
            out += tl.load(dfinal + place, c < tl.where(slot >= 0, features, 0), other=0.0).to(tl.float32)
        tl.store(dinitial + (sequence * PAST + m) * features + c, out.to(dinitial.dtype.element_ty), live)


@triton.jit
def conv_step(
    x, state, weight, bias, y, new_state, x_b, x_c, s_b, s_t, s_c, n_b, n_t, n_c, w_c, w_k, features, blocks,
    PAST: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """One position from a state; new_state may be state itself: a thread reads an input before it writes over it."""
    pid = tl.program_id(0)
    c = (pid % blocks) * BD + tl.arange(0, BD)
    live = c < features
    c = c.to(tl.int64)
    row = (pid // blocks).to(tl.int64)
    now = tl.load(x + row * x_b + c * x_c, live, other=0.0)
    out = now.to(tl.float32) * tl.load(weight + c * w_c + PAST * w_k, live, other=0.0).to(tl.float32)
    for k in tl.static_range(PAST):
        value = tl.load(state + row * s_b + k * s_t + c * s_c, live, other=0.0)
        out += value.to(tl.float32) * tl.load(weight + c * w_c + k * w_k, live, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(new_state + row * n_b + (k - 1) * n_t + c * n_c, value, live)
    if PAST > 0:
        tl.store(new_state + row * n_b + (PAST - 1) * n_t + c * n_c, now, live)
    if bias is not None:
        out += tl.load(bias + c, live, other=0.0)
    if SILU:
        out *= sigmoid(out, GPU)
    tl.store(y + row * features + c, out.to(y.dtype.element_ty), live)
