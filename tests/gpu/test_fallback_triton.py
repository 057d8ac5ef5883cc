"""Where CUDA's kernels are refused and a Triton kernel can't be made: the next backend takes over with one warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan import ops
from statescan.errors import BackendUnavailableError
from statescan.models import CausalLM, MambaConfig
from statescan.ops import _cuda, _dispatch
from statescan.testing import ScanCase, refusal, scan_problem
from statescan.testing.conv import ConvCase, conv_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CONFIG = MambaConfig(d_model=64, n_layer=2, vocab_size=256)
FOLDERS = ("selective_scan", "causal_conv1d", "add_norm", "ssm_kernel")
EVERY: dict[str, Any] = {"D": True, "z": True, "dt_bias": True, "initial_state": True, "dt_softplus": True}


@pytest.fixture(autouse=True)
def _triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refusal("selective_scan", "triton", device="cuda")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(_cuda, "unavailable_reason", lambda: "CUDA's kernels are refused in this test")
    monkeypatch.setattr(_cuda, "_ready", set())
    monkeypatch.setattr(_dispatch, "_broken", {})


class Broken:
    """A kernel that Triton's compiler refuses."""

    def warmup(self, *_: Any, **__: Any) -> Any:
        from triton.compiler.errors import CompilationError

        raise CompilationError(None, None, "no such thing")  # type: ignore[arg-type]

    def __getitem__(self, grid: Any) -> Any:
        return self.warmup


def kernels() -> list[Any]:
    return [importlib.import_module(f"statescan.ops.{folder}.triton_kernels") for folder in FOLDERS]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From the call on this kernel doesn't compile, and nothing is remembered."""

    def refuse(name: str) -> None:
        module = next(module for module in kernels() if hasattr(module, name))
        monkeypatch.setattr(module, name, Broken())
        _cuda._ready.clear()
        _dispatch._broken.clear()

    return refuse


def step(model: CausalLM, ids: Tensor) -> list[Tensor]:
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["scan_forward", "scan_backward", "conv_gradient", "conv_backward", "norm_backward"])
def test_a_training_step_goes_on(name: str, without: Callable[[str], None]) -> None:
    torch.manual_seed(0)
    model = CausalLM(CONFIG, device="cuda").train()
    ids = torch.randint(0, 256, (2, 65), device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what CUDA's refusal is said of
        wanted = step(model, ids)
    without(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = step(model, ids)
    said = [str(w.message) for w in caught if "did not compile" in str(w.message)]
    assert len(said) == 1, said
    assert "backend 'triton' is passed over, 'torch' runs instead: a Triton kernel did not compile" in said[0]
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, ids)


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    A = torch.complex(-torch.rand(3, 7), torch.randn(3, 7)).cuda()
    B, C = (torch.randn(3, 7, device="cuda", dtype=torch.complex64) for _ in range(2))
    return {
        "scan": (ops.selective_scan, scan_problem(ScanCase(batch=2, length=45, d_inner=64, **EVERY), torch.bfloat16,
                                                  device="cuda")),
        "segments": (ops.selective_scan, scan_problem(ScanCase(batch=1, length=1500, d_inner=64, **EVERY),
                                                      torch.float32, device="cuda")),
        "convolution": (ops.causal_conv1d, conv_problem(ConvCase(length=150, features=136), torch.bfloat16,
                                                        device="cuda")),
        "norm": (ops.add_rms_norm, {"x": torch.randn(5, 64, device="cuda"), "weight": torch.ones(64, device="cuda"),
                                    "residual": torch.randn(5, 64, device="cuda")}),
        "s4d": (ops.s4d_kernel, {"A": A, "B": B, "C": C, "dt": torch.full((3,), 0.1, device="cuda"), "length": 1001}),
    }  # fmt: skip


def leaves_of(problem: dict[str, Any]) -> dict[str, Any]:
    floats = lambda value: isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return {k: v.detach().requires_grad_() if floats(v) else v for k, v in problem.items()}


@pytest.mark.parametrize("name", ["scan", "segments", "convolution", "norm", "s4d"])
def test_a_backward_compiles_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its kernels were made in the forward call."""
    from triton.runtime.jit import JITFunction

    compiled: list[str] = []
    real = JITFunction._do_compile

    def spy(self: Any, *arguments: Any, **named: Any) -> Any:
        compiled.append(self.__name__)
        return real(self, *arguments, **named)

    monkeypatch.setattr(JITFunction, "_do_compile", spy)
    for module in kernels():
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()
    run, problem = calls()[name]
    leaves = leaves_of(problem)
    found = run(**leaves, backend="triton")
    found = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None and x.requires_grad]
    assert any("backward" in kernel for kernel in compiled)
    compiled.clear()
    inputs = [v for v in leaves.values() if isinstance(v, Tensor) and v.requires_grad]
    torch.autograd.grad(found, inputs, [torch.randn_like(x) for x in found], allow_unused=True)
    assert not compiled


def test_a_named_backend_raises(without: Callable[[str], None]) -> None:
    without("scan_backward")
    _, problem = calls()["scan"]
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match=r"did not compile \(CompilationError.*use backend='torch'"):
            ops.selective_scan(**leaves_of(problem), backend="triton")
    ops.selective_scan(**problem, backend="triton")
