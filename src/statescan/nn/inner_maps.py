"""What may stand inside of a `Mamba` layer: which block, which map of sequences, and what of S6 depends on the input.

The paper takes its layer apart in tables 1 and 6 to 10; the words here name each of their rows.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statescan.errors import ConfigError
from statescan.nn.s4 import S4, S4D
from statescan.ops import fft_conv
from statescan.ops._checks import check_cu_seqlens, without_autocast

__all__ = [
    "A_INITS",
    "BLOCKS",
    "INNER_MAPS",
    "SELECTIVE",
    "check_choice",
    "initial_A",
    "linear_map",
    "run_linear",
    "selected",
    "state_size",
    "step_linear",
]

# The blocks, and how many streams of d_inner channels in_proj makes for each.
BLOCKS = {"mamba": 2, "h3": 3, "ungated": 1}
INNER_MAPS = ("s6", "s4", "s4d", "s4d-real", "none")
# What of S6 may depend on the input, in the order that it is written in.
SELECTIVE = ("B", "C", "dt")
A_INITS = ("s4d-real", "constant", "random", "s4d-lin")

_ALL = ",".join(SELECTIVE)


def selected(selective: str) -> frozenset[str]:
    """The parts that ``"B,C,dt"``, any of them in any order, or ``"none"`` names.

    Raises:
        ValueError: a part is unknown or comes twice.
    """
    if selective == "none":
        return frozenset()
    parts = [part.strip() for part in selective.split(",")]
    if len(set(parts)) < len(parts) or not set(parts) <= set(SELECTIVE):
        raise ValueError(selective)
    return frozenset(parts)


def check_choice(
    owner: str,
    *,
    block: Any,
    inner: Any,
    selective: Any,
    A_init: Any,
    d_state: int,
    dt_rank: int | str,
    mixer_rms_eps: float | None,
) -> None:
    """Refuses unknown words and choices that don't go together; arguments as in `statescan.nn.Mamba`.

    Raises:
        ConfigError: names `owner`, the argument, and what would do.
    """
    for name, value, known in (("block", block, BLOCKS), ("inner", inner, INNER_MAPS), ("A_init", A_init, A_INITS)):
        if value not in known:
            near = difflib.get_close_matches(str(value), known, 1)
            cure = f"did you mean '{near[0]}'?" if near else f"'{next(iter(known))}' is published"
            raise ConfigError(f"{owner}: {name} must be one of {', '.join(known)}, got {value!r}; {cure}")
    try:
        selected(selective)
    except (ValueError, AttributeError):
        raise ConfigError(
            f"{owner}: selective must be '{_ALL}', some of its parts, or 'none', got {selective!r}; "
            "write what depends on the input, with commas"
        ) from None
    if inner != "s6":
        for name, value, usual in (
            ("selective", selective, _ALL),
            ("A_init", A_init, "s4d-real"),
            ("dt_rank", dt_rank, "auto"),
            ("mixer_rms_eps", mixer_rms_eps, None),
        ):
            if value != usual:
                raise ConfigError(
                    f"{owner}: {name} must be {usual!r} with inner '{inner}', got {value!r}; it is inner 's6' alone "
                    "that has it"
                )
    in_pairs = inner in ("s4", "s4d") or (inner == "s6" and A_init == "s4d-lin")
    if in_pairs and d_state % 2:
        why = f"inner '{inner}'" if inner != "s6" else f"A_init '{A_init}'"
        raise ConfigError(
            f"{owner}: d_state must be even with {why}, got {d_state}; its states are complex and come in pairs"
        )


def state_size(inner: str, A_init: str, d_state: int) -> tuple[int, bool]:
    """(numbers in a channel's state, whether they are complex): of a conjugate pair one stands for both."""
    if inner == "none":
        return 0, False
    if inner in ("s4", "s4d") or (inner == "s6" and A_init == "s4d-lin"):
        return d_state // 2, True
    return d_state, False


def initial_A(A_init: str, d_inner: int, d_state: int, **where: Any) -> tuple[Tensor, Tensor | None]:
    """(log(-Re A), Im A or None) at the start, each (d_inner, states).

    * ``"s4d-real"``: ``-(n + 1)``, the published one: the n-th number of a channel's state decays n times as fast as
      the first
    * ``"constant"``: ``-1/2``
    * ``"random"``: ``-exp(N(0, 1))``, drawn for every entry
    * ``"s4d-lin"``: ``-1/2 + n i``, complex; d_state / 2 states, each of which stands for a conjugate pair

    Args:
        A_init: one of `A_INITS`.
        d_inner: channels.
        d_state: size of the state of a channel.
        where: device and dtype.

    Source: Gu and Dao (2023), section 3.6 and table 8. S4D (arXiv:2206.11893) has ``-1/2 + pi n i`` under the last
    name.
    """
    if A_init == "random":
        return torch.randn(d_inner, d_state, **where), None
    if A_init == "constant":
        return torch.full((d_inner, d_state), math.log(0.5), **where), None
    if A_init == "s4d-real":
        return torch.arange(1, d_state + 1, **where).log().expand(d_inner, d_state), None
    states = d_state // 2
    real = torch.full((d_inner, states), math.log(0.5), **where)
    return real, torch.arange(states, **where).expand(d_inner, states)


def linear_map(
    inner: str,
    d_inner: int,
    d_state: int,
    dt_min: float,
    dt_max: float,
    backend: str,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> S4 | S4D:
    """The time-invariant map of a name: S4 (HiPPO-LegS), S4D (complex, ``-1/2 + pi n i``) or S4D-Real.

    Args:
        inner: ``"s4"``, ``"s4d"`` or ``"s4d-real"``.
        d_inner: channels, each with a system of its own.
        d_state: size of a channel's state.
        dt_min: smallest initial step size.
        dt_max: largest.
        backend: of the kernel, where it has one of this name; else its own choice.
        device: where parameters are made.
        dtype: of the parameters, float32 or float64.
    """
    given: dict[str, Any] = {"dt_min": dt_min, "dt_max": dt_max, "mix": False, "device": device}
    given["backend"] = backend if backend in ("torch", "reference") else "auto"
    if inner == "s4":
        return S4(d_inner, d_state, **given).to(dtype)
    return S4D(d_inner, d_state, init="lin" if inner == "s4d" else "real", **given).to(dtype)


def run_linear(
    linear: S4 | S4D, u: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A time-invariant map over whole sequences, as a convolution.

    Args:
        linear: from `linear_map`.
        u: (batch, length, d_inner).
        state: (batch, d_inner, states), with cu_seqlens (sequences, d_inner, states). Default: zeros, none comes out.
        cu_seqlens: (sequences + 1,) int32, where packed sequences start; batch is 1.

    Returns:
        (y as u, the state after the last position of each sequence or None).
    """
    with without_autocast(u.device.type):
        if cu_seqlens is None:
            return tuple(linear(u, state))  # type: ignore[return-value]
        check_cu_seqlens(type(linear).__name__, cu_seqlens, u.shape[0], u.shape[1], in_graph=True)
        bounds = cu_seqlens.tolist()
        if state is None:
            return _packed(linear, u, bounds), None
        parts, after = [], []
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start == stop:
                after.append(state[i : i + 1])
                continue
            y, one = linear(u[:, start:stop], state[i : i + 1])
            parts.append(y)
            after.append(one)
        return torch.cat(parts, 1), torch.cat(after)


def _packed(linear: S4 | S4D, u: Tensor, bounds: Sequence[int]) -> Tensor:
    """Packed sequences from zero states: those of similar length are padded to the longest of them and run as one
    batch, so that there are as many Fourier transforms as powers of two and less than half of the work is padding."""
    sizes: dict[int, list[tuple[int, int]]] = {}
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            sizes.setdefault((stop - start - 1).bit_length(), []).append((start, stop - start))
    kernel = linear.kernel(max(length for group in sizes.values() for _, length in group))
    y, places = [], []
    for group in sizes.values():
        longest = max(length for _, length in group)
        starts = torch.tensor([start for start, _ in group], device=u.device).unsqueeze(1)
        lengths = torch.tensor([length for _, length in group], device=u.device).unsqueeze(1)
        steps = torch.arange(longest, device=u.device)
        real = steps < lengths
        index = (starts + steps).clamp(max=u.shape[1] - 1)
        rows = u[0, index].masked_fill(~real.unsqueeze(-1), 0)
        out = fft_conv(rows, kernel, D=linear.D)
        y.append(out[real])
        places.append(index[real])
    return torch.zeros_like(u).index_copy(1, torch.cat(places), torch.cat(y).unsqueeze(0))


def step_linear(linear: S4 | S4D, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One more position of a time-invariant map: u (batch, d_inner), state (batch, d_inner, states)."""
    with without_autocast(u.device.type):
        output = linear.step(u, state)
    assert output.state is not None
    return output.output, output.state
