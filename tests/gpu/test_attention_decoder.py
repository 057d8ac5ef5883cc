"""A Transformer's captured decoder: its logits against float64, and what the engine writes with it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.errors import ShapeError
from statescan.generate import Engine, SamplingParams, generate_naive
from statescan.generate.unpacked import ModelDecoder
from statescan.models import CausalLM, TransformerConfig
from statescan.testing import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

PYTHIA: dict[str, Any] = {
    "mlp": "gelu", "norm": "layer", "bias": True, "parallel": True, "rotary_fraction": 0.25, "tie_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "pythia": TransformerConfig(256, 3, 256, n_head=4, **PYTHIA),
    "pythia, wide heads": TransformerConfig(256, 2, 256, n_head=2, **PYTHIA),
    "transformer++": TransformerConfig(256, 3, 256, n_head=4),
    "shared keys": TransformerConfig(512, 2, 256, n_head=8, n_kv_head=2),
    "absolute": TransformerConfig(128, 2, 256, n_head=2, positions="absolute", max_positions=384, bias=True),
    "no positions": TransformerConfig(128, 2, 256, n_head=1, positions="none", mlp="gelu"),
    "parallel and gated": TransformerConfig(128, 2, 256, n_head=2, parallel=True, d_intermediate=200),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@functools.cache
def model(name: str) -> CausalLM:
    """A model whose every parameter is random, held exactly by each dtype's numbers."""
    torch.manual_seed(0)
    made = CausalLM(CONFIGS[name], device="cuda").eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
        parameter.copy_(parameter.bfloat16().half().float().bfloat16())
    return made


def twin(name: str, dtype: torch.dtype) -> CausalLM:
    made = CausalLM(CONFIGS[name], backend="torch", device="cuda", dtype=dtype).eval().requires_grad_(False)
    made.load_state_dict(model(name).state_dict())
    return made


def decoder(name: str, dtype: str, capacity: int) -> Any:
    from statescan.generate.attention_graphs import AttentionGraphDecoder

    return AttentionGraphDecoder(ModelDecoder(model(name), dtype), capacity, 256)


def filled(slots: Any, ids: Tensor) -> None:
    """Reads one prompt a slot."""
    state = slots.init_state(ids.shape[0])
    slots.prefill(ids.tolist(), state, 4096)
    for row in range(ids.shape[0]):
        slots.assign(row, state, row)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_within_the_budget_of_the_same_precision(name: str, dtype: str, rows: int) -> None:
    """One row computes in float32 on the weights' numbers, more rows in the weights' dtype."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (rows, 74), generator=draw).cuda()
    slots = decoder(name, dtype, rows)
    assert slots.row_refusal is None
    with torch.no_grad():
        filled(slots, ids[:, :70])
        got = []
        for t in range(70, 74):
            slots.tokens.copy_(ids[:, t])
            slots._step_rows(rows)
            got.append(slots.logits.clone())
        # The cache is in the weights' dtype, and so is the prompt's reading: they set the precision.
        low = twin(name, DTYPES[dtype])
        truth = twin(name, torch.float64)(ids).logits[:, 70:]
        reference = low(ids).logits[:, 70:].float()
    assert_within_budget(torch.stack(got, 1), truth, reference)
    assert slots.lengths.tolist() == [74] * rows


@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_writes_what_running_everything_again_writes(name: str) -> None:
    """Prompts of several lengths, more of them than fit, so that rows come and go; in float32, greedily and drawn."""
    prompts = ["It is a truth", "a", "Call me Ishmael. Some years ago", "never", "mind how long precisely"]
    engine = Engine(model(name), dtype="float32", max_batch=3)
    assert engine._slots is not None
    params = [
        SamplingParams(max_new_tokens=9 + 7 * i, temperature=0.0 if i % 2 else 0.8, top_k=20, seed=i) for i in range(5)
    ]
    found = engine.generate(prompts, params)
    same = 0
    for prompt, own, result in zip(prompts, params, found, strict=True):
        wanted = generate_naive(model(name), prompt, own)
        # Two logits within rounding of each other may change places; what was written before stays the same.
        agree = sum(a == b for a, b in zip(wanted.tokens, result.tokens, strict=True))
        same += agree == len(wanted.tokens)
        assert wanted.tokens[:4] == result.tokens[:4]
    assert same >= 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_room_grows_while_rows_write(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that was made too small is made larger under the rows, and they write on as from a large one."""
    from statescan.generate import attention_graphs

    whole = Engine(model("pythia"), dtype=dtype, max_batch=2)
    params = SamplingParams(max_new_tokens=300, temperature=0.0)
    wanted = whole.generate(["Call me", "I will not"], params)
    monkeypatch.setattr(attention_graphs, "_AHEAD", 16)
    small = Engine(model("pythia"), dtype=dtype, max_batch=2)
    found = small.generate(["Call me", "I will not"], params)
    assert small._slots.room > 256
    # Spans are cut by the room, so sums are in another order; the first tokens don't turn on it.
    for a, b in zip(wanted, found, strict=True):
        assert a.tokens[:16] == b.tokens[:16]
        assert len(b.tokens) == 300


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_are_made_again_for_more_room(dtype: str) -> None:
    """Captured, thrown away with their memory, and captured again, for one row and for several."""
    slots = decoder("pythia", dtype, 4)
    ids = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        filled(slots, ids)
        for slot in range(4):
            slots.place(slot, SamplingParams(max_new_tokens=50, temperature=0.0), 40, [])
        seen = []
        for room in (0, 500, 3000):
            slots._reserve(room)
            filled(slots, ids)
            slots.tokens.copy_(ids[:, 0])
            for rows in (1, 4):
                slots.step(rows)
            seen.append(slots.logits.clone())
    for later in seen[1:]:
        assert (later - seen[0]).abs().max() <= 0.05 * seen[0].abs().max()
    assert slots.room >= 3000


def test_sessions_go_on() -> None:
    engine = Engine(model("transformer++"), max_batch=2)
    greedy = SamplingParams(max_new_tokens=12, temperature=0.0)
    session = engine.open("It is a truth")
    first = engine.resume(session, greedy)
    second = engine.resume(session, greedy)
    whole = engine.generate(["It is a truth"], SamplingParams(max_new_tokens=24, temperature=0.0))[0]
    assert first.tokens + second.tokens == whole.tokens


def test_absolute_positions_end() -> None:
    engine = Engine(model("absolute"), max_batch=1)
    with pytest.raises(ShapeError, match="384 absolute positions"):
        engine.generate(["a" * 380], SamplingParams(max_new_tokens=10, temperature=0.0))


def test_what_has_no_kernels_runs_all_the_same() -> None:
    torch.manual_seed(0)
    decayed = CausalLM(TransformerConfig(128, 2, 256, positions="xpos"), device="cuda").eval()
    engine = Engine(decayed)
    assert engine._slots is None
    params = SamplingParams(max_new_tokens=8, temperature=0.0)
    assert engine.generate(["abc"], params)[0].tokens == generate_naive(decayed, "abc", params).tokens
