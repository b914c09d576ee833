"""Reads what a Hugging Face hub tells of a model: config.json and sizes, never the weights.

The hub is the one that whoever runs this has named; what it answers is bounded in bytes and time.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from yarl import URL

from pagoda_operator.checkpoint import HEAD_LENGTH_BYTES, Tensors, read_head, read_index

PUBLIC_HUB = "https://huggingface.co"
READ_SECONDS = 10.0
"""Of all requests for a model together."""
CONNECT_SECONDS = 4.0
MAX_ANSWER_BYTES = 4 << 20
"""Of a file; the index of a model of 400 billion parameters has half a MiB."""
FIRST_HEAD_BYTES = 1 << 16
"""Of a safetensors file; a head that is longer is read in a second request."""
MAX_REDIRECTS = 3
_PARTIAL = 206


class Unreadable(Exception):
    """The hub does not tell; the message says why."""


class Unreachable(Unreadable):
    """Nobody answers, or not in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a hub told of a model."""

    config: Any
    """config.json, as parsed."""
    tensors: Tensors
    etag: str | None = None
    """Of config.json."""


@dataclass(slots=True)
class Hub:
    """One session with a hub.

    Args:
        endpoint: its address, as https://huggingface.co.
        token: of an account, for models that are not public.
    """

    endpoint: str
    token: str | None = None
    _session: aiohttp.ClientSession | None = field(default=None, init=False)

    async def read(self, name: str, revision: str | None, etag: str | None = None) -> Answer | None:
        """What the hub tells of the model ORG/NAME.

        Args:
            revision: branch, tag or commit; None: the default branch.
            etag: of what was read before; None is returned if that still holds.
        Raises:
            Unreadable
        """
        root = f"{self.endpoint.rstrip('/')}/{name}/resolve/{_quote(revision or 'main')}/"
        return await self.read_at(root, etag)

    async def read_at(self, root: str, etag: str | None = None) -> Answer | None:
        """The same of the folder of any web server, whose address ends in a slash."""
        try:
            async with asyncio.timeout(READ_SECONDS):
                return await self._read(root, etag)
        except TimeoutError as error:
            raise Unreachable(f"{root} did not answer within {READ_SECONDS:g} s") from error
        except (OSError, aiohttp.ClientConnectionError) as error:
            what = str(error) or type(error).__name__
            raise Unreachable(f"{root} cannot be reached: {what}") from error
        except (aiohttp.ClientError, ValueError) as error:
            # ValueError: it is no address, or an answer no HTTP.
            what = str(error) or type(error).__name__
            raise Unreadable(f"{root} cannot be read: {what}") from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _read(self, root: str, etag: str | None) -> Answer | None:
        asked = {"If-None-Match": etag} if etag else {}
        status, body, etag = await self._get(f"{root}config.json", asked)
        if asked and status == 304:
            return None
        config = _parse(status, body, f"{root}config.json")
        keys = ("quantization_config", "compression_config")
        if isinstance(config, dict) and not any(map(config.get, keys)):
            # Where GPTQ's older tools wrote it.
            status, body, _ = await self._get(f"{root}quantize_config.json")
            old = _parse(status, body, f"{root}quantize_config.json") if status == 200 else None
            if old and isinstance(old, dict):
                config[keys[0]] = {"quant_method": "gptq", **old}
        return Answer(config, await self._read_tensors(root), etag)

    async def _read_tensors(self, root: str) -> Tensors:
        """From the index, or from the head of the one file; nothing where there is neither."""
        url = f"{root}model.safetensors.index.json"
        status, body, _ = await self._get(url)
        if status == 200:
            return read_index(_parse(status, body, url))
        url = f"{root}model.safetensors"
        head = await self._get_part(url, 0, FIRST_HEAD_BYTES)
        length = int.from_bytes(head[:HEAD_LENGTH_BYTES], "little")
        if not 0 < length <= MAX_ANSWER_BYTES:
            return Tensors()
        missing = HEAD_LENGTH_BYTES + length - len(head)
        if missing > 0:
            head += await self._get_part(url, len(head), missing)
        try:
            return read_head(json.loads(head[HEAD_LENGTH_BYTES:][:length]))
        except (ValueError, RecursionError):
            return Tensors()

    async def _get(
        self, url: str, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, str | None]:
        """Status, body and ETag."""
        async with self._open(url, headers or {}) as response:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise Unreadable(f"{url} has more than {MAX_ANSWER_BYTES >> 20} MiB")
            return response.status, bytes(body), response.headers.get("ETag")

    async def _get_part(self, url: str, first: int, count: int) -> bytes:
        """Bytes of a file; empty where the server does not serve parts."""
        wanted = {"Range": f"bytes={first}-{first + count - 1}", "Accept-Encoding": "identity"}
        async with self._open(url, wanted) as response:
            if response.status != _PARTIAL:
                # What follows may be the whole file.
                response.close()
                return b""
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) >= count:
                    break
            return bytes(body[:count])

    def _open(self, url: str, headers: dict[str, str]) -> Any:
        if self._session is None:
            authorization = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            self._session = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "pagoda-operator", **authorization},
                timeout=aiohttp.ClientTimeout(connect=CONNECT_SECONDS),
                # Many clusters reach a hub through a proxy only.
                trust_env=True,
            )
        return self._session.get(
            URL(url, encoded=True), headers=headers, max_redirects=MAX_REDIRECTS
        )


def _quote(revision: str) -> str:
    return revision.replace("/", "%2F")


def _parse(status: int, body: bytes, url: str) -> Any:
    if status in (401, 403):
        raise Unreadable(f"{url} is for those with a token only (HTTP {status})")
    if status != 200:
        raise Unreadable(f"{url} answers with HTTP {status}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{url} is not JSON") from error
