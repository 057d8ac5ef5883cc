"""The layer as one function on the GPU: every gradient against float64 within the budget of the layer's ops one after
the other, the same bits under every policy of recomputation and in every run, the bytes that stay between passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statescan.errors import ShapeError
from statescan.models import CausalLM, MambaConfig
from statescan.nn import Mamba
from statescan.ops import _cuda, mamba_inner
from statescan.testing import assert_within_budget, check_registration, poisoned_memory, recorded_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

POLICIES = ["none", "cheap", "block"]
CU_SEQLENS = (0, 40, 40, 41, 150)


def layer_and_input(seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Mamba, Tensor, Tensor]:
    torch.manual_seed(seed)
    layer = Mamba(64, **{"d_state": 16, **options}).to("cuda", dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    x = torch.randn(1 if options.get("packed") else 2, 150, 64, device="cuda", dtype=dtype)
    return layer, x, torch.randn_like(x)


def results(layer: Mamba, x: Tensor, dout: Tensor, *, autocast: bool = False, **arguments: Any) -> dict[str, Tensor]:
    """Output and gradients by name."""
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        assert layer.runs_as_one(x) == (layer.backend != "torch")
        output = layer(x, **arguments).output
    names = ["x", *(name for name, _ in layer.named_parameters())]
    gradients = torch.autograd.grad(output, [x, *layer.parameters()], dout.to(output.dtype))
    return {"output": output.detach(), **{f"d {n}": g for n, g in zip(names, gradients, strict=True)}}


def by_its_ops(layer: Mamba, dtype: torch.dtype) -> Mamba:
    """The same layer op by op in plain PyTorch."""
    sizes = {"d_state": layer.d_state, "d_conv": layer.d_conv, "bias": layer.in_proj.bias is not None}
    twin = Mamba(layer.d_model, **sizes, backend="torch").to("cuda", dtype)
    twin.load_state_dict({k: v.to(dtype) for k, v in layer.state_dict().items()})
    return twin


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "d_conv": 3}, {"d_state": 5}, {"packed": True}],
    ids=["plain", "biases", "odd", "packed"],
)
def test_within_the_budget_of_its_ops(how: str, options: dict) -> None:
    options = dict(options)
    arguments = {"cu_seqlens": torch.tensor(CU_SEQLENS, device="cuda")} if options.pop("packed", False) else {}
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(how, torch.float32)
    columns: dict[str, list[list[Tensor]]] = {}
    for seed in range(3):
        layer, x, dout = layer_and_input(seed, dtype, **options)
        x, dout = (x[:1], dout[:1]) if arguments else (x, dout)
        wide = (x.double(), dout.double())
        exact = results(by_its_ops(layer, torch.float64), *wide, **arguments)
        got = results(layer, x, dout, autocast=how == "autocast", **arguments)
        own = results(by_its_ops(layer, dtype), x, dout, autocast=how == "autocast", **arguments)
        for name in exact:
            for column, entry in zip(columns.setdefault(name, [[], [], []]), (got, exact, own), strict=True):
                column.append(entry[name])
    for name, column in columns.items():
        assert_within_budget(*column, name)


def model_results(policy: str, autocast: bool, packed: bool) -> list[Tensor]:
    torch.manual_seed(0)
    config = MambaConfig(d_model=64, n_layer=3, vocab_size=128, recompute=policy)
    model = CausalLM(config, device="cuda")
    ids = torch.randint(0, 128, (1 if packed else 2, 150), device="cuda")
    arguments = {"cu_seqlens": torch.tensor(CU_SEQLENS, device="cuda")} if packed else {}
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids, **arguments).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "float32"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_policies_and_runs_are_bit_equal(autocast: bool, packed: bool) -> None:
    with poisoned_memory():
        first = model_results("none", autocast, packed)
    assert all(torch.isfinite(x).all() for x in first)
    for policy in ("none", "cheap", "block"):
        with poisoned_memory():
            other = model_results(policy, autocast, packed)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), policy


def kept_bytes(policy: str, layers: int, tokens: int, d_model: int) -> float:
    """Bytes that a training step keeps between its passes, parameters and what depends on the vocabulary left out."""
    torch.manual_seed(0)
    config = MambaConfig(d_model=d_model, n_layer=layers, vocab_size=8, recompute=policy)
    model = CausalLM(config, device="cuda")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 8, (1, tokens), device="cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(ids, labels=ids).loss
    assert loss.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_kept_a_layer_and_token(policy: str) -> None:
    tokens, d = 4096, 256
    i, rank, n = 2 * d, d // 16, 16
    measured = (kept_bytes(policy, 3, tokens, d) - kept_bytes(policy, 1, tokens, d)) / 2 / tokens
    stream = 4 * d + 4  # float32, and one number a token of the norm
    narrow, checkpoints = 2 * (rank + 2 * n), i * n * 4 // 32
    wanted = {
        "none": stream + 2 * d + 2 * 2 * i + 2 * i + narrow + checkpoints,
        "cheap": stream + 2 * 2 * i + narrow + checkpoints,
        "block": stream,
    }[policy]
    print(f"{policy}: {measured:.0f} bytes a layer and token, counted {wanted}")
    assert wanted <= measured <= wanted * 1.01 + 64 * i * n * 4 / tokens


def test_whatever_stands_between_a_weight_and_its_use_is_called() -> None:
    layer, x, _ = layer_and_input(0)

    class Adapted(nn.Linear):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            Adapted.calls += 1
            return super().forward(input) * 2

    assert layer.runs_as_one(x)
    layer.x_proj = Adapted(128, 36, bias=False, device="cuda")
    assert not layer.runs_as_one(x)
    layer(x).output.sum().backward()
    assert Adapted.calls == 1
    layer, x, _ = layer_and_input(0)
    layer.backend = "torch"
    assert not layer.runs_as_one(x)
    layer.backend = "auto"
    assert not layer.runs_as_one(x, layer.init_state(2))
    assert not layer.runs_as_one(x.double())
    assert not layer.runs_as_one(x.bfloat16())  # its own op names the mismatch
    with torch.no_grad():
        assert not layer.runs_as_one(x)


def test_wrong_offsets_are_named() -> None:
    layer, x, _ = layer_and_input(0)
    with pytest.raises(ShapeError, match="must end at the length 150, got 149"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 40, 149], device="cuda"))


def test_frozen_weights_get_no_gradient() -> None:
    layer, x, dout = layer_and_input(0)
    whole = results(layer, x, dout)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in ("x_proj.weight", "A_log"))
    layer(x).output.backward(dout)
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, whole[f"d {name}"])


def test_registration() -> None:
    layer, x, dout = layer_and_input(0)
    for policy in POLICIES:
        with recorded_calls() as calls, torch.autocast("cuda", torch.bfloat16):
            layer(x.requires_grad_(), recompute=policy).output.backward(dout.bfloat16())
        ours = [call for call in calls if "mamba_inner" in str(call[0])]
        assert len(ours) == 2
        check_registration(ours)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_whole_model_compiles(policy: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = CausalLM(MambaConfig(d_model=64, n_layer=2, vocab_size=128, recompute=policy), device="cuda")
    ids = torch.randint(0, 128, (2, 96), device="cuda")

    def run(net: Any) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = net(ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]

    eager = run(model)
    compiled = run(torch.compile(model, fullgraph=True))
    for a, b in zip(eager, compiled, strict=True):
        assert float((a - b).norm()) <= 2**-6 * float(a.norm()) + 1e-7


def test_the_layer_is_taken() -> None:
    assert mamba_inner.unavailable_reason("cuda", torch.bfloat16, 16, 4) is None
    assert _cuda.unavailable_reason() is None
