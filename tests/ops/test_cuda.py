"""CUDA kernels compiled at first use: what is missing is named with its cure. No GPU is needed; a double compiles."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
import threading
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from statescan.errors import BackendUnavailableError
from statescan.ops import _cuda, _dispatch, explain
from statescan.ops._dispatch import Facts, choose
from statescan.ops.selective_scan import cuda as backend

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

    def Device(self, number: int) -> Any:
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
    monkeypatch.setattr(_cuda, "_ready", set())
    monkeypatch.setattr(_cuda, "_nvrtc_version", lambda: (13, 2))
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
        (
            "the same CUDA",
            r"NVRTC, is of CUDA 12\.9 and torch of CUDA 13\.0, .*must be one; pip install 'cuda-core\[cu13\]'",
        ),
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
    elif missing == "the same CUDA":
        monkeypatch.setattr(_cuda, "_core", Compiler)
        monkeypatch.setattr(_cuda, "_nvrtc_version", lambda: (12, 9))
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
    monkeypatch.setattr(_cuda, "_nvrtc_version", lambda: (13, 3))
    _cuda._cached("a", (), "sm_90")
    assert compiler.compiled == 7
    assert len(list((tmp_path / "kernels").iterdir())) == 7
    assert all(file.suffix == ".cubin" for file in (tmp_path / "kernels").iterdir())


@pytest.mark.parametrize("damage", ["empty", "cut", "another bit"])
def test_a_damaged_cubin_is_compiled_anew(damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The driver, which is told no length, never sees it; the good one takes its place."""
    compiler = Compiler()
    monkeypatch.setattr(_cuda, "_core", lambda: compiler)
    code = _cuda._cached("a", (), "sm_90")
    (file,) = (tmp_path / "kernels").iterdir()
    whole = file.read_bytes()
    assert whole.startswith(code)
    file.write_bytes({"empty": b"", "cut": whole[:-1], "another bit": bytes([whole[0] ^ 1]) + whole[1:]}[damage])
    assert _cuda._cached("a", (), "sm_90") == code
    assert compiler.compiled == 2
    assert file.read_bytes() == whole


def test_a_full_disk_is_named_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_cuda, "_core", Compiler)

    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match=r"can't be kept in .*kernels \(.*No space left on device\)") as caught:
        codes = [_cuda._cached(source, (), "sm_90") for source in ("a", "b")]
    assert codes == [b"cubin"] * 2
    assert len(caught) == 1
    assert not list((tmp_path / "kernels").iterdir())


@pytest.mark.parametrize("environment", [{}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "/elsewhere"}])
def test_where_cubins_are_kept(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATESCAN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/one"))
    base = environment.get("XDG_CACHE_HOME") or "/home/one/.cache"
    assert _cuda.cache_folder() == Path(base) / "statescan" / "kernels"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels run all the same, as with a folder that can't be written; a folder that is named needs no home."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    compiler = Compiler()
    monkeypatch.setattr(_cuda, "_core", lambda: compiler)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.delenv("STATESCAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _cuda.cache_folder() == tmp_path / "statescan" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.warns(UserWarning, match=r"can't be kept \(.*no home folder.*set STATESCAN_CACHE") as caught:
        codes = [_cuda._cached(source, (), "sm_90") for source in ("a", "b")]
    assert codes == [b"cubin"] * 2
    assert len(caught) == 1
    assert compiler.compiled == 2


def test_a_kernel_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was compiled, and the driver refuses it: another backend can take the call."""

    def refuse(name: str) -> Any:
        raise RuntimeError("CUDA_ERROR_INVALID_IMAGE")

    module = types.SimpleNamespace(get_kernel=refuse)
    monkeypatch.setattr(_cuda, "_module", lambda *_: module)
    with pytest.raises(BackendUnavailableError, match=r"could not be loaded .*INVALID_IMAGE\); use backend='torch'"):
        _cuda.kernel(Path("a file.cu"), "f", {}, 128, 0)


def test_a_gpu_without_memory_is_no_kernel_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch keeps is given back and the kernel loaded again; where that fails too the next call may have room."""
    asked, freed = [], []
    full = 3

    def load(name: str) -> Any:
        asked.append(name)
        if len(asked) <= full:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")
        return name

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(len(asked)))
    monkeypatch.setattr(_cuda, "_module", lambda *_: types.SimpleNamespace(get_kernel=load))
    monkeypatch.setattr(_cuda, "Kernel", lambda function, *_: function)
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left on the GPU to load 'f'"):
        _cuda.kernel(Path("another file.cu"), "f", {}, 128, 0)
    assert (len(asked), freed) == (2, [1])
    assert _cuda.kernel(Path("another file.cu"), "f", {}, 128, 0) == "f"
    assert (len(asked), freed) == (4, [1, 3])


class Driver:
    """cuLaunchKernelEx: keeps what it is handed, as the driver would read it."""

    def __init__(self, formats: Sequence[str] = "", code: int = 0) -> None:
        self.formats, self.code = formats, code
        self.seen: list[dict[str, Any]] = []

    def __call__(self, configuration: int, function: int, pointers: int, extra: None) -> int:
        assert extra is None
        c = _cuda._Configuration.from_address(configuration)
        places = (ctypes.c_void_p * max(len(self.formats), 1)).from_address(pointers)
        sizes = [struct.calcsize(f"={kind}") for kind in self.formats]
        values = [
            struct.unpack(f"={kind}", ctypes.string_at(place, size))[0]
            for kind, place, size in zip(self.formats, places, sizes, strict=False)
        ]
        self.seen.append(
            {
                "function": function,
                "grid": (c.grid_x, c.grid_y, c.grid_z),
                "block": (c.block_x, c.block_y, c.block_z),
                "shared": c.shared,
                "stream": c.stream,
                "attributes": [(a.kind, tuple(a.value.numbers[:3])) for a in c.attributes[: c.count]],
                "values": values,
                "thread": threading.current_thread().name,
            }
        )
        return self.code


def made_kernel(monkeypatch: pytest.MonkeyPatch, driver: Driver, **options: Any) -> Any:
    monkeypatch.setattr(_cuda, "_core", Compiler)
    monkeypatch.setattr(_cuda, "_thread", threading.local())
    monkeypatch.setattr(_cuda, "_stream_handle", lambda: 1234)
    monkeypatch.setattr(_cuda, "_launcher", lambda: driver)
    return _cuda.Kernel(types.SimpleNamespace(handle=77), 128, **{"shared": 0, **options})


def test_what_a_launch_hands_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("QQiqdfi")
    kernel = made_kernel(monkeypatch, driver, shared=1024)
    tensor = torch.ones(3)
    for last in (-5, 6):
        kernel(
            (3, 2, 1), tensor[1:], None, _cuda.i32(last), 2**40, 0.1, ctypes.c_float(0.1), _cuda.i32(2**31 - 1)
        )  # fmt: skip
    single = struct.unpack("=f", struct.pack("=f", 0.1))[0]
    expected = [tensor.data_ptr() + 4, 0, -5, 2**40, 0.1, single, 2**31 - 1]
    assert driver.seen[0]["values"] == expected
    assert driver.seen[1]["values"] == [*expected[:2], 6, *expected[3:]]
    first = driver.seen[0]
    assert (first["function"], first["grid"], first["block"]) == (77, (3, 2, 1), (128, 1, 1))
    assert (first["shared"], first["stream"], first["attributes"]) == (1024, 1234, [])


def test_a_launch_hands_structures_over_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A structure has its own size; what comes after it still begins at its own place."""
    driver = Driver(["128s", "i", "20s", "q"])
    kernel = made_kernel(monkeypatch, driver)
    for turn in range(2):
        kernel((1, 1, 1), bytes([turn]) * 128, _cuda.i32(-7), b"x" * 20, 2**40 + turn)
    assert [seen["values"] for seen in driver.seen] == [
        [bytes([turn]) * 128, -7, b"x" * 20, 2**40 + turn] for turn in range(2)
    ]


def test_a_rehearsal_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("q")
    kernel = made_kernel(monkeypatch, driver)
    with _cuda.rehearsal():
        with _cuda.rehearsal():
            kernel((1, 1, 1), 5)
        kernel((1, 1, 1), 5)
        others = threading.Thread(target=kernel, args=((1, 1, 1), 6))
        others.start()
        others.join()
    assert [seen["values"] for seen in driver.seen] == [[6]], "another thread's launch is no rehearsal"
    with contextlib.suppress(ZeroDivisionError), _cuda.rehearsal():
        raise ZeroDivisionError
    kernel((1, 1, 1), 7)
    assert [seen["values"] for seen in driver.seen] == [[6], [7]]


def test_a_launch_of_clusters_a_cooperative_one_and_one_that_begins_early(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    made_kernel(monkeypatch, driver, cluster=8)((3, 2, 1))
    assert driver.seen[0]["grid"] == (24, 2, 1), "the grid counts clusters"
    assert driver.seen[0]["attributes"] == [(4, (8, 1, 1))]
    made_kernel(monkeypatch, driver, cooperative=True)((3, 2, 1))
    assert (driver.seen[1]["grid"], driver.seen[1]["attributes"]) == ((3, 2, 1), [(2, (1, 0, 0))])
    made_kernel(monkeypatch, driver, early=True)((3, 2, 1))
    assert driver.seen[2]["attributes"] == [(6, (1, 0, 0))]


def test_a_launch_that_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_error_name", lambda code: {1: "CUDA_ERROR_INVALID_VALUE"}[code])
    kernel = made_kernel(monkeypatch, Driver(code=1))
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_INVALID_VALUE; grid \(0, 1, 1\), 128 threads"):
        kernel((0, 1, 1))


def test_threads_launch_one_kernel_each_with_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is called without the interpreter's lock, so another thread fills arguments meanwhile."""
    met = threading.Barrier(2)

    class Slow(Driver):
        def __call__(self, *arguments: Any) -> int:
            met.wait(10)  # both have filled theirs
            return super().__call__(*arguments)

    driver = Slow("q")
    kernel = made_kernel(monkeypatch, driver)
    threads = [threading.Thread(target=kernel, args=((1, 1, 1), number), name=str(number)) for number in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {seen["thread"]: seen["values"] for seen in driver.seen} == {"5": [5], "6": [6]}


def test_a_kernel_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(_cuda, "_kernels", {})
    monkeypatch.setattr(_cuda, "_function", lambda *facts: made.append(facts) or object())
    file = Path("scan.cu")
    first = _cuda.kernel(file, "forward", {"N": 16, "G": 1}, 128, 0)
    assert _cuda.kernel(file, "forward", {"N": 16, "G": 1}, 128, 0) is first
    others = [
        _cuda.kernel(file, "forward", {"N": 17, "G": 1}, 128, 0),
        _cuda.kernel(file, "backward", {"N": 16, "G": 1}, 128, 0),
        _cuda.kernel(file, "forward", {"N": 16, "G": 1}, 256, 0),
        _cuda.kernel(file, "forward", {"N": 16, "G": 1}, 128, 1),
        _cuda.kernel(file, "forward", {"N": 16, "G": 1}, 128, 0, shared=1),
        _cuda.kernel(file, "forward", {"N": 16, "G": 1}, 128, 0, cluster=2),
        _cuda.kernel(file, "forward", {"N": 16, "G": 1}, 128, 0, early=True),
        _cuda.kernel(file, "forward", {"N": 16, "G": 1}, 128, 0, specific=True),
    ]
    assert len({id(one) for one in (first, *others)}) == len(made) == 9
    assert made[0] == ("scan.cu", "forward", ("G=1", "N=16"), 128, 0, 0, False, 1, False, False)


def test_a_kernel_of_one_architecture_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_cuda, "_core", Compiler)
    monkeypatch.setattr(_cuda, "_cached", lambda source, options, arch: asked.append(arch) or b"cubin")
    for specific in (False, True):
        _cuda._module.__wrapped__(str(_cuda._COMMON), ("ONE=1",), 0, specific)
    assert asked == ["sm_90", "sm_90a"]


def test_a_thread_without_a_context_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """autograd's thread may launch a kernel that another thread made, before torch has called the driver there."""
    events: list[str] = []

    class Core(Compiler):
        def Device(self, number: int) -> Any:
            name = threading.current_thread().name
            return types.SimpleNamespace(set_current=lambda: events.append(f"device {number} in {name}"))

    def launch(*_: Any) -> int:
        events.append(f"launch in {threading.current_thread().name}")
        return 0

    kernel = made_kernel(monkeypatch, Driver())
    kernel._core, kernel._launch = Core(), launch
    for name in ("first", "second"):
        thread = threading.Thread(target=lambda: [kernel((1, 1, 1)), kernel((1, 1, 1))], name=name)
        thread.start()
        thread.join()
    assert events == [f"{what} in {name}" for name in ("first", "second") for what in ("device 0", "launch", "launch")]


@pytest.mark.parametrize("packed", [False, True])
def test_plan_of_the_backward_on_an_h100(packed: bool) -> None:
    """Two blocks fit a multiprocessor, with room for a whole tile's sums; a long row is cut into four rounds
    of blocks."""
    room = 113 * 1024
    full = backend.plan(8, 2048, 2048, 16, 1, 132, False, packed, False, room)
    assert (full.parts, full.chunks_backward) == (full.tile // full.history, 1)
    assert full.shared <= room
    assert 4 * (full.shared_ends + 1024) <= 2 * room
    long = backend.plan(1, 65536, 2048, 16, 1, 132, False, packed, False, room)
    assert (long.chunks_backward, long.chunk_len_backward) == (33, 2016)
    # the forward's first pass cuts such chunks again, where no packed sequence may begin within one
    assert (long.chunks_forward, long.pieces_forward) == (16, 1 if packed else 3)
    assert long.chunk_len_forward == (4096 if packed else 3 * 1376)
    short = backend.plan(1, 2048, 1536, 16, 1, 132, False, packed, False, room)
    assert (short.chunks_backward, short.chunk_len_backward) == (11, 192)


@pytest.mark.parametrize(
    ("batch", "length", "d_inner", "groups", "halves"),
    [
        (8, 2048, 2048, 1, True),  # 256 blocks, 264 have room
        (8, 2048, 4096, 1, True),  # 512: a second round of 248
        (16, 2048, 1536, 1, False),  # 384: of 120, each alone on a multiprocessor
        (1, 65536, 2048, 1, True),  # four rounds of 264
        (4, 2048, 2048, 1, False),  # 128, alone
        (8, 2048, 2112, 1, False),  # 33 pieces of 64 channels are no twos
        (8, 2048, 2048, 2, True),
        (8, 2048, 2048, 32, False),  # a group has one
    ],
)
def test_blocks_of_the_backward_in_twos_on_an_h100(
    batch: int, length: int, d_inner: int, groups: int, halves: bool
) -> None:
    sizes = (batch, length, d_inner, 16, groups, 132, False, False)
    assert backend.plan(*sizes, False, 113 * 1024, 227 * 1024).halves is halves
    # not where rows are to be the same in any batch, nor where a block has no more room than two have
    assert not backend.plan(*sizes, True, 113 * 1024, 227 * 1024).halves
    assert not backend.plan(*sizes, False, 113 * 1024, 163 * 1024).halves


@pytest.mark.parametrize(
    ("d_state", "packed", "halves"),
    [(8, False, True), (16, False, True), (16, True, False), (5, False, False), (32, False, False), (64, False, False)],
)
def test_states_and_packed_rows_that_come_in_twos(d_state: int, packed: bool, halves: bool) -> None:
    sizes = (8, 2048, 2048, d_state, 1, 132, False, packed, False, 113 * 1024, 227 * 1024)
    assert backend.plan(*sizes).halves is halves


def test_the_form_that_may_come_in_halves() -> None:
    form = {"IN": 1, "HASZ": 1, "VEC": 1, "VECB": 1, "FIXB": 0, "FIXC": 0}
    assert backend._tuned(form)
    for name, other in (("IN", 0), ("IN", 2), ("HASZ", 0), ("VEC", 0), ("VECB", 0), ("FIXB", 1), ("FIXC", 1)):
        assert not backend._tuned({**form, name: other}), name


def test_shared_memory_of_a_block_of_two_halves() -> None:
    """By hand, as structs Shared and Ring of scan_backward.cu have it: the host asks for it, and an H100 has it."""
    slots, staged, per_channel = 32 * 64 * 16, 2 * 32 * 16 * 4, 2 * 64 * 4
    history, parts, shares, dA, ones = 4 * 256 * 16, 4 * 8 * 8 * 2 * 16 * 4, 4 * 256 * 16, 2 * 256 * 16, 4 * 16
    half = slots + staged + per_channel + history + parts + shares + dA + ones + 3 * 17 * 8
    p = backend.plan(8, 2048, 2048, 16, 1, 132, False, False, False, 113 * 1024, 227 * 1024)
    assert p.halves
    asked = backend._shared_of_two(p.shared, p.threads_backward)
    assert 2 * (half + -half % 16) + 2 * 256 * 16 <= asked <= 227 * 1024


@pytest.mark.parametrize(
    ("batch", "d_inner", "dtype", "d_state", "more", "told"),
    [
        (8, 2048, torch.bfloat16, 16, {}, True),
        (8, 2048, torch.float32, 16, {}, False),
        (8, 2048, torch.bfloat16, 24, {}, False),
        (8, 2048, torch.bfloat16, 32, {}, False),
        (8, 130, torch.bfloat16, 16, {}, False),
        (200, 32, torch.bfloat16, 16, {}, False),
        (16, 1536, torch.bfloat16, 16, {}, False),
        (8, 2048, torch.bfloat16, 16, {"packed": True}, False),
    ],
)
def test_explain_tells_of_blocks_in_twos(
    batch: int, d_inner: int, dtype: torch.dtype, d_state: int, more: dict[str, bool], told: bool
) -> None:
    facts = Facts("cuda", dtype, d_state=d_state)
    text = backend.describe(facts, batch, 2048, d_inner, multiprocessors=132, **more)
    assert ("two blocks of the backward are one" in text) is told


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("d_state", [1, 8, 16, 64])
@pytest.mark.parametrize("length", [1, 511, 1024, 2048, 16383, 16384, 65536])
def test_an_invariant_plan_is_the_lengths_alone(length: int, d_state: int, wide: bool) -> None:
    """Whatever rows the batch holds and whatever GPU they are on, with batch_invariant=True time is cut the same way
    and a channel has as many lanes: these settle the order in which a row's own numbers are added."""
    for d_inner in (64, 2048):
        plans = {
            backend.plan(batch, length, d_inner, d_state, 1, multiprocessors, wide, False, True)
            for batch in (1, 2, 3, 8, 64, 1024)
            for multiprocessors in (16, 132)
        }
        assert len(plans) == 1


def test_other_plans_look_at_the_batch() -> None:
    """Each of these numbers moves with the batch where nothing else is asked for, so the test above can fail by it."""
    for field, length, batches in (
        ("lanes_forward", 2048, (1, 64)),
        ("threads_forward", 2048, (1, 64)),
        ("chunks_forward", 2048, (1, 64)),
        ("chunk_len_forward", 2048, (1, 64)),
        ("chunks_backward", 2048, (1, 64)),
        ("chunk_len_backward", 65536, (1, 2)),
    ):
        few, many = (backend.plan(batch, length, 2048, 16, 1, 132, False, False) for batch in batches)
        assert getattr(few, field) != getattr(many, field), field
