"""What is said to the API server, before it is said."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.aio.config import kube_config

from pagoda_operator.cluster import ApiServer, _to_yaml
from pagoda_operator.telemetry import Telemetry


# A key of YAML has at most 1,024 characters.
@given(text=st.text(max_size=100))
def test_what_is_applied_is_yaml_whatever_its_letters(text: str) -> None:
    assert yaml.safe_load(_to_yaml({text: [text]})) == {text: [text]}


def test_an_emoji_is_one_character() -> None:
    assert _to_yaml({"a": "鑑🏯\x00\x85"}) == '{"a": "\\u9451🏯\\u0000\\u0085"}'


@pytest.fixture
async def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """An API server that KUBECONFIG names, and that says who asks."""

    async def answer(request: web.Request) -> web.Response:
        told = {"path": str(request.raw_path), "as": request.headers.get("Authorization")}
        return web.json_response(told)

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    kubeconfig = tmp_path / "kubeconfig"
    # It was read from KUBECONFIG when the module was imported.
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    kubeconfig.write_text(make_kubeconfig(f"http://{host}:{port}"))
    yield f"http://{host}:{port}"
    await runner.cleanup()


def make_kubeconfig(server: str) -> str:
    parts = {
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    return json.dumps({"apiVersion": "v1", "kind": "Config", **parts})


async def ask() -> dict[str, str]:
    api = await ApiServer.connect(Telemetry())
    try:
        found = await api.get("Pod", "team", "a")
    finally:
        await api.close()
    assert found is not None
    return found


async def test_a_password_for_the_host_in_netrc_takes_no_tokens_place(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert (await ask())["as"] == "Bearer t"


async def test_the_proxy_of_the_environment_is_asked_unless_the_host_needs_none(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kubeconfig").write_text(make_kubeconfig("http://api.invalid:6443"))
    monkeypatch.setenv("HTTP_PROXY", url)
    assert (await ask())["path"].startswith("http://api.invalid:6443/api/v1")
    (tmp_path / "kubeconfig").write_text(make_kubeconfig(url))
    monkeypatch.setenv("HTTP_PROXY", "http://nobody.invalid:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert (await ask())["path"].startswith("/api/v1")
