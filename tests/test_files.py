"""The one writer of whole files: what its errors say, and what a killed process leaves behind."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from statescan.data import ByteTokenizer
from statescan.errors import CheckpointError
from statescan.files import atomic_file, is_leftover, make_folder, want_folder, write_json, write_text


def refused_file(path: Path, **options: bool) -> str:
    with pytest.raises(CheckpointError) as raised, atomic_file(path, **options) as temporary:
        temporary.write_text("new")
    return str(raised.value)


def test_errors_name_the_path_and_a_cure_and_never_the_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    cases = [
        (tmp_path / "none" / "x", "make it first"),
        (tmp_path / "file" / "x", "make it first"),
        (tmp_path / "folder", "name a file"),
        (tmp_path / ("x" * 300), "shorter name"),
    ]
    for path, cure in cases:
        text = refused_file(path, make_parents=False)
        assert text.startswith(f"save: could not write {path}: ")
        assert cure in text
        assert ".tmp" not in text
        assert "\n" not in text
    assert "name another folder" in refused_file(tmp_path / "file" / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    with pytest.raises(
        CheckpointError, match=re.escape(f"could not write {tmp_path / 'none' / 'x'}: there is no folder")
    ):
        want_folder(tmp_path / "none" / "x")
    want_folder(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"a folder stands there: name a file"):
        want_folder(tmp_path / "folder")


def test_the_old_file_stands_until_the_new_one_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of the change both are whole on the disk; where it fails, the old one still stands."""
    path = tmp_path / "file"
    path.write_text("old")
    replace, seen = os.replace, []

    def watched(source: Path, target: Path) -> None:
        seen.append((Path(source).read_text(), Path(target).read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with atomic_file(path) as temporary:
        temporary.write_text("new")
    assert seen == [("new", "old")]
    assert path.read_text() == "new"

    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "replace", refused)
    assert "unharmed" in refused_file(path)
    assert path.read_text() == "new"


def test_parents_are_made_where_that_is_wished(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a" / "b") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a" / "b").read_text() == "new"
    assert make_folder(tmp_path / "a" / "c" / "d").is_dir()
    assert make_folder(tmp_path / "a" / "c" / "d").is_dir()
    with pytest.raises(CheckpointError, match=r"could not make the folder .*/a/b: .*name another folder"):
        make_folder(tmp_path / "a" / "b")


def test_what_a_killed_process_left_is_known_by_its_name(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "log.csv") as temporary:
        temporary.write_text("")
        assert is_leftover(temporary.name)
    for name in ("log.csv", ".hidden", ".log.csv.tmp", "log.csv.1.0a1b2c3d.tmp"):
        assert not is_leftover(name)


def test_a_tokenizer_that_can_t_be_saved_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(_: int) -> None:
        raise full

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"could not write .*tokenizer.json: No space left.*; free some space"):
        ByteTokenizer().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_texts_and_json_are_written_whole_in_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "folder" / "a.txt", "Ω\n")
    assert (tmp_path / "folder" / "a.txt").read_bytes() == "Ω\n".encode().replace(b"\n", os.linesep.encode())
    for options, text in (({}, '{\n "a": [\n  1\n ]\n}\n'), ({"indent": None}, '{"a": [1]}\n')):
        write_json(tmp_path / "b.json", {"a": [1]}, **options)
        assert (tmp_path / "b.json").read_text(encoding="utf-8") == text
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", {"a": object()})
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == '{"a": [1]}\n'
    assert os.listdir(tmp_path / "folder") == ["a.txt"]
