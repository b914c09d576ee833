"""The server that flags name: its address, its key and its model."""

from __future__ import annotations

import argparse
import json
import os

from pagoda_runtime.bench.chunks import show_error
from pagoda_runtime.bench.client import HttpClient
from pagoda_runtime.bench.http1 import Answer, NoAnswer, parse_base_url
from pagoda_runtime.errors import RequestError
from pagoda_runtime.flags import text_value
from pagoda_runtime.keys import VARIABLE as KEYS_VARIABLE
from pagoda_runtime.keys import environment_keys


def add_server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--base-url",
        "--url",
        type=text_value,
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="address of the server (%(default)s)",
    )
    group.add_argument(
        "--model", type=text_value, help="name in the requests (the first that the server lists)"
    )
    group.add_argument(
        "--api-key",
        type=text_value,
        default=next(iter(environment_keys(os.environ)), None),
        metavar="KEY",
        help=f"sent as bearer token (the first of {KEYS_VARIABLE})",
    )


def make_client(args: argparse.Namespace) -> HttpClient:
    """A client of the server. Raises RequestError for what is no URL."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    return HttpClient(parse_base_url(args.base_url), headers)


async def find_model(client: HttpClient, args: argparse.Namespace) -> str:
    """The model's name, after the server has shown that it is there. Raises RequestError."""
    try:
        async with client.request("GET", "/v1/models") as answer:
            body = await answer.read_all()
    except NoAnswer as error:
        raise RequestError(
            f"--base-url {args.base_url}: {error}. Start the server, or correct --base-url."
        ) from error
    if answer.status in (401, 403):
        raise RequestError(
            f"{args.base_url} answers {answer.status}: {show_error(body)} Give --api-key a key "
            "that the server knows."
        )
    if answer.status == 503:
        raise RequestError(
            f"{args.base_url} answers 503: {show_error(body)} Try again when it is ready."
        )
    if args.model is not None:
        return str(args.model)
    return _first_model(answer, body, args.base_url)


def _first_model(answer: Answer, body: bytes, base_url: str) -> str:
    try:
        if answer.status != 200:
            raise KeyError
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise RequestError(
            f"{base_url}/v1/models answers {answer.status} and lists no model: {show_error(body)} "
            "Give --model, or correct --base-url."
        ) from None
