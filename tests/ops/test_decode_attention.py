"""One position's attention to a cache: its backends against the whole softmax in float64, and what they leave alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.errors import DTypeError, ShapeError
from statescan.nn.attention import rotary_table
from statescan.ops import decode_attention
from statescan.ops.decode_attention import cuda as backend
from statescan.testing import assert_within_budget

BACKENDS = ["torch", "reference"]


def problem(
    seed: int = 0, *, batch: int = 3, heads: int = 4, kv_heads: int = 2, size: int = 8, room: int = 11, turned: int = 4
) -> dict[str, Any]:
    """Float64 arguments; rows of different lengths, one empty and one with room for one more, NaN beyond each."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    lengths = torch.tensor([0, room - 1, room // 2, *range(1, batch)][:batch], dtype=torch.int32)
    caches = [normal(batch, kv_heads, room, size) for _ in range(2)]
    for row, length in enumerate(lengths.tolist()):
        for cache in caches:
            cache[row, :, length:] = torch.nan
    new = [normal(batch, count, size) for count in (heads, kv_heads, kv_heads)]
    table = rotary_table(room + 2, turned, 10_000.0) if turned else None
    return dict(zip("qkv", new, strict=True)) | {
        "keys": caches[0],
        "values": caches[1],
        "lengths": lengths,
        "rotary": table,
    }


def cast(arguments: dict[str, Any], dtype: torch.dtype, cache: torch.dtype) -> dict[str, Any]:
    """Copies in other dtypes; the cache is written in place."""
    kinds = dict.fromkeys("qkv", dtype) | dict.fromkeys(("keys", "values"), cache)
    return {name: x.to(kinds[name], copy=True) if name in kinds else x for name, x in arguments.items()}


def truth(a: dict[str, Any]) -> Tensor:
    """The softmax over all positions by complex turns, in float64, from arguments of any dtype."""
    q, k, v, keys, values = (a[name].double() for name in ("q", "k", "v", "keys", "values"))
    out = torch.zeros_like(q)
    for row, n in enumerate(a["lengths"].tolist()):

        def turn(x: Tensor, n: int = n) -> Tensor:
            if a["rotary"] is None:
                return x
            half = a["rotary"].shape[1] // 2
            angle = torch.complex(a["rotary"][n, :half].double(), a["rotary"][n, half:].double())
            both = torch.complex(x[:, :half], x[:, half : 2 * half]) * angle
            return torch.cat([both.real, both.imag, x[:, 2 * half :]], 1)

        for head in range(q.shape[1]):
            at = head * keys.shape[1] // q.shape[1]
            # The new key and value count as the cache keeps them.
            key = torch.cat([keys[row, at, :n], turn(k[row])[at : at + 1].to(a["keys"].dtype).double()])
            value = torch.cat([values[row, at, :n], v[row, at : at + 1].to(a["values"].dtype).double()])
            weights = torch.exp(key @ turn(q[row])[head] / math.sqrt(q.shape[2]))
            out[row, head] = weights @ value / weights.sum()
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turned", [0, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_the_softmax(backend: str, turned: int, kv_heads: int) -> None:
    arguments = problem(kv_heads=kv_heads, turned=turned)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    wanted = truth(arguments)
    got = decode_attention(**arguments, backend=backend)
    assert (got - wanted).abs().max() < 1e-12
    for name in ("q", "k", "v", "lengths"):
        assert torch.equal(arguments[name], before[name])
    for row, n in enumerate(arguments["lengths"].tolist()):
        assert torch.equal(arguments["values"][row, :, n], before["v"][row])
        for name in ("keys", "values"):
            assert torch.equal(arguments[name][row, :, :n], before[name][row, :, :n])
            assert arguments[name][row, :, n + 1 :].isnan().all()
            assert arguments[name][row, :, n].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=str)
def test_torch_within_the_references_budget(dtype: torch.dtype, cache: torch.dtype) -> None:
    draws = [cast(problem(seed), dtype, cache) for seed in range(6)]
    wanted = [truth(one) for one in draws]
    reference = [decode_attention(**cast(one, dtype, cache), backend="reference") for one in draws]
    got = [decode_attention(**one, backend="torch") for one in draws]
    assert_within_budget(got, wanted, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_row_says_so_and_is_left_alone(backend: str) -> None:
    arguments = problem()
    arguments["lengths"] = torch.tensor([11, 10, 5], dtype=torch.int32)
    arguments["keys"][0], arguments["values"][0] = 1.0, 2.0
    out = decode_attention(**arguments, backend=backend)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()
    assert (arguments["keys"][0] == 1).all()
    assert (arguments["values"][0] == 2).all()


def test_steps_are_the_layer() -> None:
    """Step by step through the op, from an empty cache, gives what the layer gives of the whole sequence."""
    from statescan.nn import CausalSelfAttention

    torch.manual_seed(0)
    layer = CausalSelfAttention(32, 4, n_kv_head=2, rotary_fraction=0.5).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x).output
        keys, values = (torch.zeros(2, 2, 9, 8, dtype=torch.float64) for _ in range(2))
        table = rotary_table(9, layer.turned, layer.rotary_base).double()
        for t in range(9):
            q, k, v = layer.qkv_proj(x[:, t]).unflatten(-1, (8, 8)).split((4, 2, 2), 1)
            lengths = torch.full((2,), t, dtype=torch.int32)
            y = layer.out_proj(decode_attention(q, k, v, keys, values, lengths, rotary=table).flatten(1))
            # The table's angles are rounded to float32.
            assert (y - whole[:, t]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": torch.zeros(3, 4, 8, 1)}, ShapeError, r"q must have shape \(batch, heads, d_head\)"),
        ({"keys": torch.zeros(3, 3, 11, 8)}, ShapeError, "q must have a number of heads that keys' kv_heads = 3 div"),
        ({"keys": torch.zeros(2, 2, 11, 8)}, ShapeError, "keys must have shape"),
        ({"values": torch.zeros(3, 2, 12, 8)}, ShapeError, "values must have shape"),
        ({"v": torch.zeros(3, 4, 8)}, ShapeError, "v must have shape"),
        ({"k": torch.zeros(3, 2, 8, dtype=torch.float16)}, DTypeError, "k must be float32"),
        ({"values": torch.zeros(3, 2, 11, 8, dtype=torch.float16)}, DTypeError, "values must be float32"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, DTypeError, "lengths must be int32"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, ShapeError, "lengths must have shape"),
        ({"rotary": torch.zeros(5, 4)}, ShapeError, "rotary must have shape"),
        ({"rotary": torch.zeros(11, 10)}, ShapeError, "rotary must have shape"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Tensor], error: type[Exception], text: str) -> None:
    arguments = cast(problem(), torch.float32, torch.float32) | change
    with pytest.raises(error, match=text):
        decode_attention(**arguments)


def test_more_rows_than_a_grid_takes_go_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch gets its own rows of everything; a stand-in for the kernel says which."""
    seen: list[tuple[tuple[int, ...], list[int]]] = []
    rows = 5
    qkv, caches = torch.zeros(rows, 3, 64), torch.zeros(2, rows, 1, 8, 64)
    lengths, out = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, 1, 64)
    q, k, v = qkv.split(1, 1)
    by_row = (q, k, v, *caches, lengths, out)

    def run(grid: tuple[int, ...], *given: Any) -> None:
        tensors = [x for x in given if isinstance(x, Tensor)]
        (q_, k_, v_, keys_, values_, lengths_, *_), out_ = tensors, tensors[-1]
        places = [
            (own.data_ptr() - whole.data_ptr()) // (whole.stride(0) * whole.element_size())
            for own, whole in zip((q_, k_, v_, keys_, values_, lengths_, out_), by_row, strict=True)
        ]
        assert all(len(own) == grid[2] for own in (q_, lengths_, out_))
        seen.append((grid, places))

    monkeypatch.setattr(backend._cuda, "MOST_BLOCKS", 2)
    monkeypatch.setattr(backend._cuda, "kernel", lambda *_: run)
    backend.launch(q, k, v, caches[0], caches[1], lengths, None, out, torch.zeros(1000), torch.zeros(rows).int())
    assert [(grid[2], places) for grid, places in seen] == [(2, [0] * 7), (2, [2] * 7), (1, [4] * 7)]
