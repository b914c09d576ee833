"""Streams of several choices, without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pagoda_runtime.client.stream import Mailbox, RequestStream
from pagoda_runtime.errors import EngineDead, RequestError
from pagoda_runtime.ipc.messages import RequestDelta, TokenLogprobs


def delta(index: int, *token_ids: int, **fields: Any) -> RequestDelta:
    return RequestDelta(request_id="r", index=index, new_token_ids=list(token_ids), **fields)


def logprob(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -1.0, 1, [])


class Engine:
    """Notes what a stream tells the engine."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.finished: list[int] = []

    def stream(self, num_choices: int) -> tuple[Callable[[RequestDelta], None], RequestStream]:
        mailbox = Mailbox("r", num_choices)
        stream = RequestStream(
            mailbox,
            asyncio.get_running_loop(),
            num_choices,
            abort=self.aborted.append,
            finish=lambda _, index: self.finished.append(index),
        )
        return mailbox.put, stream


async def test_what_piles_up_is_one_delta_for_each_choice():
    put, stream = Engine().stream(2)
    put(delta(0, 1, queue_seconds=0.5, num_cached_tokens=8, prompt_logprobs=[logprob(9)]))
    put(delta(1, 2, logprobs=[logprob(2)]))
    put(delta(0, 3, cumulative_logprob=-2.0))
    put(delta(1, 4, 5, logprobs=[logprob(4), logprob(5)]))
    zero, one = await anext(stream), await anext(stream)
    assert (zero.index, one.index) == (0, 1)
    assert (zero.new_token_ids, one.new_token_ids) == ([1, 3], [2, 4, 5])
    assert one.logprobs == [logprob(2), logprob(4), logprob(5)]
    assert (zero.queue_seconds, zero.num_cached_tokens) == (0.5, 8)
    assert (zero.cumulative_logprob, zero.prompt_logprobs) == (-2.0, [logprob(9)])
    await stream.aclose()


async def test_a_stream_ends_when_all_that_piled_up_is_taken():
    put, stream = Engine().stream(2)
    put(delta(0, 1))
    put(delta(1, 2, finish_reason="stop"))
    put(delta(0, 3, finish_reason="length", is_last=True))
    assert [(d.index, d.new_token_ids) async for d in stream] == [(0, [1, 3]), (1, [2])]


async def test_a_finished_choice_is_told_to_the_engine_and_not_heard_again():
    engine = Engine()
    put, stream = engine.stream(2)
    put(delta(0, 1))
    put(delta(1, 2))
    assert (await anext(stream)).index == 0
    stream.finish(0)
    stream.finish(0)
    assert engine.finished == [0]
    put(delta(0, 5))
    put(delta(1, 6, finish_reason="length", is_last=True))
    assert [d.index async for d in stream] == [1]
    assert engine.aborted == []


async def test_the_last_finished_choice_aborts_the_request():
    engine = Engine()
    put, stream = engine.stream(2)
    put(delta(0, 1))
    await anext(stream)
    stream.finish(1)
    stream.finish(0)
    assert (engine.finished, engine.aborted) == ([1], ["r"])
    assert [d async for d in stream] == []


async def test_a_choice_that_the_engine_ended_counts_as_finished():
    engine = Engine()
    put, stream = engine.stream(2)
    stream.finish(1)
    put(delta(0, 1, finish_reason="stop"))
    assert [d.index async for d in stream] == [0]
    assert engine.aborted == ["r"]


async def test_fewer_choices_than_asked_for_end_with_the_last_one():
    engine = Engine()
    put, stream = engine.stream(4)
    put(delta(0, 1, finish_reason="stop"))
    put(delta(1, 2, finish_reason="stop", is_last=True))
    assert [d.index async for d in stream] == [0, 1]
    assert engine.aborted == []


async def test_a_death_is_heard_after_the_deltas_that_came_before_it():
    mailbox = Mailbox("r")
    loop = asyncio.get_running_loop()
    stream = RequestStream(mailbox, loop, 1, abort=lambda _: None, finish=lambda *_: None)
    mailbox.put(delta(0, 1))
    mailbox.fail("gone")
    assert (await anext(stream)).new_token_ids == [1]
    with pytest.raises(EngineDead, match="gone"):
        await anext(stream)


async def test_a_request_that_the_engine_cannot_go_on_with_ends_with_its_reason():
    engine = Engine()
    put, stream = engine.stream(2)
    put(delta(1, finish_reason="abort", error="It is too complex."))
    with pytest.raises(RequestError, match="It is too complex"):
        await anext(stream)
    assert engine.aborted == ["r"]
