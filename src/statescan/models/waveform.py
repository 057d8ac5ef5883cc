"""A model of raw sound, sample by sample: the SaShiMi backbone, each stage of it with a layer of its own kind."""

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

__all__ = ["STAGES", "StageState", "WaveformConfig", "WaveformModel", "WaveformOutput"]

_ARCHITECTURE = "WaveformModel"
# Layers with dilations 1, 2, ... 2^9, then again.
_DILATIONS = 10


def _mamba(config: WaveformConfig, d_model: int, layer: int, A_init: str = "s4d-real") -> nn.Module:
    return Mamba(d_model, d_state=config.d_state_mamba, A_init=A_init)


# What may stand in a stage; the published backbone puts a multilayer perceptron behind each layer of the first kinds.
STAGES: dict[str, Callable[[WaveformConfig, int, int], nn.Module]] = {
    "s4": lambda c, d, layer: S4(d, c.d_state),
    "s4d": lambda c, d, layer: S4D(d, c.d_state),
    "attention": lambda c, d, layer: CausalSelfAttention(d, max(1, d // 64)),
    "mamba": _mamba,
    "mamba-complex": lambda c, d, layer: _mamba(c, d, layer, "s4d-lin"),
    "lstm": lambda c, d, layer: LSTM(d),
    "gru": lambda c, d, layer: GRU(d),
    "conv": lambda c, d, layer: DilatedConv(d, width=2, dilation=2 ** (layer % _DILATIONS)),
}
_WITH_MLP = ("s4", "s4d", "attention")
_CONVOLVED = ("s4", "s4d")


@dataclass(frozen=True, slots=True)
class WaveformConfig:
    """What a `WaveformModel` is made of.

    Args:
        stages: the kind of layer of each stage, one of `STAGES`, from the one at the rate of the samples to the centre.
            One stage alone has no pooling: a plain stack, as the baselines are. Default ("s4", "s4", "mamba").
        d_model: width of the outermost stage. Default 64.
        n_layer: blocks of a stage, before the pooling and again after it; in the centre once. Default 4.
        pool: samples of a stage that make one of the next. Default 4.
        widen: each stage is so many times as wide as the one outside of it. Default 2.
        d_state: states a channel of S4 and S4D. Default 64.
        d_state_mamba: of Mamba. Default 16.
        d_mlp: width inside the multilayer perceptrons, in widths of the stage. Default 2.
        dropout: of every block's output, in training. Default 0.
        classes: labels by which it is conditioned; 0 for none. Default 0.
        levels: codes a sample can have. Default 256.
        sample_rate: samples a second of what it is trained on. Default 8000.
        quantization: what a code means, see `statescan.data.audio.QUANTIZATIONS`. Default "mu-law".

    Raises:
        ConfigError: a field is out of range.
    """

    stages: tuple[str, ...] = ("s4", "s4", "mamba")
    d_model: int = 64
    n_layer: int = 4
    pool: int = 4
    widen: int = 2
    d_state: int = 64
    d_state_mamba: int = 16
    d_mlp: int = 2
    dropout: float = 0.0
    classes: int = 0
    levels: int = 256
    sample_rate: int = 8000
    quantization: str = "mu-law"

    def __post_init__(self) -> None:
        # A list, as JSON has it, is taken too.
        object.__setattr__(self, "stages", tuple(self.stages))
        known = len(self.stages) > 0 and all(kind in STAGES for kind in self.stages)
        self._want("stages", known, f"one or more of {', '.join(STAGES)}")
        for name in ("d_model", "n_layer", "widen", "d_state", "d_state_mamba", "d_mlp", "sample_rate"):
            self._want(name, getattr(self, name) >= 1, "at least 1")
        self._want("pool", self.pool >= 2, "at least 2")
        self._want("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self._want("classes", self.classes >= 0, "at least 0")
        self._want("levels", self.levels >= 2, "at least 2")
        self._want("quantization", self.quantization in ("mu-law", "linear"), "'mu-law' or 'linear'")

    def _want(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ConfigError(f"WaveformConfig: {name} must be {wanted}, got {getattr(self, name)!r}")

    @property
    def period(self) -> int:
        """Samples after which every stage is at the same point of its pooling again."""
        return self.pool ** (len(self.stages) - 1)

    @property
    def silence(self) -> int:
        """The code of silence, which is also what stands before the first sample."""
        return self.levels // 2

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values that json can write."""
        return {**dataclasses.asdict(self), "stages": list(self.stages)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> WaveformConfig:
        """Makes a configuration from named fields; ConfigError names one that is unknown."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"WaveformConfig: unknown field {unknown[0]!r}; known are {sorted(known)}")
        return cls(**fields)


def check_below(name: str, values: Tensor, count: int) -> None:
    """Integers in [0, count), or a ShapeError or DTypeError; what lies on another device is not looked at, which would
    wait for it."""
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        cure = "quantise the samples first" if name == "codes" else "pass their numbers"
        raise DTypeError(f"WaveformModel: {name} must be integers, got {values.dtype}; {cure}")
    if values.device.type == "cpu" and type(values) is Tensor and values.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high >= count:
            raise ShapeError(f"WaveformModel: {name} must be in [0, {count}), got {low} to {high}")


class StageState(NamedTuple):
    """What a stage keeps of the samples before.

    before, after: of the layers before the pooling and after it.
    waiting: (batch, 0 .. pool - 1, d_model), what is not yet a whole group for the stage inside; None in the centre.
    held: (batch, 1 .. pool, d_model), what came from inside for the samples to come; None in the centre.
    """

    before: tuple[Any, ...]
    after: tuple[Any, ...]
    waiting: Tensor | None
    held: Tensor | None


class WaveformOutput(NamedTuple):
    """logits: (batch, length, levels) of the sample after each, or (batch, levels) of a step; loss: mean negative
    log-likelihood in nats, None without targets; state: one `StageState` a stage, None unless one went in."""

    logits: Tensor
    loss: Tensor | None
    state: tuple[StageState, ...] | None


class _Block(nn.Module):
    """``x + mixer(norm(x))``, then where the kind has it ``x + mlp(norm(x))``."""

    def __init__(self, config: WaveformConfig, kind: str, d_model: int, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mixer = STAGES[kind](config, d_model, layer)
        self.norm_mlp = nn.LayerNorm(d_model) if kind in _WITH_MLP else None
        self.mlp = MLP(d_model, config.d_mlp * d_model) if kind in _WITH_MLP else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: Any, given: dict[str, Any]) -> tuple[Tensor, Any]:
        mixed = self.mixer(self.norm(x), state, **given)
        return self._mlp(x + self.dropout(mixed.output)), mixed.state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed = self.mixer.step(self.norm(x), state)  # type: ignore[operator]
        return self._mlp(x + self.dropout(mixed.output)), mixed.state

    def _mlp(self, x: Tensor) -> Tensor:
        if self.mlp is None or self.norm_mlp is None:
            return x
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class _Stage(nn.Module):
    """Blocks at one rate, and the way to the next stage inside and back."""

    def __init__(self, config: WaveformConfig, number: int) -> None:
        super().__init__()
        self.kind = config.stages[number]
        self.d_model = config.d_model * config.widen**number
        inside = self.d_model * config.widen
        centre = number == len(config.stages) - 1
        self.pool = config.pool

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(_Block(config, self.kind, self.d_model, layer) for layer in range(count))

        self.before = blocks(config.n_layer)
        self.after = blocks(0 if centre else config.n_layer)
        self.down = None if centre else nn.Linear(self.pool * self.d_model, inside)
        self.up = None if centre else nn.Linear(inside, self.pool * self.d_model)

    def init_state(self, batch: int) -> StageState:
        before = tuple(block.mixer.init_state(batch) for block in self.before)  # type: ignore[operator]
        if self.up is None:
            return StageState(before, (), None, None)
        after = tuple(block.mixer.init_state(batch) for block in self.after)  # type: ignore[operator]
        first = self.first(batch)
        return StageState(before, after, first[:, :0], first)

    def first(self, batch: int) -> Tensor:
        """What stands for the group before the first one: the way back of zeros."""
        assert self.up is not None
        return self.up.bias.view(1, self.pool, self.d_model).expand(batch, -1, -1)

    def kernels(self, length: int) -> list[dict[str, Any]]:
        """What each of its layers takes besides its input: of convolutions their kernels, all made at once."""
        blocks = [*self.before, *self.after]
        if self.kind not in _CONVOLVED:
            return [{}] * len(blocks)
        return [{"kernels": made} for made in joint_kernels([block.mixer for block in blocks], length)]  # type: ignore[misc]

    def pooled(self, groups: Tensor) -> Tensor:
        """(..., pool * d_model) to the width of the stage inside."""
        assert self.down is not None
        return self.down(groups)

    def spread(self, x: Tensor) -> Tensor:
        """(batch, groups, width inside) to (batch, groups * pool, d_model)."""
        assert self.up is not None
        return self.up(x).reshape(x.shape[0], x.shape[1] * self.pool, self.d_model)


class WaveformModel(nn.Module):
    """Gives for each sample the distribution of the next, from all samples before it.

    Stage i runs once for every pool^i samples. Going in, a stage's blocks are followed by a linear map of each `pool`
    neighbours to one vector of the next stage; coming back, each vector is mapped to `pool` and added to what stood
    there (the skip), one group later: the vector made of samples k pool .. k pool + pool - 1 helps with those after.
    So nothing looks ahead, and a step costs the same for every sample: a stage inside rests until its group is full.

    Args:
        config: see `WaveformConfig`.
        device: where parameters are made. They are float32; lower precision comes by autocast.

    Source: Goel et al., "It's Raw! Audio Generation with State-Space Models" (2022), arXiv:2202.09729, section 4, in
    the form with blocks on both sides of the pooling; Mamba in its stages: Gu and Dao (2023), section 4.4.
    """

    def __init__(self, config: WaveformConfig, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.levels, config.d_model)
        self.class_embedding = Embedding(config.classes, config.d_model) if config.classes else None
        self.stages = nn.ModuleList(_Stage(config, number) for number in range(len(config.stages)))
        self.norm_f = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.levels)
        self.to(device)

    def init_state(self, batch: int) -> tuple[StageState, ...]:
        """The state before the first sample, of `batch` rows."""
        return tuple(stage.init_state(batch) for stage in self._stages())

    def forward(
        self,
        codes: Tensor,
        labels: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        state: tuple[StageState, ...] | None = None,
    ) -> WaveformOutput:
        """Runs rows of samples.

        Args:
            codes: (batch, length), integers below `levels`. Before a row's first sample stands ``config.silence``, so a
                row that is judged whole goes in as that and all but its last sample.
            labels: (batch,) below `classes`, where the model is conditioned.
            targets: (batch, length), the sample after each; -100 where it is not judged. Default: no loss.
            state: what `init_state`, `forward` or `step` gave. Default: no sample came before, and no state comes out.

        Returns:
            WaveformOutput.

        Raises:
            ShapeError, DTypeError: an argument doesn't fit.
            ConfigError: labels that the model has no use for, or that it lacks.
        """
        if codes.dim() != 2 or 0 in codes.shape:
            raise ShapeError(f"WaveformModel: codes must be (batch, length >= 1), got {tuple(codes.shape)}")
        x, after = self._through(0, self._embed(codes, labels), state)
        logits = self.head(self.norm_f(x))
        loss = None
        if targets is not None:
            if targets.shape != codes.shape:
                raise ShapeError(
                    f"WaveformModel: targets must be (batch, length) = {tuple(codes.shape)}, got {tuple(targets.shape)}"
                )
            loss = F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
                                   targets.flatten().long(), ignore_index=-100)  # fmt: skip
        return WaveformOutput(logits, loss, after)

    def step(self, codes: Tensor, state: tuple[StageState, ...], labels: Tensor | None = None) -> WaveformOutput:
        """One more sample of each row: codes (batch,); the same numbers as `forward` gives."""
        if codes.dim() != 1 or 0 in codes.shape:
            raise ShapeError(f"WaveformModel.step: codes must be (batch,), got {tuple(codes.shape)}")
        x, after = self._step(0, self._embed(codes, labels), state)
        return WaveformOutput(self.head(self.norm_f(x)), None, after)

    def _stages(self) -> list[_Stage]:
        return list(self.stages)  # pyright: ignore[reportReturnType]

    def _embed(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        if (labels is None) != (self.class_embedding is None):
            wanted = f"(batch,) labels below {self.config.classes}" if self.config.classes else "no labels"
            got = "none" if labels is None else "some"
            raise ConfigError(f"WaveformModel: wanted {wanted}, as it was made with, got {got}")
        check_below("codes", codes, self.config.levels)
        x = self.embedding(codes.long())
        if labels is None or self.class_embedding is None:
            return x
        if tuple(labels.shape) != (codes.shape[0],):
            raise ShapeError(f"WaveformModel: labels must be (batch,) = ({codes.shape[0]},), got {tuple(labels.shape)}")
        check_below("labels", labels, self.config.classes)
        known = self.class_embedding(labels.long())
        return x + (known.unsqueeze(1) if codes.dim() == 2 else known)

    def _through(
        self, number: int, x: Tensor, states: tuple[StageState, ...] | None
    ) -> tuple[Tensor, tuple[StageState, ...] | None]:
        """Stage `number` and those inside of it over x (batch, length, width), and their states after it."""
        stage = self._stages()[number]
        state = None if states is None else states[0]
        batch, length, width = x.shape
        given = stage.kernels(length)
        after_before, after_after = [], []
        for layer, block in enumerate(stage.before):
            x, one = block(x, None if state is None else state.before[layer], given[layer])
            after_before.append(one)
        if stage.down is None:
            return x, None if states is None else (StageState(tuple(after_before), (), None, None),)
        inside = None if states is None else states[1:]
        if state is None:
            joined, held = x, stage.first(batch).to(x.dtype)
        else:
            assert state.waiting is not None
            assert state.held is not None
            joined, held = torch.cat([state.waiting.to(x.dtype), x], 1), state.held.to(x.dtype)
        groups = joined.shape[1] // stage.pool
        if groups:
            grouped = joined[:, : groups * stage.pool].reshape(batch, groups, stage.pool * width)
            inner, inside = self._through(number + 1, stage.pooled(grouped), inside)
            held = torch.cat([held, stage.spread(inner).to(x.dtype)], 1)
        x = x + held[:, :length]
        for layer, block in enumerate(stage.after):
            x, one = block(x, None if state is None else state.after[layer], given[len(stage.before) + layer])
            after_after.append(one)
        if states is None:
            return x, None
        assert inside is not None
        own = StageState(tuple(after_before), tuple(after_after), joined[:, groups * stage.pool :], held[:, length:])
        return x, (own, *inside)

    def _step(self, number: int, x: Tensor, states: tuple[StageState, ...]) -> tuple[Tensor, tuple[StageState, ...]]:
        """As `_through`, for one vector a row, (batch, width): the stage inside moves when its group is full."""
        stage, state, inside = self._stages()[number], states[0], states[1:]
        after_before, after_after = [], []
        for block, one in zip(stage.before, state.before, strict=True):
            x, one = block.step(x, one)  # type: ignore[operator]
            after_before.append(one)
        if stage.down is None:
            return x, (StageState(tuple(after_before), (), None, None),)
        assert state.waiting is not None
        assert state.held is not None
        waiting = torch.cat([state.waiting.to(x.dtype), x.unsqueeze(1)], 1)
        x, held = x + state.held[:, 0].to(x.dtype), state.held[:, 1:]
        if waiting.shape[1] == stage.pool:
            inner, inside = self._step(number + 1, stage.pooled(waiting.flatten(1)), inside)
            waiting, held = waiting[:, :0], stage.spread(inner.unsqueeze(1))
        for block, one in zip(stage.after, state.after, strict=True):
            x, one = block.step(x, one)  # type: ignore[operator]
            after_after.append(one)
        return x, (StageState(tuple(after_before), tuple(after_after), waiting, held), *inside)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes config.json and the weights into a folder, whole or not at all."""
        return save_own(folder, _ARCHITECTURE, self.config.to_dict(), self)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, device: torch.device | str | None = None
    ) -> WaveformModel:
        """Reads what `save_pretrained` wrote.

        Raises:
            CheckpointError: the folder is no such model's, or a file in it is missing, cut short or of another shape.
        """
        model = cls(WaveformConfig.from_dict(own_config(folder, _ARCHITECTURE)))
        load_own_weights(model, folder)
        return model.to(device)
