"""Modules made without initial values: nothing is drawn, and reading a model takes torch's compiler not along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from statescan.models import CausalLM, MambaConfig
from statescan.nn.undrawn import Undrawn

_READ = """
import sys
from statescan.models import CausalLM
model = CausalLM.from_pretrained(sys.argv[1])
assert not any(parameter.is_meta for parameter in model.parameters())
print("torch._dynamo" in sys.modules)
"""


def test_nothing_is_drawn_inside_and_all_is_outside() -> None:
    before = torch.get_rng_state()
    with Undrawn():
        linear = nn.Linear(3, 3)
        embedding = nn.Embedding(3, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert linear.weight.shape == embedding.weight.shape == (3, 3)
    nn.Linear(3, 3)
    assert not torch.equal(torch.get_rng_state(), before)


def test_reading_a_model_imports_no_compiler(tmp_path: Path) -> None:
    CausalLM(MambaConfig(d_model=16, n_layer=2, vocab_size=16)).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", _READ, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
