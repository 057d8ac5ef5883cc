"""Problems for the selective scan: every shape, option and range of values that a backend is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["COMPLEX_CASES", "REAL_CASES", "SCAN_CASES", "ScanCase", "as_update", "scan_problem"]


@dataclass(frozen=True, slots=True)
class ScanCase:
    """One problem of the selective scan, without its values.

    Args:
        batch, length, d_inner, d_state: sizes.
        B, C: number of groups per position, 0 for the form without groups, or "fixed".
        D, z, dt_bias, initial_state: whether the option is given.
        dt_softplus: the option's value.
        cu_seqlens: boundaries of packed sequences, or None.
        complex_A: A is complex; then B and C are complex too where `complex_BC`.
        step: scale of the step sizes; a model's usual ones lie between 1e-3 and 1e-1.
        rate: scale of -A.
    """

    batch: int = 2
    length: int = 19
    d_inner: int = 37
    d_state: int = 3
    B: int | str = 0
    C: int | str = 0
    D: bool = False
    z: bool = False
    dt_bias: bool = False
    initial_state: bool = False
    dt_softplus: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    complex_A: bool = False
    complex_BC: bool = False
    step: float = 0.1
    rate: float = 1.0

    def draws(self, length: int | None = None) -> int:
        """How many random draws give the smallest output or gradient 32 numbers, for `assert_within_budget`."""
        smallest = min(self.d_inner, self.batch * (length or self.length) * self.d_state)
        return -(-32 // smallest)


_ALL: dict[str, Any] = {"D": True, "z": True, "dt_bias": True, "initial_state": True, "dt_softplus": True}

REAL_CASES: dict[str, ScanCase] = {
    "smallest": ScanCase(batch=1, length=1, d_inner=1, d_state=1),
    "no options": ScanCase(),
    "every option": ScanCase(d_inner=17, d_state=16, length=33, **_ALL),
    "one step": ScanCase(length=1, d_inner=16, d_state=16, **_ALL),
    "two steps": ScanCase(length=2, d_inner=3, d_state=2, **_ALL),
    "D alone": ScanCase(D=True),
    "z alone": ScanCase(z=True),
    "dt_bias alone": ScanCase(dt_bias=True),
    "dt_softplus alone": ScanCase(dt_softplus=True),
    "initial_state alone": ScanCase(initial_state=True),
    "d_state 1": ScanCase(d_state=1, d_inner=37, **_ALL),
    "d_state 5": ScanCase(d_state=5, d_inner=16, **_ALL),
    "d_state 37": ScanCase(d_state=37, d_inner=3, length=11, **_ALL),
    "d_state 64": ScanCase(d_state=64, d_inner=4, length=9, **_ALL),
    "wide": ScanCase(d_inner=83, d_state=4, length=7, **_ALL),
    "groups": ScanCase(d_inner=12, B=3, C=3, **_ALL),
    "different groups": ScanCase(d_inner=12, B=2, C=4, **_ALL),
    "a group a channel": ScanCase(d_inner=6, B=6, C=1, **_ALL),
    "fixed B": ScanCase(d_inner=18, B="fixed", **_ALL),
    "fixed C": ScanCase(d_inner=18, C="fixed", **_ALL),
    "fixed B and C": ScanCase(d_inner=18, d_state=16, B="fixed", C="fixed", **_ALL),
    "prime length": ScanCase(batch=1, length=131, d_inner=19, d_state=2, **_ALL),
    "packed": ScanCase(batch=1, length=41, d_inner=17, cu_seqlens=(0, 7, 8, 30, 41), **_ALL),
    "packed, empty ones": ScanCase(batch=1, length=23, cu_seqlens=(0, 0, 5, 5, 5, 6, 23, 23), **_ALL),
    "packed, no state": ScanCase(batch=1, length=23, cu_seqlens=(0, 0, 9, 23)),
    "packed, one": ScanCase(batch=1, length=9, cu_seqlens=(0, 9), **_ALL),
    "packed, groups": ScanCase(batch=1, length=20, d_inner=8, B=2, C="fixed", cu_seqlens=(0, 3, 20), **_ALL),
    "packed, single steps": ScanCase(batch=1, length=5, cu_seqlens=(0, 1, 2, 3, 4, 5), **_ALL),
    "large steps": ScanCase(step=30.0, **_ALL),
    "huge steps, underflow": ScanCase(step=3000.0, rate=10.0, **_ALL),
    "tiny steps": ScanCase(step=1e-6, length=40, **_ALL),
    "fast decay": ScanCase(rate=300.0, d_state=16, **_ALL),
    "no decay": ScanCase(rate=0.0, **_ALL),
}

COMPLEX_CASES: dict[str, ScanCase] = {
    "complex A": ScanCase(complex_A=True),
    "complex A, every option": ScanCase(complex_A=True, **_ALL),
    "complex A, B, C": ScanCase(complex_A=True, complex_BC=True, **_ALL),
    "complex, groups": ScanCase(d_inner=6, complex_A=True, complex_BC=True, B=2, C=3, **_ALL),
    "complex, fixed": ScanCase(complex_A=True, complex_BC=True, B="fixed", C="fixed", **_ALL),
    "complex A, fixed real C": ScanCase(complex_A=True, C="fixed", **_ALL),
    "complex, packed": ScanCase(
        batch=1, length=21, complex_A=True, complex_BC=True, cu_seqlens=(0, 0, 4, 20, 21), **_ALL
    ),
}
SCAN_CASES: dict[str, ScanCase] = {**REAL_CASES, **COMPLEX_CASES}


def scan_problem(
    case: ScanCase, dtype: torch.dtype, *, seed: int = 0, device: str = "cpu", parameters: torch.dtype | None = None
) -> dict[str, Any]:
    """The keyword arguments of `selective_scan` for a case.

    Args:
        case: the problem.
        dtype: dtype of u, dt, z and of B and C per position.
        seed: seeds the values.
        device: where the tensors go.
        parameters: dtype of A, D, dt_bias and fixed B and C. Default: the state's dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    state = (torch.complex128 if real == torch.float64 else torch.complex64) if case.complex_A else real
    parameters = parameters or real
    b, l, d, n = case.batch, case.length, case.d_inner, case.d_state

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    step = case.step * (0.1 + uniform(b, l, d))
    bias = 0.3 * normal(d) * min(case.step, 1.0)
    if case.dt_bias and not case.dt_softplus:
        bias = bias.abs()
    if case.dt_softplus:
        step = step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    A = -case.rate * (0.2 + uniform(d, n) * torch.arange(1, n + 1))
    if case.complex_A:
        A = torch.complex(A, 3 * normal(d, n))

    def projection(form: int | str) -> Tensor:
        shape = {"fixed": (d, n), 0: (b, l, n)}.get(form) or (b, l, int(form), n)
        value = normal(*shape)
        if case.complex_BC:
            return torch.complex(value, normal(*shape)).to(state)
        return value.to(parameters if form == "fixed" else dtype)

    rows = b if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    initial = torch.complex(normal(rows, d, n), normal(rows, d, n)) if case.complex_A else normal(rows, d, n)
    problem: dict[str, Any] = {
        "u": normal(b, l, d).to(dtype),
        "dt": step.to(dtype),
        "A": A.to(state if case.complex_A else parameters),
        "B": projection(case.B),
        "C": projection(case.C),
        "D": normal(d).to(parameters) if case.D else None,
        "z": normal(b, l, d).to(dtype) if case.z else None,
        "dt_bias": bias.to(parameters) if case.dt_bias else None,
        "dt_softplus": case.dt_softplus,
        "initial_state": initial.to(state) if case.initial_state else None,
        "cu_seqlens": None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, dtype=torch.int32),
    }
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in problem.items()}


def as_update(problem: dict[str, Any], t: int = 0) -> dict[str, Any]:
    """The keyword arguments of `selective_state_update` for position `t` of a scan's problem that has no cu_seqlens."""
    u, A = problem["u"], problem["A"]
    state = problem["initial_state"]
    if state is None:
        real = torch.float64 if u.dtype == torch.float64 else torch.float32
        dtype = (torch.complex128 if real == torch.float64 else torch.complex64) if A.is_complex() else real
        state = torch.zeros(u.shape[0], *A.shape, dtype=dtype, device=u.device)

    def here(value: Tensor | None, fixed: bool = False) -> Tensor | None:
        return value if value is None or fixed else value[:, t]

    return {
        "state": state,
        "u": here(u),
        "dt": here(problem["dt"]),
        "A": A,
        "B": here(problem["B"], problem["B"].dim() == 2),
        "C": here(problem["C"], problem["C"].dim() == 2),
        "D": problem["D"],
        "z": here(problem["z"]),
        "dt_bias": problem["dt_bias"],
        "dt_softplus": problem["dt_softplus"],
    }
