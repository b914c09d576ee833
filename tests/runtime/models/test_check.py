"""What ends `pagoda serve` with status 2 before it listens."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pagoda_runtime.cli import main
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.check import verify_start, verify_tensor_parallel
from pagoda_runtime.models.registry import load_model_config

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def remove(name: str, put: str | None = None):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if put is not None:
            (folder / put).write_text("GGUF")

    return change


def rewrite(text: str):
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("config.json"), ["ModelNotFound", "config.json does not exist"]),
        (remove("config.json", "a.gguf"), ["ModelNotFound", "GGUF files", "tiny/a.gguf"]),
        (remove("tokenizer.json"), ["ModelNotFound", "tokenizer.json does not exist"]),
        (rewrite("[" * 10_000), ["InvalidModelConfig", "config.json is not valid JSON"]),
        (rewrite("{"), ["InvalidModelConfig", "config.json is not valid JSON"]),
        (rewrite(json.dumps({**CONFIG, "hidden_size": 0})), ["InvalidModelConfig", "hidden_size"]),
        (rewrite('{"architectures": ["T5Model"]}'), ["UnsupportedArchitecture", "T5Model"]),
    ],
)
def test_a_folder_that_cannot_be_served_ends_the_command(folder, capsys, change, words):
    change(folder)
    assert main(["serve", str(folder)]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-model-len", "65"], ["--max-model-len", "65", "reaches 64"]),
        (
            ["--tensor-parallel-size", "3"],
            ["is 3; it must divide", "2 attention heads", "one of: 1, 2."],
        ),
        (["--quantization", "awq"], ["--quantization", "awq"]),
    ],
)
def test_flags_that_do_not_go_with_the_model_end_the_command(folder, capsys, flags, words):
    assert main(["serve", str(folder), *flags]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.gguf", ["model file nowhere.gguf does not exist", "GGUF file"]),
        ("/no/such/folder", ["model folder /no/such/folder does not exist"]),
        ("~nobody-here/model", ["ModelNotFound", "~nobody-here/model is not a path"]),
        ("./" + "x" * 300, ["ModelNotFound", "is not a path", "too long"]),
        ("hf://a/b/c", ["'hf://a/b/c'", "hf://org/name"]),
        (__file__, ["is a file, but not in GGUF format"]),
    ],
)
def test_a_model_that_is_not_there_ends_the_command(capsys, name, words):
    assert main(["serve", name]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


@pytest.mark.parametrize("command", [["bench", "latency"], ["run-batch", "-i", "a", "-o", "b"]])
def test_other_commands_refuse_a_wrong_path_as_early(capsys, command):
    assert main([*command, "/no/such/folder"]) == 2
    assert "/no/such/folder does not exist" in capsys.readouterr().err


def test_the_command_neither_listens_nor_loads_the_server_for_a_wrong_path():
    command = [sys.executable, "-X", "importtime", "-m", "pagoda_runtime", "serve", "/no/such"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "ModelNotFound" in result.stderr
    for word in ("Listening", "uvicorn", "torch"):
        assert word not in result.stderr


@pytest.mark.parametrize(
    ("heads", "kv_heads", "intermediate_size", "fitting"),
    [
        (32, 8, 14336, [1, 2, 4, 8, 16, 32]),
        (4, 1, 2048, [1, 2, 4]),
        (14, 2, 4864, [1, 2]),
        (24, 3, 96, [1, 3, 6, 12, 24]),
        (12, 4, 20, [1, 2, 4]),
    ],
)
def test_ranks_must_divide_heads_and_intermediate_size(
    folder, heads, kv_heads, intermediate_size, fitting
):
    of_heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes = {"hidden_size": 2 * heads, "intermediate_size": intermediate_size}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **of_heads, **sizes}))
    model = load_model_config(folder)
    for size in range(1, heads + 2):
        if size in fitting:
            verify_tensor_parallel(model, size)
            continue
        with pytest.raises(FatalError) as caught:
            verify_tensor_parallel(model, size)
        assert f" is {size}; it must divide" in caught.value.message
        assert caught.value.message.endswith(f"one of: {', '.join(map(str, fitting))}.")


def test_a_default_that_no_request_could_have_can_be_left_out(folder):
    (folder / "generation_config.json").write_text('{"repetition_penalty": 0}')
    config = EngineConfig(model=str(folder))
    with pytest.raises(FatalError, match="--generation-config none"):
        verify_start(config)
    verify_start(replace(config, generation_config="none"))
