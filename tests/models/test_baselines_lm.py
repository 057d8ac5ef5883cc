"""The models that Mamba is judged against: each by its published counterpart, and in every way of running it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from statescan.checkpoint.attention_layouts import attention_fields_from
from statescan.errors import CheckpointError, ConfigError, ShapeError
from statescan.generate import Engine, SamplingParams, generate_naive
from statescan.models import (
    PRESETS,
    CausalLM,
    ConvConfig,
    MambaConfig,
    ModelConfig,
    RecurrentConfig,
    S4Config,
    TransformerConfig,
    config_from_dict,
    flops_per_token,
    parameter_count,
    preset,
    state_bytes,
)
from statescan.models.convert import convert
from statescan.nn import S4
from statescan.train import RunConfig

SMALL: dict[str, Any] = {"d_model": 16, "n_layer": 2, "vocab_size": 50}
PYTHIA: dict[str, Any] = {
    "mlp": "gelu", "norm": "layer", "bias": True, "parallel": True, "rotary_fraction": 0.5, "tie_embeddings": False,
    "init": "neox",
}  # fmt: skip
CONFIGS: dict[str, ModelConfig] = {
    "pythia": TransformerConfig(**SMALL, n_head=2, **PYTHIA),
    "transformer++": TransformerConfig(**SMALL, n_head=2),
    "transformer, absolute": TransformerConfig(**SMALL, n_head=2, positions="absolute", max_positions=40, bias=True),
    "transformer, xpos": TransformerConfig(**SMALL, n_head=2, positions="xpos"),
    "transformer, none": TransformerConfig(**SMALL, n_head=4, n_kv_head=2, positions="none"),
    "lstm": RecurrentConfig(**SMALL),
    "gru": RecurrentConfig(**SMALL, cell="gru", d_hidden=12, d_intermediate=24),
    "conv": ConvConfig(**SMALL, width=3, dilations=2),
    "s4": S4Config(**SMALL, mixer="s4", d_state=4),
    "s4d": S4Config(**SMALL, d_state=4, norm="layer"),
}


def make(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> CausalLM:
    """A model whose every parameter is random, so that none can be left out unseen."""
    torch.manual_seed(0)
    model = CausalLM(CONFIGS[name].replace(**fields), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def near(a: Tensor, b: Tensor, bound: float = 1e-11) -> None:
    assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_is_pieces_is_steps(name: str) -> None:
    model, ids = make(name), tokens(2, 17)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :6], state=model.init_state(2))
        second = model(ids[:, 6:15], state=first.state)
        near(torch.cat([first.logits, second.logits], 1), whole[:, :15])
        state = second.state
        for t in range(15, 17):
            one = model.step(ids[:, t], state)
            near(one.logits, whole[:, t])
            state = one.state
    assert model(ids).state is None


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    model, ids = make(name), tokens(3, 12)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, :4], mask[1, 7:], mask[2, 2:5] = False, False, False
    with torch.no_grad():
        padded = model(ids, mask=mask).logits
        for row in range(3):
            near(padded[row][mask[row]], model(ids[row][mask[row]][None]).logits[0])
        loss = model(ids, labels=ids, mask=mask).loss
    apart = []
    for row, spans in enumerate([[(4, 12)], [(0, 7)], [(0, 2), (5, 12)]]):
        # A token whose next is padding is not judged.
        logits = model(ids[row][mask[row]][None]).logits[0]
        at = 0
        for a, b in spans:
            apart.append(F.cross_entropy(logits[at : at + b - a - 1], ids[row, a + 1 : b], reduction="none"))
            at += b - a
    near(loss, torch.cat(apart).mean().detach())


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_of_a_batch_that_goes_on(name: str) -> None:
    """Rows of different lengths, from a state, and then all of them by steps."""
    model, ids = make(name), tokens(3, 9)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :5], mask[2, 6:] = False, False
    with torch.no_grad():
        state = model(ids, mask=mask, state=model.init_state(3)).state
        last = tokens(3, seed=5)
        stepped = model.step(last, state).logits
        for row in range(3):
            alone = torch.cat([ids[row][mask[row]], last[row : row + 1]])[None]
            near(stepped[row], model(alone).logits[0, -1])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    model, ids = make(name), tokens(1, 20)
    bounds = [0, 7, 8, 8, 20]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = model(ids, labels=ids, cu_seqlens=cu_seqlens, logits_to_keep=20)
    losses = []
    for a, b in itertools.pairwise(bounds):
        if b > a:
            logits = model(ids[:, a:b]).logits[0]
            near(packed.logits[0, a:b], logits)
            losses.append(F.cross_entropy(logits[:-1], ids[0, a + 1 : b], reduction="none"))
    near(packed.loss, torch.cat(losses).mean())
    embeds = model.backbone.embedding(ids).detach().clone()
    embeds[:, 10] = torch.nan
    logits = model(inputs_embeds=embeds, cu_seqlens=cu_seqlens).logits
    assert torch.equal(logits[:, :8], model(ids, cu_seqlens=cu_seqlens).logits[:, :8])
    assert logits[:, 10].isnan().all()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_blocks_gives_the_same_gradients(name: str, dropout: float) -> None:
    ids, results = tokens(2, 11), []
    extra = {"attention_dropout": dropout} if name.startswith(("pythia", "transformer")) else {}
    for policy in ("none", "block"):
        model = make(name, recompute=policy, dropout=dropout, embedding_dropout=dropout, **extra)
        torch.manual_seed(7)
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*CONFIGS, "mamba"])
def test_dropout_is_for_training_alone(name: str) -> None:
    ids = tokens(2, 11)
    CONFIGS_HERE = {**CONFIGS, "mamba": MambaConfig(**SMALL)}
    for field in ("dropout", "embedding_dropout", "attention_dropout"):
        config = CONFIGS_HERE[name]
        if field == "attention_dropout" and not isinstance(config, TransformerConfig):
            continue
        torch.manual_seed(0)
        model = CausalLM(config.replace(**{field: 0.5}), dtype=torch.float64)
        torch.manual_seed(0)
        without = CausalLM(config, dtype=torch.float64)
        with torch.no_grad():
            assert not torch.equal(model(ids).logits, model(ids).logits)
            assert torch.equal(model.eval()(ids).logits, without(ids).logits)
            state = model.init_state(2)
            assert torch.equal(model.step(ids[:, 0], state).logits, without.step(ids[:, 0], state).logits)


def test_dropout_keeps_the_mean_and_drops_the_share() -> None:
    """Of what a block adds to the stream; the stream itself passes."""
    torch.manual_seed(0)
    model = CausalLM(CONFIGS["transformer++"].replace(dropout=0.25, n_layer=1), dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []
    block = model.backbone.layers[0]
    block.register_forward_hook(lambda _, __, out: seen.append(out[:2]))
    norm_inputs: list[Tensor] = []
    model.backbone.norm_f.register_forward_hook(lambda _, given, __: norm_inputs.append(given[0]))
    with torch.no_grad():
        model(tokens(40, 40))
    x, dropped = seen[0][0], norm_inputs[0]
    kept = dropped != 0
    assert abs(float(kept.double().mean()) - 0.75) < 0.01
    assert torch.allclose(dropped[kept], x[kept] / 0.75)


@pytest.mark.parametrize("name", ["pythia", "transformer, absolute", "conv", "s4d"])
def test_it_compiles_without_a_break(name: str) -> None:
    model, ids = make(name), tokens(2, 11)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    near(compiled(ids, labels=ids).loss.detach(), model(ids, labels=ids).loss.detach())


# ---- published counterparts ----------------------------------------------------------------------------------------


def neox(**fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
        rotary_pct=0.25, max_position_embeddings=64, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(config).eval()


def llama(**fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80,
        max_position_embeddings=64, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


PUBLISHED = {
    "gpt-neox": lambda: neox(),
    "gpt-neox, one after the other": lambda: neox(use_parallel_residual=False, layer_norm_eps=1e-3),
    "gpt-neox, tied": lambda: neox(tie_word_embeddings=True),
    "llama": lambda: llama(),
    "llama, shared keys": lambda: llama(num_key_value_heads=2, rope_theta=1000.0),
    "llama, tied": lambda: llama(tie_word_embeddings=True, rms_norm_eps=1e-4),
}


def shaken(model: Any) -> Any:
    """Every parameter random, biases and norms too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_and_gradients_are_transformers(name: str, tmp_path: Path) -> None:
    theirs = shaken(PUBLISHED[name]())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CausalLM.from_pretrained(tmp_path / "theirs")
    ids = tokens(2, 21)
    wanted = theirs(ids).logits
    with torch.no_grad():
        near(ours(ids).logits, wanted, 1e-5)
        state = ours(ids[:, :20], state=ours.init_state(2)).state
        near(ours.step(ids[:, 20], state).logits, wanted[:, 20], 1e-5)
    F.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    ours(ids, labels=ids).loss.backward()
    grad = ours.backbone.embedding.weight.grad
    near(grad, theirs.get_input_embeddings().weight.grad, 1e-4)
    # And back: the same tensors to the bit, which transformers reads.
    ours.save_pretrained(tmp_path / "back", "transformers")
    again = type(theirs).from_pretrained(tmp_path / "back")
    state, before = again.state_dict(), theirs.state_dict()
    assert state.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(state[key], value), key
    convert(tmp_path / "theirs", tmp_path / "ours", "statescan")
    converted = CausalLM.from_pretrained(tmp_path / "ours")
    assert converted.config == ours.config
    for key, value in ours.state_dict().items():
        assert torch.equal(converted.state_dict()[key], value), key
    convert(tmp_path / "ours", tmp_path / "theirs again", "transformers")
    assert torch.equal(type(theirs).from_pretrained(tmp_path / "theirs again")(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden_act": "relu"}, ConfigError, "hidden_act must be 'gelu', got 'relu'"),
        ({"attention_bias": False}, ConfigError, "attention_bias must be True, got False"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            ConfigError,
            "rope_type must be",
        ),
        ({"something": 3}, ConfigError, "the field something is not known here, got 3"),
        ({"architectures": ["GPTNeoXForSequenceClassification"]}, ConfigError, "architectures must name"),
        ({"num_hidden_layers": 4}, CheckpointError, "the weights hold no gpt_neox.layers.3"),
        ({"num_hidden_layers": 2}, CheckpointError, "the weights hold gpt_neox.layers.2"),
        ({"intermediate_size": 100}, CheckpointError, "must have the shape"),
        ({"statescan": {"vocab_size": 60}}, ConfigError, "statescan.vocab_size must pad to vocab_size = 50"),
    ],
    ids=str,
)
def test_fields_of_transformers_are_honoured_or_refused(
    change: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    neox().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=text):
        CausalLM.from_pretrained(tmp_path)


def test_a_published_pythias_files_are_understood(tmp_path: Path) -> None:
    """pythia-160m's own config.json, and the masks and tables that its first files carried along, at a small width."""
    published = {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12, "num_hidden_layers": 12,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
    }  # fmt: skip
    fields = attention_fields_from(published, tmp_path)
    wanted = preset("pythia-160m", vocab_size=50304, pad_vocab_size_multiple=1, d_intermediate=3072)
    assert config_from_dict(fields) == wanted
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    model = CausalLM(config_from_dict(attention_fields_from({**published, **small, "vocab_size": 50}, tmp_path)))
    model.save_pretrained(tmp_path, "transformers")
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        name = f"gpt_neox.layers.{layer}.attention"
        tensors |= {f"{name}.bias": torch.ones(1, 1, 8, 8), f"{name}.masked_bias": torch.tensor(-1e9)}
        tensors[f"{name}.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**published, **small, "vocab_size": 50}))
    ids = tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(CausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, ids = make(name, torch.float32), tokens(2, 9)
    model.save_pretrained(tmp_path / "m")
    again = CausalLM.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    marked = {n: getattr(p, "_max_lr", None) for n, p in again.named_parameters()}
    assert marked == {n: getattr(p, "_max_lr", None) for n, p in model.named_parameters()}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architecture"] == "CausalLM"
    assert config["family"] == CONFIGS[name].to_dict()["family"]
    with pytest.raises(CheckpointError, match="state-spaces layout has no word for a model of"):
        model.save_pretrained(tmp_path / "other", "state-spaces")
    assert not (tmp_path / "other").exists()
    if name not in ("pythia", "transformer++"):
        with pytest.raises(CheckpointError, match="save as 'statescan'"):
            model.save_pretrained(tmp_path / "other", "transformers")
    with pytest.raises(ConfigError, match="the layout must be one of"):
        model.save_pretrained(tmp_path / "other", "gguf")


# ---- counters, presets, initial values -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, c in PRESETS.items() if not isinstance(c, MambaConfig)])
def test_presets_have_as_many_parameters_as_counted(name: str) -> None:
    model = CausalLM(preset(name), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(preset(name))


def test_published_sizes() -> None:
    """Pythia's as its model cards count them; each Transformer++ is of its Mamba's size."""
    counted = {
        "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632,
        "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960,
    }  # fmt: skip
    assert {name: parameter_count(preset(name)) for name in counted} == counted
    for size, mamba in (("130m", 129.1), ("370m", 371.5), ("790m", 793.2), ("1.4b", 1372.2)):
        assert abs(parameter_count(preset(f"transformer++-{size}")) / 1e6 / mamba - 1) < 0.06


@pytest.mark.parametrize("name", CONFIGS)
def test_counters(name: str) -> None:
    config, model = CONFIGS[name], make(name, torch.float32)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and ".ssm." not in n)
    matrices -= 0 if config.tie_embeddings else model.backbone.embedding.weight.numel()
    matrices -= 0 if model.backbone.positions is None else model.backbone.positions.weight.numel()
    flops = flops_per_token(config)
    assert flops.training == 3 * flops.forward
    # Two for each number of a matrix; the rest is small, but for S4's states, of which there are many at this width.
    assert 2 * matrices < flops.forward < 2 * matrices * (1.6 if ".ssm." in str(list(model.state_dict())) else 1.3)
    state = model(tokens(3, 24), state=model.init_state(3)).state
    if isinstance(config, TransformerConfig):
        held = 2 * sum(layer.keys[:, :, : layer.length].nbytes for layer in state)
        assert state_bytes(config, 3, context=24) == held
        assert flops_per_token(config, 24).forward > flops.forward
        with pytest.raises(ConfigError, match="context must be given for a Transformer"):
            state_bytes(config, 3)
        assert model.state_bytes(2, torch.bfloat16, context=8) == 2 * state_bytes(config, 1, torch.bfloat16, context=8)
    else:
        parts = [
            part for layer in state for part in (layer if isinstance(layer, tuple) else (layer,)) if part is not None
        ]
        assert state_bytes(config, 3) == sum(part.nbytes for part in parts)
        assert state_bytes(config, 3, context=1000) == state_bytes(config, 3)


def test_initial_values() -> None:
    def std(weight: Tensor) -> float:
        return float(weight.detach().std())

    torch.manual_seed(0)
    pythia = CausalLM(preset("pythia-tiny", d_model=256, n_head=4))
    small, wang = math.sqrt(2 / (5 * 256)), 2 / (2 * math.sqrt(256))
    block: Any = pythia.backbone.layers[1]
    for part in (block.mixer.qkv_proj, block.mixer.out_proj, block.mlp.in_proj, block.mlp.out_proj):
        layer, wanted = part, wang if part in (block.mixer.out_proj, block.mlp.out_proj) else small
        assert abs(std(layer.weight) / wanted - 1) < 0.02
        assert not layer.bias.any()
    assert abs(std(pythia.backbone.embedding.weight) / small - 1) < 0.02
    assert abs(std(pythia.lm_head.weight) / small - 1) < 0.02
    plus = CausalLM(preset("transformer++-tiny", d_model=256, n_head=4))
    block = plus.backbone.layers[0]
    for layer, wanted in (
        (block.mixer.qkv_proj, 0.02),
        (block.mlp.out_proj, 0.02 / 2),
        (block.mixer.out_proj, 0.02 / 2),
    ):
        assert abs(std(layer.weight) / wanted - 1) < 0.02
    torch.manual_seed(3)
    first = CausalLM(CONFIGS["lstm"])
    torch.manual_seed(3)
    later = CausalLM(CONFIGS["lstm"], device="meta").to_empty(device="cpu")
    later.reset_parameters()
    assert all(bool(p.isfinite().all()) for p in later.parameters())
    assert later.lm_head.weight is later.backbone.embedding.weight
    assert {n: p.shape for n, p in first.named_parameters()} == {n: p.shape for n, p in later.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_decay_leaves_alone_what_it_must(name: str) -> None:
    from statescan.train.optim import parameter_groups

    model = make(name)
    groups = parameter_groups(model, 0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for n, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (n not in model.undecayed_parameters()), n


# ---- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_come_back(name: str) -> None:
    config = CONFIGS[name]
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    run = RunConfig(config)
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    changed = run.apply_overrides(["model.d_model=32", "model.dropout=0.1"])
    assert (changed.model.d_model, changed.model.dropout) == (32, 0.1)


@pytest.mark.parametrize(
    ("make_one", "text"),
    [
        (lambda: TransformerConfig(16, 2, 50, n_head=3), "n_head must be a divisor of d_model = 16, got 3"),
        (lambda: TransformerConfig(16, 2, 50, n_head=4, n_kv_head=3), "n_kv_head must be a divisor of n_head = 4"),
        (lambda: TransformerConfig(16, 2, 50, positions="alibi"), "positions must be one of 'rotary'"),
        (lambda: TransformerConfig(16, 2, 50, rotary_fraction=0.0), r"rotary_fraction must be a number in \(0, 1\]"),
        (lambda: TransformerConfig(16, 2, 50, d_intermediate=0), "d_intermediate must be None or an integer >= 1"),
        (lambda: TransformerConfig(16, 2, 50, recompute="cheap"), "recompute must be one of 'none', 'block'"),
        (lambda: TransformerConfig(16, 2, 50, dropout=1), r"dropout must be a number in \[0, 1\), got 1"),
        (lambda: MambaConfig(16, 2, 50, dropout=-0.1), r"dropout must be a number in \[0, 1\), got -0.1"),
        (lambda: TransformerConfig(0, 2, 50), "d_model must be an integer >= 1, got 0"),
        (lambda: TransformerConfig(16, 2, 50, norm="batch"), "norm must be one of 'rms', 'layer'"),
        (lambda: RecurrentConfig(16, 2, 50, cell="rnn"), "cell must be one of 'lstm', 'gru', got 'rnn'"),
        (lambda: ConvConfig(16, 2, 50, width=0), "width must be an integer >= 1, got 0"),
        (lambda: S4Config(16, 2, 50, d_state=3), "d_state must be an even integer >= 2, got 3"),
        (lambda: S4Config(16, 2, 50, dt_max=1e-4), "dt_max must be at least dt_min"),
        (lambda: config_from_dict({"family": "rwkv"}), "family must be one of transformer, recurrent, conv, s4"),
        (lambda: config_from_dict({"family": "conv", "d_model": 4}), "n_layer, vocab_size must be given"),
        (lambda: preset("pythia-tiny", n_heads=2), "did you mean 'n_head'"),
        (lambda: preset("pythia-16m"), "did you mean 'pythia-160m'"),
        (lambda: RunConfig.from_dict({"model": {"family": "rwkv"}}), "model.family: wanted transformer"),
    ],
)
def test_bad_configurations(make_one: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_one()


def test_absolute_positions_end() -> None:
    model = make("transformer, absolute")
    with pytest.raises(
        ShapeError, match="a model with 40 absolute positions reads no more than so many tokens, got 41"
    ):
        model(tokens(1, 41))
    with pytest.raises(ShapeError, match="got 41"):
        model(tokens(1, 50), cu_seqlens=torch.tensor([0, 9, 50]))
    with torch.no_grad():
        state = model(tokens(1, 40), state=model.init_state(1)).state
    with pytest.raises(ShapeError, match="got 41"):
        model.step(tokens(1), state)


# ---- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_writes_what_running_everything_again_writes(name: str) -> None:
    """Prompts of several lengths, more of them than fit, so that rows come and go."""
    torch.manual_seed(0)
    model = CausalLM(CONFIGS[name].replace(vocab_size=256))
    prompts = ["It is a", "a", "Call me", "never mind"]
    params = [SamplingParams(max_new_tokens=5 + 3 * i, temperature=0.8, seed=i) for i in range(4)]
    found = Engine(model, max_batch=2, prefill_chunk=4).generate(prompts, params)
    for prompt, own, result in zip(prompts, params, found, strict=True):
        assert result.tokens == generate_naive(model, prompt, own).tokens


def test_a_session_goes_on_and_its_state_is_not_changed_by_others() -> None:
    torch.manual_seed(0)
    model = CausalLM(CONFIGS["pythia"].replace(vocab_size=256))
    engine = Engine(model, max_batch=2)
    greedy = SamplingParams(max_new_tokens=6, temperature=0.0)
    session = engine.open("It is a")
    first = engine.resume(session, greedy)
    engine.generate(["something else", "and more"], greedy)
    second = engine.resume(session, greedy)
    whole = engine.generate(["It is a"], SamplingParams(max_new_tokens=12, temperature=0.0))[0]
    assert first.tokens + second.tokens == whole.tokens


@pytest.mark.parametrize("name", ["pythia", "lstm", "s4d"])
def test_bfloat16_weights_are_a_copy(name: str) -> None:
    torch.manual_seed(0)
    model = CausalLM(CONFIGS[name].replace(vocab_size=256))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = Engine(model, dtype="bfloat16")
    result = engine.generate(["abc"], SamplingParams(max_new_tokens=4, temperature=0.0))[0]
    assert len(result.tokens) == 4
    kinds = {p.dtype for n, p in engine.decoder.model.named_parameters() if ".ssm." not in n}
    assert kinds == {torch.bfloat16}
    assert isinstance(engine.decoder.nbytes, int)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, float16"):
        Engine(model, dtype="int8")


def test_s4_system_stays_exact_in_low_precision() -> None:
    model = CausalLM(CONFIGS["s4"], dtype=torch.bfloat16)
    systems = [m for m in model.modules() if isinstance(m, S4)]
    assert systems
    assert all(p.dtype == torch.float32 for m in systems for p in m.parameters())
    assert model(tokens(1, 8)).logits.dtype == torch.bfloat16
