"""gpt-oss's format: an answer is a row of messages, each with a channel and perhaps a recipient."""

from __future__ import annotations

import re

from pagoda_runtime.parsing.deltas import Sink, drop
from pagoda_runtime.parsing.scanner import Reading, Scanner

_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_BEGINS = ("<|start|>", "<|channel|>", "<|message|>")
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>")


def read_harmony(scanner: Scanner, sink: Sink) -> Reading[None]:
    """Read messages until the text ends; the prompt has begun the first one.

    Raises: CutOff within a header, which is no part of the answer.
    """
    beginning = yield from scanner.take(" to=", *_BEGINS)
    if not beginning:
        # A model that does without channels.
        beginning = yield from scanner.until(_BEGINS, sink.content)
        if not beginning:
            return
    header, is_open = [beginning], beginning != "<|message|>"
    while True:
        if is_open:
            yield from scanner.through(("<|message|>",), header.append)
        ending = yield from _read_body(scanner, sink, "".join(header))
        if ending not in ("<|start|>", ""):
            ending = yield from scanner.until(("<|start|>", "<|channel|>"), drop)
        if not ending:
            return
        header, is_open = [ending], True


def _read_body(scanner: Scanner, sink: Sink, header: str) -> Reading[str]:
    channel = _CHANNEL.search(header)
    if recipient := _RECIPIENT.search(header):
        sink.start(recipient[1])
        ending = yield from scanner.until(_ENDS, sink.arguments)
        if ending:
            sink.end()
        return ending
    if channel is None or channel[1] != "analysis":
        return (yield from scanner.until(_ENDS, sink.content))
    ending = yield from scanner.until(_ENDS, sink.reasoning)
    if ending:
        sink.end_reasoning()
    return ending
