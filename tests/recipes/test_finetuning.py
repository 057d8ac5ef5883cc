"""A run that goes on from a model has its shape, its tokenizer and gentle settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from statescan.data import ByteTokenizer, SymbolTokenizer
from statescan.errors import CheckpointError
from statescan.models import CausalLM, MambaConfig
from statescan.recipes.finetuning import finetuning_run
from statescan.train import RunConfig, TrainConfig


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
    assert finetuning_run(tmp_path / "bytes", ["a.txt"], lora=4).train.lora == 4
    assert RunConfig.from_dict(run.to_dict()) == run

    SymbolTokenizer("abcd").save(CausalLM(MambaConfig(8, 1, 4)).save_pretrained(tmp_path / "symbols"))
    assert finetuning_run(tmp_path / "symbols", ["a.txt"]).data.tokenizer == str(tmp_path / "symbols")
    assert finetuning_run(tmp_path / "symbols", ["a.txt"], tokenizer="bytes").data.tokenizer == "bytes"


def test_there_must_be_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        finetuning_run(tmp_path / "nowhere", ["a.txt"])
