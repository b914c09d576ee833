"""The devices that engines run on: asked what depends on the device, so that nobody else is.

Importing this takes no torch with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pagoda_runtime.errors import FatalError
from pagoda_runtime.platforms.base import MemoryBudget, MemoryUse, Platform, Record, Replay
from pagoda_runtime.platforms.cpu import CpuPlatform
from pagoda_runtime.platforms.cuda import CudaPlatform

__all__ = [
    "PLATFORMS",
    "MemoryBudget",
    "MemoryUse",
    "Platform",
    "Record",
    "Replay",
    "choose_platform",
    "describe_default",
]

PLATFORMS: Mapping[str, Platform] = MappingProxyType(
    {platform.name: platform for platform in (CudaPlatform(), CpuPlatform())}
)
"""By name; `auto` is the first that is available."""


def choose_platform(name: str) -> Platform:
    """That of --device. Raises: FatalError: InvalidFlags."""
    for platform in PLATFORMS.values():
        if name in ("auto", platform.name) and platform.is_available():
            return platform
    raise FatalError(
        "InvalidFlags",
        f"--device is {name}, and torch sees no such device here. Use cpu, or auto.",
    )


def describe_default(field: str) -> str | None:
    """In the help of a flag: a default that depends on the device; None if it does not."""
    shown = [
        f"{_show(platform.defaults[field])} with {platform.noun}"
        for platform in sorted(PLATFORMS.values(), key=lambda platform: platform.name)
        if field in platform.defaults
    ]
    return ", ".join(shown) or None


def _show(value: int) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
