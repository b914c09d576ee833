"""Templates that checkpoints carry, rendered beside transformers."""

from __future__ import annotations

import pytest

from pagoda_runtime.errors import RequestError
from pagoda_runtime.models.testing import write_tiny_tokenizer
from pagoda_runtime.tokenizer.chat_template import ChatTemplate
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer

LOOPS = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}"
)
PRINTS = "{% for m in messages %}{{ m.role }}:{{ m.content | trim }};{% endfor %}"
FIRST = "{% for m in messages %}{{ m.role }}:{{ m.content[0]['text'] }};{% endfor %}"
BOTH = (
    "{% macro write(content) %}{% if content is string %}<{{ content }}>{% else %}"
    "{% for part in content %}[{{ part['text'] }}]{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ m.role }}:{{ write(m.content) }};{% endfor %}"
)
STRING_OR_NOTHING = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.content is string %}{{ m.content }}{% endif %};{% endfor %}"
)
# Parts of users, strings of the system and of the assistant, who has to follow a user.
BY_ROLE = (
    "{% for m in messages %}{% if m.role == 'user' %}user:"
    "{% for part in m.content %}{{ part.text }}{% endfor %};"
    "{% else %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('who asks?') }}"
    "{% endif %}{{ m.role + ':' + m.content }};{% endif %}{% endfor %}"
)
TOOLS = (
    "{% if tools is not none %}TOOLS{% endif %}{% if documents is not none %}DOCUMENTS{% endif %}"
    "{{ messages[0].content }}"
)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def conversation(*contents: object) -> list[dict[str, object]]:
    roles = ("system", "user", "assistant")
    return [{"role": role, "content": c} for role, c in zip(roles, contents, strict=True)]


def render(template: str, messages: list[dict[str, object]]) -> str:
    return ChatTemplate(template).render(messages, {})


@pytest.mark.parametrize("template", [LOOPS, PRINTS, STRING_OR_NOTHING, BY_ROLE])
@pytest.mark.parametrize("contents", [("s", "onetwo", "a"), (parts("s"), parts("one", "two"), "a")])
def test_words_come_out_whatever_form_the_template_wants(template, contents):
    assert render(template, conversation(*contents)) == "system:s;user:onetwo;assistant:a;"


def test_a_template_that_reads_the_first_part_gets_all_words_in_it():
    expected = "system:s;user:onetwo;assistant:a;"
    assert render(FIRST, conversation("s", parts("one", "two"), "a")) == expected


@pytest.mark.parametrize(
    ("template", "contents"),
    [
        (LOOPS, (parts("s"), parts("one", "two"), parts("a"))),
        (PRINTS, ("s", " one ", "a")),
        (BOTH, ("s", parts("one", "two"), "a")),
        (TOOLS, ("s", "one", "a")),
    ],
)
def test_a_form_that_the_template_knows_is_rendered_as_by_transformers(
    tmp_path, template, contents
):
    from transformers import AutoTokenizer

    write_tiny_tokenizer(tmp_path, template)
    messages = conversation(*contents)
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert (
        load_tokenizer(tmp_path).apply_chat_template(messages, add_generation_prompt=False)
        == expected
    )


def test_variables_of_the_caller_replace_the_empty_tools():
    template = ChatTemplate(TOOLS)
    assert template.render(conversation("s", "u", "a"), {"tools": []}) == "TOOLSs"


def test_parts_that_are_no_text_are_left_to_the_template():
    image = [{"type": "image"}, *parts("one")]
    assert render(BOTH, [{"role": "user", "content": image}]) == "user:[][one];"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ '{} {}'.format('a') }}", "out of range"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages[0].content.nothing.more }}", "no attribute 'nothing'"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
    ],
)
def test_whatever_fails_in_a_template_is_a_request_error_with_its_words(template, words):
    # No time passes: a busy machine would be blamed in place of the template.
    compiled = ChatTemplate(template, lambda: 0.0)
    with pytest.raises(RequestError, match=words) as caught:
        compiled.render(conversation("s", "u", "a"), {})
    assert caught.value.param == "messages"
