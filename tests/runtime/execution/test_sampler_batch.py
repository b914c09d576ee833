"""All rows at once, as a device samples them, beside row by row."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagoda_kernels.launch import LaunchRecorder
from pagoda_runtime.execution import sampler
from pagoda_runtime.execution.testing import make_row
from pagoda_runtime.sampling_params import SamplingParams

NUM_MIXED = 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [300, 2001, 8192])
def test_a_batch_chooses_what_row_by_row_is_chosen(vocab_size, dtype):
    random = Random(vocab_size)
    rows = [random_row(random, vocab_size) for _ in range(NUM_MIXED)]
    torch.manual_seed(vocab_size)
    logits = (3 * torch.randn(NUM_MIXED, vocab_size)).to(dtype)
    found = sampler.sample(logits, rows, [0, 3], in_batch=True)
    for output, expected in zip(
        found, sampler.sample(logits, rows, [0, 3], in_batch=False), strict=True
    ):
        assert output.token_ids == expected.token_ids
        assert output.token_logprobs == (
            expected.token_logprobs and pytest.approx(expected.token_logprobs, abs=1e-5)
        )
        for token, other in zip(output.logprobs or [], expected.logprobs or [], strict=True):
            assert (token.token_id, token.rank) == (other.token_id, other.rank)
            assert [token_id for token_id, _ in token.top] == [i for i, _ in other.top]


def random_row(random, vocab_size):
    def some(number):
        return tuple(random.choices(range(vocab_size), k=number))

    def maybe(value, default):
        return value if random.random() < 0.3 else default

    params = SamplingParams(
        temperature=random.choice([0.0, 0.5, 1.0, 1.5]),
        top_k=maybe(random.choice([1, 5, 64, 250]), 0),
        top_p=maybe(random.choice([0.001, 0.1, 0.5, 0.9, 0.99]), 1.0),
        min_p=maybe(random.choice([0.01, 0.2]), 0.0),
        presence_penalty=maybe(0.5, 0.0),
        frequency_penalty=maybe(0.2, 0.0),
        repetition_penalty=maybe(1.2, 1.0),
        logit_bias=maybe(dict.fromkeys(some(3), 2.0), {}),
        allowed_token_ids=maybe(some(60), None),
        bad_words_token_ids=maybe((some(1), (7, 9)), ()),
        min_tokens=maybe(9, 0),
        logprobs=maybe(random.choice([0, 4]), None),
        best_of=maybe(3, None),
    )
    return make_row(
        params,
        seeds=[random.getrandbits(64) for _ in range(random.choice([1, 1, 1, 4]))],
        position=random.randrange(1, 5000),
        num_candidates=8 if random.random() < 0.1 else 0,
        history=[*some(30), 7],
        num_prompt_tokens=11,
        num_output_tokens=20,
    )


class Logits:
    """A model of nothing but logits."""

    def __init__(self, knows_argmax):
        self.knows_argmax = knows_argmax

    def argmax(self, hidden):
        return hidden.argmax(-1) if self.knows_argmax else None

    def logits(self, hidden):
        return hidden


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("knows_argmax", [False, True])
def test_the_first_tokens_of_rows_are_where_the_logits_are(in_batch, knows_argmax):
    random = Random(1)
    rows = [random_row(random, 300) for _ in range(NUM_MIXED)]
    logits = 3 * torch.randn(NUM_MIXED, 300)
    started = sampler.start_sampling(Logits(knows_argmax), logits, rows, [0], in_batch=in_batch)
    assert started.token_ids.dtype is torch.int64
    for token_id, row, output in zip(started.token_ids, rows, started.tell(), strict=True):
        assert int(token_id) in range(300)
        assert row.num_candidates or int(token_id) == output.token_ids[0]


class Watch(TorchDispatchMode):
    """Counts copies between host and device, and raises where the device would be waited for."""

    def __init__(self):
        super().__init__()
        self.to_host = self.to_device = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::is_nonzero",
            "aten::equal",
            "aten::masked_select",
        ), name
        if name.startswith("aten::index") and args[1:] and isinstance(args[1], list | tuple):
            assert all(index is None or index.dtype is not torch.bool for index in args[1])
            assert all(index is None or index.is_cuda for index in args[1])
        result = func(*args, **(kwargs or {}))
        if name in ("aten::copy_", "aten::_to_copy"):
            source = args[1] if name == "aten::copy_" else args[0]
            if source.device != result.device:
                # Nothing is waited for.
                assert args[2] if name == "aten::copy_" else kwargs["non_blocking"]
                self.to_host += source.is_cuda
                self.to_device += result.is_cuda
        return result


@pytest.mark.parametrize("seed", range(4))
def test_a_device_is_not_waited_for(seed):
    """Also: no tensors of two devices meet, and no shape depends on numbers."""
    random = Random(seed)
    rows = [random_row(random, 2001) for _ in range(NUM_MIXED)]
    with LaunchRecorder() as recorder, Watch() as watch:
        logits = torch.empty(len(rows), 2001, dtype=torch.bfloat16, device="cuda")
        started = sampler.start_with_logits(logits, rows, [0], in_batch=True)
    assert started.token_ids.is_cuda
    assert started.token_ids.shape == (len(rows),)
    assert (watch.to_device, watch.to_host) == (1, 1)
    assert len(recorder.launches) == 2


def test_a_batch_of_greedy_rows_costs_a_device_little():
    rows = [make_row(SamplingParams(temperature=0.0))] * 5
    with LaunchRecorder() as recorder, Watch() as watch:
        logits = torch.empty(5, 2001, device="cuda")
        sampler.start_with_logits(logits, rows, [0], in_batch=True)
    assert (watch.to_device, watch.to_host) == (1, 1)
    assert len(recorder.launches) == 2


def test_a_draw_that_needs_many_attempts_gets_them():
    torch.manual_seed(0)
    logits = torch.randn(1, 3000) / 4
    rows = [make_row(SamplingParams(top_p=0.002), seeds=range(30), position=3)]
    (expected,) = sampler.sample(logits, rows, in_batch=False)
    assert sampler.sample(logits, rows, in_batch=True) == [expected]
