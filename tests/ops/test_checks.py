"""Boundaries that were looked at once are not looked at again, unless something changed them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from statescan.errors import ShapeError
from statescan.ops._checks import check_cu_seqlens, mark_checked
from statescan.ops.selective_scan.cuda import _marks


class Watched(torch.Tensor):
    """Counts how often its values are read on the host."""

    reads = 0

    def tolist(self):  # type: ignore[no-untyped-def]
        Watched.reads += 1
        return super().tolist()


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).as_subclass(Watched)


def test_boundaries_that_the_caller_made_are_not_read() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            marked = bounds(0, 3, 5)
            Watched.reads = 0
            mark_checked(marked, 5)
            check_cu_seqlens("op", marked, 1, 5)
            assert Watched.reads == 0
            # Of another length, or copied, they are others.
            with pytest.raises(ShapeError, match="must end at the length 6, got 5"):
                check_cu_seqlens("op", marked, 1, 6)
            check_cu_seqlens("op", marked.clone(), 1, 5)
            assert Watched.reads == 2


def test_boundaries_that_changed_are_read_again() -> None:
    marked = bounds(0, 3, 5)
    mark_checked(marked, 5)
    marked[1] = 6
    with pytest.raises(ShapeError, match="must never fall, got 6 followed by 5"):
        check_cu_seqlens("op", marked, 1, 5)


def test_on_the_cpu_a_look_costs_nothing_and_is_not_remembered() -> None:
    # Memory that numpy shares may change without torch's knowing.
    seen = bounds(0, 3, 5)
    Watched.reads = 0
    check_cu_seqlens("op", seen, 1, 5)
    check_cu_seqlens("op", seen, 1, 5)
    assert Watched.reads == 2


def test_marks_of_packed_sequences_are_made_once_for_the_same_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def wanted(values: list[int], length: int) -> tuple[list[int], list[int]]:
        starts, ends = [0] * length, [0] * length
        for number, (begin, end) in enumerate(pairwise(values), start=1):
            if end > begin:
                starts[begin], ends[end - 1] = number, number
        return starts, ends

    def made(tensor: torch.Tensor) -> tuple[list[int], list[int]]:
        starts, ends = _marks(tensor, 9)
        return starts[:9].tolist(), ends[:9].tolist()

    values = [0, 0, 1, 4, 4, 9]  # some are empty, one of a single step
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            tensor = torch.tensor(values, dtype=torch.int32)
            assert made(tensor) == wanted(values, 9)
            assert _marks(tensor, 9)[0] is not _marks(tensor, 9)[0]  # nobody said that they are right
            mark_checked(tensor, 9)
            first = _marks(tensor, 9)
            assert _marks(tensor, 9)[0] is first[0]
            capturing = True
            assert _marks(tensor, 9)[0] is not first[0]
            capturing = False
    tensor = torch.tensor(values, dtype=torch.int32)
    mark_checked(tensor, 9)
    assert made(tensor) == wanted(values, 9)
    tensor[2] = 3
    assert made(tensor) == wanted([0, 0, 3, 4, 4, 9], 9)
