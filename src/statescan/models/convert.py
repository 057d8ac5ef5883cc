"""From one layout of checkpoints to another, tensor by tensor from file to file."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from statescan import checkpoint as files
from statescan.errors import CheckpointError
from statescan.files import flush_to_disk, make_folder
from statescan.models.attention_checkpoints import published_tensors, to_published
from statescan.models.baseline_config import ModelConfig, TransformerConfig
from statescan.models.causal_lm import CausalLM, config_of
from statescan.models.config import MambaConfig

__all__ = ["convert"]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    layout: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    shard_bytes: int = files.MOST_BYTES_OF_A_SHARD,
) -> Path:
    """Writes a checkpoint in another layout; every number keeps its bits and its dtype.

    The tensors go from file to file through a memory map: what lies in memory does not grow with the model. (A
    pytorch_model.bin of PyTorch before 1.6 can't be mapped: of such, one shard lies in memory.) All is written beside
    the destination and takes its name when it is whole. Tokenizer files go along.

    Args:
        source: as in `CausalLM.from_pretrained`.
        destination: a folder that does not exist yet or is empty.
        layout: "statescan", "state-spaces" or "transformers".
        revision: of a hub id. Default: its main branch.
        offline: look into the hub's cache alone. Default False.
        shard_bytes: weights beyond so many bytes are split into several files. Default 5 GB.

    Returns:
        The destination.

    Raises:
        CheckpointError: something is wrong with the source, the destination is in use, the layout can't say what the
            model is, or the system refused to write; the destination is as it was.
        ConfigError: an unknown layout, architecture or field.
    """
    destination = Path(destination)
    opened = files.open_source(source, revision=revision, offline=offline)
    config = config_of(opened)
    opened.check_layers(config.n_layer)
    with opened.making_shapes():
        shapes = CausalLM(config, device="meta").saved_shapes()
    if not isinstance(config, MambaConfig):
        return _convert_baseline(opened, config, shapes, destination, layout, shard_bytes)
    tied = config.tie_embeddings
    tensors = opened.tensors(shapes, tied)
    fields = files.fields_to(layout, config.to_dict(), str(tensors.dtype).removeprefix("torch."))
    names = {files.their_name(layout, name): name for name in tensors}
    if tied and files.head_is_written(layout, tied):
        names["lm_head.weight"] = "backbone.embedding.weight"
    stored = _Renamed(tensors, names)
    with _new_folder(destination) as folder:
        files.save_folder(folder, fields, stored, binary=layout == "state-spaces", shard_bytes=shard_bytes)
        _copy_tokenizer(opened.folder, folder)
    return destination


def _convert_baseline(
    opened: files.Source,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    destination: Path,
    layout: str,
    shard_bytes: int,
) -> Path:
    """As `convert`, by way of a model in memory: these layouts' tensors are put together from others."""
    if isinstance(config, TransformerConfig) and opened.layout == "transformers":
        stored = published_tensors(opened, config, shapes)
    else:
        stored = opened.tensors(shapes, config.tie_embeddings)
    if layout == "statescan":
        fields, tensors = files.fields_to(layout, config.to_dict(), ""), stored
    else:
        assert not isinstance(config, MambaConfig)
        fields, tensors = to_published(config, stored, layout)
    with _new_folder(destination) as folder:
        files.save_folder(folder, fields, tensors, shard_bytes=shard_bytes)
        _copy_tokenizer(opened.folder, folder)
    return destination


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in files.TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class _Renamed(Mapping[str, Tensor]):
    """Tensors under a layout's names, each opened when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: dict[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A folder under a temporary name that takes the destination's when the block ends well."""
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CheckpointError(
            f"convert: the destination must be a new or empty folder, got {destination}, which is in use; name another"
        )
    # A folder's name may end in dots and slashes: its own, not the one typed.
    target = Path(os.path.abspath(destination))
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        make_folder(temporary)
        yield temporary
        os.replace(temporary, target)
        flush_to_disk(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"convert: could not write {destination}: {error.strerror or error}; check the path and the disk"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
