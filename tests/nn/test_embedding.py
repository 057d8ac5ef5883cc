"""The embedding's own gradient against torch's; on a GPU, the same to the bit every time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statescan.nn import Embedding, embedding
from statescan.nn.embedding import _Lookup


@pytest.mark.parametrize("few", [True, False], ids=["product", "sorted"])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (0,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_gradient_is_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_FEW_ROWS", 6 if few else 5)
    monkeypatch.setattr(embedding, "_AT_ONCE", 6 * 4)  # four tokens at once: the last piece is shorter
    torch.manual_seed(0)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 6, shape, dtype=dtype)
    grad = torch.randn(*shape, 4, dtype=torch.float64)
    output = _Lookup.apply(ids, weight)
    assert torch.equal(output, F.embedding(ids, weight))
    (got,) = torch.autograd.grad(output, weight, grad)
    (wanted,) = torch.autograd.grad(F.embedding(ids, weight), weight, grad)
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda w: _Lookup.apply(ids, w), weight)
    assert torch.autograd.gradgradcheck(lambda w: _Lookup.apply(ids, w), weight)


def test_sums_of_halves_are_added_up_in_float32() -> None:
    """A row that thousands of tokens use: bfloat16 sums stand still where they are 256 times what is added."""
    torch.manual_seed(0)
    weight = torch.zeros(1025, 2, dtype=torch.bfloat16, requires_grad=True)
    grad = 1 + torch.rand(5000, 2).bfloat16()
    (got,) = torch.autograd.grad(_Lookup.apply(torch.full((5000,), 7), weight), weight, grad)
    torch.testing.assert_close(got[7].double(), grad.double().sum(0), rtol=2**-8, atol=0)
    assert not got[:7].any()
    assert not got[8:].any()


def test_a_backward_under_autocast_rounds_nothing() -> None:
    torch.manual_seed(0)
    weight = torch.zeros(8, 3, requires_grad=True)
    ids, grad = torch.randint(0, 8, (1000,)), torch.randn(1000, 3)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(_Lookup.apply(ids, weight), weight, grad)
    wanted = torch.zeros(8, 3, dtype=torch.float64).index_add_(0, ids, grad.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_it_is_torchs_layer() -> None:
    torch.manual_seed(0)
    layer = Embedding(5, 3)
    assert list(layer.state_dict()) == ["weight"]
    assert torch.equal(layer(torch.tensor([[4, 0]])), layer.weight[[4, 0]].unsqueeze(0))
    compiled = torch.compile(lambda ids, w: _Lookup.apply(ids, w).square().sum(), fullgraph=True, backend="aot_eager")
    ids = torch.tensor([1, 1, 4])
    (got,) = torch.autograd.grad(compiled(ids, layer.weight), layer.weight)
    (wanted,) = torch.autograd.grad(layer(ids).square().sum(), layer.weight)
    torch.testing.assert_close(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [256, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_gradients_are_bit_equal(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    layer = Embedding(rows, 512, device="cuda", dtype=dtype)
    ids = torch.randint(97, 123, (32, 2048), device="cuda")
    grad = torch.randn(32, 2048, 512, device="cuda", dtype=dtype)
    first, *others = (torch.autograd.grad(layer(ids), layer.weight, grad)[0] for _ in range(6))
    for other in others:
        assert torch.equal(first, other)
    wanted = torch.zeros(rows, 512, device="cuda", dtype=torch.float64).index_add_(
        0, ids.flatten(), grad.flatten(0, 1).double()
    )
    torch.testing.assert_close(first.double(), wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
