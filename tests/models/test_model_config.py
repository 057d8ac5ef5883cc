"""Configurations and presets: checked fields, unknown names, counters beside the published sizes."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from statescan.errors import ConfigError
from statescan.models import (
    PRESETS,
    CausalLM,
    MambaConfig,
    flops_per_token,
    parameter_count,
    preset,
    state_bytes,
)

SMALL = MambaConfig(d_model=16, n_layer=2, vocab_size=11)


@pytest.mark.parametrize(
    ("name", "millions"), [("130m", 129.1), ("370m", 371.5), ("790m", 793.2), ("1.4b", 1372.2), ("2.8b", 2768.3)]
)
def test_published_parameter_counts(name: str, millions: float) -> None:
    assert round(parameter_count(PRESETS[name]) / 1e6, 1) == millions
    model = CausalLM(PRESETS[name], device="meta")
    assert model.parameter_count() == parameter_count(PRESETS[name])


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_embeddings": False}, {"bias": True, "conv_bias": False}, {"dt_rank": 5, "d_conv": 2, "expand": 3}],
    ids=str,
)
def test_counters_count_what_is_there(fields: dict) -> None:
    config = SMALL.replace(**fields)
    model = CausalLM(config)
    assert model.parameter_count() == parameter_count(config)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        state = model.init_state(3, dtype=dtype)
        held = sum(part.numel() * part.element_size() for one in state for part in one)
        assert state_bytes(config, 3, dtype) == held
    assert model.state_bytes(2) == state_bytes(config, 2, torch.float32)


def test_flops_of_the_matrix_products_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = CausalLM(SMALL)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 10, dtype=torch.long))
    d, i, n, r = 16, 32, 16, 1
    rest = SMALL.n_layer * (2 * i * 4 + 7 * i * n + 6 * i + 4 * d) + 4 * d
    products = flops_per_token(SMALL).forward - rest
    assert products == SMALL.n_layer * 2 * (2 * d * i + i * (r + 2 * n) + r * i + i * d) + 2 * 16 * d
    assert counter.get_total_flops() == 10 * products
    assert flops_per_token(SMALL).training == 3 * flops_per_token(SMALL).forward


def test_padded_vocabulary_and_sizes() -> None:
    assert PRESETS["130m"].padded_vocab_size == 50280
    assert MambaConfig(d_model=8, n_layer=1, vocab_size=50277, pad_vocab_size_multiple=16).padded_vocab_size == 50288
    assert PRESETS["130m"].dt_rank_size == 48
    assert PRESETS["130m"].d_inner == 1536


def test_copies_pickles_and_dictionaries() -> None:
    for other in (
        copy.deepcopy(SMALL),
        pickle.loads(pickle.dumps(SMALL)),
        MambaConfig.from_dict(SMALL.to_dict()),
        SMALL.replace(),
    ):
        assert other == SMALL
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 0),
        ("d_model", 1.5),
        ("n_layer", True),
        ("vocab_size", -1),
        ("d_state", "16"),
        ("dt_rank", 0),
        ("dt_rank", "full"),
        ("dt_init", "zeros"),
        ("dt_min", 0.0),
        ("dt_max", 1e-6),
        ("dt_scale", float("nan")),
        ("norm_epsilon", -1e-5),
        ("conv_bias", 1),
        ("tie_embeddings", None),
        ("recompute", "all"),
    ],
    ids=str,
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"MambaConfig: {field} must be .*got ") as caught:
        SMALL.replace(**{field: value})
    assert "\n" not in str(caught.value)


def test_unknown_names_get_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match="got 'd_modle'; did you mean 'd_model'"):
        preset("tiny", d_modle=3)
    with pytest.raises(ConfigError, match="got '130M'"):
        preset("130M")
    with pytest.raises(ConfigError, match="got 'tinny'; did you mean 'tiny'"):
        preset("tinny")
    with pytest.raises(ConfigError, match="did you mean 'n_layer'"):
        MambaConfig.from_dict({**SMALL.to_dict(), "n_layers": 3})
    with pytest.raises(ConfigError, match="vocab_size must be given"):
        MambaConfig.from_dict({"d_model": 8, "n_layer": 1})


def test_presets_build() -> None:
    for config in PRESETS.values():
        CausalLM(config, device="meta")
    assert preset("tiny", n_layer=2).n_layer == 2
