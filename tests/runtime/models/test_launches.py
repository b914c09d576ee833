"""What a decode step of a model launches on a GPU, without one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagoda_kernels.kv_cache import make_kv_cache
from pagoda_kernels.launch import LaunchRecorder
from pagoda_kernels.rotate_and_store import rotate_and_store
from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.models.registry import ARCHITECTURES, make_model
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.unquantized import UnquantizedLinear

GPU = torch.device("cuda", 0)
CONFIG = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


class StoreOnly:
    """A plan of 4 tokens that stores keys and values, and attends to nothing."""

    def __init__(self, model):
        shape = (8, 16, model.heads.num_kv_heads, model.heads.head_dim)
        self.kv_cache, self.heads = make_kv_cache(shape, torch.bfloat16, GPU), model.heads

    def attend(self, layer, qkv, rotary, norm=None, sinks=None):
        slots = torch.empty(4, dtype=torch.int64, device=GPU)
        heads = qkv.view(4, -1, self.heads.head_dim)
        rotate_and_store(heads, *rotary, self.kv_cache, slots, *(norm or ()))
        return qkv.new_empty(4, self.heads.num_heads * self.heads.head_dim)


class Operations(TorchDispatchMode):
    """Counts what torch computes; views and empty tensors are no work."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "aten" and not func.is_view and "empty" not in name:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches_of_a_step(architecture, num_layers):
    values = CONFIG | {"num_hidden_layers": num_layers}
    config = ARCHITECTURES[architecture](ConfigFile(Path("config.json"), values))
    with LaunchRecorder() as recorder, torch.no_grad():
        model = make_model(config, Placement(torch.bfloat16, GPU, UnquantizedLinear))
        model.after_loading()
        model.set_max_model_len(512)
        ids = torch.zeros(2, 4, dtype=torch.int64, device=GPU)
        step = StepInput(*ids, StoreOnly(model))
        with Operations() as operations:
            model.logits(model(step))
    kernels = Counter(launch.kernel.fn.__name__.strip("_") for launch in recorder.launches)
    return kernels + operations.counts


@pytest.mark.parametrize(
    ("architecture", "of_the_step"),
    [
        ("LlamaForCausalLM", {"rotary_kernel": 1}),
        ("Qwen3ForCausalLM", {"rotary_kernel": 1}),
        # Local and global layers are rotated otherwise, and embeddings are scaled.
        ("Gemma3ForCausalLM", {"rotary_kernel": 2, "mul_.Tensor": 1}),
    ],
)
def test_a_layer_is_eight_launches_beside_its_attention(architecture, of_the_step):
    num_layers = 6
    of_layers = {
        "mm": 4,
        "add_and_norm_kernel": 2,
        "rotate_and_store_kernel": 1,
        "gated_activation_kernel": 1,
    }
    expected = Counter({name: num_layers * count for name, count in of_layers.items()})
    # The first norm and the last one, and the product with the vocabulary.
    expected += Counter(of_the_step)
    expected += Counter({"embedding": 1, "_to_copy": 1, "add_and_norm_kernel": 2, "mm": 1})
    assert launches_of_a_step(architecture, num_layers) == expected
