"""Causal self-attention with a growing cache of keys and values: the baseline that sees everything, at O(length^2)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.errors import ConfigError, ShapeError
from statescan.nn.sequences import by_sequence

__all__ = ["POSITIONS", "AttentionOutput", "AttentionState", "CausalSelfAttention"]

POSITIONS = ("none", "rotary", "xpos")
_XPOS_GAMMA, _XPOS_BASE = 0.4, 512.0
# Queries of one piece under xPos: its decay over a piece, and so the largest scale of a key, stays far from overflow.
_XPOS_PIECE = 8192


class AttentionState(NamedTuple):
    """Keys and values seen so far; the room behind `length` is not yet used.

    keys, values: (batch, heads, capacity, d_head); length: how many are filled. `tip` is shared by the states that
    share the arrays: how far they have been written. A state that is continued a second time is copied first, so that
    no state ever changes.
    """

    keys: Tensor
    values: Tensor
    length: int
    tip: list[int]


class AttentionOutput(NamedTuple):
    """output: shaped as the input; state after the last position, None unless one went in."""

    output: Tensor
    state: AttentionState | None


class CausalSelfAttention(nn.Module):
    """``y = W_o softmax(Q K^T / sqrt(d_head)) V``, each position looking at itself and all before it.

    Args:
        d_model: width of input and output.
        n_head: number of heads; divides d_model.
        positions: "rotary" (turns queries and keys by their positions), "xpos" (rotary, and a decay with distance), or
            "none" (for absolute positions, added to the embedding).
        rotary_fraction: part of each head that is turned; Pythia turns 0.25. Default 1.
        rotary_base: wave length of the slowest turn, over 2 pi. Default 10,000.
        bias: the projections have biases. Default False.
        device, dtype: of the parameters.

    Source: Vaswani et al. (2017); rotary: Su et al. (2021), arXiv:2104.09864; xPos: Sun et al. (2022),
    arXiv:2212.10554, with its gamma 0.4 and scale base 512.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        positions: str = "rotary",
        rotary_fraction: float = 1.0,
        rotary_base: float = 10_000.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n_head < 1 or d_model % n_head:
            raise ConfigError(f"CausalSelfAttention: n_head must divide d_model = {d_model}, got {n_head}")
        if positions not in POSITIONS:
            raise ConfigError(f"CausalSelfAttention: positions must be one of {list(POSITIONS)}, got {positions!r}")
        self.d_model, self.n_head, self.d_head = d_model, n_head, d_model // n_head
        self.positions, self.rotary_base = positions, rotary_base
        self.turned = 2 * int(self.d_head * rotary_fraction / 2) if positions != "none" else 0
        if positions != "none" and self.turned < 2:
            raise ConfigError(
                f"CausalSelfAttention: rotary_fraction must turn at least 2 of the {self.d_head} numbers of a head, "
                f"got {rotary_fraction}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias, **factory)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, **factory)

    def init_state(
        self,
        batch: int,
        *,
        capacity: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """An empty cache with room for `capacity` positions; it doubles when it is full."""
        if capacity < 1:
            raise ConfigError(f"CausalSelfAttention.init_state: capacity must be >= 1, got {capacity}")
        like = self.out_proj.weight
        shape = (batch, self.n_head, capacity, self.d_head)
        keys, values = (torch.zeros(shape, device=device or like.device, dtype=dtype or like.dtype) for _ in range(2))
        return AttentionState(keys, values, 0, [0])

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> AttentionOutput:
        """Runs a whole sequence, or the next part of one.

        Args:
            x: (batch, length, d_model).
            state: what `init_state`, `forward` or `step` gave; it stays as it is. Default: none came before.
            cu_seqlens: (sequences + 1,), bounds of packed sequences; batch 1 and no state then.
        """
        if x.ndim != 3 or x.shape[2] != self.d_model or 0 in x.shape:
            raise ShapeError(
                f"CausalSelfAttention: x must be (batch, length >= 1, d_model) with d_model {self.d_model}, "
                f"got {tuple(x.shape)}"
            )
        if cu_seqlens is not None:
            alone = by_sequence("CausalSelfAttention", lambda one: self.forward(one).output, x, cu_seqlens, state)
            return AttentionOutput(alone, None)
        if state is not None and state.keys.shape[0] != x.shape[0]:
            raise ShapeError(
                f"CausalSelfAttention: state must have {x.shape[0]} rows, as x has, got {state.keys.shape[0]}; "
                "make it with init_state(batch)"
            )
        before = 0 if state is None else state.length
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.n_head, self.d_head)).permute(2, 0, 3, 1, 4)
        if self.turned:
            angles = self._angles(before, x.shape[1], x.device)
            q, k = self._turn(q, angles), self._turn(k, angles)
        if state is not None:
            state = _append(state, k, v)
            k, v = state.keys[:, :, : state.length].to(q.dtype), state.values[:, :, : state.length].to(q.dtype)
        y = self._attend_decayed(q, k, v) if self.positions == "xpos" else _attend(q, k, v)
        return AttentionOutput(self.out_proj(y.transpose(1, 2).flatten(2)), state)

    def step(self, x: Tensor, state: AttentionState) -> AttentionOutput:
        """One position: x (batch, d_model)."""
        output = self.forward(x.unsqueeze(1), state)
        return AttentionOutput(output.output.squeeze(1), output.state)

    def _angles(self, start: int, length: int, device: torch.device) -> Tensor:
        """(length, turned / 2), float32: position times frequency, reduced to one circle in float64."""
        place = torch.arange(start, start + length, device=device, dtype=torch.float64)
        pair = torch.arange(0, self.turned, 2, device=device, dtype=torch.float64)
        frequency = self.rotary_base ** (-pair / self.turned)
        return torch.remainder(place[:, None] * frequency, 2 * math.pi)

    def _turn(self, x: Tensor, angles: Tensor) -> Tensor:
        """Turns the pairs (i, i + turned / 2) of each head: GPT-NeoX's layout."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        first, second = x[..., : self.turned].to(wide).chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
        return torch.cat([turned, x[..., self.turned :]], -1) if self.turned < self.d_head else turned

    def _attend_decayed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """xPos: the product of query m and key n shrinks by zeta^((m - n) / 512), pair by pair of a head.

        A piece of the queries at a time, with keys scaled relative to its first: keys of the past by less than 1.
        """
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        half = torch.arange(0, self.turned, 2, device=q.device, dtype=torch.float64) / self.turned
        log_zeta = torch.log((half + _XPOS_GAMMA) / (1 + _XPOS_GAMMA)).repeat(2)
        log_zeta = F.pad(log_zeta, (0, self.d_head - self.turned))
        ahead = k.shape[2] - q.shape[2]
        places = torch.arange(k.shape[2], device=q.device, dtype=torch.float64).unsqueeze(-1)
        parts = []
        for start in range(0, q.shape[2], _XPOS_PIECE):
            end = min(start + _XPOS_PIECE, q.shape[2])
            from_here = (places[: ahead + end] - (ahead + start)) / _XPOS_BASE
            scale = torch.exp(from_here * log_zeta).to(wide)
            mine = (q[:, :, start:end] * scale[ahead + start :]).to(q.dtype)
            theirs = (k[:, :, : ahead + end] / scale).to(k.dtype)
            parts.append(_attend(mine, theirs, v[:, :, : ahead + end]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def extra_repr(self) -> str:
        return f"{self.d_model}, n_head={self.n_head}, positions={self.positions!r}"


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last positions (batch, heads, queries, d_head) to all up to themselves."""
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.shape[2] == 1:
        return F.scaled_dot_product_attention(q, k, v)
    # Here, since this import takes all of torch._dynamo along.
    from torch.nn.attention.bias import causal_lower_right

    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))


def _append(state: AttentionState, k: Tensor, v: Tensor) -> AttentionState:
    """The state with more keys and values behind it; the arrays are shared with it where nobody has written there."""
    end = state.length + k.shape[2]
    keys, values, tip = state.keys, state.values, state.tip
    if end > keys.shape[2] or tip[0] != state.length or torch.is_grad_enabled():
        room = max(end, 2 * keys.shape[2] if end > keys.shape[2] else keys.shape[2])
        grow = room - state.length
        keys = F.pad(keys[:, :, : state.length], (0, 0, 0, grow))
        values = F.pad(values[:, :, : state.length], (0, 0, 0, grow))
        tip = [state.length]
    keys[:, :, state.length : end] = k
    values[:, :, state.length : end] = v
    tip[0] = end
    return AttentionState(keys, values, end, tip)
