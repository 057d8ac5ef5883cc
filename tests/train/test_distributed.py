"""Two processes on the CPU (gloo), launched by Fabric: replicated (DDP) and sharded (FSDP2)."""

import signal

import pytest
import torch

from statescan.data import WindowSampler, build_token_file
from statescan.models import CausalLM
from statescan.train import Callback, latest_checkpoint, train
from statescan.train.logs import read_csv

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)


def losses(out):
    return [float(row["loss"]) for row in read_csv(out / "log.csv")]


def weights(out):
    return CausalLM.from_pretrained(out).state_dict()


def assert_close(one, other):
    """Weights of two runs that differ by the order of float64 sums alone: far below a rounding of float32."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == torch.float64
        assert (tensor - other[name]).abs().max() <= 2**-24 * other[name].abs().max(), name


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_log(self, row):
        if row["step"] == self.step:
            signal.raise_signal(signal.SIGTERM)


def finished(child):
    assert child.returncode == 0, child.stderr[-3000:]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_gradient_of_two_processes_is_that_of_the_whole_batch(
    make_run, run_child, tmp_path, corpus, saved_tensors, strategy
):
    run = make_run(steps=1, accumulate=2, evaluate_every=0, clip=0, devices=2, strategy=strategy)
    finished(run_child(tmp_path / "run", run))
    torch.manual_seed(run.train.seed)
    model = CausalLM(run.model).double()
    single = CausalLM(run.model)
    single.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    ids, _ = build_token_file(corpus, cache=run.data.cache).split(0.1)
    windows = torch.from_numpy(WindowSampler(ids, 32, run.train.seed).next_batch(4))
    for one in (model, single):
        one(windows[:, :-1], labels=windows).loss.backward()
    _, tensors = saved_tensors(tmp_path / "run", run)
    oracle = dict(model.named_parameters())
    for name, parameter in single.named_parameters():
        exact = oracle[name].grad
        moment = tensors[f"optimizer.exp_avg.{name}"].double() / (1 - run.train.betas[0])
        own_error = (parameter.grad.double() - exact).abs().max()
        assert (moment - exact).abs().max() <= 2 * (own_error + exact.abs().max() * 2**-23), name


@pytest.fixture
def double():
    """Models of float64, here and by --double in the children: what the order of sums does is out of sight there."""
    torch.set_default_dtype(torch.float64)
    yield "--double"
    torch.set_default_dtype(torch.float32)


# A loss is logged from float32: one rounding in each of two processes, one of their sum, and one in a single process.
LOGGED = 4 * 2**-24


def test_sharded_runs_stop_resume_and_open_on_another_number_of_processes(
    make_run, run_child, tmp_path, saved_tensors, assert_same_run, double
):
    two = make_run(devices=2, strategy="fsdp", log_every=1)
    one = make_run(log_every=1)
    finished(run_child(tmp_path / "whole", two, double))
    # The first process is told to stop: both do, at the same update.
    finished(run_child(tmp_path / "parts", two, double, "--signal", int(signal.SIGTERM), 6))
    assert latest_checkpoint(tmp_path / "parts").step == 6
    halfway, tensors = saved_tensors(tmp_path / "parts", two)
    assert halfway == 6
    exported = CausalLM.from_pretrained(tmp_path / "parts").state_dict()
    for name, tensor in exported.items():
        if name != "lm_head.weight":
            assert torch.equal(tensor, tensors[f"model.{name}"]), name

    # From two processes to one: the same weights and moments, and losses that go on.
    for path in (tmp_path / "parts").rglob("*"):
        copy = tmp_path / "alone" / path.relative_to(tmp_path / "parts")
        if path.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    train(one, tmp_path / "alone", resume=True, progress=False)
    finished(run_child(tmp_path / "parts", two, double, "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", two)
    whole, alone = losses(tmp_path / "whole"), losses(tmp_path / "alone")
    assert alone[:6] == whole[:6]
    assert alone[6:] == pytest.approx(whole[6:], rel=LOGGED)
    assert_close(weights(tmp_path / "alone"), weights(tmp_path / "whole"))

    # And back, from one process to two.
    stopped = train(make_run(log_every=1, steps=7), tmp_path / "back", progress=False, callbacks=[StopAt(6)])
    assert stopped.interrupted
    step, before = saved_tensors(tmp_path / "back", one)
    finished(
        run_child(tmp_path / "back", make_run(devices=2, strategy="fsdp", log_every=1, steps=7), double, "--resume")
    )
    assert step == 6
    sharded = latest_checkpoint(tmp_path / "back")
    assert sharded.step == 7
    assert len(list(sharded.path.glob("rank-*.pt"))) == 2
    train(make_run(log_every=1, steps=7), tmp_path / "single", progress=False)
    assert losses(tmp_path / "back")[:6] == losses(tmp_path / "single")[:6]
    assert losses(tmp_path / "back")[6] == pytest.approx(losses(tmp_path / "single")[6], rel=LOGGED)
    assert_close(weights(tmp_path / "back"), weights(tmp_path / "single"))
    assert before.keys() == tensors.keys()
