from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import configuration, manifests, network
from cluster.base_image import pick_mirror
from cluster.binaries import content_key, kubernetes_version
from cluster.components import api_server, etcd, kubelet
from cluster.images import IMAGES, content_tag
from cluster.mount_points import make, remove
from cluster.pki import IDENTITIES, extensions, subject
from cluster.settings import ROOT, Settings
from cluster.store import KEPT_TAGS, prune_registry, superseded_images

SETTINGS = Settings(state=Path("/s"), cache=Path("/c"))


def test_the_folders_come_from_the_environment() -> None:
    settings = Settings.from_environment({"HOME": "/home/a"})
    assert settings == Settings(
        Path("/var/lib/pagoda-cluster"), Path("/home/a/.cache/pagoda/cluster")
    )
    settings = Settings.from_environment({"PAGODA_CACHE": "/k", "PAGODA_CLUSTER_DIR": "/r"})
    assert settings == Settings(Path("/r"), Path("/k/cluster"))


def test_a_content_key_changes_with_content_and_not_with_the_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "go.mod").write_text("module a")
    first = content_key([tmp_path / "one" / "go.mod"])
    assert first == content_key([tmp_path / "two" / "go.mod"])
    (tmp_path / "two" / "go.mod").write_text("module b")
    assert first != content_key([tmp_path / "two" / "go.mod"])


def test_an_image_tag_changes_when_a_file_moves(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    before = content_tag(tmp_path, [Path("a.py")])
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert content_tag(tmp_path, [Path("b.py")]) != before


def test_every_image_is_made_from_its_own_code_and_requirements_only() -> None:
    operator, runtime = ({str(path) for path in image.files(ROOT)} for image in IMAGES)
    assert "requirements/operator.txt" in operator
    assert "requirements/runtime.txt" in runtime
    assert not any(path.startswith(("runtime/", "kernels/")) for path in operator)
    assert not any(path.startswith("operator/") for path in runtime)
    assert not any("__pycache__" in path for path in operator | runtime)


def test_the_containerfile_copies_nothing_that_is_not_in_the_tag() -> None:
    known = {str(path) for image in IMAGES for path in image.files(ROOT)}
    for line in (ROOT / "Containerfile").read_text().splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert source in known or any(path.startswith(source + "/") for path in known)


def test_the_mirror_is_that_of_the_releases() -> None:
    lines = (
        "http://security.example bookworm-security Debian-Security\n"
        "http://other.example bookworm-updates Debian\n"
        "http://mirror.example/debian bookworm Debian\n"
    )
    assert pick_mirror(lines) == "http://mirror.example/debian"
    assert pick_mirror("http://archive.example noble Ubuntu\n") is None


def test_the_version_of_kubernetes_is_that_of_the_module() -> None:
    assert kubernetes_version("require k8s.io/kubernetes v1.36.3\n") == "v1.36.3"


def test_a_certificate_of_a_client_serves_nothing() -> None:
    by_name = {identity.name: identity for identity in IDENTITIES}
    assert extensions(by_name["admin"]) == "extendedKeyUsage=clientAuth\n"
    assert "IP:10.96.0.1" in extensions(by_name["apiserver"])
    assert subject(by_name["kubelet"]) == "/O=system:nodes/CN=system:node:pagoda-node"


def test_no_program_listens_beyond_this_machine() -> None:
    """Loopback or the bridge, whose addresses are routed nowhere."""
    inside = ("127.0.0.1", network.NODE_IP)
    for program in (etcd(SETTINGS), api_server(SETTINGS)):
        flags = dict(
            flag.removeprefix("--").split("=", 1) for flag in program.command if "=" in flag
        )
        listening = [value for name, value in flags.items() if name.startswith(("listen", "bind"))]
        assert listening
        assert all(any(address in value for address in inside) for value in listening)
    assert configuration.kubelet(SETTINGS)["address"] in inside
    assert configuration.registry(Path("/b"))["http"]["addr"].startswith("127.0.0.1:")


def test_everything_of_the_node_lies_in_the_cluster_folder() -> None:
    assert "--root-dir=/s/kubelet" in kubelet(SETTINGS).command
    assert configuration.kubelet(SETTINGS)["podLogsDir"] == "/s/pod-logs"
    assert json.loads(network.cni_configuration(SETTINGS))["plugins"][0]["ipam"]["dataDir"] == (
        "/s/cni/addresses"
    )


def test_the_audit_log_holds_every_write_once_and_what_installed_operators_read() -> None:
    policy = configuration.audit_policy()
    assert policy["omitStages"] == ["RequestReceived"]
    writes, controllers, installed, rest = policy["rules"]
    assert controllers["level"] == "None"
    assert installed == {"level": "Metadata", "userGroups": ["system:serviceaccounts"]}
    assert set(writes["verbs"]) == {"create", "update", "patch", "delete", "deletecollection"}
    assert rest == {"level": "None"}


def test_the_name_service_has_the_address_that_kubelet_gives_to_pods() -> None:
    services = [item for item in manifests.system_objects()["items"] if item["kind"] == "Service"]
    assert [services[0]["spec"]["clusterIP"]] == configuration.kubelet(SETTINGS)["clusterDNS"]


@pytest.mark.parametrize("is_used", [False, True])
def test_a_mount_point_of_ours_goes_unless_somebody_uses_it(tmp_path: Path, is_used: bool) -> None:
    record, folder = tmp_path / "state" / "record", tmp_path / "run" / "x"
    make(folder, record)
    make(tmp_path, record)
    if is_used:
        (folder / "theirs").touch()
    remove(record)
    assert folder.exists() == is_used
    assert tmp_path.exists()


def test_images_that_the_registry_forgot_are_superseded_under_all_their_names() -> None:
    listing = """REF TYPE DIGEST SIZE PLATFORMS LABELS
127.0.0.1:5000/pagoda-runtime:old type sha256:aa 1 linux -
127.0.0.1:5000/pagoda-runtime@sha256:aa type sha256:aa 1 linux -
sha256:c0 type sha256:aa 1 linux -
127.0.0.1:5000/pagoda-runtime:new type sha256:bb 1 linux -
example.org/else:1 type sha256:dd 1 linux -
"""
    assert superseded_images(listing, {"127.0.0.1:5000/pagoda-runtime:new"}) == [
        "127.0.0.1:5000/pagoda-runtime:old",
        "127.0.0.1:5000/pagoda-runtime@sha256:aa",
        "sha256:c0",
    ]


def test_the_registry_keeps_the_newest_tags(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path / "state", cache=tmp_path)
    tags = tmp_path / "registry/docker/registry/v2/repositories/pagoda-x/_manifests/tags"
    for number in range(KEPT_TAGS):
        (tags / str(number)).mkdir(parents=True)
    prune_registry(settings, "pagoda-x")
    assert len(list(tags.iterdir())) == KEPT_TAGS
