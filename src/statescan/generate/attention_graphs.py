"""A Transformer decoded on an NVIDIA GPU: a step of all rows, drawing included, is one CUDA graph.

The cache of keys and values lies in the slots and grows by doubling or to what a row may need; a step reads the filled
part of it alone. One row runs on products that stream the weights once with norms, gates and sums in the same launches;
more rows run cuBLAS's products. Prompts are read by `CausalLM.forward`, whose attention is torch's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.errors import BackendUnavailableError, ShapeError
from statescan.generate.drawing import DrawingSlots, bucket
from statescan.generate.sampling import SamplingParams
from statescan.generate.unpacked import ModelDecoder, RowStates
from statescan.models import CausalLM, TransformerConfig
from statescan.nn import CausalSelfAttention, LayerNorm
from statescan.nn.attention import AttentionState, rotary_table
from statescan.nn.mamba import is_plain
from statescan.ops import _cuda
from statescan.ops.decode_attention import cuda as attention
from statescan.ops.decode_attention.step import Norm, StepPieces

__all__ = ["AttentionGraphDecoder", "refuses"]

_ROOM_UNIT = 128  # a cache's room is a multiple of this
# Room made at once for tokens that a row may never write.
_AHEAD = 1024


def refuses(decoder: ModelDecoder) -> str | None:
    """Why a model can't be decoded here, with the cure; None where it can."""
    config = decoder.config
    if decoder.device.type != "cuda":
        return f"it runs on CUDA devices, the weights are on '{decoder.device.type}'"
    if not isinstance(config, TransformerConfig):
        return f"it decodes Transformers, the model has a {type(config).__name__}"
    if config.positions == "xpos":
        return "its kernel does not decay with distance, positions is 'xpos'"
    if config.d_model // config.heads not in (64, 128):
        return f"its kernel takes heads of 64 or 128 numbers, they have {config.d_model // config.heads}"
    if config.d_model % 8 or config.mlp_width % 8:
        return f"d_model and d_intermediate must be multiples of 8, they are {config.d_model} and {config.mlp_width}"
    return _cuda.unavailable_reason()


class _Block:
    """What a step needs of one block."""

    def __init__(self, block: Any) -> None:
        self.mixer: CausalSelfAttention = block.mixer
        self.mlp: Any = block.mlp
        self.parallel: bool = block.parallel
        self.norms = (_norm(block.norm), _norm(block.norm_mlp))
        linear = (self.mixer.qkv_proj, self.mixer.out_proj, self.mlp.in_proj, self.mlp.out_proj)
        self.plain = all(is_plain(one, nn.Linear) for one in linear)
        if self.plain:
            self.weights = [one.weight.detach() for one in linear]
            self.biases = [None if one.bias is None else one.bias.detach().float() for one in linear]
            self.plain = all(weight.data_ptr() % 16 == 0 and weight.is_contiguous() for weight in self.weights)


def _norm(module: Any) -> Norm:
    bias = module.bias.detach().float() if isinstance(module, LayerNorm) else None
    return Norm(module.weight.detach().float(), bias, module.eps)


class AttentionGraphDecoder(DrawingSlots):
    """Slots for rows on the device, and graphs that take all rows of the first so many slots one token further.

    Args:
        decoder: of a Transformer on a CUDA device.
        capacity: number of slots.
        vocabulary: tokens that may be drawn; columns past it only pad the model's vocabulary.

    Raises:
        BackendUnavailableError: it can't run here; the text says why.
    """

    def __init__(self, decoder: ModelDecoder, capacity: int, vocabulary: int) -> None:
        reason = refuses(decoder)
        if reason is not None:
            raise BackendUnavailableError(f"AttentionGraphDecoder: {reason}")
        model: CausalLM = decoder.model
        config = model.config
        assert isinstance(config, TransformerConfig)
        super().__init__(decoder.device, capacity, vocabulary, config.padded_vocab_size)
        self.decoder, self.model, self.config = decoder, model, config
        backbone: Any = model.backbone
        self._act: torch.dtype = backbone.embedding.weight.dtype
        self._blocks = [_Block(block) for block in backbone.layers]
        self._norm_f = _norm(backbone.norm_f)
        self._pieces = StepPieces(config.d_model, self._act, self._act, self.device)
        # What the kernels of one row refuse; None where one row runs on them.
        self.row_refusal = self._refuses_row()
        self.lengths = torch.zeros(capacity, dtype=torch.int32, device=self.device)
        self._known = np.zeros(capacity, dtype=np.int64)  # the same numbers as the host counts them
        self.room = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rotary: Tensor | None = None
        heads, kv_heads = config.heads, config.kv_heads
        self._heads = (heads, kv_heads, kv_heads)
        self._size = config.d_model // heads
        self._ended = torch.zeros(capacity * kv_heads, dtype=torch.int32, device=self.device)
        self._reserve(_ROOM_UNIT)

    def _refuses_row(self) -> str | None:
        if not all(block.plain for block in self._blocks) or not is_plain(self.model.lm_head, nn.Linear):
            return "its kernels read the weights of plain linear layers; adapters and hooks are called"
        if not self.config.residual_in_fp32:
            return "its stream is float32, residual_in_fp32 is off"
        return StepPieces.refuses_row(self.config.d_model, self.config.mlp_width, self.config.parallel)

    # What goes into a slot.

    def place(self, slot: int, params: SamplingParams, position: int, before: list[int]) -> None:
        """Makes a slot ready for a row, and room for what it may write; arguments as in `DrawingSlots.place`."""
        super().place(slot, params, position, before)
        self._reserve(position + min(params.max_new_tokens, _AHEAD))

    def assign(self, slot: int, state: RowStates, row: int = 0) -> None:
        """Copies a row's state into a slot."""
        length = state.layers[0].lengths[row]
        self._reserve(length)
        for i, layer in enumerate(state.layers):
            self._keys[i][slot, :, :length] = layer.keys[row, :, :length]
            self._values[i][slot, :, :length] = layer.values[row, :, :length]
        self.lengths[slot] = length
        self._known[slot] = length

    def move(self, source: int, target: int) -> None:
        """Moves all of a row from one slot to another; draws started before are still found under the first."""
        length = int(self._known[source])
        for caches in (self._keys, self._values):
            for cache in caches:
                cache[target, :, :length] = cache[source, :, :length]
        self.lengths[target] = self.lengths[source]
        self._known[target] = length
        self._move_drawing(source, target)

    def take(self, slot: int) -> RowStates:
        """A copy of a slot's state."""
        length = int(self._known[slot])
        layers = []
        for keys, values in zip(self._keys, self._values, strict=True):
            k, v = (cache[slot : slot + 1, :, :length].clone() for cache in (keys, values))
            layers.append(AttentionState(k, v, (length,), [(length,)]))
        return RowStates(tuple(layers))

    def _reserve(self, room: int) -> None:
        """Room for so many positions in every slot; graphs made for less are made again when they are needed."""
        most = self.config.max_positions if self.config.positions == "absolute" else room
        if min(room, most) <= self.room:
            return
        room = math.ceil(max(room, self.room + self.room // 8) / _ROOM_UNIT) * _ROOM_UNIT
        if self.config.positions == "absolute":
            room = min(room, self.config.max_positions)
        if self._graphs:
            # A pool whose last graph is gone takes no other: cuBLAS may still hold memory of it.
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()
        shape = (self.capacity, self.config.kv_heads, room, self._size)
        for caches in (self._keys, self._values):
            for i in range(len(self._blocks)):
                # One layer's at a time, so that no more than that is there twice.
                grown = torch.empty(shape, dtype=self._act, device=self.device)
                if self.room:
                    grown[:, :, : self.room] = caches[i]
                    caches[i] = grown
                else:
                    caches.append(grown)
        self.room = room
        turned = self._blocks[0].mixer.turned
        if turned:
            self._rotary = rotary_table(room, turned, self.config.rotary_base, self.device)

    # What runs.

    def step(self, rows: int) -> list[int]:
        """Takes the first `rows` slots one token further; returns the number of the draw of each."""
        longest = int(self._known[:rows].max())
        if longest >= self.room:
            self._reserve(longest + 1 + _AHEAD)
        if longest >= self.room:
            raise ShapeError(
                f"CausalLM: a model with {self.config.max_positions} absolute positions reads no more than so many "
                "tokens; write fewer, or make the model with a larger max_positions or positions='rotary'"
            )
        size = bucket(rows, self.capacity)
        if size > rows:
            # Slots that are run along, since the graph is larger, begin from nothing, so that they read nothing.
            self.lengths[rows:size].zero_()
        self._known[:rows] += 1
        return super().step(rows)

    def prefill(self, ids: list[list[int]], state: RowStates, chunk: int) -> Tensor:
        """Reads tokens of one number into the rows of a state; returns the logits after each, (rows, vocabulary)."""
        tokens = torch.tensor(ids, dtype=torch.int64).to(self.device)
        part = max(1, chunk // tokens.shape[0])
        logits = None
        for start in range(0, tokens.shape[1], part):
            logits = self.decoder.prefill(tokens[:, start : start + part], state)
        assert logits is not None
        return logits

    def init_state(self, rows: int) -> RowStates:
        """The state before the first token."""
        return self.decoder.init_state(rows)

    def _rehearse(self, rows: int) -> None:
        lengths = self.lengths.clone()
        # Beyond every row's room nothing is written.
        self.lengths.fill_(self.room)
        self._step_rows(rows)
        self.lengths.copy_(lengths)

    def _step_rows(self, rows: int) -> None:
        """Launches the step of the first `rows` slots up to their logits."""
        if rows == 1 and self.row_refusal is None:
            self._step_row()
        else:
            self._step_several(rows)
        self.lengths[:rows] += 1

    def _attend(self, layer: int, qkv: Tensor, partial: Tensor) -> Tensor:
        """Attention's output (rows, d_model) from the projections (rows, heads + 2 kv_heads, d_head)."""
        rows = qkv.shape[0]
        q, k, v = qkv.split(self._heads, 1)
        out = torch.empty(rows, self._heads[0], self._size, dtype=qkv.dtype, device=self.device)
        keys, values = self._keys[layer][:rows], self._values[layer][:rows]
        attention.launch(q, k, v, keys, values, self.lengths[:rows], self._rotary, out, partial, self._ended)
        return out.flatten(1)

    def _partial(self, rows: int) -> Tensor:
        parts = attention.spans(rows, self.config.kv_heads, self.room, self._size)
        return torch.empty(parts * rows * self._heads[0] * (self._size + 2), device=self.device)

    def _embedded(self, rows: int) -> Tensor:
        backbone: Any = self.model.backbone
        x = backbone.embedding(self.tokens[:rows])
        if backbone.positions is not None:
            table = backbone.positions.weight
            x = x + F.embedding(self.lengths[:rows].clamp(max=table.shape[0] - 1), table)
        return x

    def _step_several(self, rows: int) -> None:
        config, pieces = self.config, self._pieces
        x = self._embedded(rows)
        stream = torch.empty(rows, config.d_model, device=self.device)
        normed, normed_mlp = (torch.empty_like(x) for _ in range(2))
        partial = self._partial(rows)
        begin = True
        for i, block in enumerate(self._blocks):
            one, two = block.norms
            both = (two, normed_mlp) if block.parallel else (None, None)
            pieces.norms(x, stream, one, normed, *both, begin)
            begin = False
            qkv = block.mixer.qkv_proj(normed).unflatten(1, (sum(self._heads), self._size))
            mixed = block.mixer.out_proj(self._attend(i, qkv, partial))
            if block.parallel:
                x = mixed + block.mlp(normed_mlp)
            else:
                pieces.norms(mixed, stream, two, normed, None, None, False)
                x = block.mlp(normed)
        pieces.norms(x, stream, self._norm_f, normed, None, None, False)
        head = self.model.lm_head
        logits = self.logits[:rows]
        if not is_plain(head, nn.Linear) or self._act == torch.float32:
            logits.copy_(head(normed))
        else:
            torch.mm(normed, head.weight.t(), out_dtype=torch.float32, out=logits)

    def _step_row(self) -> None:
        pieces = self._pieces
        stream = self._embedded(1).float().flatten()
        qkv = torch.empty(1, sum(self._heads), self._size, device=self.device)
        inner = torch.empty(self.config.mlp_width, device=self.device)
        act = "gelu" if self.config.mlp == "gelu" else "gated"
        partial = self._partial(1)
        for i, block in enumerate(self._blocks):
            w_qkv, w_out, w_in, w_mlp = block.weights
            b_qkv, b_out, b_in, b_mlp = block.biases
            if block.parallel and act == "gelu":
                pieces.normed_products(stream, block.norms, (w_qkv, w_in), (b_qkv, b_in), (qkv, inner), act)
                mixed = self._attend(i, qkv, partial)
                pieces.summed_products(stream, (mixed, inner), (w_out, w_mlp), (b_out, b_mlp))
                continue
            one, two = block.norms
            pieces.normed_products(stream, (one,), (w_qkv,), (b_qkv,), (qkv,), "none")
            mixed = self._attend(i, qkv, partial)
            if block.parallel:
                # Both read the stream as it is before either is added.
                pieces.normed_products(stream, (two,), (w_in,), (b_in,), (inner,), act)
                pieces.summed_products(stream, (mixed, inner), (w_out, w_mlp), (b_out, b_mlp))
            else:
                pieces.summed_products(stream, (mixed,), (w_out,), (b_out,))
                pieces.normed_products(stream, (two,), (w_in,), (b_in,), (inner,), act)
                pieces.summed_products(stream, (inner,), (w_mlp,), (b_mlp,))
        head: Any = self.model.lm_head
        pieces.normed_products(stream, (self._norm_f,), (head.weight.detach(),), (None,), (self.logits[0],), "none")
