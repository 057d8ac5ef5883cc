"""Model folders: bit-equal round trips, and every way a file can be wrong: one clear line each, and no harm done."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from statescan.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    atomic_file,
    load_config,
    load_tensors,
    save_folder,
    tensor_shapes,
)
from statescan.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 4),
        "b.c": torch.randn(5).bfloat16(),
        "whole numbers": torch.arange(6),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


def as_wanted(given: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in given.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(caught: pytest.ExceptionInfo[CheckpointError], *words: str) -> None:
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_round_trip_to_the_bit(tmp_path: Path) -> None:
    given = tensors()
    save_folder(tmp_path / "new" / "folder", {"x": 1, "y": [1.5, None]}, given)
    folder = tmp_path / "new" / "folder"
    assert sorted(contents(folder)) == [CONFIG_FILE, WEIGHTS_FILE]
    assert load_config(folder) == {"x": 1, "y": [1.5, None]}
    back = load_tensors(folder, as_wanted(given))
    assert {name: tensor.dtype for name, tensor in back.items()} == {n: t.dtype for n, t in given.items()}
    assert all(torch.equal(back[name], given[name]) for name in given)
    assert tensor_shapes(folder) == {name: tuple(tensor.shape) for name, tensor in given.items()}
    half = load_tensors(folder, {**as_wanted(given), "a": ((3, 4), torch.bfloat16)})
    assert torch.equal(half["a"], given["a"].bfloat16())


def test_other_tools_read_it(tmp_path: Path) -> None:
    save_folder(tmp_path, {}, tensors())
    back = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    assert torch.equal(back["a"], tensors()["a"])


def test_shared_and_partial_storage(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    given = {"x": base.view(3, 4), "y": base.view(3, 4), "part": base[2:5], "turned": base.view(3, 4).T}
    save_folder(tmp_path, {}, given)
    back = load_tensors(tmp_path, as_wanted(given))
    assert all(torch.equal(back[name], given[name]) for name in given)


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    given = tensors()
    save_folder(tmp_path, {}, given)
    back = load_tensors(tmp_path, as_wanted(given))
    with open(tmp_path / WEIGHTS_FILE, "r+b") as file:
        file.truncate(0)
    assert torch.equal(back["a"], given["a"])


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 60, -1])
def test_cut_short(tmp_path: Path, keep: int) -> None:
    save_folder(tmp_path, {}, tensors())
    path = tmp_path / WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(CheckpointError) as caught:
        load_tensors(tmp_path, as_wanted(tensors()))
    one_line(caught, str(path), "cut short", "bytes", "copy it again")
    with pytest.raises(CheckpointError):
        tensor_shapes(tmp_path)


def test_mismatches_are_named_before_anything_is_read(tmp_path: Path) -> None:
    save_folder(tmp_path, {}, tensors())
    wanted = as_wanted(tensors())
    with pytest.raises(CheckpointError) as caught:
        load_tensors(tmp_path, {**wanted, "a": ((4, 3), torch.float32)})
    one_line(caught, "a must have shape (4, 3), got (3, 4)", "another configuration")
    with pytest.raises(CheckpointError) as caught:
        load_tensors(tmp_path, {**wanted, **{f"d{i}": ((1,), torch.float32) for i in range(5)}})
    one_line(caught, "lacks d0, d1, d2 and 2 more")
    with pytest.raises(CheckpointError) as caught:
        load_tensors(tmp_path, {name: wanted[name] for name in wanted if name != "a"})
    one_line(caught, "holds a, which the model does not have")


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path / "nowhere")
    one_line(caught, "must be a folder", "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path / "file")
    one_line(caught, "a file")
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path)
    one_line(caught, f"has no {CONFIG_FILE}")
    with pytest.raises(CheckpointError) as caught:
        load_tensors(tmp_path, {})
    one_line(caught, f"has no {WEIGHTS_FILE}")
    for text, word in (('{"a": ', "not JSON"), ("[1]", "JSON object, got list"), ("\udcff", "not JSON")):
        (tmp_path / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError) as caught:
            load_config(tmp_path)
        one_line(caught, word)


def test_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path, {"old": True}, tensors())
    before = contents(tmp_path)

    def full(*args: object, **named: object) -> None:
        Path(str(args[0])).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("statescan.checkpoint.folder.write_safetensors", full)
    with pytest.raises(CheckpointError) as caught:
        save_folder(tmp_path, {"old": False}, tensors())
    one_line(caught, str(tmp_path / WEIGHTS_FILE), "No space left", "unharmed", "free some space")
    assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX")
def test_a_write_that_the_system_refuses_leaves_the_old_files(tmp_path: Path) -> None:
    save_folder(tmp_path, {"old": True}, tensors())
    before = contents(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, old[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            save_folder(tmp_path, {"old": False}, {"big": torch.zeros(200_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    one_line(caught, str(tmp_path / WEIGHTS_FILE), "unharmed", "file size limit")
    assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError) as caught:
            save_folder(tmp_path, {}, tensors())
    finally:
        tmp_path.chmod(0o700)
    one_line(caught, "Permission denied", "may write to")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError) as caught:
        save_folder(tmp_path / "file", {}, tensors())
    one_line(caught, "could not write")
    assert (tmp_path / "file").read_text() == "x"


def test_the_new_file_is_whole_when_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    with atomic_file(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert order[:2] == ["fsync", "replace"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert contents(tmp_path) == {"f": b"old"}


def test_config_is_readable_json(tmp_path: Path) -> None:
    save_folder(tmp_path, {"d_model": 8}, {})
    assert json.loads((tmp_path / CONFIG_FILE).read_text()) == {"d_model": 8}
