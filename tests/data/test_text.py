import gzip
import io
import json
import lzma
import random
import tarfile

import pytest

from statescan.data import find_sources, packaged_corpus, read_chunks, read_texts
from statescan.data.text import Source
from statescan.errors import DataError

zstandard = pytest.importorskip("zstandard")


def contents(*args, **kwargs):
    return [document.content for document in read_texts(*args, **kwargs)]


def test_files_of_every_kind_give_the_bytes_that_went_in(tmp_path):
    text = "Größe, 大きさ\n".encode() + bytes(range(256)) * 50
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.md").write_bytes(text)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "d.txt.xz").write_bytes(lzma.compress(text))
    (tmp_path / "e.txt.zst").write_bytes(zstandard.compress(text))
    # Several frames in one file are what `cat a.zst b.zst` and parallel compressors leave.
    (tmp_path / "f.zst").write_bytes(zstandard.compress(text[:99]) + zstandard.compress(text[99:]))
    for name in ("a.txt", "b.md", "c.txt.gz", "d.txt.xz", "e.txt.zst", "f.zst"):
        assert contents(tmp_path / name) == [text], name


def test_json_lines_give_one_document_a_line(tmp_path):
    lines = [{"text": "one\n", "body": "x"}, {"text": "", "body": "y"}, {"text": "drei \ud83d", "body": "z"}]
    packed = "\n\n".join(json.dumps(line) for line in lines).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(packed)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(packed))
    for name in ("a.jsonl", "b.jsonl.zst"):
        assert contents(tmp_path / name) == [b"one\n", b"", "drei \ufffd".encode()]
        assert contents(tmp_path / name, field="body") == [b"x", b"y", b"z"]
    assert [document.source for document in read_texts(tmp_path / "a.jsonl")][1] == f"{tmp_path / 'a.jsonl'}:3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 1}', "wanted a string in the field 'text', got int"),
        (b'{"body": "x"}', "wanted the field 'text', got 'body'; name the field"),
        (b"[1]", "wanted a JSON object, got list"),
        (b'{"text": ', "wanted one JSON object a line"),
        (b'{"text": "\xff"}', "wanted one JSON object a line"),
    ],
)
def test_bad_json_lines_name_the_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as raised:
        contents(path)
    assert f"{path}:2" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_folders_are_read_in_sorted_order_without_hidden_and_binary_files(tmp_path):
    for name, content in [
        ("b/z.txt", b"3"),
        ("b/a.txt", b"2"),
        ("a.txt", b"1"),
        (".git/x.txt", b"hidden"),
        (".hidden", b"hidden"),
        ("c.png", b"\x89PNG\0\0"),
        ("d.unknown", b"4"),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    skipped = []
    assert contents(tmp_path, skipped=skipped) == [b"1", b"2", b"3", b"4"]
    assert skipped == [str(tmp_path / "c.png")]
    assert contents(tmp_path / "c.png") == [b"\x89PNG\0\0"], "a file named by itself is read whatever it holds"


def test_globs_and_repeats(tmp_path):
    for name in ("a.txt", "b.txt", "c.md", "deep/down/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert contents(str(tmp_path / "*.txt")) == [b"a.txt", b"b.txt"]
    assert contents(str(tmp_path / "**" / "*.txt")) == [b"a.txt", b"b.txt", b"deep/down/d.txt"]
    assert contents([tmp_path / "b.txt", str(tmp_path / "*.txt"), tmp_path / "c.md"]) == [b"b.txt", b"a.txt", b"c.md"]


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".txz", "w:xz"), (".tar.zst", "w")])
def test_tars_give_their_files(tmp_path, suffix, mode):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        members = [("x/b.txt", b"one"), ("x/a.jsonl", b'{"text": "two"}\n{"text": "three"}'), ("x/.c", b"hidden")]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    content = zstandard.compress(packed.getvalue()) if suffix.endswith(".zst") else packed.getvalue()
    (tmp_path / f"a{suffix}").write_bytes(content)
    documents = list(read_texts(tmp_path / f"a{suffix}"))
    assert [document.content for document in documents] == [b"one", b"two", b"three"]
    assert documents[0].source == f"{tmp_path / f'a{suffix}'}:x/b.txt"


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("text", ["ab\ncdé大🙂" * 9, "é大🙂" * 20, "\n\n\n", "x"])
def test_chunks_put_together_are_the_document_and_never_cut_a_character(tmp_path, chunk_bytes, text):
    (tmp_path / "a.txt").write_bytes(text.encode())
    chunks = list(read_chunks([Source(tmp_path / "a.txt")], chunk_bytes=chunk_bytes))
    assert b"".join(chunk.content for chunk in chunks) == text.encode()
    assert [chunk.starts_document for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    if chunk_bytes >= 7:
        assert "".join(chunk.text() for chunk in chunks) == text
        assert max(len(chunk.content) for chunk in chunks) <= 2 * chunk_bytes


def test_invalid_utf8_passes_as_bytes_and_is_named_as_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good \xff bad")
    (document,) = read_texts(path)
    assert document.content == b"good \xff bad"
    assert document.text("replace") == "good \ufffd bad"
    with pytest.raises(DataError, match=r"wanted UTF-8, got the byte 0xff at offset 5; convert"):
        document.text()
    chunks = list(read_chunks([Source(path)], chunk_bytes=4))
    with pytest.raises(DataError, match="at offset 5;"):
        [chunk.text() for chunk in chunks]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".tar", ".tar.gz"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_archives_are_named(tmp_path, suffix, damage):
    text = random.Random(0).randbytes(200_000)
    packed = text
    if ".tar" in suffix:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo("a.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.replace(b"\0", b"x")))
        packed = buffer.getvalue()
    if suffix == ".tar" and damage == "flipped":
        packed = packed[:150] + b"z" + packed[151:]  # in the header, whose checksum tells; content has none in a tar
    compress = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }
    packed = compress.get("." + suffix.rsplit(".", 1)[1], bytes)(packed)
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif suffix != ".tar":
        middle = len(packed) // 2
        packed = packed[:middle] + bytes([packed[middle] ^ 0x10]) + packed[middle + 1 :]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed)
    with pytest.raises(DataError, match="wanted a whole file, got one that is cut short or damaged") as raised:
        contents(path)
    assert str(path) in str(raised.value)


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for entry, message in [
        (tmp_path / "none.txt", "does not exist"),
        (tmp_path / "empty", "wanted a folder with text files"),
        (str(tmp_path / "*.txt"), "wanted files matching"),
        ("packaged:ulysses", "wanted one of the packaged texts"),
    ]:
        with pytest.raises(DataError, match=message):
            find_sources(entry)
    with pytest.raises(DataError, match="got none; name a text"):
        find_sources([])


def test_packaged_corpus_is_about_a_megabyte_of_utf8_and_a_source_too():
    text = packaged_corpus()
    assert text.startswith("CHAPTER 1. Loomings.")
    assert 1_000_000 < len(text.encode()) < 1_500_000
    assert contents("packaged:moby_dick") == [text.encode()]
