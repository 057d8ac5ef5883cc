"""The published layouts: how each names a model's fields and tensors, and what it can't say.

Three layouts are known, each a config.json beside weights:

- ``statescan``: this package's, fields as `statescan.models.MambaConfig` names them.
- ``state-spaces``: of the paper's authors (`MambaLMHeadModel`); a tied head is repeated, a layer has its fields in
  ssm_cfg.
- ``transformers``: `MambaForCausalLM` and `FalconMambaForCausalLM`.

A field is honoured, or it is one that no number of the model depends on (listed below), or it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statescan.checkpoint.attention_layouts import ATTENTION_TYPES, attention_fields_from
from statescan.errors import CheckpointError, ConfigError

__all__ = ["LAYOUTS", "detect_layout", "fields_from", "fields_to", "head_is_written", "their_name"]

LAYOUTS = ("statescan", "state-spaces", "transformers")
_ARCHITECTURE = "CausalLM"

# The layer's arguments in ssm_cfg carry the same names as ours.
_SSM_CFG = (
    "d_state",
    "d_conv",
    "expand",
    "dt_rank",
    "dt_min",
    "dt_max",
    "dt_init",
    "dt_scale",
    "dt_init_floor",
    "conv_bias",
    "bias",
)
_STATE_SPACES = {
    "d_model": 2560,
    "n_layer": 64,
    "vocab_size": 50277,
    "residual_in_fp32": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
# What a layout fixes: another value is another model.
_STATE_SPACES_FIXED = {"d_intermediate": 0, "rms_norm": True, "attn_layer_idx": [], "attn_cfg": {}}
_STATE_SPACES_MARKS = ("ssm_cfg", "rms_norm", "fused_add_norm", "attn_cfg", "attn_layer_idx", "d_intermediate")
_DEFAULT_EPSILON = 1e-5

# transformers' name -> ours, and transformers' default.
_TRANSFORMERS = {
    "hidden_size": ("d_model", 768),
    "num_hidden_layers": ("n_layer", 32),
    "vocab_size": ("vocab_size", 50280),
    "state_size": ("d_state", 16),
    "conv_kernel": ("d_conv", 4),
    "time_step_rank": ("dt_rank", "auto"),
    "time_step_min": ("dt_min", 0.001),
    "time_step_max": ("dt_max", 0.1),
    "time_step_init_scheme": ("dt_init", "random"),
    "time_step_scale": ("dt_scale", 1.0),
    "time_step_floor": ("dt_init_floor", 1e-4),
    "use_conv_bias": ("conv_bias", True),
    "use_bias": ("bias", False),
    "layer_norm_epsilon": ("norm_epsilon", 1e-5),
    "residual_in_fp32": ("residual_in_fp32", True),
    "tie_word_embeddings": ("tie_embeddings", True),
    "initializer_range": ("initializer_range", 0.1),
    "rescale_prenorm_residual": ("rescale_prenorm_residual", False),
}
_MODEL_TYPES = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM"}
_MIXER_RMS_EPS = 1e-6
_TRANSFORMERS_FIXED = {"hidden_act": "silu", "rms_norm": True, "ssm_cfg": {}}
# Fields that no number of the model depends on: how it is stored, run or decoded from.
_WITHOUT_EFFECT = frozenset(
    (
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "use_mambapy",
        "use_falcon_mambapy",
        "use_associative_scan",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "fused_add_norm",
        "pad_vocab_size_multiple",
        "_name_or_path",
        "_from_model_config",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "is_encoder_decoder",
    )
)
# Ours beside transformers' fields: what those have no place for, or a place that does harm.
_EXTRA = "statescan"
_EXTRA_FIELDS = ("vocab_size", "pad_vocab_size_multiple", "dt_rank", "rescale_prenorm_residual", "recompute")


# What is done with models of this package that are no language models.
_OTHERS = {
    "WaveformModel": "it is a model of sound: `statescan generate --model {folder} --seconds 2 -o out.wav` makes some",
    "SequenceClassifier": "it is a classifier: open it with statescan.models.SequenceClassifier.from_pretrained",
    "BackboneClassifier": "it is a classifier: open it with statescan.models.BackboneClassifier.from_pretrained",
}


def detect_layout(config: Mapping[str, Any], path: Path) -> str:
    """Which layout a config.json is of.

    Raises:
        ConfigError: its architecture is not known here.
    """
    if "architecture" in config:
        return "statescan"
    if "model_type" in config:
        if config["model_type"] not in (*_MODEL_TYPES, *ATTENTION_TYPES):
            raise ConfigError(
                f"{path}: model_type must be one of {', '.join((*_MODEL_TYPES, *ATTENTION_TYPES))}, got "
                f"{config['model_type']!r}; "
                "`statescan evaluate --tasks` judges any causal model that transformers has, everything else needs the "
                "package that knows this architecture"
            )
        return "transformers"
    if any(mark in config for mark in _STATE_SPACES_MARKS):
        return "state-spaces"
    return "statescan"


def fields_from(layout: str, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `MambaConfig` that a config.json of a layout tells.

    Raises:
        ConfigError: a field is unknown, or has a value that this package's model can't take.
    """
    fields = dict(config)
    if layout == "statescan":
        architecture = fields.pop("architecture", _ARCHITECTURE)
        if architecture != _ARCHITECTURE:
            raise ConfigError(
                f"from_pretrained: {path} must have architecture '{_ARCHITECTURE}', got {architecture!r}; "
                + _OTHERS.get(architecture, "open it with that class").format(folder=path.parent)
            )
        return fields
    if fields.get("model_type") in ATTENTION_TYPES:
        return attention_fields_from(fields, path)
    return _from_state_spaces(fields, path) if layout == "state-spaces" else _from_transformers(fields, path)


def _fixed(fields: dict[str, Any], fixed: Mapping[str, Any], path: Path) -> None:
    for name, wanted in fixed.items():
        got = fields.pop(name, wanted)
        if got != wanted or isinstance(got, bool) != isinstance(wanted, bool):
            raise ConfigError(
                f"{path}: {name} must be {wanted!r}, got {got!r}; statescan has no model of this kind: use the package "
                "that wrote it"
            )


def _no_more(fields: Mapping[str, Any], path: Path, where: str = "") -> None:
    if fields:
        name = sorted(fields)[0]
        raise ConfigError(
            f"{path}: the field {where}{name} is not known here, got {fields[name]!r}; if the model does not depend on "
            "it, take it out of the file"
        )


def _from_state_spaces(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    _fixed(fields, _STATE_SPACES_FIXED, path)
    fields.pop("fused_add_norm", None)
    layer = fields.pop("ssm_cfg", {})
    if not isinstance(layer, dict):
        raise ConfigError(f"{path}: ssm_cfg must be an object of fields, got {layer!r}; copy the file again")
    layer = dict(layer)
    _fixed(layer, {"layer": "Mamba1"}, path)
    layer.pop("use_fast_path", None)
    ours = {name: fields.pop(name, default) for name, default in _STATE_SPACES.items()}
    ours |= {name: layer.pop(name) for name in _SSM_CFG if name in layer}
    _no_more(layer, path, "ssm_cfg.")
    _no_more(fields, path)
    return ours


def _from_transformers(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = fields.pop("model_type")
    architectures = fields.pop("architectures", None) or [_MODEL_TYPES[kind]]
    if _MODEL_TYPES[kind] not in architectures:
        raise ConfigError(
            f"{path}: architectures must name {_MODEL_TYPES[kind]}, got {architectures!r}; only "
            "language models are read"
        )
    _fixed(fields, _TRANSFORMERS_FIXED, path)
    for name in _WITHOUT_EFFECT:
        fields.pop(name, None)
    extra = fields.pop(_EXTRA, {})
    ours = {name: fields.pop(theirs, default) for theirs, (name, default) in _TRANSFORMERS.items()}
    ours["mixer_rms_eps"] = fields.pop("mixer_rms_eps", _MIXER_RMS_EPS) if kind == "falcon_mamba" else None
    # Left over in published files from their conversion: the same fields once more.
    for name, twin in (("d_model", "d_model"), ("n_layer", "n_layer")):
        _fixed(fields, {name: ours[twin]}, path)
    # expand is only the default of intermediate_size: the published FalconMamba has 16 where 2 is meant.
    expand = fields.pop("expand", 2)
    inner = fields.pop("intermediate_size", None)
    try:
        inner = int(expand * ours["d_model"]) if inner is None else inner
        multiple = inner > 0 and inner % ours["d_model"] == 0
    except (TypeError, ZeroDivisionError):
        multiple = False
    if not multiple:
        raise ConfigError(
            f"{path}: intermediate_size must be a multiple of hidden_size = {ours['d_model']}, got {inner!r}; other "
            "widths are not read"
        )
    _fixed(fields, {"d_inner": inner}, path)
    ours["expand"] = inner // ours["d_model"]
    ours["pad_vocab_size_multiple"] = 1
    _no_more(fields, path)
    return ours | _own_extra(extra, ours, path)


def _own_extra(extra: Any, ours: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What this package adds to transformers' fields: how many of the vocabulary's rows are in use."""
    if not isinstance(extra, dict) or set(extra) - set(_EXTRA_FIELDS):
        raise ConfigError(
            f"{path}: the field {_EXTRA} must hold what `statescan convert` wrote, got {extra!r}; remove it"
        )
    if extra and "vocab_size" in extra:
        rows, multiple = extra["vocab_size"], extra.get("pad_vocab_size_multiple", 1)
        if not isinstance(rows, int) or not isinstance(multiple, int) or multiple < 1:
            raise ConfigError(
                f"{path}: {_EXTRA}.vocab_size must be an integer, got {extra!r}; remove the field {_EXTRA}"
            )
        if math.ceil(rows / multiple) * multiple != ours["vocab_size"]:
            raise ConfigError(
                f"{path}: {_EXTRA}.vocab_size must pad to vocab_size = {ours['vocab_size']}, got {rows}; "
                f"remove the field {_EXTRA}"
            )
    if extra.get("dt_rank", ours["dt_rank"]) not in (ours["dt_rank"], "auto") or (
        extra.get("dt_rank") == "auto" and ours["dt_rank"] not in ("auto", math.ceil(ours["d_model"] / 16))
    ):
        raise ConfigError(
            f"{path}: {_EXTRA}.dt_rank must agree with time_step_rank = {ours['dt_rank']}, got {extra['dt_rank']!r}; "
            f"remove the field {_EXTRA}"
        )
    return dict(extra)


def fields_to(layout: str, fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of a layout for a model with these fields of `MambaConfig` (all of them).

    Args:
        layout: one of `LAYOUTS`.
        fields: every field.
        dtype: of the stored weights, such as "float32".

    Raises:
        CheckpointError: the layout has no word for a field's value that the model's numbers depend on.
        ConfigError: an unknown layout.
    """
    if layout == "statescan":
        return {"architecture": _ARCHITECTURE, **fields}
    if layout == "state-spaces":
        return _to_state_spaces(fields)
    if layout == "transformers":
        return _to_transformers(fields, dtype)
    raise ConfigError(f"save: the layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")


def _published_layer(layout: str, fields: Mapping[str, Any]) -> None:
    """Refuses a layer that the published layouts have no words for. A real A's initial value is not in them, as other
    initial values are not, and the model's numbers don't depend on it."""
    real = fields["A_init"] != "s4d-lin"
    every = ",".join(sorted(str(fields["selective"]).replace(" ", "").split(",")))
    for name, fits, wanted in (
        ("block", fields["block"] == "mamba", "'mamba'"),
        ("inner", fields["inner"] == "s6", "'s6'"),
        ("selective", every == "B,C,dt", "'B,C,dt'"),
        ("A_init", real, "real"),
        ("dt_rank", fields["dt_rank"] != "none", "a number or 'auto'"),
    ):
        if not fits:
            raise CheckpointError(
                f"save: the {layout} layout has {name} {wanted} alone, got {fields[name]!r}; save as 'statescan'"
            )


def _to_state_spaces(fields: Mapping[str, Any]) -> dict[str, Any]:
    _published_layer("state-spaces", fields)
    for name, wanted in (("norm_epsilon", _DEFAULT_EPSILON), ("mixer_rms_eps", None)):
        if fields[name] != wanted:
            raise CheckpointError(
                f"save: the state-spaces layout has {name} {wanted} alone, got {fields[name]!r}; save as "
                "'transformers' or 'statescan'"
            )
    defaults = {
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "dt_rank": "auto",
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init": "random",
        "dt_scale": 1.0,
        "dt_init_floor": 1e-4,
        "conv_bias": True,
        "bias": False,
    }
    layer = {name: fields[name] for name in _SSM_CFG if fields[name] != defaults[name]}
    return {
        "d_model": fields["d_model"],
        "d_intermediate": 0,
        "n_layer": fields["n_layer"],
        "vocab_size": fields["vocab_size"],
        "ssm_cfg": layer,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": fields["residual_in_fp32"],
        "fused_add_norm": True,
        "pad_vocab_size_multiple": fields["pad_vocab_size_multiple"],
        "tie_embeddings": fields["tie_embeddings"],
    }


def _to_transformers(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    _published_layer("transformers", fields)
    kind = "mamba" if fields["mixer_rms_eps"] is None else "falcon_mamba"
    rows = math.ceil(fields["vocab_size"] / fields["pad_vocab_size_multiple"]) * fields["pad_vocab_size_multiple"]
    theirs: dict[str, Any] = {"architectures": [_MODEL_TYPES[kind]], "model_type": kind, "torch_dtype": dtype}
    theirs |= {name: fields[ours] for name, (ours, _) in _TRANSFORMERS.items()}
    theirs |= {
        "vocab_size": rows,
        "expand": fields["expand"],
        "intermediate_size": fields["expand"] * fields["d_model"],
        "hidden_act": "silu",
        "use_cache": True,
        # Which ids begin and end a text the tokenizer knows; 0, transformers' default, is a byte like any other.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if fields["dt_rank"] == "auto":
        theirs["time_step_rank"] = math.ceil(fields["d_model"] / 16)
    if kind == "falcon_mamba":
        theirs["mixer_rms_eps"] = fields["mixer_rms_eps"]
    # It concerns initial values alone, but where it is true transformers 5 scales out_proj once more on loading.
    theirs["rescale_prenorm_residual"] = False
    theirs[_EXTRA] = {name: fields[name] for name in _EXTRA_FIELDS}
    return theirs


def their_name(layout: str, name: str) -> str:
    """What a layout calls a tensor of ours."""
    if layout == "transformers":
        return name.replace("backbone.embedding.", "backbone.embeddings.")
    return name


def head_is_written(layout: str, tied: bool) -> bool:
    """Whether a layout holds lm_head.weight: always where it is not tied; state-spaces repeats a tied one."""
    return not tied or layout == "state-spaces"
