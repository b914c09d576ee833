"""`pagoda convert SRC.gguf DST`: one GGUF file becomes a folder in Hugging Face layout.

`gguf` reads the file and dequantizes its tensors, unless their blocks are kept. `architectures`
says how each family's names and fields translate, `tokenizer` rebuilds tokenizer.json, `checkpoint`
writes the weights. The folder appears under its final name only when it is complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from safetensors import SafetensorError

from pagoda_runtime.errors import FatalError, exit_status

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pagoda convert` to its parser."""
    parser.add_argument("source", metavar="SRC", type=Path, help="a GGUF file")
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="the folder to write; it must not exist yet, or be empty",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights (bfloat16)"
    )
    parser.add_argument(
        "--quantization",
        choices=("none", "gguf"),
        default="none",
        help="gguf keeps matrices in the file's own blocks where Pagoda multiplies by them (none)",
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a Jinja chat template to put in the folder, in place of the file's own",
    )


def run(args: argparse.Namespace) -> int:
    """Convert as the flags say; returns the exit status, with errors as one message on stderr."""
    started = time.monotonic()
    try:
        convert(
            args.source,
            args.destination,
            dtype=args.dtype,
            keep_blocks=args.quantization == "gguf",
            chat_template=args.chat_template,
        )
    except FatalError as error:
        print(f"pagoda convert: {error.message}", file=sys.stderr)
        return exit_status(error)
    print(f"{args.destination}: converted in {time.monotonic() - started:.1f} s")
    return 0


def convert(
    source: Path,
    destination: Path,
    *,
    dtype: str = "bfloat16",
    keep_blocks: bool = False,
    chat_template: Path | None = None,
) -> None:
    """Write `destination` from the GGUF file `source`.

    keep_blocks: of matrices, where there is a method for them; the rest is in dtype.

    Raises:
        FatalError: ModelNotFound (no such file), CorruptWeights (not a whole GGUF file),
            UnsupportedArchitecture, InvalidModelConfig (a tokenizer or rope that is not supported,
            a destination that is in use), DiskFull.
    """
    from pagoda_runtime.convert import architectures, checkpoint, reader, tokenizer

    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FatalError(
            "InvalidModelConfig", f"{destination} exists and is not empty; name another folder."
        )
    template = _read_template(chat_template)
    file = reader.open_gguf(source)
    tensors = checkpoint.plan_tensors(file, dtype=dtype, keep_blocks=keep_blocks)
    config = architectures.build_config(file, dtype=dtype) | checkpoint.describe_blocks(tensors)
    generation_config = tokenizer.build_generation_config(file)
    token_files = tokenizer.build_tokenizer_files(file, chat_template=template)

    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, content in {
            "config.json": json.dumps(config, indent=2),
            "generation_config.json": json.dumps(generation_config, indent=2),
            **token_files,
        }.items():
            (partial / name).write_text(content + "\n", encoding="utf-8")
        checkpoint.write_weights(file, tensors, partial, dtype=dtype)
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    except (OSError, SafetensorError) as error:
        raise FatalError("DiskFull", f"{destination} could not be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FatalError("ModelNotFound", f"--chat-template {path}: {error.strerror}.") from error
