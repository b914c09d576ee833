"""TLS, Unix sockets, and a proxy that shows the server under a path."""

from __future__ import annotations

import json
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from pagoda_runtime.errors import FatalError
from pagoda_runtime.server.flags import parse_serve_args
from pagoda_runtime.server.listening import listen_on_path, tls_options
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server
from pagoda_runtime.server.testing_process import ServerProcess

MODEL = "fake:" + json.dumps({"vocab_size": 256, "max_model_len": 4000})
COMMAND = ["pagoda_runtime.server.testing", MODEL, "--drain-delay-seconds", "0"]
STREAM = {"prompt": [1], "max_tokens": 30, "ignore_eos": True, "stream": True}
STREAM |= {"stream_options": {"include_usage": True}}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """PEM files of an authority, of the server's certificate and key, and of a client's both."""
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client.example")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key", "client")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    server.cert_chain_pems[0].write_to_path(str(files["cert"]))
    server.private_key_pem.write_to_path(str(files["key"]))
    client.private_key_and_cert_chain_pem.write_to_path(str(files["client"]))
    return files


@pytest.fixture
def closing() -> Iterator[list[ServerProcess]]:
    servers: list[ServerProcess] = []
    yield servers
    for server in servers:
        server.close()


def test_clients_speak_tls_and_show_their_own_certificate(files, tmp_path, closing):
    flags = ["--host", "127.0.0.1", "--port", "0", "--ssl-certfile", str(files["cert"])]
    flags += ["--ssl-keyfile", str(files["key"]), "--ssl-ca-certs", str(files["ca"])]
    server = ServerProcess([*COMMAND, *flags, "--ssl-cert-reqs", "2"], tmp_path / "log")
    closing.append(server)
    url = server.wait_for_url()
    assert url.startswith("https://")
    stranger = ssl.create_default_context(cafile=str(files["ca"]))
    known = ssl.create_default_context(cafile=str(files["ca"]))
    known.load_cert_chain(files["client"])
    with httpx.Client(base_url=url, verify=known) as http:
        while http.get("/ready").status_code != 200:
            pass
        with http.stream("POST", "/v1/completions", json=STREAM) as answer:
            text = answer.read().decode()
        assert '"completion_tokens":30' in text
        assert text.endswith("data: [DONE]\n\n")
    # TLS 1.3 tells a client that it is refused with the first answer.
    with httpx.Client(base_url=url, verify=stranger) as http, pytest.raises(httpx.TransportError):
        http.get("/health")
    plain = url.replace("https:", "http:")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{plain}/health")
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_unix_socket_takes_the_place_of_host_and_port(tmp_path, closing):
    path = tmp_path / "pagoda.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = ServerProcess([*COMMAND, "--uds", str(path)], tmp_path / "log")
    closing.append(server)
    assert server.wait_for_url() == f"unix:{path}"
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(transport=transport, base_url="http://pagoda") as http:
        while http.get("/ready").status_code != 200:
            pass
        answer = http.post(
            "/v1/completions", json={**STREAM, "stream": None, "stream_options": None}
        )
        assert answer.json()["usage"]["completion_tokens"] == 30
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not path.exists()
    assert any("-:0 POST /v1/completions 200" in line for line in server.lines)


def test_a_path_that_is_in_use_or_no_socket_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(FatalError, match="--uds"), listen_on_path(str(file), 1):
        pass
    assert file.read_text() == "precious"
    path = str(tmp_path / "socket")
    with (
        listen_on_path(path, 1),
        pytest.raises(FatalError, match="in use"),
        listen_on_path(path, 1),
    ):
        pass


def test_files_of_tls_that_cannot_be_used_are_refused(files):
    for cert, key in (("missing", "key"), ("key", "key"), ("cert", "client")):
        certfile = str(files.get(cert, "missing.pem"))
        config = make_config("--ssl-certfile", certfile, "--ssl-keyfile", str(files[key]))
        with pytest.raises(FatalError, match="--ssl-certfile") as caught:
            tls_options(config)
        assert caught.value.reason == "InvalidFlags"
    assert tls_options(make_config()) == {}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--uds", "a", "--port", "1"], ["--uds", "--port"]),
        (["--ssl-keyfile", "a"], ["--ssl-keyfile", "without --ssl-certfile"]),
        (["--ssl-certfile", "a", "--ssl-ca-certs", "b"], ["--ssl-ca-certs", "--ssl-cert-reqs"]),
        (["--ssl-certfile", "a", "--ssl-cert-reqs", "2"], ["--ssl-cert-reqs", "--ssl-ca-certs"]),
        (["--root-path", "llm"], ["--root-path", "'llm'", "/llm"]),
        (["--otlp-traces-endpoint", "localhost:4317"], ["--otlp-traces-endpoint", "URL"]),
    ],
)
def test_flags_that_contradict_each_other_are_named(argv, words):
    with pytest.raises(FatalError) as caught:
        parse_serve_args(["m", *argv])
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_a_server_behind_a_path_answers_with_it_and_without(prefix):
    config = make_config("--root-path", "/llm/", "--api-key", "k")
    state = make_state(FakeEngine(config.engine), config)
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        assert (await http.get(f"{prefix}/health")).status_code == 200
        assert (await http.get(f"{prefix}/v1/models")).status_code == 401
        headers = {"authorization": "Bearer k"}
        models = await http.get(f"{prefix}/v1/models", headers=headers)
        assert models.json()["data"][0]["id"] == "fake"
        document = (await http.get(f"{prefix}/openapi.json")).json()
        assert document["servers"] == [{"url": "/llm"}]
        assert (await http.get(f"{prefix}/")).headers["content-type"].startswith("text/html")
        assert (await http.get(f"{prefix}/llm/llm/health")).status_code == 404
        metrics = (await http.get("/metrics")).text
        assert 'handler="/v1/models",method="GET",status="2xx"} 1.0' in metrics
