"""Runs a function and all its gradients, and lays the results side by side by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Derivatives", "derivatives", "random_cotangents"]

Derivatives = dict[str, Tensor]


def _leaf(value: Any, exact: bool) -> Any:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    value = value.detach()
    if exact:
        value = value.to(torch.complex128 if value.is_complex() else torch.float64)
    return value.requires_grad_()


def derivatives(
    function: Callable[..., tuple[Tensor | None, ...]],
    arguments: dict[str, Any],
    outputs: tuple[str, ...] = ("y", "final_state"),
    *,
    cotangents: dict[str, Tensor] | None = None,
    exact: bool = False,
    seed: int = 1,
) -> Derivatives:
    """The outputs of `function(**arguments)` and the gradient for every float argument, as ``"y"``, ``"d u"``.

    Args:
        function: returns a tuple of tensors; None among them is passed over.
        arguments: keyword arguments; every float or complex tensor among them gets a gradient. Strides are kept.
        outputs: names of the tuple's entries.
        cotangents: the gradient that flows into each output; one that is missing gets none. Default: random numbers
            in the output's dtype; hand one call's to the next, so that calls of different precision get the same.
        exact: turn the arguments into float64 (complex128) first.
        seed: seeds the cotangents.
    """
    leaves = {name: _leaf(value, exact) for name, value in arguments.items()}
    with torch.enable_grad():
        results = {name: value for name, value in zip(outputs, function(**leaves), strict=False) if value is not None}
    if cotangents is None:
        cotangents = random_cotangents(results, seed)
    wanted = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    heads = [name for name in results if name in cotangents and results[name].requires_grad]
    gradients = torch.autograd.grad(
        [results[name] for name in heads],
        list(wanted.values()),
        [cotangents[name].to(results[name].dtype) for name in heads],
        allow_unused=True,
    )
    derived = {name: value.detach() for name, value in results.items()}
    for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
        derived[f"d {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return derived


def random_cotangents(results: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """A random gradient for each output, in the output's dtype."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name in sorted(results):
        value = results[name]
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.is_complex():
            noise = torch.complex(noise, torch.randn(value.shape, generator=generator, dtype=torch.float64))
        drawn[name] = noise.to(device=value.device, dtype=value.dtype)
    return drawn
