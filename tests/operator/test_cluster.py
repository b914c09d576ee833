"""What is said to the API server, before it is said."""

from __future__ import annotations

import yaml
from hypothesis import given
from hypothesis import strategies as st

from pagoda_operator.cluster import _to_yaml


# A key of YAML has at most 1,024 characters.
@given(text=st.text(max_size=100))
def test_what_is_applied_is_yaml_whatever_its_letters(text: str) -> None:
    assert yaml.safe_load(_to_yaml({text: [text]})) == {text: [text]}


def test_an_emoji_is_one_character() -> None:
    assert _to_yaml({"a": "鑑🏯\x00\x85"}) == '{"a": "\\u9451🏯\\u0000\\u0085"}'
