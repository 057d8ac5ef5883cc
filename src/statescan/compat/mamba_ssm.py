"""The names that people import from mamba_ssm and causal_conv1d, in those packages' layout and signatures.

Sequences are (batch, channels, length) here. Every function turns its arguments (views, no copies), calls the op, layer
or model of this package, and turns the result; so it runs wherever those do, and has gradients in every float input.
docs/mamba-ssm.md lists which names exist and what differs.

Source: the interfaces of mamba_ssm 2.3 and causal_conv1d 1.6; the code is this package's own.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statescan import models, ops
from statescan import nn as layers
from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.generate import Engine, SamplingParams, sample
from statescan.ops._checks import wants_gradients

__all__ = [
    "GenerateOutput",
    "InferenceParams",
    "LMOutput",
    "Mamba",
    "MambaConfig",
    "MambaLMHeadModel",
    "RMSNorm",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "layer_norm_fn",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
]

# ---------------------------------------------------------------------------------------------------------- arguments


def _want(op: str, name: str, value: Any, shape: tuple[int, ...], meaning: str) -> None:
    if not isinstance(value, Tensor):
        raise DTypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")
    if tuple(value.shape) != shape:
        raise ShapeError(
            f"{op}: {name} must have shape {meaning} = {shape}, got {tuple(value.shape)}; give it that shape"
        )


def _want_sequence(op: str, name: str, value: Any, meaning: str = "(batch, dim, length)", dims: int = 3) -> None:
    if not isinstance(value, Tensor):
        raise DTypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")
    if value.dim() != dims or 0 in value.shape:
        raise ShapeError(
            f"{op}: {name} must have shape {meaning}, each at least 1, got {tuple(value.shape)}; give it that form"
        )


def _common(op: str, **tensors: Tensor | None) -> torch.dtype:
    """The one dtype for activations that came in several (a float32 step beside bfloat16 inputs)."""
    for name, value in tensors.items():
        if value is not None and not value.is_floating_point() and not value.is_complex():
            raise DTypeError(f"{op}: {name} must be a float tensor, got {value.dtype}; pass {name}.float()")
    real = (t.dtype for t in tensors.values() if t is not None and not t.is_complex())
    return functools.reduce(torch.promote_types, real)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _want_writable(op: str, name: str, state: Tensor) -> None:
    if torch.is_grad_enabled() and state.requires_grad and state.is_leaf:
        raise ConfigError(
            f"{op}: {name} is written in place, so it must be no leaf that requires a gradient, got one; "
            f"pass {name}.clone()"
        )


def _want_rows(op: str, name: str, rows: Tensor, batch: int, there: int) -> Tensor:
    _want(op, name, rows, (batch,), "(batch,)")
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise DTypeError(f"{op}: {name} must be integers, got {rows.dtype}; pass {name}.int()")
    if rows.device.type == "cpu" and (int(rows.min()) < 0 or int(rows.max()) >= there):
        raise ShapeError(
            f"{op}: {name} must lie in [0, {there}), the state's rows, got {int(rows.min())} to {int(rows.max())}; "
            "give the row of each sequence"
        )
    return rows.long()


# --------------------------------------------------------------------------------------------------------------- scan


def _projection(op: str, name: str, value: Any, A: Tensor, batch: int, length: int) -> Tensor:
    """B or C by position, (batch, dstate, length) or (batch, groups, dstate, length), as (batch, length, groups,
    dstate); a fixed (dim, dstate) as it is. With complex A real and imaginary parts may stand interleaved, 2 length."""
    dim, dstate = A.shape
    if not isinstance(value, Tensor):
        raise DTypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")
    if value.dim() == 2:
        _want(op, name, value, (dim, dstate), "(dim, dstate)")
        return value
    parts = value.unsqueeze(1) if value.dim() == 3 else value
    interleaved = A.is_complex() and not value.is_complex() and parts.shape[-1] == 2 * length
    fits = parts.dim() == 4 and parts.shape[0] == batch and parts.shape[2] == dstate
    if not fits or dim % max(parts.shape[1], 1) or (parts.shape[-1] != length and not interleaved):
        raise ShapeError(
            f"{op}: {name} must have shape (dim, dstate), (batch, dstate, length) or (batch, groups, dstate, length) "
            f"with dim, dstate, batch, length = {dim}, {dstate}, {batch}, {length} and groups dividing dim"
            f"{', or twice the length, interleaved' if A.is_complex() else ''}, got {tuple(value.shape)}; give it one"
        )
    if interleaved:
        pairs = parts.to(_exact(parts.dtype)).unflatten(-1, (length, 2))
        parts = torch.complex(pairs[..., 0], pairs[..., 1])
    return parts.permute(0, 3, 1, 2)


def _scan(
    op: str,
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    _want_sequence(op, "u", u)
    batch, dim, length = u.shape
    _want(op, "delta", delta, (batch, dim, length), "(batch, dim, length)")
    _want_sequence(op, "A", A, "(dim, dstate)", 2)
    _want(op, "A", A, (dim, A.shape[1]), "(dim, dstate)")
    for name, value in (("D", D), ("delta_bias", delta_bias)):
        if value is not None:
            _want(op, name, value, (dim,), "(dim,)")
    if z is not None:
        _want(op, "z", z, (batch, dim, length), "(batch, dim, length)")
    B = _projection(op, "B", B, A, batch, length)
    C = _projection(op, "C", C, A, batch, length)
    dtype = _common(op, u=u, delta=delta, z=z, B=B if B.dim() == 4 else None, C=C if C.dim() == 4 else None)
    state = torch.promote_types(_exact(dtype), torch.complex64) if A.is_complex() else _exact(dtype)

    def settled(value: Tensor) -> Tensor:
        if value.is_complex() and A.is_complex():
            return value.to(state)
        return value.to(dtype) if value.dim() == 4 else value

    output = ops.selective_scan(
        u.transpose(1, 2).to(dtype),
        delta.transpose(1, 2).to(dtype),
        A,
        settled(B),
        settled(C),
        D=D,
        z=None if z is None else z.transpose(1, 2).to(dtype),
        dt_bias=delta_bias,
        dt_softplus=delta_softplus,
        initial_state=None if initial_state is None else initial_state.to(state),
        cu_seqlens=cu_seqlens,
        return_final_state=return_last_state,
        backend=backend,
    )
    out = output.y.transpose(1, 2).to(u.dtype)
    if output.final_state is None:
        return out
    return out, output.final_state


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """`statescan.ops.selective_scan` in the layout of mamba_ssm's selective_scan_fn.

    Args:
        u: (batch, dim, length); float64, float32, bfloat16 or float16.
        delta: as u; the activations may differ in dtype, then the widest is computed in.
        A: (dim, dstate), float or complex.
        B: (dim, dstate), (batch, dstate, length) or (batch, groups, dstate, length); with complex A complex, or real
            with 2 length, real and imaginary parts in turn.
        C: as B.
        D: (dim,). Default: none.
        z: as u. Default: none.
        delta_bias: (dim,). Default: none.
        delta_softplus: Default False.
        return_last_state: also return the state after the last position. Default False.
        initial_state: (batch, dim, dstate), which mamba_ssm does not take. Default: zeros.
        cu_seqlens: as in `statescan.ops.selective_scan`, which mamba_ssm does not take. Default: none.

    Returns:
        out (batch, dim, length) in u's dtype, a transposed view; with return_last_state (out, last_state), of which
        last_state (batch, dim, dstate) carries gradients too.

    Raises:
        ShapeError, DTypeError: an argument does not fit; the text names it.
    """
    return _scan(
        "selective_scan_fn",
        "auto",
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        return_last_state,
        initial_state,
        cu_seqlens,
    )


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """`selective_scan_fn` on the readable reference, position by position; arguments and result as there."""
    return _scan(
        "selective_scan_ref",
        "reference",
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        return_last_state,
        initial_state,
        cu_seqlens,
    )


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """`statescan.ops.selective_state_update` with mamba_ssm's arguments: one position, the state written in place.

    Args:
        state: (rows, dim, dstate) or (rows, heads, dim, dstate), any float dtype (complex for complex A); overwritten.
            The update itself is computed in float32 (float64 for float64 inputs).
        x: (batch, dim) or (batch, heads, dim).
        dt: as x.
        A: (dim, dstate) or (heads, dim, dstate).
        B: (batch, dstate) or (batch, groups, dstate); groups divide heads (without heads: dim).
        C: as B.
        D: (dim,) or (heads, dim). Default: none.
        z: as x. Default: none.
        dt_bias: as D. Default: none.
        dt_softplus: Default False.
        state_batch_indices: (batch,) integers, the state's row of each sequence, no two the same. Default: all, in
            order.

    Returns:
        As x. Where gradients are on, both it and the state carry them.

    Raises:
        ShapeError, DTypeError, ConfigError: an argument does not fit; the text names it.
    """
    op = "selective_state_update"
    if not isinstance(state, Tensor) or state.dim() not in (3, 4):
        got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ShapeError(f"{op}: state must be (batch, dim, dstate) or (batch, heads, dim, dstate), got {got}")
    lead, dstate = tuple(state.shape[1:-1]), state.shape[-1]
    meaning = "(dim,)" if len(lead) == 1 else "(heads, dim)"
    _want_sequence(op, "x", x, f"(batch, {meaning[1:]}".replace(",)", ")"), state.dim() - 1)
    batch = x.shape[0]
    for name, value in (("x", x), ("dt", dt), ("z", z)):
        if name != "z" or value is not None:
            _want(op, name, value, (batch, *lead), f"(batch, *{meaning})")
    _want(op, "A", A, (*lead, dstate), f"(*{meaning}, dstate)")
    for name, value in (("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            _want(op, name, value, lead, meaning)
    if state_batch_indices is not None:
        rows = _want_rows(op, "state_batch_indices", state_batch_indices, batch, state.shape[0])
        held = state.index_select(0, rows)
    else:
        _want(op, "state", state, (batch, *lead, dstate), f"(batch, *{meaning}, dstate)")
        rows, held = None, state
    _want_writable(op, "state", state)
    groups = []
    for name, value in (("B", B), ("C", C)):
        dims = 3 if isinstance(value, Tensor) and value.dim() == 3 else 2
        _want_sequence(op, name, value, "(batch, [groups,] dstate)", dims)
        count = 1 if value.dim() == 2 else value.shape[1]
        if lead[0] % count:
            raise ShapeError(f"{op}: {name} must have groups that divide {lead[0]}, got {count}; repeat it over groups")
        value = value.unsqueeze(1) if value.dim() == 2 else value
        _want(op, name, value, (batch, count, dstate), "(batch, groups, dstate)")
        groups.append(value)

    dtype = _common(op, x=x, dt=dt, z=z, B=groups[0], C=groups[1])
    exact = torch.promote_types(_exact(dtype), torch.complex64) if A.is_complex() else _exact(dtype)
    tracked = wants_gradients(state, x, dt, A, B, C, D, z, dt_bias)
    flat = held.reshape(batch, -1, dstate)
    inplace = not tracked and rows is None and state.dtype == exact and state.is_contiguous()
    if tracked:
        # What the backward pass keeps must not be the tensor that is overwritten below.
        flat = flat.clone()
    y, after = ops.selective_state_update(
        flat.to(exact),
        x.reshape(batch, -1).to(dtype),
        dt.reshape(batch, -1).to(dtype),
        A.reshape(-1, dstate),
        *(g.to(exact if g.is_complex() else dtype) for g in groups),
        D=None if D is None else D.reshape(-1),
        z=None if z is None else z.reshape(batch, -1).to(dtype),
        dt_bias=None if dt_bias is None else dt_bias.reshape(-1),
        dt_softplus=dt_softplus,
        inplace=inplace,
    )
    if not inplace:
        after = after.reshape(held.shape).to(state.dtype)
        if rows is None:
            state.copy_(after)
        else:
            state.index_copy_(0, rows, after)
    return y.reshape(x.shape).to(x.dtype)


# -------------------------------------------------------------------------------------------------------- convolution


def _activation(op: str, activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise ConfigError(
            f"{op}: activation must be None, 'silu' or 'swish', got {activation!r}; apply others yourself"
        )
    return None if activation is None else "silu"


def _want_filter(op: str, x: Tensor, weight: Any, bias: Any) -> int:
    _want_sequence(op, "weight", weight, "(dim, width)", 2)
    _want(op, "weight", weight, (x.shape[1], weight.shape[1]), "(dim, width)")
    if bias is not None:
        _want(op, "bias", bias, (x.shape[1],), "(dim,)")
    return weight.shape[1]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """`statescan.ops.causal_conv1d` with the arguments of causal_conv1d's function of this name, in any combination.

    Args:
        x: (batch, dim, length), any strides.
        weight: (dim, width), any width.
        bias: (dim,). Default: none.
        seq_idx: (batch, length) integers: neighbours of one number are one sequence, which sees nothing of the one
            before; negative numbers are padding, whose outputs are 0. Default: each row is one sequence.
        initial_states: (batch, dim, width - 1), the inputs before each row, oldest first. Default: zeros.
        return_final_states: also return the last width - 1 inputs of each row('s last sequence). Default False.
        final_states_out: (batch, dim, width - 1), they are written here, and this is returned. Default: a new tensor.
        activation: None, "silu" or "swish". Default None.

    Returns:
        (batch, dim, length) in x's dtype, a transposed view; with return_final_states also (batch, dim, width - 1).

    Raises:
        ShapeError, DTypeError, ConfigError: an argument does not fit; the text names it.
    """
    op = "causal_conv1d_fn"
    act = _activation(op, activation)
    _want_sequence(op, "x", x)
    batch, dim, length = x.shape
    width = _want_filter(op, x, weight, bias)
    for name, value in (("initial_states", initial_states), ("final_states_out", final_states_out)):
        if value is not None:
            _want(op, name, value, (batch, dim, width - 1), "(batch, dim, width - 1)")
    if final_states_out is not None:
        _want_writable(op, "final_states_out", final_states_out)
    before = None if initial_states is None else initial_states.transpose(1, 2).to(x.dtype)
    inputs = x.transpose(1, 2)
    if seq_idx is None:
        y, final = ops.causal_conv1d(
            inputs, weight, bias, activation=act, initial_state=before, return_final_state=return_final_states
        )
    else:
        _want(op, "seq_idx", seq_idx, (batch, length), "(batch, length)")
        # All rows one after the other, cut where a row begins or the number changes.
        begins = torch.ones_like(seq_idx, dtype=torch.bool)
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        starts = begins.flatten().nonzero().squeeze(1)
        cu_seqlens = F.pad(starts, (0, 1), value=batch * length).to(torch.int32)
        per_row = begins.sum(1)
        last = per_row.cumsum(0) - 1
        if before is not None:
            before = before.new_zeros(len(starts), width - 1, dim).index_copy(0, last + 1 - per_row, before)
        y, final = ops.causal_conv1d(
            inputs.reshape(1, batch * length, dim),
            weight,
            bias,
            activation=act,
            initial_state=before,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_states,
        )
        y = y.reshape(batch, length, dim).masked_fill((seq_idx < 0).unsqueeze(-1), 0)
        final = None if final is None else final.index_select(0, last)
    out = y.transpose(1, 2)
    if final is None:
        return out
    final = final.transpose(1, 2)
    return out, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Takes one or more inputs into the convolution with causal_conv1d's arguments: conv_state is written in place.

    Args:
        x: (batch, dim) or (batch, dim, length).
        conv_state: (rows, dim, state_len), state_len >= width - 1, the last inputs, oldest first; overwritten.
        weight: (dim, width).
        bias: (dim,). Default: none.
        activation: None, "silu" or "swish". Default None.
        cache_seqlens: (batch,) integers, how many inputs each sequence has had: conv_state is a ring then, input number
            i stands at i % state_len. Default: no ring.
        conv_state_indices: (batch,) integers, the row of conv_state of each sequence, no two the same. Default: all, in
            order.

    Returns:
        As x. Where gradients are on, it and conv_state carry them.

    Raises:
        ShapeError, DTypeError, ConfigError: an argument does not fit; the text names it.
    """
    op = "causal_conv1d_update"
    act = _activation(op, activation)
    if isinstance(x, Tensor) and x.dim() == 2:
        return causal_conv1d_update(
            x.unsqueeze(-1), conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
        ).squeeze(-1)
    _want_sequence(op, "x", x, "(batch, dim) or (batch, dim, length)")
    batch, dim, length = x.shape
    width = _want_filter(op, x, weight, bias)
    if not isinstance(conv_state, Tensor) or conv_state.dim() != 3 or conv_state.shape[-1] < width - 1:
        got = tuple(conv_state.shape) if isinstance(conv_state, Tensor) else type(conv_state).__name__
        raise ShapeError(
            f"{op}: conv_state must be (batch, dim, state_len >= width - 1 = {width - 1}), got {got}; make it longer"
        )
    state_len = conv_state.shape[-1]
    _want_writable(op, "conv_state", conv_state)
    rows = None
    if conv_state_indices is not None:
        rows = _want_rows(op, "conv_state_indices", conv_state_indices, batch, conv_state.shape[0])
        held = conv_state.index_select(0, rows)
    else:
        held = conv_state
    _want(op, "conv_state", held, (batch, dim, state_len), "(batch, dim, state_len)")
    present = x.to(conv_state.dtype)
    if cache_seqlens is None:
        known = held[..., state_len - (width - 1) :]
        after = torch.cat([held, present], -1)[..., length:]
    else:
        _want(op, "cache_seqlens", cache_seqlens, (batch,), "(batch,)")
        count = cache_seqlens.long()[:, None]

        def places(first: int, end: int) -> Tensor:
            at = (count + torch.arange(first, end, device=x.device)) % max(state_len, 1)
            return at.unsqueeze(1).expand(-1, dim, -1)

        known = held.gather(2, places(1 - width, 0)) if width > 1 else held[..., :0]
        kept = min(length, state_len)
        after = held.scatter(2, places(length - kept, length), present[..., length - kept :])
    # A copy: the state is overwritten below, and the backward pass needs what it was.
    history = known.to(x.dtype, copy=True).transpose(1, 2)
    if length == 1:
        out = ops.causal_conv1d_update(x[..., 0], history, weight, bias, activation=act).y.unsqueeze(-1)
    else:
        y = ops.causal_conv1d(x.transpose(1, 2), weight, bias, activation=act, initial_state=history).y
        out = y.transpose(1, 2)
    if rows is None:
        conv_state.copy_(after)
    else:
        conv_state.index_copy_(0, rows, after)
    return out


# -------------------------------------------------------------------------------------------------------------- block


def _mamba_inner(
    op: str,
    backend: str,
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    delta_softplus: bool,
    checkpoint_lvl: int,
    b_rms_weight: Tensor | None,
    c_rms_weight: Tensor | None,
    dt_rms_weight: Tensor | None,
    eps: float,
) -> Tensor:
    _want_sequence(op, "xz", xz, "(batch, 2 dim, length)")
    if xz.shape[1] % 2:
        raise ShapeError(f"{op}: xz must have an even number of channels, x and z, got {tuple(xz.shape)}; put both in")
    if checkpoint_lvl not in (0, 1):
        raise ConfigError(f"{op}: checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}; 1 keeps less")
    dim = xz.shape[1] // 2
    _want_sequence(op, "A", A, "(dim, dstate)", 2)
    _want(op, "A", A, (dim, A.shape[1]), "(dim, dstate)")
    if isinstance(conv1d_weight, Tensor) and conv1d_weight.dim() == 3:
        conv1d_weight = conv1d_weight.squeeze(1)
    _want(op, "conv1d_weight", conv1d_weight, (dim, conv1d_weight.shape[-1]), "(dim, [1,] width)")
    _want_sequence(op, "delta_proj_weight", delta_proj_weight, "(dim, rank)", 2)
    rank = delta_proj_weight.shape[1]
    _want(op, "delta_proj_weight", delta_proj_weight, (dim, rank), "(dim, rank)")
    width = A.shape[1] * (2 if A.is_complex() else 1)
    sizes = [rank, *(width for given in (B, C) if given is None)]
    _want(op, "x_proj_weight", x_proj_weight, (sum(sizes), dim), "(rank + what it gives of B and C, dim)")
    _want(op, "out_proj_weight", out_proj_weight, (out_proj_weight.shape[0], dim), "(d_model, dim)")
    wanted: tuple[tuple[str, Tensor | None, int], ...] = (
        ("conv1d_bias", conv1d_bias, dim),
        ("out_proj_bias", out_proj_bias, out_proj_weight.shape[0]),
        ("D", D, dim),
        ("delta_bias", delta_bias, dim),
        ("B_proj_bias", B_proj_bias, width),
        ("C_proj_bias", C_proj_bias, width),
        ("b_rms_weight", b_rms_weight, width),
        ("c_rms_weight", c_rms_weight, width),
        ("dt_rms_weight", dt_rms_weight, dim),
    )
    for name, value, size in wanted:
        if value is not None:
            _want(op, name, value, (size,), "(size,)")
    for name, given, mates in (("B", B, (B_proj_bias, b_rms_weight)), ("C", C, (C_proj_bias, c_rms_weight))):
        if given is not None and any(mate is not None for mate in mates):
            raise ConfigError(
                f"{op}: {name}_proj_bias and {name.lower()}_rms_weight are for a {name} that x_proj makes, got both "
                f"with a given {name}; apply them to {name} beforehand"
            )

    def normed(value: Tensor, weight: Tensor | None) -> Tensor:
        return value if weight is None else ops.add_rms_norm(value, weight, eps=eps, backend=backend).output

    def made(value: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        value = normed(value if bias is None else value + bias.to(value.dtype), weight)
        if A.is_complex():
            pairs = value.to(_exact(value.dtype)).unflatten(-1, (A.shape[1], 2))
            value = torch.complex(pairs[..., 0], pairs[..., 1])
        return value.transpose(1, 2)

    def run(xz: Tensor) -> Tensor:
        x, z = xz.transpose(1, 2).chunk(2, dim=-1)
        u = ops.causal_conv1d(x, conv1d_weight, conv1d_bias, activation="silu", backend=backend).y
        low, *rest = F.linear(u, x_proj_weight).split(sizes, dim=-1)
        delta = normed(F.linear(low, delta_proj_weight), dt_rms_weight)
        by_B = made(rest.pop(0), B_proj_bias, b_rms_weight) if B is None else B
        by_C = made(rest.pop(0), C_proj_bias, c_rms_weight) if C is None else C
        y = _scan(
            op,
            backend,
            u.transpose(1, 2),
            delta.transpose(1, 2),
            A,
            by_B,
            by_C,
            D,
            z.transpose(1, 2),
            delta_bias,
            delta_softplus,
            False,
            None,
            None,
        )
        assert isinstance(y, Tensor)
        return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)

    if checkpoint_lvl == 1 and torch.is_grad_enabled():
        result = checkpoint(run, xz, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(result, Tensor)
        return result
    return run(xz)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block after its input projection: convolution, small projections, scan, output projection.

    Args:
        xz: (batch, 2 dim, length), the channels of x before those of the gate z.
        conv1d_weight: (dim, 1, width) or (dim, width).
        conv1d_bias: (dim,) or None.
        x_proj_weight: (rank + dstate for B + dstate for C, dim); without the rows of a B or C that is given, and with
            twice the rows for complex A, real and imaginary parts in turn.
        delta_proj_weight: (dim, rank).
        out_proj_weight: (d_model, dim).
        out_proj_bias: (d_model,) or None.
        A: (dim, dstate), float or complex.
        B: as in `selective_scan_fn`. Default: made from the input.
        C: as B.
        D: (dim,). Default: none.
        delta_bias: (dim,). Default: none.
        B_proj_bias: added to the B that is made, (rows of B,). Default: none.
        C_proj_bias: as B_proj_bias.
        delta_softplus: Default True.
        checkpoint_lvl: 1: keep xz alone, and compute all else again in the backward pass; 0: keep everything. The same
            gradients. Default 1.
        b_rms_weight: B is divided by its root mean square and multiplied by this. Default: it isn't.
        c_rms_weight: as b_rms_weight.
        dt_rms_weight: the same for the steps after their projection, (dim,). Default: it isn't.
        b_c_dt_rms_eps: added to the mean squares. Default 1e-6.

    Returns:
        (batch, length, d_model). Gradients flow into every float argument, out_proj_bias and the RMS weights included.

    Raises:
        ShapeError, DTypeError, ConfigError: an argument does not fit; the text names it.
    """
    return _mamba_inner(
        "mamba_inner_fn",
        "auto",
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
        checkpoint_lvl,
        b_rms_weight,
        c_rms_weight,
        dt_rms_weight,
        b_c_dt_rms_eps,
    )


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` on the readable references, keeping everything; arguments and result as there."""
    return _mamba_inner(
        "mamba_inner_ref",
        "reference",
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
        0,
        None,
        None,
        None,
        1e-6,
    )


# --------------------------------------------------------------------------------------------------------------- norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Scales rows, drops out, adds, and normalises, in this order; with is_rms_norm by `statescan.ops.add_rms_norm`.

    Equations, over the last axis::

        sum = dropout(x * rowscale) + dropout(x1) + residual
        out = norm(sum) * weight + bias,   out1 = norm(sum) * weight1 + bias1

    Args:
        x: (..., d), any float dtype.
        weight: (d,).
        bias: (d,) or None.
        residual: as x, any float dtype. Default: none.
        x1: as x, added. Default: none.
        weight1: (d,), for a second output. Default: none.
        bias1: (d,). Default: none.
        eps: Default 1e-6.
        dropout_p: drawn from torch's generator of the device. Default 0.
        rowscale: (...), a factor for each row of x; not with x1. Default: none.
        prenorm: return the sum too. Default False.
        residual_in_fp32: without a residual, the sum is float32 at least. Default False.
        is_rms_norm: divide by the root mean square, subtract no mean. Default False.
        return_dropout_mask: return the masks of x and x1 too, True where kept (None where nothing is dropped).

    Returns:
        out in x's dtype; or a tuple of out, [out1], [sum], [mask, mask1]. The sum has the residual's dtype, else x's.

    Raises:
        ShapeError, DTypeError, ConfigError: an argument does not fit; the text names it.
    """
    op = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1:
        raise DTypeError(f"{op}: x must be a float tensor (..., d), got {getattr(x, 'dtype', type(x).__name__)}")
    if x1 is not None and rowscale is not None:
        raise ConfigError(f"{op}: rowscale and x1 exclude each other, got both; scale the rows beforehand")
    if not 0 <= dropout_p < 1:
        raise ConfigError(f"{op}: dropout_p must be in [0, 1), got {dropout_p!r}; 0 drops nothing")
    if bias1 is not None and weight1 is None:
        raise ConfigError(f"{op}: bias1 belongs to weight1, got it alone; give both")
    shape, d = tuple(x.shape), x.shape[-1]
    for name, value in (("residual", residual), ("x1", x1)):
        if value is not None:
            _want(op, name, value, shape, "that of x")
    for name, value in (("weight", weight), ("bias", bias), ("weight1", weight1), ("bias1", bias1)):
        if name == "weight" or value is not None:
            _want(op, name, value, (d,), "(d,)")
    if rowscale is not None:
        _want(op, "rowscale", rowscale, shape[:-1], "that of x without its last axis")
    exact = _exact(_common(op, x=x, residual=residual, x1=x1))
    stream = residual.dtype if residual is not None else _exact(x.dtype) if residual_in_fp32 else x.dtype

    def dropped(value: Tensor) -> tuple[Tensor, Tensor | None]:
        if dropout_p == 0:
            return value, None
        keep = torch.rand(value.shape, device=value.device) >= dropout_p
        return torch.where(keep, value.to(exact) / (1 - dropout_p), 0), keep

    branch, mask = dropped(x if rowscale is None else x.to(exact) * rowscale.to(exact).unsqueeze(-1))
    mask1 = None
    if x1 is not None:
        other, mask1 = dropped(x1)
        branch = branch.to(exact) + other.to(exact)
    if is_rms_norm and bias is None and branch is x:
        out, total = ops.add_rms_norm(x, weight, residual=residual, eps=eps, residual_dtype=stream)
    else:
        total = branch if residual is None else branch.to(exact) + residual.to(exact)
        total = total.to(stream)
        out = _normed(total, weight, bias, eps, is_rms_norm, exact).to(x.dtype)
    results: list[Tensor | None] = [out]
    if weight1 is not None:
        results.append(_normed(total, weight1, bias1, eps, is_rms_norm, exact).to(x.dtype))
    if prenorm:
        results.append(total)
    if return_dropout_mask:
        results += [mask, mask1]
    return tuple(results) if len(results) > 1 else out


def _normed(
    total: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool, exact: torch.dtype
) -> Tensor:
    wide, bias = total.to(exact), None if bias is None else bias.to(exact)
    if not is_rms_norm:
        return F.layer_norm(wide, (wide.shape[-1],), weight.to(exact), bias, eps)
    out = ops.add_rms_norm(wide, weight, eps=eps).output
    return out if bias is None else out + bias


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`layer_norm_fn` with is_rms_norm; arguments and results as there."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        True,
        return_dropout_mask,
    )


class RMSNorm(nn.Module):
    """`rms_norm_fn` with a weight; arguments as there.

    Args:
        hidden_size: size of the last axis.
        eps: Default 1e-5.
        dropout_p: of x, in training alone. Default 0.
        device: where the weight is made. Default: torch's.
        dtype: of the weight. Default: torch's.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.dropout_p = dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Sets the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """The normalised sum; with prenorm also the sum."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


# -------------------------------------------------------------------------------------------------------------- layer


@dataclass
class InferenceParams:
    """What goes along with a text that is written step by step: how much was read, and each layer's state.

    Args:
        max_seqlen: not needed here, since states don't grow.
        max_batch_size: not needed here.
        seqlen_offset: tokens read so far; the caller counts. 0 starts from empty states.
        batch_size_offset: must be 0.
        key_value_memory_dict: layer index -> (conv_state, ssm_state), made where missing.
        lengths_per_sample: not needed here.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Starts a new text in the same memory."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0


def _new_cache(mixer: layers.Mamba, batch: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """(batch, d_inner, d_conv) and (batch, d_inner, d_state), the latter float32 whatever dtype the layer has."""
    conv, ssm = mixer.init_state(batch, dtype=dtype)
    return conv.new_zeros(batch, mixer.d_inner, mixer.d_conv), ssm


def _read_cache(op: str, mixer: layers.Mamba, conv_state: Tensor, ssm_state: Tensor, batch: int) -> layers.MambaState:
    _want(op, "conv_state", conv_state, (batch, mixer.d_inner, mixer.d_conv), "(batch, d_inner, d_conv)")
    _want(op, "ssm_state", ssm_state, (batch, mixer.d_inner, mixer.d_state), "(batch, d_inner, d_state)")
    _want_writable(op, "conv_state", conv_state)
    _want_writable(op, "ssm_state", ssm_state)
    conv = conv_state[..., 1:].transpose(1, 2)
    # Copies: both are overwritten after the step, and the backward pass needs what they were.
    return layers.MambaState(conv.clone(), ssm_state.clone())


def _write_cache(conv_state: Tensor, ssm_state: Tensor, after: layers.MambaState | None) -> None:
    assert after is not None
    # mamba_ssm keeps d_conv inputs, of which the oldest is never read.
    conv_state.copy_(F.pad(after.conv.transpose(1, 2), (1, 0)))
    ssm_state.copy_(after.ssm)


def _states_of(
    op: str, params: InferenceParams, index: int, mixer: layers.Mamba, batch: int
) -> tuple[Tensor, Tensor, layers.MambaState]:
    if params.batch_size_offset != 0:
        raise ConfigError(f"{op}: inference_params.batch_size_offset must be 0, got {params.batch_size_offset}")
    memory = params.key_value_memory_dict
    if index not in memory:
        memory[index] = _new_cache(mixer, batch, None)
    conv_state, ssm_state = memory[index]
    state = _read_cache(op, mixer, conv_state, ssm_state, batch)
    if params.seqlen_offset == 0:
        state = layers.MambaState(torch.zeros_like(state.conv), torch.zeros_like(state.ssm))
    return conv_state, ssm_state, state


def _mark(mixer: layers.Mamba) -> None:
    """The marks that training code for mamba_ssm looks for on parameters."""
    mixer.A_log._no_weight_decay = True  # type: ignore[attr-defined]
    mixer.D._no_weight_decay = True  # type: ignore[attr-defined]
    if mixer.dt_proj.bias is not None:
        mixer.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]


class Mamba(layers.Mamba):
    """`statescan.nn.Mamba` with mamba_ssm's calls: forward gives a tensor, states are written in place.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias:
            as in `statescan.nn.Mamba`.
        use_fast_path: taken and not needed: there is one path.
        layer_idx: the key of its states in `InferenceParams`. Default: none.
        device: where parameters are made. Default: torch's.
        dtype: of the parameters; A_log and D stay float32 below it. Default: torch's.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            dt_rank,
            dt_min,
            dt_max,
            dt_init,
            dt_scale,
            dt_init_floor,
            conv_bias,
            bias,
            device=device,
            dtype=dtype,
        )
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.activation = "silu"
        _mark(self)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, inference_params: InferenceParams | None = None
    ) -> Tensor:
        """(batch, length, d_model) to the same shape; with inference_params from and into the layer's states, one token
        or several at a time."""
        if inference_params is None:
            return super().forward(hidden_states).output
        if self.layer_idx is None:
            raise ConfigError("Mamba.forward: layer_idx must be set for inference_params, got None; Mamba(layer_idx=0)")
        conv_state, ssm_state, state = _states_of(
            "Mamba.forward", inference_params, self.layer_idx, self, hidden_states.shape[0]
        )
        output, after = super().forward(hidden_states, state)
        _write_cache(conv_state, ssm_state, after)
        return output

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes (batch, length, d_model), as a rule of length 1, on from the states, which are written in place.

        Returns:
            (output, conv_state, ssm_state); where gradients are on all three carry them.
        """
        _want_sequence("Mamba.step", "hidden_states", hidden_states, "(batch, length, d_model)")
        state = _read_cache("Mamba.step", self, conv_state, ssm_state, hidden_states.shape[0])
        if hidden_states.shape[1] == 1:
            output, after = super().step(hidden_states[:, 0], state)
            output = output.unsqueeze(1)
        else:
            output, after = super().forward(hidden_states, state)
        _write_cache(conv_state, ssm_state, after)
        return output, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(conv_state, ssm_state) of zeros. dtype is conv_state's (default: the layer's); ssm_state is float32 at
        least, whatever dtype is."""
        del max_seqlen, kwargs
        return _new_cache(self, batch_size, dtype)


# -------------------------------------------------------------------------------------------------------------- model

_LAYER_FIELDS = (
    "d_state",
    "d_conv",
    "expand",
    "dt_rank",
    "dt_min",
    "dt_max",
    "dt_init",
    "dt_scale",
    "dt_init_floor",
    "conv_bias",
    "bias",
)
_SHARED_FIELDS = (
    "d_model",
    "n_layer",
    "vocab_size",
    "residual_in_fp32",
    "pad_vocab_size_multiple",
    "tie_embeddings",
)
_INITIALIZER = ("initializer_range", "rescale_prenorm_residual")


@dataclass
class MambaConfig:
    """mamba_ssm's configuration; `statescan` gives ours, whose fields can be read from here as well.

    Args:
        d_model: Default 2560.
        d_intermediate: must be 0, no MLP. Default 0.
        n_layer: Default 64.
        vocab_size: Default 50277.
        ssm_cfg: the layer's arguments, such as d_state; "layer" may be "Mamba1". Default none.
        attn_layer_idx: must be empty, no attention. Default empty.
        attn_cfg: must be empty. Default empty.
        rms_norm: must be True. Default True.
        residual_in_fp32: Default True.
        fused_add_norm: taken and not needed: there is one path. Default True.
        pad_vocab_size_multiple: Default 8.
        tie_embeddings: Default True.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        # What this class has no field for (the norm's epsilon, initial values); kept by a model's own copy.
        self._more: dict[str, Any] = {}

    def statescan(self, initializer_cfg: dict[str, Any] | None = None) -> models.MambaConfig:
        """The configuration of `statescan.models.CausalLM` for the same model.

        Raises:
            ConfigError: a field asks for a model that isn't Mamba-1; the text names it.
        """
        for name, wanted in (("d_intermediate", 0), ("attn_layer_idx", []), ("attn_cfg", {}), ("rms_norm", True)):
            if (got := getattr(self, name)) != wanted:
                raise ConfigError(
                    f"MambaConfig: {name} must be {wanted!r}, got {got!r}; statescan has no model of this kind"
                )
        layer = dict(self.ssm_cfg)
        if (kind := layer.pop("layer", "Mamba1")) != "Mamba1":
            raise ConfigError(f"MambaConfig: ssm_cfg['layer'] must be 'Mamba1', got {kind!r}; others are not built")
        layer.pop("use_fast_path", None)
        more = dict(self._more)
        for name, value in (initializer_cfg or {}).items():
            if name == "n_residuals_per_layer" and value == 1:
                continue
            if name not in _INITIALIZER:
                raise ConfigError(
                    f"MambaConfig: initializer_cfg must have {' and '.join(_INITIALIZER)} alone, got {name}={value!r}"
                )
            more[name] = value
        for name in layer:
            if name not in _LAYER_FIELDS:
                raise ConfigError(f"MambaConfig: ssm_cfg must have {', '.join(_LAYER_FIELDS)} alone, got {name!r}")
        return models.MambaConfig(**{name: getattr(self, name) for name in _SHARED_FIELDS}, **layer, **more)

    @classmethod
    def from_statescan(cls, config: models.MambaConfig) -> MambaConfig:
        """mamba_ssm's configuration of one of ours; layer arguments at their defaults are left out of ssm_cfg.

        Raises:
            ConfigError: a layer with another block, inner map or selection, which mamba_ssm has no word for.
        """
        if not config.is_plain_mamba:
            raise ConfigError(
                "MambaConfig.from_statescan: config must have the published Mamba layer, got one with another block, "
                "inner map or selection; use statescan.models.CausalLM"
            )
        defaults = {f.name: f.default for f in dataclasses.fields(models.MambaConfig)}
        fields = config.to_dict()
        layer = {name: fields[name] for name in _LAYER_FIELDS if fields[name] != defaults[name]}
        theirs = cls(**{name: fields[name] for name in _SHARED_FIELDS}, ssm_cfg=layer)
        theirs._more = {n: v for n, v in fields.items() if n not in _LAYER_FIELDS + _SHARED_FIELDS}
        return theirs

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in self.__dataclass_fields__:
            raise AttributeError(f"'MambaConfig' object has no attribute '{name}'")
        return getattr(self.statescan(), name)


class LMOutput(NamedTuple):
    """logits: (batch, kept, vocabulary)."""

    logits: Tensor


@dataclass
class GenerateOutput:
    """sequences: (batch, length), the prompt included; scores: the logits (batch, vocabulary) of each new token, before
    penalty, temperature and filters, or None."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


class _Ids:
    """Stands where the engine wants a tokenizer: token ids go in and out, and no text is made."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode_bytes(self, ids: Sequence[int], /) -> bytes:
        del ids
        return b""


class MambaLMHeadModel(models.CausalLM):
    """`statescan.models.CausalLM` with mamba_ssm's calls; parameters have the same names, shapes and initial values.

    Args:
        config: a `MambaConfig` of this module (or of `statescan.models`).
        initializer_cfg: initializer_range and rescale_prenorm_residual, for the initial values. Default: none.
        device: where parameters are made. Default: torch's.
        dtype: of the parameters; A_log and D stay float32 below it. Default: torch's.
        backend: as in `statescan.ops`. Default "auto".
    """

    def __init__(
        self,
        config: MambaConfig | models.MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        theirs = MambaConfig.from_statescan(config) if isinstance(config, models.MambaConfig) else config
        ours = theirs.statescan(initializer_cfg)
        super().__init__(ours, backend=backend, device=device, dtype=dtype)
        copy = dataclasses.replace(theirs)
        copy._more = MambaConfig.from_statescan(ours)._more
        self.config = copy  # type: ignore[assignment]
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        for mixer in self._mixers():
            _mark(mixer)

    def _mixers(self) -> list[layers.Mamba]:
        return [layer.mixer for layer in self.backbone.layers]  # type: ignore[misc]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
    ) -> LMOutput:
        """Logits of the last num_last_tokens positions (0: of all).

        Args:
            input_ids: (batch, length) int64 or int32.
            position_ids: taken and not needed.
            inference_params: read on from its states and write them, where its seqlen_offset is not 0; any number of
                tokens at a time. Default: none.
            num_last_tokens: Default 0.
        """
        del position_ids
        if inference_params is None:
            logits = super().forward(input_ids, logits_to_keep=num_last_tokens).logits
            assert logits is not None
            return LMOutput(logits)
        cached = [
            _states_of("MambaLMHeadModel.forward", inference_params, i, mixer, input_ids.shape[0])
            for i, mixer in enumerate(self._mixers())
        ]
        output = super().forward(
            input_ids, state=tuple(state for _, _, state in cached), logits_to_keep=num_last_tokens
        )
        assert output.state is not None
        assert output.logits is not None
        for (conv_state, ssm_state, _), after in zip(cached, output.state, strict=True):
            _write_cache(conv_state, ssm_state, after)
        return LMOutput(output.logits)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer index -> (conv_state, ssm_state), for `InferenceParams.key_value_memory_dict`."""
        del max_seqlen, kwargs
        return {i: _new_cache(mixer, batch_size, dtype) for i, mixer in enumerate(self._mixers())}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        *,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        teacher_outputs: Tensor | None = None,
        vocab_size: int | None = None,
        cg: bool = False,
        enable_timing: bool = False,
        streamer: Any = None,
    ) -> Any:
        """Writes on from prompts of one length, with `statescan.generate`.

        Args:
            input_ids: (batch, length) int64 or int32.
            max_length: tokens of a row at most, those of the prompt included.
            top_k: 1 takes the likeliest token, 0 limits nothing. Default 1.
            top_p: 0 or 1 limits nothing. Default 0.
            min_p: tokens at least so many times as likely as the likeliest; together with top_k too. Default 0.
            temperature: Default 1.
            return_dict_in_generate: give a `GenerateOutput`. Default False.
            output_scores: with its scores. Default False.
            repetition_penalty: Default 1.
            eos_token_id: a row that draws it ends there, whatever the others do, and is filled up with it. Default:
                none.
            teacher_outputs: (batch, some length), the tokens to take instead of drawing, by position. Default: none.
            vocab_size: only tokens below it are drawn. Default: the configuration's, so that no padding row is.
            cg: taken and not needed: on a GPU steps are CUDA graphs wherever the engine can.
            enable_timing: print the time it took. Default False.
            streamer: its put() gets the prompt and each step's tokens, its end() is called. Default: none.

        Returns:
            (batch, up to max_length) int64, or a `GenerateOutput`. Random numbers follow torch.manual_seed.

        Raises:
            ShapeError, DTypeError, ConfigError, DataError: an argument does not fit; the text names it.
        """
        op = "MambaLMHeadModel.generate"
        del cg
        _want_sequence(op, "input_ids", input_ids, "(batch, length)", 2)
        batch, length = input_ids.shape
        if not isinstance(max_length, int) or max_length <= length:
            raise ConfigError(
                f"{op}: max_length must be an integer above the prompt's length {length}, which it counts too, got "
                f"{max_length!r}; pass {length} + the number of new tokens"
            )
        rows = self.config.padded_vocab_size
        vocab = self.config.vocab_size if vocab_size is None else vocab_size
        if not isinstance(vocab, int) or not 1 <= vocab <= rows:
            raise ConfigError(f"{op}: vocab_size must be in [1, {rows}], got {vocab_size!r}; leave it out")
        if teacher_outputs is not None:
            _want_sequence(op, "teacher_outputs", teacher_outputs, "(batch, length)", 2)
            _want(op, "teacher_outputs", teacher_outputs, (batch, teacher_outputs.shape[1]), "(batch, length)")
        ends = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        params = SamplingParams(
            temperature=0.0 if top_k == 1 else temperature,
            top_k=top_k,
            top_p=top_p if top_p > 0 else 1.0,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=int(torch.randint(2**53, ()).item()),
            max_new_tokens=max_length - length,
            stop_token_ids=ends,
        )
        # Rows differ by their stream, so that the same prompt twice gives two texts.
        own = [dataclasses.replace(params, stream=row) for row in range(batch)]
        start = time.perf_counter()
        dtype = _engine_dtype(self.backbone.embedding.weight)
        # The engine takes no prompt with tokens that may not be drawn.
        outside = int(input_ids.max()) >= vocab or int(input_ids.min()) < 0
        if output_scores or teacher_outputs is not None or streamer is not None or dtype is None or outside:
            sequences, scores = self._generate_by_steps(input_ids, own, vocab, teacher_outputs, streamer)
        else:
            engine = Engine(self, _Ids(vocab), dtype, max_batch=batch)
            written = [result.tokens for result in engine.generate(list(input_ids), own)]
            longest = max(map(len, written))
            filled = [tokens + [ends[0]] * (longest - len(tokens)) if ends else tokens for tokens in written]
            sequences, scores = torch.cat([input_ids.long(), torch.tensor(filled, device=input_ids.device)], 1), ()
        if enable_timing:
            print(f"Prompt processing + decoding time: {1000 * (time.perf_counter() - start):.0f}ms")
        if not return_dict_in_generate:
            return sequences
        return GenerateOutput(sequences, scores if output_scores else None)

    def _generate_by_steps(
        self,
        input_ids: Tensor,
        params: Sequence[SamplingParams],
        vocab: int,
        teacher_outputs: Tensor | None,
        streamer: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same tokens as the engine's where every step's logits are wanted, or a token is not to be drawn."""
        batch, length = input_ids.shape
        put: Callable[[Tensor], object] = streamer.put if streamer is not None else lambda tokens: None
        put(input_ids.cpu())
        output = super().forward(input_ids, state=self.init_state(batch), logits_to_keep=1)
        assert output.logits is not None
        logits, state = output.logits[:, -1], output.state
        sequences, scores, ended = input_ids.long(), [], [False] * batch
        seen = torch.zeros(batch, vocab, dtype=torch.bool)
        for row, tokens in enumerate(input_ids.tolist()):
            seen[row, [token for token in tokens if token < vocab]] = True
        for position in range(length, length + params[0].max_new_tokens):
            scores.append(logits[:, :vocab])
            numbers = scores[-1].to(_exact(logits.dtype)).cpu()
            tokens = []
            for row, own in enumerate(params):
                if teacher_outputs is not None and position < teacher_outputs.shape[1]:
                    token = int(teacher_outputs[row, position])
                elif ended[row]:
                    token = own.stop_token_ids[0]
                else:
                    token = sample(numbers[row], own, position, seen[row])
                    ended[row] = token in own.stop_token_ids
                tokens.append(token)
                if token < vocab:
                    seen[row, token] = True
            new = torch.tensor(tokens, device=input_ids.device)
            put(new.cpu())
            sequences = torch.cat([sequences, new[:, None]], 1)
            if all(ended) or position + 1 == length + params[0].max_new_tokens:
                break
            assert state is not None
            output = self.step(new, state)
            assert output.logits is not None
            logits, state = output.logits, output.state
        if streamer is not None:
            streamer.end()
        return sequences, tuple(scores)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], layout: str = "state-spaces", **kwargs: Any
    ) -> Path:
        """As `statescan.models.CausalLM.save_pretrained`, by default in the layout that mamba_ssm reads."""
        return super().save_pretrained(save_directory, layout, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """As `statescan.models.CausalLM.from_pretrained`, which reads every published layout; kwargs are its revision,
        offline and backend."""
        model = super().from_pretrained(pretrained_model_name, device, dtype, **kwargs)
        assert isinstance(model, MambaLMHeadModel)
        model._mark_parameters()
        return model


def _engine_dtype(weight: Tensor) -> str | None:
    """The engine's dtype that keeps these weights as they are; None: step by step, in the weights' own."""
    if weight.dtype == torch.float64:
        return None
    if weight.dtype == torch.float16:
        return "float16" if weight.device.type == "cuda" else "float32"
    return "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
