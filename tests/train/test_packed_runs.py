"""Training on packed documents: none sees another, and what an update learns is the mean over them apart."""

import json
import signal

import numpy as np
import pytest
import torch

from statescan.data import PackedSampler, build_token_file
from statescan.errors import CheckpointError, ConfigError, DataError, DTypeError, ShapeError
from statescan.models import CausalLM, MambaConfig
from statescan.train import Callback, CapturedStep, loop, train


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """JSON lines of very different lengths, many of them shorter than a window."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [f"Line {number}: " + "whales, " * (number % 7) for number in range(60)] + ["x"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def packed_run(make_run, rows):
    def make(**fields):
        return make_run(data__packing="true", data__paths=str(rows), **fields)

    return make


def sampled(run, rows):
    """The sampler of a run, made from the file by hand."""
    file = build_token_file(rows, cache=run.data.cache)
    ids, _ = file.split(run.data.valid_fraction)
    offsets = [int(offset) for offset in file.document_offsets if offset < len(ids)]
    return PackedSampler(ids, np.array([*offsets, len(ids)]), run.train.length, run.train.seed), ids


def mean_apart(model, sampler, ids, windows):
    """The mean loss over the pieces of the first windows, each run through the model alone."""
    total, count = 0.0, 0
    for window in range(windows):
        for start, predictions in sampler.pieces(window):
            piece = torch.from_numpy(np.asarray(ids[start : start + predictions + 1], np.int64))[None]
            total = total + model(piece[:, :-1], labels=piece).loss * predictions
            count += predictions
    assert count == windows * sampler.length
    return total / count


def test_the_loss_of_packed_windows_is_the_mean_over_documents_apart(packed_run, rows):
    run = packed_run()
    sampler, ids = sampled(run, rows)
    (batch,) = sampler.next_batch(6)
    assert len(batch.cu_seqlens) > 2 * 6, "the windows hold several documents"
    torch.manual_seed(0)
    model = CausalLM(run.model).double()
    inputs, targets, cu_seqlens = (torch.from_numpy(part) for part in batch)
    packed = model(inputs, targets=targets, cu_seqlens=cu_seqlens).loss
    apart = mean_apart(model, sampler, ids, 6)
    # Sums of float64 in another order: a rounding for each of the model's terms, of which a few thousand meet.
    assert abs(packed - apart) <= 2**-53 * 2**12 * apart
    # And a state that crossed a document would show.
    across = model(inputs, targets=targets).loss
    assert abs(across - apart) > 1e-6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_is_the_gradient_of_the_documents_apart(packed_run, rows, tmp_path, saved_tensors, accumulate):
    run = packed_run(steps=1, accumulate=accumulate, evaluate_every=0, clip=0)
    result = train(run, tmp_path / "run", progress=False)
    sampler, ids = sampled(run, rows)
    torch.manual_seed(run.train.seed)
    model = CausalLM(run.model).double()
    single = CausalLM(run.model)
    single.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    exact_loss, own_loss = (mean_apart(one, sampler, ids, run.train.batch_size) for one in (model, single))
    exact_loss.backward()
    own_loss.backward()
    rounding = exact_loss.item() * 2**-23
    assert abs(result.train_loss - exact_loss.item()) <= 2 * (abs(own_loss.item() - exact_loss.item()) + rounding)
    _, tensors = saved_tensors(tmp_path / "run", run)
    oracle = dict(model.named_parameters())
    for name, parameter in single.named_parameters():
        exact = oracle[name].grad
        moment = tensors[f"optimizer.exp_avg.{name}"].double() / (1 - run.train.betas[0])
        own_error = (parameter.grad.double() - exact).abs().max()
        assert (moment - exact).abs().max() <= 2 * (own_error + exact.abs().max() * 2**-23), name


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_log(self, row):
        if row["step"] == self.step:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("captured", [False, True])
def test_a_packed_run_resumes_to_the_same_bits(packed_run, tmp_path, assert_same_run, monkeypatch, captured):
    if captured:  # as on a GPU; a graph's parts run here one after the other
        monkeypatch.setattr(loop._Trainer, "_capture_lacks", lambda self: None)
    run = packed_run(steps=30, accumulate=2, checkpoint_every=8)
    whole = train(run, tmp_path / "whole", progress=False)
    assert whole.evaluations[-1][1] < whole.evaluations[0][1] - 1, "it learns"
    parts = train(run, tmp_path / "parts", progress=False, callbacks=[StopAt(15)])
    assert (parts.interrupted, parts.steps) == (True, 15)
    train(run, tmp_path / "parts", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", run)


def test_what_does_not_fit_is_named(packed_run, make_run, rows, tmp_path):
    run = packed_run(steps=1, evaluate_every=0)
    train(run, tmp_path / "run", progress=False)
    with pytest.raises(CheckpointError, match=r"wanted data.packing = True, with which the run began, got False"):
        train(make_run(steps=2, data__paths=str(rows)), tmp_path / "run", resume=True, progress=False)
    with pytest.raises(DataError, match=r"at least length = 100000 predictions, got \d+ in \d+ of them"):
        train(packed_run(length=100_000), tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_targets_are_checked():
    model = CausalLM(MambaConfig(d_model=8, n_layer=1, vocab_size=8, d_state=2))
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ConfigError, match="labels and targets exclude each other"):
        model(ids, labels=ids, targets=ids)
    with pytest.raises(ShapeError, match=r"targets must be \(batch, length\) = \(1, 4\), got \(1, 3\)"):
        model(ids, targets=ids[:, 1:])
    with pytest.raises(DTypeError, match=r"targets must be int64 or int32, got torch.float32"):
        model(ids, targets=ids.float())
    # Targets of the next id are what labels mean, but for the last position.
    ids = torch.arange(4)[None]
    ignoring = torch.tensor([[1, 2, 3, -100]])
    assert torch.equal(model(ids, targets=ignoring).loss, model(ids, labels=ids).loss)
    assert model(ids, targets=ignoring).logits is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_captured_update_of_packed_windows_is_the_update(packed_run, tmp_path, monkeypatch, accumulate):
    """With room for a power of two of documents, so that few graphs do for all batches."""
    run = packed_run(accumulate=accumulate, batch_size=8)
    plain = train(run, tmp_path / "plain", progress=False)
    monkeypatch.setattr(loop._Trainer, "_capture_lacks", lambda self: None)
    shapes, steps = [], []
    real = CapturedStep.step

    def step(self, inputs, targets, offsets):
        shapes.append((tuple(inputs.shape), tuple(targets.shape), tuple(offsets.shape)))
        steps.append(self)
        return real(self, inputs, targets, offsets)

    monkeypatch.setattr(CapturedStep, "step", step)
    captured = train(run, tmp_path / "captured", progress=False)
    assert captured.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
    assert len(shapes) == 12
    assert {shape[:2] for shape in shapes} == {((accumulate, 256 // accumulate),) * 2}
    rooms = {shape[2] for shape in shapes}
    assert all(rows == accumulate and room & (room - 1) == 0 for rows, room in rooms)
    assert len(set(map(id, steps))) == len(rooms) <= 2, "one for each room, and few of them"
