"""What an engine does on a GPU, and the same on a CPU that is treated as one.

`make gpu-check` runs the former where there is a GPU; the latter keeps the tests themselves right
where there is none.
"""

from __future__ import annotations

import pytest

from pagoda_kernels.paged_attention import make_backend
from pagoda_kernels.paged_attention.reference import ReferenceAttention
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.testing import CpuAsDevice
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.platforms.cuda import CudaPlatform


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def platform(request):
    return CpuAsDevice() if request.param == "cpu" else CudaPlatform()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Family → its tiny checkpoint, made when it is asked for."""
    made = {}

    def make(family, **settings):
        if family not in made:
            made[family] = make_tiny_checkpoint(tmp_path_factory.mktemp(family), family, **settings)
        return made[family]

    return make


@pytest.fixture
def num_tokens(platform):
    """That a request gets: few where the reference attends."""
    return 4 if platform.name == "cpu" else 24


@pytest.fixture
def backend(platform):
    """What makes the attention: of those for CPUs only the reference is like one for a GPU."""
    return ReferenceAttention if platform.name == "cpu" else make_backend


@pytest.fixture
def make_runner(platform, backend):
    def make(folder, **settings):
        values = {
            "dtype": "float32",
            "kv_cache_memory_bytes": 1 << 24,
            "block_size": 16,
            "max_model_len": 256,
            "max_num_seqs": 4,
            **settings,
        }
        config = EngineConfig(model=str(folder), device=platform.name, **values)
        return ModelRunner(config, platform=platform, backend=backend)

    return make
