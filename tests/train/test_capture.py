"""A step by CapturedStep on a CPU, where it runs eagerly: against the same step written out, its schedule, its guard,
its state, and every refusal. What a graph adds is tested on a GPU, by tests/gpu/test_capture_cuda.py."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from statescan.errors import ConfigError, ShapeError
from statescan.train.capture import CapturedStep


def made(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    return model, optimizer, CapturedStep(optimizer, lambda x: model(x).square().mean(), **options)


def batches(count, seed=1, rows=4):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, rows, 5, generator=generator))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e3])
def test_is_the_step_written_out(clip):
    model, _, step = made(clip=clip)
    twin = copy.deepcopy(model)
    # The rate is a float32 tensor there.
    plain = torch.optim.AdamW(twin.parameters(), lr=float(torch.tensor(1e-2)), fused=True)
    for number, x in enumerate(batches(6)):
        loss = twin(x).square().mean()
        loss.backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()])
        if clip:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
        plain.step()
        plain.zero_grad()
        got = step.step(x)
        assert (got.shape, step.steps) == ((), number + 1)
        if clip != 0.05:
            assert torch.equal(got, loss.detach())
            assert torch.equal(step.norm, expected)
            assert same(model, twin)
            continue
        assert expected > clip
        torch.testing.assert_close((got, step.norm), (loss.detach(), expected), rtol=1e-5, atol=0)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            # A division here, a product there, and Adam divides by the gradient's own size: a rounding a step.
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-2 * (number + 1) * 2**-20)


def test_several_steps_of_a_call_are_as_many_calls():
    one, _, single = made(clip=0.1, schedule=lambda n: 1e-2 / (n + 1))
    three, _, triple = made(clip=0.1, schedule=lambda n: 1e-2 / (n + 1), steps_per_replay=3)
    data = batches(6)
    losses = [single.step(x) for x in data]
    together = [triple.step(torch.stack(data[i : i + 3])) for i in (0, 3)]
    assert torch.equal(torch.stack(losses), torch.cat(together))
    assert together[0].shape == (3,)
    assert triple.steps == single.steps == 6
    assert same(one, three)


@pytest.mark.parametrize("each", [1, 2])
def test_passes_accumulate_to_the_gradient_of_their_mean(each):
    model, _, step = made(clip=0.1, accumulate=2, steps_per_replay=each)
    twin, optimizer, _ = made()
    data, losses = batches(4, rows=6), []
    for x in data:
        loss = (twin(x[:3]).square().mean() + twin(x[3:]).square().mean()) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    parts = data if each == 1 else [torch.stack(data[i : i + 2]) for i in (0, 2)]
    got = torch.cat([step.step(part).flatten() for part in parts])
    torch.testing.assert_close(got, torch.stack(losses), rtol=1e-5, atol=0)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-2 * 4 * 2**-20)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"steps_per_replay": 3}])
def test_a_single_number_goes_to_every_pass(options):
    model, optimizer, _ = made()
    seen = []

    def loss(x, factor):
        seen.append((tuple(x.shape), float(factor)))
        return model(x).square().mean() * factor

    step = CapturedStep(optimizer, loss, **options)
    each = options.get("steps_per_replay", 1)
    x, factor = torch.randn(4, 5), torch.tensor(0.5)
    step.step(*((x, factor) if each == 1 else (x.expand(3, 4, 5), factor.expand(3))))
    assert seen == [((4 // options.get("accumulate", 1), 5), 0.5)] * (options.get("accumulate", 1) * each)


def test_without_a_batch_the_loss_makes_its_own():
    model, optimizer, _ = made()
    generator = torch.Generator().manual_seed(3)
    step = CapturedStep(optimizer, lambda: model(torch.randn(4, 5, generator=generator)).square().mean())
    twin, _, other = made()
    data = torch.Generator().manual_seed(3)
    for _ in range(3):
        assert torch.equal(step.step(), other.step(torch.randn(4, 5, generator=data)))
    assert same(model, twin)


def test_rates_come_from_the_schedule_or_by_hand():
    asked = []

    def schedule(number):
        asked.append(number)
        return 0.1 * 0.5**number

    model, optimizer, step = made(schedule=schedule)
    twin, _, by_hand = made()
    for number, x in enumerate(batches(4)):
        by_hand.set_lr(0.1 * 0.5**number)
        by_hand.step(x)
        step.step(x)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 * 0.5**number, rel=1e-7)
    assert sorted(set(asked)) == [0, 1, 2, 3]
    assert same(model, twin)
    with pytest.raises(ConfigError, match="come from `schedule`"):
        step.set_lr(0.1)


def test_a_group_keeps_to_its_highest_rate():
    model, _, _ = made()
    first, second = model[0], model[2]
    optimizer = torch.optim.AdamW(
        [{"params": first.parameters()}, {"params": second.parameters(), "max_lr": 1e-3}], lr=1e-2, fused=True
    )
    step = CapturedStep(optimizer, lambda x: model(x).square().mean(), schedule=lambda n: 1e-2 if n == 0 else 1e-4)
    before = [p.detach().clone() for p in model.parameters()]
    data = batches(2)
    step.step(data[0])
    # Adam's first update is the rate, whatever the gradient's size (its decay of 0.01 aside).
    moved = [(p.detach() - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True)]
    assert moved[:2] == pytest.approx([1e-2] * 2, rel=2e-2)
    assert moved[2:] == pytest.approx([1e-3] * 2, rel=2e-2)
    step.step(data[1])
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_left_out_and_counted(bad):
    model, optimizer, step = made(clip=1.0)
    data = batches(3)
    step.step(data[0])
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    broken = data[1].clone()
    broken[0, 0] = bad
    for number in (1, 2):
        step.step(broken)
        assert (float(step.skipped), float(step.skipped_in_row)) == (number, number)
        assert not torch.isfinite(step.norm)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name])
    for key, state in optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, before[1][key][name]), name
    step.step(data[2])
    assert (float(step.skipped), float(step.skipped_in_row), step.steps) == (2, 0, 4)
    assert not torch.equal(model[0].weight, before[0]["0.weight"])


def test_goes_on_from_its_state(tmp_path):
    data = batches(6)
    schedule = lambda number: 1e-2 / (number + 1)
    whole, _, step = made(schedule=schedule, clip=0.1)
    for x in data[:3]:
        step.step(x)
    torch.save((whole.state_dict(), step.state_dict()), tmp_path / "state.pt")
    rest = [step.step(x) for x in data[3:]]

    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other, _, again = made(seed=9, schedule=schedule, clip=0.1)
    again.step(data[0] + 1)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    assert again.steps == 3
    assert all(torch.equal(again.step(x), loss) for x, loss in zip(data[3:], rest, strict=True))
    assert same(whole, other)


def test_loaded_rate_is_the_one_that_goes_on():
    _, optimizer, step = made()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(state)
    step.step(batches(1)[0])
    assert float(optimizer.param_groups[0]["lr"]) == 0.25


def test_the_optimiser_does_not_keep_it():
    _, optimizer, step = made()
    weak = weakref.ref(step)
    del step
    gc.collect()
    assert weak() is None
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_step_of_the_optimiser_alone_after_it_is_as_ever():
    model, optimizer, step = made(clip=1e-3)
    step.step(batches(1)[0])
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, fused=True)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, by in ((model, optimizer), (twin, plain)):
        one(batches(1, seed=5)[0]).square().mean().backward()
        by.step()
    assert same(model, twin)


def test_autocast_goes_around_the_loss_alone():
    seen = []
    model, optimizer, _ = made()

    def loss(x):
        out = model(x)
        seen.append(out.dtype)
        return out.float().square().mean()

    step = CapturedStep(optimizer, loss, autocast=torch.bfloat16)
    step.step(batches(1)[0])
    assert seen == [torch.bfloat16]
    assert not torch.is_autocast_enabled("cpu")
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_works_under_no_grad():
    model, _, step = made()
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        step.step(batches(1)[0])
    assert not torch.equal(model[0].weight, before)


def test_refuses_another_batch():
    _, _, step = made()
    step.step(batches(1)[0])
    with pytest.raises(ShapeError, match=r"as the first one, \(4, 5\) torch.float32, got \(3, 5\) torch.float32"):
        step.step(torch.randn(3, 5))
    with pytest.raises(ShapeError, match=r"got \(4, 5\) torch.float64"):
        step.step(torch.randn(4, 5, dtype=torch.float64))
    with pytest.raises(ShapeError, match="got nothing"):
        step.step()
    assert step.steps == 1
    _, _, free = made(capture=False)
    free.step(torch.randn(4, 5))
    free.step(torch.randn(3, 5))
    _, _, halves = made(accumulate=2)
    with pytest.raises(ShapeError, match="a multiple of accumulate = 2 rows, got 3"):
        halves.step(torch.randn(3, 5))
    _, _, double = made(steps_per_replay=2)
    with pytest.raises(ShapeError, match=r"first axis of steps_per_replay = 2, got shape \(4, 5\)"):
        double.step(torch.randn(4, 5))


def test_refuses_what_it_can_not_run():
    model, optimizer, _ = made()
    loss = lambda x: model(x).square().mean()
    with pytest.raises(ConfigError, match="fused=True"):
        CapturedStep(torch.optim.AdamW(model.parameters(), fused=False), loss)
    for options, match in [
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"warmup": 0}, "warmup must be at least 1, got 0"),
        ({"steps_per_replay": 0}, "steps_per_replay must be at least 1"),
        ({"clip": -1.0}, "clip must be finite"),
        ({"clip": math.nan}, "clip must be finite"),
        ({"capture": True}, "on 'cpu'; leave it None"),
    ]:
        with pytest.raises(ConfigError, match=match):
            CapturedStep(optimizer, loss, **options)
    elsewhere = nn.Linear(2, 2, device="meta")
    with pytest.raises(ConfigError, match=r"one device, got \['cpu', 'meta'\]"):
        CapturedStep(optimizer, loss, parameters=[*model.parameters(), *elsewhere.parameters()])
    with pytest.raises(ShapeError, match=r"one number, got shape \(4, 3\)"):
        CapturedStep(optimizer, model).step(torch.randn(4, 5))
