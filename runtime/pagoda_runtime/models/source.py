"""Find the model's folder: a local one, or one that is downloaded from a Hugging Face hub, a web
server, a bucket or a registry.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pagoda_runtime.errors import FatalError, unreadable
from pagoda_runtime.models.download import OnProgress
from pagoda_runtime.quantization.config import ONLINE

WEB = ("https://", "http://", "s3://", "gs://")
OCI = "oci://"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What Linux reads ahead for one call, whatever it is asked for.
_PIECE_BYTES = 1 << 17
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def resolve_model(
    uri: str,
    revision: str | None,
    on_progress: OnProgress = lambda *_: None,
    *,
    quantization: str | None = None,
) -> Path:
    """The folder with the model's files.

    Args:
        uri: a folder or a GGUF file; `hf://org/name`; the address of a folder on a web server or of
            a bucket (`s3://`, `gs://`); `oci://host/repository` of a registry; or `org/name`, if
            nothing local has that name.
        revision: branch, tag or commit on the hub, tag or digest in a registry; None: the default
            branch, or the tag `latest`.
        quantization: what the flag --quantization says: a GGUF file is dequantized for none, and
            for what its weights are then rounded to.
    Raises: FatalError: ModelNotFound, ModelAccessDenied, SourceUnreachable or DiskFull; for a GGUF
        file what `convert` raises.
    """
    path = local_path(uri)
    if uri.startswith(WEB):
        from pagoda_runtime.models.web import fetch_folder

        if revision is not None:
            text = f"--revision (model.revision) is {revision}, but {uri} has no revisions."
            raise FatalError("InvalidFlags", text)
        return fetch_folder(uri, on_progress)
    if uri.startswith(OCI):
        from pagoda_runtime.models.oci import fetch_artifact

        return fetch_artifact(uri, revision, on_progress)
    if path is None:
        return _download(uri.removeprefix("hf://"), revision, on_progress)
    if path.is_dir():
        return path
    from pagoda_runtime.convert.cache import converted

    on_progress("convert", 0.0, 0.0)
    return converted(path, keep_blocks=quantization not in ("none", *ONLINE))


def local_path(uri: str) -> Path | None:
    """The folder or file on this machine that uri names; None: it is a model of a hub, a web server
    or a registry.

    Raises: FatalError: ModelNotFound, it is neither.
    """
    if uri.startswith((*WEB, OCI)):
        return None
    if not uri.startswith("hf://"):
        try:
            path = Path(uri).expanduser()
            if path.exists():
                return path
        except PermissionError as error:
            raise unreadable(uri, error) from error
        except (OSError, RuntimeError) as error:
            raise FatalError("ModelNotFound", f"{uri} is not a path: {error}.") from error
        is_gguf = path.suffix == ".gguf"
        if (
            is_gguf
            or path.is_absolute()
            or uri.startswith((".", "~"))
            or not _HUB_NAME.fullmatch(uri)
        ):
            raise FatalError(
                "ModelNotFound",
                f"The model {'file' if is_gguf else 'folder'} {uri} does not exist. Give --model "
                "(model.uri) a folder in Hugging Face layout, a GGUF file, or hf://org/name.",
            )
    if not _HUB_NAME.fullmatch(uri.removeprefix("hf://")):
        raise FatalError(
            "ModelNotFound", f"{uri!r} is not a model of a hub; it must look like hf://org/name."
        )
    return None


def read_ahead(uri: str, most_bytes: int = 1 << 32) -> None:
    """Ask the system for the first weights of a local folder, in pieces that it takes at once.

    For a thread beside others: it waits where the disk has enough to do. What goes wrong here is
    said when the weights are loaded.
    """
    for path in sorted(Path(uri).glob("*.safetensors")):
        with contextlib.suppress(OSError), path.open("rb") as file:
            size = min(most_bytes, os.fstat(file.fileno()).st_size)
            for offset in range(0, size, _PIECE_BYTES):
                os.posix_fadvise(file.fileno(), offset, _PIECE_BYTES, os.POSIX_FADV_WILLNEED)
            most_bytes -= size


def _download(name: str, revision: str | None, on_progress: OnProgress) -> Path:
    from huggingface_hub import snapshot_download

    on_progress("download", 0.0, 0.0)
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_PATTERNS),
            tqdm_class=_progress_bar(on_progress),
        )
    except Exception as error:
        # All that goes wrong in there is the source's, whichever library under it says so.
        raise _describe_failure(f"hf://{name}", revision, error) from error
    on_progress("download", 100.0, 0.0)
    return Path(folder)


def _describe_failure(uri: str, revision: str | None, error: Exception) -> FatalError:
    """The last words for a download that failed. No request's id: they are the same each time."""
    from huggingface_hub import constants, errors

    chain = list(_causes(error))
    status = next(
        (e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)), 0
    )
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return FatalError(
            "ModelAccessDenied",
            f"{uri} is gated. Accept its terms on the hub and set HF_TOKEN to a token of that "
            "account.",
        )
    if status == 404 or any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        at_revision = f" at revision {revision}" if revision else ""
        return FatalError(
            "ModelNotFound",
            f"{uri} was not found on the hub{at_revision}. Check the name and --revision; for a "
            "private model set HF_TOKEN.",
        )
    if status in (401, 403):
        text = f"The hub refuses {uri} (HTTP {status}). Set HF_TOKEN to a token that may read it."
        return FatalError("ModelAccessDenied", text)
    if any(isinstance(e, errors.HFValidationError) for e in chain):
        return FatalError("ModelNotFound", f"{uri} is not a model of a hub: {chain[0]}")
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        text = f"{uri} is not in the cache, and HF_HUB_OFFLINE forbids to download it."
        return FatalError("ModelNotFound", text)
    if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        text = f"The disk is full: {uri} does not fit in {constants.HF_HUB_CACHE} (HF_HOME)."
        return FatalError("DiskFull", text)
    what = f"HTTP {status}" if status else f"{type(chain[-1]).__name__}: {chain[-1]}"
    return FatalError(
        "SourceUnreachable",
        f"{uri} could not be downloaded from {constants.ENDPOINT}: {what}. Check the network "
        "(NetworkPolicy, proxy) and HF_ENDPOINT, or give --model (model.uri) a local folder.",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, down to the first one."""
    while True:
        yield error
        if (cause := error.__cause__ or error.__context__) is None:
            return
        error = cause


def _progress_bar(on_progress: OnProgress) -> type[Any]:
    """A bar for the hub's client that tells the listener instead of the screen."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    nowhere = SimpleNamespace(write=lambda text: None, flush=lambda: None)

    class ProgressBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": nowhere})

        def update(self, n: float | None = 1) -> bool | None:
            result = super().update(n)
            if self.counts_bytes and self.total:
                percent = min(100.0, 100.0 * self.n / self.total)
                on_progress("download", percent, self.format_dict["rate"] or 0.0)
            return result

    return ProgressBar
