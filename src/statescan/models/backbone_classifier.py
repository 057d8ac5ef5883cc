"""A classifier on top of a language model's backbone: from scratch, or from pretrained weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.data.tokenizer import DNA_LETTERS, DnaTokenizer
from statescan.errors import CheckpointError, ConfigError, ShapeError
from statescan.models.baseline_config import ModelConfig, config_from_dict
from statescan.models.causal_lm import Backbone, CausalLM, next_token_targets
from statescan.models.classifier import ClassifierOutput, pooled
from statescan.models.own_folder import load_own_weights, own_config, save_own
from statescan.nn.reverse_complement import ReverseComplement, complement_ids, strand_pair
from statescan.ops import linear_cross_entropy

__all__ = ["BackboneClassifier", "BackboneClassifierConfig", "JointLosses"]

_ARCHITECTURE = "BackboneClassifier"
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class BackboneClassifierConfig:
    """What a `BackboneClassifier` is made of.

    Args:
        classes: number of labels.
        backbone: configuration of a language model of any family; its head is not used.
        pooling: "mean" over the positions, or "last". Default "mean".
        reverse_complement: of DNA: the backbone reads both strands, with the same weights, and a sequence and its
            reverse complement get the same answer. Default False.
        dropout: of the pooled vector. Default 0.

    Raises:
        ConfigError: a field is out of range.
    """

    classes: int
    backbone: ModelConfig
    pooling: str = "mean"
    reverse_complement: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._want("classes", self.classes >= 2, "at least 2")
        self._want("pooling", self.pooling in ("mean", "last"), "'mean' or 'last'")
        self._want("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        pairs = not self.reverse_complement or (self.pooling == "mean" and self.backbone.vocab_size == 5)
        self._want("reverse_complement", pairs, "False but for bases (vocab_size 5) and pooling 'mean'")

    def _want(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ConfigError(f"BackboneClassifierConfig: {name} must be {wanted}, got {getattr(self, name)!r}")

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.backbone.vocab_size

    @property
    def d_input(self) -> int:
        """0: the sequences are tokens."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values that json can write."""
        return {**dataclasses.asdict(self), "backbone": self.backbone.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BackboneClassifierConfig:
        """Makes a configuration from named fields; ConfigError names one that is unknown."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"BackboneClassifierConfig: unknown field {unknown[0]!r}; known are {sorted(known)}")
        return cls(**{**fields, "backbone": config_from_dict(fields["backbone"])})


class JointLosses(NamedTuple):
    """Scalars in nats. classes: of the labels; next_token: mean over the tokens that are predicted."""

    classes: Tensor
    next_token: Tensor


class BackboneClassifier(nn.Module):
    """Backbone, a pooled position, a linear head.

    Args:
        config: see `BackboneClassifierConfig`.
        device: where parameters are made. They are float32; lower precision comes by autocast.
    """

    def __init__(self, config: BackboneClassifierConfig, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        model = CausalLM(config.backbone, device=device)
        self.backbone: Backbone = model.backbone
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.backbone.d_model, config.classes, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def load_backbone(self, source: str | os.PathLike[str]) -> None:
        """Takes the backbone's weights from a pretrained `CausalLM`.

        Raises:
            CheckpointError: there is no model, or one of another shape.
        """
        model = CausalLM.from_pretrained(source)
        mine, theirs = self.config.backbone.to_dict(), model.config.to_dict()
        for name in ("recompute", "dropout", "embedding_dropout"):
            mine.pop(name, None)
            theirs.pop(name, None)
        if differing := sorted(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)):
            name = differing[0]
            raise CheckpointError(
                f"{source}: wanted a model with {name} = {mine.get(name)}, as the classifier's backbone has, got "
                f"{theirs.get(name)}"
            )
        self.backbone.load_state_dict(model.backbone.state_dict())

    def forward(self, inputs: Tensor, labels: Tensor | None = None, *, mask: Tensor | None = None) -> ClassifierOutput:
        """Classifies a batch.

        Args:
            inputs: (batch, length) token ids.
            labels: (batch,) int64. Default: no loss.
            mask: (batch, length), 1 at real positions, padding behind them. Default: all are real.

        Returns:
            ClassifierOutput.

        Raises:
            ShapeError: an argument doesn't fit.
        """
        return self._classify(self._hidden(inputs, mask), labels, mask)

    def joint_losses(self, inputs: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> JointLosses:
        """The loss of the labels and, of one pass through the backbone, that of each next token, as a second task.

        The head of the tokens is the embedding's matrix, as in a language model whose two are tied. With
        reverse_complement the backbone predicts either strand, each in its own direction. Of bases (vocab_size 5) an
        unknown one is read and not predicted.

        Args:
            inputs: (batch, length) token ids.
            labels: (batch,) int64.
            mask: (batch, length), 1 at real positions, padding behind them, which is not predicted. Default: all are
                real.

        Returns:
            JointLosses; next_token is 0 where there is nothing to predict.

        Raises:
            ShapeError: an argument doesn't fit.
        """
        hidden = self._hidden(inputs, mask)
        classes = self._classify(hidden, labels, mask).loss
        assert classes is not None
        ids = inputs
        if self.config.reverse_complement:
            this, other = hidden.chunk(2, -1)
            hidden, ids = torch.cat([this, other.flip(1, 2)]), torch.cat([inputs, complement_ids(inputs)])
        targets = next_token_targets(ids, ids.shape[0], ids.shape[1], mask, None)
        if self.config.vocab_size == len(DNA_LETTERS):
            targets = targets.masked_fill(targets == DnaTokenizer.unjudged, _IGNORED)
        weight = self.backbone.embedding.weight
        return JointLosses(classes, linear_cross_entropy(hidden, weight, targets, ignore_index=_IGNORED))

    def _hidden(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, length, d_model); of both strands (batch, length, 2 d_model), as `ReverseComplement` gives them."""
        if self.config.reverse_complement:
            if mask is not None:
                raise ShapeError(
                    "BackboneClassifier: with reverse_complement rows must be of one length, got a mask; the other "
                    "strand would begin with padding"
                )
            pair = strand_pair(lambda ids: self.backbone.embed("BackboneClassifier", ids, None, 2), inputs)
            return ReverseComplement(lambda x: self.backbone.run(x, None, None).hidden)(pair)
        return self.backbone(inputs, mask=mask).hidden

    def _classify(self, hidden: Tensor, labels: Tensor | None, mask: Tensor | None) -> ClassifierOutput:
        if self.config.reverse_complement:
            this, other = hidden.chunk(2, -1)
            rows = (this.mean(1) + other.flip(2).mean(1)) / 2
        else:
            rows = pooled(hidden, mask, self.config.pooling)
        logits = self.head(self.dropout(rows)).float()
        if labels is None:
            return ClassifierOutput(logits, None)
        if tuple(labels.shape) != (hidden.shape[0],):
            raise ShapeError(
                f"BackboneClassifier: labels must be (batch,) = ({hidden.shape[0]},), got {tuple(labels.shape)}"
            )
        return ClassifierOutput(logits, F.cross_entropy(logits, labels.long()))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes config.json and the weights into a folder, whole or not at all."""
        return save_own(folder, _ARCHITECTURE, self.config.to_dict(), self)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> BackboneClassifier:
        """Reads what `save_pretrained` wrote.

        Raises:
            CheckpointError: the folder is no such model's, or a file in it is missing, cut short or of another shape.
        """
        model = cls(BackboneClassifierConfig.from_dict(own_config(folder, _ARCHITECTURE)))
        load_own_weights(model, folder)
        return model
