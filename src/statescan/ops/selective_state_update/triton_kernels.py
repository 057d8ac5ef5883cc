# type: ignore  (what Triton compiles looks like Python, but has types of its own)
"""One step of the selective scan in Triton: a program has BD channels of one row with all their states."""

from __future__ import annotations

import triton
import triton.language as tl

from statescan.ops._triton_functions import LOG2E, decay, sigmoid, softplus

__all__ = ["state_update"]


@triton.jit
def state_update(
    state, u, dt, z, B, C, A, D, bias, y, new_state,
    s_b, s_c, s_n, n_b, n_c, n_n, u_b, u_c, dt_b, dt_c, z_b, z_c, B_b, B_g, B_n, C_b, C_g, C_n,
    d_inner, group_channels, group_blocks, blocks, B_channels, C_channels,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """y and the state after this position; new_state may be state itself, whose numbers one thread reads and writes."""
    pid = tl.program_id(0)
    block = pid % blocks
    row = (pid // blocks).to(tl.int64)
    group = block // group_blocks
    lane = (block % group_blocks) * BD + tl.arange(0, BD)
    live = lane < group_channels
    c0 = group * group_channels
    c = (c0 + lane).to(tl.int64)
    n = tl.arange(0, NP)
    some = live[:, None] & (n < N)[None, :]
    at = c[:, None] * N + n[None, :]
    a = tl.load(A + at, some, other=0.0) * LOG2E
    h = tl.load(state + row * s_b + c[:, None] * s_c + n[None, :] * s_n, some, other=0.0)
    x = tl.load(u + row * u_b + c * u_c, live, other=0.0).to(tl.float32)
    d = tl.load(dt + row * dt_b + c * dt_c, live, other=0.0).to(tl.float32)
    if bias is not None:
        d += tl.load(bias + c, live, other=0.0)
    if SOFTPLUS:
        d = softplus(d, GPU)
    if FIXED_B:
        b = tl.load(B + at, some, other=0.0)
    else:
        b = tl.load(B + row * B_b + (c0 // B_channels).to(tl.int64) * B_g + n * B_n, n < N, other=0.0)
        b = b.to(tl.float32)[None, :]
    if FIXED_C:
        k = tl.load(C + at, some, other=0.0)
    else:
        k = tl.load(C + row * C_b + (c0 // C_channels).to(tl.int64) * C_g + n * C_n, n < N, other=0.0)
        k = k.to(tl.float32)[None, :]
    h = decay(d[:, None], a, GPU) * h + (d * x)[:, None] * b
    tl.store(new_state + row * n_b + c[:, None] * n_c + n[None, :] * n_n, h, some)
    out = tl.sum(h * k, 1)
    if D is not None:
        out += tl.load(D + c, live, other=0.0) * x
    if z is not None:
        gate = tl.load(z + row * z_b + c * z_c, live, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate, GPU)
    tl.store(y + row * d_inner + c, out.to(y.dtype.element_ty), live)
