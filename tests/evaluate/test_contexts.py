"""The same tokens with less and with more context: each mean is of the bits read one by one, and pairs are pairs."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from statescan.errors import ConfigError, DataError
from statescan.evaluate import ByContext, Region, contexts, read_by_context
from statescan.models import CausalLM, MambaConfig, TransformerConfig

VOCABULARY = 5


class Output(NamedTuple):
    logits: Tensor
    state: Tensor | None


class Counter(nn.Module):
    """Spends 2 bits, and a thousandth for each token that it has seen, on a 0, and twice that on a 1: what it costs
    says how much context there was. `extra` bits more of a dearer one."""

    def __init__(self, extra: float = 0.0) -> None:
        super().__init__()
        self.extra = extra
        self.nothing = nn.Parameter(torch.zeros(1))

    def init_state(self, rows: int) -> Tensor:
        return torch.zeros(rows, dtype=torch.float64)

    def forward(self, ids: Tensor, state: Tensor | None = None) -> Output:
        seen = self.init_state(len(ids)) if state is None else state
        before = seen[:, None] + torch.arange(1, ids.shape[1] + 1, dtype=torch.float64)
        nats = (2 + before / 1000) * math.log(2)
        known = torch.stack([-nats, -2 * nats], -1) - self.extra * math.log(2)
        # Of three: what is left of the probability goes to the last.
        rest = torch.log1p(-known.exp().sum(-1, keepdim=True))
        return Output(torch.cat([known, rest], -1), seen + ids.shape[1])


@pytest.mark.parametrize(
    "config",
    [MambaConfig(8, 2, VOCABULARY, d_state=4), TransformerConfig(8, 2, VOCABULARY, n_head=1, d_intermediate=8)],
)
def test_bits_are_those_of_each_token_alone(config, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(contexts, "_LENGTHS", 3)
    monkeypatch.setattr(contexts, "_AT_ONCE", 48)  # several batches
    torch.manual_seed(0)
    model = CausalLM(config).double().eval()
    with torch.no_grad():  # sure enough of itself that context counts
        for name, weight in model.named_parameters():
            weight.mul_(10 if name.endswith("proj.weight") or "embedding" in name else 1)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 200)
    # Two homologues, of which one begins later; what is shorter than a window; another.
    regions = [Region(0, 90, 0), Region(90, 150, 0, 20), Region(150, 160, 1), Region(160, 200, 2)]
    carried = 64 if isinstance(config, MambaConfig) else None
    found = read_by_context(model, tokens, regions, context=32, carried=carried, unjudged=4, locus=24)
    assert found.lengths == (8, 16, 32)

    @torch.no_grad()
    def cost(start: int, aim: int) -> float:
        logits = model(torch.from_numpy(tokens[start:aim])[None]).logits[0, -1, :]
        return -float(logits.log_softmax(-1)[tokens[aim]]) / math.log(2)

    # Of 90: 17 to 89, in stretches of 24 of which the last is of 16 at least; of 60 and of 40 alike.
    wanted: dict[tuple[int, int], np.ndarray] = {}
    beyond: dict[int, list[float]] = {}
    for region in regions:
        first, end = region.start + 17, region.end
        for start in range(first, end - 15, 24):
            for aim in range(start, min(start + 24, end)):
                if tokens[aim] == 4:
                    continue
                key = (region.group, (aim - first + region.place) // 24)
                bits = []
                for length in (8, 16, 32):
                    half = length // 2
                    window = start - 1 - half + (aim - start) // half * half
                    assert half < aim - window <= length
                    bits.append(cost(window, aim))
                wanted[key] = wanted.get(key, np.zeros(4)) + np.array([1, *bits])
                # As far as whole pieces reach.
                if 32 < aim - region.start <= 64 and region.end - region.start > 64:
                    beyond.setdefault(key[1], []).append(cost(region.start, aim) - bits[-1])
    table = np.stack([wanted[key] for key in sorted(wanted)])
    np.testing.assert_array_equal(found.tokens, table[:, 0])
    # Losses are of float32 logits.
    np.testing.assert_allclose(found.bits, table[:, 1:].T, rtol=1e-6)
    if carried:
        (octave,) = found.carried
        assert (octave.first, octave.last) == (33, 64)
        counts = {number: count for number, count in enumerate(octave.tokens.tolist()) if count}
        assert counts == {number: len(values) for number, values in beyond.items()}
        for number, values in beyond.items():
            assert octave.more[number] == pytest.approx(sum(values), rel=1e-4, abs=1e-4)
    # The changes are means over tokens, and their errors over loci.
    for number in (1, 2):
        point = found.curve()[number]
        more = table[:, number + 1] - table[:, number]
        total = table[:, 0].sum()
        assert point.change == pytest.approx(more.sum() / total, rel=1e-4)
        spread = np.square(more - point.change * table[:, 0]).sum()
        loci = len(table)
        assert point.standard_error == pytest.approx(math.sqrt(loci / (loci - 1) * spread) / total, rel=1e-3)


def test_there_is_as_much_context_as_is_told() -> None:
    tokens = np.zeros(4 * 128 + 1, np.int64)
    found = read_by_context(Counter(), tokens, [Region(0, len(tokens), 0)], context=128, carried=512, locus=64)
    assert found.lengths == (2, 4, 8, 16, 32, 64, 128)
    windows, carried = found.curve()[:7], found.curve()[7:]
    for point in windows:
        # All of the second half, equally often.
        assert (point.first, point.carried) == (point.last // 2 + 1, False)
        assert 1000 * (point.bits_per_token - 2) == pytest.approx((point.first + point.last) / 2, abs=1e-3)
    assert 1000 * found.whole()[0] == pytest.approx(96.5 - 2, abs=1e-3)
    assert [(point.first, point.last) for point in carried] == [(129, 256), (257, 512)]
    for point in carried:
        # As the longest windows have 96.5 on average.
        assert point.carried
        assert 1000 * point.change == pytest.approx((point.first + point.last) / 2 - 96.5, abs=1e-3)  # type: ignore[operator]


def test_no_context_has_the_easier_tokens() -> None:
    """A text that is easy at first and hard later, of which more context tells nothing."""

    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(1))

        def init_state(self, rows: int) -> Tensor:
            return torch.zeros(rows)

        def forward(self, ids: Tensor, state: Tensor | None = None) -> Output:
            surely = ids.double().unsqueeze(-1) * torch.linspace(0, 1, VOCABULARY, dtype=torch.float64)
            return Output(surely, state)

    tokens = np.concatenate([np.zeros(600, np.int64), np.arange(600) * 3 % VOCABULARY])
    found = read_by_context(Forgetful(), tokens, [Region(0, 1200, 0)], context=256, carried=1024, locus=64)
    assert (len(found.carried), found.carried[-1].last) == (2, 1024)
    for point in found.curve()[1:]:
        assert point.change == pytest.approx(0, abs=1e-12)
        assert point.standard_error == pytest.approx(0, abs=1e-12)


def _model() -> CausalLM:
    torch.manual_seed(1)
    model = CausalLM(MambaConfig(8, 1, VOCABULARY, d_state=4)).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(40)
    return model


def test_homologues_are_of_one_locus() -> None:
    one = np.random.default_rng(3).integers(0, 4, 300)
    tokens = np.concatenate([one, one])
    model = _model()

    def errors(*regions: Region) -> list[float]:
        found = read_by_context(model, tokens, regions, context=32, locus=32)
        return [point.standard_error for point in found.curve()[1:]]  # type: ignore[misc]

    alone = errors(Region(0, 300, 0))
    together = errors(Region(0, 300, 0), Region(300, 600, 0))
    apart = errors(Region(0, 300, 0), Region(300, 600, 1))
    # A copy says nothing new; taken for another it would seem to.
    assert together == pytest.approx(alone, rel=1e-5)
    assert all(1.3 < whole / half < 1.5 for whole, half in zip(together, apart, strict=True))


def test_two_models_are_paired_on_the_same_tokens() -> None:
    tokens, regions = np.random.default_rng(3).integers(0, 2, 300), [Region(0, 300, 0)]
    one = read_by_context(Counter(), tokens, regions, context=32, locus=32)
    other = read_by_context(Counter(extra=0.5), tokens, regions, context=32, locus=32)
    assert len(set((one.bits[0] / one.tokens).round(3).tolist())) > 1
    for more, error in other.less(one):
        # However unequal the loci are, the difference is the same in all of them.
        assert more == pytest.approx(0.5, rel=1e-6)
        assert error == pytest.approx(0.0, abs=1e-6)
    held = ByContext.from_dict(json.loads(json.dumps(one.to_dict())))
    assert (held.curve(), held.less(other)) == (one.curve(), one.less(other))
    # Other tokens judged, another token before the first judged, other loci, other windows.
    others = [
        read_by_context(Counter(), 1 - tokens, regions, context=32, locus=32),
        read_by_context(Counter(), np.append(1 - tokens[:1], tokens[1:]), regions, context=32, locus=32),
        read_by_context(Counter(), tokens, regions, context=32, locus=48),
        read_by_context(Counter(), tokens, regions, context=16, locus=32),
    ]
    for another in others:
        with pytest.raises(ConfigError, match="two models judged on the same tokens in the same windows"):
            one.less(another)


def test_of_too_many_tokens_some_loci_of_all_homologues(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.zeros(2 * 1000, np.int64)
    regions = [Region(0, 1000, 0), Region(1000, 2000, 0)]
    whole = read_by_context(Counter(), tokens, regions, context=64, locus=32)
    assert len(whole.tokens) == 30
    assert whole.tokens.sum() == 2 * 30 * 32
    for name, most in (("_TOKENS", 2 * 32 * 7), ("_STRETCHES", 2 * 7)):
        with monkeypatch.context() as patch:
            patch.setattr(contexts, name, most)
            found = read_by_context(Counter(), tokens, regions, context=64, locus=32)
        assert found.tokens.tolist() == [2 * 32] * 7
    # One locus at least, of which there is no error.
    monkeypatch.setattr(contexts, "_TOKENS", 1)
    found = read_by_context(Counter(), tokens, regions, context=64, locus=32)
    assert found.tokens.tolist() == [64]
    assert all(point.standard_error is None for point in found.curve())


def test_what_does_not_fit_is_refused() -> None:
    tokens = np.zeros(65, np.int64)
    with pytest.raises(ConfigError, match="context must be at least 2, got 1"):
        read_by_context(Counter(), tokens, [Region(0, 65, 0)], context=1)
    with pytest.raises(DataError, match="a region of more than 65 tokens, got 65 at most; lower the context"):
        read_by_context(Counter(), tokens, [Region(0, 65, 0)], context=65)
    found = read_by_context(Counter(), tokens, [Region(0, 65, 0)], context=64)
    assert found.tokens.tolist() == [32]
    with pytest.raises(DataError, match="got unknown ones alone"):
        read_by_context(Counter(), tokens, [Region(0, 65, 0)], context=64, unjudged=0)
