"""Makes kernels of backward passes ready with Triton's own compiler and a driver that stands in for a GPU's; run as a
script, with the bytes of shared memory that a block of that GPU has.

Of each rehearsal it prints a line: its name, the kernels that were loaded, and why it ended, or null.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from statescan.errors import BackendUnavailableError
from statescan.ops import _triton
from statescan.ops.add_norm import triton_norm
from statescan.ops.causal_conv1d import triton_conv
from statescan.ops.ssm_kernel import triton_products


class Driver:
    """Of an H100 with so much shared memory a block. It loads kernels and launches none."""

    def __init__(self, shared: int) -> None:
        self.utils, self.shared, self.loaded = self, shared, list[str]()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared}

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        def launch(*_: Any) -> None:
            raise AssertionError("a kernel was launched")

        return launch

    def load_binary(self, name: str, *_: Any) -> tuple[object, int, int, int, int]:
        self.loaded.append(name)
        return object(), 1, 32, 0, 1024

    def unload_module(self, module: object) -> None: ...


@triton.jit
def wrong(x, N: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.static_assert(N == 3, "it wants another number")


def _rehearse_wrong(x: Tensor) -> None:
    with _triton.on_device_of(x):
        _triton._Made(wrong)[(1,)](x, N=4)


class OnGPU(Tensor):
    """To the code around the kernels."""

    device = torch.device("cuda", 0)


def _rehearse_packed(cu_seqlens: Tensor, length: int) -> None:
    _triton.check_boundaries("selective_scan", cu_seqlens, length)


def main() -> None:
    gpu = Driver(int(sys.argv[1]))
    driver.set_active(gpu)  # type: ignore[arg-type]
    x, weight = torch.zeros(2, 30, 64, dtype=torch.bfloat16), torch.zeros(64, 4)
    cu_seqlens = torch.tensor([0, 7, 30], dtype=torch.int32).as_subclass(OnGPU)
    rehearsals: dict[str, tuple[Any, ...]] = {
        "norm": (triton_norm._rehearse_backward, x, torch.zeros(64), None, torch.float32),
        "convolution": (triton_conv._rehearse_backward, x, weight, None, None, None, True, True),
        "s4d": (triton_products._rehearse_vandermonde, torch.zeros(4, 32), 2000),
        "s4d again": (triton_products._rehearse_vandermonde, torch.zeros(4, 32), 2000),
        "packed": (_rehearse_packed, cu_seqlens, 30),
        "wrong": (_rehearse_wrong, x),
    }
    with (
        mock.patch.object(_triton, "hardware", return_value=1),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        for name, rehearsal in rehearsals.items():
            reason = None
            gpu.loaded.clear()
            try:
                _triton.make_ready(*rehearsal)
            except BackendUnavailableError as problem:
                reason = str(problem)
            print(json.dumps([name, gpu.loaded, reason]), flush=True)


if __name__ == "__main__":
    main()
