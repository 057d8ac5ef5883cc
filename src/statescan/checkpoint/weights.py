"""Files of weights: safetensors or PyTorch's, whole or in shards, mapped into memory and read tensor by tensor."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from statescan.errors import CheckpointError

__all__ = [
    "BIN_FILE",
    "WEIGHTS_FILE",
    "WEIGHTS_FILES",
    "TensorSpec",
    "Weights",
    "find_weights",
    "open_weights",
    "same_bits",
    "shards_of",
    "write_bin",
    "write_safetensors",
]

WEIGHTS_FILE = "model.safetensors"
BIN_FILE = "pytorch_model.bin"
# In the order in which they are looked for, which is the transformers package's.
WEIGHTS_FILES = (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", BIN_FILE, f"{BIN_FILE}.index.json")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LISTED = 3
# Bytes written at once: what a tensor on another device or with gaps is copied to before it goes to the disk.
_PIECE = 2**26


class TensorSpec(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def find_weights(folder: Path) -> Path:
    """The file of weights in a folder: model.safetensors, its index, pytorch_model.bin, its index, the first there is.

    Raises:
        CheckpointError: there is none.
    """
    for name in WEIGHTS_FILES:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(
        f"load: {folder} has no {WEIGHTS_FILE} (nor {', '.join(WEIGHTS_FILES[1:])}); pass the folder that a model was "
        "saved to"
    )


def open_weights(path: Path) -> Weights:
    """Opens a file of weights, an index of shards, or what a folder holds of them; nothing but headers is read.

    Raises:
        CheckpointError: a file is missing, cut short, of another format, or holds anything but tensors.
    """
    path = find_weights(path) if path.is_dir() else path
    if path.name.endswith(".index.json"):
        return Weights(path, _read_index(path))
    return Weights(path, dict.fromkeys(_open_shard(path), path))


class Weights:
    """Names and shapes of a checkpoint's tensors, and the tensors themselves, mapped until they are copied.

    Args:
        path: the file, or the index of the shards.
        places: name -> the file that holds it.
    """

    def __init__(self, path: Path, places: Mapping[str, Path]) -> None:
        self.path = path
        self._places = dict(places)
        self._shard: tuple[Path, dict[str, Tensor]] | None = None
        self.specs: dict[str, TensorSpec] = {}
        for shard in dict.fromkeys(self._places.values()):
            tensors = self._open(shard)
            listed = {name for name, place in self._places.items() if place == shard}
            if missing := sorted(listed - set(tensors)):
                raise CheckpointError(
                    f"load: {shard} lacks {some(missing)}, which {path.name} says it holds; copy it again"
                )
            if extra := sorted(set(tensors) - listed):
                raise CheckpointError(
                    f"load: {shard} holds {some(extra)}, which {path.name} does not list; copy both again"
                )
            self.specs |= {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def _open(self, shard: Path) -> dict[str, Tensor]:
        # One at a time: a file that can't be mapped lies in memory while it is open.
        if self._shard is None or self._shard[0] != shard:
            self._shard = None
            self._shard = (shard, _open_shard(shard))
        return self._shard[1]

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, a view of the file: copy it before the file may change."""
        return self._open(self._places[name])[name]

    def in_order(self, names: Iterable[str]) -> list[str]:
        """The names, shard by shard, so that each is opened once."""
        order = {place: i for i, place in enumerate(dict.fromkeys(self._places.values()))}
        return sorted(names, key=lambda name: order[self._places[name]])

    def check(
        self, wanted: Mapping[str, tuple[int, ...]], config: Path, spare: Iterable[str] = (), floats: bool = True
    ) -> None:
        """Refuses a missing or surplus name and a wrong shape, before anything is read.

        Args:
            wanted: name -> shape.
            config: the file that the names and shapes come from, for the message.
            spare: names that may be there too.
            floats: refuse whole numbers. Default True.

        Raises:
            CheckpointError: see above.
        """
        if missing := sorted(set(wanted) - set(self.specs)):
            raise CheckpointError(
                f"load: {self.path} lacks {some(missing)}; it belongs to another configuration than {config}"
            )
        if extra := sorted(set(self.specs) - set(wanted) - set(spare)):
            raise CheckpointError(
                f"load: {self.path} holds {some(extra)}, which the model does not have; it belongs to another "
                f"configuration than {config}"
            )
        for name, shape in wanted.items():
            if self.specs[name].shape != tuple(shape):
                raise CheckpointError(
                    f"load: {self.path}: {name} must have shape {tuple(shape)}, got {self.specs[name].shape}; it "
                    f"belongs to another configuration than {config}"
                )
            if floats and not self.specs[name].dtype.is_floating_point:
                raise CheckpointError(
                    f"load: {self.path}: {name} must hold floating-point numbers, got {self.specs[name].dtype}; "
                    "quantised weights are not read: take the model's full weights"
                )


def some(names: list[str]) -> str:
    """A few names of a list, and how many more."""
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, nan and signed zero included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr():
        return True
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _read_index(path: Path) -> dict[str, Path]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        places = {str(name): str(file) for name, file in index["weight_map"].items()}
    except OSError as error:
        raise CheckpointError(
            f"load: could not read {path}: {error.strerror or error}; check its permissions"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"load: {path} must be JSON with a 'weight_map' of names and files, got something else ({error}); "
            "copy it again"
        ) from error
    for file in sorted(set(places.values())):
        # A file's name alone: an index must not lead out of its folder.
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"load: {path} must name files of its own folder, got {file!r}; don't trust this file"
            )
        if not (path.parent / file).exists():
            raise CheckpointError(f"load: {path.parent} lacks {file}, which {path.name} names; copy that file too")
    return {name: path.parent / file for name, file in places.items()}


def _open_shard(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except FileNotFoundError:
        raise CheckpointError(
            f"load: {path.parent} has no {path.name}; pass the folder that a model was saved to"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"load: could not read {path}: {error.strerror or error}; check its permissions"
        ) from error
    # A zip archive or a pickle is PyTorch's, whatever its name says.
    if path.suffix == ".safetensors" or not (start == b"PK" or start[:1] == b"\x80" or path.suffix in (".bin", ".pt")):
        return _map_safetensors(path)
    return _load_bin(path)


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        # Checks that the header fits the file and that no two tensors overlap.
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise CheckpointError(
            f"load: {path} is cut short or no safetensors file ({path.stat().st_size} bytes: "
            f"{str(error).splitlines()[0]}); copy it again or save the model again"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"load: could not read {path}: {error.strerror or error}; check its permissions"
        ) from error
    header.pop("__metadata__", None)
    # Private and writable for torch's sake; nobody writes to it.
    data = np.memmap(path, dtype=np.uint8, mode="c") if header else np.empty(0, dtype=np.uint8)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"load: {path}: {name} has dtype {entry['dtype']}, wanted one of {', '.join(_DTYPES)}; "
                "take the model's full weights"
            )
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        dtype = _DTYPES[entry["dtype"]]
        piece = data[begin:end]
        if begin % dtype.itemsize:
            piece = piece.copy()
        flat = torch.from_numpy(np.asarray(piece)).view(dtype) if end > begin else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what matters of it is refused below
            found = torch.load(path, map_location="cpu", mmap=mapped or None, weights_only=True)
    except pickle.UnpicklingError as error:
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
        what = f"code beside tensors ({names[0]})" if names else "something else than tensors"
        raise CheckpointError(
            f"load: {path} holds {what}, which was not run; get the model as safetensors, from someone you trust"
        ) from error
    except Exception as error:  # a tampered pickle makes torch raise anything: IndexError, AssertionError, ...
        raise CheckpointError(
            f"load: {path} is cut short or no file of PyTorch's ({path.stat().st_size} bytes: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}); copy it again"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        wrong = (
            next((n for n, t in found.items() if not isinstance(t, Tensor)), "") if isinstance(found, Mapping) else ""
        )
        raise CheckpointError(
            f"load: {path} must hold names and tensors, got {repr(wrong) if wrong else type(found).__name__}; save the "
            "model's state_dict alone"
        )
    for name, tensor in found.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            what = "holds no numbers (a meta tensor)" if tensor.is_meta else f"has layout {tensor.layout}"
        elif tensor.dtype not in _CODES:
            what = f"has dtype {tensor.dtype}, wanted one of {', '.join(_DTYPES)}"
        else:
            continue
        raise CheckpointError(f"load: {path}: {name} {what}; take the model's full weights")
    return {str(name): tensor for name, tensor in found.items()}


def shards_of(specs: Mapping[str, TensorSpec], most_bytes: int) -> list[list[str]]:
    """Names in groups of at most so many bytes (a larger tensor stands alone), in the order given."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        own = int(np.prod(spec.shape, dtype=np.int64)) * spec.dtype.itemsize
        if groups[-1] and size + own > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    return groups


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file piece by piece, with no copy of the whole in memory.

    Args:
        path: the file.
        tensors: any device, any strides; asked for one at a time, each once for its shape and once for its numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wider numbers first, so that all stay aligned in the file.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name].detach()
            if tensor.numel() == 0:
                continue
            flat = tensor.to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
            for start in range(0, len(flat), _PIECE):
                file.write(flat[start : start + _PIECE].data)


def write_bin(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that `torch.load` reads with weights only; mapped tensors go from file to file.

    Args:
        path: the file.
        tensors: two names may share one tensor, which is written once.
    """
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu")
        # torch.save writes a tensor's whole storage, of which it may be a part.
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.dtype.itemsize
        plain[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    torch.save(plain, path)
