"""Models by name: a snapshot of a hub repository in its local cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from statescan.checkpoint.weights import WEIGHTS_FILES
from statescan.errors import CheckpointError, ConfigError, MissingExtraError

__all__ = ["TOKENIZER_FILES", "fetch", "is_hub_id", "locate"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOKENIZER_FILES = (
    "statescan_tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether this names a repository ("owner/name") and nothing that lies here."""
    return isinstance(source, str) and _ID.fullmatch(source) is not None and not Path(source).exists()


def locate(source: str | os.PathLike[str], revision: str | None = None, offline: bool = False) -> Path:
    """The folder or file that a source means; a hub id is fetched into the cache first.

    Args:
        source: a folder, a file of weights, or "owner/name" on the hub.
        revision: branch, tag or commit, for the hub alone. Default: the main branch.
        offline: look into the cache alone; so does the environment's HF_HUB_OFFLINE.

    Raises:
        CheckpointError: there is no such thing, or the hub can't be reached.
        ConfigError: a revision of something that is not on the hub.
        MissingExtraError: a hub id without the package huggingface_hub.
    """
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise ConfigError(f"load: a revision is for hub ids, got {revision!r} with {path}; leave it out")
        return path
    if is_hub_id(source):
        return fetch(str(source), revision, offline)
    raise CheckpointError(
        f"load: wanted a folder with config.json, a file of weights or a hub id 'owner/name', got '{source}', which "
        "does not exist; check the path"
    )


def fetch(repository: str, revision: str | None, offline: bool) -> Path:
    """Downloads config, weights and tokenizer of a repository (an interrupted download goes on); gives the folder."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtraError(f"the hub id '{repository}'", "huggingface_hub", "hub") from None
    shards = ["*.safetensors", f"{WEIGHTS_FILES[1]}"]
    named = f"'{repository}'" + (f" at revision {revision!r}" if revision else "")

    def snapshot(patterns: list[str]) -> Path:
        try:
            folder = huggingface_hub.snapshot_download(
                repository, revision=revision, local_files_only=offline, allow_patterns=patterns
            )
        except Exception as error:  # the hub's, the network library's and the system's errors alike end here
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CheckpointError(
                f"load: could not get {named} from the hub ({type(error).__name__}: {reason}); check the name and the "
                "connection, or pass a folder"
            ) from error
        return Path(folder)

    folder = snapshot(["config.json", *shards, *TOKENIZER_FILES])
    if not any((folder / name).exists() for name in WEIGHTS_FILES[:2]):
        # Pickled weights are asked for only where there are no others.
        folder = snapshot(["config.json", *WEIGHTS_FILES[2:], "pytorch_model-*.bin", *TOKENIZER_FILES])
    return folder
