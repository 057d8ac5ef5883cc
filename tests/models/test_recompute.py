"""Recomputation: the same gradients to the bit, less memory between the passes, no large product a second time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from statescan.models import CausalLM, MambaConfig

POLICIES = ["none", "cheap", "block"]
CONFIG = MambaConfig(d_model=32, n_layer=3, vocab_size=64, d_state=4)


class Live(TorchDispatchMode):
    """Every storage made while it is on; `bytes()` counts those that still exist, whoever holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.products: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = (x for x in args[-2:])
            self.products.append(a.shape[0] * a.shape[1] * b.shape[1])
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return output

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def run(policy: str, *, backend: str = "auto", autocast: bool = False, **arguments) -> tuple[list[Tensor], int, int]:
    """(loss and gradients, bytes kept between forward and backward, multiply-adds of all matrix products)."""
    torch.manual_seed(0)
    model = CausalLM(CONFIG.replace(recompute=policy), backend=backend)
    ids = torch.randint(0, 64, (1, 48))
    with Live() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(ids, labels=ids, **arguments)
        kept = live.bytes()
        output.loss.backward()
    return [output.loss.detach(), *(p.grad for p in model.parameters())], kept, sum(live.products)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"cu_seqlens": torch.tensor([0, 13, 48])}, {"mask": torch.arange(48)[None] >= 5}],
    ids=["plain", "packed", "padded"],
)
def test_gradients_are_equal_to_the_bit(backend: str, autocast: bool, arguments: dict) -> None:
    wanted, _, _ = run("none", backend=backend, autocast=autocast, **arguments)
    for policy in ("cheap", "block"):
        got, _, _ = run(policy, backend=backend, autocast=autocast, **arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), policy


def test_with_a_state_in_and_out() -> None:
    results = []
    for policy in POLICIES:
        torch.manual_seed(0)
        model = CausalLM(CONFIG.replace(recompute=policy))
        ids = torch.randint(0, 64, (2, 20))
        first = model(ids[:, :9], state=model.init_state(2))
        second = model(ids[:, 9:], state=first.state, labels=ids[:, 9:])
        second.loss.backward()
        results.append([second.loss.detach(), *(p.grad for p in model.parameters())])
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_each_policy_keeps_less_than_the_one_before(autocast: bool) -> None:
    none, cheap, block = (run(policy, autocast=autocast)[1] for policy in POLICIES)
    assert block < cheap < none


def test_cheap_keeps_what_its_name_says() -> None:
    _, none, products_of_none = run("none")
    _, cheap, products_of_cheap = run("cheap")
    d, i, n, r = 32, 64, 4, 2
    # The convolution's output, x_proj's, dt_proj's and the scan's go, a layer and token; so does the normed residual.
    dropped = CONFIG.n_layer * 48 * 4 * (i + (r + 2 * n) + i + i + d)
    assert none - cheap >= dropped
    # Only the small projections run again; in_proj and out_proj, far larger, do not.
    assert products_of_cheap - products_of_none == CONFIG.n_layer * 48 * (i * (r + 2 * n) + r * i)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("layers", [1, 3])
def test_cheap_keeps_the_stream_and_the_output_of_in_proj_alone(autocast: bool, layers: int) -> None:
    torch.manual_seed(0)
    model = CausalLM(CONFIG.replace(recompute="cheap", n_layer=layers))
    ids = torch.randint(0, 64, (1, 48))
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    with Live() as live, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids).loss
    kept = [
        size
        for key, (reference, size) in live.made.items()
        if not reference.expired() and key not in parameters and key != ids.untyped_storage()._cdata
    ]
    d, i, narrow = 32, 64, 2 if autocast else 4
    wanted = layers * [48 * 2 * i * narrow]  # in_proj's output
    wanted += (layers + 1) * [48 * d * 4, 48 * 4]  # a norm: the residual stream, one number a token
    wanted += [48 * d * narrow, 64 * d * 4]  # linear_cross_entropy: the gradients of its two inputs
    if autocast:
        wanted += layers * [d * 2 * i * narrow]  # in_proj's weight in bfloat16, as autocast keeps it for any policy
    assert sorted(size for size in kept if size > 8) == sorted(wanted)
    assert loss.requires_grad


def test_no_gradient_no_recomputation() -> None:
    model = CausalLM(CONFIG.replace(recompute="block"))
    with torch.no_grad():
        assert not model(torch.zeros(1, 4, dtype=torch.long)).logits.requires_grad
