"""CUDA kernels compiled at first use: what is missing is named with its cure. No GPU is needed; a double compiles."""

from __future__ import annotations

import threading
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from statescan.errors import BackendUnavailableError
from statescan.ops import _cuda, _dispatch, explain
from statescan.ops._dispatch import Facts, choose

ON_GPU = Facts("cuda", torch.float32, d_state=16)


class Compiler:
    """As much of cuda.core as compiling and loading takes; counts what it compiles."""

    __version__ = "1.0"

    def __init__(self, failure: str | None = None, loads: bool = True) -> None:
        self.failure, self.loads, self.compiled = failure, loads, 0

    def ProgramOptions(self, **_: Any) -> None:
        return None

    def Program(self, *_: Any) -> Any:
        return types.SimpleNamespace(compile=self._compile)

    def _compile(self, _: str) -> Any:
        if self.failure:
            raise RuntimeError(self.failure)
        self.compiled += 1
        return types.SimpleNamespace(code=b"cubin")

    def Device(self, _: int) -> Any:
        return types.SimpleNamespace(set_current=lambda: None)

    @property
    def ObjectCode(self) -> Any:
        def load(_: bytes) -> Any:
            if not self.loads:
                raise RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
            return types.SimpleNamespace(get_kernel=lambda name: name)

        return types.SimpleNamespace(from_cubin=load)


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine with a GPU of compute capability 9.0, an empty cache, and nothing remembered."""
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_dispatch, "_broken", {})
    monkeypatch.setattr(_cuda, "_not_kept", set())
    # the next one in the order, which has its own tests
    monkeypatch.setattr("statescan.ops._triton.refusal", lambda facts: "no triton here")
    _cuda.unavailable_reason.cache_clear()
    yield
    _cuda.unavailable_reason.cache_clear()


def test_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    monkeypatch.setattr(_cuda, "_core", lambda: compiler)
    assert choose("selective_scan", "auto", "cuda", torch.float32, d_state=16) == "cuda"
    assert compiler.compiled == 1
    _cuda.unavailable_reason.cache_clear()
    assert _cuda.unavailable_reason() is None
    assert compiler.compiled == 1  # the second time it comes from the cache


@pytest.mark.parametrize(
    ("missing", "cause"),
    [
        (
            "cuda-core",
            r"cuda-core does not import \(No module named 'cuda'\); install it: pip install 'cuda-core\[cu13\]'",
        ),
        ("compiler", r"could not be compiled and loaded .*nvrtc not found.*pip install 'cuda-core\[cu13\]'"),
        ("driver", r"could not be compiled and loaded .*UNSUPPORTED_PTX.*it takes a driver for CUDA 13\.0"),
        ("architecture", r"its kernels need compute capability 8\.0, a GPU has 7\.5; use backend='torch'"),
    ],
)
def test_what_is_missing_is_named(missing: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` goes on with one warning, a named backend raises, both with the cause and the cure."""
    if missing == "cuda-core":

        def core() -> Any:
            raise ImportError("No module named 'cuda'")

        monkeypatch.setattr(_cuda, "_core", core)
    elif missing == "architecture":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        monkeypatch.setattr(_cuda, "_core", Compiler)
    else:
        failure = "nvrtc not found" if missing == "compiler" else None
        monkeypatch.setattr(_cuda, "_core", lambda: Compiler(failure, loads=missing != "driver"))
    with pytest.warns(UserWarning, match=f"statescan's CUDA kernels are not used: .*{cause}") as caught:
        assert choose("selective_scan", "auto", "cuda", torch.float32, d_state=16) == "torch"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("selective_scan", "auto", "cuda", torch.float32, d_state=16) == "torch"
        with pytest.raises(BackendUnavailableError, match=f"backend 'cuda' can't run this call: .*{cause}"):
            choose("selective_scan", "cuda", "cuda", torch.float32, d_state=16)


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The empty kernel compiles, a real one does not: nothing is kept, and the error names kernel options and cure."""
    monkeypatch.setattr(_cuda, "_core", lambda: Compiler("line 1: no such code"))
    with pytest.raises(
        BackendUnavailableError,
        match=r"did not compile for sm_90 with IN=1 N=16: line 1: no such code; use backend='torch' and report this",
    ):
        _cuda._cached("no such code", ("IN=1", "N=16"), "sm_90")
    assert not list(tmp_path.rglob("*.cubin"))


def test_auto_passes_over_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_core", Compiler)
    assert explain("selective_scan", ON_GPU).backend == "cuda"
    bad = Compiler("line 1: no such code")

    def run(name: str) -> str:
        if name == "cuda":
            monkeypatch.setattr(_cuda, "_core", lambda: bad)
            _cuda._cached("no such code", (), "sm_90")
        return name

    with pytest.warns(UserWarning, match="'cuda' is passed over, 'torch' runs instead: .*no such code") as caught:
        assert _dispatch.attempt("selective_scan", "auto", ON_GPU, run) == "torch"
    assert len(caught) == 1
    with pytest.raises(BackendUnavailableError, match="no such code"):
        choose("selective_scan", "cuda", "cuda", torch.float32, d_state=16)


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels run all the same, compiled anew in every process; it is said once, not for every kernel."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("STATESCAN_CACHE", str(blocked))
    compiler = Compiler()
    monkeypatch.setattr(_cuda, "_core", lambda: compiler)
    with pytest.warns(UserWarning, match="set STATESCAN_CACHE to a folder that can be written"):
        assert _cuda._cached("one", (), "sm_90") == b"cubin"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _cuda._cached("two", (), "sm_90") == b"cubin"
    assert compiler.compiled == 2


def test_what_a_cubin_is_kept_under(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Source, options, architecture and the compiler's version: a change of any compiles anew."""
    compiler = Compiler()
    monkeypatch.setattr(_cuda, "_core", lambda: compiler)
    for facts in (("a", (), "sm_90"), ("b", (), "sm_90"), ("a", ("N=16",), "sm_90"), ("a", (), "sm_80")):
        _cuda._cached(*facts)
        _cuda._cached(*facts)
    assert compiler.compiled == 4
    monkeypatch.setattr(Compiler, "__version__", "1.1")
    _cuda._cached("a", (), "sm_90")
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    _cuda._cached("a", (), "sm_90")
    assert compiler.compiled == 6
    assert len(list((tmp_path / "kernels").iterdir())) == 6
    assert all(file.suffix == ".cubin" for file in (tmp_path / "kernels").iterdir())


def test_a_thread_without_a_context_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """autograd's thread may launch a kernel that another thread made, before torch has called the driver there."""
    events: list[str] = []

    class Core(Compiler):
        def Device(self, number: int) -> Any:
            name = threading.current_thread().name
            return types.SimpleNamespace(set_current=lambda: events.append(f"device {number} in {name}"))

        def launch(self, *_: Any) -> None:
            events.append(f"launch in {threading.current_thread().name}")

        LaunchConfig = types.SimpleNamespace
        Stream = types.SimpleNamespace(from_handle=lambda handle: handle)

    monkeypatch.setattr(_cuda, "_core", Core)
    monkeypatch.setattr(_cuda, "_thread", threading.local())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    kernel = _cuda.Kernel("function", 128, 0)
    for name in ("first", "second"):
        thread = threading.Thread(target=lambda: [kernel((1, 1, 1)), kernel((1, 1, 1))], name=name)
        thread.start()
        thread.join()
    assert events == [f"{what} in {name}" for name in ("first", "second") for what in ("device 0", "launch", "launch")]
