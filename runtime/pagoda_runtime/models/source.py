"""Find the model's folder: a local one, or one that is downloaded from a Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagoda_runtime.errors import FatalError

if TYPE_CHECKING:
    from pagoda_runtime.models.weights import OnProgress

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def resolve_model(uri: str, revision: str | None, on_progress: OnProgress) -> Path:
    """The folder with the model's files.

    Args:
        uri: a folder; `hf://org/name`; or `org/name`, if no such folder exists.
        revision: branch, tag or commit on the hub; None: the default branch.
    Raises: FatalError: ModelNotFound or ModelAccessDenied.
    """
    if not uri.startswith("hf://"):
        path = Path(uri).expanduser()
        if path.exists():
            return path
        if path.is_absolute() or uri.startswith((".", "~")) or not _HUB_NAME.fullmatch(uri):
            raise FatalError(
                "ModelNotFound",
                f"The model folder {uri} does not exist. "
                "Give --model (model.uri) a folder in Hugging Face layout, or hf://org/name.",
            )
    name = uri.removeprefix("hf://")
    if not _HUB_NAME.fullmatch(name):
        raise FatalError(
            "ModelNotFound", f"{uri!r} is not a model of a hub; it must look like hf://org/name."
        )
    return _download(name, revision, on_progress)


def _download(name: str, revision: str | None, on_progress: OnProgress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    on_progress("download", 0.0, 0.0)
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_PATTERNS),
            tqdm_class=_progress_bar(on_progress),
        )
    except GatedRepoError as error:
        raise FatalError(
            "ModelAccessDenied",
            f"hf://{name} is gated. Accept its terms on the hub and set HF_TOKEN to a token of "
            "that account.",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at_revision = f" at revision {revision}" if revision else ""
        raise FatalError(
            "ModelNotFound",
            f"hf://{name} was not found on the hub{at_revision}. Check the name and --revision; "
            "for a private model set HF_TOKEN.",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FatalError(
            "ModelNotFound",
            f"hf://{name} could not be downloaded: {error}. Check the network and HF_ENDPOINT, "
            "or give --model a local folder.",
        ) from error
    on_progress("download", 100.0, 0.0)
    return Path(folder)


def _progress_bar(on_progress: OnProgress) -> type[Any]:
    """A bar for the hub's client that tells the listener instead of the screen."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class ProgressBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})

        def update(self, n: float | None = 1) -> bool | None:
            result = super().update(n)
            if self.counts_bytes and self.total:
                percent = min(100.0, 100.0 * self.n / self.total)
                on_progress("download", percent, self.format_dict["rate"] or 0.0)
            return result

    return ProgressBar


class _Nowhere:
    def write(self, text: str) -> None:
        """Drop it."""

    def flush(self) -> None:
        """Nothing is kept."""
