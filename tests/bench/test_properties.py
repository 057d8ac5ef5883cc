"""The properties table: stacks of equal size, what is counted as a state, the report and its figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from statescan.bench import properties
from statescan.bench.properties import (
    KINDS,
    Stack,
    _bytes,
    draw_properties,
    read_properties,
    run_properties,
    stacks,
)
from statescan.errors import ConfigError, DataError
from statescan.nn import LSTM, S4D, CausalSelfAttention, Mamba


@pytest.mark.parametrize(("d_model", "n_layer"), [(64, 2), (128, 4), (512, 8)])
def test_stacks_have_equal_parameters(d_model: int, n_layer: int) -> None:
    counts = {}
    for kind, make in stacks(d_model, n_layer).items():
        with torch.device("meta"):
            counts[kind] = make().parameter_count()
    assert tuple(counts) == KINDS
    for kind, count in counts.items():
        assert abs(count / counts["Mamba"] - 1) < 0.05, kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_reads_and_steps_as_it_runs(kind: str) -> None:
    torch.manual_seed(0)
    stack = stacks(64, 2)[kind]().double()
    x = torch.randn(2, 9, stack.d_model, dtype=torch.float64)
    whole = stack(x)
    with torch.no_grad():
        states = stack.init_states(2, 16)
        states = stack.read(x[:, :6], states)
        for t in range(6, 9):
            y, states = stack.step(x[:, t], states)
            assert (y - whole[:, t]).abs().max() < 1e-9 * whole.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_token_comes_after_the_whole_context(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind reads as many tokens as the axis says, in pieces; a step's time is that of all rows."""
    monkeypatch.setattr(properties, "_PIECE", 16)
    stack, read = stacks(64, 2)[kind](), []
    whole = stack.read

    def watched(x: torch.Tensor, states: list) -> list:
        read.append(tuple(x.shape))
        return whole(x, states)

    monkeypatch.setattr(stack, "read", watched)
    found = properties._inference(stack, 40, properties._Sizes(64, 2, 128, (40,), 3, 5.0), "cpu")
    assert read == [(3, 16, stack.d_model), (3, 16, stack.d_model), (3, 8, stack.d_model)]
    assert found["seconds_per_token"] == found["seconds"] / 3


def test_what_a_state_holds() -> None:
    x = torch.randn(3, 10, 64)
    with torch.no_grad():
        attention = CausalSelfAttention(64, 2)
        state = attention(x, attention.init_state(3, capacity=40)).state
        assert _bytes(state) == 2 * 3 * 10 * 64 * 4  # keys and values of ten positions, not of forty
        lstm = LSTM(64, 32)
        assert _bytes(lstm(x, lstm.init_state(3)).state) == 2 * 3 * 32 * 4
        s4d = S4D(64, 16)
        assert _bytes(s4d(x, s4d.init_state(3)).state) == 3 * 64 * 8 * 8
        mamba = Mamba(64)
        assert _bytes(mamba(x, mamba.init_state(3)).state) == 3 * 128 * (16 + 3) * 4


def test_a_quick_run_reports_and_draws(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    assert matplotlib
    out = tmp_path / "properties.json"
    report = run_properties(device="cpu", threads=1, quick=True, out=out)
    assert read_properties(out) == report
    assert report["parameters"].keys() == set(KINDS)
    rows = {(row["kind"], row["use"], row["length"]): row for row in report["rows"]}
    assert len(rows) == 5 * 2 * 2
    assert all(row["failure"] is None and row["seconds_per_token"] > 0 for row in rows.values())
    # The cache grows with what was seen; nobody else's state does.
    for kind in KINDS:
        short, long = (rows[kind, "inference", length]["bytes"] for length in (32, 128))
        assert long == (4 * short if kind == "Transformer" else short)
    drawn = out.with_suffix(".svg").read_text()
    for text in (*KINDS, "training: time a token", "inference: memory of one sequence"):
        assert text in drawn
    again = draw_properties(report, tmp_path / "again.svg")
    assert again.read_text() == drawn
    assert "after one token" not in drawn
    del report["context_read"]  # as in files of before every kind read its context
    older = draw_properties(report, tmp_path / "older.svg").read_text()
    assert "inference of LSTM, CNN, S4, Mamba: measured after one token at every place of the axis" in older


def test_a_length_that_would_take_too_long_is_left_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {32: 1.0, 128: 3.0}
    fake = lambda stack, length, sizes, device: {"seconds": took[length], "seconds_per_token": 1.0, "bytes": 1}
    monkeypatch.setitem(properties._TRAIN_OR_INFER, "training", fake)
    sizes = properties._Sizes(64, 2, 128, (32, 128, 512, 2048), 1, 5.0)
    stack = Stack(64, [LSTM(64)])
    rows = list(properties._over_length("LSTM", "training", stack, sizes, "cpu", lambda line: None))
    assert [row["failure"] for row in rows[:2]] == [None, None]
    assert all("left out: a call would take more than 5 s" in row["failure"] for row in rows[2:])


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device must be cpu, or cuda where there is a GPU, got 'tpu'"):
        run_properties(device="tpu")
    with pytest.raises(ConfigError, match=r"--only must be part of one of LSTM, CNN, .*got 'GRU'"):
        run_properties(only="GRU")
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    assert read_properties(tmp_path / "other.json") is None
    assert read_properties(tmp_path / "none.json") is None
    with pytest.raises(DataError, match="wanted a report of `statescan bench properties`"):
        draw_properties({"rows": []}, tmp_path / "x.svg")
