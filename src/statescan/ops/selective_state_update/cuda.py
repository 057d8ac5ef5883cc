"""One step of the selective scan on NVIDIA GPUs: one kernel (update.cu), which reads and writes each state once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.ops import _cuda
from statescan.ops._checks import wants_gradients
from statescan.ops._cuda import i32
from statescan.ops._dispatch import Facts

__all__ = ["launch", "refuses", "selective_state_update"]

_SOURCE = Path(__file__).with_name("update.cu")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_THREADS = 128


def refuses(facts: Facts) -> str | None:
    """CUDA devices, real A, and as many states as the scan takes, which gives the gradients."""
    if facts.device != "cuda":
        return _cuda.elsewhere(facts.device)
    if facts.complex_A:
        return "its states are real, A is complex; use backend='torch'"
    if facts.d_state > 256:
        return f"its kernels take up to 256 states a channel, d_state is {facts.d_state}; use backend='torch'"
    if facts.dtype == torch.float64 and facts.d_state > 128:
        return (
            f"in float64 its kernels take up to 128 states a channel, d_state is {facts.d_state}; use backend='torch'"
        )
    return _cuda.unavailable_reason()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is contiguous (any strides before it), else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _in_fours(*tensors: Tensor) -> bool:
    """Whether four neighbouring numbers of each can be moved at once."""
    for tensor in tensors:
        if tensor.shape[-1] % 4 or tensor.data_ptr() % min(4 * tensor.element_size(), 16):
            return False
        if any(stride % 4 for stride in tensor.stride()[:-1]):
            return False
    return True


def launch(
    state: Tensor,
    new_state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Runs the kernel on the current stream, outside of autograd.

    Args:
        state: (batch, d_inner, d_state) float32 (float64 for float64), last axis contiguous or copied.
        new_state: where the new state is written, last axis contiguous; may be `state`.
        u, dt, z: (batch, d_inner) in one dtype, any stride between rows; z may be None.
        A: (d_inner, d_state) in the state's dtype.
        B, C: (batch, groups, d_state) in the dtype of u, or (d_inner, d_state) in the state's.
        D, dt_bias: (d_inner,) in the state's dtype, or None.
        dt_softplus: softplus of dt + dt_bias.
        out: where y is written: shape and dtype of u, last axis contiguous. Default: a new tensor.

    Returns:
        y, which is `out` where that was given.
    """
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device) if out is None else out
    batch, d_inner = u.shape
    d_state = A.shape[1]
    u, dt, B, C, A, state = (_dense(t) for t in (u, dt, B, C, A, state))
    z = None if z is None else _dense(z)
    fixed_B, fixed_C = (m.contiguous() if m.dim() == 2 else None for m in (B, C))
    D, dt_bias = (None if t is None else t.contiguous() for t in (D, dt_bias))
    lanes = max(1, min(32, 1 << math.ceil(math.log2(math.ceil(d_state / 4)))))
    macros = {
        "IN": _TYPES[u.dtype],
        "NST": d_state,
        "LANES": lanes,
        "VECS": int(_in_fours(state, new_state, A, B, C)),
        "FIXB": int(fixed_B is not None),
        "FIXC": int(fixed_C is not None),
        "HASZ": int(z is not None),
        "SOFTPLUS": int(dt_softplus),
    }

    def rows(matrix: Tensor, fixed: Tensor | None) -> tuple[Any, ...]:
        return (None, 0, 0) if fixed is not None else (matrix, matrix.stride(0), matrix.stride(1))

    def shared(matrix: Tensor) -> Any:
        return i32(1 if matrix.dim() == 2 else d_inner // matrix.shape[1])

    with torch.cuda.device(u.device):
        run = _cuda.kernel(_SOURCE, "state_update", macros, _THREADS, u.device.index or 0)
        run(
            (batch * math.ceil(d_inner / (_THREADS // lanes)), 1, 1),
            *(state, state.stride(0), state.stride(1), new_state, new_state.stride(0), new_state.stride(1)),
            *(u, u.stride(0), dt, dt.stride(0), z, 0 if z is None else z.stride(0)),
            *(*rows(B, fixed_B), *rows(C, fixed_C), A, A.stride(0), fixed_B, fixed_C, D, dt_bias),
            *(y, y.stride(0), i32(d_inner), shared(B), shared(C)),
        )
    return y


def _update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    new_state = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    return launch(state, new_state, u, dt, A, B, C, D, z, dt_bias, dt_softplus), new_state


def _update_inplace(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    if state.stride(-1) == 1:
        return launch(state, state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    y, new_state = _update(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    state.copy_(new_state)
    return y


_INPUTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus"
_LIBRARY = torch.library.Library("statescan", "FRAGMENT")
_LIBRARY.define(f"selective_state_update_cuda(Tensor state, {_INPUTS}) -> (Tensor, Tensor)")
_LIBRARY.define(f"selective_state_update_cuda_inplace(Tensor(a!) state, {_INPUTS}) -> Tensor")
_LIBRARY.impl("selective_state_update_cuda", _update, "CUDA")
_LIBRARY.impl("selective_state_update_cuda_inplace", _update_inplace, "CUDA")


@torch.library.register_fake("statescan::selective_state_update_cuda", lib=_LIBRARY)
def _(state: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty(
        state.shape, dtype=state.dtype, device=state.device
    )


@torch.library.register_fake("statescan::selective_state_update_cuda_inplace", lib=_LIBRARY)
def _(state: Tensor, u: Tensor, *rest: Any) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


def selective_state_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """`statescan.ops.selective_state_update` on a GPU, from settled arguments.

    Where a gradient is to come it is the scan's, over one position.
    """
    if inplace:
        rest = (u, dt, A, B, C, D, z, dt_bias, dt_softplus)
        return torch.ops.statescan.selective_state_update_cuda_inplace(state, *rest), state
    inputs = (state, u, dt, A, B, C, D, z, dt_bias)
    if wants_gradients(*inputs):
        from statescan.ops.selective_scan.cuda import selective_scan

        y, new_state = selective_scan(
            *(u.unsqueeze(1), dt.unsqueeze(1), A),
            *(B if B.dim() == 2 else B.unsqueeze(1), C if C.dim() == 2 else C.unsqueeze(1)),
            *(D, None if z is None else z.unsqueeze(1), dt_bias, dt_softplus, state, None, True),
        )
        assert new_state is not None
        return y.squeeze(1), new_state
    return torch.ops.statescan.selective_state_update_cuda(*inputs, dt_softplus)
