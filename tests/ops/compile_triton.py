"""Compiles, without a GPU, every Triton kernel that a function launches, as the GPU would get it; run as a script.

The tests' own process has Triton in its interpreter's hands. Here a recorder stands in the place of an op's kernels:
what a launcher hands them is what Triton's compiler gets, integers that are 1 as constants and pointers with their
alignment, as Triton itself does it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from statescan.ops import _triton, _triton_functions
from statescan.ops.ssm_kernel import triton_products

_TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def compiled(kernel: Any, target: GPUTarget, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """What the compiler says of a kernel for one launch's arguments."""
    options = {name: named.pop(name) for name in _OPTIONS if name in named}
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = given[name]
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
        elif name in named or value == 1:
            signature[name], constants[position,] = "constexpr", value
        else:
            signature[name] = "i32" if value < 1 << 31 else "i64"
        if isinstance(value, Tensor) or (signature[name] != "constexpr" and value % 16 == 0):
            attributes[position,] = [["tt.divisibility", 16]]
    options["debug"] = bool(kernel.debug)
    made = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    code = made.asm.get("ptx") or made.asm.get("amdgcn", "")
    stops = "__assertfail" in code or "s_trap" in code
    return {"kernel": kernel.__name__, "made": sorted(made.asm), "shared": made.metadata.shared, "stops": stops}


class _Recorder:
    """An op's kernels: a launch compiles them."""

    def __init__(self, kernels: Any, target: GPUTarget, record: Callable[[dict[str, Any]], None]) -> None:
        self.kernels, self.target, self.record = kernels, target, record

    def __getattr__(self, name: str) -> Any:
        launch = lambda *a, **k: self.record(compiled(getattr(self.kernels, name), self.target, a, k))
        return type("Launcher", (), {"__getitem__": lambda self, grid: launch})()


def products(channels: int, states: int, length: int, sums: int) -> None:
    """The four products with empty memory of these sizes."""
    wide, single = torch.empty(channels, states, dtype=torch.float64), torch.empty(channels, states)
    v, points = torch.empty(channels, sums, states), torch.empty(length)
    out = torch.empty(channels, sums, length)
    triton_products.vandermonde_forward(wide, wide, single, single, length)
    triton_products.vandermonde_backward(wide, wide, torch.empty(channels, length))
    triton_products.cauchy_forward(single, single, v, v, points, points)
    triton_products.cauchy_backward(single, single, v, v, points, points, out, out)


def main() -> None:
    """One line of JSON for each kernel compiled."""
    kind, architecture, warp = sys.argv[1], sys.argv[2], int(sys.argv[3])
    nvidia = kind == "cuda"
    target = GPUTarget(kind, int(architecture) if nvidia else architecture, warp)
    recorder = _Recorder(_triton.kernels("ssm_kernel"), target, lambda found: print(json.dumps(found), flush=True))
    major = int(architecture) // 10 if nvidia else 0
    with (
        mock.patch.object(_triton, "kernels", return_value=recorder),
        mock.patch.object(_triton, "hardware", return_value=1 if nvidia else 2),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(major, 0)),
    ):
        for sizes in ((4, 32, 20000, 4), (1, 1, 1, 1)):
            products(*sizes)
    boundaries = torch.empty(3, dtype=torch.int32)
    found = compiled(_triton_functions.check_boundaries, target, (boundaries, 2, 10), {"BLOCK": 1024})
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
