"""Pagoda's paged inference engine and its OpenAI-compatible server.

from pagoda_runtime import LLM, SamplingParams

with LLM("path/to/model") as llm:
    print(llm.generate("The capital of France is")[0].outputs[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagoda_runtime.client.llm import LLM
    from pagoda_runtime.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # Looked up on use, so that `import pagoda_runtime` costs nothing in the processes that need
    # neither the offline class nor its sockets and tokenizer.
    if name == "LLM":
        from pagoda_runtime.client.llm import LLM

        return LLM
    if name == "SamplingParams":
        from pagoda_runtime.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
