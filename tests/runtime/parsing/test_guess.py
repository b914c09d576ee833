"""Which format a chat template has."""

from __future__ import annotations

import pytest

from pagoda_runtime.parsing.formats import REASONING_FORMATS, TOOL_FORMATS, guess_format

HERMES = '<tools>{{ tools }}</tools> in <tool_call>\\n{"name": …}</tool_call>'


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        (None, None, None),
        ("{{ messages[0].content }}", None, None),
        (HERMES, "hermes", None),
        (HERMES + "<think>\n", "hermes", "think"),
        ("<tool_call>\n<function=x>\n<parameter=y>", "qwen3_coder", None),
        ("<tool_call>{{ name }}<arg_key></arg_key><think></think>", "glm45", "think"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral", None),
        ("[TOOL_CALLS][{{ calls }}] [THINK]", "mistral_json", "mistral"),
        ("<｜tool▁calls▁begin｜>\n```json\n", "deepseek_v3", None),
        ("<｜tool▁calls▁begin｜></think>", "deepseek_v31", "think"),
        ("<|start|>assistant<|channel|>final<|message|>", "openai", "openai"),
        ("<|tool_call>call:x<tool_call|><|channel>thought", "gemma4", "gemma4"),
        ("<start_function_call>call:", "functiongemma", None),
        ("<|start_of_role|><|tool_call|><think><response></response>", "granite", "granite"),
        ("<|tool_call_start|>[f()]<|tool_call_end|>", "lfm2", None),
        ("[func_name1(params_name1=…)]", "pythonic", None),
        ('{"name": function name, "parameters": dictionary of …}', "llama3_json", None),
        ('<seed:tool_call><function=x><parameter=y>"parameters": x', None, None),
    ],
)
def test_a_template_shows_its_formats_by_their_marks(template, tools, reasoning):
    found = guess_format(template, TOOL_FORMATS), guess_format(template, REASONING_FORMATS)
    assert found == (tools, reasoning)
