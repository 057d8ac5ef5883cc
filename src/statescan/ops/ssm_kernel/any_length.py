"""The public functions of this folder as operators for a length that is a symbol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statescan.ops import _any_length
from statescan.ops.ssm_kernel import api
from statescan.ops.ssm_kernel.real_form import kernel_dtype

__all__: list[str] = []


def _kernel_fake(A: Tensor, *arguments: Any) -> Tensor:
    return A.new_empty(A.shape[0], arguments[-3], dtype=kernel_dtype(A))


def _response_fake(A: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    u, state = arguments[-3:-1]
    wide = torch.complex128 if A.is_complex() else torch.float64
    return u.new_empty(u.shape, dtype=kernel_dtype(A)), state.new_empty(state.shape, dtype=wide)


def _kernel(function: Any) -> Any:
    def call(*arguments: Any) -> Tensor:
        *given, discretization, backend = arguments
        return function(*given, discretization=discretization, backend=backend)

    return call


def _response(function: Any) -> Any:
    def call(*arguments: Any) -> api.StateResponse:
        *given, discretization = arguments
        return function(*given, discretization=discretization)

    return call


for _name, _system in (("s4d", "Tensor A"), ("s4", "Tensor Lambda, Tensor P")):
    _system += ", Tensor B, Tensor C, Tensor dt"
    _count = _system.count(",") + 1
    _any_length.define(
        f"{_name}_kernel",
        f"({_system}, SymInt length, str discretization, str backend) -> Tensor",
        _count,
        _kernel(getattr(api, f"{_name}_kernel")),
        _kernel_fake,
    )
    _any_length.define(
        f"{_name}_response",
        f"({_system}, Tensor u, Tensor state, str discretization) -> (Tensor, Tensor)",
        _count + 2,
        _response(getattr(api, f"{_name}_response")),
        _response_fake,
    )
