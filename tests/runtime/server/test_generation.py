"""What is counted of a request, however its tokens were grouped on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from pagoda_runtime.client.output_processor import OutputProcessor, TextDelta
from pagoda_runtime.ipc.messages import RequestDelta
from pagoda_runtime.metrics import RequestClock
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.generation import Generation
from pagoda_runtime.server.testing import (
    ByteTokenizer,
    FakeEngine,
    fake_logprobs,
    make_config,
    make_state,
)

TEXT = b"hello world"


class Grouped:
    """The stream of an engine that generates TEXT, of which `size` tokens pile up each time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.is_told = False

    async def __aiter__(self) -> AsyncIterator[RequestDelta]:
        for first in range(0, len(TEXT), self.size):
            token_ids = list(TEXT[first : first + self.size])
            num_tokens = first + len(token_ids)
            yield RequestDelta(
                request_id="r",
                new_token_ids=token_ids,
                logprobs=[fake_logprobs(token_id, -0.5, 0) for token_id in token_ids],
                finish_reason="length" if num_tokens == len(TEXT) else None,
                cumulative_logprob=-0.5 * num_tokens,
                queue_seconds=None if first else 0.0,
            )
            if self.is_told:
                return

    def finish(self, index: int) -> None:
        self.is_told = True

    async def aclose(self) -> None:
        self.is_told = True


async def generate(size: int, params: SamplingParams) -> tuple[Sequence[TextDelta], dict[str, str]]:
    """The deltas, and the metrics afterwards."""
    state = make_state(FakeEngine(make_config().engine), make_config())
    clock = RequestClock(state.metrics, 0.0, num_prompt_tokens=4, max_tokens=11)
    outputs = OutputProcessor(ByteTokenizer(), params, ())
    deltas = [delta async for delta in Generation(Grouped(size), clock, outputs).deltas()]
    lines = state.metrics.render().decode().splitlines()
    return deltas, dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("size", [1, 2, 3, 11])
async def test_tokens_behind_a_stop_string_are_not_counted(size):
    deltas, metrics = await generate(size, SamplingParams(stop=("lo w",)))
    assert "".join(delta.text for delta in deltas) == "hel"
    assert sum(len(delta.token_ids) for delta in deltas) == 7
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "lo w")
    # By which best_of tells the likeliest choices.
    assert deltas[-1].cumulative_logprob == -3.5
    label = '{model_name="fake"}'
    assert float(metrics[f"vllm:generation_tokens_total{label}"]) == 7
    assert float(metrics[f"vllm:request_generation_tokens_sum{label}"]) == 7
    assert float(metrics[f"vllm:inter_token_latency_seconds_count{label}"]) == 6


@pytest.mark.parametrize("size", [1, 4, 11])
async def test_a_stop_string_within_min_tokens_ends_nothing(size):
    deltas, _ = await generate(size, SamplingParams(stop=("l", "ow"), min_tokens=5))
    assert "".join(delta.text for delta in deltas) == "hello wor"
    assert sum(len(delta.token_ids) for delta in deltas) == 10
