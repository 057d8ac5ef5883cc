"""The PNG is drawn for short, long and odd texts, and its text panel places every character."""

from __future__ import annotations

import struct
import sys

import pytest
import torch

from statescan.data import ByteTokenizer
from statescan.errors import MissingExtraError
from statescan.inspect import inspect_text
from statescan.inspect.picture import _COLUMNS, _LINES, _cells
from statescan.models import CausalLM, MambaConfig


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(MambaConfig(d_model=32, n_layer=2, vocab_size=256))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["a", "It cost $5 and $6.\n\ttab 🐋\x01", "the whale and the sea. " * 12])
def test_a_picture_is_written_without_warnings(model, text, tmp_path):
    path = tmp_path / "report.png"
    inspect_text(model, ByteTokenizer(), text).save_png(path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 600
    assert list(tmp_path.iterdir()) == [path]


def test_cells_wrap_and_break_lines():
    cells, lines = _cells(("a", "\n", "", "é", "x" * (_COLUMNS + 1)))
    assert cells[:4] == [(0, 0, 0, "a"), (0, 1, 1, "↵"), (1, 0, 2, "·"), (1, 1, 3, "é")]
    assert cells[-1][:3] == (2, 2, 4)
    assert lines == 3
    cells, lines = _cells(("y",) * (_COLUMNS * _LINES + 5))
    assert len(cells) == _COLUMNS * _LINES
    assert lines == _LINES


def test_without_matplotlib_the_cure_is_named(model, tmp_path, monkeypatch):
    report = inspect_text(model, ByteTokenizer(), "a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"statescan\[plot\]"):
        report.save_png(tmp_path / "x.png")
