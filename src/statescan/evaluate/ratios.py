"""Means over groups of unequal size, and their standard errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ratio_of_sums"]


def ratio_of_sums(sums: NDArray[Any], sizes: NDArray[Any]) -> tuple[float, float]:
    """(m = sum s / sum n, its standard error), ``SE^2 = G / (G - 1) sum (s_g - m n_g)^2 / (sum n)^2``.

    Args:
        sums: (groups,) what each group, such as a window or a recording, has in all; groups count as drawn each on its
            own.
        sizes: (groups,) how much of it there is.

    Returns:
        Of a single group the standard error is NaN.

    Source: Cochran (1977), Sampling Techniques, equation 6.13, without the finite population's correction.
    """
    total, groups = float(sizes.sum()), len(sums)
    mean = float(sums.sum()) / total
    spread = float(np.square(sums - mean * sizes).sum())
    return mean, math.sqrt(groups / (groups - 1) * spread) / total if groups > 1 else math.nan
