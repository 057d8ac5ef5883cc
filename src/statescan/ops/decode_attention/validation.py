"""What `decode_attention` takes."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.errors import ShapeError
from statescan.ops._checks import check_device, check_dtype, check_shape, check_tensor

__all__ = ["validate"]

_OP = "decode_attention"
_CACHES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def validate(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rotary: Tensor | None
) -> None:
    """Raises one line that says what is wrong unless `decode_attention` can take these arguments."""
    for name, value in (("q", q), ("k", k), ("v", v), ("keys", keys), ("values", values), ("lengths", lengths)):
        check_tensor(_OP, name, value)
        check_device(_OP, name, value, q, "q")
    check_dtype(_OP, "q", q, _CACHES)
    if q.dim() != 3 or 0 in q.shape:
        raise ShapeError(
            f"{_OP}: q must have shape (batch, heads, d_head), each at least 1, got {tuple(q.shape)}; "
            "pass one position a row"
        )
    batch, heads, size = q.shape
    if keys.dim() != 4 or keys.shape[0] != batch or keys.shape[3] != size or 0 in keys.shape:
        raise ShapeError(
            f"{_OP}: keys must have shape (batch, kv_heads, capacity, d_head) with batch {batch} and d_head {size}, "
            f"got {tuple(keys.shape)}; make the cache for these rows and heads"
        )
    if heads % keys.shape[1]:
        raise ShapeError(
            f"{_OP}: q must have a number of heads that keys' kv_heads = {keys.shape[1]} divides, got {heads}; "
            "every key is shared by heads / kv_heads queries"
        )
    check_dtype(_OP, "keys", keys, _CACHES)
    check_shape(_OP, "values", values, tuple(keys.shape), "(batch, kv_heads, capacity, d_head)", "give it keys' shape")
    check_dtype(_OP, "values", values, (keys.dtype,), "the dtype of keys")
    for name, value in (("k", k), ("v", v)):
        wanted = (batch, keys.shape[1], size)
        check_shape(_OP, name, value, wanted, "(batch, kv_heads, d_head)", "pass the new position alone")
        check_dtype(_OP, name, value, (q.dtype,), "the dtype of q")
    check_shape(_OP, "lengths", lengths, (batch,), "(batch,)", "give one number a row")
    check_dtype(_OP, "lengths", lengths, (torch.int32,))
    if rotary is not None:
        check_tensor(_OP, "rotary", rotary)
        check_device(_OP, "rotary", rotary, q, "q")
        check_dtype(_OP, "rotary", rotary, (torch.float32, torch.float64))
        fits = rotary.dim() == 2 and rotary.shape[0] >= keys.shape[2]
        if not fits or rotary.shape[1] % 2 or not 2 <= rotary.shape[1] <= size:
            raise ShapeError(
                f"{_OP}: rotary must have shape (positions, turned) with a row for each of the cache's "
                f"{keys.shape[2]} positions and an even number of at most d_head = {size}, got {tuple(rotary.shape)}; "
                "make it with statescan.nn.attention.rotary_table"
            )
