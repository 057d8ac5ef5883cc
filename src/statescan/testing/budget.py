"""The error budget: how far from the float64 truth a backend may be. Nothing in it is set by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["assert_within_budget", "unit_roundoff"]


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding one number to `dtype`, 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


def _exact(value: Tensor) -> Tensor:
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64).flatten()


def _norm(value: Tensor) -> float:
    return float(value.abs().square().sum().sqrt())


def _draws(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def assert_within_budget(
    actual: Tensor | Sequence[Tensor],
    truth: Tensor | Sequence[Tensor],
    reference: Tensor | Sequence[Tensor],
    name: str = "result",
    *,
    reference_truth: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Fails unless `actual` is about as close to the truth as the readable reference of the same precision is.

    The error may be at most twice the sum of the reference's own error and one rounding of the output's dtype::

        |actual - truth| <= 2 (|reference - truth| + unit_roundoff |truth|)

    in the 2-norm over the whole tensor. Rounding errors are spread over all entries, so two implementations of one
    precision differ little in this norm, while a defect (a tail not written, an index off by one, a sign) moves some
    entry by its own size, and with it the norm by more than one over the square root of the number of entries: in
    float32 thousands of budgets, in bfloat16 more than one for tensors of up to some ten thousand numbers, which
    problems should not exceed. Bounds entry by entry would be wrong: an entry where large terms cancel has no relative
    accuracy in any order of summation; and the largest error of few numbers is a matter of luck.

    The reference's error on a handful of numbers is a matter of luck too. Small tensors are therefore given as
    sequences, one tensor per random draw of the problem, and compared as one long tensor.

    Float64 results have no truth above them: oracle and reference share their roundings, and the reference's error
    against the oracle says nothing. There the reference runs in float32, with `reference_truth`, and its error counts
    in units of roundoff, which is what an order of operations has in every precision; and the oracle's own rounding
    errors, as large as the reference's, come on top of the budget.

    Args:
        actual: what the backend gave.
        truth: the same in float64 (complex128), from an oracle.
        reference: what the reference gave on the very inputs of the backend, in their precision.
        name: what is compared, for the message.
        reference_truth: the truth of the reference's own problem, where that was rounded to another precision.
    """
    draws = list(zip(_draws(actual), _draws(truth), _draws(reference), strict=True))
    for a, t, r in draws:
        if a.shape != t.shape or a.shape != r.shape:
            raise AssertionError(
                f"{name}: shapes differ: actual {tuple(a.shape)}, truth {tuple(t.shape)}, reference {tuple(r.shape)}"
            )
        if reference_truth is None and a.dtype != r.dtype:
            raise AssertionError(f"{name}: dtype {a.dtype}, the reference gives {r.dtype}")
    dtype = draws[0][0].dtype
    wanted = torch.cat([_exact(t) for _, t, _ in draws])
    aim = wanted if reference_truth is None else torch.cat([_exact(t) for t in _draws(reference_truth)])
    scale = 1.0 if reference_truth is None else unit_roundoff(dtype) / unit_roundoff(draws[0][2].dtype)
    error = _norm(torch.cat([_exact(a) for a, _, _ in draws]) - wanted)
    own = _norm(torch.cat([_exact(r) for _, _, r in draws]) - aim) * scale
    budget = (2 if reference_truth is None else 3) * (own + unit_roundoff(dtype) * _norm(wanted))
    # written so that a NaN on either side fails
    if not error <= budget:
        raise AssertionError(
            f"{name} ({dtype}): the error's norm is {error:.3e}, the budget {budget:.3e}: "
            f"reference's own error {own:.3e}, truth {_norm(wanted):.3e}"
        )
