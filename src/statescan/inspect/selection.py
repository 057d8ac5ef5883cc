"""What each layer writes into its state, and how long it stays: exact quantities of the recurrence, in float64.

With ``w_t = dt_t u_t B_t`` (what token t writes) and ``h_t = exp(dt_t A) h_{t-1} + w_t``, token t's part of a later
state is ``c_{t,s} = exp(A (dt_{t+1} + ... + dt_s)) w_t``, and ``h_s = sum_t c_{t,s}``: a state is the sum of its
tokens' parts.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from statescan.errors import ConfigError, DataError, ShapeError

__all__ = [
    "ChannelMap",
    "InspectReport",
    "LayerSelection",
    "inspect_text",
    "layer_selection",
    "step_sizes",
    "token_contributions",
]

# Numbers of (token, channel, state) held at once, 64 MB in float64.
_AT_ONCE = 1 << 23

# What counts as forgotten: log2 of the part that is left.
_LEFT = math.log2(0.1)

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """One layer's choices, a number for every token.

    Args:
        layer: index of the layer.
        delta: mean over channels of the step size dt_t: how far the layer opens for the token.
        delta_median: the median over channels.
        written: ``|w_t| / |h_t|``, how much of the state right after the token is new (above 1 where it cancels the
            old).
        half_life: median over channels and states of ``ln 2 / (dt_t |A|)``: tokens until the state would be half
            forgotten if every token had this one's step.
        remembered: tokens until less than a tenth of what the token wrote is left, ``|c_{t,s}| < |w_t| / 10``;
            infinity where more is left at the end of the text.
        left: ``|c_{t,end}| / |w_t|``, the part of what it wrote that is left at the end.
        share: ``<c_{t,end}, h_end> / |h_end|^2``, its share of the final state; the shares sum to 1, some may be
            negative.
    """

    layer: int
    delta: Array
    delta_median: Array
    written: Array
    half_life: Array
    remembered: Array
    left: Array
    share: Array


class ChannelMap(NamedTuple):
    """One layer, channel by channel, the channels with the longest memory first.

    Args:
        layer: index of the layer.
        channels: (d_inner,) the order of the channels.
        delta: (d_inner, tokens) step sizes in this order.
        written: (d_inner, tokens) ``|w_t| / |h_t|`` of each channel.
    """

    layer: int
    channels: NDArray[np.int64]
    delta: Array
    written: Array


def _decay(exponent: Tensor) -> Tensor:
    """exp, kept clear of numbers so small that processors compute them slowly: they are nothing beside the others."""
    return torch.exp(exponent.clamp_(min=-500))


def _check(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, channels = u.shape
    for name, tensor, wanted in (
        ("dt", dt, (tokens, channels)),
        ("A", A, (channels, A.shape[-1])),
        ("B", B, (tokens, A.shape[-1])),
    ):
        if tuple(tensor.shape) != wanted:
            raise ShapeError(f"inspect: {name} must be {wanted} for u {tuple(u.shape)}, got {tuple(tensor.shape)}")
    u, dt, A, B = (tensor.detach().cpu().double() for tensor in (u, dt, A, B))
    return u, dt, A, B


def token_contributions(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Every token's part of the final state, ``c_t = exp(A sum_{s > t} dt_s) dt_t u_t B_t``.

    Args:
        u: (tokens, d_inner), the scan's input.
        dt: (tokens, d_inner), step sizes after bias and softplus.
        A: (d_inner, d_state), negative.
        B: (tokens, d_state).

    Returns:
        (tokens, d_inner, d_state) float64; its sum over tokens is the final state from an empty one.

    Raises:
        ShapeError: shapes that don't fit.
    """
    u, dt, A, B = _check(u, dt, A, B)
    later = dt.sum(0) - dt.cumsum(0)
    return torch.exp(A * later[:, :, None]) * ((dt * u)[:, :, None] * B[:, None, :])


def layer_selection(layer: int, u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> LayerSelection:
    """The quantities of `LayerSelection` from a layer's scan; arguments as in `token_contributions`."""
    u, dt, A, B = _check(u, dt, A, B)
    tokens, channels = u.shape
    states = A.shape[1]
    x = dt * u
    elapsed = dt.cumsum(0)
    # |w_t|^2 = sum_d x_td^2 sum_n B_tn^2
    wrote = (x.square().sum(1) * B.square().sum(1)).sqrt()

    h = torch.zeros(channels, states, dtype=torch.float64)
    norms = torch.zeros(tokens, dtype=torch.float64)
    for t in range(tokens):
        h = torch.exp(dt[t, :, None] * A) * h + x[t, :, None] * B[t]
        norms[t] = h.norm()

    at_once = max(1, _AT_ONCE // (channels * states))
    left, share, remembered = (torch.zeros(tokens, dtype=torch.float64) for _ in range(3))
    for start in range(0, tokens, at_once):
        part = slice(start, min(start + at_once, tokens))
        c = _decay(A * (elapsed[-1] - elapsed[part])[:, :, None]) * (x[part, :, None] * B[part, None, :])
        left[part] = c.flatten(1).norm(dim=1)
        share[part] = (c * h).flatten(1).sum(1)
        remembered[part] = _forgotten(range(part.start, part.stop), x, elapsed, A, B, wrote)
    half_life = torch.stack([(math.log(2) / (dt[t, :, None] * A.abs())).flatten().median() for t in range(tokens)])
    safe = torch.where(wrote > 0, wrote, 1.0)
    return LayerSelection(
        layer,
        delta=dt.mean(1).numpy(),
        delta_median=dt.median(1).values.numpy(),
        written=(wrote / torch.where(norms > 0, norms, 1.0)).numpy(),
        half_life=half_life.numpy(),
        remembered=remembered.numpy(),
        left=(left / safe).numpy(),
        share=(share / torch.where(h.norm() > 0, h.norm().square(), 1.0)).numpy(),
    )


def _forgotten(which: range, x: Tensor, elapsed: Tensor, A: Tensor, B: Tensor, wrote: Tensor) -> Tensor:
    """Tokens until ``|c_{t,s}|`` falls to a tenth of ``|w_t|``: by bisection, as it never rises, then its logarithm."""
    t = torch.arange(which.start, which.stop)
    last = len(x) - 1
    scale = torch.where(wrote > 0, wrote, 1.0)[t, None, None]
    energy = (x[t][:, :, None] * B[t][:, None, :] / scale).square()

    def log_part(s: Tensor) -> Tensor:
        """log2 of the part left at token s."""
        decay = _decay(2 * A * (elapsed[s] - elapsed[t])[:, :, None])
        return 0.5 * torch.log2((energy * decay).sum((1, 2)))

    low, high = t.clone(), torch.full_like(t, last)
    low_value, high_value = torch.zeros(len(t), dtype=torch.float64), log_part(high)
    never = high_value > _LEFT
    while bool(((high - low) > 1).logical_and(~never).any()):
        middle = (low + high) // 2
        value = log_part(middle)
        above = value > _LEFT
        low, low_value = torch.where(above, middle, low), torch.where(above, value, low_value)
        high, high_value = torch.where(above, high, middle), torch.where(above, high_value, value)
    between = (low_value - _LEFT) / (low_value - high_value)
    answer = (low - t).double() + (high - low).double() * between
    # A token that wrote nothing has nothing to forget.
    return torch.where(wrote[t] > 0, torch.where(never, torch.inf, answer), 0.0)


def _channel_map(layer: int, u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> ChannelMap:
    u, dt, A, B = _check(u, dt, A, B)
    x = dt * u
    h = torch.zeros_like(A)
    written = torch.zeros_like(dt)
    for t in range(len(u)):
        h = torch.exp(dt[t, :, None] * A) * h + x[t, :, None] * B[t]
        norm = h.norm(dim=1)
        written[t] = x[t].abs() * B[t].norm() / torch.where(norm > 0, norm, 1.0)
    order = torch.argsort((dt.mean(0)[:, None] * A.abs()).mean(1), stable=True)
    return ChannelMap(layer, order.numpy(), dt[:, order].T.numpy().copy(), written[:, order].T.numpy().copy())


@dataclass(frozen=True)
class InspectReport:
    """What a model selects in a text: `save_html` and `save_png` draw it, the fields are plain arrays.

    Args:
        pieces: the text of each token; empty where a character is only begun, which the token that ends it shows.
        token_ids: their ids.
        bits: what each token cost to predict, -log2 p; NaN for the first.
        layers: the layers looked at, in order.
        channels: one layer in full.
        n_layer: layers of the model.
        title: what stands above the report.
        notes: what was left out, in sentences.
    """

    pieces: tuple[str, ...]
    token_ids: tuple[int, ...]
    bits: Array
    layers: tuple[LayerSelection, ...]
    channels: ChannelMap
    n_layer: int
    title: str
    notes: tuple[str, ...]

    def save_html(self, path: str | Path) -> None:
        """Writes the report as one HTML file that needs nothing else, whole or not at all."""
        from statescan.inspect.html import save_html

        save_html(self, path)

    def save_png(self, path: str | Path) -> None:
        """Draws the report as PNG, whole or not at all.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from statescan.inspect.picture import save_png

        save_png(self, path)


def inspect_text(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    layer: int | None = None,
    max_tokens: int = 1024,
    max_layers: int = 24,
    title: str | None = None,
) -> InspectReport:
    """Runs a model over a text and measures, layer by layer, what goes into the state and what stays.

    Args:
        model: a `statescan.models.CausalLM`.
        tokenizer: of the model.
        text: at least one token.
        layer: the layer shown channel by channel; negative counts from the end. Default: the middle one.
        max_tokens: tokens looked at; of a longer text the first ones. Default 1024.
        max_layers: layers looked at; of a deeper model as many, evenly spaced, the first, last and `layer` among them.
            Default 24.
        title: Default: the model's size.

    Returns:
        The `InspectReport`; what was left out stands in its notes.

    Raises:
        DataError: the text is empty.
        ConfigError: `layer`, `max_tokens` or `max_layers` is out of range.
    """
    blocks: Any = model.backbone.layers  # type: ignore[union-attr]
    depth = len(blocks)
    if not getattr(getattr(model, "config", None), "is_plain_mamba", True):
        raise ConfigError(
            "inspect: model must have the published Mamba layer, which makes dt and B from its input and has a real A; "
            "got one with another block, inner map or selection"
        )
    if max_tokens < 1 or max_layers < 1:
        raise ConfigError(f"inspect: max_tokens and max_layers must be at least 1, got {max_tokens} and {max_layers}")
    if layer is not None and not -depth <= layer < depth:
        raise ConfigError(f"inspect: layer must be from {-depth} to {depth - 1}, got {layer}")
    chosen = depth // 2 if layer is None else layer % depth
    ids = np.asarray(tokenizer.encode(text)).astype(np.int64)
    if len(ids) == 0:
        raise DataError("inspect: text must hold at least one token, got an empty text")
    notes = []
    if len(ids) > max_tokens:
        notes.append(
            f"The text has {len(ids):,} tokens; shown are the first {max_tokens:,} (max_tokens). "
            "What is said of the end holds for the end of these."
        )
        ids = ids[:max_tokens]
    looked_at = _spaced(depth, max_layers, chosen)
    if len(looked_at) < depth:
        notes.append(f"The model has {depth} layers; shown are {len(looked_at)} of them, evenly spaced (max_layers).")

    layers: list[LayerSelection] = []
    full: list[ChannelMap] = []
    handles = []
    for index in looked_at:
        handles += _watch(index, blocks[index].mixer, layers, full if index == chosen else None)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            where = next(model.parameters()).device
            logits = model(torch.from_numpy(ids)[None].to(where)).logits[0]
            loss = F.cross_entropy(logits[:-1].float(), torch.from_numpy(ids[1:]).to(where), reduction="none")
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    config = getattr(model, "config", None)
    size = sum(p.numel() for p in model.parameters())
    width = getattr(config, "d_model", blocks[0].mixer.d_model)
    return InspectReport(
        pieces=_pieces(tokenizer, ids),
        token_ids=tuple(ids.tolist()),
        bits=np.concatenate([[np.nan], loss.double().cpu().numpy() / math.log(2)]),
        layers=tuple(sorted(layers, key=lambda one: one.layer)),
        channels=full[0],
        n_layer=depth,
        title=title or f"Mamba, {size / 1e6:.3g} M parameters, {depth} layers of width {width}",
        notes=tuple(notes),
    )


def _spaced(depth: int, wanted: int, chosen: int) -> list[int]:
    if depth <= wanted:
        return list(range(depth))
    spaced = set(np.round(np.linspace(0, depth - 1, wanted)).astype(int).tolist()) if wanted > 1 else {chosen}
    if chosen not in spaced:
        # The chosen layer takes the place of its nearest neighbour, but not of the first or last one if that can be.
        inner = sorted(spaced - {0, depth - 1}) or sorted(spaced)
        spaced.remove(min(inner, key=lambda index: abs(index - chosen)))
        spaced.add(chosen)
    return sorted(spaced)


def step_sizes(mixer: Any, projected: Tensor) -> Tensor:
    """The steps Δ of a Mamba layer, float64, from what its `dt_proj` returned: (tokens, d_inner), as that.

    The module leaves its bias to the scan, which adds it before the softplus.
    """
    return F.softplus(projected.double() + mixer.dt_proj.bias.double())


def _watch(index: int, mixer: Any, layers: list[LayerSelection], full: list[ChannelMap] | None) -> Sequence[Any]:
    """Hooks that measure a layer while it runs, so that only one layer's tensors are held at a time.

    The modules are watched and not called again: what an adapter around them adds is seen.
    """
    held: dict[str, Tensor] = {}

    def at_x_proj(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        held["u"] = inputs[0][0]
        held["B"] = output[0, :, mixer.dt_rank : mixer.dt_rank + mixer.d_state]

    def at_dt_proj(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dt = step_sizes(mixer, output[0])
        A = -torch.exp(mixer.A_log.double())
        u, B = held.pop("u"), held.pop("B")
        layers.append(layer_selection(index, u, dt, A, B))
        if full is not None:
            full.append(_channel_map(index, u, dt, A, B))

    return mixer.x_proj.register_forward_hook(at_x_proj), mixer.dt_proj.register_forward_hook(at_dt_proj)


def _pieces(tokenizer: Any, ids: NDArray[np.int64]) -> tuple[str, ...]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return tuple(decoder.decode(tokenizer.decode_bytes([int(token)])) for token in ids)
