import json
import os
import subprocess
import sys

import numpy as np
import pytest

from statescan.data import ByteTokenizer, TokenFile, build_token_file, load_tokenizer, tokens
from statescan.errors import DataError


class Words:
    """A tokenizer of a vocabulary above 65,536, to see 4-byte ids and the mark between documents."""

    name, fingerprint, vocab_size, end_of_text = "words", "words-1", 70_000, 69_999

    def encode(self, text):
        return np.array([int(word) for word in text.split()], np.uint32)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("1 2 3", "", "65536", "4 5")))
    return path


def test_ids_documents_and_facts(lines, tmp_path):
    file = build_token_file(lines, Words(), cache=tmp_path / "cache")
    assert file.tokens.dtype == np.uint32
    assert file.tokens.tolist() == [1, 2, 3, 69_999, 65_536, 69_999, 4, 5]
    assert file.document_offsets.tolist() == [0, 4, 6, 8]
    assert file.facts["bytes"] == len("1 2 3") + len("65536") + len("4 5")
    assert file.bytes_per_token == 13 / 8
    again = TokenFile(file.path)
    assert again.tokens.tolist() == file.tokens.tolist()
    with pytest.raises(ValueError, match="read-only"):
        file.tokens[0] = 9


def test_bytes_pass_through_whatever_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_bytes(b"")
    file = build_token_file([tmp_path / f"{name}.txt" for name in "acb"], cache=tmp_path / "cache")
    assert bytes(file.tokens) == bytes(range(256)) + b"\0" + b"\xff\xfe"
    assert file.document_offsets.tolist() == [0, 257, 259]


def test_documents_longer_than_a_chunk_are_one(tmp_path, monkeypatch):
    text = "".join(f"line {number}\n" for number in range(3000))
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(tokens, "read_chunks", lambda *a, **k: READ(*a, **k, chunk_bytes=100))
    file = build_token_file(tmp_path / "a.txt", cache=tmp_path / "cache")
    assert bytes(file.tokens).decode() == text
    assert file.document_offsets.tolist() == [0, len(text)]


READ = tokens.read_chunks


def test_built_once_and_anew_when_anything_changes(tmp_path, monkeypatch):
    source = tmp_path / "a.txt"
    source.write_text("one text")
    cache = tmp_path / "cache"
    first = build_token_file(source, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_write", lambda *a: pytest.fail("the corpus was read again"))
        assert build_token_file(source, cache=cache).path == first.path
    assert build_token_file(source, field="other", cache=cache).key != first.key
    source.write_text("another text")
    second = build_token_file(source, cache=cache)
    assert second.key != first.key
    assert second.digest != first.digest
    source.write_text("one text")
    os.utime(source, ns=(1, 1))
    third = build_token_file(source, cache=cache)
    assert third.key != first.key
    assert third.digest == first.digest


def test_a_damaged_file_is_refused_and_built_anew(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    file = build_token_file(tmp_path / "a.txt", cache=tmp_path / "cache")
    whole = file.path.read_bytes()
    for broken in (whole[:-1], whole[:30], b"", whole + b"x", b"x" * len(whole)):
        file.path.write_bytes(broken)
        with pytest.raises(DataError, match=r"cut short|which is none"):
            TokenFile(file.path)
        assert build_token_file(tmp_path / "a.txt", cache=tmp_path / "cache").path == file.path
        assert file.path.read_bytes() == whole


def test_a_failure_leaves_nothing_behind(tmp_path):
    cache = tmp_path / "cache"
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"wanted text, got none in .*a.txt; name files that hold some"):
        build_token_file(tmp_path / "a.txt", cache=cache)
    (tmp_path / "b.txt").write_bytes(b"good \xff")
    with pytest.raises(DataError, match="wanted UTF-8"):
        build_token_file(tmp_path / "b.txt", Words(), cache=cache)
    assert list(cache.iterdir()) == []
    with pytest.raises(DataError, match=r"can't be written .*STATESCAN_CACHE"):
        build_token_file(tmp_path / "b.txt", cache=tmp_path / "a.txt" / "below-a-file")


def test_a_full_disk_harms_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "a.txt").write_text("text " * 10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(DataError, match="can't be written"):
            build_token_file(tmp_path / "a.txt", cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_build_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("text of some length\n" * 100_000)
    script = (
        "import sys; from statescan.data import build_token_file;"
        "print(build_token_file(sys.argv[1], cache=sys.argv[2]).digest)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.txt"), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    digests = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(digests) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".tokens"]


def test_the_default_cache_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "here"))
    (tmp_path / "a.txt").write_text("text")
    assert build_token_file(tmp_path / "a.txt").path.parent == tmp_path / "here" / "tokens"


def test_split_is_the_tail_at_a_document_start_where_one_is_near(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * 99}) + "\n" for _ in range(10)))
    file = build_token_file(tmp_path / "a.jsonl", ByteTokenizer(), cache=tmp_path / "cache")
    assert len(file) == 999
    for fraction, cut in [(0.0, 999), (0.05, 999 - 50), (0.12, 900), (0.2, 800), (0.33, 700), (0.9, 100)]:
        train, valid = file.split(fraction)
        assert (len(train), len(valid)) == (cut, 999 - cut), fraction
        assert np.concatenate([train, valid]).tolist() == file.tokens.tolist()
    with pytest.raises(DataError, match=r"wanted valid_fraction in \[0, 1\), got 1.0"):
        file.split(1.0)


def test_a_json_tokenizer_gives_what_it_gives_by_itself(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"call": 0, "me": 1, "</s>": 2}, unk_token="</s>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "call me"}\n{"text": "me call call"}')
    file = build_token_file(tmp_path / "a.jsonl", load_tokenizer(tmp_path / "words.json"), cache=tmp_path / "cache")
    assert file.tokens.tolist() == [0, 1, 2, 1, 0, 0]
