"""`python -m pagoda_runtime` is the command `pagoda`."""

from __future__ import annotations

import sys

from pagoda_runtime.cli import main

sys.exit(main())
