from __future__ import annotations

from pagoda_runtime.client.environment import engine_environment


def test_the_engine_has_the_environment_of_its_parent_huge_pages_and_short_waits():
    environ = {"HF_HOME": "/data"}
    assert engine_environment(environ) == {
        "HF_HOME": "/data",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "GOMP_SPINCOUNT": "10000",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    }
    assert environ == {"HF_HOME": "/data"}


def test_what_the_user_has_set_stays():
    environ = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
        "GOMP_SPINCOUNT": "7",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    }
    assert engine_environment(environ) == environ
    assert "GOMP_SPINCOUNT" not in engine_environment({"OMP_WAIT_POLICY": "active"})
