"""A decoding step's own products: which rows and shapes they take, what they refuse, what a launch is handed. No GPU is
needed: tests/gpu/test_decoder.py runs them."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from statescan.ops import _cuda
from statescan.ops.mamba_step import projection
from statescan.ops.mamba_step.projection import Projection, pays, refuses_projection

H100 = 132  # multiprocessors


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=H100))


def matrix(outputs: int, columns: int, **facts: Any) -> Any:
    """A weight as far as a refusal looks at it."""
    known = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "address": 4096, "contiguous": True, **facts}
    return SimpleNamespace(
        device=known["device"],
        dtype=known["dtype"],
        shape=torch.Size((outputs, columns)),
        data_ptr=lambda: known["address"],
        is_contiguous=lambda: known["contiguous"],
    )


@pytest.mark.parametrize(
    ("d_model", "rows"), [(2048, range(64, 129)), (768, range(0)), (1024, range(0)), (1536, range(0))]
)
def test_rows_that_it_pays_for(d_model: int, rows: range) -> None:
    """At 1.4b's width both products take 128 blocks; at 130m's, 370m's and 790m's too few for what the memory gives."""
    for outputs, parts in ((4 * d_model, 1), (d_model, 4)):
        assert [n for n in range(1, 300) if pays(n, outputs, parts, H100)] == list(rows)


def test_what_it_takes() -> None:
    good = matrix(8192, 2048)
    assert refuses_projection([good, good], 1) is None
    assert refuses_projection([matrix(2048, 4096, dtype=torch.float16)], 4) is None
    assert refuses_projection([matrix(64 * H100, 64)], 1) is None


@pytest.mark.parametrize(
    ("weight", "parts", "text"),
    [
        (matrix(8192, 2048, device=torch.device("cpu")), 1, "the weights are on 'cpu'"),
        (matrix(8192, 2048, dtype=torch.float32), 1, "takes bfloat16 or float16, the weights are float32"),
        (matrix(96, 2048), 1, "takes 64 outputs and 64 columns at a time, they are 96 and 2048"),
        (matrix(2048, 4096), 3, "and 192 columns at a time"),
        (matrix(64 * (H100 + 1), 64), 1, "its 133 blocks would take turns on 132 multiprocessors"),
        (matrix(2048, 4096), 5, "and 320 columns at a time"),
        (matrix(10240, 2560), 1, "its 160 blocks"),
        (matrix(8192, 2048, address=4104), 1, "pass clones of them"),
        (matrix(8192, 2048, contiguous=False), 1, "pass clones of them"),
    ],
)
def test_what_it_refuses(weight: Any, parts: int, text: str) -> None:
    assert text in str(refuses_projection([weight], parts))


def test_a_later_weight_is_looked_at_too() -> None:
    assert "one weight" in str(refuses_projection([matrix(8192, 2048), matrix(8192, 2048, address=8)], 1))


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_other_architectures(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert "of compute capability 9.0 alone" in str(refuses_projection([matrix(8192, 2048)], 1))


def test_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "unavailable_reason", lambda: "no compiler here")
    assert refuses_projection([matrix(8192, 2048)], 1) == "no compiler here"


class Encoder:
    """cuTensorMapEncodeTiled: keeps what it is asked for, and writes a map that tells which call made it."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.seen: list[dict[str, Any]] = []

    def __call__(
        self, to: Any, kind: Any, rank: Any, address: Any, sizes: Any, strides: Any, box: Any, *rest: Any
    ) -> int:
        assert to.value % 64 == 0
        self.seen.append(
            {
                "kind": kind.value,
                "rank": rank.value,
                "address": address.value,
                "sizes": list(sizes),
                "strides": list(strides),
                "box": list(box),
                "rest": [list(rest[0]), *(one.value for one in rest[1:])],
            }
        )
        ctypes.memset(to.value, len(self.seen), 128)
        return self.code


@pytest.mark.parametrize(("rows", "most"), [(1, 64), (64, 64), (65, 128), (128, 128)])
@pytest.mark.parametrize("parts", [1, 4])
def test_what_a_launch_is_handed(parts: int, rows: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, launches = Encoder(), []

    def kernel(file: Any, name: str, options: dict[str, int], threads: int, device: int, **facts: Any) -> Any:
        assert file.name == "projection.cu"
        assert f'extern "C" __global__ void __launch_bounds__({threads}, 1) {name}(' in file.read_text()
        return lambda grid, *arguments: launches.append((options, facts, grid, arguments))

    monkeypatch.setattr(projection, "_encoder", lambda: encoder)
    monkeypatch.setattr(_cuda, "kernel", kernel)
    weights = [torch.zeros(256, 512, dtype=torch.bfloat16) for _ in range(2)]
    run = Projection(weights, parts)
    x, bias = torch.zeros(rows, 512, dtype=torch.bfloat16), torch.zeros(256)
    y = run(1, x, bias)
    assert y.shape == ((rows, 256) if parts == 1 else (parts, rows, 256))
    assert y.dtype == torch.bfloat16
    for tensor, height, seen in zip((*weights, x), (64, 64, most), encoder.seen, strict=True):
        assert seen["address"] == tensor.data_ptr()
        assert (seen["kind"], seen["rank"], seen["sizes"]) == (9, 2, [512, tensor.shape[0]])
        assert (seen["strides"], seen["box"]) == ([1024], [64, height])
        assert seen["rest"] == [[1, 1], 0, 3, 3, 0]
    ((options, facts, grid, arguments),) = launches
    assert options == {"IN": 1, "NR": most, "KP": 512 // parts, "STAGES": 8}
    assert facts == {"shared": 8 * ((64 + most) * 128 + 16), "early": True, "specific": True}
    assert facts["shared"] <= 227 * 1024
    assert grid == (4, parts, 1)
    assert arguments[:2] == (bytes([2]) * 128, bytes([3]) * 128)
    assert arguments[2] is bias
    assert arguments[3] is y
    assert [one.value for one in arguments[4:]] == [rows, 256]


def test_a_map_that_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "_encoder", lambda: Encoder(code=1))
    with pytest.raises(RuntimeError, match=r"refuses a tensor map of \(128, 64\) \(CUDA error 1\)"):
        Projection([torch.zeros(128, 64, dtype=torch.float16)])
