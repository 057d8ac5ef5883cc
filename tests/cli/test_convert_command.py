"""``statescan convert``, and commands on models of other layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from statescan.data import ByteTokenizer
from statescan.models import CausalLM, MambaConfig

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    CausalLM(MambaConfig(d_model=16, n_layer=2, vocab_size=256, d_state=4)).save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
def test_a_converted_model_writes_what_the_first_wrote(run: Run, model: Path, tmp_path: Path, layout: str) -> None:
    code, out, err = run("convert", model, tmp_path / "new", "--to", layout)
    assert (code, err) == (0, "")
    assert layout in out
    assert "config.json" in out
    texts = []
    for folder in (model, tmp_path / "new"):
        code, out, _ = run(
            "generate", "--model", folder, "--prompt", "Call me", "--max-new-tokens", "12", "--json", "--seed", "0"
        )
        assert code == 0
        texts.append(json.loads(out)[0]["tokens"])
    assert texts[0] == texts[1]
    code, out, _ = run("info", tmp_path / "new", "--json")
    assert json.loads(out)["config"]["d_state"] == 4


def test_json_and_shards(run: Run, model: Path, tmp_path: Path) -> None:
    code, out, _ = run("convert", model, tmp_path / "new", "--to", "statescan", "--json", "--shard-megabytes", 1)
    assert code == 0
    told = json.loads(out)
    assert told["files"] == ["config.json", "model.safetensors", "statescan_tokenizer.json"]
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "new").iterdir())


def test_a_named_tokenizer_stands_for_a_missing_one(run: Run, model: Path) -> None:
    (model / "statescan_tokenizer.json").unlink()
    generate = ("generate", "--model", model, "--prompt", "x", "--max-new-tokens", "2")
    code, _, err = run(*generate)
    assert code == 1
    assert "--tokenizer" in err
    assert run(*generate, "--tokenizer", "bytes")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{model}", "{tmp}/new", "--to", "onnx"), "the layout must be one of 'statescan', 'state-spaces'"),
        (("{tmp}/nowhere", "{tmp}/new", "--to", "statescan"), "does not exist"),
        (("{model}", "{model}", "--to", "transformers"), "must be a new or empty folder"),
        (("{model}", "{model}/config.json/new", "--to", "transformers"), "could not make the folder"),
        (("{model}", "{tmp}/new", "--to", "statescan", "--revision", "v1"), "a revision is for hub ids"),
    ],
    ids=str,
)
def test_one_line_says_what_is_wrong(run: Run, model: Path, tmp_path: Path, arguments: tuple, words: str) -> None:
    given = [text.replace("{tmp}", str(tmp_path)).replace("{model}", str(model)) for text in arguments]
    code, out, err = run("convert", *given)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
