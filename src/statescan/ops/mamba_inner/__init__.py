"""A whole Mamba layer as one differentiable function, where its convolution and scan run as kernels."""

from statescan.ops.mamba_inner.api import (
    LayerWeights,
    Normed,
    mamba_inner,
    mamba_inner_or_none,
    unavailable_reason,
)

__all__ = ["LayerWeights", "Normed", "mamba_inner", "mamba_inner_or_none", "unavailable_reason"]
