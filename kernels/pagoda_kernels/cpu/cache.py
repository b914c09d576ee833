"""Compiled kernels in files, for the next start.

A file holds one kernel for one kind of processor, and begins with a digest of what follows: half a
file, as a full disk or a killed process leaves it, is no kernel. What is read from it runs as code,
so it must lie where nobody but this user and root can write.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import stat
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

logger = logging.getLogger("pagoda.kernels")

AHEAD_FOLDER = Path(__file__).parent / "compiled_ahead"
"""Kernels that were compiled where the package was installed: see `pagoda_kernels.cpu.ahead`."""

_DIGEST_BYTES = hashlib.sha256().digest_size


@cache
def kernels_digest() -> str:
    """Of the sources of all kernels: a compiled one has in it those that it calls."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def kernels_folder(base: Path) -> Path:
    """Where in a folder the kernels of this version are, 1 MB."""
    return base / "kernels" / kernels_digest()


def cache_folder() -> Path:
    """Where this user's compiled kernels are kept: in PAGODA_CACHE, or ~/.cache/pagoda."""
    base = os.environ.get("PAGODA_CACHE") or os.path.expanduser("~/.cache/pagoda")
    return kernels_folder(Path(base))


class KernelCache:
    """What numba asks for the compiled forms of one function, and gives them to."""

    def __init__(self, function: Callable[..., Any], variant: str = "") -> None:
        """variant: tells functions of the same name apart, which close over different things."""
        self._function, self._variant = function, variant

    @property
    def cache_path(self) -> str:
        return str(cache_folder())

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The function as it was compiled for these types; None if it has to be compiled."""
        target_context.refresh()
        name = self._file_name(signature, target_context.codegen())
        for folder in (kernels_folder(AHEAD_FOLDER), cache_folder()):
            content = read_kernel(folder, name)
            if content is not None:
                return CompileResult._rebuild(target_context, *pickle.loads(content))
        log_once(logging.INFO, f"Compiling kernels into {cache_folder()}, which takes 10 to 15 s.")
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep it, or say once why that is impossible."""
        name = self._file_name(signature, result.codegen)
        write_kernel(cache_folder(), name, dumps(result._reduce()))

    def _file_name(self, signature: Any, codegen: Any) -> str:
        function = self._function
        parts = (
            kernels_digest(),
            (numba.__version__, llvmlite.__version__, sys.implementation.cache_tag),
            codegen.magic_tuple(),
            (function.__module__, function.__qualname__, self._variant, function.__code__.co_code),
            signature,
        )
        digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
        return f"{function.__name__.strip('_')}-{digest[:16]}.kernel"


def read_kernel(folder: Path, name: str) -> bytes | None:
    """A file's content, if it is there, whole, and nobody else's."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        if not _is_trusted(os.fstat(descriptor)):
            log_once(
                logging.WARNING,
                f"The compiled kernels in {folder} are not used: others may write there. Make it "
                "yours alone (chown, chmod go-w), or set PAGODA_CACHE to another folder.",
            )
            return None
        with open(os.open(name, os.O_RDONLY, dir_fd=descriptor), "rb") as file:
            is_trusted, content = _is_trusted(os.fstat(file.fileno())), file.read()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if not is_trusted or hashlib.sha256(content).digest() != digest:
        log_once(
            logging.WARNING,
            f"Damaged files of compiled kernels in {folder} are not used, and made anew.",
        )
        return None
    return content


def write_kernel(folder: Path, name: str, content: bytes) -> None:
    """Put a file in the place of what has its name, whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not _is_trusted(folder.stat()):
            return
        descriptor, scratch = tempfile.mkstemp(dir=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.rename(scratch, folder / name)
        except OSError:
            os.unlink(scratch)
            raise
    except OSError as error:
        log_once(
            logging.WARNING,
            f"Compiled kernels cannot be kept in {folder}: {error.strerror}. Each start compiles "
            "them again, for some 10 s. Make room there, or set PAGODA_CACHE to another folder.",
        )


def _is_trusted(status: os.stat_result) -> bool:
    """Whether nobody but this user and root can have made it what it is."""
    is_owned = status.st_uid in (os.geteuid(), 0)
    return is_owned and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def log_once(level: int, message: str) -> None:
    logger.log(level, message)
