"""One step of attention in plain PyTorch; on any device, without reading `lengths` on the host."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._dispatch import Facts

__all__ = ["decode_attention", "refuses"]


def refuses(facts: Facts) -> str | None:
    """Plain PyTorch runs everything."""
    return None


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """(batch, heads, d_head) turned by each row's angles (batch, turned)."""
    cos, sin = angles.to(x.dtype).unsqueeze(1).chunk(2, -1)
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], -1)


@torch.no_grad()
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rotary: Tensor | None
) -> Tensor:
    """Arguments and meaning as in the public function. It reads the whole of the cache, the empty part too."""
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    capacity = keys.shape[2]
    full = (lengths < 0) | (lengths >= capacity)
    place = lengths.clamp(0, capacity - 1).long()
    query, key = q.to(real), k.to(real)
    if rotary is not None:
        query, key = _turned(query, rotary[place]), _turned(key, rotary[place])
    rows = torch.arange(q.shape[0], device=q.device)
    for cache, new in ((keys, key), (values, v)):
        cache[rows, :, place] = torch.where(full[:, None, None], cache[rows, :, place], new.to(cache.dtype))
    seen = torch.arange(capacity, device=q.device) <= place[:, None]
    # What lies beyond may be anything: a weight of zero does not silence a NaN.
    out = F.scaled_dot_product_attention(
        query.unsqueeze(2),
        keys.to(real).where(seen[:, None, :, None], 0),
        values.to(real).where(seen[:, None, :, None], 0),
        attn_mask=seen[:, None, None],
        enable_gqa=q.shape[1] != keys.shape[1],
    ).squeeze(2)
    return out.masked_fill(full[:, None, None], math.nan).to(q.dtype)
