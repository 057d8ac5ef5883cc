"""Published layouts: the model that transformers has is ours in every number, and each layout leads back to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.checkpoint import LAYOUTS, open_weights
from statescan.errors import CheckpointError, ConfigError
from statescan.models import CausalLM, MambaConfig, convert

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40, "initializer_range": 0.02}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "state and rank": {"state_size": 7, "time_step_rank": 5, "conv_kernel": 3},
    "expand 3": {"expand": 3},
    "intermediate size": {"expand": 16, "intermediate_size": 64},
    "biases": {"use_bias": True, "use_conv_bias": False},
    "untied": {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    "residual": {"residual_in_fp32": False, "rescale_prenorm_residual": True},
}
FALCON: dict[str, dict[str, Any]] = {
    "falcon": {"model_type": "falcon_mamba", "mixer_rms_eps": 1e-3},
    "falcon, all": {
        "model_type": "falcon_mamba",
        "expand": 16,
        "intermediate_size": 96,
        "tie_word_embeddings": False,
        "state_size": 5,
        "time_step_rank": 3,
        "use_bias": True,
    },
}
OURS = {
    "default": MambaConfig(d_model=16, n_layer=2, vocab_size=11),
    "everything else": MambaConfig(
        d_model=24,
        n_layer=3,
        vocab_size=13,
        d_state=5,
        d_conv=3,
        expand=3,
        dt_rank=4,
        dt_min=0.01,
        dt_max=0.2,
        dt_init="constant",
        dt_scale=0.5,
        dt_init_floor=0.005,
        conv_bias=False,
        bias=True,
        residual_in_fp32=False,
        pad_vocab_size_multiple=16,
        tie_embeddings=False,
    ),
}


def theirs(fields: dict[str, Any], seed: int = 0) -> Any:
    """A model of transformers with weights of deviation 0.02 (its default of 0.1 is chaotic)."""
    fields = SMALL | fields
    falcon = fields.pop("model_type", "mamba") == "falcon_mamba"
    config, model = (
        (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM)
        if falcon
        else (transformers.MambaConfig, transformers.MambaForCausalLM)
    )
    torch.manual_seed(seed)
    made = model(config(**fields, use_cache=False)).train()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith((".bias", "conv1d.weight")) and "dt_proj" not in name:
                parameter.normal_(std=0.2)
    return made


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def agree(ours: CausalLM, model: Any) -> None:
    """Logits within 1e-5 and every gradient within 5e-5."""
    ids = torch.randint(0, 11, (2, 24), generator=torch.Generator().manual_seed(1))
    assert relative(ours(ids).logits, model(ids, use_cache=False).logits) <= 1e-5
    ours(ids, labels=ids).loss.backward()
    model(ids, labels=ids, use_cache=False).loss.backward()
    gradients = {name.replace("embeddings.", "embedding."): p.grad for name, p in model.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert relative(parameter.grad, gradients.pop(name)) <= 5e-5, name
    assert not gradients


def contents(folder: Path) -> dict[str, Tensor]:
    weights = open_weights(folder)
    return {name: weights[name].clone() for name in weights.specs}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", [*VARIANTS, *FALCON])
def test_a_model_that_transformers_saved_is_ours(tmp_path: Path, name: str) -> None:
    model = theirs((VARIANTS | FALCON)[name])
    # Several shards and an index, as large models come.
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if name == "default" else "1GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (name == "default")
    agree(CausalLM.from_pretrained(tmp_path / "theirs"), model)


@pytest.mark.parametrize("name", [*VARIANTS, *FALCON])
def test_through_statescan_and_back_to_the_bit(tmp_path: Path, name: str) -> None:
    model = theirs((VARIANTS | FALCON)[name])
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", "statescan")
    convert(tmp_path / "ours", tmp_path / "back", "transformers", shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert equal(contents(tmp_path / "theirs"), contents(tmp_path / "back"))
    # Where this is true, transformers scales out_proj once more on loading, its own files too; ours never say so.
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rescale_prenorm_residual"] is False
    before, after = (type(model.config).from_pretrained(tmp_path / place).to_dict() for place in ("theirs", "back"))
    assert before.pop("architectures") == after.pop("architectures")
    for field in (
        "expand",
        "transformers_version",
        "statescan",
        "_name_or_path",
        "use_cache",
        "rescale_prenorm_residual",
    ):
        before.pop(field, None), after.pop(field, None)
    # Which ids begin and end a text is not the model's.
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        before.pop(field), after.pop(field)
    assert before == after
    opened = type(model).from_pretrained(tmp_path / "back").train()
    assert equal(dict(opened.named_parameters()), dict(model.named_parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OURS)
def test_a_saved_model_opens_in_transformers(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    ours = CausalLM(OURS[name])
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "transformers")
    ours.save_pretrained(tmp_path / "saved", "transformers")
    assert equal(contents(tmp_path / "theirs"), contents(tmp_path / "saved"))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values())
    # No id is a padding's: transformers gives the embedding of one neither a number nor a gradient.
    assert [getattr(model.config, f"{kind}_token_id") for kind in ("pad", "bos", "eos")] == [None] * 3
    assert model.get_input_embeddings().padding_idx is None
    with torch.no_grad():
        ids = torch.randint(0, 11, (2, 24))
        assert relative(ours(ids).logits, model(ids).logits) <= 1e-5
    written = model.generate(ids[:1, :5], attention_mask=torch.ones(1, 5), max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout_leads_back(tmp_path: Path, layout: str, name: str, dtype: torch.dtype) -> None:
    config = OURS[name].replace(recompute="cheap" if layout == "transformers" else "none")
    model = CausalLM(config, dtype=dtype)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "other", layout)
    convert(tmp_path / "other", tmp_path / "back", "statescan")
    assert equal(contents(tmp_path / "ours"), contents(tmp_path / "back"))
    back = CausalLM.from_pretrained(tmp_path / "other", dtype=dtype)
    assert back.config == config
    assert equal(dict(back.state_dict()), dict(model.state_dict()))
    model.save_pretrained(tmp_path / "saved", layout)
    assert equal(contents(tmp_path / "saved"), contents(tmp_path / "other"))
    ids = torch.randint(0, 11, (1, 9))
    assert torch.equal(back(ids).logits, model(ids).logits)


def published(folder: Path, **fields: Any) -> CausalLM:
    """A folder as the authors' package leaves it: pytorch_model.bin with the tied head twice, and its config.json."""
    torch.manual_seed(0)
    model = CausalLM(MambaConfig(d_model=16, n_layer=2, vocab_size=11, d_state=5, dt_rank=3, bias=True))
    config = {
        "d_model": 16,
        "n_layer": 2,
        "vocab_size": 11,
        "ssm_cfg": {"d_state": 5, "dt_rank": 3, "bias": True},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | fields))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def test_the_authors_layout(tmp_path: Path) -> None:
    model = published(tmp_path)
    back = CausalLM.from_pretrained(tmp_path)
    assert back.config == model.config
    assert equal(dict(back.state_dict()), dict(model.state_dict()))
    assert back.lm_head.weight is back.backbone.embedding.weight
    # The old format of PyTorch can't be mapped and is read all the same.
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert equal(dict(CausalLM.from_pretrained(tmp_path).state_dict()), dict(model.state_dict()))
    (tmp_path / "pytorch_model.bin").unlink()
    convert_folder = tmp_path / "safetensors"
    model.save_pretrained(convert_folder)
    (convert_folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert equal(dict(CausalLM.from_pretrained(tmp_path / "model.safetensors").state_dict()), dict(model.state_dict()))


def test_what_we_write_for_the_authors_package(tmp_path: Path) -> None:
    model = published(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back", "state-spaces")
    saved = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert equal(dict(saved), dict(model.state_dict()))
    assert saved["lm_head.weight"].data_ptr() == saved["backbone.embedding.weight"].data_ptr()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    # The names that its MambaConfig takes; another one is a TypeError there.
    known = "d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm residual_in_fp32 "
    known += "fused_add_norm pad_vocab_size_multiple tie_embeddings"
    assert set(config) == set(known.split())
    assert config["ssm_cfg"] == {"d_state": 5, "dt_rank": 3, "bias": True}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rms_norm": False}, "rms_norm must be True, got False"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx must be []"),
        ({"d_intermediate": 32}, "d_intermediate must be 0"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "layer must be 'Mamba1', got 'Mamba2'"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg.headdim is not known"),
        ({"ssm_cfg": 3}, "ssm_cfg must be an object"),
        ({"rope": 1}, "the field rope is not known"),
        ({"n_layer": "two"}, "n_layer must be an integer"),
    ],
    ids=str,
)
def test_fields_of_the_authors_layout_are_honoured_or_refused(tmp_path: Path, fields: dict, words: str) -> None:
    published(tmp_path, **fields)
    with pytest.raises(ConfigError) as caught:
        CausalLM.from_pretrained(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"model_type": "mamba2"}, "model_type must be one of mamba, falcon_mamba, gpt_neox, llama, got 'mamba2'"),
        ({"architectures": ["MambaForTokens"]}, "architectures must name MambaForCausalLM"),
        ({"intermediate_size": 40}, "intermediate_size must be a multiple of hidden_size = 32, got 40"),
        ({"quantization_config": {"bits": 4}}, "the field quantization_config is not known"),
        ({"ssm_cfg": {"d_state": 4}}, "ssm_cfg must be {}"),
        ({"d_model": 16}, "d_model must be 32"),
        ({"mixer_rms_eps": 1e-6}, "mixer_rms_eps is not known"),
        ({"hidden_size": None}, "intermediate_size must be a multiple"),
        ({"hidden_size": 0, "intermediate_size": 64}, "intermediate_size must be a multiple of hidden_size = 0"),
        ({"time_step_rank": "all"}, "dt_rank must be"),
        ({"statescan": {"vocab_size": 3}}, "statescan.vocab_size must pad to vocab_size = 40, got 3"),
    ],
    ids=str,
)
def test_fields_of_transformers_are_honoured_or_refused(tmp_path: Path, fields: dict, words: str) -> None:
    theirs({}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ConfigError) as caught:
        CausalLM.from_pretrained(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_left_overs_of_published_files_are_read(tmp_path: Path) -> None:
    model = theirs({})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # As in the files of 2024: the authors' fields once more, a torch_dtype, no tie_word_embeddings.
    del config["tie_word_embeddings"], config["use_associative_scan"]
    config |= {"d_model": 32, "n_layer": 2, "d_inner": 64, "fused_add_norm": True, "rms_norm": True, "ssm_cfg": {}}
    config |= {"pad_vocab_size_multiple": 8, "torch_dtype": "float32", "_name_or_path": "./"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    agree(CausalLM.from_pretrained(tmp_path), model)


def test_what_a_layout_can_not_say(tmp_path: Path) -> None:
    for fields, word in (({"norm_epsilon": 1e-6}, "norm_epsilon"), ({"mixer_rms_eps": 1e-6}, "mixer_rms_eps")):
        model = CausalLM(OURS["default"].replace(**fields))
        with pytest.raises(CheckpointError, match=f"state-spaces layout has {word}"):
            model.save_pretrained(tmp_path / "no", "state-spaces")
    with pytest.raises(ConfigError, match="layout must be one of 'statescan', 'state-spaces', 'transformers'"):
        CausalLM(OURS["default"]).save_pretrained(tmp_path / "no", "onnx")
    assert not (tmp_path / "no").exists()


def test_a_head_that_is_not_the_embedding_it_is_said_to_be(tmp_path: Path) -> None:
    model = published(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"][3, 2] += 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from backbone\.embedding\.weight"):
        CausalLM.from_pretrained(tmp_path)


def test_a_layer_with_norms_steps_and_cuts_as_it_runs_whole() -> None:
    torch.manual_seed(0)
    model = CausalLM(MambaConfig(d_model=16, n_layer=2, vocab_size=11, mixer_rms_eps=1e-4), dtype=torch.float64)
    ids = torch.randint(0, 11, (2, 12))
    whole = model(ids).logits
    first = model(ids[:, :7], state=model.init_state(2))
    rest = model(ids[:, 7:11], state=first.state)
    assert rest.state is not None
    last = model.step(ids[:, 11], rest.state)
    got = torch.cat([first.logits, rest.logits, last.logits[:, None]], 1)  # type: ignore[list-item]
    assert relative(got, whole) <= 1e-12
    plain = CausalLM(model.config.replace(mixer_rms_eps=None), dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    assert relative(plain(ids).logits, whole) > 1e-3
