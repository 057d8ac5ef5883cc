"""The model beside the `transformers` package's on the same random weights: logits and gradients in float32."""

from __future__ import annotations

import pytest
import torch

from statescan.models import CausalLM, MambaConfig

transformers = pytest.importorskip("transformers")


def pair(seed: int, **fields) -> tuple[CausalLM, torch.nn.Module]:
    """The same weights in both, drawn with deviation 0.02 (0.1, its own default, is chaotic)."""
    config = MambaConfig(d_model=64, n_layer=4, vocab_size=128, **fields)
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            state_size=config.d_state,
            conv_kernel=config.d_conv,
            expand=config.expand,
            time_step_rank=config.dt_rank_size,
            use_bias=config.bias,
            use_conv_bias=config.conv_bias,
            residual_in_fp32=True,
            layer_norm_epsilon=config.norm_epsilon,
            initializer_range=0.02,
            tie_word_embeddings=config.tie_embeddings,
            use_cache=False,
        )
    )
    ours = CausalLM(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.ndim >= 2 and not name.endswith(("A_log", "conv1d.weight", "dt_proj.weight")):
                parameter.normal_(std=0.02)
            elif name.endswith(("norm.weight", "norm_f.weight", "D")):
                parameter.uniform_(0.5, 1.5)
    weights = {name.replace("backbone.embedding.", "backbone.embeddings."): v for name, v in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    return ours, theirs.train()


@pytest.mark.parametrize(
    "fields", [{}, {"bias": True, "d_state": 8}, {"tie_embeddings": False, "d_conv": 3, "dt_rank": 7}], ids=str
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_logits_and_gradients(fields: dict, backend: str) -> None:
    ours, theirs = pair(0, **fields)
    for module in ours.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    ids = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(1))
    mine, their = ours(ids), theirs(ids, use_cache=False)
    assert float((mine.logits - their.logits).detach().abs().max() / their.logits.detach().abs().max()) <= 1e-5
    loss = ours(ids, labels=ids).loss
    their_loss = theirs(ids, labels=ids, use_cache=False).loss
    assert float(loss.detach()) == pytest.approx(float(their_loss.detach()), rel=1e-5)
    loss.backward()
    their_loss.backward()
    gradients = {name.replace("embeddings.", "embedding."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted = gradients[name]
        assert float((parameter.grad - wanted).abs().max() / wanted.abs().max()) <= 5e-5, name


def test_padding_on_the_left() -> None:
    ours, theirs = pair(2)
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        mine = ours(ids, mask=mask).logits
        alone = theirs(ids[:1, 5:], use_cache=False).logits
    assert float((mine[0, 5:] - alone[0]).abs().max() / alone.abs().max()) <= 1e-5
