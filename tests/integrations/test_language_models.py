"""Models of any kind, found and opened to be judged: their tokenizers, their lengths, and no code of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from statescan.data import ByteTokenizer
from statescan.errors import CheckpointError, ConfigError, DataError
from statescan.evaluate import LogitsReader, Request, StateReader, evaluate_tasks
from statescan.integrations.language_models import find_judged, open_judged
from statescan.models import CausalLM, MambaConfig, TransformerConfig

transformers = pytest.importorskip("transformers")


def gpt2(folder: Path, positions: int = 16) -> Any:
    """A small random GPT-2, which has a table of positions, without a tokenizer."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=256, n_positions=positions, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


def llama(folder: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("make", "runs_on"), [(gpt2, "transformers"), (llama, "statescan"), (llama, "transformers")])
def test_no_more_is_read_than_the_model_s_own_length(tmp_path: Path, make: Any, runs_on: str) -> None:
    model = make(tmp_path)
    ids = np.random.default_rng(0).integers(0, 256, 43)
    with torch.no_grad():
        table = model(torch.tensor(ids[None, -17:-1])).logits[0, -3:].log_softmax(-1)
    wanted = float(table.gather(1, torch.tensor(ids[-3:, None])).sum())
    for limit in (2048, None):
        judged = open_judged(tmp_path, tokenizer="bytes", max_length=limit)
        assert judged.runs_on == {gpt2: "transformers", llama: "statescan"}[make]
        judged = open_judged(tmp_path, tokenizer="bytes", max_length=limit, runs_on=runs_on)
        assert judged.reader.max_length == 16
        assert judged.reader.score([Request(ids[:40], ids[40:])])[0].logprob == pytest.approx(wanted, rel=1e-4)
    assert find_judged(tmp_path, tokenizer="bytes", max_length=5).max_length == 5


def rwkv(folder: Path) -> Any:
    """A recurrence of another kind, which statescan has not."""
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=256, hidden_size=16, attention_hidden_size=16, intermediate_size=24, num_hidden_layers=2
    )
    model = transformers.RwkvForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_an_rwkv_is_judged_on_tasks_and_refused_elsewhere_with_the_way(tmp_path: Path) -> None:
    """Its answers are its own logits', by the reader and through `evaluate --tasks`."""
    model = rwkv(tmp_path / "rwkv")
    judged = open_judged(tmp_path / "rwkv", tokenizer="bytes")
    assert judged.runs_on == "transformers"
    questions = [("the river ran to the", " sea"), ("he shut the", " door")]
    lines = [json.dumps({"context": context, "target": target}) for context, target in questions]
    (tmp_path / "lambada_test.jsonl").write_text("\n".join(lines) + "\n")
    (report,) = evaluate_tasks(judged.reader, judged.tokenizer, ["lambada"], tmp_path)
    for (context, target), row in zip(questions, report.items, strict=True):
        ids = torch.tensor([list((context + target).encode())])
        with torch.no_grad():
            table = model(ids[:, :-1]).logits[0].log_softmax(-1)
        wanted = table[-len(target) :].gather(1, ids[0, -len(target) :, None]).sum().item()
        assert row["logprobs"][0] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ConfigError, match=r"got 'rwkv'; `statescan evaluate --tasks` judges any causal model that"):
        CausalLM.from_pretrained(tmp_path / "rwkv")


def test_a_table_of_positions_is_a_reader_s_length_too(tmp_path: Path) -> None:
    assert LogitsReader(gpt2(tmp_path)).max_length == 16
    learned = TransformerConfig(16, 1, 256, n_head=2, positions="absolute", max_positions=12)
    assert StateReader(CausalLM(learned), max_length=None).max_length == 12
    assert LogitsReader(CausalLM(learned), max_length=40).max_length == 12
    # Rotary positions, and a state, end nowhere.
    assert StateReader(CausalLM(TransformerConfig(16, 1, 256, n_head=2)), max_length=None).max_length is None
    assert StateReader(CausalLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256)), max_length=4000).max_length == 4000


def test_code_that_comes_with_a_tokenizer_or_a_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    proof = tmp_path / "ran"
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Whoever is asked says yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "model"
    gpt2(folder)
    (folder / "evil.py").write_text(
        f"open({str(proof)!r}, 'w').close()\nfrom transformers import GPT2Config, GPT2LMHeadModel\n"
        "class Tokenizer: pass\nclass Config(GPT2Config): model_type = 'evil'\nclass Model(GPT2LMHeadModel): pass\n",
        encoding="utf-8",
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    )
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": classes}))
    for error, tokenizer in ((DataError, None), (CheckpointError, "bytes")):
        with pytest.raises(error) as caught:
            open_judged(folder, tokenizer=tokenizer)
        assert "it comes with code of its own, which is not run" in str(caught.value)
    # A class that transformers has is taken, whatever the files offer.
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="holds none that transformers opens"):
        open_judged(folder)
    assert not proof.exists()
    assert "custom code" not in "".join(capfd.readouterr())


def test_a_spare_tokenizer_is_for_models_without_one(tmp_path: Path) -> None:
    CausalLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="name a tokenizer with --tokenizer"):
        find_judged(tmp_path)
    assert find_judged(tmp_path, spare_tokenizer="bytes").tokenizer.name == "bytes"
    ByteTokenizer().save(tmp_path)
    assert find_judged(tmp_path, spare_tokenizer="dna").tokenizer.name == "bytes"
    assert find_judged(tmp_path, tokenizer="dna", spare_tokenizer="bytes").tokenizer.name == "dna"
    # One that is there and can't be opened is not passed over.
    (tmp_path / "statescan_tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="wanted what save wrote"):
        find_judged(tmp_path, spare_tokenizer="bytes")
