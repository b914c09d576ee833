from __future__ import annotations

import numpy as np
import pytest
import torch

from pagoda_kernels.launch import LaunchRecorder
from pagoda_kernels.transfer import OnTheWay, all_to_device, to_device


def test_what_is_on_the_way_is_not_changed_by_what_comes_after():
    tensor = torch.arange(4)
    sent = OnTheWay(tensor)
    tensor.zero_()
    assert sent.wait().tolist() == [0, 1, 2, 3]


def test_an_array_is_on_the_device_with_its_dtype():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    tensor = to_device(array, torch.device("cpu"))
    assert tensor.dtype is torch.int32
    assert tensor.tolist() == array.tolist()


ARRAYS = [
    np.arange(6).reshape(2, 3),
    np.empty(0, np.float32),
    np.arange(3, dtype=np.float32),
    np.array([7]),
]


def test_arrays_that_are_sent_together_keep_their_shapes_and_dtypes():
    for array, tensor in zip(ARRAYS, all_to_device(ARRAYS, torch.device("cpu")), strict=True):
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
    with LaunchRecorder():
        for array, tensor in zip(ARRAYS, all_to_device(ARRAYS, torch.device("cuda")), strict=True):
            assert tensor.shape == array.shape
            assert tensor.dtype is torch.from_numpy(array).dtype
            assert tensor.storage_offset() * tensor.itemsize % 16 == 0


@pytest.mark.gpu
def test_a_gpu_gets_arrays_that_are_sent_together():
    for array, tensor in zip(ARRAYS, all_to_device(ARRAYS, torch.device("cuda")), strict=True):
        assert np.array_equal(tensor.cpu().numpy(), array)


def test_both_ways_can_be_rehearsed_without_a_device():
    with LaunchRecorder():
        tensor = to_device(np.arange(6), torch.device("cuda"))
        assert tensor.device.type == "cuda"
        OnTheWay(tensor + 1)


@pytest.mark.gpu
def test_a_gpu_sends_what_it_had_when_it_was_asked():
    tensor = to_device(np.arange(1 << 20), torch.device("cuda"))
    sent = OnTheWay(tensor.add_(1))
    tensor.zero_()
    assert np.array_equal(sent.wait(), np.arange(1, (1 << 20) + 1))
