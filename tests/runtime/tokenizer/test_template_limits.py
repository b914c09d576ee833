"""Templates that go on for ever, take too much, or want calls in another form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count

import pytest

from pagoda_runtime.errors import RequestError
from pagoda_runtime.tokenizer.chat_template import ChatTemplate

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"é": [1]}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def ticking() -> Iterator[float]:
    """A clock on which each look costs a millisecond."""
    return (tick / 1000 for tick in count())


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% for a in range(9) %}{{ m(n + 1) if n < 50 }}{% endfor %}{% endmacro %}"
        "{{ m(0) }}",
    ],
)
def test_a_template_that_goes_on_for_ever_is_ended(source):
    template = ChatTemplate(source, clock=ticking().__next__)
    with pytest.raises(RequestError, match="not done after 2 seconds of computing"):
        template.render([USER], {})


@pytest.mark.parametrize(
    "source", ["{{ 'x' * 99999999 }}", "{{ [0] * (10 ** 9) }}", "{{ 10 ** 99999999 }}"]
)
def test_a_template_cannot_make_values_without_bound(source):
    with pytest.raises(RequestError, match=r"repeats a value|an exponent"):
        ChatTemplate(source).render([USER], {})


def test_products_of_common_size_are_computed():
    assert ChatTemplate("{{ '-' * 3 }}{{ 2 * 3 }}{{ 2 ** 3 }}").render([USER], {}) == "---68"


@pytest.mark.parametrize(
    "written",
    ["{{ call.arguments | tojson }}", "{{ call.arguments + '' }}", "{{ call.arguments }}"],
)
def test_arguments_have_the_form_that_the_template_writes_as_json(written):
    source = (
        "{% for m in messages if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
        f"{{{{ call.name }}}}:{written}{{% endfor %}}"
    )
    template = ChatTemplate(source)
    for _ in range(2):
        assert (
            template.render([USER, CALLING], {})
            == f"f:{json.dumps({'é': [1]}, ensure_ascii=False)}"
        )


def test_calls_come_without_content_where_the_template_looks_for_them_there_alone():
    template = ChatTemplate(
        "{% for m in messages %}{% if m.tool_calls and m.content is none %}"
        "{{ m.tool_calls[0].function.arguments + '' }}{% else %}{{ m.content }};{% endif %}"
        "{% endfor %}"
    )
    assert template.render([USER, CALLING], {}) == 'Hi;{"é": [1]}'
    assert template.render([USER, {**CALLING, "content": "x"}], {}) == "Hi;x;"
