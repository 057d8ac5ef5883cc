import json

import pytest
import torch

from statescan.models import flops_per_token
from statescan.train import loop, train, utilization

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165e12, 82.6e12),
        ("Tesla T4", None, None),
    ],
)
def test_the_peak_goes_by_the_name(monkeypatch, name, half, single):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert utilization.peak_flops(GPU, "bf16") == half
    assert utilization.peak_flops(GPU, "float32") == single
    assert utilization.peak_flops(torch.device("cpu"), "bf16") is None


def test_a_run_tells_how_much_of_the_peak_it_used(make_run, tmp_path, monkeypatch):
    run = make_run(steps=4, evaluate_every=0)
    assert train(run, tmp_path / "cpu", progress=False).utilization is None
    monkeypatch.setattr(utilization, "peak_flops", lambda device, precision: 1e9 if precision == "float32" else 0.0)
    shown, written = [], []
    monkeypatch.setattr(loop.Progress, "show", lambda self, **fields: shown.append(fields))
    monkeypatch.setattr(loop.TensorBoardLog, "add", lambda self, step, **values: written.append(values))
    result = train(run, tmp_path / "run", progress=False)
    # Three times the forward pass, whose share of a layer and the head stands in the counters' own tests.
    expected = result.tokens_per_second * flops_per_token(run.model).training / 1e9
    assert result.utilization == pytest.approx(expected, rel=1e-12)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model_flop_utilization"] == result.utilization
    assert all("% of the peak" in fields["speed"] for fields in shown if "speed" in fields)
    assert [values for values in written if "train__model_flop_utilization" in values]
    two = utilization.utilization(run.model, 32, 100.0, GPU, "float32", 2)
    assert two == pytest.approx(utilization.utilization(run.model, 32, 100.0, GPU, "float32") / 2)
