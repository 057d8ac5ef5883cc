"""`selective_state_update`: validate, choose the backend, call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from statescan.ops._checks import transformed, without_autocast
from statescan.ops._dispatch import Facts, attempt
from statescan.ops.selective_state_update.validation import settle, validate

__all__ = ["StateUpdateOutput", "selective_state_update"]


class StateUpdateOutput(NamedTuple):
    """What `selective_state_update` returns: y (batch, d_inner) in u's dtype; the new state."""

    y: Tensor
    state: Tensor


def selective_state_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> StateUpdateOutput:
    """Takes the selective scan one position further: what a model does for each token that it writes.

    For every channel, with a state of d_state numbers::

        dt = softplus(dt + dt_bias)               (each part only where asked for)
        h' = exp(dt A) h + dt B u
        y  = (C . h' + D u) * silu(z)             (complex A: 2 Re(C . h'))

    Args:
        state: h, (batch, d_inner, d_state), in the state's dtype: float32, float64 for float64 inputs, complex64 or
            complex128 where A is complex.
        u: input, (batch, d_inner); float64, float32, bfloat16 or float16.
        dt: step sizes, shape and dtype of u.
        A: (d_inner, d_state), any float dtype or complex.
        B: (batch, d_state) or (batch, groups, d_state) in u's dtype; or (d_inner, d_state), the same for every row, in
            any float dtype; with complex A also complex. Where batch equals d_inner, two dimensions are read as
            (batch, d_state): pass the fixed form as ``B.expand(batch, d_inner, d_state)``.
        C: as B.
        D: the skip connection's weight, (d_inner,), any float dtype. Default: none.
        z: the gate before its SiLU, shape and dtype of u. Default: none.
        dt_bias: added to dt in the state's precision, (d_inner,), any float dtype. Default: none.
        dt_softplus: pass dt + dt_bias through softplus, log(1 + exp(x)), and x itself beyond 20. Default: False.
        inplace: write the new state over `state` and return that very tensor; not differentiable. Default: False.
        backend: ``"auto"``, or ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"``, ``"reference"``; `statescan.explain`
            tells what "auto" takes.

    Returns:
        `StateUpdateOutput` (y, state): y as u; the new state, `state` itself with inplace=True. Without inplace both
        carry gradients to every float input.

    Raises:
        ShapeError: a shape or device is wrong.
        DTypeError: a dtype is wrong.
        ConfigError: inplace=True where a gradient is asked for.
        BackendUnavailableError: the named backend can't run this call.

    Numerics: as `selective_scan`, whose single step this is.

    Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, equation 2a.
    """
    validate(state, u, dt, A, B, C, D, z, dt_bias, inplace)
    by_transform = transformed(state, u, dt, A, B, C, D, z, dt_bias)
    facts = Facts(u.device.type, u.dtype, A.is_complex(), A.shape[1], transformed=by_transform)
    with without_autocast(u.device.type):
        tensors = settle(u, dt, A, B, C, D, z, dt_bias)

        def run(name: str) -> tuple[Tensor, Tensor]:
            if name == "cpu":
                from statescan.ops.selective_state_update.cpu import selective_state_update as update
            elif name == "triton":
                from statescan.ops.selective_state_update.triton_update import selective_state_update as update
            elif name == "cuda":
                from statescan.ops.selective_state_update.cuda import selective_state_update as update
            elif name == "torch":
                from statescan.ops.selective_state_update.torch_update import selective_state_update as update
            else:
                from statescan.ops.selective_state_update.reference import selective_state_update as update
            return update(state, *tensors, dt_softplus, inplace)

        y, new_state = attempt("selective_state_update", backend, facts, run)
    return StateUpdateOutput(y, new_state)
