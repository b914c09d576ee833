"""The keys and values of one layer in blocks, as numbers of the model's dtype or of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

LARGEST: Mapping[torch.dtype, float] = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e5m2: 57344.0,
    torch.int8: 127.0,
}
"""dtypes of 8 bits, each with its largest number. A token's head is divided by what makes its own
largest number that one."""

FORMATS: Mapping[torch.dtype, str] = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.int8: "int8",
}
"""What Triton kernels call them."""

# A head of zeros is divided by this over the largest number, and not by 0.
LEAST = 1e-30


class KVCache(NamedTuple):
    """What a layer has stored.

    numbers: [num_blocks, block_size, 2, num_kv_heads, head_dim], keys at index 0 and values at 1. A
        token's lie side by side, so one write stores both.
    scales: [num_blocks, block_size, 2, num_kv_heads] fp32, what each head's numbers are times; None
        where they are not of a dtype of LARGEST.
    """

    numbers: torch.Tensor
    scales: torch.Tensor | None

    @property
    def num_blocks(self) -> int:
        return len(self.numbers)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """[num_blocks, …] each, of numbers that any device copies."""
        # torch does not index every tensor of 8-bit floats.
        numbers = self.numbers.view(torch.uint8) if self.scales is not None else self.numbers
        return [numbers] if self.scales is None else [numbers, self.scales]


def make_kv_cache(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> KVCache:
    """Not cleared: unused slots are never read, and untouched pages take no memory.

    Args:
        shape: num_blocks, block_size, num_kv_heads, head_dim.
    """
    num_blocks, block_size, num_kv_heads, head_dim = shape
    heads = (num_blocks, block_size, 2, num_kv_heads)
    return KVCache(
        torch.empty((*heads, head_dim), dtype=dtype, device=device),
        torch.empty(heads, dtype=torch.float32, device=device) if dtype in LARGEST else None,
    )


def token_bytes(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Of a token in one layer."""
    scale_bytes = torch.float32.itemsize if dtype in LARGEST else 0
    return 2 * num_kv_heads * (head_dim * dtype.itemsize + scale_bytes)


def store_reference(kv_cache: KVCache, slot_mapping: torch.Tensor, kv: torch.Tensor) -> None:
    """Store tokens' keys and values, [num_tokens, 2, num_kv_heads, head_dim], at their slots."""
    if kv_cache.scales is None:
        kv_cache.numbers.flatten(0, 1).index_copy_(0, slot_mapping, kv)
        return
    new = KVCache(*quantize(kv.float(), kv_cache.numbers.dtype))
    for stored, some in zip(kv_cache.tensors, new.tensors, strict=True):
        stored.flatten(0, 1).index_copy_(0, slot_mapping, some)


def load_reference(kv_cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
    """[num_slots, 2, num_kv_heads, head_dim] fp32: what is stored there."""
    numbers, *scales = (stored.flatten(0, 1)[slots] for stored in kv_cache.tensors)
    numbers = numbers.view(kv_cache.numbers.dtype).float()
    return numbers * scales[0][..., None] if scales else numbers


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x, [..., head_dim] fp32, as numbers of a dtype of LARGEST, and [...] scales.

    number = round(x * (largest / max|x|)), to the nearest, half to even; scale = max|x| / largest.
    """
    largest = LARGEST[dtype]
    most = x.abs().amax(-1).clamp_min(LEAST)
    # The product may exceed the largest number by the rounding of the factor.
    # A plain number over a tensor would be its product with reciprocals, which are rounded first.
    factor = torch.full_like(most, largest) / most
    scaled = (x * factor[..., None]).clamp(-largest, largest)
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), most / largest
