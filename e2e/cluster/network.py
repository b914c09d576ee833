"""The bridge that pods hang on, the way out of it, and the kernel settings it needs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from .console import output_of
from .settings import BRIDGE, NFT_TABLE, NODE_IP, POD_CIDR, SERVICE_CIDR, ClusterError, Settings

SYSCTLS = Path("/proc/sys")
# What the bridge needs, and what kubelet and kube-proxy set for themselves; all are put back.
WANTED = {"net/ipv4/ip_forward": "1"}
CHANGED_BY_KUBERNETES = (
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "net/netfilter/nf_conntrack_max",
    "net/ipv4/conf/all/route_localnet",
)
# kube-proxy's tables, one for each address family that the kernel has.
KUBE_PROXY_TABLES = ("ip kube-proxy", "ip6 kube-proxy")
CNI_BIN_FOLDERS = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")


def set_up(settings: Settings) -> None:
    """Make the bridge and its way out. Raises ClusterError if its addresses are taken."""
    _refuse_taken_addresses()
    _remember_sysctls(settings)
    for name, value in WANTED.items():
        (SYSCTLS / name).write_text(value)
    # Without it, kernels that have it as a module let a Service's answers bypass the address
    # translation. kube-proxy masquerades everything, so it is no condition.
    subprocess.run(["modprobe", "-aq", "br_netfilter", "overlay"], check=False)
    if not _bridge_exists():
        output_of("ip", "link", "add", BRIDGE, "type", "bridge")
    output_of("ip", "address", "replace", f"{NODE_IP}/{POD_CIDR.split('/')[1]}", "dev", BRIDGE)
    output_of("ip", "link", "set", BRIDGE, "up")
    # Translated before they leave; yet a machine without a default route would refuse them.
    output_of("ip", "route", "replace", SERVICE_CIDR, "dev", BRIDGE)
    _load_rules()


def _refuse_taken_addresses() -> None:
    for interface in json.loads(output_of("ip", "-json", "-4", "address")):
        for address in interface["addr_info"]:
            if interface["ifname"] != BRIDGE and address["local"].startswith("10.244."):
                raise ClusterError(
                    f"{interface['ifname']} has the address {address['local']}: the local cluster "
                    f"needs {POD_CIDR} for its pods. Stop what uses it, or use that cluster with "
                    "make demo CONTEXT=… REGISTRY=…."
                )


def _load_rules() -> None:
    """Pods reach the world with the machine's address; what the firewall forbids, they may.

    One table of our own, so that taking it away takes all of it away.
    """
    rules = f"""
    add table ip {NFT_TABLE}
    delete table ip {NFT_TABLE}
    table ip {NFT_TABLE} {{
        chain out {{
            type nat hook postrouting priority srcnat; policy accept;
            ip saddr {POD_CIDR} ip daddr != {POD_CIDR} masquerade
        }}
    }}
    """
    done = subprocess.run(
        ["nft", "-f", "-"], input=rules, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ClusterError(f"nft refused the cluster's rules: {done.stderr.strip()}")


def tear_down(settings: Settings) -> None:
    """Take away the bridge with what hangs on it, the rules, and put the kernel's settings back."""
    if _bridge_exists():
        for port in json.loads(output_of("ip", "-json", "link", "show", "master", BRIDGE)):
            _ignoring_errors("ip", "link", "delete", port["ifname"])
        output_of("ip", "link", "delete", BRIDGE)
    tables = _nft_tables()
    for table in (f"ip {NFT_TABLE}", *KUBE_PROXY_TABLES):
        if table in tables:
            _ignoring_errors("nft", "delete", "table", *table.split())
    _restore_sysctls(settings)


def _bridge_exists() -> bool:
    command = ["ip", "link", "show", "dev", BRIDGE]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _nft_tables() -> set[str]:
    done = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False)
    return {line.removeprefix("table ").strip() for line in done.stdout.splitlines()}


def _ignoring_errors(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=False)


def _remember_sysctls(settings: Settings) -> None:
    """Write down the settings as they were before the first `up`; a crash must not lose them."""
    path = settings.state / "sysctls.json"
    if path.exists():
        return
    values = {}
    for name in (*WANTED, *CHANGED_BY_KUBERNETES):
        if (SYSCTLS / name).exists():
            values[name] = (SYSCTLS / name).read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def _restore_sysctls(settings: Settings) -> None:
    path = settings.state / "sysctls.json"
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return
    for name, value in values.items():
        target = SYSCTLS / name
        if target.exists() and target.read_text().strip() != value:
            target.write_text(value)
    path.unlink()


def cni_bin_folder() -> str:
    for folder in CNI_BIN_FOLDERS:
        if (Path(folder) / "bridge").exists():
            return folder
    raise ClusterError(f"the CNI plugins are in none of {', '.join(CNI_BIN_FOLDERS)}.")


def cni_configuration(settings: Settings) -> str:
    """Pods on the bridge, addresses from a folder of ours; no plugin that writes iptables rules."""
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": POD_CIDR, "gateway": NODE_IP}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": str(settings.state / "cni" / "addresses"),
    }
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": ipam,
    }
    plugins = [bridge]
    return json.dumps({"cniVersion": "1.0.0", "name": "pagoda", "plugins": plugins}, indent=2)
