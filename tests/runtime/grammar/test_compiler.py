"""Grammars that are compiled, followed, and refused."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from pagoda_runtime.errors import FatalError, RequestError
from pagoda_runtime.grammar.compiler import Grammars, Matcher
from pagoda_runtime.grammar.forms import json_grammar, regex_grammar
from pagoda_runtime.grammar.vocabulary import light_vocabulary
from pagoda_runtime.server.testing import ByteTokenizer


def make_grammars(
    *, vocab_size: int = 256, end_token_ids: tuple[int, ...] = (0,), **options: Any
) -> Grammars:
    return Grammars(ByteTokenizer, vocab_size=vocab_size, end_token_ids=end_token_ids, **options)


def begin(grammars: Grammars, text: str, **options: bool) -> Matcher:
    return grammars.compile(text).result(10).begin(**options)


def allowed(grammars: Grammars, *matchers: Matcher) -> list[set[int]]:
    masks = grammars.start_masks(matchers)()
    bits = [np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little") for mask in masks]
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def test_a_mask_holds_the_tokens_that_may_come_next_and_the_end_where_it_may():
    grammars = make_grammars()
    matcher = begin(grammars, regex_grammar("ab?"))
    assert allowed(grammars, matcher) == [{ord("a")}]
    matcher.take(ord("a"))
    assert allowed(grammars, matcher) == [{ord("b"), 0}]
    assert not matcher.is_finished
    matcher.take(ord("b"))
    assert matcher.is_finished
    assert matcher.error is None


def test_all_end_tokens_of_a_model_may_come_where_one_may():
    grammars = make_grammars(vocab_size=300, end_token_ids=(0, 290))
    matcher = begin(grammars, regex_grammar("a+"))
    assert allowed(grammars, matcher) == [{ord("a")}]
    matcher.take(ord("a"))
    assert allowed(grammars, matcher) == [{ord("a"), 0, 290}]


@pytest.mark.parametrize("end_token_ids", [(0,), ()])
def test_an_ignored_end_comes_only_where_nothing_else_may(end_token_ids):
    grammars = make_grammars(end_token_ids=end_token_ids)
    matcher = begin(grammars, regex_grammar("a{1,2}"), ignore_eos=True)
    matcher.take(ord("a"))
    assert allowed(grammars, matcher) == [{ord("a")}]


def test_forks_go_their_own_ways_and_share_nothing():
    grammars = make_grammars()
    first = begin(grammars, regex_grammar("a(b|c)d|x"))
    first.take(ord("a"))
    second = first.fork()
    first.take(ord("b"))
    assert allowed(grammars, first, second) == [{ord("d")}, {ord("b"), ord("c")}]


@pytest.mark.parametrize("vocab_size", [256, 259, 320])
def test_a_mask_has_the_models_tokens_and_nothing_for_those_without_a_meaning(vocab_size):
    grammars = make_grammars(vocab_size=vocab_size)
    matcher = begin(grammars, "start: /(?s:.*)/")
    (mask,) = grammars.start_masks([matcher])()
    assert len(mask) == 4 * -(-vocab_size // 32)
    assert max(allowed(grammars, matcher)[0]) < 256


def test_a_model_with_fewer_tokens_than_its_tokenizer_gets_only_those_it_has():
    grammars = make_grammars(vocab_size=100)
    assert allowed(grammars, begin(grammars, "start: /[a-z]+/")) == [{97, 98, 99}]


def test_a_light_vocabulary_accepts_what_the_whole_one_does():
    light = make_grammars(vocab_size=320, make_vocabulary=light_vocabulary)
    whole = make_grammars(vocab_size=320)
    for text in ("start: <[7]>", "start: /é+/", json_grammar({})):
        light.verify(text)
        whole.verify(text)
    for text in ("start: <no>", "start: <[320]>", "start: x"):
        for grammars in (light, whole):
            with pytest.raises(RequestError):
                grammars.verify(text)


def test_a_grammar_is_compiled_once():
    grammars = make_grammars()
    text = json_grammar({"type": "null"})
    assert grammars.compile(text) is grammars.compile(text)


BOMBS = {
    "no grammar": "this is no grammar",
    "no rule": "start: nothing",
    "bad regex": "start: /(/",
    "unknown token": "start: <|no_such_token|>",
    "no schema": 'start: %json {"type": "no such type"}',
    "unsupported keyword": 'start: %json {"uniqueItems": true, "type": "array"}',
    "nothing allowed": 'start: %json {"type": "integer", "minimum": 3, "maximum": 1}',
    "recursion": "start: start",
    "deep brackets": f"start: {'(' * 100_000}/a/{')' * 100_000}",
    "deep schema": "start: %json " + '{"items": ' * 100_000 + "{}" + "}" * 100_000,
    "chain of terminals": "start: A0\n"
    + "".join(f"A{i}: A{i + 1}\n" for i in range(12_000))
    + "A12000: /a/\nwrong",
    "large lookahead": "start: /(a|b)*a(a|b){10000}c/ & /(b|c)*b(b|c){10000}/",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_what_is_no_grammar_or_too_large_is_refused_within_seconds(text):
    grammars = make_grammars()
    begun = time.monotonic()
    with pytest.raises(RequestError) as caught:
        grammars.verify(text)
    assert len(caught.value.message) < 600
    assert time.monotonic() - begun < 5


def test_long_chains_of_rules_are_compiled():
    chain = "".join(f"r{i}: r{i + 1}\n" for i in range(10_000))
    make_grammars().verify(f'start: r0\n{chain}r10000: "a"\n')


def test_a_grammar_that_takes_too_long_is_refused_while_others_are_served():
    def slow() -> ByteTokenizer:
        time.sleep(0.5)
        return ByteTokenizer()

    grammars = Grammars(slow, vocab_size=256, end_token_ids=[0], compile_seconds=0.01)
    with pytest.raises(RequestError, match=r"not compiled after 0\.01 seconds"):
        grammars.verify('start: "a"')
    # What was begun is there for the next one.
    grammars.compile_seconds = 10
    grammars.verify('start: "a"')


def test_a_tokenizer_that_cannot_be_loaded_is_told_of_each_request():
    def fail() -> ByteTokenizer:
        raise FatalError("ModelNotFound", "tokenizer.json does not exist.")

    grammars = Grammars(fail, vocab_size=256, end_token_ids=[0])
    for _ in range(2):
        with pytest.raises(RequestError, match=r"tokenizer\.json does not exist"):
            grammars.verify('start: "a"')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('start: (a b)*\na: "a"*\nb: "a"*\n', "max is 1000"),
        ('start: x\nx: x x x | "a" |\n', "take too long"),
    ],
)
def test_a_sequence_that_becomes_too_complex_has_an_error_and_others_go_on(text, words):
    grammars = make_grammars()
    heavy, light = begin(grammars, text), begin(grammars, "start: /a+/")
    begun = time.monotonic()
    while heavy.error is None:
        assert time.monotonic() - begun < 20
        allowed(grammars, heavy, light)
        heavy.take(ord("a"))
        light.take(ord("a"))
    assert "cannot follow its grammar" in heavy.error
    assert words in heavy.error
    assert light.error is None
