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


def _norms(value: Tensor) -> dict[str, float]:
    if value.numel() == 0:
        return {"2-norm": 0.0, "max-norm": 0.0}
    return {"2-norm": float(value.abs().square().sum().sqrt()), "max-norm": float(value.abs().max())}


def _draws(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def assert_within_budget(
    actual: Tensor | Sequence[Tensor],
    truth: Tensor | Sequence[Tensor],
    reference: Tensor | Sequence[Tensor],
    name: str = "result",
) -> None:
    """Fails unless `actual` is about as close to the truth as the readable reference of the same precision is.

    The error may be at most twice the sum of the reference's own error and one rounding of the output's dtype::

        |actual - truth| <= 2 (|reference - truth| + unit_roundoff |truth|)

    and that in two norms over the whole tensor: the 2-norm, which many small errors move, and the largest absolute
    value, which one wrong entry moves. Both are norms of the tensor rather than bounds entry by entry, because an entry
    where large terms cancel has no relative accuracy in any order of summation.

    The reference's error on a handful of numbers is a matter of luck. Small tensors are therefore given as sequences,
    one tensor per random draw of the problem; they are compared as one long tensor.

    Args:
        actual: what the backend gave.
        truth: the same in float64 (complex128), from an oracle.
        reference: what the reference gave on the very inputs of the backend, in their precision.
        name: what is compared, for the message.
    """
    draws = list(zip(_draws(actual), _draws(truth), _draws(reference), strict=True))
    for a, t, r in draws:
        if a.shape != t.shape or a.shape != r.shape:
            raise AssertionError(
                f"{name}: shapes differ: actual {tuple(a.shape)}, truth {tuple(t.shape)}, reference {tuple(r.shape)}"
            )
        if a.dtype != r.dtype:
            raise AssertionError(f"{name}: dtype {a.dtype}, the reference gives {r.dtype}")
    dtype = draws[0][0].dtype
    wanted = torch.cat([_exact(t) for _, t, _ in draws])
    error = _norms(torch.cat([_exact(a) for a, _, _ in draws]) - wanted)
    own = _norms(torch.cat([_exact(r) for _, _, r in draws]) - wanted)
    size = _norms(wanted)
    for norm in error:
        budget = 2 * (own[norm] + unit_roundoff(dtype) * size[norm])
        # written so that a NaN on either side fails
        if not error[norm] <= budget:
            raise AssertionError(
                f"{name} ({dtype}): {norm} of the error is {error[norm]:.3e}, the budget {budget:.3e}: "
                f"reference's own error {own[norm]:.3e}, truth {size[norm]:.3e}"
            )
