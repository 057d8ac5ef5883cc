"""Any causal language model as what the evaluation judges: this package's models, and those of `transformers`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from statescan.checkpoint import locate, open_source
from statescan.checkpoint.folder import read_config
from statescan.data import load_tokenizer
from statescan.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from statescan.evaluate import LogitsReader, Reader, StateReader
from statescan.evaluate.continuations import longest_input, shorter
from statescan.models import CausalLM
from statescan.models.causal_lm import config_of
from statescan.ops._checks import usable_device

__all__ = ["FoundModel", "JudgedModel", "TransformersTokenizer", "find_judged", "open_judged"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A model that comes with any of these comes with a tokenizer.
_TOKENIZERS = (
    *("statescan_tokenizer.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("vocab.txt", "tokenizer.model", "spiece.model"),
)


class JudgedModel(NamedTuple):
    """A model ready to be judged.

    name: as it was given; reader: what judges; tokenizer: as `encode_pairs` takes it; parameters: their number;
    runs_on: "statescan" or "transformers".
    """

    name: str
    reader: Reader
    tokenizer: Any
    parameters: int
    runs_on: str


class TransformersTokenizer:
    """A tokenizer of the `transformers` package with what the evaluation asks of one.

    Args:
        tokenizer: as `AutoTokenizer.from_pretrained` gives it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.begin_of_text: int | None = end if begin is None else begin
        self.end_of_text: int | None = begin if end is None else end
        self.vocab_size = len(tokenizer)
        self.adds_special_tokens: bool = tokenizer.num_special_tokens_to_add(pair=False) > 0

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[NDArray[Any]]:
        """The ids of several texts, with the tokens that the tokenizer adds by itself where asked for."""
        ids = self._tokenizer(list(texts), add_special_tokens=add_special_tokens).input_ids if texts else []
        return [np.array(one, dtype=np.int64) for one in ids]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of ids, special tokens included."""
        return self._tokenizer.decode([int(id) for id in ids])


class FoundModel(NamedTuple):
    """A model whose configuration and tokenizer were read, and whose weights were not: `open` reads them.

    name: as it was given; place: folder or file; tokenizer: as of `JudgedModel`; runs_on: "statescan" or
    "transformers"; device, dtype, max_length, batch_tokens, share: as `find_judged` was told.
    """

    name: str
    place: Path
    tokenizer: Any
    runs_on: str
    device: torch.device | str
    dtype: torch.dtype
    max_length: int | None
    batch_tokens: int | None
    share: bool

    def open(self) -> JudgedModel:
        """Reads the weights.

        Raises:
            CheckpointError: they are not what they should be.
            ConfigError: max_length or batch_tokens is out of range.
        """
        reader: Reader
        if self.runs_on == "transformers":
            model = _open_transformers(_folder(self.place), self.device, self.dtype)
            reader = LogitsReader(model, max_length=self.max_length, batch_tokens=self.batch_tokens)
        else:
            model = CausalLM.from_pretrained(self.place, device=self.device, dtype=self.dtype)
            reader = StateReader(model, max_length=self.max_length, batch_tokens=self.batch_tokens, share=self.share)
        return JudgedModel(self.name, reader, self.tokenizer, sum(p.numel() for p in model.parameters()), self.runs_on)


def find_judged(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    tokenizer: str | os.PathLike[str] | None = None,
    spare_tokenizer: str | os.PathLike[str] | None = None,
    runs_on: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    max_length: int | None = 2048,
    batch_tokens: int | None = None,
    share: bool = True,
) -> FoundModel:
    """Finds a model by name or path, and all that can be told of it before its weights are read.

    Args:
        source: a folder with config.json and weights, or "owner/name" on the hub.
        device: where it computes. Default: the CPU.
        dtype: of the weights, "float32", "bfloat16" or "float16". Default "float32".
        tokenizer: "bytes", a `tokenizers` JSON file, or a folder that holds one. Default: the model's own.
        spare_tokenizer: the same, for a model that comes without one. Default: none.
        runs_on: "statescan" or "transformers", which takes any of its causal models (Pythia, RWKV, OPT ...). Default
            "auto": statescan for the models that it has.
        revision, offline: of a hub id; see `CausalLM.from_pretrained`.
        max_length: the last so many tokens of an input are read, None: all; never more than the length that a model's
            config.json says it has (n_positions, max_position_embeddings, n_ctx). Default 2048.
        batch_tokens, share: see `statescan.evaluate.StateReader`; share is statescan's alone.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: an unknown architecture, device, dtype or field.
        DataError: no tokenizer is there.
        MissingExtraError: `transformers` is needed and not installed.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"evaluate: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if runs_on not in ("auto", "statescan", "transformers"):
        raise ConfigError(f"evaluate: runs_on must be 'auto', 'statescan' or 'transformers', got {runs_on!r}")
    usable_device("evaluate: device", device)
    place = locate(source, revision, offline)
    folder = _folder(place)
    if runs_on == "auto":
        runs_on = _who_knows(place)
    elif runs_on == "statescan":
        config_of(open_source(place))
    if tokenizer is None and not any((folder / name).is_file() for name in _TOKENIZERS):
        tokenizer = spare_tokenizer
    if runs_on == "transformers":
        _transformers()
    if tokenizer is not None or runs_on == "statescan":
        own: Any = load_tokenizer(tokenizer or folder)
    else:
        own = _open_transformers_tokenizer(folder)
    longest = longest_input(SimpleNamespace(**read_config(folder / "config.json")))
    max_length = shorter(max_length, longest)
    return FoundModel(str(source), place, own, runs_on, device, DTYPES[dtype], max_length, batch_tokens, share)


def open_judged(source: str | os.PathLike[str], **options: Any) -> JudgedModel:
    """Opens a model by name or path, ready to be judged.

    Args:
        source: a folder with config.json and weights, or "owner/name" on the hub.
        options: of `find_judged`: device, dtype, tokenizer, runs_on, max_length ...

    Raises:
        CheckpointError: there is no such model, or its files are not what they should be.
        ConfigError, DataError, MissingExtraError: as `find_judged` and `FoundModel.open` raise them.
    """
    return find_judged(source, **options).open()


def _folder(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def _who_knows(place: Path) -> str:
    try:
        config_of(open_source(place))
    except ConfigError:
        config = read_config(_folder(place) / "config.json")
        # Only transformers' files name a model type: the others' errors are for the user to see.
        return "transformers" if "model_type" in config else "statescan"
    return "statescan"


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError("a model that statescan does not have itself", "transformers", "hf") from None


def _open_transformers_tokenizer(folder: Path) -> TransformersTokenizer:
    try:
        # Never code that comes with a model, nor the question whether to run it.
        own = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(
            f"tokenizer: {folder} holds none that transformers opens ({_reason(problem)}); name one with "
            "tokenizer (--tokenizer PATH)"
        ) from problem
    return TransformersTokenizer(own)


def _open_transformers(folder: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    try:
        model: Any = _transformers().AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        raise CheckpointError(
            f"load: transformers could not open {folder} ({_reason(problem)}); check its config.json and weights"
        ) from problem
    return model.to(device).eval()


def _reason(problem: BaseException) -> str:
    """In a line; `transformers` asks to trust code where it comes with a model, which is not done here."""
    if "trust_remote_code" in str(problem):
        return "it comes with code of its own, which is not run"
    return _first_line(problem)


def _first_line(problem: BaseException) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
