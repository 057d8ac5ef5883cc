"""Model FLOP utilisation: which part of a device's peak the model's own operations take."""

from __future__ import annotations

import re

import torch

from statescan.models import ModelConfig
from statescan.models.counters import flops_per_token

__all__ = ["peak_flops", "utilization"]

# Dense operations a second by NVIDIA's data sheets: 16-bit factors on tensor cores with float32 sums, and float32
# outside of tensor cores, as torch's products run unless told otherwise. The first name that fits counts.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250e12, 75e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H200", 989e12, 67e12),
    ("GH200", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 4090", 165e12, 82.6e12),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that a device could do at most; None where its name is not in the table.

    Args:
        device: of the training.
        precision: "bf16" or "float32", as `TrainConfig.precision`.
    """
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device)
    for name, half, single in _PEAKS:
        if re.search(rf"\b{name}\b", words):
            return half if precision == "bf16" else single
    return None


def utilization(
    config: ModelConfig, length: int, tokens_per_second: float, device: torch.device, precision: str, devices: int = 1
) -> float | None:
    """The part of the devices' peak that goes into the model's own operations; None where the peak isn't known.

    ``tokens a second * operations a token in training / (devices * peak)``, with `statescan.models.flops_per_token`,
    which leaves out what is only computed again. A scan's exponentials and sums, which no tensor core does, are among
    the operations: for a state space model 1 is out of reach.

    Args:
        config: of the model.
        length: tokens of a window; attention looks at half of it on average.
        tokens_per_second: of all devices together.
        device: one of them; they are alike.
        precision: as for `peak_flops`.
        devices: how many.

    Source: Chowdhery et al., "PaLM" (2022), appendix B, arXiv:2204.02311.
    """
    peak = peak_flops(device, precision)
    if peak is None:
        return None
    return tokens_per_second * flops_per_token(config, length // 2).training / (devices * peak)
