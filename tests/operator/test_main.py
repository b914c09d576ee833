"""The operator's flags."""

from __future__ import annotations

import pytest

from pagoda_operator.main import parse_options


@pytest.mark.parametrize("flags", [[], ["--namespace="], ["--namespace", ""]])
def test_no_namespace_and_an_empty_one_are_all_of_them(flags: list[str]) -> None:
    assert parse_options(["--engine-image", "engine:1", *flags]).namespace is None


def test_a_namespace_is_the_one_that_is_served() -> None:
    assert parse_options(["--engine-image=engine:1", "--namespace=team"]).namespace == "team"
