"""API keys in files: who may call, and that a changed file is followed without a restart."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from pagoda_runtime import keys
from pagoda_runtime.errors import FatalError
from pagoda_runtime.keys import ApiKeys
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "REFRESH_SECONDS", 0.0)


def mount(folder: Path, version: str, secret: dict[str, str]) -> Path:
    """Put a Secret into folder as the kubelet does: all names change at once, by one rename."""
    content = folder / f"..{version}"
    content.mkdir(parents=True)
    for name, value in secret.items():
        (content / name).write_text(value)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..data_tmp").symlink_to(content.name)
    (folder / "..data_tmp").rename(folder / "..data")
    for name in folder.iterdir():
        if not name.name.startswith("..") and name.name not in secret:
            name.unlink()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return mount(tmp_path / "api-keys", "1", {"alice": "key-a\n", "bob": "key-b"})


@pytest_asyncio.fixture
async def http(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    config = make_config("--api-key-file", str(folder), "--api-key", "fixed")
    state = make_state(FakeEngine(config.engine), config)
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        yield http


async def who_may(http: httpx.AsyncClient, *names: str) -> set[str]:
    """Those of the keys that the server takes."""
    answers = {
        name: await http.get("/v1/models", headers={"authorization": f"Bearer {name}".strip()})
        for name in names
    }
    assert {answer.status_code for answer in answers.values()} <= {200, 401}
    return {name for name, answer in answers.items() if answer.status_code == 200}


async def test_each_file_of_a_mounted_secret_is_a_key_and_a_new_version_takes_effect(http, folder):
    names = ("key-a", "key-b", "key-c", "fixed", "..data", "alice", "")
    assert await who_may(http, *names) == {"key-a", "key-b", "fixed"}
    mount(folder, "2", {"bob": "key-b", "carol": "key-c"})
    assert await who_may(http, *names) == {"key-b", "key-c", "fixed"}


async def test_a_secret_without_keys_lets_in_nobody_by_it(http, folder, caplog):
    mount(folder, "2", {"alice": "\n"})
    assert await who_may(http, "key-a", "", "fixed") == {"fixed"}
    assert sum("holds no key" in line for line in caplog.messages) == 1


async def test_keys_that_cannot_be_read_hold_on_until_they_can(http, folder, caplog):
    hidden = folder.rename(folder.with_name("gone"))
    assert await who_may(http, "key-a", "key-c") == {"key-a"}
    assert sum("its last keys hold on" in line for line in caplog.messages) == 1
    mount(hidden, "2", {"carol": "key-c"}).rename(folder)
    assert await who_may(http, "key-a", "key-c") == {"key-c"}


def test_a_file_has_a_key_a_line_and_is_read_again_after_a_second(tmp_path, monkeypatch):
    monkeypatch.undo()
    path = tmp_path / "keys"
    path.write_text(" one \n\ntwo\n")
    known = ApiKeys(path=str(path))
    assert {key for key in (b"one", b"two", b"", b"three") if known.accept(key)} == {b"one", b"two"}
    path.write_text("three\n")
    time.sleep(keys.REFRESH_SECONDS)
    assert known.accept(b"three")
    assert not known.accept(b"one")


def test_a_pipe_is_read_once():
    read_end, write_end = os.pipe()
    os.write(write_end, b"piped\n")
    os.close(write_end)
    known = ApiKeys(path=f"/dev/fd/{read_end}")
    os.close(read_end)
    assert known.accept(b"piped")
    assert known.accept(b"piped")


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_keys_is_named_at_the_start(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FatalError) as caught:
        ApiKeys(path=str(path))
    assert caught.value.reason == "InvalidFlags"
    assert f"--api-key-file {path}" in caught.value.message


def test_a_key_file_that_cannot_be_used_ends_the_command_before_it_listens(start, log):
    server = start("--api-key-file", "/no/such/file")
    assert server.wait() == 2
    assert json.loads(log.read_text())["reason"] == "InvalidFlags"
    assert not any("Listening" in line for line in server.lines)


def test_no_process_shows_keys_of_the_environment_or_a_file(start, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("in-file")
    monkeypatch.setenv("PAGODA_API_KEY", "in-variable")
    server = start("--api-key-file", str(tmp_path / "keys"))
    url = server.wait_for_url()
    for key, status in (("in-file", 503), ("in-variable", 503), ("other", 401)):
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": [1]}, headers=headers)
        assert answer.status_code in (status, 200), key
    for pid in (server.process.pid, *server.children()):
        assert not re.search(rb"in-file|in-variable", Path(f"/proc/{pid}/cmdline").read_bytes())
