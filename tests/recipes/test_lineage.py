"""The pictures of the page on the lineage: they are drawn, and what they claim holds in numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statescan.ops.discretization import discretize
from statescan.ops.hippo import hippo_project, hippo_reconstruct
from statescan.ops.linear_ssm import ssm_kernel
from statescan.recipes.lineage import (
    draw_lineage,
    linear_memory,
    random_system,
    readable_part,
    selective_memory,
    signal,
)


def test_every_picture_of_the_page_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = draw_lineage(tmp_path / "pictures")
    page = (Path(__file__).parents[2] / "docs" / "from-ssm-to-mamba.md").read_text(encoding="utf-8")
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"images/{path.name}" in page
    assert page.count("images/lineage-") == len(drawn)


def test_hippo_remembers_what_a_random_system_forgets() -> None:
    """Mean error over the older half: HiPPO's 64 numbers against the best reading of a random system's 64."""
    u, n = signal(1000), 64
    age = 1 - (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    hippo = hippo_reconstruct(hippo_project(u, n)[-1], age)
    A, B = random_system(n)
    A_bar, B_bar = discretize(A, B, 40 / 1000)
    random = readable_part(ssm_kernel(A_bar, B_bar, torch.eye(n, dtype=torch.float64), 1000).squeeze(-1), u)
    error = {name: (back - u)[:500].abs().mean().item() for name, back in (("hippo", hippo), ("random", random))}
    assert error["hippo"] < 0.05 < 0.3 < error["random"]


def test_the_selective_state_keeps_what_is_marked() -> None:
    values = torch.linspace(-1, 1, 30, dtype=torch.float64).sin()
    marks = torch.zeros(30, dtype=torch.float64)
    marks[[4, 20]] = 1
    step, state = selective_memory(values, marks)
    assert step[4] > 1 > step[5]
    assert (state[4:20] - values[4]).abs().max() < 0.03
    assert (state[20:] - values[20]).abs().max() < 0.03
    for fixed in (0.05, 1.0):
        assert (linear_memory(values, fixed)[4:20] - values[4]).abs().max() > 0.2
