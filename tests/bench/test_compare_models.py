"""What tells two models' readings apart: words that a window has held before, positions, books."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from statescan.data import ByteTokenizer
from statescan.evaluate import evaluate_tokens
from statescan.models import CausalLM, MambaConfig, TransformerConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare_models.py"


def test_a_word_is_new_or_was_there_before() -> None:
    kinds = runpy.run_path(str(SCRIPT))["kinds_of"]
    window = b"Copperfield, a copy of Copperfield; a c"
    found = dict(zip(range(1, len(window)), kinds(window).tolist(), strict=True))
    assert len(found) == len(window) - 1
    assert {found[i] for i in range(1, 11)} == {"long, new"}
    assert (found[11], found[12]) == ("between", "between")
    assert {found[i] for i in range(23, 34)} == {"long, before"}
    # "a" is held before; "c" is no word so far, though "copy" begins with it.
    assert (found[13], found[36], found[38]) == ("short, new", "short, before", "short, new")


def test_differences_add_up_and_are_those_of_the_means() -> None:
    compare = runpy.run_path(str(SCRIPT))["compare"]
    text = np.frombuffer(b"The rose is a rose, and was always a rose. " * 10, np.uint8)
    starts, random = [0, 32, 64, 96, 128, 160], np.random.default_rng(0)
    one, other = random.random((2, 6, 32))
    found = compare(text, [0, 100, len(text)], starts, one, other)
    assert found["all"]["difference"] == pytest.approx(one.mean() - other.mean())
    assert [book["windows"] for book in found["books"]] == [4, 2]
    assert found["books"][1]["difference"] == pytest.approx((one - other)[4:].mean())
    assert [(p["first"], p["last"]) for p in found["positions"]] == [(1, 16), (17, 32)]
    assert found["positions"][1]["difference"] == pytest.approx((one - other)[:, 16:].mean())
    for part in ("books", "positions", "words"):
        assert sum(row["share_of_the_difference"] for row in found[part]) == pytest.approx(1.0)
        assert sum(row["bytes"] for row in found[part]) == one.size


def test_the_command_reads_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))
    models = {"one": CausalLM(MambaConfig(8, 1, 256)), "other": CausalLM(TransformerConfig(8, 1, 256, n_head=2))}
    for name, model in models.items():
        ByteTokenizer().save(model.save_pretrained(tmp_path / name))
    text = b"The rose is a rose, and was always a rose. " * 6
    (tmp_path / "novels_test.txt").write_bytes(text)
    line = ["--data", tmp_path, "--model", tmp_path / "one", "--other", tmp_path / "other", "--length", 32]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, line), "--out", str(tmp_path / "found.json")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads((tmp_path / "found.json").read_text())
    tokens = np.frombuffer(text, np.uint8)[: 1 + 32 * 8]
    wanted = evaluate_tokens(models["one"].eval(), tokens, total_bytes=len(tokens), context=32).bits_per_token
    assert found["all"]["one"] == pytest.approx(wanted, rel=1e-5)
    assert found["all"]["windows"] == 8
