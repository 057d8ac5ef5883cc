"""Transformers as the transformers package stores them: GPT-NeoX (Pythia) and Llama (what Transformer++ is).

A field is honoured, or it is one that no number of the model depends on, or it is refused by name. Tensors are
rearranged: GPT-NeoX keeps queries, keys and values head by head, Llama has one matrix for each, and for each half of
the gated MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.errors import CheckpointError, ConfigError

__all__ = ["ATTENTION_TYPES", "attention_fields_from", "attention_fields_to", "tensors_from", "tensors_to"]

ATTENTION_TYPES = {"gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM"}
# Fields that no number of the model depends on in a forward pass without dropout: how it is stored, run, trained.
_WITHOUT_EFFECT = frozenset(
    (
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "_name_or_path",
        "classifier_dropout",
        "initializer_range",
        "max_position_embeddings",
        "pretraining_tp",
        "_from_model_config",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "is_encoder_decoder",
        "is_decoder",
        "sep_token_id",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
    )
)
_EXTRA = "statescan"
# What these layouts have no word for and the numbers of a forward pass don't depend on.
_EXTRA_FIELDS = ("vocab_size", "pad_vocab_size_multiple", "residual_in_fp32", "init", "initializer_range", "recompute")


def attention_fields_from(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `TransformerConfig` that a config.json of model_type "gpt_neox" or "llama" tells.

    Raises:
        ConfigError: a field is unknown, or has a value that this package's model can't take.
    """
    fields = dict(config)
    kind = fields.pop("model_type")
    architectures = fields.pop("architectures", None) or [ATTENTION_TYPES[kind]]
    if ATTENTION_TYPES[kind] not in architectures:
        raise ConfigError(
            f"{path}: architectures must name {ATTENTION_TYPES[kind]}, got {architectures!r}; only language models are "
            "read"
        )
    for name in _WITHOUT_EFFECT:
        fields.pop(name, None)
    extra = fields.pop(_EXTRA, {})
    neox = kind == "gpt_neox"
    base, fraction = _rotary(fields, neox, path)
    width = fields.pop("hidden_size")
    heads = fields.pop("num_attention_heads")
    kv_heads = None if neox else fields.pop("num_key_value_heads", None)
    ours: dict[str, Any] = {
        "family": "transformer",
        "d_model": width,
        "n_layer": fields.pop("num_hidden_layers"),
        "vocab_size": fields.pop("vocab_size"),
        "d_intermediate": fields.pop("intermediate_size"),
        "mlp": "gelu" if neox else "gated",
        "norm": "layer" if neox else "rms",
        "norm_epsilon": fields.pop("layer_norm_eps" if neox else "rms_norm_eps", 1e-5 if neox else 1e-6),
        "tie_embeddings": fields.pop("tie_word_embeddings", False),
        "n_head": heads,
        "n_kv_head": None if kv_heads == heads else kv_heads,
        "rotary_base": base,
        "rotary_fraction": fraction,
        "bias": neox,
        "parallel": fields.pop("use_parallel_residual", True) if neox else False,
        "init": "neox" if neox else "depth",
        "pad_vocab_size_multiple": 1,
        "dropout": fields.pop("hidden_dropout", 0.0) if neox else 0.0,
        "attention_dropout": fields.pop("attention_dropout", 0.0) or 0.0,
    }
    fixed: dict[str, Any] = {"hidden_act": "gelu" if neox else "silu", "head_dim": width // heads}
    fixed |= {"attention_bias": True} if neox else {"attention_bias": False, "mlp_bias": False}
    for name, wanted in fixed.items():
        got = fields.pop(name, wanted)
        if got is not None and got != wanted:
            raise ConfigError(
                f"{path}: {name} must be {wanted!r}, got {got!r}; statescan has no model of this kind: use the package "
                "that wrote it"
            )
    if fields:
        name = sorted(fields)[0]
        raise ConfigError(
            f"{path}: the field {name} is not known here, got {fields[name]!r}; if the model does not depend on it, "
            "take it out of the file"
        )
    if not isinstance(extra, dict) or set(extra) - set(_EXTRA_FIELDS):
        raise ConfigError(f"{path}: the field {_EXTRA} must hold what statescan wrote, got {extra!r}; remove it")
    multiple = extra.get("pad_vocab_size_multiple", 1)
    if "vocab_size" in extra and math.ceil(extra["vocab_size"] / multiple) * multiple != ours["vocab_size"]:
        raise ConfigError(
            f"{path}: {_EXTRA}.vocab_size must pad to vocab_size = {ours['vocab_size']}, got {extra['vocab_size']}; "
            f"remove the field {_EXTRA}"
        )
    return ours | extra


def _rotary(fields: dict[str, Any], neox: bool, path: Path) -> tuple[float, float]:
    """(base, turned fraction), as transformers 4 and 5 write them."""
    given = fields.pop("rope_parameters", None) or {}
    scaling = fields.pop("rope_scaling", None) or {}
    kind = given.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    if kind != "default":
        raise ConfigError(
            f"{path}: rope_type must be 'default', got {kind!r}; statescan has no model of this kind: use the package "
            "that wrote it"
        )
    base = given.get("rope_theta", fields.pop("rope_theta", None))
    older = fields.pop("rotary_emb_base", None)
    base = base if base is not None else older if older is not None else 10_000.0
    fraction = fields.pop("rotary_pct", 0.25 if neox else 1.0)
    fraction = given.get("partial_rotary_factor", fields.pop("partial_rotary_factor", fraction))
    return float(base), float(fraction)


def attention_fields_to(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """transformers' config.json for a model with these fields of `TransformerConfig` (all of them).

    Raises:
        CheckpointError: neither layout has words for it.
    """
    shared = {"positions": "rotary", "d_intermediate": int, "embedding_dropout": 0.0}
    kinds: dict[str, dict[str, Any]] = {
        "gpt_neox": {"mlp": "gelu", "norm": "layer", "bias": True, "n_kv_head": None},
        "llama": {"mlp": "gated", "norm": "rms", "bias": False, "parallel": False, "rotary_fraction": 1.0},
    }
    kind = "gpt_neox" if fields["norm"] == "layer" else "llama"
    for name, wanted in (shared | kinds[kind]).items():
        if wanted is not int and fields[name] != wanted:
            raise CheckpointError(
                f"save: the transformers layout has {name} {wanted!r} alone in its {ATTENTION_TYPES[kind]}, got "
                f"{fields[name]!r}; save as 'statescan'"
            )
    multiple = fields["pad_vocab_size_multiple"]
    theirs: dict[str, Any] = {
        "architectures": [ATTENTION_TYPES[kind]],
        "model_type": kind,
        "torch_dtype": dtype,
        "hidden_size": fields["d_model"],
        "num_hidden_layers": fields["n_layer"],
        "num_attention_heads": fields["n_head"],
        "intermediate_size": fields["d_intermediate"],
        "vocab_size": math.ceil(fields["vocab_size"] / multiple) * multiple,
        "hidden_act": "gelu" if kind == "gpt_neox" else "silu",
        "tie_word_embeddings": fields["tie_embeddings"],
        "attention_dropout": fields["attention_dropout"],
        "rope_theta": fields["rotary_base"],
        "initializer_range": fields["initializer_range"],
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "gpt_neox":
        theirs |= {
            "layer_norm_eps": fields["norm_epsilon"],
            "use_parallel_residual": fields["parallel"],
            "rotary_pct": fields["rotary_fraction"],
            "rotary_emb_base": fields["rotary_base"],
            "hidden_dropout": fields["dropout"],
            "attention_bias": True,
        }
    else:
        theirs |= {
            "rms_norm_eps": fields["norm_epsilon"],
            "num_key_value_heads": fields["n_kv_head"] or fields["n_head"],
            "attention_bias": False,
            "mlp_bias": False,
        }
    theirs[_EXTRA] = {name: fields[name] for name in _EXTRA_FIELDS}
    return theirs


def _neox_names(layer: int) -> dict[str, str]:
    """Our name -> theirs, of what differs by its name alone."""
    ours, theirs = f"backbone.layers.{layer}.", f"gpt_neox.layers.{layer}."
    pairs = {
        "norm": "input_layernorm",
        "norm_mlp": "post_attention_layernorm",
        "mixer.out_proj": "attention.dense",
        "mlp.in_proj": "mlp.dense_h_to_4h",
        "mlp.out_proj": "mlp.dense_4h_to_h",
    }
    return {f"{ours}{a}.{part}": f"{theirs}{b}.{part}" for a, b in pairs.items() for part in ("weight", "bias")}


def _llama_names(layer: int) -> dict[str, str]:
    ours, theirs = f"backbone.layers.{layer}.", f"model.layers.{layer}."
    pairs = {
        "norm": "input_layernorm",
        "norm_mlp": "post_attention_layernorm",
        "mixer.out_proj": "self_attn.o_proj",
        "mlp.out_proj": "mlp.down_proj",
    }
    return {f"{ours}{a}.weight": f"{theirs}{b}.weight" for a, b in pairs.items()}


def _names(fields: Mapping[str, Any]) -> dict[str, str]:
    neox = fields["norm"] == "layer"
    root = "gpt_neox" if neox else "model"
    names = {"backbone.embedding.weight": f"{root}.{'embed_in' if neox else 'embed_tokens'}.weight"}
    for part in ("weight", "bias") if neox else ("weight",):
        names[f"backbone.norm_f.{part}"] = f"{root}.{'final_layer_norm' if neox else 'norm'}.{part}"
    for layer in range(fields["n_layer"]):
        names |= (_neox_names if neox else _llama_names)(layer)
    if not fields["tie_embeddings"]:
        names["lm_head.weight"] = "embed_out.weight" if neox else "lm_head.weight"
    return names


def _by_head(value: Tensor, heads: int, ours: bool) -> Tensor:
    """GPT-NeoX's rows (heads, 3, d_head) from ours (3, heads, d_head), or back."""
    sizes = (3, heads, -1) if ours else (heads, 3, -1)
    return value.unflatten(0, sizes).transpose(0, 1).flatten(0, 2)


def tensors_from(
    fields: Mapping[str, Any], theirs: Collection[str], read: Callable[[str], Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """Our name -> what reads that tensor.

    Args:
        fields: of `TransformerConfig`, all of them, n_head a number.
        theirs: names of the stored tensors.
        read: gives one of them.

    Raises:
        CheckpointError: a name is missing or one too many.
    """
    neox, heads = fields["norm"] == "layer", fields["n_head"]
    made: dict[str, Callable[[], Tensor]] = {}
    used: set[str] = set()

    def put(ours: str, build: Callable[[list[Tensor]], Tensor], *sources: str) -> None:
        if missing := [name for name in sources if name not in theirs]:
            raise CheckpointError(f"load: the weights hold no {missing[0]}; copy them again, with all their parts")
        used.update(sources)
        made[ours] = lambda: build([read(name) for name in sources])

    for ours, name in _names(fields).items():
        put(ours, lambda parts: parts[0], name)
    for layer in range(fields["n_layer"]):
        ours = f"backbone.layers.{layer}."
        if neox:
            for part in ("weight", "bias"):
                source = f"gpt_neox.layers.{layer}.attention.query_key_value.{part}"
                put(f"{ours}mixer.qkv_proj.{part}", lambda parts: _by_head(parts[0], heads, False), source)
            continue
        prefix = f"model.layers.{layer}."
        qkv = (f"{prefix}self_attn.{x}_proj.weight" for x in "qkv")
        put(f"{ours}mixer.qkv_proj.weight", torch.cat, *qkv)
        put(f"{ours}mlp.in_proj.weight", torch.cat, *(f"{prefix}mlp.{x}_proj.weight" for x in ("gate", "up")))
    # Tables that older files carry along: masks and rotary frequencies; and a tied head that is written all the same.
    spare = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")
    head = "embed_out.weight" if neox else "lm_head.weight"
    for name in theirs:
        if name not in used and not name.endswith(spare) and not (fields["tie_embeddings"] and name == head):
            raise CheckpointError(f"load: the weights hold {name}, which this model has no place for")
    return made


def tensors_to(fields: Mapping[str, Any], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors from ours; the inverse of `tensors_from`."""
    neox, heads = fields["norm"] == "layer", fields["n_head"]
    kv_heads = fields["n_kv_head"] or heads
    theirs = {name: ours[mine] for mine, name in _names(fields).items()}
    for layer in range(fields["n_layer"]):
        mine = f"backbone.layers.{layer}."
        if neox:
            for part in ("weight", "bias"):
                value = _by_head(ours[f"{mine}mixer.qkv_proj.{part}"], heads, True)
                theirs[f"gpt_neox.layers.{layer}.attention.query_key_value.{part}"] = value
            continue
        prefix, size = f"model.layers.{layer}.", fields["d_model"] // heads
        sizes = (fields["d_model"], kv_heads * size, kv_heads * size)
        for x, value in zip("qkv", ours[f"{mine}mixer.qkv_proj.weight"].split(sizes), strict=True):
            theirs[f"{prefix}self_attn.{x}_proj.weight"] = value
        for x, value in zip(("gate", "up"), ours[f"{mine}mlp.in_proj.weight"].chunk(2), strict=True):
            theirs[f"{prefix}mlp.{x}_proj.weight"] = value
    return theirs
