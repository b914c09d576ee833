"""What says of a CRD which leaves it has lies in e2e/, where a real API server is asked as well."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "e2e"))
