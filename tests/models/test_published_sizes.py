"""The published sizes in full beside the `transformers` package's on the same random weights (init 0.02)."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.models import CausalLM, preset

transformers = pytest.importorskip("transformers")

SIZES = ("130m", "370m", "790m", "1.4b", "2.8b")
LENGTH = 24
# The weights, which both models share, one model's gradients, and what is computed on the way: bytes a parameter.
BYTES_A_PARAMETER = 10


def _theirs(name: str, device: str) -> Any:
    ours: Any = preset(name)
    config = transformers.MambaConfig(
        vocab_size=ours.padded_vocab_size,
        hidden_size=ours.d_model,
        num_hidden_layers=ours.n_layer,
        layer_norm_epsilon=ours.norm_epsilon,
        initializer_range=0.02,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.MambaForCausalLM(config).train()


def _ours(name: str, theirs: Any) -> CausalLM:
    model = CausalLM(preset(name), device="meta", dtype=theirs.dtype)
    weights = {key.replace("backbone.embeddings.", "backbone.embedding."): v for key, v in theirs.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def _memory(device: str) -> int:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def size(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(preset, device), where both models fit."""
    name, device = request.param
    needed = BYTES_A_PARAMETER * CausalLM(preset(name), device="meta").parameter_count()
    if _memory(device) < needed:
        pytest.skip(f"the weights of {name} and their gradients need {needed / 1e9:.0f} GB of free memory on {device}")
    return name, device


CASES = [pytest.param((name, "cpu"), marks=pytest.mark.slow, id=f"{name}-cpu") for name in SIZES[:4]]
CASES += [pytest.param((name, "cuda"), marks=pytest.mark.gpu, id=f"{name}-cuda") for name in SIZES]


@pytest.mark.parametrize("size", CASES, indirect=True)
def test_logits_and_gradients_of_a_published_size(size: tuple[str, str]) -> None:
    name, device = size
    theirs = _theirs(name, device)
    ours = _ours(name, theirs)
    ids = torch.randint(0, 50277, (1, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    logits = _relative(ours(ids).logits, theirs(ids).logits)
    ours(ids, labels=ids).loss.backward()
    mine = dict(ours.named_parameters())
    gradients = {}
    for name_there, parameter in theirs.named_parameters():

        def compare(p: Tensor, key: str = name_there.replace("embeddings.", "embedding.")) -> None:
            gradients[key] = _relative(mine[key].grad, p.grad)  # type: ignore[arg-type]
            p.grad = mine[key].grad = None  # as soon as it is there, so that few lie in memory

        parameter.register_post_accumulate_grad_hook(compare)
    theirs(ids, labels=ids).loss.backward()
    worst = max(gradients, key=lambda key: gradients[key])
    print(f"{name} on {device}: logits {logits:.1e}, gradients {gradients[worst]:.1e} ({worst})")
    assert logits <= 1e-5
    assert gradients[worst] <= 5e-5, worst
    assert gradients.keys() == mine.keys()


@pytest.mark.parametrize("size", CASES[:1] + CASES[4:6], indirect=True)
def test_bfloat16_is_as_near_to_float32_as_transformers_own(size: tuple[str, str]) -> None:
    name, device = size
    theirs = _theirs(name, device)
    ids = torch.randint(0, 50277, (1, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        # The weights as bfloat16 has them: what differs is the computation alone.
        theirs.bfloat16()
        narrow = theirs(ids).logits.float()
        ours = _ours(name, theirs)(ids).logits.float()  # type: ignore[union-attr]
        exact = theirs.float()(ids).logits
        error, its = float((ours - exact).norm() / exact.norm()), float((narrow - exact).norm() / exact.norm())
    print(f"{name} on {device} in bfloat16: ours {error:.1e}, transformers {its:.1e}")
    assert error <= 2 * its + torch.finfo(torch.bfloat16).eps / 2
