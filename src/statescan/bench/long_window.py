"""One window of a genome, forward and backward: seconds and memory, whatever the length."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from statescan.models import CausalLM, ModelConfig

__all__ = ["LongWindow", "long_window"]


class LongWindow(NamedTuple):
    """seconds: of a forward and a backward pass; peak_bytes: the most memory that torch held for tensors, None where it
    isn't counted; loss: nats per base."""

    seconds: float
    peak_bytes: int | None
    loss: float


def long_window(
    config: ModelConfig,
    length: int,
    *,
    device: torch.device | str = "cuda",
    precision: str = "bf16",
    repeats: int = 2,
) -> LongWindow:
    """Runs one window of random bases through a model and back, under autocast where precision is "bf16".

    Args:
        config: of a model of bases.
        length: of the window.
        device: where.
        precision: "bf16" or "float32".
        repeats: passes, of which the last is timed: the first one builds kernels.

    Raises:
        torch.OutOfMemoryError: the device has too little memory.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    model = CausalLM(config, device=device).train()
    ids = torch.randint(0, 4, (1, length + 1), device=device)
    on_cuda = device.type == "cuda"
    seconds, loss = 0.0, torch.zeros(())
    for _ in range(repeats):
        model.zero_grad(set_to_none=True)
        if on_cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = model(ids[:, :-1], labels=ids).loss
        assert found is not None
        found.backward()
        loss = found.detach()
        if on_cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
    peak: Any = torch.cuda.max_memory_allocated(device) if on_cuda else None
    return LongWindow(seconds, peak, float(loss))
