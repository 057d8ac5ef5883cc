"""Modules made without initial values, for those whose values come from a file."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Undrawn"]

_DRAWS = (Tensor.normal_, Tensor.uniform_)


class Undrawn(TorchFunctionMode):
    """Inside of ``with Undrawn():`` nothing is drawn: `torch.nn.init`'s functions leave tensors as they are.

    On the meta device, where a value is nothing but its shape, torch's first draw and its first product import its
    compiler all the same, which takes longer than to read a small model. (The layers set nothing of their own there.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
