"""`pagoda serve`: flags, their ranges, and what a wrong command line leaves behind."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pagoda_runtime.cli import main
from pagoda_runtime.config import EngineConfig, ServerConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.platforms import PLATFORMS
from pagoda_runtime.server.flags import parse_serve_args

ROOT = Path(__file__).parents[2]


def test_a_bare_model_gives_the_defaults_of_the_configs():
    assert parse_serve_args(["m"]) == ServerConfig(engine=EngineConfig(model="m"))


def test_the_model_may_be_a_flag():
    assert parse_serve_args(["--model", "m"]) == parse_serve_args(["m"])


def test_every_flag_reaches_its_field():
    flags = {
        "revision": "main",
        "dtype": "float16",
        "device": "cpu",
        "quantization": "awq",
        "generation_config": "none",
        "kv_cache_dtype": "fp8",
        "tensor_parallel_size": 2,
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "long_prefill_token_threshold": 64,
        "block_size": 32,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory_bytes": 1 << 30,
        "num_threads": 2,
        "max_num_waiting": 10,
        "seed": 7,
        "stall_seconds": 60.0,
        "collective_timeout_seconds": 9.0,
        "host": "127.0.0.1",
        "port": 9000,
        "root_path": "/llm",
        "ssl_certfile": "cert.pem",
        "ssl_keyfile": "key.pem",
        "ssl_ca_certs": "ca.pem",
        "ssl_cert_reqs": 1,
        "otlp_traces_endpoint": "http://collector:4318/v1/traces",
        "admin_host": "127.0.0.2",
        "admin_port": 9001,
        "chat_template": "template.jinja",
        "tool_call_parser": "hermes",
        "reasoning_parser": "qwen3",
        "api_key_file": "keys",
        "max_body_bytes": 5000,
        "drain_delay_seconds": 1.0,
        "drain_seconds": 2.0,
        "log_level": "debug",
    }
    argv = [
        "m",
        "--no-enable-prefix-caching",
        "--async-scheduling",
        "--enforce-eager",
        "--deterministic",
        "--served-model-name",
        "a",
        "b",
        "--api-key",
        "k",
        "--disable-access-log",
        "--no-playground",
        "--trust-request-chat-template",
        "--allowed-origins",
        "https://a.example",
        '["http://b.example:8080"]',
        "--allow-credentials",
        "--allowed-methods",
        '["GET", "POST"]',
        "--allowed-headers",
        "authorization",
    ]
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    config = parse_serve_args(argv)
    got = {
        **{f.name: getattr(config, f.name) for f in fields(config) if f.name != "engine"},
        **{f.name: getattr(config.engine, f.name) for f in fields(config.engine)},
    }
    assert got == {
        **flags,
        "model": "m",
        "enable_prefix_caching": False,
        "async_scheduling": True,
        "enforce_eager": True,
        "deterministic": True,
        "served_model_name": ("a", "b"),
        "api_key": ("k",),
        "disable_access_log": True,
        "playground": False,
        "uds": None,
        "trust_request_chat_template": True,
        "allowed_origins": ("https://a.example", "http://b.example:8080"),
        "allow_credentials": True,
        "allowed_methods": ("GET", "POST"),
        "allowed_headers": ("authorization",),
    }


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["m", "--port", "70000"], ["--port", "70000", "0–65535"]),
        (["m", "--max-num-seqs", "0"], ["--max-num-seqs", "0", "1–65536"]),
        (["m", "--max-model-len", "many"], ["--max-model-len", "many", "at least 2"]),
        (["m", "--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization", "1.5", "most 1"]),
        (["m", "--drain-seconds", "nan"], ["--drain-seconds", "nan", "0 or more"]),
        (["m", "--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["m", "--max-num-seq", "4"], ["--max-num-seq 4", "mean --max-num-seqs", "serve --help"]),
        (["m", "--api-key", ""], ["--api-key", "empty"]),
        (["a", "--model", "b"], ["'a'", "'b'"]),
        (["m", "--allowed-origins", "https://a/x"], ["--allowed-origins", "a/x", "without a path"]),
        (["m", "--allowed-methods", "[GET]"], ["--allowed-methods", "[GET]", "JSON list"]),
        (["m", "--allow-credentials"], ["--allow-credentials", "without --allowed-origins"]),
        (["m", "--allowed-origins", "*", "--allow-credentials"], ["every page", "name the ori"]),
        ([], ["as MODEL", "--model MODEL"]),
    ],
)
def test_a_wrong_flag_is_named_with_its_value_and_range(argv, words):
    with pytest.raises(FatalError) as caught:
        parse_serve_args(argv)
    assert caught.value.reason == "InvalidFlags"
    for word in words:
        assert word in caught.value.message


def test_a_wrong_command_line_ends_with_2_and_last_words(monkeypatch, tmp_path, capsys):
    log = tmp_path / "termination-log"
    monkeypatch.setenv("PAGODA_TERMINATION_LOG", str(log))
    assert main(["serve", "m", "--port", "x"]) == 2
    words = json.loads(log.read_text())
    assert words["reason"] == "InvalidFlags"
    assert "--port" in words["message"]
    assert capsys.readouterr().err.count("--port") == 1


@pytest.mark.parametrize(
    "command", ["serve", "chat", "convert", "pull", "run-batch", "bench serve"]
)
def test_an_unknown_flag_points_at_the_help_of_its_own_command(command, capsys):
    required = {"convert": ["a", "b"], "pull": ["a"], "run-batch": ["-i", "a", "-o", "b"]}.get(
        command, []
    )
    assert main([*command.split(), *required, "--unknown"]) == 2
    assert f"`pagoda {command} --help`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["serve"], ["bench", "latency"], ["bench", "throughput"], ["run-batch"]]
)
def test_help_tells_the_defaults_that_are_used(argv, capsys):
    with pytest.raises(SystemExit):
        main([*argv, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    cpu, gpu = PLATFORMS["cpu"].defaults, PLATFORMS["cuda"].defaults
    for field in {**cpu, **gpu}.keys() - {"async_scheduling"}:
        assert f"({cpu[field]} with a CPU, {gpu[field]} with a GPU)" in text
    assert "tokens of a block (32 with a CPU, 16 with a GPU)" in text
    assert "while one runs (off with a CPU, on with a GPU)" in text
    prefix_caching = "off" if "latency" in argv else "on"
    assert f"for requests that begin alike ({prefix_caching})" in text


def test_python_m_pagoda_runtime_is_the_same_command():
    command = [sys.executable, "-m", "pagoda_runtime", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("pagoda 0.")


def test_keys_of_the_environment_join_those_of_the_flag(monkeypatch):
    monkeypatch.setenv("PAGODA_API_KEY", "a, b\nc,")
    assert parse_serve_args(["m", "--api-key", "d"]).api_key == ("d", "a", "b", "c")


def test_an_api_key_does_not_show_in_the_config_as_text():
    assert "secret" not in repr(parse_serve_args(["m", "--api-key", "secret"]))


def test_the_reference_of_flags_and_metrics_is_what_the_code_says():
    generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))["render_all"]()
    assert generated
    for path, text in generated.items():
        assert (ROOT / path).read_text() == text, f"run `python docs/generate.py`: {path} is old"
