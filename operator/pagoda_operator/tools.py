"""The commands for people, of `pagoda-operator` and, as a plugin, of `kubectl pagoda`.

The exit status is for pipelines: 0 all is well, 1 something is wrong with the service, 2 the
command could not be done.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import yaml

from pagoda_operator.causes import is_ready
from pagoda_operator.checkpoint import CheckpointError, read_checkpoint
from pagoda_operator.checks import HUB_VARIABLE
from pagoda_operator.cluster import (
    ApiError,
    ApiServer,
    StartError,
    context_namespace,
    own_namespace,
)
from pagoda_operator.decode import SpecError, camel_case
from pagoda_operator.describe import describe_service, is_well
from pagoda_operator.forecast import Forecast, Paint
from pagoda_operator.gpus import named_products
from pagoda_operator.hub import PUBLIC_HUB, Hub, Unreadable
from pagoda_operator.inspection import HF, HTTPS, tell
from pagoda_operator.model_files import read_model
from pagoda_operator.names import KIND, LABEL_SERVICE, Key, Manifest
from pagoda_operator.observe import list_events
from pagoda_operator.pod import CREDENTIALS
from pagoda_operator.preflight import Preflight, check, of_checkpoint_error
from pagoda_operator.render import render_children
from pagoda_operator.spec import LLMService, parse
from pagoda_operator.telemetry import Telemetry

COMMANDS = ("plan", "status", "inspect")
LIMITS = {
    "tensor_parallel_size": (1, 16),
    "max_model_len": (2, 16_777_216),
    "max_num_seqs": (1, 65_536),
    "gpu_memory_percent": (10, 98),
}
"""Of numbers that sizes are made of, as the CRD has them (`tests/contract`)."""
LOG_VARIABLE, TERMINATION_LOG = "PAGODA_TERMINATION_LOG", "/dev/termination-log"
_STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}


class UsageError(Exception):
    """The command cannot be done; the message says why and what helps."""


def main(arguments: Sequence[str], prog: str = "pagoda-operator") -> int:
    """Run one of COMMANDS. Returns the exit status."""
    options = _make_parser(prog).parse_args(arguments)
    try:
        return int(asyncio.run(options.run(options, sys.stdout)))
    except (UsageError, ApiError, StartError, OSError) as error:
        print(f"{prog} {options.command}: {error}", file=sys.stderr)
        return 2


def kubectl_main() -> None:
    sys.exit(main(sys.argv[1:], "kubectl pagoda"))


def make_paint(stream: TextIO, environment: Mapping[str, str]) -> Paint:
    """Colours on a terminal, unless NO_COLOR is set."""
    if not stream.isatty() or environment.get("NO_COLOR"):
        return lambda text, style: text
    return lambda text, style: f"\033[{_STYLES[style]}m{text}\033[0m"


def read_services(text: str, namespace: str) -> list[LLMService]:
    """The LLMServices of a file with manifests, with the CRD's defaults.

    Raises:
        UsageError: there are none, or one cannot be understood.
    """
    try:
        documents = [it for it in yaml.safe_load_all(text) if isinstance(it, dict)]
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"the file is not YAML: {error}") from error
    lists = (it["items"] if isinstance(it.get("items"), list) else [it] for it in documents)
    items = [item for some in lists for item in some]
    found = [it for it in items if isinstance(it, dict) and it.get("kind") == KIND]
    if not found:
        raise UsageError(f"the file has no object of kind {KIND}.")
    return [_parse(manifest, namespace) for manifest in found]


def _parse(manifest: Manifest, namespace: str) -> LLMService:
    metadata = manifest.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name = metadata.get("name")
    if not isinstance(name, str) or not name:
        raise UsageError(f"an object of kind {KIND} has no metadata.name.")
    known = {"namespace": namespace, **metadata, "uid": "", "generation": 1}
    try:
        service = parse({**manifest, "metadata": known})
        for field, (least, most) in LIMITS.items():
            value = getattr(service.spec.engine, field)
            if value is not None and not least <= value <= most:
                where = f"spec.engine.{camel_case(field)}"
                raise UsageError(f"{name}: {where} is {value}; it can be {least} to {most}.")
        # What is needed of lists and maps, the schema says only.
        render_children(service, engine_image="")
    except SpecError as error:
        raise UsageError(f"{name}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        hint = "`kubectl apply --dry-run=server` says where"
        raise UsageError(f"{name}: the API server would refuse it; {hint}: {error!r}") from error
    return service


async def _plan(options: argparse.Namespace, stream: TextIO) -> int:
    try:
        text = sys.stdin.read() if options.filename == "-" else Path(options.filename).read_text()
    except UnicodeDecodeError as error:
        raise UsageError(f"{options.filename} is no text: {error}") from error
    services = read_services(text, options.namespace)
    paint, is_good = make_paint(stream, os.environ), True
    for service in services:
        hub = None
        if options.hub_endpoint:
            scheme = "https" if service.spec.model.uri.startswith(HTTPS) else "hf"
            (variable,) = CREDENTIALS[scheme]
            hub = Hub(options.hub_endpoint, os.environ.get(variable))
        forecast = await _forecast(service, options, hub)
        is_good &= not forecast.preflight.problems
        if options.output == "yaml":
            children = render_children(service, engine_image=options.engine_image)
            stream.write(yaml.safe_dump_all(children.values(), sort_keys=False))
        else:
            stream.writelines(f"{line}\n" for line in forecast.lines(paint))
    return 0 if is_good else 1


async def _inspect(options: argparse.Namespace, stream: TextIO) -> int:
    """Tell of a model what a Job is for, on the terminal and in the termination message."""
    try:
        endpoint = os.environ.get(HUB_VARIABLE, PUBLIC_HUB)
        (variable,) = CREDENTIALS["https" if options.model.startswith(HTTPS) else "hf"]
        hub = Hub(endpoint, os.environ.get(variable))
        answer = await read_model(options.model, options.revision, hub)
        line = tell(answer.config, answer.tensors)
    except Unreadable as error:
        _leave(str(error))
        raise UsageError(str(error)) from error
    _leave(line)
    stream.write(f"{line}\n")
    return 0


def _leave(message: str) -> None:
    """A container's last message, where there is a place for it."""
    if (log := Path(os.environ.get(LOG_VARIABLE, TERMINATION_LOG))).exists():
        log.write_text(message)


async def _status(options: argparse.Namespace, stream: TextIO) -> int:
    namespace = options.namespace or own_namespace() or context_namespace(options.context)
    api = await ApiServer.connect(Telemetry(), options.context)
    try:
        now, paint = datetime.now(UTC), make_paint(stream, os.environ)
        lines, is_good = await show(api, Key(namespace, options.name), now, paint)
    finally:
        await api.close()
    stream.writelines(f"{line}\n" for line in lines)
    return 0 if is_good else 1


async def show(api: ApiServer, key: Key, now: datetime, paint: Paint) -> tuple[list[str], bool]:
    """The text about a service, and whether it is well.

    Raises:
        UsageError: there is none.
        ApiError
    """
    service = await api.get(KIND, key.namespace, key.name)
    if service is None:
        raise UsageError(f"there is no LLMService {key.name} in the namespace {key.namespace}.")
    pods = await api.list("Pod", key.namespace, f"{LABEL_SERVICE}={key.name}")
    unready = {pod["metadata"]["name"]: "type=Warning" for pod in pods if not is_ready(pod)}
    events = await list_events(api, key.namespace, unready)
    return list(describe_service(service, pods, events, now, paint)), is_well(service)


async def _forecast(service: LLMService, options: argparse.Namespace, hub: Hub | None) -> Forecast:
    children = list(render_children(service, engine_image=options.engine_image))
    spec = service.spec
    if options.gpu and not named_products(spec):
        gpu = replace(spec.resources.gpu, products=(options.gpu,))
        spec = replace(spec, resources=replace(spec.resources, gpu=gpu))
    folder, model = options.model_folder, spec.model
    try:
        if not folder and (hub is None or not model.uri.startswith((HF, HTTPS))):
            raise Unreadable(f"{model.uri} is not read from here; give --model-folder")
        answer = await read_model(folder or model.uri, model.revision, hub)
        checkpoint = read_checkpoint(answer.config, answer.tensors)
    except Unreadable as error:
        if folder:
            raise UsageError(f"--model-folder: {error}") from error
        why = f"The model was not checked: {error}."
        return Forecast(service, children, None, Preflight(warnings=(why,)))
    except CheckpointError as error:
        return Forecast(service, children, None, of_checkpoint_error(error))
    return Forecast(service, children, checkpoint, check(spec, checkpoint))


def _make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan",
        help="say what an LLMService would become",
        description="Say what would be created, how the model fits the GPU, and what is wrong. "
        "Exit status: 0 nothing is wrong, 1 it would not serve, 2 the file cannot be read.",
        allow_abbrev=False,
    )
    plan.add_argument("-f", "--filename", required=True, help="a file with LLMServices; - is stdin")
    plan.add_argument("-n", "--namespace", default="default", help="of objects that name none")
    plan.add_argument("--model-folder", help="a copy of the model's folder on this machine")
    plan.add_argument("--gpu", help="the product, where resources.gpu.products names none")
    plan.add_argument(
        "--hub-endpoint",
        default=os.environ.get(HUB_VARIABLE, PUBLIC_HUB),
        help="of hf:// models (HF_ENDPOINT); empty: nothing is read",
    )
    plan.add_argument("--engine-image", default="pagoda-runtime", help="of -o yaml")
    plan.add_argument("-o", "--output", choices=("text", "yaml"), default="text")
    plan.set_defaults(run=_plan)
    inspect = commands.add_parser(
        "inspect",
        help="say what preflight needs to know of a model (what the operator's Jobs run)",
        allow_abbrev=False,
    )
    inspect.add_argument("model", help="a folder, hf://ORG/NAME or https://HOST/PATH")
    inspect.add_argument("--revision", help="branch, tag or commit of a hub's model")
    inspect.set_defaults(run=_inspect)
    status = commands.add_parser(
        "status",
        help="say how an LLMService is",
        description="Say how an LLMService is, and why. Exit status: 0 its spec is in force, 1 not "
        "yet or never, 2 it is not there.",
        allow_abbrev=False,
    )
    status.add_argument("name", help="of the LLMService")
    status.add_argument("-n", "--namespace", help="by default the kubeconfig's")
    status.add_argument("--context", help="of the kubeconfig")
    status.set_defaults(run=_status)
    return parser
