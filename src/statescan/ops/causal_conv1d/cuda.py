"""The causal convolution on NVIDIA GPUs: kernels in conv.cu, compiled at first use.

A thread holds up to 16 bytes of neighbouring channels and walks a run of positions with the last width-1 inputs in
registers. The backward makes the pre-activation again; the weights' gradients leave each block as one row of partial
sums, which a second kernel adds in an order that the shape fixes. More than 16 taps run on plain kernels.

`launch_forward` and `launch_backward` take buffers for their results, with any stride between positions: a block that
holds several activations in one tensor has them written in place.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.errors import ShapeError
from statescan.ops import _cuda
from statescan.ops._checks import refuse_second_derivative, wants_gradients
from statescan.ops._cuda import i32
from statescan.ops._dispatch import Facts
from statescan.ops.causal_conv1d.validation import compute_dtype

__all__ = ["causal_conv1d", "causal_conv1d_update", "launch_backward", "launch_forward", "refuses"]

_SOURCE = Path(__file__).with_name("conv.cu")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_THREADS = 128
_MOST_TAPS = 16  # that a thread keeps in registers
_LONGEST = 2**31 - 2**20  # positions are counted in 32 bits
# Measured on an H100, the second on an H200 (docs/performance.md): bytes of channels a thread, positions that it walks,
# positions fetched at once, whether while the ones before are worked on, blocks a multiprocessor; runs are cut shorter
# until there are so many blocks for each multiprocessor.
_FORWARD = (8, 16, 8, 0, 6, 2)
_FORWARD_16_BITS = (8, 32, 16, 1, 4, 2)  # of four taps
_BACKWARD = (8, 128, 4, 1, 4, 2)
_ALL = ("SILU", "VARLEN", "HASI", "HASF", "WT", "BT")
_PLAIN_RUN = 64  # positions of one partial sum where there are more taps than registers


def refuses(facts: Facts) -> str | None:
    """CUDA devices."""
    if facts.device != "cuda":
        return _cuda.elsewhere(facts.device)
    return _cuda.unavailable_reason()


def _in_reach(tensor: Tensor) -> bool:
    """Whether the kernels can walk it: channels side by side, positions less than 2^31 bytes apart."""
    dense = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return dense and tensor.stride(1) * tensor.element_size() < 2**31


def _dense_channels(tensor: Tensor) -> Tensor:
    """The tensor itself where the kernels can walk it, else a contiguous copy."""
    return tensor if _in_reach(tensor) else tensor.contiguous()


def _rows(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))


def _channels(most: int, features: int, *tensors: Tensor | None) -> int:
    """How many neighbouring channels every tensor lets a thread move at once: a power of two, at most `most`."""
    while most > 1:
        fits = features % most == 0
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                fits = fits and tensor.data_ptr() % (most * tensor.element_size()) == 0
                fits = fits and all(stride % most == 0 for stride in tensor.stride()[:-1])
        if fits:
            break
        most //= 2
    return most


class _Call:
    """What every kernel of one call shares: tensors made ready, macros, argument lists."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        if x.shape[1] > _LONGEST:
            raise ShapeError(
                f"causal_conv1d: x must have a length of at most {_LONGEST} on backend 'cuda', got {x.shape[1]}; "
                "cut it, and hand the final_state on as initial_state"
            )
        self.width = weight.shape[1]
        past = self.width > 1
        self.x, self.weight = _dense_channels(x), weight
        self.bias = None if bias is None else bias.contiguous()
        self.initial = _dense_channels(initial_state) if initial_state is not None and past else None
        self.offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
        self.batch, self.length, self.features = x.shape
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.device = x.device.index or 0
        self.processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        self.macros = {
            "IN": _TYPES[x.dtype],
            "SILU": int(silu),
            "VARLEN": int(cu_seqlens is not None),
            "HASI": int(self.initial is not None),
            "WT": _TYPES[weight.dtype],
            "BT": -1 if bias is None else _TYPES[bias.dtype],
        }

    @property
    def plain(self) -> bool:
        return self.width > _MOST_TAPS

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return (self.sequences, self.width - 1, self.features)

    def inputs(self) -> list[Any]:
        """The first arguments of the kernels: x, weight, bias, initial state, offsets."""
        weight = (self.weight, self.weight.stride(0), self.weight.stride(1))
        return [*_rows(self.x), *weight, self.bias, *_rows(self.initial), self.offsets]

    def sizes(self) -> list[Any]:
        return [i32(self.length), i32(self.features), i32(self.sequences)]

    def cut(self, part: int, settings: tuple[int, ...], *tensors: Tensor | None) -> tuple[dict[str, int], int, int]:
        """(macros, blocks, rows of partial sums) for kernels that walk runs of positions."""
        size, run, ahead, early, resident, fill = settings
        if self.width > 4 or self.x.dtype == torch.float64:  # longer code and more registers a position
            ahead, resident = 2, 1
        most = max(size // self.x.element_size(), 1)
        while most > 1 and most * self.width > 8 * size // self.x.element_size():
            most //= 2
        channels = _channels(most, self.features, self.x, self.initial, *tensors)
        across = min(32, 1 << math.ceil(math.log2(math.ceil(self.features / channels))))
        along = _THREADS // across

        def count(run: int) -> tuple[int, int]:
            rows = self.batch * math.ceil(self.length / (run * along))
            return math.ceil(self.features / (across * channels)) * rows, rows

        while run > 8 and count(run)[0] < fill * self.processors:
            run //= 2
        ahead = min(ahead, run)
        taps = {
            "TAPS": self.width,
            "CH": channels,
            "RUN": run,
            "AHEAD": ahead,
            "EARLY": early,
            "NX": across,
            "NY": along,
        }
        return {**self.macros, **taps, "PART": part, "MINB": resident}, *count(run)

    def one(self, part: int, *needed: str) -> dict[str, int]:
        """Macros of the kernels that take one number a thread; only those that they look at."""
        given = {"HASF": 0, **self.macros}
        return {"IN": given["IN"], "TAPS": 0, "CH": 1, "PART": part, **{name: given[name] for name in needed}}

    def run(self, name: str, macros: dict[str, int], blocks: int, *arguments: Any, threads: int = _THREADS) -> None:
        _cuda.kernel(_SOURCE, name, macros, threads, self.device)((blocks, 1, 1), *arguments)


def _check_buffer(out: Tensor, x: Tensor) -> None:
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert _in_reach(out)


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Runs the forward kernel on the current stream, outside of autograd.

    Args:
        x: (batch, length, d) on a CUDA device; copied only where its last axis is not contiguous.
        weight: (d, width), any float dtype and strides.
        bias: (d,), any float dtype, or None.
        silu: SiLU after the sum.
        initial_state: (batch or sequences, width-1, d) in the dtype of x, or None.
        cu_seqlens: (sequences + 1,) int32, or None; a kernel stops the program where the offsets are wrong.
        out: where y is written: shape and dtype of x, last axis contiguous, any other strides. Default: a new tensor.

    Returns:
        y, which is `out` where that was given.
    """
    call = _Call(x, weight, bias, silu, initial_state, cu_seqlens)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _check_buffer(y, x)
    if call.batch == 0:
        return y
    with torch.cuda.device(x.device):
        if call.plain:
            blocks = math.ceil(x.numel() / _THREADS)
            more = (i32(call.width), i32(call.batch))
            call.run(
                *("plain_forward", call.one(3, *_ALL), blocks),
                *(*call.inputs(), *_rows(y), *call.sizes(), *more),
            )
        else:
            settings = _FORWARD_16_BITS if call.width == 4 and x.element_size() == 2 else _FORWARD
            macros, blocks, _ = call.cut(1, settings, y)
            call.run("conv_forward", macros, blocks, *call.inputs(), *_rows(y), *call.sizes())
    return y


def final_state(x: Tensor, width: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last width-1 inputs of every sequence, (batch or sequences, width-1, d)."""
    call = _Call(x, x.new_empty(x.shape[2], width), None, False, initial_state, cu_seqlens)
    state = torch.empty(call.state_shape, dtype=x.dtype, device=x.device)
    if state.numel():
        inputs = call.inputs()
        with torch.cuda.device(x.device):
            call.run(
                *("conv_final", call.one(4, "VARLEN", "HASI"), math.ceil(state.numel() / _THREADS)),
                *(*inputs[:3], *inputs[7:], state, *call.sizes(), i32(width)),
            )
    return state


def launch_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs the backward kernels on the current stream, outside of autograd.

    Args:
        dy: gradient of y, shape and dtype of x; copied only where its last axis is not contiguous.
        dfinal: gradient of the final state, (batch or sequences, width-1, d), or None.
        x, weight, bias, silu, initial_state, cu_seqlens: as given to `launch_forward`.
        dx: where the gradient of x is written: shape and dtype of x, last axis contiguous, any other strides (half of
            a projection's gradient, for instance); may not overlap x or dy. Default: a new tensor.

    Returns:
        (dx, dweight, dbias, dinitial_state): `dx` itself where that was given; the parameters' gradients in their own
        dtypes, dweight contiguous; None for an input that isn't there.
    """
    call = _Call(x, weight, bias, silu, initial_state, cu_seqlens)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    _check_buffer(dx, x)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    dinitial = None if initial_state is None else torch.empty(call.state_shape, dtype=x.dtype, device=x.device)
    if call.batch == 0:
        return dx, dweight.zero_(), None if dbias is None else dbias.zero_(), dinitial
    dy = _dense_channels(dy)
    dfinal = dfinal.contiguous() if dfinal is not None and dfinal.numel() else None
    call.macros["HASF"] = int(dfinal is not None)
    one = call.one(3, *_ALL)
    real = compute_dtype(x.dtype)

    def partial(rows: int) -> Tensor:
        return torch.empty(rows, call.width + 1, call.features, dtype=real, device=x.device)

    with torch.cuda.device(x.device):
        if call.plain:
            blocks, sizes = math.ceil(x.numel() / _THREADS), (*call.sizes(), i32(call.width))
            g = torch.empty(x.shape, dtype=real, device=x.device)
            call.run("plain_gradient", one, blocks, *call.inputs(), *_rows(dy), g, *sizes, i32(call.batch))
            taps = call.inputs()[3:6]
            call.run(
                *("plain_backward", one, blocks, *taps, g, call.offsets, dfinal),
                *(*_rows(dx), *sizes, i32(call.batch)),
            )
            rows = call.batch * math.ceil(call.length / _PLAIN_RUN)
            sums = partial(rows)
            blocks = math.ceil(call.features / _THREADS) * (call.width + 1) * rows
            before = (*_rows(call.x), *_rows(call.initial), call.offsets)
            call.run("plain_weights", {**one, "RUN": _PLAIN_RUN}, blocks, *before, g, sums, *sizes)
        else:
            macros, blocks, rows = call.cut(2, _BACKWARD, dy, dfinal, dx)
            sums = partial(rows)
            call.run(
                *("conv_backward", macros, blocks, *call.inputs(), *_rows(dy), dfinal),
                *(*_rows(dx), sums, *call.sizes()),
            )
        columns = (call.width + int(bias is not None)) * call.features
        more = (i32(call.features), i32(call.width), dweight, dbias)
        call.run("conv_sums", call.one(4, "WT", "BT"), math.ceil(columns / 32), sums, i32(rows), *more, threads=1024)
        if dinitial is not None and dinitial.numel():
            blocks = math.ceil(dinitial.numel() / _THREADS)
            more = (*_rows(dy), dfinal, dinitial, *call.sizes(), i32(call.width))
            call.run("conv_initial", call.one(4, *_ALL), blocks, *call.inputs(), *more)
    return dx, dweight, dbias, dinitial


def _update(x: Tensor, state: Tensor, new_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Fills new_state, whose last axis is contiguous and which may be state itself; returns y."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        return y
    call = _Call(x[:, None], weight, bias, silu, state, None)
    macros = {**call.one(5, "SILU", "WT", "BT"), "TAPS": 0 if call.plain else call.width}
    with torch.cuda.device(x.device):
        call.run(
            *("conv_update", macros, math.ceil(x.numel() / _THREADS)),
            *(call.x, call.x.stride(0), *_rows(call.initial), *call.inputs()[3:7], *_rows(new_state)),
            *(y, i32(call.batch), i32(call.features), i32(call.width)),
        )
    return y


def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    y = launch_forward(x, weight, bias, silu, initial_state, cu_seqlens)
    if not want_final:
        return y, x.new_empty(0)
    return y, final_state(x, weight.shape[1], initial_state, cu_seqlens)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((sequences, weight.shape[1] - 1, x.shape[2]) if want_final else (0,))


def _backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def launch(dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return launch_backward(dy, dfinal, x, weight, bias, silu, initial_state, cu_seqlens)

    dx, dweight, dbias, dinitial = _cuda.launch_ready(launch, dy, dfinal)
    dbias = weight.new_empty(0) if dbias is None else dbias
    return dx, dweight, dbias, x.new_empty(0) if dinitial is None else dinitial


def _backward_fake(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty((0,) if initial_state is None else initial_state.shape),
    )


def _update_op(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    new_state = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    return _update(x, state, new_state, weight, bias, silu), new_state


def _update_inplace_op(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    if state.stride(-1) == 1 or state.numel() == 0:
        return _update(x, state, state, weight, bias, silu)
    y, new_state = _update_op(x, state, weight, bias, silu)
    state.copy_(new_state)
    return y


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu"
_LIBRARY = torch.library.Library("statescan", "FRAGMENT")
_LIBRARY.define(f"causal_conv1d_cuda({_INPUTS}, bool want_final) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"causal_conv1d_cuda_backward(Tensor dy, Tensor? dfinal, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_STEP = "Tensor weight, Tensor? bias, bool silu"
_LIBRARY.define(f"causal_conv1d_cuda_update(Tensor x, Tensor state, {_STEP}) -> (Tensor, Tensor)")
_LIBRARY.define(f"causal_conv1d_cuda_update_inplace(Tensor x, Tensor(a!) state, {_STEP}) -> Tensor")
_LIBRARY.impl("causal_conv1d_cuda", _forward_op, "CUDA")
_LIBRARY.impl("causal_conv1d_cuda_backward", _backward_op, "CUDA")
_LIBRARY.impl("causal_conv1d_cuda_update", _update_op, "CUDA")
_LIBRARY.impl("causal_conv1d_cuda_update_inplace", _update_inplace_op, "CUDA")
torch.library.register_fake("statescan::causal_conv1d_cuda", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("statescan::causal_conv1d_cuda_backward", _backward_fake, lib=_LIBRARY)


@torch.library.register_fake("statescan::causal_conv1d_cuda_update", lib=_LIBRARY)
def _(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


@torch.library.register_fake("statescan::causal_conv1d_cuda_update_inplace", lib=_LIBRARY)
def _(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rehearse_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    want_final: bool,
) -> None:
    """The backward passes that may follow such a call: the final state's gradient may come or not."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dfinal = [None, x.new_empty(sequences, weight.shape[1] - 1, x.shape[2])]
    for given in dfinal if want_final else dfinal[:1]:
        launch_backward(x.new_empty(x.shape), given, x, weight, bias, silu, initial_state, cu_seqlens)


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
        _cuda.make_ready(_rehearse_backward, x, weight, bias, initial_state, cu_seqlens, silu, want_final)
        return torch.ops.statescan.causal_conv1d_cuda(x, weight, bias, initial_state, cu_seqlens, silu, want_final)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("causal_conv1d", "cuda")
        x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
        dx, dweight, dbias, dinitial = torch.ops.statescan.causal_conv1d_cuda_backward(
            *(torch.zeros_like(x) if dy is None else dy, dfinal if ctx.want_final else None),
            *(x, weight, bias, initial_state, cu_seqlens, ctx.silu),
        )
        return (
            dx,
            dweight,
            None if bias is None else dbias,
            None if initial_state is None else dinitial,
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
) -> tuple[Tensor, Tensor | None]:
    """See `statescan.ops.causal_conv1d`; gives (y, final_state)."""
    inputs = (x, weight, bias, initial_state)
    if wants_gradients(*inputs):
        y, final = _CausalConv1d.apply(*inputs, cu_seqlens, silu, return_final_state)  # type: ignore[misc]
    else:
        y, final = torch.ops.statescan.causal_conv1d_cuda(*inputs, cu_seqlens, silu, return_final_state)
    return y, final if return_final_state else None


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    """See `statescan.ops.causal_conv1d_update`; where a gradient is to come, a convolution of length 1 from a state."""
    if inplace:
        return torch.ops.statescan.causal_conv1d_cuda_update_inplace(x, state, weight, bias, silu), state
    if wants_gradients(x, state, weight, bias):
        y, new_state = causal_conv1d(x[:, None], weight, bias, silu, state, None, True)
        assert new_state is not None
        return y[:, 0], new_state
    return torch.ops.statescan.causal_conv1d_cuda_update(x, state, weight, bias, silu)
