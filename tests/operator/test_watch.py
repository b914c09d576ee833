"""kopf's side: settings that are easy to get wrong, and which key an object leads to."""

from __future__ import annotations

import itertools

import kopf

from pagoda_operator.testing import make_pod
from pagoda_operator.watch import CHILDREN, EndlessBackoff, build_settings, owners


def test_the_label_selector_applies_to_every_kind_of_child() -> None:
    settings = build_settings()
    for group, version, plural in CHILDREN:
        resource = kopf.Resource(group=group, version=version, plural=plural)
        found = list(settings.watching.label_selectors.collect(resource))
        assert found == ["app.kubernetes.io/managed-by=pagoda"]


def test_kopf_writes_nothing_of_its_own() -> None:
    settings = build_settings()
    assert settings.posting.enabled is False
    assert settings.scanning.disabled is True


def test_the_backoff_never_ends_and_never_exceeds_ten_seconds() -> None:
    pauses = list(itertools.islice(EndlessBackoff(), 100))
    assert 0.5 <= pauses[0] <= 1.0
    assert all(5.0 <= pause <= 10.0 for pause in pauses[10:])


def test_an_object_leads_to_its_owner_and_to_what_its_label_says() -> None:
    assert owners(make_pod("rev")) == {"chat"}
    owner = {"kind": "LLMService", "name": "chat"}
    edited = {"metadata": {"ownerReferences": [owner], "labels": {"pagoda.dev/service": "another"}}}
    assert owners(edited) == {"chat", "another"}
    assert owners({"metadata": {"ownerReferences": [{"kind": "ReplicaSet", "name": "x"}]}}) == set()
