"""One step of attention on NVIDIA GPUs: one kernel (attend.cu), which reads each filled key and value once."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from statescan.ops import _cuda
from statescan.ops._cuda import i32
from statescan.ops._dispatch import Facts

__all__ = ["decode_attention", "launch", "refuses", "spans"]

_SOURCE = Path(__file__).with_name("attend.cu")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_THREADS, _UNROLL = 128, 4
# Blocks of a launch, where there is work for so many: a few rounds of what a GPU holds at once.
_BLOCKS = 4096
_MOST_SPANS = 32


def refuses(facts: Facts) -> str | None:
    """CUDA devices, heads of 64 or 128 numbers, no float64."""
    if facts.device != "cuda":
        return _cuda.elsewhere(facts.device)
    if facts.dtype not in _TYPES:
        return f"its kernel takes float32, bfloat16 or float16, the dtype is {facts.dtype}; use backend='torch'"
    if facts.d_state not in (64, 128):
        return f"its kernel takes heads of 64 or 128 numbers, they have {facts.d_state}; use backend='torch'"
    return _cuda.unavailable_reason()


def spans(batch: int, kv_heads: int, capacity: int, d_head: int) -> int:
    """Parts that each row's and head's cache is read in: at most so many, fewer where it is not filled so far."""
    step = _THREADS * 8 // d_head * _UNROLL
    return max(1, min(_BLOCKS // (batch * kv_heads), _MOST_SPANS, math.ceil(capacity / step)))


@functools.cache
def _ended(device: int, stream: int, places: int) -> Tensor:
    """Counters of spans that ended, zero between launches; each stream has its own."""
    return torch.zeros(places, dtype=torch.int32, device=torch.device("cuda", device))


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    rotary: Tensor | None,
    out: Tensor,
    partial: Tensor,
    ended: Tensor,
) -> None:
    """Runs the kernel on the current stream.

    Args:
        q: (batch, heads, d_head), rows of any stride, dense within.
        k, v: (batch, kv_heads, d_head), likewise.
        keys, values: (batch, kv_heads, capacity, d_head), positions dense, 16-byte aligned.
        lengths: (batch,) int32.
        rotary: (positions, turned) float32, dense, or None.
        out: as q.
        partial: float32 scratch, at least spans * batch * heads * (d_head + 2) numbers.
        ended: int32 zeros, at least batch * kv_heads, zeros again afterwards; no other launch may use them meanwhile.
    """
    batch, heads, size = q.shape
    if batch > _cuda.MOST_BLOCKS:
        for rows in _cuda.pieces(batch):
            q_, k_, v_, keys_, values_, lengths_, out_ = (x[rows] for x in (q, k, v, keys, values, lengths, out))
            launch(q_, k_, v_, keys_, values_, lengths_, rotary, out_, partial, ended)
        return
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    macros = {
        "IN": _TYPES[q.dtype],
        "CT": _TYPES[keys.dtype],
        "D": size,
        "TURN": 0 if rotary is None else rotary.shape[1],
        "GROUP": heads // kv_heads,
    }
    run = _cuda.kernel(_SOURCE, "attend", macros, _THREADS, q.device.index or 0)
    run(
        (spans(batch, kv_heads, capacity, size), kv_heads, batch),
        *(q, q.stride(0), k, k.stride(0), v, v.stride(0)),
        *(keys, keys.stride(0), keys.stride(1), values, values.stride(0), values.stride(1)),
        *(lengths, rotary, ctypes.c_float(math.log2(math.e) / math.sqrt(size))),
        *(partial, ended, out, out.stride(0), i32(capacity)),
    )


def _dense(x: Tensor) -> Tensor:
    """The tensor itself where each row is dense, else a contiguous copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rotary: Tensor | None
) -> Tensor:
    batch, heads, size = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    used = [cache if _aligned(cache) else cache.contiguous() for cache in (keys, values)]
    parts = spans(batch, keys.shape[1], keys.shape[2], size)
    with torch.cuda.device(q.device):
        partial = torch.empty(parts * batch * heads * (size + 2), dtype=torch.float32, device=q.device)
        places = batch * keys.shape[1]
        if torch.cuda.is_current_stream_capturing():
            # A graph has its own, and sets them to zero each time.
            ended = torch.zeros(places, dtype=torch.int32, device=q.device)
        else:
            ended = _ended(q.device.index or 0, torch.cuda.current_stream().cuda_stream, places)
        table = None if rotary is None else rotary.float().contiguous()
        q, k, v = _dense(q), _dense(k), _dense(v)
        launch(q, k, v, used[0], used[1], lengths.contiguous(), table, out, partial, ended)
        for cache, copy in zip((keys, values), used, strict=True):
            if copy is not cache:
                cache.copy_(copy)
    return out


def _aligned(cache: Tensor) -> bool:
    """Whether positions are dense and can be moved 16 bytes at a time."""
    unit = 16 // cache.element_size()
    return (
        cache.stride(3) == 1
        and cache.stride(2) == cache.shape[3]
        and cache.stride(1) % unit == 0
        and cache.stride(0) % unit == 0
        and cache.data_ptr() % 16 == 0
    )


_LIBRARY = torch.library.Library("statescan", "FRAGMENT")
_LIBRARY.define(
    "decode_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, "
    "Tensor? rotary) -> Tensor"
)
_LIBRARY.impl("decode_attention_cuda", _attend, "CUDA")


@torch.library.register_fake("statescan::decode_attention_cuda", lib=_LIBRARY)
def _(q: Tensor, *rest: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rotary: Tensor | None
) -> Tensor:
    """`statescan.ops.decode_attention` on a GPU."""
    return torch.ops.statescan.decode_attention_cuda(q, k, v, keys, values, lengths, rotary)
