"""Images with labels: MNIST and its kin as the public archives, Debian's packages and numpy files hold them."""

from __future__ import annotations

import gzip
import lzma
import math
import os
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statescan.data.labelled import LabelledSequences
from statescan.errors import ConfigError, DataError

__all__ = ["Images", "find_images", "pixel_sequences", "read_idx", "read_images"]

# Where Debian's package dataset-fashion-mnist puts its four files.
_INSTALLED = Path("/usr/share/datasets/fashion-mnist")
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PARTS = {"x_train": "train-images", "y_train": "train-labels", "x_test": "t10k-images", "y_test": "t10k-labels"}
_NO_FILES = "wanted a .npz file or a folder with train-images-idx3-ubyte(.gz) and its three companions"


class Images(NamedTuple):
    """Pictures and labels, uint8: x (count, height, width), y (count,), for training and for the test."""

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.uint8]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.uint8]


def read_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """An array in the idx format of the MNIST archives, plain or compressed (.gz, .xz).

    Two zero bytes, a byte for the type, one for the number of dimensions, each size as a big-endian 32-bit number, then
    the values in row-major order.

    Raises:
        DataError: the file can't be read, is no idx file, or is cut short.
    """
    path = Path(path)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as stream:
            raw = bytes(stream.read())
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as problem:
        raise DataError(f"images: '{path}' can't be read: {problem}; download it again") from None
    kind, dims = (_IDX_TYPES.get(raw[2]), raw[3]) if len(raw) >= 4 and raw[:2] == b"\0\0" else (None, 0)
    if kind is None or not 1 <= dims <= 4 or len(raw) < 4 + 4 * dims:
        raise DataError(f"images: '{path}' must be an idx file (it starts with two zero bytes), got {raw[:4]!r}")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", dims, 4))
    start, wanted = 4 + 4 * dims, math.prod(shape) * np.dtype(kind).itemsize
    if len(raw) - start != wanted:
        raise DataError(
            f"images: '{path}' says it holds {shape}, which are {wanted:,} bytes, got {len(raw) - start:,}; "
            "it was cut short, download it again"
        )
    array = np.frombuffer(raw, kind, offset=start).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="))


def find_images() -> Path | None:
    """The folder of an installed package with Fashion-MNIST, None where there is none."""
    return _INSTALLED if _INSTALLED.is_dir() else None


def read_images(path: str | os.PathLike[str]) -> Images:
    """The four arrays of a data set like MNIST.

    Args:
        path: a .npz file with x_train, y_train, x_test and y_test; or a folder with the archives' four idx files, plain
            or .gz (named train-images-idx3-ubyte or train-images.idx3-ubyte).

    Raises:
        DataError: a file is missing, can't be read, or the arrays don't go together.
    """
    path = Path(path)
    if path.is_dir():
        arrays = {name: read_idx(_find(path, stem)) for name, stem in _PARTS.items()}
    elif path.suffix == ".npz" and path.exists():
        try:
            with np.load(path, allow_pickle=False) as held:
                if missing := sorted(set(_PARTS) - set(held.files)):
                    raise DataError(f"images: '{path}' must hold {', '.join(_PARTS)}, got no {missing[0]}")
                arrays = {name: held[name] for name in _PARTS}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as problem:
            raise (
                problem
                if isinstance(problem, DataError)
                else DataError(f"images: '{path}' can't be read as .npz: {problem}; download it again")
            ) from None
    else:
        raise DataError(f"images: {_NO_FILES}, got '{path}'" + ("" if path.exists() else ", which does not exist"))
    images = Images(**arrays)
    for x, y, part in ((images.x_train, images.y_train, "train"), (images.x_test, images.y_test, "test")):
        if x.dtype != np.uint8 or x.ndim != 3 or y.shape != x.shape[:1] or y.dtype.kind not in "ui":
            raise DataError(
                f"images: '{path}': wanted x_{part} (count, height, width) uint8 and y_{part} (count,), got {x.shape} "
                f"{x.dtype} and {y.shape} {y.dtype}"
            )
    if images.x_train.shape[1:] != images.x_test.shape[1:]:
        raise DataError(
            f"images: '{path}': wanted pictures of one size, got {images.x_train.shape[1:]} for training and "
            f"{images.x_test.shape[1:]} for the test"
        )
    return images


def _find(folder: Path, stem: str) -> Path:
    found = sorted(entry for entry in folder.iterdir() if entry.name.startswith(stem) and "ubyte" in entry.name)
    if not found:
        raise DataError(f"images: {_NO_FILES}, got '{folder}' without {stem}-...")
    return found[0]


def pixel_sequences(
    images: Images, *, held_out: int = 5000, permutation_seed: int | None = None, shift: int = 0, seed: int = 0
) -> tuple[LabelledSequences, LabelledSequences, LabelledSequences]:
    """Pictures as sequences of pixels, row by row: for training, for validation (held out from it), for the test.

    Args:
        images: from `read_images`.
        held_out: pictures taken out of those for training, at random.
        permutation_seed: puts the pixels of all pictures into one fixed random order. Default: as they are.
        shift: in training a picture is seen moved by up to so many pixels, up or down and to the sides; less than its
            height and width.
        seed: of the choice of the held-out pictures.

    Raises:
        DataError: fewer pictures than shall be held out. ConfigError: a shift out of range.
    """
    count = len(images.x_train)
    if not 0 < held_out < count:
        raise DataError(f"images: held_out must be within 1 .. {count - 1} pictures, got {held_out}")
    _, height, width = images.x_train.shape
    if not 0 <= shift < min(height, width):
        raise ConfigError(
            f"images: shift must be within 0 .. {min(height, width) - 1} pixels of pictures of {height} x {width}, "
            f"got {shift}; 1 or 2 are usual"
        )
    classes = int(images.y_train.max()) + 1
    pixels = images.x_train / np.float32(255)
    mean, deviation = float(pixels.mean(dtype=np.float64)), float(pixels.std(dtype=np.float64)) or 1.0

    def sequences(x: NDArray[np.uint8], y: NDArray[np.uint8]) -> LabelledSequences:
        return LabelledSequences(x.reshape(len(x), -1), y.astype(np.uint8), classes, mean=mean, deviation=deviation)

    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    learnt, test = sequences(images.x_train, images.y_train), sequences(images.x_test, images.y_test)
    views = _moves(height, width, shift) if shift else None
    parts = replace(learnt.take(order[held_out:]), views=views), learnt.take(order[:held_out]), test
    if permutation_seed is None:
        return parts
    pixel_order = np.random.Generator(np.random.PCG64(permutation_seed)).permutation(learnt.length)
    return tuple(part.reordered(pixel_order) for part in parts)  # pyright: ignore[reportReturnType]


def _moves(height: int, width: int, shift: int) -> NDArray[np.int32]:
    """For each move of a picture, which pixel comes to stand where; `height` x `width` where one from outside does."""
    rows, columns = np.mgrid[:height, :width]
    found = []
    for down in range(-shift, shift + 1):
        for right in range(-shift, shift + 1):
            row, column = rows - down, columns - right
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            found.append(np.where(inside, row * width + column, height * width).ravel())
    return np.stack(found).astype(np.int32)
