"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from statescan.testing import refusal

# Triton settles at its own import whether its functions are interpreted, which tests/ops/test_triton.py needs where no
# GPU is; torch may import it for another test before that.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as _patch:
        _patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")

# where the ops' suites put their tensors
TEST_DEVICE = os.environ.get("STATESCAN_TEST_DEVICE", "cpu")


@pytest.fixture
def require_backend() -> Callable[..., None]:
    """A function that skips the test, with the backend's own words, where a backend refuses the call.
    STATESCAN_TEST_REQUIRE=cpu turns the skip into a failure, except for what the backend leaves out by design
    (complex A): a build whose kernels went missing must not pass for green.
    """

    def require(op: str, backend: str, **facts: Any) -> None:
        facts.setdefault("device", TEST_DEVICE)
        reason = refusal(op, backend, **facts)
        if reason is None:
            return
        if backend in os.environ.get("STATESCAN_TEST_REQUIRE", "").split(",") and not facts.get("complex_A"):
            pytest.fail(f"{op}: backend '{backend}' is required here and refuses: {reason}")
        pytest.skip(f"{backend}: {reason}")

    return require
