"""What `selective_state_update` takes: shapes, dtypes, devices, and the dtypes its backends are handed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statescan.errors import ConfigError, ShapeError
from statescan.ops._checks import (
    ACTIVATION_DTYPES,
    check_device,
    check_dtype,
    check_parameters,
    check_projection,
    check_shape,
    check_state,
    check_tensor,
    state_dtypes,
)

__all__ = ["UpdateArguments", "settle", "validate"]


class UpdateArguments(NamedTuple):
    """The tensors as a backend gets them: B, C (batch, groups, d_state) or fixed, parameters in the state's dtype."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None


def validate(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    inplace: bool,
) -> None:
    """Raises one line that says what is wrong unless `selective_state_update` can take these arguments."""
    op = "selective_state_update"
    check_tensor(op, "u", u)
    check_dtype(op, "u", u, ACTIVATION_DTYPES)
    if u.dim() != 2 or u.shape[0] < 1 or u.shape[1] < 1:
        raise ShapeError(
            f"{op}: u must have shape (batch, d_inner), each at least 1, got {tuple(u.shape)}; "
            "pass one position, u[:, t], or call selective_scan for several"
        )
    batch, d_inner = u.shape
    for name, value in (("dt", dt), ("z", z)):
        if name == "dt" or value is not None:
            check_tensor(op, name, value)
            assert value is not None
            check_shape(op, name, value, (batch, d_inner), "(batch, d_inner)", "give it u's shape")
            check_dtype(op, name, value, (u.dtype,), "the dtype of u")
            check_device(op, name, value, u, "u")
    check_parameters(op, u, A, D, dt_bias)
    check_projection(op, "B", B, u, A, (batch,))
    check_projection(op, "C", C, u, A, (batch,))
    check_state(op, "state", state, u, A, batch, "batch")
    if inplace and torch.is_grad_enabled():
        named = {"state": state, "u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
        for name, value in named.items():
            if value is not None and value.requires_grad:
                raise ConfigError(
                    f"{op}: inplace=True is not differentiable: wanted no argument that requires a gradient, "
                    f"got {name} with requires_grad; call it under torch.no_grad(), or pass inplace=False"
                )


def settle(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> UpdateArguments:
    """Brings validated arguments into the one form that backends take, differentiably.

    A, D, dt_bias and fixed B and C (d_inner, d_state) come out in the state's dtype; B and C of this position as
    (batch, groups, d_state), where they were (batch, d_state) with one group.
    """
    real, state = state_dtypes(u.dtype, A.is_complex())

    def projection(value: Tensor) -> Tensor:
        if value.dim() == 3:
            return value
        if value.shape[0] == u.shape[0]:
            return value.unsqueeze(1)
        return value.to(state if value.is_complex() else real)

    return UpdateArguments(
        u,
        dt,
        A.to(state),
        projection(B),
        projection(C),
        None if D is None else D.to(real),
        z,
        None if dt_bias is None else dt_bias.to(real),
    )
