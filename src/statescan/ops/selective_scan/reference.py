"""The readable truth: the recurrence, one step after the other. float64 in, float64 out; autograd differentiates it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._checks import assert_cu_seqlens, sequence_of
from statescan.ops._dispatch import Facts

__all__ = ["refuses", "selective_scan"]


def refuses(facts: Facts) -> str | None:
    """The reference runs everything; PyTorch's exponentials and sums depend on the batch."""
    if facts.batch_invariant:
        return (
            "PyTorch's last bits depend on where in the batch a number stands, so batch_invariant can't be kept; use "
            "backend='cpu' or 'cuda'"
        )
    return None


def _at_every_channel(matrix: Tensor, length: int, d_inner: int) -> tuple[Tensor, ...]:
    """B or C as one (batch or 1, d_inner, d_state) per position."""
    if matrix.dim() == 2:  # the same at every position
        return (matrix.unsqueeze(0),) * length
    groups = matrix.shape[2]
    return matrix.repeat_interleave(d_inner // groups, dim=2).unbind(1)


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
    """The selective scan, step by step; arguments as `settle` leaves them, meaning as in the public function.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = (C_t . h_t + D u_t) * silu(z_t).
    """
    dtype = u.dtype
    batch, length, d_inner = u.shape
    real = torch.float64 if dtype == torch.float64 else torch.float32
    state_dtype = A.dtype

    u, dt = u.to(real), dt.to(real)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    B, C = (m.to(state_dtype if m.is_complex() else real) for m in (B, C))

    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = u.new_zeros(sequences, d_inner, A.shape[1], dtype=state_dtype)
    owner = first = None
    if cu_seqlens is not None:
        assert_cu_seqlens("selective_scan", cu_seqlens, length)
        owner = sequence_of(cu_seqlens, length)
        positions = torch.arange(length, device=u.device, dtype=torch.int32)
        first = (cu_seqlens[owner] == positions).view(length, 1, 1, 1)

    h = initial_state if cu_seqlens is None else torch.zeros_like(initial_state[:1])
    final_state = initial_state
    outputs = []
    steps = zip(
        u.unbind(1),
        dt.unbind(1),
        _at_every_channel(B, length, d_inner),
        _at_every_channel(C, length, d_inner),
        strict=True,
    )
    for t, (u_t, dt_t, B_t, C_t) in enumerate(steps):
        if first is not None and owner is not None:
            h = torch.where(first[t], initial_state.index_select(0, owner[t : t + 1]), h)
        h = torch.exp(dt_t.unsqueeze(-1) * A) * h + (dt_t * u_t).unsqueeze(-1) * B_t
        y_t = (C_t * h).sum(-1)
        outputs.append(2 * y_t.real if y_t.is_complex() else y_t)
        if cu_seqlens is not None and return_final_state:
            ends = (cu_seqlens[1:] == t + 1) & (cu_seqlens[1:] > cu_seqlens[:-1])
            final_state = torch.where(ends.view(-1, 1, 1), h, final_state)
    if cu_seqlens is None:
        final_state = h

    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(dtype), final_state if return_final_state else None
