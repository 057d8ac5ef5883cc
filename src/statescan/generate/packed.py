"""The inference form of a language model: packed weights, constant-memory prefill, one call a decoding step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.models import CausalLM
from statescan.models.baseline_config import mamba_config
from statescan.nn import Embedding, StepProjection, over_its_rms
from statescan.ops import (
    PackedWeight,
    add_rms_norm,
    causal_conv1d,
    explain,
    mamba_step,
    pack_weight,
    packed_linear,
    selective_scan,
)
from statescan.ops.mamba_step.api import BlockWeights
from statescan.ops.packed_linear.validation import PACKED_DTYPES, PackedDType

__all__ = ["DecodeDType", "DecodeState", "PackedModel", "effective_linear"]

DecodeDType = PackedDType | Literal["float16"]

# Positions prefilled at once: the largest temporaries are (2048, 2 d_inner), 25 MB in float32 at the 130m shape.
_CHUNK = 2048
# Up to so many positions of a prompt go through the decoding products, which read each weight once for all of them.
# The choice depends on the prompt's length alone, never on the batch: a batch gives what each prompt alone gives.
_SHORT = 24


@dataclass
class DecodeState:
    """All that a model keeps of the tokens it has seen, for every row of a batch; changed in place by `PackedModel`.

    Args:
        conv: (n_layer, batch, d_conv - 1, d_inner) float32, the convolutions' last inputs, oldest first.
        ssm: (n_layer, batch, d_inner, d_state) float32.
    """

    conv: Tensor
    ssm: Tensor

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.ssm.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held; they do not grow with the number of tokens seen."""
        return self.conv.nbytes + self.ssm.nbytes

    def select(self, rows: Tensor | Sequence[int]) -> DecodeState:
        """A new state of the given rows, in that order; a row may come more than once (to fork a sequence)."""
        index = torch.as_tensor(rows, device=self.ssm.device, dtype=torch.int64)
        return DecodeState(self.conv.index_select(1, index), self.ssm.index_select(1, index))

    def assign(self, row: int, other: DecodeState, other_row: int = 0) -> None:
        """Overwrites one row by a row of another state of the same model."""
        self.conv[:, row] = other.conv[:, other_row]
        self.ssm[:, row] = other.ssm[:, other_row]

    def clone(self) -> DecodeState:
        """A copy that shares nothing."""
        return DecodeState(self.conv.clone(), self.ssm.clone())


@torch.no_grad()
def effective_linear(module: nn.Module, columns: int) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of what a module computes, read off a plain linear layer and measured on any other.

    A wrapped projection (a low-rank adapter, a quantised layer, a hook) is fed the identity: its output is W^T + b, so
    everything it adds is merged. The module must be linear up to the bias; it is run in evaluation mode.

    Args:
        module: maps (rows, columns) to (rows, outputs).
        columns: number of inputs.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks
    if type(module) is nn.Linear and not hooks:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    if type(module) is StepProjection and not hooks:
        return module.weight.detach(), None
    parameter = next(module.parameters())
    was = {child: child.training for child in module.modules()}
    module.eval()
    try:
        eye = torch.eye(columns, device=parameter.device, dtype=parameter.dtype)
        bias = module(torch.zeros_like(eye[:1]))[0]
        weight = (module(eye) - bias).t()
    finally:
        for child, training in was.items():
            child.training = training
    return weight.detach(), bias.detach() if bool(bias.any()) else None


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


def _pack(weight: Tensor, dtype: DecodeDType) -> PackedWeight:
    if dtype == "float16":
        return PackedWeight(weight.detach().half().contiguous())
    return pack_weight(weight, dtype)


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _moved_weight(packed: PackedWeight, device: torch.device) -> PackedWeight:
    return PackedWeight(packed.data.to(device), _moved(packed.scale, device))


def _moved_block(block: BlockWeights, device: torch.device) -> BlockWeights:
    fields = {}
    for name, value in vars(block).items():
        if isinstance(value, PackedWeight):
            fields[name] = _moved_weight(value, device)
        else:
            fields[name] = _moved(value, device) if isinstance(value, Tensor) else value
    return BlockWeights(**fields)


@torch.no_grad()
def _pack_block(layer: Any, dtype: DecodeDType) -> BlockWeights:
    mixer, norm = layer.mixer, layer.norm
    # The projections that make dt, B and C are 5 % of the weights and steer the recurrence: int8 stops at bfloat16.
    fine: DecodeDType = "bfloat16" if dtype == "int8" else dtype
    in_weight, in_bias = effective_linear(mixer.in_proj, mixer.d_model)
    x_weight, x_bias = effective_linear(mixer.x_proj, mixer.d_inner)
    dt_weight, dt_extra = effective_linear(mixer.dt_proj, mixer.dt_rank)
    out_weight, out_bias = effective_linear(mixer.out_proj, mixer.d_inner)
    dt_bias = _vector(mixer.dt_proj.bias)
    if dt_extra is not None:
        dt_bias = dt_extra.float() if dt_bias is None else dt_bias + dt_extra.float()
    norm_weight, conv_weight = _vector(norm.weight), _vector(mixer.conv1d.weight.squeeze(1))
    assert norm_weight is not None
    assert conv_weight is not None
    return BlockWeights(
        norm=norm_weight,
        in_proj=_pack(in_weight, dtype),
        conv_weight=conv_weight,
        x_proj=_pack(x_weight, fine),
        dt_proj=_pack(dt_weight, fine),
        A=-torch.exp(mixer.A_log.detach().float()).contiguous(),
        out_proj=_pack(out_weight, dtype),
        conv_bias=_vector(mixer.conv1d.bias),
        dt_bias=dt_bias,
        D=_vector(mixer.D),
        in_bias=_vector(in_bias),
        x_bias=_vector(x_bias),
        out_bias=_vector(out_bias),
        epsilon=float(norm.eps),
    )


class PackedModel:
    """A `CausalLM` in the form that inference reads: weights packed once, adapters merged, no graph.

    Args:
        model: the language model; left unchanged and not kept.
        dtype: of the large weights. ``"float32"`` shares the memory of a float32 model's weights; ``"bfloat16"`` takes
            2 bytes a weight and ``"int8"`` 1 (x_proj and dt_proj stay bfloat16 there); ``"float16"`` on GPUs. A tied
            head is held once.
        device: where the packed weights go. Default: where the model is.

    Numerics:
        Steps and prompts of up to 24 tokens compute in float32 throughout, whatever the weights are. Longer prompts
        run their products in float32 (``"float32"``) or with bfloat16 activations and weights (``"bfloat16"`` and
        ``"int8"``, whose weights are widened to bfloat16 for it) where the processor multiplies bfloat16, in float32
        elsewhere; scan, norms and residual stream are float32 always. The first long prompt makes the copy of the
        projections that this needs; `nbytes` counts it.
        On the cpu backend a row's result is the same, bit for bit, whatever other rows are in the batch.

    Raises:
        ConfigError: an unknown dtype.
    """

    def __init__(
        self, model: CausalLM, dtype: DecodeDType = "float32", *, device: torch.device | str | None = None
    ) -> None:
        if dtype not in (*PACKED_DTYPES, "float16"):
            raise ConfigError(f"PackedModel: dtype must be one of {[*PACKED_DTYPES, 'float16']}, got {dtype!r}")
        if not isinstance(model, CausalLM):
            raise ConfigError(f"PackedModel: model must be a CausalLM, got {type(model).__name__}")
        if not getattr(model.config, "is_plain_mamba", False):
            raise ConfigError(
                "PackedModel: model must have the published Mamba layer, got one with another block, inner map or "
                "selection; Engine and generate run it by its own forward and step"
            )
        self.config = mamba_config("PackedModel", model.config)
        self.dtype: DecodeDType = dtype
        backbone: Any = model.backbone
        where = backbone.norm_f.weight.device if device is None else torch.device(device)
        if dtype == "float16" and where.type == "cpu":
            raise ConfigError("PackedModel: dtype 'float16' runs on GPUs, got device cpu; use 'bfloat16' there")
        self.blocks = [_moved_block(_pack_block(layer, dtype), where) for layer in backbone.layers]
        norm_f = _moved(_vector(backbone.norm_f.weight), where)
        assert norm_f is not None
        self.norm_f = norm_f
        self.epsilon = float(backbone.norm_f.eps)
        head_weight, head_bias = effective_linear(model.lm_head, self.config.d_model)
        self.head = _moved_weight(_pack(head_weight, dtype), where)
        self.head_bias = _moved(_vector(head_bias), where)
        embedding = self._embedding_weight(backbone.embedding)
        tied = embedding.shape == head_weight.shape and embedding.data_ptr() == head_weight.data_ptr()
        self.embedding = self.head if tied else _moved_weight(_pack(embedding, dtype), where)
        self._stack = self._native_stack()
        self._prefill: list[dict[str, Callable[[Tensor], Tensor]]] | None = None
        self._prefill_bytes = 0

    def _native_stack(self) -> Any:
        """All blocks and the head as one call of the C++ library, None where that can't run."""
        if explain("mamba_step", device=self.device.type).backend != "cpu" or self.config.mixer_rms_eps is not None:
            return None
        from statescan.ops.mamba_step.cpu import Stack

        return Stack(self.blocks, self.norm_f, self.epsilon, self.head, self.head_bias)

    @staticmethod
    @torch.no_grad()
    def _embedding_weight(module: nn.Module) -> Tensor:
        hooks = module._forward_hooks or module._forward_pre_hooks
        if isinstance(module, nn.Embedding) and type(module) in (Embedding, nn.Embedding) and not hooks:
            return module.weight.detach()
        count = int(module.num_embeddings)  # type: ignore[arg-type]
        return module(torch.arange(count, device=next(module.parameters()).device)).detach()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm_f.device

    @property
    def vocab_size(self) -> int:
        """Number of logits: the model's vocabulary with its padding."""
        return self.head.rows

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a step reads (a tied table counted once), plus the prefill copies once they exist."""
        seen: dict[int, int] = {}
        tensors: list[Tensor | None] = [self.norm_f, self.head_bias]
        for packed in (self.head, self.embedding):
            tensors += [packed.data, packed.scale]
        for block in self.blocks:
            for value in vars(block).values():
                if isinstance(value, PackedWeight):
                    tensors += [value.data, value.scale]
                elif isinstance(value, Tensor):
                    tensors.append(value)
        for tensor in tensors:
            if tensor is not None:
                seen[tensor.data_ptr()] = tensor.nbytes
        return sum(seen.values()) + self._prefill_bytes

    def init_state(self, batch: int = 1) -> DecodeState:
        """The state before the first token: zeros, for `batch` rows."""
        if batch < 1:
            raise ShapeError(f"PackedModel.init_state: batch must be >= 1, got {batch}; give one row a sequence")
        block, layers = self.blocks[0], len(self.blocks)
        return DecodeState(
            torch.zeros(layers, batch, block.width - 1, block.d_inner, device=self.device),
            torch.zeros(layers, batch, block.d_inner, block.d_state, device=self.device),
        )

    @torch.no_grad()
    def step(self, input_ids: Tensor, state: DecodeState) -> Tensor:
        """Takes one more token a row.

        Args:
            input_ids: (batch,) int64 or int32.
            state: of the tokens before; moved on in place.

        Returns:
            Logits of the next token, (batch, vocabulary) float32.

        Raises:
            ShapeError, DTypeError: ids or state do not fit.
        """
        self._check("step", input_ids, state, 1)
        x = self.embedding.unpack(input_ids.long())
        if self._stack is not None:
            return self._stack.step(x, state.conv, state.ssm)
        if self.config.mixer_rms_eps is not None:
            # No kernel of a whole block knows these norms: op by op, as a prompt of one token.
            return self._head(self._run(input_ids[:, None], state.conv, state.ssm, False, "last"), "last")
        residual = None
        for i, block in enumerate(self.blocks):
            x, residual = mamba_step(x, residual, state.conv[i], state.ssm[i], block)
        hidden = add_rms_norm(x, self.norm_f, residual=residual, eps=self.epsilon).output
        return packed_linear(hidden, self.head, self.head_bias)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        state: DecodeState,
        logits: Literal["last", "all"] = "last",
        *,
        together: bool = False,
        chunk: int | None = None,
    ) -> Tensor:
        """Takes many tokens a row, in memory that does not grow with their number (but for all logits, if asked for).

        Args:
            input_ids: (batch, length) int64 or int32; every row has all `length` tokens.
            state: of the tokens before; moved on in place, so that a long prompt may come in parts.
            logits: ``"last"``: of the last position alone; ``"all"``: of every position.
            together: all rows go through one product, as a GPU needs to be filled; a row's last bits may then depend on
                the number of rows. Default: row by row.
            chunk: positions taken at once, those of all rows counted where they go together. Default 2048.

        Returns:
            Logits float32: (batch, vocabulary) for "last", (batch, length, vocabulary) for "all".

        Raises:
            ShapeError, DTypeError, ConfigError: an argument is not as described.
        """
        self._check("prefill", input_ids, state, 2)
        if logits not in ("last", "all"):
            raise ConfigError(f"PackedModel.prefill: logits must be 'last' or 'all', got {logits!r}")
        chunk = _CHUNK if chunk is None else chunk
        if chunk < 1:
            raise ConfigError(f"PackedModel.prefill: chunk must be at least 1, got {chunk}; the default is {_CHUNK}")
        batch, length = input_ids.shape
        if length <= _SHORT and self.device.type == "cpu":
            return self._head(self._run(input_ids, state.conv, state.ssm, False, logits), logits)
        if together:
            return self._long_prompt(input_ids, state.conv, state.ssm, logits, max(1, chunk // batch))
        # Row by row: a large product's summation order may depend on its number of rows.
        rows = [
            self._long_prompt(input_ids[r : r + 1], state.conv[:, r : r + 1], state.ssm[:, r : r + 1], logits, chunk)
            for r in range(batch)
        ]
        return rows[0] if batch == 1 else torch.cat(rows)

    def _long_prompt(
        self, ids: Tensor, conv: Tensor, ssm: Tensor, logits: Literal["last", "all"], chunk: int
    ) -> Tensor:
        parts = []
        for start in range(0, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            long = part.shape[1] > _SHORT or self.device.type != "cpu"
            hidden = self._run(part, conv, ssm, long, logits)
            if logits == "all" or start + chunk >= ids.shape[1]:
                parts.append(self._head(hidden, logits))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _run(self, ids: Tensor, conv: Tensor, ssm: Tensor, long: bool, logits: Literal["last", "all"]) -> Tensor:
        """Residual stream (batch, length, or 1 for "last", d_model) float32 after the last block; states moved on in
        place."""
        act = self._activation_dtype() if long else torch.float32
        products = self._prefill_products() if long else None
        x: Tensor = self.embedding.unpack(ids.long()).to(act)
        residual = None
        for i, block in enumerate(self.blocks):
            product = _decode_products(block) if products is None else products[i]
            normed, residual = add_rms_norm(
                x, block.norm, residual=residual, eps=block.epsilon, residual_dtype=torch.float32
            )
            u, z = product["in"](normed).chunk(2, dim=-1)
            past = conv[i].to(act)
            u, after = causal_conv1d(
                u, block.conv_weight, block.conv_bias, activation="silu", initial_state=past, return_final_state=True
            )
            assert after is not None
            conv[i] = after
            sizes = [block.dt_rank, block.d_state, block.d_state]
            dt, B, C = product["x"](u).split(sizes, dim=-1)
            if self.config.mixer_rms_eps is not None:
                dt, B, C = (over_its_rms(part, self.config.mixer_rms_eps) for part in (dt, B, C))
            y, state = selective_scan(
                u,
                product["dt"](dt),
                block.A,
                B,
                C,
                D=block.D,
                z=z,
                dt_bias=block.dt_bias,
                dt_softplus=True,
                initial_state=ssm[i],
                return_final_state=True,
            )
            assert state is not None
            ssm[i] = state
            x = product["out"](y)
        assert residual is not None
        if logits == "last":
            x, residual = x[:, -1:], residual[:, -1:]
        return x.float() + residual

    def _head(self, stream: Tensor, logits: Literal["last", "all"]) -> Tensor:
        kept = stream[:, -1] if logits == "last" else stream
        return packed_linear(add_rms_norm(kept, self.norm_f, eps=self.epsilon).output, self.head, self.head_bias)

    def _activation_dtype(self) -> torch.dtype:
        if self.dtype in ("float32", "float16"):
            return torch.float32 if self.dtype == "float32" else torch.float16
        return torch.bfloat16 if multiplies_bfloat16(self.device) else torch.float32

    def _prefill_products(self) -> list[dict[str, Callable[[Tensor], Tensor]]]:
        """Products for long prompts, with the copies of the weights that they need, made once."""
        if self._prefill is None:
            act = self._activation_dtype()
            made = []
            for block in self.blocks:
                product = {}
                for name, packed, bias in (
                    ("in", block.in_proj, block.in_bias),
                    ("x", block.x_proj, block.x_bias),
                    ("dt", block.dt_proj, None),
                    ("out", block.out_proj, block.out_bias),
                ):
                    product[name], copied = _prefill_product(packed, bias, act)
                    self._prefill_bytes += copied
                made.append(product)
            self._prefill = made
        return self._prefill

    def _check(self, caller: str, input_ids: Tensor, state: DecodeState, dims: int) -> None:
        meaning = "(batch,)" if dims == 1 else "(batch, length >= 1)"
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise DTypeError(
                f"PackedModel.{caller}: input_ids must be int64 or int32, got {input_ids.dtype}; pass input_ids.long()"
            )
        if input_ids.dim() != dims or 0 in input_ids.shape:
            raise ShapeError(f"PackedModel.{caller}: input_ids must be {meaning}, got {tuple(input_ids.shape)}")
        if input_ids.device != self.device:
            raise ShapeError(
                f"PackedModel.{caller}: input_ids must be on {self.device}, where the weights are, got "
                f"{input_ids.device}; pass input_ids.to('{self.device}')"
            )
        block, batch = self.blocks[0], input_ids.shape[0]
        for name, tensor, wanted in (
            ("conv", state.conv, (len(self.blocks), batch, block.width - 1, block.d_inner)),
            ("ssm", state.ssm, (len(self.blocks), batch, block.d_inner, block.d_state)),
        ):
            if tuple(tensor.shape) != wanted or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ShapeError(
                    f"PackedModel.{caller}: state.{name} must be contiguous float32 {wanted}, got {tensor.dtype} "
                    f"{tuple(tensor.shape)}; make it with init_state({batch})"
                )
        if input_ids.device.type != "cpu":
            return  # looking at them would wait for the device
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= self.embedding.rows:
            raise ShapeError(
                f"PackedModel.{caller}: input_ids must be in [0, {self.embedding.rows}), got {low} to {high}; the text "
                "was read with a tokenizer of another vocabulary"
            )


def _decode_products(block: BlockWeights) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "in": lambda x: packed_linear(x, block.in_proj, block.in_bias),
        "x": lambda x: packed_linear(x, block.x_proj, block.x_bias),
        "dt": lambda x: packed_linear(x, block.dt_proj),
        "out": lambda x: packed_linear(x, block.out_proj, block.out_bias),
    }


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32's here; without the instructions they are emulated."""
    if device.type != "cpu":
        return True
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):
        return False


def _prefill_product(
    packed: PackedWeight, bias: Tensor | None, act: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], int]:
    """(x -> x W^T + bias in x's dtype, bytes of the weight's copy): in oneDNN's weight layout where torch offers it."""
    weight = packed.data if packed.data.dtype == act else packed.unpack(dtype=torch.float32).to(act)
    bias = None if bias is None else bias.to(act)
    shared = weight.data_ptr() == packed.data.data_ptr()
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        try:
            ordered = torch.ops.mkldnn._reorder_linear_weight(weight, _CHUNK)
            linear = torch.ops.mkldnn._linear_pointwise

            def onednn(x: Tensor) -> Tensor:
                return linear(x, ordered, bias, "none", [], "")

            onednn(torch.zeros(2, packed.columns, dtype=act))  # where torch lacks it, it fails here
            return onednn, weight.nbytes
        except (AttributeError, NotImplementedError, RuntimeError):
            pass
    return lambda x: F.linear(x, weight, bias), 0 if shared else weight.nbytes
