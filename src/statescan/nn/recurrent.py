"""LSTM and GRU as layers with the interface of the others: the baselines that infer fast, train serially and forget."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from statescan.errors import ConfigError, ShapeError
from statescan.ops._checks import check_cu_seqlens

__all__ = ["GRU", "LSTM", "RecurrentOutput", "RecurrentState"]


class RecurrentState(NamedTuple):
    """hidden: (batch, d_hidden); cell: the same for an LSTM, None for a GRU."""

    hidden: Tensor
    cell: Tensor | None


class RecurrentOutput(NamedTuple):
    """output: shaped as the input; state after the last position, None unless one went in."""

    output: Tensor
    state: RecurrentState | None


# Positions that are given to the library's loop at once: cuDNN takes no more than 65,535.
_LONGEST = 1 << 15


class _Recurrent(nn.Module):
    """A recurrent net (cuDNN's on a GPU) and a projection back to the width of the residual stream."""

    _kind: type[nn.LSTM | nn.GRU]

    def __init__(
        self,
        d_model: int,
        d_hidden: int | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_hidden = d_model, d_model if d_hidden is None else d_hidden
        if self.d_model < 1 or self.d_hidden < 1:
            raise ConfigError(
                f"{type(self).__name__}: d_model and d_hidden must be >= 1, got {d_model} and {self.d_hidden}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rnn = self._kind(self.d_model, self.d_hidden, bias=bias, batch_first=True, **factory)
        self.out_proj = nn.Linear(self.d_hidden, self.d_model, bias=False, **factory)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RecurrentState:
        """Zeros for `batch` rows, where and as the parameters are unless said otherwise."""
        like = self.out_proj.weight
        zeros = torch.zeros(batch, self.d_hidden, device=device or like.device, dtype=dtype or like.dtype)
        return RecurrentState(zeros, zeros.clone() if self._kind is nn.LSTM else None)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> RecurrentOutput:
        """Runs a whole sequence.

        Args:
            x: (batch, length, d_model).
            state: what `init_state`, `forward` or `step` gave. Default: zeros, and no state comes out.
            cu_seqlens: (sequences + 1,), bounds of packed sequences; batch 1 then, and a row of the state a sequence.
        """
        name = type(self).__name__
        if x.ndim != 3 or x.shape[2] != self.d_model or 0 in x.shape:
            raise ShapeError(
                f"{name}: x must be (batch, length >= 1, d_model) with d_model {self.d_model}, got {tuple(x.shape)}"
            )
        if cu_seqlens is not None:
            check_cu_seqlens(name, cu_seqlens, x.shape[0], x.shape[1], in_graph=True)
            return self._packed(name, x, cu_seqlens.diff().tolist(), state)
        after = None if state is None else self._given(name, state, x.shape[0])
        pieces = []
        for piece in x.split(_LONGEST, 1):
            hidden, after = self.rnn(piece, after)
            pieces.append(hidden)
        hidden = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return RecurrentOutput(self.out_proj(hidden), None if state is None else self._taken(after))

    def _packed(self, name: str, x: Tensor, sizes: list[int], state: RecurrentState | None) -> RecurrentOutput:
        """All sequences side by side, each for as long as it lasts; an empty one keeps its state."""
        kept = [number for number, size in enumerate(sizes) if size]
        packed: PackedSequence = pack_sequence([x[0].split(sizes)[number] for number in kept], enforce_sorted=False)
        rows = torch.tensor(kept, device=x.device)
        given = None
        if state is not None:
            given = self._given(name, state, len(sizes))
            given = given[:, rows] if isinstance(given, Tensor) else tuple(part[:, rows] for part in given)
        hidden, after = self.rnn(packed, given)
        output = self.out_proj(torch.cat(unpack_sequence(hidden)).unsqueeze(0))
        if state is None:
            return RecurrentOutput(output, None)
        last = self._taken(after)
        cell = state.cell
        if cell is not None and last.cell is not None:
            cell = cell.index_copy(0, rows, last.cell.to(cell.dtype))
        return RecurrentOutput(
            output, RecurrentState(state.hidden.index_copy(0, rows, last.hidden.to(state.hidden.dtype)), cell)
        )

    def step(self, x: Tensor, state: RecurrentState) -> RecurrentOutput:
        """One position: x (batch, d_model)."""
        output = self.forward(x.unsqueeze(1), state)
        return RecurrentOutput(output.output.squeeze(1), output.state)

    def _taken(self, after: Any) -> RecurrentState:
        # An LSTM gives (hidden, cell), a GRU its hidden state alone, each with a dimension for the layers.
        return RecurrentState(after[0][0], after[1][0]) if self._kind is nn.LSTM else RecurrentState(after[0], None)

    def _given(self, name: str, state: RecurrentState, batch: int) -> Any:
        if tuple(state.hidden.shape) != (batch, self.d_hidden):
            raise ShapeError(
                f"{name}: state.hidden must be (batch, d_hidden) = ({batch}, {self.d_hidden}), "
                f"got {tuple(state.hidden.shape)}; make it with init_state(batch)"
            )
        if self._kind is nn.GRU:
            return state.hidden.unsqueeze(0)
        assert state.cell is not None
        return state.hidden.unsqueeze(0), state.cell.unsqueeze(0)


class LSTM(_Recurrent):
    """Long short-term memory, then a projection back to d_model.

    Args:
        d_model: width of input and output.
        d_hidden: width of the state. Default: d_model.
        bias: the gates have biases. Default True.
        device, dtype: of the parameters.

    Source: Hochreiter and Schmidhuber (1997); gates as in torch.nn.LSTM.
    """

    _kind = nn.LSTM


class GRU(_Recurrent):
    """Gated recurrent unit, then a projection back to d_model; arguments as in `LSTM`.

    Source: Cho et al. (2014), arXiv:1406.1078; gates as in torch.nn.GRU.
    """

    _kind = nn.GRU
