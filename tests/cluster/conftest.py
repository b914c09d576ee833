"""The cluster's code lies in e2e/, where the tools that run before any installation are."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "e2e"))
