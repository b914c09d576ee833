from __future__ import annotations

import numba
import pytest

from pagoda_kernels.cpu.panels import BF16, E4M3, INT8
from pagoda_kernels.cpu.targets import TARGETS, choose_target, features, targets_of

AVX2 = TARGETS[-1].features


def test_the_best_set_of_instructions_that_a_processor_has_is_chosen():
    everything = frozenset().union(*(target.features for target in TARGETS))
    names = [target.name for target in TARGETS]
    assert [choose_target("x86_64", target.features).name for target in TARGETS] == names
    assert choose_target("x86_64", everything | {"amx-bf16"}) == TARGETS[0]
    # Cooper Lake multiplies bf16, but has no lookup of bytes, which the same kernels need.
    assert choose_target("x86_64", everything - {"avx512vbmi"}).name == "avx512-vnni"


def test_a_processor_of_no_known_kind_gets_kernels_of_its_own():
    assert choose_target("x86_64", AVX2 - {"fma"}) is None
    assert choose_target("aarch64", AVX2) is None
    assert targets_of("aarch64") == ()


@pytest.mark.parametrize("numbers", [BF16, E4M3, INT8])
def test_every_instruction_that_a_kernel_may_need_is_of_some_target(numbers):
    assert any(numbers.features <= target.features for target in TARGETS)


def test_numba_compiles_for_the_chosen_target():
    chosen = [t for t in TARGETS if t.feature_flags == numba.config.CPU_FEATURES]
    assert [target.cpu for target in chosen] == [numba.config.CPU_NAME] * len(chosen)
    assert all(features() == target.features for target in chosen)
