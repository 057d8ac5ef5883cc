"""What several of the ops' test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from statescan.testing import refusal


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """TRITON_INTERPRET=1 for a module alone: elsewhere the Triton backends refuse tensors on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        reason = refusal("selective_scan", "triton", device="cpu")
        if reason is not None:
            pytest.skip(reason)
        yield
