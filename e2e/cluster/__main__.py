"""The local Kubernetes cluster: `python3 e2e/cluster up|down|status|images|kubeconfig|paths`.

Standard library only, Python 3.11 or newer: it runs before any virtual environment exists.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started as a folder, Python puts this folder itself on the path, where a module called `network`
# or `settings` would hide any other of that name; the package lives one level up.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster.commands import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
