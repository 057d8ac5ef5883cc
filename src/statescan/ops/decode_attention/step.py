"""Launches of step.cu: what stands around attention in a captured Transformer's step on an NVIDIA GPU."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from statescan.ops import _cuda
from statescan.ops._cuda import i32

__all__ = ["Norm", "StepPieces"]

_SOURCE = Path(__file__).with_name("step.cu")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_THREADS = 256
_SHARED_LIMIT = 46 * 1024  # bytes that a block declares, with room for its sums


class Norm(NamedTuple):
    """gain, bias: (d_model,) float32, bias None for a root-mean-square norm; epsilon: added to the mean square."""

    gain: Tensor
    bias: Tensor | None
    epsilon: float


class StepPieces:
    """Kernels for one width and one dtype of weights.

    Args:
        d_model: width of the residual stream, a multiple of 8.
        act: dtype of several rows' activations.
        weights: dtype of the weights.
        device: a CUDA device.
    """

    def __init__(self, d_model: int, act: torch.dtype, weights: torch.dtype, device: torch.device) -> None:
        self._device = device.index if device.index is not None else torch.cuda.current_device()
        self._options = {"IN": _TYPES[act], "WT": _TYPES[weights], "C": d_model}
        # Two blocks of a multiprocessor are enough loads on their way to fill the memory's time.
        self._blocks = 2 * torch.cuda.get_device_properties(device).multi_processor_count

    @staticmethod
    def refuses_row(d_model: int, inner: int, pair: bool) -> str | None:
        """Why the products of one row don't take these widths; None where they do."""
        if d_model % 8 or inner % 8:
            return f"its rows are read eight numbers at a time, d_model is {d_model} and the MLP's width {inner}"
        if 4 * d_model * (2 if pair else 1) > _SHARED_LIMIT:
            return f"a block holds the stream in its shared memory, d_model is {d_model}"
        return None

    def norms(
        self, x: Tensor, stream: Tensor, one: Norm, first: Tensor, two: Norm | None, second: Tensor | None, begin: bool
    ) -> None:
        """stream = x + stream (begin: x); first = one(stream), second = two(stream); (rows, d_model)."""
        options = {**self._options, "LAYER": int(one.bias is not None), "PAIR": int(two is not None)}
        run = _cuda.kernel(_SOURCE, "norms", {**options, "FIRST": int(begin)}, _THREADS, self._device)
        other = (None, None) if two is None else (two.gain, two.bias)
        run((x.shape[0], 1, 1), x, stream, ctypes.c_float(one.epsilon), one.gain, one.bias, *other, first, second)

    def normed_products(
        self,
        stream: Tensor,
        norms: tuple[Norm, ...],
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        outputs: tuple[Tensor, ...],
        act: str,
    ) -> None:
        """outputs[i] = weights[i] norms[i](stream) + biases[i] for one or two products; the last through `act`.

        Args:
            stream: (d_model,) float32.
            norms: one a product.
            weights: (outputs, d_model), gated twice as many rows.
            biases: float32 or None.
            outputs: float32.
            act: "none", "gelu", or "gated": silu of the first half's rows times the second half's.
        """
        pair = len(weights) == 2
        options = {
            **self._options,
            "LAYER": int(norms[0].bias is not None),
            "PAIR": int(pair),
            "ACT": ("none", "gelu", "gated").index(act),
        }
        run = _cuda.kernel(_SOURCE, "normed_products", options, _THREADS, self._device)
        first = (weights[0], biases[0], outputs[0], i32(outputs[0].numel())) if pair else (None, None, None, i32(0))
        other = norms[-1]
        rows = outputs[-1].numel() + (outputs[0].numel() if pair else 0)
        run(
            (min(self._blocks, math.ceil(rows / (_THREADS // 32))), 1, 1),
            *(stream, ctypes.c_float(norms[0].epsilon), norms[0].gain, norms[0].bias, other.gain, other.bias),
            *first,
            *(weights[-1], biases[-1], outputs[-1], i32(outputs[-1].numel())),
        )

    def summed_products(
        self,
        stream: Tensor,
        inputs: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
    ) -> None:
        """stream += sum of weights[i] inputs[i] + biases[i], over one or two; inputs float32, stream (d_model,)."""
        sizes = [x.numel() for x in inputs]
        options = {**self._options, "C1": sizes[0], "C2": sizes[1] if len(sizes) == 2 else 0}
        shared = 4 * sum(sizes) + 64
        run = _cuda.kernel(_SOURCE, "summed_products", options, _THREADS, self._device, shared=shared)
        second = (inputs[1], weights[1], biases[1]) if len(sizes) == 2 else (None, None, None)
        rows = stream.numel()
        run(
            (min(self._blocks, math.ceil(rows / (_THREADS // 32))), 1, 1),
            *(stream, inputs[0], weights[0], biases[0], *second, i32(rows)),
        )
