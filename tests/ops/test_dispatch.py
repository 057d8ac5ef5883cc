"""Which backend runs: the choice, its words, and what happens when a kernel can't be made after all."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan import ops
from statescan.errors import BackendUnavailableError, ConfigError
from statescan.ops import _dispatch, explain, selective_scan
from statescan.ops._dispatch import Facts, attempt
from statescan.ops.mamba_step.validation import BlockWeights
from statescan.testing import ScanCase, scan_problem

SCAN = Facts("cpu", torch.float32, d_state=4)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_broken", {})
    return


def failing(*names: str, calls: list[str]) -> Any:
    def run(name: str) -> str:
        calls.append(name)
        if name in names:
            raise BackendUnavailableError(f"kernel of {name} did not compile; use backend='torch'")
        return name

    return run


def test_auto_goes_on_to_the_next_with_one_warning() -> None:
    calls: list[str] = []
    first = explain("selective_scan", SCAN).backend
    after = "reference" if first == "torch" else "torch"
    with pytest.warns(UserWarning, match="is passed over") as caught:
        assert attempt("selective_scan", "auto", SCAN, failing(first, calls=calls)) == after
    assert calls == [first, after]
    assert [str(w.message) for w in caught] == [
        f"selective_scan: backend '{first}' is passed over, '{after}' runs instead: "
        f"kernel of {first} did not compile; use backend='torch'"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attempt("selective_scan", "auto", SCAN, failing(first, calls=calls)) == after
    assert calls == [first, after, after]
    assert explain("selective_scan", SCAN).refusals[first] == f"kernel of {first} did not compile; use backend='torch'"


def test_other_calls_are_not_held_against_it() -> None:
    """A kernel that failed for one kind of call says nothing of another's."""
    first = explain("selective_scan", SCAN).backend
    with pytest.warns(UserWarning, match="is passed over"):
        attempt("selective_scan", "auto", SCAN, failing(first, calls=[]))
    assert explain("selective_scan", Facts("cpu", torch.float64, d_state=4)).refusals[first] is None


def test_a_named_backend_raises() -> None:
    calls: list[str] = []
    with pytest.raises(BackendUnavailableError, match="kernel of torch did not compile; use backend='torch'"):
        attempt("selective_scan", "torch", SCAN, failing("torch", calls=calls))
    assert calls == ["torch"]
    assert attempt("selective_scan", "torch", SCAN, failing(calls=calls)) == "torch"  # tried again when named


def test_when_nothing_is_left() -> None:
    everything = _dispatch.BACKENDS["selective_scan"]
    with (
        pytest.warns(UserWarning, match="is passed over"),
        pytest.raises(BackendUnavailableError, match=r"selective_scan: no backend can run this call:\n") as caught,
    ):
        attempt("selective_scan", "auto", SCAN, failing(*everything, calls=[]))
    assert "kernel of reference did not compile" in str(caught.value)


def test_the_scan_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function: a backend whose kernel fails is passed over, and the result is the next one's."""
    problem = scan_problem(ScanCase(batch=1, length=8, d_inner=4, d_state=4), torch.float32)
    first = explain("selective_scan", SCAN).backend
    if first == "torch":
        pytest.skip("no backend stands before torch here")

    def broken(*_: Any) -> Any:
        raise BackendUnavailableError("a kernel did not compile; use backend='torch'")

    module = importlib.import_module(f"statescan.ops.selective_scan.{first}")
    monkeypatch.setattr(module, "selective_scan", broken)
    with pytest.warns(UserWarning, match=f"backend '{first}' is passed over, 'torch' runs instead: a kernel did not"):
        y = selective_scan(**problem).y
    assert torch.equal(y, selective_scan(**problem, backend="torch").y)
    with pytest.raises(BackendUnavailableError, match="a kernel did not compile"):
        selective_scan(**problem, backend=first)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def step_weights() -> BlockWeights:
    """d_model 6, d_inner 8, d_state 3, dt_rank 2."""
    return BlockWeights(
        draw(6), ops.pack_weight(draw(16, 6)), draw(8, 4), ops.pack_weight(draw(8, 8)), ops.pack_weight(draw(8, 2)),
        -draw(8, 3).exp(), ops.pack_weight(draw(6, 8)), dt_bias=draw(8), D=draw(8),
    )  # fmt: skip


# Every op with a backend whose kernels are compiled where they run.
CALLS: dict[str, Any] = {
    "causal_conv1d": lambda **kw: ops.causal_conv1d(draw(1, 10, 4), draw(4, 3), **kw).y,
    "causal_conv1d_update": lambda **kw: ops.causal_conv1d_update(draw(2, 4), draw(2, 2, 4), draw(4, 3), **kw).y,
    "selective_state_update": lambda **kw: ops.selective_state_update(
        draw(2, 4, 3), draw(2, 4), draw(2, 4), -draw(4, 3).exp(), draw(2, 3), draw(2, 3), **kw
    ).y,
    "add_rms_norm": lambda **kw: ops.add_rms_norm(draw(2, 5), draw(5), **kw).output,
    "linear_cross_entropy": lambda **kw: ops.linear_cross_entropy(draw(3, 5), draw(7, 5), torch.arange(3), **kw),
    "mamba_step": lambda **kw: ops.mamba_step(
        draw(2, 6), None, draw(2, 3, 8), draw(2, 8, 3), step_weights(), **kw
    ).output,
    "decode_attention": lambda **kw: ops.decode_attention(
        draw(2, 4, 64), draw(2, 2, 64), draw(2, 2, 64), draw(2, 2, 8, 64), draw(2, 2, 8, 64),
        torch.tensor([3, 5], dtype=torch.int32), **kw,
    ),
    "s4d_kernel": lambda **kw: ops.s4d_kernel(-draw(2, 3).exp(), draw(2, 3), draw(2, 3), draw(2).exp(), 9, **kw),
    "s4_kernel": lambda **kw: ops.s4_kernel(
        torch.complex(-draw(2, 3).exp(), draw(2, 3)), torch.complex(draw(2, 3), draw(2, 3)) / 4,
        torch.complex(draw(2, 3), draw(2, 3)), torch.complex(draw(2, 3), draw(2, 3)), draw(2).exp() / 9, 9, **kw,
    ),
}  # fmt: skip


def test_every_op_of_kernels_is_here() -> None:
    compiled = {op for op, names in _dispatch.BACKENDS.items() if {"cuda", "triton", "cauchy_triton"} & set(names)}
    assert compiled == {*CALLS, "selective_scan"}


@pytest.mark.parametrize("op", CALLS)
def test_every_op_goes_on(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning that names the cause, and the next backend's result; a backend that is named raises."""
    call = CALLS[op]
    first = explain(op, d_state=64 if op == "decode_attention" else 3, complex_A=op == "s4_kernel").backend
    second = next(name for name in list(_dispatch.BACKENDS[op]) if name in ("torch", "reference") and name != first)
    wanted = call(backend=second)

    def broken(*_: Any) -> Any:
        raise BackendUnavailableError("a kernel did not compile; use backend='torch'")

    module = importlib.import_module(_dispatch._module(op, first))
    monkeypatch.setattr(module, op, broken)
    words = f"{op}: backend '{first}' is passed over, '{second}' runs instead: a kernel did not compile"
    with pytest.warns(UserWarning, match=words) as caught:
        assert torch.equal(call(), wanted)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(), wanted)
        with pytest.raises(BackendUnavailableError, match="a kernel did not compile; use backend='torch'"):
            call(backend=first)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_backends_that_depend_on_the_batch_refuse(device: str) -> None:
    explanation = explain("selective_scan", Facts(device, torch.float32, d_state=16, batch_invariant=True))
    for backend in ("triton", "torch", "reference"):
        assert "batch_invariant can't be kept; use backend=" in str(explanation.refusals[backend])


# ------------------------------------------------------------------------------------------------------- plans in words


def test_the_plan_is_told() -> None:
    text = str(
        explain("selective_scan", device="cuda", dtype=torch.bfloat16, batch=8, length=2048, d_inner=2048,
                multiprocessors=132)
    )  # fmt: skip
    assert "how 'cuda' runs it: forward: 256 blocks of 64 channels" in text
    assert text.count("one pass over time: 256 blocks keep 132 multiprocessors busy") == 2
    assert "checkpoints every 32 steps" in text


def test_the_plan_cuts_time_where_the_chip_is_not_filled() -> None:
    plans = explain("selective_scan", device="cuda", batch=1, length=2048, d_inner=1536, multiprocessors=132).plans
    assert "time in 11 chunks of 192 steps: 24 blocks do not fill 132 multiprocessors" in plans["cuda"]
    long = explain("selective_scan", device="cuda", batch=1, length=65536, d_inner=2048, multiprocessors=132).plans
    assert "16 chunks of 4128 steps, whose start states are found in pieces of 1376: 32 blocks do not" in long["cuda"]
    fixed = explain("selective_scan", device="cuda", batch_invariant=True, batch=1, length=2048, d_inner=1536,
                    multiprocessors=132).plans["cuda"]  # fmt: skip
    many = explain("selective_scan", device="cuda", batch_invariant=True, batch=64, length=2048, d_inner=1536,
                   multiprocessors=132).plans["cuda"]  # fmt: skip
    assert "by the length alone, as batch_invariant asks" in fixed
    assert fixed.replace(" 24 blocks", "") == many.replace(" 1536 blocks", "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "explain: batch must be at least 1, got 0; give the sizes of the call"),
        ({"groups": 3}, "explain: groups must divide d_inner = 64, got 3; give the sizes of the call"),
        ({"multiprocessors": -1}, "explain: multiprocessors must be at least 1, got -1; give the sizes of the call"),
    ],
)
def test_bad_sizes(given: dict[str, int], message: str) -> None:
    sizes: dict[str, Any] = {"batch": 1, "length": 8, "d_inner": 64, "multiprocessors": 132, **given}
    with pytest.raises(ConfigError, match=message):
        explain("selective_scan", device="cuda", **sizes)


def test_a_plan_without_a_gpu_needs_its_size() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to ask")
    with pytest.raises(ConfigError, match=r"give multiprocessors, e\.g\. 132 for an H100"):
        explain("selective_scan", device="cuda", batch=1, length=8, d_inner=64)
    with pytest.raises(ConfigError, match=r"no backend of selective_scan on cpu decides by \['batch'\]; leave it out"):
        explain("selective_scan", device="cpu", batch=1)
