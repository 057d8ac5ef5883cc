"""What tests/gpu/sanitize.py launches of a decoder's kernels. No GPU is needed: a double stands in for the compiler and
the driver."""

from __future__ import annotations

import re
import runpy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statescan
from statescan.generate import attention_graphs, graphs
from statescan.ops import _cuda
from statescan.ops.mamba_step import decode, middle, projection

PACKAGE = Path(statescan.__file__).parent
# Sources whose kernels nothing but a decoder launches.
SOURCES = [
    PACKAGE / name
    for name in (
        "generate/sample.cu",
        "ops/decode_attention/step.cu",
        "ops/mamba_step/decode.cu",
        "ops/mamba_step/middle.cu",
        "ops/mamba_step/middle_tiles.cu",
        "ops/mamba_step/projection.cu",
    )
]
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(')
DECODERS = (
    *("decode", "decoder", "middle", "middle_tiles", "projection", "sample", "sample_clusters", "attention_decoder"),
)


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[1] / "gpu" / "sanitize.py"))["main"].__globals__


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, script: dict[str, Any]) -> list[tuple[Path, str, dict[str, int]]]:
    """(source, kernel, macros) of every launch; tensors are on the CPU, all else is as on an H100."""
    found: list[tuple[Path, str, dict[str, int]]] = []

    def kernel(file: Path, name: str, options: dict[str, int], *_: Any, **__: Any) -> Any:
        return lambda grid, *arguments: found.append((file, name, dict(options)))

    chip = types.SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=233472)
    monkeypatch.setattr(_cuda, "kernel", kernel)
    monkeypatch.setattr(_cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: chip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *_: self)
    monkeypatch.setattr(projection, "_encoder", lambda: lambda *_: 0)
    for module in (graphs, attention_graphs):
        monkeypatch.setattr(module, "refuses", lambda _: None)

    def as_on_a_gpu(module: Any, name: str) -> None:
        asked = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: asked(*given[:-1], torch.device("cuda")))

    as_on_a_gpu(decode, "refuses_stack")
    as_on_a_gpu(middle, "refuses_middle")
    as_on_a_gpu(middle, "refuses_tiles")
    product = torch.mm

    def mm(a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return out.copy_(product(a, b))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setitem(script, "DEVICE", "cpu")
    monkeypatch.setitem(script, "PACKED", ("float32", "bfloat16"))  # float16 weights are packed on GPUs alone
    return found


def run_all(cases: Any) -> None:
    for _, run in cases:
        run()


def values(launched: list[tuple[Path, str, dict[str, int]]], name: str, option: str) -> set[int]:
    return {options[option] for _, kernel, options in launched if kernel == name}


def test_every_kernel_of_a_decoder(script: dict[str, Any], launched: list[tuple[Path, str, dict[str, int]]]) -> None:
    """Each of their sources, in the variants that small models reach."""
    for op in DECODERS:
        before = len(launched)
        run_all(script["RUNS"][op]("cuda"))
        assert len(launched) > before, op
    wanted = {(file, name) for file in SOURCES for name in KERNEL.findall(file.read_text())}
    assert {file for file, _ in wanted} == set(SOURCES)
    assert wanted <= {(file, name) for file, name, _ in launched}
    # Pieces of mamba_step that hold the convolution's state in 16 bits and add up parts of a product.
    assert values(launched, "conv_step", "CONV") == {0, 1}
    assert values(launched, "add_norm", "PARTS") == {1, 4}
    assert values(launched, "draw", "CL") == {1, 8}
    assert values(launched, "draw", "ITEMS") >= {1, 3}
    assert values(launched, "middle_step", "ROWS") == {16, 32, 64, 128}
    assert values(launched, "middle_step", "CE") == {8, 16}
    assert values(launched, "middle_step", "CONV") == values(launched, "middle_tiles", "CONV") == {0, 1}
    assert values(launched, "project", "NR") == {64, 128}
    assert values(launched, "normed_products", "ACT") == {0, 1, 2}
    for option in ("LAYER", "PAIR"):
        assert values(launched, "normed_products", option) == values(launched, "norms", option) == {0, 1}


@pytest.mark.parametrize("op", DECODERS)
def test_what_it_is_meant_for(
    op: str, script: dict[str, Any], launched: list[tuple[Path, str, dict[str, int]]]
) -> None:
    """Nothing refuses it on an H100, and it launches the kernel that it is named after."""
    weights = script["projection_weights"]
    if op == "projection":  # asks the weights where they are
        assert weights()[0].shape[1] // 64 > projection._STAGES, "the ring of copies has to turn"
    else:
        assert script["REFUSALS"][op]() is None
    run_all(script["RUNS"][op]("cuda"))
    own = {"decode": "decode_step", "decoder": "state_step", "middle": "middle_step", "projection": "project",
           "sample": "draw", "sample_clusters": "draw", "attention_decoder": "attend"}.get(op, op)  # fmt: skip
    assert own in {name for _, name, _ in launched}


def test_clusters_alone_are_left_out(
    script: dict[str, Any], launched: list[tuple[Path, str, dict[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an A100, where a small vocabulary is drawn from as everywhere."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    for op in ("sample", "sample_clusters"):
        monkeypatch.setitem(script, "RUNS", {op: script[op]})
        found, missing = script["subjects"]()
        assert ((op, "cuda") in found) == (op == "sample")
        assert [what.partition(": ")[0] for what in missing] == ([] if found[:-1] else [f"{op}, cuda"])
    run_all(script["sample"]("cuda"))
    assert values(launched, "draw", "CL") == {1}


@pytest.mark.parametrize("asked", ["refuses", "row"])
def test_a_transformer_that_is_not_taken_is_named(
    asked: str,
    script: dict[str, Any],
    launched: list[tuple[Path, str, dict[str, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its decoder, or by the kernels of one row; it does not fail as if a kernel were wrong."""
    if asked == "row":
        monkeypatch.setattr(attention_graphs.StepPieces, "refuses_row", staticmethod(lambda *_: "not here"))
    else:
        monkeypatch.setattr(attention_graphs, "refuses", lambda _: "not here")
    monkeypatch.setitem(script, "RUNS", {"attention_decoder": script["attention_decoder"]})
    assert script["subjects"]() == ([("model", "auto")], ["attention_decoder, cuda: not here"])


@pytest.mark.parametrize("reason", [None, "it needs compute capability 9.0"])
def test_what_cannot_run_is_named(reason: str | None, script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refuse: Callable[[], str | None] = lambda: reason
    monkeypatch.setitem(script, "RUNS", {"decode": script["decode"]})
    monkeypatch.setitem(script, "REFUSALS", {"decode": refuse})
    found, missing = script["subjects"]()
    assert found == [*([("decode", "cuda")] if reason is None else []), ("model", "auto")]
    assert missing == ([] if reason is None else [f"decode, cuda: {reason}"])


def test_nothing_of_a_decoder_is_an_op(script: dict[str, Any]) -> None:
    """Each has a reason of its own to be left out, and the others are asked as ops."""
    assert set(script["REFUSALS"]) == set(DECODERS)
    assert set(script["RUNS"]) - set(DECODERS) <= set(script["BACKENDS"])
