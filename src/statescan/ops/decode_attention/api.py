"""`decode_attention`: validate, choose the backend, call."""

from __future__ import annotations

from torch import Tensor

from statescan.ops._checks import transformed, without_autocast
from statescan.ops._dispatch import Facts, attempt
from statescan.ops.decode_attention.validation import validate

__all__ = ["decode_attention"]


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    rotary: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attends from one new position a row to all before it, itself included, and puts it into the cache.

    For every row, with n = lengths[row] positions in its cache::

        q, k         = turned by position n's angles                  (where rotary is given)
        keys[n]      = k,  values[n] = v                              (in place)
        out          = softmax(q keys[:n + 1]^T / sqrt(d_head)) values[:n + 1]

    `lengths` stays as it is: a step of a whole model reads it in every layer and adds one at its end. It is read on the
    device, so a CUDA graph of the call goes on being right while it grows. Not differentiable.

    Args:
        q: queries, (batch, heads, d_head); float32, bfloat16, float16 or float64.
        k: keys, (batch, kv_heads, d_head), dtype of q. Query head h looks at key head h // (heads / kv_heads).
        v: values, as k.
        keys: the cache, (batch, kv_heads, capacity, d_head), any float dtype; changed in place.
        values: as keys.
        lengths: (batch,) int32, positions in each row's cache. A row with a full cache gives NaN and writes nothing.
        rotary: (positions, turned) float32, each row the cosines of a position's turned / 2 angles, then their sines;
            pairs are (i, i + turned / 2). Default: nothing is turned.
        backend: ``"auto"``, or ``"cuda"``, ``"torch"``, ``"reference"``.

    Returns:
        (batch, heads, d_head), dtype of q.

    Raises:
        ShapeError: a shape or device is wrong.
        DTypeError: a dtype is wrong.
        BackendUnavailableError: the named backend can't run this call.

    Numerics: scores, softmax and sums in float32 (float64 where q is); the new key and value are rounded to the cache's
    dtype before they are used, so that later steps see the same.

    Source: Vaswani et al. (2017), equation 1; Su et al. (2021), arXiv:2104.09864; the cache is read in spans whose sums
    are put together at the end, as in Dao et al. (2023), "Flash-Decoding".
    """
    validate(q, k, v, keys, values, lengths, rotary)
    by_transform = transformed(q, k, v, keys, values)
    facts = Facts(q.device.type, q.dtype, d_state=q.shape[2], transformed=by_transform)

    def run(name: str) -> Tensor:
        if name == "cuda":
            from statescan.ops.decode_attention.cuda import decode_attention as attend
        elif name == "torch":
            from statescan.ops.decode_attention.torch_attention import decode_attention as attend
        else:
            from statescan.ops.decode_attention.reference import decode_attention as attend
        return attend(q, k, v, keys, values, lengths, rotary)

    with without_autocast(q.device.type):
        return attempt("decode_attention", backend, facts, run)
