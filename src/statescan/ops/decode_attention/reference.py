"""The readable truth: row by row, head by head. float64 in float64 out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statescan.ops._dispatch import Facts

__all__ = ["decode_attention", "refuses"]


def refuses(facts: Facts) -> str | None:
    """The reference runs everything."""
    return None


def _turned(x: Tensor, angles: Tensor | None) -> Tensor:
    """(heads, d_head) turned by one position's angles (turned,)."""
    if angles is None:
        return x
    cos, sin = angles.to(x.dtype).chunk(2)
    half = cos.shape[0]
    first, second = x[:, :half], x[:, half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[:, 2 * half :]], 1)


@torch.no_grad()
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rotary: Tensor | None
) -> Tensor:
    """Arguments and meaning as in the public function."""
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.full(q.shape, math.nan, dtype=q.dtype, device=q.device)
    shared = q.shape[1] // keys.shape[1]
    for row, n in enumerate(lengths.tolist()):
        if not 0 <= n < keys.shape[2]:
            continue
        angles = None if rotary is None else rotary[n]
        query = _turned(q[row].to(real), angles)
        keys[row, :, n] = _turned(k[row].to(real), angles).to(keys.dtype)
        values[row, :, n] = v[row].to(values.dtype)
        for head in range(q.shape[1]):
            seen = keys[row, head // shared, : n + 1].to(real)
            share = torch.softmax(seen @ query[head] / math.sqrt(q.shape[2]), 0)
            out[row, head] = (share @ values[row, head // shared, : n + 1].to(real)).to(q.dtype)
    return out
