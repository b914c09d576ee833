"""The cluster's certificates and the kubeconfigs that carry them."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from .console import output_of
from .settings import (
    API_SERVICE_IP,
    DNS_DOMAIN,
    NODE_IP,
    NODE_NAME,
    Settings,
)

DAYS = "3650"


@dataclass(frozen=True, slots=True)
class Identity:
    """One certificate: who it says its holder is, and the names and addresses it may serve at."""

    name: str
    user: str
    group: str = ""
    served_at: tuple[str, ...] = ()


API_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc")
IDENTITIES = (
    Identity(
        "apiserver",
        "kube-apiserver",
        served_at=(
            *(f"DNS:{name}" for name in API_NAMES),
            f"DNS:kubernetes.default.svc.{DNS_DOMAIN}",
            "DNS:localhost",
            f"IP:{API_SERVICE_IP}",
            f"IP:{NODE_IP}",
            "IP:127.0.0.1",
        ),
    ),
    Identity("apiserver-to-kubelet", "kube-apiserver-kubelet-client", "system:masters"),
    Identity("front-proxy", "front-proxy-client"),
    Identity("admin", "kubernetes-admin", "system:masters"),
    Identity("controller-manager", "system:kube-controller-manager"),
    Identity("scheduler", "system:kube-scheduler"),
    Identity("proxy", "system:kube-proxy"),
    Identity("coredns", "system:coredns"),
    Identity(
        "kubelet",
        f"system:node:{NODE_NAME}",
        "system:nodes",
        served_at=(f"DNS:{NODE_NAME}", f"IP:{NODE_IP}"),
    ),
)
# Those that call the API server: each gets a kubeconfig.
CLIENTS = ("admin", "controller-manager", "scheduler", "proxy", "coredns", "kubelet")


def write_certificates(settings: Settings) -> None:
    """A new authority, a certificate for each identity, the key of service account tokens."""
    folder = settings.pki
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _new_key(folder / "ca.key")
    output_of(
        *("openssl", "req", "-x509", "-new", "-key", str(folder / "ca.key"), "-days", DAYS),
        *("-subj", "/CN=pagoda-cluster", "-out", str(folder / "ca.crt")),
        *("-addext", "basicConstraints=critical,CA:TRUE"),
        *("-addext", "keyUsage=critical,digitalSignature,keyCertSign,cRLSign"),
    )
    for identity in IDENTITIES:
        _sign(folder, identity)
    # Tokens are signed with ES256 then.
    _new_key(folder / "service-account.key")


def write_kubeconfigs(settings: Settings) -> None:
    for name in CLIENTS:
        path = settings.kubeconfig if name == "admin" else settings.config / f"{name}.kubeconfig"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(kubeconfig(settings, name))


def kubeconfig(settings: Settings, name: str) -> str:
    """A kubeconfig (JSON is YAML) with the certificates inside, so that it can be copied."""

    def data(file: str) -> str:
        return base64.b64encode((settings.pki / file).read_bytes()).decode()

    server = {
        "server": f"https://{settings.api_ip}:{settings.api_port}",
        "certificate-authority-data": data("ca.crt"),
    }
    user = {
        "client-certificate-data": data(f"{name}.crt"),
        "client-key-data": data(f"{name}.key"),
    }
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "pagoda", "cluster": server}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "pagoda", "context": {"cluster": "pagoda", "user": name}}],
            "current-context": "pagoda",
        },
        indent=2,
    )


def subject(identity: Identity) -> str:
    group = f"/O={identity.group}" if identity.group else ""
    return f"{group}/CN={identity.user}"


def extensions(identity: Identity) -> str:
    """Every certificate may call; one with names may be served with, too."""
    usage = "clientAuth,serverAuth" if identity.served_at else "clientAuth"
    lines = [f"extendedKeyUsage={usage}"]
    if identity.served_at:
        lines.append(f"subjectAltName={','.join(identity.served_at)}")
    return "\n".join(lines) + "\n"


def _sign(folder: Path, identity: Identity) -> None:
    key, request = folder / f"{identity.name}.key", folder / f"{identity.name}.csr"
    _new_key(key)
    output_of(
        *("openssl", "req", "-new", "-key", str(key), "-subj", subject(identity)),
        *("-out", str(request)),
    )
    extension_file = folder / f"{identity.name}.ext"
    extension_file.write_text(extensions(identity))
    output_of(
        *("openssl", "x509", "-req", "-in", str(request), "-days", DAYS),
        *("-CA", str(folder / "ca.crt"), "-CAkey", str(folder / "ca.key")),
        *("-set_serial", f"0x{_serial()}", "-extfile", str(extension_file)),
        *("-out", str(folder / f"{identity.name}.crt")),
    )
    request.unlink()
    extension_file.unlink()


def _serial() -> str:
    return "7" + output_of("openssl", "rand", "-hex", "15").strip()


def _new_key(path: Path) -> None:
    path.touch(mode=0o600)
    output_of("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(path))
