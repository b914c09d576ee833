"""What Triton does at the first launch of a kernel, as far as it goes without a GPU.

Run in the container of an engine (`test_gpu_image.py`). Prints a line of JSON for this run and each
one before it; ends with status 1 where it compiled anything, so that the kubelet runs it again and
shows whether that was kept.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource

CACHE = Path(os.environ["TRITON_CACHE_DIR"])
# Always the same, because the key of what Triton keeps has it.
LIBCUDA = CACHE.with_name("libcuda")


@triton.jit
def add_one(x, num_values, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_values
    tl.store(x + index, tl.load(x + index, mask=mask) + 1, mask=mask)


def load_libcuda(source: str) -> None:
    """A libcuda.so.1 in which every function that the source names fails with status 1, loaded."""
    names = set(re.findall(r"\bcu[A-Z]\w+", source))
    # cuda.h gives some functions a name with a version behind.
    functions = (f"int {name}{end}(void) {{ return 1; }}" for name in names for end in ("", "_v2"))
    LIBCUDA.mkdir(exist_ok=True)
    (LIBCUDA / "stub.c").write_text("\n".join(functions))
    # What needs a library of this name takes the one that is loaded.
    command = ["gcc", "-shared", "-Wl,-soname=libcuda.so.1", "-o", "libcuda.so.1", "stub.c"]
    subprocess.run(command, cwd=LIBCUDA, check=True)
    ctypes.CDLL(str(LIBCUDA / "libcuda.so.1"), ctypes.RTLD_GLOBAL)


def build_launcher() -> str:
    """Triton's C code that loads and launches kernels, built and imported; returns its file."""
    source = Path(driver.__file__).with_name("driver.c").read_text()
    os.environ["TRITON_LIBCUDA_PATH"] = str(LIBCUDA)
    load_libcuda(source)
    assert callable(driver.CudaUtils().load_binary)
    (library,) = CACHE.rglob("cuda_utils*.so")
    return str(library)


def compile_kernel() -> int:
    """Size in bytes of the kernel's machine code for compute capability 90."""
    signature = {"x": "*fp32", "num_values": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=add_one, signature=signature, constexprs={"BLOCK": 64})
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in binary.asm["ptx"]
    return len(binary.asm["cubin"])


def files() -> set[str]:
    return {str(path) for path in CACHE.rglob("*") if path.is_file()}


def main() -> int:
    before = files()
    found = {"launcher": build_launcher(), "cubin_bytes": compile_kernel(), "uid": os.getuid()}
    num_files_made = len(files() - before)
    with CACHE.with_name("probe.jsonl").open("a+") as runs:
        runs.write(json.dumps({**found, "num_files_made": num_files_made}) + "\n")
        runs.seek(0)
        print(runs.read())
    return 1 if num_files_made else 0


if __name__ == "__main__":
    sys.exit(main())
