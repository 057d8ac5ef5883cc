"""compute-sanitizer over GPU kernels of this package on small shapes: ``python tests/gpu/sanitize.py [TOOL]...``.

What only a decoder's graph launches is launched here one by one: without the caching allocator nothing can be captured.

Tools are memcheck and racecheck, both by default. For each tool the script runs itself under compute-sanitizer, once an
op, and fails where the tool reports anything. It also fails where it leaves something out: without a GPU, without
compute-sanitizer, or where a backend can't run on this machine, it names what is missing, and ends well only with
--may-skip.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from statescan import ops
from statescan.generate import SamplingParams
from statescan.models import Block, CausalLM, MambaConfig, TransformerConfig
from statescan.ops import _cuda
from statescan.ops._dispatch import BACKENDS
from statescan.testing import REAL_CASES, ScanCase, as_update, refusal, scan_problem
from statescan.testing.conv import CONV_CASES, ConvCase, conv_problem

TOOLS = ("memcheck", "racecheck")
TOOL = "STATESCAN_SANITIZER"  # the environment's name of the one that a run is under
ELSEWHERE = "/usr/local/cuda/bin/compute-sanitizer"  # where the CUDA toolkit puts it, often not on PATH
# Where several threads hold the same number, Triton lets each of them write it to the same place of shared memory when
# it changes a tensor's layout: one instruction against itself, one value. Racecheck calls that a race; in our own CUDA
# it is one.
RACE = re.compile(r"Race reported between (Write access at \S+) .*\n=+\s+and (\w+ access at \S+) ")
GPU_BACKENDS = ("cuda", "triton", "cauchy_triton")
LOW = (torch.float32, torch.bfloat16)
PACKED = ("float32", "bfloat16", "float16")  # weights of a decoder on a GPU
DEVICE = "cuda"  # of what only a decoder launches; a test without a GPU takes another

EVERY: dict[str, Any] = {"D": True, "z": True, "dt_bias": True, "initial_state": True, "dt_softplus": True}
# Whole and cut tiles and blocks of channels, one pass and chunks of time, packed sequences, groups, many states.
SCANS = {
    "whole blocks, cut tile": ScanCase(batch=2, length=45, d_inner=64, d_state=16, **EVERY),
    "cut block": ScanCase(batch=1, length=37, d_inner=72, d_state=16, **EVERY),
    "groups": ScanCase(batch=1, length=40, d_inner=128, d_state=16, B=2, C=2, **EVERY),
    "many states": ScanCase(batch=1, length=21, d_inner=33, d_state=100, **EVERY),
    "chunks": ScanCase(batch=1, length=600, d_inner=32, d_state=16, **EVERY),
    "chunks, packed": ScanCase(batch=1, length=600, d_inner=32, d_state=16, cu_seqlens=(0, 5, 5, 300, 600), **EVERY),
    **{name: REAL_CASES[name] for name in ("smallest", "no options", "fixed B and C", "packed, empty ones")},
}
IN_TWOS = {  # of the backward's blocks, in the form that models use
    "whole blocks, cut tile": ScanCase(batch=2, length=77, d_inner=128, d_state=16, **EVERY),
    "chunks": ScanCase(batch=1, length=600, d_inner=128, d_state=16, **EVERY),
}
CONVS = {
    "tiles": ConvCase(length=150, features=136),
    "cut": ConvCase(length=77, features=67),
    **{name: CONV_CASES[name] for name in ("one token", "packed", "wide filter over a tile", "plain")},
}


def differentiate(outputs: Any, inputs: list[Tensor]) -> None:
    """Runs the backward pass of everything that has one."""
    found = [
        o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor) and o.requires_grad
    ]
    if found:
        torch.autograd.grad(found, inputs, [torch.randn_like(o) for o in found], allow_unused=True)


def with_gradients(problem: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    leaves = {
        k: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in problem.items()
    }
    return leaves, [v for v in leaves.values() if isinstance(v, Tensor) and v.requires_grad]


def selective_scan(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, case in SCANS.items():
        for dtype in (*LOW, torch.float64) if name == "cut block" and backend == "cuda" else LOW:

            def run(case: ScanCase = case, dtype: torch.dtype = dtype) -> None:
                problem, leaves = with_gradients(scan_problem(case, dtype, device="cuda"))
                differentiate(ops.selective_scan(**problem, return_final_state=True, backend=backend), leaves)

            yield f"{name}, {dtype}", run
    if backend == "cuda":
        for name, case in IN_TWOS.items():

            def run_in_twos(case: ScanCase = case) -> None:
                with blocks_in_twos() as possible:
                    if not possible:
                        return  # no room on this chip
                    problem, leaves = with_gradients(scan_problem(case, torch.bfloat16, device="cuda"))
                    differentiate(ops.selective_scan(**problem, return_final_state=True, backend="cuda"), leaves)

            yield f"{name}, blocks in twos", run_in_twos


@contextlib.contextmanager
def blocks_in_twos() -> Iterator[bool]:
    """Two blocks of the backward are one, as they are where they fill the chip; whether this one has room for that."""
    from statescan.ops.selective_scan import cuda as scan

    rule, scan._in_twos = scan._in_twos, lambda blocks, multiprocessors: True
    scan.plan.cache_clear()
    room = scan._room(torch.cuda.get_device_properties(0))
    try:
        yield scan.plan(1, 64, 128, 16, 1, 1, False, False, False, *room).halves
    finally:
        scan._in_twos = rule
        scan.plan.cache_clear()


def selective_state_update(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for name in ("every option", "no options", "groups", "fixed B and C"):
        for dtype in LOW:

            def run(case: ScanCase = REAL_CASES[name], dtype: torch.dtype = dtype) -> None:
                problem = as_update(scan_problem(case, dtype, device="cuda"))
                ops.selective_state_update(**problem, backend=backend)

            yield f"{name}, {dtype}", run


def causal_conv1d(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, case in CONVS.items():
        for dtype in LOW:

            def run(case: ConvCase = case, dtype: torch.dtype = dtype) -> None:
                problem, leaves = with_gradients(conv_problem(case, dtype, device="cuda"))
                differentiate(ops.causal_conv1d(**problem, return_final_state=True, backend=backend), leaves)

            yield f"{name}, {dtype}", run


def causal_conv1d_update(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for features in (67, 128):
        for dtype in LOW:

            def run(features: int = features, dtype: torch.dtype = dtype) -> None:
                x, weight, bias = (torch.randn(*s, device="cuda") for s in ((3, features), (features, 4), (features,)))
                state = torch.randn(3, 3, features, device="cuda", dtype=dtype)
                ops.causal_conv1d_update(x.to(dtype), state, weight, bias, activation="silu", backend=backend)

            yield f"{features} channels, {dtype}", run


def add_rms_norm(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for rows, width in ((5, 67), (3, 768), (2, 1024)):
        for dtype in LOW:

            def run(rows: int = rows, width: int = width, dtype: torch.dtype = dtype) -> None:
                x = torch.randn(1, rows, width, device="cuda", dtype=dtype, requires_grad=True)
                residual = torch.randn(1, rows, width, device="cuda", requires_grad=True)
                weight = torch.randn(width, device="cuda", requires_grad=True)
                differentiate(
                    tuple(ops.add_rms_norm(x, weight, residual=residual, backend=backend)), [x, residual, weight]
                )

            yield f"{rows} x {width}, {dtype}", run


def decode_attention(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in LOW:
        for size, turned in ((64, 64), (128, 0)):

            def run(dtype: torch.dtype = dtype, size: int = size, turned: int = turned) -> None:
                q, k, v = (torch.randn(2, heads, size, device="cuda", dtype=dtype) for heads in (6, 2, 2))
                keys, values = (torch.randn(2, 2, 300, size, device="cuda", dtype=dtype) for _ in range(2))
                lengths = torch.tensor([0, 299], dtype=torch.int32, device="cuda")
                rotary = torch.rand(300, turned, device="cuda") if turned else None
                ops.decode_attention(q, k, v, keys, values, lengths, rotary=rotary, backend=backend)

            yield f"heads of {size}, {dtype}", run


def linear_cross_entropy(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for rows, vocabulary in ((7, 101), (33, 1000)):
        for dtype in LOW:

            def run(rows: int = rows, vocabulary: int = vocabulary, dtype: torch.dtype = dtype) -> None:
                hidden = torch.randn(rows, 64, device="cuda", dtype=dtype, requires_grad=True)
                weight = torch.randn(vocabulary, 64, device="cuda", dtype=dtype, requires_grad=True)
                targets = torch.randint(0, vocabulary, (rows,), device="cuda")
                targets[0] = -100
                differentiate(ops.linear_cross_entropy(hidden, weight, targets, backend=backend), [hidden, weight])

            yield f"{rows} x {vocabulary}, {dtype}", run


def small_model(d_model: int = 64) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(MambaConfig(d_model=d_model, n_layer=2, vocab_size=50), device="cuda")


def mamba_step(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    from statescan.generate.packed import PackedModel

    for dtype in ("float32", "bfloat16", "int8"):
        for batch in (1, 3, 17):

            def run(dtype: Any = dtype, batch: int = batch) -> None:
                packed = PackedModel(small_model(), dtype)
                x = torch.randn(batch, 64, device="cuda")
                state = packed.init_state(batch)
                ops.mamba_step(x, None, state.conv[0], state.ssm[0], packed.blocks[0], backend=backend)
                ops.mamba_step(x, x.clone(), state.conv[0], state.ssm[0], packed.blocks[0], backend=backend)

            yield f"{dtype}, batch {batch}", run


def packed_linear(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in ("float32", "bfloat16", "int8"):
        for rows in (1, 3, 17):

            def run(dtype: Any = dtype, rows: int = rows) -> None:
                packed = ops.pack_weight(torch.randn(70, 96, device="cuda"), dtype)
                ops.packed_linear(torch.randn(rows, 96, device="cuda"), packed, backend=backend)

            yield f"{dtype}, {rows} rows", run


def s4d_kernel(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for states, length in ((1, 1), (7, 45), (33, 1001), (40, 20_001)):

        def run(states: int = states, length: int = length) -> None:
            A = torch.complex(-torch.rand(3, states), torch.randn(3, states)).cuda().requires_grad_()
            B, C = (torch.randn(3, states, device="cuda", dtype=torch.complex64, requires_grad=True) for _ in range(2))
            dt = torch.full((3,), 0.1, device="cuda", requires_grad=True)
            differentiate(ops.s4d_kernel(A, B, C, dt, length, backend=backend), [A, B, C, dt])

        yield f"{states} states, {length} lags", run


def s4_kernel(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for states, rank, length in ((1, 1, 1), (7, 2, 45), (33, 1, 5000)):

        def run(states: int = states, rank: int = rank, length: int = length) -> None:
            Lambda = torch.complex(-torch.rand(3, states), torch.randn(3, states)).cuda().requires_grad_()
            P = (torch.randn(3, states, rank, device="cuda", dtype=torch.complex64) / 4).requires_grad_()
            B, C = (torch.randn(3, states, device="cuda", dtype=torch.complex64, requires_grad=True) for _ in range(2))
            dt = torch.full((3,), 0.1, device="cuda", requires_grad=True)
            differentiate(ops.s4_kernel(Lambda, P, B, C, dt, length, backend=backend), [Lambda, P, B, C, dt])

        yield f"{states} states, rank {rank}, {length} lags", run


# -------------------------------------------------------------------------------------- what only a decoder launches

# Every way to draw: greedy, plain, through all filters, with a penalty and with log probabilities.
DRAWS = (
    SamplingParams(temperature=0, logprobs=True),
    SamplingParams(seed=1),
    SamplingParams(
        seed=2, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2, stream=7, logprobs=True
    ),
    SamplingParams(seed=3, top_p=0.5),
    SamplingParams(temperature=0, repetition_penalty=2.5),
)
# One launch takes a row of the first two, whose channels and rows don't divide among the multiprocessors.
ONE_LAUNCH = {
    "d_model 128": MambaConfig(d_model=128, n_layer=2, vocab_size=50),
    "biases": MambaConfig(160, n_layer=2, vocab_size=1003, dt_rank=16, bias=True, tie_embeddings=False),
}
# Several rows: in pieces (even sizes, odd ones), and in 16 bits by one launch between the large products.
SEVERAL_ROWS = {
    "d_model 64": MambaConfig(d_model=64, n_layer=2, vocab_size=50),
    "odd": MambaConfig(d_model=45, n_layer=2, vocab_size=203, d_state=11, bias=True),
    "d_model 256": MambaConfig(d_model=256, n_layer=2, vocab_size=50),
}
# Each norm, each activation, a block's halves after and beside each other, keys of their own and shared ones.
TRANSFORMERS = {
    "pythia": TransformerConfig(
        *(256, 2, 50), n_head=4, mlp="gelu", norm="layer", bias=True, parallel=True, rotary_fraction=0.25,
        tie_embeddings=False,
    ),
    "transformer++": TransformerConfig(256, 2, 50, n_head=4, n_kv_head=2),
    "parallel and gated": TransformerConfig(128, 2, 50, n_head=1, parallel=True, d_intermediate=200),
    "absolute": TransformerConfig(128, 2, 50, n_head=2, positions="absolute", max_positions=384, bias=True, mlp="gelu"),
}  # fmt: skip


def packed_model(config: MambaConfig, dtype: Any) -> Any:
    from statescan.generate.packed import PackedModel

    torch.manual_seed(0)
    return PackedModel(CausalLM(config, device=DEVICE), dtype)


@torch.no_grad()
def write(slots: Any, rows: int, draws: Sequence[SamplingParams] = DRAWS) -> None:
    """A few tokens a row, by the launches that a graph of so many rows holds."""
    for slot in range(rows):
        slots.place(slot, draws[slot % len(draws)], 70, [1, 2, 3])
    for _ in range(3):
        slots._step_rows(rows)
        slots._launch_draw(slots.logits, 0, rows)


def decode(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """All blocks and the head in one launch."""
    from statescan.generate.graphs import GraphDecoder

    for name, config in ONE_LAUNCH.items():
        for dtype in PACKED:
            for capacity in (1, 3):  # with more slots the convolution's state is kept in the weights' dtype

                def run(config: MambaConfig = config, dtype: str = dtype, capacity: int = capacity) -> None:
                    slots = GraphDecoder(packed_model(config, dtype), capacity, config.vocab_size)
                    if slots.one_launch_refusal is not None:
                        raise RuntimeError(f"one launch does not take this model: {slots.one_launch_refusal}")
                    for params in DRAWS[::2]:
                        write(slots, 1, [params])

                yield f"{name}, {dtype}, {capacity} slots", run


def decoder(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Several rows, and one of a model that one launch does not take."""
    from statescan.generate.graphs import GraphDecoder

    for name, config in SEVERAL_ROWS.items():
        for dtype in PACKED:
            for rows in (1, 2, 17):

                def run(config: MambaConfig = config, dtype: str = dtype, rows: int = rows) -> None:
                    write(GraphDecoder(packed_model(config, dtype), rows + 1, config.vocab_size), rows)

                yield f"{name}, {dtype}, {rows} rows", run


def between_products(kind: str, configs: Sequence[MambaConfig], rows: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """The one launch between a block's large products; in turn with all that may be None and without."""
    from statescan.ops.mamba_step import middle as module

    for turn, (config, count) in enumerate(itertools.product(configs, rows)):
        bare = (turn % len(rows) + turn // len(rows)) % 2 == 1  # each number of rows has both
        for dtype in PACKED[1:]:

            def run(config: MambaConfig = config, dtype: str = dtype, count: int = count, bare: bool = bare) -> None:
                block = packed_model(config, dtype).blocks[0]
                if bare:
                    block = dataclasses.replace(block, conv_bias=None, dt_bias=None, D=None)
                low = block.x_proj.data.dtype
                launch = getattr(module, kind)(block, torch.device(DEVICE))
                uz = torch.randn(count, 2 * block.d_inner, device=DEVICE).to(low)
                conv = torch.randn(count, block.width - 1, block.d_inner, device=DEVICE).to(
                    low if bare else torch.float32
                )
                ssm = torch.randn(count, block.d_inner, block.d_state, device=DEVICE)
                for _ in range(2):
                    # The launch in front of it makes uz, and no states: it reads them before that has ended.
                    launch(uz.clone(), conv, ssm, block, uz.new_empty(count, block.d_inner))

            yield f"d_inner {2 * config.d_model}, {dtype}, {count} rows{', bare' if bare else ''}", run


# Eight and sixteen channels a block on an H100; every number of rows that there is a kernel for.
MIDDLES = [MambaConfig(d_model=d_model, n_layer=1, vocab_size=50) for d_model in (256, 768)]
TILES = [MambaConfig(d_model=d_model, n_layer=1, vocab_size=50, dt_rank=32) for d_model in (256, 512)]


def middle(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    return between_products("Middle", MIDDLES, (1, 17, 64, 100))


def middle_tiles(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Under racecheck every lane speaks for itself: the tool does not see that __syncwarp orders a warp's reads before
    what one lane says of them; of the rings that are read so this is the one that comes round here."""
    from statescan.ops.mamba_step import middle as module

    module._TILES_EACH = os.environ.get(TOOL) == "racecheck"
    return between_products("MiddleTiles", TILES, (1, 16, 97))


def projection_weights(dtype: torch.dtype = torch.bfloat16, parts: int = 1) -> list[Tensor]:
    """Of more tiles than are fetched ahead."""
    return [torch.randn(128, 640 * parts, device=DEVICE).to(dtype) for _ in range(2)]


def projection(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    from statescan.ops.mamba_step.projection import Projection

    for dtype in (torch.bfloat16, torch.float16):
        for parts in (1, 4):
            for rows in (1, 64, 100, 128):

                def run(dtype: torch.dtype = dtype, parts: int = parts, rows: int = rows) -> None:
                    weights = projection_weights(dtype, parts)
                    product = Projection(weights, parts)
                    x = torch.randn(rows, weights[0].shape[1], device=DEVICE).to(dtype)
                    for i, bias in enumerate((None, torch.randn(128, device=DEVICE))):
                        product(i, x, bias)

                yield f"{dtype}, {parts} parts, {rows} rows", run


def drawn(vocabularies: Sequence[int]) -> Iterator[tuple[str, Callable[[], None]]]:
    """With one logit a thread and several; and logits that are no numbers."""
    from statescan.generate.drawing import DrawingSlots

    for vocabulary in vocabularies:

        def run(vocabulary: int = vocabulary) -> None:
            slots = DrawingSlots(torch.device(DEVICE), len(DRAWS) + 1, vocabulary, vocabulary + 5)
            rows = len(DRAWS)
            for slot, params in enumerate(DRAWS):
                slots.place(slot, params, 3, [1, 2, vocabulary - 1])
            for ties in (False, True):
                slots.logits.normal_().mul_(3)
                if ties:
                    slots.logits.round_()
                slots._launch_draw(slots.logits, 0, rows)
            slots._launch_draw(slots.logits[1:], 1, rows - 1)
            slots.logits.fill_(float("nan"))
            slots._launch_draw(slots.logits, 0, rows)

        yield f"{vocabulary} tokens", run


def sample(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """One block a row."""
    return drawn((50, 3000))


def sample_clusters(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A cluster of eight blocks a row."""
    return drawn((5003, 20011))


def attention_decoder(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    from statescan.generate.attention_graphs import AttentionGraphDecoder
    from statescan.generate.unpacked import ModelDecoder

    for name, config in TRANSFORMERS.items():
        for dtype in PACKED:
            for rows in (1, 3):

                @torch.no_grad()
                def run(config: TransformerConfig = config, dtype: str = dtype, rows: int = rows) -> None:
                    torch.manual_seed(0)
                    own = ModelDecoder(CausalLM(config, device=DEVICE), dtype)
                    slots = AttentionGraphDecoder(own, rows + 1, config.vocab_size)
                    if slots.row_refusal is not None:
                        raise RuntimeError(f"kernels of one row do not take this model: {slots.row_refusal}")
                    slots._reserve(256)
                    for cache in (*slots._keys, *slots._values):
                        cache.normal_()
                    slots.lengths.fill_(70)
                    write(slots, rows)

                yield f"{name}, {dtype}, {rows} rows", run


def refuses_cuda() -> str | None:
    return _cuda.unavailable_reason()


def refuses_clusters() -> str | None:
    reason = _cuda.unavailable_reason()
    if reason is None and torch.cuda.get_device_capability()[0] < 9:
        reason = "a large vocabulary is a cluster's, which needs compute capability 9.0"
    return reason


def refuses_decode() -> str | None:
    from statescan.ops.mamba_step.decode import refuses_stack

    packed = packed_model(ONE_LAUNCH["d_model 128"], "float32")
    return refuses_stack(packed.blocks, packed.head, packed.device)


def refuses_between_products(kind: str, config: MambaConfig) -> str | None:
    from statescan.ops.mamba_step import middle as module

    packed = packed_model(config, "bfloat16")
    return getattr(module, kind)(packed.blocks[0], packed.device)


def refuses_attention() -> str | None:
    from statescan.generate.attention_graphs import AttentionGraphDecoder, refuses
    from statescan.generate.unpacked import ModelDecoder

    for config in TRANSFORMERS.values():
        own = ModelDecoder(CausalLM(config, device=DEVICE), PACKED[0])
        reason = refuses(own) or AttentionGraphDecoder(own, 1, config.vocab_size).row_refusal
        if reason is not None:
            return reason
    return None


def refuses_projections() -> str | None:
    from statescan.ops.mamba_step.projection import refuses_projection

    return refuses_projection(projection_weights(), 1)


# Why what is no op with backends of its own can't run here.
REFUSALS: dict[str, Callable[[], str | None]] = {
    "decode": refuses_decode,
    "decoder": refuses_cuda,
    "middle": lambda: refuses_between_products("refuses_middle", MIDDLES[0]),
    "middle_tiles": lambda: refuses_between_products("refuses_tiles", TILES[0]),
    "projection": refuses_projections,
    "sample": refuses_cuda,
    "sample_clusters": refuses_clusters,
    "attention_decoder": refuses_attention,
}

# --------------------------------------------------------------------------------------------------------- the whole


def model(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Whole passes, as training and inference put the kernels together."""
    from statescan.generate.packed import PackedModel

    ids = torch.randint(0, 50, (2, 45), device="cuda")

    def training() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = small_model()(ids[:, :-1], labels=ids).loss
        loss.backward()

    def block() -> None:
        for policy in ("cheap", "block"):
            layer = Block(MambaConfig(d_model=64, n_layer=1, vocab_size=50, recompute=policy), device="cuda")
            x = torch.randn(2, 40, 64, device="cuda", requires_grad=True)
            differentiate(layer(x, x.detach().clone())[:2], [x, *layer.parameters()])

    def inference() -> None:
        packed = PackedModel(small_model(), "bfloat16")
        state = packed.init_state(2)
        packed.prefill(ids, state)
        packed.step(ids[:, 0].contiguous(), state)

    yield "training step", training
    yield "a block that recomputes", block
    yield "prefill and a step", inference


RUNS: dict[str, Callable[[str], Iterator[tuple[str, Callable[[], None]]]]] = {
    "selective_scan": selective_scan,
    "selective_state_update": selective_state_update,
    "causal_conv1d": causal_conv1d,
    "causal_conv1d_update": causal_conv1d_update,
    "add_rms_norm": add_rms_norm,
    "linear_cross_entropy": linear_cross_entropy,
    "decode_attention": decode_attention,
    "mamba_step": mamba_step,
    "packed_linear": packed_linear,
    "s4d_kernel": s4d_kernel,
    "s4_kernel": s4_kernel,
    "decode": decode,
    "decoder": decoder,
    "middle": middle,
    "middle_tiles": middle_tiles,
    "projection": projection,
    "sample": sample,
    "sample_clusters": sample_clusters,
    "attention_decoder": attention_decoder,
}


def subjects() -> tuple[list[tuple[str, str]], list[str]]:
    """(op, backend) of all that can run here, parts of decoders among them, and the whole model; and what can't, with
    the reason."""
    found, missing = [], []
    for op in RUNS:
        for backend in GPU_BACKENDS:
            if backend not in BACKENDS.get(op, ("cuda",)):
                continue
            if op in REFUSALS:
                reason = REFUSALS[op]()
            else:
                reason = refusal(op, backend, device="cuda", d_state=64 if op == "decode_attention" else 16)
            if reason is None:
                found.append((op, backend))
            else:
                missing.append(f"{op}, {backend}: {reason}")
    return [*found, ("model", "auto")], missing


def inside(op: str, backend: str) -> None:
    """What runs under compute-sanitizer."""
    cases = list((model if op == "model" else RUNS[op])(backend))
    for name, run in cases:
        run()
        torch.cuda.synchronize()
        print(f"ran {op}, {backend}: {name}", flush=True)
    print(f"all {len(cases)} ran", flush=True)


def check(tool: str, op: str, backend: str, seconds: float) -> str | None:
    """Why an op's run under a tool is bad, or None."""
    program = shutil.which("compute-sanitizer") or ELSEWHERE
    # Not what the driver refuses and libraries ask for anyway (entry points of other versions).
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [program, "--tool", tool, *quiet, "--error-exitcode", "86"]
    command += [sys.executable, __file__, "--inside", op, backend]
    # Without the caching allocator every tensor has an allocation of its own, so that an access past its end shows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", TOOL: tool}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"no end within {seconds:.0f} s"
    if done.returncode == 0 and "\nall " in done.stdout:
        return None
    text = done.stdout + done.stderr
    races = RACE.findall(text)
    if backend.endswith("triton") and "\nall " in done.stdout and races and all(a == b for a, b in races):
        return None
    said = text.strip().splitlines()
    reports = [line for line in said if line.startswith("=========") and len(line) > 12]
    return "\n".join([*reports[:40], *said[-10:]]) or f"exit code {done.returncode}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--only", default="", help="only where 'OP, BACKEND' contains this")
    parser.add_argument("--seconds", type=float, default=600.0, help="an op may take under a tool")
    parser.add_argument("--jobs", type=int, default=4, help="so many at once on one GPU")
    parser.add_argument("--may-skip", action="store_true", help="end well where something is missing on this machine")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    unknown = set(given.tools) - set(TOOLS)
    if unknown:
        parser.error(f"TOOL must be of {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    if given.inside:
        inside(*given.inside)
        return 0
    pairs: list[tuple[str, str]] = []
    if not torch.cuda.is_available():
        missing = ["torch sees no CUDA device"]
    elif shutil.which("compute-sanitizer") is None and not os.path.exists(ELSEWHERE):
        missing = ["compute-sanitizer is not installed (it comes with the CUDA toolkit; put its folder on PATH)"]
    else:
        pairs, missing = subjects()
        pairs = [pair for pair in pairs if given.only in ", ".join(pair)]
        missing = [what for what in missing if given.only in what]
        if not pairs and not missing:
            parser.error(f"--only must be part of an 'OP, BACKEND', got {given.only!r}")
    for what in missing:
        print(f"not sanitized: {what}", flush=True)
    runs = [(tool, *pair) for tool in given.tools or TOOLS for pair in pairs]

    def report(run: tuple[str, str, str]) -> bool:
        start = time.perf_counter()
        problem = check(*run, given.seconds)
        outcome = "clean" if problem is None else f"FAILED\n{problem}"
        print(f"{run[0]}: {run[1]}, {run[2]} ({time.perf_counter() - start:.0f} s): {outcome}", flush=True)
        return problem is None

    with ThreadPoolExecutor(given.jobs) as pool:
        good = list(pool.map(report, runs))
    print(f"{sum(good)} of {len(good)} clean")
    if missing and not given.may_skip:
        print("failed: not all was sanitized; --may-skip leaves out what this machine can't run")
    return 0 if all(good) and (not missing or given.may_skip) else 1


if __name__ == "__main__":
    sys.exit(main())
