"""Runs rows on a device that is started ahead of what the host has read: no token waits for the host.

Tokens are drawn on the device. The host starts steps as long as it likes, up to a bound, and reads the tokens in the
order in which they were started. It learns late that a row has stopped: what the row wrote after that is thrown away,
and its slot is given to another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from statescan.generate.sampling import SamplingParams

__all__ = ["Slots", "run_ahead"]

# Steps started beyond the last token read. Starting one takes the host some 10 us, reading its tokens and making text
# of them 2 to 3 us a row; a stop costs at most so many steps of one row.
_AHEAD = 8
# Tokens of several prompts that are prefilled together.
_TOGETHER = 32768


class Slots(Protocol):
    """The device's side, `statescan.generate.graphs.GraphDecoder` or a stand-in: see there."""

    capacity: int

    def place(self, slot: int, params: SamplingParams, position: int, before: list[int], /) -> None: ...

    def assign(self, slot: int, state: Any, row: int, /) -> None: ...

    def move(self, source: int, target: int, /) -> None: ...

    def take(self, slot: int, /) -> Any: ...

    def draw(self, slot: int, logits: Any, /) -> int: ...

    def step(self, rows: int, /) -> list[int]: ...

    def read(
        self, slots: Sequence[int], numbers: Sequence[int], /, wait: bool = True
    ) -> tuple[list[int], list[float]] | None: ...

    def prefill(self, ids: list[list[int]], state: Any, chunk: int, /) -> Any: ...

    def init_state(self, rows: int, /) -> Any: ...


class _Live:
    """A row in a slot."""

    def __init__(self, row: Any) -> None:
        self.row = row
        self.to_start = row.params.max_new_tokens  # tokens whose drawing was not started yet


class _Flight(NamedTuple):
    """Draws that were started together: rows, their slots, and the numbers of the draws there."""

    rows: list[_Live]
    slots: list[int]
    numbers: list[int]


def run_ahead(slots: Slots, rows: Sequence[Any], max_batch: int, chunk: int, ahead: int = _AHEAD) -> Iterator[Any]:
    """Yields the pieces of all rows as their tokens come.

    Args:
        slots: the device's side.
        rows: of `statescan.generate.engine`; a row is told its tokens by `take` and has a `result` when it has ended.
        max_batch: rows that run at once; further ones wait.
        chunk: tokens of a prompt read at once.
        ahead: steps started beyond the last token read. A row with a session runs without, since its state has to
            stand at its last token.
    """
    waiting: deque[Any] = deque(rows)
    live: list[_Live] = []  # in the order of their slots
    flying: deque[_Flight] = deque()
    limit = min(max_batch, slots.capacity)
    if any(row.session is not None for row in rows):
        ahead = 0

    def leave(index: int) -> None:
        """Frees a slot; the last slot's row moves into it."""
        last = live.pop()
        if index < len(live):
            slots.move(len(live), index)
            live[index] = last

    def admit() -> _Flight:
        """Reads the next prompts, as many of one length as may go together, and starts their first draws."""
        group = [waiting.popleft()]
        if group[0].session is None:
            size = len(group[0].unread)
            while (
                waiting
                and len(live) + len(group) < limit
                and waiting[0].session is None
                and len(waiting[0].unread) == size
                and (len(group) + 1) * min(size, chunk) <= _TOGETHER
            ):
                group.append(waiting.popleft())
            state = slots.init_state(len(group))
        else:
            state = group[0].session._state.select([0])
        logits = slots.prefill([row.unread for row in group], state, max(chunk, min(_TOGETHER, chunk * len(group))))
        started = _Flight([], [], [])
        for i, row in enumerate(group):
            slot = len(live)
            live.append(_Live(row))
            slots.place(slot, row.params, row.prompt_tokens, row.seen_before)
            slots.assign(slot, state, i)
            live[-1].to_start -= 1
            started.rows.append(live[-1])
            started.slots.append(slot)
            started.numbers.append(slots.draw(slot, logits[i]))
        return started

    def finish(entry: _Live) -> None:
        row = entry.row
        if row.session is not None:
            row.session.tokens = row.seen_before + row.tokens
            row.session._state = slots.take(live.index(entry))
            row.session._pending = row.tokens[-1:]
        if entry in live:
            leave(live.index(entry))

    while waiting or live or flying:
        if waiting and len(live) < limit:
            flying.append(admit())
        elif live and len(flying) <= ahead and any(entry.to_start > 0 for entry in live):
            flying.append(_Flight(list(live), list(range(len(live))), slots.step(len(live))))
            for entry in live:
                entry.to_start -= 1
            # A row whose last token is on its way needs its slot no more.
            for index in range(len(live) - 1, -1, -1):
                if live[index].to_start <= 0 and live[index].row.session is None:
                    leave(index)
        # What has come is read; where nothing more may be started, the oldest is waited for.
        while flying:
            full = len(flying) > ahead or not any(entry.to_start > 0 for entry in live)
            if waiting and len(live) < limit:
                full = False
            first = flying[0]
            came = slots.read(first.slots, first.numbers, wait=full)
            if came is None:
                break
            flying.popleft()
            pieces = []
            for entry, token, logprob in zip(first.rows, *came, strict=True):
                row = entry.row
                if row.result is None:
                    pieces.append(row.take(token, logprob))
                    if row.result is not None:
                        finish(entry)
            yield from pieces
