"""The HTML report holds what was measured, shows any text safely, and needs nothing from elsewhere."""

from __future__ import annotations

import base64
import errno
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from statescan.data import ByteTokenizer
from statescan.errors import CheckpointError
from statescan.inspect import InspectReport, inspect_text
from statescan.inspect.html import MEASURES, map_delta, measure
from statescan.inspect.page import PAGE
from statescan.models import CausalLM, MambaConfig

TEXT = 'a</script><b>&amp;"\u2028\n\t🐋 {{data}} $1 end\x01'


class Parts(HTMLParser):
    """Tags with their attributes, and the text of script and style elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.raw: list[tuple[dict, str]] = []
        self._inside: dict | None = None

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs) if tag in {"script", "style"} else None

    def handle_data(self, data):
        if self._inside is not None:
            self.raw.append((self._inside, data))
            self._inside = None


@pytest.fixture(scope="module")
def report() -> InspectReport:
    torch.manual_seed(0)
    model = CausalLM(MambaConfig(d_model=32, n_layer=3, vocab_size=256))
    return inspect_text(model, ByteTokenizer(), TEXT, max_layers=2, title="a <title> & more")


@pytest.fixture(scope="module")
def page(report, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.save_html(path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parts(page) -> Parts:
    parser = Parts()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def data(parts) -> dict:
    return json.loads(next(text for attrs, text in parts.raw if attrs.get("id") == "data"))


def test_nothing_is_loaded_from_elsewhere(page, parts):
    assert not [tag for tag, _ in parts.tags if tag in {"link", "img", "iframe", "object", "embed", "base"}]
    assert not [attrs for _, attrs in parts.tags if {"src", "href"} & set(attrs)]
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", page)


def test_any_text_is_data_and_never_markup(parts, data):
    assert "".join(data["pieces"]) == TEXT
    assert len([tag for tag, _ in parts.tags if tag == "script"]) == 2
    assert not [tag for tag, _ in parts.tags if tag == "b"]


def test_title_and_notes_are_escaped_and_said(page):
    assert "a &lt;title&gt; &amp; more" in page
    assert "The model has 3 layers; shown are 2 of them" in page


def test_numbers_are_those_of_the_report(report, data):
    assert [one["layer"] for one in data["layers"]] == [one.layer for one in report.layers]
    for drawn, one in zip(data["layers"], report.layers, strict=True):
        for name, *_ in MEASURES:
            np.testing.assert_allclose(drawn["values"][name], measure(one, name), rtol=1e-3)
        assert drawn["open"] == np.nonzero(np.isinf(one.remembered))[0].tolist()
        np.testing.assert_allclose(drawn["share"], one.share, rtol=1e-3)
    assert data["bits"][0] is None
    np.testing.assert_allclose(data["bits"][1:], report.bits[1:], rtol=1e-3)


def test_what_is_not_forgotten_is_drawn_as_long_as_the_text_allows(report):
    one = report.layers[0]
    endless = np.isinf(one.remembered)
    assert endless[-1]
    drawn = measure(one, "remembered")
    assert np.isfinite(drawn).all()
    assert (drawn[endless] == (len(drawn) - np.arange(len(drawn)))[endless]).all()
    assert (drawn[~endless] == one.remembered[~endless]).all()


def test_the_channel_map_is_the_matrix(report, data):
    picture = data["map"]["delta"]
    pixels = np.frombuffer(base64.b64decode(picture["data"]), np.uint8).reshape(picture["rows"], picture["columns"])
    wanted = map_delta(report.channels)
    reach = max(np.percentile(np.abs(wanted), 99), 1e-3)
    np.testing.assert_allclose(pixels / 255, np.clip(wanted / (2 * reach) + 0.5, 0, 1), atol=0.5 / 255 + 1e-9)


def test_a_failed_write_leaves_the_old_file(report, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / ".report.html.tmp"))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(CheckpointError, match=r"/report.html: No space left.* is unharmed; free some space") as raised:
        report.save_html(path)
    assert ".tmp" not in str(raised.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
def test_numbers_of_the_page_are_short_at_any_size() -> None:
    function = re.search(r"^function number\(v\) \{.*?^\}$", PAGE, re.MULTILINE | re.DOTALL)
    assert function is not None
    values = [0, 1.93e13, 1048576, 999_999, 42.31, 0.5, 0.0123, 1.4e-11]
    script = f"{function[0]}\nconsole.log(JSON.stringify({values}.map(number)));"
    ran = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == ["0", "1.9e13", "1.0e6", "999999", "42.3", "0.500", "0.0123", "1.4e−11"]
