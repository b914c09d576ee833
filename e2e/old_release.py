"""The release at commit 2c9d34d: its chart, and an image of its operator, from a fixture.

fixtures/release-2c9d34d.tar.gz is `git archive 2c9d34d charts operator/pagoda_operator`. The image
is today's, whose locked dependencies are still the same, with that code in place of today's.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import stack
from cluster.buildah import Buildah
from cluster.settings import environment_settings

ARCHIVE = Path(__file__).parent / "fixtures" / "release-2c9d34d.tar.gz"
IMAGE = "127.0.0.1:5000/pagoda-operator-old:2c9d34d"
# Before /opt/pagoda, where today's code is.
CONTAINERFILE = """\
ARG BASE
FROM ${BASE} AS operator
COPY operator/pagoda_operator /opt/old/pagoda_operator
ENV PYTHONPATH=/opt/old
"""


def unpack(folder: Path) -> Path:
    """Unpack the release; returns its chart."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "charts" / "pagoda"


def push_operator(folder: Path, today: str) -> str:
    """Build and push the image of the unpacked release's operator; returns its reference."""
    (folder / "Containerfile").write_text(CONTAINERFILE)
    cache = environment_settings().cache
    buildah, log = Buildah(cache), cache / "logs" / "image-old-operator.log"
    buildah.output("pull", "--quiet", "--tls-verify=false", today)
    buildah.build("operator", today, folder, IMAGE, log)
    buildah.push(IMAGE, log)
    return IMAGE


def apply_crds(target: stack.Target, chart: Path) -> None:
    """The CRD as that release's README had people apply it."""
    crds = str(chart / "crds")
    target.kubectl.run("apply", "--server-side", "--force-conflicts", "-f", crds)
