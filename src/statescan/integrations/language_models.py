"""Any causal language model as what the evaluation judges: this package's models, and those of `transformers`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from statescan.checkpoint import locate, open_source
from statescan.checkpoint.folder import read_config
from statescan.data import load_tokenizer
from statescan.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from statescan.evaluate import LogitsReader, Reader, StateReader
from statescan.models import CausalLM
from statescan.models.causal_lm import config_of

__all__ = ["JudgedModel", "TransformersTokenizer", "open_judged"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def open_judged(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    tokenizer: str | os.PathLike[str] | None = None,
    runs_on: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    max_length: int | None = 2048,
    batch_tokens: int | None = None,
    share: bool = True,
) -> JudgedModel:
    """Opens a model by name or path.

    Args:
        source: a folder with config.json and weights, or "owner/name" on the hub.
        device: where it computes. Default: the CPU.
        dtype: of the weights, "float32", "bfloat16" or "float16". Default "float32".
        tokenizer: "bytes", a `tokenizers` JSON file, or a folder that holds one. Default: the model's own.
        runs_on: "statescan" or "transformers", which takes any of its causal models (Pythia, RWKV, OPT ...). Default
            "auto": statescan for the models that it has.
        revision, offline: of a hub id; see `CausalLM.from_pretrained`.
        max_length, batch_tokens, share: see `statescan.evaluate.StateReader`; share is statescan's alone.

    Raises:
        CheckpointError: there is no such model, or its files are not what they should be.
        ConfigError: an unknown architecture, dtype or field.
        DataError: no tokenizer is there.
        MissingExtraError: `transformers` is needed and not installed.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"evaluate: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if runs_on not in ("auto", "statescan", "transformers"):
        raise ConfigError(f"evaluate: runs_on must be 'auto', 'statescan' or 'transformers', got {runs_on!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise ConfigError(
            f"evaluate: device must be one that torch can use here, got '{device}' ({_first_line(problem)})"
        ) from None
    place = locate(source, revision, offline)
    folder = place if place.is_dir() else place.parent
    if runs_on == "auto":
        runs_on = _who_knows(place)
    if runs_on == "transformers":
        model, own = _open_transformers(folder, device, DTYPES[dtype], tokenizer)
        reader: Reader = LogitsReader(model, max_length=max_length, batch_tokens=batch_tokens)
    else:
        own = load_tokenizer(tokenizer or folder)
        model = CausalLM.from_pretrained(place, device=device, dtype=DTYPES[dtype])
        reader = StateReader(model, max_length=max_length, batch_tokens=batch_tokens, share=share)
    return JudgedModel(str(source), reader, own, sum(p.numel() for p in model.parameters()), runs_on)


def _who_knows(place: Path) -> str:
    try:
        config_of(open_source(place))
    except ConfigError:
        config = read_config((place if place.is_dir() else place.parent) / "config.json")
        # Only transformers' files name a model type: the others' errors are for the user to see.
        return "transformers" if "model_type" in config else "statescan"
    return "statescan"


def _open_transformers(
    folder: Path, device: torch.device | str, dtype: torch.dtype, tokenizer: str | os.PathLike[str] | None
) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("a model that statescan does not have itself", "transformers", "hf") from None
    own: Any
    if tokenizer is not None:
        own = load_tokenizer(tokenizer)
    else:
        try:
            own = TransformersTokenizer(transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError, KeyError) as problem:
            raise DataError(
                f"tokenizer: {folder} holds none that transformers opens ({_first_line(problem)}); name one with "
                "tokenizer (--tokenizer PATH)"
            ) from problem
    try:
        # Never code that comes with a model.
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        raise CheckpointError(
            f"load: transformers could not open {folder} ({_first_line(problem)}); check its config.json and weights"
        ) from problem
    return model.to(device).eval(), own


def _first_line(problem: BaseException) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
