"""The exceptions of the runtime, and the reasons of its last words.

    PagodaError
    ├── FatalError(reason, message)     the process cannot serve: it ends non-zero with this message
    └── RequestError(message, param)    one request is wrong: HTTP 400 in OpenAI's error shape
        ├── PromptTooLong               the prompt does not fit the context or the KV cache
        └── ModelNotServed              the named model is not served here: HTTP 404

    TryLater(message, retry_after_seconds)
        ├── QueueFull                   too many requests wait: HTTP 429; nothing is kept
        └── Unavailable                 the server loads or drains: HTTP 503

    EngineDead(message)                 the engine process is gone: HTTP 503, and the server ends

A message names what was wrong, the limit, and the remedy in the user's words (a flag or a file).
"""

from __future__ import annotations

# Contract with the operator (`tests/contract`): a fatal error ends with one JSON line
# {"reason": ..., "message": ...} in the termination log, and reason is one of these.
FATAL_REASONS = (
    "ModelNotFound",
    "ModelAccessDenied",
    "UnsupportedArchitecture",
    "CorruptWeights",
    "QuantizationMismatch",
    "InvalidModelConfig",
    "DoesNotFit",
    "OutOfMemory",
    "GpuOutOfMemory",
    "KvCacheTooSmall",
    "NcclInitFailed",
    "RankDied",
    "DiskFull",
    "InvalidFlags",
    "SourceUnreachable",
)
# What another command line, path or config mends, and no repetition.
USAGE_REASONS = frozenset(
    {
        "InvalidFlags",
        "ModelNotFound",
        "ModelAccessDenied",
        "InvalidModelConfig",
        "UnsupportedArchitecture",
        "QuantizationMismatch",
    }
)
# A user recognises a value by so much of it.
MAX_SHOWN_CHARACTERS = 80
# Long enough for some running requests to end, short enough for a person to wait.
RETRY_AFTER_SECONDS = 2


def shown(value: object) -> str:
    """A user's value as a message repeats it: what is long is cut or described."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        # First cut, then quoted: quoting megabytes takes long.
        value = value if len(value) <= MAX_SHOWN_CHARACTERS else f"{value[:MAX_SHOWN_CHARACTERS]}…"
        return repr(value)
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return repr(value)


class PagodaError(Exception):
    """Root of every error that Pagoda raises on purpose."""


class FatalError(PagodaError):
    """The engine cannot start or go on. `reason` is one of FATAL_REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        assert reason in FATAL_REASONS, reason
        super().__init__(message)
        self.reason = reason
        self.message = message


def unreadable(path: object, error: OSError) -> FatalError:
    """What ends an engine that may not read its model."""
    return FatalError(
        "ModelAccessDenied",
        f"{path} cannot be read: {error.strerror}. Give the user that runs the engine read access "
        "to the model.",
    )


def exit_status(error: PagodaError) -> int:
    """Of the command that ends with this error: 2 if it was called wrongly, as shells have it."""
    return 2 if isinstance(error, FatalError) and error.reason in USAGE_REASONS else 1


class RequestError(PagodaError):
    """One request is wrong; `param` names the field that is to blame, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class PromptTooLong(RequestError):
    """The prompt, or prompt and max_tokens together, exceed what this engine can hold."""


class ModelNotServed(RequestError):
    """The request names a model that this server does not serve."""


class TryLater(PagodaError):
    """The same request may be served later."""

    def __init__(self, message: str, retry_after_seconds: int = RETRY_AFTER_SECONDS) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds


class QueueFull(TryLater):
    """The waiting queue is at its bound: HTTP 429."""


class Unavailable(TryLater):
    """The server loads or drains: HTTP 503."""


class EngineDead(PagodaError):
    """The engine process ended; no request can be served by this server any more."""
