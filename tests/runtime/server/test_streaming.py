"""A block that is cancelled when its client goes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from pagoda_runtime.server.streaming import while_connected


class Client:
    """The receiving end of a request whose body was read."""

    def __init__(self) -> None:
        self.is_gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.is_gone.wait()
        return {"type": "http.disconnect"}


async def test_a_client_that_goes_ends_the_block():
    client, ends = Client(), []

    async def answer() -> None:
        async with while_connected(client.receive):
            client.is_gone.set()
            try:
                await asyncio.sleep(5)
            finally:
                ends.append("cleaned up")

    with pytest.raises(ClientDisconnect):
        await answer()
    assert ends == ["cleaned up"]
    # The task may wait again afterwards.
    await asyncio.sleep(0)


async def test_a_block_that_ends_first_keeps_its_result():
    client = Client()
    async with while_connected(client.receive):
        await asyncio.sleep(0)
        client.is_gone.set()
    await asyncio.sleep(0)


async def test_who_else_cancels_the_request_is_not_taken_for_its_client():
    client, begun = Client(), asyncio.Event()

    async def answer() -> None:
        async with while_connected(client.receive):
            begun.set()
            await asyncio.sleep(5)

    task = asyncio.create_task(answer())
    await begun.wait()
    task.cancel()
    client.is_gone.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_of_the_block_is_its_own():
    async def answer() -> None:
        async with while_connected(Client().receive):
            await asyncio.sleep(0)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await answer()
