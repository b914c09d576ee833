"""What an engine that ended left behind, in the words of its user. Pure."""

from __future__ import annotations

import json
import re

from pagoda_operator.flags import API_KEYS_PATH, MODELS_PATH, model_claim
from pagoda_operator.spec import LLMServiceSpec

# Contract with the runtime: the reasons of its last words (`tests/contract`).
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
# The pod's own next attempt may succeed: nobody has to act.
TRANSIENT_REASONS = ("SourceUnreachable",)


def parse_last_words(message: str) -> tuple[str, str] | None:
    """Reason and message of the JSON line in a termination log; None if there is none."""
    for line in reversed(message.splitlines()):
        try:
            words = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(words, dict) and words.get("reason") in FATAL_REASONS:
            return str(words["reason"]), str(words.get("message", ""))
    return None


def say_as_user(spec: LLMServiceSpec, reason: str, message: str) -> str:
    """The message in the words of the spec: its fields and its uri, not what they became."""
    if (claim := model_claim(spec.model.uri)) is not None:
        message = re.sub(rf"(?<![\w./-]){MODELS_PATH}(?![\w-])", f"pvc://{claim}", message)
    return _name_field(spec, message) if reason == "InvalidFlags" else message


def _name_field(spec: LLMServiceSpec, message: str) -> str:
    """The message with the field that a wrong flag came from.

    Of most flags that come from a field of their own, the engine names the field itself.
    """
    if (secret := spec.auth.api_keys_secret_ref) is not None:
        whose = f"The Secret {secret.name} of spec.auth.apiKeysSecretRef"
        message = message.replace(f"--api-key-file {API_KEYS_PATH}", whose)
    names = {argument.partition("=")[0] for argument in spec.engine.extra_args}
    is_theirs = "(engine." not in message and any(
        re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", message) for name in names
    )
    return f"spec.engine.extraArgs: {message}" if is_theirs else message
