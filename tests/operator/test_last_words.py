"""What an engine left behind, in the words of its user."""

from __future__ import annotations

import pytest

from pagoda_operator.last_words import parse_last_words, say_as_user
from pagoda_operator.testing import make_service


def test_only_a_json_line_with_a_known_reason_is_last_words() -> None:
    assert parse_last_words('{"reason": "Whatever", "message": "x"}') is None
    assert parse_last_words("[1]\n7\nnull\nnot json") is None
    line = '{"reason": "DiskFull", "message": "no room"}'
    assert parse_last_words(f"a line of the log\n{line}\nmore log") == ("DiskFull", "no room")


@pytest.mark.parametrize(
    ("uri", "message", "said"),
    [
        ("pvc://models/gemma", "The folder /models/gemma is", "The folder pvc://models/gemma is"),
        ("pvc://models", "/models/config.json: x", "pvc://models/config.json: x"),
        ("pvc://m/a", "--model /models/a and /srv/models", "--model pvc://m/a and /srv/models"),
        ("hf://org/name", "no /models here", "no /models here"),
    ],
)
def test_the_model_is_named_by_the_uri_of_the_spec(uri: str, message: str, said: str) -> None:
    spec = make_service({"model": {"uri": uri}}).spec
    assert say_as_user(spec, "ModelNotFound", message) == said
