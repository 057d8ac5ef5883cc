"""The texts that the language models of the recipes learn from and are judged by, as token files.

A folder holds `novels_train`, `novels_valid`, `novels_test` (English novels of 1840 to 1920, split by book), `sotu`,
`moby_dick`, `wiki_vital_intros`, each as ``.txt`` or ``.tar`` with or without a compression's ending, or as a folder of
text files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from statescan.data import TokenFile, Tokenizer, build_token_file
from statescan.errors import DataError

__all__ = ["NOVELS", "SHIPPED_TEXTS", "find_text", "read_corpus"]

# Parts of the novels: no book is in two of them.
NOVELS = ("novels_train", "novels_valid", "novels_test")
# What the model that comes with the package learns from: public domain, but for Wikipedia (CC BY-SA 4.0). Moby-Dick
# might be among them and is not: it comes with the package as the text that a user's first model is judged on.
SHIPPED_TEXTS = ("novels_train", "sotu", "wiki_vital_intros")
_ENDINGS = ("", ".txt", ".txt.xz", ".txt.gz", ".txt.zst", ".tar", ".tar.xz", ".tar.gz", ".tar.zst")


def find_text(folder: str | os.PathLike[str], name: str) -> Path:
    """The file, archive or folder that holds a text.

    Args:
        folder: where the texts lie.
        name: e.g. "novels_train", without an ending.

    Raises:
        DataError: none of that name lies there.
    """
    folder = Path(folder)
    for ending in _ENDINGS:
        path = folder / f"{name}{ending}"
        if path.exists():
            return path
    raise DataError(
        f"data: wanted '{name}' (.txt, .tar, either with .xz, .gz or .zst, or a folder) in '{folder}', got none; name "
        "the folder that holds the texts with --data FOLDER"
    )


def read_corpus(
    folder: str | os.PathLike[str],
    names: str | Sequence[str] = "novels_train",
    *,
    tokenizer: Tokenizer | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> TokenFile:
    """Texts one after the other as a token file, memory-mapped; each book, speech collection or list is one document.

    Args:
        folder: where the texts lie.
        names: which, in order; see `NOVELS` and `SHIPPED_TEXTS`. Default: the training novels.
        tokenizer: what turns text into ids. Default: bytes, with a zero byte between documents.
        cache: folder of the token files. Default: the user's cache folder.

    Returns:
        The file; `tokens` are its ids, uint8 for bytes, and `document_offsets` say where each document starts.

    Raises:
        DataError: a text is missing or damaged.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    return build_token_file([find_text(folder, name) for name in wanted], tokenizer, cache=cache)
