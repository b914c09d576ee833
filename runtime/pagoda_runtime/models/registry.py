"""The architectures that are served, and the way from a model folder to its config and model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.gemma3 import gemma3
from pagoda_runtime.models.generation import read_generation
from pagoda_runtime.models.llama import llama
from pagoda_runtime.models.mistral import mistral
from pagoda_runtime.models.qwen2 import qwen2
from pagoda_runtime.models.qwen3 import qwen3
from pagoda_runtime.quantization.config import read_quantization

if TYPE_CHECKING:
    from pagoda_runtime.models.model import Model
    from pagoda_runtime.quantization.base import Placement

ARCHITECTURES: Mapping[str, Callable[[ConfigFile], ModelConfig]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Gemma3ForCausalLM": gemma3,
}


def make_model(config: ModelConfig, placement: Placement) -> Model:
    """The model of a config, its weights not yet loaded."""
    # Not above: who only reads configs needs no torch.
    from pagoda_runtime.models.model import Model

    return Model(config, placement)


def load_model_config(
    folder: Path, *, quantization: str | None = None, generation_config: str = "auto"
) -> ModelConfig:
    """Read config.json and, if there is one, generation_config.json.

    Args:
        quantization: what the flag --quantization says, or None.
        generation_config: what the flag --generation-config says: auto or none.
    Raises: FatalError: ModelNotFound, ModelAccessDenied, InvalidModelConfig,
        UnsupportedArchitecture or QuantizationMismatch.
    """
    file = ConfigFile.read(folder / "config.json")
    stored = read_quantization(file, quantization)
    architectures = file.values.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise file.invalid("architectures", architectures, "a list with the name of a class")
    for name in architectures:
        if name in ARCHITECTURES:
            config = replace(ARCHITECTURES[name](file), quantization=stored)
            return read_generation(config, file, uses_defaults=generation_config == "auto")
    raise FatalError(
        "UnsupportedArchitecture",
        f"{file.path}: the architecture {architectures[0]} is not supported. "
        f"Supported: {', '.join(ARCHITECTURES)}. Serve a model of one of these.",
    )
