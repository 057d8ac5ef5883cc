"""torch.compile(fullgraph=True) and torch.export of the model: no graph breaks, the same numbers."""

from __future__ import annotations

import os

import pytest
import torch

from statescan.models import CausalLM, MambaConfig

CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=32, d_state=4)
DEVICE = os.environ.get("STATESCAN_TEST_DEVICE", "cpu")
IDS = torch.arange(20, device=DEVICE).view(2, 10) % 32


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(**fields) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CONFIG.replace(**fields), device=DEVICE)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to what fusing and reordering float32 sums of 32 numbers may do through two layers."""
    return float((a - b).detach().abs().max() / b.detach().abs().max()) <= 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_forward_and_backward_in_one_graph(backend: str) -> None:
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert close(compiled(IDS).logits, model(IDS).logits)
    loss = model(IDS, labels=IDS).loss
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    got_loss = compiled(IDS, labels=IDS).loss
    got = torch.autograd.grad(got_loss, list(model.parameters()))
    assert close(got_loss, loss)
    assert all(close(a, b) for a, b in zip(got, wanted, strict=True))


def test_state_and_step_in_one_graph() -> None:
    model = make()
    state = model.init_state(2)
    forward = torch.compile(lambda ids, state: model(ids, state=state), fullgraph=True, backend="aot_eager")
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    whole = model(IDS).logits
    first = forward(IDS[:, :9], state)
    last = step(IDS[:, 9], first.state)
    assert close(first.logits, whole[:, :9])
    assert close(last.logits, whole[:, 9])


def test_autocast_in_one_graph() -> None:
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        got, wanted = compiled(IDS, labels=IDS).loss, model(IDS, labels=IDS).loss
    assert float((got - wanted).abs().detach()) <= 1e-3


def test_export() -> None:
    model = make().eval()
    program = torch.export.export(model, (IDS,))
    assert close(program.module()(IDS).logits, model(IDS).logits)


def test_export_at_any_length() -> None:
    model = make().eval()
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=4096)}}
    # As for inference: what a GPU's scan keeps for a backward pass has a number of parts that export would fix.
    with torch.no_grad():
        program = torch.export.export(model, (IDS,), dynamic_shapes=shapes)
    for shape in ((1, 3), (3, 65)):
        ids = torch.arange(shape[0] * shape[1], device=DEVICE).view(shape) % 32
        assert close(program.module()(ids).logits, model(ids).logits)
