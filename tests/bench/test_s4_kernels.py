"""S4's kernel beside the plain way: the way written for the benchmark computes the same, and the report says it all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from statescan.bench.s4_kernels import least_cost, naive_s4_kernel, published_c, run_s4_kernels, s4_problem
from statescan.errors import ConfigError
from statescan.ops import s4_kernel
from statescan.testing import refusal


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
    names = ("statescan", *(f"statescan {backend}" for backend in ("torch", "cauchy", "cauchy_cpu")))
    names += ("statescan s4d_kernel", "statescan s4d_kernel torch", "statescan fft_conv", "naive Cauchy")
    assert [(row["implementation"], row["mode"]) for row in report["rows"]] == [(n, m) for n in names for m in modes]
    unavailable = refusal("s4_kernel", "cauchy_cpu")
    for row in report["rows"]:
        if unavailable is not None and row["implementation"] == "statescan cauchy_cpu":
            assert unavailable[:80] in row["failure"]
            continue
        assert row["failure"] is None
        assert row["milliseconds"] > 0
        assert 0 < row["relative_error"] < 1e-4
        cost = least_cost(row["implementation"], row["mode"], 16, 16, 500, 2)
        assert row["floors"]["bytes"] == cost.bytes / report["ceilings"]["read_gb_s"] / 1e6
        assert row["ratio"] == row["milliseconds"] / row["floors"]["bytes"]
    by = {(row["implementation"], row["mode"]): row for row in report["rows"]}
    assert [(bar["beside"], bar["mode"]) for bar in report["bars"]] == [("naive Cauchy", mode) for mode in modes]
    for bar in report["bars"]:
        ours, theirs = by["statescan", bar["mode"]], by["naive Cauchy", bar["mode"]]
        assert bar["times_faster"] == theirs["milliseconds"] / ours["milliseconds"]
        assert bar["part_of_memory"] == ours["peak_memory_bytes"] / max(1, theirs["peak_memory_bytes"])


def test_the_floor_counts_every_input_and_output_once() -> None:
    """Bytes of tensors of the sizes in question, of float32 and complex64."""
    d_model, d_state, length, batch = 6, 8, 50, 3
    problem = s4_problem(d_model, d_state)
    size = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors)
    kernel = s4_kernel(**problem, length=length)
    shape = (d_model, d_state, length, batch)
    for name in ("statescan", "statescan torch", "statescan cauchy_cpu", "naive Cauchy", "state-spaces/s4"):
        assert least_cost(name, "forward", *shape).bytes == size(*problem.values(), kernel)
        assert least_cost(name, "forward+backward", *shape).bytes == 2 * size(*problem.values(), kernel)
    del problem["P"]
    diagonal = least_cost("statescan s4d_kernel", "forward", *shape)
    assert diagonal == least_cost("statescan s4d_kernel torch", "forward", *shape)
    assert diagonal.bytes == size(*problem.values(), kernel)
    assert diagonal.flops == 2 * d_model * length * d_state
    u = torch.zeros(batch, length, d_model)
    assert least_cost("statescan fft_conv", "forward", *shape).bytes == size(u, kernel, u)
    both = least_cost("statescan fft_conv", "forward+backward", *shape).bytes
    assert both == size(u, kernel, u) + size(u, u, kernel) + size(u, kernel)


def test_only_some_are_measured() -> None:
    report = run_s4_kernels(device="cpu", threads=1, quick=True, only="s4d")
    assert {row["implementation"] for row in report["rows"]} == {"statescan s4d_kernel", "statescan s4d_kernel torch"}
    report = run_s4_kernels(device="cpu", threads=1, quick=True, peers=False, only="statescan,_kernel torch")
    assert {row["implementation"] for row in report["rows"]} == {"statescan", "statescan s4d_kernel torch"}
    with pytest.raises(ConfigError, match=r"--only must be part of one of statescan, .*got 's5'"):
        run_s4_kernels(device="cpu", only="s5")


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
