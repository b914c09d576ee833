"""Flags of `pagoda serve` ↔ ServerConfig, field by field. The flags carry vLLM's names."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any

from pagoda_runtime.config import ServerConfig
from pagoda_runtime.engine_flags import (
    add_cache_flags,
    add_engine_flags,
    add_model_flags,
    to_engine_config,
)
from pagoda_runtime.errors import FatalError
from pagoda_runtime.flags import (
    DEFAULTS,
    FlagParser,
    Flags,
    integer,
    origins,
    seconds,
    text_value,
    texts,
)
from pagoda_runtime.keys import environment_keys
from pagoda_runtime.parsing.formats import (
    REASONING_ALIASES,
    REASONING_FORMATS,
    TOOL_ALIASES,
    TOOL_FORMATS,
)

LOG_LEVELS = ("debug", "info", "warning", "error")
# Flags that mean nothing without another one.
NEEDED = (
    ("ssl_keyfile", "ssl_certfile"),
    ("ssl_ca_certs", "ssl_certfile"),
    ("ssl_cert_reqs", "ssl_ca_certs"),
    ("ssl_ca_certs", "ssl_cert_reqs"),
    ("allow_credentials", "allowed_origins"),
    ("allowed_methods", "allowed_origins"),
    ("allowed_headers", "allowed_origins"),
)
# Of flags that take several values, and may come several times.
SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend", "type": text_value, "default": None}
FILE: dict[str, Any] = {"metavar": "FILE", "type": text_value}
PATH = {**FILE, "metavar": "PATH"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags of `pagoda serve`."""
    add_model_flags(parser)
    add_engine_flags(parser)
    add_cache_flags(parser)
    add_server_flags(parser)
    add_address_flags(parser)
    add_tls_flags(parser)
    add_browser_flags(parser)


def add_address_flags(parser: argparse.ArgumentParser) -> None:
    flags = Flags(parser, "addresses")
    flags.add("--host", type=text_value, help="address to listen on")
    flags.add("--port", type=integer(0, 65535), help="port; 0 takes a free one")
    flags.add(
        "--uds", **PATH, shown="none", help="Unix socket to listen on in place of host and port"
    )
    flags.add(
        "--root-path",
        metavar="PATH",
        type=root_path,
        shown="none",
        help="path under which a proxy shows this server, as /llm, whether it takes it off or not",
    )
    flags.add(
        "--admin-port",
        type=integer(0, 65535),
        shown="none: there is no admin port",
        help="port of /reset_prefix_cache; 0 takes a free one",
    )
    flags.add(
        "--admin-host",
        type=text_value,
        help="address of the admin port, which has no TLS; not one that clients reach",
    )


def add_tls_flags(parser: argparse.ArgumentParser) -> None:
    flags = Flags(parser, "TLS")
    flags.add(
        "--ssl-certfile",
        **FILE,
        shown="none: plain HTTP",
        help="PEM file of the server's certificate and those above it; clients then speak TLS",
    )
    flags.add(
        "--ssl-keyfile", **FILE, shown="in --ssl-certfile", help="PEM file of its private key"
    )
    flags.add(
        "--ssl-ca-certs",
        **FILE,
        shown="none",
        help="PEM file of authorities whose certificates clients may show",
    )
    flags.add(
        "--ssl-cert-reqs",
        type=int,
        choices=(0, 1, 2),
        help="whether a client shows a certificate: 0 no, 1 it may, 2 it must",
    )


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    flags = Flags(parser, "server")
    add_request_flags(flags)
    flags.add(
        "--api-key",
        **SEVERAL,
        metavar="KEY",
        shown="PAGODA_API_KEY, several between commas; without any key everybody may call",
        help="keys of which /v1/* asks for one as bearer token; `ps` shows what is given here",
    )
    flags.add(
        "--api-key-file",
        **FILE,
        help="file with more keys, one a line, or folder of such files, as a mounted Secret is; "
        "changes hold within seconds",
    )
    flags.add(
        "--max-body-bytes",
        type=integer(1024),
        shown="4 MiB, and 64 bytes for each token of the context",
        help="bytes of a request's body; a larger one is answered with 413",
    )
    flags.add(
        "--drain-delay-seconds",
        type=seconds,
        help="seconds after SIGTERM in which new requests are still served",
    )
    flags.add(
        "--drain-seconds", type=seconds, help="seconds that running requests then have to finish"
    )
    flags.add(
        "--otlp-traces-endpoint",
        metavar="URL",
        type=url,
        shown="none: no traces",
        help="OpenTelemetry collector that takes a span for each request over HTTP, as "
        "http://localhost:4318/v1/traces",
    )
    flags.add("--playground", action=argparse.BooleanOptionalAction, help="a page to chat on, at /")
    flags.add(
        "--disable-access-log",
        "--disable-uvicorn-access-log",
        action="store_true",
        help="do not log a line for each request; probes have one at level debug only",
    )


def add_request_flags(flags: Flags) -> None:
    """Those that serving over HTTP and answering a file have in common."""
    flags.add(
        "--served-model-name",
        **SEVERAL,
        metavar="NAME",
        shown="MODEL as given",
        help="names that requests may use; answers show the first",
    )
    flags.add("--chat-template", **FILE, help="Jinja file in place of the model's template")
    flags.add(
        "--trust-request-chat-template",
        action="store_true",
        help="take `chat_template` of requests: programs of strangers, in a sandbox",
    )
    for name, formats, what in (
        ("--tool-call-parser", (*TOOL_FORMATS, *TOOL_ALIASES), "in which the model calls tools"),
        ("--reasoning-parser", (*REASONING_FORMATS, *REASONING_ALIASES), "of the model's thoughts"),
    ):
        flags.add(
            name,
            choices=("auto", "none", *formats),
            help=f"format {what}; auto finds it by the chat template",
        )
    flags.add("--log-level", choices=LOG_LEVELS, help="least level that server and engine log")


def add_browser_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of CORS. vLLM's users give each of them one JSON list."""
    flags = Flags(parser, "browsers (CORS)")
    flags.add(
        "--allowed-origins",
        **{**SEVERAL, "type": origins},
        metavar="ORIGIN",
        shown="none",
        help="origins of pages that may call this server, such as https://example.org, or *",
    )
    flags.add(
        "--allow-credentials", action="store_true", help="such pages may send cookies; not with *"
    )
    for name in ("--allowed-methods", "--allowed-headers"):
        flags.add(
            name,
            **{**SEVERAL, "type": texts},
            metavar="NAME",
            shown="*: all",
            help=f"{name.rpartition('-')[2]} that such pages may use",
        )


def to_server_config(args: argparse.Namespace) -> ServerConfig:
    """The config of parsed flags. Raises FatalError InvalidFlags if there is not one model."""
    values = vars(args)
    for name in ("served_model_name", "api_key"):
        values[name] = tuple(values[name] or ())
    values["api_key"] += environment_keys(os.environ)
    for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
        values[name] = tuple(chain.from_iterable(values[name] or ())) or DEFAULTS[name]
    verify_flags(values)
    rest = {f.name: values[f.name] for f in fields(ServerConfig) if f.name != "engine"}
    return ServerConfig(engine=to_engine_config(args), **rest)


def url(text: str) -> str:
    """A type for argparse: a URL of http or https."""
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an http or https URL")
    return text


def root_path(text: str) -> str:
    """A type for argparse: a path such as /llm, or nothing; a slash at its end goes."""
    path = text.rstrip("/")
    if not re.fullmatch(r"(/[\w.~-]+)*", path, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a path such as /llm")
    return path


def verify_flags(values: Mapping[str, Any]) -> None:
    """Raises FatalError InvalidFlags where flags contradict each other."""
    changed = [name for name in ("host", "port") if values[name] != DEFAULTS[name]]
    if values["uds"] is not None and changed:
        raise FatalError(
            "InvalidFlags",
            f"--uds takes the place of host and port, and --{changed[0]} is given; leave one out.",
        )
    for name, needed in NEEDED:
        if values[name] != DEFAULTS[name] and not values[needed]:
            flag, other = (f"--{n.replace('_', '-')}" for n in (name, needed))
            raise FatalError("InvalidFlags", f"{flag} means nothing without {other}.")
    if "*" in values["allowed_origins"] and values["allow_credentials"]:
        raise FatalError(
            "InvalidFlags",
            "--allow-credentials with --allowed-origins * would let every page act as its visitor; "
            "name the origins.",
        )


def parse_serve_args(argv: Sequence[str]) -> ServerConfig:
    """The config that `pagoda serve` with these arguments has. Raises FatalError InvalidFlags."""
    parser = FlagParser(prog="pagoda serve")
    add_arguments(parser)
    return to_server_config(parser.parse_args(argv))
