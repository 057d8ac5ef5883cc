"""Configurations of the models that Mamba is judged against: Transformer, LSTM and GRU, dilated convolutions, S4."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from statescan.errors import ConfigError
from statescan.models.config import MambaConfig

__all__ = [
    "FAMILIES",
    "BaselineConfig",
    "ConvConfig",
    "ModelConfig",
    "RecurrentConfig",
    "S4Config",
    "TransformerConfig",
    "config_from_dict",
    "mamba_config",
]

_Own = TypeVar("_Own", bound="BaselineConfig")


@dataclass(frozen=True, slots=True)
class BaselineConfig:
    """What the configurations of all baselines share.

    Args:
        d_model: width of the residual stream.
        n_layer: number of blocks.
        vocab_size: number of token ids; the embedding has `padded_vocab_size` rows.
        d_intermediate: width inside the MLP of every block; 0 for blocks without one, None for the MLP's own default
            (4 d_model, or 8/3 d_model with a gate). Default None.
        mlp: "gated" (SwiGLU) or "gelu". Default "gated".
        norm: "rms" or "layer". Default "rms".
        norm_epsilon: added to the mean square in every norm. Default 1e-5.
        residual_in_fp32: keep the residual stream in float32 where activations are narrower. Default True.
        pad_vocab_size_multiple: the embedding's rows are a multiple of this. Default 8.
        tie_embeddings: lm_head shares the embedding's weight. Default True.
        init: initial values of the matrices, see `statescan.models.baselines`: "depth" or "neox". Default "depth".
        initializer_range: standard deviation of initial values. Default 0.02.
        dropout: share of each branch's output that is dropped before it joins the residual stream, in training.
            Default 0.
        embedding_dropout: the same for the embedding. Default 0.
        recompute: what the backward pass computes again instead of keeping it: "none", or "block", everything but each
            block's input. Gradients are the same to the bit. Default "none".

    Raises:
        ConfigError: a field is out of range or of the wrong kind.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_intermediate: int | None = None
    mlp: str = "gated"
    norm: str = "rms"
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    init: str = "depth"
    initializer_range: float = 0.02
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    recompute: str = "none"

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            self._want(name, self._is_int(name) and getattr(self, name) >= 1, "an integer >= 1")
        self._want(
            "d_intermediate",
            self.d_intermediate is None or (self._is_int("d_intermediate") and self.d_intermediate >= 0),
            "None or an integer >= 0",
        )
        self._among("mlp", "gated", "gelu")
        self._among("norm", "rms", "layer")
        self._among("init", "depth", "neox")
        self._among("recompute", "none", "block")
        for name in ("norm_epsilon", "initializer_range"):
            self._want(name, self._is_number(name) and getattr(self, name) >= 0, "a number >= 0")
        for name in ("dropout", "embedding_dropout"):
            self._want(name, self._is_number(name) and 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        for name in ("residual_in_fp32", "tie_embeddings"):
            self._want(name, isinstance(getattr(self, name), bool), "True or False")

    def _want(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ConfigError(
                f"{type(self).__name__}: {name} must be {wanted}, got {getattr(self, name)!r}; "
                "the presets (statescan.models.PRESETS) show working values"
            )

    def _among(self, name: str, *choices: str) -> None:
        self._want(name, getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}")

    def _is_int(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, int) and not isinstance(value, bool)

    def _is_number(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of pad_vocab_size_multiple."""
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @property
    def is_plain_mamba(self) -> bool:
        """False: kernels over a whole Mamba layer, and what looks at its selection, have nothing to run here."""
        return False

    @property
    def mlp_width(self) -> int:
        """Width inside the MLP, 0 where there is none."""
        if self.d_intermediate is not None:
            return self.d_intermediate
        return 4 * self.d_model if self.mlp == "gelu" else -(-8 * self.d_model // (3 * 64)) * 64

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values that json can write; "family" names the class."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_Own], fields: Mapping[str, Any]) -> _Own:
        """Makes a configuration from named fields.

        Raises:
            ConfigError: a field is unknown, missing or out of range.
        """
        cls._check_names(fields)
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in fields]
        if missing:
            raise ConfigError(
                f"{cls.__name__}: {', '.join(missing)} must be given, got {sorted(fields)}; add what is missing"
            )
        return cls(**fields)

    def replace(self: _Own, **fields: Any) -> _Own:
        """The same configuration with some fields changed.

        Raises:
            ConfigError: a field is unknown or out of range.
        """
        self._check_names(fields)
        return dataclasses.replace(self, **fields)

    @classmethod
    def _check_names(cls, fields: Mapping[str, Any]) -> None:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                cure = f"did you mean '{near[0]}'?" if near else "leave it out"
                raise ConfigError(f"{cls.__name__}: a field must be one of {', '.join(known)}, got '{name}'; {cure}")


@dataclass(frozen=True, slots=True)
class TransformerConfig(BaselineConfig):
    """A Transformer: Transformer++ (the defaults: rotary, SwiGLU, RMSNorm, no biases), Pythia, or what lies between.

    Args:
        n_head: number of heads. Default: d_model / 64.
        n_kv_head: heads of keys and values, each shared by n_head / n_kv_head heads. Default: n_head.
        positions: "rotary", "xpos" (rotary, and a decay with distance), "absolute" (learned, added to the embedding) or
            "none". Default "rotary".
        max_positions: rows of the table of absolute positions. Default 2048.
        rotary_fraction: part of each head that is turned; Pythia turns 0.25. Default 1.
        rotary_base: wave length of the slowest turn, over 2 pi. Default 10,000.
        bias: projections and MLPs have biases. Default False.
        parallel: attention and MLP read the same stream and are added together, as in GPT-NeoX. Default False.
        attention_dropout: share of the attention's weights that are dropped in training. Default 0.
        (others): see `BaselineConfig`.

    Source: Gu and Dao (2023), appendix E.2: "Transformer++"; Biderman et al. (2023), arXiv:2304.01373: Pythia.
    """

    n_head: int | None = None
    n_kv_head: int | None = None
    positions: str = "rotary"
    max_positions: int = 2048
    rotary_fraction: float = 1.0
    rotary_base: float = 10_000.0
    bias: bool = False
    parallel: bool = False
    attention_dropout: float = 0.0
    family: Literal["transformer"] = "transformer"

    def __post_init__(self) -> None:
        BaselineConfig.__post_init__(self)
        self._want("family", self.family == "transformer", "'transformer'")
        self._want("d_intermediate", self.mlp_width > 0, "None or an integer >= 1")
        for name in ("n_head", "n_kv_head"):
            value = getattr(self, name)
            self._want(name, value is None or (self._is_int(name) and value >= 1), "None or an integer >= 1")
        self._want("n_head", self.d_model % self.heads == 0, f"a divisor of d_model = {self.d_model}")
        self._want("n_kv_head", self.heads % self.kv_heads == 0, f"a divisor of n_head = {self.heads}")
        self._among("positions", "rotary", "xpos", "absolute", "none")
        self._want("max_positions", self._is_int("max_positions") and self.max_positions >= 1, "an integer >= 1")
        self._want(
            "rotary_fraction",
            self._is_number("rotary_fraction") and 0 < self.rotary_fraction <= 1,
            "a number in (0, 1]",
        )
        self._want("rotary_base", self._is_number("rotary_base") and self.rotary_base > 1, "a number > 1")
        for name in ("bias", "parallel"):
            self._want(name, isinstance(getattr(self, name), bool), "True or False")
        self._want(
            "attention_dropout",
            self._is_number("attention_dropout") and 0 <= self.attention_dropout < 1,
            "a number in [0, 1)",
        )

    @property
    def heads(self) -> int:
        """Number of heads."""
        return max(1, self.d_model // 64) if self.n_head is None else self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.heads if self.n_kv_head is None else self.n_kv_head


@dataclass(frozen=True, slots=True)
class RecurrentConfig(BaselineConfig):
    """Blocks of norm and LSTM or GRU around a residual stream.

    Args:
        cell: "lstm" or "gru". Default "lstm".
        d_hidden: width of the state. Default: d_model.
        bias: the gates have biases. Default True.
        d_intermediate: 0, no MLP, by default.
        (others): see `BaselineConfig`.
    """

    d_intermediate: int | None = 0
    cell: str = "lstm"
    d_hidden: int | None = None
    bias: bool = True
    family: Literal["recurrent"] = "recurrent"

    def __post_init__(self) -> None:
        BaselineConfig.__post_init__(self)
        self._want("family", self.family == "recurrent", "'recurrent'")
        self._among("cell", "lstm", "gru")
        self._want(
            "d_hidden",
            self.d_hidden is None or (self._is_int("d_hidden") and self.d_hidden >= 1),
            "None or an integer >= 1",
        )
        self._want("bias", isinstance(self.bias, bool), "True or False")

    @property
    def hidden(self) -> int:
        """Width of the state."""
        return self.d_model if self.d_hidden is None else self.d_hidden


@dataclass(frozen=True, slots=True)
class ConvConfig(BaselineConfig):
    """WaveNet's gated dilated causal convolutions, with norms, around a residual stream.

    Args:
        width: taps of a layer. Default 2.
        dilations: layers after which the dilations 1, 2, 4, ... begin anew. Default 10.
        bias: the filters have biases. Default True.
        d_intermediate: 0, no MLP, by default.
        (others): see `BaselineConfig`.

    Source: van den Oord et al. (2016), arXiv:1609.03499.
    """

    d_intermediate: int | None = 0
    width: int = 2
    dilations: int = 10
    bias: bool = True
    family: Literal["conv"] = "conv"

    def __post_init__(self) -> None:
        BaselineConfig.__post_init__(self)
        self._want("family", self.family == "conv", "'conv'")
        for name in ("width", "dilations"):
            self._want(name, self._is_int(name) and getattr(self, name) >= 1, "an integer >= 1")
        self._want("bias", isinstance(self.bias, bool), "True or False")

    def dilation(self, layer: int) -> int:
        """Distance between the taps of a layer."""
        return 2 ** (layer % self.dilations)

    @property
    def reach(self) -> int:
        """How many positions back the model sees."""
        return sum((self.width - 1) * self.dilation(layer) for layer in range(self.n_layer))


@dataclass(frozen=True, slots=True)
class S4Config(BaselineConfig):
    """Blocks of S4 or S4D and an MLP, as in S4's language model: a Transformer with S4 in attention's place.

    Args:
        mixer: "s4" or "s4d". Default "s4d".
        d_state: size of the state of a channel, even. Default 64.
        dt_min: smallest initial step size. Default 0.001.
        dt_max: largest initial step size. Default 0.1.
        (others): see `BaselineConfig`.

    Source: Gu, Goel and Re (2021), arXiv:2111.00396, section 4.3 and appendix D.3.
    """

    mixer: str = "s4d"
    d_state: int = 64
    dt_min: float = 0.001
    dt_max: float = 0.1
    family: Literal["s4"] = "s4"

    def __post_init__(self) -> None:
        BaselineConfig.__post_init__(self)
        self._want("family", self.family == "s4", "'s4'")
        self._among("mixer", "s4", "s4d")
        self._want(
            "d_state", self._is_int("d_state") and self.d_state >= 2 and self.d_state % 2 == 0, "an even integer >= 2"
        )
        for name in ("dt_min", "dt_max"):
            self._want(name, self._is_number(name) and getattr(self, name) > 0, "a number > 0")
        self._want("dt_max", self.dt_max >= self.dt_min, f"at least dt_min = {self.dt_min}")


ModelConfig = MambaConfig | TransformerConfig | RecurrentConfig | ConvConfig | S4Config
FAMILIES: dict[str, type[BaselineConfig]] = {
    "transformer": TransformerConfig,
    "recurrent": RecurrentConfig,
    "conv": ConvConfig,
    "s4": S4Config,
}


def mamba_config(caller: str, config: ModelConfig) -> MambaConfig:
    """The configuration, where it is Mamba's.

    Raises:
        ConfigError: another family's.
    """
    if isinstance(config, BaselineConfig):  # a drop-in's own configuration of a Mamba gives the same fields
        raise ConfigError(f"{caller}: model must be a Mamba, got one of {type(config).__name__}; take another preset")
    return config


def config_from_dict(fields: Mapping[str, Any]) -> ModelConfig:
    """The configuration that named fields tell: of the class that "family" names, of `MambaConfig` without it.

    Raises:
        ConfigError: an unknown family; a field is unknown, missing or out of range.
    """
    if "family" not in fields:
        return MambaConfig.from_dict(fields)
    family = FAMILIES.get(fields["family"])
    if family is None:
        raise ConfigError(
            f"model: family must be one of {', '.join(FAMILIES)}, got {fields['family']!r}; a Mamba has none"
        )
    return family.from_dict(fields)  # type: ignore[return-value]
