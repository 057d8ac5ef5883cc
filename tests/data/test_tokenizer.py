import json
import random
import sys

import numpy as np
import pytest

from statescan.data import ByteTokenizer, JsonTokenizer, SymbolTokenizer, Tokenizer, load_tokenizer, token_dtype
from statescan.errors import DataError, MissingExtraError

TEXT = "Call me Ishmael. Größe 大きさ 🙂\r\n\ttabs  and   spaces" * 3


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "small.json"
    tokenizer.save(str(path))
    return path


def test_bytes_there_and_back():
    tokenizer = load_tokenizer()
    assert isinstance(tokenizer, ByteTokenizer)
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint8
    assert tokenizer.decode(ids) == TEXT
    everything = bytes(range(256))
    assert tokenizer.decode_bytes(tokenizer.encode(everything)) == everything
    assert tokenizer.decode([0xE5, 0xA4]) == "\ufffd"
    with pytest.raises(DataError, match=r"wanted ids in \[0, 256\), got 1 to 256"):
        tokenizer.decode([1, 256])


def test_json_there_and_back(bpe_path):
    tokenizer = load_tokenizer(bpe_path)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("small", 300, 0)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint16
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode_bytes(ids) == TEXT.encode()
    # Ids may end inside a character: only bytes can be put together piece by piece.
    assert b"".join(tokenizer.decode_bytes([id]) for id in ids) == TEXT.encode()
    assert tokenizer.bytes_add_up
    assert tokenizer.decode_bytes([0]) == b"<|endoftext|>"
    batch = tokenizer.encode_batch([TEXT, "me", ""])
    assert [list(ids) for ids in batch] == [list(tokenizer.encode(text)) for text in (TEXT, "me", "")]
    with pytest.raises(DataError, match="wanted ids in its vocabulary"):
        tokenizer.decode_bytes([300])


def _changed(path, tmp_path, **fields):
    told = json.loads(path.read_text(encoding="utf-8"))
    for name, value in fields.items():
        told[name] = value(told[name]) if callable(value) else value
    changed = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    changed.write_text(json.dumps(told), encoding="utf-8")
    return JsonTokenizer(changed)


def _added(content, **flags):
    token = {"id": 300, "content": content, "special": False, "normalized": True}
    return lambda tokens: [*tokens, token | {"lstrip": False, "rstrip": False, "single_word": False} | flags]


def test_ids_do_not_depend_on_what_is_beyond_a_space(bpe_path, tmp_path):
    kinds = [
        JsonTokenizer(bpe_path),
        # As GPT-NeoX's: runs of spaces are tokens of their own.
        _changed(bpe_path, tmp_path, normalizer={"type": "NFC"}, added_tokens=_added("   ")),
    ]
    draw = random.Random(0)
    letters = [
        "a",
        "'s",
        "\u0301",
        "é",
        " ",
        "  ",
        "\n",
        "\t",
        "\u00a0",
        "\u2028",
        "\x1f",
        "1",
        "٣",
        "!",
        "<|endoftext|>",
        "大",
    ]
    for tokenizer in kinds:
        assert tokenizer.splits_at_spaces
        checked = 0
        while checked < 2000:
            before, after = ("".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(2))
            if before[-1].isspace() or after[0].isspace():
                continue
            apart = [*tokenizer.encode(before), *tokenizer.encode(" " + after)]
            assert apart == list(tokenizer.encode(before + " " + after)), (before, after)
            checked += 1
    for fields in (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": _added("two words")},
        {"added_tokens": _added("word", lstrip=True)},
        {"added_tokens": _added("word", rstrip=True)},
        {"model": lambda model: model | {"dropout": 0.1}},
    ):
        assert not _changed(bpe_path, tmp_path, **fields).splits_at_spaces, fields


def test_tokens_around_a_text_are_told_and_added_where_asked_for(bpe_path, tmp_path):
    plain = JsonTokenizer(bpe_path)
    assert not plain.adds_special_tokens
    assert plain.begin_of_text is None
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    known = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}

    def template(*single):
        return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}

    begun = _changed(bpe_path, tmp_path, post_processor=template(end, text))
    assert begun.adds_special_tokens
    assert begun.begin_of_text == 0
    ids = plain.encode_batch([TEXT, ""])
    assert [list(one) for one in begun.encode_batch([TEXT, ""])] == [list(one) for one in ids]
    added = begun.encode_batch([TEXT, ""], add_special_tokens=True)
    assert [list(one) for one in added] == [[0, *one] for one in ids]
    # What ends a text begins none.
    ended = _changed(bpe_path, tmp_path, post_processor=template(text, end))
    assert ended.adds_special_tokens
    assert ended.begin_of_text is None


def test_the_token_that_begins_a_text_is_the_one_named_beside(bpe_path, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(bpe_path))
    inner.add_special_tokens(["<s>", "</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    begin, end = (inner.token_to_id(token) for token in ("<s>", "</s>"))
    assert JsonTokenizer(tmp_path / "tokenizer.json").begin_of_text is None
    for name, fields, wanted in (
        ("special_tokens_map.json", {"eos_token": "</s>"}, end),
        ("special_tokens_map.json", {"eos_token": "</s>", "bos_token": {"content": "<s>"}}, begin),
        ("tokenizer_config.json", {"eos_token": "</s>", "bos_token": None}, begin),
        ("tokenizer_config.json", {"bos_token": "</s>"}, end),
        ("tokenizer_config.json", {"bos_token": "<unknown>"}, begin),
    ):
        (tmp_path / name).write_text(json.dumps(fields), encoding="utf-8")
        assert JsonTokenizer(tmp_path / "tokenizer.json").begin_of_text == wanted, fields
    for text, words in (("{", "can't be read as JSON"), ("[]", "wanted a JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=words):
            _ = JsonTokenizer(tmp_path / "tokenizer.json").begin_of_text


def test_the_token_that_ends_a_text_is_the_one_named_beside(bpe_path, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(bpe_path))
    inner.add_special_tokens(["<|im_end|>", "<|eot_id|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    guessed, chat, other = (inner.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>", "<|eot_id|>"))
    assert JsonTokenizer(tmp_path / "tokenizer.json").end_of_text == guessed == 0
    for name, fields, wanted in (
        ("special_tokens_map.json", {"eos_token": {"content": "<|eot_id|>"}, "bos_token": "<|endoftext|>"}, other),
        ("tokenizer_config.json", {"bos_token": "<|endoftext|>"}, other),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, chat),
        ("tokenizer_config.json", {"eos_token": "<unknown>"}, other),
        ("special_tokens_map.json", {}, guessed),
    ):
        (tmp_path / name).write_text(json.dumps(fields), encoding="utf-8")
        assert JsonTokenizer(tmp_path / "tokenizer.json").end_of_text == wanted, fields
    # The names go with it into another folder.
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}', encoding="utf-8")
    JsonTokenizer(tmp_path / "tokenizer.json").save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").end_of_text == chat
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="can't be read as JSON"):
        _ = JsonTokenizer(tmp_path / "tokenizer.json").end_of_text


def test_a_text_is_encoded_whole_whatever_batches_the_file_was_saved_for(bpe_path, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(bpe_path))
    inner.enable_truncation(5)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "batches.json"))
    cut, plain = JsonTokenizer(tmp_path / "batches.json"), JsonTokenizer(bpe_path)
    assert list(cut.encode(TEXT)) == list(plain.encode(TEXT))
    assert [list(ids) for ids in cut.encode_batch(["me", ""])] == [list(ids) for ids in plain.encode_batch(["me", ""])]
    assert cut.splits_at_spaces


def test_other_kinds_of_vocabulary_decode_through_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"call": 0, "me": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    assert tokenizer.decode_bytes(tokenizer.encode("call me")) == b"call me"
    assert not tokenizer.bytes_add_up
    assert tokenizer.end_of_text is None


def test_saved_into_a_folder_and_read_from_it(bpe_path, tmp_path):
    for number, tokenizer in enumerate((ByteTokenizer(), JsonTokenizer(bpe_path))):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer.save(folder)
        again = load_tokenizer(folder)
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert list(again.encode(TEXT)) == list(tokenizer.encode(TEXT))
        assert len(list(folder.iterdir())) == 1, "no temporary file stays"


def test_bad_sources_are_named(tmp_path, monkeypatch):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"wanted a `tokenizers` JSON file, got .*bad.json"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match="which does not exist"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"wanted tokenizer.json or statescan_tokenizer.json in the folder"):
        load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'statescan\[hub\]'"):
        load_tokenizer(tmp_path / "bad.json")


def test_token_dtype_is_the_narrowest():
    assert [token_dtype(size) for size in (1, 256, 257, 65536, 65537)] == [
        np.dtype(d) for d in ("u1", "u1", "u2", "u2", "u4")
    ]


def test_symbols_there_and_back(tmp_path):
    tokenizer = SymbolTokenizer(".AB?é")
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode("B..?é")
    assert ids.tolist() == [2, 0, 0, 3, 4]
    assert tokenizer.decode(ids) == "B..?é"
    assert tokenizer.decode_bytes(ids) == tokenizer.decode(ids).encode() == "B..?é".encode()
    assert [ids.tolist() for ids in tokenizer.encode_batch(["A", ""])] == [[1], []]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, SymbolTokenizer)
    assert (again.symbols, again.fingerprint) == (tokenizer.symbols, tokenizer.fingerprint)
    assert SymbolTokenizer(".BA?é").fingerprint != tokenizer.fingerprint
    with pytest.raises(DataError, match=r"wanted characters of '.AB\?é', got 'x'"):
        tokenizer.encode("Ax")
    with pytest.raises(DataError, match=r"wanted ids in \[0, 5\), got 1 to 5"):
        tokenizer.decode([1, 5])
    for symbols in ("", "AA"):
        with pytest.raises(DataError, match="wanted distinct characters"):
            SymbolTokenizer(symbols)


@pytest.mark.parametrize("text", ['{"kind": "words"}', "{", "[]"])
def test_a_tokenizer_file_that_none_of_ours_wrote_is_named(tmp_path, text):
    (tmp_path / "statescan_tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"wanted what save wrote, got .*statescan_tokenizer.json"):
        load_tokenizer(tmp_path)
