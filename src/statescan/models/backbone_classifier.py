"""A classifier on top of a language model's backbone: from scratch, or from pretrained weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.data.tokenizer import DNA_LETTERS, DnaTokenizer
from statescan.errors import CheckpointError, ConfigError, ShapeError
from statescan.models.baseline_config import ModelConfig, config_from_dict
from statescan.models.causal_lm import Backbone, CausalLM
from statescan.models.classifier import ClassifierOutput, pooled
from statescan.models.own_folder import load_own_weights, own_config, save_own
from statescan.nn.reverse_complement import ReverseComplement, complement_ids, strand_pair
from statescan.ops import linear_cross_entropy

__all__ = ["BackboneClassifier", "BackboneClassifierConfig"]

_ARCHITECTURE = "BackboneClassifier"
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class BackboneClassifierConfig:
    """What a `BackboneClassifier` is made of.

    Args:
        classes: number of labels.
        backbone: configuration of a language model of any family; its head is not used.
        pooling: "mean" over the positions, or "last", of the linear head. Default "mean".
        reverse_complement: of DNA: the backbone reads both strands, with the same weights, and a sequence and its
            reverse complement get the same answer. Default False.
        dropout: of the pooled vector. Default 0.
        head: "linear", on the pooled vector; or "likelihood", Bayes' rule: the backbone is a language model that is
            told a label, by a vector added to each embedding, and a label's logit is the log-likelihood of the whole
            sequence under it, all labels alike beforehand. It reads a sequence once a label, and learns from every
            token where the other learns from one label a sequence. Default "linear".

    Raises:
        ConfigError: a field is out of range.
    """

    classes: int
    backbone: ModelConfig
    pooling: str = "mean"
    reverse_complement: bool = False
    dropout: float = 0.0
    head: str = "linear"

    def __post_init__(self) -> None:
        self._want("classes", self.classes >= 2, "at least 2")
        self._want("head", self.head in ("linear", "likelihood"), "'linear' or 'likelihood'")
        pools = self.head == "linear" or (self.pooling == "mean" and not self.dropout)
        self._want("head", pools, "'linear' where pooling or dropout is set, which a likelihood has not")
        tied = self.head == "linear" or self.backbone.tie_embeddings
        self._want(
            "head", tied, "'linear' for a backbone without tie_embeddings: tokens are predicted by its embedding"
        )
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
        """All fields, as plain values that json can write; `head` where it is not linear, as in folders from before."""
        fields = {**dataclasses.asdict(self), "backbone": self.backbone.to_dict()}
        if self.head == "linear":
            del fields["head"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BackboneClassifierConfig:
        """Makes a configuration from named fields; ConfigError names one that is unknown."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"BackboneClassifierConfig: unknown field {unknown[0]!r}; known are {sorted(known)}")
        return cls(**{**fields, "backbone": config_from_dict(fields["backbone"])})


class BackboneClassifier(nn.Module):
    """Backbone, a pooled position, a linear head; or the likelihoods of a backbone that is told a label.

    Args:
        config: see `BackboneClassifierConfig`.
        device: where parameters are made. They are float32; lower precision comes by autocast.
    """

    def __init__(self, config: BackboneClassifierConfig, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        model = CausalLM(config.backbone, device=device)
        self.backbone: Backbone = model.backbone
        if config.head == "likelihood":
            # What stands before the first token, and what a label adds to every embedding.
            self.start = nn.Parameter(torch.zeros(config.backbone.d_model, device=device))
            self.label = nn.Embedding(config.classes, config.backbone.d_model, device=device)
            nn.init.zeros_(self.label.weight)
            return
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
            ClassifierOutput; of head "likelihood" the logits are log-likelihoods of whole sequences, nats, read under
            all labels at once, in the memory of `classes` times the batch.

        Raises:
            ShapeError: an argument doesn't fit.
        """
        self._check_mask(inputs, mask)
        if self.config.head == "likelihood":
            logits = self._log_likelihoods(inputs, mask)
            return ClassifierOutput(logits, self._loss(logits, labels))
        return self._classify(self._hidden(inputs, mask), labels, mask)

    def generative_loss(self, inputs: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The cross entropy of each token under its sequence's own label, of both strands with reverse_complement: what
        a language model that is told labels minimises, where the loss of `forward` tells the labels apart.

        Args:
            inputs, labels, mask: as of `forward`.

        Returns:
            A scalar, nats: the mean over the tokens that are predicted.

        Raises:
            ConfigError: of another head than "likelihood".
            ShapeError: an argument doesn't fit.
        """
        if self.config.head != "likelihood":
            raise ConfigError(
                f"BackboneClassifier.generative_loss: head must be 'likelihood', got {self.config.head!r}; "
                "take the loss of forward"
            )
        self._check_mask(inputs, mask)
        hidden, targets = self._read(inputs, labels, mask)
        return linear_cross_entropy(hidden, self.backbone.embedding.weight, targets, ignore_index=_IGNORED)

    def _read(self, inputs: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states, each from the label and the tokens before one, and that token or _IGNORED: (rows, length,
        d_model) and (rows, length). With reverse_complement rows are first the batch, then the other strand of it."""
        self._check_labels(labels, inputs.shape[0])
        if self.config.reverse_complement:
            inputs, labels = torch.cat([inputs, complement_ids(inputs)]), torch.cat([labels, labels])
        x = self.backbone.embed("BackboneClassifier", inputs, None, 2)
        x = torch.cat([self.start.to(x.dtype).expand(x.shape[0], 1, -1), x[:, :-1]], 1)
        hidden = self.backbone(inputs_embeds=x + self.label(labels.long())[:, None], mask=mask).hidden
        targets = self._known(inputs.long())
        return hidden, targets if mask is None else targets.masked_fill(mask == 0, _IGNORED)

    def _log_likelihoods(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Of each row under each label, nats, (batch, classes); with reverse_complement the mean of both strands."""
        classes, batch = self.config.classes, inputs.shape[0]
        labels = torch.arange(classes, device=inputs.device)[:, None].expand(-1, batch).reshape(-1)
        masks = None if mask is None else torch.cat([mask] * classes)
        hidden, targets = self._read(torch.cat([inputs] * classes), labels, masks)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        # A label's lead is a small difference of sums over all tokens: rounded by autocast it would be another.
        with torch.autocast(hidden.device.type, enabled=False):
            weight = self.backbone.embedding.weight.to(exact)
            each = linear_cross_entropy(hidden.to(exact), weight, targets, ignore_index=_IGNORED, reduction="none")
        return -each.sum(1).view(-1, classes, batch).mean(0).T

    def _known(self, targets: Tensor) -> Tensor:
        """Without the unknown among bases, which are read and not predicted."""
        if self.config.vocab_size == len(DNA_LETTERS):
            return targets.masked_fill(targets == DnaTokenizer.unjudged, _IGNORED)
        return targets

    def _check_mask(self, inputs: Tensor, mask: Tensor | None) -> None:
        """Before rows are repeated, so that an error tells the sizes that were passed."""
        if mask is None:
            return
        if self.config.reverse_complement:
            raise ShapeError(
                "BackboneClassifier: with reverse_complement rows must be of one length, got a mask; the other "
                "strand would begin with padding"
            )
        if mask.shape != inputs.shape:
            raise ShapeError(
                f"BackboneClassifier: mask must be (batch, length) = {tuple(inputs.shape)}, as inputs, got "
                f"{tuple(mask.shape)}; give one number a token, 1 where it is real"
            )

    @staticmethod
    def _check_labels(labels: Tensor, batch: int) -> None:
        if tuple(labels.shape) != (batch,):
            raise ShapeError(f"BackboneClassifier: labels must be (batch,) = ({batch},), got {tuple(labels.shape)}")

    def _hidden(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, length, d_model); of both strands (batch, length, 2 d_model), as `ReverseComplement` gives them."""
        if self.config.reverse_complement:
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
        return ClassifierOutput(logits, self._loss(logits, labels))

    def _loss(self, logits: Tensor, labels: Tensor | None) -> Tensor | None:
        if labels is None:
            return None
        self._check_labels(labels, logits.shape[0])
        return F.cross_entropy(logits, labels.long())

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
