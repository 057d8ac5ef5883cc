"""Causal self-attention with a growing cache of keys and values: the baseline that sees everything, at O(length^2)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.errors import ConfigError, ShapeError
from statescan.nn.sequences import padded_groups
from statescan.ops._checks import check_cu_seqlens

__all__ = ["POSITIONS", "AttentionOutput", "AttentionState", "CausalSelfAttention", "rotary_table"]

POSITIONS = ("none", "rotary", "xpos")
_XPOS_GAMMA, _XPOS_BASE = 0.4, 512.0
# Queries of one piece under xPos: its decay over a piece, and so the largest scale of a key, stays far from overflow.
_XPOS_PIECE = 8192


class AttentionState(NamedTuple):
    """Keys and values seen so far; the room behind each row's length is not yet used.

    keys, values: (batch, kv_heads, capacity, d_head); lengths: how many are filled, row by row. `tip` is shared by the
    states that share the arrays: how far they have been written. A state that is continued a second time is copied
    first, so that no state ever changes.
    """

    keys: Tensor
    values: Tensor
    lengths: tuple[int, ...]
    tip: list[tuple[int, ...]]

    @property
    def length(self) -> int:
        """The longest row's."""
        return max(self.lengths)

    def select(self, rows: list[int]) -> AttentionState:
        """A copy of some rows, in that order; a row may come more than once."""
        lengths = tuple(self.lengths[row] for row in rows)
        index = torch.tensor(rows, device=self.keys.device)
        return AttentionState(self.keys[index], self.values[index], lengths, [lengths])

    def overwrite(self, row: int, other: AttentionState, other_row: int = 0) -> AttentionState:
        """A state with one row taken from another of the same layer; the arrays of this one are written over, unless
        they have to grow."""
        length = other.lengths[other_row]
        grow = max(0, length - self.keys.shape[2])
        keys, values = (F.pad(array, (0, 0, 0, grow)) if grow else array for array in (self.keys, self.values))
        keys[row, :, :length] = other.keys[other_row, :, :length]
        values[row, :, :length] = other.values[other_row, :, :length]
        lengths = (*self.lengths[:row], length, *self.lengths[row + 1 :])
        return AttentionState(keys, values, lengths, [lengths])


class AttentionOutput(NamedTuple):
    """output: shaped as the input; state after the last position, None unless one went in."""

    output: Tensor
    state: AttentionState | None


class CausalSelfAttention(nn.Module):
    """``y = W_o softmax(Q K^T / sqrt(d_head)) V``, each position looking at itself and all before it.

    Args:
        d_model: width of input and output.
        n_head: number of heads; divides d_model.
        n_kv_head: heads of keys and values, each shared by n_head / n_kv_head heads. Default: n_head.
        positions: "rotary" (turns queries and keys by their positions), "xpos" (rotary, and a decay with distance), or
            "none" (for absolute positions, added to the embedding).
        rotary_fraction: part of each head that is turned; Pythia turns 0.25. Default 1.
        rotary_base: wave length of the slowest turn, over 2 pi. Default 10,000.
        bias: the projections have biases. Default False.
        dropout: share of the attention's weights that are dropped in training. Default 0.
        device, dtype: of the parameters.

    Source: Vaswani et al. (2017); rotary: Su et al. (2021), arXiv:2104.09864; xPos: Sun et al. (2022),
    arXiv:2212.10554, with its gamma 0.4 and scale base 512; shared keys: Ainslie et al. (2023), arXiv:2305.13245.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        n_kv_head: int | None = None,
        positions: str = "rotary",
        rotary_fraction: float = 1.0,
        rotary_base: float = 10_000.0,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n_head < 1 or d_model % n_head:
            raise ConfigError(f"CausalSelfAttention: n_head must divide d_model = {d_model}, got {n_head}")
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        if n_kv_head < 1 or n_head % n_kv_head:
            raise ConfigError(f"CausalSelfAttention: n_kv_head must divide n_head = {n_head}, got {n_kv_head}")
        if positions not in POSITIONS:
            raise ConfigError(f"CausalSelfAttention: positions must be one of {list(POSITIONS)}, got {positions!r}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"CausalSelfAttention: dropout must be in [0, 1), got {dropout}")
        self.d_model, self.n_head, self.n_kv_head, self.d_head = d_model, n_head, n_kv_head, d_model // n_head
        self.positions, self.rotary_base, self.dropout = positions, rotary_base, dropout
        self.turned = 2 * int(self.d_head * rotary_fraction / 2) if positions != "none" else 0
        if positions != "none" and self.turned < 2:
            raise ConfigError(
                f"CausalSelfAttention: rotary_fraction must turn at least 2 of the {self.d_head} numbers of a head, "
                f"got {rotary_fraction}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(d_model, (n_head + 2 * n_kv_head) * self.d_head, bias=bias, **factory)
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
        shape = (batch, self.n_kv_head, capacity, self.d_head)
        keys, values = (torch.zeros(shape, device=device or like.device, dtype=dtype or like.dtype) for _ in range(2))
        return AttentionState(keys, values, (0,) * batch, [(0,) * batch])

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> AttentionOutput:
        """Runs a whole sequence, or the next part of one.

        Args:
            x: (batch, length, d_model).
            state: what `init_state`, `forward` or `step` gave; it stays as it is. Default: none came before.
            cu_seqlens: (sequences + 1,), bounds of packed sequences; batch 1 then, and a row of the state a sequence.
        """
        if x.ndim != 3 or x.shape[2] != self.d_model or 0 in x.shape:
            raise ShapeError(
                f"CausalSelfAttention: x must be (batch, length >= 1, d_model) with d_model {self.d_model}, "
                f"got {tuple(x.shape)}"
            )
        rows = x.shape[0]
        if cu_seqlens is not None:
            check_cu_seqlens("CausalSelfAttention", cu_seqlens, x.shape[0], x.shape[1], in_graph=True)
            rows = cu_seqlens.shape[0] - 1
        if state is not None and state.keys.shape[0] != rows:
            raise ShapeError(
                f"CausalSelfAttention: state must have {rows} rows, as x has, got {state.keys.shape[0]}; "
                "make it with init_state(batch)"
            )
        if cu_seqlens is not None:
            return self._packed(x, cu_seqlens, state)
        q, k, v = self._project(x)
        if state is None:
            return AttentionOutput(self._merge(self._attend(*self._turned(q, k, 0), v, (0,) * rows)), None)
        if len(set(state.lengths)) == 1:
            q, k = self._turned(q, k, state.lengths[0])
        else:
            starts = torch.tensor(state.lengths, device=x.device)
            q, k = self._turned(q, k, starts[:, None] + torch.arange(x.shape[1], device=x.device))
        before, state = state.lengths, _append(state, k, v, (x.shape[1],) * rows)
        k, v = (array[:, :, : state.length].to(q.dtype) for array in (state.keys, state.values))
        return AttentionOutput(self._merge(self._attend(q, k, v, before)), state)

    def step(self, x: Tensor, state: AttentionState) -> AttentionOutput:
        """One position: x (batch, d_model)."""
        output = self.forward(x.unsqueeze(1), state)
        return AttentionOutput(output.output.squeeze(1), output.state)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, n_head, length, d_head), keys and values (batch, n_kv_head, length, d_head)."""
        heads = (self.n_head, self.n_kv_head, self.n_kv_head)
        q, k, v = self.qkv_proj(x).unflatten(-1, (sum(heads), self.d_head)).transpose(1, 2).split(heads, 1)
        return q, k, v

    def _merge(self, y: Tensor) -> Tensor:
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _packed(self, x: Tensor, cu_seqlens: Tensor, state: AttentionState | None) -> AttentionOutput:
        """Sequences of like lengths go together as rows, padded behind by their own last position, which no real
        position looks at."""
        starts, sizes = cu_seqlens[:-1].tolist(), cu_seqlens.diff().tolist()
        q, k, v = self._project(x)
        places = torch.arange(x.shape[1], device=x.device) - torch.repeat_interleave(
            cu_seqlens[:-1], cu_seqlens.diff(), output_size=x.shape[1]
        )
        if state is not None:
            before = torch.tensor(state.lengths, device=x.device)
            places = places + torch.repeat_interleave(before, cu_seqlens.diff(), output_size=x.shape[1])
        q, k = self._turned(q, k, places[None])
        y = torch.empty_like(q)
        groups = padded_groups(sizes) if state is None else [list(range(len(sizes)))]
        for rows in groups:
            length = max(sizes[row] for row in rows)
            index = torch.tensor(
                [[starts[row] + min(i, max(sizes[row] - 1, 0)) for i in range(length)] for row in rows],
                device=x.device,
            ).clamp_(max=x.shape[1] - 1)
            real = torch.arange(length, device=x.device) < torch.tensor([[sizes[row]] for row in rows], device=x.device)
            mine, theirs, values = (part[0][:, index].transpose(0, 1) for part in (q, k, v))
            lengths = (0,) * len(rows)
            if state is not None:
                lengths, state = state.lengths, _append(state, theirs, values, tuple(sizes))
                # The queries that pad a row look no further than to its end.
                room = max(before + length for before in lengths)
                theirs, values = (
                    F.pad(array, (0, 0, 0, max(0, room - array.shape[2])))[:, :, :room].to(q.dtype)
                    for array in (state.keys, state.values)
                )
            done = self._attend(mine, theirs, values, lengths).transpose(1, 2)[real]
            y = y.index_copy(2, index[real], done.transpose(0, 1).unsqueeze(0))
        return AttentionOutput(self._merge(y), state)

    def _turned(self, q: Tensor, k: Tensor, places: Tensor | int) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their positions: the first one's number, or (batch or 1, length) of them."""
        if not self.turned:
            return q, k
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        if isinstance(places, Tensor):
            cos, sin = _cos_sin(places, self.turned, self.rotary_base, wide)
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        elif torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
            # A graph must not depend on memory that others let go.
            cos, sin = _cos_sin(
                torch.arange(places, places + q.shape[2], device=q.device), self.turned, self.rotary_base, wide
            )
        else:
            cos, sin = _kept_cos_sin(
                places, q.shape[2], self.turned, self.rotary_base, q.device, wide, torch.is_inference_mode_enabled()
            )
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns the pairs (i, i + turned / 2) of each head: GPT-NeoX's layout."""
        first, second = x[..., : self.turned].to(cos.dtype).chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
        return torch.cat([turned, x[..., self.turned :]], -1) if self.turned < self.d_head else turned

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, before: tuple[int, ...]) -> Tensor:
        """Attention of new positions (batch, heads, queries, d_head), of which `before` came in each row."""
        if self.positions == "xpos":
            return self._attend_decayed(q, k, v, before)
        return self._softmax(q, k, v, before)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, before: tuple[int, ...]) -> Tensor:
        options: dict[str, Any] = {"dropout_p": self.dropout if self.training else 0.0}
        if self.n_kv_head < self.n_head:
            options["enable_gqa"] = True
        ahead = k.shape[2] - q.shape[2]
        if any(length != ahead for length in before):
            start = torch.tensor(before, device=q.device)[:, None]
            last = start + torch.arange(q.shape[2], device=q.device)
            seen = torch.arange(k.shape[2], device=q.device) <= last[:, None, :, None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options)
        if ahead == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        if q.shape[2] == 1:
            return F.scaled_dot_product_attention(q, k, v, **options)
        # Here, since this import takes all of torch._dynamo along.
        from torch.nn.attention.bias import causal_lower_right

        mask: Any = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    def _attend_decayed(self, q: Tensor, k: Tensor, v: Tensor, before: tuple[int, ...]) -> Tensor:
        """xPos: the product of query m and key n shrinks by zeta^((m - n) / 512), pair by pair of a head.

        A piece of the queries at a time, with keys scaled relative to its first: keys of the past by less than 1.
        """
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        half = torch.arange(0, self.turned, 2, device=q.device, dtype=torch.float64) / self.turned
        log_zeta = torch.log((half + _XPOS_GAMMA) / (1 + _XPOS_GAMMA)).repeat(2)
        log_zeta = F.pad(log_zeta, (0, self.d_head - self.turned))
        # Rows of one number of positions share their scales.
        first: Tensor | int = before[0]
        if len(set(before)) > 1:
            first = torch.tensor(before, device=q.device).view(-1, 1, 1)
        places = torch.arange(k.shape[2], device=q.device, dtype=torch.float64).unsqueeze(-1)
        parts = []
        for start in range(0, q.shape[2], _XPOS_PIECE):
            end = min(start + _XPOS_PIECE, q.shape[2])
            seen = min(max(before) + end, k.shape[2])
            # Keys beyond a row's own queries are seen by none of them, whatever their scale: it must stay finite alone.
            from_here = ((places[:seen] - (first + start)) / _XPOS_BASE).clamp(max=_XPOS_PIECE / _XPOS_BASE)
            theirs = (k[:, :, :seen] / torch.exp(from_here * log_zeta).to(wide).unsqueeze(-3)).to(k.dtype)
            ahead = places[: end - start] / _XPOS_BASE
            mine = (q[:, :, start:end] * torch.exp(ahead * log_zeta).to(wide)).to(q.dtype)
            parts.append(self._softmax(mine, theirs, v[:, :, :seen], tuple(length + start for length in before)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def extra_repr(self) -> str:
        return f"{self.d_model}, n_head={self.n_head}, positions={self.positions!r}"


def _cos_sin(places: Tensor, turned: int, base: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., turned / 2) each: of position times frequency, reduced to one circle in float64."""
    pair = torch.arange(0, turned, 2, device=places.device, dtype=torch.float64)
    angles = torch.remainder(places.double().unsqueeze(-1) * base ** (-pair / turned), 2 * math.pi)
    return angles.cos().to(wide), angles.sin().to(wide)


@functools.lru_cache(maxsize=8)
def _kept_cos_sin(
    start: int, length: int, turned: int, base: float, device: torch.device, wide: torch.dtype, inference: bool
) -> tuple[Tensor, Tensor]:
    """All layers of a pass need the same; what was made in inference mode stays there."""
    return _cos_sin(torch.arange(start, start + length, device=device), turned, base, wide)


def rotary_table(positions: int, turned: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """(positions, turned) float32: the cosines of every position's angles, then their sines."""
    return torch.cat(_cos_sin(torch.arange(positions, device=device), turned, base, torch.float32), -1)


def _append(state: AttentionState, k: Tensor, v: Tensor, counts: tuple[int, ...]) -> AttentionState:
    """The state with the first `counts` of more keys and values behind each row; the arrays are shared with it where
    nobody has written there."""
    ends = tuple(length + count for length, count in zip(state.lengths, counts, strict=True))
    keys, values, tip = state.keys, state.values, state.tip
    end, room = max(ends), keys.shape[2]
    if end > room or tip[0] != state.lengths or torch.is_grad_enabled():
        grow = (max(end, 2 * room) if end > room else room) - state.length
        keys = F.pad(keys[:, :, : state.length], (0, 0, 0, grow))
        values = F.pad(values[:, :, : state.length], (0, 0, 0, grow))
        tip = [state.lengths]
    if len(set(state.lengths)) == 1 and len(set(counts)) == 1:
        keys[:, :, state.length : end] = k[:, :, : counts[0]]
        values[:, :, state.length : end] = v[:, :, : counts[0]]
    elif set(counts) == {1}:
        rows, places = (torch.tensor(at, device=keys.device) for at in (range(len(ends)), state.lengths))
        keys[rows, :, places] = k[:, :, 0].to(keys.dtype)
        values[rows, :, places] = v[:, :, 0].to(values.dtype)
    else:
        for row, (start, stop) in enumerate(zip(state.lengths, ends, strict=True)):
            keys[row, :, start:stop] = k[row, :, : stop - start]
            values[row, :, start:stop] = v[row, :, : stop - start]
    tip[0] = ends
    return AttentionState(keys, values, ends, tip)
