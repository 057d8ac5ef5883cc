"""The rows of the paper's tables 1 and 6 to 10 as configurations: counted, saved, and refused by layouts that have no
word for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from statescan.compat import mamba_ssm
from statescan.errors import CheckpointError, ConfigError
from statescan.models import CausalLM, MambaConfig, convert, flops_per_token, parameter_count, preset, state_bytes
from statescan.train.optim import parameter_groups

# Hyena's convolutions, in three rows of table 1 and two of table 6, have no state of constant size and are not built.
TABLE_1: dict[str, dict[str, Any]] = {
    "S4, no gate": {"block": "ungated", "inner": "s4"},
    "S6, no gate": {"block": "ungated"},
    "H3, S4": {"block": "h3", "inner": "s4"},
    "H3, S6": {"block": "h3"},
    "Mamba, S4": {"inner": "s4"},
    "Mamba, S6": {},
}
TABLE_6: dict[str, dict[str, Any]] = {
    "H3, S4 (complex)": {"block": "h3", "inner": "s4d"},
    "H3, S4 (real)": {"block": "h3", "inner": "s4d-real"},
    "H3, S6": {"block": "h3"},
    "Mamba, S4 (complex)": {"inner": "s4d"},
    "Mamba, S4 (real)": {"inner": "s4d-real"},
    "Mamba, S6": {},
}
TABLE_7: dict[str, dict[str, Any]] = {
    "none": {"selective": "none"},
    "B": {"selective": "B"},
    "C": {"selective": "C"},
    "dt": {"selective": "dt"},
    "dt, B, C": {},
}
TABLE_8: dict[str, dict[str, Any]] = {
    "-1/2 + ni": {"A_init": "s4d-lin"},
    "-1/2": {"A_init": "constant"},
    "-(n + 1)": {},
    "exp(N(0, 1))": {"A_init": "random"},
}
TABLE_9: dict[str, dict[str, Any]] = {
    "-": {"dt_rank": "none"},
    **{str(rank): {"dt_rank": rank} for rank in (1, 2, 4, 8, 16, 32, 64)},
}
TABLE_10: dict[str, dict[str, Any]] = {
    f"{n}, {kind}": {"d_state": n, "selective": selective}
    for kind, selective in (("constant B and C", "dt"), ("selective", "B,C,dt"))
    for n in (1, 2, 4, 8, 16)
}
ROWS = {
    f"table {number}: {name}": fields
    for number, table in ((1, TABLE_1), (6, TABLE_6), (7, TABLE_7), (8, TABLE_8), (9, TABLE_9), (10, TABLE_10))
    for name, fields in table.items()
}
# The same and more, one by one.
CHOICES: list[dict[str, Any]] = [
    {"block": block, **fields}
    for block in ("mamba", "h3", "ungated")
    for fields in (
        *({"inner": inner} for inner in ("s6", "s4", "s4d", "s4d-real", "none")),
        {"selective": "none"},
        {"selective": "B,dt", "A_init": "s4d-lin"},
        {"dt_rank": "none", "bias": True, "conv_bias": False},
    )
]
SMALL = MambaConfig(d_model=16, n_layer=2, vocab_size=11, d_state=4)
IDS = torch.tensor([[1, 5, 10, 0, 3, 3, 7]])


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_paper_is_a_model(name: str) -> None:
    torch.manual_seed(0)
    config = SMALL.replace(**ROWS[name])
    model = CausalLM(config)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert loss.isfinite()
    for each, parameter in model.named_parameters():
        assert parameter.grad is not None, each
        assert parameter.grad.isfinite().all(), each
        assert parameter.grad.any(), each


def test_rows_differ_by_the_parameters_that_they_name() -> None:
    """At the paper's size: a rank is a column of x_proj and one of dt_proj a layer; a B or C costs the same fixed or
    not; so does any A."""
    size = {name: parameter_count(preset("370m", **fields)) for name, fields in ROWS.items()}
    assert round(size["table 7: dt, B, C"] / 1e6, 1) == 371.5
    for rank in (1, 2, 4, 8, 16, 32, 64):
        assert size[f"table 9: {rank}"] - size["table 9: -"] == 48 * 2 * 2048 * rank
    for n in (1, 2, 4, 8, 16):
        assert size[f"table 10: {n}, selective"] == size[f"table 10: {n}, constant B and C"]
        assert size["table 7: dt, B, C"] - size[f"table 10: {n}, selective"] == 48 * 3 * 2048 * (16 - n)
    assert size["table 7: dt"] == size["table 7: dt, B, C"]
    assert size["table 7: none"] == size["table 7: B"] == size["table 7: C"] == size["table 9: -"]
    assert len({size[f"table 8: {name}"] for name in TABLE_8}) == 1
    assert size["table 6: H3, S6"] - size["table 6: Mamba, S6"] == 48 * 1024 * 2048
    assert size["table 1: Mamba, S6"] - size["table 1: S6, no gate"] == 48 * 1024 * 2048


@pytest.mark.parametrize("fields", CHOICES, ids=str)
def test_counters_count_what_is_there(fields: dict[str, Any]) -> None:
    config = SMALL.replace(**fields)
    model = CausalLM(config)
    assert model.parameter_count() == parameter_count(config)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        # In float64 S4's system is in float64 where the layer is.
        held = CausalLM(config, dtype=dtype).init_state(3, dtype=dtype)
        assert state_bytes(config, 3, dtype) == sum(
            part.numel() * part.element_size()
            for one in held
            for part in one  # type: ignore[union-attr]
        )


@pytest.mark.parametrize("fields", [f for f in CHOICES if f.get("inner", "s6") in ("s6", "none")], ids=str)
def test_flops_of_the_matrix_products_are_what_torch_counts(fields: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = SMALL.replace(**fields)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        CausalLM(config)(IDS)
    i, n, d = config.d_inner, config.d_state, config.d_model
    scan = 4 * i + i * (21 * n // 2 if config.A_init == "s4d-lin" else 7 * n)
    layer = 2 * i * config.d_conv + 4 * d
    layer += scan if config.inner == "s6" else 0
    layer += 0 if config.block == "ungated" else 2 * i
    products = flops_per_token(config).forward - config.n_layer * layer - 4 * d
    assert counter.get_total_flops() == IDS.numel() * products


@pytest.mark.parametrize("fields", CHOICES, ids=str)
def test_saved_and_read_to_the_bit(tmp_path: Path, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = SMALL.replace(**fields)
    for dtype in (torch.float32, torch.float64):
        model = CausalLM(config, dtype=dtype)
        folder = model.save_pretrained(tmp_path / str(dtype))
        back = CausalLM.from_pretrained(folder, dtype=dtype)
        assert back.config == config
        assert torch.equal(model(IDS).logits, back(IDS).logits)
        # Weight decay and the highest rates are those of the model that was never saved.
        groups = [parameter_groups(one, 0.1) for one in (model, back)]
        names = [{p: n for n, p in one.named_parameters()} for one in (model, back)]
        ours, theirs = (
            [({known[p] for p in group["params"]}, group["weight_decay"], group.get("max_lr")) for group in found]
            for found, known in zip(groups, names, strict=True)
        )
        assert ours == theirs
        undecayed = set().union(*(group[0] for group in ours if group[1] == 0))
        assert undecayed == model.undecayed_parameters()


@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize("fields", CHOICES, ids=str)
def test_recomputed_gradients_are_the_same_to_the_bit(fields: dict[str, Any], recompute: str) -> None:
    def gradients(policy: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = CausalLM(SMALL.replace(**fields, recompute=policy))
        model(IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(recompute), gradients("none"), strict=True))


@pytest.mark.parametrize("layout", ["state-spaces", "transformers"])
@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"block": "h3"}, "block 'mamba'"),
        ({"inner": "s4d"}, "inner 's6'"),
        ({"selective": "B,C"}, "selective 'B,C,dt'"),
        ({"A_init": "s4d-lin"}, "A_init real"),
        ({"dt_rank": "none"}, "dt_rank a number or 'auto'"),
    ],
    ids=str,
)
def test_published_layouts_refuse_by_name(tmp_path: Path, layout: str, fields: dict[str, Any], word: str) -> None:
    model = CausalLM(SMALL.replace(**fields))
    with pytest.raises(CheckpointError, match=f"the {layout} layout has {word} alone, got .*; save as 'statescan'"):
        model.save_pretrained(tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(CheckpointError, match=f"layout has {word} alone"):
        convert(tmp_path / "own", tmp_path / "out", layout)


@pytest.mark.parametrize("layout", ["state-spaces", "transformers"])
def test_initial_values_of_a_real_A_are_no_part_of_a_layout(tmp_path: Path, layout: str) -> None:
    model = CausalLM(SMALL.replace(A_init="random", selective="dt,C,B"))
    model.save_pretrained(tmp_path, layout=layout)
    assert torch.equal(CausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_one_predicate_says_what_is_published() -> None:
    for fields in ({}, {"A_init": "random"}, {"selective": "dt,B,C"}, {"dt_rank": 3, "d_state": 5}):
        assert SMALL.replace(**fields).is_plain_mamba
    for fields in ({"block": "h3"}, {"inner": "s4"}, {"selective": "B"}, {"dt_rank": "none"}, {"A_init": "s4d-lin"}):
        assert not SMALL.replace(**fields).is_plain_mamba
    assert SMALL.replace(dt_rank="none").dt_rank_size == SMALL.replace(selective="B").dt_rank_size == 0


@pytest.mark.parametrize("fields", [{"block": "h3"}, {"inner": "s4"}, {"A_init": "s4d-lin"}], ids=str)
def test_mamba_ssm_has_no_word_for_them(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="config must have the published Mamba layer, got one with another block"):
        mamba_ssm.MambaLMHeadModel(SMALL.replace(**fields))
    assert mamba_ssm.MambaLMHeadModel(SMALL.replace(A_init="random")).config.statescan().A_init == "random"


@pytest.mark.parametrize("fields", [f for f in CHOICES if f["block"] == "mamba" or f.get("inner") == "s4"], ids=str)
def test_compiles_without_a_break(fields: dict[str, Any]) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = CausalLM(SMALL.replace(**fields, n_layer=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, wanted = compiled(IDS, labels=IDS).loss, model(IDS, labels=IDS).loss
    loss.backward()
    assert abs(float(loss.detach()) - float(wanted.detach())) <= 1e-6


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"inner": "mamba2"}, "inner must be one of s6, s4, s4d, s4d-real, none, got 'mamba2'"),
        ({"block": "hyena"}, "block must be one of mamba, h3, ungated, got 'hyena'"),
        ({"selective": "A"}, "selective must be"),
        ({"A_init": "legs"}, "A_init must be one of"),
        ({"inner": "s4", "selective": "none"}, "selective must be 'B,C,dt' with inner 's4'"),
        ({"inner": "s4", "d_state": 3}, "d_state must be even with inner 's4', got 3"),
    ],
    ids=str,
)
def test_a_bad_choice_is_named(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^MambaConfig: {text}"):
        SMALL.replace(**fields)


def test_a_folder_written_before_there_were_choices_is_read(tmp_path: Path) -> None:
    fields = SMALL.to_dict()
    for name in ("block", "inner", "selective", "A_init"):
        del fields[name]
    assert MambaConfig.from_dict(fields) == SMALL
