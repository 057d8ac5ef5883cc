"""LSTM, GRU, dilated convolution, attention: one map whole, in parts and by steps, and against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from statescan.errors import ConfigError, ShapeError
from statescan.nn import GRU, LSTM, MLP, CausalSelfAttention, DilatedConv, GatedMLP
from statescan.nn import attention as attention_module
from statescan.nn import recurrent as recurrent_module

LAYERS = {
    "lstm": lambda: LSTM(8, 5),
    "gru": lambda: GRU(8),
    "conv": lambda: DilatedConv(8, width=3, dilation=2),
    "conv, one tap": lambda: DilatedConv(8, width=1),
    "attention rotary": lambda: CausalSelfAttention(8, 2),
    "attention part rotary": lambda: CausalSelfAttention(16, 2, rotary_fraction=0.25, bias=True),
    "attention xpos": lambda: CausalSelfAttention(8, 2, positions="xpos"),
    "attention none": lambda: CausalSelfAttention(8, 2, positions="none"),
    "attention shared keys": lambda: CausalSelfAttention(16, 4, n_kv_head=2),
}


def _layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[kind]().double()


def _input(layer: nn.Module, length: int = 19) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, length, layer.d_model, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("grad", [False, True])
def test_whole_is_steps_is_pieces(kind: str, grad: bool) -> None:
    layer = _layer(kind)
    x = _input(layer)
    with torch.set_grad_enabled(grad):
        whole = layer(x)
        state, steps = layer.init_state(2), []
        for t in range(x.shape[1]):
            one = layer.step(x[:, t], state)
            steps.append(one.output)
            state = one.state
        first = layer(x[:, :7], layer.init_state(2))
        second = layer(x[:, 7:], first.state)
    assert whole.state is None
    assert (whole.output - torch.stack(steps, 1)).abs().max() < 1e-12
    assert (whole.output - torch.cat([first.output, second.output], 1)).abs().max() < 1e-12


@pytest.mark.parametrize("layer", [LSTM(8, 5), GRU(8)], ids=["lstm", "gru"])
def test_sequences_longer_than_the_loop_takes_are_run_in_parts(
    layer: LSTM | GRU, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer.double()
    x = _input(layer)
    whole = layer(x, layer.init_state(2))
    monkeypatch.setattr(recurrent_module, "_LONGEST", 8)
    lengths: list[int] = []
    layer.rnn.register_forward_pre_hook(lambda _module, given: lengths.append(given[0].shape[1]))
    parts = layer(x, layer.init_state(2))
    assert lengths == [8, 8, 3]
    assert torch.equal(parts.output, layer(x).output)
    assert (parts.output - whole.output).abs().max() < 1e-14
    for one, other in zip(parts.state, whole.state, strict=True):
        assert one is other is None or (one - other).abs().max() < 1e-14


@pytest.mark.parametrize("kind", LAYERS)
def test_causal(kind: str) -> None:
    layer = _layer(kind)
    x = _input(layer)
    moved = x.clone()
    moved[:, 11] += 1
    change = (layer(moved).output - layer(x).output).abs().amax((0, 2))
    assert change[:11].max() < 1e-14
    assert change[11] > 1e-3


def _rows_of(state, rows: slice):
    """Some rows of a layer's state."""
    if isinstance(state, torch.Tensor):
        return state[rows]
    if isinstance(state, attention_module.AttentionState):
        return state.select(list(range(len(state.lengths)))[rows])
    return type(state)(*(None if part is None else part[rows] for part in state))


BOUNDS = [0, 5, 5, 12, 19]
SPANS = [(a, b) for a, b in itertools.pairwise(BOUNDS) if b > a]


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_is_separate(kind: str) -> None:
    layer = _layer(kind)
    x = _input(layer)[:1]
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    packed = layer(x, cu_seqlens=cu_seqlens).output
    apart = torch.cat([layer(x[:, a:b]).output for a, b in SPANS], 1)
    assert (packed - apart).abs().max() < 1e-13
    with pytest.raises(ShapeError, match="cu_seqlens must end at the length 19, got 18"):
        layer(x, cu_seqlens=torch.tensor([0, 18]))


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_passes_between_packed_sequences(kind: str) -> None:
    """A NaN in one of them leaves the others' outputs and gradients what they were."""
    layer = _layer(kind)
    x = _input(layer)[:1]
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    wanted = layer(x, cu_seqlens=cu_seqlens).output
    poisoned = x.clone()
    poisoned[:, 7] = torch.nan
    poisoned.requires_grad_()
    output = layer(poisoned, cu_seqlens=cu_seqlens).output
    others = [t for t in range(19) if not 5 <= t < 12]
    assert torch.equal(output[:, others], wanted[:, others])
    assert output[:, 7].isnan().all()
    output[:, others].square().sum().backward()
    alone = x.clone().requires_grad_()
    layer(alone, cu_seqlens=cu_seqlens).output[:, others].square().sum().backward()
    assert torch.equal(poisoned.grad[:, others], alone.grad[:, others])


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_from_states_is_separate(kind: str) -> None:
    """Rows that have seen different numbers of positions go on together, one of them by nothing."""
    layer = _layer(kind)
    x = _input(layer)[:1]
    first = torch.tensor([0, 3, 4, 4, 10], dtype=torch.int32)
    then = torch.tensor([0, 1, 6, 9, 9], dtype=torch.int32)
    with torch.no_grad():
        begun = layer(x[:, :10], layer.init_state(4), cu_seqlens=first)
        packed = layer(x[:, 10:], begun.state, cu_seqlens=then)
        for row in range(4):
            own = layer.init_state(1)
            for part, bounds, output in ((x[:, :10], first, begun.output), (x[:, 10:], then, packed.output)):
                span = slice(int(bounds[row]), int(bounds[row + 1]))
                if span.stop > span.start:
                    one = layer(part[:, span], own)
                    assert (one.output - output[:, span]).abs().max() < 1e-12
                    own = one.state
            after = layer.step(x[:, 0], _rows_of(packed.state, slice(row, row + 1))).output
            assert (after - layer.step(x[:, 0], own).output).abs().max() < 1e-12
        together = layer.step(x[:, 0].expand(4, -1), packed.state)
        rows = [layer.step(x[:, 0], _rows_of(packed.state, slice(row, row + 1))).output for row in range(4)]
        assert (together.output - torch.cat(rows)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", LAYERS)
def test_a_state_continued_twice_is_not_changed(kind: str) -> None:
    layer = _layer(kind)
    x = _input(layer)
    with torch.no_grad():
        state = layer(x[:, :6], layer.init_state(2)).state
        one = layer(x[:, 6:9], state)
        after = layer(x[:, 12:14], layer(x[:, :9], layer.init_state(2)).state).output
        layer(x[:, 9:12], state)
        # First the child, whose sibling came after it: running it again would write what the sibling wrote over.
        assert (layer(x[:, 12:14], one.state).output - after).abs().max() < 1e-12
        assert torch.equal(layer(x[:, 6:9], state).output, one.output)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_through_a_state(kind: str) -> None:
    """Two pieces joined by their state have the gradients of the whole."""
    layer = _layer(kind)
    x = _input(layer, 9)
    layer(x).output.square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    first = layer(x[:, :4], layer.init_state(2))
    second = layer(x[:, 4:], first.state)
    (first.output.square().sum() + second.output.square().sum()).backward()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-9, atol=1e-12), name


def _attention_truth(layer: CausalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """The formula, head by head and position by position, with complex numbers for the turns."""
    h, dh = layer.n_head, layer.d_head
    weight, bias = layer.qkv_proj.weight, layer.qkv_proj.bias
    heads = (h, layer.n_kv_head, layer.n_kv_head)
    both = (x @ weight.T + (0 if bias is None else bias)).unflatten(-1, (sum(heads), dh))
    q, k, v = both.split(heads, 2)
    k, v = (part.repeat_interleave(h // layer.n_kv_head, 2) for part in (k, v))
    pairs = layer.turned // 2
    y = torch.zeros(*x.shape[:2], h, dh, dtype=x.dtype)
    for b in range(x.shape[0]):
        for head in range(h):
            for m in range(x.shape[1]):
                scores = []
                for n in range(m + 1):
                    a, c = q[b, m, head], k[b, n, head]
                    score = a[layer.turned :] @ c[layer.turned :]
                    for j in range(pairs):
                        frequency = layer.rotary_base ** (-2 * j / layer.turned) if pairs else 0
                        turn = complex(math.cos((m - n) * frequency), math.sin((m - n) * frequency))
                        qj, kj = complex(a[j], a[j + pairs]), complex(c[j], c[j + pairs])
                        part = (qj * turn * kj.conjugate()).real
                        if layer.positions == "xpos":
                            part *= ((2 * j / layer.turned + 0.4) / 1.4) ** ((m - n) / 512)
                        score = score + part
                    scores.append(score / math.sqrt(dh))
                share = torch.softmax(torch.stack([torch.as_tensor(s, dtype=x.dtype) for s in scores]), 0)
                y[b, m, head] = share @ v[b, : m + 1, head]
    out = layer.out_proj
    return y.flatten(2) @ out.weight.T + (0 if out.bias is None else out.bias)


@pytest.mark.parametrize("kind", [k for k in LAYERS if k.startswith("attention")])
def test_attention_is_its_formula(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(kind)
    x = _input(layer, 11)
    with torch.no_grad():
        truth = _attention_truth(layer, x)
        assert (layer(x).output - truth).abs().max() < 1e-12
        monkeypatch.setattr(attention_module, "_XPOS_PIECE", 4)  # queries in pieces
        assert (layer(x).output - truth).abs().max() < 1e-12


def test_xpos_does_not_overflow_at_length() -> None:
    """Keys far back would have scales of e^(+-200) if they were counted from the first position."""
    torch.manual_seed(0)
    layer = CausalSelfAttention(4, 1, positions="xpos")
    with torch.no_grad():
        state = layer.init_state(1)
        far = attention_module.AttentionState(
            torch.randn(1, 1, 90_001, 4), torch.randn(1, 1, 90_001, 4), (90_000,), [(90_000,)]
        )
        y = layer.step(torch.randn(1, 4), far).output
    assert torch.isfinite(y).all()
    assert state.length == 0


def test_lstm_is_torchs() -> None:
    torch.manual_seed(0)
    layer, x = LSTM(8, 5).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    hidden, _ = layer.rnn(x)
    assert torch.equal(layer(x).output, hidden @ layer.out_proj.weight.T)


def test_dilated_conv_is_its_formula() -> None:
    layer = _layer("conv")
    x = _input(layer, 9)
    y = torch.zeros_like(x)
    for t in range(9):
        both = layer.conv.bias.expand(2, -1).clone()
        for tap in range(3):
            s = t - (2 - tap) * 2
            if s >= 0:
                both += x[:, s] @ layer.conv.weight[:, :, tap].T
        y[:, t] = torch.tanh(both[:, :8]) * torch.sigmoid(both[:, 8:]) @ layer.out_proj.weight.T
    assert (layer(x).output - y).abs().max() < 1e-12


def test_mlps() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64)
    plain, gated = MLP(6).double(), GatedMLP(6).double()
    z = x @ plain.in_proj.weight.T + plain.in_proj.bias
    gelu = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    assert torch.allclose(plain(x), gelu @ plain.out_proj.weight.T + plain.out_proj.bias)
    g, v = (x @ gated.in_proj.weight.T).chunk(2, -1)
    assert torch.allclose(gated(x), (g / (1 + torch.exp(-g)) * v) @ gated.out_proj.weight.T)
    assert GatedMLP(768).out_proj.in_features == 2048  # Transformer++'s at this width


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="n_head must divide d_model = 8, got 3"):
        CausalSelfAttention(8, 3)
    with pytest.raises(ConfigError, match="positions must be one of"):
        CausalSelfAttention(8, 2, positions="alibi")
    with pytest.raises(ConfigError, match="rotary_fraction must turn at least 2"):
        CausalSelfAttention(8, 2, rotary_fraction=0.1)
    with pytest.raises(ConfigError, match="must be >= 1"):
        DilatedConv(8, dilation=0)
    with pytest.raises(ConfigError, match="must be >= 1"):
        LSTM(0)
    for kind in LAYERS:
        layer = _layer(kind)
        with pytest.raises(ShapeError, match="x must be"):
            layer(torch.zeros(2, 3, 5, dtype=torch.float64))
    with pytest.raises(ShapeError, match="make it with init_state"):
        LSTM(8)(torch.zeros(2, 3, 8), LSTM(8).init_state(3))
    with pytest.raises(ShapeError, match="make it with init_state"):
        DilatedConv(8)(torch.zeros(2, 3, 8), DilatedConv(8).init_state(3))
    with pytest.raises(ShapeError, match="make it with init_state"):
        DilatedConv(8).step(torch.zeros(2, 8), DilatedConv(8).init_state(3))
    with pytest.raises(ShapeError, match=r"x must be \(batch, d_model\) with d_model 8 in a step, got \(2, 3, 8\)"):
        DilatedConv(8).step(torch.zeros(2, 3, 8), DilatedConv(8).init_state(2))
    with pytest.raises(ShapeError, match="state must have 2 rows"):
        CausalSelfAttention(8, 2)(torch.zeros(2, 3, 8), CausalSelfAttention(8, 2).init_state(3))
    with pytest.raises(ConfigError, match="n_kv_head must divide n_head = 4, got 3"):
        CausalSelfAttention(8, 4, n_kv_head=3)
    with pytest.raises(ConfigError, match=r"dropout must be in \[0, 1\), got 1"):
        CausalSelfAttention(8, 4, dropout=1.0)


@pytest.mark.parametrize("kind", ["lstm", "gru", "conv", "attention rotary"])
def test_wrong_boundaries_stop_a_compiled_layer(kind: str) -> None:
    """The lengths of [2, 21] fit, too, so nothing else would tell."""
    layer = _layer(kind)
    x = _input(layer)[:1]
    run = torch.compile(lambda x, cu: layer(x, cu_seqlens=cu).output, backend="eager")
    right = torch.tensor([0, 8, 19], dtype=torch.int32)
    torch.testing.assert_close(run(x, right), layer(x, cu_seqlens=right).output)
    for wrong in ([2, 10, 21], [0, 8, 18], [-1, 8, 18]):
        with pytest.raises(RuntimeError, match="cu_seqlens must go from 0 to the length and never fall"):
            run(x, torch.tensor(wrong, dtype=torch.int32))
