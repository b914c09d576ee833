"""Models of a registry, from the registry that Debian packages."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pagoda_runtime.errors import FatalError
from pagoda_runtime.models import oci
from pagoda_runtime.models.source import resolve_model

pytestmark = pytest.mark.skipif(
    shutil.which("docker-registry") is None, reason="the program docker-registry is not here"
)
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "model.safetensors": bytes(range(256)) * 4000,
}
RAW, ARCHIVE = "application/vnd.cncf.model.weight.v1.raw", "application/vnd.cncf.model.v1.tar+gzip"


class Registry:
    """A registry with a folder of its own, and what pushes to it."""

    def __init__(self, folder, **configuration):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        # A port that was free a moment ago may be somebody's by now.
        while not self._start(configuration):
            pass

    def _start(self, configuration):
        """Whether it answers; it does not if it ended."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{probe.getsockname()[1]}"
        self.uri = f"oci://{self.host}/team/tiny"
        storage = {"filesystem": {"rootdirectory": str(self.folder / "store")}}
        common = {"version": 0.1, "log": {"level": "error", "accesslog": {"disabled": True}}}
        text = common | {"storage": storage, "http": {"addr": self.host}} | configuration
        (self.folder / "config.json").write_text(json.dumps(text))
        command = ["docker-registry", "serve", str(self.folder / "config.json")]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **quiet)
        while self.process.poll() is None:
            try:
                self.ask("GET", "/v2/").close()
                return True
            except urllib.error.HTTPError as error:
                error.close()
                return True
            except OSError:
                time.sleep(0.05)
        return False

    def ask(self, method, path, data=None, **headers):
        url = path if path.startswith("http") else f"http://{self.host}{path}"
        headers = {"Authorization": "Bearer pushes", **headers}
        return urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method))

    def push(self, layers, tag="latest"):
        """Push (media type, annotations, content)s as one artifact; returns its digest."""
        found = []
        for media, notes, content in [("application/json", {}, b"{}"), *layers]:
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            with self.ask("POST", "/v2/team/tiny/blobs/uploads/", b"") as begun:
                where = begun.headers["Location"]
            binary = {"Content-Type": "application/octet-stream"}
            self.ask("PUT", f"{where}&digest={digest}", content, **binary).close()
            found.append(
                {"mediaType": media, "digest": digest, "size": len(content), "annotations": notes}
            )
        media = "application/vnd.oci.image.manifest.v1+json"
        manifest = {"schemaVersion": 2, "mediaType": media, "config": found[0], "layers": found[1:]}
        body = json.dumps(manifest).encode()
        kind = {"Content-Type": media}
        with self.ask("PUT", f"/v2/team/tiny/manifests/{tag}", body, **kind) as answer:
            return answer.headers["Docker-Content-Digest"]

    def stop(self):
        self.process.kill()
        self.process.wait()


def layers_of(files):
    return [(RAW, {"org.opencontainers.image.title": n}, it) for n, it in files.items()]


def packed(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(oci.AUTH_VARIABLE, raising=False)
    monkeypatch.setattr(oci.time, "sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.stop()


@pytest.fixture
def registry(shared, cache):
    shared.push(layers_of(FILES))
    return shared


def test_the_files_of_an_artifact_come_and_progress_is_told(registry):
    reports = []
    folder = resolve_model(registry.uri, None, lambda *report: reports.append(report))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert (reports[0][1], reports[-2][1], reports[-1][1]) == (0.0, 99.9, 100.0)


@pytest.mark.parametrize("at_folder", ["", "models/"])
def test_an_archive_is_unpacked_and_the_model_found_in_it(registry, at_folder):
    files = {f"{at_folder}{name}": content for name, content in FILES.items()}
    registry.push([(ARCHIVE, {}, packed(files))], "packed")
    folder = resolve_model(f"{registry.uri}:packed", None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_a_tag_and_a_digest_stand_beside_each_other(registry):
    first = registry.push(layers_of(FILES), "v1")
    old = resolve_model(registry.uri, "v1")
    other = {**FILES, "config.json": b"{}"}
    registry.push(layers_of(other), "v1")
    assert (resolve_model(registry.uri, "v1") / "config.json").read_bytes() == b"{}"
    assert resolve_model(registry.uri, first) == old
    assert resolve_model(f"{registry.uri}@{first}", None) == old
    with pytest.raises(FatalError, match="names a tag or digest itself"):
        resolve_model(f"{registry.uri}:v1", "v1")


def test_what_was_fetched_before_is_served_where_the_registry_is_not(cache, tmp_path):
    registry = Registry(tmp_path / "registry")
    try:
        registry.push(layers_of(FILES))
        folder = resolve_model(registry.uri, None)
    finally:
        registry.stop()
    assert resolve_model(registry.uri, None) == folder
    with pytest.raises(FatalError) as caught:
        resolve_model(registry.uri, "v2")
    assert caught.value.reason == "SourceUnreachable"


def test_what_was_cut_off_goes_on_and_is_checked_as_a_whole(registry, cache):
    folder = resolve_model(registry.uri, None)
    weights = FILES["model.safetensors"]
    for beginning, is_right in ((b"x" * 1000, False), (weights[:1000], True)):
        part = folder.with_suffix(".part")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        (part / "model.safetensors.part").write_bytes(beginning)
        if is_right:
            assert resolve_model(registry.uri, None) == folder
            assert (folder / "model.safetensors").read_bytes() == weights
        else:
            # What begins otherwise was not fetched again: its digest tells.
            with pytest.raises(FatalError, match="has the digest sha256:") as caught:
                resolve_model(registry.uri, None)
            assert caught.value.reason == "CorruptWeights"


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (layers_of({"../config.json": b"{}"}), "'../config.json' is no name of a file"),
        (layers_of({"/etc/passwd": b"{}"}), "'/etc/passwd' is no name of a file"),
        ([(RAW, {}, b"{}")], "'' is no name of a file"),
        ([(ARCHIVE, {}, packed({"../config.json": b"{}"}))], "OutsideDestinationError"),
        ([(ARCHIVE, {}, b"no archive")], "ReadError"),
    ],
)
def test_what_is_no_model_is_refused_and_leaves_nothing_outside(registry, cache, layers, words):
    registry.push(layers, "bad")
    with pytest.raises(FatalError) as caught:
        resolve_model(registry.uri, "bad")
    assert caught.value.reason == "CorruptWeights"
    assert words in caught.value.message
    assert not list(cache.rglob("config.json"))


def test_what_is_not_there_is_told(registry):
    for uri, revision in ((registry.uri, "v9"), (f"oci://{registry.host}/no/where", None)):
        with pytest.raises(FatalError, match="has no") as caught:
            resolve_model(uri, revision)
        assert caught.value.reason == "ModelNotFound"
    registry.push(layers_of({"a.txt": b"a"}), "text")
    with pytest.raises(FatalError, match=r"has no config\.json"):
        resolve_model(registry.uri, "text")


class TokenServer(ThreadingHTTPServer):
    """Gives a token to who has the password."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), TokenHandler)
        self.asked = []


class TokenHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        login = base64.b64encode(b"me:secret").decode()
        is_right = self.headers["Authorization"] == f"Basic {login}"
        body = b'{"token": "pulls"}' if is_right else b"{}"
        self.send_response(200 if is_right else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_a_private_registry_is_asked_with_a_token_for_the_password(cache, tmp_path, monkeypatch):
    tokens = TokenServer()
    thread = threading.Thread(target=tokens.serve_forever, daemon=True)
    thread.start()
    realm = f"http://127.0.0.1:{tokens.server_port}/token"
    registry = Registry(tmp_path / "r", auth={"silly": {"realm": realm, "service": "hub"}})
    try:
        registry.push(layers_of(FILES))
        for login in (None, {"auth": base64.b64encode(b"me:wrong").decode()}):
            if login:
                monkeypatch.setenv(oci.AUTH_VARIABLE, json.dumps({"auths": {registry.host: login}}))
            with pytest.raises(FatalError, match="Set DOCKER_AUTH_CONFIG") as caught:
                resolve_model(registry.uri, None)
            assert caught.value.reason == "ModelAccessDenied"
        for login in (
            {"username": "me", "password": "secret"},
            {"auth": base64.b64encode(b"me:secret").decode()},
        ):
            monkeypatch.setenv(oci.AUTH_VARIABLE, json.dumps({"auths": {registry.host: login}}))
            folder = resolve_model(registry.uri, None)
            assert (folder / "config.json").exists()
            shutil.rmtree(folder)
        assert tokens.asked[-1] == "/token?scope=repository%3Ateam%2Ftiny%3Apull&service=hub"
    finally:
        registry.stop()
        tokens.shutdown()
        tokens.server_close()
        thread.join()


def test_a_registry_that_asks_for_the_password_itself_gets_it(cache, tmp_path, monkeypatch):
    hashed = "me:$2b$04$IxwxU9xoS2X96aIUjCYOiOeBx5U6jpSCz.u.wFG0G8dKxYjQjfA9O"
    path = tmp_path / "htpasswd"
    path.write_text(hashed)
    registry = Registry(tmp_path / "r", auth={"htpasswd": {"realm": "r", "path": str(path)}})
    try:
        login = {"username": "me", "password": "secret"}
        monkeypatch.setenv(oci.AUTH_VARIABLE, json.dumps({"auths": {registry.host: login}}))
        with pytest.raises(FatalError, match="has no latest"):
            resolve_model(registry.uri, None)
    finally:
        registry.stop()


def test_an_auth_config_of_another_form_is_told(registry, monkeypatch):
    monkeypatch.setenv(oci.AUTH_VARIABLE, "secret")
    with pytest.raises(FatalError, match="is not what Docker") as caught:
        resolve_model(registry.uri, None)
    assert "secret" not in caught.value.message


def test_a_login_of_another_registry_is_kept_back(monkeypatch):
    logins = {"auths": {"ghcr.io": {"auth": "eDp5"}, "https://index.docker.io/v1/": {"auth": "eA"}}}
    environment = {oci.AUTH_VARIABLE: json.dumps(logins)}
    found = {host: oci._login(host, environment) for host in ("ghcr.io", "docker.io", "quay.io")}
    assert found == {"ghcr.io": "eDp5", "docker.io": "eA", "quay.io": None}


@pytest.mark.parametrize("uri", ["oci://", "oci://host", "oci://host/A", "oci://u:p@host/a/b c"])
def test_what_is_no_reference_is_told(uri, cache):
    with pytest.raises(FatalError, match="it must look like oci://host/repository:tag"):
        resolve_model(uri, None)
    assert not Path(cache).exists()
