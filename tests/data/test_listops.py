"""ListOps: examples obey the rules, and their answers are those of a reader written apart."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from statescan.data import LISTOPS_VOCABULARY, listops, solve_listops
from statescan.data.labelled import LabelledSequences
from statescan.data.listops import listops_splits, read_listops
from statescan.errors import ConfigError, DataError


def _tokens(ids: list[int]) -> list[str]:
    return [LISTOPS_VOCABULARY[i] for i in ids]


def _value(tokens: list[str]) -> int:
    """The value by Python's own evaluation of the expression as text."""
    names = {"[MIN": "min(", "[MAX": "max(", "[MED": "med(", "[SM": "total("}
    text = "".join(names.get(token, ")," if token == "]" else f"{token},") for token in tokens)
    given = {"med": lambda *x: int(statistics.median(x)), "total": lambda *x: sum(x) % 10, "min": min, "max": max}
    return eval(text.rstrip(","), {"__builtins__": {}}, given)


def test_examples_obey_the_rules() -> None:
    examples = list(itertools.islice(listops(0, min_length=20, max_length=200), 300))
    assert len({e.ids.tobytes() for e in examples}) == 300
    for example in examples:
        tokens = _tokens(example.ids.tolist())
        assert 20 < len(tokens) < 200
        assert tokens[0].startswith("[")
        assert _nesting(tokens) <= 9
        assert example.answer == solve_listops(tokens) == _value(tokens)
    answers = {e.answer for e in examples}
    assert answers == set(range(10))


def test_the_same_seed_gives_the_same_examples() -> None:
    first, again, other = (list(itertools.islice(listops(s, min_length=10, max_length=90), 20)) for s in (5, 5, 6))
    assert all((a.ids == b.ids).all() and a.answer == b.answer for a, b in zip(first, again, strict=True))
    assert {e.ids.tobytes() for e in first} != {e.ids.tobytes() for e in other}


def _nesting(tokens: list[str]) -> int:
    return max(itertools.accumulate((token.startswith("[")) - (token == "]") for token in tokens))


def test_long_range_arenas_lengths() -> None:
    for example in itertools.islice(listops(1), 5):
        assert 500 < len(example.ids) < 2000
        # The Arena's trees have ten levels, and the last has digits alone.
        assert _nesting(_tokens(example.ids.tolist())) == 9


def test_arguments_are_drawn_by_the_rules() -> None:
    counts, digits, asked = [], 0, 0
    for example in itertools.islice(listops(3, min_length=3, max_length=10**6), 3000):
        depth, arguments = 0, 0
        for token in _tokens(example.ids.tolist()):
            if token != "]" and depth == 1:
                arguments += 1
                digits += token.isdigit()
            depth += (token.startswith("[")) - (token == "]")
        counts.append(arguments)
        asked += arguments
    assert set(counts) == set(range(2, 11))
    # Uniform over 2 ... 10, and three of four are digits; short trees come once only, which moves this a little.
    assert abs(statistics.mean(counts) - 6) < 0.25
    assert abs(digits / asked - 0.75) < 0.02


def test_few_levels_have_few_operations() -> None:
    for example in itertools.islice(listops(0, min_length=3, max_length=30, max_depth=2), 50):
        assert _nesting(_tokens(example.ids.tolist())) == 1
    with pytest.raises(ConfigError, match="max_depth >= 2"):
        next(listops(0, max_depth=1))


def test_known_values() -> None:
    assert solve_listops(["[MED", "1", "2", "8", "9", "]"]) == 5
    assert solve_listops(["[SM", "9", "9", "[MAX", "3", "4", "]", "]"]) == 2
    assert solve_listops(["[MIN", "7", "[MED", "3", "9", "4", "]", "8", "]"]) == 4


def test_bad_input() -> None:
    for text in ("[MED 1 2", "1 2", "] 1", "[MAX ]", "[MED 1 x ]", ""):
        with pytest.raises(ConfigError, match="solve_listops"):
            solve_listops(text.split())
    with pytest.raises(ConfigError, match="listops: wanted"):
        next(listops(0, min_length=10, max_length=11))


def _rows(part: LabelledSequences) -> list[tuple[bytes, int]]:
    assert part.lengths is not None
    zipped = zip(part.values, part.lengths, part.labels, strict=True)
    for row, length, _ in zip(part.values, part.lengths, part.labels, strict=True):
        assert (row[:length] > 0).all()
        assert (row[length:] == 0).all()
    return [(row[:length].tobytes(), int(label)) for row, length, label in zipped]


def test_splits_are_distinct_right_and_the_same_whoever_makes_them(tmp_path: Path) -> None:
    rules = {"min_length": 10, "max_length": 60}
    parts = listops_splits(3, (4100, 60, 40), workers=2, cache=tmp_path, **rules)
    assert [len(part) for part in parts] == [4100, 60, 40]
    rows = [row for part in parts for row in _rows(part)]
    assert len({ids for ids, _ in rows}) == 4200
    for ids, answer in rows[::17]:
        assert solve_listops(_tokens(list(ids))) == answer
    alone = listops_splits(3, (4100, 60, 40), workers=1, **rules)
    assert [_rows(part) for part in alone] == [_rows(part) for part in parts]
    # From the cache: nothing is made, and other counts of the same sum are other cuts.
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    again = listops_splits(3, (4000, 100, 100), cache=tmp_path, **rules)
    assert [row for part in again for row in _rows(part)] == rows
    assert kept.stat().st_mtime_ns == stamp
    assert _rows(listops_splits(4, (50, 1, 1), **rules)[0]) != rows[:50]


def test_the_arenas_own_files(tmp_path: Path) -> None:
    lines = {
        "train": "( ( ( [MAX 3 ) 4 ) ] )\t4\n[MED 1 2 8 9 ]\t5\n",
        "val": "[SM 9 9 ]\t8\n",
        "test": "[MIN 7 [MAX 2 3 ] ]\t3\n",
    }
    for split, text in lines.items():
        (tmp_path / f"basic_{split}.tsv").write_text("Source\tTarget\n" + text)
    train, valid, test = read_listops(tmp_path)
    assert [len(part) for part in (train, valid, test)] == [2, 1, 1]
    for part in (train, valid, test):
        for ids, answer in _rows(part):
            assert solve_listops(_tokens(list(ids))) == answer
    assert _tokens(list(_rows(train)[0][0])) == ["[MAX", "3", "4", "]"]
    (tmp_path / "basic_val.tsv").write_text("Source\tTarget\n[SM 9 nine ]\t8\n")
    with pytest.raises(DataError, match=r"line 2 of '.*basic_val.tsv' must be an expression, a tab and its value"):
        read_listops(tmp_path)
    (tmp_path / "basic_test.tsv").unlink()
    (tmp_path / "basic_val.tsv").write_text("Source\tTarget\n[SM 9 9 ]\t8\n")
    with pytest.raises(DataError, match=r"got no '.*basic_test.tsv'"):
        read_listops(tmp_path)


def test_bad_counts() -> None:
    with pytest.raises(ConfigError, match="every count must be at least 1"):
        listops_splits(0, (10, 0, 1))
