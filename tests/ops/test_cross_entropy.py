"""linear_cross_entropy: float64 truth for value and gradients in every dtype and reduction, and never all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.ops import explain, linear_cross_entropy
from statescan.testing import assert_within_budget

BACKENDS = ["torch", "reference"]
REDUCTIONS = ["mean", "sum", "none"]


def problem(
    dtype: torch.dtype = torch.float64,
    rows: tuple[int, ...] = (3, 7),
    width: int = 8,
    vocabulary: int = 11,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias (leaves) and targets, of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, rows, generator=generator)
    targets[..., 2] = -100
    return hidden, weight, bias, targets


def with_gradients(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, **arguments) -> list[Tensor]:
    """The losses and the gradients of their weighted sum."""
    losses = linear_cross_entropy(hidden, weight, targets, bias=bias, **arguments)
    cotangent = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).view(losses.shape)
    return [losses.detach(), *torch.autograd.grad(losses, (hidden, weight, bias), cotangent)]


def truth(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, reduction: str) -> list[Tensor]:
    """The same by torch's own cross_entropy on all logits, in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = F.linear(wide[0], wide[1], wide[2])
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
    losses = losses.view(targets.shape) if reduction == "none" else losses
    cotangent = torch.linspace(0.5, 1.5, losses.numel(), dtype=torch.float32).to(losses.dtype).view(losses.shape)
    return [losses.detach(), *torch.autograd.grad(losses, wide, cotangent)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk_size", [1, 4, 21, None])
def test_gradcheck(backend: str, reduction: str, chunk_size: int | None) -> None:
    hidden, weight, bias, targets = problem()

    def run(*tensors: Tensor) -> Tensor:
        return linear_cross_entropy(
            tensors[0],
            tensors[1],
            targets,
            bias=tensors[2],
            reduction=reduction,
            chunk_size=chunk_size,
            backend=backend,
        )

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk_size", [3, None])
def test_value_and_gradients_within_the_budget(dtype: torch.dtype, reduction: str, chunk_size: int | None) -> None:
    draws = [problem(dtype, rows=(2, 31), width=24, vocabulary=53, seed=seed) for seed in range(4)]
    got = [with_gradients(*draw, reduction=reduction, chunk_size=chunk_size, backend="torch") for draw in draws]
    own = [with_gradients(*draw, reduction=reduction, backend="reference") for draw in draws]
    exact = [truth(*draw, reduction) for draw in draws]
    for i, name in enumerate(("loss", "d hidden", "d weight", "d bias")):
        assert_within_budget([x[i] for x in got], [x[i] for x in exact], [x[i] for x in own], name)


def test_float16_means_over_many_tokens_do_not_vanish() -> None:
    hidden, weight, bias, targets = problem(torch.float16, rows=(4096,), width=4, vocabulary=600)
    got = with_gradients(hidden * 0.01, weight, bias * 0, targets, reduction="mean")
    # every probability over the 4096 tokens is below 2^-24, the least float16 there is
    assert 1 / 600 / 4096 < 2**-21
    exact = truth(hidden * 0.01, weight, bias * 0, targets, "mean")
    assert float((got[2].double() - exact[2]).abs().max() / exact[2].abs().max()) < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(backend: str, reduction: str) -> None:
    hidden, weight, bias, targets = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(hidden, weight, bias, targets, reduction=reduction, backend=backend)
    assert [x.dtype for x in got] == [torch.float32] * 4
    exact = truth(hidden, weight, bias, targets, reduction)
    rounded = truth(hidden.detach().bfloat16(), weight.detach().bfloat16(), bias, targets, reduction)
    for a, e, r in zip(got, exact, rounded, strict=True):
        # the inputs' rounding is given; the product's and the softmax's roundings are as large again
        given = float((r - e).abs().max())
        assert float((a.double() - e).abs().max()) <= 4 * (
            given + torch.finfo(torch.bfloat16).eps * float(e.abs().max())
        )
    inside = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, bias=bias, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        same = linear_cross_entropy(hidden.bfloat16(), weight, targets, bias=bias, backend=backend)
    assert torch.equal(inside, same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_judge_is_zero_not_nan(backend: str) -> None:
    hidden, weight, bias, targets = problem()
    for reduction in REDUCTIONS:
        got = with_gradients(hidden, weight, bias, torch.full_like(targets, -100), reduction=reduction, backend=backend)
        assert all((x == 0).all() for x in got)
    empty = linear_cross_entropy(hidden[:0], weight, targets[:0], backend=backend)
    assert float(empty.detach()) == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_wanted_gradients_are_made(reduction: str) -> None:
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        tensors = [t.detach().requires_grad_(w) for t, w in zip(problem()[:3], wanted, strict=True)]
        targets = problem()[3]
        losses = linear_cross_entropy(tensors[0], tensors[1], targets, bias=tensors[2], reduction=reduction)
        assert losses.requires_grad == any(wanted)
        if any(wanted):
            losses.sum().backward()
        assert [t.grad is not None for t in tensors] == list(wanted)


class Products(TorchDispatchMode):
    """Counts matrix products while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_grad_mode_only_the_logits_are_multiplied(reduction: str) -> None:
    hidden, weight, bias, targets = problem(rows=(8,))
    with Products() as products, torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, chunk_size=4)
    assert products.count == 2  # one a chunk
    assert not loss.requires_grad
    with Products() as products:
        again = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, chunk_size=4)
        again.sum().backward()
    assert products.count == (8 if reduction == "none" else 6)  # with gradients of hidden and weight
    assert torch.equal(again.detach(), loss)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made while it is on has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return output


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_logits_never_exist(reduction: str) -> None:
    hidden, weight, bias, targets = problem(torch.float32, rows=(1024,), width=4, vocabulary=3000)
    with Largest() as largest:
        losses = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, chunk_size=64)
        losses.sum().backward()
    assert largest.numbers == 64 * 3000
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, backend="reference")
    assert largest.numbers == 1024 * 3000


def test_the_default_chunk_bounds_the_logits() -> None:
    hidden, weight, _, targets = problem(torch.float32, rows=(600,), width=2, vocabulary=65_536)
    with Largest() as largest, torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    assert largest.numbers == 256 * 65_536


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_runs_are_equal_to_the_bit(reduction: str) -> None:
    draw = problem(torch.float32, rows=(2, 31), width=24, vocabulary=53)
    first, second = (with_gradients(*draw, reduction=reduction, chunk_size=7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_inputs_and_narrow_targets() -> None:
    hidden, weight, bias, targets = problem()
    wanted = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none")
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    turned = weight.T.contiguous().T
    got = linear_cross_entropy(strided, turned, targets.int(), bias=bias, reduction="none")
    assert float((got - wanted).detach().abs().max()) <= 1e-14
    other = targets.clone()
    other[other == -100] = 10
    again = linear_cross_entropy(hidden, weight, other, bias=bias, reduction="none", ignore_index=10)
    assert torch.equal(again == 0, other == 10)


def test_a_gradient_goes_once() -> None:
    hidden, weight, bias, targets = problem()
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, bias=bias), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, bias=bias, backend="reference"), hidden, create_graph=True
    )
    grad.square().sum().backward()


def test_explain_names_both() -> None:
    assert explain("linear_cross_entropy").backend == "torch"


def test_bad_inputs() -> None:
    hidden, weight, bias, targets = problem()
    with pytest.raises(ShapeError, match=r"weight \(vocabulary >= 1, d\), got \(3, 7, 8\) and \(11, 7\)"):
        linear_cross_entropy(hidden, weight[:, :7], targets)
    with pytest.raises(ShapeError, match="targets must have shape"):
        linear_cross_entropy(hidden, weight, targets[:2])
    with pytest.raises(ShapeError, match="bias must have shape"):
        linear_cross_entropy(hidden, weight, targets, bias=bias[:3])
    with pytest.raises(DTypeError, match=r"targets must be int64 or int32.*pass targets.long\(\)"):
        linear_cross_entropy(hidden, weight, targets.float())
    with pytest.raises(DTypeError, match="must share one dtype outside of autocast"):
        linear_cross_entropy(hidden.float(), weight, targets)
    with pytest.raises(DTypeError, match="hidden must be"):
        linear_cross_entropy(hidden.long(), weight, targets)
    with pytest.raises(ShapeError, match=r"must be on"):
        linear_cross_entropy(hidden, weight.to("meta"), targets)
    with pytest.raises(ConfigError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
        linear_cross_entropy(hidden, weight, targets, reduction="max")
    with pytest.raises(ConfigError, match="chunk_size must be an integer >= 1, got 0"):
        linear_cross_entropy(hidden, weight, targets, chunk_size=0)
    with pytest.raises(ConfigError, match="backend must be one of"):
        linear_cross_entropy(hidden, weight, targets, backend="fused")
    for wrong in (-1, 11):
        bad = targets.clone()
        bad[0, 0] = wrong
        with pytest.raises(ShapeError, match=r"or in \[0, 11\), got"):
            linear_cross_entropy(hidden, weight, bad)
