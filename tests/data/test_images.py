"""MNIST's files: the archives' idx format, plain and compressed, and .npz; and pictures as sequences."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest

from statescan.data.images import Images, find_images, pixel_sequences, read_idx, read_images
from statescan.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "vision" / "mnist.npz"


def _images(train: int = 30, test: int = 8) -> Images:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (train + test, 4, 5)).astype(np.uint8)
    y = (np.arange(train + test) % 10).astype(np.uint8)
    return Images(x[:train], y[:train], x[train:], y[train:])


def _idx(array: np.ndarray) -> bytes:
    """As the format's description has it, written apart."""
    kind = {"u1": 8, "i2": 0x0B, "f4": 0x0D}[array.dtype.str[1:]]
    head = bytes([0, 0, kind, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_idx(tmp_path: Path, suffix: str, dtype: type) -> None:
    array = (np.arange(24).reshape(2, 3, 4) * 3 - 20).astype(dtype)
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"some-idx3-ubyte{suffix}"
    path.write_bytes(pack(_idx(array)))
    got = read_idx(path)
    assert got.dtype == array.dtype
    assert (got == array).all()


def _write_folder(folder: Path, images: Images, suffix: str = ".gz") -> None:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    for name, array in zip(names, images, strict=True):
        data = _idx(array)
        (folder / f"{name}-ubyte{suffix}").write_bytes(gzip.compress(data) if suffix else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_of_idx_files_and_an_npz_file_hold_the_same(tmp_path: Path, suffix: str) -> None:
    images = Images(*_images())
    folder = tmp_path / "idx"
    folder.mkdir()
    _write_folder(folder, images, suffix)
    np.savez_compressed(tmp_path / "same.npz", **images._asdict())
    for got in (read_images(folder), read_images(tmp_path / "same.npz")):
        for array, wanted in zip(got, images, strict=True):
            assert (array == wanted).all()


def test_names_as_some_archives_unpack_them(tmp_path: Path) -> None:
    _write_folder(tmp_path, _images(), "")
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert len(read_images(tmp_path).x_train) == 30


def test_pixels_are_split_without_overlap_and_none_is_lost() -> None:
    images = _images()
    train, valid, test = pixel_sequences(images, held_out=6)
    assert [len(part) for part in (train, valid, test)] == [24, 6, 8]
    rows = {row.tobytes() for part in (train, valid) for row in part.values}
    assert rows == {picture.tobytes() for picture in images.x_train}
    pixels = images.x_train / 255
    for part in (train, valid, test):
        assert part.classes == 10
        assert part.mean == pytest.approx(pixels.mean(), rel=1e-5)
        assert part.deviation == pytest.approx(pixels.std(), rel=1e-5)
    assert (test.values.reshape(images.x_test.shape) == images.x_test).all()


def test_the_permutation_is_one_for_all_pictures() -> None:
    images = _images()
    plain, permuted = pixel_sequences(images, held_out=6), pixel_sequences(images, held_out=6, permutation_seed=7)
    order = np.random.Generator(np.random.PCG64(7)).permutation(20)
    assert (order != np.arange(20)).any()
    for one, other in zip(plain, permuted, strict=True):
        assert (one.values[:, order] == other.values).all()
        assert (one.labels == other.labels).all()


@pytest.mark.parametrize("permutation_seed", [None, 7])
def test_moved_pictures_are_the_pictures_moved(permutation_seed: int | None) -> None:
    images = _images()
    train, valid, test = pixel_sequences(images, held_out=6, permutation_seed=permutation_seed, shift=2)
    assert valid.views is None
    assert test.views is None
    assert train.views is not None
    assert train.views.shape == (25, 20)
    order = np.arange(20)
    if permutation_seed is not None:
        order = np.random.Generator(np.random.PCG64(permutation_seed)).permutation(20)
    plain = pixel_sequences(images, held_out=6)[0].values.reshape(-1, 4, 5)
    wanted = set()
    for down in range(-2, 3):
        for right in range(-2, 3):
            moved = np.zeros_like(plain)
            room = np.pad(plain, ((0, 0), (2, 2), (2, 2)))
            moved[:] = room[:, 2 - down : 6 - down, 2 - right : 7 - right]
            wanted.add(moved.reshape(24, 20)[:, order].tobytes())
    padded = np.pad(train.values, ((0, 0), (0, 1)))
    assert {padded[:, view].tobytes() for view in train.views} == wanted


@pytest.mark.parametrize("shift", [-3, 4, 100])
def test_a_picture_is_not_moved_out_of_its_frame(shift: int) -> None:
    with pytest.raises(ConfigError, match=rf"shift must be within 0 .. 3 pixels of pictures of 4 x 5, got {shift}"):
        pixel_sequences(_images(), held_out=6, shift=shift)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"which does not exist"):
        read_images(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"can't be read as \.npz"):
        read_images(tmp_path / "text.npz")
    np.savez(tmp_path / "part.npz", x_train=_images().x_train)
    with pytest.raises(DataError, match="got no x_test"):
        read_images(tmp_path / "part.npz")
    images = _images()
    np.savez(tmp_path / "odd.npz", **images._replace(y_train=images.y_train[:5])._asdict())
    with pytest.raises(DataError, match=r"wanted x_train \(count, height, width\) uint8 and y_train \(count,\)"):
        read_images(tmp_path / "odd.npz")
    np.savez(tmp_path / "sizes.npz", **images._replace(x_test=images.x_test[:, 1:])._asdict())
    with pytest.raises(DataError, match="wanted pictures of one size"):
        read_images(tmp_path / "sizes.npz")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DataError, match=r"without train-images-\.\.\."):
        read_images(folder)
    _write_folder(folder, images)
    whole = (folder / "t10k-labels-idx1-ubyte.gz").read_bytes()
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(whole[:-9])
    with pytest.raises(DataError, match="can't be read"):
        read_images(folder)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(gzip.decompress(whole)[:-3]))
    with pytest.raises(DataError, match="which are 8 bytes, got 5; it was cut short"):
        read_images(folder)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"<html>"))
    with pytest.raises(DataError, match="must be an idx file"):
        read_images(folder)
    with pytest.raises(DataError, match=r"held_out must be within 1 \.\. 29"):
        pixel_sequences(images, held_out=30)


@pytest.mark.skipif(not SHARED.exists(), reason="no MNIST beside the tree")
def test_mnist_itself() -> None:
    images = read_images(SHARED)
    assert images.x_train.shape == (60000, 28, 28)
    train, valid, test = pixel_sequences(images)
    assert [len(part) for part in (train, valid, test)] == [55000, 5000, 10000]
    assert (train.mean, train.deviation) == (pytest.approx(0.1307, abs=1e-4), pytest.approx(0.3081, abs=1e-4))
    # What is held out has every digit, about as often as the rest has it.
    assert np.bincount(valid.labels).min() > 400


@pytest.mark.skipif(find_images() is None, reason="dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist() -> None:
    folder = find_images()
    assert folder is not None
    assert read_images(folder).x_train.shape == (60000, 28, 28)
