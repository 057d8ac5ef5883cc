"""The benchmarks that run on either device, their floors, and the figures; no test here judges a speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from statescan.bench import costs, device_jobs, device_worker, figures, runner, subjects
from statescan.bench.costs import Cost
from statescan.bench.subjects import Verdict
from statescan.cli import main
from statescan.errors import BackendUnavailableError, ConfigError, DataError
from statescan.models import preset

# One H100's, as 16 special functions and 128 lanes a clock and multiprocessor give them.
H100 = {
    "copy_gb_s": 3000.0,
    "matmul_bf16_gflops": 750e3,
    "matmul_f32_gflops": 50e3,
    "special_g_s": 16 * 132 * 1.98,
    "fma_g_s": 128 * 132 * 1.98,
}


def test_a_floor_is_the_slowest_part_and_leaves_out_what_has_no_rate() -> None:
    cost = Cost(bytes=3e9, flops=1.5e12, special=8e8, fma=1e9)
    floors = cost.floors(H100, "bfloat16")
    assert floors == pytest.approx(
        {
            "bytes": 1.0,
            "flops": 2.0,
            "special": 8e8 / (16 * 132 * 1.98e9) * 1e3,
            "fma": 1e9 / (128 * 132 * 1.98e9) * 1e3,
        }
    )
    assert cost.floors(H100, "float32")["flops"] == pytest.approx(30.0)
    assert cost.floors({"read_gb_s": 30.0}, "float32") == pytest.approx({"bytes": 100.0})
    assert (cost + cost).bytes == 6e9
    assert (cost * 3).special == pytest.approx(2.4e9)


def test_the_scans_floor_is_the_one_worked_out_by_hand() -> None:
    # (8, 2048, 2048), 16 states, bf16: u, dt, z in and y out, 67 MB each, and B and C; 19 special functions a cell.
    cells = 8 * 2048 * 2048
    floors = costs.scan_cost(8, 2048, 2048, 16, "bfloat16", "forward").floors(H100, "bfloat16")
    assert floors["bytes"] == pytest.approx((4 * cells + 2 * 8 * 2048 * 16) * 2 / 3e12 * 1e3)
    assert floors["special"] == pytest.approx(0.1525, abs=1e-4)
    forward, backward, both = (
        costs.scan_cost(8, 2048, 2048, 16, "bfloat16", mode) for mode in ("forward", "backward", "forward+backward")
    )
    assert both == forward + backward
    assert costs.scan_cost(8, 2048, 2048, 16, "bfloat16", "forward", gated=False).bytes < forward.bytes


def test_the_norms_floor_counts_a_gradient_for_both_once() -> None:
    one = costs.norm_cost(1, 1, 1, "float32", "backward").bytes
    assert one == 4 * 4  # stream, two gradients in, one out
    assert costs.norm_cost(1, 1, 1, "bfloat16", "backward").bytes == 4 + 2 + 4 + 2 + 4


def test_attention_counts_half_the_scores() -> None:
    cost = costs.attention_cost(1, 65536, 16, 64, "bfloat16", "forward")
    assert cost.flops == 2 * 65536**2 * 1024
    assert costs.attention_cost(1, 65536, 16, 64, "bfloat16", "backward").flops == 2.5 * cost.flops


def test_decoding_reads_every_weight_once_and_every_state_twice() -> None:
    cost = costs.decode_cost(preset("1.4b"), 128, "bfloat16")
    weights = costs.decode_cost(preset("1.4b"), 1, "bfloat16").bytes - (
        cost.bytes - costs.decode_cost(preset("1.4b"), 127, "bfloat16").bytes
    )
    assert weights == pytest.approx(2 * 1.372e9, rel=0.01)
    state = 48 * 4096 * (16 + 3) * 4
    assert cost.bytes == pytest.approx(weights + 2 * 128 * state)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_device_benchmark_lists_jobs_with_floors(device: str) -> None:
    for name in device_jobs.DEVICE_BENCHMARKS[device]:
        for quick in (False, True):
            jobs = device_jobs.device_jobs(name, device, quick)
            assert any(job.implementation.startswith("statescan") for job in jobs), name
            assert len({(job.case, job.implementation, job.dtype) for job in jobs}) == len(jobs)
            for job in jobs:
                assert job.bench == name
                assert job.cost is not None
                assert max(job.cost.floors(H100, job.dtype).values()) > 0
                json.dumps(job.options)


def cli(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def job_of(kind: str, name: str, **options: Any) -> dict[str, Any]:
    return {
        "kind": kind, "implementation": name, "dtype": "float32", "device": "cpu", "max_seconds": 0.01,
        "mode": "backward", "d_state": 4, **options,
    }  # fmt: skip


@pytest.mark.parametrize(
    "job",
    [
        job_of("scan", "statescan torch", shape=[2, 20, 16]),
        job_of("scan", "statescan torch, 16 channels", shape=[1, 20, 16], gated=False, mode="forward+backward"),
        job_of("scan", "PyTorch loop", shape=[2, 20, 16], mode="inference"),
        job_of("conv", "statescan torch", shape=[2, 20, 16]),
        job_of("conv", "torch", shape=[2, 20, 16]),
        job_of("conv", "torch", shape=[2, 20, 16], dtype="bfloat16"),
        job_of("norm", "statescan torch", shape=[2, 20, 16]),
        job_of("norm", "torch", shape=[2, 20, 16]),
        job_of("attention", "torch SDPA flash", shape=[2, 40, 2, 64], mode="forward+backward"),
        job_of("block", "statescan, recompute cheap", shape=[1, 30, 32]),
        job_of("block", "statescan, plain PyTorch", shape=[1, 30, 32], mode="forward"),
        job_of("train", "statescan, recompute block", preset="tiny", batch=1, length=16, warmup=1, repeats=2),
        job_of("train", "statescan, recompute none, captured", preset="tiny", batch=1, length=16, warmup=1, repeats=2),
        job_of("generate", "statescan", preset="tiny", batch=2, length=30, new=3),
        job_of("prefill", "statescan", preset="tiny", batch=2, length=40, repeats=1),
        job_of("read_long", "statescan", preset="tiny", length=3000),
    ],
    ids=lambda job: f"{job['kind']} {job['implementation']}",
)  # fmt: skip
def test_each_kind_is_checked_and_timed(job: dict[str, Any]) -> None:
    measured = device_worker.measure(job)
    assert "failure" not in measured, measured
    assert 0 <= measured["relative_error"] <= measured["error_limit"] < (1e-4 if job["dtype"] == "float32" else 0.1)
    assert min(measured["samples"]) > 0
    json.dumps(measured)


def test_a_wrong_result_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    from statescan import ops

    right = ops.selective_scan

    def wrong(*args: Any, backend: str, **kwargs: Any) -> Any:
        found = right(*args, backend="torch", **kwargs)
        return found._replace(y=found.y * 1.001) if backend == "reference" else found

    monkeypatch.setattr(ops, "selective_scan", wrong)
    measured = device_worker.measure(job_of("scan", "PyTorch loop", shape=[1, 20, 16], mode="forward"))
    assert measured["failure"].startswith("wrong result: y is off by 1.00e-03")
    assert "samples" not in measured


def test_a_wrong_gradient_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * 0.5

    from statescan import ops

    right = ops.causal_conv1d
    calls: list[str] = []

    def wrong(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["backend"])
        return right(Half.apply(x) if len(calls) == 1 else x, *args, **kwargs)

    monkeypatch.setattr(ops, "causal_conv1d", wrong)
    measured = device_worker.measure(job_of("conv", "statescan torch", shape=[1, 20, 16]))
    assert measured["failure"].startswith("wrong result: d x is off by 5.0")


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    subjects._expected.clear()


def test_the_truth_is_worked_out_once_a_problem() -> None:
    for mode in ("inference", "backward", "forward"):
        device_worker.measure(job_of("scan", "statescan torch", shape=[2, 20, 16], mode=mode))
    assert len(subjects._expected) == 2  # a slice of channels, and every channel of a row for dB and dC
    device_worker.measure(job_of("scan", "statescan torch", shape=[2, 24, 16], mode="forward"))
    assert len(subjects._expected) == 1


def test_not_a_number_is_the_worst() -> None:
    assert subjects.worst({"a": Verdict(float("nan"), 1.0), "b": Verdict(5.0, 1.0)})[0] == "a"


def test_mamba_ssm_and_causal_conv1d_are_called_in_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the published signatures and layouts, (batch, channels, length)."""
    from statescan.ops import causal_conv1d, selective_scan

    def scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):  # type: ignore[no-untyped-def]
        u, delta, B, C, z = (x if x is None else x.transpose(1, 2) for x in (u, delta, B, C, z))
        out = selective_scan(
            u, delta, A, B, C, D=D, z=z, dt_bias=delta_bias, dt_softplus=delta_softplus, backend="torch"
        )
        return out.y.transpose(1, 2)

    def conv_fn(x, weight, bias=None, activation=None):  # type: ignore[no-untyped-def]
        return causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation, backend="torch").y.transpose(1, 2)

    for name, functions in (
        ("mamba_ssm", {}), ("mamba_ssm.ops", {}),
        ("mamba_ssm.ops.selective_scan_interface", {"selective_scan_fn": scan_fn}),
        ("causal_conv1d", {"causal_conv1d_fn": conv_fn}),
    ):  # fmt: skip
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    for job in (job_of("scan", "mamba_ssm", shape=[2, 20, 16]), job_of("conv", "causal_conv1d", shape=[2, 20, 16])):
        assert "failure" not in device_worker.measure(job)


def test_a_worker_that_dies_costs_one_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys\n"
        "for job in json.load(sys.stdin)['jobs']:\n"
        "    if job['n'] == 1:\n"
        "        print('why it died', file=sys.stderr, flush=True)\n"
        "        os._exit(3)\n"
        "    print('noise')\n"
        f"    print({runner._MARK!r} + json.dumps(job), flush=True)\n"
    )
    started: list[list[str]] = []
    popen = runner.subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        started.append(command)
        return popen([sys.executable, str(worker)], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", start)
    answers = list(runner._ask([{"n": n} for n in range(4)], "cpu", 1, [30.0] * 4))
    assert answers == [{"n": 0}, {"failure": "why it died"}, {"n": 2}, {"n": 3}]
    assert len(started) == 2


def test_a_worker_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    popen = runner.subprocess.Popen
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, **options: popen(sleeping, **options))
    assert list(runner._ask([{}], "cpu", 1, [0.2])) == [{"failure": "no result within 0 s"}]


def test_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.resolve_device(None) == "cpu"
    with pytest.raises(ConfigError, match=r"bench: --device must be 'cuda' or 'cpu', got 'tpu'"):
        runner.run(["scan"], device="tpu")
    with pytest.raises(BackendUnavailableError, match="use --device cpu"):
        runner.run(["scan"], device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="'decode' is measured on a cpu device only; use --device cpu"):
        runner.run(["decode"], device="cuda")


def test_quick_runs_on_a_cpu_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "file.json"
    arguments = ["--device", "cpu", "--quick", "--no-peers", "--threads", "1", "--out", str(out)]
    assert cli("bench", "generate", *arguments, "--only", "statescan", "--case", "tiny, 2 x") == 0
    assert {row["case"] for row in json.loads(out.read_text())["rows"]} == {"tiny, 2 x (48 + 8)"}
    assert "tiny, 2 x (48 + 8)" in capsys.readouterr().out
    assert cli("bench", "attention", "block", "generate", *arguments) == 0
    shown = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert {row["bench"] for row in report["rows"]} == {"attention", "block", "generate"}
    for row in report["rows"]:
        assert row["failure"] is None, row
        assert row["relative_error"] <= row["error_limit"]
        assert row["floor_ms"] == max(row["floors"].values())
        assert row["ratio"] == pytest.approx(row["milliseconds"] / row["floor_ms"])
        assert row["implementation"] in shown
    assert "x floor" in shown


def test_a_model_can_be_named_for_generate() -> None:
    """A Transformer's floor: the weights without the embedding's table, and of the cache what is filled."""
    jobs = device_jobs.device_jobs("generate", "cuda", False, "pythia-1.4b")
    assert [job.case for job in jobs] == [f"pythia-1.4b, {batch} x (2048 + 128)" for batch in (1, 16, 64, 128)]
    assert {job.implementation for job in jobs} == {"statescan"}
    weights = 2 * (1_414_647_808 - 50304 * 2048)
    position = 24 * 2 * 2048 * 2
    for job, batch in zip(jobs, (1, 16, 64, 128), strict=True):
        assert job.cost.bytes == weights + batch * position * (2048 + 64 + 1)
    assert {job.dtype for job in device_jobs.device_jobs("generate", "cpu", False, "pythia-tiny")} == {
        "float32",
        "bfloat16",
    }
    with pytest.raises(ConfigError, match="a model is named for 'generate' alone"):
        runner.run(["scan"], device="cpu", model="tiny")


# ---- figures --------------------------------------------------------------------------------------------------------


def report_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"machine": {"gpu": "a GPU", "versions": {"torch": "2"}, "date": "today"}, "ceilings": {}, "rows": rows}


def row_of(bench: str, name: str, milliseconds: float, case: str = "", **notes: Any) -> dict[str, Any]:
    return {
        "bench": bench, "case": case or json.dumps(notes), "implementation": name, "dtype": "bfloat16",
        "milliseconds": milliseconds, "ratio": 1.5, "floors": {"bytes": milliseconds / 1.5},
        "tokens_per_second": 1e6 / milliseconds, "peak_memory_bytes": 2**30, "failure": None, "notes": notes,
    }  # fmt: skip


def all_rows() -> list[dict[str, Any]]:
    rows = [
        row_of(
            "attention",
            name,
            ms * length / 512,
            f"{1024 // length} x {length}, width 64, {mode}",
            mode=mode,
            length=length,
        )
        for name, ms in (("statescan cuda, 64 channels", 1.0), ("torch SDPA flash", 3.0))
        for length in (512, 1024)
        for mode in ("forward", "forward+backward")
    ]
    rows += [row_of("generate", "statescan", 2.0, preset="130m", batch=batch) for batch in (1, 16)]
    rows += [row_of("train", f"statescan, recompute {p}", 9.0, "130m, 8 x 2048") for p in ("none", "block")]
    return [*rows, row_of("scan", "statescan cuda", 0.3, "(8, 2048, 2048) forward")]


def test_figures_show_what_the_files_hold_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "results.json"
    failed = {**row_of("attention", "broken peer", 1.0, mode="forward", length=512), "failure": "why"}
    file.write_text(json.dumps(report_of([*all_rows(), failed])))
    drawn = figures.draw([file], tmp_path / "out")
    assert [path.name for path in drawn] == ["attention.svg", "floors.svg", "throughput.svg", "memory.svg"]
    for path in drawn:
        assert path.stat().st_size < 100_000
        assert "a GPU, torch 2, today" in path.read_text()
    text = drawn[0].read_text()
    assert "torch SDPA flash" in text
    assert "broken peer" not in text
    again = figures.draw([file], tmp_path / "again")
    assert [a.read_bytes() for a in again] == [d.read_bytes() for d in drawn]
    # of a training step that is there as one CUDA graph nothing else is drawn
    captured = [
        row_of("train", f"statescan, recompute none{how}", 7.0, "130m, 8 x 2048")
        for how in (", captured", ", compiled")
    ]
    file.write_text(json.dumps(report_of([*all_rows(), *captured])))
    text = next(path for path in figures.draw([file], tmp_path / "captured") if path.stem == "throughput").read_text()
    assert [name in text for name in ("none, captured", "recompute block", "none<", "compiled")] == [
        True,
        True,
        False,
        False,
    ]
    only = tmp_path / "only.json"
    only.write_text(json.dumps(report_of([row_of("scan", "statescan cuda", 0.3, "(8, 2048, 2048) forward")])))
    assert [path.name for path in figures.draw([only], tmp_path / "few")] == ["floors.svg"]


def test_figures_of_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"rows": [1]}')
    with pytest.raises(DataError, match=r"other.json must be a result file of `statescan bench --out`"):
        figures.draw([other], tmp_path)
    other.write_text(json.dumps(report_of([])))
    assert cli("bench", "figures", str(other), "--out", str(tmp_path)) == 1
    assert "holds rows of attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("GPU", "torch sees no CUDA device"),
        ("tool", "compute-sanitizer is not installed"),
        ("backend", "selective_scan, triton: triton does not import"),
        (None, ""),
    ],
)
def test_the_sanitizer_is_not_green_where_something_is_missing(
    missing: str | None, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless that is asked for."""
    import runpy

    main = runpy.run_path(str(Path(__file__).parents[1] / "gpu" / "sanitize.py"))["main"]
    found = main.__globals__
    checked: list[tuple[str, ...]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing != "GPU")
    monkeypatch.setattr(found["shutil"], "which", lambda name: None if missing == "tool" else f"/bin/{name}")
    monkeypatch.setitem(found, "ELSEWHERE", "/nowhere/compute-sanitizer")
    monkeypatch.setitem(found, "RUNS", {"selective_scan": None})
    monkeypatch.setitem(found, "check", lambda *run: checked.append(run[:3]))
    monkeypatch.setitem(
        found,
        "refusal",
        lambda op, name, **_: "triton does not import" if (missing, name) == ("backend", "triton") else None,
    )
    assert main(["memcheck"]) == (0 if missing is None else 1)
    out = capsys.readouterr().out
    assert ("not sanitized: " in out) == (missing is not None)
    assert words in out
    kept = {("memcheck", "selective_scan", "cuda"), ("memcheck", "model", "auto")}
    expected = {None: {*kept, ("memcheck", "selective_scan", "triton")}, "backend": kept}.get(missing, set())
    assert set(checked) == expected
    assert main(["memcheck", "--may-skip"]) == 0
    monkeypatch.setitem(found, "check", lambda *run: "an error")
    assert main(["memcheck", "--may-skip"]) == int(bool(expected)), "what runs has to be clean all the same"
    if missing is None:
        with pytest.raises(SystemExit):
            main(["--only", "no such op"])


def test_the_results_kept_can_be_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    root = Path(__file__).parents[2]
    script = runpy.run_path(str(root / "benchmarks" / "table.py"))
    results = sorted((root / "benchmarks" / "results").glob("*.json"))
    files = [file for file in results if script["has_rows"](json.loads(file.read_text()))]
    assert len(files) > 5
    script["main"]([str(file) for file in results])
    shown = capsys.readouterr().out
    assert [file.stem for file in files if f"**{file.stem}**" not in shown] == []
    pytest.importorskip("matplotlib")
    drawn = figures.draw([root / "benchmarks" / "results" / "h100.json"], tmp_path)
    kept = {path.name for path in (root / "docs" / "figures").iterdir()}
    assert {path.name for path in drawn} <= kept
