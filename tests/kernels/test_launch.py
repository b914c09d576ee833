from __future__ import annotations

import pytest
import torch

from pagoda_kernels.launch import LaunchRecorder, launch, uses_triton


class Kernel:
    """Stands for what @triton.jit returns."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, args, options))


def test_tensors_of_a_recorder_have_their_kernels_noted_and_not_run():
    kernel = Kernel()
    with LaunchRecorder() as recorder:
        x = torch.empty(1000, device="cuda", dtype=torch.bfloat16)
        launch(kernel, [8, 2], x, 1000, BLOCK=128, num_warps=4)
    assert kernel.launches == []
    (noted,) = recorder.launches
    assert noted.kernel is kernel
    assert noted.grid == (8, 2)
    assert noted.args[0].device.type == "cuda"
    assert noted.args[1] == 1000
    assert noted.options == {"BLOCK": 128, "num_warps": 4, "enable_fp_fusion": True}


def test_real_tensors_have_theirs_run():
    kernel, x = Kernel(), torch.zeros(4)
    launch(kernel, [1], x, BLOCK=4)
    assert kernel.launches == [((1,), (x,), {"BLOCK": 4, "enable_fp_fusion": True})]


def test_a_gpu_uses_triton_and_a_cpu_does_not():
    assert uses_triton(torch.device("cuda"))
    assert not uses_triton(torch.device("cpu"))


def test_a_look_at_a_number_and_a_mix_of_devices_raise_under_a_recorder():
    with LaunchRecorder():
        x = torch.zeros(4, device="cuda")
        with pytest.raises(Exception, match=r"data.dependent|aten._local_scalar_dense"):
            x[0].item()
        with pytest.raises(RuntimeError, match="device"):
            x + torch.zeros(4)
