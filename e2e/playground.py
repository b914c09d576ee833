"""`make playground-check`: the page at / in a headless Chromium, before a scripted engine.

Playwright lives in an environment of its own in the cache folder; Chromium is Debian's package.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import msgspec
from environments import make_environment

from pagoda_runtime.client.stream import RequestStream
from pagoda_runtime.ipc.messages import EngineRequest
from pagoda_runtime.server.testing import (
    READY,
    FakeEngine,
    make_config,
    make_state,
    running_server,
)

ROOT = Path(__file__).resolve().parent.parent
PLAYWRIGHT = "playwright==1.65.2"
KEY = "the key of this check"
FLAGS = ["--served-model-name", "scripted", "--api-key", KEY, "--tool-call-parser", "hermes"]
FLAGS += ["--reasoning-parser", "qwen3"]

# The engine's answers in their order; "\0" is the end token.
ANSWERS = (
    "<think>A pagoda is a tower. I should say where they come from, and keep it short.</think>"
    "A **pagoda** is a tower with several tiers, each with its own eaves.\n\n"
    "- It grew out of the Indian *stupa*.\n- In Japan most are of wood; in China of brick.\n\n"
    "Counting the eaves tells the tiers:\n\n```python\ndef tiers(pagoda):\n"
    "    return len(pagoda.eaves)\n```\n\nAn <img src=x onerror=alert(1)> is text here.\0",
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Kyōto", "days": 2}}\n</tool_call>\0',
    "It will be sunny in Kyōto.\0",
    "This answer goes on. ",
)


class ScriptedEngine(FakeEngine):
    """Gives the next of ANSWERS to each request."""

    num_asked = 0

    def generate(self, request: EngineRequest) -> RequestStream:  # type: ignore[override]
        self.answer = ANSWERS[self.num_asked % len(ANSWERS)].encode()
        self.num_asked += 1
        return super().generate(request)  # type: ignore[return-value]


def find_browser() -> str:
    """The path of Chromium, which apt installs where it is missing."""
    if not shutil.which("chromium"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-y", "-q", "chromium"]):
            subprocess.run(
                ["apt-get", *command], check=True, env=environment, stdout=subprocess.DEVNULL
            )
    return shutil.which("chromium") or "chromium"


async def check(picture: Path) -> int:
    python, browser = make_environment("browser", [PLAYWRIGHT]) / "python", find_browser()
    config = make_config(*FLAGS)
    engine = ScriptedEngine(config.engine, step_seconds=0.002)
    engine.ready = msgspec.structs.replace(READY, max_model_len=8000, num_blocks=8000)
    async with running_server(make_state(engine, config)) as url:
        program = ROOT / "e2e" / "browser.py"
        process = await asyncio.create_subprocess_exec(
            str(python), str(program), url, KEY, browser, str(picture)
        )
        return await process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "guides" / "playground.png")
    return asyncio.run(check(parser.parse_args().picture))


if __name__ == "__main__":
    raise SystemExit(main())
