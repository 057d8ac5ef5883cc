"""The paper's parallel scan in plain PyTorch: any device, complex A, packed sequences, twice differentiable.

The recurrence h_t = a_t h_{t-1} + x_t composes: a step is the pair (a_t, x_t), and two steps in a row are the pair
(a_2 a_1, a_2 x_1 + x_2). Pairing neighbours, solving the half as long problem and filling in the gaps (an up-sweep and
a down-sweep) takes O(length) work and O(log length) operations, with nothing divided and no product of decays that
could overflow. Time is cut into chunks that hand a state on, so that memory does not grow with the length; under
autograd each chunk keeps its inputs and its first state alone and is run again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from statescan.ops._checks import assert_cu_seqlens, sequence_of, wants_gradients
from statescan.ops._dispatch import Facts

__all__ = ["CHUNK", "refuses", "selective_scan"]

# Steps a chunk. It depends on nothing, so that a row's result does not depend on the batch it is in.
CHUNK = 256


def refuses(facts: Facts) -> str | None:
    """Plain PyTorch runs everything; its exponentials and sums depend on the batch."""
    if facts.batch_invariant:
        return (
            "PyTorch's last bits depend on where in the batch a number stands, so batch_invariant can't be kept; use "
            "backend='cpu' or 'cuda'"
        )
    return None


def _keep(value: Tensor, restarts: Tensor | None) -> Tensor:
    """`value` with zeros where a sequence starts: selected, not multiplied, so that a neighbour's NaN stays there."""
    if restarts is None:
        return value
    return torch.where(restarts.view(-1, 1, 1), torch.zeros((), dtype=value.dtype, device=value.device), value)


def _sweep(out: Tensor, a: Tensor, x: Tensor, h: Tensor, restarts: Tensor | None) -> None:
    """Writes h_t = a_t h_{t-1} + x_t into `out`, with h_{-1} = `h`; where `restarts`, h_{t-1} counts as 0.

    a, x, out: (batch, time, d_inner, d_state); h: (batch, d_inner, d_state); restarts: (time,) bool or None.
    """
    time = x.shape[1]
    even_restarts = None if restarts is None else restarts[0::2]
    before = h.unsqueeze(1)
    if time > 1:
        half = time // 2
        even, odd = slice(0, 2 * half, 2), slice(1, None, 2)
        odd_restarts = None if restarts is None else restarts[odd]
        pair_x = x[:, odd] + _keep(a[:, odd] * x[:, even], odd_restarts)
        pair_a = a[:, odd] * a[:, even]
        pair_restarts = None if restarts is None else restarts[even] | restarts[odd]
        _sweep(out[:, odd], pair_a, pair_x, h, pair_restarts)
        before = torch.cat([before, out[:, 1 : 2 * (time - half) - 1 : 2]], dim=1)
    out[:, 0::2] = x[:, 0::2] + _keep(a[:, 0::2] * before, even_restarts)


class _LinearScan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + x_t from h_{-1} = h. Its gradient is the same scan backwards, so every derivative exists."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, h: Tensor, restarts: Tensor | None) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _sweep(out, a, x, h, restarts)
        ctx.save_for_backward(a, h, out, restarts)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = gradients
        a, h, out, restarts = ctx.saved_tensors
        a = a.conj()
        # g_t = grad_t + a_{t+1} g_{t+1}: read from the end, position t is decayed by the a of its right neighbour.
        decay = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1).flip(1)
        cut = None if restarts is None else torch.cat([restarts[1:], restarts.new_zeros(1)]).flip(0)
        g = _LinearScan.apply(decay, grad.flip(1), torch.zeros_like(h), cut).flip(1)
        before = torch.cat([h.unsqueeze(1), out[:, :-1]], dim=1)
        grad_a = _keep(g * before.conj(), restarts)
        grad_h = _keep(a[:, :1] * g[:, :1], None if restarts is None else restarts[:1]).squeeze(1)
        return grad_a, g, grad_h, None


def _grouped(matrix: Tensor, d_inner: int) -> Tensor:
    """B or C as something that broadcasts against (batch, time, d_inner, d_state)."""
    if matrix.dim() == 2 or matrix.shape[2] in (1, d_inner):
        return matrix
    return matrix.repeat_interleave(d_inner // matrix.shape[2], dim=2)


def _chunk(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    h: Tensor,
    restarts: Tensor | None,
    initial_state: Tensor | None,
    owner: Tensor | None,
    ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One chunk: (y, the state after it, the states at the positions `ends`)."""
    dtype, d_inner = u.dtype, u.shape[2]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    u, dt = u.to(real), dt.to(real)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    B, C = (_grouped(m if m.is_complex() else m.to(real), d_inner) for m in (B, C))
    a = torch.exp(dt.unsqueeze(-1) * A)
    x = (dt * u).unsqueeze(-1) * B
    if restarts is not None and initial_state is not None:
        assert owner is not None
        x = x + _keep(a * initial_state[owner], ~restarts)
    if x.dtype != a.dtype:  # complex A with real B
        x = x.to(a.dtype)
    states = _LinearScan.apply(a, x, h, restarts)
    y = (states * C).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z.to(real))
    # a copy: a view of the last state would keep all the others of the chunk alive
    return y.to(dtype), states[:, -1].clone(), None if ends is None else states[0, ends]


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
    """The selective scan by chunks of the parallel scan; arguments as `settle` leaves them.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = (C_t . h_t + D u_t) * silu(z_t).
    """
    batch, length, d_inner = u.shape
    count = -(-length // CHUNK)

    def pieces(value: Tensor | None, fixed: bool = False) -> tuple[Any, ...]:
        # split, not slices: its gradient is one concatenation, where each slice's would be as long as the sequence
        return (value,) * count if value is None or fixed else value.split(CHUNK, dim=1)

    restarts = owner = nonempty = last = None
    h = initial_state
    if h is None or cu_seqlens is not None:
        h = u.new_zeros(batch, d_inner, A.shape[1], dtype=A.dtype)
    if cu_seqlens is not None:
        assert_cu_seqlens("selective_scan", cu_seqlens, length)
        owner = sequence_of(cu_seqlens, length)
        restarts = cu_seqlens[owner] == torch.arange(length, device=u.device, dtype=torch.int32)
        nonempty = cu_seqlens[1:] > cu_seqlens[:-1]
        last = cu_seqlens[1:].long() - 1

    needs_grad = wants_gradients(u, dt, A, B, C, D, z, dt_bias, initial_state)
    outputs: list[Tensor] = []
    ends_of: list[Tensor] = []
    states_of: list[Tensor] = []
    chunks = zip(pieces(u), pieces(dt), pieces(B, B.dim() == 2), pieces(C, C.dim() == 2), pieces(z), strict=True)
    for index, (u_c, dt_c, B_c, C_c, z_c) in enumerate(chunks):
        start, stop = index * CHUNK, min((index + 1) * CHUNK, length)
        restarts_c = None if restarts is None else restarts[start:stop]
        owner_c = None if owner is None else owner[start:stop]
        ends = None
        if return_final_state and last is not None and nonempty is not None:
            inside = nonempty & (last >= start) & (last < stop)
            if torch.compiler.is_compiling():  # no shape may depend on values: read at every sequence, keep some
                ends_of.append(inside)
                ends = (last - start).clamp(0, stop - start - 1)
            else:
                ends_of.append(inside.nonzero().squeeze(1))
                ends = last[ends_of[-1]] - start
        arguments = (
            u_c, dt_c, A, B_c, C_c, D, z_c, dt_bias, dt_softplus, h, restarts_c, initial_state, owner_c, ends,
        )  # fmt: skip
        if needs_grad and count > 1:
            y, h, at_ends = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, h, at_ends = _chunk(*arguments)
        outputs.append(y)
        if at_ends is not None:
            states_of.append(at_ends)

    y = outputs[0] if count == 1 else torch.cat(outputs, dim=1)
    if not return_final_state or cu_seqlens is None:
        return y, h if return_final_state else None
    final_state = initial_state
    if final_state is None:
        final_state = u.new_zeros(cu_seqlens.shape[0] - 1, d_inner, A.shape[1], dtype=A.dtype)
    if torch.compiler.is_compiling():
        for inside, states in zip(ends_of, states_of, strict=True):
            final_state = torch.where(inside.view(-1, 1, 1), states, final_state)
    else:
        final_state = final_state.index_put((torch.cat(ends_of),), torch.cat(states_of))
    return y, final_state
