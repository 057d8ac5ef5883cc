"""Mamba, FalconMamba and Jamba models of the package `transformers` on statescan's kernels, one line to turn on.

What is replaced is the forward method of three classes, the layers that hold the scan. Models, configurations, weights,
caches, `generate`, trainers and adapters stay the package's own.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import re
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.errors import ConfigError, MissingExtraError, ShapeError
from statescan.nn.mamba import is_plain
from statescan.nn.packing import Packing, pack
from statescan.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update

__all__ = ["disable", "enable", "is_enabled"]

# The versions whose layers and caches were read: the first, and the first that is not among them.
_FIRST, _BEYOND = (5, 17), (5, 25)
_MIXERS = {"mamba": "MambaMixer", "falcon_mamba": "FalconMambaMixer", "jamba": "JambaMambaMixer"}
_BACKENDS = ("auto", "cpu", "cuda", "triton", "torch", "reference")


class _Enabled(NamedTuple):
    """The package's own forward methods, and the backend of ours."""

    stock: dict[type[nn.Module], Callable[..., Any]]
    backend: str


_enabled: _Enabled | None = None


def enable(*, backend: str = "auto") -> None:
    """Makes the Mamba layers of `transformers` run on statescan's kernels, in models that exist and in later ones.

    The layers of `MambaForCausalLM`, `FalconMambaForCausalLM` and `JambaForCausalLM` (and of their base models) compute
    the same function of the same parameters, in training, prefill and `generate`, and read and write the package's own
    cache objects. Three things come out right that the package's own path leaves wrong: padding on either side gives
    what each row gives alone, in its outputs, its gradients and its state; several tokens at once may go on from a
    cache; and adapters on x_proj and dt_proj are called. Enabling twice changes the backend alone.

    Args:
        backend: of the convolution and the scan, as in `statescan.ops`. Default "auto".

    Raises:
        MissingExtraError: `transformers` is not installed.
        ConfigError: its version is not one that was read, its layers are not as expected, somebody else has replaced
            them, or the backend is unknown. Then nothing is changed.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), algorithm 2. The
    norms of FalconMamba and Jamba on dt, B and C are their layers' own modules.
    """
    global _enabled
    if backend not in _BACKENDS:
        raise ConfigError(
            f"transformers.enable: backend must be one of {', '.join(_BACKENDS)}, got {backend!r}; use 'auto'"
        )
    if _enabled is not None:
        _enabled = _enabled._replace(backend=backend)
        return
    version = _version()
    stock: dict[type[nn.Module], Callable[..., Any]] = {}
    for model, name in _MIXERS.items():
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        mixer = getattr(module, name, None)
        if mixer is None:
            raise ConfigError(f"transformers.enable: {module.__name__} of version {version} has no {name}; {_CURE}")
        _check_mixer(mixer, version)
        stock[mixer] = mixer.forward
    _check_cache(version)
    bound = _bound_forwards(stock)
    for layer, _ in bound:
        if layer._old_forward.__func__ is not stock[_base(layer, stock)]:
            raise ConfigError(
                f"transformers.enable: a {type(layer).__name__} has a forward method of its own, "
                f"{layer._old_forward!r}; enable before the model is wrapped"
            )
    for mixer in stock:
        mixer.forward = _forward
    for layer, _ in bound:
        layer._old_forward = types.MethodType(_forward, layer)
    _enabled = _Enabled(stock, backend)


def disable() -> None:
    """Gives the layers of `transformers` their own forward methods back; does nothing where `enable` was not called.

    Raises:
        ConfigError: somebody has replaced the methods again since, so that there is nothing to give back to.
    """
    global _enabled
    if _enabled is None:
        return
    stock = _enabled.stock
    for mixer in stock:
        if mixer.forward is not _forward:
            raise ConfigError(
                f"transformers.disable: {mixer.__name__}.forward is {mixer.forward!r}, put there after enable(); "
                "undo that first"
            )
    for mixer, forward in stock.items():
        mixer.forward = forward
    for layer, _ in _bound_forwards(stock):
        if layer._old_forward.__func__ is _forward:
            layer._old_forward = types.MethodType(stock[_base(layer, stock)], layer)
    _enabled = None


def is_enabled() -> bool:
    """Whether the layers of `transformers` run on statescan's kernels."""
    return _enabled is not None


_CURE = f"install 'transformers>={_FIRST[0]}.{_FIRST[1]},<{_BEYOND[0]}.{_BEYOND[1]}'"


def _version() -> str:
    try:
        package = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError("statescan.integrations.transformers", "transformers", "hf") from None
    version = str(package.__version__)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not _FIRST <= (int(numbers[1]), int(numbers[2])) < _BEYOND:
        raise ConfigError(
            f"transformers.enable: transformers must be at least {_FIRST[0]}.{_FIRST[1]} and below "
            f"{_BEYOND[0]}.{_BEYOND[1]}, whose Mamba layers were read, got {version}; {_CURE}"
        )
    return version


def _check_mixer(mixer: type[nn.Module], version: str) -> None:
    """Refuses a layer class whose forward is not the package's own or takes other arguments than were read."""
    forward = mixer.__dict__.get("forward")
    if forward is None or getattr(forward, "__module__", None) != mixer.__module__:
        raise ConfigError(
            f"transformers.enable: {mixer.__name__}.forward is not the package's own but {mixer.forward!r}; "
            "undo that replacement first"
        )
    names = tuple(inspect.signature(forward).parameters)
    if names not in [("self", "hidden_states", its, "attention_mask", "kwargs") for its in ("cache", "cache_params")]:
        raise ConfigError(
            f"transformers.enable: {mixer.__name__}.forward of version {version} must take (hidden_states, cache, "
            f"attention_mask, **kwargs), takes {names[1:]}; {_CURE}"
        )


def _check_cache(version: str) -> None:
    caches = importlib.import_module("transformers.cache_utils")
    layer = getattr(caches, "LinearAttentionLayer", None)
    made = None if layer is None else layer()
    wanted = ("conv_states", "recurrent_states", "has_previous_state", "record_past")
    if made is None or any(not hasattr(made, name) for name in wanted):
        raise ConfigError(
            f"transformers.enable: a cache's LinearAttentionLayer of version {version} must have {', '.join(wanted)}; "
            f"{_CURE}"
        )


def _base(layer: nn.Module, stock: dict[type[nn.Module], Any]) -> type[nn.Module]:
    return next(mixer for mixer in type(layer).__mro__ if mixer in stock)


def _bound_forwards(stock: dict[type[nn.Module], Any]) -> list[tuple[Any, Any]]:
    """Layers of existing models on which `accelerate` (device_map, offloading) put a forward of its own over the
    class's, which it remembers bound; with that forward. Raises where something else did so."""
    found = []
    for layer in gc.get_objects():
        if not issubclass(type(layer), tuple(stock)):
            continue
        own = vars(layer).get("forward")
        if own is None or type(layer).forward not in (_forward, stock[_base(layer, stock)]):
            continue
        if not hasattr(vars(layer).get("_old_forward"), "__func__"):
            raise ConfigError(
                f"transformers: a {type(layer).__name__} has a forward method of its own, {own!r}, over the class's; "
                "call enable() or disable() before it is put there (for hub kernels: load without use_kernels=True)"
            )
        found.append((layer, own))
    return found


# The padding mask read last and what was read: every layer of a model is handed the same one, and reading it makes the
# host wait for the device.
_read: tuple[weakref.ref[Tensor], int, int, Packing | None] | None = None


def _packing(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Packing | None:
    global _read
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[1] < length:
        raise ShapeError(
            f"transformers: a Mamba layer's attention_mask must be (batch, length) = ({batch}, {length}), got "
            f"{tuple(mask.shape)}; give one entry a token, 1 at real tokens and 0 at padding"
        )
    # A mask that also covers the tokens in the cache ends with this call's.
    if torch.compiler.is_compiling() or mask.is_inference():  # without identity, or without a version
        return pack("transformers", mask[:, -length:], batch, length, device)
    if _read is not None and _read[0]() is mask and _read[1:3] == (mask._version, length):
        return _read[3]
    packing = pack("transformers", mask[:, -length:], batch, length, device)
    _read = (weakref.ref(mask), mask._version, length, packing)
    return packing


def _forward(
    self: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """A Mamba layer of `transformers` (see `enable`); hidden_states (batch, length, hidden_size), result alike."""
    former = kwargs.pop("cache_params", None)  # the argument's name before 5.24
    cache = former if cache is None else cache
    unknown = sorted(name for name, value in kwargs.items() if value is not None)
    if unknown:
        raise ConfigError(
            f"transformers: a Mamba layer on statescan's kernels takes no {', '.join(unknown)}; leave it out, or "
            "call statescan.integrations.transformers.disable()"
        )
    batch, length, _ = hidden_states.shape
    held: Any = None if cache is None else cache.layers[self.layer_idx]
    before = held is not None and held.has_previous_state[0]
    packing = _packing(attention_mask, batch, length, hidden_states.device)
    if packing is not None:
        if held is not None and held.record_past:
            raise ConfigError(
                "transformers: a cache that records its past (assisted generation) can't be padded on statescan's "
                "kernels; give rows of one length without attention_mask"
            )
        if packing.tokens == 0:
            _start_empty(self, cache, before, hidden_states)
            return torch.zeros_like(hidden_states)
        x = packing.pack(hidden_states)
    elif held is not None and before and length == 1 and not held.record_past and _untouched(self.conv1d, nn.Conv1d):
        return _step(self, hidden_states[:, 0], cache, held).unsqueeze(1)
    else:
        x = hidden_states
    output = _sequences(self, x, cache, held if before else None, None if packing is None else packing.cu_seqlens)
    return output if packing is None else packing.unpack(output)


def _start_empty(self: Any, cache: Any, before: bool, hidden_states: Tensor) -> None:
    """A first call that holds padding alone leaves the state before the first token: zeros."""
    if cache is None or before:
        return
    batch, inner, width = hidden_states.shape[0], self.intermediate_size, self.conv_kernel_size
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    cache.update_conv_state(hidden_states.new_zeros(batch, inner, width), self.layer_idx, conv_kernel_size=width)
    state = hidden_states.new_zeros(batch, inner, self.ssm_state_size, dtype=wide)
    cache.update_recurrent_state(state, self.layer_idx)


def _sequences(self: Any, x: Tensor, cache: Any, held: Any, cu_seqlens: Tensor | None) -> Tensor:
    """Whole sequences, packed where cu_seqlens is given, from the states in `held`, into `cache`."""
    width = self.conv_kernel_size
    xz = self.in_proj(x)
    u, z = xz.chunk(2, dim=-1)
    window = state = None
    if held is not None:
        # The cache holds (batch, channels, width) or more; the oldest inputs are out of the next one's reach. Where
        # gradients are on, what goes into the graph must not be overwritten below.
        window = held.conv_states[0][..., held.conv_states[0].shape[-1] - (width - 1) :].transpose(1, 2).to(u.dtype)
        state = held.recurrent_states[0].to(torch.promote_types(u.dtype, torch.float32))
        if torch.is_grad_enabled():
            window, state = window.clone(), state.clone()
    convolved, after = _convolve(self, u, window, cu_seqlens, cache is not None)
    dt, B, C, dt_bias = _select(self, convolved)
    scan = selective_scan(
        convolved,
        dt,
        _A(self, u.dtype),
        B,
        C,
        D=self.D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=True,
        initial_state=state,
        cu_seqlens=cu_seqlens,
        return_final_state=cache is not None,
        backend=_backend(),
    )
    if cache is not None:
        if cu_seqlens is not None:
            kept = F.pad(after.transpose(1, 2), (1, 0))  # type: ignore[union-attr]
        elif cache.layers[self.layer_idx].record_past:
            kept = u.transpose(1, 2)
        else:
            kept = u[:, -width:].transpose(1, 2)
        cache.update_conv_state(kept, self.layer_idx, conv_kernel_size=width)
        cache.update_recurrent_state(scan.final_state, self.layer_idx)
    return self.out_proj(_settled(scan.y, x))


def _step(self: Any, x: Tensor, cache: Any, held: Any) -> Tensor:
    """One more token a row: (batch, hidden_size), from the states in the cache, which it moves on."""
    u, z = self.in_proj(x).chunk(2, dim=-1)
    window, state = held.conv_states[0], held.recurrent_states[0]
    moved = torch.cat([window[..., 1:], u.unsqueeze(-1).to(window.dtype)], dim=-1)
    silu = self.activation in ("silu", "swish")
    convolved = causal_conv1d_update(
        u,
        moved[..., :-1].transpose(1, 2).to(u.dtype),
        self.conv1d.weight.squeeze(1),
        self.conv1d.bias,
        activation="silu" if silu else None,
        backend=_backend(),
    ).y
    if not silu:
        convolved = self.act(convolved)
    dt, B, C, dt_bias = _select(self, convolved)
    wide = torch.promote_types(u.dtype, torch.float32)
    inplace = state.dtype == wide and not torch.is_grad_enabled()
    update = selective_state_update(
        state if inplace else state.to(wide, copy=True),
        convolved,
        dt,
        _A(self, u.dtype),
        B,
        C,
        D=self.D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=True,
        inplace=inplace,
        backend=_backend(),
    )
    window.copy_(moved)
    if not inplace:
        cache.update_recurrent_state(update.state, self.layer_idx)
    return self.out_proj(_settled(update.y, x))


def _convolve(
    self: Any, u: Tensor, window: Tensor | None, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """act(conv1d(u)) from the inputs in `window` (rows, width - 1, channels), and that of the inputs after it."""
    silu = self.activation in ("silu", "swish")
    if _untouched(self.conv1d, nn.Conv1d):
        y, after = causal_conv1d(
            u,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu" if silu else None,
            initial_state=window,
            cu_seqlens=cu_seqlens,
            return_final_state=keep,
            backend=_backend(),
        )
        return (y if silu else self.act(y)), after
    # Somebody stands between the filter and its use (an adapter, a parametrization, offloading): the module is called,
    # sequence after sequence.
    reach = self.conv_kernel_size - 1
    rows = list(u.unbind(0)) if cu_seqlens is None else list(u[0].split(cu_seqlens.diff().tolist()))
    outputs, ends = [], []
    for index, row in enumerate(rows):
        past = row.new_zeros(reach, row.shape[1]) if window is None else window[index]
        whole = torch.cat([past, row])
        ends.append(whole[whole.shape[0] - reach :])
        if len(row):
            outputs.append(self.act(self.conv1d(whole.T.unsqueeze(0))[0, :, reach : whole.shape[0]]).T)
    y = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs).unsqueeze(0)
    return y.to(u.dtype), torch.stack(ends) if keep else None


def _select(self: Any, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dt, B, C as functions of the convolution's output, and the bias that dt still lacks."""
    parts = self.x_proj(u).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
    if hasattr(self, "dt_layernorm"):
        norms = (self.dt_layernorm, self.b_layernorm, self.c_layernorm)
        parts = tuple(norm(part) for norm, part in zip(norms, parts, strict=True))
    low, B, C = (part.to(u.dtype) for part in parts)
    if _untouched(self.dt_proj, nn.Linear):
        # The scan adds the bias, in float32 and right before the softplus, where small steps survive 16-bit numbers.
        return F.linear(low, self.dt_proj.weight).to(u.dtype), B, C, self.dt_proj.bias
    return self.dt_proj(low).to(u.dtype), B, C, None


def _untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Nobody stands between the module's parameters and their use, `accelerate` on the instance included."""
    return "forward" not in vars(module) and is_plain(module, kind)


def _settled(y: Tensor, x: Tensor) -> Tensor:
    """What out_proj is given: in the layer's input's dtype, but where autocast will choose one."""
    return y if torch.is_autocast_enabled(y.device.type) else y.to(x.dtype)


def _A(self: Any, dtype: torch.dtype) -> Tensor:
    return -torch.exp(self.A_log.to(torch.promote_types(dtype, torch.float32)))


def _backend() -> str:
    return "auto" if _enabled is None else _enabled.backend
