"""The decoder on an NVIDIA GPU: a step of all rows, drawing included, is one CUDA graph; the host only starts it.

`GraphDecoder` does so for packed Mamba models, `StepGraph` for the `step` of any other model, without drawing.

One row runs on `statescan.ops.mamba_step.decode.Stack`, a single launch that streams the weights once. More rows run
the two large products of a block, cuBLAS's or those of `mamba_step.projection`, with `mamba_step.middle` between them,
or all its products by cuBLAS with the pieces of mamba_step. Then `sample.cu` draws every row's token on the device and
writes it where the next step reads it, and into the host's memory where the host finds it in its own time.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_structure

from statescan.errors import BackendUnavailableError, ConfigError
from statescan.generate.drawing import DrawingSlots, bucket
from statescan.generate.packed import DecodeState, PackedModel
from statescan.ops import _cuda

__all__ = ["GraphDecoder", "StepGraph", "bucket", "refuses"]

_LAUNCH_BOUND = 8192  # tokens read at once, up to which launches set the time
_PREFILLS = 8  # shapes of prompts remembered
_OUT_PARTS = 4  # products that out_proj is cut into


def refuses(packed: PackedModel) -> str | None:
    """Why a packed model can't be decoded by graphs, with the cure; None where it can."""
    if packed.device.type != "cuda":
        return f"it runs on CUDA devices, the weights are on '{packed.device.type}'"
    if packed.dtype == "int8":
        return "int8 weights run on the CPU; on a GPU use dtype='bfloat16'"
    if packed.config.mixer_rms_eps is not None:
        return "its kernels leave dt, B and C as they are, mixer_rms_eps is set"
    if packed.blocks[0].d_state > 256:
        return f"its kernels hold up to 256 states a channel, d_state is {packed.blocks[0].d_state}"
    return _cuda.unavailable_reason()


class GraphDecoder(DrawingSlots):
    """Slots for rows on the device, and graphs that take all rows of the first so many slots one token further.

    Nothing here waits for the device but `read`. `statescan.generate.ahead` decides what runs in which slot.

    Args:
        packed: the model's weights on a CUDA device.
        capacity: number of slots.
        vocabulary: tokens that may be drawn; columns past it only pad the model's vocabulary.

    Raises:
        BackendUnavailableError: it can't run here; the text says why.
    """

    def __init__(self, packed: PackedModel, capacity: int, vocabulary: int) -> None:
        reason = refuses(packed)
        if reason is not None:
            raise BackendUnavailableError(f"GraphDecoder: {reason}")
        from statescan.ops.mamba_step.cuda import Pieces
        from statescan.ops.mamba_step.decode import Stack, refuses_stack
        from statescan.ops.mamba_step.middle import Middle, MiddleTiles, refuses_middle, refuses_tiles
        from statescan.ops.mamba_step.projection import Projection, refuses_projection

        device = packed.device
        super().__init__(device, capacity, vocabulary, packed.vocab_size)
        self.packed = packed
        self._act = packed.head.data.dtype
        self._pieces = Pieces(self._act, device)
        self.one_launch_refusal = refuses_stack(packed.blocks, packed.head, device)
        self._stack: Any = None
        if self.one_launch_refusal is None:
            self._stack = Stack(
                packed.blocks, packed.embedding, packed.norm_f, packed.epsilon, packed.head, packed.head_bias
            )
        self.middle_refusal = refuses_middle(packed.blocks[0], device)
        self._middle = None if self.middle_refusal else Middle(packed.blocks[0], device)
        self.tiles_refusal = refuses_tiles(packed.blocks[0], device)
        self._tiles = None if self.tiles_refusal else MiddleTiles(packed.blocks[0], device)
        in_weights = [block.in_proj.data for block in packed.blocks]
        self.in_proj_refusal = refuses_projection(in_weights, 1)
        self._in_projection = None if self.in_proj_refusal else Projection(in_weights)
        out_weights = [block.out_proj.data for block in packed.blocks]
        self.out_proj_refusal = refuses_projection(out_weights, _OUT_PARTS)
        self._out_projection = None if self.out_proj_refusal else Projection(out_weights, _OUT_PARTS)
        self.state = packed.init_state(capacity)
        # The convolution's inputs are the activations: where several rows run they are kept in as many bits.
        if capacity > 1 and self._act.itemsize == 2:
            self.state.conv = self.state.conv.to(self._act)
        # By (rows, length), those used last at the end; False where such prompts were read once.
        self._prefills: dict[tuple[int, int], _Prefill | Literal[False]] = {}
        self._biases = [
            tuple(
                None if bias is None else bias.to(self._act) for bias in (block.in_bias, block.x_bias, block.out_bias)
            )
            for block in packed.blocks
        ]

    # What goes into a slot.

    def assign(self, slot: int, state: DecodeState, row: int = 0) -> None:
        """Copies a row's state into a slot."""
        self.state.assign(slot, state, row)

    def move(self, source: int, target: int) -> None:
        """Moves all of a row from one slot to another; draws started before are still found under the first."""
        self.state.conv[:, target] = self.state.conv[:, source]
        self.state.ssm[:, target] = self.state.ssm[:, source]
        self._move_drawing(source, target)

    def take(self, slot: int) -> DecodeState:
        """A copy of a slot's state."""
        state = self.state.select([slot])
        return DecodeState(state.conv.float(), state.ssm)

    # What runs.

    def prefill(self, ids: list[list[int]], state: DecodeState, chunk: int) -> Tensor:
        """Reads tokens of one number into the rows of a state; returns the logits after each, (rows, vocabulary)."""
        tokens = torch.tensor(ids, dtype=torch.int64).to(self.device)
        rows, length = tokens.shape
        if rows * length > min(chunk, _LAUNCH_BOUND):
            return self.packed.prefill(tokens, state, together=True, chunk=chunk)
        # Reading so few tokens takes the host longer than the device. The second prompts of one shape are captured.
        shape = (rows, length)
        graph = self._prefills.pop(shape, None)
        if graph is None:
            self._prefills[shape] = False
            while len(self._prefills) > _PREFILLS:
                del self._prefills[next(iter(self._prefills))]
            return self.packed.prefill(tokens, state, together=True, chunk=chunk)
        self._prefills[shape] = graph = graph or _Prefill(self.packed, tokens, self._pool)
        return graph(tokens, state)

    def init_state(self, rows: int) -> DecodeState:
        """The state before the first token."""
        return self.packed.init_state(rows)

    def _rehearse(self, rows: int) -> None:
        """A run whose states go to a scratch copy."""
        saved = self.state
        self.state = DecodeState(saved.conv[:, :rows].clone(), saved.ssm[:, :rows].clone())
        self._step_rows(rows)
        self.state = saved

    def _step_rows(self, rows: int) -> None:
        """Launches the step of the first `rows` slots up to their logits."""
        packed, state = self.packed, self.state
        if rows == 1 and self._stack is not None:
            conv = state.conv[:, :1].float()
            self._stack.step(self.tokens, conv, state.ssm, self.logits)
            if conv.dtype != state.conv.dtype:
                state.conv[:, :1] = conv
            return
        first = packed.blocks[0]
        d_inner, d_state, rank = first.d_inner, first.d_state, first.dt_rank
        act, pieces, device = self._act, self._pieces, self.device
        x = F.embedding(self.tokens[:rows], cast(Tensor, packed.embedding.data))
        stream = torch.empty(rows, first.d_model, device=device)
        normed = torch.empty(rows, first.d_model, dtype=act, device=device)
        u, y = (torch.empty(rows, d_inner, dtype=act, device=device) for _ in range(2))
        middle: Any = next((one for one in (self._middle, self._tiles) if one is not None and one.pays(rows)), None)
        in_projection, out_projection = (
            one if one is not None and one.pays(rows) else None for one in (self._in_projection, self._out_projection)
        )
        before = None
        for i, block in enumerate(packed.blocks):
            in_bias, x_bias, out_bias = self._biases[i]
            pieces.add_norm(x, before, stream, block.norm, block.epsilon, normed)
            before = stream
            if in_projection is not None:
                uz = in_projection(i, normed, block.in_bias)
            else:
                uz = F.linear(normed, block.in_proj.data, in_bias)
            if middle is not None:
                middle(uz, state.conv[i], state.ssm[i], block, y)
            else:
                pieces.conv_step(uz[:, :d_inner], state.conv[i], block.conv_weight, block.conv_bias, u)
                selected = F.linear(u, block.x_proj.data, x_bias)
                low, B, C = selected.split([rank, d_state, d_state], dim=1)
                dt = F.linear(low, block.dt_proj.data)
                z = uz[:, d_inner:]
                pieces.state_step(state.ssm[i], u, z, dt, block.A, B, C, block.D, block.dt_bias, y)
            if out_projection is not None:
                x = out_projection(i, y, block.out_bias)
            else:
                x = self._out_proj(y, block.out_proj.data, out_bias)
        pieces.add_norm(x, before, stream, packed.norm_f, packed.epsilon, normed)
        logits = self.logits[:rows]
        if act == torch.float32:
            torch.mm(normed, packed.head.data.t(), out=logits)
        else:
            torch.mm(normed, packed.head.data.t(), out_dtype=torch.float32, out=logits)
        if packed.head_bias is not None:
            logits += packed.head_bias

    def _out_proj(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y W^T + b, (rows, d_model), or parts of it, (parts, rows, d_model), that the norm adds up.

        So few outputs a row leave multiprocessors idle; as products over a quarter of the columns each, all work.
        """
        rows, d_inner = y.shape
        if bias is not None or y.dtype == torch.float32 or d_inner % (8 * _OUT_PARTS):
            return F.linear(y, weight, bias)
        parts = d_inner // _OUT_PARTS
        return torch.bmm(
            y.view(rows, _OUT_PARTS, parts).transpose(0, 1), weight.view(-1, _OUT_PARTS, parts).permute(1, 2, 0)
        )


class _Prefill:
    """Prompts of one shape read by one CUDA graph, bit by bit as `PackedModel.prefill` reads them.

    Args:
        packed: which has read prompts of this shape before, so that its kernels are ready.
        tokens: (rows, length) of that shape.
        pool: of memory shared with graphs that are never run at the same time.
    """

    def __init__(self, packed: PackedModel, tokens: Tensor, pool: Any) -> None:
        self._tokens, self._state = tokens.clone(), packed.init_state(tokens.shape[0])
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.device(tokens.device), torch.cuda.graph(self._graph, pool=pool):
            self._logits = packed.prefill(self._tokens, self._state, together=True, chunk=tokens.numel())

    def __call__(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Logits after the last tokens, (rows, vocabulary); the state is moved on in place."""
        self._tokens.copy_(tokens)
        self._state.conv.copy_(state.conv)
        self._state.ssm.copy_(state.ssm)
        self._graph.replay()
        state.conv.copy_(self._state.conv)
        state.ssm.copy_(self._state.ssm)
        return self._logits.clone()


class StepGraph:
    """The `step` of a model as one CUDA graph: a token more for `batch` rows, their states in place.

    For any model with ``init_state(batch)`` and ``step(tokens, state)``, whether it gives ``logits`` and a new
    ``state`` (`statescan.models.CausalLM`) or the logits alone and changes the state it was handed (`PackedModel`).
    All that a step needs to know must lie on the device, in tensors whose shapes stay.

    Args:
        model: on a CUDA device, in evaluation mode.
        batch: number of rows.

    Attributes:
        state: the state of all rows; write into its tensors to begin elsewhere.
        tokens: (batch,) int64, read by the next step.
        logits: (batch, vocabulary), of the last step.

    Raises:
        ConfigError: a step of this model can't be captured; the text says why.
    """

    def __init__(self, model: Any, batch: int) -> None:
        self._model = model
        self.state: Any = model.init_state(batch)
        leaves = tree_leaves(self.state)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = tensors[0].device if tensors else getattr(model, "device", torch.device("cpu"))
        if device.type != "cuda":
            raise ConfigError(f"StepGraph: model must be on a CUDA device, its state is on '{device}'; move it there")
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        with torch.no_grad(), torch.cuda.device(device):
            # What is compiled, allocated and chosen at a first call is so before the capture.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                scratch = model.init_state(batch)
                for _ in range(2):
                    scratch = self._run(scratch)[1]
            torch.cuda.current_stream().wait_stream(aside)
            self._refuse_change(self.state, scratch)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.logits, after = self._run(self.state)
                for old, new in zip(leaves, tree_leaves(after), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)

    def __call__(self, tokens: Tensor | None = None) -> Tensor:
        """`logits` after one more token a row: `tokens` (batch,), or those that stand in ``self.tokens``."""
        if tokens is not None:
            self.tokens.copy_(tokens)
        self._graph.replay()
        return self.logits

    def _run(self, state: Any) -> tuple[Tensor, Any]:
        made = self._model.step(self.tokens, state)
        return (made, state) if isinstance(made, Tensor) else (made.logits, made.state)

    @staticmethod
    def _refuse_change(before: Any, after: Any) -> None:
        """Raises where a step changed what a graph can't change: all of the state but the values of its tensors."""
        old, new = tree_leaves(before), tree_leaves(after)
        for a, b in zip(old, new, strict=False):
            if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) != (b.shape, b.dtype):
                raise ConfigError(
                    f"StepGraph: the state's tensors must keep shape and dtype, {tuple(a.shape)} {a.dtype} became "
                    f"{tuple(b.shape)} {b.dtype}; reserve room for all tokens"
                )
            if isinstance(a, (int, float, str)) and a != b:
                raise ConfigError(
                    "StepGraph: what changes in the state must lie in tensors on the device, a step made "
                    f"{b!r} of {a!r}"
                )
        if tree_structure(before) != tree_structure(after):
            raise ConfigError("StepGraph: a step must leave the state's structure as it is, it gave another")
