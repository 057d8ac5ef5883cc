from __future__ import annotations

import re

import numpy as np
import pytest

from statescan.data.names import find_names, swap_books, swap_names, swapped_copies
from statescan.errors import DataError

PAGE = (
    "When Sophia met Tulkinghorn, he bowed. “Is it you, Sophia?” said Tulkinghorn’s clerk; and Sophia laughed.\n"
    "They went with Tulkinghorn to Lincoln, and from Lincoln to Lincoln’s fields. When the rain came, the\n"
    "fields were wet; a When or two is no name. Zoé and Zoé are of another alphabet.\n"
).encode()


def test_names_are_words_that_keep_their_capital() -> None:
    assert find_names(PAGE) == [b"Lincoln", b"Sophia", b"Tulkinghorn"]
    # twice within a sentence, and too often without a capital
    assert find_names(b"so Rain and Rain fell; rain, rain and rain") == []


def test_a_name_is_another_everywhere_in_a_segment_and_nothing_else_changes() -> None:
    names = find_names(PAGE)
    swapped = swap_names(PAGE, names, 3)
    shape = re.compile(b"|".join(names))
    before, after = shape.split(PAGE), swapped
    called: list[bytes] = []
    for part, following in zip(before, [*before[1:], None], strict=True):
        assert after.startswith(part)
        after = after[len(part) :]
        if following is not None:
            name = re.match(rb"[A-Za-z]+", after)
            assert name is not None
            called.append(name.group())
            after = after[name.end() :]
    assert not after
    by_name: dict[bytes, set[bytes]] = {}
    for old, new in zip(shape.findall(PAGE), called, strict=True):
        by_name.setdefault(old, set()).add(new)
    assert all(len(new) == 1 for new in by_name.values())
    assert any(new != {old} for old, new in by_name.items())


def test_every_segment_has_its_own_names() -> None:
    names = [f"Name{'abcdefghijklmnopqrstuvwxyz'[i]}".encode() for i in range(26)]
    line = b" ".join(names) + b"\n"
    text = line * 20
    one, other = swap_names(text, names, 0, segment=2 * len(line)), swap_names(text, names, 0, segment=len(text))
    assert len(set(other.splitlines())) == 1
    lines = one.splitlines()
    assert all(lines[2 * k] == lines[2 * k + 1] for k in range(10))
    assert len(set(lines)) == 10
    # a line longer than a segment is cut where the segment ends, and nothing is lost
    assert swap_names(b"x" * 1000, names, 0, segment=64) == b"x" * 1000


def test_names_stand_behind_quotation_marks_and_dashes_too() -> None:
    text = (
        "so Sophia and Sophia, with Lincoln and Lincoln. “Sophia!” ‘Lincoln’—Sophia. 'Lincoln' Éléonore Sophiaé éSophia"
    )
    names_there = find_names(text.encode())
    assert names_there == [b"Lincoln", b"Sophia"]
    swapped = swap_names(text.encode(), [*names_there, b"Arthur", b"Guppy", b"Snagsby", b"Jarndyce"], 5).decode()
    names = re.findall(r"[A-Z][a-z]+", swapped)
    first, second = names[0], names[2]
    assert (first, second) != ("Sophia", "Lincoln")
    wanted = text.replace("Sophiaé éSophia", "@").replace("Sophia", "<1>").replace("Lincoln", "<2>")
    assert swapped == wanted.replace("<1>", first).replace("<2>", second).replace("@", "Sophiaé éSophia")


def test_a_long_line_is_cut_between_words() -> None:
    text = b"so Sophia met Lincolnshire " * 30
    swapped = swap_names(text, [b"Sophia", b"Lincoln", b"Arthur"], 1, segment=50)
    assert swapped.count(b" Lincolnshire ") == 30
    assert len(set(swapped.split()[1::4])) > 1


def test_copies_are_the_same_however_many() -> None:
    tokens = np.frombuffer(PAGE, np.uint8)
    two, three = swapped_copies(tokens, 2, 1), swapped_copies(tokens, 3, 1)
    assert three.tobytes().startswith(two.tobytes())
    assert swapped_copies(tokens, 2, 2).tobytes() != two.tobytes()
    assert two.tobytes().count(b"of another alphabet") == 2
    for page, count in ((b"no name here", 0), (b"so Sophia met Sophia", 1)):
        with pytest.raises(DataError, match=f"two names at least.* got {count}"):
            swapped_copies(np.frombuffer(page, np.uint8), 4)


def test_a_segment_has_bytes() -> None:
    with pytest.raises(DataError, match="segment must be at least 1 byte, got 0"):
        swap_names(PAGE, [b"Lincoln"], 0, segment=0)


def test_a_book_keeps_its_names_from_first_to_last() -> None:
    page = b"and Sophia met Lincoln; so Sophia left Lincoln, with Arthur and Arthur.\n"
    books = [page * 2000, page * 3]  # the first is longer than a segment
    one, other = next(swap_books(books, 1))
    assert set(one.splitlines()) == {one.splitlines()[0]}
    assert set(other.splitlines()) == {other.splitlines()[0]}
    assert len({one.splitlines()[0], other.splitlines()[0], page.strip()}) == 3
    assert (one.count(b"\n"), other.count(b"\n")) == (2000, 3)
    copies = list(swap_books(books, 3))
    assert copies[0] == [one, other]
    assert len({copy[0] for copy in copies}) == 3
    with pytest.raises(DataError, match="two names at least"):
        next(swap_books([b"none", b""], 1))
