"""The commands take every family of models: trained, gone on with, written with, judged, described."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from statescan.errors import CheckpointError
from statescan.models import CausalLM, TransformerConfig, preset
from statescan.train import RunConfig, train

TEXT = "The whale swam. The men rowed after it, and the sea was cold and wide. " * 60
SMALL = ["--set", "model.d_model=16", "--set", "model.n_layer=2"]
FAMILIES = {
    "pythia-tiny": ["model.n_head=2"],
    "transformer++-tiny": ["model.n_head=2", "model.positions=absolute", "model.max_positions=64"],
    "lstm-tiny": [],
    "gru-tiny": [],
    "conv-tiny": [],
    "s4-tiny": ["model.d_state=4"],
    "s4d-tiny": ["model.d_state=4"],
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "whale.txt"
    path.write_text(TEXT)
    return path


def arguments(name: str, text: Path, out: Path, steps: int, cache: Path) -> list[object]:
    extra = [part for field in FAMILIES[name] for part in ("--set", field)]
    return [
        "train", "--preset", name, "--data", text, "--out", out, *SMALL, *extra,
        *(part for field in ("batch_size=2", "length=24", "evaluate_tokens=100", "log_every=1", "lr=1e-2")
          for part in ("--set", f"train.{field}")),
        "--set", f"train.steps={steps}", "--set", f"data.cache={cache}", "--set", "train.accelerator=cpu",
        "--set", "model.dropout=0.1",
    ]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_through_the_commands(run, text: Path, tmp_path: Path, name: str) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    code, shown, err = run(*arguments(name, text, out, 6, cache), "--json")
    assert code == 0, err
    trained = json.loads(shown)
    assert trained["steps"] == 6
    assert trained["evaluations"][-1]["bits_per_byte"] < trained["evaluations"][0]["bits_per_byte"]
    config = json.loads((out / "config.json").read_text())
    assert config["family"] == preset(name).to_dict()["family"]
    assert config["d_model"] == 16
    # Interrupted and gone on with, it is the same run.
    again = RunConfig.from_json(out / "run.json")
    short = again.apply_overrides(["train.steps=3", "train.min_lr=1e-2"])
    whole = again.apply_overrides(["train.min_lr=1e-2"])
    train(short, tmp_path / "half", progress=False)
    train(whole, tmp_path / "half", resume=True, progress=False)
    train(whole, tmp_path / "once", progress=False)
    for file in ("model.safetensors", "log.csv"):
        assert (tmp_path / "half" / file).read_bytes() == (tmp_path / "once" / file).read_bytes()

    code, shown, err = run(
        "generate",
        "--model",
        out,
        "--prompt",
        "The whale",
        "--prompt",
        "Sea",
        "--max-new-tokens",
        5,
        "--seed",
        1,
        "--json",
    )
    assert code == 0, err
    assert [len(row["tokens"]) for row in json.loads(shown)] == [5, 5]
    windows = ["--context", 30, "--json"]
    code, shown, err = run("evaluate", "--model", out, "--data", text, "--max-tokens", 60, *windows)
    assert code == 0, err
    judged = json.loads(shown)["bits_per_byte"]
    assert 2 < judged < 8.5
    code, shown, err = run("evaluate", "--model", out, "--data", text, "--max-tokens", 60, "--carry-state", *windows)
    assert code == 0, err
    code, shown, err = run("info", out, "--json")
    assert code == 0, err
    facts = json.loads(shown)
    assert facts["parameters"] == CausalLM.from_pretrained(out).parameter_count()
    assert facts["state_grows"] == (config["family"] == "transformer")
    code, shown, err = run("inspect", "The whale", "--model", out, "--out", tmp_path / "page.html")
    assert code == 1
    assert "inspect: model must have the published Mamba layer" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["pythia-tiny", "lstm-tiny", "conv-tiny", "s4d-tiny"])
def test_packed_documents_are_trained_on(run, tmp_path: Path, name: str) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"{i} bottles standing on the wall."}) + "\n" for i in range(120)))
    packed = ["--set", "data.packing=true", "--json"]
    code, shown, err = run(*arguments(name, lines, tmp_path / "run", 5, tmp_path / "cache"), *packed)
    assert code == 0, err
    judged = json.loads(shown)["evaluations"]
    assert judged[-1]["bits_per_byte"] < judged[0]["bits_per_byte"]


def test_a_run_is_not_gone_on_with_by_another_family(run, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*arguments("lstm-tiny", text, out, 2, tmp_path / "cache"))[0] == 0
    held = RunConfig.from_json(out / "run.json")
    other = RunConfig(TransformerConfig(16, 2, 256, n_head=2), held.data, held.train)
    with pytest.raises(CheckpointError, match="wanted a model of = RecurrentConfig, with which the run began"):
        train(other, out, resume=True, progress=False)
    code, _, err = run("train", "--out", out, "--resume", "--preset", "pythia-tiny")
    assert code == 1
    assert "wanted a --preset with" in err
    assert len(err.strip().splitlines()) == 1


def test_presets_are_described(run) -> None:
    code, shown, _ = run("info", "pythia-1.4b")
    assert code == 0
    assert "1,414,647,808" in shown
    assert "196,608 (bfloat16), for each token of the context" in shown
    code, _, err = run(
        "train", "--preset", "pythia-tiny", "--data", "packaged:moby_dick", "--out", "x", "--set", "model.d_state=4"
    )
    assert code == 1
    assert "model.d_state" in err
