"""Public functions of the causal depthwise convolution."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from statescan.ops._checks import transformed
from statescan.ops._dispatch import Facts, attempt
from statescan.ops.causal_conv1d.validation import check_conv, check_update

__all__ = ["ConvOutput", "ConvUpdateOutput", "causal_conv1d", "causal_conv1d_update"]


class ConvOutput(NamedTuple):
    """Result of `causal_conv1d`: the outputs, and the last width-1 inputs if they were asked for."""

    y: Tensor
    final_state: Tensor | None


class ConvUpdateOutput(NamedTuple):
    """Result of `causal_conv1d_update`: one output, and the last width-1 inputs after it."""

    y: Tensor
    state: Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> ConvOutput:
    """Convolves each channel with its own short filter that looks only back in time.

    Recurrence, with width = weight.shape[1]::

        y[t] = act(bias + sum_k weight[:, k] * x[t - (width-1) + k]),   k = 0 .. width-1

    where x before the first position comes from `initial_state`, or is zero.

    Args:
        x: (batch, length, d); float64, float32, bfloat16 or float16. Any strides; no copy is made where the last axis
            is contiguous (half of a projection's output, for instance).
        weight: (d, width), width >= 1, any float dtype; the last tap multiplies the present input.
        bias: (d,), any float dtype. Default: none.
        activation: None or ``"silu"``.
        initial_state: (batch, width-1, d), with `cu_seqlens` (sequences, width-1, d), in the dtype of x: the inputs
            before the first position, oldest first. Default: zeros.
        cu_seqlens: (sequences + 1,) int32 (or int64), the offsets from 0 to the length of packed sequences; batch
            must be 1. Sequences see nothing of each other; a length of 0 is allowed. Default: each row of the batch is
            one sequence.
        return_final_state: give the state after the last position too.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"reference"``; see
            `statescan.explain`.

    Returns:
        ConvOutput(y, final_state): y is (batch, length, d) in the dtype of x; final_state is shaped as `initial_state`
        (None unless `return_final_state`), and continues the sequence when given as the next call's `initial_state`.
        Gradients flow into x, weight, bias and initial_state, out of both results.

    Raises:
        ShapeError: a shape, device or `cu_seqlens` does not fit.
        DTypeError: a dtype is not taken.
        ConfigError: an unknown activation or backend.
        BackendUnavailableError: the named backend can't run this call.

    Numerics: sums and the activation are taken in float32 (float64 for float64), and rounded once to the dtype of x.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), figure 3 and section
    3.4, the convolution before the SSM. Differs from a torch Conv1d with padding in its layout (channels last) and in
    that its state can be carried.
    """
    check_conv(x, weight, bias, activation, initial_state, cu_seqlens)
    by_transform = transformed(x, weight, bias, initial_state)
    facts = Facts(x.device.type, x.dtype, width=weight.shape[1], transformed=by_transform)

    def run(name: str) -> tuple[Tensor, Tensor | None]:
        arguments = (x, weight, bias, activation == "silu", initial_state, cu_seqlens)
        if name == "cpu":
            from statescan.ops.causal_conv1d.cpu import causal_conv1d as conv
        elif name == "triton":
            from statescan.ops.causal_conv1d.triton_conv import causal_conv1d as conv

            return conv(*arguments, return_final_state)
        elif name == "torch":
            from statescan.ops.causal_conv1d.torch_conv import causal_conv1d as conv
        elif name == "cuda":
            from statescan.ops.causal_conv1d.cuda import causal_conv1d as conv

            return conv(*arguments, return_final_state)
        else:
            from statescan.ops.causal_conv1d.reference import causal_conv1d as conv
        return conv(*arguments)

    y, final_state = attempt("causal_conv1d", backend, facts, run)
    return ConvOutput(y, final_state if return_final_state else None)


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> ConvUpdateOutput:
    """Takes one more input into the causal convolution and gives the output at that position.

    Recurrence: y = act(bias + sum_k weight[:, k] * window[k]), window = (state, x) in order of time, and the new state
    is the window without its oldest input.

    Args:
        x: (batch, d); float64, float32, bfloat16 or float16.
        state: (batch, width-1, d) in the dtype of x, the inputs before x, oldest first.
        weight: (d, width), any float dtype.
        bias: (d,), any float dtype. Default: none.
        activation: None or ``"silu"``.
        inplace: write the new state into `state` and return that same tensor; gives no gradients. Default: a new one.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ConvUpdateOutput(y, state): y (batch, d) in the dtype of x, and the state after this input.

    Raises:
        ShapeError: a shape or device does not fit.
        DTypeError: a dtype is not taken.
        ConfigError: an unknown activation or backend, or `inplace` where a gradient is wanted.
        BackendUnavailableError: the named backend can't run this call.

    Source: as `causal_conv1d`, of which this is the case of length 1.
    """
    check_update(x, state, weight, bias, activation, inplace)
    by_transform = transformed(x, state, weight, bias)
    facts = Facts(x.device.type, x.dtype, width=weight.shape[1], transformed=by_transform)

    def run(name: str) -> tuple[Tensor, Tensor]:
        if name == "cpu":
            from statescan.ops.causal_conv1d.cpu import causal_conv1d_update as update
        elif name == "triton":
            from statescan.ops.causal_conv1d.triton_conv import causal_conv1d_update as update
        elif name == "cuda":
            from statescan.ops.causal_conv1d.cuda import causal_conv1d_update as update
        elif name == "torch":
            from statescan.ops.causal_conv1d.torch_conv import causal_conv1d_update as update
        else:
            from statescan.ops.causal_conv1d.reference import causal_conv1d_update as update
        return update(x, state, weight, bias, activation == "silu", inplace)

    return ConvUpdateOutput(*attempt("causal_conv1d_update", backend, facts, run))
