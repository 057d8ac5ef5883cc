"""The language model: embedding, blocks of norm and mixer around a residual stream, head."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statescan import checkpoint as files
from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.models import counters
from statescan.models.attention_checkpoints import published_tensors, to_published
from statescan.models.baseline_config import BaselineConfig, ModelConfig, TransformerConfig, config_from_dict
from statescan.models.baselines import BaselineBlock, Positions, make_norm
from statescan.models.config import MambaConfig
from statescan.nn import Embedding, Mamba, MambaState, Packing, RMSNorm, pack
from statescan.nn.mamba import is_plain
from statescan.nn.undrawn import Undrawn
from statescan.ops import linear_cross_entropy
from statescan.ops.mamba_inner import Normed

__all__ = ["Backbone", "BackboneOutput", "Block", "CausalLM", "CausalLMOutput"]

_IGNORED = -100
_HEAD = "lm_head.weight"
# Rows of logits that a head of unknown kind makes at once.
_HEAD_CHUNK = 256


# What each layer keeps of the tokens before, one entry a layer: a `MambaState`, an `AttentionState`, ...
State = tuple[Any, ...]


class BackboneOutput(NamedTuple):
    """hidden: (batch, length, d_model) after the last norm; state: one a layer after the last token, or None."""

    hidden: Tensor
    state: State | None


class CausalLMOutput(NamedTuple):
    """logits: (batch, kept, vocabulary), None where only a loss was wanted; loss: a scalar or None; state: or None."""

    logits: Tensor | None
    loss: Tensor | None
    state: State | None


class Block(nn.Module):
    """One layer of the residual stream: add, norm, mix.

    Recurrence over layers::

        residual = residual + x
        x        = mixer(norm(residual))

    Args:
        config: of the model.
        backend: as in `statescan.ops`. Default "auto".
        device: where parameters are made. Default: torch's.
        dtype: of the parameters. Default: torch's.
    """

    def __init__(
        self,
        config: MambaConfig,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.recompute = config.recompute
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.d_model, config.norm_epsilon, backend=backend, device=device, dtype=dtype)
        self.mixer = Mamba(
            config.d_model,
            d_state=config.d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            dt_rank=config.dt_rank,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
            dt_init=config.dt_init,
            dt_scale=config.dt_scale,
            dt_init_floor=config.dt_init_floor,
            conv_bias=config.conv_bias,
            bias=config.bias,
            mixer_rms_eps=config.mixer_rms_eps,
            block=config.block,
            inner=config.inner,
            selective=config.selective,
            A_init=config.A_init,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, x: Tensor, residual: Tensor | None, state: MambaState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, MambaState | None]:
        """Runs the block over (batch, length, d_model); gives (x, residual, state after the last token)."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._run(x, residual, state, cu_seqlens)
        if self.mixer.runs_as_one(x, state):
            normed, stream = self._norm(x, residual)
            source = Normed(stream, self.norm.weight, self.norm.eps) if is_plain(self.norm, RMSNorm) else None
            output = self.mixer(normed, cu_seqlens=cu_seqlens, recompute=self.recompute, normed=source)
            return output.output, stream, None
        if self.recompute == "block":
            return checkpoint(self._run, x, residual, state, cu_seqlens, use_reentrant=False, preserve_rng_state=True)
        normed, stream = self._norm(x, residual)
        # in_proj keeps its input for its weight's gradient: that is the normed residual, which is quick to make again
        # from the residual, and that is kept in any case.
        with torch.autograd.graph.saved_tensors_hooks(*self._forget(normed, stream)):
            output = self.mixer(normed, state, cu_seqlens=cu_seqlens, recompute=True)
        return output.output, stream, output.state

    def step(self, x: Tensor, residual: Tensor | None, state: MambaState) -> tuple[Tensor, Tensor, MambaState | None]:
        """Runs the block over one token, (batch, d_model)."""
        normed, stream = self.norm(x, residual, self._residual_dtype(x, residual))
        output = self.mixer.step(normed, state)
        return output.output, stream, output.state

    def _run(
        self, x: Tensor, residual: Tensor | None, state: MambaState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, MambaState | None]:
        normed, stream = self._norm(x, residual)
        output = self.mixer(normed, state, cu_seqlens=cu_seqlens)
        return output.output, stream, output.state

    def _norm(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normed sum, in autocast's dtype where it is on, and the sum itself."""
        normed, stream = self.norm(x, residual, self._residual_dtype(x, residual))
        device = normed.device.type
        if torch.is_autocast_enabled(device) and normed.dtype == torch.float32:
            # in_proj would make this copy of the first layer's float32 input and keep it, out of reach of `_forget`.
            normed = normed.to(torch.get_autocast_dtype(device))
        return normed, stream

    def _residual_dtype(self, x: Tensor, residual: Tensor | None) -> torch.dtype | None:
        return residual_dtype(self.residual_in_fp32, x, residual)

    def _forget(self, normed: Tensor, residual: Tensor) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """Hooks that keep, instead of the normed tensor, its shape, and make it again from the residual."""
        norm, stream, dtype = self.norm, residual.detach(), normed.dtype
        place, numbers = normed.data_ptr(), normed.numel()

        def keep(tensor: Tensor) -> Any:
            whole = tensor.is_contiguous() and tensor.numel() == numbers and tensor.dtype == dtype
            return tensor.shape if whole and tensor.data_ptr() == place else tensor

        def give(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad():
                # The kernel computes in the stream's precision and rounds once, so going by way of the stream's dtype
                # gives the same bits.
                return norm(stream).output.to(dtype).view(kept)

        return keep, give


def residual_dtype(in_fp32: bool, x: Tensor, residual: Tensor | None) -> torch.dtype | None:
    """The dtype of the residual stream after x is added, None for what the op takes by itself."""
    if not in_fp32:
        return None
    return torch.promote_types(x.dtype if residual is None else residual.dtype, torch.float32)


class Backbone(nn.Module):
    """Everything but the head: embedding, blocks, last norm.

    Args:
        config: of the model.
        backend: as in `statescan.ops`. Default "auto".
        device: where parameters are made. Default: torch's.
        dtype: of the parameters. Default: torch's.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.dropout, self.embedding_dropout = config.dropout, config.embedding_dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = Embedding(config.padded_vocab_size, config.d_model, **factory)
        self.positions = None
        if isinstance(config, TransformerConfig) and config.positions == "absolute":
            self.positions = Positions(config, **factory)
        if isinstance(config, MambaConfig):
            layers: list[nn.Module] = [Block(config, backend=backend, **factory) for _ in range(config.n_layer)]
            self.norm_f = RMSNorm(config.d_model, config.norm_epsilon, backend=backend, **factory)
        else:
            layers = [BaselineBlock(config, i, backend=backend, **factory) for i in range(config.n_layer)]
            self.norm_f = make_norm(config, backend=backend, **factory)
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
    ) -> BackboneOutput:
        """Hidden states after the last norm; arguments as in `CausalLM.forward`."""
        x = self.embed("CausalLM.forward", input_ids, inputs_embeds, 2)
        packing, cu_seqlens = read_layout(x, mask, cu_seqlens)
        if packing is None:
            return self.run(x, cu_seqlens, state)
        if packing.tokens == 0:
            return BackboneOutput(torch.zeros_like(x), state)
        output = self.run(packing.pack(x), packing.cu_seqlens, state)
        return BackboneOutput(packing.unpack(output.hidden), output.state)

    def run(self, x: Tensor, cu_seqlens: Tensor | None, state: State | None) -> BackboneOutput:
        """Hidden states for embeddings without padding, (batch, length, d_model)."""
        self._check_state("CausalLM.forward", state)
        if self.positions is not None:
            x = self.positions(x, None if state is None else state[0], cu_seqlens)
        x = F.dropout(x, self.embedding_dropout, self.training)
        residual = None
        after = []
        for i, layer in enumerate(self.layers):
            x, residual, one = layer(x, residual, None if state is None else state[i], cu_seqlens)
            x = F.dropout(x, self.dropout, self.training)
            after.append(one)
        hidden = self.norm_f(x, residual, residual_dtype(self.residual_in_fp32, x, residual)).output
        return BackboneOutput(hidden, None if state is None else tuple(after))

    def step(self, input_ids: Tensor, state: State) -> BackboneOutput:
        """Hidden state of one more token a row: input_ids (batch,), hidden (batch, d_model)."""
        x = self.embed("CausalLM.step", input_ids, None, 1)
        self._check_state("CausalLM.step", state)
        if self.positions is not None:
            x = self.positions(x.unsqueeze(1), state[0], None).squeeze(1)
        x = F.dropout(x, self.embedding_dropout, self.training)
        residual = None
        after = []
        for layer, one in zip(self.layers, state, strict=True):
            x, residual, one = layer.step(x, residual, one)  # type: ignore[operator]
            x = F.dropout(x, self.dropout, self.training)
            after.append(one)
        hidden = self.norm_f(x, residual, residual_dtype(self.residual_in_fp32, x, residual)).output
        return BackboneOutput(hidden, tuple(after))

    def embed(self, caller: str, input_ids: Tensor | None, inputs_embeds: Tensor | None, dims: int) -> Tensor:
        """Checks the ids (or the embeddings that stand for them) and looks them up."""
        weight = self.embedding.weight
        if (input_ids is None) == (inputs_embeds is None):
            both = "both" if input_ids is not None else "neither"
            raise ConfigError(
                f"{caller}: exactly one of input_ids and inputs_embeds must be given, got {both}; pass one"
            )
        if inputs_embeds is not None:
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != weight.shape[1] or 0 in inputs_embeds.shape:
                raise ShapeError(
                    f"{caller}: inputs_embeds must be (batch, length >= 1, d_model) with d_model {weight.shape[1]}, "
                    f"got {tuple(inputs_embeds.shape)}; features come last"
                )
            if not inputs_embeds.is_floating_point():
                raise DTypeError(
                    f"{caller}: inputs_embeds must be float, got {inputs_embeds.dtype}; ids go to input_ids"
                )
            return inputs_embeds
        assert input_ids is not None
        meaning = "(batch, length >= 1)" if dims == 2 else "(batch,)"
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise DTypeError(
                f"{caller}: input_ids must be int64 or int32, got {input_ids.dtype}; pass input_ids.long()"
            )
        if input_ids.ndim != dims or 0 in input_ids.shape:
            raise ShapeError(
                f"{caller}: input_ids must be {meaning}, got {tuple(input_ids.shape)}; "
                "give at least one token, and a batch dimension even for one row"
            )
        if input_ids.device != weight.device:
            raise ShapeError(
                f"{caller}: input_ids must be on {weight.device}, where the model is, got {input_ids.device}; "
                f"pass input_ids.to('{weight.device}')"
            )
        # On other devices looking would wait for them, and while tracing there are no values.
        if input_ids.device.type == "cpu" and type(input_ids) is Tensor and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in input_ids.aminmax())
            if low < 0 or high >= weight.shape[0]:
                raise ShapeError(
                    f"{caller}: input_ids must be in [0, {weight.shape[0]}), got {low} to {high}; "
                    "the text was read with a tokenizer of another vocabulary"
                )
        return self.embedding(input_ids)

    def _check_state(self, caller: str, state: State | None) -> None:
        if state is not None and len(state) != len(self.layers):
            raise ShapeError(
                f"{caller}: state must have one entry a layer, {len(self.layers)}, got {len(state)}; "
                "make it with init_state(batch)"
            )


def read_layout(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Packing | None, Tensor | None]:
    """What mask and cu_seqlens say about embeddings (batch, length, d_model): (packing or None, int32 cu_seqlens)."""
    if mask is not None and cu_seqlens is not None:
        raise ConfigError(
            "CausalLM.forward: mask and cu_seqlens exclude each other, got both; packed tokens need no mask"
        )
    if mask is not None:
        return pack("CausalLM.forward", mask, x.shape[0], x.shape[1], x.device), None
    if cu_seqlens is None:
        return None, None
    if not isinstance(cu_seqlens, Tensor):
        raise DTypeError(
            f"CausalLM.forward: cu_seqlens must be an int32 tensor, got {type(cu_seqlens).__name__}; "
            "pass torch.tensor(cu_seqlens, dtype=torch.int32)"
        )
    if cu_seqlens.ndim != 1:
        raise ShapeError(
            f"CausalLM.forward: cu_seqlens must be (sequences + 1,), got {tuple(cu_seqlens.shape)}; "
            "pass the running sum of the sequences' lengths, with 0 in front"
        )
    return None, cu_seqlens.to(torch.int32) if cu_seqlens.dtype == torch.int64 else cu_seqlens


class CausalLM(nn.Module):
    """A language model, Mamba or one of its baselines: predicts each next token from all before it.

    Args:
        config: what it is made of: a `MambaConfig`, `TransformerConfig`, `RecurrentConfig`, `ConvConfig` or `S4Config`;
            see `statescan.models.PRESETS`.
        backend: as in `statescan.ops`, for every op inside. Default "auto".
        device: where parameters are made; "meta" makes none, `reset_parameters` after `to_empty` fills them.
        dtype: of the parameters. Default: torch's.

    Source: Gu and Dao (2023), section 4.2 and appendix E.2; Mamba's names, shapes and initial values as in its code.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, backend=backend, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_weights()
        self._reset_for_depth()

    def tie_weights(self) -> None:
        """Makes lm_head share the embedding's weight where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def reset_parameters(self) -> None:
        """Draws all initial values anew; also fills a model made on the meta device and moved by `to_empty`."""
        self.tie_weights()
        for layer in self.backbone.layers:
            if isinstance(layer, Block):
                layer.norm.reset_parameters()
                layer.mixer.reset_parameters()
        self.backbone.norm_f.reset_parameters()
        if not self.config.tie_embeddings:
            self.lm_head.reset_parameters()
        self._reset_for_depth()

    @torch.no_grad()
    def _reset_for_depth(self) -> None:
        """What the model sets beyond its layers' own initial values, as GPT-2 did."""
        if self.lm_head.weight.is_meta:
            return
        if isinstance(self.config, BaselineConfig):
            self._reset_baseline(self.config)
            return
        nn.init.normal_(self.backbone.embedding.weight, std=self.config.initializer_range)
        for layer in self.backbone.layers:
            mixer: Any = layer.mixer
            for projection in (mixer.in_proj, mixer.out_proj):
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
            if self.config.rescale_prenorm_residual:
                # n_layer sums along the residual stream would otherwise raise its variance n_layer times.
                mixer.out_proj.weight /= math.sqrt(self.config.n_layer)

    def _reset_baseline(self, config: BaselineConfig) -> None:
        backbone = self.backbone
        std = config.initializer_range if config.init == "depth" else math.sqrt(2 / (5 * config.d_model))
        nn.init.normal_(backbone.embedding.weight, std=std)
        if backbone.positions is not None:
            backbone.positions.reset_parameters()
        for layer in backbone.layers:
            layer.reset_parameters(config)  # type: ignore[operator]
        if not config.tie_embeddings:
            nn.init.normal_(self.lm_head.weight, std=std)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Runs the model over whole sequences, from a state if one is given.

        Args:
            input_ids: (batch, length) int64 or int32.
            inputs_embeds: (batch, length, d_model), instead of input_ids.
            labels: (batch, length), the ids again: position t is judged on labels[t + 1]. Or (batch, length + 1), a
                window of which the first `length` entries are the inputs, so that the last position is judged too.
                -100 is ignored. Default: no loss.
            targets: (batch, length) int64 or int32, instead of labels: position t is judged on targets[t], whatever
                follows it in the batch, -100 on nothing. So a piece of a packed document is judged on all its
                positions. Default: none.
            mask: (batch, length) bool or integer, 1 at real tokens, 0 at padding, on either side or in between; real
                tokens give exactly what they give alone. Padding has logits of a zero hidden state; neither it nor
                a token whose next one is padding is judged. Default: all are real.
            cu_seqlens: (sequences + 1,) int32 or int64, from 0 to length, where packed sequences start; batch is 1. The
                last token of a sequence is not judged. Default: each row is one sequence.
            state: one entry a layer, from `init_state` or an earlier output, one row a sequence. Default: none.
            logits_to_keep: give logits of the last so many positions. Default 0: of all, or of none where there are
                labels.

        Returns:
            CausalLMOutput(logits, loss, state): loss is the mean over judged tokens in float32 (0 where there is none);
            a state comes out where one went in.

        Raises:
            ShapeError: a shape or device does not fit, or an id is outside of the vocabulary.
            DTypeError: a dtype is not taken.
            ConfigError: arguments that exclude each other.
        """
        x = self.backbone.embed("CausalLM.forward", input_ids, inputs_embeds, 2)
        batch, length, _ = x.shape
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ConfigError(
                f"CausalLM.forward: logits_to_keep must be an integer >= 0, got {logits_to_keep!r}; 0 keeps all"
            )
        if targets is not None:
            check_targets(targets, labels, batch, length)
        packing, cu_seqlens = read_layout(x, mask, cu_seqlens)
        if packing is not None and packing.tokens == 0:
            hidden, after, packing = torch.zeros_like(x), state, None
        elif packing is not None:
            hidden, after = self.backbone.run(packing.pack(x), packing.cu_seqlens, state)
        else:
            hidden, after = self.backbone.run(x, cu_seqlens, state)
        loss = None
        if labels is not None or targets is not None:
            if targets is None:
                targets = next_token_targets(labels, batch, length, mask, cu_seqlens)  # type: ignore[arg-type]
            if packing is not None:
                targets = packing.pack(targets)
            loss = self._loss(hidden, targets)
        logits = None
        if targets is None or logits_to_keep > 0:
            kept = hidden if packing is None else packing.unpack(hidden)
            logits = self.lm_head(kept[:, -logits_to_keep:] if logits_to_keep else kept)
        return CausalLMOutput(logits, loss, after)

    def step(self, input_ids: Tensor, state: State) -> CausalLMOutput:
        """Takes one more token a row; changes nothing in place and is differentiable.

        Args:
            input_ids: (batch,) int64 or int32.
            state: the state after the tokens before.

        Returns:
            CausalLMOutput: logits (batch, vocabulary) of the next token, and the state after this one.
        """
        hidden, after = self.backbone.step(input_ids, state)
        return CausalLMOutput(self.lm_head(hidden), None, after)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token, one entry a layer; see the layers' own `init_state` in `statescan.nn`."""
        return tuple(
            layer.mixer.init_state(batch, device=device, dtype=dtype)  # type: ignore[union-attr, operator]
            for layer in self.backbone.layers
        )

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head = self.lm_head
        # Nobody may stand between the weight and its use: an adapter, a quantised layer or a hook gets called.
        if type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks):
            return linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, ignore_index=_IGNORED)
        rows, aims = hidden.flatten(0, 1), targets.flatten()
        total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        for h, aim in zip(rows.split(_HEAD_CHUNK), aims.split(_HEAD_CHUNK), strict=True):
            total = total + checkpoint(self._loss_of_chunk, h, aim, use_reentrant=False)
        return total / (aims != _IGNORED).sum().clamp(min=1)

    def _loss_of_chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.long(), ignore_index=_IGNORED, reduction="sum")

    def undecayed_parameters(self) -> frozenset[str]:
        """Names of the parameters that weight decay must leave alone: A, D, norms, biases, S4's system."""
        return frozenset(
            name
            for name, parameter in self.named_parameters()
            if name.rsplit(".", 1)[-1] in ("A_log", "A_imag", "D", "bias", "dt_bias")
            or any(part in f".{name}" for part in (".norm.", ".norm_mlp.", ".norm_f.", ".rnn.bias_"))
            or getattr(parameter, "_no_weight_decay", False)
        )

    def parameter_count(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, context: int = 0) -> counters.Flops:
        """Operations a token, forward and training; see `statescan.models.flops_per_token`."""
        return counters.flops_per_token(self.config, context)

    def state_bytes(self, batch: int = 1, dtype: torch.dtype | None = None, *, context: int | None = None) -> int:
        """Bytes of the state of `batch` sequences with activations of `dtype` (default: the weights'), after `context`
        tokens; see `statescan.models.state_bytes`."""
        return counters.state_bytes(self.config, batch, dtype or self.backbone.embedding.weight.dtype, context=context)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        layout: str = "statescan",
        *,
        shard_bytes: int = files.MOST_BYTES_OF_A_SHARD,
    ) -> Path:
        """Writes config.json and the weights into a folder, each file whole or not at all.

        Args:
            folder: made where it is missing.
            layout: "statescan"; "transformers", for its `MambaForCausalLM`, `FalconMambaForCausalLM`,
                `GPTNeoXForCausalLM` or `LlamaForCausalLM`; "state-spaces", for the authors' package. Default
                "statescan".
            shard_bytes: weights beyond so many bytes are split into several files. Default 5 GB.

        Raises:
            CheckpointError: the system refused to write (what stood there before is unharmed), or the layout has no
                word for what this model is.
            ConfigError: an unknown layout.
        """
        state = self.state_dict()
        if isinstance(self.config, BaselineConfig) and layout != "statescan":
            config, tensors = to_published(self.config, state, layout)
            return files.save_folder(folder, config, tensors, shard_bytes=shard_bytes)
        # What the layout can't say is refused before anything is written.
        config = files.fields_to(layout, self.config.to_dict(), _dtype_name(self.backbone.embedding.weight.dtype))
        names = [n for n in state if n != _HEAD or files.head_is_written(layout, self.config.tie_embeddings)]
        tensors = {files.their_name(layout, name): state[name] for name in names}
        return files.save_folder(folder, config, tensors, binary=layout == "state-spaces", shard_bytes=shard_bytes)

    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that makes up the model, a tied head left out."""
        tied = self.config.tie_embeddings
        return {n: tuple(t.shape) for n, t in self.state_dict().items() if not (tied and n == _HEAD)}

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        offline: bool = False,
        backend: str = "auto",
    ) -> CausalLM:
        """Reads a model: of this package, of the state-spaces authors, or of the transformers package (Mamba,
        FalconMamba, GPT-NeoX, which Pythia is, and Llama, which Transformer++ is).

        Args:
            source: a folder with config.json and weights, a file of weights beside its config.json, or "owner/name" on
                the hub, which is downloaded into its cache.
            device: where the model shall be. Default: the CPU.
            dtype: of the parameters in memory; A_log and D stay float32 below it. Default: torch's.
            revision: branch, tag or commit on the hub. Default: its main branch.
            offline: look into the hub's cache alone. Default False.
            backend: as in `statescan.ops`. Default "auto".

        Raises:
            CheckpointError: a file is missing, cut short, of another shape or holds code; the hub can't be reached.
            ConfigError: config.json has an unknown field or architecture, or a value out of range.
            MissingExtraError: a hub id without the package huggingface_hub.
        """
        opened = files.open_source(source, revision=revision, offline=offline)
        config = config_of(opened)
        opened.check_layers(config.n_layer)
        with Undrawn(), opened.making_shapes():
            model = cls(config, backend=backend, device="meta", dtype=dtype)
        if isinstance(config, TransformerConfig) and opened.layout == "transformers":
            stored = published_tensors(opened, config, model.saved_shapes())
        else:
            stored = opened.tensors(model.saved_shapes(), config.tie_embeddings)
        state = model.state_dict()
        where = device or "cpu"
        # Copies, since the files may change while the model lives.
        tensors = {name: stored[name].to(device=where, dtype=state[name].dtype, copy=True) for name in stored}
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        return model


def config_of(source: files.Source) -> ModelConfig:
    """The configuration of an opened checkpoint.

    Raises:
        ConfigError: a field is missing, unknown or out of range; the text names the file.
    """
    try:
        return config_from_dict(source.fields)
    except ConfigError as error:
        raise ConfigError(f"{source.folder / files.CONFIG_FILE}: {error}") from None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_targets(targets: Tensor, labels: Tensor | None, batch: int, length: int) -> None:
    """Refuses targets that are no (batch, length) integers, or that come with labels."""
    if labels is not None:
        raise ConfigError("CausalLM.forward: labels and targets exclude each other, got both; pass one of them")
    if targets.dtype not in (torch.int64, torch.int32):
        raise DTypeError(f"CausalLM.forward: targets must be int64 or int32, got {targets.dtype}; pass targets.long()")
    if targets.shape != (batch, length):
        raise ShapeError(
            f"CausalLM.forward: targets must be (batch, length) = ({batch}, {length}), got {tuple(targets.shape)}; "
            "pass the id that each input is followed by"
        )


def next_token_targets(
    labels: Tensor, batch: int, length: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """What each position is judged on, (batch, length), -100 where it is not; see `CausalLM.forward`."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise DTypeError(f"CausalLM.forward: labels must be int64 or int32, got {labels.dtype}; pass labels.long()")
    if labels.shape == (batch, length):
        targets = F.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    elif labels.shape == (batch, length + 1):
        targets = labels[:, 1:]
    else:
        raise ShapeError(
            f"CausalLM.forward: labels must be (batch, length) = ({batch}, {length}) or (batch, length + 1), got "
            f"{tuple(labels.shape)}; pass the input ids themselves, or the window that they begin"
        )
    if mask is not None:
        real = mask != 0
        real = real & F.pad(real[:, 1:], (0, 1), value=True)
        targets = torch.where(real, targets, _IGNORED)
    if cu_seqlens is not None:
        # An empty sequence's offset minus one is some other sequence's end (or -1, the end of the last): harmless.
        targets = targets.index_fill(1, cu_seqlens[1:].long() - 1, _IGNORED)
    return targets
