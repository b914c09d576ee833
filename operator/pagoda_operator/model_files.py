"""Reads what a model's files tell, on this machine or at a hub."""

from __future__ import annotations

import json
from pathlib import Path

from pagoda_operator.checkpoint import HEAD_LENGTH_BYTES, Tensors, read_head
from pagoda_operator.hub import Answer, Hub, Unreadable
from pagoda_operator.inspection import HF, HTTPS

MAX_HEAD_BYTES = 100_000_000
"""Of a safetensors file: the format allows no more."""


async def read_model(where: str, revision: str | None, hub: Hub | None) -> Answer:
    """What a folder tells, or the hub of hf://ORG/NAME, or https://HOST/PATH.

    Args:
        hub: with the token of what is asked; it is closed then.

    Raises:
        Unreadable
    """
    if hub is None or not where.startswith((HF, HTTPS)):
        return read_folder(Path(where))
    try:
        if where.startswith(HTTPS):
            answer = await hub.read_at(f"{where.rstrip('/')}/")
        else:
            answer = await hub.read(where.removeprefix(HF), revision)
    finally:
        await hub.close()
    # None is for those who know more.
    assert answer is not None
    return answer


def read_folder(folder: Path) -> Answer:
    """What a model's folder on this machine tells.

    Raises:
        Unreadable: it has no config.json, or a file is not what its name says.
    """
    path, sizes, dtypes = folder / "config.json", 0, []
    try:
        config = json.loads(path.read_text())
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(HEAD_LENGTH_BYTES), "little")
                tensors = read_head(json.loads(file.read(min(length, MAX_HEAD_BYTES))))
            sizes += tensors.num_bytes or 0
            dtypes.append(tensors.dtype)
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path}: {error}") from error
    return Answer(config, Tensors(sizes or None, next(filter(None, dtypes), None)))
