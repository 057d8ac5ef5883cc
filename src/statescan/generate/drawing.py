"""Slots for rows on an NVIDIA GPU: a step of all, drawing included, is one CUDA graph; the host only starts it.

`statescan.generate.graphs` and `statescan.generate.attention_graphs` say what a step is. `sample.cu` draws every row's
token on the device and writes it where the next step reads it, and into the host's memory where the host finds it in
its own time.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from statescan.errors import ConfigError
from statescan.generate.sampling import SamplingParams
from statescan.ops import _cuda
from statescan.ops._cuda import i32

__all__ = ["DrawingSlots", "bucket"]

_DRAW = Path(__file__).with_name("sample.cu")
_DRAW_THREADS = 1024
_SLOT_WORDS = 7  # 64-bit words of `struct Slot` in sample.cu
_RING = 256  # tokens of a slot kept in the host's memory until they are read
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
_GREEDY, _LOGPROB = 1, 2
_BROKEN = 0xFFFFFFFF  # in place of a token


def bucket(rows: int, capacity: int) -> int:
    """Rows that the graph runs which takes `rows`: a few sizes, so that there are few graphs."""
    for size in _BUCKETS:
        if size >= rows:
            return min(size, capacity)
    return min(math.ceil(rows / 64) * 64, capacity)


class DrawingSlots:
    """What decoders on a GPU share: the slots' tokens, how each is drawn, and the graphs of their steps.

    A subclass has `_step_rows` and `_rehearse`, and moves its rows' states. Nothing here waits for the device but
    `read`.

    Args:
        device: a CUDA device.
        capacity: number of slots.
        vocabulary: tokens that may be drawn; columns past it only pad the model's vocabulary.
        columns: the model's vocabulary.
    """

    def __init__(self, device: torch.device, capacity: int, vocabulary: int, columns: int) -> None:
        if not 1 <= vocabulary <= columns:
            raise ConfigError(
                f"{type(self).__name__}: vocabulary must be from 1 to the model's {columns}, got {vocabulary}; "
                "use the model's own tokenizer"
            )
        self.device, self.capacity, self.vocabulary = device, capacity, vocabulary
        self.logits = torch.zeros(capacity, columns, device=device)
        self.tokens = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._slots = torch.zeros(capacity, _SLOT_WORDS, dtype=torch.int64, device=device)
        self._draws = torch.zeros(capacity, dtype=torch.int32, device=device)
        # Eight blocks draw for a row; a vocabulary of bytes fits one.
        self._draw_blocks = 8 if vocabulary > 4 * _DRAW_THREADS else 1
        self._seen = torch.zeros(capacity, vocabulary, dtype=torch.uint8, device=device)
        self._ring = torch.zeros(capacity, _RING, dtype=torch.int64).pin_memory()
        self._ring_logprob = torch.zeros(capacity, _RING).pin_memory()
        self._ring_words = self._ring.numpy()
        self._ring_values = self._ring_logprob.numpy()
        self._counts = np.zeros(capacity, dtype=np.int64)  # draws started in each slot, as the device counts them
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()

    def place(self, slot: int, params: SamplingParams, position: int, before: list[int]) -> None:
        """Makes a slot ready for a row: how it draws, and what the repetition penalty has seen.

        Args:
            params: with a seed where they are not greedy.
            position: number of tokens before the next one, prompt included.
            before: those tokens.
        """
        flags = (_GREEDY if params.greedy else 0) | (_LOGPROB if params.logprobs else 0)
        log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
        data = struct.pack(
            "<QQQffffiiQ",
            params.seed or 0,
            params.stream,
            position,
            params.temperature,
            params.top_p,
            log_min_p,
            params.repetition_penalty,
            min(params.top_k, 2**31 - 1),
            flags,
            0,
        )
        self._slots[slot].copy_(torch.frombuffer(bytearray(data), dtype=torch.int64), non_blocking=True)
        if params.repetition_penalty != 1:
            self._seen[slot].zero_()
            ids = torch.tensor([token for token in before if token < self.vocabulary], dtype=torch.int64)
            self._seen[slot].index_fill_(0, ids.to(self.device), 1)

    def _move_drawing(self, source: int, target: int) -> None:
        """Moves how a row is drawn, and its last token."""
        for tensor in (self._slots, self.tokens, self._seen):
            tensor[target] = tensor[source]

    def draw(self, slot: int, logits: Tensor) -> int:
        """Draws the slot's next token from logits (vocabulary,), as after a prompt; returns the draw's number."""
        self.logits[slot].copy_(logits)
        self._launch_draw(self.logits[slot : slot + 1], slot, 1)
        self._counts[slot] += 1
        return int(self._counts[slot])

    def step(self, rows: int) -> list[int]:
        """Takes the first `rows` slots one token further; returns the number of the draw of each."""
        size = bucket(rows, self.capacity)
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = self._capture(size)
        graph.replay()
        self._counts[:size] += 1
        return self._counts[:rows].tolist()

    def read(
        self, slots: Sequence[int], numbers: Sequence[int], wait: bool = True
    ) -> tuple[list[int], list[float]] | None:
        """Tokens and log probabilities of one draw a slot, by their numbers; None where not all of them are there yet
        and `wait` is off. Log probabilities that were not asked for are junk.

        Raises:
            ConfigError: the logits of one were no numbers to draw from.
        """
        count = np.asarray(numbers)
        at = (np.asarray(slots), count % _RING)
        looks = 0
        while True:
            words = self._ring_words[at]
            if ((words >> 32) == count).all():
                tokens = words & 0xFFFFFFFF
                if (tokens == _BROKEN).any():
                    raise ConfigError(
                        "Engine: logits must be finite or minus infinity, one of them finite, got others (the "
                        "model's output is not finite); look at its weights, or decode them in float32"
                    )
                return tokens.tolist(), self._ring_values[at].tolist()
            if not wait:
                return None
            looks += 1
            if looks % 1024 == 0:
                # Nothing for milliseconds: a failed kernel would never write, and says so here.
                torch.cuda.current_stream(self.device).synchronize()
            elif looks > 16:
                time.sleep(0)

    def _launch_draw(self, logits: Tensor, first: int, rows: int) -> None:
        blocks = self._draw_blocks
        options = {"IN": 0, "CL": blocks, "ITEMS": math.ceil(self.vocabulary / (blocks * _DRAW_THREADS))}
        run = _cuda.kernel(_DRAW, "draw", options, _DRAW_THREADS, self.device.index or 0, cluster=blocks)
        run(
            (rows, 1, 1),
            logits,
            logits.stride(0),
            self._seen,
            i32(self.vocabulary),
            i32(first),
            self._slots,
            self.tokens,
            self._draws,
            self._ring,
            self._ring_logprob,
            i32(_RING),
        )

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        # Kernels are compiled and cuBLAS is set up by a run that is undone.
        with torch.no_grad(), torch.cuda.device(self.device):
            self._rehearse(size)
            torch.cuda.current_stream(self.device).synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._step_rows(size)
                self._launch_draw(self.logits, 0, size)
        return graph

    def _rehearse(self, rows: int) -> None:
        """Launches all that a step does once, and leaves every state as it was."""
        raise NotImplementedError

    def _step_rows(self, rows: int) -> None:
        """Launches the step of the first `rows` slots up to their logits."""
        raise NotImplementedError
