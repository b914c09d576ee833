"""The command line of the local cluster."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import control_plane, lifecycle
from .console import say
from .images import ensure_images
from .settings import ClusterError, Settings, environment_settings


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    settings = environment_settings()
    # A user's PATH often lacks the folders where the administrator's programs are.
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    try:
        return _run(options, settings)
    except ClusterError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="e2e/cluster",
        description="A Kubernetes cluster of one node on this machine.",
        epilog="PAGODA_CLUSTER_DIR (/var/lib/pagoda-cluster) holds the running cluster, "
        "PAGODA_CACHE (~/.cache/pagoda) what outlives it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start the cluster; build what is missing")
    commands.add_parser("down", help="stop it and leave nothing but the cache")
    commands.add_parser("status", help="every process and the node; status 1 unless all is up")
    commands.add_parser("kubeconfig", help="print the path of the kubeconfig")
    commands.add_parser("paths", help="print kubectl, helm, kubeconfig and audit log as JSON")
    planes = commands.add_parser("control-plane", help="an API server without a node, in a folder")
    planes.add_argument("action", choices=("up", "down"))
    planes.add_argument("folder", type=Path)
    images = commands.add_parser("images", help="build and push Pagoda's images, print them")
    images.add_argument("--registry", help="push there instead of to the local registry")
    images.add_argument(
        "--tag", help="with --registry: of both images, in place of their contents'"
    )
    return parser


def _run(options: argparse.Namespace, settings: Settings) -> int:
    match options.command:
        case "up":
            started = time.monotonic()
            lifecycle.up(settings)
            say(f"  cluster up after {time.monotonic() - started:.1f} s")
        case "down":
            lifecycle.down(settings)
        case "control-plane":
            place = replace(settings, state=options.folder.absolute())
            if options.action == "up":
                say(json.dumps(lifecycle.paths(control_plane.up(place))))
            else:
                control_plane.down(place)
        case "status":
            say("\n".join(lifecycle.status(settings)))
            return 0 if lifecycle.is_up(settings) else 1
        case "images":
            say(json.dumps(ensure_images(settings, options.registry, options.tag)))
        case "kubeconfig":
            say(str(settings.kubeconfig))
        case "paths":
            say(json.dumps(lifecycle.paths(settings)))
    return 0
