"""torch.export of a prompt and of a step, and folders that other programs open without this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from statescan.data import ByteTokenizer
from statescan.errors import CheckpointError, ConfigError
from statescan.models import CausalLM, MambaConfig, TransformerConfig, convert, export, flat_state, load_program

CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=32, d_state=4)
# Refuses this package, as where it is not installed.
WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "statescan":
            raise ModuleNotFoundError(f"No module named {name!r} (refused by the test)", name=name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(backend: str = "auto", **fields) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CONFIG.replace(**fields), backend=backend).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 32, shape, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what float32 sums of a few dozen numbers in another order differ by."""
    return float((a - b).abs().max()) <= 16 * torch.finfo(torch.float32).eps * float(b.abs().max())


@torch.no_grad()
def check(model: CausalLM, programs, batch: int, length: int, logits: str = "last") -> None:
    prompt, token = ids(batch, length), ids(batch)
    wanted = model(prompt, state=model.init_state(batch))
    got, state = programs.prefill.module()(prompt, flat_state(model, batch))
    assert close(got, wanted.logits[:, -1] if logits == "last" else wanted.logits)
    wanted_next = model.step(token, wanted.state)
    got_next, state = programs.step.module()(token, state)
    assert close(got_next, wanted_next.logits)
    flat = [part for one in wanted_next.state for part in one]
    assert len(state) == len(flat)
    assert all(close(a, b) for a, b in zip(state, flat, strict=True))


@pytest.mark.parametrize("fields", [{}, {"mixer_rms_eps": 1e-6, "bias": True, "tie_embeddings": False}], ids=str)
def test_any_batch_and_any_length(fields: dict) -> None:
    model = make(**fields)
    programs = export(model)
    # 32 is d_inner, which no size of the call may be taken for.
    for batch, length in ((1, 1), (1, 9), (4, 20), (32, 3)):
        check(model, programs, batch, length)


@pytest.mark.parametrize("inner", ["s4", "s4d", "s4d-real"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_time_invariant_maps_at_any_batch_and_any_length(inner: str, backend: str) -> None:
    model = make(backend, inner=inner)
    programs = export(model, logits="all")
    for batch, length in ((1, 1), (3, 7), (32, 3), (2, 64), (1, 100), (2, 1000)):
        check(model, programs, batch, length, "all")


def test_fixed_sizes_and_all_logits() -> None:
    model = make().train()
    programs = export(model, batch=2, length=5, logits="all")
    assert model.training
    check(model.eval(), programs, 2, 5, "all")


def test_a_saved_program_runs_where_the_package_is_not(tmp_path: Path) -> None:
    model = make("torch")
    programs = export(model, length=6)
    with torch.no_grad():
        logits, state = programs.prefill.module()(ids(2, 6), flat_state(model, 2))
        after = programs.step.module()(ids(2), state)[0]
    torch.export.save(programs.prefill, tmp_path / "prefill.pt2")
    torch.export.save(programs.step, tmp_path / "step.pt2")
    torch.save((ids(2, 6), flat_state(model, 2), ids(2), logits, after), tmp_path / "wanted.pt")
    code = f"""{WITHOUT}
import torch
prompt, state, token, logits, after = torch.load({str(tmp_path / "wanted.pt")!r})
prefill, step = (torch.export.load({str(tmp_path)!r} + f"/{{name}}.pt2").module() for name in ("prefill", "step"))
with torch.no_grad():
    got, state = prefill(prompt, state)
    torch.testing.assert_close(got, logits)
    torch.testing.assert_close(step(token, state)[0], after)
assert "statescan" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("inner", ["s6", "s4", "s4d"])
def test_a_saved_program_of_our_kernels_runs_in_another_process(tmp_path: Path, inner: str) -> None:
    model = make(inner=inner)
    programs = export(model)
    torch.export.save(programs.prefill, tmp_path / "prefill.pt2")
    torch.export.save(programs.step, tmp_path / "step.pt2")
    with torch.no_grad():
        wanted = model.step(ids(3), model.init_state(3)).logits
        prompted = model(ids(3, 9)).logits[:, -1]
    torch.save((ids(3), ids(3, 9), flat_state(model, 3), wanted, prompted), tmp_path / "wanted.pt")
    code = f"""
import torch
from statescan.models import load_program
token, prompt, state, wanted, prompted = torch.load({str(tmp_path / "wanted.pt")!r})
with torch.no_grad():
    torch.testing.assert_close(load_program({str(tmp_path / "step.pt2")!r}).module()(token, state)[0], wanted)
    torch.testing.assert_close(load_program({str(tmp_path / "prefill.pt2")!r}).module()(prompt, state)[0], prompted)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_damaged_program_is_named(tmp_path: Path) -> None:
    (tmp_path / "step.pt2").write_bytes(b"PK no archive")
    for name in ("step.pt2", "missing.pt2"):
        with pytest.raises(CheckpointError, match=f"{name} is no exported program that can be read here"):
            load_program(tmp_path / name)


def test_what_cannot_be_exported_is_named() -> None:
    with pytest.raises(ConfigError, match="model must be a Mamba language model, got one of TransformerConfig"):
        export(CausalLM(TransformerConfig(16, 1, 32, n_head=2)))
    with pytest.raises(ConfigError, match="batch must be at least 1, or None for any, got 0"):
        export(make(), batch=0)
    for model in (make("torch"), make("reference", inner="s4d")):
        with pytest.raises(ConfigError, match=r"length must be a number for this model.* pass length=32") as e:
            export(model)
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="logits must be 'last' or 'all', got 'none'"):
        export(make(), logits="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_a_saved_folder_opens_in_transformers_without_this_package(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    model = make(mixer_rms_eps=1e-6 if kind == "falcon_mamba" else None)
    model.save_pretrained(tmp_path / "ours")
    ByteTokenizer().save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "transformers")
    model.save_pretrained(tmp_path / "straight", "transformers")
    with torch.no_grad():
        torch.save((ids(2, 9), model(ids(2, 9)).logits), tmp_path / "wanted.pt")
    code = f"""{WITHOUT}
import torch, transformers
prompt, wanted = torch.load({str(tmp_path / "wanted.pt")!r})
for place in ("theirs", "straight"):
    model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + place, local_files_only=True)
    assert model.config.model_type == {kind!r}
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, wanted, rtol=1e-5, atol=1e-6)
        model.generate(prompt, max_new_tokens=2, do_sample=False)
assert "statescan" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
