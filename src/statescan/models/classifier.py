"""A classifier of whole sequences over any mixer: pixels, samples or tokens in, one label out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.models.own_folder import load_own_weights, own_config, save_own
from statescan.nn import GRU, LSTM, MLP, S4, S4D, CausalSelfAttention, DilatedConv, Embedding, Mamba
from statescan.nn.s4 import joint_kernels

__all__ = ["MIXERS", "ClassifierConfig", "ClassifierOutput", "SequenceClassifier"]

_ARCHITECTURE = "SequenceClassifier"


def _attention(config: ClassifierConfig, layer: int) -> nn.Module:
    return CausalSelfAttention(config.d_model, max(1, config.d_model // 64))


MIXERS: dict[str, Callable[[ClassifierConfig, int], nn.Module]] = {
    "s4": lambda c, layer: S4(c.d_model, c.d_state, bidirectional=c.bidirectional, dropout=c.dropout),
    "s4d": lambda c, layer: S4D(c.d_model, c.d_state, bidirectional=c.bidirectional, dropout=c.dropout),
    "mamba": lambda c, layer: Mamba(c.d_model, d_state=c.d_state),
    "lstm": lambda c, layer: LSTM(c.d_model),
    "gru": lambda c, layer: GRU(c.d_model),
    "conv": lambda c, layer: DilatedConv(c.d_model, width=3, dilation=2**layer),
    "attention": _attention,
}
_TWO_WAYS = ("s4", "s4d")
_ONE_HOT = 64  # up to so many ids the embedding is a matrix product


@dataclass(frozen=True, slots=True)
class ClassifierConfig:
    """What a `SequenceClassifier` is made of.

    Args:
        classes: number of labels.
        d_input: numbers at each position of a real-valued sequence; 0 where the sequence is tokens.
        vocab_size: number of token ids; 0 where the sequence is real-valued. Id 0 is padding.
        d_model: width of the residual stream. Default 128.
        n_layer: number of blocks. Default 4.
        mixer: one of `MIXERS`. Default "s4d".
        d_state: states a channel, of mixers that have them. Default 64.
        bidirectional: S4 and S4D see both ways. Default False.
        dropout: in S4 and S4D and after every mixer. Default 0.
        pooling: "mean" over the positions, or "last". Default "mean".
        d_mlp: width of a multilayer perceptron behind every mixer, as a Transformer has it; 0 for none. Default 0.

    Raises:
        ConfigError: a field is out of range.
    """

    classes: int
    d_input: int = 0
    vocab_size: int = 0
    d_model: int = 128
    n_layer: int = 4
    mixer: str = "s4d"
    d_state: int = 64
    bidirectional: bool = False
    dropout: float = 0.0
    pooling: str = "mean"
    d_mlp: int = 0

    def __post_init__(self) -> None:
        self._want("classes", self.classes >= 2, "at least 2")
        self._want("d_input", (self.d_input > 0) != (self.vocab_size > 0), "> 0 or vocab_size > 0, and not both")
        self._want("d_model", self.d_model >= 1, "at least 1")
        self._want("n_layer", self.n_layer >= 1, "at least 1")
        self._want("mixer", self.mixer in MIXERS, f"one of {sorted(MIXERS)}")
        self._want("d_state", self.d_state >= 1, "at least 1")
        self._want(
            "bidirectional", not self.bidirectional or self.mixer in _TWO_WAYS, f"False with mixers but {_TWO_WAYS}"
        )
        self._want("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self._want("d_mlp", self.d_mlp >= 0, "at least 0")
        self._want("pooling", self.pooling in ("mean", "last"), "'mean' or 'last'")

    def _want(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ConfigError(f"ClassifierConfig: {name} must be {wanted}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values that json can write."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ClassifierConfig:
        """Makes a configuration from named fields; ConfigError names one that is unknown."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"ClassifierConfig: unknown field {unknown[0]!r}; known are {sorted(known)}")
        return cls(**fields)


class ClassifierOutput(NamedTuple):
    """logits: (batch, classes), float32; loss: a scalar, None without labels."""

    logits: Tensor
    loss: Tensor | None


def pooled(x: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One vector a row: the mean over its real positions, or the last of them.

    Args:
        x: (batch, length, features).
        mask: (batch, length), 1 at real positions. None: all are real.
        pooling: "mean" or "last".
    """
    if mask is None:
        return x.mean(1) if pooling == "mean" else x[:, -1]
    if pooling == "mean":
        real = mask.to(x.dtype)
        return (x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    last = torch.where(mask != 0, torch.arange(x.shape[1], device=x.device), 0).amax(1)
    return x[torch.arange(x.shape[0], device=x.device), last]


class SequenceClassifier(nn.Module):
    """Encoder, blocks of norm, mixer and residual, a pooled position, a linear head.

    Args:
        config: see `ClassifierConfig`.
        device: where parameters are made. They are float32; lower precision comes by autocast.
    """

    def __init__(self, config: ClassifierConfig, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device}
        d = config.d_model
        self.encoder = nn.Linear(config.d_input, d, **factory) if config.d_input else None
        self.embedding = Embedding(config.vocab_size, d, **factory) if config.vocab_size else None
        self.norms = nn.ModuleList(nn.LayerNorm(d, **factory) for _ in range(config.n_layer))
        mixers = [MIXERS[config.mixer](config, layer) for layer in range(config.n_layer)]
        self.mixers = nn.ModuleList(mixer.to(device) for mixer in mixers)
        halves = config.n_layer if config.d_mlp else 0
        self.mlp_norms = nn.ModuleList(nn.LayerNorm(d, **factory) for _ in range(halves))
        self.mlps = nn.ModuleList(MLP(d, config.d_mlp, **factory) for _ in range(halves))
        self.dropout = nn.Dropout(config.dropout)
        self.norm_f = nn.LayerNorm(d, **factory)
        self.head = nn.Linear(d, config.classes, **factory)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, *, mask: Tensor | None = None) -> ClassifierOutput:
        """Classifies a batch.

        Args:
            inputs: (batch, length, d_input) real, or (batch, length) token ids.
            labels: (batch,) int64. Default: no loss.
            mask: (batch, length), 1 at real positions, padding behind them: it is left out of the pooling. Causal
                mixers see none of it at the real positions; a bidirectional one reads it as what it holds.

        Returns:
            ClassifierOutput.

        Raises:
            ShapeError, DTypeError: an argument doesn't fit.
        """
        x = self.features(inputs, mask=mask)
        logits = self.head(x).float()
        if labels is None:
            return ClassifierOutput(logits, None)
        if tuple(labels.shape) != (x.shape[0],):
            raise ShapeError(
                f"SequenceClassifier: labels must be (batch,) = ({x.shape[0]},), got {tuple(labels.shape)}"
            )
        return ClassifierOutput(logits, F.cross_entropy(logits, labels.long()))

    def features(self, inputs: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """What the head reads, (batch, d_model); arguments as in `forward`."""
        x = self._encode(inputs)
        if mask is not None and tuple(mask.shape) != tuple(x.shape[:2]):
            raise ShapeError(
                f"SequenceClassifier: mask must be (batch, length) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}"
            )
        given = [{}] * len(self.mixers)
        if self.config.mixer in _TWO_WAYS:
            given = [{"kernels": kernels} for kernels in joint_kernels(list(self.mixers), x.shape[1])]
        for layer, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            x = x + self.dropout(mixer(norm(x), **given[layer]).output)
            if self.config.d_mlp:
                x = x + self.dropout(self.mlps[layer](self.mlp_norms[layer](x)))
        return pooled(self.norm_f(x), mask, self.config.pooling)

    def _encode(self, inputs: Tensor) -> Tensor:
        if self.encoder is not None:
            if inputs.dim() != 3 or inputs.shape[2] != self.config.d_input or 0 in inputs.shape:
                raise ShapeError(
                    f"SequenceClassifier: inputs must be (batch, length >= 1, d_input) with d_input "
                    f"{self.config.d_input}, got {tuple(inputs.shape)}"
                )
            if not inputs.is_floating_point():
                raise DTypeError(f"SequenceClassifier: inputs must be float, got {inputs.dtype}; scale them first")
            return self.encoder(inputs.to(self.encoder.weight.dtype))
        assert self.embedding is not None
        if inputs.dim() != 2 or 0 in inputs.shape:
            raise ShapeError(f"SequenceClassifier: inputs must be (batch, length >= 1), got {tuple(inputs.shape)}")
        if inputs.is_floating_point():
            raise DTypeError(f"SequenceClassifier: inputs must be token ids, got {inputs.dtype}; pass inputs.long()")
        if self.config.vocab_size > _ONE_HOT:
            return self.embedding(inputs.long())
        # Of few ids: a matrix product, whose gradient is one too, in place of as many additions to the same few rows.
        ids = torch.arange(self.config.vocab_size, device=inputs.device)
        weight = self.embedding.weight
        return F.linear((inputs.unsqueeze(-1) == ids).to(weight.dtype), weight.T)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes config.json and the weights into a folder, whole or not at all."""
        return save_own(folder, _ARCHITECTURE, self.config.to_dict(), self)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> SequenceClassifier:
        """Reads what `save_pretrained` wrote.

        Raises:
            CheckpointError: the folder is no such model's, or a file in it is missing, cut short or of another shape.
        """
        model = cls(ClassifierConfig.from_dict(own_config(folder, _ARCHITECTURE)))
        load_own_weights(model, folder)
        return model
