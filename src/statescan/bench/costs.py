"""What a benchmark can't do without: bytes, matrix products, special functions, multiply-adds; and the time they take.

A floor is the largest of the four times, as if everything else ran beside it: no version is much faster. Rates are the
machine's own, measured (copy bandwidth, matrix products) or counted from its clock (a GPU's special functions and
multiply-adds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from statescan.models.baseline_config import ModelConfig, TransformerConfig
from statescan.models.config import MambaConfig
from statescan.models.counters import flops_per_token, parameter_count, state_bytes

__all__ = [
    "Cost",
    "attention_cost",
    "block_cost",
    "conv_cost",
    "decode_cost",
    "norm_cost",
    "prefill_cost",
    "scan_cost",
    "train_cost",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WIDTH = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Cost:
    """The least that a computation has to do.

    Args:
        bytes: read or written, every input and output once.
        flops: of matrix products, a multiply-add counted two.
        special: exponentials, reciprocals, logarithms.
        fma: multiply-adds, additions and multiplications outside of matrix products, each counted one.
    """

    bytes: float = 0.0
    flops: float = 0.0
    special: float = 0.0
    fma: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes, self.flops + other.flops, self.special + other.special, self.fma + other.fma
        )

    def __mul__(self, count: float) -> Cost:
        return Cost(self.bytes * count, self.flops * count, self.special * count, self.fma * count)

    def floors(self, ceilings: Mapping[str, float], dtype: str) -> dict[str, float]:
        """Milliseconds that each part takes alone at this machine's rates; parts without a known rate are left out.

        Args:
            ceilings: as `statescan.bench.measure` gives them, in 1e9 a second.
            dtype: of the matrix products.
        """
        memory = ceilings.get("copy_gb_s") or ceilings.get("read_gb_s")
        matmul = ceilings.get("matmul_f32_gflops" if dtype == "float32" else "matmul_bf16_gflops")
        prepacked = ceilings.get("matmul_f32_prepacked_gflops", 0.0) if dtype == "float32" else 0.0
        rates = {
            "bytes": (self.bytes, memory),
            "flops": (self.flops, max(matmul or 0.0, prepacked)),
            "special": (self.special, ceilings.get("special_g_s")),
            "fma": (self.fma, ceilings.get("fma_g_s")),
        }
        return {name: amount / rate / 1e6 for name, (amount, rate) in rates.items() if amount and rate}


def scan_cost(batch: int, length: int, d_inner: int, d_state: int, dtype: str, mode: str, gated: bool = True) -> Cost:
    """The selective scan with D, dt_bias and softplus, and with the gate z where `gated`.

    Forward, a position and channel: d_state exponentials, one for softplus, an exponential and a reciprocal for
    silu(z); four multiply-adds a state (dt A; times h; plus dt u B; times C). Backward: the states once more, the
    adjoint (times decay, plus C dy), dC, dB, d(dt u), and three for d dt and dA: twelve a state, and a reciprocal for
    the derivative of softplus.
    """
    width, cells = _WIDTH[dtype], float(batch * length * d_inner)
    tensors = 3 if gated else 2  # u, dt, z
    matrices = 2.0 * batch * length * d_state * width
    gate = 2 if gated else 0
    forward = Cost(
        bytes=cells * width * (tensors + 1) + matrices,
        special=cells * (d_state + 1 + gate),
        fma=cells * 4 * d_state,
    )
    backward = Cost(
        bytes=cells * width * (2 * tensors + 1) + 2 * matrices,
        special=cells * (d_state + 2 + gate),
        fma=cells * 12 * d_state,
    )
    return _mode(mode, forward, backward)


def conv_cost(batch: int, length: int, d: int, width: int, dtype: str, mode: str) -> Cost:
    """The causal convolution with bias and SiLU: x in, y out; back, x and dy in, dx out."""
    size, cells = _WIDTH[dtype], float(batch * length * d)
    forward = Cost(bytes=2 * cells * size, special=2 * cells, fma=width * cells)
    backward = Cost(bytes=3 * cells * size, special=2 * cells, fma=3 * width * cells)
    return _mode(mode, forward, backward)


def norm_cost(batch: int, length: int, d: int, dtype: str, mode: str) -> Cost:
    """Residual addition and RMSNorm: x in `dtype`, the residual stream in float32, read and written once each.

    Back: the stream and the gradients of both results in, the gradient of their sum out: once in each of the two
    dtypes, or once for both where they are one.
    """
    size, cells = _WIDTH[dtype], float(batch * length * d)
    second = size if size != 4 else 0
    forward = Cost(bytes=cells * (2 * size + 8), fma=4 * cells)
    backward = Cost(bytes=cells * (size + 8 + 4 + second), fma=8 * cells)
    return _mode(mode, forward, backward)


def attention_cost(batch: int, length: int, heads: int, head_dim: int, dtype: str, mode: str) -> Cost:
    """Causal attention: half of the score matrix, two products forward and five backward."""
    size, cells = _WIDTH[dtype], float(batch * length * heads * head_dim)
    scores = batch * heads * length * length / 2
    forward = Cost(bytes=4 * cells * size, flops=4 * scores * head_dim, special=scores)
    backward = Cost(bytes=8 * cells * size, flops=10 * scores * head_dim, special=scores)
    return _mode(mode, forward, backward)


def block_cost(config: MambaConfig, batch: int, length: int, dtype: str, mode: str) -> Cost:
    """One block: norm, projections, convolution, scan, each part's tensors moved once between them."""
    d, i, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank_size
    size, rows = _WIDTH[dtype], float(batch * length)
    # (inputs, outputs) of the four projections
    products = ((d, 2 * i), (i, r + 2 * n), (r, i), (i, d))
    forward = Cost(
        bytes=sum(rows * size * (a + b) + size * a * b for a, b in products),
        flops=sum(2 * rows * a * b for a, b in products),
    )
    backward = Cost(
        bytes=sum(rows * size * 2 * (a + b) + 2 * size * a * b for a, b in products),
        flops=2 * forward.flops,
    )
    return (
        _mode(mode, forward, backward)
        + norm_cost(batch, length, d, dtype, mode)
        + conv_cost(batch, length, i, config.d_conv, dtype, mode)
        + scan_cost(batch, length, i, n, dtype, mode)
    )


def train_cost(config: ModelConfig, batch: int, length: int, dtype: str) -> Cost:
    """A training step: every block forward and backward, the head three times, AdamW over float32 weights.

    AdamW reads weight, gradient and two moments and writes all but the gradient: 28 bytes a weight. What `recompute`
    does again is not counted.
    """
    d, rows = config.d_model, float(batch * length)
    size = _WIDTH[dtype]
    if not isinstance(config, MambaConfig):
        flops = rows * flops_per_token(config, length // 2).training
        return Cost(bytes=28.0 * parameter_count(config), flops=flops)
    head = Cost(
        bytes=3 * rows * d * size,
        flops=6 * rows * d * config.padded_vocab_size,
        special=rows * config.padded_vocab_size,
    )
    optimizer = Cost(bytes=28.0 * parameter_count(config))
    return block_cost(config, batch, length, dtype, "forward+backward") * config.n_layer + head + optimizer


def prefill_cost(config: ModelConfig, batch: int, length: int, dtype: str) -> Cost:
    """Reading prompts, the last position's logits only."""
    head = 2.0 * batch * config.d_model * config.padded_vocab_size
    if not isinstance(config, MambaConfig):
        every = float(flops_per_token(config, length // 2).forward - 2 * config.d_model * config.padded_vocab_size)
        return Cost(flops=batch * length * every + head)
    return block_cost(config, batch, length, dtype, "forward") * config.n_layer + Cost(flops=head)


def decode_cost(config: ModelConfig, batch: int, dtype: str, context: int = 0) -> Cost:
    """One token a row: every weight read once for all rows, every row's float32 state read and written; of attention's
    cache the `context` positions that are filled, read once, and one written."""
    weights = float(parameter_count(config) * _WIDTH[dtype])
    if not isinstance(config, MambaConfig):
        # Of a table that is not the head's too, a row is read for each token.
        table = 0 if config.tie_embeddings else config.padded_vocab_size * config.d_model * _WIDTH[dtype]
        held = _DTYPES[dtype]
        read = state_bytes(config, batch, held, context=context)
        # A cache grows by one position, any other state is written anew.
        written = state_bytes(config, batch, held, context=1) if isinstance(config, TransformerConfig) else read
        flops = float(batch * flops_per_token(config, context).forward)
        return Cost(bytes=weights - table + read + written, flops=flops)
    return Cost(bytes=weights + 2 * state_bytes(config, batch), flops=float(batch * flops_per_token(config).forward))


def _mode(mode: str, forward: Cost, backward: Cost) -> Cost:
    if mode in ("forward", "inference"):
        return forward
    return backward if mode == "backward" else forward + backward
