"""`save_pretrained` and `from_pretrained`: bit-equal, tied, in any dtype, with clear words when something is off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from statescan.checkpoint import CONFIG_FILE, WEIGHTS_FILE, tensor_shapes
from statescan.errors import CheckpointError, ConfigError
from statescan.models import CausalLM, MambaConfig, convert

CONFIG = MambaConfig(d_model=8, n_layer=2, vocab_size=11, d_state=4)
IDS = torch.tensor([[1, 5, 10, 0]])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_back_to_the_bit(tmp_path: Path, tie: bool, dtype: torch.dtype) -> None:
    model = CausalLM(CONFIG.replace(tie_embeddings=tie, recompute="cheap"), dtype=dtype)
    model.save_pretrained(tmp_path)
    back = CausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert back.config == model.config
    for (name, a), (other, b) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.equal(model(IDS).logits, back(IDS).logits)
    assert (back.lm_head.weight is back.backbone.embedding.weight) == tie
    assert ("lm_head.weight" in tensor_shapes(tmp_path)) == (not tie)
    assert all(p.requires_grad and p.is_leaf for p in back.parameters())
    back(IDS, labels=IDS).loss.backward()


def test_a_narrower_dtype_on_the_way_in(tmp_path: Path) -> None:
    model = CausalLM(CONFIG)
    model.save_pretrained(tmp_path)
    back = CausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = back.backbone.layers[0].mixer
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.D.dtype == torch.float32
    assert torch.equal(mixer.in_proj.weight, model.backbone.layers[0].mixer.in_proj.weight.bfloat16())


def test_saving_again_replaces_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = CausalLM(CONFIG)
        model.save_pretrained(tmp_path)
        assert torch.equal(CausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json"]


def test_weights_of_another_configuration(tmp_path: Path) -> None:
    CausalLM(CONFIG).save_pretrained(tmp_path)

    def with_config(**fields: object) -> None:
        config = json.loads((tmp_path / CONFIG_FILE).read_text())
        (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **fields}))

    with_config(d_model=16)
    with pytest.raises(CheckpointError, match=r"must have shape .*got .*another configuration"):
        CausalLM.from_pretrained(tmp_path)
    with_config(d_model=8, n_layer=3)
    with pytest.raises(CheckpointError, match=r"lacks backbone\.layers\.2"):
        CausalLM.from_pretrained(tmp_path)
    with_config(n_layer=1)
    with pytest.raises(CheckpointError, match=r"holds backbone\.layers\.1.*which the model does not have"):
        CausalLM.from_pretrained(tmp_path)
    with_config(n_layer=2, d_stat=3)
    with pytest.raises(ConfigError, match="did you mean 'd_state'"):
        CausalLM.from_pretrained(tmp_path)


def test_more_layers_than_any_file_holds_are_refused_before_they_are_made(tmp_path: Path) -> None:
    CausalLM(CONFIG).save_pretrained(tmp_path / "model")
    place = tmp_path / "model" / CONFIG_FILE
    place.write_text(json.dumps(json.loads(place.read_text()) | {"n_layer": 10**9}))
    for read in (CausalLM.from_pretrained, lambda source: convert(source, tmp_path / "new", "transformers")):
        with pytest.raises(
            CheckpointError, match=r"tensors, fewer than the 1000000000 layers that .*config\.json says"
        ):
            read(tmp_path / "model")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fields", [{"d_model": 10**12}, {"d_state": 10**19}, {"vocab_size": 10**19}], ids=str)
def test_sizes_that_no_tensor_can_have_are_told_in_a_line(tmp_path: Path, fields: dict[str, int]) -> None:
    CausalLM(CONFIG).save_pretrained(tmp_path / "model")
    place = tmp_path / "model" / CONFIG_FILE
    place.write_text(json.dumps(json.loads(place.read_text()) | fields))
    for read in (CausalLM.from_pretrained, lambda source: convert(source, tmp_path / "new", "transformers")):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path / "model")
        assert f"{place} says sizes that no tensor can have" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_another_architecture(tmp_path: Path) -> None:
    CausalLM(CONFIG).save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"architecture": "SequenceClassifier"}))
    with pytest.raises(ConfigError, match="must have architecture 'CausalLM', got 'SequenceClassifier'"):
        CausalLM.from_pretrained(tmp_path)


def test_a_cut_file(tmp_path: Path) -> None:
    CausalLM(CONFIG).save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        CausalLM.from_pretrained(tmp_path)
