"""The specification of write_kv_cache in plain torch."""

from __future__ import annotations

import torch


def write_kv_cache_reference(
    kv: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See `pagoda_kernels.write_kv_cache.write_kv_cache`; nothing is checked here."""
    kv_cache.flatten(0, 1).index_copy_(0, slot_mapping, kv)
