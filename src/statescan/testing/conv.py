"""Problems and oracles of the causal convolution and of the fused norm, written apart from the ops' references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CONV_CASES", "ConvCase", "add_rms_norm_oracle", "causal_conv1d_oracle", "conv_problem"]


@dataclass(frozen=True)
class ConvCase:
    """Shape and options of one call of `causal_conv1d`; `offsets` packs sequences into batch 1."""

    batch: int = 2
    length: int = 11
    features: int = 19
    width: int = 4
    bias: bool = True
    silu: bool = True
    initial_state: bool = True
    offsets: tuple[int, ...] | None = None


_PACKED = (0, 0, 2, 7, 7, 20, 23, 23)

CONV_CASES: dict[str, ConvCase] = {
    "every option": ConvCase(),
    "plain": ConvCase(bias=False, silu=False, initial_state=False),
    "no bias": ConvCase(bias=False),
    "no activation": ConvCase(silu=False),
    "no initial state": ConvCase(initial_state=False),
    "one token": ConvCase(length=1),
    "shorter than the filter": ConvCase(length=2),
    "one channel": ConvCase(features=1),
    "whole vectors": ConvCase(features=32, length=13),
    "a block of channels and one": ConvCase(batch=1, features=257, length=5),
    "two blocks of channels": ConvCase(batch=1, features=513, length=9),
    "packed": ConvCase(batch=1, length=23, offsets=_PACKED),
    "packed, no initial state": ConvCase(batch=1, length=23, offsets=_PACKED, initial_state=False),
    "packed, wide filter": ConvCase(batch=1, length=23, width=9, offsets=_PACKED),
    **{f"width {width}": ConvCase(width=width, length=17) for width in (1, 2, 3, 5, 6, 7, 8, 9)},
    **{
        f"length {length}": ConvCase(batch=1, length=length, features=3)
        for length in (127, 128, 129, 131, 255, 256, 257)
    },
    "wide filter over a tile": ConvCase(batch=1, length=259, features=3, width=9),
}


def conv_problem(
    case: ConvCase, dtype: torch.dtype, *, parameters: torch.dtype | None = None, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Random keyword arguments of `causal_conv1d`; `parameters` is the dtype of weight and bias, by default `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    parameters = parameters or dtype
    sequences = case.batch if case.offsets is None else len(case.offsets) - 1
    problem: dict[str, Any] = {
        "x": draw(case.batch, case.length, case.features),
        "weight": draw(case.features, case.width, dtype=parameters),
        "activation": "silu" if case.silu else None,
    }
    if case.bias:
        problem["bias"] = draw(case.features, dtype=parameters)
    if case.initial_state:
        problem["initial_state"] = draw(sequences, case.width - 1, case.features)
    if case.offsets is not None:
        problem["cu_seqlens"] = torch.tensor(case.offsets, dtype=torch.int32, device=device)
    return problem


def causal_conv1d_oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, final_state) by torch's own grouped convolution, sequence by sequence, in the inputs' precision."""
    past, features = weight.shape[1] - 1, x.shape[2]
    if cu_seqlens is None:
        sequences = [x[i] for i in range(x.shape[0])]
    else:
        sequences = list(torch.split(x[0], torch.diff(cu_seqlens).tolist()))
    outputs, states = [], []
    for i, inputs in enumerate(sequences):
        before = x.new_zeros(past, features) if initial_state is None else initial_state[i]
        rows = torch.cat([before, inputs])
        states.append(rows[rows.shape[0] - past :])
        if inputs.shape[0]:
            y = F.conv1d(rows.t()[None], weight[:, None], bias, groups=features)[0].t()
            outputs.append(F.silu(y) if activation == "silu" else y)
    y = torch.cat(outputs)[None] if cu_seqlens is not None else torch.stack(outputs)
    return y, torch.stack(states)


def add_rms_norm_oracle(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(output, residual) from the vector norm: sum / sqrt(|sum|^2 / d + eps) * weight."""
    total = x if residual is None else x + residual
    length = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
    return total * torch.rsqrt(length**2 / x.shape[-1] + eps) * weight, total
