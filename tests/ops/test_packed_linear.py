"""The contract of `pack_weight` and `packed_linear`: every backend and packed dtype, rows that no company changes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan import errors
from statescan.ops import PackedWeight, pack_weight, packed_linear
from statescan.ops._dispatch import BACKENDS
from statescan.testing import assert_within_budget, check_registration, poisoned_memory, recorded_calls

BACKEND_NAMES = list(BACKENDS["packed_linear"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PACKED = ["float32", "bfloat16", "int8"]
# (out, in): one, less than a vector, primes around one and two vectors of every width, a long row, many rows.
SIZES = [(1, 1), (3, 5), (7, 31), (5, 33), (6, 64), (17, 67), (80, 1536), (257, 100)]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(
    out: int, columns: int, rows: int, dtype: torch.dtype, packed: str, bias: bool = True, seed: int = 0
) -> tuple[Tensor, PackedWeight, Tensor | None]:
    generator = torch.Generator().manual_seed(seed * 1000 + out * 7 + columns)
    weight = torch.randn(out, columns, generator=generator)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    return x, pack_weight(weight, packed), torch.randn(out, generator=generator) if bias else None  # type: ignore[arg-type]


def truth(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """The product in float64, written without the package's unpacking."""
    weight = packed.data.double()
    if packed.scale is not None:
        weight = weight * packed.scale.double()[:, None]
    y = (x.double()[:, None, :] * weight).sum(-1)
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_within_budget(backend: str, dtype: torch.dtype, packed: str, require_backend: Any) -> None:
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the kernel sums in float32 and says so")
    require_backend("packed_linear", backend, dtype=dtype)
    own = torch.float32 if dtype == torch.float64 else dtype
    for out, columns in SIZES:
        for rows in (1, 2, 3, 4, 7, 17):
            draws = [problem(out, columns, rows, dtype, packed, bias=rows % 2 == 1, seed=seed) for seed in range(3)]
            lower = [(x.to(own), w, b) for x, w, b in draws]
            with poisoned_memory():
                actual = [packed_linear(*draw, backend=backend) for draw in draws]
            assert_within_budget(
                actual,
                [truth(*draw) for draw in draws],
                [packed_linear(*draw, backend="reference") for draw in lower],
                f"{out}x{columns}, {rows} rows",
                reference_truth=[truth(*draw) for draw in lower] if own != dtype else None,
            )


@pytest.mark.parametrize("packed", PACKED)
def test_a_row_does_not_depend_on_its_company_or_the_threads(packed: str, require_backend: Any) -> None:
    require_backend("packed_linear", "cpu")
    before = torch.get_num_threads()
    try:
        for out, columns in [(5, 33), (80, 1536), (515, 768)]:
            x, weight, bias = problem(out, columns, 17, torch.float32, packed)
            alone = torch.cat([packed_linear(x[r : r + 1], weight, bias, backend="cpu") for r in range(17)])
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for rows in range(1, 18):
                    some = packed_linear(x[17 - rows :], weight, bias, backend="cpu")
                    assert torch.equal(some, alone[17 - rows :]), (out, columns, threads, rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_strides_and_leading_dimensions(backend: str, require_backend: Any) -> None:
    require_backend("packed_linear", backend)
    x, weight, bias = problem(9, 40, 6, torch.float32, "bfloat16")
    assert bias is not None
    exact, plain = truth(x, weight, bias), packed_linear(x, weight, bias, backend="reference")
    wide = torch.full((6, 100), float("nan"))
    wide[:, 30:70] = x
    doubled = torch.stack([bias, bias], 1).flatten()[::2]
    for given, added in [
        (wide[:, 30:70], bias),
        (x.t().contiguous().t(), bias),
        (x.view(2, 3, 40), doubled),
        (x.repeat_interleave(2, 0)[::2], doubled),
    ]:
        y = packed_linear(given, weight, added, backend=backend)
        assert y.shape == (*given.shape[:-1], 9)
        assert_within_budget(y.reshape(6, 9), exact, plain)
        if backend == "cpu":
            assert torch.equal(y.view(6, 9), packed_linear(x, weight, bias, backend=backend))
    assert packed_linear(x[0], weight, bias, backend=backend).shape == (9,)
    assert packed_linear(x[:0], weight, bias, backend=backend).shape == (0, 9)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_gradients_of_x_and_bias(backend: str, packed: str, require_backend: Any) -> None:
    require_backend("packed_linear", backend)
    x, weight, bias = problem(11, 23, 3, torch.float32, packed)
    assert bias is not None
    cotangent = torch.randn(3, 11)
    x64, b64 = x.double().requires_grad_(), bias.double().requires_grad_()
    truth(x64, weight, b64).backward(cotangent.double())
    results = {}
    for name in (backend, "reference"):
        given, added = x.clone().requires_grad_(), bias.clone().requires_grad_()
        packed_linear(given, weight, added, backend=name).backward(cotangent)
        results[name] = (given.grad, added.grad)
    for i, exact in enumerate((x64.grad, b64.grad)):
        assert exact is not None
        assert_within_budget(results[backend][i], exact, results["reference"][i], ("x", "bias")[i])  # type: ignore


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_what_is_not_finite_stays_in_its_row(backend: str, value: float, require_backend: Any) -> None:
    require_backend("packed_linear", backend)
    x, weight, bias = problem(4, 37, 5, torch.float32, "int8")
    others = [0, 1, 3, 4]
    exact, plain = truth(x, weight, bias)[others], packed_linear(x, weight, bias, backend="reference")[others]
    x[2, 36] = value
    y = packed_linear(x, weight, bias, backend=backend)
    assert not torch.isfinite(y[2]).any()
    assert_within_budget(y[others], exact, plain)


def test_int8_rounds_to_the_nearest_step() -> None:
    weight = torch.randn(50, 300) * torch.logspace(-6, 6, 50)[:, None]
    packed = pack_weight(weight, "int8")
    assert packed.scale is not None
    error = (packed.unpack(dtype=torch.float64) - weight.double()).abs()
    assert bool((error <= packed.scale.double()[:, None] * (0.5 + 1e-5)).all())
    assert bool((packed.data.abs().amax(1) == 127).all())
    zeros = pack_weight(torch.zeros(2, 3), "int8")
    assert torch.equal(zeros.unpack(), torch.zeros(2, 3))
    tiny = pack_weight(torch.full((1, 3), 1e-42), "int8")
    assert bool(torch.isfinite(tiny.unpack()).all())


def test_packing_shares_what_it_can_and_counts_its_bytes() -> None:
    weight = torch.randn(6, 8)
    assert pack_weight(weight, "float32").data.data_ptr() == weight.data_ptr()
    half = weight.bfloat16()
    assert pack_weight(half, "bfloat16").data.data_ptr() == half.data_ptr()
    strided = pack_weight(weight.t(), "float32")
    assert torch.equal(strided.data, weight.t())
    assert (strided.rows, strided.columns, strided.dtype) == (8, 6, "float32")
    assert [pack_weight(weight, d).nbytes for d in ("float32", "bfloat16", "int8")] == [192, 96, 48 + 24]
    for dtype in ("float32", "bfloat16", "int8"):
        packed = pack_weight(weight, dtype)
        assert torch.equal(packed.unpack(torch.tensor([[3, 0]])), packed.unpack()[[3, 0]].unsqueeze(0))
    assert not pack_weight(torch.nn.Parameter(weight), "float32").data.requires_grad


@pytest.mark.parametrize("packed", PACKED)
def test_registration_and_compilation(packed: str, require_backend: Any) -> None:
    require_backend("packed_linear", "cpu")
    x, weight, bias = problem(10, 48, 3, torch.bfloat16, packed)
    with recorded_calls() as calls:
        wanted = packed_linear(x, weight, bias, backend="cpu")
        packed_linear(x.float(), weight, backend="cpu")
    assert len(calls) == 2
    check_registration(calls)
    compiled = torch.compile(
        lambda x: packed_linear(x, weight, bias, backend="cpu"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), wanted)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_lower_instruction_sets(isa: str, require_backend: Any) -> None:
    require_backend("packed_linear", "cpu")
    if os.environ.get("STATESCAN_CPU_ISA") == isa:
        pytest.skip("this is the run that the test starts")
    chosen = "test_within_budget and cpu or company or not_finite or strides"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__, "-k", chosen],
        env={**os.environ, "STATESCAN_CPU_ISA": isa, "STATESCAN_TEST_REQUIRE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


WEIGHT = pack_weight(torch.ones(4, 6), "float32")
WRONG = [
    (lambda: pack_weight(torch.ones(4, 6), "int4"), errors.ConfigError, r"dtype must be one of .*got 'int4'"),  # type: ignore
    (lambda: pack_weight(torch.ones(4)), errors.ShapeError, r"weight must have shape \(out, in\), got \(4,\)"),
    (lambda: pack_weight(torch.ones(4, 6, dtype=torch.int32)), errors.DTypeError, "weight must be float32.*int32"),
    (lambda: pack_weight(torch.full((2, 2), float("inf")), "int8"), errors.ConfigError, "non-finite.*mend the weight"),
    (lambda: packed_linear(torch.ones(2, 5), WEIGHT), errors.ShapeError, r"x must have shape \(..., 6\), got \(2, 5\)"),
    (lambda: packed_linear(torch.ones(2, 6).int(), WEIGHT), errors.DTypeError, "x must be float32.*got int32"),
    (lambda: packed_linear(torch.ones(2, 6), torch.ones(4, 6)), errors.ConfigError, "make one with pack_weight"),  # type: ignore
    (
        lambda: packed_linear(torch.ones(2, 6), WEIGHT, torch.ones(5)),
        errors.ShapeError,
        r"bias must have shape \(out,\) = \(4,\), got \(5,\)",
    ),
    (
        lambda: packed_linear(torch.ones(2, 6), WEIGHT, torch.ones(4).int()),
        errors.DTypeError,
        "bias must be float32.*got int32",
    ),
    (
        lambda: packed_linear(torch.ones(2, 6, device="meta"), WEIGHT),
        errors.ShapeError,
        "x must be on cpu, where packed is, got meta",
    ),
    (
        lambda: packed_linear(torch.ones(2, 6).double(), WEIGHT, backend="cpu"),
        errors.BackendUnavailableError,
        "it sums in float32, the input is float64; use backend='torch'",
    ),
    (lambda: packed_linear(torch.ones(2, 6), WEIGHT, backend="gpu"), errors.ConfigError, "backend must be one of"),
]


@pytest.mark.parametrize(("call", "error", "text"), WRONG)
def test_errors(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
