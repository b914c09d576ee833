"""The page at /: what it may do, and that it loads nothing. A browser drives it elsewhere
(`make playground-check`)."""

from __future__ import annotations

import base64
import hashlib
import re

import httpx

from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server


async def get(*flags: str) -> httpx.Response:
    config = make_config(*flags)
    state = make_state(FakeEngine(config.engine), config)
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        return await http.get("/")


async def test_the_page_needs_no_key_and_runs_its_own_script_alone():
    page = await get("--api-key", "k")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


async def test_the_page_loads_nothing_from_anywhere():
    page = (await get()).text
    assert not re.search(r"\bsrc=|@import|url\(|href=\"(?!data:,)", page)
    assert not re.search(r" on\w+=| style=|innerHTML|eval\(", page)


async def test_the_page_goes_with_its_flag():
    assert (await get("--no-playground")).status_code == 404
