"""The drop-ins on a GPU: transformers' models with `enable()`, mamba_ssm's documented calls, beside the host."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from statescan.compat.mamba_ssm import (
    InferenceParams,
    Mamba,
    MambaConfig,
    MambaLMHeadModel,
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_inner_fn,
    rms_norm_fn,
    selective_scan_fn,
    selective_state_update,
)
from statescan.integrations import transformers as drop_in
from statescan.ops import _cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DEVICE = "cuda"
VOCAB = 97


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    reason = _cuda.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    drop_in.disable()
    yield
    drop_in.disable()


def _relative(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().cpu().double(), wanted.detach().cpu().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _theirs(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "pad_token_id": 0}
    if kind == "jamba":
        more = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2}
        places = {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 3, "attn_layer_offset": 1}
        config = transformers.JambaConfig(
            **sizes, **more, **places, num_experts_per_tok=1, use_mamba_kernels=False, eos_token_id=None
        )
        model = transformers.JambaForCausalLM(config)
    elif kind == "falcon":
        model = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**sizes, eos_token_id=None))
    else:
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, eos_token_id=None))
    model.generation_config.eos_token_id = None
    return model.eval()


def _padded(side: str) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(2, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(tokens)
    for row, length in enumerate((40, 17, 3)):
        mask[row, slice(40 - length, 40) if side == "left" else slice(0, length)] = 1
    return tokens * mask, mask


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["mamba", "falcon", "jamba"])
def test_logits_and_gradients_are_those_of_the_package_on_the_host(kind: str, checkpointing: bool) -> None:
    stock = _theirs(kind).train()
    model = copy.deepcopy(stock).to(DEVICE)
    tokens = torch.randint(2, VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))
    wanted = stock(tokens, labels=tokens)
    wanted.loss.backward()
    drop_in.enable()
    if checkpointing:
        model.gradient_checkpointing_enable()
    got = model(tokens.to(DEVICE), labels=tokens.to(DEVICE))
    got.loss.backward()
    assert _relative(got.logits, wanted.logits) <= 1e-5
    for (name, mine), (_, its) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if its.grad is not None:
            assert _relative(mine.grad, its.grad) <= 5e-5, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["mamba", "falcon"])
def test_padded_rows_give_what_each_gives_alone(kind: str, side: str) -> None:
    stock = _theirs(kind)
    tokens, mask = _padded(side)
    alone = [stock(row[keep.bool()][None]).logits[0] for row, keep in zip(tokens, mask, strict=True)]
    drop_in.enable()
    got = stock.to(DEVICE)(tokens.to(DEVICE), attention_mask=mask.to(DEVICE)).logits.cpu()
    for row, (keep, wanted) in enumerate(zip(mask, alone, strict=True)):
        assert _relative(got[row][keep.bool()], wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["mamba", "falcon", "jamba"])
def test_generate_writes_the_package_s_tokens(kind: str) -> None:
    model = _theirs(kind)
    prompt = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():  # far enough apart that rounding decides nothing
        model.get_output_embeddings().weight *= 20
    arguments = {"max_new_tokens": 16, "do_sample": False}
    wanted = model.generate(prompt, **arguments)
    drop_in.enable()
    assert torch.equal(model.to(DEVICE).generate(prompt.to(DEVICE), **arguments).cpu(), wanted)


def test_bfloat16_under_autocast_trains() -> None:
    stock = _theirs("mamba").train()
    model = copy.deepcopy(stock).to(DEVICE)
    tokens = torch.randint(2, VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))
    stock(tokens, labels=tokens).loss.backward()
    drop_in.enable()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(tokens.to(DEVICE), labels=tokens.to(DEVICE)).loss
    loss.backward()
    for (name, mine), (_, its) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert _relative(mine.grad, its.grad) <= 0.1, name


def _both(call: Any, *tensors: Tensor | None) -> None:
    """Results and gradients of one call on the GPU in float32 and on the host in float64."""
    results = []
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        inputs = [None if t is None else t.to(device, dtype, copy=True).requires_grad_() for t in tensors]
        out = call(*inputs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        sum(one.square().sum() for one in outs).backward()  # type: ignore[union-attr]
        results.append([*outs, *(t.grad for t in inputs if t is not None)])
    for got, wanted in zip(results[1], results[0], strict=True):
        assert _relative(got, wanted) <= 1e-5


def test_the_functions_of_mamba_ssm_and_causal_conv1d() -> None:
    torch.manual_seed(0)
    u, delta, z = (torch.randn(2, 64, 90) for _ in range(3))
    A, D, bias = -torch.rand(64, 16), torch.ones(64), torch.rand(64)
    B, C = torch.randn(2, 16, 90), torch.randn(2, 16, 90)
    _both(
        lambda u, delta, A, B, C, D, z, bias: selective_scan_fn(
            u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True
        ),
        *(u, delta, A, B, C, D, z, bias),
    )
    weight, conv_bias = torch.randn(64, 4), torch.randn(64)
    _both(lambda x, w, b: causal_conv1d_fn(x, w, b, activation="silu"), u, weight, conv_bias)
    _both(lambda x, w: rms_norm_fn(x, w, None), torch.randn(2, 90, 64), torch.rand(64))
    _both(
        lambda xz, cw, cb, x_proj, dt_proj, out_proj, A, D, bias: mamba_inner_fn(
            xz, cw.unsqueeze(1), cb, x_proj, dt_proj, out_proj, None, A, D=D, delta_bias=bias
        ),
        torch.randn(2, 128, 90),
        weight,
        conv_bias,
        torch.randn(36, 64) / 8,
        torch.randn(64, 4) / 2,
        torch.randn(32, 64) / 8,
        A,
        D,
        bias,
    )
    # One step after another is the whole.
    state, window = torch.zeros(2, 64, 16, device=DEVICE), torch.zeros(2, 64, 4, device=DEVICE)
    on = [t.to(DEVICE) for t in (u, delta, A, B, C, D, z, bias, weight, conv_bias)]
    u, delta, A, B, C, D, z, bias, weight, conv_bias = on
    whole = causal_conv1d_fn(u, weight, conv_bias, activation="silu")
    scanned = selective_scan_fn(whole, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)
    steps = []
    for t in range(90):
        x = causal_conv1d_update(u[..., t], window, weight, conv_bias, activation="silu")
        more = {"D": D, "z": z[..., t], "dt_bias": bias, "dt_softplus": True}
        steps.append(selective_state_update(state, x, delta[..., t], A, B[..., t], C[..., t], **more))
    assert _relative(torch.stack(steps, -1), scanned) <= 1e-5


def test_the_layer_and_the_model_of_mamba_ssm() -> None:
    torch.manual_seed(0)
    layer = Mamba(d_model=64, d_state=16, d_conv=4, expand=2).to(DEVICE)
    x = torch.randn(2, 64, 64, device=DEVICE)
    y = layer(x)
    y.square().sum().backward()
    host = copy.deepcopy(layer).cpu().double()
    host.zero_grad()
    wanted = host(x.cpu().double())
    wanted.square().sum().backward()
    assert _relative(y, wanted) <= 1e-5
    for (name, mine), (_, its) in zip(layer.named_parameters(), host.named_parameters(), strict=True):
        assert _relative(mine.grad, its.grad) <= 5e-5, name

    model = MambaLMHeadModel(MambaConfig(d_model=64, n_layer=2, vocab_size=VOCAB), device=DEVICE).eval()
    with torch.no_grad():
        model.lm_head.weight *= 20
    ids = torch.randint(VOCAB, (2, 8), device=DEVICE)
    want = ids
    for _ in range(12):
        want = torch.cat([want, model(want).logits[:, -1:, :VOCAB].argmax(-1)], 1)
    for cg in (True, False):
        out = model.generate(
            input_ids=ids, max_length=20, cg=cg, return_dict_in_generate=True, output_scores=not cg,
            enable_timing=False, temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        )  # fmt: skip
        assert torch.equal(out.sequences, want)  # type: ignore[union-attr]
    params = InferenceParams(max_seqlen=20, max_batch_size=2)
    pieces = []
    for piece in (5, 1, 7, 1):
        at = params.seqlen_offset
        pieces.append(model(want[:, at : at + piece], inference_params=params).logits)
        params.seqlen_offset += piece
    assert _relative(torch.cat(pieces, 1), model(want[:, :14]).logits) <= 1e-5
