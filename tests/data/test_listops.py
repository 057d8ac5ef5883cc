"""ListOps: examples obey the rules, and their answers are those of a reader written apart."""

from __future__ import annotations

import itertools
import statistics

import pytest

from statescan.data import LISTOPS_VOCABULARY, listops, solve_listops
from statescan.errors import ConfigError


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
        depth = deepest = 0
        for token in tokens:
            depth += token.startswith("[")
            deepest = max(deepest, depth)
            depth -= token == "]"
        assert deepest <= 10
        assert example.answer == solve_listops(tokens) == _value(tokens)
    answers = {e.answer for e in examples}
    assert answers == set(range(10))


def test_the_same_seed_gives_the_same_examples() -> None:
    first, again, other = (list(itertools.islice(listops(s, min_length=10, max_length=90), 20)) for s in (5, 5, 6))
    assert all((a.ids == b.ids).all() and a.answer == b.answer for a, b in zip(first, again, strict=True))
    assert {e.ids.tobytes() for e in first} != {e.ids.tobytes() for e in other}


def test_long_range_arenas_lengths() -> None:
    for example in itertools.islice(listops(1), 5):
        assert 500 < len(example.ids) < 2000


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
