import functools
import json
import math
import random
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

from statescan.data import ByteTokenizer, WindowSampler, build_token_file, load_tokenizer
from statescan.errors import CheckpointError, ConfigError, DataError, MissingExtraError, TrainingError
from statescan.evaluate import evaluate_tokens
from statescan.models import CausalLM
from statescan.train import Callback, CapturedStep, list_checkpoints, load_run, loop, train
from statescan.train.checkpoint import random_states, set_random_states
from statescan.train.logs import read_csv


class InterruptAt(Callback):
    """Raises a signal in the middle of a run, after the row or the evaluation of a step."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def on_log(self, row):
        self.raise_at(row["step"])

    def on_evaluation(self, step, bits_per_byte):
        self.raise_at(step)

    def raise_at(self, step):
        if step == self.step:
            self.step = None
            signal.raise_signal(self.number)


class Events(Callback):
    def __init__(self):
        self.events = []

    def on_log(self, row):
        self.events.append(("log", row["step"]))

    def on_evaluation(self, step, bits_per_byte):
        self.events.append(("evaluation", step))

    def on_checkpoint(self, step, path):
        assert path.is_dir()
        self.events.append(("checkpoint", step))


def test_a_run_learns_and_leaves_everything_behind(make_run, tmp_path, corpus):
    run = make_run(steps=40, evaluate_every=10, checkpoint_every=15)
    events = Events()
    out = tmp_path / "run"
    result = train(run, out, progress=False, callbacks=[events])
    assert (result.out, result.steps, result.interrupted) == (out, 40, False)
    assert [step for step, _ in result.evaluations] == [0, 10, 20, 30, 40]
    bits = [value for _, value in result.evaluations]
    assert bits[0] == pytest.approx(8, abs=0.1), "an untrained model of bytes knows nothing"
    assert bits[-1] < 4.5
    assert result.tokens_per_second > 0
    rows = read_csv(out / "log.csv")
    assert [int(row["step"]) for row in rows] == [*range(3, 40, 3), 40]
    assert float(rows[-1]["loss"]) == result.train_loss
    assert int(rows[-1]["tokens"]) == 40 * 4 * 32
    assert [(int(row["step"]), float(row["bits_per_byte"])) for row in read_csv(out / "evaluations.csv")] == (
        result.evaluations
    )
    assert [checkpoint.step for checkpoint in list_checkpoints(out)] == [30, 40]
    assert [event for event in events.events if event[0] == "checkpoint"] == [("checkpoint", s) for s in (15, 30, 40)]
    assert [event for event in events.events if event[0] == "log"] == [("log", int(row["step"])) for row in rows]
    facts = json.loads((out / "run.json").read_text())
    assert (facts["status"], facts["steps"]) == ("finished", 40)
    assert load_run(out) == run
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").iterdir())

    # What stands in the folder is the model that was judged last, with its tokenizer.
    model, tokenizer = CausalLM.from_pretrained(out), load_tokenizer(out)
    assert isinstance(tokenizer, ByteTokenizer)
    _, valid = build_token_file(corpus, cache=run.data.cache).split(0.1)
    again = evaluate_tokens(model, np.asarray(valid[:201]), tokenizer=tokenizer, context=32)
    assert again.bits_per_byte == bits[-1]
    best = CausalLM.from_pretrained(out / "best")
    judged = evaluate_tokens(best, np.asarray(valid[:201]), tokenizer=load_tokenizer(out / "best"), context=32)
    assert judged.bits_per_byte == min(bits)
    assert not [path for path in out.rglob("*") if path.name.startswith(".") and path.name != ".metadata"]


def test_an_update_is_the_gradient_of_the_batch(make_run, tmp_path, corpus, saved_tensors):
    run = make_run(steps=1, accumulate=2, evaluate_every=0, clip=0)
    train(run, tmp_path / "run", progress=False)
    torch.manual_seed(run.train.seed)
    model = CausalLM(run.model).double()
    ids, _ = build_token_file(corpus, cache=run.data.cache).split(0.1)
    windows = torch.from_numpy(WindowSampler(ids, 32, run.train.seed).next_batch(4))
    model(windows[:, :-1], labels=windows).loss.backward()
    single = CausalLM(run.model)
    single.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    single(windows[:, :-1], labels=windows).loss.backward()
    _, tensors = saved_tensors(tmp_path / "run", run)
    oracle = dict(model.named_parameters())
    for name, parameter in single.named_parameters():
        exact = oracle[name].grad
        # The first moment after one update is (1 - beta1) times the gradient.
        moment = tensors[f"optimizer.exp_avg.{name}"].double() / (1 - run.train.betas[0])
        own_error = (parameter.grad.double() - exact).abs().max()
        rounding = exact.abs().max() * 2**-23
        assert (moment - exact).abs().max() <= 2 * (own_error + rounding), name


@pytest.mark.parametrize(
    ("fields", "interrupt"),
    [
        ({}, 3),
        ({"accumulate": 2, "precision": "bf16", "recompute": "cheap"}, 5),
        ({"accumulate": 4, "log_every": 5, "checkpoint_every": 0, "recompute": "block"}, 5),
        # As on a GPU, where an update is one graph; its parts run here one after the other.
        ({"capture": True, "accumulate": 2}, 5),
    ],
)
def test_resume_is_bit_equal_to_the_uninterrupted_run(
    make_run, tmp_path, assert_same_run, fields, interrupt, monkeypatch
):
    if "capture" in fields:
        monkeypatch.setattr(loop._Trainer, "_capture_lacks", lambda self: None)
    run = make_run(**fields)
    whole = train(run, tmp_path / "whole", progress=False)
    parts = train(run, tmp_path / "parts", progress=False, callbacks=[InterruptAt(interrupt)])
    assert parts.interrupted
    assert parts.steps == interrupt
    assert "resume=True" in parts.resume_command
    assert CausalLM.from_pretrained(tmp_path / "parts").config == CausalLM.from_pretrained(tmp_path / "whole").config
    torch.manual_seed(12345)
    np.random.seed(12345)
    parts = train(run, tmp_path / "parts", resume=True, progress=False)
    assert not parts.interrupted
    assert (parts.steps, parts.train_loss, parts.evaluations) == (whole.steps, whole.train_loss, whole.evaluations)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_with_the_last_update_leaves_a_finished_run_and_is_told(make_run, tmp_path, number):
    run = make_run(steps=6)
    before = signal.getsignal(number)
    result = train(run, tmp_path / "run", progress=False, callbacks=[InterruptAt(6, number)])
    assert signal.getsignal(number) is before
    assert (result.steps, result.interrupted, result.signalled) == (6, False, True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    again = train(run, tmp_path / "run", resume=True, progress=False)
    assert (again.steps, again.interrupted, again.signalled) == (6, False, False)
    assert (again.train_loss, again.evaluations) == (result.train_loss, result.evaluations)
    early = train(run, tmp_path / "early", progress=False, callbacks=[InterruptAt(3, number)])
    assert (early.interrupted, early.signalled) == (True, True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_captured_update_is_the_update(make_run, tmp_path, monkeypatch, saved_tensors, accumulate):
    """But for the learning rate, which is a float32 tensor there."""
    make_run = functools.partial(make_run, accumulate=accumulate)
    plain = train(make_run(), tmp_path / "plain", progress=False)
    monkeypatch.setattr(loop._Trainer, "_capture_lacks", lambda self: None)
    steps = []
    step = CapturedStep.step
    monkeypatch.setattr(CapturedStep, "step", lambda self, *batch: steps.append(self.steps) or step(self, *batch))
    captured = train(make_run(), tmp_path / "captured", progress=False)
    assert steps == list(range(12))
    names = ("step", "epoch", "tokens", "skipped", "learning_rate")
    rows = [read_csv(tmp_path / name / "log.csv") for name in ("plain", "captured")]
    assert [[row[name] for name in names] for row in rows[0]] == [[row[name] for name in names] for row in rows[1]]
    assert captured.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
    assert float(rows[1][-1]["gradient_norm"]) == pytest.approx(float(rows[0][-1]["gradient_norm"]), rel=1e-4)
    # capture=false never takes that way
    steps.clear()
    train(make_run(capture=False), tmp_path / "refused", progress=False)
    assert steps == []
    tensors = [saved_tensors(tmp_path / name, make_run())[1] for name in ("plain", "refused")]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, "a CUDA device, it runs on 'cpu'"),
        ({"compile": True}, "train.compile=false, it is true"),
    ],
)
def test_what_a_captured_update_lacks_is_named(make_run, tmp_path, fields, wanted, monkeypatch):
    if fields:  # looked at on a CUDA device alone
        real = loop._Trainer._capture_lacks

        def elsewhere(self):
            monkeypatch.setattr(self, "device", torch.device("cuda"))
            lacking = real(self)
            monkeypatch.undo()
            return lacking

        monkeypatch.setattr(loop._Trainer, "_capture_lacks", elsewhere)
    with pytest.raises(ConfigError, match=f"train.capture=true wants {wanted}; set train.capture=auto"):
        train(make_run(capture=True, **fields), tmp_path / "run", progress=False)


def _draws(self, *args, real=CausalLM.forward, **kwargs):
    """A model with noise of its own in training, from all three generators, as dropout has it."""
    output = real(self, *args, **kwargs)
    if not self.training:
        return output
    return output._replace(loss=output.loss * (0.5 + random.random() + np.random.rand() + torch.rand(())))


def test_resume_restores_the_random_states_that_a_model_draws_from(make_run, tmp_path, monkeypatch, assert_same_run):
    monkeypatch.setattr(CausalLM, "forward", _draws)
    run = make_run(clip=0)
    train(run, tmp_path / "whole", progress=False)
    train(run, tmp_path / "parts", progress=False, callbacks=[InterruptAt(6)])
    shutil.copytree(tmp_path / "parts", tmp_path / "forgetful")
    for module in (random, np.random):
        module.seed(12345)
    torch.manual_seed(12345)
    train(run, tmp_path / "parts", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", run)
    # The noise is what the test stands on: a run that forgets the states goes another way.
    for name in ("python", "numpy", "torch"):
        out = tmp_path / f"forgetful-{name}"
        shutil.copytree(tmp_path / "forgetful", out)

        def forget(states, name=name):
            set_random_states({**states, name: random_states()[name]})

        monkeypatch.setattr(loop, "set_random_states", forget)
        train(run, out, resume=True, progress=False)
        assert (out / "model.safetensors").read_bytes() != (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_resume_from_an_older_checkpoint_when_the_newest_is_damaged(make_run, tmp_path, assert_same_run):
    run = make_run()
    train(run, tmp_path / "whole", progress=False)
    train(run, tmp_path / "parts", progress=False, callbacks=[InterruptAt(9, signal.SIGTERM)])
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "parts")] == [8, 9]
    newest = list_checkpoints(tmp_path / "parts")[-1].path
    content = (newest / "__0_0.distcp").read_bytes()
    (newest / "__0_0.distcp").write_bytes(content[:-1])
    with (tmp_path / "parts" / "log.csv").open("a") as log:
        log.write("10,0.5,cut sho")  # as a crash leaves it
    train(run, tmp_path / "parts", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", run)


def test_resume_of_a_run_that_never_saved_starts_over(make_run, tmp_path, assert_same_run):
    run = make_run()
    train(run, tmp_path / "whole", progress=False)
    train(run, tmp_path / "parts", progress=False, callbacks=[InterruptAt(3)])
    shutil.rmtree(tmp_path / "parts" / "checkpoints")
    train(run, tmp_path / "parts", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", run)


def test_resume_of_a_finished_run_goes_on_where_more_steps_are_asked_for(make_run, tmp_path, capsys):
    first = train(make_run(steps=6), tmp_path / "run", progress=False)
    same = train(make_run(steps=6), tmp_path / "run", resume=True, progress=False)
    assert (same.steps, same.train_loss, same.evaluations) == (6, first.train_loss, first.evaluations)
    assert same.tokens_per_second == 0
    capsys.readouterr()
    more = train(make_run(steps=9), tmp_path / "run", resume=True, progress=False)
    assert more.steps == 9
    captured = capsys.readouterr()
    assert captured.out == "", "standard output is for results"
    assert "from step 6 with train.steps = 9 (was 6)" in captured.err
    assert [int(row["step"]) for row in read_csv(tmp_path / "run" / "log.csv")] == [3, 6, 9]


def test_an_existing_run_or_model_is_not_overwritten(make_run, tmp_path):
    train(make_run(steps=1), tmp_path / "run", progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"wanted a folder without a run, got .*run', which holds one; go on with it by"
    ):
        train(make_run(steps=1), tmp_path / "run", progress=False)
    (tmp_path / "run" / "run.json").rename(tmp_path / "run.json")
    with pytest.raises(ConfigError, match=r"wanted a new or empty folder, got .*run', which holds best and 8 more"):
        train(make_run(steps=1), tmp_path / "run", progress=False)
    (tmp_path / "run.json").rename(tmp_path / "run" / "run.json")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="wanted a folder, got the file"):
        train(make_run(steps=1), tmp_path / "file", progress=False)


@pytest.mark.parametrize(
    "name", ["log.csv", "evaluations.csv", "loss.png", "tensorboard/events", "best/notes.txt", "thesis.txt", ".hidden"]
)
def test_a_folder_with_anything_in_it_is_refused_before_anything_is_written(make_run, tmp_path, name):
    out = tmp_path / "run"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("precious")
    for resume, error in ((False, "wanted a new or empty folder"), (True, "got no run.json there")):
        with pytest.raises((ConfigError, CheckpointError), match=error) as raised:
            train(make_run(steps=1), out, resume=resume, progress=False)
        assert "\n" not in str(raised.value)
        assert resume or f"which holds {name.partition('/')[0]};" in str(raised.value)
    assert [path for path in out.rglob("*") if path.is_file()] == [out / name]
    assert (out / name).read_text() == "precious"


def test_an_empty_folder_and_what_a_killed_start_left_are_no_obstacle(make_run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".run.json.123.0a1b2c3d.tmp").write_text("{")
    assert train(make_run(steps=1, evaluate_every=0), out, progress=False).steps == 1


def test_a_foreign_run_json_is_named(make_run, tmp_path):
    (tmp_path / "run.json").write_text('{"name": "another program\'s"}')
    with pytest.raises(CheckpointError, match=r"got a run.json there that train did not write"):
        train(make_run(steps=1), tmp_path, resume=True, progress=False)


def test_a_folder_that_can_t_be_made_is_named_with_a_cure(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"make the folder .*file/run: Not a directory; .*name another folder"):
        train(make_run(steps=1), tmp_path / "file" / "run", progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__d_state": 8}, "wanted model.d_state = 4, with which the run began, got 8"),
        ({"seed": 1}, "wanted train.seed = 0"),
        ({"batch_size": 8}, "wanted train.batch_size = 4"),
        ({"length": 16}, "wanted train.length = 32"),
        ({"data__valid_fraction": 0.2}, r"wanted the texts, tokenizer and held-out part .*train_tokens"),
        ({"data__paths": "packaged:moby_dick"}, r"wanted the texts, .*digest"),
    ],
)
def test_resume_with_other_settings_is_refused(make_run, tmp_path, fields, message):
    train(make_run(steps=1, evaluate_every=0), tmp_path / "run", progress=False)
    with pytest.raises(CheckpointError, match=message):
        train(make_run(steps=2, **fields), tmp_path / "run", resume=True, progress=False)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model__vocab_size": 100}, ConfigError, "tokenizer's 256, got 100; set model.vocab_size=256"),
        ({"length": 100_000}, DataError, r"at least train.length \+ 1 = 100001 ids, got"),
        ({"data__paths": "none.txt"}, DataError, "does not exist"),
        ({"data__paths": ""}, DataError, "got none; name a text"),
        (
            {"devices": 3, "accelerator": "cpu"},
            ConfigError,
            "wanted train.batch_size to be a multiple of .* = 3, got 4",
        ),
    ],
)
def test_what_can_t_be_trained_is_named_and_leaves_no_folder(make_run, tmp_path, fields, error, message):
    with pytest.raises(error, match=message) as raised:
        train(make_run(**fields), tmp_path / "run", progress=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_nothing_to_resume_is_named(make_run, tmp_path):
    with pytest.raises(CheckpointError, match=r"got no run.json there; leave --resume out"):
        train(make_run(), tmp_path / "run", resume=True, progress=False)
    with pytest.raises(CheckpointError, match=r"wanted a run in .*, got no run.json there"):
        load_run(tmp_path / "run")


def test_gradients_that_stay_infinite_end_the_run(make_run, tmp_path, monkeypatch):
    real = CausalLM.forward

    def broken(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        return output._replace(loss=output.loss * math.inf) if output.loss is not None else output

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "forward", broken)
        run = make_run(steps=60, max_nonfinite=5, log_every=2, checkpoint_every=2)
        with pytest.raises(TrainingError, match=r"the last 6 gradients up to step 6 were infinite.*lower train.lr"):
            train(run, tmp_path / "run", progress=False)
    rows = read_csv(tmp_path / "run" / "log.csv")
    assert [int(row["skipped"]) for row in rows] == [2, 4, 6]
    # The weights were never touched: what is on the disk is good to go on from.
    done = train(run, tmp_path / "run", resume=True, progress=False)
    assert done.evaluations[-1][1] < done.evaluations[0][1]


def test_other_texts_can_be_held_out_and_nothing_at_all(make_run, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Another text, which is held out. " * 9)
    result = train(make_run(steps=2, data__valid_paths=str(other)), tmp_path / "other", progress=False)
    facts = json.loads((tmp_path / "other" / "run.json").read_text())["data"]
    assert facts["valid_tokens"] == len(other.read_bytes())
    assert facts["train_tokens"] == facts["tokens"]
    assert [step for step, _ in result.evaluations] == [0, 2]
    none = train(make_run(steps=2, data__valid_fraction=0), tmp_path / "none", progress=False)
    assert none.evaluations == []
    assert CausalLM.from_pretrained(tmp_path / "none")


def test_missing_extras_are_named(make_run, tmp_path, monkeypatch, capsys):
    for name in ("tensorboard", "torch.utils.tensorboard.writer", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    train(make_run(steps=1), tmp_path / "run", progress=False)
    notes = capsys.readouterr().err
    assert "no TensorBoard events" in notes
    assert "no loss.png" in notes
    assert not (tmp_path / "run" / "loss.png").exists()
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'statescan\[train\]'"):
        train(make_run(steps=1), tmp_path / "other", progress=False)


@pytest.fixture
def interruptible():
    """Python's own SIGINT handler, which a process started in the background with the signal ignored lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_it_at_once(make_run, tmp_path, interruptible):
    class Twice(Callback):
        def on_log(self, row):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_run(), tmp_path / "run", progress=False, callbacks=[Twice()])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_resume_command_is_the_line_it_was_started_with(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/statescan", "train", "--data", "my text.txt", "--out", "x", "--resume"])
    assert loop._resume_command(tmp_path) == "statescan train --data 'my text.txt' --out x --resume"
    monkeypatch.setattr(sys, "argv", ["/venv/bin/statescan", "demo", "--out", "x"])
    assert loop._resume_command(tmp_path) == "statescan demo --out x"


def test_compile_trains_the_same_run(make_run, tmp_path):
    plain = train(make_run(steps=3, evaluate_every=0), tmp_path / "plain", progress=False)
    try:
        compiled = train(make_run(steps=3, evaluate_every=0, compile=True), tmp_path / "compiled", progress=False)
    except Exception as problem:
        if "compiler" in str(problem).lower() and shutil.which("g++") is None:
            pytest.skip("torch.compile needs a C++ compiler")
        raise
    # Other kernels round differently: one part in 10^5 of a loss after three updates of size 1e-2 at most.
    assert compiled.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
    assert CausalLM.from_pretrained(tmp_path / "compiled")


def test_fewer_steps_than_are_done_are_refused(make_run, tmp_path):
    run = make_run(steps=4)
    train(run, tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "run.json").read_bytes()
    shorter = make_run(steps=2)
    with pytest.raises(ConfigError, match=r"train\.steps of at least 4, which are done .*got 2; raise train\.steps"):
        train(shorter, tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
