"""AdamW with the published parameter groups, warm-up and cosine, and an update that clips and guards on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from statescan.train.config import TrainConfig

__all__ = ["GuardedAdamW", "guarded_update", "learning_rate", "parameter_groups"]


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of an update.

    ``lr (step + 1) / warmup`` while step < warmup, then
    ``min_lr + (lr - min_lr) (1 + cos(pi t)) / 2`` with t from 0 to 1 at the last update.

    Args:
        step: the update, from 0.
        config: steps, warmup, lr, min_lr.

    Returns:
        The learning rate.

    Source: Gu and Dao 2023, appendix E.2 (linear warm-up, cosine to 1e-5).
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    span = config.steps - 1 - config.warmup
    progress = min(1.0, (step - config.warmup) / span) if span > 0 else 1.0
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in groups: with weight decay, without, and those that have a highest learning rate of their own.

    Without: A_log, D, biases, and the weights of norms: whatever has fewer than two dimensions, is marked
    ``_no_weight_decay``, or is called A_log or A_imag. With: every matrix, the convolutions' kernels and the embedding,
    which is the head's matrix too where the two are tied.

    Args:
        model: the model; a parameter that two names share is taken once.
        weight_decay: of the first group.

    Returns:
        Groups for a torch optimiser; an empty one is left out. A group of parameters that are marked ``_max_lr`` (those
        of S4's system) has that number under "max_lr", which the schedule never passes.

    Source: state-spaces/mamba marks A_log, D and the step's bias; Gu and Dao 2023, appendix E.2 (decay 0.1).
    S4, arXiv:2111.00396, trains its system at 0.001 at most and without decay.
    """
    decay, plain = [], []
    capped: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = (
            parameter.ndim < 2
            or getattr(parameter, "_no_weight_decay", False)
            or name.rpartition(".")[2] in ("A_log", "A_imag")
        )
        highest = getattr(parameter, "_max_lr", None)
        if highest is not None:
            capped.setdefault(highest, []).append(parameter)
        else:
            (plain if exempt else decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
        *({"params": some, "weight_decay": 0.0, "max_lr": highest} for highest, some in capped.items()),
    ]
    return [group for group in groups if group["params"]]


class GuardedAdamW:
    """AdamW whose update clips by the global norm and leaves a gradient that is not finite out, on the device.

    ``norm = |g|_2`` over all parameters; ``g <- g * min(1, clip / (norm + 1e-6))``; then AdamW, except where the norm
    is not finite: the weights, both moments and the step count stay as they are. With torch's fused kernel the division
    and the exception happen inside the update (its ``grad_scale`` and ``found_inf``), so that the host never waits for
    the norm and no extra pass runs over the gradients.

    Args:
        model: whose parameters are trained; already sharded where they are to be.
        config: lr, betas, eps, weight_decay, clip.

    Attributes:
        optimizer: the torch.optim.AdamW inside.
        parameters: what is trained, each once.
        skipped: () float32, how many updates were left out.
        skipped_in_row: () float32, how many of them end the sequence so far.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self._clip = config.clip
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = self.parameters[0].device
        self._fused = device.type in {"cpu", "cuda", "mps"}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=self._fused,
        )
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_row = torch.zeros((), device=device)

    def step(self, lr: float) -> Tensor:
        """Update the weights by their gradients, which are dropped then.

        Args:
            lr: the learning rate.

        Returns:
            () float32: the global norm before clipping, on the device.
        """
        for group in self.optimizer.param_groups:
            rate = min(lr, group.get("max_lr", lr))
            # As a captured step has it, where it is a tensor: to capture changes no bit.
            group["lr"] = float(np.float32(rate)) if self.parameters[0].is_cuda else rate
        norm, bad = guarded_update(self.optimizer, self.parameters, self._clip, self._fused)
        self.skipped += bad
        self.skipped_in_row.add_(1).mul_(bad)
        return norm


def guarded_update(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float, fused: bool
) -> tuple[Tensor, Tensor]:
    """Clip by the global norm and update, except where the norm is not finite; the gradients are dropped then.

    Args:
        optimizer: its parameters' gradients are there.
        parameters: over whose gradients the norm goes.
        clip: the largest norm; 0 for no clipping.
        fused: the optimiser's update takes ``grad_scale`` and ``found_inf``, so that all of it stays on the device;
            else the host waits for the norm.

    Returns:
        (norm before clipping, 1 where the update was left out or 0), each () float32 on the device.
    """
    norm = global_norm([p.grad for p in parameters if p.grad is not None])
    bad = (~torch.isfinite(norm)).float()
    # Where the norm is bad the divisor is too, and nobody reads it.
    divisor = ((norm + 1e-6) / clip).clamp(min=1.0) if clip else torch.ones_like(norm)
    if fused:
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        # A later step of the optimiser by itself must not meet them.
        optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]
    elif not bool(bad):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(divisor)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, bad


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, () float32; of the whole gradients where they are sharded."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # type: ignore[operator]
    return norm.float()
