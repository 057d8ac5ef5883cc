"""Packed sequences for layers that have no kernel of their own for them: each one by itself, put back in line."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from statescan.errors import ConfigError
from statescan.ops._checks import check_cu_seqlens

__all__ = ["by_sequence", "padded_groups"]


def padded_groups(sizes: list[int]) -> list[list[int]]:
    """Numbers of the sequences that go together as rows of one batch: padded, none becomes twice as long.

    Args:
        sizes: length of each sequence; empty ones are left out.
    """
    groups: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        if size:
            groups.setdefault((size - 1).bit_length(), []).append(number)
    return list(groups.values())


def by_sequence(caller: str, run: Callable[[Tensor], Tensor], x: Tensor, cu_seqlens: Tensor, state: object) -> Tensor:
    """Runs a layer over each packed sequence apart, so that nothing passes from one into the next.

    Args:
        caller: named in errors.
        run: the layer, (1, length, d_model) to the same.
        x: (1, tokens, d_model).
        cu_seqlens: (sequences + 1,), from 0 to the number of tokens.
        state: has to be None.
    """
    check_cu_seqlens(caller, cu_seqlens, x.shape[0], x.shape[1], in_graph=True)
    if state is not None:
        raise ConfigError(f"{caller}: state and cu_seqlens exclude each other here; run the sequences as a batch")
    sizes = cu_seqlens.diff().tolist()
    return torch.cat([run(part) if part.shape[1] else part for part in x.split(sizes, 1)], 1)
