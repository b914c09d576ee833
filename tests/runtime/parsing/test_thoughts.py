"""Thoughts and channels, told apart from answers."""

from __future__ import annotations

import pytest
from written_answers import cuts, read

from pagoda_runtime.parsing.formats import HARMONY, REASONING_FORMATS

THOUGHTS = [name for name in REASONING_FORMATS if name != HARMONY]


@pytest.mark.parametrize("row", THOUGHTS)
@pytest.mark.parametrize("is_thinking", [False, True])
def test_thoughts_are_split_from_the_answer(row, is_thinking):
    marks = REASONING_FORMATS[row]
    text = f"{'' if is_thinking else marks.begin}\nHm, a < b?\n\nYes.\n{marks.end}\n\nIt is.\n"
    whole = read([text], None, reasoning=row, is_thinking=is_thinking)
    assert (whole.reasoning, whole.content) == ("Hm, a < b?\n\nYes.", "It is.\n")
    for pieces in cuts(text):
        assert read(pieces, None, reasoning=row, is_thinking=is_thinking) == whole
    for end in range(text.index(marks.end) + len(marks.end)):
        found = read([text[:end]], None, is_cut=True, reasoning=row, is_thinking=is_thinking)
        assert (found.content, marks.end[:3] in found.reasoning) == ("", False)


def test_an_answer_without_thoughts_is_content():
    for text in ("\nYes.", "<b>", "Yes, <think> is a tag."):
        assert read(list(text), None, reasoning="think").content == text


def test_thoughts_come_before_calls_and_granite_s_marks_of_the_answer_are_left_out():
    text = '<think>x <tool_call></think>\n<tool_call>{"name": "now"}</tool_call>'
    found = read(list(text), "hermes", reasoning="think")
    assert (found.reasoning, found.content, len(found.calls)) == ("x <tool_call>", "", 1)
    text = "<think>x</think><response>Yes.</response>"
    assert read(list(text), "granite", reasoning="granite").content == "Yes."


def test_the_channels_of_harmony_are_thoughts_words_and_calls():
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "I will look.<|end|><|start|>assistant<|channel|>commentary to=functions.now "
        '<|constrain|>json<|message|>{"a": 1}<|call|>'
    )
    whole = read([text], HARMONY, reasoning=HARMONY)
    assert (whole.reasoning, whole.content) == ("Hm.", "I will look.")
    assert [(call.name, call.arguments) for call in whole.calls] == [("now", '{"a": 1}')]
    for pieces in cuts(text):
        assert read(pieces, HARMONY, reasoning=HARMONY) == whole
    for end in range(len(text)):
        found = read([text[:end]], HARMONY, is_cut=True, reasoning=HARMONY)
        assert "<|" not in found.content + found.reasoning
    final = "<|channel|>final<|message|>Done < now.<|return|>"
    assert read(list(final), None, reasoning=HARMONY).content == "Done < now."
    assert read(["Plain."], None, reasoning=HARMONY).content == "Plain."
