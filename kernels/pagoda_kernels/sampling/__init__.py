"""Draw tokens of rows of logits, on their device, with nothing read by the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pagoda_kernels.launch import uses_triton
from pagoda_kernels.sampling.reference import draw_tokens_reference
from pagoda_kernels.sampling.uniform import make_state, mix, uniform

__all__ = ["Draw", "draw_tokens", "make_state", "mix", "pack_draws", "uniform"]


class Draw(NamedTuple):
    """One draw from a row of logits."""

    row: int
    top_k: int = 0
    """0 and below, and from the vocabulary's size on: all tokens."""
    state: int = 0
    """`make_state` of seed and position."""
    temperature: float = 0.0
    """0: the largest logit, the first of equals; else at least 1e-5."""
    min_p: float = 0.0
    top_p: float = 1.0


def pack_draws(draws: Sequence[Draw]) -> npt.NDArray[np.int64]:
    """[6, num_draws]: the fields of Draw, floats as the bits of float64."""
    rows, top_ks, states, *floats = zip(*draws, strict=True)
    packed = np.empty((6, len(draws)), np.int64)
    packed[0], packed[1] = rows, top_ks
    packed[2] = np.array(states, np.uint64).view(np.int64)
    packed[3:].view(np.float64)[:] = floats
    return packed


def draw_tokens(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """A token for each draw, in proportion to the weights exp(logit / temperature) of those tokens
    that are among the top_k largest, have at least min_p times the largest weight, and are among
    the largest of these that reach top_p of their sum. Of equal logits the lower token is larger.

    A NaN counts as 0. A draw depends on its row and its fields alone.

    Args:
        logits: [num_rows, vocab_size], fp32, fp16 or bf16, rows contiguous.
        draws: [6, num_draws] int64, contiguous, of `pack_draws`.
    Returns: [num_draws] int64.
    Raises: ValueError: shapes, dtypes, layouts or devices do not agree.
    """
    if logits.dim() != 2 or logits.stride(1) != 1 or not logits.dtype.is_floating_point:
        raise ValueError("logits must be [num_rows, vocab_size] floats, rows contiguous.")
    if draws.dim() != 2 or draws.shape[0] != len(Draw._fields) or draws.dtype is not torch.int64:
        raise ValueError(f"draws is {draws.dtype} {list(draws.shape)}; it must be int64 [6, …].")
    if draws.device != logits.device or not draws.is_contiguous():
        raise ValueError("draws must be contiguous, on the device of logits.")
    if uses_triton(logits.device):
        from pagoda_kernels.sampling.kernel import draw_tokens_triton

        return draw_tokens_triton(logits, draws)
    return draw_tokens_reference(logits, draws)
