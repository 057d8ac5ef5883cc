"""Every block and inner map on the GPU: outputs and gradients against float64 within the budget of plain PyTorch, cut =
whole = steps, and text from the engine as the model's own forward gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.generate import Engine, SamplingParams
from statescan.models import CausalLM, MambaConfig
from statescan.nn import Mamba

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

BLOCKS = ["mamba", "h3", "ungated"]
MAPS: dict[str, dict[str, Any]] = {
    "s6": {},
    "s4": {"inner": "s4"},
    "s4d": {"inner": "s4d"},
    "s4d-real": {"inner": "s4d-real"},
    "none": {"inner": "none"},
    "no part selects": {"selective": "none"},
    "B selects": {"selective": "B"},
    "dt and C select": {"selective": "dt,C"},
    "complex": {"A_init": "s4d-lin"},
    "complex, C selects": {"A_init": "s4d-lin", "selective": "C"},
}
LENGTH, WIDTH = 150, 32

choices = pytest.mark.parametrize("kind", MAPS)
blocks = pytest.mark.parametrize("block", BLOCKS)


def make(block: str, kind: str, dtype: torch.dtype, device: str) -> Mamba:
    torch.manual_seed(0)
    layer = Mamba(WIDTH, block=block, d_state=8, **MAPS[kind]).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    made = Mamba(WIDTH, block=block, d_state=8, dtype=dtype, device=device, **MAPS[kind])
    made.load_state_dict(layer.float().state_dict())
    return made


def results(layer: Mamba, x: Tensor, weight: Tensor, packed: bool) -> list[Tensor]:
    x = x.to(layer.conv1d.weight).requires_grad_()
    cu_seqlens = torch.tensor([0, 40, 40, 41, LENGTH], device=x.device) if packed else None
    output = layer(x, cu_seqlens=cu_seqlens).output
    gradients = torch.autograd.grad(output, [x, *layer.parameters()], weight.to(output))
    return [part.detach().double().cpu() for part in (output, *gradients)]


def error(a: Tensor, truth: Tensor) -> float:
    return float((a - truth).abs().max() / truth.abs().max())


@blocks
@choices
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients(block: str, kind: str, dtype: torch.dtype, packed: bool) -> None:
    g = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(1 if packed else 2, LENGTH, WIDTH, generator=g).to(dtype).float() for _ in range(2))
    layer = make(block, kind, dtype, "cuda")
    exact = Mamba(WIDTH, block=block, d_state=8, dtype=torch.float64, **MAPS[kind])
    exact.load_state_dict(layer.state_dict())
    truth = results(exact, x.double(), weight, packed)
    on_cpu = make(block, kind, dtype, "cpu")
    got, reference = results(layer, x, weight, packed), results(on_cpu, x, weight, packed)
    # Sums over a few hundred positions and channels are taken in another order here.
    eps = torch.finfo(dtype).eps
    for mine, same, true in zip(got, reference, truth, strict=True):
        assert mine.isfinite().all()
        assert error(mine, true) <= 2 * error(same, true) + layer.d_inner / 2 * eps


@blocks
@choices
def test_cut_is_whole_is_steps(block: str, kind: str) -> None:
    layer = make(block, kind, torch.float32, "cuda")
    x = torch.randn(2, LENGTH, WIDTH, device="cuda")
    with torch.no_grad():
        whole = layer(x, layer.init_state(2))
        first = layer(x[:, :70], layer.init_state(2))
        assert first.state is not None
        second = layer(x[:, 70:], first.state)
        assert error(torch.cat([first.output, second.output], 1), whole.output) <= 1e-5
        state, steps = first.state, []
        for t in range(70, LENGTH):
            output, state = layer.step(x[:, t], state)  # type: ignore[arg-type]
            steps.append(output)
        assert state is not None
        assert whole.state is not None
        assert error(torch.stack(steps, 1), whole.output[:, 70:]) <= 1e-5
        assert error(state.ssm, whole.state.ssm) <= 1e-5 if state.ssm.numel() else kind == "none"


@choices
@pytest.mark.parametrize("block", ["mamba", "h3"])
def test_the_engine_writes_what_the_model_says(block: str, kind: str) -> None:
    torch.manual_seed(0)
    config = MambaConfig(d_model=WIDTH, n_layer=2, vocab_size=256, d_state=8, block=block, **MAPS[kind])
    model = CausalLM(config, device="cuda")
    prompts = ["Call me Ishmael.", "a", "The whale, " * 9]
    params = [SamplingParams(seed=i, temperature=0, max_new_tokens=12 + i) for i in range(3)]
    results = Engine(model, max_batch=2).generate(prompts, params)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.finish_reason == "length"
        ids = [*prompt.encode(), *result.tokens]
        with torch.no_grad():
            logits = model(torch.tensor([ids], device="cuda")).logits[0].float()
        for t in range(len(prompt.encode()), len(ids)):
            # The token written is the likeliest one, or within rounding of it.
            row = logits[t - 1, :256]
            assert row.max() - row[ids[t]] <= 1e-4 * row.abs().max()
