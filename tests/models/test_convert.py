"""`convert`: nothing under the final name before it is whole, and no model in memory."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from statescan.checkpoint import LAYOUTS, open_weights
from statescan.errors import CheckpointError
from statescan.models import CausalLM, MambaConfig, convert

CONFIG = MambaConfig(d_model=8, n_layer=2, vocab_size=11)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    CausalLM(CONFIG).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def test_the_tokenizer_goes_along_and_an_empty_folder_is_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", "transformers")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_destination_in_use_is_left_alone(source: Path, tmp_path: Path) -> None:
    for name in ("folder", "file"):
        place = tmp_path / name
        (place.write_text if name == "file" else (lambda text, place=place: place.mkdir()))("x")
        if name == "folder":
            (place / "mine").write_text("x")
        with pytest.raises(CheckpointError, match="must be a new or empty folder"):
            convert(source, place, "statescan")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine"]
    with pytest.raises(CheckpointError, match="must be a new or empty folder"):
        convert(source, source, "transformers")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for writer in ("write_safetensors", "write_bin"):
        monkeypatch.setattr(f"statescan.checkpoint.folder.{writer}", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        convert(source, tmp_path / "new", layout)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


SLOW = """
import sys, time
import statescan.checkpoint.folder as folder
from statescan.models import convert
whole = folder.write_safetensors
def slow(path, tensors):
    whole(path, tensors)
    print("written", flush=True)
    time.sleep(60)
folder.write_safetensors = slow
convert(sys.argv[1], sys.argv[2], "transformers")
"""


def test_a_killed_conversion_never_takes_the_name(source: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-c", SLOW, str(source), str(tmp_path / "new")]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    assert not (tmp_path / "new").exists()
    convert(source, tmp_path / "new", "transformers")  # what it left is in nobody's way
    assert CausalLM.from_pretrained(tmp_path / "new").config == CONFIG


MEMORY = """
import sys, threading, time
import torch
from statescan.models import convert
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024
peak, going = 0.0, True
def watch():
    global peak
    while going:
        peak = max(peak, anonymous())
        time.sleep(0.002)
convert(sys.argv[1], sys.argv[2] + "-first", sys.argv[3])  # what is loaded once
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
convert(sys.argv[1], sys.argv[2], sys.argv[3], shard_bytes=40_000_000)
going = False
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize(("layout", "to"), [("statescan", "transformers"), ("state-spaces", "statescan")])
def test_a_model_goes_through_a_map_and_not_through_memory(tmp_path: Path, layout: str, to: str) -> None:
    config = MambaConfig(d_model=512, n_layer=14, vocab_size=8192)
    CausalLM(config).save_pretrained(tmp_path / "from", layout)
    run = [sys.executable, "-c", MEMORY, str(tmp_path / "from"), str(tmp_path / "to"), to]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "to").iterdir()) / 2**20
    assert size > 100
    assert float(done.stdout) < 40  # MiB: about a shard of the hundred and more
    assert len(list((tmp_path / "to").glob("model-*.safetensors"))) >= 3
    assert set(open_weights(tmp_path / "to").specs)
