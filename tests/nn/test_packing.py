"""Packing a padded batch and unpacking it again."""

from __future__ import annotations

import torch

from statescan.nn import pack


def test_pack_then_unpack_is_the_input_with_zeros_at_padding() -> None:
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    packing = pack("test", mask, 3, 3, torch.device("cpu"))
    assert packing is not None
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 4]
    assert packing.cu_seqlens.dtype == torch.int32
    x = torch.randn(3, 3, 5)
    line = packing.pack(x)
    assert torch.equal(line[0], torch.stack([x[0, 1], x[0, 2], x[2, 0], x[2, 2]]))
    assert torch.equal(packing.unpack(line), x * mask[..., None])
    ids = torch.arange(9).view(3, 3)
    assert packing.pack(ids).tolist() == [[1, 2, 6, 8]]


def test_nothing_to_pack() -> None:
    assert pack("test", torch.ones(2, 4).bool(), 2, 4, torch.device("cpu")) is None
