"""A matrix product for decoding: few rows against weights packed as float32, bfloat16 or int8."""

from statescan.ops.packed_linear.api import pack_weight, packed_linear
from statescan.ops.packed_linear.validation import PackedWeight

__all__ = ["PackedWeight", "pack_weight", "packed_linear"]
