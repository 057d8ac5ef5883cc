"""The baselines on a GPU: losses and gradients against float64, packed documents, a training step as one graph."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.models import CausalLM, ConvConfig, ModelConfig, RecurrentConfig, S4Config, TransformerConfig
from statescan.train import CapturedStep
from statescan.train.optim import parameter_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SMALL: dict[str, Any] = {"d_model": 128, "n_layer": 2, "vocab_size": 256}
CONFIGS: dict[str, ModelConfig] = {
    "pythia": TransformerConfig(
        **SMALL, mlp="gelu", norm="layer", bias=True, parallel=True, rotary_fraction=0.25, tie_embeddings=False
    ),
    "transformer++": TransformerConfig(**SMALL, n_kv_head=1),
    "absolute": TransformerConfig(**SMALL, positions="absolute", max_positions=128),
    "xpos": TransformerConfig(**SMALL, positions="xpos"),
    "lstm": RecurrentConfig(**SMALL),
    "gru": RecurrentConfig(**SMALL, cell="gru"),
    "conv": ConvConfig(**SMALL),
    "s4": S4Config(**SMALL, mixer="s4"),
    "s4d": S4Config(**SMALL),
}


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN cuts float32's mantissa to ten bits unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def made(name: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CONFIGS[name]).to("cuda", dtype)


def gradients(model: CausalLM, ids: Tensor, autocast: bool = False, **options: Tensor) -> list[Tensor]:
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids, **options).loss
    loss.backward()
    found = [loss.detach().double(), *(p.grad.double() for p in model.parameters())]  # type: ignore[union-attr]
    model.zero_grad()
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients(name: str, autocast: bool) -> None:
    ids = tokens(3, 100)
    truth = gradients(made(name, torch.float64), ids)
    got = gradients(made(name), ids, autocast)
    unit = 2.0**-8 if autocast else 2.0**-24
    # A loss has passed some ten roundings of each product on its way; gradients many more, those of S4's kernel most.
    assert abs(got[0] - truth[0]) <= 16 * unit * truth[0]
    for a, b in zip(got[1:], truth[1:], strict=True):
        assert (a - b).norm() <= (64 if autocast else 256) * unit * b.norm() + 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_as_alone(name: str) -> None:
    model, ids = made(name), tokens(1, 120)
    bounds = [0, 33, 34, 34, 100, 120]
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor(bounds, device="cuda")).logits
        for a, b in itertools.pairwise(bounds):
            if b > a:
                alone = model(ids[:, a:b]).logits
                assert (packed[:, a:b] - alone).abs().max() <= 1e-4 * alone.abs().max()
    gradients(model, ids, True, cu_seqlens=torch.tensor(bounds, device="cuda"))


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_the_whole(name: str) -> None:
    model, ids = made(name).eval(), tokens(2, 24)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :20], state=model.init_state(2))
        state = first.state
        for t in range(20, 24):
            one = model.step(ids[:, t], state)
            state = one.state
            assert (one.logits - whole[:, t]).abs().max() <= 1e-4 * whole.abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step_is_captured(name: str, dropout: float) -> None:
    """As a graph the losses go down as they do kernel by kernel, with the same numbers dropped in every step: from the
    first replay on both draw from the same place. Attention's backward sums in no fixed order."""
    losses, places = [], []
    for capture in (False, True):
        torch.manual_seed(0)
        model = CausalLM(CONFIGS[name].replace(dropout=dropout)).cuda().train()
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3, fused=True)
        step = CapturedStep(
            optimizer,
            lambda ids, model=model: model(ids[:, :-1], labels=ids).loss,
            autocast=torch.bfloat16,
            clip=1.0,
            capture=capture,
        )
        torch.manual_seed(5)
        losses.append([float(step.step(tokens(4, 97, seed=2))) for _ in range(10)])
        places.append(torch.cuda.get_rng_state())
    eager, graph = losses
    assert torch.equal(*places)
    assert eager[-1] < eager[0] - 0.3
    # What others compute meanwhile must not reach into a graph's memory.
    assert max(abs(a - b) for a, b in zip(eager, graph, strict=True)) < 0.02
