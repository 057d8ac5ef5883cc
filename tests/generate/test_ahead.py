"""Rows run ahead of what the host has read, on a stand-in for the device: late tokens, late stops, moved slots."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from test_engine import VOCAB, History, Recorder, logits_of

from statescan.data import ByteTokenizer
from statescan.generate import Engine, SamplingParams, sample

PROMPTS = ["Call me Ishmael.", "a", "The whale, " * 30, "sea", "a", "Ünïcode 🐋", "land"]
PARAMS = [
    SamplingParams(temperature=0, max_new_tokens=9),
    SamplingParams(seed=3, max_new_tokens=14, top_k=40),
    SamplingParams(seed=3, max_new_tokens=1, temperature=0.7, logprobs=True),
    SamplingParams(seed=9, max_new_tokens=31, top_p=0.9, repetition_penalty=1.4),
    SamplingParams(seed=9, max_new_tokens=5, min_p=0.1, stream=6),
    SamplingParams(seed=4, max_new_tokens=40, logprobs=True),
    SamplingParams(seed=4, max_new_tokens=23, stop_token_ids=(101, 97)),
]


class Device:
    """Draws at once, but shows a token only some looks later, or when it is waited for; spare slots hold junk."""

    def __init__(self, capacity: int, seed: int = 0, size: int = 1) -> None:
        self.capacity = capacity
        self.size = size
        self.chance = random.Random(seed)
        self.state = [()] * capacity
        self.params: list[Any] = [SamplingParams(temperature=0)] * capacity
        self.position = [0] * capacity
        self.seen = [torch.zeros(VOCAB, dtype=torch.bool) for _ in range(capacity)]
        self.token = [0] * capacity
        self.counts = [0] * capacity
        self.ring: dict[tuple[int, int], tuple[int, float]] = {}
        self.steps: list[int] = []
        self.prefills: list[tuple[int, int]] = []

    def init_state(self, rows):
        return History([()] * rows)

    def prefill(self, ids, state, chunk):
        assert len({len(row) for row in ids}) == 1
        self.prefills.append((len(ids), len(ids[0])))
        state.rows = [before + tuple(row) for before, row in zip(state.rows, ids, strict=True)]
        return torch.stack([logits_of(row) for row in state.rows])

    def place(self, slot, params, position, before):
        self.params[slot], self.position[slot] = params, position
        self.seen[slot] = torch.zeros(VOCAB, dtype=torch.bool)
        self.seen[slot][before] = True

    def assign(self, slot, state, row):
        self.state[slot] = state.rows[row]

    def move(self, source, target):
        assert source != target
        for field in (self.state, self.params, self.position, self.token):
            field[target] = field[source]
        self.seen[target] = self.seen[source].clone()

    def take(self, slot):
        return History([self.state[slot]])

    def draw(self, slot, logits):
        params = self.params[slot]
        token = sample(logits, params, self.position[slot], self.seen[slot])
        self.position[slot] += 1
        self.seen[slot][token] = True
        self.token[slot] = token
        self.counts[slot] += 1
        logprob = float(torch.log_softmax(logits, -1)[token])
        self.ring[slot, self.counts[slot]] = (token, logprob)
        return self.counts[slot]

    def step(self, rows):
        self.steps.append(rows)
        size = min(-(-rows // self.size) * self.size, self.capacity)
        for slot in range(size):
            self.state[slot] = (*self.state[slot], self.token[slot])
            self.draw(slot, logits_of(self.state[slot]))
        return self.counts[:rows]

    def read(self, slots, numbers, wait=True):
        assert all(number > self.counts[slot] - 20 for slot, number in zip(slots, numbers, strict=True)), "written over"
        if not wait and self.chance.random() < 0.7:
            return None
        return tuple(map(list, zip(*(self.ring[at] for at in zip(slots, numbers, strict=True)), strict=True)))


def ahead_of(device: Device, max_batch: int, **options: Any) -> Engine:
    engine = Engine(Recorder(), ByteTokenizer(), max_batch=max_batch, **options)
    engine._slots = device
    return engine


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("max_batch", [1, 2, 3, 7])
def test_results_are_those_of_the_engine_that_waits_for_every_token(max_batch, size):
    plain = Engine(Recorder(), ByteTokenizer()).generate(PROMPTS, PARAMS)
    for seed in range(3):
        device = Device(max_batch, seed, size)
        engine = ahead_of(device, max_batch)
        pieces: list[tuple[int, str]] = []
        got = engine.generate(PROMPTS, PARAMS, stream=lambda *piece: pieces.append(piece))  # noqa: B023
        assert got == plain
        for row, result in enumerate(plain):
            assert "".join(text for at, text in pieces if at == row) == result.text
        assert max(device.steps, default=0) <= max_batch


def test_stops_are_found_late_and_nothing_after_them_is_kept():
    params = SamplingParams(seed=1, max_new_tokens=60)
    whole = Engine(Recorder(), ByteTokenizer()).generate(PROMPTS, params)
    stops = tuple(
        next(result.text[i : i + 3] for i in range(15, 60) if result.text[i : i + 3].isalpha()) for result in whole
    )
    stopped = SamplingParams(seed=1, max_new_tokens=60, stop=stops)
    plain = Engine(Recorder(), ByteTokenizer()).generate(PROMPTS, stopped)
    device = Device(3, seed=5)
    assert ahead_of(device, 3).generate(PROMPTS, stopped) == plain
    assert {result.finish_reason for result in plain} == {"stop"}


def test_the_host_waits_only_where_nothing_more_may_start():
    device = Device(2)
    ahead_of(device, 2).generate(["a", "b"], SamplingParams(seed=1, max_new_tokens=50))
    assert len(device.steps) == 49  # the first token comes from the prompt; no step is started in vain
    assert device.prefills == [(2, 1)]  # prompts of one length are read together


def test_rows_that_have_all_their_tokens_on_the_way_leave_their_slot():
    device = Device(3)
    params = [SamplingParams(seed=i, max_new_tokens=n) for i, n in enumerate([2, 5, 9])]
    ahead_of(device, 3).generate(["a", "bb", "ccc"], params)
    assert device.steps == [3, 2, 2, 2, 1, 1, 1, 1]


def test_a_session_stands_at_its_last_token():
    plain, device = Engine(Recorder(), ByteTokenizer()), Device(4)
    engine = ahead_of(device, 4)
    one, two = plain.open("Call me"), engine.open("Call me")
    for params, prompt in (
        (SamplingParams(seed=1, max_new_tokens=6), None),
        (SamplingParams(seed=1, max_new_tokens=40, stop_token_ids=(101,)), " Ahab."),
        (SamplingParams(seed=2, max_new_tokens=1), None),
        (SamplingParams(seed=2, max_new_tokens=3), None),
    ):
        assert plain.resume(one, params, prompt=prompt) == engine.resume(two, params, prompt=prompt)
        assert one.tokens == two.tokens
        assert one._state.rows == two._state.rows


def test_a_stream_left_early_harms_nothing():
    device = Device(2)
    engine = ahead_of(device, 2)
    pieces = engine.stream(["a", "b", "c"], SamplingParams(max_new_tokens=50))
    for _, piece in zip(range(6), pieces, strict=False):
        assert piece.generation is None
    pieces.close()
    assert len(device.steps) <= 12
    assert engine.generate(PROMPTS, PARAMS) == Engine(Recorder(), ByteTokenizer()).generate(PROMPTS, PARAMS)
