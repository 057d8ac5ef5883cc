"""A run that goes on from a model has its shape, its tokenizer and gentle settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from statescan.data import ByteTokenizer, SymbolTokenizer
from statescan.errors import CheckpointError
from statescan.models import CausalLM, MambaConfig
from statescan.recipes.finetuning import finetuning_run, within_passes
from statescan.train import DataConfig, RunConfig, TrainConfig


def test_shape_and_tokenizer_are_the_model_s(tmp_path: Path) -> None:
    config = MambaConfig(8, 1, 256)
    ByteTokenizer().save(CausalLM(config).save_pretrained(tmp_path / "bytes"))
    run = finetuning_run(tmp_path / "bytes", ["a.txt"], steps=100)
    assert run.model == config
    assert (run.data.paths, run.data.tokenizer) == (("a.txt",), "bytes")
    assert (run.train.weights, run.train.lora, run.train.steps) == (str(tmp_path / "bytes"), 0, 100)
    # What was learnt is to stay: a fraction of the rate from nothing, and no decay.
    assert run.train.lr < 0.2 * TrainConfig().lr
    assert run.train.weight_decay == 0.0
    assert finetuning_run(tmp_path / "bytes", ["a.txt"], lora=4, steps=1).train.lora == 4
    assert RunConfig.from_dict(run.to_dict()) == run

    SymbolTokenizer("abcd").save(CausalLM(MambaConfig(8, 1, 4)).save_pretrained(tmp_path / "symbols"))
    assert finetuning_run(tmp_path / "symbols", ["a.txt"], steps=1).data.tokenizer == str(tmp_path / "symbols")
    assert finetuning_run(tmp_path / "symbols", ["a.txt"], tokenizer="bytes", steps=1).data.tokenizer == "bytes"


def test_a_short_text_is_gone_through_three_times_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    ByteTokenizer().save(CausalLM(MambaConfig(8, 1, 256)).save_pretrained("model"))
    text = tmp_path / "text.txt"

    def settings(size: int) -> TrainConfig:
        text.write_bytes(b"It was a dark night.\n" * (size // 21))
        return finetuning_run("model", [str(text)]).train

    short = settings(21_000)
    # 95 % of 21,000 bytes, three times, in updates of 8 x 256.
    assert short.steps == int(3 * 0.95 * 21_000 / 2048) == 29
    assert (short.warmup, short.evaluate_every, short.checkpoint_every) == (2, 7, 14)
    assert settings(630).steps == 1
    assert settings(420_000).steps == 300
    # From any folder the run finds its start.
    assert short.weights == str(tmp_path / "model")
    whole = RunConfig(MambaConfig(8, 1, 256), DataConfig((str(text),), valid_paths=(str(text),)), short)
    assert within_passes(whole, 0.01).train.steps == int(0.01 * 420_000 / 2048)
    assert within_passes(whole, 3) == whole


def test_there_must_be_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        finetuning_run(tmp_path / "nowhere", ["a.txt"])
