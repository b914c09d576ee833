"""Make the code that was copied into an image a distribution: metadata, a command, bytecode.

Usage, in the Containerfile: python install.py COMMAND, with pyproject.toml beside this file.
A build of a wheel would say the same, but needs a build system from the network at each change.
"""

from __future__ import annotations

import compileall
import py_compile
import sys
import tomllib
from pathlib import Path

CODE = Path("/opt/pagoda")
COMMANDS = Path(sys.prefix) / "bin"


def main(command: str) -> None:
    project = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    metadata = CODE / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    module, function = project["scripts"][command].split(":")
    script = COMMANDS / command
    script.write_text(
        f"#!{sys.executable}\nimport sys\n\nfrom {module} import {function}\n\n"
        f"sys.exit({function}())\n"
    )
    script.chmod(0o755)
    # By content: the times of files change on their way through an image's layers.
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    if not compileall.compile_dir(CODE, quiet=1, invalidation_mode=mode):
        sys.exit("the code does not compile")


if __name__ == "__main__":
    main(sys.argv[1])
