"""`make clients`: other people's clients in tool loops, with schemas and embeddings.

Two real servers with tiny random models, which grammars make call tools and keep to schemas. The
clients live in an environment of their own in the cache folder; `client_loops.py` drives them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from environments import make_environment

from pagoda_runtime.models.testing import (
    make_tiny_checkpoint,
    make_tiny_pooled_checkpoint,
    write_tiny_tokenizer,
)
from pagoda_runtime.server.testing_process import ServerProcess

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "langchain-openai==1.7.4",
    "langchain-anthropic==1.7.10",
    "litellm==1.110.2",
    "instructor==1.17.0",
    "pydantic-ai-slim[openai]==2.38.0",
)
TEMPLATE = (
    "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join(' ') }} in "
    "<tool_call>{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FLAGS = ["--host", "127.0.0.1", "--port", "0", "--num-threads", "1", "--served-model-name", "tiny"]
PAGE = """# Clients that were tried

Written by `make clients` on {date}: two servers with tiny random models, whose answers grammars
keep to tools and schemas.

| client | tools | a schema | a stream | embeddings |
| --- | --- | --- | --- | --- |
"""


def start(folder: Path, *flags: str) -> ServerProcess:
    command = ["pagoda_runtime", "serve", str(folder), *FLAGS, *flags]
    return ServerProcess(command, folder.parent / "termination-log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reference" / "clients.md")
    out = parser.parse_args().out
    python = str(make_environment("clients", PACKAGES) / "python")
    with tempfile.TemporaryDirectory() as folder:
        chat = make_tiny_checkpoint(Path(folder) / "chat", max_position_embeddings=4096)
        write_tiny_tokenizer(chat, TEMPLATE)
        embedder = make_tiny_pooled_checkpoint(Path(folder) / "embedder", "bert", modules=True)
        flags = ["--kv-cache-memory-bytes", "16000000", "--tool-call-parser", "hermes"]
        servers = [start(chat, *flags), start(embedder)]
        try:
            urls = [server.wait_until_ready() for server in servers]
            program = str(ROOT / "e2e" / "client_loops.py")
            done = subprocess.run(
                [python, program, *urls],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
                # It would ask the network for prices.
                env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            )
        finally:
            for server in servers:
                server.close()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    page = PAGE.format(date=datetime.now(UTC).date())
    for row in rows:
        page += f"| {' | '.join(row)} |\n"
        print(*row, sep=" | ")
    if done.returncode == 0:
        out.write_text(page)
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
