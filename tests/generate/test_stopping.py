"""Text out of tokens: the same wherever it is cut, never half a character, never a part of a stop string."""

from __future__ import annotations

import gc
import weakref

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from statescan.data import ByteTokenizer
from statescan.generate import Stop, StopMatcher, TextStream


def first_stop(text: str, stops: list[str]) -> tuple[str, str] | None:
    """By definition: reading character by character, the first stop string to be complete (the longest of several)."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return None


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({min(place, len(text)) for place in places})
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


few = st.text(alphabet="abc", max_size=12)


@settings(max_examples=400, deadline=None)
@given(
    text=few,
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    places=st.lists(st.integers(0, 12), max_size=8),
)
def test_pieces_join_to_the_text_before_the_first_stop(text, stops, places):
    matcher, shown, found = StopMatcher(stops), "", None
    wanted = first_stop(text, stops)
    for piece in cut(text, places):
        pushed = matcher.push(piece)
        if isinstance(pushed, Stop):
            shown, found = shown + pushed.text, pushed.stop
            break
        shown += pushed
        # Nothing shown may have to be taken back: whatever comes later, the stop begins after it.
        assert wanted is None or len(shown) <= len(wanted[0])
    else:
        shown += matcher.flush()
    assert (shown, found) == (wanted if wanted is not None else (text, None))


def test_nothing_is_held_back_without_reason():
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == "the "
    assert matcher.push("E") == "EN"
    assert matcher.push("N") == ""
    assert matcher.push("x") == "ENx"
    assert matcher.push("E") == ""
    assert matcher.flush() == "E"
    assert StopMatcher([]).push("anything") == "anything"


@settings(max_examples=300, deadline=None)
@given(data=st.one_of(st.text(max_size=12).map(str.encode), st.binary(max_size=12)))
def test_bytes_come_out_as_whole_characters_only(data):
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push(byte) for byte in data]
    text = "".join(pieces) + stream.flush()
    whole = data.decode("utf-8", "replace")
    # An unfinished character at the end is left out; everything else is there.
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}
    try:
        data.decode()
    except UnicodeDecodeError:
        return
    assert text == whole
    assert "\ufffd" not in pieces or "\ufffd" in whole


def test_a_character_of_four_bytes_appears_when_it_is_whole():
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte) for byte in "é🐋".encode()] == ["", "é", "", "", "", "🐋"]


def test_a_stop_string_across_tokens_and_inside_a_character_boundary():
    stream = TextStream(ByteTokenizer(), ["\n—"])
    pushed = [stream.push(byte) for byte in "a\n—b".encode()[:5]]
    assert pushed[:4] == ["a", "", "", ""]
    assert pushed[4] == Stop("", "\n—")


def test_a_prompt_that_ends_inside_a_character_is_finished():
    whale = "🐋".encode()
    stream = TextStream(ByteTokenizer(), before=list(b"see " + whale[:2]))
    assert [stream.push(byte) for byte in whale[2:]] == ["", "🐋"]


class WithoutWord:
    """Bytes, too, from a tokenizer that doesn't say that they add up: read by windows of two tokens."""

    def decode_bytes(self, ids) -> bytes:
        return bytes(ids)


@settings(max_examples=300, deadline=None)
@given(
    before=st.binary(max_size=5),
    data=st.one_of(st.text(alphabet="aé🐋\n", max_size=9).map(str.encode), st.binary(max_size=12)),
    stops=st.lists(st.text(alphabet="aé\n", min_size=1, max_size=2), max_size=2),
)
def test_bytes_that_add_up_give_the_same_pieces_as_windows(before, data, stops):
    assume("\ufffd".encode() not in before + data)  # which a window waits on
    quick, slow = TextStream(ByteTokenizer(), stops, before), TextStream(WithoutWord(), stops, before)
    for byte in data:
        pieces = quick.push(byte), slow.push(byte)
        assert pieces[0] == pieces[1]
        if isinstance(pieces[0], Stop):
            return
    assert quick.flush() == slow.flush()


def test_a_tokenizers_table_goes_with_it():
    tokenizer = ByteTokenizer()
    assert TextStream(tokenizer).push(ord("a")) == "a"
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


class Words:
    """A vocabulary that marks the beginnings of words, as SentencePiece's does, with bytes for what it doesn't know."""

    def __init__(self) -> None:
        self.pieces = ["▁the", "▁cat", "s", "▁", b"\xf0", b"\x9f", b"\x90", b"\x8b", "END"]

    def decode_bytes(self, ids) -> bytes:
        data = b"".join(p if isinstance(p, bytes) else p.encode() for p in (self.pieces[i] for i in ids))
        # As such decoders do: text, so U+FFFD for what isn't whole, and no space at the very beginning.
        return data.decode("utf-8", "replace").replace("▁", " ").removeprefix(" ").encode()


def test_vocabularies_that_mark_words_keep_their_spaces_and_characters():
    stream = TextStream(Words(), before=[0])
    assert [stream.push(token) for token in [1, 2, 3, 4, 5, 6, 7, 0]] == [" cat", "s", " ", "", "", "", "🐋", " the"]


def test_a_token_that_holds_more_than_the_stop_is_cut():
    class Long:
        def decode_bytes(self, ids) -> bytes:
            return b"".join([b"abc", b"STOP and more"][i] for i in ids)

    stream = TextStream(Long(), ["STOP"])
    assert stream.push(0) == "abc"
    assert stream.push(1) == Stop("", "STOP")
