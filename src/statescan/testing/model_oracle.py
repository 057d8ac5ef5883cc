"""The whole Mamba language model in plain numpy, written apart from the package's own layers: the truth for them.

One token after the other, one equation a line, float64. It also runs on complex numbers, so that the derivative of the
loss with respect to any one parameter is ``loss(parameter + i h).imag / h`` to the last digit (the complex step): no
difference is taken, so nothing cancels however small h is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["complex_step_gradient", "layer", "logits", "loss"]

Array = Any


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _softplus(x: Array) -> Array:
    return np.log(1 + np.exp(x))


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.sum(x * x) / x.shape[0] + eps) * weight


def layer(p: Mapping[str, Array], inputs: Array, prefix: str = "") -> Array:
    """One Mamba layer over one sequence.

    Args:
        p: parameters by their published names, behind `prefix`.
        inputs: (length, d_model).
        prefix: e.g. ``"backbone.layers.0.mixer."``.

    Returns:
        (length, d_model).
    """
    w = {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}
    A = -np.exp(w["A_log"])
    d_inner, d_state = A.shape
    taps = w["conv1d.weight"][:, 0, :]
    width = taps.shape[1]
    dt_rank = w["dt_proj.weight"].shape[1]
    kind = np.result_type(inputs, *w.values())
    h = np.zeros((d_inner, d_state), kind)
    seen = [np.zeros(d_inner, kind)] * (width - 1)
    outputs = []
    for token in inputs:
        xz = w["in_proj.weight"] @ token + w.get("in_proj.bias", 0)
        x, z = xz[:d_inner], xz[d_inner:]
        seen.append(x)
        x = sum(taps[:, k] * seen[len(seen) - width + k] for k in range(width)) + w.get("conv1d.bias", 0)
        x = _silu(x)
        selected = w["x_proj.weight"] @ x
        dt = _softplus(w["dt_proj.weight"] @ selected[:dt_rank] + w["dt_proj.bias"])
        B, C = selected[dt_rank : dt_rank + d_state], selected[dt_rank + d_state :]
        h = np.exp(dt[:, None] * A) * h + (dt * x)[:, None] * B[None, :]
        y = (h @ C + w["D"] * x) * _silu(z)
        outputs.append(w["out_proj.weight"] @ y + w.get("out_proj.bias", 0))
    return np.stack(outputs)


def logits(p: Mapping[str, Array], ids: Sequence[int], eps: float = 1e-5) -> Array:
    """Logits of every position of one sequence, (length, vocabulary).

    Args:
        p: a `CausalLM`'s parameters by name; without ``lm_head.weight`` the head is tied.
        ids: the tokens.
        eps: of the norms.
    """
    x = p["backbone.embedding.weight"][list(ids)]
    i = 0
    while f"backbone.layers.{i}.norm.weight" in p:
        gain = p[f"backbone.layers.{i}.norm.weight"]
        x = x + layer(p, np.stack([_rms_norm(row, gain, eps) for row in x]), f"backbone.layers.{i}.mixer.")
        i += 1
    head = p.get("lm_head.weight", p["backbone.embedding.weight"])
    return np.stack([head @ _rms_norm(row, p["backbone.norm_f.weight"], eps) for row in x])


def loss(p: Mapping[str, Array], ids: Sequence[int], eps: float = 1e-5) -> Array:
    """Mean cross-entropy of each next token of one sequence, a number."""
    scores = logits(p, ids, eps)[:-1]
    top = scores.real.max(-1, keepdims=True)
    log_sum = np.log(np.exp(scores - top).sum(-1)) + top[:, 0]
    return np.mean(log_sum - scores[np.arange(len(ids) - 1), list(ids[1:])])


def complex_step_gradient(p: Mapping[str, Array], name: str, ids: Sequence[int], eps: float = 1e-5) -> Array:
    """d loss / d p[name], entry by entry, exact to float64's rounding."""
    step = 1e-30
    gradient = np.empty(p[name].shape)
    for place in np.ndindex(gradient.shape):
        moved = p[name].astype(np.complex128)
        moved[place] += 1j * step
        gradient[place] = loss({**p, name: moved}, ids, eps).imag / step
    return gradient
