"""A control plane without a node, for what asks the API alone; as many at once as folders.

The API server, its store, the controllers and the scheduler are those of the cluster. Pods get as
far as a node that a test made up.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from . import components, configuration, pki
from .binaries import ensure_binaries
from .lifecycle import api_says, has_default_account, one_at_a_time, wait_for
from .packages import ensure_packages
from .processes import start, stop
from .settings import ClusterError, Settings

NAMES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


def up(settings: Settings) -> Settings:
    """Start one in `settings.state`, which is new or empty, on free ports of loopback.

    Returns: the settings with its ports; `kubeconfig` and `audit_log` are in the folder.
    """
    if settings.state.exists() and any(settings.state.iterdir()):
        raise ClusterError(f"{settings.state} is not empty: take a new folder.")
    with one_at_a_time(settings):
        ensure_packages(settings)
        ensure_binaries(settings)
    etcd_port, api_port = _free_ports()
    settings = replace(settings, api_ip="127.0.0.1", api_port=api_port, etcd_port=etcd_port)
    pki.write_certificates(settings)
    pki.write_kubeconfigs(settings)
    configuration.write_all(settings)
    start(settings, components.etcd(settings))
    start(settings, components.api_server(settings))
    wait_for(settings, "kube-apiserver", lambda: api_says(settings, "/readyz") == "ok")
    start(settings, components.controller_manager(settings))
    start(settings, components.scheduler(settings))
    wait_for(settings, "kube-controller-manager", lambda: has_default_account(settings))
    return settings


def down(settings: Settings) -> None:
    """Stop it and remove its folder."""
    for name in reversed(NAMES):
        stop(settings, name)
    shutil.rmtree(settings.state, ignore_errors=True)


@contextmanager
def control_plane(settings: Settings) -> Iterator[Settings]:
    """One for a while."""
    try:
        yield up(settings)
    finally:
        down(settings)


def _free_ports() -> tuple[int, int]:
    """One with a free port after it, for the store, and one for the API server."""
    while True:
        with ExitStack() as held:
            first, second, api = (held.enter_context(socket.socket()) for _ in range(3))
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            api.bind(("127.0.0.1", 0))
            return port, api.getsockname()[1]
