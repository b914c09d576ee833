"""Engines that serve nothing but what the operator asks: one process for all pods of a fleet.

    python benchmarks/operator_stub.py

It answers at the engine's port of every address of loopback, and of no other interface. As a
program of its own: what it takes of a core is not the operator's.
"""

from __future__ import annotations

import asyncio
import json
import socket

from pagoda_operator.flags import PORT

LOAD = {"running": 0, "waiting": 0}
MODEL = {
    "architecture": "Qwen3ForCausalLM",
    "quantization": "none",
    "kv_cache_dtype": "bfloat16",
    "tensor_parallel_size": 1,
}


def _answer(status: str, content: object) -> bytes:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


ANSWERS = {b"/load": _answer("200 OK", LOAD), b"/startup": _answer("200 OK", {"model": MODEL})}
UNKNOWN = _answer("404 Not Found", {})


class Stub(asyncio.Protocol):
    """One connection; requests have no bodies and come one after the other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1]
            self._transport.write(ANSWERS.get(path, UNKNOWN))


async def serve() -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    listener.bind(("0.0.0.0", PORT))
    server = await asyncio.get_running_loop().create_server(Stub, sock=listener, backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
