"""packed_linear in torch's own operators, for every device: widens a slice of rows at a time, in bounded memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops._dispatch import Facts
from statescan.ops.packed_linear.validation import PackedWeight

__all__ = ["packed_linear", "refuses"]

# Rows unpacked at once: the largest temporary is this times the columns, 50 MB in float32 at 1,536 columns.
_ROWS = 8192


def refuses(facts: Facts) -> str | None:
    """Runs everywhere."""
    return None


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """See `statescan.ops.packed_linear`."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(compute)
    if packed.data.dtype == compute:
        y = F.linear(wide, packed.data)
    else:
        parts = [F.linear(wide, part.to(compute)) for part in packed.data.split(_ROWS)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if packed.scale is not None:
            y = y * packed.scale.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype)
