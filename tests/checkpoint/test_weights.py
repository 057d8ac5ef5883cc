"""Files of weights that are cut, tampered with, made to run code, or incomplete: one clear line each."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch

from statescan.checkpoint import load_tensors, open_weights, save_folder
from statescan.checkpoint.weights import shards_of, write_safetensors
from statescan.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(30, 4),
        "b": torch.randn(50).bfloat16(),
        "c": torch.randn(7, 2, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
    }


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_weights(path)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def equal(path: Path) -> None:
    weights, wanted = open_weights(path), tensors()
    assert set(weights.specs) == set(wanted)
    for name, tensor in wanted.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor), name


def test_our_file_is_everyones(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors())
    back = safetensors.torch.load_file(path)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors().items())
    equal(path)
    safetensors.torch.save_file(tensors(), path)
    equal(tmp_path)


@pytest.mark.parametrize("binary", [False, True])
def test_shards_hold_what_the_whole_holds(tmp_path: Path, binary: bool) -> None:
    save_folder(tmp_path, {}, tensors(), binary=binary, shard_bytes=500)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == (
        ["config.json", "pytorch_model.bin"]
        if binary
        else [
            "config.json",
            *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)),
            "model.safetensors.index.json",
        ]
    )
    equal(tmp_path)
    wanted = {name: (tuple(t.shape), t.dtype) for name, t in tensors().items()}
    assert torch.equal(load_tensors(tmp_path, wanted)["c"], tensors()["c"])


def test_groups_of_shards() -> None:
    specs = dict(zip("abcd", map(_spec, (10, 10, 50, 5)), strict=True))
    assert shards_of(specs, 80) == [["a", "b"], ["c"], ["d"]]
    assert shards_of({}, 80) == [[]]


def _spec(numbers: int):
    from statescan.checkpoint.weights import TensorSpec

    return TensorSpec((numbers,), torch.float32)


def test_sharded_binaries(tmp_path: Path) -> None:
    parts = {"pytorch_model-00001-of-00002.bin": ["a", "b", "none"], "pytorch_model-00002-of-00002.bin": None}
    parts["pytorch_model-00002-of-00002.bin"] = [n for n in tensors() if n not in ("a", "b", "none")]
    for file, names in parts.items():
        torch.save({name: tensors()[name] for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    equal(tmp_path)


def index_of(folder: Path) -> tuple[Path, dict]:
    save_folder(folder, {}, tensors(), shard_bytes=500)
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    path, index = index_of(tmp_path)
    whole = dict(index["weight_map"])
    first, second = sorted(set(whole.values()))
    index["weight_map"] = {**whole, "z": first}
    path.write_text(json.dumps(index))
    refused(tmp_path, f"{first} lacks z, which model.safetensors.index.json says it holds")
    index["weight_map"] = {name: file for name, file in whole.items() if name != "b"}
    path.write_text(json.dumps(index))
    refused(tmp_path, "holds b, which model.safetensors.index.json does not list")
    index["weight_map"] = {**whole, "a": "../" + first}
    path.write_text(json.dumps(index))
    refused(tmp_path, "must name files of its own folder, got '../")
    for text in ("{", "[]", '{"weight_map": 3}', '{"metadata": {}}'):
        path.write_text(text)
        refused(tmp_path, "must be JSON with a 'weight_map'")
    path.write_text(json.dumps({"weight_map": whole}))
    (tmp_path / second).unlink()
    refused(tmp_path, f"lacks {second}", "copy that file too")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 300, -1])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_cut_short(tmp_path: Path, file: str, keep: int) -> None:
    save_folder(tmp_path, {}, tensors(), binary=file.endswith(".bin"))
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, str(path), "cut short", f"({path.stat().st_size} bytes", "copy it again")


def test_a_header_that_was_tampered_with(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.zeros(4, 2)})
    whole = path.read_bytes()
    for old, new in ((b"[4,2]", b"[9,2]"), (b"[0,32]", b"[0,99]"), (b'"F32"', b'"F64"'), (b'{"__', b'["__')):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        refused(path, "cut short or no safetensors file")
    path.write_bytes((2**40).to_bytes(8, "little") + whole[8:])
    refused(path, "cut short or no safetensors file")


def test_numbers_of_unknown_kind(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    refused(tmp_path, "a has dtype F8_E4M3", "full weights")


class Code:
    """A pickle of this runs a command when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path, zipped: bool) -> None:
    path, proof = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    content = {"a": torch.zeros(2), "b": Code(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(tmp_path, str(path), "code beside tensors", "mkdir", "was not run")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Code(proof)))
    assert proof.exists()  # it would have run


@pytest.mark.filterwarnings("error")
def test_a_bare_pickle_is_refused_in_one_line(tmp_path: Path) -> None:
    path, proof = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Code(proof), protocol=4))
    refused(tmp_path, str(path), "something else than tensors", "was not run")
    assert not proof.exists()


def test_a_pickle_of_other_things(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    for content, words in (({"a": torch.zeros(2), "step": 3}, "got 'step'"), ([torch.zeros(2)], "got list")):
        torch.save(content, path)
        refused(path, "must hold names and tensors", words)


@pytest.mark.parametrize("content", [b"\x80", b"\x80\x02", b"\x80\x02.", b"\x80\x02]q\x00h\x05.", b"PK"])
def test_a_few_bytes_of_a_pickle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_binary_that_was_tampered_with_gives_a_line_or_tensors(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    draw = random.Random(0)
    told = []
    for place in range(min(len(whole), 700)):
        changed = bytearray(whole)
        changed[place] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            open_weights(path)
        except CheckpointError as error:
            told.append(str(error))
    assert len(told) > 50
    assert not any("\n" in text for text in told)


def test_numbers_that_safetensors_has_no_word_for_and_tensors_without_any(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    for tensor, words in (
        (torch.zeros(2).to(torch.float8_e4m3fn), "odd has dtype torch.float8_e4m3fn, wanted one of F64"),
        (torch.zeros(2, dtype=torch.complex64), "odd has dtype torch.complex64"),
        (torch.zeros(2, device="meta"), "odd holds no numbers (a meta tensor)"),
        (torch.eye(2).to_sparse(), "odd has layout torch.sparse_coo"),
    ):
        torch.save({"a": torch.zeros(2), "odd": tensor}, path)
        refused(path, str(path), words, "take the model's full weights")


def test_weights_of_another_form_are_not_left_beside(tmp_path: Path) -> None:
    save_folder(tmp_path, {}, tensors())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for form in ({"binary": True}, {"shard_bytes": 100}):
        with pytest.raises(CheckpointError, match=r"holds model\.safetensors, which would be taken"):
            save_folder(tmp_path, {}, tensors(), **form)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
