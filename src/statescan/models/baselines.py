"""The blocks of the models that Mamba is judged against: attention, LSTM and GRU, dilated convolution, S4.

Each is called as Mamba's block is, so that `CausalLM` is made of any of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statescan.errors import ShapeError
from statescan.models.baseline_config import (
    BaselineConfig,
    ConvConfig,
    RecurrentConfig,
    S4Config,
    TransformerConfig,
)
from statescan.nn import GRU, LSTM, MLP, CausalSelfAttention, DilatedConv, GatedMLP, LayerNorm, RMSNorm
from statescan.nn.attention import AttentionState
from statescan.nn.inner_maps import linear_map, run_linear, step_linear
from statescan.nn.s4 import LinearLayerOutput
from statescan.ops import AddNormOutput

__all__ = ["BaselineBlock", "Positions", "S4Mixer", "make_norm"]


def make_norm(
    config: BaselineConfig, *, backend: str, device: torch.device | str | None, dtype: torch.dtype | None
) -> RMSNorm | LayerNorm:
    """A norm of the configured kind."""
    if config.norm == "layer":
        return LayerNorm(config.d_model, config.norm_epsilon, device=device, dtype=dtype)
    return RMSNorm(config.d_model, config.norm_epsilon, backend=backend, device=device, dtype=dtype)


class S4Mixer(nn.Module):
    """S4 or S4D, GELU, then every channel from all of them through a gated linear unit; packed sequences too.

    Args:
        config: of the model.
        backend: as in `statescan.ops.s4_kernel`.
        device, dtype: of the parameters; those of the system stay float32, float64 beside float64.
    """

    def __init__(
        self, config: S4Config, *, backend: str, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        exact = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.ssm = linear_map(
            config.mixer, config.d_model, config.d_state, config.dt_min, config.dt_max, backend,
            device=device, dtype=exact,
        )  # fmt: skip
        self.output_linear = nn.Linear(config.d_model, 2 * config.d_model, device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Zeros (batch, d_model, states) in the system's precision, whatever the activations'."""
        return self.ssm.init_state(batch, device=device)

    def forward(self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> LinearLayerOutput:
        """Runs whole sequences; arguments as in the other layers, x (batch, length, d_model)."""
        y, after = run_linear(self.ssm, x, state, cu_seqlens)
        return LinearLayerOutput(self._mix(y), after)

    def step(self, x: Tensor, state: Tensor) -> LinearLayerOutput:
        """One position: x (batch, d_model)."""
        y, after = step_linear(self.ssm, x, state)
        return LinearLayerOutput(self._mix(y), after)

    def _mix(self, y: Tensor) -> Tensor:
        return F.glu(self.output_linear(self.dropout(F.gelu(y))), dim=-1)


def _mixer(
    config: BaselineConfig, layer: int, backend: str, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    if isinstance(config, TransformerConfig):
        return CausalSelfAttention(
            config.d_model,
            config.heads,
            n_kv_head=config.kv_heads,
            positions="none" if config.positions == "absolute" else config.positions,
            rotary_fraction=config.rotary_fraction,
            rotary_base=config.rotary_base,
            bias=config.bias,
            dropout=config.attention_dropout,
            **factory,
        )
    if isinstance(config, RecurrentConfig):
        kind = LSTM if config.cell == "lstm" else GRU
        return kind(config.d_model, config.hidden, bias=config.bias, **factory)
    if isinstance(config, ConvConfig):
        return DilatedConv(
            config.d_model, width=config.width, dilation=config.dilation(layer), bias=config.bias, **factory
        )
    assert isinstance(config, S4Config)
    return S4Mixer(config, backend=backend, **factory)


class BaselineBlock(nn.Module):
    """One layer of the residual stream: add, norm, mix, and an MLP where there is one.

    Recurrence over layers::

        residual = residual + x
        m        = mixer(norm(residual))
        x        = m + mlp(norm_mlp(residual))                                   (parallel)
        residual = residual + m,  x = mlp(norm_mlp(residual))                    (else; without an MLP x = m)

    Args:
        config: of the model.
        layer: its number, from 0.
        backend: as in `statescan.ops`. Default "auto".
        device: where parameters are made. Default: torch's.
        dtype: of the parameters. Default: torch's.
    """

    def __init__(
        self,
        config: BaselineConfig,
        layer: int,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.recompute, self.residual_in_fp32 = config.recompute, config.residual_in_fp32
        self.dropout = config.dropout
        self.parallel = isinstance(config, TransformerConfig) and config.parallel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = make_norm(config, backend=backend, **factory)
        self.mixer: Any = _mixer(config, layer, backend, device, dtype)
        self.norm_mlp, self.mlp = None, None
        if config.mlp_width:
            self.norm_mlp = make_norm(config, backend=backend, **factory)
            bias = isinstance(config, TransformerConfig) and config.bias
            kind = MLP if config.mlp == "gelu" else GatedMLP
            self.mlp = kind(config.d_model, config.mlp_width, bias=bias, **factory)

    def forward(
        self, x: Tensor, residual: Tensor | None, state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """Runs the block over (batch, length, d_model); gives (x, residual, state after the last token)."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._run(x, residual, state, cu_seqlens)
        return checkpoint(self._run, x, residual, state, cu_seqlens, use_reentrant=False, preserve_rng_state=True)

    def step(self, x: Tensor, residual: Tensor | None, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Runs the block over one token, (batch, d_model)."""
        normed, stream = self._add_norm(self.norm, x, residual)
        mixed = self.mixer.step(normed, state)
        x, stream = self._through_mlp(mixed.output, stream)
        return x, stream, mixed.state

    def init_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
        """The state before the first token."""
        return self.mixer.init_state(batch, device=device, dtype=dtype)

    def _run(
        self, x: Tensor, residual: Tensor | None, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        normed, stream = self._add_norm(self.norm, x, residual)
        mixed = self.mixer(normed, state, cu_seqlens=cu_seqlens)
        x, stream = self._through_mlp(mixed.output, stream)
        return x, stream, mixed.state

    def _through_mlp(self, mixed: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """(x, residual) from the mixer's output and the stream that it read."""
        if self.mlp is None or self.norm_mlp is None:
            return mixed, stream
        if self.parallel:
            return mixed + self.mlp(self.norm_mlp(stream).output.to(mixed.dtype)), stream
        normed, stream = self._add_norm(self.norm_mlp, F.dropout(mixed, self.dropout, self.training), stream)
        return self.mlp(normed), stream

    def _add_norm(self, norm: RMSNorm | LayerNorm, x: Tensor, residual: Tensor | None) -> AddNormOutput:
        wide = None
        if self.residual_in_fp32:
            wide = torch.promote_types(x.dtype if residual is None else residual.dtype, torch.float32)
        return norm(x, residual, wide)

    @torch.no_grad()
    def reset_parameters(self, config: BaselineConfig) -> None:
        """Draws all initial values.

        ``init="depth"``: matrices of attention and MLPs N(0, initializer_range^2), those that write to the residual
        stream divided by sqrt(branches of the model), as GPT-2 did; ``"neox"``: N(0, 2 / (5 d_model)), those that write
        to the stream N(0, (2 / (n_layer sqrt(d_model)))^2), as GPT-NeoX and Pythia. Biases 0. What has initial values
        of its own (gates, filters, state spaces) keeps them; its projection is scaled by depth.

        Source: Radford et al. (2019), section 2.3; Black et al. (2022), arXiv:2204.06745, section 2.2.
        """
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        branches = config.n_layer * (1 if self.mlp is None else 2)
        inner, outer = config.initializer_range, config.initializer_range / math.sqrt(branches)
        if config.init == "neox":
            inner, outer = math.sqrt(2 / (5 * config.d_model)), 2 / (config.n_layer * math.sqrt(config.d_model))
        linear = [self.mlp.in_proj] if self.mlp is not None else []
        writing = [self.mlp.out_proj] if self.mlp is not None else []
        if isinstance(self.mixer, CausalSelfAttention):
            linear.append(self.mixer.qkv_proj)
            writing.append(self.mixer.out_proj)
        elif isinstance(self.mixer, S4Mixer):
            self.mixer.output_linear.weight /= math.sqrt(branches)
        else:
            self.mixer.out_proj.weight /= math.sqrt(branches)
        for layers, std in ((linear, inner), (writing, outer)):
            for layer in layers:
                nn.init.normal_(layer.weight, std=std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


class Positions(nn.Module):
    """A learned vector for each position, added to the embedding.

    Args:
        config: with max_positions rows.
        device, dtype: of the table.
    """

    def __init__(
        self, config: TransformerConfig, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.std = config.initializer_range
        self.weight = nn.Parameter(torch.empty(config.max_positions, config.d_model, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draws the table, N(0, initializer_range^2)."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor, state: AttentionState | None, cu_seqlens: Tensor | None) -> Tensor:
        """x (batch, length, d_model) with its positions added, from where the first layer's state stands."""
        before = (0,) if state is None else state.lengths
        from_start = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            starts = cu_seqlens[:-1] - torch.tensor(before, device=x.device)
            places = from_start - torch.repeat_interleave(starts, cu_seqlens.diff(), output_size=x.shape[1])
            sizes = cu_seqlens.diff().tolist()
            last = max(size + start for size, start in zip(sizes, before * (len(sizes) // len(before)), strict=True))
        else:
            # From a number of the host, where all rows have one: a graph can't be captured with a copy in it.
            first = before[0] if len(set(before)) == 1 else torch.tensor(before, device=x.device)[:, None]
            places = (from_start + first).view(-1, x.shape[1])
            last = max(before) + x.shape[1]
        if last > self.weight.shape[0]:
            raise ShapeError(
                f"CausalLM: a model with {self.weight.shape[0]} absolute positions reads no more than so many tokens, "
                f"got {last}; cut the text, or make the model with a larger max_positions or positions='rotary'"
            )
        return x + F.embedding(places if cu_seqlens is None else places[None], self.weight)
