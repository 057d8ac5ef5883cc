"""A run that goes on from given weights: all of them, or adapters alone, merged when the model is written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from statescan.errors import CheckpointError, ConfigError
from statescan.evaluate import evaluate_tokens
from statescan.models import CausalLM, MambaConfig, TransformerConfig
from statescan.train import DataConfig, RunConfig, TrainConfig, train
from statescan.train.adapters import add_adapters, merged_weights

pytest.importorskip("lightning_fabric")

CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=256, d_state=4)


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    torch.manual_seed(3)
    CausalLM(CONFIG).save_pretrained(tmp_path / "start")
    (tmp_path / "text.txt").write_bytes(b"It was the best of times, it was the worst of times. " * 40)
    return RunConfig(
        CONFIG,
        DataConfig((str(tmp_path / "text.txt"),), valid_fraction=0.2, cache=str(tmp_path / "cache")),
        TrainConfig(
            steps=4, batch_size=2, length=32, lr=1e-2, warmup=1, evaluate_every=0, checkpoint_every=2,
            weights=str(tmp_path / "start"), accelerator="cpu",
        ),
    )  # fmt: skip


def state(folder: Path) -> dict[str, torch.Tensor]:
    return CausalLM.from_pretrained(folder).state_dict()


def test_a_run_starts_with_the_weights_it_was_given(run: RunConfig, tmp_path: Path) -> None:
    # At a rate of next to nothing the weights stay where they were.
    still = replace(run.train, lr=1e-12, min_lr=0.0)
    train(replace(run, train=still), tmp_path / "still", progress=False)
    before, after = state(tmp_path / "start"), state(tmp_path / "still")
    assert all(torch.allclose(after[name], before[name], atol=1e-9) for name in before)


def test_the_best_that_was_trained_is_kept_where_the_start_was_better(run: RunConfig, tmp_path: Path) -> None:
    # Another text than the held-out one, at a rate that only harms.
    (tmp_path / "other.txt").write_bytes(bytes(range(256)) * 4)
    data = replace(run.data, valid_paths=(str(tmp_path / "other.txt"),))
    settings = replace(run.train, steps=8, lr=0.1, evaluate_every=2)
    result = train(replace(run, data=data, train=settings), tmp_path / "harmed", progress=False)
    (_, began), *after = result.evaluations
    best = min(bits for _, bits in after)
    assert began < best
    tokens = np.arange(1024, dtype=np.int64) % 256
    model = CausalLM.from_pretrained(tmp_path / "harmed" / "best").eval()
    assert evaluate_tokens(model, tokens, total_bytes=1024, context=32).bits_per_token == pytest.approx(best, rel=1e-4)


def test_weights_of_another_shape_are_refused(run: RunConfig, tmp_path: Path) -> None:
    other = replace(run, model=CONFIG.replace(n_layer=3))
    with pytest.raises(ConfigError, match=r"wanted a model with n_layer = 3, .* with 2; leave model"):
        train(other, tmp_path / "other", progress=False)


@pytest.mark.parametrize("config", [CONFIG, TransformerConfig(16, 2, 256, n_head=2)], ids=["mamba", "transformer"])
def test_merged_weights_compute_what_the_adapted_model_does(config: MambaConfig | TransformerConfig) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    plain, ids = CausalLM(config).double(), torch.randint(0, 256, (2, 20))
    adapted = CausalLM(config).double()
    adapted.load_state_dict(plain.state_dict())
    add_adapters(adapted, 3)
    adapted.double()
    assert torch.equal(plain(ids).logits, adapted(ids).logits)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if "lora_" in name:
                parameter.normal_(std=0.3)
    moved = adapted(ids).logits
    assert (moved - plain(ids).logits).abs().max() > 1e-2
    plain.load_state_dict(merged_weights(adapted))
    torch.testing.assert_close(plain(ids).logits, moved, rtol=1e-10, atol=1e-12)


def test_adapters_are_merged_into_the_run_s_model_and_lie_beside_it(run: RunConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = replace(run, train=replace(run.train, lora=2))
    train(lora, tmp_path / "lora", progress=False)
    before, after = state(tmp_path / "start"), state(tmp_path / "lora")
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"in_proj", "x_proj", "out_proj"}

    ids = torch.randint(0, 256, (1, 30))
    merged = CausalLM.from_pretrained(tmp_path / "lora")
    opened = peft.PeftModel.from_pretrained(CausalLM.from_pretrained(tmp_path / "start"), tmp_path / "lora" / "adapter")
    torch.testing.assert_close(opened(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_run_of_adapters_goes_on_to_the_same_bits(run: RunConfig, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = replace(run, train=replace(run.train, lora=2))
    train(lora, tmp_path / "whole", progress=False)
    # All that it needs is in its own folder by now.
    shutil.rmtree(tmp_path / "start")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000004")
    (tmp_path / "parts" / "model.safetensors").unlink()
    train(lora, tmp_path / "parts", resume=True, progress=False)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    with pytest.raises(CheckpointError, match=r"wanted train\.lora = 2"):
        train(replace(lora, train=replace(lora.train, lora=3)), tmp_path / "parts", resume=True, progress=False)


def test_adapters_want_a_rank_and_no_shards(run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"train.lora must be a rank >= 1"):
        add_adapters(CausalLM(CONFIG), 0)
    # x_proj is 9 x 32, in_proj 64 x 16, out_proj 16 x 32.
    with pytest.raises(ConfigError, match=r"train.lora must be a rank of at most 16, .* got 100000"):
        add_adapters(CausalLM(CONFIG), 100_000)
    with pytest.raises(ConfigError, match=r"train.lora: wanted 0 with train.strategy=fsdp, got 2"):
        replace(run.train, lora=2, strategy="fsdp")
