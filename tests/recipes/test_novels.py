"""The texts of the recipes: found under any of their endings, read as one token file, named where missing."""

from __future__ import annotations

import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest

from statescan.errors import DataError
from statescan.recipes.novels import find_text, read_corpus


def _archive(path: Path, books: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:xz") as archive:
        for name, content in books.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_archives_and_texts_become_one_file_with_a_document_a_book(tmp_path: Path) -> None:
    books = {"A.txt": b"First book.\n", "B.txt": "Zweites Büchlein.\n".encode()}
    _archive(tmp_path / "novels_train.tar.xz", books)
    (tmp_path / "sotu.txt.xz").write_bytes(lzma.compress(b"Fellow-Citizens"))
    corpus = read_corpus(tmp_path, ("novels_train", "sotu"), cache=tmp_path / "cache")
    texts = [*books.values(), b"Fellow-Citizens"]
    assert corpus.tokens.tobytes() == b"\0".join(texts)
    assert corpus.tokens.dtype == np.uint8
    ends = np.cumsum([len(text) for text in texts]) + np.array([1, 2, 2])
    assert corpus.document_offsets.tolist() == [0, *ends.tolist()]


def test_a_folder_of_books_is_read_as_its_archive(tmp_path: Path) -> None:
    (tmp_path / "novels_test").mkdir()
    (tmp_path / "novels_test" / "A.txt").write_text("One.")
    (tmp_path / "novels_test" / "B.txt").write_text("Two.")
    assert read_corpus(tmp_path, "novels_test", cache=tmp_path / "cache").tokens.tobytes() == b"One.\0Two."


def test_a_missing_text_is_named_with_the_folder_and_the_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wanted 'moby_dick' .* got none; name the folder .*--data FOLDER"):
        find_text(tmp_path, "moby_dick")
