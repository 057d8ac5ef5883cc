"""S4's kernel beside the plain way: the way written for the benchmark computes the same, and the report says it all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from statescan.bench.s4_kernels import naive_s4_kernel, published_c, run_s4_kernels, s4_problem
from statescan.errors import ConfigError
from statescan.ops import s4_kernel


@pytest.mark.parametrize("length", [33, 64])
def test_the_naive_way_is_the_same_kernel(length: int) -> None:
    problem = s4_problem(5, 8)
    wide = {k: v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in problem.items()}
    truth = s4_kernel(**wide, length=length, backend="reference")
    names = ("Lambda", "P", "B", "C", "dt")
    ours = s4_kernel(*(wide[name] for name in names), length)
    C_end = published_c(wide, length)
    naive = naive_s4_kernel(wide["Lambda"], wide["P"], wide["B"], C_end, wide["dt"], length)
    assert (ours - truth).norm() < 1e-10 * truth.norm()
    # An even length has the frequency -1, where 2 (1 - w) / (1 + w) is finite by rounding alone.
    assert (naive - truth).norm() < (1e-6 if length % 2 == 0 else 1e-10) * truth.norm()


def test_a_quick_run_reports_every_implementation(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    report = run_s4_kernels(device="cpu", threads=1, quick=True, out=out)
    assert json.loads(out.read_text()) == report
    modes = ("forward", "forward+backward")
    names = ("statescan", "statescan cauchy", "naive Cauchy")
    assert [(row["implementation"], row["mode"]) for row in report["rows"]] == [(n, m) for n in names for m in modes]
    for row in report["rows"]:
        assert row["failure"] is None
        assert row["milliseconds"] > 0
        assert 0 <= row["relative_error"] < 1e-4
    by = {(row["implementation"], row["mode"]): row for row in report["rows"]}
    assert [(bar["beside"], bar["mode"]) for bar in report["bars"]] == [("naive Cauchy", mode) for mode in modes]
    for bar in report["bars"]:
        ours, theirs = by["statescan", bar["mode"]], by["naive Cauchy", bar["mode"]]
        assert bar["times_faster"] == theirs["milliseconds"] / ours["milliseconds"]
        assert bar["part_of_memory"] == ours["peak_memory_bytes"] / max(1, theirs["peak_memory_bytes"])


def test_a_peer_that_does_not_open_is_reported_not_hidden(tmp_path: Path) -> None:
    file = tmp_path / "s4.py"
    file.write_text("raise RuntimeError('not this one')")
    report = run_s4_kernels(device="cpu", threads=1, quick=True, peer=file)
    failures = [row["failure"] for row in report["rows"] if row["implementation"] == "state-spaces/s4"]
    assert len(failures) == 2
    assert all("not this one" in failure for failure in failures)
    with pytest.raises(ConfigError, match="got no file"):
        run_s4_kernels(peer=tmp_path / "none.py")
    with pytest.raises(ConfigError, match="device must be cpu, or cuda where there is a GPU, got 'tpu'"):
        run_s4_kernels(device="tpu")
