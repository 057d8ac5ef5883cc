"""The language model against its float64 oracle, and against itself in every way of running it."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.models import CausalLM, MambaConfig
from statescan.nn import MambaState
from statescan.testing import model_oracle

CONFIG = MambaConfig(d_model=6, n_layer=2, vocab_size=9, d_state=3, d_conv=3, pad_vocab_size_multiple=4)


def make(dtype: torch.dtype = torch.float64, backend: str = "auto", **fields) -> CausalLM:
    """A model whose every parameter is random, so that none can be left out unseen."""
    torch.manual_seed(0)
    model = CausalLM(CONFIG.replace(**fields), backend=backend, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False, "bias": True}, {"conv_bias": False}], ids=str)
def test_logits_and_every_gradient_are_the_oracles(backend: str, fields: dict) -> None:
    model = make(backend=backend, **fields)
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}
    ids = tokens(1, 6)
    sequence = ids[0].tolist()
    assert relative(model(ids).logits[0], torch.from_numpy(model_oracle.logits(parameters, sequence))) <= 1e-10
    loss = model(ids, labels=ids).loss
    assert abs(float(loss.detach()) - model_oracle.loss(parameters, sequence)) <= 1e-10
    loss.backward()
    for name, parameter in model.named_parameters():
        truth = torch.from_numpy(model_oracle.complex_step_gradient(parameters, name, sequence))
        assert relative(parameter.grad, truth) <= 1e-10, name


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = make()
    window = tokens(3, 8)
    ids = window[:, :7]
    scores = model(ids).logits
    both = model(ids, labels=ids, logits_to_keep=2)
    assert torch.equal(both.logits, scores[:, -2:]) or relative(both.logits, scores[:, -2:]) <= 1e-14
    assert relative(both.loss, F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())) <= 1e-14
    assert (
        relative(model(ids, labels=window).loss, F.cross_entropy(scores.flatten(0, 1), window[:, 1:].flatten()))
        <= 1e-14
    )
    ignored = ids.clone()
    ignored[:, 2:4] = -100
    wanted = F.cross_entropy(scores[:, :-1].flatten(0, 1), ignored[:, 1:].flatten())
    assert relative(model(ids, labels=ignored).loss, wanted) <= 1e-14
    assert model(ids, labels=ids).logits is None
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    assert float(nothing.detach()) == 0
    assert relative(model(ids, labels=ids.int()).loss, model(ids, labels=ids).loss) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cuts", [[4], [1, 2, 7]], ids=str)
def test_prefill_in_chunks_and_steps_is_one_pass(dtype: torch.dtype, cuts: list[int]) -> None:
    model = make(dtype)
    ids = tokens(2, 11)
    whole = model(ids).logits
    state = model.init_state(2)
    parts = []
    for part in ids[:, :9].tensor_split(cuts, 1):
        output = model(part, state=state)
        parts.append(output.logits)
        state = output.state
    for t in (9, 10):
        output = model.step(ids[:, t], state)
        parts.append(output.logits[:, None])
        state = output.state
    # two layers of sums taken in another order, and a division by a norm between them
    assert relative(torch.cat(parts, 1), whole) <= 64 * torch.finfo(dtype).eps


def test_padding_on_either_side_and_in_between() -> None:
    model = make()
    ids = tokens(3, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1]])
    for state in (None, tuple(MambaState(*(torch.randn_like(p) for p in one)) for one in model.init_state(3))):
        padded = model(ids, mask=mask, state=state)
        for row in range(3):
            real = mask[row].bool()
            before = None if state is None else tuple(MambaState(o.conv[[row]], o.ssm[[row]]) for o in state)
            alone = model(ids[[row]][:, real], state=before)
            assert relative(padded.logits[row, real], alone.logits[0]) <= 1e-14
            if state is not None:
                for one, other in zip(padded.state, alone.state, strict=True):
                    assert relative(one.ssm[row], other.ssm[0]) <= 1e-13
                    assert relative(one.conv[row], other.conv[0]) <= 1e-13
    last = model(ids, mask=mask, logits_to_keep=1).logits
    assert relative(last, model(ids, mask=mask).logits[:, -1:]) <= 1e-14
    empty = model(ids, mask=torch.zeros_like(mask), labels=ids, state=model.init_state(3))
    assert float(empty.loss) == 0
    assert torch.equal(empty.state[0].ssm, model.init_state(3)[0].ssm)


def test_loss_of_padded_rows_is_that_of_the_rows_alone() -> None:
    model = make()
    ids = tokens(2, 6)
    for mask in ([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]):
        real = torch.tensor(mask).bool()
        totals = []
        for row in range(2):
            alone = ids[[row]][:, real[row]]
            totals.append(model(alone, labels=alone).loss * (alone.shape[1] - 1))
        assert relative(model(ids, labels=ids, mask=real).loss, sum(totals) / (real.sum() - 2)) <= 1e-14


@pytest.mark.parametrize("offsets", [[0, 4, 10], [0, 1, 1, 6, 10], [0, 0, 10]], ids=str)
def test_packed_is_separate(offsets: list[int]) -> None:
    model = make()
    ids = tokens(1, 10)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    packed = model(ids, cu_seqlens=cu_seqlens)
    loss = model(ids, labels=ids, cu_seqlens=cu_seqlens).loss
    window = torch.cat([ids, ids[:, :1]], 1)
    assert relative(model(ids, labels=window, cu_seqlens=cu_seqlens).loss, loss) <= 1e-14
    total, judged = 0.0, 0
    for start, end in itertools.pairwise(offsets):
        if start == end:
            continue
        alone = model(ids[:, start:end])
        assert relative(packed.logits[:, start:end], alone.logits) <= 1e-14
        total = total + F.cross_entropy(alone.logits[0, :-1], ids[0, start + 1 : end], reduction="sum")
        judged += end - start - 1
    assert relative(loss, total / judged) <= 1e-14


def test_embeddings_instead_of_ids() -> None:
    model = make()
    ids = tokens(2, 5)
    embeds = model.backbone.embedding(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert torch.equal(model(ids.int()).logits, model(ids).logits)
    assert torch.equal(model.lm_head(model.backbone(ids).hidden), model(ids).logits)
    hidden = model.backbone(ids, mask=torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])).hidden
    assert (hidden[1, :2] == 0).all()


def test_residual_stream_stays_float32_beside_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    from statescan.nn import norm as module

    seen: list[torch.dtype] = []
    add = module.add_rms_norm

    def spy(*args, **named):
        output = add(*args, **named)
        seen.append(output.residual.dtype)
        return output

    monkeypatch.setattr(module, "add_rms_norm", spy)
    ids = tokens(1, 5)
    make(torch.bfloat16)(ids)
    assert set(seen) == {torch.float32}
    seen.clear()
    make(torch.bfloat16, residual_in_fp32=False)(ids)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert make(torch.float32)(ids).logits.dtype == torch.bfloat16
        assert make(torch.float32)(ids, labels=ids).loss.dtype == torch.float32
    assert set(seen) == {torch.float32}
    seen.clear()
    make(torch.float64)(ids)
    assert set(seen) == {torch.float64}


def test_published_state_dict_and_initial_values() -> None:
    torch.manual_seed(0)
    config = MambaConfig(d_model=64, n_layer=4, vocab_size=500, bias=True)
    model = CausalLM(config)
    names = {
        "backbone.embedding.weight",
        "backbone.norm_f.weight",
        "lm_head.weight",
        *(
            f"backbone.layers.{i}.{name}"
            for i in range(4)
            for name in (
                "norm.weight",
                "mixer.A_log",
                "mixer.D",
                "mixer.in_proj.weight",
                "mixer.in_proj.bias",
                "mixer.conv1d.weight",
                "mixer.conv1d.bias",
                "mixer.x_proj.weight",
                "mixer.dt_proj.weight",
                "mixer.dt_proj.bias",
                "mixer.out_proj.weight",
                "mixer.out_proj.bias",
            )
        ),
    }
    assert set(model.state_dict()) == names
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert float(model.backbone.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    plain = CausalLM(config.replace(rescale_prenorm_residual=False))
    for scaled, size in ((model, 0.5), (plain, 1.0)):
        for layer in scaled.backbone.layers:
            weight = layer.mixer.out_proj.weight.detach()
            assert float(weight.std()) == pytest.approx(size * 128**-0.5 / math.sqrt(3), rel=0.05)
            assert (layer.mixer.in_proj.bias == 0).all()
            assert (layer.mixer.out_proj.bias == 0).all()
            assert (layer.mixer.dt_proj.bias != 0).all()
    undecayed = model.undecayed_parameters()
    kept = {name for name, _ in model.named_parameters()} - undecayed
    assert all(name.endswith("weight") and "norm" not in name for name in kept)
    assert {"backbone.norm_f.weight", "backbone.layers.0.mixer.A_log", "backbone.layers.3.mixer.D"} <= undecayed


def test_ties() -> None:
    tied, untied = make(), make(tie_embeddings=False)
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1
    copied = copy.deepcopy(tied)
    assert copied.lm_head.weight is copied.backbone.embedding.weight
    moved = tied.to(torch.float32)
    assert moved.lm_head.weight is moved.backbone.embedding.weight
    pickled = pickle.loads(pickle.dumps(tied))
    assert pickled.lm_head.weight is pickled.backbone.embedding.weight


def test_meta_construction_then_reset_is_construction() -> None:
    model = CausalLM(CONFIG, device="meta").to_empty(device="cpu")
    model.reset_parameters()
    assert model.lm_head.weight is model.backbone.embedding.weight
    ids = tokens(1, 5)
    assert torch.isfinite(model(ids, labels=ids).loss)
    whole = CausalLM(CONFIG)
    for name, parameter in model.named_parameters():
        other = whole.get_parameter(name).detach()
        assert float(parameter.detach().std()) == pytest.approx(float(other.std()), rel=0.9, abs=1e-3), name


def test_bad_inputs() -> None:
    model = make()
    ids = tokens(2, 5)
    with pytest.raises(ShapeError, match=r"input_ids must be in \[0, 12\), got 12 to 12"):
        model(torch.full((1, 2), 12))
    with pytest.raises(ShapeError, match=r"got -1 to .*tokenizer of another vocabulary"):
        model(torch.tensor([[-1, 2]]))
    with pytest.raises(DTypeError, match=r"input_ids must be int64 or int32, got torch.float32; pass input_ids.long"):
        model(ids.float())
    with pytest.raises(ShapeError, match=r"input_ids must be \(batch, length >= 1\), got \(5,\)"):
        model(ids[0])
    with pytest.raises(ShapeError, match=r"got \(2, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ShapeError, match="where the model is, got meta"):
        model(ids.to("meta"))
    with pytest.raises(ConfigError, match="got neither"):
        model()
    with pytest.raises(ConfigError, match="got both"):
        model(ids, inputs_embeds=torch.zeros(2, 5, 6))
    with pytest.raises(ShapeError, match="d_model 6"):
        model(inputs_embeds=torch.zeros(2, 5, 7))
    with pytest.raises(DTypeError, match="ids go to input_ids"):
        model(inputs_embeds=torch.zeros(2, 5, 6).long())
    with pytest.raises(ShapeError, match=r"labels must be \(batch, length\) = \(2, 5\)"):
        model(ids, labels=ids[:, :4])
    with pytest.raises(DTypeError, match="labels must be int64 or int32"):
        model(ids, labels=ids.float())
    with pytest.raises(ShapeError, match=r"targets must be -100 \(ignored\) or in \[0, 12\)"):
        model(ids, labels=ids + 12)
    with pytest.raises(ConfigError, match="exclude each other"):
        model(ids, mask=torch.ones(2, 5).bool(), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ShapeError, match="mask must be"):
        model(ids, mask=torch.ones(2, 4).bool())
    with pytest.raises(ShapeError, match="state must have one entry a layer, 2, got 1"):
        model(ids, state=model.init_state(2)[:1])
    with pytest.raises(ShapeError, match=r"state\.conv must be"):
        model(ids, state=model.init_state(3))
    for wrong in (-1, 1.5):
        with pytest.raises(ConfigError, match="logits_to_keep must be an integer >= 0"):
            model(ids, logits_to_keep=wrong)
    with pytest.raises(DTypeError, match="cu_seqlens must be an int32 tensor, got list"):
        model(ids[:1], cu_seqlens=[0, ids.shape[1]])
    with pytest.raises(ShapeError, match="cu_seqlens must be"):
        model(ids[:1], cu_seqlens=torch.tensor(3))
    with pytest.raises(ShapeError, match=r"CausalLM.step: input_ids must be \(batch,\)"):
        model.step(ids, model.init_state(2))
    for wrong in ([0, 4], [1, 5], [0, 4, 2, 5]):
        with pytest.raises(ShapeError, match="cu_seqlens"):
            model(ids[:1], cu_seqlens=torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(DTypeError, match="cu_seqlens"):
        model(ids[:1], cu_seqlens=torch.tensor([0.0, 5.0]))
