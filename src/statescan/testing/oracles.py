"""Float64 truths, written apart from the ops' references: closed forms as dense matrices instead of recurrences.

They take the arguments of the public ops, compute in float64 (complex128), and autograd differentiates them. Memory
grows with the square of the length: they are for small problems.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["selective_scan", "selective_state_update"]


def _exact(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _softplus(value: Tensor) -> Tensor:
    """log(1 + exp(x)) as log(exp(0) + exp(x)); x itself beyond 20, which is part of the op's definition."""
    return torch.where(value > 20, value, torch.logaddexp(torch.zeros_like(value), value))


def _per_channel(matrix: Tensor, batch: int, length: int, d_inner: int) -> Tensor:
    """B or C in any of its forms as (batch, length, d_inner, d_state), in complex128."""
    matrix = _exact(matrix).to(torch.complex128)
    if matrix.dim() == 2:
        return matrix.expand(batch, length, *matrix.shape)
    if matrix.dim() == 3:
        return matrix.unsqueeze(2).expand(batch, length, d_inner, matrix.shape[-1])
    group_of = torch.arange(d_inner) // (d_inner // matrix.shape[2])
    return matrix[:, :, group_of.to(matrix.device)]


def _unrolled(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence solved: h_t = exp(A (dt_1 + .. + dt_t)) h_0 + sum_{s <= t} exp(A (dt_{s+1} + .. + dt_t)) x_s.

    u, dt: (batch, length, d_inner); B, C: (batch, length, d_inner, d_state); h: (batch, d_inner, d_state). Returns
    C_t . h_t at every t, and the last state.
    """
    length = u.shape[1]
    t = torch.arange(length, device=u.device)
    later = (t[:, None] > t[None, :]).to(dt.dtype)  # (t, s): step t comes after step s
    # between[b, t, s, d] = dt_{s+1} + .. + dt_t, each a sum of its own terms: no difference of running sums
    between = torch.cumsum(dt[:, :, None] * later[None, :, :, None], dim=1)
    reach = (t[:, None] >= t[None, :]).to(dt.dtype)
    decay = torch.exp(between[..., None] * A) * reach[None, :, :, None, None]
    states = torch.einsum("btsdn,bsd,bsdn->btdn", decay, (dt * u).to(decay.dtype), B)
    states = states + torch.exp(torch.cumsum(dt, dim=1)[..., None] * A) * h[:, None]
    return torch.einsum("btdn,btdn->btd", C, states), states[:, -1]


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """The selective scan as a dense lower-triangular matrix per channel; arguments as the public op's.

    Returns:
        (y, final_state) in float64; final_state complex128 where A is complex.
    """
    complex_A = A.is_complex()
    batch, length, d_inner = u.shape
    u, dt = _exact(u), _exact(dt)
    A = _exact(A).to(torch.complex128)
    B, C = _per_channel(B, batch, length, d_inner), _per_channel(C, batch, length, d_inner)
    if dt_bias is not None:
        dt = dt + _exact(dt_bias)
    if dt_softplus:
        dt = _softplus(dt)

    bounds = None if cu_seqlens is None else [int(bound) for bound in cu_seqlens]
    sequences = batch if bounds is None else len(bounds) - 1
    h = torch.zeros(sequences, *A.shape, dtype=A.dtype, device=u.device)
    if initial_state is not None:
        h = _exact(initial_state).to(A.dtype)
    if bounds is None:
        y, final_state = _unrolled(u, dt, A, B, C, h)
    else:
        parts, ends = [], []
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start == stop:
                ends.append(h[i : i + 1])
                continue
            at = slice(start, stop)
            part, end = _unrolled(u[:, at], dt[:, at], A, B[:, at], C[:, at], h[i : i + 1])
            parts.append(part)
            ends.append(end)
        y, final_state = torch.cat(parts, dim=1), torch.cat(ends)
    y = y.real * 2 if complex_A else y.real
    if D is not None:
        y = y + _exact(D) * u
    if z is not None:
        z = _exact(z)
        y = y * z / (1 + torch.exp(-z))
    return y, final_state if complex_A else final_state.real


def selective_state_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step, as the dense form at length 1; arguments as the public op's. Returns (y, state) in float64."""

    def at_length_one(matrix: Tensor) -> Tensor:
        fixed = matrix.dim() == 2 and matrix.shape[0] != u.shape[0]
        return matrix if fixed else matrix.unsqueeze(1)

    y, new_state = selective_scan(
        u.unsqueeze(1),
        dt.unsqueeze(1),
        A,
        at_length_one(B),
        at_length_one(C),
        D=D,
        z=None if z is None else z.unsqueeze(1),
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        initial_state=state,
    )
    return y.squeeze(1), new_state
