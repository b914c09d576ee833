"""Models that a web server has, in a folder below one address."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pagoda_runtime.errors import FatalError
from pagoda_runtime.models import web
from pagoda_runtime.models.source import resolve_model

SHARDS = {"a.safetensors": bytes(range(256)) * 40, "b.safetensors": b"b" * 9000}


def quiet(phase, percent, bytes_per_second):
    pass


class WebServer(ThreadingHTTPServer):
    """`files` by path; `headers` of every request; `ranges` are (path, start) of those for a part.

    cuts: paths, and after how many bytes the next answer for them ends.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.headers = []
        self.ranges = []
        self.token = None
        self.cuts = {}
        self.redirects = {}
        self.status = None

    @property
    def uri(self):
        return f"http://127.0.0.1:{self.server_port}/models/tiny"

    def put(self, name, content):
        self.files[f"/models/tiny/{name}"] = content


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path
        server.headers.append(self.headers)
        if server.status:
            return self.answer(server.status)
        if path in server.redirects:
            return self.answer(302, headers={"Location": server.redirects[path]})
        if server.token and self.headers["Authorization"] != f"Bearer {server.token}":
            return self.answer(401)
        if path not in server.files:
            return self.answer(404)
        content = server.files[path]
        headers = {"ETag": f'"{hash(content)}"'}
        start = 0
        if asked := self.headers["Range"]:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            server.ranges.append((path, start))
        cut = server.cuts.pop(path, None)
        return self.answer(206 if start else 200, content[start:], headers, cut)

    def answer(self, status, content=b"", headers=None, cut=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path))
    monkeypatch.delenv(web.TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(web.time, "sleep", lambda seconds: None)
    server = WebServer()
    server.put("config.json", b'{"architectures": ["LlamaForCausalLM"]}')
    server.put("tokenizer.json", b"{}")
    index = {"metadata": {"total_size": 19240}, "weight_map": {n: n for n in SHARDS}}
    server.put(web.INDEX, json.dumps(index).encode())
    for name, content in SHARDS.items():
        server.put(name, content)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_files_of_a_folder_come_and_progress_is_told(server):
    reports = []
    folder = resolve_model(server.uri, None, lambda *report: reports.append(report))
    for name, content in SHARDS.items():
        assert (folder / name).read_bytes() == content
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert not (folder / "chat_template.jinja").exists()
    percents = [percent for _, percent, _ in reports]
    assert (percents[0], percents[-1]) == (0.0, 100.0)
    assert {phase for phase, _, _ in reports} == {"download"}
    assert not list(folder.glob("*.part"))


def test_a_model_of_one_file_and_an_address_with_a_slash(server):
    del server.files["/models/tiny/" + web.INDEX]
    server.put(web.WEIGHTS, b"w" * 100)
    reports = []
    folder = resolve_model(server.uri + "/", None, lambda *report: reports.append(report))
    assert (folder / web.WEIGHTS).read_bytes() == b"w" * 100
    assert reports[-2][1] == 99.9


def test_what_is_the_same_stays_and_what_changed_comes_anew(server):
    folder = resolve_model(server.uri, None, quiet)
    before = (folder / "b.safetensors").stat()
    server.put("a.safetensors", b"new")
    assert resolve_model(server.uri, None, quiet) == folder
    assert (folder / "a.safetensors").read_bytes() == b"new"
    after = (folder / "b.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_file_of_the_same_size_is_not_taken_for_the_one_that_was_cut_off(server, monkeypatch):
    folder = resolve_model(server.uri, None, quiet)
    server.put("b.safetensors", b"c" * 9000)
    server.cuts["/models/tiny/b.safetensors"] = 10
    monkeypatch.setattr(web, "ATTEMPTS", 1)
    with pytest.raises(FatalError, match="could not be downloaded"):
        resolve_model(server.uri, None, quiet)
    resolve_model(server.uri, None, quiet)
    assert (folder / "b.safetensors").read_bytes() == b"c" * 9000


def test_a_file_that_is_gone_does_not_stay_beside_the_others(server):
    folder = resolve_model(server.uri, None, quiet)
    del server.files["/models/tiny/tokenizer.json"]
    resolve_model(server.uri, None, quiet)
    assert not (folder / "tokenizer.json").exists()


def test_a_download_that_was_cut_off_goes_on_where_it_was(server):
    server.cuts["/models/tiny/a.safetensors"] = 4000
    folder = resolve_model(server.uri, None, quiet)
    assert (folder / "a.safetensors").read_bytes() == SHARDS["a.safetensors"]
    assert server.ranges == [("/models/tiny/a.safetensors", 4000)]


def test_a_server_that_is_away_leaves_what_was_fetched_whole(server):
    folder = resolve_model(server.uri, None, quiet)
    server.status = 503
    assert resolve_model(server.uri, None, quiet) == folder
    (folder.parent / f"{folder.name}.complete").unlink()
    with pytest.raises(FatalError) as caught:
        resolve_model(server.uri, None, quiet)
    assert caught.value.reason == "SourceUnreachable"
    assert "HTTP 503" in caught.value.message


def test_a_token_opens_the_folder_and_goes_to_no_other_server(server, monkeypatch):
    server.token = "secret"
    with pytest.raises(FatalError) as caught:
        resolve_model(server.uri, None, quiet)
    assert caught.value.reason == "ModelAccessDenied"
    assert web.TOKEN_VARIABLE in caught.value.message
    monkeypatch.setenv(web.TOKEN_VARIABLE, "secret")
    folder = resolve_model(server.uri, None, quiet)
    assert (folder / "config.json").exists()
    # The second time at the other end of a redirect, which asks for the token in vain.
    server.redirects["/models/tiny/config.json"] = "/elsewhere"
    server.files["/elsewhere"] = b"{}"
    with pytest.raises(FatalError, match="HTTP 401"):
        resolve_model(server.uri, None, quiet)


def test_a_bucket_is_asked_with_signatures_for_each_address_and_part(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.uri.removesuffix("/models/tiny"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server.cuts["/models/tiny/a.safetensors"] = 4000
    folder = resolve_model("s3://models/tiny", None, quiet)
    assert (folder / "a.safetensors").read_bytes() == SHARDS["a.safetensors"]
    assert folder.name.startswith("models-")
    told = [headers for headers in server.headers if headers["Range"]]
    assert "SignedHeaders=host;range;x-amz-content-sha256" in told[0]["Authorization"]
    assert all("Credential=key/" in headers["Authorization"] for headers in server.headers)
    server.status = 403
    (folder.parent / f"{folder.name}.complete").unlink()
    with pytest.raises(FatalError, match="Set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"):
        resolve_model("s3://models/tiny", None, quiet)


@pytest.mark.parametrize("missing", ["config.json", "b.safetensors"])
def test_a_missing_file_is_named(server, missing):
    del server.files[f"/models/tiny/{missing}"]
    with pytest.raises(FatalError) as caught:
        resolve_model(server.uri, None, quiet)
    assert caught.value.reason == "ModelNotFound"
    assert f"{server.uri}/{missing} does not exist" in caught.value.message


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", ".hidden", "a/b", 7])
def test_a_name_that_leads_out_of_the_folder_is_refused(server, name):
    server.put(web.INDEX, json.dumps({"weight_map": {"w": name}}).encode())
    with pytest.raises(FatalError, match="is no name of a file"):
        resolve_model(server.uri, None, quiet)


def test_the_parts_of_an_embedding_model_come_too(server):
    server.put(web.MODULES, json.dumps([{"path": ""}, {"path": "1_Pooling"}]).encode())
    server.put("1_Pooling/config.json", b'{"pooling_mode_mean_tokens": true}')
    folder = resolve_model(server.uri, None, quiet)
    assert b"mean" in (folder / "1_Pooling" / "config.json").read_bytes()


def test_nobody_at_the_address_is_a_network_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path))
    monkeypatch.setattr(web.time, "sleep", lambda seconds: None)
    with pytest.raises(FatalError) as caught:
        resolve_model("http://127.0.0.1:9/model", None, quiet)
    assert caught.value.reason == "SourceUnreachable"


def test_a_revision_is_for_a_hub(server):
    with pytest.raises(FatalError) as caught:
        resolve_model(server.uri, "main", quiet)
    assert caught.value.reason == "InvalidFlags"
