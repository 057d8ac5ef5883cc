"""A kernel that can't be made on this GPU: the next backend takes over with one warning, in training and decoding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from statescan.errors import BackendUnavailableError
from statescan.generate import Engine, SamplingParams
from statescan.models import CausalLM, MambaConfig
from statescan.ops import _cuda, _dispatch
from statescan.ops.mamba_inner import api

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CONFIG = MambaConfig(d_model=64, n_layer=2, vocab_size=256)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From the call on, these kernels (a file's or a function's name) don't compile, and nothing is remembered."""
    real = _cuda.kernel

    def refuse(*names: str) -> None:
        def kernel(file: Path, name: str, *arguments: Any, **options: Any) -> Any:
            if file.name in names or name in names:
                raise BackendUnavailableError(f"{file.name}: {name} did not compile; use backend='torch'")
            return real(file, name, *arguments, **options)

        monkeypatch.setattr(_cuda, "kernel", kernel)
        monkeypatch.setattr(_cuda, "_ready", set())
        monkeypatch.setattr(_dispatch, "_broken", {})
        monkeypatch.setattr(api, "_broken", {})

    return refuse


def step(model: CausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    "names",
    [
        ("conv.cu",),
        ("conv_backward",),
        ("scan_forward.cu",),
        ("scan_backward.cu",),
        ("norm.cu",),
        ("norm_backward",),
        ("softmax_gradient.cu",),
        ("conv.cu", "scan_forward.cu", "norm.cu", "softmax_gradient.cu"),
    ],
    ids=" ".join,
)
def test_a_training_step_goes_on(names: tuple[str, ...], without: Callable[..., None]) -> None:
    torch.manual_seed(0)
    model = CausalLM(CONFIG, device="cuda").train()
    ids = torch.randint(0, 256, (2, 65), device="cuda")
    wanted = step(model, ids)
    without(*names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = step(model, ids)
    said = [str(w.message) for w in caught if "did not compile" in str(w.message)]
    assert said
    # A layer is told of as a whole, then each of its ops that has to go on: nothing is said twice.
    assert len(said) == len(set(said)) <= 1 + 2 * len(names)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, ids)


@pytest.mark.parametrize("names", [("decode.cu",), ("step.cu",), ("sample.cu",)], ids=" ".join)
@pytest.mark.parametrize("max_batch", [1, 4])
def test_an_engine_goes_on(names: tuple[str, ...], max_batch: int, without: Callable[..., None]) -> None:
    torch.manual_seed(0)
    # One launch takes a model whose dt_rank is a multiple of 8.
    config = CONFIG.replace(d_model=128) if "decode.cu" in names else CONFIG
    model = CausalLM(config, device="cuda").eval()
    params = SamplingParams(max_new_tokens=12, seed=3)
    prompts = ["Call me", "The whale", "It was"]
    if Engine(model, max_batch=max_batch)._slots.one_launch_refusal is not None and "decode.cu" in names:
        pytest.skip("one launch does not take this model here")
    without(*names)
    with pytest.warns(UserWarning, match="Engine: a step runs op by op instead of as one CUDA graph") as caught:
        engine = Engine(model, max_batch=max_batch)
    assert len([w for w in caught if "Engine: " in str(w.message)]) == 1
    got = engine.generate(prompts, params)
    plain = Engine(model, max_batch=max_batch)
    plain._slots = None
    assert got == plain.generate(prompts, params)
