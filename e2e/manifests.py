"""The plain manifests of deploy/, for those who install without Helm: rendered from the chart.

`make manifests` writes them; a test compares them with what this would write.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = ROOT / "deploy" / "operator.yaml"
HEAD = "# The operator for all namespaces, rendered from charts/pagoda by `make manifests`.\n"
MANAGED_BY = "app.kubernetes.io/managed-by"


def render(helm: str) -> str:
    """The chart's objects but for the CRD, which kustomize takes from crds/."""
    command = [helm, "template", "pagoda", str(ROOT / "charts" / "pagoda")]
    command += ["--namespace", "pagoda-system", "--set", "crds.install=false"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    objects = [found for found in yaml.safe_load_all(done.stdout) if found]
    for found in objects:
        # Helm would take them for its own.
        for metadata in (found["metadata"], *_template_metadata(found)):
            metadata["labels"].pop(MANAGED_BY, None)
    return HEAD + yaml.safe_dump_all(objects, sort_keys=False, width=100)


def _template_metadata(found: dict[str, object]) -> list[dict[str, dict[str, str]]]:
    spec = found.get("spec")
    return [spec["template"]["metadata"]] if isinstance(spec, dict) else []


if __name__ == "__main__":
    program = shutil.which("helm")
    if program is None:
        sys.exit("helm is not on the PATH; the local cluster has one: python3 e2e/cluster paths")
    MANIFESTS.write_text(render(program))
    print(MANIFESTS.relative_to(ROOT))
