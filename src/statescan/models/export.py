"""A language model as `torch.export` programs: one that reads a prompt, one that takes a token more."""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from statescan.errors import CheckpointError, ConfigError
from statescan.models.causal_lm import CausalLM
from statescan.models.config import MambaConfig
from statescan.nn import MambaState

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["ExportedModel", "export", "flat_state", "load_program"]

# The modules that register the ops of kernels; an exported program knows them by name alone.
_OPS = {
    "add_norm": ("cpu", "cuda", "triton_norm"),
    "causal_conv1d": ("cpu", "cuda", "triton_conv"),
    "selective_scan": ("cpu", "cuda", "triton_scan"),
    "selective_state_update": ("cpu", "cuda", "triton_update"),
    "ssm_kernel": ("any_length", "cpu", "triton_products"),
    "fft_conv": ("any_length",),
}


class ExportedModel(NamedTuple):
    """Two programs over plain tensors; the state is a list of them, as `flat_state` gives it.

    prefill: (input_ids (batch, length) int64, state) -> (logits, state).
    step: (input_ids (batch,) int64, state) -> (logits (batch, vocabulary), state).
    """

    prefill: ExportedProgram
    step: ExportedProgram


class _Prefill(nn.Module):
    def __init__(self, model: CausalLM, last: bool) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(self, input_ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        output = self.model(input_ids, state=_layers(state), logits_to_keep=int(self.last))
        assert output.logits is not None
        assert output.state is not None
        return output.logits[:, -1] if self.last else output.logits, _flat(output.state)


class _Step(nn.Module):
    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        output = self.model.step(input_ids, _layers(state))
        assert output.logits is not None
        assert output.state is not None
        return output.logits, _flat(output.state)


def _layers(state: list[Tensor]) -> tuple[MambaState, ...]:
    return tuple(MambaState(conv, ssm) for conv, ssm in zip(state[::2], state[1::2], strict=True))


def _flat(state: Any) -> list[Tensor]:
    return [part for one in state for part in one]


def flat_state(model: CausalLM, batch: int) -> list[Tensor]:
    """The state before the first token as the exported programs take it: conv and ssm of each layer in turn."""
    return _flat(model.init_state(batch))


def load_program(path: str | os.PathLike[str]) -> ExportedProgram:
    """Reads a program that `torch.export.save` wrote, whatever backend's ops it calls.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it calls an op that is not here.
    """
    for op, backends in _OPS.items():
        for backend in backends:
            # Triton may be missing.
            with contextlib.suppress(ImportError):
                importlib.import_module(f"statescan.ops.{op}.{backend}")
    try:
        return torch.export.load(path)
    except Exception as problem:  # the archive's reader, the graph's and the system raise errors of many kinds
        reason = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise CheckpointError(
            f"load: {path} is no exported program that can be read here ({reason}); export the model again"
        ) from problem


def export(
    model: CausalLM,
    *,
    batch: int | None = None,
    length: int | None = None,
    logits: Literal["last", "all"] = "last",
    max_length: int = 2**20,
) -> ExportedModel:
    """Exports reading a prompt and taking one more token, for inference.

    The programs hold the weights and call the ops of the backend that the model has: a model made with
    ``backend="torch"``, exported at one length, gives programs of PyTorch's own ops, which run where this package is
    not; at any length S4's and S4D's kernels and convolutions stay ours. `torch.export.save` writes one to a file;
    `load_program` reads it with our kernels' ops at hand.

    Args:
        model: a Mamba language model, in the dtype and on the device where the programs shall run.
        batch: rows. Default: any number.
        length: tokens of a prompt. Default: any number up to max_length. Where a backend unrolls by the length it must
            be given: with ``"torch"`` for S6, whose scan that is, with ``"reference"`` for every inner map.
        logits: of the last position, (batch, vocabulary), or of all, (batch, length, vocabulary). Default "last".
        max_length: the most tokens of a prompt of any length. Default 2^20.

    Returns:
        ExportedModel(prefill, step).

    Raises:
        ConfigError: another kind of model, an argument out of range, or a model that has no programs of any length.
    """
    if not isinstance(model.config, MambaConfig):
        raise ConfigError(
            f"export: model must be a Mamba language model, got one of {type(model.config).__name__}; its state is no "
            "plain list of tensors"
        )
    for name, value in (("batch", batch), ("length", length)):
        if value is not None and value < 1:
            raise ConfigError(f"export: {name} must be at least 1, or None for any, got {value}")
    if logits not in ("last", "all"):
        raise ConfigError(f"export: logits must be 'last' or 'all', got {logits!r}")
    rows: Any = torch.export.Dim("batch") if batch is None else None
    tokens: Any = torch.export.Dim("length", max=max_length) if length is None else None
    device = model.backbone.embedding.weight.device
    # Sizes of examples that no other size of a model is likely to have, lest they be taken for it.
    ids = torch.zeros(batch or 3, length or 7, dtype=torch.int64, device=device)
    state = flat_state(model, batch or 3)
    state_shapes = [{0: rows} if batch is None else None for _ in state]
    prompt = {0: rows} if batch is None else {}
    prompt |= {1: tokens} if length is None else {}
    training = model.training
    model.eval()
    # Here, since it imports the compiler, which exporting needs and reading a model doesn't.
    from torch._dynamo.exc import UserError

    try:
        with torch.no_grad():
            try:
                prefill = torch.export.export(
                    _Prefill(model, logits == "last"), (ids, state), dynamic_shapes=(prompt or None, state_shapes)
                )
            except UserError as problem:
                if length is not None:
                    raise
                raise ConfigError(
                    "export: length must be a number for this model, got None; its backend unrolls a scan or a "
                    "convolution by the length: pass length=32, or make the model with backend='auto'"
                ) from problem
            step = torch.export.export(
                _Step(model),
                (ids[:, 0].clone(), state),
                dynamic_shapes=({0: rows} if batch is None else None, state_shapes),
            )
    finally:
        model.train(training)
    return ExportedModel(prefill, step)
