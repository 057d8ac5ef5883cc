"""The operators for lengths that are symbols: their fakes, their gradients, and that they are the calls themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statescan.ops import fft_conv, s4_kernel, s4_response, s4d_kernel, s4d_response
from statescan.ops.fft_conv import any_length as _conv  # noqa: F401, registers
from statescan.ops.ssm_kernel import any_length as _kernels  # noqa: F401, registers

D, N = 3, 2


def _system(real: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A, P, B, C, dt in double precision."""
    draw = torch.Generator().manual_seed(0)
    P, B, C = (torch.randn(D, N, dtype=torch.complex128, generator=draw) for _ in range(3))
    A = torch.complex(
        -torch.rand(D, N, dtype=torch.float64, generator=draw), torch.randn(D, N, dtype=torch.float64, generator=draw)
    )
    if real:
        A, P, B, C = (part.real.contiguous() for part in (A, P, B, C))
    return A, P, B, C, torch.rand(D, dtype=torch.float64, generator=draw) / 10 + 0.01


def _run(length: int, real: bool = False) -> tuple[Tensor, Tensor]:
    """u and a state."""
    draw = torch.Generator().manual_seed(1)
    dtype = torch.float64 if real else torch.complex128
    u = torch.randn(2, length, D, dtype=torch.float64, generator=draw)
    return u, torch.randn(2, D, N, dtype=dtype, generator=draw)


def _cases() -> dict[str, tuple]:
    A, P, B, C, dt = _system()
    rA, _, rB, rC, _ = _system(real=True)
    (u, state), (_, real_state) = _run(11), _run(11, real=True)
    kernel, ahead, skip = torch.randn(D, 11).double(), torch.randn(D, 11).double(), torch.randn(D).double()
    ops = torch.ops.statescan
    return {
        "s4d_kernel": (ops.s4d_kernel, (A, B, C, dt, 11, "zoh", "torch"), s4d_kernel(A, B, C, dt, 11)),
        "s4d_kernel, real": (ops.s4d_kernel, (rA, rB, rC, dt, 11, "zoh", "torch"), s4d_kernel(rA, rB, rC, dt, 11)),
        "s4_kernel": (
            ops.s4_kernel, (A, P.unsqueeze(-1), B, C, dt, 11, "bilinear", "torch"), s4_kernel(A, P, B, C, dt, 11)
        ),
        "s4d_response": (
            ops.s4d_response, (A, B, C, dt, u, state, "zoh"), s4d_response(A, B, C, dt, u, state)
        ),
        "s4d_response, real": (
            ops.s4d_response, (rA, rB, rC, dt, u, real_state, "zoh"), s4d_response(rA, rB, rC, dt, u, real_state)
        ),
        "s4_response": (
            ops.s4_response,
            (A, P.unsqueeze(-1), B, C, dt, u, state, "bilinear"),
            s4_response(A, P, B, C, dt, u, state),
        ),
        "fft_conv": (ops.fft_conv, (u, kernel, None, None, "torch"), fft_conv(u, kernel)),
        "fft_conv, all": (
            ops.fft_conv, (u, kernel, ahead, skip, "torch"), fft_conv(u, kernel, reverse_kernel=ahead, D=skip)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", _cases())
def test_an_operator_is_the_call(name: str) -> None:
    operator, arguments, wanted = _cases()[name]
    got = operator(*arguments)
    for a, b in zip(*(((x,) if isinstance(x, Tensor) else x) for x in (got, wanted)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
    torch.library.opcheck(operator.default, tuple(leaves))  # schema, fakes, autograd, dynamic shapes
    tensors = [x for x in leaves if isinstance(x, Tensor)]

    def run(*values: Tensor) -> Tensor | tuple[Tensor, ...]:
        left = iter(values)
        return operator(*(next(left) if isinstance(x, Tensor) else x for x in leaves))

    assert torch.autograd.gradcheck(run, tensors)
