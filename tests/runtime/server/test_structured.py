"""The forms of structured output in bodies, and those that are refused before anything runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from pagoda_runtime.ipc.messages import EngineRequest
from pagoda_runtime.server.protocol import CompletionRequest
from pagoda_runtime.server.structured import find_structure
from pagoda_runtime.server.testing import (
    FakeEngine,
    FakeStream,
    make_config,
    make_state,
    running_server,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = {"structures": [{"begin": "<t>", "schema": SCHEMA, "end": "</t>"}], "triggers": ["<t"]}
FIELDS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
        }
    },
    {"response_format": {"type": "structural_tag", **TAG}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": '{"type": "null"}', "disable_any_whitespace": True}},
    {"structured_outputs": {"json_object": True, "whitespace_pattern": " ?"}},
    {"structured_outputs": {"regex": "a+"}},
    {"structured_outputs": {"choice": ["a", "b"]}},
    {"structured_outputs": {"grammar": 'start: "a"'}},
    {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}},
    {"structured_outputs": {"structural_tag": TAG}},
    {"guided_json": SCHEMA},
    {"guided_json_object": True},
    {"guided_regex": "a+"},
    {"guided_choice": ["a"]},
    {"guided_grammar": 'start: "a"'},
]
NEUTRAL: list[dict[str, Any]] = [
    {"response_format": {"type": "text"}},
    {"response_format": None, "guided_json": None},
    {"guided_regex": "", "guided_choice": [], "guided_json_object": False},
]


class Recorder(FakeEngine):
    """Keeps the grammars that it was asked for."""

    grammars: list[str | None]

    def generate(self, request: EngineRequest) -> FakeStream:
        self.grammars.append(request.sampling_params.grammar)
        return super().generate(request)


@pytest.fixture
def engine() -> Recorder:
    engine = Recorder(make_config().engine)
    engine.grammars = []
    return engine


@pytest_asyncio.fixture
async def http(engine: Recorder) -> AsyncIterator[httpx.AsyncClient]:
    state = make_state(engine, make_config())
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        yield http


async def complete(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **fields})


@pytest.mark.parametrize("fields", FIELDS, ids=str)
async def test_each_form_is_a_grammar_for_the_engine(http, engine, fields):
    assert (await complete(http, **fields)).status_code == 200
    message = {"role": "user", "content": "a"}
    body = {"messages": [message], "max_tokens": 1, **fields}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    first, second = engine.grammars
    assert first == second
    assert "start:" in first


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
async def test_a_form_that_asks_for_nothing_is_none(http, engine, fields):
    assert (await complete(http, **fields)).status_code == 200
    assert engine.grammars == [None]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_json": {"type": "bogus"}}, "guided_json", "not valid"),
        ({"guided_json": "["}, "guided_json", "is no JSON"),
        ({"guided_json": {"uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_regex": "(a"}, "guided_regex", "not valid"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look"),
        ({"structured_outputs": {}}, "structured_outputs", "must have one of json"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "goes with json",
        ),
        (
            {"structured_outputs": {"choice": ["a"], "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
            "goes with json",
        ),
        (
            {
                "structured_outputs": {
                    "json": {},
                    "whitespace_pattern": " ",
                    "disable_any_whitespace": True,
                }
            },
            "structured_outputs.whitespace_pattern",
            "leave one out",
        ),
        (
            {"response_format": {"type": "json_object", "triggers": ["<"]}},
            "response_format.triggers",
            "goes with the type structural_tag",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "list of texts"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "not valid"),
        ({"guided_grammar": 'start: "a"' + 300_000 * " "}, "guided_grammar", "262144"),
        ({"guided_grammar": "start: " + "(" * 9000}, "guided_grammar", "within each other"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "is missing",
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex",
            "leave one out",
        ),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "leave one out"),
        (
            {"guided_regex": "a", "use_beam_search": True, "n": 2},
            "guided_regex",
            "use_beam_search does not heed",
        ),
        (
            {"guided_json": {"enum": [str(n) * 20 for n in range(20_000)]}},
            "guided_json",
            "grammar",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "jsn"),
    ],
)
async def test_what_cannot_be_served_is_a_400_that_names_its_field(http, fields, param, words):
    for stream in (False, True):
        answer = await complete(http, stream=stream, **fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert words in error["message"]
        assert len(error["message"]) < 800


async def test_grammar_bombs_disturb_nobody(http):
    bombs = [
        f"start: A0 {n}\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(12_000))
        for n in range(4)
    ]
    bombs += ["start: " + f"({n}" * 60_000 for n in range(4)]

    async def ask_plainly() -> None:
        for _ in range(20):
            assert (await complete(http)).status_code == 200

    tasks = [complete(http, guided_grammar=bomb) for bomb in bombs]
    *answers, _ = await asyncio.gather(*tasks, ask_plainly())
    assert [answer.status_code for answer in answers] == [400] * len(bombs)


async def test_metrics_count_grammars_and_those_that_were_refused(http):
    await complete(http, guided_regex="a+")
    await complete(http, guided_regex="(a")
    lines = (await http.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("vllm:grammar"))
    assert values['vllm:grammar_failures_total{model_name="fake"}'] == "1.0"
    assert values['vllm:grammar_compile_seconds_count{model_name="fake"}'] == "2.0"


def test_a_structure_names_the_field_that_asks_for_it():
    body = CompletionRequest(prompt="a", guided_choice=["x"])
    structure = find_structure(body)
    assert structure is not None
    assert structure.param == "guided_choice"
    assert structure.write() == 'start: CHOICE\nCHOICE: "x"\n'
