"""GGUF files as the folders that are served: each is converted once, and kept."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from pagoda_runtime.convert import convert
from pagoda_runtime.errors import FatalError, unreadable

logger = logging.getLogger("pagoda.convert")

GGUF_MAGIC = b"GGUF"


def require_gguf(path: Path) -> None:
    """Raises FatalError ModelNotFound, ModelAccessDenied: the file is no GGUF file."""
    try:
        with open(path, "rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise unreadable(path, error) from error
    if magic != GGUF_MAGIC:
        raise FatalError(
            "ModelNotFound",
            f"{path} is a file, but not in GGUF format. Give --model (model.uri) a GGUF file, or a "
            "folder in Hugging Face layout.",
        )


def converted(path: Path, *, keep_blocks: bool) -> Path:
    """The folder that a GGUF file becomes: below PAGODA_CACHE or ~/.cache/pagoda, in bfloat16.

    keep_blocks: see `convert`; either kind has a folder of its own.

    It is written at the first call, and again when the file has another size or time; then the
    older one goes. Processes that ask at the same time wait for the first of them.
    Raises: FatalError: what `convert` raises, DiskFull if there is no place to write.
    """
    require_gguf(path)
    base = Path(os.environ.get("PAGODA_CACHE") or "~/.cache/pagoda").expanduser() / "gguf"
    file = path.resolve()
    facts = file.stat()
    kind = "blocks" if keep_blocks else "bfloat16"
    name = f"{file.stem}-{_digest(str(file))}-{kind}"
    # Another version of Pagoda may convert another way.
    state = _digest(f"{facts.st_size} {facts.st_mtime_ns} {version('pagoda-serve')}")
    folder = base / f"{name}-{state}"
    if folder.is_dir():
        return folder
    try:
        base.mkdir(parents=True, exist_ok=True)
        lock = open(base / f"{name}.lock", "wb")  # noqa: SIM115
    except OSError as error:
        raise FatalError(
            "DiskFull", f"{base} cannot be written: {error}. Set PAGODA_CACHE to another folder."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _convert_logged(file, folder, keep_blocks=keep_blocks)
            for old in base.glob(f"{name}-*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)
    return folder


def _convert_logged(file: Path, folder: Path, *, keep_blocks: bool) -> None:
    started = time.monotonic()
    logger.info("Converting %s, once, to %s", file, folder)
    convert(file, folder, keep_blocks=keep_blocks)
    logger.info("Converted in %.1f s", time.monotonic() - started)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
