"""What a checkpoint says of its quantization, and whether a flag goes with it; without torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.errors import FatalError
from pagoda_runtime.quantization.compressed_config import read_compressed
from pagoda_runtime.quantization.description import (
    Quantization,
    QuantizationFile,
    Rule,
    everything,
    unquantized,
)
from pagoda_runtime.quantization.schemes import (
    AWQ,
    EXL2,
    FP8_BLOCK_SIZE,
    GGUF,
    GGUF_TYPES,
    GPTQ,
    Rounded,
    ScaledNumbers,
    Scheme,
)

ONLINE: Mapping[str, Scheme] = {
    "fp8": Rounded("fp8"),
    "int8": Rounded("int8"),
    "int4": Rounded("int4"),
}
"""What the matrices of an unquantized checkpoint can be made when they are loaded."""
_HEAD = "lm_head"
_SENSITIVE = re.compile(r".*\bv_proj$")
"""Small, and what int4 costs most: a quarter of the divergence of Gemma 3 270M from its bf16."""


def read_quantization(file: ConfigFile, flag: str | None) -> Quantization | None:
    """How the matrices are stored or to be held; None: unquantized, and to stay so.

    Args:
        file: config.json, beside which GPTQ's old quantize_config.json may lie.
        flag: what --quantization says: None or "none", or a method.
    Raises: FatalError: QuantizationMismatch, or as ConfigFile.read_optional.
    """
    stored = _find_stored(file)
    if stored is None:
        if flag is None or flag == "none":
            return None
        if flag not in ONLINE:
            raise FatalError(
                "QuantizationMismatch",
                f"--quantization {flag} (engine.quantization) was given, but {file.path} has no "
                "quantization_config. Remove the flag, or set it to none or to what weights can be "
                f"rounded to when they are loaded: {', '.join(ONLINE)}.",
            )
        return online(flag)
    method = stored.values.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise stored.invalid("quant_method", method, f"one of {', '.join(READERS)}")
    if flag not in (None, method):
        raise FatalError(
            "QuantizationMismatch",
            f"--quantization {flag} (engine.quantization) was given, but {file.path.parent} is "
            f"quantized by {method} ({stored.path.name}). Remove the flag, or set it to {method}.",
        )
    return READERS[method](stored)


def online(flag: str) -> Quantization:
    """All matrices but that of the vocabulary, rounded as they are loaded; int4 spares v_proj."""
    values = [Rule(_SENSITIVE, ONLINE["int8"])] if flag == "int4" else []
    return Quantization(flag, (unquantized(_HEAD), *values, everything(ONLINE[flag])))


def _find_stored(file: ConfigFile) -> QuantizationFile | None:
    for key in ("quantization_config", "compression_config"):
        if values := file.mapping(key):
            return QuantizationFile(file, values, f"{key}.")
    old = ConfigFile.read_optional(file.path.with_name("quantize_config.json"))
    return QuantizationFile(old, {"quant_method": "gptq", **old.values}, "") if old.values else None


def _unquantized(modules: Iterable[str]) -> tuple[Rule, ...]:
    return tuple(map(unquantized, modules))


def _awq(file: QuantizationFile) -> Quantization:
    file.one_of("bits", None, (4,))
    version = file.read_value("version", "gemm", lambda v: isinstance(v, str), "gemm")
    if version.lower() != "gemm":
        raise file.invalid("version", version, "gemm")
    skipped = _unquantized([_HEAD, *file.names("modules_to_not_convert")])
    return Quantization("awq", (*skipped, everything(AWQ(file.group_size(128)))))


def _gptq(file: QuantizationFile) -> Quantization:
    formats = ("gptq", "gptq_v2")
    file.one_of("pack_dtype", "int32", ("int32",))
    is_v2 = file.one_of("checkpoint_format", "gptq", formats) == formats[1]
    scheme = _gptq_scheme(file, is_v2)
    rules: list[Rule] = [] if file.boolean("lm_head", False) else [unquantized(_HEAD)]
    dynamic = file.part("dynamic")
    for pattern in dynamic.values:
        is_left_out = pattern.startswith("-:")
        regex = dynamic.compile(pattern, re.sub(r"^[+-]:", "", pattern))
        override = dynamic.part(pattern, beside=file.values)
        rules.append(Rule(regex, None if is_left_out else _gptq_scheme(override, is_v2)))
    rules += _unquantized(file.names("modules_to_not_convert"))
    return Quantization("gptq", (*rules, *_gptq_modules(file, scheme)))


def _gptq_scheme(file: QuantizationFile, is_v2: bool) -> GPTQ:
    bits = file.one_of("bits", None, (2, 3, 4, 8))
    return GPTQ(bits, file.group_size(), file.boolean("desc_act", False), is_v2)


def _gptq_modules(file: QuantizationFile, scheme: GPTQ) -> Iterable[Rule]:
    """All modules, or those that the file names, in lists of lists."""
    key = "modules_in_block_to_quantize"
    lists = file.values.get(key)
    if not lists:
        return [everything(scheme)]
    if not isinstance(lists, list) or not all(isinstance(names, list) for names in lists):
        raise file.invalid(key, lists, "a list of lists of names")
    names = [str(name) for some in lists for name in some]
    return [Rule(re.compile(rf"(.*\.)?{re.escape(name)}$"), scheme) for name in names]


def _fp8(file: QuantizationFile) -> Quantization:
    file.one_of("fmt", "e4m3", ("e4m3",))
    activations = file.one_of("activation_scheme", "dynamic", ("dynamic", "static"))
    block, block_size = file.values.get("weight_block_size"), 0
    if block is not None:
        block_size = FP8_BLOCK_SIZE
        if block != [block_size] * 2:
            raise file.invalid("weight_block_size", block, f"{[block_size] * 2} or absent")
    skipped = _unquantized([_HEAD, *file.names("modules_to_not_convert", "ignored_layers")])
    scheme = ScaledNumbers("e4m3", block_size, activations)
    return Quantization("fp8", (*skipped, everything(scheme)))


def _exl2(file: QuantizationFile) -> Quantization:
    return Quantization("exl2", (everything(EXL2()),))


def _gguf(file: QuantizationFile) -> Quantization:
    types = file.part("types")
    modules: dict[GGUF, list[str]] = {}
    for module in types.values:
        scheme = GGUF(types.one_of(module, None, GGUF_TYPES))
        modules.setdefault(scheme, []).append(re.escape(module))
    return Quantization(
        "gguf",
        tuple(Rule(re.compile(f"({'|'.join(names)})$"), some) for some, names in modules.items()),
    )


READERS: Mapping[str, Callable[[QuantizationFile], Quantization]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "exl2": _exl2,
    "gguf": _gguf,
    "compressed-tensors": read_compressed,
}
"""quant_method → what reads the rest."""
