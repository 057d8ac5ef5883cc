"""Aligned species: read from arrays and from records, parted alike, told by their bases, masked alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from statescan.data import DnaTokenizer, Genome
from statescan.data.aligned import AlignedBlocks, holds_blocks, mask_alike, read_blocks
from statescan.errors import DataError


def made(blocks: int = 60, species: int = 3) -> AlignedBlocks:
    """Species whose blocks differ in their bases and, by a base or two, in their lengths."""
    draw = np.random.default_rng(0)
    sizes = [draw.integers(40, 120, blocks) - number for number in range(species)]
    ends = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    offsets = np.stack([ends[i * blocks : (i + 1) * blocks + 1] for i in range(species)])
    return AlignedBlocks(list("abc")[:species], draw.integers(0, 4, ends[-1]).astype(np.uint8), offsets)


def save(path: Path, blocks: AlignedBlocks) -> Path:
    arrays = {}
    for name, ends in zip(blocks.names, blocks.offsets, strict=True):
        arrays |= {name: blocks.tokens[ends[0] : ends[-1]], f"{name}_blocklen": np.diff(ends)}
    np.savez(path, **arrays)
    return path


def test_parts_are_the_same_blocks_of_all_species() -> None:
    blocks = made(200)
    assert [blocks.part(name) for name in ("train", "valid", "test")] == [(0, 170), (170, 180), (180, 200)]
    spans = np.stack([blocks.spans(name) for name in ("train", "valid", "test")], 1)
    assert (spans[:, 0, 0] == blocks.offsets[:, 0]).all()
    assert (spans[:, 2, 1] == blocks.offsets[:, -1]).all()
    assert (spans[:, :-1, 1] == spans[:, 1:, 0]).all()


def test_blocks_from_arrays_and_from_records(tmp_path: Path) -> None:
    pytest.importorskip("dnaio")
    blocks, folder = made(4, 2), tmp_path / "apes"
    folder.mkdir()
    for name, ends in zip("ab", blocks.offsets, strict=True):
        records = (DnaTokenizer().decode(blocks.tokens[ends[i] : ends[i + 1]]) for i in range(4))
        (folder / f"{name}.fa").write_text("".join(f">block{i}\n{text}\n" for i, text in enumerate(records)))
    path = save(tmp_path / "apes.npz", blocks)
    assert [holds_blocks(place) for place in (path, folder)] == [True, False]
    for place in (path, folder):
        read = read_blocks(place, cache=tmp_path / "cache")
        assert (read.names, read.blocks) == (["a", "b"], 4)
        assert (read.tokens == blocks.tokens).all()
        assert (read.offsets == blocks.offsets).all()
        assert read.facts() == blocks.facts()
        # Of the same bases a token file says the same digest.
        assert read.facts()["digest"] == Genome(place, cache=tmp_path / "cache").file.digest
    # What reads genomes takes a species as a record.
    assert Genome(path, cache=tmp_path / "cache").names == ["a", "b"]
    assert (Genome(path, cache=tmp_path / "cache").fetch("b") == blocks.tokens[blocks.offsets[1, 0] :]).all()
    (folder / "b.fa").write_text(">block0\nACGT\n")
    with pytest.raises(DataError, match=r"with as many blocks each in .*, got 2 with \[1, 4\]"):
        read_blocks(folder, cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"one .npz of aligned blocks by itself, got .*apes.npz"):
        read_blocks([str(folder), str(path)], cache=tmp_path / "cache")
    (folder / "b.fa").write_text((folder / "a.fa").read_text())
    with pytest.raises(DataError, match="got the same bases as a and as b"):
        read_blocks(folder, cache=tmp_path / "cache")


def test_facts_tell_other_bases_and_other_parts() -> None:
    blocks = made()
    other = blocks.tokens.copy()
    other[-1] = (other[-1] + 1) % 4
    assert replace(blocks, tokens=other).facts() != blocks.facts()
    ends = blocks.offsets.copy()
    ends[:, 51] += 1  # where the held-out part begins
    assert replace(blocks, offsets=ends).facts() != blocks.facts()


def test_arrays_that_are_no_aligned_blocks(tmp_path: Path) -> None:
    path = tmp_path / "apes.npz"
    good = {"a": np.array([0, 1, 4], np.uint8), "a_blocklen": np.array([1, 2])}
    good |= {"b": np.array([3, 1], np.uint8), "b_blocklen": np.array([1, 1])}
    np.savez(path, **good)
    assert read_blocks(path, cache=tmp_path / "cache").offsets.tolist() == [[0, 1, 3], [3, 4, 5]]
    for name, value in (
        ("a", np.array([0, 1, 5], np.uint8)),
        ("a", np.array([0.0, 1, 4])),
        ("a", np.array([[0], [1], [4]], np.uint8)),
        ("b_blocklen", np.array([1, 2])),
        ("b_blocklen", np.array([3, -1])),
    ):
        np.savez(path, **{**good, name: value})
        with pytest.raises(DataError, match=f"must hold {name[0]} as .* uint8 of A C G T N"):
            read_blocks(path, cache=tmp_path / "cache")
    np.savez(path, seq=np.zeros(4, np.uint8))
    with pytest.raises(DataError, match="wanted NAME and NAME_blocklen of each species"):
        read_blocks(path, cache=tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"can't be read as \.npz"):
        read_blocks(path, cache=tmp_path / "cache")


def test_unknown_bases_are_masked_alike() -> None:
    plain = made()
    tokens = plain.tokens.copy()
    # A stretch inside a block, one over a border, single ones at both ends of a block.
    own = plain.offsets[1]
    tokens[own[5] + 10 : own[5] + 25] = 4
    tokens[own[9] - 4 : own[9] + 6] = 4
    tokens[[own[20], own[21] - 1]] = 4
    masked = mask_alike(replace(plain, tokens=tokens))
    counts = []
    for ends in masked.offsets:
        unknown = masked.tokens[ends[0] : ends[-1]] == 4
        each = np.add.reduceat(unknown, ends[:-1] - ends[0])
        assert set(np.flatnonzero(each)) == {5, 8, 9, 20}
        counts.append(each)
    # Not one base more or less: how long the stretches are would tell whose they were.
    assert not np.diff(counts, axis=0).any()
    assert counts[0][[5, 8, 9, 20]].tolist() == [15, 4, 6, 2]
    known = masked.tokens != 4
    assert (masked.tokens[known] == plain.tokens[known]).all()
    assert (masked.tokens[tokens == 4] == 4).all()


def masks_of_blocks(sizes: list[list[int]], unknown: list[tuple[int, int, int, int]]) -> list[list[str]]:
    """Of each species and block the masked bases, as a string of N and dots.

    Args:
        sizes: (species, blocks) bases of each block.
        unknown: species, block, first and last of some stretches of N.
    """
    ends = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    count = len(sizes[0])
    offsets = np.stack([ends[i * count : (i + 1) * count + 1] for i in range(len(sizes))])
    tokens = np.zeros(ends[-1], np.uint8)
    for species, block, first, last in unknown:
        tokens[offsets[species, block] + first : offsets[species, block] + last] = 4
    masked = mask_alike(AlignedBlocks(list("abcd")[: len(sizes)], tokens, offsets)).tokens
    text = "".join(".???N"[base] for base in masked)
    return [[text[row[i] : row[i + 1]] for i in range(count)] for row in offsets]


def test_stretches_near_each_other_stay_apart_and_in_order() -> None:
    sizes = [[8, 40, 8], [8, 40, 8], [8, 22, 8], [8, 20, 8], [8, 90, 8]]
    own = "." * 4 + "N" * 10 + ".." + "N" * 10 + "." * 14
    for number, other in enumerate(
        (own, "N" * 10 + "." + "N" * 10 + ".", "N" * 20, "." * 14 + "N" * 10 + "." * 5 + "N" * 10 + "." * 51)
    ):
        masks = masks_of_blocks([sizes[0], sizes[number + 1]], [(0, 1, 4, 14), (0, 1, 16, 26)])
        assert masks[0] == ["." * 8, own, "." * 8]
        assert [masks[1][0], masks[1][2]] == ["." * 8, "." * 8]
        assert (masks[1][1].count("N"), len(masks[1][1])) == (20, sizes[number + 1][1])
        assert masks[1][1] == other
    # What reaches over a border does so in all, and is as long.
    masks = masks_of_blocks([[40, 40], [90, 17]], [(0, 0, 36, 40), (0, 1, 0, 6)])
    assert masks[1] == ["." * 86 + "NNNN", "NNNNNN" + "." * 11]


def test_of_a_block_shorter_than_the_stretches_all_is_masked_and_none_of_its_neighbours() -> None:
    # In the middle: from where it lies it would reach into the block before, and over its own end.
    for first, last in ((0, 30), (5, 35), (10, 40)):
        masks = masks_of_blocks([[9, 40, 9], [9, 20, 9]], [(0, 1, first, last)])
        assert masks[1] == ["." * 9, "N" * 20, "." * 9]
        assert masks[0][1].count("N") == 30
    masks = masks_of_blocks([[9, 40, 9], [9, 20, 9]], [(0, 1, 3, 15), (0, 1, 20, 32)])
    assert masks[1] == ["." * 9, "N" * 20, "." * 9]
    # A block without bases.
    assert masks_of_blocks([[9, 40, 9], [9, 0, 9]], [(0, 1, 3, 15)])[1] == ["." * 9, "", "." * 9]


def test_stretches_of_two_species_that_overlap_are_as_many_bases() -> None:
    masks = masks_of_blocks([[100], [101], [99]], [(0, 0, 10, 20), (1, 0, 15, 25)])
    assert [row[0].count("N") for row in masks] == [15, 15, 15]
    draw = np.random.default_rng(0)
    for _ in range(200):
        sizes = draw.integers(0, 30, (3, 4))
        unknown = []
        for species, block in zip(draw.integers(0, 3, 6), draw.integers(0, 4, 6), strict=True):
            first, last = np.sort(draw.integers(0, sizes[species, block] + 1, 2))
            unknown.append((int(species), int(block), int(first), int(last)))
        counts = np.array([[mask.count("N") for mask in row] for row in masks_of_blocks(sizes.tolist(), unknown)])
        assert (counts == np.minimum(counts.max(0), sizes)).all()
        named = {block for _, block, first, last in unknown if last > first}
        assert set(np.flatnonzero(counts.any(0))) == named
