"""A training step as one CUDA graph: after as many steps the same bits as kernel by kernel, in weights, moments, random
states, losses and logs; the guard, the schedule and several steps inside of a replay; what can't be captured."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statescan.errors import ConfigError, ShapeError
from statescan.models import CausalLM, MambaConfig
from statescan.train import CapturedStep, DataConfig, RunConfig, TrainConfig, latest_checkpoint, loop, train
from statescan.train.optim import parameter_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CONFIG = MambaConfig(d_model=64, n_layer=2, vocab_size=256)


def made(
    *, capture: bool | None = None, seed: int = 0, noise: bool = False, recompute: str = "none", **options: Any
) -> tuple[CausalLM, torch.optim.AdamW, CapturedStep]:
    torch.manual_seed(seed)
    model = CausalLM(CONFIG.replace(recompute=recompute), device="cuda").train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, fused=True)

    def loss(ids: Tensor) -> Tensor:
        out = model(ids[:, :-1], labels=ids).loss
        # As dropout has it: other numbers in every step.
        return out * (0.5 + torch.rand((), device="cuda")) if noise else out

    return model, optimizer, CapturedStep(optimizer, loss, capture=capture, **options)


def windows(count: int, rows: int = 3, length: int = 70, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, rows, length + 1), generator=generator).cuda()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, step: CapturedStep) -> dict[str, Tensor]:
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{kind} of {name}": value for kind, value in optimizer.state[parameter].items()}
    tensors |= {"norm": step.norm, "skipped": step.skipped, "skipped in row": step.skipped_in_row}
    tensors["random state"] = torch.cuda.get_rng_state()
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def launches(run: Callable[[], Any]) -> dict[str, int]:
    """How often the host called the driver, by the call's name."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as p:
        run()
        torch.cuda.synchronize()
    return {event.key: event.count for event in p.key_averages() if "Launch" in event.key}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"autocast": torch.bfloat16, "clip": 0.1, "noise": True},
        {"autocast": torch.bfloat16, "recompute": "cheap"},
        {"autocast": torch.bfloat16, "recompute": "block"},
        {"clip": 1.0, "noise": True, "steps_per_replay": 2, "schedule": lambda n: 1e-3 / (n + 1)},
        {"warmup": 1},
        {"autocast": torch.bfloat16, "clip": 0.1, "noise": True, "accumulate": 3},
    ],
    ids=["plain", "autocast", "cheap", "block", "several", "early", "accumulated"],
)
def test_captured_steps_are_eager_steps(options: dict[str, Any]) -> None:
    data = windows(8)
    each = options.get("steps_per_replay", 1)
    results, losses = [], []
    for capture in (False, True):
        model, optimizer, step = made(capture=capture, **options)
        torch.manual_seed(7)
        parts = data if each == 1 else data.unflatten(0, (-1, each))
        losses.append(torch.cat([step.step(part).flatten() for part in parts]))
        results.append(everything(model, optimizer, step))
        assert step.steps == 8
    assert torch.equal(*losses)
    assert losses[0].unique().numel() == 8
    assert_same(*results)
    assert torch.isfinite(losses[0]).all()


def test_a_first_replay_draws_from_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a device that comes late to what a capture begins with: torch then sets the place in the generator's
    stream to zero, where the first step drew from, and a replay sets it to its own."""
    data = windows(6)
    losses = []
    begin = torch.cuda.CUDAGraph.capture_begin

    def late(self: torch.cuda.CUDAGraph, *arguments: Any, **options: Any) -> None:
        torch.cuda._sleep(10**9)
        begin(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", late)
    for capture in (False, True):
        _, _, step = made(capture=capture, noise=True)
        torch.manual_seed(7)
        losses.append(torch.stack([step.step(part) for part in data]))
    assert torch.equal(*losses)


def test_a_replay_is_one_launch() -> None:
    _, _, step = made()
    data = windows(2)
    for _ in range(4):
        step.step(data[0])
    calls = launches(lambda: step.step(data[1]))
    assert sum(count for name, count in calls.items() if "GraphLaunch" in name) == 1
    # The batch and the loss are copied beside it.
    assert sum(count for name, count in calls.items() if "GraphLaunch" not in name) <= 3, calls
    _, _, eager = made(capture=False)
    eager.step(data[0])
    assert sum(launches(lambda: eager.step(data[1])).values()) > 50


def test_the_guard_works_in_a_replay() -> None:
    model, optimizer, _ = made()
    step = CapturedStep(optimizer, lambda ids, factor: model(ids[:, :-1], labels=ids).loss * factor, clip=1.0)
    data = windows(9)
    factors = torch.ones(9, device="cuda")
    factors[6] = math.nan
    factors[7] = math.inf
    for x, factor in zip(data[:6], factors, strict=False):
        step.step(x, factor)
    before = everything(model, optimizer, step)
    for number in (6, 7):
        step.step(data[number], factors[number])
    after = everything(model, optimizer, step)
    assert (float(after.pop("skipped")), float(after.pop("skipped in row"))) == (2, 2)
    assert not torch.isfinite(after.pop("norm"))
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    assert math.isfinite(float(step.step(data[8], factors[8])))
    assert (float(step.skipped), float(step.skipped_in_row)) == (2, 0)
    assert not torch.equal(model.backbone.embedding.weight, before["backbone.embedding.weight"])


def test_rates_reach_the_replay() -> None:
    data = windows(8)
    results = []
    for capture in (False, True):
        model, optimizer, step = made(capture=capture)
        for number, x in enumerate(data):
            step.set_lr(1e-3 * 0.5**number)
            step.step(x)
        results.append(everything(model, optimizer, step))
    assert_same(*results)
    before = results[1]["backbone.embedding.weight"]
    step.set_lr(0.0)
    step.step(data[0])
    assert torch.equal(model.backbone.embedding.weight, before), "a rate of zero moves nothing"


def test_goes_on_from_its_state() -> None:
    data = windows(12)
    schedule = lambda number: 1e-3 / (number + 1)
    model, optimizer, step = made(schedule=schedule, noise=True)
    for x in data[:6]:
        step.step(x)
    saved = copy.deepcopy((model.state_dict(), step.state_dict(), torch.cuda.get_rng_state()))
    for x in data[6:]:
        step.step(x)
    expected = everything(model, optimizer, step)

    # Into one that was captured already, whose graph writes the moments before.
    other, other_optimizer, again = made(seed=9, schedule=schedule, noise=True)
    for x in data[:5]:
        again.step(x)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    torch.cuda.set_rng_state(saved[2])
    for x in data[6:]:
        again.step(x)
    assert_same(everything(other, other_optimizer, again), expected)


def test_weights_put_elsewhere_are_found() -> None:
    model, optimizer, step = made()
    twin, twin_optimizer, eager = made(capture=False)
    data = windows(7)
    for number, x in enumerate(data):
        if number == 5:
            model.lm_head.weight.data = model.lm_head.weight.data.clone()
        step.step(x)
        eager.step(x)
    assert_same(everything(model, optimizer, step), everything(twin, twin_optimizer, eager))


def test_a_generator_of_its_own() -> None:
    results = []
    for capture in (False, True):
        model, optimizer, _ = made()
        generator = torch.Generator("cuda").manual_seed(5)

        def loss(model: CausalLM = model, generator: torch.Generator = generator) -> Tensor:
            ids = torch.randint(0, 256, (2, 33), device="cuda", generator=generator)
            return model(ids[:, :-1], labels=ids).loss

        step = CapturedStep(optimizer, loss, generators=[generator], capture=capture, steps_per_replay=3)
        losses = torch.cat([step.step() for _ in range(4)])
        assert losses.unique().numel() == 12, "fresh data in every step of every replay"
        results.append({**everything(model, optimizer, step), "losses": losses, "own": generator.get_state()})
    assert_same(*results)


@pytest.mark.parametrize("shared", [False, True])
def test_two_captured_steps_share_an_optimiser(shared: bool) -> None:
    """As for two lengths of a curriculum."""
    short, long = windows(8, length=20), windows(8, length=90)
    results = []
    for capture in (False, True):
        model, optimizer, step = made(capture=capture)
        loss = lambda ids, model=model: model(ids[:, :-1], labels=ids).loss
        other = CapturedStep(optimizer, loss, capture=capture, beside=step if shared else None)
        for a, b in zip(short, long, strict=True):
            step.step(a)
            other.step(b)
        results.append(everything(model, optimizer, step))
    assert_same(*results)


def test_graphs_of_one_training_share_their_memory() -> None:
    ids = windows(1, rows=16, length=2000)[0]

    def reserved(shared: bool) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        model, optimizer, step = made()
        loss = lambda ids: model(ids[:, :-1], labels=ids).loss
        other = CapturedStep(optimizer, loss, beside=step if shared else None)
        for _ in range(5):
            step.step(ids)
            other.step(ids[:15])
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    apart, together = reserved(False), reserved(True)
    assert together < 0.7 * apart, (together, apart)


def test_batches_from_the_host() -> None:
    data = windows(8)
    results = []
    for move in (lambda x: x, lambda x: x.cpu(), lambda x: x.cpu().pin_memory()):
        model, optimizer, step = made()
        for x in data:
            step.step(move(x))
        results.append(everything(model, optimizer, step))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_another_shape_is_refused() -> None:
    _, _, step = made()
    for x in windows(5):
        step.step(x)
    with pytest.raises(ShapeError, match=r"as the first one, \(3, 71\) torch.int64, got \(2, 71\) torch.int64"):
        step.step(windows(1, rows=2)[0])
    step.step(windows(1)[0])


def test_a_loss_that_waits_is_refused_when_it_is_captured() -> None:
    model, optimizer, _ = made()
    seen: list[float] = []

    def loss(ids: Tensor) -> Tensor:
        out = model(ids[:, :-1], labels=ids).loss
        seen.append(out.item())
        return out

    step = CapturedStep(optimizer, loss)
    data = windows(4)
    for x in data[:3]:
        step.step(x)
    with pytest.raises(ConfigError, match=r"can't be captured in a CUDA graph .*must not wait for the device"):
        step.step(data[3])
    assert len(seen) == 3
    # Random numbers can be drawn again, and go on where they were.
    torch.manual_seed(5)
    first = torch.rand(3, device="cuda")
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(3, device="cuda"))


# ---- the training loop ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    corpus = tmp_path / "text.txt"
    corpus.write_text("".join(f"{number} green bottles, standing on the wall.\n" for number in range(200)))
    return RunConfig(
        CONFIG,
        DataConfig(paths=(str(corpus),), valid_fraction=0.1, cache=str(tmp_path / "tokens")),
        TrainConfig(
            steps=16, batch_size=4, length=64, lr=1e-2, warmup=3, evaluate_every=8, evaluate_tokens=500, log_every=2,
            checkpoint_every=8, precision="bf16", accelerator="cuda", clip=0.5,
        ),
    )  # fmt: skip


def left_by(out: Path) -> dict[str, Any]:
    files = ("log.csv", "evaluations.csv", "model.safetensors", "best/model.safetensors")
    checkpoint = latest_checkpoint(out)
    assert checkpoint is not None
    return {name: (out / name).read_bytes() for name in files} | {"trainer": json.dumps(checkpoint.trainer_state())}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_captured_run_is_the_eager_run(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, packed: bool
) -> None:
    run = run.apply_overrides([f"train.accumulate={accumulate}"])
    if packed:
        rows = tmp_path / "rows.jsonl"
        texts = [f"Line {number}: " + "whales, " * (number % 23) for number in range(300)]
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        run = run.apply_overrides(["data.packing=true", f"data.paths={rows}"])
    replays: list[int] = []
    real = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replays.append(1) or real(self))
    for name, capture in (("eager", "false"), ("captured", "auto")):
        train(run.apply_overrides([f"train.capture={capture}"]), tmp_path / name, progress=False)
        # Three updates of each graph come before it; packed windows take two graphs or three.
        assert len(replays) in (range(1) if capture == "false" else range(7, 14) if packed else [13])
    assert left_by(tmp_path / "eager") == left_by(tmp_path / "captured")


def test_a_captured_run_carries_its_states(run: RunConfig, tmp_path: Path) -> None:
    # Without zeros drawn in between, since a graph draws its numbers from another place of the generator's stream.
    run = run.apply_overrides(["train.initial_state=carry", "train.from_zero=0"])
    for name, capture in (("eager", "false"), ("captured", "true")):
        train(run.apply_overrides([f"train.capture={capture}"]), tmp_path / name, progress=False)
    assert left_by(tmp_path / "eager") == left_by(tmp_path / "captured")
    train(run.apply_overrides(["train.initial_state=zero"]), tmp_path / "zero", progress=False)
    assert left_by(tmp_path / "zero") != left_by(tmp_path / "captured")
    noisy = run.apply_overrides(["train.initial_state=noise", "train.capture=true"])
    assert math.isfinite(train(noisy, tmp_path / "noise", progress=False).train_loss)


def test_a_captured_run_resumes_to_the_same_bits(run: RunConfig, tmp_path: Path) -> None:
    train(run, tmp_path / "whole", progress=False)

    class Stop(loop.Callback):
        def on_checkpoint(self, step: int, path: Path) -> None:
            if step == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "parts", progress=False, callbacks=[Stop()])
    train(run, tmp_path / "parts", progress=False, resume=True)
    assert left_by(tmp_path / "parts") == left_by(tmp_path / "whole")
