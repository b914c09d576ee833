from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.tokenizer.detokenizer import MAX_UNDECODED_TOKENS, IncrementalDetokenizer
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

END = 256


class ByteTokenizer:
    """One token per byte, and a special one."""

    all_special_ids = frozenset({END})

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        parts = bytes(i for i in ids if i != END).decode("utf-8", errors="replace")
        return parts if skip_special_tokens or END not in ids else parts + "<end>"

    def piece(self, token_id: int) -> str | None:
        return chr(token_id) if token_id < 128 else None


class WordTokenizer:
    """As sentencepiece: words begin with a space, which a text loses at its start."""

    all_special_ids = frozenset({0})
    words = ("<s>", "▁the", "▁capital", "s", "▁of", ".")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = "".join(self.words[i] for i in ids if i or not skip_special_tokens)
        return text.replace("▁", " ").removeprefix(" ")

    def piece(self, token_id: int) -> str | None:
        return None


class WithoutPieces:
    """A tokenizer of which every token is decoded among its neighbours."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.all_special_ids = tokenizer.all_special_ids
        self.decode = tokenizer.decode

    def piece(self, token_id: int) -> str | None:
        return None


def byte_level_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġthe", "âĤ¬", "âĤ", "¬x", "Ċ"]
    vocabulary = {token: number for number, token in enumerate(alphabet + words)}
    fast = FastTokenizer(BPE(vocab=vocabulary, merges=[]))
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    return Tokenizer(fast, special_tokens={})


def sentencepiece_tokenizer() -> Tokenizer:
    words = ["<unk>", "▁", "▁the", "s", "€", "▁▁", "\n"] + [
        f"<0x{byte:02X}>" for byte in range(256)
    ]
    vocabulary = {token: number for number, token in enumerate(words)}
    fast = FastTokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    fast.add_special_tokens(["<end>"])
    return Tokenizer(fast, special_tokens={})


TOKENIZERS = {"byte level": byte_level_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}


def make(**params: object) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(ByteTokenizer(), SamplingParams(**params))


def push_all(detokenizer: IncrementalDetokenizer, text: str) -> list[str]:
    return [detokenizer.push([byte]) for byte in text.encode()] + [detokenizer.finish()]


def test_an_end_token_gives_no_text_though_the_vocabulary_has_it_as_an_ordinary_one():
    def text(**params: object) -> str:
        params_ = SamplingParams(**params)
        detokenizer = IncrementalDetokenizer(ByteTokenizer(), params_, eos_token_ids=[ord("!")])
        return detokenizer.push(b"hi!") + detokenizer.finish()

    assert text() == text(include_stop_str_in_output=True) == "hi"
    assert text(ignore_eos=True) == text(skip_special_tokens=False) == "hi!"


def test_half_a_character_is_held_back():
    assert push_all(make(), "aé€") == ["a", "", "é", "", "", "€", ""]


def test_what_never_becomes_a_character_is_shown_at_the_end():
    detokenizer = make()
    assert detokenizer.push(list("€".encode()[:2])) == ""
    assert detokenizer.finish() == "\ufffd"


def test_endless_broken_bytes_are_shown_after_a_while():
    detokenizer = make()
    shown = [detokenizer.push([0x80]) for _ in range(4 * MAX_UNDECODED_TOKENS)]
    assert any(shown)
    assert len(detokenizer._ids) <= 2 * MAX_UNDECODED_TOKENS


@given(st.text(max_size=30), st.lists(st.integers(1, 9), min_size=1))
def test_any_text_comes_through_however_it_is_cut(text, sizes):
    detokenizer, data, shown = make(), list(text.encode()), []
    while data:
        size = sizes[len(data) % len(sizes)]
        shown.append(detokenizer.push(data[:size]))
        data = data[size:]
    assert "".join(shown) + detokenizer.finish() == text


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_pieces_give_the_text_that_decoding_gives(kind, data):
    tokenizer = TOKENIZERS[kind]
    token_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40)
    prompt, output = data.draw(token_ids), data.draw(token_ids)
    params = SamplingParams(skip_special_tokens=data.draw(st.booleans()))
    shown = []
    for decoder in (tokenizer, WithoutPieces(tokenizer)):
        detokenizer = IncrementalDetokenizer(decoder, params, prompt_token_ids=prompt)
        pushes = [(detokenizer.push([i]), detokenizer.num_decoded) for i in output]
        shown.append([*pushes, detokenizer.finish()])
    assert shown[0] == shown[1]


def test_spaces_between_words_are_kept():
    detokenizer = IncrementalDetokenizer(WordTokenizer(), SamplingParams())
    assert [detokenizer.push([i]) for i in (1, 2, 3, 4, 5)] == ["the", " capital", "s", " of", "."]


def test_a_continuation_keeps_its_first_space():
    detokenizer = IncrementalDetokenizer(WordTokenizer(), SamplingParams(), prompt_token_ids=[0, 1])
    assert detokenizer.push([2, 4]) == " capital of"


@pytest.mark.parametrize(("skip", "text"), [(True, "hi"), (False, "hi<end>")])
def test_special_tokens_are_shown_only_if_asked_for(skip, text):
    detokenizer = make(skip_special_tokens=skip)
    assert detokenizer.push([*b"hi", END]) + detokenizer.finish() == text


def test_a_stop_token_gives_no_text():
    assert make(stop_token_ids=(ord("\n"),)).push(list(b"hi\n")) == "hi"


def test_a_stop_string_over_token_borders_is_never_shown():
    detokenizer = make(stop=("\nUser:",))
    shown = push_all(detokenizer, "yes\nUser: no")
    assert "".join(shown) == "yes"
    assert detokenizer.stopped_by == "\nUser:"


def test_the_beginning_of_a_stop_string_is_shown_once_it_turns_out_to_be_none():
    assert push_all(make(stop=("abc",)), "xabd") == ["x", "", "", "abd", ""]


def test_a_held_back_beginning_is_shown_at_the_end():
    detokenizer = make(stop=("abc",))
    assert push_all(detokenizer, "xab") == ["x", "", "", "ab"]
    assert detokenizer.stopped_by is None


@pytest.mark.parametrize("grouped", [True, False])
def test_the_stop_string_that_is_complete_first_wins(grouped):
    detokenizer = make(stop=("bcd", "c"))
    data = list(b"abcd")
    pushes = [data] if grouped else [[byte] for byte in data]
    assert "".join(detokenizer.push(ids) for ids in pushes) == "ab"
    assert detokenizer.stopped_by == "c"


@given(
    st.text(alphabet="ab", max_size=20),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_text_shown_ends_before_the_first_complete_stop_string(text, stop):
    detokenizer = make(stop=tuple(stop))
    shown = "".join(push_all(detokenizer, text))
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert (shown, detokenizer.stopped_by) == (text, None)
    else:
        matched = max((s for s in stop if text[: min(ends)].endswith(s)), key=len)
        assert (shown, detokenizer.stopped_by) == (text[: min(ends) - len(matched)], matched)


@given(
    st.text(alphabet="ab", max_size=20),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 20),
    st.integers(1, 5),
)
def test_a_stop_string_that_is_complete_before_min_tokens_is_text(text, stop, min_tokens, size):
    detokenizer, data = make(stop=tuple(stop), min_tokens=min_tokens), text.encode()
    pushes = [data[first : first + size] for first in range(0, len(data), size)]
    shown = "".join(map(detokenizer.push, pushes)) + detokenizer.finish()
    ends = [
        end
        for end in range(max(1, min_tokens), len(text) + 1)
        if any(text[:end].endswith(s) for s in stop)
    ]
    if not ends:
        assert (shown, detokenizer.stopped_by) == (text, None)
        assert detokenizer.num_tokens == len(text)
    else:
        matched = max((s for s in stop if text[: ends[0]].endswith(s)), key=len)
        assert (shown, detokenizer.stopped_by) == (text[: ends[0] - len(matched)], matched)
        assert detokenizer.num_tokens == ends[0]


def test_nothing_is_shown_after_a_stop():
    detokenizer = make(stop=("x",))
    detokenizer.push(list(b"ax"))
    assert detokenizer.push(list(b"more")) + detokenizer.finish() == ""


@pytest.mark.parametrize("grouped", [True, False])
def test_a_stop_string_is_the_end_of_the_text_if_it_is_asked_for(grouped):
    detokenizer = make(stop=("bc",), include_stop_str_in_output=True)
    data = list(b"abcd")
    pushes = [data] if grouped else [[byte] for byte in data]
    assert "".join(detokenizer.push(ids) for ids in pushes) == "abc"
    assert (detokenizer.stopped_by, detokenizer.num_shown) == ("bc", 3)


def test_a_stop_token_gives_text_if_it_is_asked_for():
    params = {"stop_token_ids": (ord("\n"),), "include_stop_str_in_output": True}
    assert make(**params).push(list(b"hi\n")) == "hi\n"


def test_each_token_knows_where_its_text_begins():
    detokenizer = make(stop=("b€!",))
    begins, shown = [], []
    for byte in "ab€c".encode():
        begins.append(detokenizer.num_decoded)
        detokenizer.push([byte])
        shown.append((detokenizer.num_shown, detokenizer.is_certain))
    assert begins == [0, 1, 2, 2, 2, 3]
    assert shown == [(1, True), (1, False), (1, False), (1, False), (1, False), (4, True)]
