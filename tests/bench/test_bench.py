"""What `statescan bench` runs: its jobs, its figures' checks, its file. No test here judges a speed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from statescan.bench import BENCHMARKS, run
from statescan.bench.runner import _FULL, _QUICK
from statescan.errors import ConfigError
from statescan.models import CausalLM, MambaConfig


def test_unknown_benchmark_is_named() -> None:
    with pytest.raises(ConfigError, match=r"bench: name must be one of .*'scan'.* got 'speed'"):
        run(["speed"])


def test_every_benchmark_lists_jobs_with_floors_for_ours() -> None:
    limits = {"read_gb_s": 40.0, "exp_g_s": 1.0, "matmul_f32_gflops": 200.0, "matmul_bf16_gflops": 400.0}
    for sizes in (_FULL, _QUICK):
        for name, jobs in BENCHMARKS.items():
            found = list(jobs({**sizes, "max_seconds": 1.0}))
            assert found, name
            for job in found:
                assert job.bench == name
                if job.implementation.startswith("statescan") and job.floor:
                    assert job.floor(limits) > 0


def test_a_quick_run_checks_outputs_and_writes_its_file(tmp_path: Path) -> None:
    out = tmp_path / "figures" / "scan.json"
    report = run(["scan", "decode"], device="cpu", threads=1, quick=True, peers=False, out=out)
    assert json.loads(out.read_text()) == report
    assert report["machine"]["versions"]["torch"] == torch.__version__
    rows = [row for row in report["rows"] if row["failure"] is None]
    assert {row["bench"] for row in rows} == {"scan", "decode"}
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["ratio"] == pytest.approx(row["milliseconds"] / row["floor_ms"])
        limit = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 5e-2}[row["dtype"]]
        assert 0 <= row["relative_error"] < limit, row


def test_a_failing_implementation_is_reported_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATESCAN_CPU_LIBRARY", "nowhere.so")
    report = run(["scan"], device="cpu", threads=1, quick=True, peers=False, only="cpu")
    assert all("cpu" in row["failure"] for row in report["rows"])


def test_a_peer_that_runs_something_else_alone_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' Mamba asked for mambapy's scan runs its own loop where mambapy is not installed."""
    installed = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "mambapy" else installed(name, *a)
    )
    report = run(["scan"], device="cpu", threads=1, quick=True, only="mambapy")
    assert report["rows"]
    assert all(row["failure"].startswith("mambapy is not installed") for row in report["rows"])


def test_transformers_takes_the_same_weights() -> None:
    pytest.importorskip("transformers")
    from statescan.bench.peers import transformers_model

    torch.manual_seed(0)
    model = CausalLM(MambaConfig(d_model=16, n_layer=2, vocab_size=40))
    ids = torch.randint(0, 40, (1, 9))
    with torch.no_grad():
        ours, theirs = model(ids).logits, transformers_model(model).eval()(ids).logits
    assert (ours - theirs).norm() <= 1e-5 * ours.norm()


def test_llama_cpp_takes_the_same_weights() -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from statescan.bench.peers import LlamaCpp

    torch.manual_seed(0)
    model = CausalLM(MambaConfig(d_model=64, n_layer=2, vocab_size=40))
    ids = torch.randint(0, 40, (1, 9))
    llama = LlamaCpp(model, "f32", threads=1)
    llama.prefill_call(ids[0].numpy())()
    with torch.no_grad():
        ours = model(ids, logits_to_keep=1).logits[0, -1]
    theirs = torch.from_numpy(llama.logits(8))
    assert (ours - theirs).norm() <= 1e-5 * ours.norm()
