"""The causal convolution in Triton: portable to the GPUs that Triton knows, interpreted on the CPU for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statescan.ops import _triton
from statescan.ops._checks import refuse_second_derivative, sequence_of, wants_gradients
from statescan.ops._dispatch import Facts

__all__ = ["causal_conv1d", "causal_conv1d_update", "refuses"]

_TIMES, _CHANNELS = 16, 128  # positions and channels of a tile


def refuses(facts: Facts) -> str | None:
    """Why Triton does not take this call, with the cure; None if it does."""
    return _triton.refusal(facts)


def _parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.float(), None if bias is None else bias.float().contiguous()


def _owners(cu_seqlens: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """(boundaries, the sequence of every position)."""
    if cu_seqlens is None:
        return None, None
    cu = cu_seqlens.to(torch.int32).contiguous()
    return cu, sequence_of(cu, length).int()


def _strides(state: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if state is None else state.stride()


def _tiles(x: Tensor) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """(grid, the sizes that kernels over tiles take)."""
    times, blocks = -(-x.shape[1] // _TIMES), -(-x.shape[2] // _CHANNELS)
    return (x.shape[0] * times * blocks,), (x.shape[1], x.shape[2], times, blocks)


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    y, final_state = _forward_fake(x, weight, bias, initial_state, cu_seqlens, silu)
    run, past = _triton.kernels("causal_conv1d"), weight.shape[1] - 1
    weight, bias = _parameters(weight, bias)
    initial = initial_state if past else None
    cu, owners = _owners(cu_seqlens, x.shape[1])
    strides = (*x.stride(), *_strides(initial))
    options = {"PAST": past, "BD": _CHANNELS, "PACKED": cu is not None}
    grid, sizes = _tiles(x)
    with _triton.on_device_of(x):
        if cu is not None:
            _triton.check_boundaries("causal_conv1d", cu, x.shape[1])
        run.conv_forward[grid](
            *(x, weight, bias, initial, cu, owners, y, *strides, *weight.stride(), *sizes),
            **options,
            BT=_TIMES,
            SILU=silu,
            GPU=_triton.hardware(x),
        )
        if past:
            blocks = sizes[3]
            run.state_forward[(blocks * _sequences(x, cu),)](
                *(x, initial, cu, final_state, *strides, x.shape[1], x.shape[2], blocks), **options
            )
    return y, final_state


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    del bias, initial_state, silu
    return x.new_empty(x.shape), x.new_empty((_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2]))


def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, _, _, grad_initial = _backward_fake(
        grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, silu
    )
    run, past = _triton.kernels("causal_conv1d"), weight.shape[1] - 1
    wide, shift = _parameters(weight, bias)
    initial = initial_state if past else None
    if grad_final_state is not None:
        grad_final_state = grad_final_state.contiguous() if past else None
    cu, owners = _owners(cu_seqlens, x.shape[1])
    grid, sizes = _tiles(x)
    blocks = sizes[3]
    shares = grid[0] // blocks

    def real(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    dweight = real(shares, x.shape[2], past + 1)
    dbias = None if bias is None else real(shares, x.shape[2])
    g = real(*x.shape) if silu else grad_y
    options = {"PAST": past, "BD": _CHANNELS, "PACKED": cu is not None}
    with _triton.on_device_of(x):
        if cu is not None:
            _triton.check_boundaries("causal_conv1d", cu, x.shape[1])
        run.conv_gradient[grid](
            *(x, wide, shift, initial, cu, owners, grad_y, g, dweight, dbias),
            *(*x.stride(), *_strides(initial), *wide.stride(), *grad_y.stride(), *sizes),
            **options,
            BT=_TIMES,
            SILU=silu,
            GPU=_triton.hardware(x),
        )
        run.conv_backward[grid](
            *(g, wide, cu, owners, grad_final_state, grad_x, *g.stride(), *wide.stride(), *sizes), **options, BT=_TIMES
        )
        if grad_initial.numel():
            run.state_backward[(blocks * _sequences(x, cu),)](
                *(g, wide, cu, grad_final_state, grad_initial, *g.stride(), *wide.stride()),
                *(x.shape[1], x.shape[2], blocks),
                **options,
            )
    if _triton.rehearsing():
        return grad_x, dweight, dweight, grad_initial
    grad_bias = weight.new_empty(0) if dbias is None or bias is None else dbias.sum(0).to(bias.dtype)
    return grad_x, dweight.sum(0).to(weight.dtype), grad_bias, grad_initial


def _backward_fake(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del grad_y, grad_final_state, silu
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    state = (_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2])
    grad_initial = x.new_empty((0,) if initial_state is None else state)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_bias, grad_initial


def _backward_op(grad_y: Tensor, grad_final_state: Tensor | None, *saved: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def launch(grad_y: Tensor, grad_final_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _backward(grad_y, grad_final_state, *saved)

    return _triton.launch_ready(launch, grad_y, grad_final_state)


def _rehearse_backward(*arguments: Any) -> None:
    """The backward passes that may follow such a call: the final state's gradient may come or not."""
    *inputs, want_final = arguments
    y, final_state = _forward_fake(*inputs)
    for grad_final_state in (None, final_state) if want_final else (None,):
        _backward(y, grad_final_state, *inputs)


def _step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, new_state: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    weight, bias = _parameters(weight, bias)
    blocks = -(-x.shape[1] // _CHANNELS)
    with _triton.on_device_of(x):
        _triton.kernels("causal_conv1d").conv_step[(blocks * x.shape[0],)](
            *(x, state, weight, bias, y, new_state),
            *(*x.stride(), *state.stride(), *new_state.stride(), *weight.stride(), x.shape[1], blocks),
            PAST=state.shape[1],
            BD=_CHANNELS,
            SILU=silu,
            GPU=_triton.hardware(x),
        )
    return y


def _update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    new_state = state.new_empty(state.shape)
    return _step(x, state, weight, bias, silu, new_state), new_state


def _update_inplace(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return _step(x, state, weight, bias, silu, state)


def _update_fake(x: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _update_inplace_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu"
_triton.register("causal_conv1d_triton", f"({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
_triton.register(
    "causal_conv1d_triton_backward",
    f"(Tensor grad_y, Tensor? grad_final_state, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_op,
    _backward_fake,
)
_triton.register(
    "causal_conv1d_update_triton",
    "(Tensor x, Tensor state, Tensor weight, Tensor? bias, bool silu) -> (Tensor, Tensor)",
    _update,
    _update_fake,
)
_triton.register(
    "causal_conv1d_update_triton_inplace",
    "(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu) -> Tensor",
    _update_inplace,
    _update_inplace_fake,
)


class _CausalConv1d(torch.autograd.Function):
    """Saves the inputs alone: the backward makes the pre-activation again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
        want_final: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
        ctx.silu, ctx.want_final = silu, want_final
        ctx.set_materialize_grads(False)
        return torch.ops.statescan.causal_conv1d_triton(x, weight, bias, initial_state, cu_seqlens, silu)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("causal_conv1d", "triton")
        x, _, bias, initial_state, _ = saved = ctx.saved_tensors
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y
        grad_x, grad_weight, grad_bias, grad_initial = torch.ops.statescan.causal_conv1d_triton_backward(
            grad_y, grad_final_state if ctx.want_final else None, *saved, ctx.silu
        )
        return (
            grad_x,
            grad_weight,
            grad_bias if bias is not None else None,
            grad_initial if initial_state is not None else None,
            None,
            None,
            None,
        )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.causal_conv1d`; gives (y, final_state), the latter to no use where it was not asked for."""
    if wants_gradients(x, weight, bias, initial_state):
        arguments = (x, weight, bias, initial_state, cu_seqlens, silu, return_final_state)
        _triton.make_ready(_rehearse_backward, *arguments)
        return _CausalConv1d.apply(*arguments)  # pyright: ignore[reportReturnType]
    return torch.ops.statescan.causal_conv1d_triton(x, weight, bias, initial_state, cu_seqlens, silu)


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.causal_conv1d_update`; where a gradient is to come it is a convolution of length 1."""
    if inplace:
        return torch.ops.statescan.causal_conv1d_update_triton_inplace(x, state, weight, bias, silu), state
    if wants_gradients(x, state, weight, bias):
        y, new_state = causal_conv1d(x[:, None], weight, bias, silu, state, None, True)
        return y[:, 0], new_state
    return torch.ops.statescan.causal_conv1d_update_triton(x, state, weight, bias, silu)
