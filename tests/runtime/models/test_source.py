from __future__ import annotations

import ctypes
import json
import mmap
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pagoda_runtime.cli import main
from pagoda_runtime.convert.testing import write_gguf
from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.registry import load_model_config
from pagoda_runtime.models.source import read_ahead, resolve_model


def quiet(phase, percent, bytes_per_second):
    pass


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve_model(str(tmp_path), None, quiet) == tmp_path


def test_a_gguf_file_is_converted_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path))
    source, phases = write_gguf(tmp_path / "tiny.gguf", "llama"), []
    folder = resolve_model(str(source), None, lambda phase, percent, rate: phases.append(phase))
    assert folder.is_relative_to(tmp_path / "gguf")
    assert load_model_config(folder).architecture == "LlamaForCausalLM"
    assert phases == ["convert"]


def share_in_memory(path):
    """The share of a file's pages that the system holds; asking brings none there."""
    pages = path.stat().st_size // mmap.PAGESIZE
    held = (ctypes.c_ubyte * pages)()
    # A private mapping, because ctypes takes addresses of memory that could be written only.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(first))
        status = ctypes.CDLL(None, use_errno=True).mincore(
            address, ctypes.c_size_t(len(mapped)), held
        )
        del first
    assert status == 0
    return sum(page & 1 for page in held) / pages


def test_weights_are_read_into_memory_before_they_are_wanted(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(bytes(16 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if share_in_memory(path) > 0:
        pytest.skip("this file system keeps its files in memory")
    read_ahead(str(tmp_path), most_bytes=1 << 20)
    assert share_in_memory(path) < 0.5
    read_ahead(str(tmp_path))
    deadline = time.monotonic() + 10
    while share_in_memory(path) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("uri", ["hf://org/name", "org/name", "/no/such/folder"])
def test_nothing_is_read_ahead_of_a_model_that_is_not_here(uri):
    read_ahead(uri)


@pytest.mark.parametrize(
    "uri", ["/no/such/folder", "./no-such", "a/b/c", "pvc://x/y", "hf://a/b/c"]
)
def test_what_is_neither_a_folder_nor_a_name_is_not_found(uri):
    with pytest.raises(FatalError) as caught:
        resolve_model(uri, None, quiet)
    assert caught.value.reason == "ModelNotFound"
    assert uri in caught.value.message
    assert "hf://org/name" in caught.value.message


def test_a_name_that_no_hub_has_is_not_found():
    with pytest.raises(FatalError, match=r"hf://org/a\.\.b is not a model") as caught:
        resolve_model("hf://org/a..b", None, quiet)
    assert caught.value.reason == "ModelNotFound"


class Hub(BaseHTTPRequestHandler):
    """A hub with one model, org/tiny, of one file; org/secret is gated."""

    content = json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()
    commit = "c" * 40

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def respond(self):
        if self.path.startswith("/api/models/org/tiny"):
            info = {
                "id": "org/tiny",
                "sha": self.commit,
                "siblings": [{"rfilename": "config.json"}],
            }
            if "/tree/" in self.path:
                info = [
                    {
                        "type": "file",
                        "path": "config.json",
                        "size": len(self.content),
                        "oid": "d" * 40,
                    }
                ]
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith("/org/tiny/resolve/"):
            headers = {"ETag": '"abc"', "X-Repo-Commit": self.commit}
            self.send(200, self.content, headers)
        elif "org/broken" in self.path:
            self.send(503, b"", {"X-Request-Id": "changes"})
        elif "org/forbidden" in self.path:
            self.send(403, b"")
        elif "org/secret" in self.path:
            self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"})
        else:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("uri", ["hf://org/tiny", "org/tiny"])
def test_a_name_is_downloaded_from_the_hub(hub, uri):
    seen = []
    folder = resolve_model(uri, None, lambda *report: seen.append(report))
    assert (folder / "config.json").read_bytes() == Hub.content
    assert seen[0][:2] == ("download", 0.0)
    assert seen[-1][:2] == ("download", 100.0)


def test_pull_leaves_the_model_in_the_cache_and_tells_of_it_in_few_lines(hub, capsys):
    assert main(["pull", "hf://org/tiny", "--revision", "main"]) == 0
    told = capsys.readouterr()
    assert (Path(told.out.strip()) / "config.json").read_bytes() == Hub.content
    assert told.err.splitlines()[0] == "download: 0 %"
    assert told.err.splitlines()[-1].startswith("download: 100 %")


def test_pull_ends_with_the_reason_why_there_is_no_model(hub, capsys):
    assert main(["pull", "hf://org/secret"]) == 2
    assert "ModelAccessDenied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason", "remedy"),
    [
        ("org/absent", "ModelNotFound", "--revision"),
        ("org/secret", "ModelAccessDenied", "HF_TOKEN"),
        ("org/forbidden", "ModelAccessDenied", "HF_TOKEN"),
        ("org/broken", "SourceUnreachable", "HTTP 503"),
    ],
)
def test_the_hubs_refusal_becomes_a_reason_with_a_remedy(hub, name, reason, remedy):
    with pytest.raises(FatalError, match=remedy) as caught:
        resolve_model(f"hf://{name}", None, quiet)
    assert caught.value.reason == reason
    assert "changes" not in caught.value.message


def test_a_hub_that_cannot_be_reached_is_a_network_error_and_not_a_missing_model(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FatalError, match="refused") as caught:
        resolve_model("hf://org/tiny", None, quiet)
    assert caught.value.reason == "SourceUnreachable"
    assert "http://127.0.0.1:9" in caught.value.message
    assert "HF_ENDPOINT" in caught.value.message


def test_a_full_disk_is_not_taken_for_a_missing_model(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.http_get", _write_to_full_disk)
    with pytest.raises(FatalError, match="HF_HOME") as caught:
        resolve_model("hf://org/tiny", None, quiet)
    assert caught.value.reason == "DiskFull"


def _write_to_full_disk(*arguments, **more):
    with open("/dev/full", "w") as full:
        full.write("x")
