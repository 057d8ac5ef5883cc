"""``statescan reproduce language-scaling`` and ``context-growth``: rows of a moment are trained, judged and printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from statescan.errors import ConfigError
from statescan.models import MambaConfig
from statescan.models.baseline_config import RecurrentConfig
from statescan.recipes import context_growth, language_scaling

Run = Callable[..., tuple[int, str, str]]
SHORT = ("--set", "train.steps=3", "--set", "train.warmup=1", "--set", "train.log_every=1", "--set", "train.length=32")


@pytest.fixture
def novels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small parts, and rows to match."""
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))
    rows = {
        "mamba-0.3m": MambaConfig(8, 1, 256, d_state=2),
        "mamba-4m": MambaConfig(16, 1, 256, d_state=2),
        "lstm-1m": RecurrentConfig(8, 1, 256),
    }
    monkeypatch.setattr(language_scaling, "ROWS", rows)
    for part, size in (("train", 40_000), ("valid", 200), ("test", 4300)):
        (tmp_path / f"novels_{part}.txt").write_text(" ".join(f"{i * i % 97} of them;" for i in range(size))[:size])
    return tmp_path


def test_language_scaling(run: Run, novels: Path) -> None:
    base = ("reproduce", "language-scaling", "--data", novels, "--out", novels / "out", "--device", "cpu")
    code, out, err = run(*base, "--row", "lstm-1m", *SHORT)
    assert code == 0, err
    assert "| LSTM 1M |" in out
    assert "training lstm-1m: 3 updates" in err
    code, out, _ = run(*base, "--report", "--json")
    assert code == 0
    assert json.loads(out)["rows"]["lstm-1m"]["updates"] == 3
    code, out, _ = run(*base, "--tune", "--passes", 1, "--row", "mamba-0.3m", *SHORT)
    assert code == 0
    assert out.count("| mamba-0.3m |") == len(language_scaling.GRID) + 1
    assert "| mamba-4m |" not in out
    for wrong, told in (
        (("--tune", "--speed"), "exclude each other"),
        (("--row", "gru-1m"), "--row must be one of mamba-0.3m, mamba-4m, lstm-1m, or 'all', got 'gru-1m'"),
        (("--row", "lstm-1m", "--passes", 0), "passes must make at least one update"),
        (("--tune", "--row", "lstm-1m", "--passes", 0), "passes must make at least one update"),
        (("--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (("--tokenizer", "words"), "--tokenizer must be 'bytes' or 'bpe', got 'words'"),
    ):
        code, _, err = run(*base, *wrong)
        assert code == 1
        assert told in err
    for command in ("language-scaling", "context-growth"):
        code, _, err = run("reproduce", command, "--data", novels, "--out", novels / "out", "--passes", 5)
        assert code == 2
        assert "less than or equal to 4" in err
    with pytest.raises(ConfigError, match="passes must be 4 at most, got 5"):
        language_scaling.scaling_run("lstm-1m", novels, passes=5)


def test_other_ids_have_a_folder_of_their_own(run: Run, novels: Path) -> None:
    pytest.importorskip("tokenizers")
    base = ("reproduce", "language-scaling", "--data", novels, "--out", novels / "out", "--device", "cpu")
    for tokenizer, told in (("bytes", "768 bytes read"), ("bpe", "768 ids of bpe (")):
        code, out, err = run(*base, "--row", "mamba-0.3m", "--tokenizer", tokenizer, *SHORT)
        assert code == 0, err
        assert out.startswith(told)
    assert not (novels / "out" / "tokenizer.json").exists()
    for file in ("tokenizer.json", "mamba-0.3m/run.json", "results.md"):
        assert (novels / "out" / "bpe" / file).exists()
    # A report trains no tokenizer and makes no folder.
    code, _, err = run(
        "reproduce", "language-scaling", "--data", novels, "--out", novels / "none", "--tokenizer", "bpe", "--report"
    )
    assert code == 1
    assert "wanted a folder of rows to report on" in err
    assert not (novels / "none").exists()


def test_context_growth(run: Run, novels: Path) -> None:
    base = (
        "reproduce", "context-growth", "--data", novels, "--out", novels / "growth", "--scaling", novels / "out",
        "--device", "cpu", "--size", "0.3m", "--longest", 4096,
    )  # fmt: skip
    code, out, err = run(*base, "--row", "mamba-2k-carry", *SHORT)
    assert code == 0, err
    assert "| Mamba, 2k, state carried |" in out
    assert f"Not run: {', '.join(row for row in context_growth.ROWS if row != 'mamba-2k-carry')}." in out
    code, out, _ = run(*base, "--report", "--json")
    assert code == 0
    assert len(json.loads(out)["rows"]["mamba-2k-carry"]["bins"]) == 12
    code, _, err = run(*base[:-2], "--longest", 8192, "--report")
    assert code == 1
    assert "got 8192; there are 4096 (mamba-2k-carry)" in err
    code, out, _ = run(*base[:-2], "--report")
    assert code == 0
    assert "Every place has 4,096 bytes behind it." in out
    code, _, err = run(*base, "--row", "mamba-4k")
    assert code == 1
    assert "--row must be one of" in err
