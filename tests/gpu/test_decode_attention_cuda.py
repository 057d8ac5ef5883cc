"""The contract of `decode_attention` on the `cuda` backend: cuts of a cache into spans, types, heads sharing keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.nn.attention import rotary_table
from statescan.ops import decode_attention
from statescan.ops.decode_attention.cuda import spans
from statescan.testing import assert_within_budget, check_registration, poisoned_memory, recorded_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LENGTHS = {
    "short": ([0, 1, 31, 32, 33, 63, 64, 65, 127], 128),
    "in spans": ([0, 5, 1023, 1024, 1500, 2047, 2048, 2049, 2175], 2176),
    "odd room": ([0, 300, 706], 707),
    "alone": ([1777], 2048),
}


def problem(
    lengths: list[int],
    room: int,
    dtype: torch.dtype,
    cache: torch.dtype,
    heads: int,
    shared: int,
    size: int,
    turned: int,
) -> dict[str, Any]:
    """Arguments on the GPU, q, k and v parts of one tensor as a projection gives them; NaN beyond each row's length."""
    draw = torch.Generator().manual_seed(len(lengths) + size)
    batch, kv_heads = len(lengths), heads // shared
    qkv = torch.randn(batch, heads + 2 * kv_heads, size, generator=draw).to(dtype).cuda()
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    caches = [torch.randn(batch, kv_heads, room, size, generator=draw).to(cache).cuda() for _ in range(2)]
    for row, length in enumerate(lengths):
        for one in caches:
            one[row, :, length:] = torch.nan
    table = rotary_table(room, turned, 10_000.0, "cuda") if turned else None
    counts = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return {"q": q, "k": k, "v": v, "keys": caches[0], "values": caches[1], "lengths": counts, "rotary": table}


def copied(arguments: dict[str, Any], **dtypes: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtypes.get(name, x.dtype), copy=True) if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("size", "turned"), [(64, 64), (64, 0), (128, 32), (128, 128)])
@pytest.mark.parametrize("shared", [1, 2, 8])
@pytest.mark.parametrize(
    ("dtype", "cache"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
def test_within_the_references_budget(
    lengths: str, size: int, turned: int, shared: int, dtype: torch.dtype, cache: torch.dtype
) -> None:
    given = problem(*LENGTHS[lengths], dtype, cache, 8, shared, size, turned)
    exact = copied(given, **dict.fromkeys("qkv", torch.float64))
    truth = decode_attention(**exact, backend="torch")
    reference = decode_attention(**copied(given), backend="reference")
    with poisoned_memory():
        mine = copied(given)
        got = decode_attention(**mine, backend="cuda")
    assert_within_budget(got, truth, reference)
    # What is written is what the reference writes, but for a last bit where a turned key lies between two numbers.
    for name in ("keys", "values"):
        wrong = (mine[name].isnan() != exact[name].isnan()).sum()
        assert int(wrong) == 0
        a, b = (one[name].float().nan_to_num() for one in (mine, exact))
        assert (a - b).abs().max() <= 2 * torch.finfo(cache).eps * b.abs().max()
    assert torch.equal(mine["values"].nan_to_num(), exact["values"].nan_to_num())


def test_a_full_row_says_so_and_is_left_alone() -> None:
    given = problem([2047, 100], 2048, torch.bfloat16, torch.bfloat16, 8, 1, 128, 32)
    given["lengths"][0] = 2048
    kept = copied(given)
    out = decode_attention(**given, backend="cuda")
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    assert torch.equal(given["keys"][0].nan_to_num(), kept["keys"][0].nan_to_num())


def test_two_runs_are_equal_to_the_bit_and_a_rows_company_changes_nothing() -> None:
    lengths = [1500, 7, 2047, 640]
    given = problem(lengths, 2176, torch.float32, torch.bfloat16, 8, 1, 128, 32)
    first, second = (decode_attention(**copied(given), backend="cuda") for _ in range(2))
    assert torch.equal(first, second)
    # Rows in other places, as many of them: a row is cut as its own length says.
    order = [2, 0, 3, 1]
    moved = {n: x[order] if isinstance(x, Tensor) and n != "rotary" else x for n, x in copied(given).items()}
    assert torch.equal(decode_attention(**moved, backend="cuda"), first[order])


def test_a_graph_stays_right_while_lengths_grow() -> None:
    """Captured once, replayed at every length: from an empty cache past the first span's end."""
    heads, size, room = 4, 64, 400
    draw = torch.Generator().manual_seed(0)
    new = torch.randn(room, 3, 2, heads, size, generator=draw).cuda()
    table = rotary_table(room, size, 10_000.0, "cuda")
    caches = [[torch.zeros(2, heads, room, size, device="cuda") for _ in range(2)] for _ in range(2)]
    q, k, v = (torch.zeros(2, heads, size, device="cuda") for _ in range(3))
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
    decode_attention(q, k, v, *caches[0], lengths, rotary=table, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, *caches[0], lengths, rotary=table, backend="cuda")
        lengths += 1
    other = torch.zeros(2, dtype=torch.int32, device="cuda")
    for t in range(room):
        for held, value in zip((q, k, v), new[t], strict=True):
            held.copy_(value)
        graph.replay()
        if t % 37 == 0 or t == room - 1:
            wanted = decode_attention(q, k, v, *caches[1], other + t, rotary=table, backend="torch")
            assert (out - wanted).abs().max() < 1e-5, t
        else:
            decode_attention(q, k, v, *caches[1], other + t, rotary=table, backend="cuda")
    assert lengths.tolist() == [room, room]
    assert torch.allclose(caches[0][0], caches[1][0], atol=1e-5)


def test_the_cache_is_cut_so_that_a_gpu_is_filled() -> None:
    assert spans(1, 16, 2176, 128) == 32
    assert spans(128, 16, 2176, 128) == 2
    assert spans(1, 16, 20, 128) == 1


def test_registration() -> None:
    given = problem([3, 40], 64, torch.float32, torch.float32, 4, 2, 64, 32)
    for one in ("keys", "values"):
        given[one] = given[one].nan_to_num()
    with recorded_calls() as calls:
        decode_attention(**given, backend="cuda")
    assert calls
    check_registration(calls)
