"""What a request must satisfy to be taken. Client and engine core ask the same questions."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda_runtime.errors import PromptTooLong, QueueFull, RequestError, shown
from pagoda_runtime.ipc.messages import EngineReady
from pagoda_runtime.sampling_params import SamplingParams


def verify_fits(
    prompt_token_ids: Sequence[int], sampling_params: SamplingParams, facts: EngineReady
) -> None:
    """Raise RequestError or PromptTooLong for what this engine can never serve."""
    _verify_token_ids(prompt_token_ids, facts)
    if facts.pooler is not None:
        _verify_text_fits(len(prompt_token_ids), facts)
        return
    sampling_params.verify_token_ids(facts.vocab_size)
    num_prompt_tokens = len(prompt_token_ids)
    _verify_prompt_fits(num_prompt_tokens, facts)
    verify_max_tokens_fit(num_prompt_tokens, sampling_params.max_tokens, facts)
    _verify_num_sequences(sampling_params, facts)
    _verify_beams_fit(num_prompt_tokens, sampling_params, facts)


def most_tokens(facts: EngineReady) -> int:
    """Tokens of the longest sequence. Its last token is never computed and needs no place; a text
    that is pooled over has no other tokens than its own.
    """
    if facts.pooler is not None:
        return facts.max_model_len
    return min(facts.max_model_len, facts.num_blocks * facts.block_size + 1)


def _verify_num_sequences(sampling_params: SamplingParams, facts: EngineReady) -> None:
    """Raise RequestError if the sequences of the request can never run at once."""
    num_sequences = sampling_params.num_sequences
    limit, flag = facts.max_num_seqs, "--max-num-seqs"
    # Beams take their steps together.
    if sampling_params.use_beam_search and facts.max_num_batched_tokens < limit:
        limit, flag = facts.max_num_batched_tokens, "--max-num-batched-tokens"
    if num_sequences > limit:
        names = ("beam_width", "best_of", "n")
        name = next(name for name in names if getattr(sampling_params, name) == num_sequences)
        raise RequestError(
            f"{name} is {num_sequences}; this engine runs {limit} sequences at once "
            f"({flag}), and those of a request run together.",
            param=name,
        )


def _verify_beams_fit(
    num_prompt_tokens: int, sampling_params: SamplingParams, facts: EngineReady
) -> None:
    """Raise RequestError if the beams, which run together, may need more blocks than there are.

    They share the full blocks of the prompt; in the worst case each has all others for itself.
    """
    if not sampling_params.use_beam_search:
        return
    width, block_size, num_blocks = sampling_params.num_beams, facts.block_size, facts.num_blocks
    num_left = most_tokens(facts) - num_prompt_tokens
    num_tokens = min(sampling_params.max_tokens or num_left, num_left)
    num_shared = num_prompt_tokens // block_size
    # The last token is not computed. One more block holds what the beams part from.
    num_own = -(-(num_prompt_tokens + num_tokens - 1) // block_size) - num_shared
    needed = num_shared + width * num_own + 1
    if needed > num_blocks:
        raise RequestError(
            f"{width} beams of {num_tokens} tokens after a prompt of {num_prompt_tokens} may need "
            f"{needed} KV cache blocks; this engine has {num_blocks}. Lower max_tokens or "
            "beam_width, or raise --kv-cache-memory-bytes (CPU) or --gpu-memory-utilization (GPU).",
            param="max_tokens",
        )


def _verify_text_fits(num_tokens: int, facts: EngineReady) -> None:
    if num_tokens > facts.max_model_len:
        raise PromptTooLong(
            f"A text has {num_tokens} tokens; at most {facts.max_model_len} (max_model_len) fit. "
            "Shorten it, or set truncate_prompt_tokens to -1 to use its beginning alone.",
            param="input",
        )


def _verify_prompt_fits(num_prompt_tokens: int, facts: EngineReady) -> None:
    """Raise PromptTooLong if the prompt and one new token can never fit this engine."""
    max_model_len, num_blocks, block_size = facts.max_model_len, facts.num_blocks, facts.block_size
    if num_prompt_tokens + 1 > max_model_len:
        raise PromptTooLong(
            f"The prompt has {num_prompt_tokens} tokens; with max_model_len {max_model_len} at "
            f"most {max_model_len - 1} fit, because the answer needs one. Shorten the prompt, or "
            "raise --max-model-len if the model allows it.",
            param="prompt",
        )
    capacity = num_blocks * block_size
    if num_prompt_tokens + 1 > capacity:
        raise PromptTooLong(
            f"The prompt has {num_prompt_tokens} tokens; the KV cache holds {capacity} "
            f"({num_blocks} blocks of {block_size}), of which the answer needs one. Shorten the "
            "prompt, or raise --kv-cache-memory-bytes (CPU) or --gpu-memory-utilization (GPU).",
            param="prompt",
        )


def verify_max_tokens_fit(
    num_prompt_tokens: int, max_tokens: int | None, facts: EngineReady, name: str = "max_tokens"
) -> None:
    """Raise PromptTooLong if prompt and max_tokens, or its other name, exceed the context."""
    max_model_len = facts.max_model_len
    if max_tokens is not None and num_prompt_tokens + max_tokens > max_model_len:
        raise PromptTooLong(
            f"The prompt has {num_prompt_tokens} tokens and {name} is {max_tokens}, together "
            f"{num_prompt_tokens + max_tokens}; max_model_len is {max_model_len}. Lower {name} to "
            f"at most {max_model_len - num_prompt_tokens}, or shorten the prompt.",
            param=name,
        )


def _verify_token_ids(prompt_token_ids: Sequence[int], facts: EngineReady) -> None:
    """Raise RequestError if the prompt is empty or names a token that the model does not have."""
    what, param = ("prompt", "prompt") if facts.pooler is None else ("text", "input")
    if not prompt_token_ids:
        raise RequestError(f"The {what} has no tokens; it must have at least 1.", param=param)
    for token_id in (min(prompt_token_ids), max(prompt_token_ids)):
        if not 0 <= token_id < facts.vocab_size:
            raise RequestError(
                f"The {what} holds token id {shown(token_id)}; the model's ids run from 0 to "
                f"{facts.vocab_size - 1}.",
                param=param,
            )


def verify_queue_has_room(
    num_open: int, num_new: int = 1, *, max_num_seqs: int, max_num_waiting: int
) -> None:
    """Raise QueueFull if num_new requests are more than the free slots and places in the queue.

    Slots count as room even before the engine has filled them, so that a burst on an idle engine
    is not refused.
    """
    if num_open + num_new > max_num_seqs + max_num_waiting:
        raise QueueFull(
            f"{num_open} requests are here and {num_new} would join them; this engine runs "
            f"{max_num_seqs} (--max-num-seqs) and lets {max_num_waiting} wait (--max-num-waiting). "
            "Try again later."
        )
