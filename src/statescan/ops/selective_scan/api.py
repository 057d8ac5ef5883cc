"""`selective_scan`: validate, choose the backend, call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from statescan.ops._checks import transforms_active, without_autocast
from statescan.ops._dispatch import Facts, attempt
from statescan.ops.selective_scan.validation import settle, validate

__all__ = ["ScanOutput", "selective_scan"]


class ScanOutput(NamedTuple):
    """What `selective_scan` returns: y (batch, length, d_inner) in u's dtype; the final state, or None."""

    y: Tensor
    final_state: Tensor | None


def selective_scan(
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
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> ScanOutput:
    """Runs the selective state space recurrence over a batch of sequences.

    For every channel, with a state of d_state numbers::

        dt_t = softplus(dt_t + dt_bias)             (each part only where asked for)
        h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t
        y_t  = (C_t . h_t + D u_t) * silu(z_t)      (complex A: 2 Re(C_t . h_t))

    Args:
        u: input, (batch, length, d_inner); float64, float32, bfloat16 or float16.
        dt: step sizes, shape and dtype of u.
        A: (d_inner, d_state), any float dtype or complex; real parts are negative in a stable model.
        B: (batch, length, d_state); (batch, length, groups, d_state) where groups divides d_inner and each group serves
            d_inner / groups neighbouring channels; or (d_inner, d_state), the same at every position. In u's dtype, the
            last form in any float dtype; with complex A also complex.
        C: as B.
        D: the skip connection's weight, (d_inner,), any float dtype. Default: none.
        z: the gate before its SiLU, shape and dtype of u. Default: none.
        dt_bias: added to dt in the state's precision, (d_inner,), any float dtype. Default: none.
        dt_softplus: pass dt + dt_bias through softplus, log(1 + exp(x)), and x itself beyond 20. Default: False.
        initial_state: the state before the first position, (batch, d_inner, d_state), with cu_seqlens (sequences,
            d_inner, d_state), in the state's dtype. Default: zeros.
        cu_seqlens: boundaries of sequences packed one after the other, int32 or int64, (sequences + 1,), from 0 to the
            length; the batch is 1; a sequence may be empty. Nothing passes from one to the next. Default: none.
        return_final_state: also return the state after the last position (of each sequence). Default: False.
        batch_invariant: give a row's own results (its outputs, its final state, and the gradients of its u, dt, z and
            initial state, and of its B and C by position) the same bits whatever other rows the batch holds. ``"cpu"``
            does so always. On ``"cuda"`` it fixes the partition of time by the length alone, which costs speed where
            that is not the best one (docs/performance.md). The other backends refuse it: PyTorch's last bits depend on
            where in the batch a number stands. Gradients of what all rows share are sums over them. Default: False.
        backend: ``"auto"``, or ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"``, ``"reference"``; `statescan.explain`
            tells what "auto" takes, and given sizes, how it cuts the call.

    Returns:
        `ScanOutput` (y, final_state). y has u's shape and dtype. final_state is None unless asked for, else as
        initial_state; an empty sequence's final state is its initial one. Both carry gradients to every float input.

    Raises:
        ShapeError: a shape, a device, or a value of cu_seqlens is wrong.
        DTypeError: a dtype is wrong.
        BackendUnavailableError: the named backend can't run this call.

    Numerics: everything is computed in float32 (float64 for float64 inputs; complex64 and complex128 for complex A) and
    rounded to u's dtype once. Autocast changes nothing inside.

    Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, equations 2a and 2b with
    algorithm 2. As in its published code B is discretized by dt_t B_t (Euler) where A's is zero-order hold, and for
    complex A the output is twice the real part. Layout differs: batch, length, features.
    """
    validate(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    facts = Facts(u.device.type, u.dtype, A.is_complex(), A.shape[1], 0, batch_invariant, transforms_active())
    with without_autocast(u.device.type):
        tensors = settle(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)

        def run(name: str) -> tuple[Tensor, Tensor | None]:
            arguments = (*tensors[:8], dt_softplus, *tensors[8:], return_final_state)
            if name == "cpu":
                from statescan.ops.selective_scan.cpu import selective_scan as scan
            elif name == "cuda":
                from statescan.ops.selective_scan.cuda import selective_scan as scan

                return scan(*arguments, batch_invariant)
            elif name == "triton":
                from statescan.ops.selective_scan.triton_scan import selective_scan as scan
            elif name == "torch":
                from statescan.ops.selective_scan.torch_scan import selective_scan as scan
            else:
                from statescan.ops.selective_scan.reference import selective_scan as scan
            return scan(*arguments)

        y, final_state = attempt("selective_scan", backend, facts, run)
    return ScanOutput(y, final_state)
