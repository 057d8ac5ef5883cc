"""A decoding step's middle in tiles of rows: what fits a block's shared memory, and what is refused. No GPU is needed:
tests/gpu/test_decoder.py runs it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from statescan.ops.mamba_step import middle


def slots_of_x_proj(rank: int) -> int:
    """Slots (256 channels' states of a row) that x_proj's weights of 256 channels take: W_SLOTS of middle_tiles.cu."""
    return math.ceil((rank + 32) * (256 + 32) * 2 / (256 * 16 * 4))


@pytest.mark.parametrize("rank", range(32, middle._TILE_RANK + 1, 32))
def test_ring_in_tiles_holds_x_projs_weights(rank: int) -> None:
    slots, shared = middle._tiles_memory(rank)
    assert slots_of_x_proj(rank) <= slots <= 16
    assert shared <= 227 * 1024
    # What `struct Shared` holds beside the ring.
    parts, dt = 4 * 16 * (rank + 32 + 8) * 4, 16 * (256 + 8) * 4
    low = 16 * (rank + (0 if rank % 64 else 32)) * 2
    struct = 2 * 8 * slots + 16 + 16 * (256 + 32) * 2 + 16 * 256 * 2 + max(parts, dt) + 16 * 32 * 4 + low
    assert slots * 256 * 16 * 4 + struct <= shared


def test_a_wider_rank_would_not_fit() -> None:
    rank = middle._TILE_RANK + 32
    assert slots_of_x_proj(rank) > middle._tiles_memory(rank)[0]


@pytest.mark.parametrize(
    ("rank", "width", "text"),
    [(192, 4, None), (224, 4, "a multiple of 32 up to 192, it is 224"), (48, 4, "it is 48"), (32, 1, "it has 1")],
)
def test_what_the_middle_in_tiles_refuses(
    rank: int, width: int, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middle, "refuses_middle", lambda *_: None)
    block: Any = SimpleNamespace(dt_rank=rank, width=width)
    reason = middle.refuses_tiles(block, torch.device("cuda"))
    assert reason is None if text is None else text in str(reason)
