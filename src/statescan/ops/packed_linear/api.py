"""The public functions pack_weight and packed_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from statescan.errors import ConfigError
from statescan.ops._checks import transformed
from statescan.ops._dispatch import choose
from statescan.ops.packed_linear.validation import PACKED_DTYPES, PackedDType, PackedWeight, check_linear, check_weight

__all__ = ["pack_weight", "packed_linear"]


@torch.no_grad()
def pack_weight(weight: Tensor, dtype: PackedDType = "float32") -> PackedWeight:
    """Packs the weight of a linear map for decoding.

    int8 is symmetric with one scale a row: scale_o = max_k |W_ok| / 127, data_ok = round(W_ok / scale_o), so that the
    error of a weight is at most scale_o / 2. A row of zeros gets scale 0.

    Args:
        weight: (out, in), a float dtype. A contiguous weight that already has the packed dtype is *shared*, not copied:
            packing a float32 model as float32 costs no memory, and follows later in-place changes of the weight.
        dtype: ``"float32"`` (4 bytes a weight), ``"bfloat16"`` (2) or ``"int8"`` (1, plus 4 a row).

    Returns:
        The packed weight, detached from the graph.

    Raises:
        ShapeError, DTypeError, ConfigError: an argument is not as described; a weight that int8 can't hold because it
            is not finite.

    Example:
        >>> import torch
        >>> from statescan.ops import pack_weight, packed_linear
        >>> packed = pack_weight(torch.randn(80, 1536), "int8")
        >>> packed_linear(torch.randn(2, 1536), packed).shape
        torch.Size([2, 80])
    """
    check_weight(weight, dtype)
    if dtype != "int8":
        return PackedWeight(weight.detach().to(PACKED_DTYPES[dtype]).contiguous())
    wide = weight.detach().float()
    scale = wide.abs().amax(dim=1) / 127 if wide.shape[1] else wide.new_zeros(wide.shape[0])
    if not bool(torch.isfinite(scale).all()):
        raise ConfigError("pack_weight: weight has non-finite entries, which int8 can't hold; mend the weight")
    # A scale so small that it is subnormal would overflow its inverse; such a row is zero for every purpose.
    inverse = torch.where(scale > torch.finfo(torch.float32).tiny, 1 / scale, 0)
    data = (wide * inverse[:, None]).round().clamp(-127, 127).to(torch.int8)
    return PackedWeight(data.contiguous(), scale.contiguous())


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Multiplies rows of activations by a packed weight: y = x W^T + bias.

    y_o = sum_k x_k W_ok + bias_o

    Made for decoding, where 1 to 16 rows meet a weight that is read once: the CPU kernel reads it at the memory's
    speed. Any number of rows works.

    Args:
        x: (..., in), float64/32, bfloat16 or float16; any strides.
        packed: what `pack_weight` made from (out, in).
        bias: (out,), any float dtype; default none.
        backend: ``"auto"``, ``"cpu"``, ``"torch"`` or ``"reference"``.

    Returns:
        (..., out) in x's dtype. Differentiable in x and bias; the packed weight is a constant.

    Raises:
        ShapeError, DTypeError, ConfigError, BackendUnavailableError.

    Numerics:
        x and the sums are float32 (float64 for float64 x); bfloat16 and int8 weights are widened exactly, int8's scale
        multiplies the sum. On the cpu backend a row's result is the same, bit for bit, whatever other rows come with
        it and however many threads run: its summation order follows from the number of columns alone.

    Source:
        One scale a row: the symmetric case of Jacob et al. 2018, equation 1 (zero point 0).
    """
    check_linear(x, packed, bias)
    name = choose("packed_linear", backend, x.device.type, x.dtype, transformed=transformed(x, bias))
    if name == "cpu":
        from statescan.ops.packed_linear import cpu

        return cpu.packed_linear(x, packed, bias)
    if name == "torch":
        from statescan.ops.packed_linear import torch_linear

        return torch_linear.packed_linear(x, packed, bias)
    from statescan.ops.packed_linear import reference

    return reference.packed_linear(x, packed, bias)
