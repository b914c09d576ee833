"""Attention of packed texts against softmax over an explicit mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pagoda_kernels.packed_attention import PackedAttention, PackedPlan
from pagoda_kernels.paged_attention import AttentionSpec, HeadNorm, Rotary
from pagoda_kernels.rotary import rotary

LENS = np.array([3, 1, 300, 17, 150])


def make_spec(num_kv_heads=2, window=0, **settings):
    return AttentionSpec(
        **{
            "num_heads": 4,
            "num_kv_heads": num_kv_heads,
            "head_dim": 16,
            "windows": (window,),
            "scale": 0.3,
            "dtype": torch.float32,
            "kv_dtype": torch.float32,
            "block_size": 1,
            "device": torch.device("cpu"),
            **settings,
        }
    )


def no_rotary(num_tokens):
    nothing = torch.empty(num_tokens, 1, 0)
    return Rotary(nothing, nothing)


def expected_of(qkv, spec, *, is_causal):
    """A text at a time, all scores at once."""
    window, group = spec.windows[0], spec.num_heads // spec.num_kv_heads
    found = []
    for text in qkv.split(LENS.tolist()):
        heads = text.view(len(text), -1, spec.head_dim)
        q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        distances = torch.arange(len(text)) - torch.arange(len(text))[:, None]
        hidden = distances > 0 if is_causal else torch.zeros_like(distances, dtype=torch.bool)
        if window:
            hidden |= distances.abs() >= window
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return torch.cat(found)


class Padding(PackedPlan):
    """A plan as on a GPU."""

    def __init__(self, attention, lens):
        super().__init__(attention, lens)
        self._slices, self._padded = [], self._pad(np.cumsum(lens) - lens, lens)


@pytest.mark.parametrize("plan", [PackedPlan, Padding], ids=["slices", "padded"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both directions"])
@pytest.mark.parametrize(("num_kv_heads", "window"), [(4, 0), (2, 0), (4, 9), (1, 140), (4, 300)])
def test_each_token_attends_to_what_it_sees(num_kv_heads, window, is_causal, plan):
    spec = make_spec(num_kv_heads, window)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(int(LENS.sum()), spec.qkv_size, generator=generator)
    expected = expected_of(qkv, spec, is_causal=is_causal)
    attention = PackedAttention(spec, is_causal=is_causal)
    found = plan(attention, LENS).attend(0, qkv.clone(), no_rotary(len(qkv)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", [PackedPlan, Padding], ids=["slices", "padded"])
def test_layers_with_other_windows_see_what_is_theirs(plan):
    spec = make_spec(num_kv_heads=4, windows=(9, 0, 40))
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(int(LENS.sum()), spec.qkv_size, generator=generator)
    of_step = plan(PackedAttention(spec, is_causal=False), LENS)
    for layer in (0, 1, 2, 0):
        found = of_step.attend(layer, qkv.clone(), no_rotary(len(qkv)))
        own = replace(spec, windows=(spec.windows[layer],))
        torch.testing.assert_close(
            found, expected_of(qkv, own, is_causal=False), rtol=1e-5, atol=1e-5
        )


def test_heads_are_normed_and_rotated_first():
    spec = make_spec(num_kv_heads=2)
    generator = torch.Generator().manual_seed(1)
    num_tokens = int(LENS.sum())
    qkv = torch.randn(num_tokens, spec.qkv_size, generator=generator)
    positions = torch.cat([torch.arange(count) for count in LENS.tolist()])
    angles = Rotary(*rotary(positions, torch.rand(8, generator=generator)))
    norm = HeadNorm(torch.rand(6, 16, generator=generator) + 4.0, torch.tensor(0.1))
    heads = qkv.view(num_tokens, 8, 16).clone()
    qk = heads[:, :6]
    qk = qk / torch.hypot(qk.norm(dim=-1, keepdim=True), norm.floor) * norm.weight
    first, second = qk.chunk(2, dim=-1)
    cos, sin = angles.cos[..., :8], angles.sin[..., 8:]
    heads[:, :6] = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    expected = expected_of(heads.flatten(1), spec, is_causal=False)
    plan = PackedAttention(spec, is_causal=False).plan(LENS)
    found = plan.attend(0, qkv, angles, norm)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scores_that_are_more_than_products_are_refused():
    with pytest.raises(ValueError, match="Soft caps"):
        PackedAttention(make_spec(soft_cap=30.0), is_causal=False)
