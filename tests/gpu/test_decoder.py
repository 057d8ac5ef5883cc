"""The decoder on a GPU: its step against float64, its draws against the host's, the engine against the oracle."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from statescan.data import ByteTokenizer
from statescan.errors import ConfigError
from statescan.generate import Engine, SamplingParams, generate_naive, sample
from statescan.generate.packed import DecodeState, PackedModel
from statescan.models import CausalLM, MambaConfig, preset
from statescan.ops import _cuda, mamba_step
from statescan.ops.mamba_step.validation import BlockWeights
from statescan.ops.packed_linear.validation import PackedWeight
from statescan.testing import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    reason = _cuda.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)


# One launch takes the first three for one row (whole and cut tiles of rows, several rows a block, biases). Several rows
# in 16 bits have one launch between the large products at widths 2048 and 768; one has odd sizes everywhere: in pieces.
CONFIGS = {
    "tiny": preset("tiny"),
    "wide": MambaConfig(d_model=736, n_layer=2, vocab_size=1003, dt_rank=48, bias=True, tie_embeddings=False),
    "d_model 2048": MambaConfig(d_model=2048, n_layer=2, vocab_size=5003),
    "odd": MambaConfig(d_model=45, n_layer=3, vocab_size=203, d_state=11, bias=True),
    "d_model 768": MambaConfig(d_model=768, n_layer=3, vocab_size=1003, bias=True),
}
ONE_LAUNCH = ["tiny", "wide", "d_model 2048"]


@functools.cache
def model(name: str) -> CausalLM:
    torch.manual_seed(0)
    made = CausalLM(CONFIGS[name], device="cuda")
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval()


@functools.cache
def packed(name: str, dtype: Any) -> PackedModel:
    return PackedModel(model(name), dtype)


def decoder(name: str, dtype: str, capacity: int, vocabulary: int | None = None) -> Any:
    from statescan.generate.graphs import GraphDecoder

    return GraphDecoder(packed(name, dtype), capacity, vocabulary or CONFIGS[name].vocab_size)


def truth(own: PackedModel, ids: Tensor, state: DecodeState) -> Tensor:
    """Logits in float64 by the reference op with the packed weights; the state, float64 too, moves on in place."""

    def wide(value: Any) -> Any:
        if isinstance(value, PackedWeight):
            return PackedWeight(value.unpack(dtype=torch.float64))
        return value.double() if isinstance(value, Tensor) else value

    x, residual = own.embedding.unpack(ids.long(), dtype=torch.float64), None
    for i, block in enumerate(own.blocks):
        weights = replace(block, **{name: wide(value) for name, value in vars(block).items()})
        x, residual = mamba_step(x, residual, state.conv[i], state.ssm[i], weights, backend="reference")
    assert residual is not None
    h = x + residual
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + own.epsilon) * own.norm_f.double()
    logits = h @ own.head.unpack(dtype=torch.float64).T
    return logits if own.head_bias is None else logits + own.head_bias.double()


def torch_step(own: PackedModel, ids: Tensor, state: DecodeState) -> Tensor:
    """Logits in float32 on torch's own ops."""
    x, residual = own.embedding.unpack(ids.long()), None
    for i, block in enumerate(own.blocks):
        x, residual = mamba_step(x, residual, state.conv[i], state.ssm[i], block, backend="torch")
    assert residual is not None
    h = x + residual
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + own.epsilon) * own.norm_f
    logits = h @ own.head.unpack().T
    return logits if own.head_bias is None else logits + own.head_bias


def wide_state(own: PackedModel, rows: int) -> DecodeState:
    state = own.init_state(rows)
    return DecodeState(state.conv.double(), state.ssm.double())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ONE_LAUNCH)
def test_one_launch_is_float32_arithmetic_whatever_the_weights_are(name: str, dtype: str) -> None:
    own, slots = packed(name, dtype), decoder(name, dtype, 1)
    assert slots.one_launch_refusal is None
    exact, plain, again = wide_state(own, 1), own.init_state(1), []
    ids = torch.randint(0, CONFIGS[name].vocab_size, (7,), device="cuda")
    for run in range(2):
        slots.state.conv.zero_()
        slots.state.ssm.zero_()
        rows = []
        for token in ids:
            slots.tokens.fill_(int(token))
            slots.logits.fill_(float("nan"))
            slots._step_rows(1)
            rows.append(slots.logits[0].clone())
        again.append((torch.stack(rows), slots.state.conv.clone(), slots.state.ssm.clone()))
        if run == 0:
            wanted = torch.cat([truth(own, token[None], exact) for token in ids])
            usual = torch.cat([torch_step(own, token[None], plain) for token in ids])
            assert_within_budget(again[0][0], wanted, usual, "logits")
            assert_within_budget(slots.state.ssm, exact.ssm, plain.ssm, "ssm")
            assert_within_budget(slots.state.conv, exact.conv, plain.conv, "conv")
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True)), "two runs differ"


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 37, 64, 100, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_several_rows(name: str, dtype: str, rows: int) -> None:
    """float32 within the float32 budget, bfloat16 within that of a bfloat16 model; the states of other slots stay."""
    own, slots = packed(name, dtype), decoder(name, dtype, rows + 3)
    assert (slots.middle_refusal is None) == (name.startswith("d_model") and dtype == "bfloat16")
    exact, plain = wide_state(own, rows), own.init_state(rows)
    slots.state.ssm.normal_()
    slots.state.ssm[:, :rows] = 0
    before = slots.state.ssm.clone()
    ids = torch.randint(0, CONFIGS[name].vocab_size, (5, rows), device="cuda")
    got = []
    for step in ids:
        slots.tokens[:rows] = step.int()
        slots._step_rows(rows)
        got.append(slots.logits[:rows].clone())
    wanted = torch.cat([truth(own, step, exact) for step in ids])
    if dtype == "float32":
        usual = torch.cat([torch_step(own, step, plain) for step in ids])
        assert_within_budget(torch.cat(got), wanted, usual, "logits")
        assert_within_budget(slots.state.ssm[:, :rows], exact.ssm, plain.ssm, "ssm")
    else:
        low = CausalLM(CONFIGS[name], device="cuda", dtype=torch.bfloat16)
        low.load_state_dict(model(name).state_dict())
        with torch.no_grad():
            usual = low.eval()(ids.T).logits.transpose(0, 1).flatten(0, 1)
        assert_within_budget(torch.cat(got).bfloat16(), wanted, usual, "logits")
    assert torch.equal(slots.state.ssm[:, rows:], before[:, rows:])


@pytest.mark.parametrize("rows", [64, 96, 128])
def test_graphs_of_many_rows_are_equal_run_by_run(rows: int) -> None:
    """With the products' and the middle's launches that begin before the one in front has ended."""
    slots = decoder("d_model 2048", "bfloat16", rows)
    if refusal := slots.in_proj_refusal or slots.out_proj_refusal:
        pytest.skip(refusal)
    assert slots._in_projection.pays(rows)
    assert slots._out_projection.pays(rows)
    assert slots._tiles.pays(rows) == (rows > 64)
    ids = torch.randint(0, CONFIGS["d_model 2048"].vocab_size, (rows,), device="cuda").int()
    runs = []
    for graph in (True, True, False):
        slots.state.conv.zero_()
        slots.state.ssm.zero_()
        for slot in range(rows):
            slots.place(slot, SamplingParams(temperature=0), 0, [])
        slots.tokens.copy_(ids)
        for _ in range(6):
            if graph:
                slots.step(rows)
            else:
                slots._step_rows(rows)
                slots._launch_draw(slots.logits, 0, rows)
        runs.append([one.clone() for one in (slots.logits, slots.tokens, slots.state.conv, slots.state.ssm)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def random_block(d_model: int, d_inner: int, rank: int, dtype: torch.dtype, bare: bool) -> BlockWeights:
    g = torch.Generator("cuda").manual_seed(d_inner)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g, device="cuda")

    def weight(out: int, columns: int) -> PackedWeight:
        return PackedWeight(draw(out, columns, scale=columns**-0.5).to(dtype))

    return BlockWeights(
        norm=1 + draw(d_model, scale=0.1),
        in_proj=weight(2 * d_inner, d_model),
        conv_weight=draw(d_inner, 4, scale=0.5),
        x_proj=weight(rank + 32, d_inner),
        dt_proj=weight(d_inner, rank),
        A=-0.1 - 16 * draw(d_inner, 16).abs(),
        out_proj=weight(d_model, d_inner),
        conv_bias=None if bare else draw(d_inner, scale=0.1),
        dt_bias=None if bare else draw(d_inner) - 3,
        D=None if bare else draw(d_inner),
        x_bias=None if bare else draw(rank + 32, scale=0.1),
    )


def between_products(w: BlockWeights, uz: Tensor, conv: Tensor, ssm: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[y, convolution's state, state] by torch's ops, sums and states in `dtype`; where that is float32, what goes
    between launches is rounded as it is there."""
    given = w.x_proj.data.dtype
    between = (lambda x: x.to(given).to(dtype)) if dtype == torch.float32 else (lambda x: x)

    def wide(x: Tensor | None) -> Tensor | float:
        return 0.0 if x is None else x.to(dtype)

    u, z = uz.to(dtype).chunk(2, 1)
    window = torch.cat([conv.to(dtype), u.unsqueeze(1)], 1)
    u = between(torch.nn.functional.silu(torch.einsum("bwd,dw->bd", window, wide(w.conv_weight)) + wide(w.conv_bias)))
    selected = u @ w.x_proj.data.to(dtype).T + wide(w.x_bias)
    low, B, C = between(selected).split([w.dt_rank, 16, 16], 1)
    dt = torch.nn.functional.softplus(between(low @ w.dt_proj.data.to(dtype).T) + wide(w.dt_bias))
    h = torch.exp(dt.unsqueeze(-1) * w.A.to(dtype)) * ssm.to(dtype) + (dt * u).unsqueeze(-1) * B.unsqueeze(1)
    y = (h * C.unsqueeze(1)).sum(-1) + wide(w.D) * u
    return [between(y * torch.nn.functional.silu(z)), window[:, 1:], h]


def check_middle(run: Any, w: BlockWeights, rows: int, narrow: bool = False) -> None:
    """Holds what lies between in_proj and out_proj to float64. `narrow`: convolution's state in the weights' dtype."""
    d_inner, dtype = w.d_inner, w.x_proj.data.dtype
    g = torch.Generator("cuda").manual_seed(rows)
    uz = torch.randn(rows, 2 * d_inner, generator=g, device="cuda").to(dtype)
    conv = torch.randn(rows, 3, d_inner, generator=g, device="cuda").to(dtype if narrow else torch.float32)
    ssm = torch.randn(rows, d_inner, 16, generator=g, device="cuda")

    def launch(first: int) -> list[Tensor]:
        states = conv[:first].clone(), ssm[:first].clone()
        # The launch in front of the middle's: the states are there when it begins.
        y = torch.full((first, d_inner), float("nan"), dtype=dtype, device="cuda")
        run(uz[:first], *states, w, y)
        return [y, *states]

    got = launch(rows)
    exact, usual = (between_products(w, uz, conv, ssm, precision) for precision in (torch.float64, torch.float32))
    assert torch.equal(got[1], exact[1].to(conv.dtype))
    assert_within_budget(got[0], exact[0], usual[0].to(dtype), "y")
    assert_within_budget(got[2], exact[2], usual[2], "ssm")
    assert all(torch.equal(a, b) for a, b in zip(launch(rows), got, strict=True)), "two runs differ"
    alone = launch(max(1, rows // 2))
    assert all(torch.equal(a, b[: max(1, rows // 2)]) for a, b in zip(alone, got, strict=True))


@pytest.mark.parametrize("rows", [1, 17, 64, 128])
@pytest.mark.parametrize(("dtype", "bare"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("sizes", [(2048, 4096, 128), (768, 1536, 48), (2560, 5120, 160), (256, 512, 16)])
def test_the_middle_of_a_block(sizes: tuple[int, int, int], dtype: torch.dtype, bare: bool, rows: int) -> None:
    """Within the budget; equal run by run; and for a row alone what it is among others."""
    from statescan.ops.mamba_step.middle import Middle, refuses_middle

    w = random_block(*sizes, dtype, bare)
    assert refuses_middle(w, torch.device("cuda")) is None
    check_middle(Middle(w, torch.device("cuda")), w, rows, narrow=bare)


@pytest.mark.parametrize("rows", [1, 16, 97, 128])
@pytest.mark.parametrize(("dtype", "bare"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("sizes", [(2048, 4096, 128), (1536, 3072, 96), (256, 512, 32)])
def test_the_middle_in_tiles(sizes: tuple[int, int, int], dtype: torch.dtype, bare: bool, rows: int) -> None:
    """Within the budget; equal run by run; and for a row alone what it is among others."""
    from statescan.ops.mamba_step.middle import MiddleTiles, refuses_tiles

    w = random_block(*sizes, dtype, bare)
    assert refuses_tiles(w, torch.device("cuda")) is None
    check_middle(MiddleTiles(w, torch.device("cuda")), w, rows, narrow=bare)


@pytest.mark.parametrize("rows", [1, 37, 64, 100, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "columns", "parts"), [(8192, 2048, 1), (2048, 4096, 4), (384, 192, 1)])
def test_projections(outputs: int, columns: int, parts: int, dtype: torch.dtype, rows: int) -> None:
    """Within the budget of torch's product; equal run by run; and for a row alone what it is among others."""
    from statescan.ops.mamba_step.projection import Projection, refuses_projection

    g = torch.Generator("cuda").manual_seed(rows)
    weights = [torch.randn(outputs, columns, generator=g, device="cuda").to(dtype) for _ in range(2)]
    bias = torch.randn(outputs, generator=g, device="cuda")
    x = torch.randn(rows, columns, generator=g, device="cuda").to(dtype)
    if refusal := refuses_projection(weights, parts):
        pytest.skip(refusal)
    run = Projection(weights, parts)
    for i, weight in enumerate(weights):
        got = run(i, x, bias)
        assert got.shape == ((rows, outputs) if parts == 1 else (parts, rows, outputs))
        exact = torch.addmm(bias.double(), x.double(), weight.double().T)
        if parts == 1:
            assert_within_budget(got, exact, torch.addmm(bias, x.float(), weight.float().T).to(dtype), "y")
        else:
            pieces = zip(x.chunk(parts, 1), weight.chunk(parts, 1), strict=True)
            shares = torch.stack([a.double() @ b.double().T for a, b in pieces])
            shares[0] += bias.double()
            assert_within_budget(got, shares, shares.float().to(dtype), "parts of y")
        assert torch.equal(run(i, x, bias), got), "two runs differ"
        few = max(1, rows // 2)
        alone = run(i, x[:few].clone(), bias)
        assert torch.equal(alone, got[..., :few, :])


def test_what_the_middle_refuses() -> None:
    from statescan.ops.mamba_step.middle import refuses_middle

    device, good = torch.device("cuda"), random_block(256, 512, 16, torch.bfloat16, False)
    for block, text in (
        (random_block(256, 512, 16, torch.float32, False), "take bfloat16 or float16, the weights are float32"),
        (random_block(256, 512, 24, torch.bfloat16, False), "they are 512 and 24"),
        (random_block(256, 768, 16, torch.bfloat16, False), "they are 768 and 16"),
        (replace(good, A=good.A[:, :8]), "d_state is 8"),
    ):
        reason = refuses_middle(block, device)
        assert reason is not None
        assert text in reason
    assert "'cpu'" in str(refuses_middle(good, torch.device("cpu")))


def read(slots: Any, slot: int, number: int) -> tuple[int, float]:
    tokens, logprobs = slots.read([slot], [number])
    return tokens[0], logprobs[0]


DRAWS = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.7),
    SamplingParams(seed=3, top_k=1),
    SamplingParams(seed=4, top_k=40, temperature=1.3),
    SamplingParams(seed=5, top_p=0.9),
    SamplingParams(seed=6, top_p=0.2, stream=7),
    SamplingParams(seed=7, min_p=0.05),
    SamplingParams(seed=8, repetition_penalty=1.7, temperature=0.9),
    SamplingParams(seed=9, top_k=300, top_p=0.95, min_p=0.01, temperature=0.8, repetition_penalty=1.2),
    SamplingParams(temperature=0, repetition_penalty=2.5),
    SamplingParams(seed=2**64 - 1, temperature=1e-30),
    SamplingParams(seed=10, top_k=5, temperature=50.0),
    SamplingParams(seed=11, top_p=1e-9),
]


@pytest.mark.parametrize(("name", "vocabulary"), [("wide", 1003), ("d_model 2048", 5003)])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_are_the_hosts(ties: bool, name: str, vocabulary: int) -> None:
    """The same token for the same logits, but where a draw meets an edge within rounding; log probabilities, too. The
    smaller vocabulary is one block's, the larger a cluster's."""
    slots = decoder(name, "float32", len(DRAWS), vocabulary)
    assert slots._draw_blocks == (8 if vocabulary > 4096 else 1)
    g = torch.Generator().manual_seed(0)
    same = total = 0
    for position in range(12):
        logits = 3 * torch.randn(len(DRAWS), vocabulary, generator=g)
        if ties:
            logits = logits.round()
        before = torch.randint(0, vocabulary, (30,), generator=g).tolist()
        seen = torch.zeros(vocabulary, dtype=torch.bool)
        seen[before] = True
        for slot, params in enumerate(DRAWS):
            slots.place(slot, replace(params, logprobs=True), position, before)
            slots.logits.fill_(99.0)  # columns that pad the vocabulary are never drawn
            padded = slots.logits[slot].clone()
            padded[:vocabulary] = logits[slot].cuda()
            token, logprob = read(slots, slot, slots.draw(slot, padded))
            wanted = sample(logits[slot], params, position, seen)
            same, total = same + (token == wanted), total + 1
            if params.greedy:
                assert token == wanted
            assert abs(logprob - float(torch.log_softmax(logits[slot].double(), -1)[token])) < 1e-5
            assert int(slots.tokens[slot]) == token
            assert bool(slots._seen[slot, token])
    assert same >= total - 1


@pytest.mark.parametrize("vocabulary", [203, 5003])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_p=0.9, top_k=9, logprobs=True)])
def test_logits_that_are_no_numbers(params: SamplingParams, vocabulary: int) -> None:
    slots = decoder("d_model 2048", "float32", 2, vocabulary)
    good = torch.randn(slots.logits.shape[1], device="cuda")
    for value in (float("nan"), float("inf")):
        bad = good.clone()
        bad[vocabulary - 1] = value
        slots.place(1, params, 3, [])
        with pytest.raises(ConfigError, match="finite"):
            read(slots, 1, slots.draw(1, bad))
        assert int(slots.tokens[1]) == 0
    allowed = torch.full_like(good, -torch.inf)
    with pytest.raises(ConfigError, match="finite"):
        read(slots, 1, slots.draw(1, allowed))
    allowed[7] = -3.0
    assert read(slots, 1, slots.draw(1, allowed))[0] == 7


def test_draws_follow_their_distribution() -> None:
    slots = decoder("tiny", "float32", 1)
    logits = torch.randn(256, generator=torch.Generator().manual_seed(1))
    slots.place(0, SamplingParams(seed=5, top_k=4), 0, [])
    row = logits.cuda()
    counts = torch.zeros(256)
    for _ in range(2000):
        counts[read(slots, 0, slots.draw(0, row))[0]] += 1
    top = logits.topk(4)
    assert set(counts.nonzero().flatten().tolist()) == set(top.indices.tolist())
    expected = torch.softmax(top.values, 0) * 2000
    chi = ((counts[top.indices] - expected).square() / expected).sum()
    assert chi < 16.3  # three degrees of freedom, one in a thousand


PROMPTS = ["Call me Ishmael.", "a", "The whale, " * 30, "sea", "a", "Ünïcode", "land"]


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_greedy_tokens_are_the_oracles(max_batch: int) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=24)
    engine = Engine(model("tiny"), max_batch=max_batch)
    assert engine._slots is not None
    for prompt, result in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        naive = generate_naive(model("tiny"), prompt, params)
        assert result.tokens == naive.tokens
        assert result.text == naive.text


def test_samples_are_reproducible_and_their_own() -> None:
    each = [SamplingParams(seed=i, max_new_tokens=5 + 7 * i, top_p=0.95, logprobs=True) for i in range(len(PROMPTS))]
    engine = Engine(model("tiny"), max_batch=3)
    first = engine.generate(PROMPTS, each)
    assert engine.generate(PROMPTS, each) == first
    assert Engine(model("tiny"), max_batch=3).generate(PROMPTS, each) == first
    for prompt, params, result in zip(PROMPTS, each, first, strict=True):
        # in float32 alone or in company, up to rounding at an edge
        naive = generate_naive(model("tiny"), prompt, params)
        assert result.tokens == naive.tokens
        assert result.logprobs == pytest.approx(naive.logprobs, abs=1e-3)


def test_stops_sessions_and_bfloat16() -> None:
    engine = Engine(model("tiny"), dtype="bfloat16", max_batch=2)
    params = SamplingParams(seed=3, max_new_tokens=40)
    whole = engine.generate("Call me", params)[0]
    token = whole.tokens[20]
    stopped = engine.generate("Call me", replace(params, stop_token_ids=(token,)))[0]
    assert stopped.tokens == whole.tokens[: whole.tokens.index(token) + 1]
    session = engine.open("Call me")
    parts = []
    for seed in range(3):
        # the draws go on by position, so one seed gives one text however it is cut
        del seed
        parts += engine.resume(session, SamplingParams(temperature=0, max_new_tokens=5)).tokens
    greedy = engine.generate("Call me", SamplingParams(temperature=0, max_new_tokens=15))[0].tokens
    assert len(parts) == 15
    assert parts[:5] == greedy[:5]
    assert session.tokens == list(b"Call me") + parts


def test_a_long_prompt_in_parts_and_prompts_together() -> None:
    own = packed("tiny", "float32")
    ids = torch.randint(0, 256, (3, 300), device="cuda")
    whole, parts, alone = own.init_state(3), own.init_state(3), own.init_state(3)
    a = own.prefill(ids, whole, together=True)
    b = own.prefill(ids, parts, together=True, chunk=99)
    c = own.prefill(ids, alone)
    exact = wide_state(own, 3)
    for t in range(300):
        wanted = truth(own, ids[:, t], exact)
    plain = own.init_state(3)
    for t in range(300):
        usual = torch_step(own, ids[:, t], plain)
    for got in (a, b, c):
        assert_within_budget(got, wanted, usual, "logits")
    assert_within_budget(parts.ssm, exact.ssm, plain.ssm, "ssm")


@pytest.mark.parametrize("rows", [1, 3])
def test_prompts_of_a_shape_seen_before_are_read_by_a_graph(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit as without, from zero and from other states; shapes not seen of late are forgotten."""
    from statescan.generate import graphs

    monkeypatch.setattr(graphs, "_LAUNCH_BOUND", 8192)
    own, slots = packed("tiny", "bfloat16"), decoder("tiny", "bfloat16", 4)
    for turn in range(4):
        ids = torch.randint(0, 256, (rows, 60))
        state = own.init_state(rows)
        if turn == 3:
            state.ssm.normal_()
            state.conv.normal_()
        other = state.clone()
        got = slots.prefill(ids.tolist(), state, 4096)
        assert (turn == 0) == (slots._prefills[rows, 60] is False)
        wanted = own.prefill(ids.cuda(), other, together=True, chunk=4096)
        assert torch.equal(got, wanted)
        assert torch.equal(state.ssm, other.ssm)
        assert torch.equal(state.conv, other.conv)
    for length in range(2, 2 + graphs._PREFILLS):
        slots.prefill([[1] * length] * rows, own.init_state(rows), 4096)
    assert (rows, 60) not in slots._prefills


@pytest.mark.parametrize("kind", ["model", "packed"])
def test_a_graph_of_any_models_step(kind: str) -> None:
    """Bit by bit what the step gives that is launched anew for each token; states may be written into between steps."""
    from statescan.generate.graphs import StepGraph

    own: Any = model("tiny") if kind == "model" else packed("tiny", "float32")
    graph = StepGraph(own, 3)
    ids = torch.randint(0, 256, (6, 3), device="cuda")
    for _ in range(2):
        state = own.init_state(3)
        for leaf in (graph.state.conv, graph.state.ssm) if kind == "packed" else tree_leaves(graph.state):
            leaf.zero_()
        with torch.no_grad():
            for step in ids:
                got = graph(step).clone()
                if kind == "packed":
                    wanted = own.step(step, state)
                else:
                    wanted, _, state = own.step(step, state)
                assert torch.equal(got, wanted)
                assert not torch.equal(got[0], got[1])


def test_a_graph_refuses_a_state_that_grows() -> None:
    from statescan.generate.graphs import StepGraph

    class Growing:
        def init_state(self, batch: int) -> list[Tensor]:
            return [torch.zeros(batch, 0, device="cuda")]

        def step(self, tokens: Tensor, state: list[Tensor]) -> Any:
            return SimpleNamespace(logits=state[0], state=[torch.cat([state[0], tokens[:, None].float()], 1)])

    with pytest.raises(ConfigError, match="must keep shape and dtype"):
        StepGraph(Growing(), 2)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"'int8' runs on the CPU.*'bfloat16'"):
        Engine(model("tiny"), dtype="int8")
    with pytest.raises(ConfigError, match="vocabulary must be from 1 to"):
        decoder("tiny", "float32", 1, 9999)
    assert decoder("odd", "float32", 1).one_launch_refusal is not None


def test_a_model_goes_where_it_is_told() -> None:
    there = CausalLM(preset("tiny")).eval()
    params = SamplingParams(temperature=0, max_new_tokens=8)
    engine = Engine(there, ByteTokenizer(), device="cuda")
    assert next(there.parameters()).device.type == "cpu"
    assert engine.generate("sea", params)[0].tokens == generate_naive(there, "sea", params).tokens
