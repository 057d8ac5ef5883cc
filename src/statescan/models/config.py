"""The configuration of a Mamba language model: a frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from statescan.errors import ConfigError
from statescan.nn.inner_maps import SELECTIVE, check_choice, selected, state_size

__all__ = ["MambaConfig"]

_RECOMPUTE = ("none", "cheap", "block")


@dataclass(frozen=True, slots=True)
class MambaConfig:
    """What a `CausalLM` is made of; field names as published.

    Args:
        d_model: width of the residual stream.
        n_layer: number of blocks.
        vocab_size: number of token ids; the embedding has `padded_vocab_size` rows.
        d_state: numbers of state a channel. Default 16.
        d_conv: width of the convolution. Default 4.
        expand: d_inner = expand * d_model. Default 2.
        dt_rank: rank of the step projection, or "auto" for ceil(d_model / 16), or "none": the step does not depend on
            the input, as `selective` without "dt". Default "auto".
        dt_min: smallest initial step size. Default 0.001.
        dt_max: largest initial step size. Default 0.1.
        dt_init: "random" or "constant". Default "random".
        dt_scale: factor on the initial step projection. Default 1.
        dt_init_floor: initial step sizes are at least this. Default 1e-4.
        conv_bias: the convolution has a bias. Default True.
        bias: in_proj and out_proj have biases. Default False.
        mixer_rms_eps: FalconMamba's variant: dt, B and C of every layer are divided by their root mean square, with
            this added to the mean square. Default None: Mamba.
        block: what stands around the inner map: "mamba", a convolution before it and a gate after; "h3", two products;
            "ungated", the convolution alone; see `statescan.nn.Mamba`. Default "mamba".
        inner: the inner map: "s6"; "s4", "s4d" (complex), "s4d-real", which don't select; "none". Default "s6".
        selective: which of "B,C,dt" depend on the input in S6, or "none". Default "B,C,dt".
        A_init: A of S6 at the start: "s4d-real", -(n + 1); "constant", -1/2; "random", -exp(N(0, 1)); "s4d-lin",
            -1/2 + n i, complex for good, with d_state / 2 conjugate pairs. Default "s4d-real".
        norm_epsilon: added to the mean square in every norm. Default 1e-5.
        residual_in_fp32: keep the residual stream in float32 where activations are narrower. Default True.
        pad_vocab_size_multiple: the embedding's rows are a multiple of this. Default 8.
        tie_embeddings: lm_head shares the embedding's weight. Default True.
        initializer_range: standard deviation of the initial embedding. Default 0.02.
        rescale_prenorm_residual: divide each out_proj's initial weight by sqrt(n_layer). Default True.
        dropout: share of each block's output that is dropped before it joins the residual stream, in training.
            Default 0.
        embedding_dropout: the same for the embedding. Default 0.
        recompute: what the backward pass computes again instead of keeping: "none"; "cheap", all that is no large
            matrix product (norms, convolution, small projections, scan); "block", everything but each block's input.
            Gradients are the same to the bit. Default "none".

    Raises:
        ConfigError: a field is out of range or of the wrong kind.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    mixer_rms_eps: float | None = None
    block: str = "mamba"
    inner: str = "s6"
    selective: str = "B,C,dt"
    A_init: str = "s4d-real"
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    recompute: str = "none"

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "pad_vocab_size_multiple"):
            self._want(name, _is_int(self, name) and getattr(self, name) >= 1, "an integer >= 1")
        self._want(
            "dt_rank",
            self.dt_rank in ("auto", "none") or (_is_int(self, "dt_rank") and int(self.dt_rank) >= 1),
            "'auto', 'none' or >= 1",
        )
        self._want("dt_init", self.dt_init in ("random", "constant"), "'random' or 'constant'")
        for name in ("dt_min", "dt_max", "dt_scale", "dt_init_floor"):
            self._want(name, _is_number(self, name) and getattr(self, name) > 0, "a number > 0")
        self._want("dt_max", self.dt_max >= self.dt_min, f"at least dt_min = {self.dt_min}")
        for name in ("norm_epsilon", "initializer_range"):
            self._want(name, _is_number(self, name) and getattr(self, name) >= 0, "a number >= 0")
        self._want(
            "mixer_rms_eps",
            self.mixer_rms_eps is None or (_is_number(self, "mixer_rms_eps") and self.mixer_rms_eps >= 0),
            "None or a number >= 0",
        )
        for name in ("conv_bias", "bias", "residual_in_fp32", "tie_embeddings", "rescale_prenorm_residual"):
            self._want(name, isinstance(getattr(self, name), bool), "True or False")
        check_choice(
            "MambaConfig",
            block=self.block,
            inner=self.inner,
            selective=self.selective,
            A_init=self.A_init,
            d_state=self.d_state,
            dt_rank=self.dt_rank,
            mixer_rms_eps=self.mixer_rms_eps,
        )
        for name in ("dropout", "embedding_dropout"):
            self._want(name, _is_number(self, name) and 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._want("recompute", self.recompute in _RECOMPUTE, f"one of {', '.join(map(repr, _RECOMPUTE))}")

    def _want(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ConfigError(
                f"MambaConfig: {name} must be {wanted}, got {getattr(self, name)!r}; "
                "the presets (statescan.models.PRESETS) show working values"
            )

    @property
    def d_inner(self) -> int:
        """Channels of the convolution and the scan."""
        return self.expand * self.d_model

    @property
    def dt_rank_size(self) -> int:
        """The rank of the step projection as a number, 0 where the step does not depend on the input."""
        if "dt" not in self.selected:
            return 0
        return math.ceil(self.d_model / 16) if isinstance(self.dt_rank, str) else self.dt_rank

    @property
    def selected(self) -> frozenset[str]:
        """Which of B, C and dt depend on the input."""
        chosen = selected(self.selective) if self.inner == "s6" else frozenset[str]()
        return chosen - {"dt"} if self.dt_rank == "none" else chosen

    @property
    def state_size(self) -> tuple[int, bool]:
        """(numbers in a channel's state, whether they are complex)."""
        return state_size(self.inner, self.A_init, self.d_state)

    @property
    def is_plain_mamba(self) -> bool:
        """Every layer is the published one, whatever its initial values: what the packed form of a model for inference,
        the kernels over a whole layer and the published layouts know."""
        return (
            self.block == "mamba"
            and self.inner == "s6"
            and self.selected == frozenset(SELECTIVE)
            and not self.state_size[1]
        )

    @property
    def packs_on_device(self) -> bool:
        """Packed sequences are taken without the host's looking at where they start: by all but the convolutions over
        whole sequences."""
        return self.inner in ("s6", "none")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of pad_vocab_size_multiple."""
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values that json can write."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MambaConfig:
        """Makes a configuration from named fields.

        Raises:
            ConfigError: a field is unknown, missing or out of range.
        """
        _check_names(fields)
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in fields]
        if missing:
            raise ConfigError(
                f"MambaConfig: {', '.join(missing)} must be given, got {sorted(fields)}; add what is missing"
            )
        return cls(**fields)

    def replace(self, **fields: Any) -> MambaConfig:
        """The same configuration with some fields changed.

        Raises:
            ConfigError: a field is unknown or out of range.
        """
        _check_names(fields)
        return dataclasses.replace(self, **fields)


def _check_names(fields: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(MambaConfig)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            cure = f"did you mean '{near[0]}'?" if near else "leave it out"
            raise ConfigError(f"MambaConfig: a field must be one of {', '.join(known)}, got '{name}'; {cure}")


def _is_int(config: MambaConfig, name: str) -> bool:
    value = getattr(config, name)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(config: MambaConfig, name: str) -> bool:
    value = getattr(config, name)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
