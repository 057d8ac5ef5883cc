"""The Vandermonde and the Cauchy product in Triton: portable to the GPUs that Triton knows, interpreted for tests.

Every function gives the same bits on every run and every GPU of a kind.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statescan.ops import _triton
from statescan.ops._checks import wants_gradients
from statescan.ops._dispatch import Facts
from statescan.ops.ssm_kernel import products

__all__ = [
    "cauchy_backward",
    "cauchy_forward",
    "make_cauchy_ready",
    "make_vandermonde_ready",
    "refuses_products",
    "vandermonde_backward",
    "vandermonde_forward",
]

_SUMS = 16  # Cauchy sums of a program, at most
_POINTS = 2048  # that a program of the Cauchy product's backward goes through, at most


def refuses_products(facts: Facts) -> str | None:
    """Why Triton does not take this call, with the cure; None if it does."""
    return _triton.refusal(facts)


def _tile(length: int, states: int, near: int, wide: int, like: Tensor) -> dict[str, Any]:
    """How a Vandermonde kernel cuts lags, into tiles of at most 64 near, and states, into blocks of at most `wide`."""
    gpu = _triton.hardware(like)
    major = torch.cuda.get_device_capability(like.device)[0] if gpu == 1 else 0
    inner = min(near, max(16, 1 << ((length - 1).bit_length() + 1) // 2))
    return {
        "BA": min(64, max(16, _triton.power_of_2(-(-length // inner)))),
        "BT": inner,
        "BN": min(wide, max(16, _triton.power_of_2(states))),
        "PRECISION": "tf32" if major >= 8 else "ieee",
        "GPU": gpu,
        # Where matrix products read shared memory, a warp has room for a larger share: more programs run side by side.
        "num_warps": 4 if major in (9, 10) else 8,
    }


def _steps(log_re: Tensor, log_im: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(turns of a step, the log2 of its size, what that leaves out), as the kernels take them."""
    turns = torch.empty(log_re.shape, dtype=torch.int64, device=log_re.device)
    high, low = (torch.empty(log_re.shape, dtype=torch.float32, device=log_re.device) for _ in range(2))
    count = log_re.numel()
    _triton.kernels("ssm_kernel").vandermonde_states[(-(-count // 256),)](
        log_re, log_im, turns, high, low, count, BLOCK=256
    )
    return turns, high, low


def vandermonde_forward(log_re: Tensor, log_im: Tensor, w_re: Tensor, w_im: Tensor, length: int) -> Tensor:
    """See `products`."""
    channels, states = log_re.shape
    kernel = w_re.new_empty(channels, length)
    options = _tile(length, states, 128, 16, w_re)
    tiles = -(-length // (options["BA"] * options["BT"]))
    with _triton.on_device_of(w_re):
        _triton.kernels("ssm_kernel").vandermonde_forward[(channels * tiles,)](
            *(*_steps(log_re, log_im), w_re, w_im, kernel, states, length, tiles), **options, num_stages=1
        )
    return kernel


def vandermonde_backward(log_re: Tensor, log_im: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `products`."""
    (channels, states), length = log_re.shape, g.shape[1]
    options = _tile(length, states, 256, 32, g)
    tiles = -(-length // (options["BA"] * options["BT"]))
    blocks = -(-states // options["BN"])
    shares = [g.new_empty(tiles, channels, states) for _ in range(4)]
    with _triton.on_device_of(g):
        _triton.kernels("ssm_kernel").vandermonde_backward[(channels * blocks * tiles,)](
            *(*_steps(log_re, log_im), g, *shares, states, length, tiles, blocks, channels * states),
            **options,
            BB=16,
            num_stages=2,
        )
    plain_re, plain_im, moved_re, moved_im = (_added(share) for share in shares)
    return plain_re, plain_im, moved_re, moved_im


def _added(shares: Tensor) -> Tensor:
    """The sum over the first dimension, always in the same order; in a rehearsal, which has made none, the shares."""
    if _triton.rehearsing():
        return shares
    return shares.sum(0) if shares.shape[0] > 1 else shares.squeeze(0)


def cauchy_forward(
    lam_re: Tensor, lam_im: Tensor, v_re: Tensor, v_im: Tensor, y: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """See `products`."""
    (channels, sums, states), points = v_re.shape, y.shape[0]
    out_re, out_im = (v_re.new_empty(channels, sums, points) for _ in range(2))
    several = min(_SUMS, _triton.power_of_2(sums))
    groups = -(-sums // several)
    # A thread has up to eight points, as far as its accumulators leave room.
    piece = min(128 * min(8, 32 // several), max(128, _triton.power_of_2(points)))
    tiles = -(-points // piece)
    with _triton.on_device_of(y):
        _triton.kernels("ssm_kernel").cauchy_forward[(channels * groups * tiles,)](
            *(lam_re, lam_im, v_re, v_im, y, c, out_re, out_im, states, sums, points, tiles, groups),
            BK=piece,
            BS=several,
            GPU=_triton.hardware(y),
            num_warps=4,
        )
    return out_re, out_im


def cauchy_backward(
    lam_re: Tensor, lam_im: Tensor, v_re: Tensor, v_im: Tensor, y: Tensor, c: Tensor, g_re: Tensor, g_im: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `products`."""
    (channels, sums, states), points = v_re.shape, y.shape[0]
    several, wide = min(_SUMS, _triton.power_of_2(sums)), min(32, _triton.power_of_2(states))
    groups, blocks = -(-sums // several), -(-states // wide)
    piece = min(32, 128 // several)
    splits = -(-points // _POINTS)
    reach = -(-points // (splits * piece)) * piece
    splits = -(-points // reach)
    dlam = [v_re.new_empty(splits * groups, channels, states) for _ in range(2)]
    dv = [v_re.new_empty(splits, channels, sums, states) for _ in range(2)]
    with _triton.on_device_of(y):
        _triton.kernels("ssm_kernel").cauchy_backward[(channels * blocks * groups * splits,)](
            *(lam_re, lam_im, v_re, v_im, y, c, g_re, g_im, *dlam, *dv),
            *(states, sums, points, channels * states, splits, reach, groups, blocks),
            BK=piece,
            BN=wide,
            BS=several,
            GPU=_triton.hardware(y),
            num_warps=4,
        )
    dlam_re, dlam_im, dv_re, dv_im = (_added(share) for share in (*dlam, *dv))
    return dlam_re, dlam_im, dv_re, dv_im


def _rehearse_vandermonde(like: Tensor, length: int) -> None:
    log = torch.empty(like.shape, dtype=torch.float64, device=like.device)
    vandermonde_backward(log, log, torch.empty(like.shape[0], length, dtype=torch.float32, device=like.device))


def _rehearse_cauchy(like: Tensor, sums: int, points: int) -> None:
    channels, states = like.shape

    def real(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    lam, v, y, g = real(channels, states), real(channels, sums, states), real(points), real(channels, sums, points)
    cauchy_backward(lam, lam, v, v, y, y, g, g)


def make_vandermonde_ready(inputs: Sequence[Tensor], length: int) -> None:
    """Makes the kernels of the backward pass that may follow, where one may.

    Args:
        inputs: tensors of a call, the first ``(d_model, states)``.
        length: number of lags.
    """
    if wants_gradients(*inputs):
        _triton.make_ready(_rehearse_vandermonde, inputs[0], length)


def make_cauchy_ready(inputs: Sequence[Tensor], sums: int, frequencies: int, piece: int) -> None:
    """The same for the Cauchy products of a call, with so many frequencies in pieces of so many."""
    if wants_gradients(*inputs):
        for points in {min(piece, frequencies), frequencies % piece or min(piece, frequencies)}:
            _triton.make_ready(_rehearse_cauchy, inputs[0], sums, points)


products.register("triton", ("CPU", "CUDA", "XPU"), sys.modules[__name__])
