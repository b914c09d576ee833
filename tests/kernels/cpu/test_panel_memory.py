from __future__ import annotations

import gc

import torch

from pagoda_kernels.cpu.panel_memory import PanelMemory


def test_matrices_lie_behind_each_other_as_zeros_and_none_in_another():
    memory = PanelMemory()
    first = memory.zeros(3, 50, dtype=torch.bfloat16)
    second = memory.zeros(7, dtype=torch.uint8)
    assert not first.any()
    assert not second.any()
    first.fill_(1)
    assert not second.any()
    # 300 bytes, and then the next multiple of 64.
    assert second.data_ptr() - first.data_ptr() == 320
    assert first.data_ptr() % (2 << 20) == 0


def test_what_has_no_room_left_gets_a_mapping_of_its_own():
    memory = PanelMemory()
    small = memory.zeros(16, dtype=torch.int16)
    large = memory.zeros(300 << 20, dtype=torch.uint8)
    large[-1] = 7
    assert large.data_ptr() % (2 << 20) == 0
    assert not small.any()


def test_a_matrix_outlives_the_memory_that_it_came_from():
    memory = PanelMemory()
    matrix = memory.zeros(1 << 20, dtype=torch.uint8)
    matrix.fill_(5)
    del memory
    gc.collect()
    assert (matrix == 5).all()
