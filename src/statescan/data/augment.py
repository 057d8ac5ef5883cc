"""Sounds varied in training: louder or softer, earlier or later, faster or slower, upside down, in noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from statescan.errors import ConfigError

__all__ = ["VaryWaveforms"]

_MU = 255.0


@dataclass(frozen=True)
class VaryWaveforms:
    """Draws one variation for each row of a batch of mu-law codes; on the rows' device, without waiting for it.

    Args:
        gain: the loudness is multiplied by something between 1 / (1 + gain) and 1 + gain.
        speed: played up to so much faster or slower, which moves the pitch too; 0.1 is 10 %.
        shift: up to so many samples of silence before it, or a quarter of them cut off its start.
        noise: white noise of up to so much of the sound's root mean square.
        flip: turn half of them upside down, which no one hears.

    Raises:
        ConfigError: a number out of range.
    """

    gain: float = 1.0
    speed: float = 0.1
    shift: int = 400
    noise: float = 0.1
    flip: bool = True

    def __post_init__(self) -> None:
        for name in ("gain", "shift", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"VaryWaveforms: {name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.speed < 1:
            raise ConfigError(f"VaryWaveforms: speed must be in [0, 1), got {self.speed}; 0.1 is 10 % up or down")

    def __call__(self, codes: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Varied rows.

        Args:
            codes: (batch, length) uint8, mu-law, silence behind the end of each.
            lengths: (batch,) samples that are real.

        Returns:
            (values, lengths): (batch, length) codes as float32, quantised as recordings are, so that nothing in them
            tells that they were varied; and how much of each is real now, at most `length`.
        """
        rows, length = codes.shape
        where = codes.device

        def draw() -> Tensor:
            return torch.rand(rows, 1, device=where) * 2 - 1

        # Levels lie around the middle between the codes 127 and 128: sound has no mean there, and turns over there.
        companded = codes.float() * (2 / _MU) - 1
        x = companded.sign() * torch.expm1(companded.abs() * math.log1p(_MU)) / _MU
        speed = torch.exp(draw() * math.log1p(self.speed))
        lead = ((draw() * 0.625 + 0.375) * self.shift).floor()
        place = (torch.arange(length, device=where) - lead) * speed
        left = place.floor()
        part = place - left
        left = left.long()
        real = lengths.unsqueeze(1)

        def at(index: Tensor) -> Tensor:
            inside = (index >= 0) & (index < real)
            return x.gather(1, index.clamp(0, length - 1)) * inside

        x = at(left) * (1 - part) + at(left + 1) * part
        after = (real / speed + lead).floor().clamp(1, length)
        sounds = torch.arange(length, device=where) < after
        size = (x.square().sum(1, keepdim=True) / after).sqrt()
        loud = torch.rand(rows, 1, device=where).square() * self.noise
        x = (x + torch.randn_like(x) * size * loud) * sounds
        x = x * torch.exp(draw() * math.log1p(self.gain))
        if self.flip:
            x = x * torch.where(draw() > 0, 1.0, -1.0)
        x = x.clamp(-1, 1)
        companded = x.sign() * torch.log1p(_MU * x.abs()) / math.log1p(_MU)
        return ((companded + 1) * (_MU / 2) + 0.5).floor(), after.squeeze(1).to(lengths.dtype)
