"""The names of mamba_ssm and causal_conv1d: every optional argument against loops in float64 written here, gradients
by differences or through the loop, and that package's own examples with the import changed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.compat.mamba_ssm import (
    GenerateOutput,
    InferenceParams,
    Mamba,
    MambaConfig,
    MambaLMHeadModel,
    RMSNorm,
    causal_conv1d_fn,
    causal_conv1d_update,
    layer_norm_fn,
    mamba_inner_fn,
    mamba_inner_ref,
    rms_norm_fn,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
)
from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.models import CausalLM

BATCH, DIM, STATE, LENGTH = 2, 6, 3, 9
DOUBLE = torch.float64


def _draw(*shape: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _close(got: Tensor, wanted: Tensor, exact: float = 1e-11) -> None:
    """Equal to the rounding of `got`'s dtype: float64 to `exact`, relative to the largest number."""
    limit = {torch.float64: exact, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.complex128: exact}[got.dtype]
    assert got.shape == wanted.shape
    if got.numel() == 0:
        return
    error = (got.to(wanted.dtype) - wanted).abs().max()
    assert error <= limit * wanted.abs().max().clamp(min=1e-3), float(error)


def _leaves(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies; float and complex tensors as leaves that require a gradient."""
    return {
        name: value.detach().clone().requires_grad_(value.is_floating_point() or value.is_complex())
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def _gradients_agree(ours: Callable[..., Any], loop: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Results and gradients of both, with weights on every result, so that each carries some."""
    results, gradients = [], []
    for function in (ours, loop):
        given = _leaves(arguments)
        out = function(**given)
        out = out if isinstance(out, tuple) else (out,)
        loss = sum(
            (part * _draw(*part.shape, seed=90 + i).to(part.dtype)).real.sum()
            if part.is_complex()
            else (part * _draw(*part.shape, seed=90 + i)).sum()
            for i, part in enumerate(out)
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        results.append(out)
        gradients.append({n: v.grad for n, v in given.items() if isinstance(v, Tensor) and v.requires_grad})
    for got, wanted in zip(*results, strict=True):
        _close(got.detach(), wanted.detach())
    for name, wanted in gradients[1].items():
        if arguments[name].numel() == 0:
            continue
        assert wanted is not None, name
        assert gradients[0][name] is not None, name
        _close(gradients[0][name], wanted, 1e-9)


# --------------------------------------------------------------------------------------------------------------- scan


def scan_loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
) -> Any:
    """The recurrence position by position, B and C read as documented."""
    batch, dim, length = u.shape

    def at(value: Tensor, t: int) -> Tensor:
        if value.dim() == 2:
            return value.expand(batch, *value.shape)
        value = value.unsqueeze(1) if value.dim() == 3 else value
        if A.is_complex() and not value.is_complex():
            value = torch.complex(value[..., 0::2], value[..., 1::2])
        return value[..., t].repeat_interleave(dim // value.shape[1], 1)

    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    h = initial_state if initial_state is not None else A.new_zeros(batch, *A.shape)
    ys = []
    for t in range(length):
        d = step[:, :, t, None]
        h = torch.exp(d * A) * h + d * at(B, t) * u[:, :, t, None]
        y = (at(C, t) * h).sum(-1)
        y = 2 * y.real if y.is_complex() else y
        y = y if D is None else y + D * u[:, :, t]
        ys.append(y if z is None else y * F.silu(z[:, :, t]))
    out = torch.stack(ys, -1)
    return (out, h) if return_last_state else out


def _scan_arguments(form: str = "position", complex_A: bool = False, seed: int = 0) -> dict[str, Any]:
    A = -_draw(DIM, STATE, seed=seed).exp()
    shape = {"fixed": (DIM, STATE), "position": (BATCH, STATE, LENGTH), "groups": (BATCH, 2, STATE, LENGTH)}[form]
    if complex_A:
        A = torch.complex(A, _draw(DIM, STATE, seed=seed + 1))
        shape = shape if form == "fixed" else (*shape[:-1], 2 * shape[-1])
    B, C = _draw(*shape, seed=seed + 2), _draw(*shape, seed=seed + 3)
    if complex_A and form == "fixed":
        B, C = torch.complex(B, C), torch.complex(C, B)
    return {
        "u": _draw(BATCH, DIM, LENGTH, seed=seed + 4),
        "delta": 0.5 * _draw(BATCH, DIM, LENGTH, seed=seed + 5),
        "A": A,
        "B": B,
        "C": C,
        "D": _draw(DIM, seed=seed + 6),
        "z": _draw(BATCH, DIM, LENGTH, seed=seed + 7),
        "delta_bias": _draw(DIM, seed=seed + 8),
        "delta_softplus": True,
        "return_last_state": True,
    }


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("form", ["fixed", "position", "groups"])
def test_scan_with_every_form_of_B_and_C(function: Callable[..., Any], form: str, complex_A: bool) -> None:
    # The last state carries gradients too, which the other package's does not.
    _gradients_agree(function, scan_loop, _scan_arguments(form, complex_A))


def test_scan_with_complex_B_and_C_as_numbers() -> None:
    arguments = _scan_arguments("position", True)
    for name in ("B", "C"):
        pairs = arguments[name]
        arguments[name] = torch.complex(pairs[..., 0::2], pairs[..., 1::2])
    _gradients_agree(selective_scan_fn, scan_loop, arguments)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)))
def test_scan_without_optional_arguments(given: tuple[bool, bool, bool]) -> None:
    arguments = _scan_arguments()
    for name, kept in zip(("D", "z", "delta_bias"), given, strict=True):
        if not kept:
            del arguments[name]
    arguments["delta"] = arguments["delta"].abs()
    arguments |= {"delta_softplus": False, "return_last_state": False}
    _gradients_agree(selective_scan_fn, scan_loop, arguments)


def test_scan_from_an_initial_state_and_in_two_pieces() -> None:
    arguments = _scan_arguments()
    arguments["initial_state"] = _draw(BATCH, DIM, STATE, seed=40)
    _gradients_agree(selective_scan_fn, scan_loop, arguments)
    whole, last = selective_scan_fn(**arguments)
    state, pieces = arguments.pop("initial_state"), []
    for cut in (slice(0, 4), slice(4, LENGTH)):
        piece = {
            n: v[..., cut] if isinstance(v, Tensor) and v.dim() == 3 and v.shape[-1] == LENGTH else v
            for n, v in arguments.items()
        }
        out, state = selective_scan_fn(**piece, initial_state=state)
        pieces.append(out)
    _close(torch.cat(pieces, -1), whole)
    _close(state, last)


def test_scan_of_packed_sequences() -> None:
    arguments = {n: v[:1] if isinstance(v, Tensor) and v.dim() == 3 else v for n, v in _scan_arguments().items()}
    out, last = selective_scan_fn(**arguments, cu_seqlens=torch.tensor([0, 4, 4, LENGTH]))
    for row, cut in ((0, slice(0, 4)), (2, slice(4, LENGTH))):
        alone = {n: v[..., cut] if isinstance(v, Tensor) and v.dim() == 3 else v for n, v in arguments.items()}
        wanted, state = scan_loop(**alone)
        _close(out[..., cut], wanted)
        _close(last[row], state[0])
    assert not last[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_in_narrow_and_mixed_dtypes(dtype: torch.dtype) -> None:
    arguments = _scan_arguments()
    for name in ("u", "z", "B", "C"):
        arguments[name] = arguments[name].to(dtype)
    for name in ("delta", "A", "D", "delta_bias"):
        arguments[name] = arguments[name].float()
    wanted, state = scan_loop(**{n: v.double() if isinstance(v, Tensor) else v for n, v in arguments.items()})
    out, last = selective_scan_fn(**arguments)
    assert out.dtype == dtype
    assert last.dtype == torch.float32
    _close(out, wanted)
    _close(last, state)


# --------------------------------------------------------------------------------------------------------- one position


def _update_arguments(heads: int, groups: int | None, seed: int = 0) -> dict[str, Any]:
    lead = (heads, DIM) if heads else (DIM,)
    by_group = (BATCH, STATE) if groups is None else (BATCH, groups, STATE)
    return {
        "x": _draw(BATCH, *lead, seed=seed),
        "dt": _draw(BATCH, *lead, seed=seed + 1),
        "A": -_draw(*lead, STATE, seed=seed + 2).exp(),
        "B": _draw(*by_group, seed=seed + 3),
        "C": _draw(*by_group, seed=seed + 4),
        "D": _draw(*lead, seed=seed + 5),
        "z": _draw(BATCH, *lead, seed=seed + 6),
        "dt_bias": _draw(*lead, seed=seed + 7),
        "dt_softplus": True,
    }


def update_loop(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **more: Any) -> Any:
    """(out, new state), by head (or channel) and group."""
    lead = x.shape[1]

    def spread(value: Tensor) -> Tensor:
        value = value.unsqueeze(1) if value.dim() == 2 else value
        value = value.repeat_interleave(lead // value.shape[1], 1)
        return value if x.dim() == 2 else value.unsqueeze(2)

    dt = dt if more.get("dt_bias") is None else dt + more["dt_bias"]
    dt = F.softplus(dt) if more.get("dt_softplus") else dt
    state = torch.exp(dt[..., None] * A) * state + dt[..., None] * spread(B) * x[..., None]
    y = (state * spread(C)).sum(-1)
    y = y if more.get("D") is None else y + more["D"] * x
    return (y if more.get("z") is None else y * F.silu(more["z"])), state


def _updated(state: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    # Not the leaf itself, which can't be written over.
    state = state.clone()
    out = selective_state_update(state, **arguments)
    return out, state


@pytest.mark.parametrize(("heads", "groups"), [(0, None), (0, 1), (0, 2), (4, None), (4, 1), (4, 2)])
def test_update_with_heads_and_groups(heads: int, groups: int | None) -> None:
    arguments = _update_arguments(heads, groups)
    arguments["state"] = _draw(BATCH, *((heads,) if heads else ()), DIM, STATE, seed=50)
    _gradients_agree(_updated, update_loop, arguments)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)))
def test_update_without_optional_arguments(given: tuple[bool, bool, bool]) -> None:
    # Where the other package fails for want of D or dt_bias.
    arguments = _update_arguments(2, None)
    for name, kept in zip(("D", "z", "dt_bias"), given, strict=True):
        if not kept:
            del arguments[name]
    arguments["state"] = _draw(BATCH, 2, DIM, STATE, seed=51)
    _gradients_agree(_updated, update_loop, arguments)
    arguments |= {"dt_softplus": False, "dt": arguments["dt"].abs()}
    _gradients_agree(_updated, update_loop, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_update_writes_a_state_of_any_dtype_in_place(dtype: torch.dtype) -> None:
    arguments = _update_arguments(0, None)
    state = _draw(BATCH, DIM, STATE, seed=52).to(dtype)
    wanted, after = update_loop(state.double(), **arguments)
    kept = state
    out = selective_state_update(state, **arguments)
    assert kept is state
    _close(out, wanted)
    _close(state, after)


def test_update_of_some_rows_of_a_larger_state() -> None:
    arguments, rows = _update_arguments(2, 1), torch.tensor([3, 1], dtype=torch.int32)
    state = _draw(5, 2, DIM, STATE, seed=53)
    before = state.clone()
    wanted, after = update_loop(before[rows.long()], **arguments)
    _close(selective_state_update(state, **arguments, state_batch_indices=rows), wanted)
    _close(state[rows.long()], after)
    others = [0, 2, 4]
    assert torch.equal(state[others], before[others])


def test_a_gradient_goes_back_through_several_updates() -> None:
    steps = [_update_arguments(0, None, seed=10 * i) for i in range(3)]
    gradients = []
    for function in (_updated, update_loop):
        start = _draw(BATCH, DIM, STATE, seed=54).requires_grad_()
        state, total = start, torch.zeros((), dtype=DOUBLE)
        for arguments in steps:
            out, state = function(state, **arguments)
            total = total + out.square().sum()
        total.backward()
        gradients.append(start.grad)
    _close(*gradients, 1e-9)  # type: ignore[arg-type, misc]


# --------------------------------------------------------------------------------------------------------- convolution


def conv_loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
) -> Any:
    batch, dim, length = x.shape
    width = weight.shape[1]
    outs, finals = [], []
    for b in range(batch):
        past = list(initial_states[b].unbind(-1)) if initial_states is not None else [x.new_zeros(dim)] * (width - 1)
        row = []
        for t in range(length):
            if seq_idx is not None and t > 0 and seq_idx[b, t] != seq_idx[b, t - 1]:
                past = [x.new_zeros(dim)] * (width - 1)
            window = [*past, x[b, :, t]]
            y = sum((weight[:, k] * window[k] for k in range(width)), x.new_zeros(dim))
            y = y if bias is None else y + bias
            y = y if activation is None else y * torch.sigmoid(y)
            row.append(y * 0 if seq_idx is not None and seq_idx[b, t] < 0 else y)
            past = window[1:]
        outs.append(torch.stack(row, -1))
        finals.append(torch.stack(past, -1) if past else x.new_zeros(dim, 0))
    out = torch.stack(outs)
    return (out, torch.stack(finals)) if return_final_states else out


SEQ_IDX = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, -1], [5, 5, 5, 5, 5, 5, 4, 4, 4]], dtype=torch.int32)


@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_convolution_with_every_argument(width: int, packed: bool, state: bool, activation: str | None) -> None:
    # Together, too: the other package has no states beside seq_idx, and widths 2 to 4 alone.
    arguments: dict[str, Any] = {
        "x": _draw(BATCH, DIM, LENGTH, seed=0),
        "weight": _draw(DIM, width, seed=1),
        "activation": activation,
    }
    if activation is not None:
        arguments["bias"] = _draw(DIM, seed=2)
    if packed:
        arguments["seq_idx"] = SEQ_IDX
    if state:
        arguments |= {"initial_states": _draw(BATCH, DIM, width - 1, seed=3), "return_final_states": True}
    _gradients_agree(causal_conv1d_fn, conv_loop, arguments)


def test_convolution_writes_final_states_where_it_is_told() -> None:
    x, weight = _draw(BATCH, DIM, LENGTH, seed=0), _draw(DIM, 4, seed=1)
    place = torch.zeros(BATCH, DIM, 3, dtype=DOUBLE)
    out, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=place)
    assert final is place
    assert torch.equal(place, x[..., -3:])
    _close(out, conv_loop(x, weight))


def _conv_updated(conv_state: Tensor, x: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    conv_state = conv_state.clone()
    return causal_conv1d_update(x, conv_state, **arguments), conv_state


def conv_update_loop(conv_state: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Any:
    inputs = x.unsqueeze(-1) if x.dim() == 2 else x
    width = weight.shape[1]
    known = torch.cat([conv_state, inputs], -1)
    start = conv_state.shape[-1] - (width - 1)
    out = conv_loop(known[..., start + width - 1 :], weight, bias, None, known[..., start : start + width - 1],
                    activation=activation)  # fmt: skip
    return (out.squeeze(-1) if x.dim() == 2 else out), known[..., inputs.shape[-1] :]


@pytest.mark.parametrize("shape", [(BATCH, DIM), (BATCH, DIM, 1), (BATCH, DIM, 3), (BATCH, DIM, 7)])
@pytest.mark.parametrize("state_len", [3, 4, 5])
def test_convolution_goes_on_by_one_or_several(shape: tuple[int, ...], state_len: int) -> None:
    arguments = {
        "conv_state": _draw(BATCH, DIM, state_len, seed=4),
        "x": _draw(*shape, seed=5),
        "weight": _draw(DIM, 4, seed=6),
        "bias": _draw(DIM, seed=7),
        "activation": "silu",
    }
    _gradients_agree(_conv_updated, conv_update_loop, arguments)


@pytest.mark.parametrize("pieces", [[1] * 9, [2, 3, 4], [9]])
@pytest.mark.parametrize("state_len", [3, 5])
def test_convolution_over_a_ring_in_chosen_rows(pieces: list[int], state_len: int) -> None:
    x, weight = _draw(BATCH, DIM, LENGTH, seed=8), _draw(DIM, 4, seed=9)
    ring, rows = torch.zeros(4, DIM, state_len, dtype=DOUBLE), torch.tensor([2, 0], dtype=torch.int32)
    outs, seen = [], 0
    for piece in pieces:
        outs.append(
            causal_conv1d_update(
                x[..., seen : seen + piece],
                ring,
                weight,
                # Rows may stand at different places of the ring: whole turns more change nothing.
                cache_seqlens=torch.tensor([seen, seen + 7 * state_len], dtype=torch.int32),
                conv_state_indices=rows,
            )
        )
        seen += piece
    _close(torch.cat(outs, -1), conv_loop(x, weight))
    for t in range(LENGTH - state_len, LENGTH):
        assert torch.equal(ring[rows.long()][..., t % state_len], x[..., t])
    assert not ring[[1, 3]].any()


# --------------------------------------------------------------------------------------------------------------- block

RANK, MODEL = 2, 5


def inner_loop(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    **more: Any,
) -> Tensor:
    del more
    x, z = xz.chunk(2, 1)
    u = conv_loop(x, conv1d_weight.reshape(DIM, -1), conv1d_bias, activation="silu")
    parts = torch.einsum("rd,bdl->brl", x_proj_weight, u)
    width = STATE * (2 if A.is_complex() else 1)

    def normed(value: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return value
        return value / (value.square().mean(1, keepdim=True) + b_c_dt_rms_eps).sqrt() * weight[:, None]

    def made(value: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        value = normed(value if bias is None else value + bias[:, None], weight)
        return torch.complex(value[:, 0::2], value[:, 1::2]) if A.is_complex() else value

    delta = normed(torch.einsum("dr,brl->bdl", delta_proj_weight, parts[:, :RANK]), dt_rms_weight)
    B = made(parts[:, RANK : RANK + width], B_proj_bias, b_rms_weight) if B is None else B
    C = made(parts[:, -width:], C_proj_bias, c_rms_weight) if C is None else C
    y = scan_loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    out = torch.einsum("ed,bdl->ble", out_proj_weight, y)
    return out if out_proj_bias is None else out + out_proj_bias


def _inner_arguments(complex_A: bool = False, made: int = 2) -> dict[str, Any]:
    A = -_draw(DIM, STATE, seed=0).exp()
    width = STATE
    if complex_A:
        A, width = torch.complex(A, _draw(DIM, STATE, seed=1)), 2 * STATE
    return {
        "xz": _draw(BATCH, 2 * DIM, LENGTH, seed=2),
        "conv1d_weight": _draw(DIM, 1, 4, seed=3),
        "conv1d_bias": _draw(DIM, seed=4),
        "x_proj_weight": _draw(RANK + made * width, DIM, seed=5),
        "delta_proj_weight": _draw(DIM, RANK, seed=6),
        "out_proj_weight": _draw(MODEL, DIM, seed=7),
        "out_proj_bias": _draw(MODEL, seed=8),
        "A": A,
        "D": _draw(DIM, seed=9),
        "delta_bias": _draw(DIM, seed=10),
    }


@pytest.mark.parametrize("function", [mamba_inner_fn, mamba_inner_ref])
@pytest.mark.parametrize("complex_A", [False, True])
def test_block_with_every_bias(function: Callable[..., Any], complex_A: bool) -> None:
    # out_proj_bias among them, whose gradient is one number in the other package.
    arguments = _inner_arguments(complex_A)
    width = 2 * STATE if complex_A else STATE
    arguments |= {"B_proj_bias": _draw(width, seed=20), "C_proj_bias": _draw(width, seed=21)}
    _gradients_agree(function, inner_loop, arguments)


@pytest.mark.parametrize("level", [0, 1])
def test_block_with_rms_weights_gives_their_gradients(level: int) -> None:
    arguments = _inner_arguments()
    arguments |= {"b_rms_weight": _draw(STATE, seed=22), "c_rms_weight": _draw(STATE, seed=23)}
    arguments |= {"dt_rms_weight": _draw(DIM, seed=24), "b_c_dt_rms_eps": 1e-3, "checkpoint_lvl": level}
    _gradients_agree(mamba_inner_fn, inner_loop, arguments)


@pytest.mark.parametrize("given", [("B",), ("C",), ("B", "C")])
@pytest.mark.parametrize("shape", [(DIM, STATE), (BATCH, STATE, LENGTH)])
def test_block_with_B_or_C_given(given: tuple[str, ...], shape: tuple[int, ...]) -> None:
    arguments = _inner_arguments(made=2 - len(given))
    arguments |= {name: _draw(*shape, seed=30 + i) for i, name in enumerate(given)}
    arguments |= {"conv1d_bias": None, "out_proj_bias": None}
    _gradients_agree(mamba_inner_fn, inner_loop, arguments)


def test_block_without_softplus() -> None:
    arguments = _inner_arguments()
    arguments |= {"delta_softplus": False, "D": None, "delta_bias": torch.full((DIM,), 3.0, dtype=DOUBLE)}
    arguments["delta_proj_weight"] = 0.01 * arguments["delta_proj_weight"]
    for function in (mamba_inner_fn, mamba_inner_ref):
        _gradients_agree(function, inner_loop, arguments)


# --------------------------------------------------------------------------------------------------------------- norm


def _norm_loop(x: Tensor, weight: Tensor, bias: Tensor | None, rms: bool, eps: float) -> Tensor:
    mean = 0 if rms else x.mean(-1, keepdim=True)
    out = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return out if bias is None else out + bias


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("extra", ["none", "residual", "x1", "rowscale", "two"])
def test_norms_with_every_argument(rms: bool, bias: bool, extra: str) -> None:
    arguments: dict[str, Any] = {"x": _draw(BATCH, 3, DIM, seed=0), "weight": _draw(DIM, seed=1), "bias": None}
    if bias:
        arguments["bias"] = _draw(DIM, seed=2)
    if extra in ("residual", "two"):
        arguments["residual"] = _draw(BATCH, 3, DIM, seed=3)
    if extra in ("x1", "two"):
        arguments["x1"] = _draw(BATCH, 3, DIM, seed=4)
    if extra == "rowscale":
        arguments["rowscale"] = _draw(BATCH, 3, seed=5)
    if extra == "two":
        arguments |= {"weight1": _draw(DIM, seed=6), "bias1": _draw(DIM, seed=7)}

    def loop(x: Tensor, weight: Tensor, bias: Tensor | None, **more: Any) -> Any:
        total = x * more["rowscale"][..., None] if "rowscale" in more else x
        total = total + more.get("x1", 0) + more.get("residual", 0)
        out = [_norm_loop(total, weight, bias, rms, 1e-4)]
        if "weight1" in more:
            out.append(_norm_loop(total, more["weight1"], more["bias1"], rms, 1e-4))
        return (*out, total)

    def ours(**given: Any) -> Any:
        if rms:
            return rms_norm_fn(**given, eps=1e-4, prenorm=True)
        return layer_norm_fn(**given, eps=1e-4, prenorm=True)

    _gradients_agree(ours, loop, arguments)


def test_norm_drops_what_its_mask_says() -> None:
    x, x1, weight = _draw(40, DIM, seed=0), _draw(40, DIM, seed=1), _draw(DIM, seed=2)
    torch.manual_seed(0)
    out, total, mask, mask1 = rms_norm_fn(
        x, weight, None, x1=x1, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    wanted = (x * mask + x1 * mask1) / 0.75
    _close(total, wanted)
    _close(out, _norm_loop(wanted, weight, None, True, 1e-6))
    assert 0.65 < mask.double().mean() < 0.85
    assert not torch.equal(mask, mask1)
    assert layer_norm_fn(x, weight, None, return_dropout_mask=True)[1:] == (None, None)


def test_norm_keeps_the_streams_dtype() -> None:
    x, weight = _draw(3, DIM, seed=0).bfloat16(), _draw(DIM, seed=1).float()
    out, total = rms_norm_fn(x, weight, None, residual_in_fp32=True, prenorm=True)
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    residual = _draw(3, DIM, seed=2).float()
    out, total = layer_norm_fn(x, weight, None, residual=residual, prenorm=True)
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    _close(total, x.double() + residual.double())


def test_the_norm_module() -> None:
    norm = RMSNorm(DIM, eps=1e-3, dtype=DOUBLE)
    assert set(norm.state_dict()) == {"weight"}
    x, residual = _draw(3, DIM, seed=0), _draw(3, DIM, seed=1)
    out, total = norm(x, residual=residual, prenorm=True)
    _close(out.detach(), _norm_loop(x + residual, torch.ones(DIM, dtype=DOUBLE), None, True, 1e-3))
    _close(total, x + residual)
    dropping = RMSNorm(DIM, dropout_p=0.5, dtype=DOUBLE)
    assert (dropping(x.abs() + 1) == 0).any()
    assert (dropping.eval()(x.abs() + 1) != 0).all()


# --------------------------------------------------------------------------------------------------------------- layer


def test_the_documented_example_of_the_layer() -> None:
    batch, length, dim = 2, 64, 16
    x = torch.randn(batch, length, dim)
    model = Mamba(
        # This module uses roughly 3 * expand * d_model^2 parameters
        d_model=dim,  # Model dimension d_model
        d_state=16,  # SSM state expansion factor
        d_conv=4,  # Local convolution width
        expand=2,  # Block expansion factor
    )
    y = model(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    # The layer is its pieces.
    xz = (x @ model.in_proj.weight.T).transpose(1, 2)
    wanted = mamba_inner_fn(
        xz,
        model.conv1d.weight,
        model.conv1d.bias,
        model.x_proj.weight,
        model.dt_proj.weight,
        model.out_proj.weight,
        None,
        -model.A_log.exp(),
        D=model.D,
        delta_bias=model.dt_proj.bias,
    )
    _close(y.detach(), wanted.detach().double())
    assert model.A_log._no_weight_decay  # type: ignore[attr-defined]
    assert model.dt_proj.bias._no_reinit  # type: ignore[attr-defined]


def _layer(**options: Any) -> Mamba:
    torch.manual_seed(0)
    return Mamba(8, d_state=4, layer_idx=0, dtype=DOUBLE, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_the_layer_step_by_step_and_in_pieces(bias: bool, d_conv: int) -> None:
    layer, x = _layer(bias=bias, d_conv=d_conv), _draw(BATCH, LENGTH, 8, seed=0)
    whole = layer(x).detach()
    conv_state, ssm_state = layer.allocate_inference_cache(BATCH, LENGTH)
    assert conv_state.shape == (BATCH, 16, d_conv)
    outs = []
    for t in range(LENGTH):
        out, *same = layer.step(x[:, t : t + 1], conv_state, ssm_state)
        assert same[0] is conv_state
        assert same[1] is ssm_state
        outs.append(out)
    _close(torch.cat(outs, 1).detach(), whole)
    params, outs = InferenceParams(LENGTH, BATCH), []
    for piece in (4, 1, 3, 1):
        cut = slice(params.seqlen_offset, params.seqlen_offset + piece)
        outs.append(layer(x[:, cut], inference_params=params))
        params.seqlen_offset += piece
    _close(torch.cat(outs, 1).detach(), whole)
    params.reset(LENGTH, BATCH)
    _close(layer(x[:, :2], params).detach(), whole[:, :2])


def test_a_step_of_the_layer_has_gradients() -> None:
    layer, x = _layer(), _draw(BATCH, 4, 8, seed=0)
    layer(x).square().sum().backward()
    wanted = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    states = layer.allocate_inference_cache(BATCH, 4)
    outs = [layer.step(x[:, t : t + 1], *states)[0] for t in range(4)]
    torch.cat(outs, 1).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None
        _close(p.grad, wanted[name], 1e-9)  # type: ignore[arg-type]


def test_the_states_stay_exact_in_a_narrow_layer() -> None:
    layer = Mamba(8, dtype=torch.bfloat16)
    conv_state, ssm_state = layer.allocate_inference_cache(1, 4, dtype=torch.bfloat16)
    assert (conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.float32)
    out, *_ = layer.step(torch.ones(1, 1, 8, dtype=torch.bfloat16), conv_state, ssm_state)
    assert out.dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------------------- model

CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=53, ssm_cfg={"d_state": 4})


def _model(dtype: torch.dtype = torch.float32) -> MambaLMHeadModel:
    torch.manual_seed(0)
    return MambaLMHeadModel(CONFIG, dtype=dtype)


def _writer(dtype: torch.dtype = torch.float32) -> MambaLMHeadModel:
    """A model with some opinion of what comes next, and not always that it is the last token again."""
    torch.manual_seed(0)
    model = MambaLMHeadModel(dataclasses.replace(CONFIG, tie_embeddings=False), dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight *= 4
        model.backbone.embedding.weight *= 30
    return model


def _prompts(rows: int = BATCH, length: int = 5) -> Tensor:
    return torch.randint(53, (rows, length), generator=torch.Generator().manual_seed(1))


def _greedy(model: MambaLMHeadModel, ids: Tensor, max_length: int) -> Tensor:
    """The likeliest token after everything, read again for each."""
    while ids.shape[1] < max_length:
        ids = torch.cat([ids, model(ids).logits[:, -1:, :53].argmax(-1)], 1)
    return ids


def test_the_model_trains_and_gives_logits() -> None:
    model, ids = _model(), _prompts()
    assert "backbone.layers.1.mixer.A_log" in model.state_dict()
    assert model.config.ssm_cfg == {"d_state": 4}
    assert (model.config.vocab_size, model.lm_head.weight.shape[0]) == (53, 56)
    logits = model(ids, position_ids=None).logits
    assert logits.shape == (BATCH, 5, 56)
    _close(model(ids, num_last_tokens=2).logits.detach(), logits[:, -2:].detach().double())
    plain = CausalLM(model.config.statescan())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(ids).logits, logits)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(p.grad is not None for p in model.parameters())
    marked = [n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)]
    assert len(marked) == 4


def test_the_model_reads_in_pieces() -> None:
    model, ids = _model(dtype=DOUBLE), _prompts(length=7)
    whole = model(ids).logits.detach()
    params, outs = InferenceParams(max_seqlen=7, max_batch_size=BATCH), []
    params.key_value_memory_dict = model.allocate_inference_cache(BATCH, 7)
    for piece in (3, 1, 2, 1):
        cut = slice(params.seqlen_offset, params.seqlen_offset + piece)
        outs.append(model(ids[:, cut], inference_params=params).logits)
        params.seqlen_offset += piece
    _close(torch.cat(outs, 1).detach(), whole)


@pytest.mark.parametrize("cg", [False, True])
def test_the_documented_call_of_generate(cg: bool) -> None:
    # As in that package's benchmark of generation, which its README points to.
    model, input_ids = _writer().eval(), _prompts()
    torch.random.manual_seed(0)
    max_length = input_ids.shape[1] + 10
    out = model.generate(
        input_ids=input_ids,
        max_length=max_length,
        cg=cg,
        return_dict_in_generate=True,
        output_scores=True,
        enable_timing=False,
        temperature=1.0,
        top_k=1,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
    )
    assert isinstance(out, GenerateOutput)
    assert torch.equal(out.sequences, _greedy(model, input_ids, max_length))
    assert torch.equal(model.generate(input_ids, max_length, cg=cg), out.sequences)
    scores = out.scores
    assert scores is not None
    assert len(scores) == 10
    logits = model(out.sequences[:, :-1]).logits[:, input_ids.shape[1] - 1 :, :53]
    _close(torch.stack(scores, 1), logits.detach().double())


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 0, "top_p": 0.7, "temperature": 1.3},
        {"top_k": 7, "top_p": 0.9, "repetition_penalty": 1.5},
        # Where the other package takes token 0's logit for the largest, fails for two rows, or ignores it.
        {"top_k": 0, "min_p": 0.2, "temperature": 2.0},
        {"top_k": 9, "min_p": 0.2},
    ],
)
def test_drawing_follows_torchs_seed_and_the_filters(options: dict[str, Any]) -> None:
    model, ids = _writer(), _prompts()
    torch.manual_seed(3)
    first = model.generate(ids, 20, **options)
    torch.manual_seed(3)
    with_scores = model.generate(ids, 20, **options, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(first, with_scores.sequences)
    others = [model.generate(ids, 20, **options) for _ in range(3)]
    assert any(not torch.equal(first, other) for other in others)
    for step, scores in enumerate(with_scores.scores):
        for row in range(BATCH):
            logits = scores[row].double()
            for token in set(with_scores.sequences[row, : 5 + step].tolist()):
                factor = options.get("repetition_penalty", 1.0)
                logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
            p = torch.softmax(logits / options.get("temperature", 1.0), -1)
            drawn = with_scores.sequences[row, 5 + step]
            if options["top_k"]:
                assert (p > p[drawn]).sum() < options["top_k"]
                p = torch.where(p >= p.topk(options["top_k"]).values[-1], p, 0)
            p = p / p.sum()
            # What is likelier than the token drawn holds less than top_p.
            assert p[p > p[drawn]].sum() <= options.get("top_p", 1.0) + 1e-5
            assert p[drawn] >= options.get("min_p", 0.0) * p.max() * (1 - 1e-5)


def test_the_same_prompt_twice_is_drawn_differently() -> None:
    model, ids = _writer(), _prompts(1).expand(3, -1)
    torch.manual_seed(0)
    rows = model.generate(ids, 25, top_k=0, temperature=2.0)
    assert len({tuple(row.tolist()) for row in rows}) == 3


@pytest.mark.parametrize("scores", [False, True])
def test_each_row_ends_at_its_own_end(scores: bool) -> None:
    # The other package goes on until all rows end at one step.
    model, ids = _writer(), _prompts(3)
    free = _greedy(model, ids, 30)
    end = int(free[0, 9])
    out = model.generate(ids, 30, eos_token_id=end, output_scores=scores)
    for row in range(3):
        new = free[row, 5:].tolist()
        wanted = new[: new.index(end) + 1] if end in new else new
        got = out[row, 5:].tolist()
        assert got[: len(wanted)] == wanted
        assert set(got[len(wanted) :]) <= {end}
    assert out.shape[1] == max(5 + (row.index(end) + 1 if end in row else len(row)) for row in free[:, 5:].tolist())


def test_teachers_streamers_and_a_smaller_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = _writer(), _prompts()
    teacher = torch.cat([ids, torch.tensor([[7, 8], [9, 10]])], 1)
    heard: list[Any] = []

    class Streamer:
        def put(self, tokens: Tensor) -> None:
            heard.append(tokens)

        def end(self) -> None:
            heard.append("end")

    out = model.generate(ids, 9, teacher_outputs=teacher, streamer=Streamer(), enable_timing=True)
    assert torch.equal(out[:, :7], teacher)
    assert torch.equal(out, _greedy(model, teacher, 9))
    assert torch.equal(heard[0], ids)
    assert [tokens.tolist() for tokens in heard[1:-1]] == out[:, 5:].T.tolist()
    assert heard[-1] == "end"
    assert "ms" in capsys.readouterr().out
    few = model.generate(ids, 30, top_k=0, temperature=5.0, vocab_size=4)
    assert int(few[:, 5:].max()) < 4
    assert int(model.generate(ids, 60, top_k=0, temperature=50.0)[:, 5:].max()) < 53


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_generate_in_other_dtypes(dtype: torch.dtype) -> None:
    out = _writer(dtype=dtype).generate(_prompts(), 12)
    assert out.shape == (BATCH, 12)
    if dtype == torch.float64:
        assert torch.equal(out, _greedy(_writer(dtype=dtype), _prompts(), 12))


def test_saving_and_reading(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path / "theirs")
    assert {path.name for path in (tmp_path / "theirs").iterdir()} >= {"config.json", "pytorch_model.bin"}
    fields = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert MambaConfig(**fields) == model.config
    same = MambaLMHeadModel.from_pretrained(tmp_path / "theirs", device="cpu", dtype=torch.float32)
    assert isinstance(same, MambaLMHeadModel)
    assert torch.equal(same(_prompts()).logits, model(_prompts()).logits)
    assert same.config == model.config
    assert same.backbone.layers[0].mixer.A_log._no_weight_decay  # type: ignore[union-attr]
    model.save_pretrained(tmp_path / "hf", layout="transformers")
    again = MambaLMHeadModel.from_pretrained(str(tmp_path / "hf"))
    assert torch.equal(again(_prompts()).logits, model(_prompts()).logits)


def test_models_and_configurations_are_copied_whole() -> None:
    model = MambaLMHeadModel(CONFIG, initializer_cfg={"initializer_range": 0.5, "rescale_prenorm_residual": False})
    assert 0.4 < float(model.backbone.embedding.weight.detach().std()) < 0.6
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin.config == model.config
    assert twin.config.initializer_range == 0.5
    assert torch.equal(twin(_prompts()).logits, model(_prompts()).logits)
    assert CONFIG.d_inner == 32
    with pytest.raises(AttributeError, match="no_such"):
        _ = CONFIG.no_such


# -------------------------------------------------------------------------------------------------------------- errors


def _without(arguments: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return arguments | changed


@pytest.mark.parametrize(
    ("function", "arguments", "changed", "error"),
    [
        (selective_scan_fn, _scan_arguments(), {"u": torch.zeros(2, 3)}, ShapeError),
        (selective_scan_fn, _scan_arguments(), {"delta": torch.zeros(BATCH, LENGTH, DIM)}, ShapeError),
        (selective_scan_fn, _scan_arguments(), {"A": torch.zeros(STATE, DIM)}, ShapeError),
        (selective_scan_fn, _scan_arguments(), {"B": torch.zeros(BATCH, LENGTH, STATE)}, ShapeError),
        (selective_scan_fn, _scan_arguments(), {"C": torch.zeros(BATCH, 4, STATE, LENGTH)}, ShapeError),
        (selective_scan_fn, _scan_arguments(), {"C": torch.zeros(BATCH, STATE, 2 * LENGTH)}, ShapeError),
        (selective_scan_fn, _scan_arguments(), {"D": torch.zeros(DIM, 1)}, ShapeError),
        (selective_scan_fn, _scan_arguments(), {"z": torch.zeros(1)}, ShapeError),
        (selective_scan_ref, _scan_arguments(), {"delta_bias": 3}, DTypeError),
        (selective_scan_fn, _scan_arguments(), {"delta": torch.ones(BATCH, DIM, LENGTH).long()}, DTypeError),
        (selective_scan_fn, _scan_arguments(), {"D": torch.ones(DIM).long()}, DTypeError),
        (_updated, _update_arguments(0, None), {"B": 3}, DTypeError),
        (_updated, _update_arguments(0, None), {"state": torch.zeros(3, DIM, STATE)}, ShapeError),
        (_updated, _update_arguments(0, None), {"dt": torch.zeros(BATCH, 2)}, ShapeError),
        (_updated, _update_arguments(0, None), {"B": torch.zeros(BATCH, 5, STATE)}, ShapeError),
        (_updated, _update_arguments(0, None), {"C": torch.zeros(BATCH, STATE + 1)}, ShapeError),
        (_updated, _update_arguments(0, None), {"state_batch_indices": torch.tensor([0, 9])}, ShapeError),
        (_updated, _update_arguments(0, None), {"state_batch_indices": torch.tensor([0.0, 1.0])}, DTypeError),
        (mamba_inner_fn, _inner_arguments(), {"xz": torch.zeros(2, 5, 3)}, ShapeError),
        (mamba_inner_fn, _inner_arguments(), {"x_proj_weight": torch.zeros(3, DIM)}, ShapeError),
        (mamba_inner_fn, _inner_arguments(), {"checkpoint_lvl": 2}, ConfigError),
        (mamba_inner_fn, _inner_arguments(), {"b_rms_weight": torch.zeros(DIM)}, ShapeError),
        (mamba_inner_fn, _inner_arguments(), {"out_proj_bias": torch.zeros(1)}, ShapeError),
    ],
)
def test_errors_name_the_argument(
    function: Callable[..., Any], arguments: dict[str, Any], changed: dict[str, Any], error: type[Exception]
) -> None:
    if function is _updated:
        arguments = {"state": torch.zeros(BATCH, DIM, STATE, dtype=DOUBLE), **arguments}
    with pytest.raises(error, match=rf": .*\b{next(iter(changed))}\b") as caught:
        function(**_without(arguments, **changed))
    assert "\n" not in str(caught.value)


def test_errors_of_the_convolution_norms_and_states_name_the_argument() -> None:
    x, weight, state = torch.zeros(2, 3, 5), torch.zeros(3, 4), torch.zeros(2, 3, 3)
    calls: list[tuple[str, Callable[[], Any], type[Exception]]] = [
        ("activation", lambda: causal_conv1d_fn(x, weight, activation="relu"), ConfigError),
        ("weight", lambda: causal_conv1d_fn(x, weight.T), ShapeError),
        ("bias", lambda: causal_conv1d_fn(x, weight, torch.zeros(4)), ShapeError),
        ("seq_idx", lambda: causal_conv1d_fn(x, weight, seq_idx=torch.zeros(2, 4)), ShapeError),
        ("initial_states", lambda: causal_conv1d_fn(x, weight, initial_states=state[:1]), ShapeError),
        ("final_states_out", lambda: causal_conv1d_fn(x, weight, final_states_out=state[:1]), ShapeError),
        ("conv_state", lambda: causal_conv1d_update(x, state[..., 1:], weight), ShapeError),
        ("conv_state", lambda: causal_conv1d_update(x, state[:1], weight), ShapeError),
        ("conv_state", lambda: causal_conv1d_update(x, state.clone().requires_grad_(), weight), ConfigError),
        ("cache_seqlens", lambda: causal_conv1d_update(x, state, weight, cache_seqlens=torch.zeros(3)), ShapeError),
        (
            "conv_state_indices",
            lambda: causal_conv1d_update(x, state, weight, conv_state_indices=torch.tensor([-1, 0])),
            ShapeError,
        ),
        ("rowscale", lambda: rms_norm_fn(x, x[0, 0], None, x1=x, rowscale=x[..., 0]), ConfigError),
        ("dropout_p", lambda: layer_norm_fn(x, x[0, 0], None, dropout_p=1.0), ConfigError),
        ("residual", lambda: layer_norm_fn(x, x[0, 0], None, residual=x[0]), ShapeError),
        ("weight1", lambda: rms_norm_fn(x, x[0, 0], None, weight1=x[0]), ShapeError),
        ("layer_idx", lambda: Mamba(8)(torch.zeros(1, 2, 8), InferenceParams(4, 1)), ConfigError),
        ("ssm_state", lambda: _layer().step(torch.zeros(1, 1, 8), torch.zeros(1, 16, 4), state), ShapeError),
    ]
    for name, call, error in calls:
        with pytest.raises(error, match=rf": .*\b{name}\b"):
            call()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("d_intermediate", {"d_intermediate": 64}),
        ("attn_layer_idx", {"attn_layer_idx": [1]}),
        ("attn_cfg", {"attn_cfg": {"num_heads": 2}}),
        ("rms_norm", {"rms_norm": False}),
        ("layer", {"ssm_cfg": {"layer": "Mamba2"}}),
        ("headdim", {"ssm_cfg": {"headdim": 4}}),
    ],
)
def test_other_architectures_are_refused_by_name(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=name):
        MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=8, **fields))


def test_generate_refuses_by_name() -> None:
    model, ids = _model(), _prompts()
    for name, options in (
        ("max_length", {"max_length": 5}),
        ("vocab_size", {"max_length": 9, "vocab_size": 57}),
        ("top_k", {"max_length": 9, "top_k": -1}),
        ("min_p", {"max_length": 9, "top_k": 0, "min_p": 2}),
        ("teacher_outputs", {"max_length": 9, "teacher_outputs": torch.zeros(1, 4)}),
    ):
        with pytest.raises((ConfigError, ShapeError), match=name):
            model.generate(ids, **options)
    with pytest.raises(ConfigError, match="initializer_cfg"):
        MambaLMHeadModel(CONFIG, initializer_cfg={"spread": 2})
