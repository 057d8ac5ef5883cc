"""What `selective_scan` takes: shapes, dtypes, devices, and the dtypes its backends are handed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statescan.errors import ShapeError
from statescan.ops._checks import (
    ACTIVATION_DTYPES,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_parameters,
    check_projection,
    check_shape,
    check_state,
    check_tensor,
    state_dtypes,
)

__all__ = ["ScanArguments", "settle", "validate"]


class ScanArguments(NamedTuple):
    """The tensors as a backend gets them: B and C with four dimensions or two, parameters in the state's dtype."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None


def validate(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises a ShapeError or DTypeError with one line unless `selective_scan` can take these arguments."""
    op = "selective_scan"
    check_tensor(op, "u", u)
    check_dtype(op, "u", u, ACTIVATION_DTYPES)
    if u.dim() != 3 or u.shape[0] < 1 or u.shape[1] < 1 or u.shape[2] < 1:
        raise ShapeError(
            f"{op}: u must have shape (batch, length, d_inner), each at least 1, got {tuple(u.shape)}; "
            "add the missing dimension with unsqueeze, or leave the call out where there is nothing to scan"
        )
    batch, length, d_inner = u.shape
    for name, value in (("dt", dt), ("z", z)):
        if name == "dt" or value is not None:
            check_tensor(op, name, value)
            assert value is not None
            check_shape(op, name, value, (batch, length, d_inner), "(batch, length, d_inner)", "give it u's shape")
            check_dtype(op, name, value, (u.dtype,), "the dtype of u")
            check_device(op, name, value, u, "u")
    check_parameters(op, u, A, D, dt_bias)
    check_projection(op, "B", B, u, A, (batch, length))
    check_projection(op, "C", C, u, A, (batch, length))
    rows, meaning = batch, "batch"
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, batch, length)
        rows, meaning = cu_seqlens.shape[0] - 1, "sequences"
    if initial_state is not None:
        check_state(op, "initial_state", initial_state, u, A, rows, meaning)


def _settle_projection(value: Tensor, real: torch.dtype, state: torch.dtype) -> Tensor:
    if value.dim() == 2:
        return value.to(state if value.is_complex() else real)
    return value.unsqueeze(2) if value.dim() == 3 else value


def settle(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> ScanArguments:
    """Brings validated arguments into the one form that backends take, differentiably.

    A, D, dt_bias and fixed B and C come out in the state's dtype; per-position B and C as (batch, length, groups,
    d_state); cu_seqlens as int32 on u's device.
    """
    real, state = state_dtypes(u.dtype, A.is_complex())
    return ScanArguments(
        u,
        dt,
        A.to(state),
        _settle_projection(B, real, state),
        _settle_projection(C, real, state),
        None if D is None else D.to(real),
        z,
        None if dt_bias is None else dt_bias.to(real),
        initial_state,
        None if cu_seqlens is None else cu_seqlens.to(device=u.device, dtype=torch.int32),
    )
