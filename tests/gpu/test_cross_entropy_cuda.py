"""`linear_cross_entropy` on the `cuda` backend: float64 truth in every dtype, reduction and size of vocabulary, memory
that does not grow with it, the same bits in every run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops import explain, linear_cross_entropy
from statescan.testing import assert_within_budget, check_registration, poisoned_memory, recorded_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

REDUCTIONS = ["mean", "sum", "none"]
NAMES = ("loss", "d hidden", "d weight", "d bias")
# Cut pieces and whole ones, one warp and many, rows that stay in registers and rows that don't.
VOCABULARIES = [1, 7, 8, 53, 256, 3000, 4104, 65_536]


def problem(
    dtype: torch.dtype, rows: int, width: int, vocabulary: int, seed: int = 0, bias: bool = True, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """hidden, weight, bias (leaves) and targets, of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to("cuda", dtype).requires_grad_()

    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[rows // 2] = -100
    hidden = (leaf(rows, width).detach() * size).requires_grad_()
    return hidden, leaf(vocabulary, width), leaf(vocabulary) if bias else None, targets.cuda()


def with_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **arguments) -> list[Tensor]:
    losses = linear_cross_entropy(hidden, weight, targets, bias=bias, **arguments)
    cotangent = torch.linspace(0.5, 1.5, losses.numel(), device="cuda").to(losses.dtype).view(losses.shape)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    return [losses.detach(), *torch.autograd.grad(losses, leaves, cotangent)]


def truth(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reduction: str) -> list[Tensor]:
    """The same by torch's own cross_entropy on all logits, in float64."""
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(wide[0], wide[1], wide[2])  # type: ignore[arg-type]
    losses = F.cross_entropy(logits, targets, reduction=reduction)
    steps = torch.linspace(0.5, 1.5, losses.numel(), device="cuda")
    leaves = [x for x in wide if x is not None]
    return [losses.detach(), *torch.autograd.grad(losses, leaves, steps.to(losses.dtype).view(losses.shape))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_within_budget(dtype: torch.dtype, reduction: str, vocabulary: int) -> None:
    draws = [problem(dtype, 61, 24, vocabulary, seed, bias=vocabulary != 3000) for seed in range(4)]
    got = [with_gradients(*draw, reduction=reduction, chunk_size=17, backend="cuda") for draw in draws]
    own = [with_gradients(*draw, reduction=reduction, backend="reference") for draw in draws]
    exact = [truth(*draw, reduction) for draw in draws]
    for i, name in enumerate(NAMES[: len(got[0])]):
        columns = [[x[i] for x in side] for side in (got, exact, own)]
        if dtype == torch.float64:
            error = torch.cat([(a - t).flatten() for a, t in zip(columns[0], columns[1], strict=True)]).norm()
            assert float(error) <= 1e-13 * float(torch.cat([t.flatten() for t in columns[1]]).norm()), name
        else:
            assert_within_budget(*columns, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sure_and_wrong_guesses(dtype: torch.dtype) -> None:
    """Logits of a few hundred: losses of many nats and of nearly none."""
    draws = [problem(dtype, 61, 64, 300, seed, size=8.0) for seed in range(4)]
    for draw in draws:
        draw[3][:20] = (draw[0][:20] @ draw[1].T + draw[2]).argmax(-1)
    for reduction in REDUCTIONS:
        got = [with_gradients(*draw, reduction=reduction, backend="cuda") for draw in draws]
        own = [with_gradients(*draw, reduction=reduction, backend="reference") for draw in draws]
        exact = [truth(*draw, reduction) for draw in draws]
        for i, name in enumerate(NAMES):
            assert_within_budget([x[i] for x in got], [x[i] for x in exact], [x[i] for x in own], name)


def test_float16_means_over_many_tokens_do_not_vanish() -> None:
    hidden, weight, bias, targets = problem(torch.float16, 4096, 4, 600)
    got = with_gradients(hidden * 0.1, weight, bias * 0, targets, reduction="mean", backend="cuda")
    exact = truth(hidden * 0.1, weight, bias * 0, targets, "mean")
    assert float((got[2].double() - exact[2]).abs().max() / exact[2].abs().max()) < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_same_bits_in_every_run(reduction: str) -> None:
    draw = problem(torch.bfloat16, 200, 64, 5000)
    first = with_gradients(*draw, reduction=reduction, chunk_size=64, backend="cuda")
    with poisoned_memory():
        second = with_gradients(*draw, reduction=reduction, chunk_size=64, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_not_counted_does_not_matter(reduction: str) -> None:
    hidden, weight, bias, targets = problem(torch.float32, 61, 24, 300)
    clean = with_gradients(hidden, weight, bias, targets, reduction=reduction, backend="cuda")
    dirty = hidden.detach().clone()
    dirty[30] = float("nan")  # the one row that is ignored
    for x in with_gradients(dirty.requires_grad_(), weight, None, targets, reduction=reduction, backend="cuda")[:2]:
        assert torch.isfinite(x).all()
    nothing = with_gradients(hidden, weight, bias, torch.full_like(targets, -100), reduction=reduction, backend="cuda")
    assert all((x == 0).all() for x in nothing)
    assert all(torch.isfinite(x).all() for x in clean)


def test_a_target_outside_of_the_vocabulary_shows() -> None:
    hidden, weight, bias, targets = problem(torch.float32, 61, 24, 300)
    for wrong in (300, -1):
        targets[0] = wrong
        loss, d_hidden, *_ = with_gradients(hidden, weight, bias, targets, reduction="none", backend="cuda")
        assert loss[0].isnan()
        assert loss[1:].isfinite().all()
        assert d_hidden[0].isnan().all()
        assert d_hidden[1:].isfinite().all()


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    hidden, weight, bias, targets = problem(torch.float32, 61, 24, 304)
    with torch.autocast("cuda", torch.bfloat16):
        got = with_gradients(hidden, weight, bias, targets)
        own = with_gradients(hidden, weight, bias, targets, backend="reference")
    assert [x.dtype for x in got] == [torch.float32] * 4
    exact = truth(hidden, weight, bias, targets, "mean")
    for a, r, e in zip(got, own, exact, strict=True):
        assert float((a - e).norm()) <= 2 * float((r - e).norm()) + 2**-8 * float(e.norm())


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    peaks = []
    for vocabulary in (16_384, 131_072):
        hidden, weight, _, targets = problem(torch.bfloat16, 16_384, 64, vocabulary, bias=False)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with_gradients(hidden, weight, None, targets)
        of_weight = vocabulary * 64 * (4 + 2 + 2)  # its gradient, in float32 and in its own dtype, and that times one
        peaks.append(torch.cuda.max_memory_allocated() - before - of_weight)
    assert max(peaks) < 1.1 * 2**29 + 4 * 16_384 * 64 * 4
    assert peaks[1] < 1.05 * peaks[0]


def test_registration() -> None:
    draw = problem(torch.bfloat16, 61, 24, 304)
    with recorded_calls() as calls:
        with_gradients(*draw)
    assert {str(call[0]) for call in calls} == {"statescan.softmax_gradient_.default", "statescan.add_product_.default"}
    check_registration(calls)
    torch.compiler.reset()
    eager = with_gradients(*draw)
    compiled = torch.compile(lambda h, w, b, t: linear_cross_entropy(h, w, t, bias=b), fullgraph=True)
    loss = compiled(*draw)
    gradients = torch.autograd.grad(loss, draw[:3])  # type: ignore[arg-type]
    for a, b in zip([loss.detach(), *gradients], [eager[0], *(2 * g for g in eager[1:])], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


def test_explain_takes_it() -> None:
    assert explain("linear_cross_entropy", device="cuda").backend == "cuda"
